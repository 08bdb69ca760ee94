"""`eit.analyze`: frequencies and attention of every layer of a vision model, in one pass over the images."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

import torch
from torch import Tensor, nn

from eit.analysis.attention import Attention, AttentionMeter, together
from eit.analysis.class_token import PLACES, ClassToken, ClassTokenMeter
from eit.analysis.frequency import RHO, Frequency, FrequencyMeter, Grid, noise_shares
from eit.analysis.hooks import CannotMeasure, Heads, Tokens, layers_of, unwrapped, watch
from eit.analysis.moments import Moments
from eit.analysis.smoothing import Smoothing, SmoothingMeter
from eit.analysis.transfer import Transfer, TransferMeter
from eit.errors import UserError
from eit.inference.evaluate import evaluation_mode
from eit.precision import float32_products

M = TypeVar("M")


@dataclass
class Analysis:
    """What was measured of one model.

    Attributes:
        images: how many.
        image_size: (height, width), in pixels.
        depth: layers.
        rho: the frequency above which energy is high; 1 is the Nyquist frequency of an axis.
        renormalize: whether attention to prefix tokens was cut off.
        frequency: by layer, in the order in which a layer works.
        attention: by layer.
        missing: what cannot be measured of this model, and why.
        class_token: norm and image-dependent share, by layer; empty of a model without class token.
        logit_spread: standard deviation of the outputs over images, mean over outputs; NaN of one image, or where the
            model's output is not (B, K).
        reads_class_token: whether the head reads the class token, thus whether its share bounds what can be learnt.
        transfer: what each sub-block adds by what it takes, by layer; empty where the blocks do not show it.
        smoothing: likeness and effective rank of the grid's tokens, by layer.
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
    transfer: list[Transfer]
    smoothing: list[Smoothing]

    def layers_at(self, place: str) -> list[Frequency]:
        """The frequencies at `place` (stem, mixer, block, conv, attention), by layer."""
        return [f for f in self.frequency if f.where == place]

    @property
    def grid(self) -> Grid:
        """Tokens (h, w) of the first place that was measured."""
        return self.frequency[0].grid

    @property
    def pitch(self) -> float:
        """Pixels from one token of that grid to the next."""
        return self.frequency[0].pitch

    def class_tokens(self, where: str, part: str = "all") -> list[ClassToken]:
        """Those at `where` (stem, mixer, mlp, block) of `part` (all, conv, attention), by layer."""
        return [token for token in self.class_token if (token.where, token.part) == (where, part)]

    def transfers(self, where: str) -> list[Transfer]:
        """Those of `where` (mixer, conv, attention, mlp), by layer."""
        return [transfer for transfer in self.transfer if transfer.where == where]

    @property
    def class_token_share(self) -> list[float]:
        """The share of the class token that depends on the image, 0..1, after each layer that has one."""
        return [token.share for token in self.class_tokens("block")]

    @property
    def relative_entropy(self) -> list[float]:
        """Entropy of attention by that of uniform attention, 0..1, mean over heads, of each layer that attends."""
        return [fmean(layer.relative_entropy) for layer in self.attention]


@torch.no_grad()
def analyze(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    rho: float = RHO,
    renormalize: bool = True,
    batch_size: int = 16,
) -> Analysis:
    """Frequencies, attention, class token and likeness of tokens in a vision model's layers.

    EIT, LSRA, ViT, any ViT of timm or torchvision that calls scaled_dot_product_attention; of other models with
    transformer blocks or timm's feature_info the frequencies alone, and `missing` says so.

    Args:
        model: on any device; it runs in evaluation mode, and is left as it was.
        images: normalised (B, channels, height, width), or an iterable of such batches. All of one size.
        rho: the frequency above which energy is high, in (0, sqrt(2)); 1 is the Nyquist frequency of an axis.
        renormalize: cut attention to the class token off and renormalise rows, else count it as distance 0.
        batch_size: images at a time where `images` is one tensor.

    Raises:
        UserError: no images, or images of different sizes.
        CannotMeasure: a UserError too; the model has nothing that can be measured, or values that are not finite.

    Examples:
        >>> from eit import create_model
        >>> analysis = analyze(create_model("eit_mini", num_classes=10), torch.randn(2, 3, 224, 224))
        >>> shares = [layer.share for layer in analysis.layers_at("block")]
        >>> diversities = [layer.std for layer in analysis.attention]
        >>> len(shares), len(diversities)
        (5, 5)
        >>> len(analysis.class_token_share), len(analysis.transfers("mlp"))
        (5, 5)
        >>> len(analysis.smoothing)  # after the stem as well
        6
    """
    if not 0 < rho < math.sqrt(2):
        raise UserError(f"rho={rho}: a frequency between 0 and sqrt(2) is expected, 1 is an axis's Nyquist frequency")
    if not isinstance(model, nn.Module):
        raise UserError(f"analyze takes a model, as eit.load gives it, not {type(model).__name__}")
    if not isinstance(images, Iterable) or isinstance(images, str | bytes | Mapping):
        raise UserError(f"analyze takes normalised images (B, channels, height, width), not {type(images).__name__}")
    model = unwrapped(model)
    run = _Run(model, rho, renormalize)
    with evaluation_mode(model), watch(model, run.tokens, run.heads, run.lacks, run.flow):
        for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
            run.images(batch)
    return run.result()


