"""What `eit bench` says is what was measured; the naive model is the same model."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import eit
from eit import memory
from eit.benchmark import bench, matmul_peak
from eit.benchmark.bench import Arm, Measurement, Options, Record
from eit.benchmark.naive import make_naive
from eit.cli.bench import print_record
from eit.errors import UserError
from eit.models.complexity import complexity, training_macs
from tests.helpers.commands import run_eit
from tests.helpers.shared import require

CPU = torch.device("cpu")
TINY = dict(img_size=16, kernel_size=3, stride=1, pool_size=4, embed_dim=12, depth=3, num_heads=2, num_classes=5)


@pytest.fixture(autouse=True)
def small_peak(monkeypatch):
    """The machine's peak of small matrices, and no waiting."""
    monkeypatch.setitem(matmul_peak.SIZE, "cpu", 256)
    monkeypatch.setattr(bench, "SECONDS", 0.01)


def record_of(*rows, **peaks):
    about = dict(device="cpu: x", threads=2, rounds=2)
    ways = {p: {"mm": [rate / 2, rate / 2], "conv1x1": [rate, rate]} for p, rate in peaks.items()}
    record = Record(list(rows), ways, ["openvino: none"], about)
    bench.compare(record)
    return record


ROWS = (
    Measurement(Arm("a", "eager", "fp32", "train", 4, naive=True), 10**9, [2.0, 4.0]),
    Measurement(Arm("a", "eager", "fp32", "train", 4), 10**9, [1.0, 0.5], memory=3 * 2**20),
    Measurement(Arm("b", "eager", "bf16", "train", 4), 5 * 10**8, [1.0, 1.0]),
    Measurement(Arm("a", "eager", "fp32", "infer", 1), 10**8, [0.01, 0.03]),
    Measurement(Arm("b", "eager", "fp32", "infer", 1), 10**8, [0.02, 0.02]),
)


def test_shares_and_ratios_are_those_of_hand():
    record = record_of(*ROWS, fp32=16e9, bf16=40e9)
    assert record.peak("fp32") == 16e9  # of the better way
    # 1e9 MACs x 2 x 4 images / 3 s / 16e9
    assert [row.share for row in record.rows[:3]] == pytest.approx([1 / 6, 2 / 3, 0.1])
    # to the naive model, round by round; without one to the first row of the same mode and batch
    assert [row.ratios for row in record.rows[:3]] == [[1, 1], [2, 8], [2, 4]]
    assert [row.ratios for row in record.rows[3:]] == [[1, 1], [0.5, 1.5]]
    shown = record.as_json()
    assert shown["rows"][1] | {} == dict(
        model="a", runtime="eager", precision="fp32", mode="train", batch=4, naive=False, label="a", macs=10**9,
        images_per_s=4 / 0.75, share_of_peak=record.rows[1].share, median_s=0.75, min_s=0.5, max_s=1.0, ratio=5,
        min_ratio=2, max_ratio=8, peak_memory_bytes=3 * 2**20, seconds=[1.0, 0.5],
    )  # fmt: skip


def test_the_tables_say_what_the_record_says(capsys):
    print_record(record_of(*ROWS, fp32=16e9, bf16=40e9))
    text = " ".join(capsys.readouterr().out.split())
    assert "training step, batch 4 model runtime precision images/s spread ratio of peak MiB" in text
    assert "naive a eager fp32 1.5 1.0 to 2.0 1.00 17% -" in text
    assert "a eager fp32 6.0 4.0 to 8.0 5.00 67% 3" in text
    assert "inference, batch 1 model runtime precision ms spread ratio of peak" in text
    assert "a eager fp32 20.0 10.0 to 30.0 1.00 62% b eager" in text
    assert "matrix multiply peak, fp32: 16 GFLOP/s by conv1x1; mm 8" in text
    assert "not measured: openvino: none" in text


def test_a_training_step_costs_thrice_but_for_the_gradient_of_the_image():
    model = eit.EIT(**TINY)
    macs = complexity(model, (3, 16, 16)).logits_macs
    stem = 16 * 16 * 12 * 3 * 3 * 3
    assert training_macs(model, (3, 16, 16)) == 3 * macs - stem


@pytest.mark.parametrize("schedule", ["eit", "increasing", "lsra", "vit", (0, 12, 6)])
@pytest.mark.parametrize("more", [{}, dict(cls_conv="zero"), dict(cls_conv="mean", conv_branch="gated")])
def test_the_naive_model_is_the_model(schedule, more):
    torch.manual_seed(0)
    model = eit.EIT(**TINY, schedule=schedule, **more)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)  # the initial values leave attention nearly uniform
    twin = make_naive(model)
    assert twin.state_dict().keys() == model.state_dict().keys()
    x, y = torch.randn(3, 3, 20, 16), torch.tensor([0, 3, 1])
    outputs = []
    for one in (model, twin):
        logits = one(x)
        torch.nn.functional.cross_entropy(logits, y).backward()
        outputs.append([logits, *(p.grad for p in one.parameters())])
    for ours, naive in zip(*outputs, strict=True):
        torch.testing.assert_close(naive, ours, rtol=1e-4, atol=1e-4 * ours.detach().abs().max().item())


