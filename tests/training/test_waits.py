"""What a training step waits for, and what it does not: counted on torch's device `meta`, or shown on the CPU."""

import importlib.util
import math
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eit.config import Augment
from eit.data import prefetch
from eit.data.augment import noise_fields
from eit.data.images import View
from eit.data.loaders import evaluation_batch_size
from eit.data.prefetch import Prefetcher, to_device
from eit.data.workers import worker_count, worker_options
from eit.models import registry
from eit.training import trainer as train_module
from eit.training.checkpoint import load_checkpoint, newest_checkpoint
from eit.training.step_reports import StepReports, from_host
from eit.training.trainer import train
from eit.weights.load import Card, default_mean_std, save_weights
from tests.training.test_trainer import recipe, same

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


# -- Reports


@pytest.fixture
def told():
    return []


def reports_of(told, at_once=False):
    return StepReports(lambda step, numbers: told.append((step, numbers)), at_once)


def test_a_step_is_looked_at_when_the_next_one_reports_and_the_last_one_when_asked(told):
    reports = reports_of(told)
    reports.flush()
    reports.add(4, torch.tensor([1.0, 2.0]))
    assert told == []
    reports.add(5, torch.tensor([3.0, 4.0]))
    assert told == [(4, [1.0, 2.0])]
    reports.flush()
    assert told == [(4, [1.0, 2.0]), (5, [3.0, 4.0])]
    reports.flush()
    assert len(told) == 2  # once each


def test_a_step_is_looked_at_at_once_where_an_update_cannot_be_left_out(told):
    reports = reports_of(told, at_once=True)
    for step in range(2):
        reports.add(step, torch.tensor([0.5]))
        assert told[-1] == (step, [0.5]) and len(told) == step + 1
    reports.flush()
    assert len(told) == 2


@pytest.mark.parametrize("at_once", [True, False])
def test_what_looking_raises_ends_the_step_that_reports_and_is_raised_once(at_once):
    def look(step, numbers):
        raise FloatingPointError(step)

    reports = StepReports(look, at_once)
    with pytest.raises(FloatingPointError, match="7"):
        reports.add(7, torch.zeros(1))
        reports.add(8, torch.zeros(1))
        pytest.fail("it went on")
    reports.flush()