class _Run:
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

    def images(self, batch: Tensor) -> None:
        if not isinstance(batch, Tensor) or batch.dim() != 4 or not batch.is_floating_point():
            shape = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
            raise UserError(f"images are normalised floats (B, channels, height, width), not {shape}")
        size = (batch.shape[2], batch.shape[3])
        if self.size is not None and size != self.size:
            both = " and ".join(f"{h}x{w}" for h, w in (self.size, size))
            raise UserError(f"images of one size are needed, not of {both}: their grids have different frequencies")
        if not len(batch):
            return
        self.size = size
        parameter = next(self.model.parameters())
        with float32_products("fp32"):
            out = self.model(batch.to(parameter.device, parameter.dtype))
        if isinstance(out, Tensor) and out.dim() == 2:
            self.logits.add(out)
        self.count += len(batch)

    def tokens(self, tokens: Tokens) -> None:
        place = tokens.layer, tokens.where
        if tokens.where in ("stem", "block"):
            self.class_token(tokens)
        if tokens.grid.shape[1] * tokens.grid.shape[2] == 1:
            self.single[place] = None
            return
        if place not in self.frequency:
            self.frequency[place] = FrequencyMeter(*place, self.rho)
        self.frequency[place].add(tokens.grid, tokens.pitch)
        if tokens.where in ("stem", "block"):
            if place not in self.smoothing:
                self.smoothing[place] = SmoothingMeter(*place)
            self.smoothing[place].add(tokens.grid)

    def flow(self, tokens: Tokens) -> None:
        place = tokens.layer, tokens.where
        if tokens.side == "update":
            self.class_token(tokens)
        if tokens.grid.shape[1] * tokens.grid.shape[2] == 1:
            return
        if place not in self.transfer:
            self.transfer[place] = TransferMeter(*place, self.rho)
        self.transfer[place].add(tokens.side, tokens.grid, tokens.conv_channels, tokens.pitch)

    def class_token(self, tokens: Tokens) -> None:
        if tokens.class_token is None:
            return
        place = tokens.layer, tokens.where
        if place not in self.classes:
            self.classes[place] = ClassTokenMeter(*place, tokens.conv_channels)
        self.classes[place].add(tokens.class_token)

    def heads(self, heads: Heads) -> None:
        if heads.grid == (1, 1):
            return
        key = heads.layer, heads.number
        if key not in self.attention:
            self.attention[key] = AttentionMeter(heads.layer, self.renormalize, self.rho)
        self.attention[key].add(heads.call, heads.grid, heads.pitch, heads.prefix)

    def lacks(self, layer: int, where: str, reason: str) -> None:
        self.missing.setdefault((where, reason), set()).add(layer)

    def result(self) -> Analysis:
        if self.size is None:
            raise UserError("no images: nothing was measured")
        missing = self._missing()
        if not any(where == "block" for _, where in self.frequency):
            size, name = "x".join(map(str, self.size)), type(self.model).__name__
            why = missing[0] if self.missing else "larger images make more"
            raise CannotMeasure(
                f"{name} has no layer with a grid of more than one token for images of {size}, "
                f"thus neither frequencies nor distances: {why}"
            )
        frequency = [meter.result() for meter in self.frequency.values()]
        frequency.sort(key=lambda part: part.layer)  # stable: within a layer as it works
        calls: dict[int, list[Attention]] = {}
        for (layer, _), meter in sorted(self.attention.items()):
            calls.setdefault(layer, []).append(meter.result())
        attention = [together(part) for part in calls.values()]
        for place in frequency:
            if not math.isfinite(place.share):
                raise CannotMeasure(f"layer {place.layer} ({place.where}) holds values that are not finite")
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
            lines.append(f"frequencies of {_layers(layers)}: one token has none")
        grids = {meter.grid for meter in self.frequency.values() if meter.grid is not None}
        for grid in sorted(grid for grid in grids if noise_shares(grid, self.rho)[0] in (0, 1)):
            lines.append(
                f"meaning of shares on {grid[0]}x{grid[1]} tokens: all their frequencies lie on one side of rho"
            )
        for (where, reason), numbers in self.missing.items():
            what = dict(heads="attention distances", flow="transfer").get(where, f"frequencies ({where})")
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
            lines.append(f"image-dependent share of the class token: {name} has no class token among its grid's tokens")
        elif without := [n for n in range(1, self.depth + 1) if n not in after]:
            lines.append(f"image-dependent share of the class token after {_layers(without)}: {name} has none there")
        elif self.count == 1:
            lines.append("image-dependent share of the class token: one image says nothing of it")
        shown = {layer for layer, _ in self.transfer} | {
            layer for (where, _), numbers in self.missing.items() if where == "flow" for layer in numbers
        }
        if unseen := [n for n in range(1, self.depth + 1) if n not in shown | {layer for layer, _ in self.single}]:
            lines.append(f"transfer of {_layers(unseen)}: {name} has no blocks with a mixer and an MLP there")
        if not self.logits.count:
            lines.append(f"spread of the logits: {name} does not give one row of them an image")
        return lines


def _by_layer(meters: dict[tuple[int, str], M]) -> list[M]:
    """In the order in which a layer works."""
    return [meters[key] for key in sorted(meters, key=lambda key: (key[0], PLACES.index(key[1])))]


def _layers(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"layers {numbers[0]} to {numbers[-1]}"
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
