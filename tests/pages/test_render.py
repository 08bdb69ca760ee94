"""Pages hold any text, need no other file, and can be read in both themes."""

import base64
import io
import re
from importlib import resources

import numpy as np
import pytest
from markupsafe import Markup
from PIL import Image

from eit.pages import render as pages
from eit.pages.render import draw_inline, heat_over, picture, preformatted, render
from tests.helpers.browser import contrast

STYLE = resources.files("eit.pages").joinpath("page.html.j2").read_text(encoding="utf-8")


def colours(theme):
    """Name -> (r, g, b) of the light or the dark theme."""
    light, dark = re.findall(r":root \{([^}]*)\}", STYLE)
    return {
        name: tuple(int(value[i : i + 2], 16) / 255 for i in (0, 2, 4))
        for name, value in re.findall(r"--(\w+): #(\w{6})", light if theme == "light" else dark)
    }


def test_contrast_is_that_of_the_standard():
    assert contrast((0, 0, 0), (1, 1, 1)) == pytest.approx(21)
    assert contrast((119 / 255,) * 3, (1, 1, 1)) == pytest.approx(4.48, abs=0.01)  # #777, just too pale


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_has_the_contrast_of_aa(theme):
    c = colours(theme)
    for text, ground in [(t, g) for t in ("ink", "faint", "link") for g in ("paper",)] + [
        ("ink", "fill"),
        ("ink", "wrong"),
    ]:
        assert contrast(c[text], c[ground]) >= 4.5, (text, ground)
    for line in ("warn", "link"):  # marks that are not text
        assert contrast(c[line], c["paper"]) >= 3, line


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("line", ["#0072b2", "#d55e00", "#009e73"])
def test_lines_of_figures_can_be_seen(theme, line):
    rgb = tuple(int(line[i : i + 2], 16) / 255 for i in (1, 3, 5))
    assert contrast(rgb, colours(theme)["paper"]) >= 3


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>alert(1)</script>", "&lt;script&gt;alert(1)&lt;/script&gt;"),
        ("\"'&{{ 7 * 7 }}", "&#34;&#39;&amp;{{ 7 * 7 }}"),
        ("a\u202egnp\u2066.exe", "a\ufffdgnp\ufffd.exe"),
        ("a\x1b[31m\nb\udcff", "a\ufffd[31m b\ufffd"),
        ("日本語 é", "日本語 é"),
    ],
)
def test_text_is_inert_wherever_it_stands(text, shown):
    page = render(
        "analysis/report.html.j2",
        names=text, count=text, data=text, sources=[text], faults=[text], findings=[text],
        layer_table=([text], [[text]], text, text), token_table=([text], [[text]], text, text),
        missing=[text], figures=[], images=[], has_rollout=False, has_grad_cam=False, command=text,
    ).decode()  # fmt: skip
    assert page.count(shown) >= 15 and (text == shown or text not in page)
    assert "<script" not in page and "default-src 'none'" in page


def test_preformatted_text_keeps_its_lines_and_nothing_else():
    assert preformatted("a: <b>\n  c\x07") == Markup("a: &lt;b&gt;\n  c\ufffd")


def opened(address):
    kind, content = re.fullmatch(r"data:image/(\w+);base64,(.*)", address).groups()
    return kind, Image.open(io.BytesIO(base64.b64decode(content)))


@pytest.mark.parametrize(
    ("size", "exact", "kind", "shown"),
    [((8, 8), False, "png", (8, 8)), ((64, 20), False, "png", (64, 20)), ((224, 224), False, "jpeg", (160, 160)),
     ((100, 400), False, "jpeg", (40, 160)), ((320, 320), True, "png", (320, 320))],
)  # fmt: skip
def test_small_pictures_are_exact_and_large_ones_small(size, exact, kind, shown):
    pixels = np.random.default_rng(0).random((size[1], size[0], 3))
    found, image = opened(picture(pixels, exact))
    assert found == kind and image.size == shown
    if kind == "png":
        assert np.abs(np.asarray(image) / 255 - pixels).max() < 1 / 255


@pytest.mark.parametrize("shape", [(8, 8), (40, 24), (1, 5)])
def test_a_heat_map_is_bright_where_the_values_are_high(shape):
    values = np.zeros((2, 2))
    values[0, 0] = 1
    over = heat_over(np.full((*shape, 3), 0.5), values)
    assert over.shape == (*shape, 3) and over.min() >= 0 and over.max() <= 1
    assert over[0, 0].sum() > over[-1, -1].sum()


def test_figures_have_names_of_their_own():
    one, other = (draw_inline(key, lambda axis: axis.plot([1, 2]), "a <b> & $x$", "label") for key in ("one", "other"))
    ids = [set(re.findall(r'\bid="([^"]*)"', drawing.svg)) for drawing in (one, other)]
    assert ids[0] and not ids[0] & ids[1] and "a &lt;b&gt; &amp; $x$" in one.svg
    assert pages.INK not in one.svg and "currentColor" in one.svg and one.title == "label"
