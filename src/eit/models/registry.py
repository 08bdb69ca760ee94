"""The model registry: variants, families, published results, and timm entry points."""

import csv
import inspect
from dataclasses import dataclass
from importlib import resources
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model

import eit.models.eit  # no `from` import: this module may be imported while that one waits for timm
from eit.errors import UserError, first_line, nearest
from eit.hub_access import hub_reason, prepare_hub
from eit.plots import Point

AUTHORS_CODE = "https://github.com/MrHaiPi/EIT"
TIMM = "timm/"  # prefix of any other model of timm: timm/resnet50


@dataclass(frozen=True)
class Variant:
    """A published model: its size, its ImageNet-1K accuracy in the paper (percent), and the address of its weights."""

    embed_dim: int
    depth: int
    num_heads: int
    published_params: float  # millions
    gmacs: float  # with the attention products, as tests/claims/test_cost.py counts them
    published_gmacs: float  # what the paper calls FLOPs
    published_top1: float
    published_top5: float
    weights: str


def _weights(name: str) -> str:
    return f"{AUTHORS_CODE}/tree/main/model/eit-16-4-3-{name}"


VARIANTS = {
    "eit_mini": Variant(250, 5, 10, 3.5, 1.926, 1.73, 70.0, 89.6, _weights("mini")),
    "eit_tiny": Variant(330, 8, 10, 8.9, 4.213, 3.84, 78.1, 94.0, _weights("tiny")),
    "eit_base": Variant(400, 10, 16, 16.0, 7.073, 6.52, 80.6, 95.3, _weights("base")),
    "eit_large": Variant(464, 12, 16, 25.3, 10.766, 10.0, 81.8, 95.6, _weights("large")),
}

_EIT = dict(schedule="eit", cls_conv="identity", conv_branch="depthwise", stem="conv_pool", pos_embed="none")

# The paper's configuration of LSRA for images is not known. `lsra` and `lite` are two interpretations. `lsra`: in each
# layer half of the channels are convolved, the others attend. `lite`: branch and positions of Lite Transformer's code.
FAMILIES: dict[str, dict[str, str]] = {
    "eit": _EIT,
    "eit_plus": _EIT | dict(cls_conv="zero"),  # better than published, at no cost
    "lsra": _EIT | dict(schedule="lsra", cls_conv="zero"),
    "lite": _EIT | dict(schedule="lsra", conv_branch="gated", pos_embed="learned"),
    "vit": _EIT | dict(schedule="vit", stem="patch", pos_embed="learned"),
}

# Every name that `create_model` takes: its size and its default family. The models of the family eit are published.
MODELS = {
    name.replace("eit", family): (variant, family)
    for family in ("eit", "eit_plus")
    for name, variant in VARIANTS.items()
}

default_cfgs = {
    name: dict(
        url="",
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=None,
        crop_pct=224 / 256,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="patch_embed.proj",
        classifier="head",
        license="apache-2.0",
        paper_ids="arXiv:2203.07116",
        origin_url=AUTHORS_CODE,
    )
    for name in MODELS
}


def published_results() -> list[Point]:
    """Published ImageNet-1K results at 224x224, without extra data or a teacher. published.csv names each source."""
    ours = [
        Point("EIT", f"EIT-{name.removeprefix('eit_')}", v.published_params, v.gmacs, v.published_top1, False)
        for name, v in VARIANTS.items()
    ]
    text = resources.files("eit.models").joinpath("published.csv").read_text(encoding="utf-8")
    others = [
        Point(r["family"], r["model"], float(r["params_m"]), float(r["gmacs"]), float(r["top1"]), r["pyramid"] == "yes")
        for r in csv.DictReader(text.splitlines())
    ]
    return ours + others


def list_models() -> list[str]:
    """Names that `create_model` takes.

    Examples:
        >>> list_models()[:4]
        ['eit_mini', 'eit_tiny', 'eit_base', 'eit_large']
    """
    return list(MODELS)


def model_arguments() -> list[str]:
    """Names of the arguments that `create_model` takes."""
    return ["family", *inspect.signature(eit.models.eit.EIT).parameters]


