"""A precision is computed as its name says, leaves torch's settings as they were, and is written down."""

import json
import os

import pytest
import torch

from eit.errors import UserError
from eit.inference import evaluate as evaluate_module
from eit.precision import (
    PRECISIONS,
    arithmetic,
    autocast,
    deterministic_algorithms,
    float32_products,
    resolve_precision,
)
from eit.training import trainer as train_module
from eit.training.checkpoint import load_state, newest_checkpoint
from eit.training.trainer import train
from tests.helpers.commands import run_eit
from tests.helpers.training import recipe, train_until_killed

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


# -- Which one


def gpu(monkeypatch, capability):
    """torch says that there is a GPU of this capability."""

    def is_bf16_supported(including_emulation=True):
        return including_emulation or capability >= (8, 0)

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)


@pytest.mark.parametrize("device", [CPU, MPS])
def test_auto_is_fp32_where_there_is_no_cuda(device):
    assert resolve_precision("auto", device) == "fp32"


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp32")])
def test_auto_is_bf16_on_a_gpu_that_does_not_emulate_it(monkeypatch, capability, expected):
    gpu(monkeypatch, capability)
    assert resolve_precision("auto", CUDA) == expected


@pytest.mark.parametrize("device", [CPU, CUDA, MPS])
def test_a_precision_that_is_asked_for_is_taken(monkeypatch, device):
    gpu(monkeypatch, (8, 6))
    known = [name for name in PRECISIONS if device == CUDA or name != "tf32"]
    assert [resolve_precision(name, device) for name in known] == known


@pytest.mark.parametrize("device", [CPU, MPS, torch.device("cuda", 1)])
def test_tf32_where_there_is_none_is_one_line(monkeypatch, device):
    gpu(monkeypatch, (7, 5))
    with pytest.raises(UserError) as error:
        resolve_precision("tf32", device)
    assert str(error.value).startswith("train.precision=tf32 needs an NVIDIA GPU") and f"on {device} use" in str(
        error.value
    )


def test_an_unknown_precision_is_one_line():
    with pytest.raises(UserError) as error:
        resolve_precision("int8", CPU)
    assert "int8" in str(error.value) and "auto, fp32, tf32, bf16, fp16" in str(error.value)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_a_forward_pass_computes_in_the_type_that_is_named(precision, expected):
    x, layer = torch.ones(2, 3), torch.nn.Linear(3, 4)
    for context in (autocast(CPU, precision), arithmetic(CPU, precision)):
        with context:
            assert layer(x).dtype == expected


# -- float32 products on CUDA


def readable(setting):
    try:
        return setting()
    except RuntimeError:  # torch refuses where its older and its newer names were used together
        return None


def settings():
    """All that torch says about float32 products, by its older and its newer names."""
    backends = torch.backends
    parts = dict(matmul=backends.cuda.matmul, conv=backends.cudnn.conv, rnn=backends.cudnn.rnn)
    parts |= dict(cudnn=backends.cudnn, cpu_matmul=backends.mkldnn.matmul, cpu_conv=backends.mkldnn.conv)
    older = dict(
        allow_tf32_matmul=lambda: backends.cuda.matmul.allow_tf32,
        allow_tf32_cudnn=lambda: backends.cudnn.allow_tf32,
        float32_matmul_precision=torch.get_float32_matmul_precision,
    )
    newer = {name: part.fp32_precision for name, part in parts.items()} | dict(all=backends.fp32_precision)
    return newer | {name: readable(setting) for name, setting in older.items()}


def set_to_defaults():
    backends = torch.backends
    torch.set_float32_matmul_precision("highest")
    backends.cudnn.allow_tf32 = True
    for part in (backends, backends.cudnn, backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv):
        part.fp32_precision = "none"


@pytest.fixture
def defaults():
    set_to_defaults()
    yield
    set_to_defaults()


def test_the_defaults_of_these_tests_are_those_of_torch(defaults):
    assert settings()["allow_tf32_cudnn"] is True and settings()["conv"] == "tf32"  # why there is a context at all
    assert settings()["allow_tf32_matmul"] is False and settings()["matmul"] == "none"


def by_new_names(**values):
    def change():
        backends = torch.backends
        parts = dict(matmul=backends.cuda.matmul, conv=backends.cudnn.conv, rnn=backends.cudnn.rnn)
        for name, value in values.items():
            (parts | dict(cudnn=backends.cudnn, all=backends))[name].fp32_precision = value

    return change


