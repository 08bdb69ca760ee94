"""What is analysed: names on the command line -> models, with what they want to see and where they come from."""

import glob
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torchvision
from timm.data import resolve_data_config

from eit.config import data_config, parse_recipe
from eit.console import say
from eit.data.datasets import DIGITS, open_evaluation, open_unlabelled
from eit.data.images import MAX_PIXELS, Images, View
from eit.data.timm_datasets import ImageStream
from eit.errors import UserError, nearest, shorten
from eit.models.registry import FAMILIES, MODELS, TIMM, VARIANTS, check_size, check_timm_name, create_model
from eit.randomness import Stream, set_seed
from eit.training.setup import build_model
from eit.weights.card import Card
from eit.weights.load import INCLUDED, find_weights, is_weights_name, load

TORCHVISION = "torchvision/"


@dataclass
class Subject:
    """A model to analyse, in evaluation mode."""

    label: str  # short, and unique in a report
    state: str  # trained, untrained, or initial: the initial values of the trained one before it
    model: Any
    view: View
    source: str  # as the user gave it, or what its initial values are
    sha256: str = ""  # of the weights file
    card: Card | None = None
    group: str = ""  # the pattern that it was found by, if several runs were

    @property
    def seed(self) -> int | None:
        """Of the recipe that it was trained by."""
        recipe = self.card.recipe if self.card else None
        return None if recipe is None else parse_recipe(recipe).seed

    @property
    def name(self) -> str:
        """The label, with what must be known of it wherever it is shown."""
        return self.label if self.state == "trained" else f"{self.label} ({self.state})"

    @property
    def provenance(self) -> str:
        """Where the values come from, for a caption."""
        if self.state == "initial":
            return f"{self.name}: {self.source}"
        digest = f", sha256 {self.sha256[:12]}" if self.sha256 else ""
        metrics = (self.card.metrics if self.card else None) or {}
        top1 = f", validation top-1 {metrics['val_top1']:.2f}%" if "val_top1" in metrics else ""
        return f"{self.label}: {self.source} ({self.state}{top1}{digest})"


def open_subjects(names: Sequence[str], size: int | None = None, initial: bool = True) -> Iterator[Subject]:
    """The models in order; behind each trained one of ours the same with its initial values, if wanted.

    A name is that of a checkpoint (a weights file, a run folder, one that ships), of the zoo (NAME or FAMILY/NAME), of
    timm (timm/NAME) or of torchvision (torchvision/NAME); or a pattern, see `expand_groups`. `size` replaces the pixels
    of their input.

    Raises:
        UserError: no such checkpoint or model, or one that does not take `size`.
    """
    check_names(names)
    runs = expand_groups(names, tell=True)
    for (name, group), label in zip(runs, _labels([name for name, _ in runs]), strict=True):
        subject = replace(_open(name, label), group=group)
        if size is not None:
            check_size(subject.model, size, subject.view.size, subject.label)
            resize = size * subject.view.resize // subject.view.size
            subject.view = replace(subject.view, size=size, resize=resize)
        yield subject
        if initial and subject.card is not None:
            yield _initial(subject)


def expand_groups(names: Sequence[str], tell: bool = False) -> list[tuple[str, str]]:
    """(name, group) of each model: a pattern such as runs/eit* stands for all weights that match it, as one group.

    The group is the pattern, or "" of a name that stands alone. A match without weights is left out, with a line if
    this shall `tell` of it.

    Raises:
        UserError: a pattern that no weights match.
    """
    expanded = []
    for name in names:
        if not glob.has_magic(name) or os.path.exists(name):
            expanded.append((name, ""))
            continue
        runs = []
        for path in sorted(glob.glob(os.path.expanduser(name))):
            try:
                find_weights(path)
                runs.append(path)
            except UserError as error:
                if tell:
                    say(f"{error}: left out of {name}")
        if not runs:
            raise UserError(f"no run folder with weights and no weights file matches {name}")
        expanded += [(run, name if len(runs) > 1 else "") for run in runs]
    return expanded


def check_names(names: Sequence[str]) -> None:
    """Raise a UserError for a name that `open_subjects` would refuse, before anything is computed."""
    for name, _ in expand_groups(names):
        kind, _, plain = name.partition("/")
        if is_weights_name(name) or name in MODELS or (kind in FAMILIES and plain in VARIANTS):
            continue
        if name.startswith(TIMM):
            check_timm_name(name)
        elif name.startswith(TORCHVISION):
            known = torchvision.models.list_models(module=torchvision.models)
            if plain not in known:
                raise UserError(f"torchvision has no model {plain!r}{nearest(plain, known)}")
        else:
            near = nearest(name, [*MODELS, *INCLUDED])
            raise UserError(
                f"no weights at {name}{near} (known: a weights file, a run folder, {', '.join(INCLUDED)}, "
                f"{', '.join(MODELS)}, lsra/eit_mini and so on, timm/NAME, torchvision/NAME)"
            )


