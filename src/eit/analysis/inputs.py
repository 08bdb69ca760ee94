"""The inputs of an analysis: models by name, each with the preprocessing and the source of its weights; images."""

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
from eit.data.images import MAX_PIXELS, Images, Preprocessing
from eit.data.timm_datasets import ImageStream
from eit.errors import UserError, nearest, shorten
from eit.models.registry import FAMILIES, MODELS, TIMM, VARIANTS, check_size, check_timm_name, create_model
from eit.randomness import Stream, set_seed
from eit.training.setup import build_model
from eit.weights.card import Card
from eit.weights.load import INCLUDED, find_weights, is_weights_name, load

TORCHVISION = "torchvision/"


@dataclass
class LoadedModel:
    """A model to analyse, in evaluation mode."""

    label: str  # short, and unique in a report
    state: str  # trained, untrained, or initial: the initial values of the trained model before it
    model: Any
    view: Preprocessing
    source: str  # the name as the user gave it, or the seed of the initial values
    sha256: str = ""  # of the weights file
    card: Card | None = None
    group: str = ""  # the pattern, if it matched several runs

    @property
    def seed(self) -> int | None:
        """The seed of the recipe that trained it."""
        recipe = self.card.recipe if self.card else None
        return None if recipe is None else parse_recipe(recipe).seed

    @property
    def name(self) -> str:
        """The label, with the state unless it is trained."""
        return self.label if self.state == "trained" else f"{self.label} ({self.state})"

    @property
    def provenance(self) -> str:
        """The source of its weights, for a caption."""
        if self.state == "initial":
            return f"{self.name}: {self.source}"
        digest = f", sha256 {self.sha256[:12]}" if self.sha256 else ""
        metrics = (self.card.metrics if self.card else None) or {}
        top1 = f", validation top-1 {metrics['val_top1']:.2f}%" if "val_top1" in metrics else ""
        return f"{self.label}: {self.source} ({self.state}{top1}{digest})"


def load_models(names: Sequence[str], size: int | None = None, initial: bool = True) -> Iterator[LoadedModel]:
    """Load the models in order. With `initial`, each trained model of this package is followed by its initial values.

    A name is a weights file, a run folder, included weights, a model of this package (NAME or FAMILY/NAME), of timm
    (timm/NAME) or of torchvision (torchvision/NAME), or a pattern, see `expand_groups`. `size` replaces the input size
    in pixels.

    Raises:
        UserError: an unknown name, or a model that does not accept `size`.
    """
    check_names(names)
    runs = expand_groups(names, tell=True)
    for (name, group), label in zip(runs, _labels([name for name, _ in runs]), strict=True):
        loaded = replace(_open(name, label), group=group)
        if size is not None:
            check_size(loaded.model, size, loaded.view.size, loaded.label)
            resize = size * loaded.view.resize // loaded.view.size
            loaded.view = replace(loaded.view, size=size, resize=resize)
        yield loaded
        if initial and loaded.card is not None:
            yield _initial(loaded)


