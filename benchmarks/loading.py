"""Measure how fast training images are loaded, compared with timm: `python benchmarks/loading.py [ROUNDS] [OUT.json]`.

The policy of the ImageNet recipes (random resized crop, flip, RandAugment, erasing 0.25; 224 px, bicubic) on the same
JPEGs: photographs of scikit-image at 500x375 (quality 90), and mosaics of them at 1000x750 and 2000x1500. The mosaics
have the detail of small photographs, and so the most expensive entropy coding. Three loaders run in turn, ROUNDS times
(5): `timm.data.create_loader` with and without its prefetcher (which normalises and erases on the device, here the
CPU), and this package's loader. Each loads whole epochs up to normalised batches of 64. First everything runs in one
process with one thread. Then one persistent worker process loads, and the main process normalises on its own core. The
results are medians, spread, and the ratio to timm with its prefetcher, which is timm's default. `repeats=3`: repeated
augmentation as in the recipe, on one process.

Also measured: the milliseconds of each stage, how far the pixels of the crops are from timm's, and the share of a
training step of the cifar10 recipe (32x32, batch 128, all cores) that its loader takes.

Needs: pip install scikit-image
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from timm.data import ImageDataset, auto_augment, create_loader
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

import eit
from eit.config import load_recipe
from eit.data import shear
from eit.data.images import Images, Preprocessing
from eit.data.loaders import CachedLoader, WorkerLoader
from eit.data.order import SampleOrder
from eit.data.random_crop import ResizedCrop, resized, to_pixels
from eit.environment import environment
from eit.randomness import Stream, seeded

PHOTOS = ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg"]
PHOTOS += ["ihc.png", "retina.jpg"]
SIZES = {"500x375": 1, "1000x750": 2, "2000x1500": 4}
IMAGES, BATCH = {"500x375": 128, "1000x750": 128, "2000x1500": 64}, 64
VIEW = Preprocessing(224, 256, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
POLICY = dict(hflip=0.5, color_jitter=None, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25, re_mode="pixel")


def write_photos(folder: Path) -> None:
    import skimage

    tiles = []
    for name in PHOTOS:
        image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
        w, h = image.size
        w4, h3 = min(w, h * 4 // 3), min(h, w * 3 // 4)
        image = image.crop(((w - w4) // 2, (h - h3) // 2, (w + w4) // 2, (h + h3) // 2))
        tiles.append(image.resize((500, 375), Image.Resampling.LANCZOS))
    for size, k in SIZES.items():
        target = folder / size / "train" / "photo"
        target.mkdir(parents=True)
        for i in range(len(tiles)):
            mosaic = Image.new("RGB", (500 * k, 375 * k))
            for t in range(k * k):
                mosaic.paste(tiles[(i + t) % len(tiles)], (500 * (t % k), 375 * (t // k)))
            mosaic.save(target / f"{i}.jpg", quality=90)


def of_timm(root: Path, count: int, prefetcher: bool, workers: int) -> Callable[[int], Iterator[Any]]:
    dataset = ImageDataset(str(root / "train"))
    dataset.reader.samples *= count // len(dataset.reader.samples)
    loader = create_loader(
        dataset,
        (3, 224, 224),
        BATCH,
        is_training=True,
        interpolation="bicubic",
        num_workers=workers,
        use_prefetcher=prefetcher,
        persistent_workers=workers > 0,
        pin_memory=False,
        device=torch.device("cpu"),
        **POLICY,
    )
    return lambda epoch: iter(loader)


def of_eit(root: Path, count: int, repeats: int, workers: int) -> Callable[[int], Iterator[Any]]:
    files = sorted(map(str, (root / "train").rglob("*.jpg")))
    files *= count // len(files)
    words = [f"data.workers={workers}", f"augment.repeats={repeats}"]
    recipe = load_recipe("imagenet_mini", words)
    order = SampleOrder(count, BATCH, 1, 1, repeats, 0)
    images = Images(["photo"], [0] * count, files, files)
    return WorkerLoader(images, VIEW, order, recipe.data, recipe.augment, torch.device("cpu")).epoch


def rate(batches: Iterator[Any]) -> float:
    began, count = time.perf_counter(), 0
    for batch in batches:
        count += len(batch[0])
    return count / (time.perf_counter() - began)


def summary(values: list[float], digits: int = 1) -> dict[str, float]:
    return {k: round(f(values), digits) for k, f in (("median", statistics.median), ("low", min), ("high", max))}


def throughput(root: Path, size: str, rounds: int, workers: int) -> dict[str, Any]:
    """images/s of each pipeline. Each runs once before, to warm the caches."""
    count = IMAGES[size] * (1 + workers)
    pipelines = {
        "timm create_loader": of_timm(root / size, count, True, workers),
        "timm create_loader, no prefetcher": of_timm(root / size, count, False, workers),
        "eit, pillow": of_eit(root / size, count, 1, workers),
        "eit, pillow, repeats=3": of_eit(root / size, count, 3, workers),
    }
    with patch.dict(shear.FASTER, clear=True):
        pipelines["eit, Pillow's shears"] = of_eit(root / size, count, 1, workers)
        pipelines["eit, Pillow's shears, repeats=3"] = of_eit(root / size, count, 3, workers)
    found: dict[str, list[float]] = {name: [] for name in pipelines}
    for epoch in range(rounds + 1):
        for name, begin in pipelines.items():
            value = rate(begin(epoch))
            if epoch:
                found[name].append(value)
    base = statistics.median(found["timm create_loader"])
    table = {name: summary(v) | dict(ratio=round(statistics.median(v) / base, 2)) for name, v in found.items()}
    print(f"\n{size}: images/s of one {'worker process' if workers else 'thread, to the float batch'}")
    for name, row in table.items():
        print(f"  {name:36} {row['median']:7.1f} ({row['low']:.1f} to {row['high']:.1f})  x{row['ratio']:.2f}")
    return table


def milliseconds(work: Callable[[], Any], rounds: int, inner: int) -> dict[str, float]:
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        for _ in range(inner):
            work()
        times.append((time.perf_counter() - began) / inner * 1e3)
    return summary(times[1:], 3)


def stages(root: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds of the stages at 500x375, with a crop of 300x300."""
    file = str(root / "500x375" / "train" / "photo" / "1.jpg")
    with Image.open(file) as image:
        crop = image.convert("RGB").crop((50, 20, 350, 320))
    pixels, small = to_pixels(crop), crop.resize((224, 224))
    given = dict(fillcolor=(124, 116, 104), resample=Image.Resampling.BICUBIC)
    works: dict[str, Callable[[], Any]] = {
        "decode, pillow": lambda: Image.open(file).load(),
        "resize 300 to 224, pillow": lambda: crop.resize((224, 224), Image.Resampling.BICUBIC),
        "resize 300 to 224, torch": lambda: resized(pixels, 224, "bicubic"),
        "shear, pillow": lambda: auto_augment.shear_x(small, 0.27, **given),
        "shear, eit": lambda: shear.shear_x(small, 0.27, **given),
        "translate, pillow": lambda: auto_augment.translate_y_rel(small, 0.4, **given),
        "translate, eit": lambda: shear.translate_y_rel(small, 0.4, **given),
        "rotate, pillow": lambda: auto_augment.rotate(small, 20, **given),
        "sharpness, pillow": lambda: auto_augment.sharpness(small, 1.8),
        "equalize, pillow": lambda: auto_augment.equalize(small),
        "to_tensor and normalize, torchvision": lambda: TF.normalize(TF.to_tensor(small), VIEW.mean, VIEW.std),
    }
    table = {name: milliseconds(work, rounds, 20) for name, work in works.items()}
    print("\nmilliseconds at 500x375")
    for name, row in table.items():
        print(f"  {name:36} {row['median']:.3f} ({row['low']:.3f} to {row['high']:.3f})")
    return table


