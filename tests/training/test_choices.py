"""What a recipe leaves to the data: sizes, batches, weights of classes, the name of the run."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import eit
from eit.config import load_recipe
from eit.data.datasets import open_data
from eit.training import choices
from eit.training.choices import largest_batch, resolve_choices
from eit.training.run_folder import read_recipe, read_summary
from eit.training.trainer import train
from eit.weights import load as weights
from tests.helpers.images import save_digits
from tests.helpers.training import TINY, log, recipe, train_until_killed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Tiny weights that stand for those that are included."""
    folder = save_digits(tmp_path_factory.mktemp("start") / "digits", classes=2, train=8, val=4)
    r = load_recipe(
        "cifar10",
        [*TINY, f"data.root={folder}", f"out={folder.parent / 'run'}", "train.epochs=1", "train.warmup_epochs=0"],
    )
    train(r)
    return r.run_folder() / "final.safetensors"


@pytest.fixture
def included(start, monkeypatch, tmp_path):
    """`cifar10` names the tiny weights; runs/ is in an empty folder."""
    monkeypatch.setitem(weights.INCLUDED, "cifar10", start)
    monkeypatch.chdir(tmp_path)


def class_folders(root, *counts, size=(20, 16)):
    """Class folders directly inside, with as many images each."""
    rng = np.random.default_rng(0)
    for label, count in enumerate(counts):
        (root / f"class{label}").mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (*reversed(size), 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"class{label}" / f"{i}.png")
    return root


def photos(root, *words, recorded=None, device=CPU):
    """The choices for the photos in `root`."""
    r = load_recipe("photos", [f"data.root={root}", *words])
    return resolve_choices(r, recorded, *open_data(r.data), device, "fp32")


def test_class_folders_are_trained_on_in_one_command(included, capsys, tmp_path):
    class_folders(tmp_path / "pets", 10, 10)
    r = load_recipe("photos", ["data.root=pets", "train.epochs=2", "data.workers=0"])
    summary = train(r)
    said = capsys.readouterr().err
    for line in (
        "held out 4 of 20 images for validation, 2 of each class (data.val_fraction)",
        "image size 16, at which the weights cifar10 were trained (data.image_size)",
        "batch size 8, from 16 training images (data.batch_size)",
        "mean and std of the pixels as in cifar10 (data.mean)",
    ):
        assert line in said
    written = read_recipe(tmp_path / "runs/photos")
    assert (written.data.image_size, written.data.batch_size, written.data.val_fraction) == (16, 8, 0.2)
    assert written.data.mean == (0.4914, 0.4822, 0.4465) and written.loss.class_weights is None
    assert summary["folder"] == "runs/photos" and summary["stopped_early"] is False
    assert train(r) == summary and "image size" not in capsys.readouterr().err


def test_a_run_that_continues_keeps_what_was_chosen(included, monkeypatch, capsys, tmp_path):
    class_folders(tmp_path / "pets", 8, 8)
    r = load_recipe("photos", ["data.root=pets", "train.epochs=3", "data.workers=0"])
    train_until_killed(r, 2, monkeypatch)
    before = read_recipe(tmp_path / "runs/photos")
    capsys.readouterr()
    monkeypatch.setattr(choices, "SMALLEST", 4)
    assert train(r)["epochs"] == 3
    assert "batch size" not in capsys.readouterr().err
    assert read_recipe(tmp_path / "runs/photos") == before


@pytest.mark.parametrize(
    ("counts", "value"), [((10, 10), None), ((9, 12), None), ((4, 12), "balanced"), ((30, 10, 20), "balanced")]
)
def test_classes_are_weighed_if_they_are_out_of_balance(included, tmp_path, counts, value):
    assert photos(class_folders(tmp_path / "pets", *counts)).loss.class_weights == value


@pytest.mark.parametrize(("side", "size"), [(20, 32), (63, 32), (64, 64), (300, 96)])
def test_without_weights_the_size_follows_the_images(tmp_path, side, size):
    class_folders(tmp_path / "pets", 2, 2, size=(side + 9, side))
    assert photos(tmp_path / "pets", "model.pretrained=null").data.image_size == size


@pytest.mark.parametrize(("images", "batch"), [(10, 8), (40, 8), (125, 16), (1000, 64)])
def test_the_batch_follows_the_images(included, images, batch):
    r = load_recipe("photos", ["data.image_size=16", "data.val_fraction=null", "loss.class_weights=null"])
    assert resolve_choices(r, None, range(images), [], CPU, "fp32").data.batch_size == batch


