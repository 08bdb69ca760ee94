"""Maps of single images: feature energy, class-token attention, rollout, Grad-CAM."""

import importlib.util
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from eit.analysis.attention import rollout
from eit.analysis.frequency import Grid
from eit.analysis.hooks import AttentionCall, Tokens, unwrap, watch
from eit.errors import UserError
from eit.inference.evaluate import evaluation_mode
from eit.precision import float32_products


@dataclass
class ImageMaps:
    """Maps of one image, each (h, w) on the token grid, scaled to 0..1."""

    energy: list[Tensor]  # sum over channels of squares after each block, the mean over the grid subtracted
    class_attention: Tensor | None = None  # in the last layer that has a class token; mean over heads
    rollout: Tensor | None = None
    grad_cam: Tensor | None = None


class ShownImage(NamedTuple):
    """An image that is shown, as a model sees it."""

    name: str
    image: np.ndarray  # (H, W, 3) in 0..1
    spectrum: np.ndarray  # (H, W) in 0..1


@torch.no_grad()
def compute_maps(
    model: nn.Module, images: Tensor, with_rollout: bool = False, with_grad_cam: bool = False
) -> tuple[list[ImageMaps], list[str]]:
    """The maps of each image, and one line for each kind of map that this model does not have.

    The model runs in evaluation mode, and is left as it was. The images (B, channels, height, width) are normalised, on
    the device of the model.
    """
    model = unwrap(model)
    state = _Maps(with_rollout)
    cams: list[Tensor] | None = None
    missing: list[str] = []
    with evaluation_mode(model):
        with float32_products("fp32"), watch(model, state.tokens, state.heads):
            model(images)
        if with_grad_cam:
            try:
                cams = grad_cam(model, images, state.grid)
            except UserError as error:
                missing.append(str(error))
    if state.fault:
        missing.insert(0, state.fault)
    maps = []
    for i in range(len(images)):
        own = ImageMaps([_to_one(e[i]) for e in state.energy])
        if state.class_attention is not None:
            own.class_attention = _to_one(state.class_attention[i])
        if state.rolled is not None and not state.fault:
            seen = state.rolled[i, 0, -state.grid[0] * state.grid[1] :]  # by the class token
            own.rollout = _to_one(seen.unflatten(0, state.grid))
        if cams is not None:
            own.grad_cam = cams[i]
        maps.append(own)
    return maps, missing


class _Maps:
    """Collects the reports of `watch` for one batch as maps."""

    def __init__(self, with_rollout: bool) -> None:
        self.with_rollout = with_rollout
        self.energy: list[Tensor] = []
        self.grid: Grid = (0, 0)  # of the last block
        self.class_attention: Tensor | None = None
        self.rolled: Tensor | None = None
        self.fault = ""

    def tokens(self, tokens: Tokens) -> None:
        if tokens.where == "block":
            x = tokens.grid.float()
            self.energy.append((x - x.mean(dim=(1, 2), keepdim=True)).square().sum(dim=3))
            self.grid = (x.shape[1], x.shape[2])

    def heads(self, heads: AttentionCall) -> None:
        if not heads.has_class_token or heads.number:
            return
        weights = heads.inputs.weights()
        self.class_attention = weights[:, :, 0, heads.prefix :].mean(dim=1).unflatten(1, heads.grid)
        if self.with_rollout:
            if self.rolled is not None and self.rolled.shape[-1] != weights.shape[-1]:
                self.fault = "attention rollout: its layers have different numbers of tokens"
            else:
                self.rolled = rollout(weights, self.rolled)


def check_grad_cam() -> None:
    """Raise a UserError if the library grad-cam (extra `analysis`) is missing."""
    if importlib.util.find_spec("pytorch_grad_cam") is None:
        raise UserError("Grad-CAM needs the package grad-cam: pip install 'eit[analysis]'")


def grad_cam(model: Any, images: Tensor, grid: tuple[int, int]) -> list[Tensor]:
    """Grad-CAM (Selvaraju et al. 2017) of the most likely class, on the tokens before the last mixer: (h, w) per image.

    Raises:
        UserError: the model has no `blocks` of tokens on `grid` with a `norm1`.
    """
    check_grad_cam()
    from pytorch_grad_cam import GradCAM

    blocks = getattr(model, "blocks", None)
    if blocks is None or not hasattr(blocks[-1], "norm1"):
        raise UserError(f"Grad-CAM of {type(model).__name__}: the model has no blocks with a norm1")
    count = grid[0] * grid[1]

    def reshape(x: Tensor) -> Tensor:  # the class token dropped: (B, N, C) -> (B, C, h, w)
        return x[:, -count:].transpose(1, 2).unflatten(2, grid)

    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    with torch.enable_grad(), GradCAM(model, [blocks[-1].norm1], reshape_transform=reshape) as cam:
        heatmaps = cam(input_tensor=images, targets=None)  # (B, height, width), of the most likely class
    for parameter, gradient in gradients.items():
        parameter.grad = gradient
    maps = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(heatmaps)[:, None], grid)[:, 0]
    return [_to_one(own) for own in maps]


def _to_one(values: Tensor) -> Tensor:
    """The values on the CPU, scaled to 0..1."""
    values = values.float().cpu()
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def spectrum(image: Tensor) -> Tensor:
    """Logarithm of the Fourier amplitude of the grey image, frequency 0 in the middle: (channels, H, W) -> (H, W)."""
    grey = image.float().mean(dim=0)
    return torch.fft.fftshift(torch.fft.fft2(grey - grey.mean(), norm="ortho").abs().add(1e-4).log())


def shown_image(name: str, image: Tensor) -> ShownImage:
    """An image (channels, H, W) in 0..1, and its spectrum."""
    return ShownImage(name, image.expand(3, -1, -1).permute(1, 2, 0).numpy(), _to_one(spectrum(image)).numpy())