def _labels(names: Sequence[str]) -> list[str]:
    """The last part of a path, or as many as tell the paths apart; a number where the same name is given twice."""
    parts = [
        [name]
        if name.partition("/")[0] in FAMILIES
        else os.path.normpath(name).removesuffix(".safetensors").split(os.sep)
        for name in names
    ]
    different = len(set(map(tuple, parts)))
    length = 1
    while len({tuple(part[-length:]) for part in parts}) < different:
        length += 1
    labels = [shorten("/".join(part[-length:]), 40) for part in parts]
    return [x if x not in labels[:i] else f"{x} ({labels[:i].count(x) + 1})" for i, x in enumerate(labels)]


def _open(name: str, label: str) -> Subject:
    kind, _, plain = name.partition("/")
    if is_weights_name(name):
        model = load(name)
        digest = hashlib.sha256(find_weights(name).read_bytes()).hexdigest()
        return Subject(label, "trained", model, model.card.view, name, digest, model.card)
    state = "untrained"
    set_seed(Stream.INITIAL_VALUES, 0)
    if name in MODELS:
        model = create_model(name)
    elif name.startswith(TIMM):
        model, state = _timm_model(name)
    elif name.startswith(TORCHVISION):
        model, state = _torchvision_model(plain)
        return Subject(label, state, model.eval(), _torchvision_view(plain), name)
    else:
        model = create_model(plain, family=kind)
    return Subject(label, state, model.eval(), _timm_view(model), name)


def _timm_model(name: str) -> tuple[Any, str]:
    if timm.get_pretrained_cfg(name.removeprefix(TIMM)).has_weights:
        try:
            return create_model(name, pretrained=True), "trained"
        except UserError as error:
            say(f"{str(error).partition(';')[0]}; it is analysed untrained")
    return create_model(name), "untrained"


def _torchvision_model(name: str) -> tuple[Any, str]:
    try:
        return torchvision.models.get_model(name, weights="DEFAULT"), "trained"
    except OSError as error:
        say(f"the weights of {TORCHVISION}{name} cannot be had ({error}); it is analysed untrained")
    return torchvision.models.get_model(name), "untrained"


def _timm_view(model: Any) -> View:
    """What timm's configuration of the model says of its input."""
    config = resolve_data_config({}, model=model)
    size = config["input_size"][-1]
    resize = math.floor(size / config["crop_pct"])
    return View(size, resize, _interpolation(config["interpolation"]), config["mean"], config["std"])


def _torchvision_view(name: str) -> View:
    """What the transforms of the model's weights do."""
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    size, resize = transforms.crop_size[0], transforms.resize_size[0]
    return View(
        size, resize, _interpolation(transforms.interpolation.value), tuple(transforms.mean), tuple(transforms.std)
    )


def _interpolation(name: str) -> Literal["bilinear", "bicubic"]:
    return "bilinear" if name == "bilinear" else "bicubic"


def _initial(trained: Subject) -> Subject:
    """The model of a checkpoint with the values that its training began with."""
    card = trained.card
    assert card is not None
    if card.recipe is None:
        set_seed(Stream.INITIAL_VALUES, 0)
        model, source = card.create_model(), "initial values of seed 0, for the weights do not say their own"
    else:
        recipe = parse_recipe(card.recipe)
        own = card.arguments.get("cls_conv")
        if own is not None and recipe.model.cls_conv is None:  # the family's setting is younger than the weights
            recipe = recipe.model_copy(update=dict(model=recipe.model.model_copy(update=dict(cls_conv=own))))
        model = build_model(recipe, len(card.classes), initial=False)
        source = f"initial values of seed {recipe.seed}"
        if recipe.model.pretrained:
            source += ", without the weights that the run started from"
    return replace(trained, state="initial", model=model.eval(), source=source, sha256="")


def choose_images(
    path: str, count: int, labelled: str | bool, max_pixels: int = MAX_PIXELS, without: Path | None = None
) -> Images:
    """At most `count` images of `path`, evenly spaced: of a data set its validation images, else all below the folder.

    Classes are told from folders only where the images must be `labelled`, which may be the option that needs labels.
    Those below the folder `without` do not count: the figures of an earlier report.

    Raises:
        UserError: no such path, or no images there.
    """
    if not path.strip():
        raise UserError("--data '': a folder of images, or a data set, is expected")
    config = data_config(root=path, max_pixels=max_pixels)
    root = Path(path).expanduser()
    if path != DIGITS and not root.exists():
        hint = f"; did you mean {DIGITS}?" if path in DIGITS else ""
        raise UserError(f"no such folder, image or data set: {path}{hint}")
    if not labelled:
        return open_unlabelled(config, "val", without).evenly(count)
    try:
        images = open_evaluation(config)
    except UserError as error:
        option = labelled if isinstance(labelled, str) else "--bands"
        raise UserError(f"{option} needs labelled images: {error}") from None
    assert not isinstance(images, ImageStream)  # those have a data.dataset
    return images.evenly(count)
