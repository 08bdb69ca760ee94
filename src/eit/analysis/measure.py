"""`eit.analyze`: frequencies and attention of every layer of a vision model, in one pass over the images."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eit.analysis.attention import Attention, AttentionMeter
from eit.analysis.frequency import RHO, Frequency, FrequencyMeter, Grid
from eit.analysis.probe import Heads, Tokens, layers_of, unwrapped, watch
from eit.errors import UserError


@dataclass
class Analysis:
    """What was measured of one model."""

    images: int
    image_size: tuple[int, int]  # pixels
    depth: int
    frequency: list[Frequency]  # by layer, in the order in which a layer works
    attention: list[Attention]  # by layer
    missing: list[str]  # what cannot be measured of this model, and why

    def at(self, where: str) -> list[Frequency]:
        """The frequencies at `where` (stem, mixer, block, conv, attention), by layer."""
        return [f for f in self.frequency if f.where == where]

    @property
    def grid(self) -> Grid:
        """Tokens (h, w) of the first layer."""
        return self.frequency[0].grid


@torch.no_grad()
def analyze(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    rho: float = RHO,
    renormalize: bool = True,
    batch_size: int = 16,
) -> Analysis:
    """High-frequency shares, spectra, attention distances and head diversity of a vision model's layers.

    EIT, LSRA, ViT, any ViT of timm or torchvision that calls scaled_dot_product_attention; of other models with
    transformer blocks or timm's feature_info the frequencies alone, and `missing` says so.

    Args:
        model: on any device; it runs in evaluation mode, and is left as it was.
        images: normalised (B, channels, height, width), or an iterable of such batches. All of one size.
        rho: the frequency above which energy is high, in (0, sqrt(2)); 1 is the Nyquist frequency of an axis.
        renormalize: cut attention to the class token off and renormalise rows, else count it as distance 0.
        batch_size: images at a time where `images` is one tensor.

    Raises:
        UserError: no images, images of different sizes, values that are not finite, or nothing that can be measured.

    >>> model = create_model("eit_mini", num_classes=10)
    >>> found = analyze(model, torch.randn(2, 3, 224, 224))
    >>> [layer.share for layer in found.at("block")], [layer.std for layer in found.attention]
    """
    if not 0 < rho < math.sqrt(2):
        raise UserError(f"rho={rho}: a frequency between 0 and sqrt(2) is expected, 1 is an axis's Nyquist frequency")
    model = unwrapped(model)
    run = _Run(model, rho, renormalize)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with watch(model, run.tokens, run.heads, run.other_attention):
            for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
                run.images(batch)
    finally:
        for module, training in modes.items():
            module.training = training
    return run.result()


class _Run:
    def __init__(self, model: nn.Module, rho: float, renormalize: bool) -> None:
        self.model, self.rho, self.renormalize = model, rho, renormalize
        self.depth = len(layers_of(model))
        self.count = 0
        self.size: tuple[int, int] | None = None
        self.frequency: dict[tuple[int, str], FrequencyMeter] = {}
        self.attention: dict[int, AttentionMeter] = {}
        self.single: dict[tuple[int, str], None] = {}  # places with one token
        self.windows: dict[int, int] = {}  # layer -> keys of attention that is not over the whole grid

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
        self.model(batch.to(parameter.device, parameter.dtype))
        self.count += len(batch)

    def tokens(self, found: Tokens) -> None:
        place = found.layer, found.where
        if found.grid.shape[1] * found.grid.shape[2] == 1:
            self.single[place] = None
            return
        if place not in self.frequency:
            self.frequency[place] = FrequencyMeter(*place, self.rho)
        self.frequency[place].add(found.grid)

    def heads(self, found: Heads) -> None:
        if found.grid == (1, 1):
            return
        if found.layer not in self.attention:
            self.attention[found.layer] = AttentionMeter(found.layer, self.renormalize)
        self.attention[found.layer].add(found.call, found.grid, found.pitch, found.prefix)

    def other_attention(self, layer: int, keys: int) -> None:
        self.windows[layer] = keys

    def result(self) -> Analysis:
        if self.size is None:
            raise UserError("no images: nothing was measured")
        if not self.frequency:
            size = "x".join(map(str, self.size))
            raise UserError(
                f"images of {size} make a 1x1 grid of tokens, which has neither frequencies nor distances: "
                "give larger images"
            )
        frequency = [meter.result() for meter in self.frequency.values()]
        frequency.sort(key=lambda found: found.layer)  # stable: within a layer as it works
        attention = [self.attention[layer].result() for layer in sorted(self.attention)]
        for found in frequency:
            if not math.isfinite(found.share):
                raise UserError(f"layer {found.layer} ({found.where}) holds values that are not finite")
        return Analysis(self.count, self.size, self.depth, frequency, attention, self._missing())

    def _missing(self) -> list[str]:
        missing = []
        if layers := sorted({layer for layer, _ in self.single}):
            missing.append(f"frequencies of {_layers(layers)}: one token has none")
        name = type(self.model).__name__
        if self.windows:
            keys = ", ".join(map(str, sorted(set(self.windows.values()))))
            missing.append(
                f"attention distances of {_layers(sorted(self.windows))}: {name} attends to {keys} tokens there, not "
                "to all of the grid (windows); frequencies are measured"
            )
        measured = set(self.attention) | set(self.windows) | {layer for layer, _ in self.single}
        silent = [n for n in range(1, self.depth + 1) if n not in measured]
        if silent:
            windows = any(hasattr(module, "window_size") for module in self.model.modules())
            why = "attends within windows" if windows else "does not call scaled_dot_product_attention"
            missing.append(f"attention distances of {_layers(silent)}: {name} {why} there; frequencies are measured")
        return missing


def _layers(numbers: list[int]) -> str:
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"layers {numbers[0]} to {numbers[-1]}"
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
