"""The page of a run, from a whole run, from what is left of one, and after training."""

import json
import os
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
import torch

from eit.config import differences, load_recipe
from eit.console import err
from eit.errors import UserError
from eit.inference.evaluate import evaluate
from eit.pages import render
from eit.report import run as module
from eit.report.outcome import describe
from eit.report.run import write_report
from eit.training.run_folder import read_recipe
from eit.weights.load import load
from tests.cli.conftest import assert_mistake, failed
from tests.conftest import REPORT
from tests.helpers.commands import run_eit
from tests.helpers.images import save_digits
from tests.helpers.training import TINY
from tests.report.conftest import NAMES

SECTIONS = {"next", "curves", "mistakes", "classes", "calibration", "data", "recipe", "machine"}


@pytest.fixture(autouse=True)
def no_figures(request, monkeypatch):
    """Figures are not drawn, which takes most of the time of a page."""
    for place in ("eit.report.run", "eit.report.outcome"):
        monkeypatch.setattr(f"{place}.draw_inline", lambda key, *_: render.Drawing(key, "", "0 0 1 1", ""))


@pytest.fixture
def copy(home, tmp_path):
    """The run, to be changed."""
    return Path(shutil.copytree(home / "runs" / "tiny", tmp_path / "copy"))


def sections(page):
    return set(re.findall(r'<section id="(\w+)"', page))


def text_of(page):
    return unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page)))


# -- A whole run


@pytest.fixture(scope="module")
def page(home):
    with pytest.MonkeyPatch.context() as patch:
        for place in ("eit.report.run", "eit.report.outcome"):
            patch.setattr(f"{place}.draw_inline", lambda key, *_: render.Drawing(key, "", "0 0 1 1", ""))
        written = write_report(home / "runs" / "tiny")
    assert written.page == home / "runs" / "tiny" / "report.html" and not written.missing
    return written.page.read_text()


def test_a_page_has_all_that_is_known_of_a_run(page, home):
    assert sections(page) == SECTIONS
    summary = json.loads((home / "runs" / "tiny" / "summary.json").read_text())
    text = text_of(page)
    assert f"best top-1{summary['best_top1']:.2f}%" in text.replace("best top-1 ", "best top-1")
    assert f"{summary['params']:,}" in text and "Looked at 16 of 16 validation images." in text
    assert "48 training images; all looked at: 16x16 pixels" in text
    assert page.count("<code>model.embed_dim=16</code>") == 1 and "# embedding width" in text
    assert "eit train" in text and "recipe.yaml" in text and torch.__version__ in text


def test_the_figures_are_those_of_the_evaluation(page, home):
    model = load(home / "runs" / "tiny")
    metrics = evaluate(model, str(home / "data"))
    cells = [int(n) for n in re.findall(r'<td class="(?:right|wrong|none)"[^>]*>(\d+)</td>', page)]
    assert cells == [n for row in metrics.confusion for n in row]
    wrong = metrics.images - metrics.correct1
    assert page.count('<li><div class="pair">') == min(24, wrong) and f"of {wrong} mistakes" in page
    assert page.count('alt="Attention of the class token over it"') == min(24, wrong)
    confidences = [float(x) for x in re.findall(r"</b>, ([\d.]+)%</span>", page)]
    assert confidences == sorted(confidences, reverse=True)


def test_names_that_attack_the_page_are_text(page):
    assert "<script" not in page and "<img src=x" not in page and "\u202e" not in page and page != "49"
    assert "&lt;img src=x onerror=alert(1)&gt;" in page and "{{ 7*7 }}" in unescape(page) and "evil\ufffdgnp" in page
    assert "longlongl..." in page and "&lt;script&gt;alert(2)" in page
    assert re.search(r"(?:src|href)=\"(?!data:|#)", page) is None


def test_the_command_of_the_page_trains_the_same_again(page, home):
    words = re.search(r'<pre class="wrap">(.*?)</pre>', page, re.DOTALL)[1].split()
    again = load_recipe(words[2], words[3:])
    assert not differences(read_recipe(home / "runs" / "tiny"), again)
    assert again.out.endswith("tiny-again") and words[:2] == ["eit", "train"]


# -- What is left of a run


@pytest.mark.parametrize(
    ("lost", "left", "said"),
    [
        (["environment.json"], SECTIONS, "no environment.json"),
        (["best.safetensors"], SECTIONS, "about final.safetensors"),
        (
            ["best.safetensors", "final.safetensors"],
            {"next", "curves", "recipe", "machine"},
            "has no best.safetensors or final.safetensors",
        ),
        (["summary.json"], SECTIONS, "The run is not finished: 2 of 2 epochs"),
    ],
)
def test_a_page_names_what_it_does_not_have(copy, lost, left, said):
    for name in lost:
        (copy / name).unlink()
    page = write_report(copy).page.read_text()
    assert sections(page) == left and said in text_of(page)