@pytest.mark.parametrize(
    ("words", "batch"),
    [
        ([], 36),
        (["augment.mixup=0"], 36),
        (["train.accumulate=3"], 12),
        (["train.accumulate=7"], 4),
        (["train.accumulate=5"], 6),
    ],
)
def test_a_batch_larger_than_the_data_is_capped(folder, capsys, words, batch):
    r = recipe(folder, "data.batch_size=400", *words)
    assert resolve_choices(r, None, *open_data(r.data), CPU, "fp32").data.batch_size == batch
    assert (
        f"batch size {batch} instead of 400, because there are 36 training images (data.batch_size)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("most", [1, 5, 64, 100])
def test_the_largest_batch_that_fits_is_found_by_trying(folder, monkeypatch, most):
    class Full(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 2)

        def forward(self, x):
            if len(x) > most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.layer(x.mean((1, 2, 3))[:, None])

    monkeypatch.setattr(choices, "build_model", lambda *_, **__: Full())
    assert largest_batch(recipe(folder), 32, ["a", "b"], CPU, "fp32") == min(32, 2 ** (most.bit_length() - 1))


def test_not_one_image_that_fits_is_one_line(folder, monkeypatch):
    class Full(torch.nn.Linear):
        def forward(self, x):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: out of memory")

    monkeypatch.setattr(choices, "build_model", lambda *_, **__: Full(1, 1))
    with pytest.raises(eit.UserError, match="not one image of 16 pixels fits"):
        largest_batch(recipe(folder), 32, ["a", "b"], CPU, "fp32")


def test_a_model_of_timm_has_its_own_size_and_statistics(tmp_path):
    class_folders(tmp_path / "pets", 5, 5)
    words = ["model.name=timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"]
    resolved = photos(tmp_path / "pets", *words)
    assert (resolved.data.image_size, resolved.data.mean, resolved.data.std) == (224, (0.5,) * 3, (0.5,) * 3)
    assert resolved.model.pretrained is True


# -- Names of runs, and more epochs


@pytest.fixture
def here(folder, monkeypatch):
    """Recipes whose run folders are below runs/."""
    monkeypatch.chdir(folder.parent)
    return lambda *words: load_recipe("cifar10", [*TINY, f"data.root={folder}", *words])


def test_a_finished_run_with_other_settings_gets_the_next_name(here, folder, capsys):
    first = train(here())
    second = train(here("optim.lr=1e-4", "augment.smoothing=0"))
    assert (first["folder"], second["folder"]) == ("runs/cifar10", "runs/cifar10-2")
    said = capsys.readouterr().err
    assert "runs/cifar10 is a finished run with other settings (augment.smoothing: 0.1 -> 0.0; optim.lr:" in said
    assert "this run gets the folder runs/cifar10-2" in said
    assert train(here("optim.lr=1e-4", "augment.smoothing=0")) == second and train(here()) == first
    other = save_digits(folder.parent / "more", train=8)
    assert train(here(f"data.root={other}"))["folder"] == "runs/cifar10-3"
    assert "(other data)" in capsys.readouterr().err


def test_a_folder_that_the_user_names_gets_no_other_name(folder):
    train(recipe(folder))
    with pytest.raises(eit.UserError, match="another recipe"):
        train(recipe(folder, "optim.lr=0.1"))


def test_a_begun_run_with_other_settings_is_refused_with_three_of_them(here, monkeypatch):
    train_until_killed(here(), 5, monkeypatch)
    words = ["augment.mixup=0", "augment.cutmix=0", "augment.smoothing=0", "augment.hflip=0", "optim.lr=1", "seed=3"]
    with pytest.raises(eit.UserError, match=r"another recipe \(seed: 0 -> 3; augment.*; augment.* and 3 more\)"):
        train(here(*words))


@pytest.mark.parametrize("epochs", [4, 5])
def test_a_finished_run_goes_on_with_more_epochs(here, capsys, epochs):
    train(here())
    summary = train(here(f"train.epochs={epochs}"))
    said = capsys.readouterr().err
    assert f"2 epochs are extended to {epochs}: the learning rate jumps back to the cosine of the longer run" in said
    run = here().run_folder()
    assert (summary["epochs"], summary["extended_from"]) == (epochs, [2])
    assert read_summary(run) == {k: v for k, v in summary.items() if k != "folder"}
    rates = [line["lr"] for line in log(run)]
    assert len(rates) == epochs and rates[2] > rates[1]
    assert train(here(f"train.epochs={epochs}")) == summary
    assert train(here())["folder"] == "runs/cifar10-2"  # fewer epochs are another run


def test_an_extension_that_is_stopped_goes_on(here, monkeypatch):
    train(here())
    longer = here("train.epochs=4")
    train_until_killed(longer, 9, monkeypatch)  # before its first checkpoint
    assert read_summary(longer.run_folder()) is None
    train_until_killed(longer, 13, monkeypatch)
    assert train(longer)["extended_from"] == [2]
    shutil.rmtree(longer.run_folder())
    train(here())
    once = train(longer)
    assert once["extended_from"] == [2]


# -- Early stopping


def test_a_run_stops_when_nothing_is_gained_and_continued_at_the_same_epoch(folder, monkeypatch, capsys):
    scores = iter([50.0, 75.0, 75.0, 75.0, 60.0, 60.0, 60.0, 60.0])

    def evaluate(*_):
        return SimpleNamespace(loss=1.0, top1=next(scores), top5=100.0)

    from eit.training import trainer

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    r = recipe(folder, "train.epochs=8", "train.patience=3")
    train_until_killed(r, 15, monkeypatch)  # in the fourth epoch
    summary = train(r)
    assert (summary["epochs"], summary["best_epoch"], summary["stopped_early"]) == (5, 1, True)
    assert "stopped early: no epoch after epoch 2 was better (train.patience=3)" in capsys.readouterr().err
    assert [line.get("stopped_early") for line in log(r.run_folder())] == [None] * 4 + [True]
    assert train(r) == summary


@pytest.mark.parametrize(
    ("losses", "best"), [([3.0, 2.0, 1.0], 2), ([1.0, 2.0, 3.0], 0), ([2.0, 1.0, 1.0], 1), ([2.0, 3.0, 1.5], 2)]
)
def test_of_epochs_with_the_same_top1_the_one_with_the_lowest_loss_is_the_best(folder, monkeypatch, losses, best):
    from eit.training import trainer

    for patience, expected in ((9, best), ("null", 0)):
        values = iter(losses)
        monkeypatch.setattr(
            trainer, "evaluate", lambda *_, v=values: SimpleNamespace(loss=next(v), top1=75.0, top5=100.0)
        )
        r = recipe(folder, "train.epochs=3", f"train.patience={patience}", f"out={folder.parent / str(patience)}")
        assert train(r)["best_epoch"] == expected
