"""A report: one HTML page that needs nothing else, its figures as PNG and SVG, its numbers as CSV."""

import base64
import csv
import html
import io
import math
import os
import re
import shutil
import warnings
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from statistics import fmean
from string import Template
from typing import Any

from eit import __version__
from eit.analysis.analyzed_model import AnalyzedModel, curves
from eit.analysis.compare import Comparison
from eit.analysis.figures import FIGURES, figures
from eit.analysis.findings import TOKEN_TABLE, faults, mean_diversity, sentences, token_table
from eit.analysis.panels import HEAT, Figure
from eit.analysis.tables import TABLES, tables
from eit.errors import printable
from eit.files import write_file
from eit.plots import save

INK = "#010203"  # stands for the page's ink in its figures


# -- Files ------------------------------------------------------------------------------------------------------------


def write(folder: Path, compared: Comparison, data: str, command: str) -> Path:
    """Write report.html, csv/ and figures/ into `folder`, in place of those of an earlier report; the page's path.

    All is made aside first, so that an interruption leaves the earlier report whole.
    """
    aside = folder / ".unfinished"
    shutil.rmtree(aside, ignore_errors=True)
    for part in ("csv", "figures"):
        (aside / part).mkdir(parents=True)
    measured, drawn = compared.measured, figures(compared.measured)
    for name, rows in tables(measured, compared.images).items():
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if _is_nan(value) else value for key, value in row.items()} for row in rows)
        write_file(aside / "csv" / f"{name}.csv", text.getvalue().encode(errors="surrogateescape"))
    for figure in drawn:
        publish(figure, aside / "figures")
    page = _page(compared, drawn, printable(data), printable(command))
    write_file(aside / "report.html", page.encode(errors="replace"))
    ours = [f"csv/{name}.csv" for name in TABLES]
    ours += [f"figures/{key}{ending}" for key in FIGURES for ending in (".png", ".svg")]
    for name in [*ours, "report.html"]:
        (folder / name).parent.mkdir(exist_ok=True)
        if (aside / name).exists():
            os.replace(aside / name, folder / name)
        else:  # of an earlier report alone
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(aside)
    return folder / "report.html"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _settings(ink: str) -> dict[str, Any]:
    """matplotlib's, for figures of `ink` on no background."""
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


def _legend(figure: Figure, ink: str) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=one.name, **one.style()) for one in figure.legend]
    if figure.noise:
        handles.append(Line2D([], [], label="white noise", linestyle=":", linewidth=1.2, color=ink))
    return handles


def publish(figure: Figure, folder: Path) -> None:
    """The figure in the width of two columns of a paper (7 inches), as KEY.png of 300 dpi and KEY.svg."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    ink = "#222222"
    columns = min(len(figure.panels), 3 if len(figure.panels) != 4 else 2)
    rows = -(-len(figure.panels) // columns)
    with matplotlib.rc_context(_settings(ink) | {"svg.hashsalt": figure.key, "svg.fonttype": "path"}):
        handles = _legend(figure, ink)
        per_row = len(handles) if len(handles) < 4 else min(4, -(-len(handles) // 2))  # a model over its initial values
        height = 2.5 * rows + 0.2 * -(-len(handles) // max(per_row, 1))
        canvas = Canvas(figsize=(7.0, height), layout="constrained", facecolor="white")
        axes = canvas.subplots(rows, columns, squeeze=False).ravel()
        for axis, panel in zip(axes, figure.panels, strict=False):
            axis.set_title(panel.title, fontsize=9, parse_math=False)
            panel.draw(axis)
        for axis in axes[len(figure.panels) :]:
            axis.set_axis_off()
        if handles:
            canvas.legend(handles=handles, loc="outside upper center", ncols=per_row, frameon=False, fontsize=8)
        save(canvas, folder / f"{figure.key}.png", dpi=300, metadata={"Software": None})
        save(canvas, folder / f"{figure.key}.svg", metadata={"Date": None})


# -- The page ---------------------------------------------------------------------------------------------------------


def _inline(figure: Figure, number: int) -> str:
    """A panel as SVG whose ink is the page's."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    panel, key = figure.panels[number], f"{figure.key}{number}"
    sizes = {"axes.titlesize": 11, "axes.labelsize": 10, "xtick.labelsize": 9.5, "ytick.labelsize": 9.5}
    with matplotlib.rc_context(_settings(INK) | sizes | {"svg.hashsalt": key}), warnings.catch_warnings():
        canvas = Canvas(figsize=(3.7, 2.8), layout="constrained")
        canvas.patch.set_visible(False)
        axis = canvas.subplots()
        axis.set_title(panel.title, parse_math=False)
        panel.draw(axis)
        FigureCanvasSVG(canvas)
        text = io.StringIO()
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the page's own fonts have it
        canvas.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{key}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{key}-", svg)
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px sans-serif", svg)
    title = html.escape(f"{figure.title}: {panel.title}".removesuffix(": "))
    return re.sub(
        r'<svg [^>]*viewBox="([^"]*)"[^>]*>', rf'<svg viewBox="\1" role="img" aria-label="{title}">', svg, count=1
    )


