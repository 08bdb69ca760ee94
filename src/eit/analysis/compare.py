"""Measure several models on the same images."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eit.analysis import filters, image_maps, robustness
from eit.analysis.analyzed_model import AnalyzedModel, layout
from eit.analysis.frequency import RHO
from eit.analysis.hooks import CannotMeasure
from eit.analysis.inputs import load_models
from eit.analysis.measure import analyze
from eit.analysis.panels import MARKERS, PALETTE
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
    initial: bool = True  # also measure the initial values of this package's trained models
    rho: float = RHO
    renormalize: bool = True
    bands: bool = False  # accuracy under noise of frequency bands; needs labels
    filters: bool = False  # accuracy with filtered tokens; needs labels
    pictures: int = 4  # number of images to show
    rollout: bool = False
    grad_cam: bool = False
    batch_size: int = 16
    workers: int | None = None


@dataclass
class Comparison:
    """The measured models, the models that could not be measured and why, and the names of the images."""

    measured: list[AnalyzedModel]
    left_out: list[str]
    images: list[str]  # names


def compare(
    names: Sequence[str],
    images: Images,
    device: torch.device,
    options: Options,
) -> Comparison:
    """Measure the models on the images, one after the other. What cannot be measured is printed, the rest is measured.

    Raises:
        UserError: an unknown name, images none of which can be read, or no model that can be measured.
    """
    if options.grad_cam:
        image_maps.check_grad_cam()
    images = readable_images(images)
    comparison = Comparison([], [], images.names)
    shown = images.evenly(options.pictures)
    numbers: dict[str, int] = {}  # of models; a group counts as one
    for loaded in load_models(names, options.size, options.initial):
        number = numbers.setdefault(loaded.group or loaded.label, len(numbers))
        colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        loaded.model.to(device)
        loader = EvaluationLoader(images, loaded.view, options.batch_size, options.workers, device)
        try:
            analysis = analyze(loaded.model, _watched(loader, loaded.name), options.rho, options.renormalize)
        except CannotMeasure as error:
            comparison.left_out.append(f"{loaded.name}: {error}")
            continue
        first = next((o for o in comparison.measured if loaded.group and o.loaded.group == loaded.group), None)
        if first is not None and layout(first.analysis) != layout(analysis):
            raise UserError(
                f"{loaded.group}: {first.loaded.source} and {loaded.source} differ in layers, heads or tokens and "
                "cannot be averaged: name them one by one"
            )
        analyzed = AnalyzedModel(loaded, analysis, colour, marker, list(analysis.missing))
        if (options.bands or options.filters) and loaded.state == "trained":
            _accuracy(analyzed, images, device, options)
        if len(shown) and loaded.state != "initial" and first is None:  # one run of a group is enough
            batch = next(iter(EvaluationLoader(shown, loaded.view, len(shown), 0, device)))
            analyzed.image_maps, missing = image_maps.compute_maps(
                loaded.model, batch.images, options.rollout, options.grad_cam
            )
            analyzed.missing += missing
            pixels = denormalise(batch.images, loaded.view.mean, loaded.view.std)
            analyzed.shown_images = [
                image_maps.shown_image(name, x) for name, x in zip(shown.names, pixels, strict=True)
            ]
        if loaded.state != "initial":
            for text in analyzed.missing:
                say(f"{analyzed.name}: no {text}")
        comparison.measured.append(analyzed)
        loaded.model = None  # only the measurements are kept
    if not comparison.measured:
        raise UserError(comparison.left_out[0])
    for line in comparison.left_out:
        say(line)
    return comparison


def _watched(loader: EvaluationLoader, title: str) -> Iterator[Tensor]:
    """The images of the loader without padding, with a progress bar."""
    for batch in track(loader, title, loader.blocks):
        yield batch.images[: batch.valid]


def _accuracy(
    analyzed: AnalyzedModel,
    images: Images,
    device: torch.device,
    options: Options,
) -> None:
    """Accuracy under noise of each band and with filtered tokens, if the images have the classes of the weights."""
    loaded, asked = analyzed.loaded, []
    asked += ["accuracy under noise"] if options.bands else []
    asked += ["accuracy with filtered tokens"] if options.filters else []
    if loaded.card is None:
        analyzed.missing += [f"{what}: its weights do not name their classes" for what in asked]
        return
    try:
        own = match_classes(loaded.card, images)
    except UserError as error:
        analyzed.missing += [f"{what}: {error}" for what in asked]
        return
    loader = EvaluationLoader(own, loaded.view, options.batch_size, options.workers, device)
    if options.bands:
        analyzed.bands = robustness.band_accuracy(loaded.model, loader, loaded.view)
    if options.filters:
        try:
            analyzed.filters = filters.filter_accuracy(loaded.model, loader, options.rho)
        except CannotMeasure as error:
            analyzed.missing.append(f"accuracy with filtered tokens: {error}")
