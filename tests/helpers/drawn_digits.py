"""Digits as people make them: typed in twelve fonts and drawn in 29 styles, at twelve sizes and positions.

Nothing here is in the training images of tools/make_digits.py: no font, no relative of a font (that tool says which it
leaves out), and no drawn stroke at all. Fonts that are not matplotlib's come with .ci/run.
"""

import functools
import math
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from tests.helpers.shared import require

FONTS = {
    "DejaVu Sans Bold": "DejaVuSans-Bold.ttf",
    "DejaVu Serif": "DejaVuSerif.ttf",
    "DejaVu Sans Mono": "DejaVuSansMono.ttf",
    "STIX": "STIXGeneral.ttf",
    "STIX Bold Italic": "STIXGeneralBolIta.ttf",
    "Computer Modern": "cmr10.ttf",
    "Computer Modern Sans": "cmss10.ttf",
    "Computer Modern Typewriter": "cmtt10.ttf",
    "Liberation Sans": "/usr/share/fonts/truetype/liberation/LiberationSans-Regular.ttf",
    "Comic Neue": "/usr/share/fonts/opentype/comic-neue/ComicNeue-Regular.otf",
    "DKG Handwriting": "/usr/share/fonts/truetype/fifthhorseman/dkg.ttf",
    "Humor Sans": "/usr/share/fonts/truetype/humor-sans/Humor-Sans.ttf",
}

# Digit and style -> strokes: `~` a curve through its points, `-` a line with corners; x to the right, y down, in 0..1.
OVAL = "~ .5,0 .18,.15 .08,.55 .3,.97 .68,.96 .92,.5 .8,.12 .5,0"
STYLES = {
    ("0", "closed"): [OVAL],
    ("0", "open at the top"): ["~ .62,.07 .25,.1 .06,.5 .28,.95 .7,.95 .93,.5 .78,.12 .48,.0"],
    ("0", "slashed"): [OVAL, "- .85,.08 .15,.93"],
    ("1", "bar"): ["- .5,0 .5,1"],
    ("1", "flag"): ["- .22,.25 .52,0 .52,1"],
    ("1", "flag and base"): ["- .25,.22 .52,0 .52,1", "- .2,1 .84,1"],
    ("1", "slanted"): ["- .65,0 .38,1"],
    ("2", "flat base"): ["~ .1,.25 .3,.03 .7,.03 .85,.3 .6,.62 .1,1", "- .1,1 .92,1"],
    ("2", "looped"): ["~ .12,.22 .45,0 .82,.2 .66,.58 .25,.95 .08,.88 .25,.78 .55,.93 .95,.96"],
    ("2", "angular"): ["~ .1,.15 .45,.0 .8,.12 .8,.32 .5,.6 .05,.98", "- .05,.98 .95,.93"],
    ("3", "round"): ["~ .12,.12 .45,0 .8,.15 .7,.4 .38,.48 .8,.58 .9,.8 .55,1 .08,.88"],
    ("3", "flat top"): ["- .1,.02 .86,.02 .42,.4", "~ .42,.4 .8,.48 .9,.74 .6,.98 .08,.92"],
    ("3", "pointed"): ["~ .1,.08 .5,.0 .82,.2 .3,.46", "~ .3,.46 .9,.6 .82,.92 .4,1 .05,.9"],
    ("4", "open"): ["- .25,0 .08,.62 .92,.62", "- .68,.3 .64,1"],
    ("4", "closed"): ["- .7,1 .7,0 .06,.7 .96,.7"],
    ("4", "two bars"): ["- .15,0 .15,.52 .8,.52", "- .8,0 .8,1"],
    ("5", "with a hook"): ["- .85,.02 .24,.02 .18,.45", "~ .18,.45 .6,.36 .9,.65 .65,.97 .08,.92"],
    ("5", "like an S"): ["~ .88,.05 .4,.02 .2,.22 .45,.45 .85,.62 .75,.93 .35,1 .08,.9"],
    ("6", "curved"): ["~ .8,.05 .35,.2 .1,.65 .3,.97 .75,.95 .88,.7 .6,.52 .25,.6 .12,.75"],
    ("6", "straight"): ["- .6,0 .16,.62", "~ .16,.62 .14,.85 .45,1 .82,.88 .8,.6 .5,.5 .18,.65"],
    ("7", "plain"): ["- .08,.02 .9,.02 .38,1"],
    ("7", "barred"): ["- .08,.02 .9,.02 .4,1", "- .3,.52 .85,.5"],
    ("7", "hooked"): ["- .08,.18 .1,.03 .9,.03", "~ .9,.03 .6,.4 .45,1"],
    ("7", "hooked and barred"): ["- .08,.18 .1,.03 .9,.03 .4,1", "- .32,.5 .82,.5"],
    ("8", "one stroke"): [
        "~ .8,.1 .45,0 .15,.2 .5,.46 .88,.74 .55,1 .12,.8 .45,.48 .82,.22 .8,.1",
    ],
    ("8", "two rings"): [
        "~ .5,0 .2,.12 .25,.4 .5,.46 .78,.38 .8,.12 .5,0",
        "~ .5,.46 .12,.6 .2,.95 .8,.95 .88,.6 .5,.46",
    ],
    ("9", "straight stem"): ["~ .85,.2 .5,0 .14,.15 .2,.48 .6,.52 .85,.2", "- .85,.1 .8,1"],
    ("9", "curled tail"): ["~ .82,.22 .5,0 .15,.18 .25,.48 .7,.42 .82,.2 .86,.55 .7,.95 .35,1 .12,.86"],
    ("9", "round back"): ["~ .85,.25 .55,.0 .16,.18 .3,.5 .78,.4 .85,.25 .8,.65 .45,1"],
}

