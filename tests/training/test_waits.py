"""What a training step waits for, and what it does not: counted on torch's device `meta`, or shown on the CPU."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from eit.models import registry
from eit.training import trainer as train_module
from eit.training.checkpoint import load_checkpoint, newest_checkpoint
from eit.training.step_reports import StepReports
from eit.training.trainer import train
from eit.weights.card import Card, default_mean_std
from eit.weights.formats import save_weights
from tests.helpers.training import recipe, same

CPU = torch.device("cpu")


# -- A step, counted

LAUNCHES = Path(__file__).parents[2] / "benchmarks" / "launches.py"
SMALL = ["model.embed_dim=20", "model.depth=2", "model.num_heads=2"]


@pytest.fixture(scope="module")
def count():
    """`count` of benchmarks/launches.py, of a small model."""
    spec = importlib.util.spec_from_file_location("launches", LAUNCHES)
    launches = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(launches)
    return lambda recipe, *words: launches.count(recipe, *SMALL, *words)


@pytest.mark.parametrize(
    ("name", "words", "copies"),
    [
        ("cifar10", [], 1),  # mixup, cutmix, dropout; a step's own numbers are copied
        ("cifar10", ["optim.clip_grad=1"], 1),
        ("cifar10", ["train.ema_decay=0.9"], 1),
        ("cifar10", ["train.accumulate=2", "data.batch_size=4"], 1),
        ("cifar10", ["loss.name=bce", "loss.class_weights=balanced"], 1),
        ("cifar10", ["augment.mixup=0", "augment.cutmix=0", "augment.erasing=0.3", "model.family=vit"], 1),
        ("imagenet_mini", ["data.image_size=64"], 1 + 3),  # pixels, labels, boxes to erase
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_step_waits_for_the_device_once(count, name, words, copies):
    step = count(name, *words)
    assert (step["waits"], step["copies"]) == (1, copies)
    assert step["launches"] > 100  # it was a whole step


@pytest.mark.parametrize("method", ["soft", "hard"])
def test_a_step_of_distillation_waits_for_the_device_once(count, tmp_path, method):
    arguments = dict(family="vit", patch_size=8, embed_dim=16, depth=1, num_heads=2, in_chans=3)
    teacher = registry.create_model("eit_mini", num_classes=2, img_size=32, **arguments)
    mean, std = default_mean_std(3)
    about = dict(mean=mean, std=std, size=32, resize=32, interpolation="bicubic")
    file = tmp_path / "teacher.safetensors"
    save_weights(file, teacher.state_dict(), Card(model="eit_mini", arguments=arguments, classes=["a", "b"], **about))
    step = count("cifar10", f"loss.teacher={file}", f"loss.distillation={method}")
    assert (step["waits"], step["copies"]) == (1, 1)
    assert step["operators"]["convolution"] == 2 + 1  # the student's and the teacher's


def test_a_moving_average_is_a_few_launches_and_not_one_for_each_weight(count):
    without, with_average = (count("cifar10", f"train.ema_decay={decay}")["launches"] for decay in ("null", "0.9"))
    assert 0 < with_average - without <= 4


# -- A step that is not finite, noticed a step later

FAULTS = {
    "loss": lambda logits: logits.sum() * math.nan,
    "gradient": lambda logits: torch.sqrt(0 * logits.sum()),  # 0, without a slope
}
WRONG = 5  # the step


@pytest.fixture
def spoiled(monkeypatch):
    """spoiled(fault, micro_batches) -> forward passes so far, models made; step `WRONG` is not finite."""

    def make(fault, accumulate=1, wrong=lambda step: step == WRONG):
        passes, models = [], []
        build, criterion_of = train_module.build_model, train_module.make_criterion

        def build_model(*arguments, **options):
            models.append(build(*arguments, **options))
            return models[-1]

        def make_criterion(*arguments):
            criterion = criterion_of(*arguments)

            def loss(logits, target):
                passes.append(0)
                is_wrong = wrong((len(passes) - 1) // accumulate)
                return criterion(logits, target) + (FAULTS[fault](logits) if is_wrong else 0)

            return loss

        monkeypatch.setattr(train_module, "build_model", build_model)
        monkeypatch.setattr(train_module, "make_criterion", make_criterion)
        return passes, models

    return make


@pytest.mark.parametrize(
    ("fault", "words", "launched"),
    [
        ("loss", [], 1),
        ("gradient", [], 1),
        ("gradient", ["optim.clip_grad=1", "train.precision=bf16"], 1),
        ("loss", ["train.accumulate=2", "data.batch_size=4"], 1),
        ("loss", ["optim.name=lamb"], 0),
        ("gradient", ["optim.name=lamb", "optim.clip_grad=1"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_weights_stay_those_before_a_step_that_is_not_finite(folder, spoiled, fault, words, launched):
    """To the bit, though a further step was launched before it was known; nothing of either is saved."""
    r = recipe(folder, f"train.save_every={WRONG}", "train.ema_decay=0.5", *words)
    passes, models = spoiled(fault, r.train.accumulate)
    with pytest.raises(FloatingPointError, match=f"the {fault} is (nan|inf) in epoch 2, step {WRONG}"):
        train(r)
    assert len(passes) == (WRONG + 1 + launched) * r.train.accumulate
    newest, faults = newest_checkpoint(r.run_folder())
    assert newest.name == f"step-{WRONG}" and not faults
    saved, averaged, _ = load_checkpoint(newest)
    assert same(dict(models[0].state_dict()), saved)
    assert all(value.isfinite().all() for value in (*saved.values(), *averaged.values()))


def test_the_last_step_of_an_epoch_is_checked_before_it_is_evaluated_and_saved(folder, spoiled, monkeypatch):
    r = recipe(folder)
    spoiled("loss", wrong=lambda step: step == 3)
    evaluated = []
    monkeypatch.setattr(train_module, "evaluate", lambda *_: evaluated.append(0))
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1, step 3"):
        train(r)
    assert not evaluated and newest_checkpoint(r.run_folder()) == (None, [])


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_step_that_fp16_cannot_hold_is_left_out_and_the_run_goes_on(folder, spoiled, name):
    """With half the scale; weights and moments stay."""
    words = ["train.precision=fp16", f"train.save_every={WRONG}", f"train.max_steps={WRONG + 1}"]
    r = recipe(folder, f"optim.name={name}", *words)
    spoiled("gradient")
    train(r)
    before, after = (load_checkpoint(r.run_folder() / "checkpoints" / f"step-{n}") for n in (WRONG, WRONG + 1))
    assert same(before[0], after[0])
    assert after[2]["scaler"]["scale"] == before[2]["scaler"]["scale"] / 2
    moments = [step[2]["optimizer"]["state"].values() for step in (before, after)]
    for one, other in zip(*moments, strict=True):
        assert torch.equal(one["exp_avg"], other["exp_avg"])


def test_an_optimizer_that_cannot_skip_an_update_trains_and_its_steps_are_read_at_once(folder, monkeypatch):
    made = []

    class Noted(StepReports):
        def __init__(self, immediate):
            made.append(immediate)
            super().__init__(immediate)

    monkeypatch.setattr(train_module, "StepReports", Noted)
    assert train(recipe(folder, "optim.name=lamb"))["epochs"] == 2 and made == [True]
