"""Recompute the numbers of a committed analysis by brute force, from its weights and images, and compare.

    python tests/helpers/brute_force.py results/analysis [--initial] [--images FOLDER]

Nothing of eit.analysis is used: hooks on the model's own modules, and the definitions of docs/analysis.md as plain
loops over images, layers, bins of the spectrum and heads, in double precision. With --initial the rows of
initial values are recomputed as well, by building each run's model anew. Exit status 1 where a number differs by more
than 1e-5 (shares absolute, pixels relative).
"""

import argparse
import cmath
import csv
import math
import sys
from pathlib import Path

import numpy as np
import torch

import eit
from eit.config import parse_recipe
from eit.data.images import decode, normalise
from eit.training.setup import build_model

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5


def rows(folder, name):
    with open(folder / "csv" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def images_of(folder, view):
    """The images below the folder, sorted by path, as the model sees them."""
    for file in sorted(str(f) for f in folder.rglob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp")):
        yield normalise(view.pixels(decode(file, view.channels))[None], view.mean, view.std)


def phases(h, w):
    """e^(-2 pi i (p y / h + q x / w)) / sqrt(h w), and the frequency, of each bin (p, q)."""
    found = []
    for p in range(h):
        for q in range(w):
            plane = [[cmath.exp(-2j * math.pi * (p * y / h + q * x / w)) for x in range(w)] for y in range(h)]
            f = 2 * math.sqrt((min(p, h - p) / h) ** 2 + (min(q, w - q) / w) ** 2)
            found.append((p, q, f, np.array(plane) / math.sqrt(h * w)))
    return found


def shares(tokens, waves, rho):
    """`share` and `share_with_dc` of one image (h, w, C)."""
    high = np.zeros(tokens.shape[2])
    every = np.zeros(tokens.shape[2])
    for p, q, f, wave in waves:
        if (p, q) != (0, 0):
            energy = np.abs(np.tensordot(wave, tokens, axes=2)) ** 2
            every += energy
            if f > rho + 1e-9:
                high += energy
    mean = np.abs(tokens.mean(axis=(0, 1))) ** 2 * tokens.shape[0] * tokens.shape[1]
    silent = every == 0  # a channel without energy has share 0
    return np.mean(np.where(silent, 0, high / (every + silent))), np.mean(high / (every + mean + silent))


def distances(h, w, pitch):
    away = np.zeros((h * w, h * w))
    for a in range(h * w):
        for b in range(h * w):
            away[a, b] = pitch * math.hypot(a // w - b // w, a % w - b % w)
    return away


def head_distance(q, k, away):
    """Pixels: of one head of one image, q and k (1 + n, D), the class token first."""
    scores = q[1:] @ k.T / math.sqrt(q.shape[1])
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))[:, 1:]
    return float(np.mean((weights * away).sum(axis=1) / weights.sum(axis=1)))


def watched(model):
    """(layer, where) -> what it last put out, kept by hooks; and the hooks."""
    last, hooks = {}, []

    def keep(name):
        def hook(module, args, out):
            last[name] = out

        return hook

    def keep_input(name):
        def hook(module, args):
            last[name] = args[0]

        return hook

    hooks.append(model.blocks[0].register_forward_pre_hook(keep_input((0, "stem"))))
    for number, block in enumerate(model.blocks, start=1):
        hooks.append(block.register_forward_hook(keep((number, "block"))))
        hooks.append(block.attn.register_forward_hook(keep((number, "mixed"))))
        hooks.append(block.norm2.register_forward_pre_hook(keep_input((number, "mixer"))))
        hooks.append(block.attn.qkv.register_forward_hook(keep((number, "qkv"))))
    return last, hooks


@torch.no_grad()
def recompute(model, view, folder, pitch, rho):
    """Means over the images: {(layer, where): (share, share_with_dc)}, {(layer, head): pixels}."""
    model = model.eval().double()
    last, hooks = watched(model)
    spectra, heads = {}, {}
    waves = away = None
    count = 0
    for x in images_of(folder, view):
        model(x.double())
        count += 1
        h, w = model.patch_embed.grid_size(x.shape[2], x.shape[3])
        waves = waves or phases(h, w)
        away = distances(h, w, pitch) if away is None else away
        for (layer, where), found in list(last.items()):
            if where == "qkv":
                q, k, _ = found[0].unflatten(1, (3, model.blocks[layer - 1].attn.num_heads, -1)).unbind(1)
                for head in range(q.shape[1]):
                    d = head_distance(q[:, head].numpy(), k[:, head].numpy(), away)
                    heads[layer, head + 1] = heads.get((layer, head + 1), 0) + d
                continue
            parts = {where: found[0, 1:]}
            if where == "mixed":
                conv = model.blocks[layer - 1].attn.conv_channels
                parts = dict(conv=found[0, 1:, :conv], attention=found[0, 1:, conv:])
            for name, part in parts.items():
                if part.shape[1]:
                    both = np.array(shares(part.numpy().reshape(h, w, -1), waves, rho))
                    spectra[layer, name] = spectra.get((layer, name), 0) + both
    for hook in hooks:
        hook.remove()
    assert count, f"no images below {folder}"
    return {k: v / count for k, v in spectra.items()}, {k: v / count for k, v in heads.items()}, count


def largest(*differences):
    """In absolute value; NaN is larger than all."""
    return max((abs(d) for d in differences), key=lambda d: math.inf if math.isnan(d) else d)


def check(folder, initial=False, images=None):
    """Lines that say how well the numbers agree, and whether all do."""
    lines, fine = [], True
    for row in rows(folder, "models"):
        if row["state"] == "untrained" or (row["state"] == "initial" and not initial):
            continue
        source = Path(next(r["source"] for r in rows(folder, "models") if r["model"] == row["model"]))
        model = eit.load(source if source.exists() else ROOT / source)
        card = model.card
        if row["state"] == "initial":
            model = build_model(parse_recipe(card.recipe), len(card.classes), initial=False)
        key = dict(model=row["model"], state=row["state"])
        pitch, rho = float(row["pitch"]), float(row["rho"])
        spectra, heads, count = recompute(model, card.view, images or folder / "images", pitch, rho)
        assert count == int(row["images"]), f"{count} images, {row['images']} were analysed: give --images"
        worst = [0.0, 0.0, 0.0]
        mine = [r for r in rows(folder, "frequency") if key.items() <= r.items()]
        assert {(int(r["layer"]), r["where"]) for r in mine} == set(spectra)
        for r in mine:
            both = spectra[int(r["layer"]), r["where"]]
            worst[0] = largest(worst[0], both[0] - float(r["share"]), both[1] - float(r["share_with_dc"]))
        mine = [r for r in rows(folder, "heads") if key.items() <= r.items()]
        assert {(int(r["layer"]), int(r["head"])) for r in mine} == set(heads)
        for r in mine:
            d = heads[int(r["layer"]), int(r["head"])]
            worst[1] = largest(worst[1], (d - float(r["distance_px"])) / d)
        for r in (r for r in rows(folder, "diversity") if key.items() <= r.items()):
            found = [d for (layer, _), d in heads.items() if layer == int(r["layer"])]
            mean = sum(found) / len(found)
            std = math.sqrt(sum((d - mean) ** 2 for d in found) / (len(found) - 1))
            worst[2] = largest(worst[2], (std - float(r["std_px"])) / mean)
        lines.append(
            f"{row['model']} ({row['state']}), {count} images: {len(spectra)} places, shares differ by {worst[0]:.1e}; "
            f"{len(heads)} heads, distances by {worst[1]:.1e}, diversity by {worst[2]:.1e}"
        )
        fine = fine and all(w <= TOLERANCE for w in worst)  # false for NaN
    return lines, fine and bool(lines)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--initial", action="store_true")
    parser.add_argument("--images", type=Path, help="those that were analysed, all of them; default: FOLDER/images")
    given = parser.parse_args()
    try:
        lines, fine = check(given.folder, given.initial, given.images)
    except (OSError, ValueError, AssertionError) as error:
        sys.exit(f"brute_force: {error}")
    print("\n".join(lines))
    print("all equal to 1e-5" if fine else "NOT equal to 1e-5")
    sys.exit(not fine)


if __name__ == "__main__":
    main()
