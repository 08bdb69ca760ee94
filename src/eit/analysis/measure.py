"""`eit.analyze`: frequencies, attention and class token in every layer of a vision model, in one pass over images."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

import torch
from torch import Tensor, nn

from eit.analysis.attention import Attention, AttentionMeter, merge_calls
from eit.analysis.class_token import PLACES, ClassToken, ClassTokenMeter
from eit.analysis.frequency import RHO, Frequency, FrequencyMeter, Grid, noise_shares
from eit.analysis.hooks import AttentionCall, CannotMeasure, Tokens, layers_of, unwrap, watch
from eit.analysis.moments import Moments
from eit.analysis.smoothing import Smoothing, SmoothingMeter
from eit.analysis.transfer import TransferFunction, TransferMeter
from eit.errors import UserError
from eit.inference.evaluate import evaluation_mode
from eit.precision import float32_products

M = TypeVar("M")


@dataclass
class Analysis:
    """The measurements of one model.

    Attributes:
        images: number of images.
        image_size: (height, width) in pixels.
        depth: number of layers.
        rho: frequencies above it are high; 1 is the Nyquist frequency of an axis.
        renormalize: whether attention to prefix tokens was removed.
        frequency: by layer, within a layer in the order of computation.
        attention: by layer.
        missing: what cannot be measured of this model, and why.
        class_token: norm and image-dependent share, by layer; empty for a model without class token.
        logit_spread: standard deviation of the outputs over images, averaged over outputs; NaN for one image, or if the
            model's output is not (B, K).
        reads_class_token: whether the head reads the class token.
        transfer: update divided by input of each sub-block, by layer; empty if the blocks have no such modules.
        smoothing: similarity and effective rank of the grid's tokens, by layer.

    Examples:
        >>> from eit import create_model
        >>> model = create_model("eit_mini", num_classes=10, depth=2)
        >>> analysis = analyze(model, torch.randn(2, 3, 224, 224))
        >>> analysis.depth, analysis.grid, len(analysis.layers_at("block"))
        (2, (19, 19), 2)
    """

    images: int
    image_size: tuple[int, int]
    depth: int
    rho: float
    renormalize: bool
    frequency: list[Frequency]
    attention: list[Attention]
    missing: list[str]
    class_token: list[ClassToken]
    logit_spread: float
    reads_class_token: bool
    transfer: list[TransferFunction]
    smoothing: list[Smoothing]

    def layers_at(self, place: str) -> list[Frequency]:
        """Frequencies at `place` (stem, mixer, block, conv, attention), by layer."""
        return [f for f in self.frequency if f.where == place]

    @property
    def grid(self) -> Grid:
        """Tokens (h, w) at the first measured place."""
        return self.frequency[0].grid

    @property
    def pitch(self) -> float:
        """Pixels from one token of that grid to the next."""
        return self.frequency[0].pitch

    def class_tokens(self, where: str, part: str = "all") -> list[ClassToken]:
        """Class tokens at `where` (stem, mixer, mlp, block), of `part` (all, conv, attention), by layer."""
        return [token for token in self.class_token if (token.where, token.part) == (where, part)]

    def transfers(self, where: str) -> list[TransferFunction]:
        """Transfer functions of `where` (mixer, conv, attention, mlp), by layer."""
        return [transfer for transfer in self.transfer if transfer.where == where]

    @property
    def class_token_share(self) -> list[float]:
        """Share of the class token that depends on the image, 0..1, after each layer that has a class token."""
        return [token.share for token in self.class_tokens("block")]

    @property
    def relative_entropy(self) -> list[float]:
        """Entropy relative to uniform attention, 0..1, averaged over heads, of each layer with attention."""
        return [fmean(layer.relative_entropy) for layer in self.attention]


@torch.no_grad()
def analyze(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    rho: float = RHO,
    renormalize: bool = True,
    batch_size: int = 16,
) -> Analysis:
    """Measure frequencies, attention, class token and similarity of tokens in a vision model's layers.

    For EIT, LSRA, ViT, and all ViTs of timm or torchvision that call scaled_dot_product_attention. Of other models with
    transformer blocks or timm's feature_info only frequencies are measured, and `missing` says so.

    Args:
        model: on any device. It runs in evaluation mode; its mode is restored afterwards.
        images: normalised (B, channels, height, width), or an iterable of such batches, all of the same size.
        rho: frequencies above it are high, in (0, sqrt(2)); 1 is the Nyquist frequency of an axis.
        renormalize: remove attention to the class token and renormalise rows; otherwise it counts as distance 0.
        batch_size: images per batch if `images` is one tensor.

    Raises:
        UserError: no images, or images of different sizes.
        CannotMeasure: a UserError; nothing of the model can be measured, or its values are not finite.

    Examples:
        >>> from eit import create_model
        >>> analysis = analyze(create_model("eit_mini", num_classes=10), torch.randn(2, 3, 224, 224))
        >>> shares = [layer.share for layer in analysis.layers_at("block")]
        >>> diversities = [layer.std for layer in analysis.attention]
        >>> len(shares), len(diversities)
        (5, 5)
        >>> len(analysis.class_token_share), len(analysis.transfers("mlp"))
        (5, 5)
        >>> len(analysis.smoothing)  # the stem too
        6
    """
    if not 0 < rho < math.sqrt(2):
        raise UserError(f"rho={rho}: give a frequency between 0 and sqrt(2); 1 is the Nyquist frequency of an axis")
    if not isinstance(model, nn.Module):
        raise UserError(f"analyze takes a model, as eit.load gives it, not {type(model).__name__}")
    if not isinstance(images, Iterable) or isinstance(images, str | bytes | Mapping):
        raise UserError(f"analyze takes normalised images (B, channels, height, width), not {type(images).__name__}")
    model = unwrap(model)
    run = _Measurement(model, rho, renormalize)
    with (
        evaluation_mode(model),
        watch(model, run.add_tokens, run.add_attention, run.add_missing, run.add_sub_block),
    ):
        for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
            run.add_images(batch)
    return run.result()


class _Measurement:
    """Runs the model on batches, and collects the reports of `watch`."""

    def __init__(self, model: nn.Module, rho: float, renormalize: bool) -> None:
        self.model, self.rho, self.renormalize = model, rho, renormalize
        self.depth = len(layers_of(model))
        self.count = 0
        self.size: tuple[int, int] | None = None
        self.frequency: dict[tuple[int, str], FrequencyMeter] = {}
        self.attention: dict[tuple[int, int], AttentionMeter] = {}  # by layer and call
        self.classes: dict[tuple[int, str], ClassTokenMeter] = {}
        self.transfer: dict[tuple[int, str], TransferMeter] = {}
        self.smoothing: dict[tuple[int, str], SmoothingMeter] = {}
        self.logits = Moments()
        self.single: dict[tuple[int, str], None] = {}  # places with one token
        self.missing: dict[tuple[str, str], set[int]] = {}  # (where, reason) -> layers

    def add_images(self, batch: Tensor) -> None:
        if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
            shape = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise UserError(f"images must be normalised floats (B, channels, height, width), not {shape}")
        size = (batch.shape[2], batch.shape[3])
        if self.size is not None and size != self.size:
            both = " and ".join(f"{h}x{w}" for h, w in (self.size, size))
            raise UserError(f"images must have the same size, not {both}: their grids have different frequencies")
        if not len(batch):
            return
        self.size = size
        parameter = next(self.model.parameters())
        with float32_products("fp32"):
            out = self.model(batch.to(parameter.device, parameter.dtype))
        if isinstance(out, Tensor) and out.dim() == 2:
            self.logits.add(out)
        self.count += len(batch)

    def add_tokens(self, tokens: Tokens) -> None:
        place = tokens.layer, tokens.where
        if tokens.where in ("stem", "block"):
            self.add_class_token(tokens)
        if tokens.grid.shape[1] * tokens.grid.shape[2] == 1:
            self.single[place] = None
            return
        self.frequency.setdefault(place, FrequencyMeter(*place, self.rho)).add(tokens.grid, tokens.pitch)
        if tokens.where in ("stem", "block"):
            self.smoothing.setdefault(place, SmoothingMeter(*place)).add(tokens.grid)

    def add_sub_block(self, tokens: Tokens) -> None:
        place = tokens.layer, tokens.where
        if tokens.side == "update":
            self.add_class_token(tokens)
        if tokens.grid.shape[1] * tokens.grid.shape[2] == 1:
            return
        meter = self.transfer.setdefault(place, TransferMeter(*place, self.rho))
        meter.add(tokens.side, tokens.grid, tokens.conv_channels, tokens.pitch)

    def add_class_token(self, tokens: Tokens) -> None:
        if tokens.class_token is not None:
            place = tokens.layer, tokens.where
            self.classes.setdefault(place, ClassTokenMeter(*place, tokens.conv_channels)).add(tokens.class_token)

    def add_attention(self, heads: AttentionCall) -> None:
        if heads.grid != (1, 1):
            new = AttentionMeter(heads.layer, self.renormalize, self.rho)
            meter = self.attention.setdefault((heads.layer, heads.number), new)
            meter.add(heads.inputs, heads.grid, heads.pitch, heads.prefix)

    def add_missing(self, layer: int, where: str, reason: str) -> None:
        self.missing.setdefault((where, reason), set()).add(layer)

    def result(self) -> Analysis:
        if self.size is None:
            raise UserError("no images were given: nothing was measured")
        missing = self._missing()
        if not any(where == "block" for _, where in self.frequency):
            size, name = "x".join(map(str, self.size)), type(self.model).__name__
            why = missing[0] if self.missing else "give larger images"
            raise CannotMeasure(
                f"no layer of {name} has a grid of more than one token for images of {size}, "
                f"so frequencies and distances cannot be measured: {why}"
            )
        frequency = [meter.result() for meter in self.frequency.values()]
        frequency.sort(key=lambda part: part.layer)  # stable: keeps the order within a layer
        calls: dict[int, list[Attention]] = {}
        for (layer, _), meter in sorted(self.attention.items()):
            calls.setdefault(layer, []).append(meter.result())
        attention = [merge_calls(part) for part in calls.values()]
        for place in frequency:
            if not math.isfinite(place.share):
                raise CannotMeasure(f"layer {place.layer} ({place.where}) has values that are not finite")
        spread = self.logits.deviation.mean() if self.logits.count else math.nan
        return Analysis(
            self.count,
            self.size,
            self.depth,
            self.rho,
            self.renormalize,
            frequency,
            attention,
            missing,
            class_token=[token for meter in _by_layer(self.classes) for token in meter.result()],
            logit_spread=float(spread),
            reads_class_token=bool(self.classes) and getattr(self.model, "global_pool", "token") in ("token", "cls"),
            transfer=[transfer for meter in _by_layer(self.transfer) for transfer in meter.result()],
            smoothing=[meter.result() for meter in _by_layer(self.smoothing)],
        )

    def _missing(self) -> list[str]:
        lines = []
        if layers := sorted({layer for layer, _ in self.single}):
            lines.append(f"frequencies of {_layers(layers)}: there is only one token")
        grids = {meter.grid for meter in self.frequency.values() if meter.grid is not None}
        for grid in sorted(grid for grid in grids if noise_shares(grid, self.rho)[0] in (0, 1)):
            lines.append(
                f"comparable shares on {grid[0]}x{grid[1]} tokens: all their frequencies are on the same side of rho"
            )
        for (where, reason), numbers in self.missing.items():
            what = dict(heads="attention distances", transfer="gain of mixer and MLP").get(
                where, f"frequencies ({where})"
            )
            lines.append(f"{what} of {_layers(sorted(numbers))}: {reason}")
        told = {layer for (where, _), numbers in self.missing.items() if where == "heads" for layer in numbers}
        known = told | {layer for layer, _ in self.attention} | {layer for layer, _ in self.single}
        if silent := [n for n in range(1, self.depth + 1) if n not in known]:
            windows = any(hasattr(module, "window_size") for module in self.model.modules())
            why = "attends within windows" if windows else "does not call scaled_dot_product_attention"
            name = type(self.model).__name__
            lines.append(f"attention distances of {_layers(silent)}: {name} {why} there; frequencies are measured")
        name, after = type(self.model).__name__, {layer for layer, where in self.classes if where == "block"}
        if not self.classes:
            lines.append(f"image-dependent share of the class token: {name} has no class token")
        elif without := [n for n in range(1, self.depth + 1) if n not in after]:
            lines.append(
                f"image-dependent share of the class token after {_layers(without)}: {name} has no class token there"
            )
        elif self.count == 1:
            lines.append("image-dependent share of the class token: one image is not enough")
        shown = {layer for layer, _ in self.transfer} | {
            layer for (where, _), numbers in self.missing.items() if where == "transfer" for layer in numbers
        }
        if unseen := [n for n in range(1, self.depth + 1) if n not in shown | {layer for layer, _ in self.single}]:
            lines.append(
                f"gain of mixer and MLP in {_layers(unseen)}: {name} has no blocks with a mixer and an MLP there"
            )
        if not self.logits.count:
            lines.append(f"spread of the logits: the output of {name} is not one row per image")
        return lines


def _by_layer(meters: dict[tuple[int, str], M]) -> list[M]:
    """By layer, within a layer in the order of computation."""
    return [meters[key] for key in sorted(meters, key=lambda key: (key[0], PLACES.index(key[1])))]


def _layers(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"layers {numbers[0]} to {numbers[-1]}"
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