CALLERS = {
    "changed nothing": lambda: None,
    "cuda.matmul.allow_tf32": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "cudnn.allow_tf32": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "cuda.matmul.fp32_precision": by_new_names(matmul="tf32"),
    "cudnn.conv.fp32_precision": by_new_names(conv="ieee"),
    "each fp32_precision": by_new_names(matmul="tf32", conv="tf32", rnn="ieee"),
    "cudnn.fp32_precision": by_new_names(cudnn="ieee"),
    "fp32_precision, tf32": by_new_names(all="tf32"),
    "fp32_precision, ieee": by_new_names(all="ieee"),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("caller", CALLERS)
def test_products_are_in_tf32_where_that_is_asked_for_and_in_float32_otherwise(defaults, caller, precision):
    CALLERS[caller]()
    with float32_products(precision):
        inside = settings()
    is_tf32 = precision == "tf32"
    assert (inside["matmul"] == "tf32", inside["conv"] == "tf32") == (is_tf32, is_tf32)
    assert (inside["allow_tf32_matmul"], inside["allow_tf32_cudnn"]) == (is_tf32, is_tf32)  # torch.compile reads them


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("caller", CALLERS)
def test_the_settings_of_the_caller_are_put_back(defaults, caller, precision):
    CALLERS[caller]()
    before = settings()
    with float32_products("tf32" if precision == "fp32" else "fp32"), float32_products(precision):
        pass
    with pytest.raises(KeyError), float32_products(precision):
        raise KeyError
    after = settings()
    known = [name for name, value in before.items() if value is not None]
    assert {name: after[name] for name in known} == {name: before[name] for name in known}


# -- Determinism

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture
def cublas(monkeypatch):
    """The variable is not set, and is not after the test either."""
    monkeypatch.setenv(CUBLAS, "")
    monkeypatch.delenv(CUBLAS)
    return monkeypatch


def choices():
    """What torch may choose between."""
    cudnn, deterministic = torch.backends.cudnn, torch.utils.deterministic
    return dict(
        algorithms=torch.are_deterministic_algorithms_enabled(),
        warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn_search=cudnn.benchmark,
        cudnn_deterministic=cudnn.deterministic,
        cudnn_attention=torch.backends.cuda.cudnn_sdp_enabled(),
        fill=deterministic.fill_uninitialized_memory,
    )


@pytest.fixture(params=["defaults of torch", "others"])
def chosen(request, cublas):
    """Choices of the caller."""
    cudnn, before = torch.backends.cudnn, choices()
    if request.param == "others":
        torch.use_deterministic_algorithms(True, warn_only=True)
        cudnn.benchmark, cudnn.deterministic = True, False
        torch.backends.cuda.enable_cudnn_sdp(False)
        torch.utils.deterministic.fill_uninitialized_memory = False
    yield choices()
    torch.use_deterministic_algorithms(before["algorithms"], warn_only=before["warn_only"])
    cudnn.benchmark, cudnn.deterministic = before["cudnn_search"], before["cudnn_deterministic"]
    torch.backends.cuda.enable_cudnn_sdp(before["cudnn_attention"])
    torch.utils.deterministic.fill_uninitialized_memory = before["fill"]


def test_what_repeats_its_results_is_chosen_and_the_choices_of_the_caller_are_put_back(chosen):
    with deterministic_algorithms(True):
        assert choices() == dict(
            algorithms=True,
            warn_only=False,
            cudnn_search=False,
            cudnn_deterministic=True,
            cudnn_attention=False,
            fill=False,
        )
        assert os.environ[CUBLAS] == ":4096:8"
    assert choices() == chosen
    with pytest.raises(KeyError), deterministic_algorithms(True):
        raise KeyError
    assert choices() == chosen


def test_nothing_changes_where_it_is_not_asked_for(chosen):
    with deterministic_algorithms(False):
        assert choices() == chosen
    assert CUBLAS not in os.environ


def test_cublas_that_has_started_without_the_variable_is_one_line(cublas):
    cublas.setattr(torch.cuda, "is_initialized", lambda: True)
    before = choices()
    with pytest.raises(UserError) as error, deterministic_algorithms(True):
        pytest.fail("entered")
    assert str(error.value) == (
        "train.deterministic=true needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment before CUDA starts"
    )
    assert choices() == before and CUBLAS not in os.environ


def test_another_value_of_the_variable_is_one_line(cublas):
    cublas.setenv(CUBLAS, ":0:0")
    with pytest.raises(UserError) as error, deterministic_algorithms(True):
        pytest.fail("entered")
    assert str(error.value) == ("train.deterministic=true needs CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8, not :0:0")


@pytest.mark.parametrize("value", [":16:8", ":4096:8"])
def test_a_variable_that_serves_is_kept_also_where_cuda_has_started(cublas, value):
    cublas.setenv(CUBLAS, value)
    cublas.setattr(torch.cuda, "is_initialized", lambda: True)
    with deterministic_algorithms(True):
        assert os.environ[CUBLAS] == value


# -- In a run


def test_a_run_trains_in_its_precision_and_its_environment_says_so(folder, cublas):
    """The settings are those of its steps, backward passes included, and are put back."""
    seen, make = [], train_module.make_criterion
    for module in (train_module, evaluate_module):
        cublas.setattr(module, "resolve_precision", lambda name, device: "tf32")  # which the CPU takes for float32

    def watched(*arguments):
        criterion = make(*arguments)

        def loss(logits, target):
            loss = criterion(logits, target)
            loss.register_hook(lambda _: seen.append((settings()["matmul"], settings()["conv"], choices())))
            return loss

        return loss

    cublas.setattr(train_module, "make_criterion", watched)
    before = settings(), choices()
    r = recipe(folder, "train.deterministic=true", "train.precision=auto")
    train(r)
    assert len(seen) == 8 and all(step[:2] == ("tf32", "tf32") and step[2]["algorithms"] for step in seen)
    assert (settings(), choices()) == before
    written = json.loads((r.run_folder() / "environment.json").read_text())
    assert (written["precision"], written["global_batch"], written["compile"]) == ("tf32", 8, "off")
    assert written["settings"]["tf32_matmul"] and written["settings"]["deterministic_algorithms"]


def test_what_auto_was_is_written_down_and_a_run_does_not_go_on_in_another(folder, monkeypatch):
    """On another kind of GPU, say."""
    r = recipe(folder, "train.precision=auto", "train.save_every=1")
    train_until_killed(r, 3, monkeypatch)
    assert json.loads((r.run_folder() / "environment.json").read_text())["precision"] == "fp32"
    newest, _ = newest_checkpoint(r.run_folder())
    assert load_state(newest)["progress"]["fixed"]["train.precision"] == "fp32"
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "resolve_precision", lambda name, device: "bf16")
        with pytest.raises(UserError, match="trained with another train.precision: fp32, now bf16; ") as error:
            train(r)
    assert "\n" not in str(error.value)
    advice = str(error.value).rpartition("; ")[2]
    assert advice == "set another out="  # as the recipe says auto, train.precision=fp32 would be refused as another
    assert train(r)["epochs"] == 2


