"""`eit.train`: the same runs as those of the command line, from Python."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import eit
from eit.config import load_recipe
from eit.training import train as train_module
from eit.training import trainer
from tests.helpers.training import TINY

SMALL = dict(kernel_size=3, stride=1, pool_size=4, embed_dim=16, depth=2, num_heads=2)


@pytest.fixture
def resolved(monkeypatch):
    """The recipes that were given to the trainer, which trains nothing."""
    recipes = []
    monkeypatch.setattr(trainer, "train", lambda recipe: recipes.append(recipe) or dict(epochs=recipe.train.epochs))
    return recipes


def test_a_run_from_python_is_that_of_the_command(folder, tmp_path):
    run = eit.train(
        "cifar10",
        model=SMALL,
        data=dict(root=folder, image_size=16, batch_size=8, workers=0),
        train=dict(epochs=2, warmup_epochs=1),
        out=tmp_path / "python",
    )
    trainer.train(load_recipe("cifar10", [*TINY, f"data.root={folder}", f"out={tmp_path / 'words'}"]))
    assert run["folder"] == str(tmp_path / "python")
    summary = json.loads((tmp_path / "python" / "summary.json").read_text())
    assert run == summary | dict(folder=run["folder"])
    a, b = (load_file(tmp_path / name / "final.safetensors") for name in ("python", "words"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert 0 <= eit.evaluate(run["folder"], folder).top1 <= 100
    again = eit.train(tmp_path / "python" / "recipe.yaml")  # a path; the finished run says so
    assert again == run


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (dict(train=dict(epochs=30), seed=7), ["train.epochs=30", "seed=7"]),
        ({"train.epochs": 30}, ["train.epochs=30"]),
        (dict(augment=dict(crop_aspect=(0.5, 1), hflip=0.5)), ["augment.crop_aspect=[0.5,1]", "augment.hflip=0.5"]),
        (dict(model=dict(schedule=[0, 16, 32, 64])), ["model.schedule=[0,16,32,64]"]),
        (dict(optim=dict(lr=1e-05, lr_batch=None)), ["optim.lr=0.00001", "optim.lr_batch=null"]),
        (dict(loss=dict(class_weights={"0": 2.0, "1": 1})), ["loss.class_weights={'0': 2, '1': 1}"]),
        (dict(data=dict(root=Path("a b/ü"), download=False)), ["data.root=a b/ü", "data.download=false"]),
        (dict(train={}), []),
    ],
)  # fmt: skip
def test_keys_are_those_of_the_command_line(resolved, keys, words):
    wanted = load_recipe("digits", words)
    assert eit.train("digits", **keys)["folder"] == "runs/digits"
    eit.train(load_recipe("digits"), **keys)
    assert resolved == [wanted, wanted]


@pytest.mark.parametrize(
    ("given", "keys", "said"),
    [
        ("digit", {}, "unknown recipe 'digit'; did you mean 'digits'"),
        (3, {}, "train takes the name or path of a recipe, or a Recipe, not int"),
        ("digits", dict(epochs=3), "epochs"),
        ("digits", dict(train=dict(epoch=3)), "unknown recipe key 'train.epoch'"),
        ("digits", dict(train=3), "train"),
        ("digits", dict(train=dict(epochs="many")), "train.epochs=many"),
        ("digits", dict(train=dict(epochs=object())), "train.epochs is of the type object: a number, text or a list"),
        ("digits", dict(data=dict(root=torch.zeros(1))), "data.root is of the type Tensor"),
        ("gone.yaml", {}, "cannot read recipe gone.yaml"),
    ],
)
def test_mistakes_are_one_line(resolved, given, keys, said):
    with pytest.raises(eit.UserError) as error:
        eit.train(given, **keys)
    assert said in str(error.value) and "\n" not in str(error.value) and not resolved


def test_it_is_the_public_name():
    assert eit.train is train_module.train