# Longer side and centre of the digit, relative to the image; pixels of the image; stroke width, relative to the digit.
PLACES = {
    "35% in the centre": (0.35, 0.5, 0.5, 64, 0.12),
    "35% top left": (0.35, 0.28, 0.25, 200, 0.16),
    "40% bottom right": (0.4, 0.72, 0.7, 96, 0.09),
    "45% in the centre": (0.45, 0.5, 0.5, 320, 0.07),
    "50% top right": (0.5, 0.68, 0.3, 40, 0.14),
    "55% bottom left": (0.55, 0.35, 0.66, 128, 0.06),
    "60% in the centre": (0.6, 0.5, 0.5, 28, 0.1),
    "65% on the left": (0.65, 0.38, 0.5, 224, 0.18),
    "75% in the centre": (0.75, 0.5, 0.5, 100, 0.05),
    "80% near the top": (0.8, 0.5, 0.44, 256, 0.13),
    "90% in the centre": (0.9, 0.5, 0.5, 48, 0.2),
    "95% in the centre": (0.95, 0.5, 0.5, 400, 0.08),
}
LOOKS = ("white on black", "black on white", "coloured ink", "photograph")
MASK = 512  # pixels that a digit is drawn on before it is made small


@dataclass(frozen=True)
class DrawnDigit:
    """One image: the digit, `fonts` or `strokes`, the name of the font or style, the place and the look."""

    label: str
    kind: str
    style: str
    place: str
    look: str
    image: Image.Image


def draw_digits(looks: Sequence[str] = LOOKS, places: Sequence[str] = tuple(PLACES)) -> Iterator[DrawnDigit]:
    """Each digit of each font and each style of strokes, at each place, in each look; the same images in every run."""
    for place in places:
        share, *_, width = PLACES[place]
        for name in FONTS:
            for label in "0123456789":
                mask = place_ink(type_digit(name, label), share, place)
                for look in looks:
                    yield DrawnDigit(label, "fonts", name, place, look, colour(mask, look, f"{name}{label}{place}"))
        for label, style in STYLES:
            mask = place_ink(draw_strokes(label, style, place, width), share, place)
            for look in looks:
                title = f"{label} {style}"
                yield DrawnDigit(label, "strokes", title, place, look, colour(mask, look, f"{title}{place}"))


@functools.cache
def type_digit(font: str, label: str) -> Image.Image:
    """The ink of a digit of a font, cropped."""
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FONTS[font]
    require(file.exists(), f"{file} is not installed; .ci/run names the package")
    canvas = Image.new("L", (900, 900))
    ImageDraw.Draw(canvas).text((250, 200), label, fill=255, font=ImageFont.truetype(file, 400))
    return canvas.crop(canvas.getbbox())


