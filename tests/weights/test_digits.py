"""The included weights read digits as people make them: fonts and strokes that they were not trained on."""

import json
from pathlib import Path

import pytest
import yaml

import eit
from eit.weights.load import FOR, INCLUDED, find_weights, sample_images
from tests.helpers.drawn_digits import FONTS, LOOKS, PLACES, STYLES, draw_digits

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results" / "digits_in_the_wild"
KINDS = dict(fonts=FONTS, strokes=[f"{label} {style}" for label, style in STYLES])


def top1(drawn):
    """The percentage that is right, for fonts and for strokes."""
    found = eit.predict("digits", [digit.image for digit in drawn], top=1, batch_size=64)
    right = [(digit.kind, p.labels[0][0] == digit.label) for digit, p in zip(drawn, found, strict=True)]
    by_kind = {kind: [r for k, r in right if k == kind] for kind in KINDS}
    return {kind: 100 * sum(values) / len(values) for kind, values in by_kind.items()}


def test_digits_of_other_fonts_and_strokes_are_read_in_both_polarities():
    """At three of the twelve places; the whole set is measured below."""
    drawn = list(draw_digits(LOOKS[:2], ["40% bottom right", "60% in the centre", "95% in the centre"]))
    assert len(drawn) == 2 * 3 * (120 + len(STYLES))
    assert all(value >= 95 for value in top1(drawn).values())


@pytest.mark.results
def test_the_recorded_accuracy_is_that_of_the_weights():
    recorded = json.loads((RESULTS / "accuracy.json").read_text())
    assert top1(list(draw_digits())) == pytest.approx({kind: recorded[kind]["all"] for kind in KINDS}, abs=0.3)
    scans = eit.evaluate("digits", "sklearn:digits")
    assert scans.top1 == pytest.approx(recorded["scans"]["all"], abs=0.3) and scans.images == 360
    for kind, names in KINDS.items():
        assert set(recorded[kind]) == {"images", "all", *names, *PLACES, *LOOKS}
        assert recorded[kind]["images"] == len(LOOKS) * len(PLACES) * (120 if kind == "fonts" else len(STYLES))
        assert all(recorded[kind][look] >= 95 for look in LOOKS[:2])


def test_their_metadata_say_recipe_seed_and_accuracy_of_the_run_in_results():
    card = eit.load("digits").card
    summary, recorded = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("summary", "accuracy"))
    assert card.recipe == yaml.safe_load((RESULTS / "recipe.yaml").read_text()) and card.recipe["seed"] == 0
    assert card.metrics["val_top1"] == summary["last_top1"]
    assert {kind: card.metrics[f"{kind}_top1"] for kind in recorded} == {k: v["all"] for k, v in recorded.items()}
    assert find_weights("digits").stat().st_size < 1e6


def test_the_table_of_included_weights(tmp_path, monkeypatch):
    """A name in it resolves as soon as its file is there; a file or run of that name comes first."""
    assert find_weights("digits") == find_weights("eit_digits") == INCLUDED["digits"]
    assert {name for name in INCLUDED if not name.startswith("eit_")} <= set(FOR)
    for name in FOR:
        assert (INCLUDED.get(name, Path("-")).name == f"eit_{name}.safetensors") == (name in INCLUDED)
    assert [Path(file).name for file in sample_images("digits")] == ["digits-3.jpg", "digits-7.png"]
    assert sample_images("eit_digits") == sample_images("digits")
    assert sample_images("mine") == sample_images("runs/digits") == []
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()  # of images, say
    assert find_weights("digits") == INCLUDED["digits"] and len(sample_images("digits")) == 2
    (tmp_path / "digits" / "recipe.yaml").write_text("")
    assert sample_images("digits") == []
    with pytest.raises(eit.UserError, match=r"digits holds neither best\.safetensors"):
        find_weights("digits")
    (tmp_path / "digits" / "best.safetensors").touch()
    assert find_weights("digits") == Path("digits") / "best.safetensors"
    (tmp_path / "cifar10").touch()
    assert find_weights("cifar10") == Path("cifar10")


def test_no_font_of_the_test_is_in_the_training_images():
    """Nor another weight of it: names of files without their style."""
    source = (ROOT / "tools" / "make_digits.py").read_text()
    fonts = source[source.index("HANDWRITING = ") : source.index("GLYPH, INK")]
    for file in FONTS.values():
        stem = Path(file).stem.partition("-")[0].removesuffix("BolIta")
        assert stem.lower() not in fonts.lower(), stem
    assert "ImageDraw.Draw(canvas).text" in source and ".line(" not in source  # no strokes are drawn
