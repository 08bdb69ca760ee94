import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.task import LogitDistillationTask

import eit
from eit.config import Loss
from eit.data.images import Preprocessing
from eit.errors import UserError
from eit.training.loss import Distillation, class_weights, make_criterion

CPU = torch.device("cpu")
VIEW = Preprocessing(8, 8, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
DIGITS = [str(i) for i in range(10)]


def logits(batch=6, classes=5):
    return torch.randn(batch, classes, generator=torch.Generator().manual_seed(0))


def test_cross_entropy_of_numbers_and_of_mixed_targets():
    x, y = logits(), torch.tensor([0, 1, 2, 3, 4, 0])
    criterion = make_criterion(Loss(), 0.1, None, 5)
    torch.testing.assert_close(criterion(x, y), F.cross_entropy(x, y, label_smoothing=0.1))
    smooth = F.one_hot(y, 5) * 0.9 + 0.1 / 5
    torch.testing.assert_close(criterion(x, smooth), criterion(x, y))  # mixup's targets are not smoothed again


def test_binary_cross_entropy_counts_the_classes_of_an_image_and_no_others():
    """The DeiT code takes targets above 0: with smoothing that is every class."""
    x, y = logits(), torch.tensor([0, 1, 2, 3, 4, 0])
    criterion = make_criterion(Loss(name="bce"), 0.1, None, 5)
    expected = F.binary_cross_entropy_with_logits(x, F.one_hot(y, 5).float())
    torch.testing.assert_close(criterion(x, y), expected)
    torch.manual_seed(0)
    _, mixed = Mixup(mixup_alpha=0.8, label_smoothing=0.1, num_classes=5)(torch.randn(6, 3, 8, 8), y)
    present = ((F.one_hot(y, 5) + F.one_hot(y.flip(0), 5)) > 0).float()
    assert (mixed > 0).all() and 1 < present.sum(1).max() < 5
    torch.testing.assert_close(criterion(x, mixed), F.binary_cross_entropy_with_logits(x, present))


def test_the_floor_of_mixed_targets_is_below_the_threshold_for_any_share():
    """lam * floor + (1 - lam) * floor may round to more than the floor."""
    for classes in (2, 10, 1000):
        floor = torch.tensor(0.1 / classes)
        lam = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
        targets = (lam * floor + (1 - lam) * floor)[:, None].expand(-1, classes)
        x = torch.full((10_000, classes), 30.0)
        loss = make_criterion(Loss(name="bce"), 0.1, None, classes)(x, targets)
        torch.testing.assert_close(loss, torch.tensor(30.0))  # all classes absent


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
def test_class_weights(name):
    x, y, w = logits(), torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([2.0, 1, 0, 1, 1])
    weighted = make_criterion(Loss(name=name), 0.0, w, 5)
    each = F.cross_entropy(x, y, reduction="none")
    if name == "bce":
        each = F.binary_cross_entropy_with_logits(x, F.one_hot(y, 5).float(), reduction="none").mean(1)
    torch.testing.assert_close(weighted(x, y), (each * w[y]).mean())
    torch.testing.assert_close(make_criterion(Loss(name=name), 0.0, torch.ones(5), 5)(x, y), each.mean())


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
def test_balanced_weights_balance(name):
    """The best constant logits on 90 to 10 images prefer no class."""
    labels = torch.tensor([0] * 90 + [1] * 10)
    criterion = make_criterion(
        Loss(name=name), 0.0, class_weights(Loss(class_weights="balanced"), ["a", "b"], labels.tolist()), 2
    )
    constant = torch.zeros(2, requires_grad=True)
    criterion(constant.expand(100, 2), labels).backward()
    torch.testing.assert_close(constant.grad, torch.zeros(2), atol=1e-6, rtol=0)


def test_balanced_weights_have_mean_one_over_the_images():
    labels = [0] * 90 + [1] * 9 + [2]
    w = class_weights(Loss(class_weights="balanced"), ["a", "b", "c"], labels)
    assert w[labels].mean() == pytest.approx(1)
    assert [float(w[i]) * labels.count(i) for i in range(3)] == pytest.approx([100 / 3] * 3)
    given = class_weights(Loss(class_weights={"b": 5}), ["a", "b", "c"], labels)
    assert given.tolist() == [1, 5, 1]
    with pytest.raises(UserError, match="names 'd'; the classes are a, b, c"):
        class_weights(Loss(class_weights={"d": 5}), ["a", "b", "c"], labels)
    with pytest.raises(UserError, match="needs images with random access"):
        class_weights(Loss(class_weights="balanced"), ["a"], None)


# -- Distillation


def test_soft_distillation_is_timms_task():
    teacher, student = (timm.create_model("eit_mini", num_classes=4, depth=1, embed_dim=20, img_size=32) for _ in "ab")
    student.pretrained_cfg = student.pretrained_cfg | dict(mean=VIEW.mean, std=VIEW.std)
    x, y = torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])
    task = LogitDistillationTask(
        student, teacher.eval(), torch.nn.CrossEntropyLoss(), task_loss_weight=0.3, temperature=3.0, device=CPU
    )
    ours = Distillation.__new__(Distillation)
    ours.config = Loss(teacher="x", alpha=0.7, tau=3)
    ours.teacher, ours.student_statistics = task.teacher, (task.student_mean, task.student_std)
    ours.order, ours.size = torch.arange(4), 32
    out = student(x)
    torch.testing.assert_close(ours(F.cross_entropy(out, y), out, x), task(x, y)["loss"])


