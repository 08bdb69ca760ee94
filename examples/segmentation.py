"""Semantic segmentation with a pyramid-free backbone: the same linear head on EIT and on plain ViT, at two resolutions.

    python examples/segmentation.py --out segmentation        # about 10 minutes on 2 cores

The scenes are made of real images that come with scikit-learn: scanned digits on parts of two photos. The strokes of
the digits are the masks. Training and testing use different digits and different parts of the photos. Training uses
only 64x64 scenes. The unchanged model is then tested on scenes of 64x64 and 96x160, with digits of the same size.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

import eit  # noqa: F401 (registers eit_* with timm)

DIGITS, PHOTOS = load_digits(), load_sample_images().images
CLASSES = ["background", *"0123456789"]
TRAINED, LARGER = (64, 64), (96, 160)  # height, width
BACKBONE = dict(kernel_size=3, stride=1, pool_size=4, patch_size=4, embed_dim=64, depth=4, num_heads=4)


def scene(rng: np.random.Generator, size: tuple[int, int], test: bool) -> tuple[np.ndarray, np.ndarray]:
    """A photo with digits on it (height, width, 3) uint8 and the class of each pixel (height, width) uint8."""
    height, width = size
    photo = PHOTOS[rng.integers(2)]
    half = photo.shape[1] // 2  # training uses the left halves
    left = rng.integers(half if test else 0, photo.shape[1] - width if test else half - width)
    top = rng.integers(photo.shape[0] - height)
    image = photo[top : top + height, left : left + width].astype(float)
    mask = np.zeros(size, dtype=np.uint8)
    for _ in range(rng.poisson(3 * height * width / 64**2) + 1):
        index = rng.integers(1400, 1797) if test else rng.integers(1400)
        side = int(rng.integers(24, 33))
        stroke = Image.fromarray((DIGITS.images[index] * 255 / 16).astype(np.uint8)).resize((side, side), 3)
        alpha = np.asarray(stroke)[..., None] / 255
        y, x = rng.integers(height - side + 1), rng.integers(width - side + 1)
        part = (slice(y, y + side), slice(x, x + side))
        if mask[part].any():  # digits do not cover each other
            continue
        colour = rng.integers(0, 256, 3)
        while abs(colour - image[part].mean((0, 1))).sum() < 200:  # contrast enough to be visible
            colour = rng.integers(0, 256, 3)
        image[part] = image[part] * (1 - alpha) + alpha * colour
        mask[part] = np.where(alpha[..., 0] > 0.4, DIGITS.target[index] + 1, 0)
    return image.round().astype(np.uint8), mask


def batch(seed: int, count: int, size: tuple[int, int], test: bool) -> tuple[Tensor, Tensor]:
    """Images (count, 3, height, width) in -1..1 and classes (count, height, width)."""
    rng = np.random.default_rng([seed, int(test)])
    images, masks = zip(*(scene(rng, size, test) for _ in range(count)), strict=True)
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last), torch.from_numpy(np.stack(masks)).long()


class Segmenter(nn.Module):
    """(B, 3, height, width) -> logits (B, classes, height, width): a linear classifier of each token, upsampled."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.backbone = timm.create_model("eit_mini", family=family, img_size=64, features_only=True, **BACKBONE)
        self.head = nn.Conv2d(sum(self.backbone.feature_info.channels()), len(CLASSES), 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat(self.backbone(x), dim=1)
        return F.interpolate(self.head(maps), x.shape[2:], mode="bilinear")


def train(family: str, steps: int, seed: int) -> Segmenter:
    torch.manual_seed(seed)
    model = Segmenter(family).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    weight = torch.tensor([0.3] + [1.0] * 10)  # most pixels are background
    for step in range(steps):
        x, y = batch(100_000 * seed + step, 16, TRAINED, test=False)
        loss = F.cross_entropy(model(x), y, weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"{family} step {step + 1}/{steps}  loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def mean_iou(model: Segmenter, size: tuple[int, int], scenes: int) -> float:
    """Mean intersection over union of the classes, in percent. Each is summed over all pixels of the test scenes."""
    counts = torch.zeros(len(CLASSES), len(CLASSES))  # truth x prediction
    for start in range(0, scenes, 25):
        x, y = batch(start, min(25, scenes - start), size, test=True)
        pairs = y * len(CLASSES) + model(x).argmax(1)
        counts += pairs.flatten().bincount(minlength=len(CLASSES) ** 2).view_as(counts)
    right = counts.diag()
    return 100 * float((right / (counts.sum(0) + counts.sum(1) - right)).nanmean())  # only classes that occur


@torch.no_grad()
def draw(models: dict[str, Segmenter], file: Path) -> None:
    """Scenes of both sizes with the true masks and the masks that each model predicts."""
    sizes = [TRAINED, TRAINED, LARGER, LARGER]
    figure = Figure(figsize=(9, 7.3), layout="constrained")
    axes = figure.subplots(4, 2 + len(models), height_ratios=[height / width for height, width in sizes])
    for row, (size, seed) in enumerate(zip(sizes, range(7, 11), strict=True)):
        x, y = batch(seed, 1, size, test=True)
        shown = {"scene": (x[0].permute(1, 2, 0) + 1) / 2, "truth": y[0]}
        shown |= {dict(eit="EIT", vit="ViT")[name]: model(x)[0].argmax(0) for name, model in models.items()}
        for ax, (name, pixels) in zip(axes[row], shown.items(), strict=True):
            ax.imshow(pixels, cmap="tab20", vmin=0, vmax=19, interpolation="nearest")
            ax.set(xticks=[], yticks=[], title=name if row == 0 else None)
        axes[row, 0].set_ylabel(f"{size[0]}x{size[1]}")
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="training steps, with 16 scenes each")
    parser.add_argument("--scenes", type=int, default=500, help="test scenes at each resolution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("segmentation"), help="folder for results.json, scenes.png")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    models = {family: train(family, args.steps, args.seed) for family in ("eit", "vit")}
    results = dict(steps=args.steps, scenes=args.scenes, seed=args.seed, mean_iou={})
    for family, model in models.items():
        found = {f"{h}x{w}": mean_iou(model, (h, w), args.scenes) for h, w in (TRAINED, LARGER)}
        results["mean_iou"][family] = found
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{family}: {parameters:,} parameters, mean IoU", ", ".join(f"{v:.1f}% at {k}" for k, v in found.items()))
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    draw(models, args.out / "scenes.png")
    print(f"{args.out / 'scenes.png'}: scenes, masks, and the predictions of the models")


if __name__ == "__main__":
    main()
