"""`eit predict`."""

import csv
import json
from pathlib import Path

import pytest
import typer.testing
from PIL import Image

from eit.cli.app import app
from eit.cli.predict import files_in_list
from tests.cli.conftest import assert_mistake, failed
from tests.helpers.commands import run_eit


def test_included_weights_are_tried_on_their_samples(tmp_path):
    """Right after installation: no image is needed, and the samples are told."""
    done = run_eit("predict", "digits", "--top", 1, cwd=tmp_path)
    lines = [line.split("  ") for line in done.stdout.splitlines()]
    assert [Path(file).name for file, _ in lines] == ["digits-3.jpg", "digits-7.png"]
    assert [text.split()[0] for _, text in lines] == ["3", "7"] and all(Path(file).is_file() for file, _ in lines)
    assert_mistake(tmp_path, ["predict", "gone"], ["no images: name files or folders after gone"])


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


def test_a_table_has_a_row_for_each_image(tmp_path):
    Image.effect_noise((9, 9), 60).save(tmp_path / "a, b.png")
    (tmp_path / "text.jpg").write_text("text")
    names = ["a, b.png", "text.jpg"]
    done = run_eit("predict", "digits", *names, "--top", 2, "--out", "p.csv", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "p.csv: 2 images, 1 of them could not be read\n"
    with open(tmp_path / "p.csv", newline="") as file:
        first, second = csv.DictReader(file)
    assert list(first) == ["image", "class1", "probability1", "class2", "probability2", "fault"]
    printed = run_eit("predict", "digits", *names, "--top", 2, "--json", cwd=tmp_path).stdout
    good, bad = map(json.loads, printed.splitlines())
    assert [(first[f"class{i}"], float(first[f"probability{i}"])) for i in (1, 2)] == [
        (label["label"], label["probability"]) for label in good["labels"]
    ]
    assert (first["image"], first["fault"]) == ("a, b.png", "")
    assert second == dict(image="text.jpg", class1="", probability1="", class2="", probability2="", fault=bad["fault"])
    done = run_eit("predict", "digits", "a, b.png", "--top", 2, "--out", "p.JSONL", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "p.JSONL: 1 images\n")
    assert (tmp_path / "p.JSONL").read_text() == printed.splitlines(keepends=True)[0]
    run_eit("predict", "digits", "a, b.png", "--top", 99, "--out", "p.csv", cwd=tmp_path)  # there are ten classes
    with open(tmp_path / "p.csv", newline="") as file:
        (row,) = csv.DictReader(file)  # the old file is replaced
    assert row["class10"] and "class11" not in row


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (["p.txt"], "--out p.txt: give a file name that ends in .csv or .jsonl"),
        (["gone/p.csv"], "--out gone/p.csv: there is no folder gone"),
        (["."], "--out .: give a file name"),
        (["p.csv", "--json"], "--out p.csv and --json"),
    ],
)
def test_a_table_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path, out, said):
    assert_mistake(tmp_path, ["predict", "digits", "gone.png", "--out", *out], [said])
