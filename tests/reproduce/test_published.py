"""A run next to the authors' own, epoch by epoch."""

import csv
import json
from importlib import resources

import pytest

from eit.config import load_recipe
from eit.errors import UserError
from eit.models.registry import VARIANTS
from eit.reproduce.published import compare_curve, published_curve
from tests.helpers.shared import SHARED, require


def write_run(folder, model, lines):
    folder.mkdir()
    recipe = load_recipe(f"imagenet_{model}", [f"out={folder}"])
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "environment.json").write_text(json.dumps(dict(world_size=8)))
    return folder


def as_log(curve, top1=0.0):
    """The authors' curve as our log would have it: their epoch e + 1 is our e."""
    moved = [*curve[1:], curve[-1]]
    return [
        dict(epoch=i, step=i, val_top1=row["top1"] + top1, train_loss=row["train_loss"]) for i, row in enumerate(moved)
    ]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_published_curves_end_at_the_published_figures(name):
    curve = published_curve(name)
    assert len(curve) == 300
    assert max(row["top1"] for row in curve) == pytest.approx(VARIANTS[name].published_top1, abs=0.06)


def test_the_published_curves_are_those_of_the_reference():
    file = SHARED / "reference" / "published_curves.csv"
    require(file.exists(), "shared/reference is not beside the checkout")
    shipped = resources.files("eit.reproduce").joinpath("published_curves.csv").read_text()
    assert list(csv.reader(shipped.splitlines())) == list(csv.reader(file.read_text().splitlines()))


def test_a_run_is_compared_epoch_by_epoch(tmp_path):
    curve = published_curve("eit_mini")
    same = compare_curve(write_run(tmp_path / "same", "mini", as_log(curve)))
    assert same.worst == 0 and "reproduced" in same.verdict and "not" not in same.verdict
    worse = compare_curve(write_run(tmp_path / "worse", "mini", as_log(curve, -1.0)))
    assert worse.worst == pytest.approx(-1) and "not reproduced" in worse.verdict
    early = compare_curve(write_run(tmp_path / "early", "mini", as_log(curve)[:10]))
    assert early.worst is None and "too early" in early.verdict
    half = compare_curve(write_run(tmp_path / "half", "mini", as_log(curve, -0.25)[:150]))
    assert half.worst == pytest.approx(-0.25) and len(half.rows) == 150
    assert "149" in str(half) and len(str(half).splitlines()) < 20


def test_a_torn_last_line_is_left_out_and_a_damaged_one_named(tmp_path):
    folder = write_run(tmp_path / "run", "mini", as_log(published_curve("eit_mini"))[:30])
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"epoch": 30, "train_l')
    assert compare_curve(folder).epochs == 30
    with open(folder / "log.jsonl", "a") as log:
        log.write('oss": null, "val_top1": 60.0}\n')
    with pytest.raises(UserError, match="log.jsonl is damaged: line 31 has train_loss None"):
        compare_curve(folder)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("family: eit", "family: vit", "model.family: eit -> vit"),
        ("epochs: 300", "epochs: 10", "train.epochs: 300 -> 10"),
        ("accumulate: 1", "accumulate: 2", "global batch: 1024 -> 2048"),
        ("name: eit_mini", "name: timm/resnet18", "no training curve of timm/resnet18"),
    ],
)
def test_a_run_of_another_recipe_is_not_compared(tmp_path, old, new, said):
    folder = write_run(tmp_path / "run", "mini", as_log(published_curve("eit_mini")))
    text = (folder / "recipe.yaml").read_text()
    assert old in text
    (folder / "recipe.yaml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=said):
        compare_curve(folder)
