"""`eit eval --mistakes`: the page, and the mistakes that an evaluation keeps."""

import json
import re

import pytest
import torch

from eit.data.datasets import open_evaluation
from eit.data.loaders import EvaluationLoader
from eit.inference.evaluate import BINS, evaluate
from eit.inference.evaluation_data import evaluation_config, match_classes
from eit.weights.load import load
from tests.cli.conftest import assert_mistake, failed
from tests.helpers.commands import run_eit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def evaluated():
    """The included weights, and their loader of scanned digits."""
    model = load("digits")
    images = match_classes(model.card, open_evaluation(evaluation_config(model.card, "sklearn:digits")))
    return model, EvaluationLoader(images.evenly(150), model.card.view, 64, 0, CPU)


def noisy(model, seed=0):
    """A model that makes mistakes of many confidences."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: model(x) + 4 * torch.randn(len(x), 10, generator=generator)


@pytest.mark.parametrize("most", [1, 7, 24, 1000])
def test_the_most_confident_mistakes_are_kept(evaluated, most):
    model, loader = evaluated
    outputs = torch.cat(list(map(noisy(model), [batch.images for batch in loader])))[: len(loader.images)]
    confidence, predicted = outputs.detach().double().softmax(dim=1).max(dim=1)
    truth = torch.tensor(loader.images.labels)
    wrong = (predicted != truth).nonzero().flatten().tolist()
    wrong.sort(key=lambda i: -confidence[i])
    found = evaluate(noisy(model), loader, mistakes=most)
    assert len(wrong) > 30 and [m.number for m in found.mistakes] == wrong[:most]
    for mistake in found.mistakes[:10]:
        assert (mistake.truth, mistake.prediction) == (truth[mistake.number], predicted[mistake.number])
        assert mistake.confidence == pytest.approx(float(confidence[mistake.number]))
        own = EvaluationLoader(loader.images.subset([mistake.number]), loader.view, 1, 0, CPU)
        assert torch.equal(mistake.image, next(iter(own)).images[0])


def test_keeping_mistakes_changes_no_figure(evaluated):
    model, loader = evaluated
    plain, kept = evaluate(noisy(model), loader), evaluate(noisy(model), loader, mistakes=24)
    assert plain.mistakes == [] and {**vars(plain), "mistakes": 0} == {**vars(kept), "mistakes": 0}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_bins_give_the_calibration_error(evaluated, seed):
    model, loader = evaluated
    found = evaluate(noisy(model, seed), loader)
    bins = found.calibration
    assert sum(b["images"] for b in bins) == found.images and len(bins) > 5
    assert sum(b["images"] * abs(b["confidence"] - b["top1"]) for b in bins) / found.images == pytest.approx(found.ece)
    assert sum(b["images"] * b["top1"] for b in bins) / found.images == pytest.approx(found.top1)
    assert all(
        b["low"] < b["confidence"] <= b["high"] and b["high"] - b["low"] == pytest.approx(100 / BINS) for b in bins
    )


def test_the_command_writes_the_page(home, tmp_path):
    words = ("eval", "runs/tiny", "--mistakes", tmp_path / "page.html", "--json")
    found = json.loads(run_eit(*words, cwd=home).stdout)
    assert "mistakes" not in found and found["calibration"]
    page = (tmp_path / "page.html").read_text()
    assert set(re.findall(r'<section id="(\w+)"', page)) == {"mistakes", "classes", "calibration"}
    assert f"top-1 {found['top1']:.2f}%" in page and "<script" not in page and "\u202e" not in page


def test_ranks_write_the_page_of_one_process(home, tmp_path):
    pages = []
    for ranks in (0, 2):
        done = run_eit(
            "eval", "runs/tiny", "--mistakes", tmp_path / "page.html", "--batch-size", "3", cwd=home, ranks=ranks
        )
        assert done.returncode == 0, done.stderr
        pages.append((tmp_path / "page.html").read_text())
    assert pages[0] == pages[1]


def test_a_page_without_mistakes_says_so(tmp_path):
    (tmp_path / "images" / "3").mkdir(parents=True)
    from eit.data.layouts import read_digits

    images = read_digits()
    right = [i for i in range(40) if images.labels[i] == 3][:2]
    for i in right:
        images.read(i, 1).save(tmp_path / "images" / "3" / f"{i}.png")
    done = run_eit("eval", "digits", "--data", "images", "--mistakes", "page.html", cwd=tmp_path)
    assert done.returncode == 0 and "top-1 100.00%" in done.stdout, done.stderr
    assert "There are none: all 2 images are right." in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["gone", "--mistakes", "x.png"], ["--mistakes x.png", ".html"]),
        (["gone", "--mistakes", "no/x.html"], ["--mistakes no/x.html", "no folder no"]),
        (
            ["gone", "--mistakes", "x.html", "--size", "8", "--size", "9"],
            ["x.html", "one size", "2 combinations"],
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, words, said):
    assert_mistake(tmp_path, ["eval", *words], said)


def test_a_page_that_cannot_be_written_is_one_line(home, tmp_path):
    (tmp_path / "folder.html").mkdir()
    error = failed(2, "eval", "runs/tiny", "--mistakes", tmp_path / "folder.html", cwd=home)
    assert "folder.html cannot be written: Is a directory" in error
