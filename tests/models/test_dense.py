"""Feature maps at any size, and the decoders of others over them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch

import eit

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))
import segmentation  # noqa: E402


@pytest.mark.parametrize("family", ["eit", "lsra", "vit"])
def test_dpt_over_the_16_pixel_grid(family):
    small = dict(embed_dim=32, num_heads=4, family=family)
    model = smp.DPT(
        "tu-eit_mini",
        encoder_weights=None,
        pool_size=4,
        classes=5,
        decoder_intermediate_channels=(16, 16, 16, 16),
        decoder_fusion_channels=16,
        **small,
    ).eval()
    trained = eit.create_model("eit_mini", **small)  # the published stem, 16/4/3
    eit.load_weights(model.encoder.model, trained.state_dict(), reset_head=True)
    assert torch.equal(model.encoder.model.patch_embed.proj.weight, trained.patch_embed.proj.weight)
    with torch.no_grad():
        for size in ((224, 224), (384, 384), (160, 320)):
            assert model(torch.randn(1, 3, *size)).shape == (1, 5, *size)
    model.train()(torch.randn(2, 3, 64, 64)).sum().backward()
    unused = {n for n, p in model.encoder.model.named_parameters() if p.grad is None}
    assert unused == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_finer_and_coarser_maps_of_the_same_weights():
    model = eit.create_model("eit_mini", embed_dim=24, depth=2, num_heads=2)
    for pool_size, grid in ((1, 57), (2, 28), (3, 19), (4, 14)):
        other = timm.create_model("eit_mini", embed_dim=24, depth=2, num_heads=2, pool_size=pool_size)
        other.load_state_dict(model.state_dict())
        assert other.patch_embed.pitch == 4 * pool_size and other.grid_size == (grid, grid)


def test_scenes_have_real_digits_whose_strokes_are_the_masks():
    x, y = segmentation.batch(3, 6, (64, 96), test=True)
    again, _ = segmentation.batch(3, 6, (64, 96), test=True)
    other, _ = segmentation.batch(3, 6, (64, 96), test=False)
    assert torch.equal(x, again) and not torch.equal(x, other)
    assert x.shape == (6, 3, 64, 96) and y.shape == (6, 64, 96) and x.min() >= -1 and x.max() <= 1
    assert 0.02 < (y > 0).float().mean() < 0.5 and len(y.unique()) > 4
    seen = set()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        _, mask = segmentation.scene(rng, (64, 64), test=False)
        seen |= set(np.unique(mask))
    assert seen == set(range(11))


class Fixed(torch.nn.Module):
    """Says for each pixel what a function of the truth says."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.start = answer, 0

    def forward(self, x):
        _, y = segmentation.batch(self.start, len(x), x.shape[2:], test=True)
        self.start += len(x)
        return torch.nn.functional.one_hot(self.answer(y), 11).permute(0, 3, 1, 2).float()


def test_mean_iou():
    assert segmentation.mean_iou(Fixed(lambda y: y), (64, 64), 50) == pytest.approx(100)
    background = segmentation.mean_iou(Fixed(torch.zeros_like), (64, 64), 50)
    _, y = zip(*(segmentation.batch(start, 25, (64, 64), test=True) for start in (0, 25)), strict=True)
    assert background == pytest.approx(100 * float((torch.cat(y) == 0).float().mean()) / 11, rel=1e-5)
    assert segmentation.mean_iou(Fixed(lambda y: y), (64, 64), 3) == pytest.approx(100)  # classes that do not occur
    halves = segmentation.mean_iou(Fixed(lambda y: torch.where(y == 1, 2, y)), (64, 64), 50)
    ones, twos = (int((torch.cat(y) == k).sum()) for k in (1, 2))
    assert halves == pytest.approx(100 * (9 + twos / (ones + twos)) / 11, rel=1e-4)


@pytest.mark.project
def test_the_example_trains_and_draws(tmp_path):
    words = ["--steps", "4", "--scenes", "25", "--out", tmp_path / "out"]
    code = "import segmentation as s; s.BACKBONE |= dict(embed_dim=16, depth=3, num_heads=2); s.main()"
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT / "examples", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["mean_iou"]) == {"eit", "vit"} and set(found["mean_iou"]["eit"]) == {"64x64", "96x160"}
    assert (tmp_path / "out" / "scenes.png").read_bytes()[:4] == b"\x89PNG"
    assert done.stdout.count("mean IoU") == 2


def test_what_the_page_says_of_eit_and_vit_is_what_was_measured():
    found = [json.loads(f.read_text())["mean_iou"] for f in ROOT.glob("results/segmentation/*/results.json")]
    assert len(found) >= 3
    for scores in found:
        assert scores["eit"]["64x64"] > 60 > 25 > scores["vit"]["64x64"]
        assert scores["vit"]["96x160"] < scores["eit"]["96x160"] < 0.8 * scores["eit"]["64x64"]
    page = " ".join((ROOT / "docs" / "dense.md").read_text().split())
    for words in ("EIT reads most of the digits. ViT finds the strokes", "loses much accuracy on the larger scenes"):
        assert words in page
