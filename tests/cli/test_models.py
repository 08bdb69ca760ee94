"""`eit models`."""

import json
from pathlib import Path

import pytest

import eit
from eit.cli.models import describe_weights, weights_row
from eit.weights.load import FOR
from tests.cli.conftest import assert_mistake
from tests.helpers.commands import run_eit


@pytest.fixture(scope="module")
def text():
    return run_eit("models").stdout


def test_models(text):
    assert "25,305,592" in text and "https://github.com/MrHaiPi/EIT/tree/main/model/eit-16-4-3-large" in text
    rows = {row["name"]: row for row in json.loads(run_eit("models", "--json").stdout)}
    models = [rows[name] for name in eit.list_models()]
    assert list(rows) == [*eit.list_models(), *FOR]
    assert models[0]["params"] == 3_512_750 and models[0]["published_top1"] == 70.0 and models[0]["tokens"] == 361
    assert not any(row["weights_ship"] for row in models)


def test_weights_say_whether_they_are_here(text):
    digits = next(row for row in describe_weights() if row["name"] == "digits")
    assert digits["weights_ship"] and digits["weights_bytes"] == Path(digits["weights"]).stat().st_size < 1e6
    assert digits["top1"] == eit.load("digits").card.metrics["val_top1"]
    lines = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert all(part in lines["digits"] for part in ("yes", "MB", f"{digits['top1']:.1f}%", "eit predict digits"))
    assert all(part in lines["the authors' eit_tiny"] for part in ("no", "36 MB", "78.1%", "eit-16-4-3-tiny"))


def test_weights_that_are_not_here_say_so(monkeypatch):
    monkeypatch.setattr("eit.weights.load.INCLUDED", {})
    assert [row["weights_ship"] for row in describe_weights()] == [False] * len(FOR)
    assert weights_row(describe_weights()[0]) == ("digits", "no", "-", "-", "not included in this version")


def test_published_results_are_drawn(tmp_path):
    done = run_eit("models", "plot", "results.svg", cwd=tmp_path)
    assert "published.csv" in done.stdout
    text = (tmp_path / "results.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("EIT", "DeiT", "Swin", "ResNet", "EIT-mini", "no pyramid"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plot", "x.png", "--json"], ["No such option", "--json"]),
        (["--json", "plot", "x.png"], ["--json", "plot", "leave"]),
        (["--markdown", "plot", "x.png"], ["--markdown", "plot", "leave"]),
        (["plot", "x.txt"], ["x.txt", ".png", ".pdf", ".svg"]),
        (["plot", "gone/x.png"], ["gone/x.png", "no folder gone"]),
        (["plot"], ["FILE", "models plot -h"]),
        (["--plot", "x.png"], ["models --plot x.png", "type python -m eit models plot x.png"]),
        (["--plot=x.png"], ["type python -m eit models plot x.png"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, words, said):
    assert_mistake(tmp_path, ["models", *words], said)
