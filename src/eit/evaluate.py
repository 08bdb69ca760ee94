"""Exact top-1, top-5 and loss: each image counts once, on any number of ranks, with the same figures."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from eit import distributed
from eit.console import progress
from eit.loader import EvaluationLoader


@dataclass(frozen=True)
class Metrics:
    """`top1`, `top5` in percent (top5 counts the first k = min(5, classes)); `loss` is the mean cross-entropy."""

    images: int
    top1: float
    top5: float
    loss: float
    correct1: int
    correct5: int
    per_class: dict[str, dict[str, float | None]]  # class -> images, top1 (None without images)


@torch.no_grad()
def evaluate(model: Callable[[Tensor], Tensor], loader: EvaluationLoader, autocast: Any = None) -> Metrics:
    """Run `model` (in evaluation mode) over `loader`; every rank gets the result of all.

    `autocast` is a context manager for the forward pass. Counts are integers, and the loss is summed block by block in
    a fixed order, so that the figures do not depend on the number of ranks.
    """
    classes = loader.images.classes
    # per class: images, correct at 1, correct at k
    counts = torch.zeros(3, len(classes), dtype=torch.int64)
    losses = torch.zeros(loader.blocks, dtype=torch.float64)
    with progress("evaluating", len(loader.own_blocks)) as advance:
        for block, batch in loader:
            with autocast or torch.autocast(batch.images.device.type, enabled=False):
                logits = model(batch.images)
            logits, labels = logits[: batch.valid].float(), batch.labels[: batch.valid]
            top = logits.topk(min(5, len(classes)), dim=1).indices == labels[:, None]
            losses[block] = F.cross_entropy(logits, labels, reduction="sum").cpu().double()
            for row, hit in zip(counts, (torch.ones_like(labels), top[:, 0], top.any(dim=1)), strict=True):
                row.add_(torch.bincount(labels.cpu(), hit.cpu().double(), len(classes)).long())
            advance()
    device = loader.device if loader.device.type == "cuda" else torch.device("cpu")
    counts, losses = (distributed.sum_over_ranks(t.to(device)).cpu() for t in (counts, losses))
    images, correct1, correct5 = counts.sum(dim=1).tolist()
    return Metrics(
        images=images,
        top1=100 * correct1 / images,
        top5=100 * correct5 / images,
        loss=math.fsum(losses.tolist()) / images,
        correct1=correct1,
        correct5=correct5,
        per_class={
            name: dict(images=n, top1=100 * right / n if n else None)
            for name, n, right in zip(classes, counts[0].tolist(), counts[1].tolist(), strict=True)
        },
    )
