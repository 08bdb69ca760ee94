"""What a model makes of one picture: likely classes, attention of its class token, frequencies of its layers."""

import math
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eit.analysis.frequency import RHO, Frequency, FrequencyMeter
from eit.analysis.hooks import AttentionCall, CannotMeasure, Tokens, layers_of, watch
from eit.data.images import normalise
from eit.errors import UserError
from eit.inference.evaluate import evaluation_mode
from eit.inference.exported_models import ExportedModel
from eit.pages.render import picture_address, render
from eit.precision import float32_products
from eit.weights.card import Card

TOP = 5
OPACITY = 0.6  # of attention over the picture
_one_at_a_time = threading.Lock()  # a model with hooks belongs to one thread


@dataclass
class Layer:
    """One layer; number 0 is the stem.

    Attributes:
        frequency: of its output tokens; None if they are not on a grid.
        heads: (H, h, w), what the class token's query gives to each token of the grid, 0..1; None without it.
    """

    number: int
    frequency: Frequency | None = None
    heads: Tensor | None = None


@dataclass
class Explanation:
    """What one model makes of one picture.

    Attributes:
        labels: (class name, probability in 0..1), the most likely first.
        view: (height, width, channels) uint8, the picture as the model sees it.
        layers: the stem and the layers, in order; empty for a model whose layers cannot be watched.
        missing: what cannot be shown, and why.
    """

    labels: list[tuple[str, float]]
    view: np.ndarray
    layers: list[Layer] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


@torch.no_grad()
def explain(model: Any, picture: Image.Image) -> Explanation:
    """Run `model` of `eit.load` once on a decoded picture, with hooks that do not change its outputs.

    Raises:
        UserError: the model's outputs are NaN or infinite.
    """
    card: Card = model.card
    pixels = card.view.pixels(picture)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))  # exported models have none
    images = normalise(pixels[None].to(device), card.view.mean, card.view.std)
    record = _Record()
    with _one_at_a_time, float32_products("fp32"), evaluation_mode(model):
        try:
            if isinstance(model, ExportedModel):
                raise CannotMeasure("the layers of an exported file cannot be watched; give the weights it came from")
            layers_of(model)
            with watch(model, record.add_tokens, record.add_attention, record.add_missing):
                logits = model(images)
        except CannotMeasure as error:
            record = _Record(missing=[str(error)])
            logits = model(images)
    values, indices = logits[0].softmax(dim=0).cpu().topk(min(TOP, logits.shape[1]))
    if not math.isfinite(float(values[0])):
        raise UserError("the model's outputs are NaN or infinite")
    labels = [(card.classes[i], float(p)) for i, p in zip(indices.tolist(), values.double(), strict=True)]
    return Explanation(labels, pixels.permute(1, 2, 0).numpy(), *record.result())


class _Record:
    """Collects the reports of `watch` for one picture."""

    def __init__(self, missing: list[str] | None = None) -> None:
        self.layers: dict[int, Layer] = {}
        self.missing = dict.fromkeys(missing or ())

    def layer(self, number: int) -> Layer:
        return self.layers.setdefault(number, Layer(number))

    def add_tokens(self, tokens: Tokens) -> None:
        if tokens.where in ("stem", "block") and math.prod(tokens.grid.shape[1:3]) > 1:
            meter = FrequencyMeter(tokens.layer, tokens.where, RHO)
            meter.add(tokens.grid, tokens.pitch)
            found = meter.result()
            if math.isfinite(found.share):
                self.layer(tokens.layer).frequency = found

    def add_attention(self, call: AttentionCall) -> None:
        if call.has_class_token:
            row = call.inputs.weights()[0, :, 0, call.prefix :].unflatten(1, call.grid).cpu()
            layer = self.layer(call.layer)
            layer.heads = row if layer.heads is None else torch.cat((layer.heads, row))  # parallel attentions

    def add_missing(self, layer: int, where: str, reason: str) -> None:
        if where in ("block", "heads"):
            self.missing[f"{'attention' if where == 'heads' else 'frequencies'}: {reason}"] = None

    def result(self) -> tuple[list[Layer], list[str]]:
        layers = [self.layers[number] for number in sorted(self.layers)]
        if layers and not self.missing and not any(layer.heads is not None for layer in layers):
            self.missing["attention: the model has no class token, or no attention whose inputs can be seen"] = None
        return layers, list(self.missing)


# -- As HTML ----------------------------------------------------------------------------------------------------------


def to_html(explanation: Explanation) -> str:
    """The layers as a fragment of a page; every text in it is escaped."""
    view = explanation.view
    picture = Image.fromarray(view[..., 0] if view.shape[2] == 1 else view)
    return render(
        "demo/explanation.html.j2",
        view=picture_address(picture),
        grey=picture_address(picture.convert("L")),
        size=f"{view.shape[1]}x{view.shape[0]}",
        layers=explanation.layers,
        with_heads=[layer for layer in explanation.layers if layer.heads is not None],
        missing=explanation.missing,
        rho=RHO,
        mean=lambda layer: _heat(layer.heads.mean(dim=0)),
        heat=_heat,
        sqrt2=math.sqrt(2),
    ).decode()


def _heat(attention: Tensor) -> str:
    """Attention on a grid (h, w) as a small transparent picture: 0 is dark, the largest value bright."""
    import matplotlib  # late: where it keeps its files is settled when the page is opened

    scaled = (attention / attention.max().clamp(min=torch.finfo(attention.dtype).tiny)).numpy()
    return picture_address(Image.fromarray(matplotlib.colormaps["inferno"](scaled, alpha=OPACITY, bytes=True)))
