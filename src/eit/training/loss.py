"""The training loss: cross-entropy or one binary cross-entropy a class, class weights, and a teacher to follow."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.task import DistillationTeacher
from torch import Tensor

from eit.config import Loss
from eit.data.images import View
from eit.errors import UserError, is_out_of_memory
from eit.models.registry import TIMM, check_timm_name, create_model
from eit.weights.formats import digest
from eit.weights.load import find_weights, load

Criterion = Callable[[Tensor, Tensor], Tensor]


def make_criterion(config: Loss, smoothing: float, weights: Tensor | None, classes: int) -> Criterion:
    """(logits (B, classes), target) -> mean loss. The target is (B,) class numbers, or (B, classes) from mixup.

    Mixup smooths its targets itself; `smoothing` is applied to class numbers, and says what the floor of mixed targets
    is. Binary cross-entropy takes a class as present where its target is above that floor: smoothing puts all targets
    above 0, and a threshold at 0 (as in the DeiT code) would make every class present.
    """
    if config.name == "bce":
        floor = smoothing / classes + 1e-4  # mixing rounds

        def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
            present = F.one_hot(target, classes).float() if target.ndim == 1 else (target > floor).float()
            loss = F.binary_cross_entropy_with_logits(logits, present, reduction="none").mean(dim=1)
            if weights is not None:  # of the image, by its classes: a weight a column would not balance anything
                loss = loss * (present * weights).sum(dim=1) / present.sum(dim=1)  # autocast rounds matrix products
            return loss.mean()

        return binary_cross_entropy

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        # The mean over images, not over weights, so that a step does not depend on how it is cut into micro-batches.
        given = smoothing if target.ndim == 1 else 0.0
        return F.cross_entropy(logits, target, weights, label_smoothing=given, reduction="none").mean()

    return cross_entropy


def class_weights(config: Loss, classes: list[str], labels: list[int] | None) -> Tensor | None:
    """(classes,) weights. Balanced ones have mean 1 over the training images."""
    given = config.class_weights
    if given is None:
        return None
    if given == "balanced":
        if labels is None:
            raise UserError("loss.class_weights=balanced needs images with random access: give a weight for each class")
        counts = Counter(labels)
        return torch.tensor([len(labels) / (len(classes) * max(counts[i], 1)) for i in range(len(classes))])
    if unknown := [name for name in given if name not in classes]:
        known = ", ".join(classes[:5]) + (" ..." if len(classes) > 5 else "")
        raise UserError(f"loss.class_weights names {unknown[0]!r}; the classes are {known}")
    weights = torch.tensor([float(given.get(name, 1.0)) for name in classes])
    if not weights.any():
        raise UserError("loss.class_weights are all 0: nothing would be learnt")
    return weights


class Distillation:
    """A teacher that sees what the student sees (Hinton et al. 2015; soft and hard as in DeiT, Touvron et al. 2021).

    Called with the student's own loss, its logits (B, classes) and its normalised input (B, C, H, W):
    (1 - alpha) * loss + alpha * tau^2 KL(teacher || student), both at temperature tau, as timm's LogitDistillationTask,
    or + alpha * cross-entropy with the teacher's first class.
    """

    def __init__(self, config: Loss, view: View, classes: list[str], device: torch.device) -> None:
        assert config.teacher is not None
        self.config = config
        model, order, size = _open_teacher(config, view, classes)
        self.digest = digest(model.state_dict())[:16]
        teacher = DistillationTeacher(model.requires_grad_(False))
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (view.mean, view.std))
        # Compared here, on the CPU, and not in each step, which would wait for the answer
        same = torch.equal(mean, teacher.mean_kd) and torch.equal(std, teacher.std_kd)
        self.student = None if same else (mean.to(device), std.to(device))
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
        """The teacher's, (B, classes), in the student's order of classes."""
        if self.student is not None:
            mean, std = self.student
            x = (x * std + mean - self.teacher.mean_kd) / self.teacher.std_kd
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return self.teacher(x)[:, self.order].float()

    def __call__(self, loss: Tensor, student: Tensor, x: Tensor) -> Tensor:
        teacher, alpha, tau = self.logits(x), self.config.alpha, self.config.tau
        if self.config.distillation == "hard":
            follow = F.cross_entropy(student, teacher.argmax(dim=1))
        else:
            student, teacher = F.log_softmax(student / tau, dim=1), F.log_softmax(teacher / tau, dim=1)
            follow = F.kl_div(student, teacher, reduction="batchmean", log_target=True) * tau**2
        return (1 - alpha) * loss + alpha * follow


def _open_teacher(config: Loss, view: View, classes: list[str]) -> tuple[Any, Tensor, int]:
    """Model, on the CPU and with its normalisation in `pretrained_cfg`, the student's classes as columns of its logits,
    input size."""
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
                "a file of it that was trained on them"
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
