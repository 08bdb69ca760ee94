"""The cost of `eit.analyze` relative to a plain forward pass, in time and in memory.

    python benchmarks/analysis.py [--model eit_mini] [--size 224] [--batch 16] [--threads 2] [--rounds 7]

The rounds of all variants are interleaved. A ratio compares one round with the plain pass of the same round; the median
and the range over the rounds are printed. Memory is the largest resident set of a separate process.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable

import torch

import eit
from eit.analysis.attention import AttentionMeter
from eit.analysis.frequency import FrequencyMeter, fourier_coefficients
from eit.analysis.hooks import watch
from eit.analysis.measure import analyze


def variants(model: torch.nn.Module, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    def frequency() -> None:
        with watch(model, lambda t: FrequencyMeter(t.layer, t.where, 0.5).add(t.grid)):
            model(x)

    def attention() -> None:
        with watch(model, None, lambda h: AttentionMeter(h.layer, True).add(h.call, h.grid, h.pitch, h.prefix)):
            model(x)

    return {
        "plain forward": lambda: model(x),
        "frequency": frequency,
        "attention": attention,
        "both (eit.analyze)": lambda: analyze(model, x, batch_size=len(x)),
    }


def interleaved(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def show(times: dict[str, list[float]], images: int) -> None:
    first = next(iter(times.values()))
    for name, found in times.items():
        ratios = [t / base for t, base in zip(found, first, strict=True)]
        milliseconds = 1000 * statistics.median(found) / images
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name:24} {milliseconds:8.2f} ms an image   ratio {statistics.median(ratios):.2f} ({spread})")


def resident(name: str, size: int, batch: int, images: int) -> None:
    torch.set_num_threads(2)
    model = eit.create_model(name).eval()
    found = analyze(model, (torch.randn(batch, 3, size, size) for _ in range(images // batch)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{found.images:6} images: largest resident set {peak:,.0f} MiB")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="eit_mini")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    model = eit.create_model(given.model).eval()
    x = torch.randn(given.batch, 3, given.size, given.size)
    print(f"{given.model} at {given.size}, batch {given.batch}, {given.threads} threads, torch {torch.__version__}")
    show(interleaved(variants(model, x), given.rounds), given.batch)

    tokens = torch.randn(given.batch, *model.patch_embed.grid_size(given.size, given.size), model.embed_dim)
    grid = f"{tokens.shape[1]}x{tokens.shape[2]} tokens of {tokens.shape[3]} channels"
    print(f"one place of {grid}: the 2-D FFT against two products with the real basis")
    transforms = {
        "rfft2": lambda: torch.fft.rfft2(tokens, dim=(1, 2)),
        "real basis": lambda: fourier_coefficients(tokens),
    }
    show(interleaved(transforms, 5 * given.rounds), given.batch)

    print("memory:")
    for batches in (2, 8, 32, 128):
        arguments = (given.model, given.size, given.batch, batches * given.batch)
        process = multiprocessing.get_context("spawn").Process(target=resident, args=arguments)
        process.start()
        process.join()


if __name__ == "__main__":
    main()
