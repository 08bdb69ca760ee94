"""Exact accuracy, loss, calibration and confusions: each image counts once, with the same figures on any ranks."""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eit import distributed
from eit.console import progress
from eit.data.datasets import open_evaluation
from eit.data.images import Preprocessing
from eit.data.loaders import AnyEvaluationLoader, EvaluationLoader, evaluation_loader
from eit.errors import UserError
from eit.inference.evaluation_data import evaluation_config, match_classes
from eit.inference.exported_models import load
from eit.precision import arithmetic, resolve_precision

BINS = 15  # of the calibration error, as in Guo et al. 2017
LARGEST_MATRIX = 4096  # classes; the square of more would fill the memory


class Mistake(NamedTuple):
    """An image whose most likely class is wrong."""

    confidence: float  # the probability of the prediction, 0..1
    truth: int
    prediction: int
    number: int | None  # of the image, from 0; None in a stream
    image: Tensor  # the input of the model (channels, height, width), on the CPU


@dataclass(frozen=True)
class Metrics:
    """What one evaluation found; all but `loss` and counts are in percent.

    Attributes:
        images: how many.
        top1: images whose most likely class is right.
        top5: images whose class is among the min(5, classes) most likely.
        loss: the mean cross-entropy, in nats.
        ece: the expected calibration error of the top-1 probability in 15 bins of equal width:
            sum_b n_b / n |accuracy_b - confidence_b| (Guo et al. 2017, eq. 3).
        correct1: images that are right.
        correct5: images whose class is among the five most likely.
        per_class: class -> images, top1 (recall; None without images), precision (None if it is never predicted), f1
            (None if neither exists).
        pairs: (truth, prediction) -> images, those that occur.
        calibration: the bins of `ece` that have images: their ends low and high, images, mean confidence, and top1.
        mistakes: the most confident ones first, as many as `evaluate` was asked for.
    """

    images: int
    top1: float
    top5: float
    loss: float
    ece: float
    correct1: int
    correct5: int
    per_class: dict[str, dict[str, float | None]]
    pairs: dict[tuple[int, int], int]
    calibration: list[dict[str, float]]
    mistakes: list[Mistake] = field(default_factory=list, repr=False)

    def __repr__(self) -> str:
        return (
            f"<{self.images} images: top-1 {self.top1:.2f}%, top-5 {self.top5:.2f}%, loss {self.loss:.4f}, "
            f"calibration error {self.ece:.2f}%>"
        )

    @property
    def confusion(self) -> list[list[int]]:
        """Counts `[truth][prediction]`, in the order of the classes; for at most `LARGEST_MATRIX` classes."""
        check_matrix(len(self.per_class), "a confusion matrix")
        table = [[0] * len(self.per_class) for _ in self.per_class]
        for (truth, prediction), count in self.pairs.items():
            table[truth][prediction] = count
        return table


def check_matrix(classes: int, what: str) -> None:
    """Raise a UserError if a matrix of classes x classes would be too large."""
    if classes > LARGEST_MATRIX:
        raise UserError(
            f"{what} is for at most {LARGEST_MATRIX:,} classes, and there are {classes:,}; "
            "--json has figures of each class"
        )


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """`model` in evaluation mode; each of its modules is put back into its own mode at the end."""
    modes = {module: module.training for module in model.modules()} if isinstance(model, nn.Module) else {}
    if modes:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_weights(model: Any) -> None:
    """Raise a UserError if a model's weights are not there, or not in float32, as images are."""
    for name, parameter in model.named_parameters() if isinstance(model, nn.Module) else ():
        if parameter.is_meta or parameter.dtype != torch.float32:
            kind = "without values" if parameter.is_meta else f"of {parameter.dtype}"
            raise UserError(f"{name} of the model is {kind}: give a model of eit.load, or model.float()")