# matplotlib's markers, in a box of 30 x 10
SHAPES = {
    "o": "M11.5 5a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0Z",
    "s": "M11.5 1.5h7v7h-7Z",
    "^": "M15 1l4 7.5h-8Z",
    "D": "M15 0.5l4.5 4.5l-4.5 4.5l-4.5 -4.5Z",
    "v": "M15 9l4 -7.5h-8Z",
    "P": "M13.5 1.5h3v2h2v3h-2v2h-3v-2h-2v-3h2Z",
    "X": "M12 1l3 2.5l3 -2.5l1 1.5l-2.5 2.5l2.5 2.5l-1 1.5l-3 -2.5l-3 2.5l-1 -1.5l2.5 -2.5l-2.5 -2.5Z",
}


def _swatch(stroke: str, dash: str = "", shape: str = "", fill: str = "none") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    marker = f'<path d="{shape}" fill="{fill}" stroke="{stroke}"/>' if shape else ""
    line = f'<path d="M0 5H30" stroke="{stroke}" stroke-width="2"{dashed}/>'
    return f'<svg class="swatch" viewBox="0 0 30 10" aria-hidden="true">{line}{marker}</svg>'


def _key(figure: Figure) -> str:
    """The legend in HTML, above the panels."""
    items = []
    for one in figure.legend:
        fill, dash = ("var(--paper)", "5 3") if one.is_initial else (one.colour, "")
        items.append(_swatch(one.colour, dash, SHAPES[one.marker], fill) + html.escape(one.name))
    if figure.noise:
        items.append(_swatch("currentColor", "2 3") + "white noise")
    return f'<ul class="key">{"".join(f"<li>{item}</li>" for item in items)}</ul>' if items else ""


def _figure(figure: Figure, number: int, origin: str) -> str:
    panels = "".join(f'<div class="panel">{_inline(figure, i)}</div>' for i in range(len(figure.panels)))
    columns = "panels pairs" if len(figure.panels) == 4 else "panels"
    return (
        f'<figure id="{figure.key}"><h2>{html.escape(figure.title)}</h2>{_key(figure)}'
        f'<div class="{columns}">{panels}</div>'
        f"<figcaption><b>Figure {number}.</b> {html.escape(figure.caption)} <small>{html.escape(origin)}</small>"
        "</figcaption></figure>"
    )


def _page(compared: Comparison, drawn: Sequence[Figure], data: str, command: str) -> str:
    measured = compared.measured
    sources = "; ".join(one.subject.provenance for one in measured)
    origin = f"{measured[0].analysis.images:,} images of {data}. {printable(sources)}."
    body = "".join(_figure(figure, number, origin) for number, figure in enumerate(drawn, start=1))
    if any(one.pictures for one in measured):
        body += _gallery(measured, len(drawn) + 1, printable(sources))
    wrong = list(map(printable, faults(measured)))
    missing = [f"{one.name}: no {text}" for one in measured if not one.is_initial for text in one.missing]
    missing = list(map(printable, [*compared.left_out, *missing]))
    template = resources.files("eit.analysis").joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        names=html.escape(_names(measured)),
        origin=html.escape(origin),
        faults=f'<div class="faults"><h2>First of all</h2>{_list(wrong)}</div>' if wrong else "",
        words=_list(
            sentences(measured) or ["No trained model is here: nothing below speaks for or against the paper."]
        ),
        table=_summary_table(curves(measured)) + _token_table(measured),
        missing=f"<h2>What cannot be measured</h2>{_list(missing)}" if missing else "",
        figures=body,
        version=html.escape(__version__),
        command=html.escape(command),
    )


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def _names(measured: Sequence[AnalyzedModel]) -> str:
    names = [one.name for one in curves(measured) if not one.is_initial]
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def _summary_table(measured: Sequence[AnalyzedModel]) -> str:
    rows = []
    for one in measured:
        blocks, heads = one.analysis.layers_at("block"), one.analysis.attention
        cells = [
            html.escape(one.name),
            f"{one.analysis.grid[0]}x{one.analysis.grid[1]}, {one.analysis.pitch:.3g} px",
            f"{100 * one.mean(lambda a: fmean(f.share for f in a.layers_at('block'))):.1f}%",
            f"{100 * one.mean(lambda a: fmean(f.share_with_dc for f in a.layers_at('block'))):.1f}%",
            f"{100 * blocks[0].noise_share:.1f}%",
            f"{one.mean(lambda a: fmean(layer.std for layer in a.attention)):.2f} px" if heads else "&ndash;",
            f"{mean_diversity(one):.2f}%" if heads else "&ndash;",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = ("model", "tokens", "share", "with DC", "noise", "diversity", "relative")
    return (
        '<div class="scroll" tabindex="0"><table><thead><tr>'
        + "".join(f'<th scope="col">{cell}</th>' for cell in head)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<p><small>Means of the layers. share: energy of high frequencies, without and with DC; noise: the share of "
        "white noise on as many tokens; diversity: standard deviation of the heads' attention distances, in pixels "
        "and relative to the distance of uniform attention.</small></p>"
    )


def _token_table(measured: Sequence[AnalyzedModel]) -> str:
    head, rows = token_table(measured)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        '<div class="scroll" tabindex="0"><table><thead><tr>'
        + "".join(f'<th scope="col">{cell}</th>' for cell in head)
        + f"</tr></thead><tbody>{body}</tbody></table></div><p><small>{html.escape(TOKEN_TABLE)}</small></p>"
    )


