"""`eit bench --self-check`: which operators are faster here, and what a later process makes of the choice."""

import json
import subprocess
import sys

import pytest
import torch

import eit
from eit import operators
from eit.benchmark import self_check
from eit.benchmark.bench import Options
from eit.models import ops
from tests.helpers.commands import run_eit

CODE = "import eit.models.registry; print(sorted(eit.models.ops.FASTER_ON_CPU))"


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def seconds(monkeypatch):
    """Seconds of a step by its operators, in place of measured ones; what each step ran with."""
    found = dict.fromkeys(["", *operators.OPERATORS], 1.0)

    def interleave(steps, options):
        times = {}
        for arm, step in steps.items():
            step()
            both = len(arm.model.split()) > 1
            times[arm] = [(0.5 if both else found[arm.model]) if arm.mode == "infer" else 1.0] * options.rounds
        return times, {}

    monkeypatch.setattr(self_check, "interleave", interleave)
    monkeypatch.setattr(
        self_check, "make_step", lambda arm, *_: lambda: ran.append((arm.model, set(ops.FASTER_ON_CPU)))
    )
    ran = []
    return found, ran


def test_each_operator_runs_alone_and_those_that_pay_together(seconds):
    found, ran = seconds
    found |= dict(linear=0.5, stem=0.9, max_pool=0.99, attention=1.3)
    before = set(ops.FASTER_ON_CPU)
    result = self_check.self_check("eit_mini", Options(rounds=5))
    assert result.choice == ["linear", "stem"] and before == ops.FASTER_ON_CPU
    assert [gain.operators for gain in result.gains] == [[name] for name in operators.OPERATORS] + [["linear", "stem"]]
    assert result.gains[0].infer == (2, 2, 2) and result.gains[0].train == (1, 1, 1)
    assert all(used == set(names.split()) for names, used in ran) and len(ran) == 2 * 2 * (5 + 2)


def test_the_choice_is_used_by_later_processes(seconds, cache_home):
    seconds[0]["attention"] = 0.5
    done = run_eit("bench", "--self-check", "--save", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["choice"] == ["attention"]
    assert f"saved in {cache_home}/eit/operators.json; delete it to undo this" in done.stderr
    fresh = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert fresh.stdout.strip() == "['attention']", fresh.stderr


def test_a_table_tells_what_pays(seconds):
    seconds[0]["stem"] = 0.8
    done = run_eit("bench", "--self-check")
    assert done.returncode == 0 and "faster here: stem; in use:" in done.stdout and "1.25 (1.25 to 1.25)" in done.stdout


@pytest.mark.parametrize("content", ["", "[]", '{"processor": 1}', "null", "[" * 10**5])
def test_a_damaged_choice_is_not_used(cache_home, content):
    file = operators.save_choice(["linear"])
    assert operators.read_choice() == {"linear"}
    file.write_text(content)
    if content == '{"processor": 1}':  # of another processor
        assert operators.read_choice() is None
    else:
        with pytest.warns(UserWarning, match="is damaged and not used: run eit bench --self-check --save again"):
            assert operators.read_choice() is None


def test_a_choice_of_another_processor_or_version_is_not_used(monkeypatch):
    operators.save_choice(["linear"])
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert operators.read_choice() is None


@pytest.mark.parametrize(
    ("vendor", "capability", "found"),
    [
        ("AuthenticAMD", "AVX512", set(operators.OPERATORS)),
        ("GenuineIntel", "AVX512", set()),  # not measured
        (None, "DEFAULT", set()),  # ARM
    ],
)
def test_without_a_choice_the_processors_that_were_measured_have_theirs(monkeypatch, vendor, capability, found):
    monkeypatch.setattr(operators, "cpu", lambda: {"model name": "x"} | ({"vendor_id": vendor} if vendor else {}))
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert operators.chosen.__wrapped__() == found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "eit bench needs a model, such as eit_mini; or --self-check"),
        (["eit_mini", "--save"], "--save keeps what --self-check finds"),
        (["--self-check", "--save", "--rounds", "4"], "--rounds 4 is too few for --save: give at least 5"),
        (["--self-check", "--fixed", "--mode", "infer"], "--self-check does not take --mode, --fixed"),
        (["--self-check", "--no-memory"], "--self-check does not take --no-memory"),
        (["--self-check", "eit_mini", "eit_tiny"], "--self-check takes one model, not 2"),
        (["--self-check", "timm/test_vit"], "timm/test_vit has none of the operators of this package"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, message):
    done = run_eit("bench", *words)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_it_is_for_the_cpu_alone():
    with pytest.raises(eit.UserError, match="compares operators of the CPU"):
        self_check.self_check("eit_mini", Options(device=torch.device("meta")))