def expand_groups(names: Sequence[str], tell: bool = False) -> list[tuple[str, str]]:
    """(name, group) of each model. A pattern such as runs/eit* stands for all weights that match it, as one group.

    The group is the pattern, or "" for a single model. A match without weights is left out (`tell`: with a line).

    Raises:
        UserError: no weights match a pattern.
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
            raise UserError(f"no weights file, and no run folder with weights, matches {name}")
        expanded += [(run, name if len(runs) > 1 else "") for run in runs]
    return expanded


def check_names(names: Sequence[str]) -> None:
    """Raise a UserError for an unknown name, before anything is computed."""
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
    """The last parts of each path, as many as needed to distinguish them; a number if a name is given twice."""
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


def _open(name: str, label: str) -> LoadedModel:
    kind, _, plain = name.partition("/")
    if is_weights_name(name):
        model = load(name)
        digest = hashlib.sha256(find_weights(name).read_bytes()).hexdigest()
        return LoadedModel(label, "trained", model, model.card.view, name, digest, model.card)
    state = "untrained"
    set_seed(Stream.INITIAL_VALUES, 0)
    if name in MODELS:
        model = create_model(name)
    elif name.startswith(TIMM):
        model, state = _timm_model(name)
    elif name.startswith(TORCHVISION):
        model, state = _torchvision_model(plain)
        return LoadedModel(label, state, model.eval(), _torchvision_view(plain), name)
    else:
        model = create_model(plain, family=kind)
    return LoadedModel(label, state, model.eval(), _timm_view(model), name)


def _timm_model(name: str) -> tuple[Any, str]:
    if timm.get_pretrained_cfg(name.removeprefix(TIMM)).has_weights:
        try:
            return create_model(name, pretrained=True), "trained"
        except UserError as error:
            say(f"{str(error).partition(';')[0]}; the model is analysed untrained")
    return create_model(name), "untrained"


def _torchvision_model(name: str) -> tuple[Any, str]:
    try:
        return torchvision.models.get_model(name, weights="DEFAULT"), "trained"
    except OSError as error:
        say(f"the weights of {TORCHVISION}{name} cannot be downloaded ({error}); the model is analysed untrained")
    return torchvision.models.get_model(name), "untrained"


def _timm_view(model: Any) -> Preprocessing:
    """Preprocessing by timm's configuration of the model."""
    config = resolve_data_config({}, model=model)
    size = config["input_size"][-1]
    resize = math.floor(size / config["crop_pct"])
    return Preprocessing(size, resize, _interpolation(config["interpolation"]), config["mean"], config["std"])


def _torchvision_view(name: str) -> Preprocessing:
    """Preprocessing by the transforms of the model's weights."""
    transforms = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    size, resize = transforms.crop_size[0], transforms.resize_size[0]
    return Preprocessing(
        size, resize, _interpolation(transforms.interpolation.value), tuple(transforms.mean), tuple(transforms.std)
    )


def _interpolation(name: str) -> Literal["bilinear", "bicubic"]:
    return "bilinear" if name == "bilinear" else "bicubic"


def _initial(trained: LoadedModel) -> LoadedModel:
    """The same model with the initial values of its training."""
    card = trained.card
    assert card is not None
    if card.recipe is None:
        set_seed(Stream.INITIAL_VALUES, 0)
        model, source = card.create_model(), "initial values of seed 0, because the weights name no seed"
    else:
        recipe = parse_recipe(card.recipe)
        own = card.arguments.get("cls_conv")
        if own is not None and recipe.model.cls_conv is None:  # the weights are older than this key of the family
            recipe = recipe.model_copy(update=dict(model=recipe.model.model_copy(update=dict(cls_conv=own))))
        model = build_model(recipe, len(card.classes), initial=False)
        source = f"initial values of seed {recipe.seed}"
        if recipe.model.pretrained:
            source += ", without the weights that the run started from"
    return replace(trained, state="initial", model=model.eval(), source=source, sha256="")


def choose_images(
    path: str, count: int, labelled: str | bool, max_pixels: int = MAX_PIXELS, without: Path | None = None
) -> Images:
    """At most `count` images of `path`, evenly spaced: the validation images of a data set, or all below a folder.

    Args:
        path: a folder or a data set.
        count: largest number of images.
        labelled: whether labels are needed, or the name of the option that needs them.
        max_pixels: images with more pixels are refused.
        without: a folder to leave out, such as the figures of an earlier report.

    Raises:
        UserError: no such path, or no images there.
    """
    if not path.strip():
        raise UserError("--data '': give a folder of images or a data set")
    config = data_config(root=path, max_pixels=max_pixels)
    root = Path(path).expanduser()
    if path != DIGITS and not root.exists():
        hint = f"; did you mean {DIGITS}?" if path in DIGITS else ""
        raise UserError(f"--data {path}: no such folder or data set{hint}")
    if not labelled:
        return open_unlabelled(config, "val", without).evenly(count)
    try:
        images = open_evaluation(config)
    except UserError as error:
        option = labelled if isinstance(labelled, str) else "--bands"
        raise UserError(f"{option} needs labelled images: {error}") from None
    assert not isinstance(images, ImageStream)  # streams need data.dataset
    return images.evenly(count)
