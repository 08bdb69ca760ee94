"""What is for CUDA and MPS, shown without either: on `meta`, and on a pretended device that computes on the CPU."""

import sys
import threading
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import eit
from eit.analysis import image_maps, robustness
from eit.analysis.measure import analyze
from eit.analysis.moments import Moments
from eit.config import Loss
from eit.data.images import Images, Preprocessing, normalise
from eit.data.loaders import EvaluationLoader
from eit.export.exporter import export
from eit.inference.evaluate import evaluate
from eit.inference.predict import predict
from eit.precision import float32_products
from eit.training.checkpoint import BackgroundWriter
from eit.training.loss import Distillation, make_criterion
from eit.weights.formats import digest
from tests.weights.test_load import card as make_card

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set:UserWarning")  # on the pretended device

CPU = torch.device("cpu")
META = torch.device("meta")
DIGITS = [str(i) for i in range(10)]
VIEW = Preprocessing(8, 8, "bicubic", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


# -- A pretended device

aten = torch.ops.aten
READS = (aten._local_scalar_dense.default, aten.equal.default)  # give Python's numbers
WAITS = (*READS, aten.nonzero.default, aten.masked_select.default)  # the host must know how large the result is
INDEXED = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
PACKAGE = str(Path(eit.__file__).parent)
NUMBER = 63  # no machine has so many: what the package keeps for this device is no other test's


class OnDevice(torch.Tensor):
    """A tensor that is on CUDA for C++, on the pretended device for Python, and has its values on the CPU."""

    @staticmethod
    def __new__(cls, values, kind):
        about = dict(strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype)
        made = torch.Tensor._make_wrapper_subclass(cls, values.size(), device=torch.device("cuda", 0), **about)
        made.values_, made.kind = values, kind
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"{function} outside of its mode")

    device = property(lambda self: torch.device(self.kind, NUMBER))
    is_cuda = property(lambda self: self.kind == "cuda")

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy")
        return self.detach().cpu().numpy()

    def tolist(self):
        return self.detach().cpu().tolist()


def replaced(value, change):
    """`value` with `change` of each tensor in it."""
    if isinstance(value, torch.Tensor):
        return change(value)
    return type(value)(replaced(one, change) for one in value) if isinstance(value, list | tuple) else value


class Pretended(TorchDispatchMode):
    """Runs the device's operators by those of the CPU, under the device's rules, and notes where the host would wait.

    It refuses tensors of the CPU next to those of the device, other than scalars and indices; generators of the CPU; on
    MPS float64, and copies that nothing waits for. It has no backward pass.
    """

    def __init__(self, kind):
        super().__init__()
        self.kind, self.device = kind, torch.device(kind, NUMBER)
        self.copies, self.waits = 0, []  # from and to the device; where the host waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, tensors = dict(kwargs or {}), []
        replaced([args, *kwargs.values()], tensors.append)
        mine = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        asked = kwargs.get("device")
        stays = (
            bool(mine) and function not in READS if asked is None else torch.device(asked).type in ("cuda", self.kind)
        )
        if function is aten.copy_.default:
            stays = isinstance(args[0], OnDevice)
            self._copy(function, args[1], stays, len(args) > 2 and args[2])
        elif function is aten._to_copy.default:
            self._copy(function, args[0], stays, kwargs.get("non_blocking", False))
        elif mine:
            indices = [i for i in args[1] if i is not None] if function in INDEXED else []
            if function in WAITS or any(i.dtype == torch.bool or not isinstance(i, OnDevice) for i in indices):
                self._wait(function)
            others = [
                t for t in tensors if not isinstance(t, OnDevice) and t.dim() and not any(t is i for i in indices)
            ]
            if others:
                raise RuntimeError(f"{function}: all tensors must be on the same device, not on {self.device} and cpu")
        if stays and isinstance(kwargs.get("generator"), torch.Generator):
            raise RuntimeError(f"{function}: a generator of {self.device} is expected, not of cpu")
        if asked is not None:
            kwargs["device"] = CPU if stays else asked
        kwargs.pop("pin_memory", None)
        wrappers = {id(t.values_): t for t in mine}

        def values(tensor):
            return tensor.values_ if isinstance(tensor, OnDevice) else tensor

        def wrapped(tensor):
            if self.kind == "mps" and tensor.dtype == torch.float64:
                raise TypeError(f"{function}: MPS has no float64")
            return wrappers[id(tensor)] if id(tensor) in wrappers else OnDevice(tensor, self.kind)

        out = function(*replaced(args, values), **{key: replaced(value, values) for key, value in kwargs.items()})
        return replaced(out, wrapped) if stays else out

    def _copy(self, function, source, arrives, non_blocking):
        if isinstance(source, OnDevice) == arrives or not source.numel():
            return
        self.copies += 1
        if not non_blocking:
            self._wait(function)
        elif self.kind == "mps":
            raise RuntimeError(f"{function}: from or to MPS, nothing keeps the host's memory until the copy is done")

    def _wait(self, function):
        frame = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        self.waits.append(f"{function}" + (f" {frame.f_code.co_filename}:{frame.f_lineno}" if frame else ""))