def test_numbers_of_the_device_are_read_when_their_copy_has_arrived(told, monkeypatch):
    """Not before, and nothing else is waited for."""
    happened = []

    class OnGpu:
        """Stands for a tensor on CUDA."""

        device, shape, dtype = torch.device("cuda"), (1,), torch.float32

    class Pinned:
        def copy_(self, source, non_blocking):
            happened.append(("copy", non_blocking))

        def tolist(self):
            happened.append("read")
            return [1.0]

    class Event:
        def record(self):
            happened.append("record")

        def synchronize(self):
            happened.append("wait")

    monkeypatch.setattr(torch, "empty", lambda shape, dtype, pin_memory: Pinned() if pin_memory else None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    reports = reports_of(told)
    reports.add(0, OnGpu())
    assert happened == [("copy", True), "record"] and told == []
    reports.flush()
    assert happened[2:] == ["wait", "read"] and told == [(0, [1.0])]


def test_numbers_of_the_host_are_the_same_on_the_device():
    numbers = from_host([1, True, 0.0], CPU)
    assert numbers.dtype == torch.float32 and numbers.tolist() == [1, 1, 0]


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


def test_the_last_step_of_an_epoch_is_looked_at_before_it_is_evaluated_and_saved(folder, spoiled, monkeypatch):
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


def test_an_optimizer_without_a_switch_on_the_device_trains_and_is_looked_at_at_once(folder, monkeypatch):
    made = []

    class Noted(StepReports):
        def __init__(self, look, at_once):
            made.append(at_once)
            super().__init__(look, at_once)

    monkeypatch.setattr(train_module, "StepReports", Noted)
    assert train(recipe(folder, "optim.name=lamb"))["epochs"] == 2 and made == [True]


# -- Loaders


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"), [(1, None, 1), (6, None, 6), (64, None, 16), (64, 8, 8), (64, 2, 16), (2, 4, 0)]
)
def test_workers_are_the_cores_that_the_process_may_use(monkeypatch, cores, ranks, expected):
    """Fewer than the machine has, in a container or under Slurm."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert worker_count(None) == expected
    assert [worker_count(given) for given in (0, 3, 40)] == [0, 3, 40]
    options = worker_options(None, CPU)
    assert options["num_workers"] == expected and options["prefetch_factor"] == (4 if expected else None)


def test_workers_are_the_cores_of_the_machine_where_a_system_has_no_affinity(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 10)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert worker_count(None) == 10


@pytest.mark.parametrize(
    ("kind", "pinned", "waits"),
    [("cuda", True, False), ("cuda", False, True), ("mps", False, True), ("cpu", False, True)],
)
def test_only_a_copy_from_pinned_memory_to_cuda_is_not_waited_for(kind, pinned, waits):
    """Pageable memory may be freed before the copy is done."""
    seen = []
    tensor = SimpleNamespace(
        is_pinned=lambda: pinned, to=lambda device, non_blocking=False: seen.append((device, non_blocking))
    )
    to_device(tensor, torch.device(kind))
    assert seen == [(torch.device(kind), not waits)]
    assert worker_options(0, torch.device(kind))["pin_memory"] is (kind == "cuda")


@pytest.mark.parametrize(
    ("kind", "batch_size", "images", "expected"),
    [
        ("cpu", 64, 50_000, 64),
        ("cuda", 64, 50_000, 256),
        ("mps", 64, 50_000, 256),
        ("cuda", 64, 100, 100),
        ("cuda", 64, 10, 64),
    ],
)
def test_more_images_are_evaluated_at_a_time_on_a_gpu_but_no_more_than_there_are(kind, batch_size, images, expected):
    assert evaluation_batch_size(batch_size, images, torch.device(kind)) == expected


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
VIEW = View(8, 8, "bicubic", MEAN, STD)


def host_batches():
    """Two batches of workers: with boxes (top, left, height, width, seed) to erase, none in the second image."""
    random = np.random.default_rng(0)
    for labels in ([3, 1, 4], [1, 5, 9]):
        pixels = torch.from_numpy(random.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8))
        boxes = torch.tensor([[1, 2, 3, 4, 70], [0, 0, 0, 0, 0], [5, 0, 3, 8, 5]])
        yield pixels, torch.tensor(labels), [], boxes


def by_hand(host_batch, epoch, erasing):
    pixels, labels, _, boxes = host_batch
    images = (pixels.numpy() / 255 - np.array(MEAN)) / np.array(STD)
    noise = noise_fields((8, 8, 3), 7, epoch, CPU).numpy()
    for image, (top, left, height, width, seed) in zip(images, boxes.tolist(), strict=True):
        if erasing and height:
            box = np.s_[top : top + height, left : left + width]
            image[box] = noise[seed % len(noise)][box]
    return images.transpose(0, 3, 1, 2), labels


class Streams:
    """Stands for CUDA's: notes what is asked of them, in order."""

    def __init__(self, monkeypatch):
        self.happened, self.current = [], "main"
        self.main, self.side = (SimpleNamespace(name=name) for name in ("main", "side"))
        for stream in (self.main, self.side):
            stream.wait_stream = lambda other, own=stream: self.happened.append(f"{own.name} waits for {other.name}")
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.main)
        monkeypatch.setattr(torch.cuda, "stream", self.on)
        keep = lambda tensor, stream: self.happened.append(f"{tensor.ndim} axes are kept for {stream.name}")  # noqa: E731
        monkeypatch.setattr(torch.Tensor, "record_stream", keep)
        copy = prefetch.to_device
        monkeypatch.setattr(
            prefetch, "to_device", lambda *given: self.happened.append(f"copy on {self.current}") or copy(*given)
        )

    def on(self, stream):
        streams = self

        class Context(nullcontext):
            def __enter__(self):
                streams.current = stream.name

            def __exit__(self, *_):
                streams.current = "main"

        return Context()


@pytest.mark.parametrize("erasing", [0.0, 0.5])
@pytest.mark.parametrize("side", [False, True], ids=["here", "side stream"])
def test_batches_of_workers_become_the_images_that_are_made_by_hand(monkeypatch, erasing, side):
    prefetcher = Prefetcher(VIEW, Augment(erasing=erasing), 7, CPU)
    if side:
        prefetcher.side = Streams(monkeypatch).side
    batches = list(prefetcher(host_batches(), 2))
    for batch, host_batch in zip(batches, host_batches(), strict=True):
        images, labels = by_hand(host_batch, 2, erasing)
        np.testing.assert_allclose(batch.images.numpy(), images, atol=1e-6)
        assert batch.images.dtype == torch.float32 and torch.equal(batch.labels, labels) and batch.valid == 3


def test_a_side_stream_makes_the_batches_and_the_step_waits_for_them_there(monkeypatch):
    streams = Streams(monkeypatch)
    prefetcher = Prefetcher(VIEW, Augment(erasing=0.5), 7, CPU)
    prefetcher.side = streams.side
    batches = prefetcher(host_batches(), 0)
    made = ["copy on side"] * 3 + ["main waits for side", "4 axes are kept for main", "1 axes are kept for main"]
    next(batches)
    assert streams.happened == ["side waits for main", *made]
    next(batches)
    assert streams.happened == ["side waits for main", *made, *made]
    assert streams.current == "main" and list(batches) == []
