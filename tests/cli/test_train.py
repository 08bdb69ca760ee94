"""`eit train`."""

import pytest

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
        (["cifar10", "data.root=/nowhere"], ["/nowhere is not a folder"]),
        (["cifar10", "data.root=.", "data.dataset=wdss/x"], ["data.dataset=wdss/x", "did you mean 'wds'?"]),
        (["cifar10", "data.root=sklearn:iris"], ["sklearn:iris is not a folder", "sklearn:digits is the one"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, words, said):
    assert_mistake(tmp_path, ["train", *words], said)


def test_mistakes_about_a_run_folder(trained):
    good = "data/val/digit0/000.png"
    assert "out=data/val/digit0/000.png is a file" in failed(
        2, "train", "cifar10", "data.root=data", f"out={good}", *TINY, cwd=trained
    )
    assert "another recipe" in failed(
        2, "train", "cifar10", "data.root=data", "name=mine", *TINY, "seed=1", cwd=trained
    )
