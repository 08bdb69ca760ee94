"""Several models side by side on the same images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eit.analysis import pictures, robustness
from eit.analysis.figures import MARKERS, PALETTE, Measured
from eit.analysis.frequency import RHO
from eit.analysis.measure import analyze
from eit.analysis.subjects import Subject, check_names, open_subjects
from eit.console import say, track
from eit.images import Images
from eit.loader import EvaluationLoader

MOST_PICTURES = 8


@dataclass
class Options:
    """What is measured, and how."""

    size: int | None = None  # pixels; None: each model's own
    initial: bool = True  # each trained model of ours beside its initial values
    rho: float = RHO
    renormalize: bool = True
    bands: bool = False  # accuracy under noise of frequency bands: the images must be labelled
    pictures: int = 4  # images to show; at most MOST_PICTURES
    rollout: bool = False
    grad_cam: bool = False
    batch_size: int = 16
    workers: int | None = None


def compare(
    names: Sequence[str],
    images: Images,
    device: torch.device,
    options: Options,
    with_classes_of: Callable[[Any, Images], Any],
) -> tuple[list[Measured], list[pictures.Example]]:
    """What was measured of each model, and the images that are shown.

    `with_classes_of(card, images)` gives images the class numbers of weights.
    """
    check_names(names)
    measured: list[Measured] = []
    shown: list[pictures.Example] = []
    count = min(options.pictures, len(images))
    examples = images.subset(i * len(images) // count for i in range(count)) if count else None
    for subject in open_subjects(names, options.size, options.initial):
        number = len([one for one in measured if not one.is_initial]) - (subject.state == "initial")
        subject.model.to(device)
        loader = EvaluationLoader(images, subject.view, options.batch_size, options.workers, device)
        title = subject.label + (" (initial)" if subject.state == "initial" else "")
        analysis = analyze(subject.model, _watched(loader, title), options.rho, options.renormalize)
        if subject.state != "initial":
            for text in analysis.missing:
                say(f"{subject.label}: no {text}")
        one = Measured(subject, analysis, PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)])
        if options.bands and subject.state == "trained":
            one.bands = _bands(subject, images, device, options, with_classes_of)
        if examples is not None and subject.state != "initial":
            view = subject.view
            _, batch = next(iter(EvaluationLoader(examples, view, len(examples), 0, device)))
            one.pictures = pictures.take(subject.model, batch.images, options.rollout, options.grad_cam)
            if not shown:
                std, mean = (torch.tensor(v).view(-1, 1, 1) for v in (view.std, view.mean))
                pixels = (batch.images.cpu() * std + mean).clamp(0, 1)
                shown = [pictures.example(name, x) for name, x in zip(examples.names, pixels, strict=True)]
        measured.append(one)
        subject.model = None  # the numbers are what is kept
    return measured, shown


def _watched(loader: EvaluationLoader, title: str) -> Iterator[Tensor]:
    """The loader's images, each once, with a progress bar."""
    for _, batch in track(loader, title, loader.blocks):
        yield batch.images[: batch.valid]


def _bands(
    subject: Subject,
    images: Images,
    device: torch.device,
    options: Options,
    with_classes_of: Callable[[Any, Images], Images],
) -> list[robustness.Band] | None:
    if subject.card is None:
        say(f"{subject.label}: no accuracy under noise: which classes it knows is not said by its weights")
        return None
    own = with_classes_of(subject.card, images)
    loader = EvaluationLoader(own, subject.view, options.batch_size, options.workers, device)
    return robustness.band_accuracy(subject.model, loader, subject.view)