@contextmanager
def pretended(kind):
    """Within the context, `cuda` or `mps` is there."""
    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "_lazy_init", lambda: None)
    torch._C._ensureCUDADeviceGuardSet()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) shows its copy
    torch.__future__.set_swap_module_params_on_conversion(True)  # parameters stay the same objects, as without wrappers
    try:
        with Pretended(kind) as mode:
            yield mode
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch._C._set_only_lift_cpu_tensors(False)
        patch.undo()


@pytest.fixture(params=["cuda", "mps"])
def pretend(request):
    with pretended(request.param) as mode:
        yield mode


def real(kind, there):
    return pytest.param(kind, marks=[pytest.mark.gpu, pytest.mark.skipif(not there, reason=f"no {kind} here")])


@pytest.fixture(
    params=[
        "pretended cuda",
        "pretended mps",
        real("cuda", torch.cuda.is_available()),
        real("mps", torch.backends.mps.is_available()),
    ]
)
def device(request):
    if not request.param.startswith("pretended "):
        yield torch.device(request.param, 0)
        return
    with pretended(request.param.split()[1]) as mode:
        yield mode.device


def test_the_pretended_device_has_the_rules_of_a_real_one(pretend):
    x = torch.arange(6.0).view(2, 3).to(pretend.device)
    assert x.device == (x + 1).device == torch.zeros(2, device=x.device).device == pretend.device
    assert (x @ x.T).tolist() == [[5, 14], [14, 50]]
    pretend.waits.clear()
    x + torch.tensor(1.0)
    x[:, torch.tensor([0, 2], device=x.device)].sum()
    assert len(pretend.waits) == 1  # torch.tensor(..., device=)
    float(x.sum()), x[x > 1], x[:, torch.tensor([0, 2])], torch.equal(x, x), x.cpu(), x.nonzero()
    assert len(pretend.waits) == 7
    for refused in (lambda: x + torch.ones(3), lambda: x.numpy(), lambda: torch.randn(2, 3) @ x.T):
        with pytest.raises((RuntimeError, TypeError), match="device"):
            refused()
    if pretend.kind == "mps":
        with pytest.raises(TypeError, match="no float64"):
            x.double()
        with pytest.raises(RuntimeError, match="nothing keeps the host's memory"):
            torch.ones(3).to(x.device, non_blocking=True)


# -- Weights


def odd_tensors():
    """Of kinds whose bytes are not those of a plain row of floats."""
    plain = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    return dict(
        transposed=plain[:, :, 0, 0].t(),
        channels_last=plain.to(memory_format=torch.channels_last),
        expanded=torch.ones(1).expand(5),
        one_of_a_column=torch.arange(14.0)[::7][:1],
        scalar=torch.tensor(3.5),
        bfloat16=plain.bfloat16(),
        integer=torch.arange(5),
        boolean=torch.tensor([True, False, True]),
        empty=torch.empty(0, 3),
        learns=torch.nn.Parameter(plain.clone()),
    )