def distances(root: Path) -> dict[str, Any]:
    """Mean difference of crops from timm's, in levels of 0 to 255, and what a shift of half a pixel makes."""
    table: dict[str, Any] = {}
    for size in SIZES:
        crop = ResizedCrop(VIEW, (0.08, 1.0), (3 / 4, 4 / 3))
        mine, shifted = [], []
        for seed in range(16):
            file = str(root / size / "train" / "photo" / f"{seed % 8}.jpg")
            with seeded(Stream.SAMPLE, seed):
                ours = Images([""], [0], [""], [file]).read(0, 3, lambda image, n, crop=crop: crop(image, n, {}))
            with seeded(Stream.SAMPLE, seed), Image.open(file) as image:
                image = image.convert("RGB")
                box = RandomResizedCropAndInterpolation.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3))
                theirs = TF.resized_crop(image, *box, [224, 224], InterpolationMode.BICUBIC)
                top, left, h, w = box
                half = -w / 448 if left + w + w / 448 > image.width else w / 448
                moved = (max(left + half, 0), top, min(left + w + half, image.width), top + h)
                near = image.resize((224, 224), Image.Resampling.BICUBIC, moved)
            for found, other in ((mine, ours), (shifted, near)):
                found.append(float(np.abs(np.asarray(other, dtype=float) - np.asarray(theirs)).mean()))
        table[f"{size}, pillow"] = dict(mean=round(np.mean(mine), 3), half_a_pixel=round(np.mean(shifted), 3))
    print("\nmean difference of crops from timm's, levels of 255 (half a pixel's shift)")
    for name, row in table.items():
        print(f"  {name:36} {row['mean']:.3f} ({row['half_a_pixel']:.3f})")
    return table