def draw_strokes(label: str, style: str, place: str, width: float) -> Image.Image:
    """The ink of a digit drawn by a hand that is not quite sure, cropped; `width` is relative to its height."""
    random = generator(f"{label}{style}{place}")
    turn, slant = random.normal(0, 0.07), random.normal(0, 0.07)
    canvas = Image.new("L", (900, 900))
    draw, pen = ImageDraw.Draw(canvas), width * MASK
    for stroke in STYLES[label, style]:
        kind, *points = stroke.split()
        xy = np.array([[float(v) for v in point.split(",")] for point in points])
        xy = (xy - 0.5) * (0.62 if label != "1" else 0.5, 1) + random.normal(0, 0.012, xy.shape)
        xy = through(xy) if kind == "~" else xy
        xy = xy @ [[math.cos(turn), math.sin(turn)], [slant - math.sin(turn), math.cos(turn)]] * (MASK - pen) + 450
        draw.line([tuple(p) for p in xy], fill=255, width=round(pen), joint="curve")
        for x, y in xy[[0, -1]]:
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=255)
    return canvas.crop(canvas.getbbox())


def through(points: np.ndarray, steps: int = 12) -> np.ndarray:
    """A smooth curve (Catmull-Rom) through points (N, 2)."""
    padded = np.vstack([2 * points[0] - points[1], points, 2 * points[-1] - points[-2]])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    parts = [
        b + 0.5 * t * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
        for a, b, c, d in zip(padded, padded[1:], padded[2:], padded[3:], strict=False)
    ]
    return np.vstack([*parts, points[-1:]])


def place_ink(ink: Image.Image, share: float, place: str) -> Image.Image:
    """Ink on an empty mask of the place's size."""
    _, x, y, side, _ = PLACES[place]
    scale = share * MASK / max(ink.size)
    ink = ink.resize((max(1, round(ink.width * scale)), max(1, round(ink.height * scale))), Image.Resampling.BICUBIC)
    mask = Image.new("L", (MASK, MASK))
    corner = [min(max(round(at * MASK - n / 2), 4), MASK - 4 - n) for at, n in ((x, ink.width), (y, ink.height))]
    mask.paste(ink, tuple(corner))
    return mask.resize((side, side), Image.Resampling.LANCZOS)


INKS = [(20, 40, 140), (190, 30, 30), (20, 110, 50), (90, 40, 120), (60, 60, 60), (200, 90, 10)]
PAPERS = [(250, 246, 230), (255, 255, 255), (225, 235, 245), (255, 240, 150), (205, 205, 200)]


def colour(mask: Image.Image, look: str, name: str) -> Image.Image:
    """A mask in the colours of a look; a photograph has uneven light, soft focus and noise."""
    if look == "white on black":
        return mask.convert("RGB")
    if look == "black on white":
        return Image.eval(mask, lambda v: 255 - v).convert("RGB")
    random = generator(f"{look}{name}")
    ink, paper = INKS[random.integers(len(INKS))], PAPERS[random.integers(len(PAPERS))]
    if random.random() < 0.25:  # chalk on a board, a light sign on a dark wall
        ink, paper = paper, [(30, 60, 45), (20, 25, 60), (70, 20, 25)][random.integers(3)]
    image = Image.composite(Image.new("RGB", mask.size, tuple(ink)), Image.new("RGB", mask.size, tuple(paper)), mask)
    if look == "coloured ink":
        return image
    image = image.filter(ImageFilter.GaussianBlur(random.uniform(0, 0.015) * mask.width))
    rows, columns = np.mgrid[-1 : 1 : mask.height * 1j, -1 : 1 : mask.width * 1j]
    light = 0.8 + random.uniform(-0.18, 0.18) * rows + random.uniform(-0.18, 0.18) * columns
    pixels = np.asarray(image) * light[..., None] + random.normal(0, 10, (*mask.size[::-1], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def generator(name: str) -> np.random.Generator:
    """Random numbers of a name."""
    return np.random.default_rng(zlib.crc32(name.encode()))
