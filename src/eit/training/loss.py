"""The training loss: cross-entropy or binary cross-entropy of each class, class weights, and distillation."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.task import DistillationTeacher
from torch import Tensor

from eit.config import Loss
from eit.data.images import Preprocessing, compose
from eit.errors import UserError, is_out_of_memory
from eit.models.registry import TIMM, check_timm_name, create_model
from eit.weights.formats import digest
from eit.weights.load import find_weights, load

Criterion = Callable[[Tensor, Tensor], Tensor]


def make_criterion(config: Loss, smoothing: float, weights: Tensor | None, classes: int) -> Criterion:
    """(logits (B, classes), target) -> mean loss. The target is (B,) class numbers, or (B, classes) from mixup.

    Mixup smooths its own targets. `smoothing` is applied to class numbers, and gives the floor of mixed targets. In
    binary cross-entropy a class is present if its target is above that floor. Smoothing puts all targets above 0, so a
    threshold at 0 (as in the DeiT code) would make every class present.
    """
    if config.name == "bce":
        floor = smoothing / classes + 1e-4  # mixing rounds

        def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
            present = F.one_hot(target, classes).float() if target.ndim == 1 else (target > floor).float()
            loss = F.binary_cross_entropy_with_logits(logits, present, reduction="none").mean(dim=1)
            if weights is not None:  # one per image, by its classes: one per column would balance nothing
                loss = loss * (present * weights).sum(dim=1) / present.sum(dim=1)  # autocast rounds matrix products
            return loss.mean()

        return binary_cross_entropy

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        # The mean over images, not over weights: a step must not depend on how it is cut into micro-batches.
        label_smoothing = smoothing if target.ndim == 1 else 0.0
        return F.cross_entropy(logits, target, weights, label_smoothing=label_smoothing, reduction="none").mean()

    return cross_entropy


def class_weights(config: Loss, classes: list[str], labels: list[int] | None) -> Tensor | None:
    """The weight of each class, (classes,), or None. Balanced weights have mean 1 over the training images."""
    by_name = config.class_weights
    assert by_name != "auto"  # it is resolved
    if by_name is None:
        return None
    if by_name == "balanced":
        if labels is None:
            raise UserError("loss.class_weights=balanced needs images with random access: give a weight for each class")
        counts = Counter(labels)
        return torch.tensor([len(labels) / (len(classes) * max(counts[i], 1)) for i in range(len(classes))])
    if len(by_name := {compose(name): weight for name, weight in by_name.items()}) < len(config.class_weights or ()):
        raise UserError("loss.class_weights gives a class twice, in two Unicode forms of its name")
    if unknown := [name for name in by_name if name not in classes]:
        known = ", ".join(classes[:5]) + (" ..." if len(classes) > 5 else "")
        raise UserError(f"loss.class_weights names {unknown[0]!r}; the classes are {known}")
    if twice := [name for name in by_name if classes.count(name) > 1]:
        raise UserError(f"loss.class_weights names {twice[0]!r}, but {classes.count(twice[0])} classes have this name")
    weights = torch.tensor([float(by_name.get(name, 1.0)) for name in classes])
    if not weights.any():
        raise UserError("loss.class_weights are all 0: nothing would be learned")
    return weights


class Distillation:
    """Distillation from a teacher that sees the student's images (Hinton et al. 2015; Touvron et al. 2021, DeiT).

    Called with the loss of the student, its logits (B, classes) and its normalised input (B, C, H, W), it returns
    soft: (1 - alpha) * loss + alpha * tau^2 KL(teacher || student), both at temperature tau, as in timm's
    LogitDistillationTask;
    hard: (1 - alpha) * loss + alpha * cross-entropy with the class that the teacher predicts.
    """

    def __init__(self, config: Loss, view: Preprocessing, classes: list[str], device: torch.device) -> None:
        assert config.teacher is not None
        self.config = config
        model, order, size = _open_teacher(config, view, classes)
        self.digest = digest(model.state_dict())[:16]
        teacher = DistillationTeacher(model.requires_grad_(False))
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (view.mean, view.std))
        # Compared here, on the CPU: in a step the host would wait for the answer
        same_statistics = torch.equal(mean, teacher.mean_kd) and torch.equal(std, teacher.std_kd)
        self.student_statistics = None if same_statistics else (mean.to(device), std.to(device))
        self.teacher = teacher.to(device)
        self.order, self.size = order.to(device), config.teacher_size or size

        try:
            self.logits(torch.zeros(1, view.channels, view.size, view.size, device=device))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            line = str(error).splitlines()[0]
            raise UserError(f"loss.teacher={config.teacher} cannot read images of {self.size} pixels: {line}") from None

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """The logits of the teacher, (B, classes), in the student's order of classes."""
        if self.student_statistics is not None:
            mean, std = self.student_statistics
            x = (x * std + mean - self.teacher.mean_kd) / self.teacher.std_kd
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return self.teacher(x)[:, self.order].float()

    def __call__(self, loss: Tensor, student: Tensor, x: Tensor) -> Tensor:
        teacher, alpha, tau = self.logits(x), self.config.alpha, self.config.tau
        if self.config.distillation == "hard":
            distance = F.cross_entropy(student, teacher.argmax(dim=1))
        else:
            student, teacher = F.log_softmax(student / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
            distance = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * tau**2
        return (1 - alpha) * loss + alpha * distance


def _open_teacher(config: Loss, view: Preprocessing, classes: list[str]) -> tuple[Any, Tensor, int]:
    """The teacher on the CPU, the columns of its logits that are the student's classes, and its input size.

    Mean and std of its input are in `pretrained_cfg`.
    """
    name = str(config.teacher)
    if name.startswith(TIMM):
        if view.channels != 3:
            raise UserError(f"loss.teacher={name} needs colour images: model.in_chans=3")
        arguments: dict[str, Any] = dict(pretrained=True)
        if config.teacher_weights:
            file = str(find_weights(config.teacher_weights))
            arguments["pretrained_cfg_overlay"] = dict(file=file, num_classes=len(classes))
        check_timm_name(name)
        known = timm.get_pretrained_cfg(name.removeprefix(TIMM)).num_classes
        if not config.teacher_weights and known != len(classes):
            raise UserError(
                f"loss.teacher={name} knows {known} classes, the data have {len(classes)}: set loss.teacher_weights to "
                "weights of this teacher that were trained on the data's classes"
            )
        model: Any = create_model(name, num_classes=len(classes), img_size=config.teacher_size, **arguments)
        return model, torch.arange(len(classes)), model.pretrained_cfg["input_size"][-1]
    if config.teacher_weights:
        raise UserError(f"loss.teacher_weights is for a teacher {TIMM}NAME; loss.teacher={name} has its own")
    model = load(name)
    card = model.card
    if missing := [c for c in classes if c not in card.classes]:
        raise UserError(f"loss.teacher={name} does not know the classes {', '.join(missing[:5])}")
    if card.in_chans != view.channels:
        raise UserError(f"loss.teacher={name} reads {card.in_chans} channels, the student {view.channels}")
    order = torch.tensor([card.classes.index(c) for c in classes])
    return model, order, card.size
