"""Templates -> pages; matplotlib's figures -> inline SVG; arrays -> pictures inside the page."""

import base64
import io
import re
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from eit import __version__
from eit.errors import UserError, printable
from eit.files import write_file
from eit.plots import draw_once

INK = "#010203"  # placeholder in the SVG, replaced by currentColor
HEAT = "cividis"
SMALL = 64  # pixels: pictures up to this size are kept as they are, and enlarged without smoothing
SHOWN = 160  # pixels of the longer side of larger pictures


def render(template: str, **values: Any) -> bytes:
    """The page of a template in this package, such as `analysis/report.html.j2`.

    Text is escaped, and put in one line without control characters (`printable`), whatever it holds; only `Markup` is
    taken as it is.
    """
    return _environment().get_template(template).render(version=__version__, **values).encode(errors="replace")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("eit", ""),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(file: Path, template: str, **values: Any) -> None:
    """Write what `render` makes.

    Raises:
        UserError: the file cannot be written.
    """
    page = render(template, **values)
    try:
        write_file(file, page)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None


def preformatted(text: str) -> Markup:
    """Text whose lines stay lines."""
    return escape("\n".join(map(printable, text.splitlines())))


# -- Figures ----------------------------------------------------------------------------------------------------------


def figure_settings(ink: str) -> dict[str, Any]:
    """matplotlib's settings for figures in the colour `ink` without a background."""
    colours = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "legend.labelcolor")
    return dict.fromkeys(colours, ink) | {
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.labelsize": 9,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
        "font.family": "sans-serif",
        "svg.fonttype": "none",
    }


def ink() -> str:
    """The colour of text in the figure that is drawn now."""
    from matplotlib import rcParams

    return str(rcParams["text.color"])


class Drawing(NamedTuple):
    """A figure as inline SVG in the text colour of the page, with its title and description for screen readers."""

    title: str
    description: str
    view_box: str
    svg: Markup  # from matplotlib, which escapes text


def draw_inline(
    key: str, draw: Callable[[Any], None], title: str, label: str | None = None, description: str = ""
) -> Drawing:
    """What `draw` draws on an axis. `key` is unique in the page; `label` is what screen readers read for the title."""
    import matplotlib
    from matplotlib.figure import Figure

    sizes = {"axes.titlesize": 11, "axes.labelsize": 10, "xtick.labelsize": 9.5, "ytick.labelsize": 9.5}
    settings = figure_settings(INK) | sizes | {"svg.hashsalt": key}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        canvas = Figure(figsize=(3.7, 2.8), layout="constrained")
        canvas.patch.set_visible(False)
        axis = canvas.subplots()
        axis.set_title(title, parse_math=False)
        draw(axis)
        text = io.StringIO()
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the fonts of the page have the glyphs
        draw_once(canvas, "svg", text, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    parts = re.search(r'<svg [^>]*viewBox="([^"]*)"[^>]*>(.*)</svg>', text.getvalue(), re.DOTALL)
    assert parts
    view_box, svg = parts.groups()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", svg)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px sans-serif", svg)
    return Drawing(label or title, description, view_box, Markup(svg))


# -- Pictures ---------------------------------------------------------------------------------------------------------


def picture(pixels: Any, exact: bool = False) -> str:
    """Pixels (H, W, 3) in 0..1 -> the address of a picture inside the page: `exact` and small ones PNG, others JPEG."""
    import numpy as np
    from PIL import Image

    image = Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8))
    kind = "png" if exact or max(image.size) <= SMALL else "jpeg"
    if kind == "jpeg":
        image.thumbnail((SHOWN, SHOWN))
    return picture_address(image, kind)


def picture_address(image: Any, kind: str = "png") -> str:
    """The address of a PIL image inside the page."""
    content = io.BytesIO()
    image.save(content, kind, quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"


def heat_map(values: Any) -> Any:
    """Values (h, w) in 0..1 -> colours (h, w, 3)."""
    from matplotlib import colormaps

    return colormaps[HEAT](values)[..., :3]


def heat_over(image: Any, values: Any) -> Any:
    """Values (h, w) in 0..1 as a heat map over an image (H, W, 3), of which the brightness stays visible."""
    import numpy as np
    from PIL import Image

    grid = Image.fromarray((values * 255).astype(np.uint8))
    smooth = grid.resize((image.shape[1], image.shape[0]), Image.Resampling.BICUBIC)
    grey = image.mean(axis=2, keepdims=True)
    return 0.45 * grey + 0.55 * heat_map(np.asarray(smooth) / 255)
