"""`eit train`."""

import json

import numpy as np
import pytest
from PIL import Image

from eit.weights import load as weights
from tests.cli.conftest import assert_mistake, failed
from tests.helpers.commands import run_eit
from tests.helpers.training import TINY


def test_train_without_a_recipe_prints_the_recipes():
    text = run_eit("train").stdout
    assert text == run_eit("recipes").stdout
    assert all(name in text for name in ("digits", "cifar10", "imagenet_large"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["digit"], ["unknown recipe 'digit'", "did you mean 'digits'?"]),
        (["digits", "model.famly=vit"], ["unknown recipe key 'model.famly'", "did you mean 'model.family'?"]),
        (["digits", "train.epochs=x"], ["train.epochs=x", "valid integer"]),
        (["cifar10"], ["data.root is not set"]),
        (["."], [". is a folder, not a recipe", "eit finetune . trains on the images in it"]),
        (["digits", "--epochs", "9", "train.epochs=3"], ["--epochs and train.epochs=3: give one of the two"]),
        (["digits", "--out", "x", "out=y"], ["--out and out=y: give one of the two"]),
        (["digits", "--data", "/nowhere"], ["data.root=/nowhere is not a folder"]),
        (["digits", "--device", "gpu"], ["train.device=gpu is not one of auto, cpu"]),
        (["digits", "train.epochs=3", "train.warmup_epochs=3"], ["train.warmup_epochs=3 is not less than"]),
        (["digits", "train.log=wandb"], ["wandb is not installed", "eit[wandb]"]),
        (["cifar10", "data.root=/nowhere"], ["/nowhere is not a folder"]),
        (["cifar10", "data.root=.", "data.dataset=wdss/x"], ["data.dataset=wdss/x", "did you mean 'wds'?"]),
        (["cifar10", "data.root=sklearn:iris"], ["sklearn:iris is not a folder", "sklearn:digits is the one"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, words, said):
    assert_mistake(tmp_path, ["train", *words], said)


def photo_folder(root, **classes):
    """Class folders with that many photos each."""
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / name / f"{i}.jpg")
    return root


def one_class(root):
    photo_folder(root, cat=4)


def no_class(root):
    photo_folder(root.parent, **{root.name: 3})


def other_format(root):
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        (root / name / "1.heic").write_bytes(b"x")


def single_images(root):
    photo_folder(root, cat=1, dog=1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda root: None, ["does not exist", "one folder of images per class"]),
        (lambda root: root.write_text("x"), ["is a file", "one folder of images per class"]),
        (lambda root: root.mkdir(), ["has no train/ folder", "it is empty"]),
        (one_class, ["has one class, 'cat': at least two are needed"]),
        (no_class, ["3 images below it are in no class folder"]),
        (other_format, ["no images below it", "2 .heic"]),
        (single_images, ["cannot hold out a part of each class: no class has two images"]),
    ],
)
def test_folders_that_cannot_be_fine_tuned_on(trained, tmp_path, monkeypatch, make, said):
    monkeypatch.setitem(weights.INCLUDED, "cifar10", trained / "runs/mine/final.safetensors")
    make(tmp_path / "pets")
    *_, error = failed(2, "finetune", "pets", cwd=tmp_path).splitlines()
    assert error.startswith("eit: ")
    assert not [part for part in said if part not in error], error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("counts", [dict(cat=3, dog=2), dict(cat=6, dog=1), dict(cat=2, dog=2, cow=9)])
def test_few_photos_are_fine_tuned_on_with_baselines(trained, tmp_path, monkeypatch, counts):
    monkeypatch.setitem(weights.INCLUDED, "cifar10", trained / "runs/mine/final.safetensors")
    photo_folder(tmp_path / "my pets", **counts)
    words = ["finetune", "my pets", "--epochs", "2", "data.workers=0", "--baseline"]
    done = run_eit(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run folder runs/my-pets" in done.stdout
    lines = done.stdout.splitlines()
    assert [line.split("  ")[1] for line in lines[1:4]] == [
        "this run, best epoch",
        "logistic regression on 8x8 thumbnails",
        "nearest neighbour on pooled features",
    ]
    assert f"of {sum(counts.values())} images for validation" in done.stderr
    again = run_eit(*words, "--json", cwd=tmp_path)
    assert "runs/my-pets is finished" in again.stderr and len(json.loads(again.stdout)["baselines"]) == 2


def test_the_options_of_train_are_keys_of_the_recipe(trained):
    words = ["train", "cifar10", *TINY, "train.warmup_epochs=0"]
    words.remove("train.epochs=2")
    done = run_eit(
        *words, "--data", "data", "--epochs", "1", "--device", "cpu", "--out", "runs/short", "--json", cwd=trained
    )
    assert json.loads(done.stdout) | dict(epochs=1, folder="runs/short") == json.loads(done.stdout)


def test_mistakes_about_a_run_folder(trained):
    good = "data/val/digit0/000.png"
    assert "out=data/val/digit0/000.png is a file" in failed(
        2, "train", "cifar10", "data.root=data", f"out={good}", *TINY, cwd=trained
    )
    assert "another recipe" in failed(
        2, "train", "cifar10", "data.root=data", "out=runs/mine", *TINY, "seed=1", cwd=trained
    )
