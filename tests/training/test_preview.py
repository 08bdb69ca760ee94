import numpy as np
import pytest
import torch

from eit.config import load_recipe
from eit.errors import UserError
from eit.plots import Tile, grid
from eit.training import trainer as train_module
from eit.training.preview import tiles
from eit.training.trainer import train
from tests.helpers.training import TINY


@pytest.mark.parametrize("more", [[], ["augment.pad_crop=0", "augment.crop_scale=[0.5,1]", "augment.erasing=0.5"]])
def test_what_is_shown_is_what_the_model_trains_on(folder, monkeypatch, more):
    recipe = load_recipe("cifar10", [*TINY, f"data.root={folder}", f"out={folder.parent / 'run'}", *more])
    shown, validated = tiles(recipe, 6)
    seen = []
    original = train_module.build_model

    def build(*arguments, **options):
        model = original(*arguments, **options)
        model.register_forward_pre_hook(lambda _, x: seen.append(x[0].clone()))
        return model

    monkeypatch.setattr(train_module, "build_model", build)
    train(recipe)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (recipe.data.mean, recipe.data.std))
    for i, tile in enumerate(shown):
        expected = (seen[0][i] * std + mean).clamp(0, 1)
        np.testing.assert_allclose(tile.pixels.transpose(2, 0, 1), expected, atol=1e-6)
    assert len(shown) == 6 and any("+" in tile.label for tile in shown)  # mixed classes with their shares
    assert {tile.label for tile in validated} == {"digit0", "digit1", "digit2"}


def test_labels_of_images_that_are_not_mixed(folder):
    recipe = load_recipe("cifar10", [*TINY, f"data.root={folder}", "augment.mixup=0", "augment.cutmix=0"])
    assert {tile.label for tile in tiles(recipe, 8)[0]} <= {"digit0", "digit1", "digit2"}


def test_a_wrong_recipe_is_one_line(folder):
    with pytest.raises(UserError, match="is larger than the 36 training images"):
        tiles(load_recipe("cifar10", [f"data.root={folder}", "train.accumulate=40"]), 8)


@pytest.mark.parametrize("words", [[], ["data.image_size=16"], ["data.batch_size=4"]])
def test_what_a_recipe_leaves_to_the_data_is_chosen(folder, words):
    recipe = load_recipe("photos", ["model.pretrained=null", f"data.root={folder}", *words])
    shown, validated = tiles(recipe, 8)
    size, batch = (16 if "data.image_size=16" in words else 32), (4 if "data.batch_size=4" in words else 8)
    assert len(shown) == batch and shown[0].pixels.shape == (size, size, 3) and len(validated) == 8


@pytest.mark.parametrize("count", [1, 8, 11])
def test_the_grid_is_a_picture(tmp_path, count):
    names = ["$x_1$", "a very long name of a class that goes on", "", "ж", "a\nb"]
    some = [Tile(np.random.default_rng(i).random((9, 7, 3 if i % 2 else 1)), names[i % 5]) for i in range(count)]
    grid([("training $", some), ("validation", some[:1])], tmp_path / "g.png")
    assert (tmp_path / "g.png").read_bytes()[:4] == b"\x89PNG"