def create_model(name: str, family: str | None = None, **arguments: Any) -> "eit.models.eit.EIT":
    """A model with initial values.

    Args:
        name: one of `list_models()`, or timm/NAME with timm's arguments (the result then has timm's class).
        family: `eit`, `eit_plus`, `lsra`, `lite` or `vit`: the preset of schedule, convolution branch, class-token
            path, stem and position embedding; default: the family of the name. eit_plus_mini is short for eit_mini
            with family eit_plus.
        **arguments: any argument of `eit.EIT`; they override the preset.

    Returns:
        A model in training mode that takes images (B, in_chans, height, width) and returns logits (B, num_classes).

    Raises:
        UserError: an unknown name, family or argument, a family that contradicts an eit_plus name, or values that do
            not make a valid model.

    Examples:
        >>> create_model("eit_mini", num_classes=10, family="lsra").attn_channels
        [120, 120, 120, 120, 120]
    """
    if name.startswith(TIMM):
        if family is not None:
            raise UserError(f"family={family} is for this package's models, not for {name}")
        return _create_timm_model(name, **arguments)
    if name not in MODELS:
        raise UserError(f"unknown model {name!r}{nearest(name, MODELS)} (known: {', '.join(MODELS)}, timm/NAME)")
    if family is not None and family not in FAMILIES:
        raise UserError(f"unknown family {family!r}{nearest(family, FAMILIES)} (known: {', '.join(FAMILIES)})")
    if "pretrained" in arguments:
        raise UserError(
            f"no pretrained weights of {name} are included: use eit.load(PATH), or eit.load_weights(model, PATH)"
        )
    for argument in arguments:
        if argument not in model_arguments():
            raise UserError(f"{name} has no argument {argument!r}{nearest(argument, model_arguments())}")
    try:
        return timm.create_model(name, family=family, **arguments)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None


def is_model(name: str) -> bool:
    """Whether `create_model` knows the name. Names of hubs, which timm would download from, do not count."""
    return name in MODELS or (name.startswith(TIMM) and timm.is_model(name.removeprefix(TIMM)))


def check_timm_name(name: str) -> None:
    """Raise a UserError if timm has no such model."""
    if not is_model(name):
        plain = name.removeprefix(TIMM)
        raise UserError(f"timm has no model {plain!r}{nearest(plain, timm.list_models())}")


def _create_timm_model(name: str, img_size: int | None = None, **arguments: Any) -> Any:
    check_timm_name(name)
    plain = name.removeprefix(TIMM)
    if img_size is not None and getattr(timm.get_pretrained_cfg(plain), "fixed_input_size", False):
        arguments["img_size"] = img_size
    is_download = bool(arguments.get("pretrained"))
    if is_download:
        prepare_hub()
    try:
        return timm.create_model(plain, **arguments)
    except Exception as error:  # each architecture raises its own errors, and so do downloads
        reason = hub_reason(error) if is_download else first_line(error)
        raise UserError(f"{name}: {reason}{'; weights can be given as a file' if is_download else ''}") from None


def check_size(model: Any, size: int, own: int, name: str) -> None:
    """Raise a UserError if `model`, made for inputs of `own` pixels, does not accept images of `size` pixels."""
    if isinstance(model, eit.models.eit.EIT):
        stem = model.patch_embed
        if 0 in stem.grid_size(size, size):
            least = next(n for n in range(size, 1 << 20) if 0 not in stem.grid_size(n, n))
            raise UserError(f"--size {size} is too small for {name}: the smallest size is {least}")
    elif size != own and (
        hasattr(model, "image_size") or getattr(model, "pretrained_cfg", {}).get("fixed_input_size")
    ):  # torchvision's ViT, timm's
        raise UserError(f"--size {size}: {name} accepts only {own} pixels")


def head_names(model: Any) -> tuple[str, ...]:
    """Names of the classifier's modules; `head` for a model without timm's configuration."""
    names = getattr(model, "pretrained_cfg", {}).get("classifier", "head")
    return (names,) if isinstance(names, str) else tuple(names)


