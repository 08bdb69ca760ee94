"""Several models side by side on the same images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eit.analysis import filters, pictures, robustness
from eit.analysis.analyzed_model import AnalyzedModel, shape
from eit.analysis.frequency import RHO
from eit.analysis.hooks import CannotMeasure
from eit.analysis.measure import analyze
from eit.analysis.panels import MARKERS, PALETTE
from eit.analysis.subjects import open_subjects
from eit.console import say, track
from eit.data.datasets import readable_images
from eit.data.images import Images, denormalise
from eit.data.loaders import EvaluationLoader
from eit.errors import UserError
from eit.inference.evaluation_data import match_classes


@dataclass
class Options:
    """What is measured, and how."""

    size: int | None = None  # pixels; None: each model's own
    initial: bool = True  # each trained model of ours beside its initial values
    rho: float = RHO
    renormalize: bool = True
    bands: bool = False  # accuracy under noise of frequency bands: the images must be labelled
    filters: bool = False  # accuracy with filtered tokens: the images must be labelled
    pictures: int = 4  # images to show
    rollout: bool = False
    grad_cam: bool = False
    batch_size: int = 16
    workers: int | None = None


@dataclass
class Comparison:
    """What was measured of each model, which models could not be and why, and on which images."""

    measured: list[AnalyzedModel]
    left_out: list[str]
    images: list[str]  # names


def compare(
    names: Sequence[str],
    images: Images,
    device: torch.device,
    options: Options,
) -> Comparison:
    """Measure the models on the images, one after the other; what cannot be measured is said, and the rest goes on.

    Raises:
        UserError: an unknown name, images none of which can be read, or no model that can be measured.
    """
    if options.grad_cam:
        pictures.check_grad_cam()
    images = readable_images(images)
    comparison = Comparison([], [], images.names)
    shown = images.evenly(options.pictures)
    numbers: dict[str, int] = {}  # of models, a group counts as one
    for subject in open_subjects(names, options.size, options.initial):
        number = numbers.setdefault(subject.group or subject.label, len(numbers))
        colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        subject.model.to(device)
        loader = EvaluationLoader(images, subject.view, options.batch_size, options.workers, device)
        try:
            analysis = analyze(subject.model, _watched(loader, subject.name), options.rho, options.renormalize)
        except CannotMeasure as error:
            comparison.left_out.append(f"{subject.name}: {error}")
            continue
        like = next((o for o in comparison.measured if subject.group and o.subject.group == subject.group), None)
        if like is not None and shape(like.analysis) != shape(analysis):
            raise UserError(
                f"{subject.group}: {like.subject.source} and {subject.source} differ in layers, heads or tokens, so "
                "they have no mean: name them one by one"
            )
        analyzed = AnalyzedModel(subject, analysis, colour, marker, list(analysis.missing))
        if (options.bands or options.filters) and subject.state == "trained":
            _accuracy(analyzed, images, device, options)
        if len(shown) and subject.state != "initial" and like is None:  # of a group's runs one is enough
            batch = next(iter(EvaluationLoader(shown, subject.view, len(shown), 0, device)))
            analyzed.pictures, missing = pictures.take(subject.model, batch.images, options.rollout, options.grad_cam)
            analyzed.missing += missing
            pixels = denormalise(batch.images, subject.view.mean, subject.view.std)
            analyzed.examples = [pictures.example(name, x) for name, x in zip(shown.names, pixels, strict=True)]
        if subject.state != "initial":
            for text in analyzed.missing:
                say(f"{analyzed.name}: no {text}")
        comparison.measured.append(analyzed)
        subject.model = None  # the numbers are what is kept
    if not comparison.measured:
        raise UserError(comparison.left_out[0])
    for line in comparison.left_out:
        say(line)
    return comparison


def _watched(loader: EvaluationLoader, title: str) -> Iterator[Tensor]:
    """The loader's images, each once, with a progress bar."""
    for batch in track(loader, title, loader.blocks):
        yield batch.images[: batch.valid]


def _accuracy(
    analyzed: AnalyzedModel,
    images: Images,
    device: torch.device,
    options: Options,
) -> None:
    """Accuracy under noise of each band and with filtered tokens, where the classes of weights and images agree."""
    subject, asked = analyzed.subject, []
    asked += ["accuracy under noise"] if options.bands else []
    asked += ["accuracy with filtered tokens"] if options.filters else []
    if subject.card is None:
        analyzed.missing += [f"{what}: its weights do not say which classes they know" for what in asked]
        return
    try:
        own = match_classes(subject.card, images)
    except UserError as error:
        analyzed.missing += [f"{what}: {error}" for what in asked]
        return
    loader = EvaluationLoader(own, subject.view, options.batch_size, options.workers, device)
    if options.bands:
        analyzed.bands = robustness.band_accuracy(subject.model, loader, subject.view)
    if options.filters:
        try:
            analyzed.filters = filters.filter_accuracy(subject.model, loader, options.rho)
        except CannotMeasure as error:
            analyzed.missing.append(f"accuracy with filtered tokens: {error}")