def small_sets(rounds: int) -> dict[str, Any]:
    """The loader's share of a CPU training step: cifar10 recipe, random pixels, batch 128."""
    torch.set_num_threads(os.cpu_count() or 1)
    recipe = load_recipe("cifar10")
    data = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8) for i in range(2048)]
    images = Images([str(i) for i in range(10)], [i % 10 for i in range(2048)], [""] * 2048, data)
    view = Preprocessing(32, 32, "bicubic", tuple(recipe.data.mean or ()), tuple(recipe.data.std or ()))
    order = SampleOrder(2048, 128, 1, 1, 1, 0)
    loader = CachedLoader(images, view, order, 0.0, recipe.augment, torch.device("cpu"))
    loader.prepare()
    model = eit.create_model(recipe.model.name, num_classes=10, img_size=32, **recipe.model.arguments())
    model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    batches = loader.epoch(0)
    load, step = [], []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        x, y, _ = next(batches)
        loaded = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        load.append(loaded - began)
        step.append(time.perf_counter() - began)
    share = [100 * a / b for a, b in zip(load[1:], step[1:], strict=True)]
    found = dict(loader_ms=summary([1e3 * t for t in load[1:]], 2), step_ms=summary([1e3 * t for t in step[1:]], 1))
    print(
        f"\ncifar10, batch 128: the loader takes {found['loader_ms']['median']} ms of {found['step_ms']['median']} ms, "
    )
    print(f"  {statistics.median(share):.2f}% of a step")
    return found | dict(percent=summary(share, 2))


@contextmanager
def photos() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        write_photos(Path(folder))
        yield Path(folder)


def main(rounds: str = "5", out: str = "") -> None:
    torch.set_num_threads(1)
    random.seed(0)
    record = dict(date=str(date.today())) | environment(torch.device("cpu"))
    record["command"] = f"python benchmarks/loading.py {rounds} {out}".strip()
    record["packages"]["scikit-image"] = version("scikit-image")
    record["figures"] = measure(int(rounds))
    if out:
        Path(out).write_text(json.dumps(record, indent=1) + "\n")


def measure(rounds: int) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    with photos() as root:
        for workers, what in enumerate(("images/s of one thread", "images/s of one worker process")):
            figures[what] = {size: throughput(root, size, rounds, workers) for size in SIZES}
        figures["stages, ms"] = stages(root, rounds)
        figures["difference from timm, levels"] = distances(root)
    figures["cifar10 step"] = small_sets(rounds)
    return figures


if __name__ == "__main__":
    main(*sys.argv[1:])