def _create_eit(name: str, pretrained: bool, family: str | None = None, **arguments: Any) -> "eit.models.eit.EIT":
    """The model of timm's entry point `name`. timm adds its own arguments to the model's."""
    variant, own = MODELS[name]
    if own != "eit" and family not in (own, None):
        raise ValueError(f"family={family} is not {own}, the family in the name: leave out family")
    preset, saved = FAMILIES[family or own], arguments.get("pretrained_model_args")
    if saved and "cls_conv" not in saved:  # a configuration in timm's format that is older than the argument
        preset = preset | dict(cls_conv="identity")
    size = dict(embed_dim=variant.embed_dim, depth=variant.depth, num_heads=variant.num_heads)
    model = build_model_with_cfg(
        eit.models.eit.EIT,
        name,
        pretrained,
        pretrained_filter_fn=eit.models.eit.checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(-3, -2, -1), feature_cls="getter"),
        **(size | preset | arguments),
    )
    model._model_args = preset  # timm saves it with the weights, which then do not depend on later presets
    return model


@register_model
def eit_mini(pretrained: bool = False, **arguments: Any) -> "eit.models.eit.EIT":
    """EIT16/4/3-mini: 70.0% ImageNet-1K top-1 (published)."""
    return _create_eit("eit_mini", pretrained, **arguments)


@register_model
def eit_tiny(pretrained: bool = False, **arguments: Any) -> "eit.models.eit.EIT":
    """EIT16/4/3-tiny: 78.1% ImageNet-1K top-1 (published)."""
    return _create_eit("eit_tiny", pretrained, **arguments)


@register_model
def eit_base(pretrained: bool = False, **arguments: Any) -> "eit.models.eit.EIT":
    """EIT16/4/3-base: 80.6% ImageNet-1K top-1 (published)."""
    return _create_eit("eit_base", pretrained, **arguments)


@register_model
def eit_large(pretrained: bool = False, **arguments: Any) -> "eit.models.eit.EIT":
    """EIT16/4/3-large: 81.8% ImageNet-1K top-1 (published)."""
    return _create_eit("eit_large", pretrained, **arguments)


@register_model
def eit_plus_mini(pretrained: bool = False, **arguments: Any) -> "eit.models.eit.EIT":
    """EIT+ of the size EIT16/4/3-mini; no published accuracy."""
    return _create_eit("eit_plus_mini", pretrained, **arguments)


@register_model
def eit_plus_tiny(pretrained: bool = False, **arguments: Any) -> "eit.models.eit.EIT":
    """EIT+ of the size EIT16/4/3-tiny; no published accuracy."""
    return _create_eit("eit_plus_tiny", pretrained, **arguments)


@register_model
def eit_plus_base(pretrained: bool = False, **arguments: Any) -> "eit.models.eit.EIT":
    """EIT+ of the size EIT16/4/3-base; no published accuracy."""
    return _create_eit("eit_plus_base", pretrained, **arguments)


@register_model
def eit_plus_large(pretrained: bool = False, **arguments: Any) -> "eit.models.eit.EIT":
    """EIT+ of the size EIT16/4/3-large; no published accuracy."""
    return _create_eit("eit_plus_large", pretrained, **arguments)


@register_model
def resnet24_small(num_classes: int = 1000, in_chans: int = 3, pretrained: bool = False, **of_timm: Any) -> Any:
    """torchvision's ResNet with 2, 3, 3, 3 basic blocks and a stem for small images, for eit reproduce.

    It has 17.4 M parameters with 10 classes. EIT at 32x32 has 3.08 M, which is 17.7% of that, as in the paper.
    """
    from torchvision.models.resnet import BasicBlock, ResNet

    if unknown := set(of_timm) - {"pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"}:
        raise TypeError(f"no argument {min(unknown)!r}")
    if pretrained:
        raise RuntimeError("it has no published weights")
    model = ResNet(BasicBlock, [2, 3, 3, 3], num_classes=num_classes)
    model.conv1 = torch.nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
    torch.nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own
    model.maxpool = torch.nn.Identity()
    model.num_classes, model.pretrained_cfg = num_classes, dict(classifier="fc")
    return model