def move_data(copy, root):
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(re.sub(r"  root: .*", f"  root: {root}", recipe))


@pytest.mark.parametrize("root", ["gone", "", "'~/no such folder'"])
def test_images_that_are_gone_can_be_given(copy, home, tmp_path, root):
    move_data(copy, root or "''")
    written = write_report(copy)
    assert "is not here; to add them: eit report" in written.missing[0] and "--data PATH" in written.missing[0]
    assert sections(written.page.read_text()) == {"next", "curves", "recipe", "machine"}
    again = write_report(copy, tmp_path / "other.html", data=str(home / "data"))
    assert not again.missing and sections(again.page.read_text()) == SECTIONS
    alone = write_report(
        copy, data=str(home / "data" / "val")
    ).page.read_text()  # class folders without training images
    assert sections(alone) == SECTIONS and "training images;" not in text_of(alone)


def test_a_data_set_of_another_package_is_not_opened(copy):
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(re.sub(r"  dataset: .*", "  dataset: wds/pipe", recipe))
    (missing,) = write_report(copy).missing
    assert "wds/pipe is not opened" in missing and "eit eval" in missing


def test_other_images_than_those_of_training_are_noticed(copy, home, tmp_path):
    folder = Path(shutil.copytree(home / "data", tmp_path / "data"))
    names = sorted(NAMES)
    for one in (folder / "val" / names[0]).iterdir():  # right images, wrong class
        one.rename(folder / "val" / names[1] / f"moved-{one.name}")
    shutil.copy(next((folder / "val" / names[2]).iterdir()), folder / "val" / names[0] / "one.png")
    page = text_of(write_report(copy, data=str(folder)).page.read_text())
    assert "These may not be the validation images of the run" in page


def test_a_large_validation_set_is_looked_at_in_part(copy):
    page = text_of(write_report(copy, most_images=5).page.read_text())
    assert "Looked at 5 of 16 validation images, evenly spaced." in page


def test_unreadable_images_cost_the_page_no_more_than_themselves(copy, home, tmp_path):
    folder = Path(shutil.copytree(home / "data", tmp_path / "data"))
    next((folder / "val" / NAMES[0]).iterdir()).write_bytes(b"broken")
    next((folder / "train" / NAMES[1]).iterdir()).write_bytes(b"broken")
    written = write_report(copy, data=str(folder))
    assert "unreadable validation image" in written.missing[0]
    assert sections(written.page.read_text()) == SECTIONS - {"mistakes", "classes", "calibration"}