def test_the_digest_is_that_of_the_values_whatever_the_layout():
    for name, tensor in odd_tensors().items():
        plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        assert digest({name: tensor}) == digest({name: plain}), name
    assert digest({"a": torch.tensor(3.5)}) != digest({"a": torch.tensor([3.5])})


def test_the_digest_is_the_same_on_any_device(device):
    state = odd_tensors()
    on_device = {name: tensor.detach().to(device) for name, tensor in state.items()}
    assert digest(on_device) == digest(state)


def test_a_model_on_a_device_is_exported_and_stays_there(tmp_path):
    with pretended("cuda") as pretend:
        card = make_card(arguments=dict(embed_dim=16, depth=1, num_heads=2), size=32)
        model = card.create_model().to(pretend.device).train()
        model.card = card
        assert export(model, tmp_path / "model.pt2", "torch").parity.max_error < 1e-4
        assert model.training and next(model.parameters()).device == pretend.device
        assert digest(eit.load(tmp_path / "model.pt2").state_dict()) == digest(model.state_dict())


# -- Distillation


def test_distillation_starts_where_the_teacher_cannot_be_read_back():
    there = Distillation(Loss(teacher="digits"), VIEW, DIGITS, META)
    assert there.digest == Distillation(Loss(teacher="digits"), VIEW, DIGITS, CPU).digest
    assert {p.device for p in there.teacher.parameters()} == {META}
    assert there.logits(torch.empty(4, 3, 8, 8, device=META)).shape == (4, 10)


