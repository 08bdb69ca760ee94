"""`eit lr`."""

import json

import pytest

from tests.cli.conftest import assert_mistake
from tests.helpers.commands import run_eit
from tests.helpers.training import TINY


@pytest.mark.parametrize(
    ("words", "factor"),
    [(["optim.lr_batch=null"], 1), (["optim.lr_batch=16"], 2), (["optim.lr_batch=null", "optim.layer_decay=0.5"], 1)],
)
def test_a_rate_is_suggested_and_drawn(trained, tmp_path, words, factor):
    out = tmp_path / "lr.png"
    done = run_eit(
        "lr", "cifar10", "data.root=data", *TINY, *words, "--steps", "40", "--out", out, "--json", cwd=trained
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 1e-6 < result["lr"] < 1 and result["optim_lr"] == pytest.approx(factor * result["lr"])
    assert result["rates"] == sorted(result["rates"]) and len(result["rates"]) == len(result["losses"]) <= 40
    assert out.read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in (trained / "runs").iterdir() if p.name.startswith("cifar")) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["digits", "--out", "x"], ["--out x", ".png"]),
        (["digit"], ["unknown recipe 'digit'"]),
        (["digits", "--steps", "3"], ["--steps", "10"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, words, said):
    assert_mistake(tmp_path, ["lr", *words], said)
