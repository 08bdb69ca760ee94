"""Measure how long a checkpoint stops training: `python benchmarks/saving.py [MODEL]`.

Two calls are timed in turn, five times each: `BackgroundWriter.submit`, the only call that the training loop waits for,
and all of `save_checkpoint`. Prints medians, spread, and their ratio. The checkpoint has the weights, their moving
average and AdamW's two moments.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import eit
from eit.training.checkpoint import BackgroundWriter, save_checkpoint
from eit.weights.card import Card, default_class_names, default_mean_std

ROUNDS = 5


def main(name: str) -> None:
    model = eit.create_model(name)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    mean, std = default_mean_std(3)
    look = dict(mean=mean, std=std, size=224, resize=256, interpolation="bicubic")
    card = Card(model=name, arguments={}, classes=default_class_names(1000), **look)
    parts = model.state_dict(), model.state_dict(), dict(optimizer=optimizer.state_dict(), progress={})
    stops, whole, size = [], [], 0
    with tempfile.TemporaryDirectory() as folder, BackgroundWriter() as writer:
        for step in range(ROUNDS):
            began = time.perf_counter()
            writer.submit(save_checkpoint, Path(folder), 2 * step, card, *parts)
            stops.append(time.perf_counter() - began)
            writer.wait()
            began = time.perf_counter()
            target = save_checkpoint(Path(folder), 2 * step + 1, card, *parts)
            whole.append(time.perf_counter() - began)
            size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{name}: a checkpoint of {size / 1e6:.0f} MB, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for what, times in (("stops training for", stops), ("is on the disk after", whole)):
        print(f"  {what} {statistics.median(times):.3f} s ({min(times):.3f} to {max(times):.3f})")
    print(f"  ratio {statistics.median(stops) / statistics.median(whole):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:] or ["eit_large"])