@pytest.mark.parametrize("method", ["soft", "hard"])
@pytest.mark.parametrize("mean", [VIEW.mean, (0.5, 0.5, 0.5)])  # another than the teacher's, and its own
def test_distillation_is_the_same_on_any_device(device, method, mean):
    view = Preprocessing(8, 8, "bicubic", mean, mean)
    config, classes = Loss(teacher="digits", distillation=method, tau=2), DIGITS[::-1]
    there, here = (Distillation(config, view, classes, place) for place in (device, CPU))
    own, student, x = torch.tensor(2.0), torch.randn(4, 10), torch.randn(4, 3, 8, 8)
    with float32_products("fp32"):
        found = there(own.to(device), student.to(device), x.to(device))
    torch.testing.assert_close(found.cpu(), here(own, student, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mean", [VIEW.mean, (0.5, 0.5, 0.5)])
def test_a_step_of_distillation_waits_for_nothing(pretend, mean):
    distillation = Distillation(
        Loss(teacher="digits"), Preprocessing(8, 8, "bicubic", mean, mean), DIGITS, pretend.device
    )
    own, student, x = (t.to(pretend.device) for t in (torch.tensor(2.0), torch.randn(4, 10), torch.randn(4, 3, 8, 8)))
    pretend.waits.clear()
    distillation(own, student, x)
    assert pretend.waits == []


def test_a_teacher_for_which_memory_is_short_is_not_called_unable_to_read_the_images(monkeypatch):
    def full(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(Distillation, "logits", full)
    with pytest.raises(torch.OutOfMemoryError):
        Distillation(Loss(teacher="digits"), VIEW, DIGITS, CPU)


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
def test_class_weights_are_not_rounded_by_autocast(name):
    x, y, weights = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0]), torch.tensor([1.001, 0.999, 1.003, 2.001, 0.3])
    criterion = make_criterion(Loss(name=name), 0.1, weights, 5)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = criterion(x, y)
    torch.testing.assert_close(rounded, criterion(x, y), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
def test_a_loss_waits_for_nothing(pretend, name):
    criterion = make_criterion(Loss(name=name), 0.1, torch.ones(10).to(pretend.device), 10)
    x, y = torch.randn(4, 10).to(pretend.device), torch.arange(4).to(pretend.device)
    pretend.waits.clear()
    criterion(x, y)
    criterion(x, x.softmax(dim=1))
    assert pretend.waits == []


# -- Images


def test_normalising_waits_for_its_constants_once(pretend):
    images = torch.randint(0, 256, (2, 3, 4, 5), dtype=torch.uint8)
    mean, std = (0.41, 0.52, 0.63), (0.21, 0.22, 0.23)
    x = images.to(pretend.device)
    normalise(x, mean, std)
    pretend.waits.clear()
    found = normalise(x, list(mean), std)
    assert pretend.waits == []
    torch.testing.assert_close(found.cpu(), normalise(images, mean, std), atol=0, rtol=0)


def test_constants_that_were_made_in_inference_mode_serve_a_backward_pass():
    mean = std = (0.123, 0.456, 0.789)
    with torch.inference_mode():
        normalise(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), mean, std)
    x = torch.rand(1, 3, 2, 2, requires_grad=True)
    normalise(x, mean, std).sum().backward()
    assert x.grad is not None


@pytest.fixture
def files(tmp_path):
    random = np.random.default_rng(0)
    for i in range(5):
        Image.fromarray(random.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
    return [str(tmp_path / f"{i}.png") for i in range(5)]


def labelled(files):
    return Images(DIGITS, [3, 1, 4, 1, 5], files, files)


def test_predictions_are_the_same_on_any_device(device, files):
    here = list(predict(eit.load("digits"), files, batch_size=2))
    there = list(predict(eit.load("digits").to(device), files, batch_size=2))
    for one, other in zip(here, there, strict=True):
        assert [name for name, _ in one.labels] == [name for name, _ in other.labels]
        assert [p for _, p in one.labels] == pytest.approx([p for _, p in other.labels], abs=1e-4)


def test_metrics_are_the_same_on_any_device(device, files):
    model = eit.load("digits")
    here = evaluate(model, EvaluationLoader(labelled(files), model.card.view, 2, 0, CPU))
    there = evaluate(model.to(device), EvaluationLoader(labelled(files), model.card.view, 2, 0, device))
    assert here.confusion == there.confusion and here.correct5 == there.correct5
    assert (here.loss, here.ece) == pytest.approx((there.loss, there.ece), abs=1e-4)


# -- Analysis


def two_layers():
    """A convolution and attention in the first, attention alone in the last; with weights that are not near 0."""
    torch.manual_seed(0)
    model = eit.EIT(8, 3, 1, 2, embed_dim=12, depth=2, num_heads=2, num_classes=10).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def test_an_analysis_is_the_same_on_any_device(device):
    images = torch.randn(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
    here, there = (analyze(two_layers().to(place), images, batch_size=2) for place in (CPU, device))
    for one, other in zip(here.frequency, there.frequency, strict=True):
        values = (
            (f.share, f.share_se, f.share_with_dc, *f.log_amplitude, *(share for _, _, share, _ in f.radial()))
            for f in (one, other)
        )
        assert next(values) == pytest.approx(next(values), abs=1e-4)
        assert other.energy.device == CPU
    for one, other in zip(here.attention, there.attention, strict=True):
        for name in ("distance", "distance_se", "class_mass", "entropy"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-4)


def test_an_analysis_on_cuda_waits_as_often_for_many_batches_as_for_one():
    with pretended("cuda") as pretend:
        model, waits = two_layers().to(pretend.device), []
        images = torch.randn(6, 3, 8, 8).to(pretend.device)
        analyze(model, images[:1])  # what is made once
        for part in (images[:2], images):
            pretend.waits.clear()
            analyze(model, part, batch_size=2)
            waits.append(len(pretend.waits))
    assert waits[0] == waits[1]


def test_an_analysis_copies_the_constants_of_a_grid_once(pretend):
    model, images = two_layers().to(pretend.device), torch.randn(1, 3, 8, 9).to(pretend.device)
    analyze(model, images)
    pretend.waits.clear()
    analyze(model, images)
    assert not [wait for wait in pretend.waits if "moments.py" not in wait and "hooks.py" not in wait]


def test_moments_are_the_same_on_any_device(device):
    values = torch.randn(4, 2, 3, dtype=torch.float32)
    here, there = Moments(), Moments()
    for batch in values.split(3):
        here.add(batch)
        there.add(batch.to(device))
    for name in ("mean", "standard_error"):
        assert getattr(there, name).dtype == torch.float64
        torch.testing.assert_close(getattr(there, name), getattr(here, name))


def test_pictures_are_the_same_on_any_device(device):
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    taken = [image_maps.compute_maps(two_layers().to(place), images.to(place), True)[0] for place in (CPU, device)]
    for one, other in zip(*taken, strict=True):
        torch.testing.assert_close(other.energy, one.energy, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(other.rollout, one.rollout, atol=1e-3, rtol=1e-3)


def test_accuracy_under_noise_is_the_same_on_any_device(device, files):
    bands = []
    for place in (CPU, device):
        model = eit.load("digits").to(place)
        loader = EvaluationLoader(labelled(files), model.card.view, 5, 0, place)
        bands.append(robustness.band_accuracy(model, loader, model.card.view))
    assert bands[0] == bands[1]


def test_what_is_measured_and_predicted_is_computed_in_float32_not_tf32(files):
    """TF32 is torch's default for convolutions on CUDA."""
    model, seen = eit.load("digits"), []
    model.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    assert torch.backends.cudnn.allow_tf32
    list(predict(model, files[:1]))
    analyze(model, torch.randn(1, 3, 8, 8))
    image_maps.compute_maps(model, torch.randn(1, 3, 8, 8))
    robustness.band_accuracy(model, EvaluationLoader(labelled(files), model.card.view, 5, 0, CPU), model.card.view)
    assert len(seen) >= 4 and not any(seen) and torch.backends.cudnn.allow_tf32


# -- Checkpoints


class FakeStream:
    """Of CUDA, that copies when it is told to."""

    def __init__(self, copied, log):
        self.copied, self.log = copied, log

    def record_event(self, event):
        self.log("record")
        event.synchronize = lambda: self.log("wait") or self.copied.wait(10)
        return event


def test_the_writer_does_not_wait_for_a_gpu_but_its_thread_does(monkeypatch):
    steps, copied = [], threading.Event()
    with pretended("cuda") as pretend:
        stream = FakeStream(copied, lambda what: steps.append((what, pretend.copies)))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
        monkeypatch.setattr(torch.cuda, "Event", lambda blocking: SimpleNamespace(blocking=blocking))
        monkeypatch.setattr(torch.cuda, "device", lambda gpu: nullcontext())
        a, b = torch.zeros(2).to(pretend.device), torch.ones(1, 2).to(pretend.device)
        pretend.waits.clear()
        pretend.copies = 0
        with BackgroundWriter() as writer:
            writer.submit(lambda state, more: steps.append((state["a"].tolist(), more)), dict(a=a, b=[b]), 7)
            assert pretend.waits == [] and pretend.copies == 2
            a += 5
            assert ([0, 0], 7) not in steps  # it waits
            copied.set()
            writer.wait()
    assert steps == [("record", 2), ("wait", 2), ([0, 0], 7)]


def test_from_mps_the_writer_copies_before_it_returns():
    seen = []
    with pretended("mps") as pretend:
        a = torch.zeros(2).to(pretend.device)
        with BackgroundWriter() as writer:
            writer.submit(lambda state: seen.append(state["a"].tolist()), dict(a=a))
            assert len(pretend.waits) == 2  # to the device, and back
            a += 5
    assert seen == [[0, 0]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
def test_on_cuda_the_writer_gets_what_was_there_while_the_gpu_was_still_busy():
    large, seen = torch.zeros(1 << 22, device="cuda"), []
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 29)  # cycles, a third of a second or so
    large += 1
    with BackgroundWriter() as writer:
        writer.submit(lambda state: seen.append((state["a"].is_pinned(), state["a"].unique().tolist())), dict(a=large))
        assert not torch.cuda.current_stream().query()  # the copy is still to come
        large += 5
    assert seen == [(True, [1.0])]