# -- Single images ----------------------------------------------------------------------------------------------------


def _gallery(measured: Sequence[AnalyzedModel], number: int, sources: str) -> str:
    parts = []
    having = [one for one in measured if one.pictures]
    largest = max(having, key=lambda one: one.analysis.image_size)
    for i, (name, image, spectrum) in enumerate(largest.examples):
        rows = [_tile("input", name, image) + _tile("its spectrum", name, _heat(spectrum))]
        for one in having:
            own, picture, about = one.examples[i].image, one.pictures[i], f"{name}, {one.name}"
            tiles = [_tile("its input", about, own)] if own.shape != image.shape else []
            tiles += [_tile(f"energy {n}", about, _heat(e.numpy())) for n, e in enumerate(picture.energy, start=1)]
            maps = (
                ("class token", picture.class_attention),
                ("rollout", picture.rollout),
                ("Grad-CAM", picture.grad_cam),
            )
            tiles += [_tile(text, about, _over(own, found.numpy())) for text, found in maps if found is not None]
            rows.append("".join(tiles))
        names = ["", *(f"<h4>{html.escape(one.name)}</h4>" for one in having)]
        body = "".join(f'{head}<div class="tiles">{row}</div>' for head, row in zip(names, rows, strict=True))
        parts.append(f"<section><h3>{html.escape(printable(name))}</h3>{body}</section>")
    caption = (
        "Single images: the input and its Fourier amplitude (logarithm, frequency 0 in the middle); the energy of each "
        "layer's tokens after taking out their mean; what the class token attends to in the last layer that has one, "
        "over the image (mean of the heads, scaled to the brightest place)."
    )
    shown_maps = [picture for one in having for picture in one.pictures]
    if any(picture.rollout is not None for picture in shown_maps):
        caption += " Rollout: attention multiplied over the layers, without the channels that are convolved."
    if any(picture.grad_cam is not None for picture in shown_maps):
        caption += " Grad-CAM: where tokens before the last mixer speak for the likeliest class."
    caption += " Examples, not evidence: no single image would count for or against a claim."
    return (
        f'<figure id="pictures"><h2>Single images</h2>{"".join(parts)}<figcaption><b>Figure {number}.</b> {caption} '
        f"<small>{len(parts)} images. {html.escape(sources)}.</small></figcaption></figure>"
    )


def _tile(text: str, about: str, pixels: Any) -> str:
    """(H, W, 3) in 0..1 as an image with a line below it; `about` says more to those who cannot see it."""
    import numpy as np
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)).save(png, "png")
    data = base64.b64encode(png.getvalue()).decode()
    alt = html.escape(f"{text}: {about}")
    return f'<div class="tile"><img alt="{alt}" src="data:image/png;base64,{data}"><span>{text}</span></div>'


def _heat(values: Any) -> Any:
    """(h, w) in 0..1 -> colours (h, w, 3)."""
    from matplotlib import colormaps

    return colormaps[HEAT](values)[..., :3]


def _over(image: Any, values: Any) -> Any:
    """`image` (H, W, 3) under a veil: dark where `values` (h, w) in 0..1 are low, as it is where they are high."""
    import numpy as np
    from PIL import Image

    grey = Image.fromarray((values * 255).astype(np.uint8)).resize(
        (image.shape[1], image.shape[0]), Image.Resampling.BICUBIC
    )
    veil = 0.15 + 0.85 * np.asarray(grey)[..., None] / 255
    return image * veil + np.array([0.15, 0.1, 0.35]) * (1 - veil)
