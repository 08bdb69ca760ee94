"""`eit eval`."""

import csv
import json
import shutil

import pytest

from eit.cli.eval import metrics_text
from eit.inference.evaluate import Metrics
from tests.cli.conftest import assert_mistake, failed
from tests.helpers.commands import run_eit
from tests.helpers.images import save_digits


def test_an_evaluation_measures_what_training_did(trained):
    summary = json.loads((trained / "runs" / "mine" / "summary.json").read_text())
    metrics = json.loads(run_eit("eval", "runs/mine/final.safetensors", "--data", "data", "--json", cwd=trained).stdout)
    assert metrics["images"] == 12 and metrics["top1"] == pytest.approx(summary["last_top1"])
    own = json.loads(run_eit("eval", "runs/mine/final.safetensors", "--json", cwd=trained).stdout)
    assert own | dict(data="") == metrics | dict(data="")
    text = run_eit("eval", "runs/mine/final.safetensors", cwd=trained).stdout
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines()}
    assert list(lines)[:3] == ["top-1", "loss", "ECE"]  # top-5 of three classes says nothing
    assert lines["class"] == ["images", "top-1", "(recall)", "precision", "f1"]
    found = own["per_class"]["digit2"]
    shown = ["-" if found[key] is None else f"{found[key]:.2f}%" for key in ("top1", "precision", "f1")]
    assert lines["digit2"] == ["4", *shown]


def test_evaluation_at_several_sizes_and_crops(trained):
    several = ["--size", 16, "--size", 24, "--crop-ratio", 0.8, "--crop-ratio", 1]
    table = run_eit("eval", "runs/mine", *several, cwd=trained).stdout.splitlines()
    rows = [line.split() for line in table if line.strip() and "─" not in line]
    assert rows[0] == ["size", "crop", "top-1", "loss", "ECE"]
    assert [row[:2] for row in rows[1:]] == [["16", "0.800"], ["16", "1.000"], ["24", "0.800"], ["24", "1.000"]]
    found = json.loads(run_eit("eval", "runs/mine", *several, "--json", cwd=trained).stdout)
    assert [(v["size"], v["resize"], v["crop_ratio"]) for v in found["views"]] == [
        (16, 20, 0.8),
        (16, 16, 1),
        (24, 30, 0.8),
        (24, 24, 1),
    ]
    assert [f"{v['loss']:.4f}" for v in found["views"]] == [row[3] for row in rows[1:]]
    assert len({v["loss"] for v in found["views"]}) == 4
    one = json.loads(run_eit("eval", "runs/mine", "--size", 24, "--crop-ratio", 1, "--json", cwd=trained).stdout)
    assert one == found["views"][3] | {key: value for key, value in found.items() if key != "views"}
    own = json.loads(run_eit("eval", "runs/mine", "--json", cwd=trained).stdout)
    assert own["loss"] == found["views"][1]["loss"] and "confusion" not in own  # the run's own view: 16 of 16


def test_evaluation_with_flips_and_in_low_precision(trained):
    plain, bf16, flip = (
        json.loads(run_eit("eval", "runs/mine", *words, "--json", cwd=trained).stdout)
        for words in ([], ["--precision", "bf16"], ["--flip"])
    )
    assert bf16["loss"] == pytest.approx(plain["loss"], rel=0.02) and bf16["loss"] != plain["loss"]
    assert flip["loss"] == pytest.approx(plain["loss"], rel=0.1) and flip["loss"] != plain["loss"]
    assert [(r["precision"], r["flip"]) for r in (plain, bf16, flip)] == [
        ("fp32", False),
        ("bf16", False),
        ("fp32", True),
    ]