@pytest.mark.parametrize(
    "values", [dict(train_loss=None), dict(ema_top1=3.0), dict(lr=None, images_per_s="fast"), dict(val_loss=None)]
)
def test_logs_of_other_versions_are_read(copy, values):
    lines = [json.loads(line) | values for line in (copy / "log.jsonl").read_text().splitlines()]
    (copy / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    move_data(copy, "gone")
    assert "Numbers of each epoch" in write_report(copy).page.read_text()


# -- The command


def test_the_command_says_what_the_page_says(home, tmp_path, monkeypatch):
    done = run_eit("report", "runs/tiny", "--out", tmp_path / "page.html", cwd=home)
    assert done.returncode == 0 and done.stdout.endswith(f"report {tmp_path / 'page.html'}\n"), done.stderr
    found = json.loads(run_eit("report", "runs/tiny", "--json", "--images", "4", cwd=home).stdout)
    assert found["report"] == "runs/tiny/report.html" and found["missing"] == []
    assert {"rule", "finding", "advice"} == set(found["advice"][0])
    assert all(one["finding"] in done.stdout for one in found["advice"] if "validation images" in one["finding"])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone"], ["gone is not a run folder", "runs/NAME"]),
        (["gone", "--out", "page.txt"], ["--out page.txt", ".html"]),
        (["gone", "--out", "no/page.html"], ["--out no/page.html", "no folder no"]),
        (["gone", "--images", "0"], ["--images", "1"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path, words, said):
    assert_mistake(tmp_path, ["report", *words], said)


def test_mistakes_about_a_run(home, copy, tmp_path):
    assert "gone is not a folder" in failed(2, "report", copy, "--data", "gone")
    (tmp_path / "page.html").mkdir()
    assert "page.html cannot be written" in failed(2, "report", copy, "--out", tmp_path / "page.html")
    (copy / "log.jsonl").write_text("")
    assert "its log has no epoch with a validation top-1" in failed(2, "report", copy)
    save_digits(tmp_path / "others")
    assert "classes that the model does not know" in failed(
        2, "report", home / "runs/tiny", "--data", tmp_path / "others"
    )


# -- After training


def test_the_page_follows_training(home, tmp_path, written_report):
    words = [*TINY[:-1], f"data.root={home / 'data'}", "out=run"]
    done = run_eit("train", "cifar10", *words, cwd=tmp_path)
    assert done.returncode == 0 and "report run/report.html\n" in done.stdout, done.stderr
    assert sections((tmp_path / "run" / "report.html").read_text()) == SECTIONS
    before = os.stat(tmp_path / "run" / "report.html").st_mtime_ns
    again = run_eit("train", "cifar10", *words, "--json", cwd=tmp_path)  # it is finished
    assert json.loads(again.stdout)["report"] == "run/report.html"
    assert os.stat(tmp_path / "run" / "report.html").st_mtime_ns == before
    words = [*words[:-1], "out=other", "train.report=false"]
    done = run_eit("train", "cifar10", *words, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["report"] is None and not (tmp_path / "other" / "report.html").exists()


def test_rank_0_writes_the_page_alone(home, tmp_path):
    done = run_eit("train", "cifar10", *TINY[:-1], f"data.root={home / 'data'}", "out=run", cwd=tmp_path, ranks=2)
    assert done.returncode == 0 and done.stdout.count("report run/report.html\n") == 1, done.stderr
    assert sections((tmp_path / "run" / "report.html").read_text()) == SECTIONS


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error"), UserError("no"), OSError(28, "No space left on device"), MemoryError(), KeyError("x")],
)
def test_a_page_that_fails_costs_one_line(copy, monkeypatch, capsys, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(module, "write_page", fail)
    recipe = (copy / "recipe.yaml").read_text()
    (copy / "recipe.yaml").write_text(recipe.replace("report: false", "report: true"))
    before = {file: file.read_bytes() for file in copy.rglob("*") if file.is_file() and file.name != "report.html"}
    (copy / "report.html").unlink(missing_ok=True)
    assert REPORT(copy) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert "report.html cannot be made (" in line and "the run is saved without it" in line
    assert {file: file.read_bytes() for file in copy.rglob("*") if file.is_file()} == before and not err.quiet


# -- Parts of the page


def outcome_of(classes, pairs, model=None):
    from tests.report.test_advice import metrics

    found = metrics(pairs)
    found.mistakes.clear()
    found.per_class.update(
        {f"class{i}": dict(images=0, top1=None, precision=None, f1=None) for i in range(len(found.per_class), classes)}
    )
    return describe(model, found, None, None)


@pytest.mark.parametrize(
    ("classes", "matrix", "picture"), [(20, True, False), (21, False, True), (500, False, True), (501, False, False)]
)
def test_many_classes_are_a_picture_and_more_a_table_of_pairs(classes, matrix, picture):
    outcome = outcome_of(classes, {(0, 0): 3, (0, 1): 2, (1, 0): 5, (1, 1): 1})
    assert (outcome.matrix is not None, outcome.matrix_picture is not None) == (matrix, picture)
    assert outcome.pairs == [["class1", "class0", "5", "83.3%"], ["class0", "class1", "2", "40.0%"]]
    assert [row[0] for row in outcome.weakest] == ["class1", "class0"]


@pytest.mark.parametrize(
    ("classes", "rows", "said"), [(4, 4, ""), (30, 30, "the 30 smallest of 30"), (900, 200, "the 200 smallest of 900")]
)
def test_the_smallest_classes_are_counted(copy, monkeypatch, classes, rows, said):
    counts = {f"class{i}": 1000 - i for i in range(classes)}
    monkeypatch.setattr(module, "_counts", lambda images: counts)
    page = write_report(copy).page.read_text()
    section = page[page.index('<section id="data">') : page.index('<section id="recipe">')]
    assert re.findall(r"<bdi>class(\d+)</bdi>", section) == [str(i) for i in reversed(range(classes - rows, classes))]
    assert said in section


@pytest.mark.parametrize("name", ["timm/test_resnet", "timm/test_vit", "timm/resnet10t"])
def test_pictures_of_models_without_class_tokens_stand_alone(name, tmp_path):
    from eit.data.images import Preprocessing
    from eit.inference.evaluate import Mistake
    from eit.models.registry import create_model
    from tests.report.test_advice import metrics

    found = metrics({(0, 0): 3, (0, 1): 1})
    size = 160 if name == "timm/test_vit" else 64
    found.mistakes[:] = [Mistake(0.9, 0, 1, None, torch.zeros(3, size, size))]
    outcome = describe(create_model(name), found, None, Preprocessing(size, size, "bicubic", (0.5,) * 3, (0.5,) * 3))
    has_attention = name == "timm/test_vit"
    assert (outcome.tiles[0].attention is not None) == has_attention and bool(outcome.attention_note) != has_attention
    assert outcome.tiles[0].name == ""
