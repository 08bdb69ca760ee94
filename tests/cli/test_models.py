"""`eit models`."""

import json

import pytest

import eit
from tests.cli.conftest import assert_mistake
from tests.helpers.commands import run_eit


def test_models():
    text = run_eit("models").stdout
    assert "25,305,592" in text and "are not included" in text and "https://github.com/MrHaiPi/EIT" in text
    rows = json.loads(run_eit("models", "--json").stdout)
    assert [row["name"] for row in rows] == eit.list_models()
    assert rows[0]["params"] == 3_512_750 and rows[0]["published_top1"] == 70.0 and rows[0]["tokens"] == 361
    assert not any(row["weights_ship"] for row in rows)


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