def test_a_teacher_of_ours_answers_in_the_students_order_of_classes_and_sees_its_own_normalisation():
    teacher = eit.load("digits")
    classes = [*reversed(DIGITS[3:])]  # a part of the teacher's, in another order
    distillation = Distillation(Loss(teacher="digits"), VIEW, classes, CPU)
    pixels = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (VIEW.mean, VIEW.std))
    with torch.no_grad():
        own = teacher((pixels - 0.5) / 0.5)[:, [int(c) for c in classes]]
    torch.testing.assert_close(distillation.logits((pixels - mean) / std), own, atol=1e-4, rtol=1e-4)
    large = F.interpolate((pixels - mean) / std, (64, 64), mode="nearest")
    assert distillation.logits(large).shape == (4, 7)


def test_hard_distillation_follows_the_first_class():
    distillation = Distillation(Loss(teacher="digits", distillation="hard", alpha=0.25), VIEW, DIGITS, CPU)
    x, student, own = torch.randn(4, 3, 8, 8), torch.randn(4, 10), torch.tensor(2.0)
    first = distillation.logits(x).argmax(1)
    torch.testing.assert_close(distillation(own, student, x), 0.75 * own + 0.25 * F.cross_entropy(student, first))


def test_a_timm_teacher_with_a_file_of_weights(tmp_path):
    net = timm.create_model("resnet18", num_classes=10)
    torch.save(net.state_dict(), tmp_path / "r.pth")
    config = Loss(teacher="timm/resnet18", teacher_weights=str(tmp_path / "r.pth"), teacher_size=32)
    x = torch.randn(2, 3, 32, 32)
    view = Preprocessing(32, 32, "bicubic", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(Distillation(config, view, DIGITS, CPU).logits(x), net.eval()(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "classes", "message"),
    [
        (dict(teacher="digits"), ["0", "cat"], "loss.teacher=digits does not know the classes cat"),
        (dict(teacher="gone"), DIGITS, "no weights at gone"),
        (dict(teacher="timm/resnet17"), DIGITS, "timm has no model 'resnet17'"),
        (dict(teacher="digits", teacher_size=1), DIGITS, "loss.teacher=digits cannot read images of 1 pixels: "),
        (dict(teacher="timm/resnet18", teacher_weights="gone.pth"), DIGITS, "no weights at gone.pth"),
        (dict(teacher="digits", teacher_weights="x.pth"), DIGITS, "loss.teacher_weights is for a teacher timm/NAME"),
    ],
)
def test_a_wrong_teacher_is_one_line(config, classes, message):
    with pytest.raises(UserError) as error:
        Distillation(Loss(**config), VIEW, classes, CPU)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_grey_student_needs_a_grey_teacher():
    grey = Preprocessing(8, 8, "bicubic", (0.5,), (0.5,))
    for teacher, message in (("digits", "reads 3 channels, the student 1"), ("timm/resnet18", "needs colour images")):
        with pytest.raises(UserError, match=message):
            Distillation(Loss(teacher=teacher), grey, DIGITS, CPU)


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"crane": 2}, "names 'crane', but 2 classes have this name"),
        ({"e\u0301t\u00e9": 2, "\u00e9t\u00e9": 3}, "gives a class twice"),
        ({"dog": 2, "crane": 0}, "names 'crane'"),
    ],
)
def test_weights_of_a_name_that_is_not_one_class_are_refused(weights, message):
    with pytest.raises(UserError, match=message):
        class_weights(Loss(class_weights=weights), ["crane", "dog", "crane", "\u00e9t\u00e9"], [0, 1])


@pytest.mark.parametrize("name", ["e\u0301t\u00e9", "\u00e9te\u0301", "\u00e9t\u00e9"])
def test_weights_are_matched_in_any_form_of_unicode(name):
    given = class_weights(Loss(class_weights={name: 2}), ["crane", "crane", "\u00e9t\u00e9"], [0, 1])
    assert given.tolist() == [1, 1, 2]
