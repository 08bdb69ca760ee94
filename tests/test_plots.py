"""Pictures are written, whatever the classes are called."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from eit import plots

NAMES = ["$a_b$", "100% $\\frac{$", "\N{CJK UNIFIED IDEOGRAPH-732B} na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve"]
NAMES += ["line\nbreak\t", "not utf-8: \udcff", "_" + "x" * 50]


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    draw = Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda self, *a, **k: (saved.append(self), draw(self, *a, **k)))
    return saved


def counts_of(classes):
    return np.random.default_rng(0).integers(0, 50, (classes, classes)).tolist()


@pytest.mark.parametrize("ending", [".png", ".PNG", ".pdf", ".svg"])
def test_names_are_drawn_as_they_are(tmp_path, figures, ending):
    file = tmp_path / f"confusion{ending}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plots.confusion(counts_of(6), NAMES, file)
    starts = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
    assert file.read_bytes().startswith(starts[ending.lower()])
    assert [f.name for f in tmp_path.iterdir()] == [file.name]
    shown = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert shown[:2] == NAMES[:2] and shown[3:5] == ["line break", "not utf-8: \N{REPLACEMENT CHARACTER}"]
    assert shown[5] == "_" + "x" * 20 + "..."


@pytest.mark.parametrize(
    ("classes", "texts", "labels"), [(1, 1, 1), (3, 9, 3), (20, 400, 20), (21, 0, 21), (41, 0, None)]
)
def test_what_stands_in_a_confusion_matrix(tmp_path, figures, classes, texts, labels):
    counts = counts_of(classes)
    plots.confusion(counts, [f"class {i}" for i in range(classes)], tmp_path / "x.png")
    axis = figures[0].axes[0]
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("prediction", "truth")
    top1 = 100 * np.trace(counts) / np.sum(counts)
    assert axis.get_title() == f"top-1 {top1:.2f}% of {np.sum(counts):,} images"
    assert len(axis.texts) == texts
    if texts:
        assert axis.texts[-classes].get_text() == str(counts[-1][0])
    named = [label.get_text() for label in axis.get_xticklabels() if "class" in label.get_text()]
    assert named == [f"class {i}" for i in range(labels or 0)]
    shares = np.array(counts) / np.sum(counts, axis=1, keepdims=True)
    np.testing.assert_allclose(axis.images[0].get_array(), shares)


@pytest.mark.filterwarnings("error")
def test_a_class_without_images_is_drawn(tmp_path):
    plots.confusion([[0, 0], [1, 2]], ["a", "b"], tmp_path / "x.png")
    plots.confusion([[0, 0], [0, 0]], ["a", "b"], tmp_path / "y.png")


@pytest.mark.filterwarnings("error")
def test_letters_that_the_font_lacks_are_said_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plots, "_missing_letters", set())
    for ending, (first, second) in zip(("png", "svg", "pdf"), ("猫犬", "鳥牛", "한국"), strict=True):
        for _ in range(2):
            plots.confusion([[1, 0], [0, 1]], [first, f"{first}{second}"], tmp_path / f"x.{ending}")
        said = capsys.readouterr().err
        assert said.count("the font lacks 2 letters of the names") == 1 and first in said and second in said
    plots.confusion([[1, 0], [0, 1]], ["chat", "été"], tmp_path / "x.png")
    assert not capsys.readouterr().err


def test_a_picture_of_many_classes_has_a_pixel_for_each(tmp_path):
    plots.confusion(np.eye(1000, dtype=int), ["x"] * 1000, tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("L"))
    assert min(pixels.shape) > 1000


def test_curves(tmp_path, figures, drawn_curves):
    lines = [
        dict(epoch=i, train_loss=2 / (i + 1), val_loss=2.2 / (i + 1), val_top1=50.0 + i, ema_top1=None)
        for i in range(3)
    ]
    for epochs in (1, 3):
        plots.curves(lines[:epochs], tmp_path / "curves.png")
        assert Image.open(tmp_path / "curves.png").size == (900, 340)
    assert [len(axis.lines) for axis in figures[-1].axes] == [2, 1]
    assert figures[-1].axes[0].lines[1].get_ydata().tolist() == [line["val_loss"] for line in lines]


def test_drawing_is_imported_without_matplotlib_and_draws_without_pyplot(tmp_path):
    code = (
        "import sys, json; from pathlib import Path; from eit import plots; before = 'matplotlib' in sys.modules; "
        f"plots.confusion([[1]], ['a'], Path({str(tmp_path / 'x.png')!r})); "
        "print(json.dumps([before, 'matplotlib' in sys.modules, 'matplotlib.pyplot' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [False, True, False]


def test_a_warning_that_is_not_about_letters_is_passed_on(tmp_path, monkeypatch):
    figure, draw = Figure(), Figure.draw

    def warn(self, *arguments, **options):
        warnings.warn("the canvas is odd", RuntimeWarning, stacklevel=1)
        draw(self, *arguments, **options)

    monkeypatch.setattr(Figure, "draw", warn)
    with pytest.warns(RuntimeWarning, match="the canvas is odd"):
        plots.save(figure, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").exists()
