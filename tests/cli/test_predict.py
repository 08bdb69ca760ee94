"""`eit predict`."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import typer.testing
import yaml
from PIL import Image

from eit.cli.app import app
from eit.cli.predict import files_in_list
from eit.weights.load import find_weights, read_card
from tests.cli.conftest import assert_mistake, failed
from tests.helpers.commands import run_eit


def test_included_weights_predict_and_say_how_good_they_are(tmp_path, monkeypatch):
    """Right after installation: their accuracy is what they say, and what results/ has for their seed."""
    root = Path(__file__).parents[2]
    found = json.loads(run_eit("eval", "digits", "--json", cwd=tmp_path).stdout)
    card = read_card("digits")
    assert found["top1"] == pytest.approx(card.metrics["val_top1"])
    run = root / "results" / "digits" / f"seed-{card.recipe['seed']}"
    assert json.loads((run / "summary.json").read_text())["last_top1"] == pytest.approx(found["top1"])
    assert yaml.safe_load((run / "recipe.yaml").read_text()) == card.recipe
    assert find_weights("eit_digits").stat().st_size < 1_500_000
    monkeypatch.setattr(sys, "argv", ["demo_images.py", str(tmp_path / "images")])
    runpy.run_path(str(root / "tools" / "demo_images.py"))
    lines = run_eit("predict", "digits", "images", "--top", 1, cwd=tmp_path).stdout.splitlines()
    assert len(lines) == 6 and all(Path(line.split()[0]).parent.name == line.split()[1] for line in lines)


def test_files_and_a_list_on_stdin_are_predicted(trained):
    files = [f"data/val/digit{i}/000.png" for i in range(3)]
    listed = run_eit("predict", "runs/mine", "-", "--top", 2, cwd=trained, stdin="\n".join(files)).stdout
    assert [line.split()[0] for line in listed.splitlines()] == files
    assert all(line.count("%") == 2 for line in listed.splitlines())
    first = json.loads(run_eit("predict", "runs/mine", "data/val/digit0", "--json", cwd=trained).stdout.splitlines()[0])
    assert first["image"] == files[0]
    assert sum(label["probability"] for label in first["labels"]) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone", "x.png"], ["no such image: x.png"]),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, words, said):
    assert_mistake(tmp_path, ["predict", *words], said)


def test_mistakes_about_images(trained, tmp_path):
    assert "no such image: gone.png" in failed(2, "predict", "runs/mine", "gone.png", cwd=trained)
    (tmp_path / "text.png").write_text("text")
    good = "data/val/digit0/000.png"
    done = run_eit("predict", "runs/mine", tmp_path / "text.png", good, cwd=trained)
    assert (done.returncode, done.stdout.split()[0]) == (2, good)
    assert done.stderr.startswith("eit: ") and "text.png: no image" in done.stderr
    assert "is not a run folder" in failed(2, "predict", "data", good, cwd=trained)
    assert "list on stdin is empty" in failed(2, "predict", "runs/mine", "-", cwd=trained, stdin="")


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"\xef\xbb\xbfa.png\r\nb c.png\r\n", ["a.png", "b c.png"]),
        ("a.png\r\nü.png\r\n".encode("utf-16"), ["a.png", "ü.png"]),
        (b"\"a b.png\"\n'c.png' \n", ["a b.png", "c.png"]),
        (b"a.png\0b\nc.png\0", ["a.png", "b\nc.png"]),
        (b"\n  \na.png\n\n", ["a.png"]),
        (b"a\x0bb.png\n\xe2\x80\xa8.png", ["a\x0bb.png", "\u2028.png"]),
        (b"\xff.png\n", ["\udcff.png"]),
        (b"it's.png\n'", ["it's.png", "'"]),
        (b"", []),
    ],
)
def test_a_list_of_any_editor_is_read(content, names):
    assert files_in_list(content) == names


def test_json_has_an_object_for_each_image(tmp_path):
    """Also of one that is damaged, empty, missing, or no image; in order."""
    Image.effect_noise((9, 9), 60).save(tmp_path / "good.png")
    (tmp_path / "zero.png").touch()
    (tmp_path / "text.jpg").write_text("text")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    names = [str(tmp_path / name) for name in ("good.png", "zero.png", "gone.png", "text.jpg", "cut.png", "good.png")]
    done = typer.testing.CliRunner().invoke(app, ["predict", "digits", "-", "--json"], input="\n".join(names))
    assert done.exit_code == 2
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["image"] for one in found] == names
    assert [bool(one["labels"]) for one in found] == ["fault" not in one for one in found] == [True, *[False] * 4, True]
    assert all(name in one["fault"] for name, one in zip(names[1:5], found[1:5], strict=True))
    assert done.stderr.count("eit: ") == 4