def test_a_finished_run_does_not_claim_another_precision(folder, monkeypatch):
    r = recipe(folder, "train.precision=auto", "train.max_steps=2")
    train(r)
    monkeypatch.setattr(train_module, "resolve_precision", lambda name, device: "bf16")
    with pytest.raises(UserError, match="trained with another train.precision: fp32, now bf16"):
        train(r)


# -- On the command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval", "digits", "--precision", "tf32"], "--precision tf32 needs an NVIDIA GPU"),
        (["eval", "digits", "--precision", "int8"], "'int8' is not one of 'auto', 'fp32', 'tf32', 'bf16', 'fp16'"),
        (["bench", "digits", "--precision", "tf32"], "--precision tf32 needs an NVIDIA GPU"),
        (["train", "digits", "train.precision=tf32"], "train.precision=tf32 needs an NVIDIA GPU"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_precision_that_is_not_there_is_one_line(tmp_path, words, said):
    device = ["train.device=cpu", f"out={tmp_path / 'run'}"] if words[0] == "train" else ["--device", "cpu"]
    done = run_eit(*words, *device, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("eit: ") and said in done.stderr and done.stderr.count("\n") == 1


def test_an_evaluation_says_what_auto_was():
    done = run_eit("eval", "digits", "--data", "sklearn:digits", "--precision", "auto", "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["precision"] == "fp32"
