"""Accuracy with filtered tokens: what the answer uses, in a model that is known to use it."""

import re

import numpy as np
import pytest
import timm
import torch
from torch import nn

import eit
from eit.analysis.filters import FilteredAccuracy, filter_accuracy
from eit.analysis.frequency import filter_tokens
from eit.analysis.hooks import CannotMeasure, replace_tokens
from eit.data.images import Images, Preprocessing
from eit.data.loaders import EvaluationLoader
from tests.helpers.commands import run_eit
from tests.helpers.images import save_digits

SMALL = dict(img_size=32, kernel_size=3, stride=1, pool_size=4, embed_dim=24, depth=3, num_heads=4, num_classes=5)
VIEW = Preprocessing(16, 16, "bicubic", (0.5,), (0.5,))
BOARD = 1 - 2 * (np.add.outer(np.arange(16), np.arange(16)) % 2)


def loader_of(patterns):
    """Ten images of each pattern, which is its class."""
    sources = [(128 + 60 * pattern).astype(np.uint8) for pattern in patterns] * 10
    labels = list(range(len(patterns))) * 10
    data = Images([str(i) for i in range(len(patterns))], labels, [str(i) for i in range(len(labels))], sources)
    return EvaluationLoader(data, VIEW, 8, 0, torch.device("cpu"))


class Block(nn.Module):
    """Passes its tokens on."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp, self.drop = nn.Identity(), nn.Identity(), nn.Dropout(0.9)

    def forward(self, x):
        return self.drop(x)


class Reader(nn.Module):
    """Pixels are tokens, behind a class token; after two blocks the answer is the sign of a pattern among them."""

    def __init__(self, pattern):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.pattern = torch.tensor(pattern).float().flatten()
        self.cls_token = nn.Parameter(torch.full((1, 1, 1), 7.0))

    def forward(self, x):
        tokens = torch.cat((self.cls_token.expand(len(x), 1, 1), x.flatten(1)[..., None]), dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        assert (tokens[:, 0] == 7).all()  # untouched
        answer = (tokens[:, 1:, 0] * self.pattern).sum(dim=1)
        return torch.stack((answer, -answer), dim=1)


WAVE = np.tile(np.cos(2 * np.pi * np.arange(16) / 16), (16, 1))


@pytest.mark.parametrize("pattern, used", [(BOARD, "high"), (WAVE, "low")], ids=["board", "wave"])
def test_the_frequencies_that_the_answer_uses_cost_it_and_the_others_do_not(pattern, used):
    reader = Reader(pattern)
    found = filter_accuracy(reader.train(), loader_of([pattern, -pattern]), rho=0.5)
    assert reader.training and [(f.layer, f.kept) for f in found] == [(0, "low"), (0, "high"), (1, "low"), (1, "high")]
    for one in found:
        assert one.images == 20 and one.correct + one.lost - one.won == 20
        assert (one.cost == 0) if one.kept == used else (one.lost >= 8 and one.cost >= 40)
        assert one.top1 == 100 - one.cost


def test_cost_and_standard_error_are_those_of_paired_images():
    one = FilteredAccuracy(1, "low", 50, 30, lost=12, won=2)
    gaps = torch.tensor([1.0] * 12 + [-1.0] * 2 + [0.0] * 36)
    assert one.cost == pytest.approx(100 * gaps.mean().item())
    assert one.standard_error == pytest.approx(100 * gaps.std(correction=0).item() / 50**0.5)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_tokens_are_filtered_after_the_layer_and_nowhere_else(layer):
    torch.manual_seed(0)
    model, x = eit.EIT(**SMALL).eval(), torch.randn(2, 3, 32, 32)
    model.norm.register_forward_hook(lambda *_: None)  # so the last layer computes all tokens, as below
    with torch.no_grad(), replace_tokens(model, layer, lambda grid: filter_tokens(grid, 0.5, "low")):
        found = model(x)
    with torch.no_grad():
        tokens, h, w = model.embed(x)
        for number, block in enumerate(model.blocks):
            if number == layer:
                grid = filter_tokens(tokens[:, 1:].unflatten(1, (h, w)), 0.5, "low").flatten(1, 2)
                tokens = torch.cat((tokens[:, :1], grid), dim=1)
            tokens = block(tokens, h, w)
        assert torch.equal(found, model.forward_head(model.norm(tokens)))
        assert not torch.equal(found, model(x))  # and no hook is left
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("swin_tiny_patch4_window7_224", dict(img_size=56, embed_dim=24, depths=(2, 2), num_heads=(1, 2))),
        ("resnet18", dict(layers=(1, 1, 1, 1))),
        ("vit_tiny_patch16_224", dict(img_size=64, depth=3)),
    ],
)
def test_maps_in_any_order_are_put_back_as_they_were(name, arguments):
    torch.manual_seed(0)
    model, x, seen = timm.create_model(name, **arguments).eval(), torch.randn(1, 3, 64, 64), []
    x = x[..., : arguments.get("img_size", 64), : arguments.get("img_size", 64)]
    with torch.no_grad():
        before = model(x)
        with replace_tokens(model, 1, lambda grid: (seen.append(grid.shape), grid.clone())[1]):
            assert torch.equal(model(x), before)
        with replace_tokens(model, 1, lambda grid: grid.flip(1)):
            assert not torch.equal(model(x), before)
    assert len(seen) == 1 and seen[0][1] == seen[0][2]


def test_windows_cannot_be_filtered():
    class Windows(Reader):
        def forward(self, x):
            windows = x.flatten(1).unflatten(1, (4, 64)).flatten(0, 1)  # of 4 rows
            for block in self.blocks:
                windows = block(windows[..., None])[..., 0]
            return windows.unflatten(0, (-1, 4)).flatten(1)[:, :2]

    with pytest.raises(CannotMeasure, match="layer 1 .* one grid per image"):
        filter_accuracy(Windows(BOARD), loader_of([BOARD, -BOARD]), rho=0.5)


def test_the_command_with_filters(tmp_path, no_figures):
    data = save_digits(tmp_path / "data")
    words = ("analyze", "digits", "--data", data, "--out", tmp_path / "out", "--images", "6", "--pictures", "0")
    done = run_eit(*words, "--filters", "--no-initial")
    assert done.returncode == 0, done.stderr
    assert re.search(r"no accuracy with filtered tokens: ", done.stderr)  # its ten classes are others
    assert not (tmp_path / "out" / "csv" / "uses.csv").exists()
    (tmp_path / "empty").mkdir()
    done = run_eit("analyze", "digits", "--data", tmp_path / "empty", "--filters")
    assert done.returncode == 2 and "--filters needs labelled images: " in done.stderr
