"""Exact accuracy, loss, calibration and confusions: each image counts once, with the same figures on any ranks."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from eit import distributed
from eit.console import progress
from eit.images import View
from eit.loader import AnyEvaluationLoader

BINS = 15  # of the calibration error, as in Guo et al. 2017
LOW_PRECISION = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass in fp32, bf16 or fp16."""
    return torch.autocast(device.type, LOW_PRECISION.get(precision), enabled=precision in LOW_PRECISION)


@dataclass(frozen=True)
class Metrics:
    """What one evaluation found; all but `loss` and counts are in percent.

    Attributes:
        images: how many.
        top1: whose most likely class is right.
        top5: whose class is among the first min(5, classes).
        loss: the mean cross-entropy, in nats.
        ece: the expected calibration error of the top-1 probability in 15 bins of equal width:
            sum_b n_b / n |accuracy_b - confidence_b| (Guo et al. 2017, eq. 3).
        correct1: images that are right.
        correct5: images that are among the first five.
        per_class: class -> images, top1 (recall; None without images), precision (None where it is never predicted), f1
            (None where neither).
        confusion: counts `[truth][prediction]`, in the order of the classes.
    """

    images: int
    top1: float
    top5: float
    loss: float
    ece: float
    correct1: int
    correct5: int
    per_class: dict[str, dict[str, float | None]]
    confusion: list[list[int]]


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Tensor], loader: AnyEvaluationLoader, precision: str = "fp32", flip: bool = False
) -> Metrics:
    """Run `model` over `loader`; every rank gets the result of all.

    Counts are integers, and sums of floats are made block by block in a fixed order, so that the figures do not depend
    on the number of ranks.

    Args:
        model: normalised images (B, channels, height, width) -> logits (B, classes); in evaluation mode.
        loader: of `eit.loader.evaluation_loader`, on the model's device.
        precision: of the forward pass: `fp32`, `bf16` or `fp16`.
        flip: whether probabilities are the mean of those of the image and of its mirror image.
    """
    classes = loader.images.classes
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64)  # truth x prediction
    correct5 = torch.zeros((), dtype=torch.int64)
    correct = torch.zeros(BINS, dtype=torch.int64)
    confidences = torch.zeros(loader.blocks, BINS, dtype=torch.float64)
    losses = torch.zeros(loader.blocks, dtype=torch.float64)
    with progress("evaluating", len(loader.own_blocks)) as advance:
        for block, batch in loader:
            x, valid = batch.images, batch.valid
            with autocast(x.device, precision):
                outputs = [model(x), model(x.flip(-1))] if flip else [model(x)]
            # On the CPU, in float64: MPS has none, and the order of sums is fixed there.
            logs = torch.stack([logits[:valid].cpu().double().log_softmax(dim=1) for logits in outputs])
            log_p = logs.logsumexp(dim=0) - math.log(len(outputs))  # (B, classes), of the mean probability
            labels = batch.labels[:valid].cpu()
            values, ranked = log_p.topk(min(5, len(classes)), dim=1)
            confidence, predicted = values[:, 0].exp(), ranked[:, 0]
            bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # (b / 15, (b + 1) / 15]
            confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
            correct5 += (ranked == labels[:, None]).sum()
            correct += bins[predicted == labels].bincount(minlength=BINS)
            confidences[block] = bins.bincount(confidence, BINS)
            losses[block] = F.nll_loss(log_p, labels, reduction="sum")
            advance()
    device = loader.device if loader.device.type == "cuda" else torch.device("cpu")
    confusion, correct5, correct, confidences, losses = (
        distributed.sum_over_ranks(t.to(device)).cpu() for t in (confusion, correct5, correct, confidences, losses)
    )
    images, correct1 = int(confusion.sum()), int(confusion.trace())
    confidence_sums = [math.fsum(column) for column in confidences.T.tolist()]
    gaps = [abs(right - conf) for right, conf in zip(correct.tolist(), confidence_sums, strict=True)]
    return Metrics(
        images=images,
        top1=100 * correct1 / images,
        top5=100 * int(correct5) / images,
        loss=math.fsum(losses.tolist()) / images,
        ece=100 * math.fsum(gaps) / images,
        correct1=correct1,
        correct5=int(correct5),
        per_class=dict(zip(_unique(classes), _per_class(confusion), strict=True)),
        confusion=confusion.tolist(),
    )


def _per_class(confusion: Tensor) -> list[dict[str, float | None]]:
    columns = confusion.sum(dim=1), confusion.sum(dim=0), confusion.diagonal()
    return [
        dict(
            images=n,
            top1=100 * right / n if n else None,
            precision=100 * right / predicted if predicted else None,
            f1=200 * right / (n + predicted) if n + predicted else None,
        )
        for n, predicted, right in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _unique(names: Sequence[str]) -> list[str]:
    """`names`, with their number behind those that stand there twice, as some of ImageNet's do."""
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def make_views(
    view: View, sizes: Sequence[int] = (), crop_ratios: Sequence[float] = ()
) -> dict[tuple[int, float], View]:
    """(size, crop ratio) -> `view` with these, for each size with each crop ratio; where none is given, as in `view`.

    A crop ratio is the centre crop's share of the resized shorter side.
    """
    views = {}
    for size in sizes or [view.size]:
        if not crop_ratios:  # in integers: at its own size a view stays as it is
            views[size, view.size / view.resize] = replace(view, size=size, resize=size * view.resize // view.size)
        for ratio in crop_ratios:
            views[size, ratio] = replace(view, size=size, resize=math.floor(size / ratio))
    return views