def test_every_round_measures_every_arm_in_turns(monkeypatch):
    calls = []
    arms = [Arm(name, "eager", "fp32", "infer", 1) for name in "abc"]
    monkeypatch.setattr(bench, "seconds_of", lambda step, n, device: step() or len(calls))
    seconds, peaks = bench.interleave(
        {arm: lambda arm=arm: calls.append(arm.model) for arm in arms}, Options(rounds=3, precisions=["fp32"])
    )
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"  # the first ones say how many calls are enough
    assert [len(times) for times in seconds.values()] == [3, 3, 3]
    assert all(len(rates) == 3 and min(rates) > 0 for rates in peaks["fp32"].values())


@pytest.mark.project
def test_runtimes_batches_and_modes_are_measured(monkeypatch):
    require(find_spec("openvino") is not None, "openvino is not installed")
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: compiled.append(dynamic) or model)
    runtimes = ("eager", "compile", "openvino")
    record = bench.bench(
        ["digits"], Options(batch_size=2, rounds=2, memory=False, precisions=["fp32"], runtimes=runtimes, naive=True)
    )
    inference = [("naive digits", "eager"), *(("digits", runtime) for runtime in runtimes)]
    expected = [(*what, "infer", n) for n in (1, 2) for what in inference]
    trained = [("naive digits", "eager"), ("digits", "eager"), ("digits", "compile")]
    expected += [(*what, "train", 2) for what in trained]
    assert [(r.arm.label, r.arm.runtime, r.arm.mode, r.arm.batch) for r in record.rows] == expected
    assert compiled == [False] * 3 and not record.left_out
    assert all(len(r.seconds) == 2 and min(r.seconds) > 0 and r.share > 0 and r.memory is None for r in record.rows)
    cost = complexity(eit.load("digits"), (3, 32, 32))
    for row in record.rows:
        macs = cost.macs if row.arm.naive else cost.logits_macs
        assert row.macs == (macs if row.arm.mode == "infer" else 3 * macs - 16 * 16 * 80 * 75)


def test_a_training_step_trains():
    model = bench.open_model("digits", None)
    x, y = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    before = model.head.weight.clone()
    bench.training_step(model, model, x, y, "bf16")()
    assert (model.head.weight != before).any() and model.head.weight.grad is None
    assert model.head.weight.dtype == torch.float32


def test_fp16_is_measured_on_the_cpu_in_float16():
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.dtype) or t, lambda t: t):
        record = bench.bench(
            ["digits"], Options(batch_size=2, rounds=1, memory=False, precisions=["fp16"], runtimes=["eager"])
        )
    assert [(row.arm.precision, row.arm.mode) for row in record.rows] == [
        ("fp16", mode) for mode in ("infer", "infer", "train")
    ]
    assert all(row.seconds[0] > 0 and row.share > 0 for row in record.rows)
    assert record.peaks.keys() == {"fp16"} and torch.float16 in seen


@pytest.mark.parametrize(("precision", "size"), [("fp32", 2048), ("bf16", 2048), ("fp16", 512)])
def test_a_peak_is_measured_in_products_that_take_no_minutes(monkeypatch, precision, size):
    """A CPU has no fast products in float16: `mm` of 2048 x 2048 matrices takes half a minute."""
    monkeypatch.undo()
    sides, ticks = [], iter(range(99))

    def randn(*shape, device, dtype):
        sides.append(shape[1:])
        return torch.zeros((), dtype=dtype).expand(shape)

    monkeypatch.setattr(torch, "randn", randn)
    matmul_peak.routes(precision, CPU)
    assert sides == [(size, size)]
    monkeypatch.setattr(matmul_peak.time, "perf_counter", lambda: next(ticks))
    assert matmul_peak.flops_per_second(lambda: None, CPU, precision) == 2 * size**3


def test_precisions_that_a_runtime_lacks_are_named():
    left_out = []
    options = Options(modes=["infer"], batch_size=1, precisions=["fp32", "fp16"])
    arms = bench.arms_of("digits", None, ["eager", "onnxruntime", "openvino"], options, left_out)
    assert [(arm.runtime, arm.precision) for arm in arms] == [
        ("eager", "fp32"),
        ("eager", "fp16"),
        ("onnxruntime", "fp32"),
        ("openvino", "fp32"),
    ]
    assert left_out == [f"{runtime} fp16: not available on the CPU" for runtime in ("onnxruntime", "openvino")]


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_a_peak_in_float32_is_measured_in_its_own_kind_of_products(precision):
    """torch's own choice on CUDA is TF32 for convolutions and float32 for matrix products."""
    seen = []

    def product():
        seen.append((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))

    matmul_peak.flops_per_second(product, CPU, precision, 8)
    assert set(seen) == {(precision == "tf32", precision == "tf32")}