@torch.no_grad()
def evaluate(
    model: Callable[[Tensor], Tensor] | str | os.PathLike[str],
    data: AnyEvaluationLoader | str | os.PathLike[str],
    precision: str = "fp32",
    flip: bool = False,
    mistakes: int = 0,
) -> Metrics:
    """Run `model`, in evaluation mode, over `data`; every rank gets the result of all. The model is left as it was.

    Counts are integers, and sums of floats are those of each batch, added exactly (`math.fsum`), so that the figures do
    not depend on the number of ranks. All of it stays on the device until the end, but for MPS, which has no float64.

    Args:
        model: normalised images (B, channels, height, width) -> logits (B, classes), or the name or path of weights.
        data: a data set or a folder of classes, for weights and models of `eit.load`: a path, or sklearn:digits. Or a
            loader of `eit.data.loaders.evaluation_loader`, on the model's device.
        precision: of the forward pass: `fp32`, `tf32`, `bf16`, `fp16` or `auto`.
        flip: whether probabilities are the mean of those of the image and of its mirror image.
        mistakes: how many of the most confident mistakes to keep, with their images.

    Raises:
        UserError: what is given is not of these types, or has no images.
        FloatingPointError: an output is NaN or infinite.

    Examples:
        >>> import eit
        >>> metrics = eit.evaluate("digits", "sklearn:digits")
        >>> metrics.images, metrics.top1 > 90
        (360, True)
    """
    if isinstance(model, str | os.PathLike):
        model = load(model)
    if not callable(model):
        raise UserError(f"evaluate takes a model of eit.load, or the name of weights, not {type(model).__name__}")
    if isinstance(data, str | os.PathLike):
        data = _loader_of(model, os.fspath(data))
    if not hasattr(data, "own_blocks") or not len(data.images.classes):
        raise UserError(f"evaluate takes a loader of evaluation_loader, or a folder, not {type(data).__name__}")
    check_weights(model)
    with evaluation_mode(model):
        return _evaluate(model, data, precision, flip, mistakes)


def _loader_of(model: Any, path: str) -> AnyEvaluationLoader:
    """The images of a data set or folder, for a model with a card."""
    if not hasattr(model, "card"):
        raise UserError(
            f"evaluating a folder ({path}) needs a model of eit.load: its card names classes and preprocessing"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))  # exported ones have none
    images = match_classes(model.card, open_evaluation(evaluation_config(model.card, path)))
    return evaluation_loader(images, model.card.view, 64, None, device)


