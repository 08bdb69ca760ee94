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
from eit.data.images import View
from eit.data.loaders import AnyEvaluationLoader
from eit.precision import arithmetic, resolve_precision

BINS = 15  # of the calibration error, as in Guo et al. 2017


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
        per_class: class -> images, top1 (recall; None without images), precision (None if it is never predicted), f1
            (None if neither exists).
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

    Counts are integers, and sums of floats are those of each batch, added exactly (`math.fsum`), so that the figures do
    not depend on the number of ranks. All of it stays on the device until the end, but for MPS, which has no float64.

    Args:
        model: normalised images (B, channels, height, width) -> logits (B, classes); in evaluation mode.
        loader: of `eit.data.loaders.evaluation_loader`, on the model's device.
        precision: of the forward pass: `fp32`, `tf32`, `bf16`, `fp16` or `auto`.
        flip: whether probabilities are the mean of those of the image and of its mirror image.
    """
    classes = loader.images.classes
    resolved = resolve_precision(precision, loader.device)
    where = torch.device("cpu") if loader.device.type == "mps" else loader.device
    confusion = torch.zeros(len(classes), len(classes), dtype=torch.int64, device=where)  # truth x prediction
    correct5 = torch.zeros((), dtype=torch.int64, device=where)
    correct = torch.zeros(BINS, dtype=torch.int64, device=where)
    all_bins = torch.arange(BINS, device=where)
    sums: list[Tensor] = []  # of each batch: BINS confidences, and the loss
    with progress("evaluating", len(loader.own_blocks)) as advance:
        for batch in loader:
            x, valid = batch.images, batch.valid
            with arithmetic(x.device, resolved):
                outputs = [model(x), model(x.flip(-1))] if flip else [model(x)]
            logs = torch.stack([logits[:valid].to(where).double().log_softmax(dim=1) for logits in outputs])
            log_p = logs.logsumexp(dim=0) - math.log(len(outputs))  # (B, classes), of the mean probability
            labels = batch.labels[:valid].to(where)
            values, ranked = log_p.topk(min(5, len(classes)), dim=1)
            confidence, predicted = values[:, 0].exp(), ranked[:, 0]
            bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # (b / 15, (b + 1) / 15]
            in_bin = bins[:, None] == all_bins  # (B, BINS); bincount with weights has no fixed order on CUDA
            confusion.index_put_((labels, predicted), torch.ones_like(labels), accumulate=True)
            correct5 += (ranked == labels[:, None]).sum()
            correct += (in_bin & (predicted == labels)[:, None]).sum(dim=0)
            loss = F.nll_loss(log_p, labels, reduction="sum")
            sums.append(torch.cat(((in_bin * confidence[:, None]).sum(dim=0), loss[None])))
            advance()
    confusion, correct5, correct = (distributed.sum_over_ranks(t.cpu()) for t in (confusion, correct5, correct))
    own = torch.stack(sums).tolist() if sums else []
    columns = zip(*(row for rows in distributed.gather(own) for row in rows), strict=True)
    *confidence_sums, loss_sum = (math.fsum(column) for column in columns)
    images, correct1 = int(confusion.sum()), int(confusion.trace())
    gaps = [abs(right - conf) for right, conf in zip(correct.tolist(), confidence_sums, strict=True)]
    return Metrics(
        images=images,
        top1=100 * correct1 / images,
        top5=100 * int(correct5) / images,
        loss=loss_sum / images,
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
    """(size, crop ratio) -> `view` with these, for each size with each crop ratio; if none is given, as in `view`.

    A crop ratio is the centre crop's share of the resized shorter side.
    """
    views = {}
    for size in sizes or [view.size]:
        if not crop_ratios:  # in integers: at its own size a view stays as it is
            views[size, view.size / view.resize] = replace(view, size=size, resize=size * view.resize // view.size)
        for ratio in crop_ratios:
            views[size, ratio] = replace(view, size=size, resize=math.floor(size / ratio))
    return views