def test_confusions_are_written(trained, tmp_path):
    for name in ("x.png", "x.csv"):
        done = run_eit("eval", "runs/mine", "--json", "--confusion", tmp_path / name, cwd=trained)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    head, *rows = csv.reader((tmp_path / "x.csv").open(newline=""))
    assert head[1:] == [row[0] for row in rows] == ["digit0", "digit1", "digit2"]
    counts = [[int(n) for n in row[1:]] for row in rows]
    metrics = json.loads(done.stdout)
    assert [sum(row) for row in counts] == [4, 4, 4] and sum(counts[i][i] for i in range(3)) == metrics["correct1"]
    assert [counts[i][i] / 0.04 for i in range(3)] == [c["top1"] for c in metrics["per_class"].values()]
    (tmp_path / "folder.csv").mkdir()
    error = failed(2, "eval", "runs/mine", "--confusion", tmp_path / "folder.csv", cwd=trained)
    assert "folder.csv cannot be written: Is a directory" in error


def test_a_table_of_many_classes_shows_the_weakest():
    per_class = {
        f"[b]{i:02d} " + "n" * 50: dict(images=2, top1=100.0 - i, precision=None, f1=50.0) for i in range(24)
    } | {"none": dict(images=0, top1=None, precision=0.0, f1=0.0)}
    figures = dict(
        images=48, top1=50.0, top5=60.0, loss=1.0, ece=2.0, correct1=24, correct5=29, pairs={}, calibration=[]
    )
    lines = metrics_text(Metrics(per_class=per_class, **figures)).splitlines()
    assert lines[1].startswith("top-5 60.00%")
    assert lines[4] == "the 10 weakest of 24 classes (--json has all)" and len(lines) == 16
    assert [line.split()[0] for line in lines[6:]] == [f"[b]{i}" for i in range(23, 13, -1)]
    assert len({len(line) for line in lines[5:]}) == 1 and lines[6].endswith("77.00%          -   50.00%")
    per_class = dict(list(per_class.items())[:20])
    assert len(metrics_text(Metrics(per_class=per_class, **figures)).splitlines()) == 4 + 2 + 20


def test_classes_are_matched_by_name(trained, tmp_path):
    """A set with a part of the classes is evaluated with the right labels."""
    shutil.copytree(trained / "data" / "val" / "digit2", tmp_path / "digit2")
    whole = json.loads(run_eit("eval", "runs/mine", "--data", "data", "--json", cwd=trained).stdout)
    part = json.loads(run_eit("eval", "runs/mine", "--data", tmp_path, "--json", cwd=trained).stdout)
    assert part["images"] == 4 and part["per_class"]["digit2"] == whole["per_class"]["digit2"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone.pth", "--data", "x"], ["no weights at gone.pth"]),
        (["gone", "--precision", "int8"], ["--precision", "int8", "auto", "fp32", "tf32", "bf16", "fp16"]),
        (["gone", "--confusion", "x.jpg"], ["--confusion x.jpg", ".png", ".pdf", ".svg", ".csv"]),
        (["gone", "--confusion", "no/x.png"], ["--confusion no/x.png", "no folder no"]),
        (
            ["gone", "--confusion", "x.png", "--size", "8", "--size", "9"],
            ["--confusion x.png", "one size and crop ratio", "2 combinations"],
        ),
        (["digits", "--dataset", "pets"], ["--dataset pets", "a name of timm is expected", "--data pets"]),
        (["digits", "--split", "test"], ["--split test", "--dataset"]),
        (["gone", "--device", "gpu"], ["--device gpu is not one of auto, cpu, mps, cuda, cuda:N"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, words, said):
    assert_mistake(tmp_path, ["eval", *words], said)


def test_mistakes_about_a_trained_model(trained, tmp_path):
    error = failed(2, "eval", "runs/mine", "--size", 16, "--size", 3, cwd=trained)
    assert error.startswith("eit: --size 3 is too small for eit_mini") and error.endswith(" 4")
    assert "Invalid value for '--crop-ratio'" in failed(2, "eval", "runs/mine", "--crop-ratio", 1.5, cwd=trained)
    save_digits(tmp_path / "other")
    for part in ("train", "val"):
        (tmp_path / "other" / part / "digit1").rename(tmp_path / "other" / part / "eins")
    error = failed(2, "eval", "runs/mine", "--data", tmp_path / "other", cwd=trained)
    assert "classes that the model does not know: eins" in error