PEAKS = """
import torch
from eit.memory import peak_bytes

mib, cpu, kept = 2**20, torch.device("cpu"), []

def allocate(n):
    return torch.ones(n * mib // 4)

def one_after_the_other():
    for _ in range(3):
        allocate(64)

def two_at_once_and_one_that_stays():
    both = allocate(64), allocate(64)
    if not kept:
        kept.append(allocate(40))
    return both

allocate(500)  # what was before is no part of it
print(peak_bytes(one_after_the_other, cpu) / mib, peak_bytes(two_at_once_and_one_that_stays, cpu) / mib)
"""


def test_peak_memory_sees_what_is_held_at_once():
    require(memory.is_measurable(CPU), "the kernel has no high-water mark to reset")
    done = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, env=os.environ | memory.MALLOC)
    found = [float(word) for word in done.stdout.split()]
    assert found == pytest.approx([64, 168], abs=2), done.stderr


@pytest.mark.project
def test_json_chart_and_memory(tmp_path):
    words = ["bench", "digits", "--mode", "train", "--precision", "fp32", "--runtime", "eager", "--size", "32"]
    done = run_eit(*words, "--rounds", "1", "--json", "--out", tmp_path / "bars.png")
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert {"date", "command", "device", "cores", "threads", "python", "packages", "eit", "commit"} <= shown.keys()
    [row] = shown["rows"]
    flops = 2 * row["macs"] * row["batch"]
    assert row["share_of_peak"] == pytest.approx(flops / row["median_s"] / shown["peaks"]["fp32"]["flops_per_s"])
    # The MLPs alone keep 16 x (1 + 8 x 8) tokens of 320 channels before and after GELU, in five layers
    if memory.is_measurable(CPU):
        least = 5 * 2 * 16 * 65 * 320 * 4
        assert least < row["peak_memory_bytes"] < 4 * least
    assert Image.open(tmp_path / "bars.png").width > 500


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eit_mni"], "unknown model 'eit_mni'; did you mean 'eit_mini'?"),
        (["timm/resnt50"], "timm has no model 'resnt50'; did you mean 'resnet50'?"),
        (["digits", "digits"], "digits is given twice"),
        (["a.onnx"], "a.onnx is an exported file: give the weights"),
        (["digits", "--precision", "int8"], "'--precision': 'int8' is not one of 'fp32', 'tf32', 'bf16', 'fp16'"),
        (["digits", "--runtime", "tensorrt"], "'tensorrt' is not one of 'eager', 'compile', 'onnxruntime', 'openvino'"),
        (["digits", "--mode", "both"], "'--mode': 'both' is not one of 'infer', 'train'"),
        (["digits", "--threads", "9999"], "--threads 9999: this machine has"),
        (["digits", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["digits", "--out", "x.gif"], "--out x.gif: give a file name that ends in .png, .pdf or .svg"),
        (["digits", "--mode", "train", "--runtime", "openvino"], "--runtime openvino cannot train"),
        (["timm/test_vit", "--naive"], "--naive is for models of this package, not for timm/test_vit"),
    ],
)
def test_a_mistake_is_one_line(words, said):
    done = run_eit("bench", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("eit: ") and said in done.stderr and done.stderr.count("\n") == 1


def test_what_is_not_there_is_an_error_where_it_was_asked_for_and_said_otherwise(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    broken = SimpleNamespace(InvalidCxxCompiler=RuntimeError)
    monkeypatch.setitem(sys.modules, "torch._inductor.exc", broken)
    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", lambda: (_ for _ in ()).throw(RuntimeError))
    kept, left_out = bench.check_runtimes(Options())
    assert kept == ["eager", "onnxruntime"]
    assert left_out[0].startswith("--runtime compile needs a C++ compiler")
    assert left_out[1].startswith("--runtime openvino needs openvino")
    for runtime in ("compile", "openvino"):
        with pytest.raises(UserError, match=f"--runtime {runtime} needs"):
            bench.check_runtimes(Options(runtimes=[runtime]))


def test_memory_that_is_freed_can_be_kept():
    require(Path("/proc/self/statm").exists(), "/proc is not there")
    code = """
from pathlib import Path
import torch
from eit.memory import keep_freed
keep_freed()
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
torch.ones(25 << 20)  # 100 MiB, which go back at once otherwise
before = resident()
x = torch.ones(24 << 20)  # aligned, it needs a little more than its size
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10 << 20  # the pages were there