def _evaluate(
    model: Callable[[Tensor], Tensor], loader: AnyEvaluationLoader, precision: str, flip: bool, most_mistakes: int
) -> Metrics:
    classes = loader.images.classes
    resolved = resolve_precision(precision, loader.device)
    where = torch.device("cpu") if loader.device.type == "mps" else loader.device
    correct5 = torch.zeros((), dtype=torch.int64, device=where)
    in_bins = torch.zeros(2, BINS, dtype=torch.int64, device=where)  # images, and those that are right
    all_bins = torch.arange(BINS, device=where)
    sums: list[Tensor] = []  # of each batch: BINS confidences, and the loss
    cells: list[Tensor] = []  # of each batch: truth * classes + prediction, (B,)
    mistakes: list[Mistake] = []
    is_numbered = isinstance(loader, EvaluationLoader)
    with progress("evaluating", len(loader.own_blocks)) as advance:
        for block, batch in enumerate(loader):
            x, valid = batch.images, batch.valid
            with arithmetic(x.device, resolved):
                outputs = [model(x), model(x.flip(-1))] if flip else [model(x)]
            if outputs[0].ndim != 2 or outputs[0].shape[1] != len(classes):
                raise UserError(
                    f"the model gives outputs {tuple(outputs[0].shape)}, but the data have {len(classes)} classes"
                )
            logs = torch.stack([logits[:valid].to(where).double().log_softmax(dim=1) for logits in outputs])
            log_p = logs.logsumexp(dim=0) - math.log(len(outputs))  # (B, classes), of the mean probability
            labels = batch.labels[:valid].to(where)
            values, ranked = log_p.topk(min(5, len(classes)), dim=1)
            confidence, predicted = values[:, 0].exp(), ranked[:, 0]
            bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # (b / 15, (b + 1) / 15]
            in_bin = bins[:, None] == all_bins  # (B, BINS); bincount with weights has no fixed order on CUDA
            cells.append(labels * len(classes) + predicted)
            correct5 += (ranked == labels[:, None]).sum()
            in_bins += torch.stack((in_bin, in_bin & (predicted == labels)[:, None])).sum(dim=1)
            loss = F.nll_loss(log_p, labels, reduction="sum")
            sums.append(torch.cat(((in_bin * confidence[:, None]).sum(dim=0), loss[None])))
            if most_mistakes:
                first = loader.own_blocks[block] * loader.batch_size if is_numbered else None
                found = _mistakes(x, labels, predicted, confidence, first, most_mistakes)
                mistakes = _most_confident(mistakes + found, most_mistakes)
            advance()
    correct5, in_bins = (distributed.sum_over_ranks(t.cpu()) for t in (correct5, in_bins))
    own: tuple[Any, ...] = [], [], []
    if cells:
        counted = torch.cat(cells).unique(return_counts=True)
        own = torch.stack(sums).tolist(), *(t.tolist() for t in counted)
    pairs: Counter[tuple[int, int]] = Counter()
    rows = []
    for rank_rows, keys, counts in distributed.gather(own):
        rows += rank_rows
        for key, count in zip(keys, counts, strict=True):
            pairs[divmod(key, len(classes))] += count
    images = sum(pairs.values())
    if not images:
        raise UserError("there are no images to evaluate on")
    *confidence_sums, loss_sum = (math.fsum(column) for column in zip(*rows, strict=True))
    if not math.isfinite(loss_sum):
        raise FloatingPointError(
            "some outputs of the model are NaN or infinite: its weights are damaged, or the precision is too low"
        )
    correct1 = sum(count for (truth, prediction), count in pairs.items() if truth == prediction)
    binned = list(zip(*in_bins.tolist(), confidence_sums, strict=True))
    return Metrics(
        images=images,
        top1=100 * correct1 / images,
        top5=100 * int(correct5) / images,
        loss=loss_sum / images,
        ece=100 * math.fsum(abs(right - conf) for _, right, conf in binned) / images,
        correct1=correct1,
        correct5=int(correct5),
        per_class=dict(zip(_unique(classes), _per_class(pairs, len(classes)), strict=True)),
        pairs=dict(sorted(pairs.items())),
        calibration=[
            dict(
                low=100 * i / BINS, high=100 * (i + 1) / BINS, images=n, confidence=100 * conf / n, top1=100 * right / n
            )
            for i, (n, right, conf) in enumerate(binned)
            if n
        ],
        mistakes=_most_confident([m for own in distributed.gather(mistakes) for m in own], most_mistakes)
        if most_mistakes
        else [],
    )


def _mistakes(
    images: Tensor, labels: Tensor, predicted: Tensor, confidence: Tensor, first: int | None, most: int
) -> list[Mistake]:
    """The most confident mistakes of a batch whose first image has the number `first`."""
    wrong = (predicted != labels).nonzero().flatten()
    order = confidence[wrong].argsort(descending=True, stable=True)
    return [
        Mistake(
            confidence=float(confidence[i]),
            truth=int(labels[i]),
            prediction=int(predicted[i]),
            number=None if first is None else first + i,
            image=images[i].float().cpu().clone(),
        )
        for i in wrong[order][:most].tolist()
    ]


def _most_confident(mistakes: list[Mistake], most: int) -> list[Mistake]:
    return sorted(mistakes, key=lambda mistake: (-mistake.confidence, mistake.number or 0))[:most]


def _per_class(pairs: Counter[tuple[int, int]], classes: int) -> list[dict[str, float | None]]:
    columns = [0] * classes, [0] * classes, [0] * classes  # images, predictions, both
    for (truth, prediction), count in pairs.items():
        columns[0][truth] += count
        columns[1][prediction] += count
        columns[2][truth] += count * (truth == prediction)
    return [
        dict(
            images=n,
            top1=100 * right / n if n else None,
            precision=100 * right / predicted if predicted else None,
            f1=200 * right / (n + predicted) if n + predicted else None,
        )
        for n, predicted, right in zip(*columns, strict=True)
    ]


def _unique(names: Sequence[str]) -> list[str]:
    """`names`, with their number behind those that stand there twice, as some of ImageNet's do."""
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({i})" for i, name in enumerate(names)]


def make_views(
    view: Preprocessing, sizes: Sequence[int] = (), crop_ratios: Sequence[float] = ()
) -> dict[tuple[int, float], Preprocessing]:
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
