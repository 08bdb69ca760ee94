"""A report: one HTML page that needs nothing else, its figures as PNG and SVG, its numbers as CSV."""

import base64
import csv
import html
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from eit import __version__
from eit.analysis.figures import Figure, Measured, figures
from eit.analysis.frequency import diagonal_frequencies
from eit.analysis.pictures import Example
from eit.checkpoint import write_file
from eit.draw import save

INK = "#010203"  # stands for the page's ink in its figures
FOLDERS = ("csv", "figures")
PICTURES = 8


# -- Numbers ----------------------------------------------------------------------------------------------------------


def tables(measured: Sequence[Measured]) -> dict[str, list[dict[str, Any]]]:
    """The numbers as tidy tables, a row a measurement: what is written as csv/NAME.csv."""
    found: dict[str, list[dict[str, Any]]] = {
        name: [] for name in ("models", "frequency", "amplitude", "spectrum", "heads", "diversity", "robustness")
    }
    for one in measured:
        subject, analysis = one.subject, one.analysis
        key = dict(model=subject.label, state=subject.state)
        first = analysis.frequency[0]
        found["models"].append(
            key
            | dict(
                source=subject.source,
                sha256=subject.sha256,
                images=analysis.images,
                image_size="x".join(map(str, analysis.image_size)),
                grid="x".join(map(str, analysis.grid)),
                pitch=analysis.attention[0].pitch if analysis.attention else None,
                layers=analysis.depth,
                rho=first.rho,
                missing="; ".join(analysis.missing),
            )
        )
        for f in analysis.frequency:
            place = key | dict(layer=f.layer, where=f.where)
            found["frequency"].append(
                place
                | dict(
                    channels=f.channels,
                    share=f.share,
                    share_se=f.share_se,
                    share_with_dc=f.share_with_dc,
                    share_with_dc_se=f.share_with_dc_se,
                    noise_share=f.noise_share,
                    noise_share_with_dc=f.noise_share_with_dc,
                )
            )
            for frequency, value in zip(diagonal_frequencies(f.grid), f.log_amplitude, strict=True):
                found["amplitude"].append(place | dict(frequency=frequency, relative_log_amplitude=value))
            for low, high, share, noise in f.radial():
                found["spectrum"].append(
                    place | dict(frequency_from=low, frequency_to=high, share=share, noise_share=noise)
                )
        for layer in analysis.attention:
            heads = zip(layer.distance, layer.distance_se, layer.class_mass, layer.entropy, strict=True)
            for number, (distance, se, mass, entropy) in enumerate(heads, start=1):
                found["heads"].append(
                    key
                    | dict(
                        layer=layer.layer,
                        head=number,
                        distance_px=distance,
                        distance_px_se=se,
                        relative_distance=distance / layer.uniform,
                        class_mass=mass,
                        entropy_nats=entropy,
                    )
                )
            found["diversity"].append(
                key
                | dict(
                    layer=layer.layer,
                    heads=len(layer.distance),
                    std_px=layer.std,
                    range_px=layer.range,
                    pair_gap_px=layer.gap,
                    relative_std=layer.std / layer.uniform,
                    uniform_px=layer.uniform,
                )
            )
        for band in one.bands or []:
            found["robustness"].append(
                key | dict(frequency_from=band.low, frequency_to=band.high, top1=band.top1, images=band.images)
            )
    return {name: rows for name, rows in found.items() if rows}


def summary(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    """The figures of each model that a table of a few columns has room for."""
    rows = []
    for one in measured:
        analysis, blocks = one.analysis, one.analysis.at("block")
        heads = analysis.attention
        rows.append(
            dict(
                model=one.subject.label,
                state=one.subject.state,
                images=analysis.images,
                grid=list(analysis.grid),
                pitch=heads[0].pitch if heads else None,
                share=[f.share for f in blocks],
                share_with_dc=[f.share_with_dc for f in blocks],
                noise_share=blocks[0].noise_share,
                noise_share_with_dc=blocks[0].noise_share_with_dc,
                diversity_px=[layer.std for layer in heads],
                relative_diversity=[layer.std / layer.uniform for layer in heads],
                missing=analysis.missing,
            )
        )
    return rows


# -- Files ------------------------------------------------------------------------------------------------------------


def write(folder: Path, measured: Sequence[Measured], data: str, command: str, shown: Sequence[Example] = ()) -> Path:
    """Write report.html, csv/ and figures/ into `folder`, in place of those of an earlier report; the page's path.

    `shown` are the images that the `pictures` of what was measured are of.
    """
    for part in FOLDERS:
        (folder / part).mkdir(parents=True, exist_ok=True)
        for old in (folder / part).iterdir():
            if old.suffix in (".csv", ".png", ".svg"):
                old.unlink()
    for name, rows in tables(measured).items():
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if _is_nan(value) else value for key, value in row.items()} for row in rows)
        write_file(folder / "csv" / f"{name}.csv", text.getvalue().encode(errors="surrogateescape"))
    drawn = figures(measured)
    for figure in drawn:
        publish(figure, folder / "figures")
    page = _page(measured, drawn, data, command, shown)
    write_file(folder / "report.html", page.encode(errors="replace"))
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
        legend_rows = -(-len(handles) // 3)
        height = 2.5 * rows + 0.2 * legend_rows
        canvas = Canvas(figsize=(7.0, height), layout="constrained", facecolor="white")
        axes = canvas.subplots(rows, columns, squeeze=False).ravel()
        for axis, panel in zip(axes, figure.panels, strict=False):
            axis.set_title(panel.title, fontsize=9, parse_math=False)
            panel.draw(axis)
        for axis in axes[len(figure.panels) :]:
            axis.set_axis_off()
        if handles:
            canvas.legend(handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=8)
        save(canvas, folder / f"{figure.key}.png", dpi=300, metadata={"Software": None})
        save(canvas, folder / f"{figure.key}.svg", metadata={"Date": None})


# -- The page ---------------------------------------------------------------------------------------------------------


def _inline(figure: Figure, number: int) -> str:
    """A panel as SVG whose ink is the page's."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    panel, key = figure.panels[number], f"{figure.key}{number}"
    with matplotlib.rc_context(_settings(INK) | {"svg.hashsalt": key}):
        canvas = Canvas(figsize=(4.4, 3.1), layout="constrained")
        canvas.patch.set_visible(False)
        axis = canvas.subplots()
        axis.set_title(panel.title, parse_math=False)
        panel.draw(axis)
        FigureCanvasSVG(canvas)
        text = io.StringIO()
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


def _key(figure: Figure) -> str:
    """The legend in HTML, above the panels."""
    items = []
    for one in figure.legend:
        dash = ' stroke-dasharray="5 3"' if one.is_initial else ""
        fill = "none" if one.is_initial else one.colour
        swatch = (
            f'<svg class="swatch" viewBox="0 0 30 10" aria-hidden="true"><path d="M0 5H30" stroke="{one.colour}" '
            f'stroke-width="2"{dash}/><circle cx="15" cy="5" r="3.5" fill="{fill}" stroke="{one.colour}"/></svg>'
        )
        items.append(f"<li>{swatch}{html.escape(one.name)}</li>")
    if figure.noise:
        swatch = (
            '<svg class="swatch" viewBox="0 0 30 10" aria-hidden="true"><path d="M0 5H30" stroke="currentColor" '
            'stroke-width="1.5" stroke-dasharray="2 3"/></svg>'
        )
        items.append(f"<li>{swatch}white noise</li>")
    return f'<ul class="key">{"".join(items)}</ul>' if items else ""


def _figure(figure: Figure, number: int, origin: str) -> str:
    panels = "".join(f'<div class="panel">{_inline(figure, i)}</div>' for i in range(len(figure.panels)))
    return (
        f'<figure id="{figure.key}"><h2>{html.escape(figure.title)}</h2>{_key(figure)}'
        f'<div class="panels">{panels}</div>'
        f"<figcaption><b>Figure {number}.</b> {html.escape(figure.caption)} <small>{html.escape(origin)}</small>"
        "</figcaption></figure>"
    )


def _page(
    measured: Sequence[Measured],
    drawn: Sequence[Figure],
    data: str,
    command: str,
    shown: Sequence[Example],
) -> str:
    images = measured[0].analysis.images
    sources = "; ".join(one.subject.provenance for one in measured if not one.is_initial)
    origin = f"{images:,} images of {data}. {sources}."
    body = "".join(_figure(figure, number, origin) for number, figure in enumerate(drawn, start=1))
    if shown:
        body += _gallery(measured, shown, len(drawn) + 1, sources)
    missing = [f"{one.name}: no {text}" for one in measured if not one.is_initial for text in one.analysis.missing]
    template = resources.files("eit.analysis").joinpath("report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        names=html.escape(_names(measured)),
        origin=html.escape(origin),
        words=_list(verdicts(measured) or ["No trained model is here: nothing below speaks for or against the paper."]),
        table=_summary_table(measured),
        missing=f"<h2>What cannot be measured</h2>{_list(missing)}" if missing else "",
        figures=body,
        version=html.escape(__version__),
        command=html.escape(command),
    )


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"


def _names(measured: Sequence[Measured]) -> str:
    names = [one.name for one in measured if not one.is_initial]
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


def verdicts(measured: Sequence[Measured]) -> list[str]:
    """The paper's two claims in the numbers of this report, a sentence a comparison; none where nothing was trained.

    A difference counts where it is more than two standard errors of the two means.
    """
    trained = [one for one in measured if one.subject.state == "trained"]
    mixed = [one for one in trained if one.analysis.at("conv")]
    lines = []
    for one in mixed[:1]:
        for other in trained:
            if other is one or other.analysis.depth != one.analysis.depth:
                continue
            for kind in ("share", "share_with_dc"):
                pairs = list(zip(one.analysis.at("block"), other.analysis.at("block"), strict=True))
                gaps = [getattr(a, kind) - getattr(b, kind) for a, b in pairs]
                errors = [math.hypot(getattr(a, kind + "_se"), getattr(b, kind + "_se")) for a, b in pairs]
                more = sum(gap > 2 * error for gap, error in zip(gaps, errors, strict=True))
                less = sum(gap < -2 * error for gap, error in zip(gaps, errors, strict=True))
                lines.append(
                    f"High frequencies, {kind}: {one.name} has more than {other.name} in {more} of {len(pairs)} layers "
                    f"and less in {less}."
                )
            heads = list(zip(one.analysis.attention, other.analysis.attention, strict=False))
            if heads:
                more = sum(a.std / a.uniform > b.std / b.uniform for a, b in heads)
                means = [sum(layer.std for layer in layers) / len(layers) for layers in zip(*heads, strict=True)]
                lines.append(
                    f"Head diversity: {one.name} is more diverse than {other.name} in {more} of {len(heads)} layers "
                    f"(mean {means[0]:.2f} against {means[1]:.2f} px)."
                )
    for one in trained:
        twin = next((o for o in measured if o.is_initial and o.subject.label == one.subject.label), None)
        if twin:
            rise = [
                100 * (a.share - b.share)
                for a, b in zip(one.analysis.at("block"), twin.analysis.at("block"), strict=True)
            ]
            text = f"Training moves the share of {one.name} by {min(rise):+.1f} to {max(rise):+.1f} points"
            if one.analysis.attention:
                before, after = (
                    sum(layer.std for layer in o.analysis.attention) / len(o.analysis.attention) for o in (twin, one)
                )
                text += f", its mean head diversity from {before:.2f} to {after:.2f} px"
            lines.append(text + ".")
    return lines


def _summary_table(measured: Sequence[Measured]) -> str:
    def span(values: Iterable[float]) -> str:
        values = list(values)
        return f"{values[0]:.1f} &rarr; {values[-1]:.1f}" if values else "&ndash;"

    rows = []
    for one in measured:
        blocks, heads = one.analysis.at("block"), one.analysis.attention
        pitch = f", {heads[0].pitch:g} px" if heads else ""
        cells = [
            html.escape(one.name),
            f"{one.analysis.grid[0]}x{one.analysis.grid[1]}{pitch}",
            span(100 * f.share for f in blocks),
            f"{100 * blocks[0].noise_share:.1f}",
            span(100 * f.share_with_dc for f in blocks),
            f"{sum(layer.std for layer in heads) / len(heads):.2f}" if heads else "&ndash;",
            f"{100 * sum(layer.std / layer.uniform for layer in heads) / len(heads):.1f}" if heads else "&ndash;",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = (
        "model",
        "tokens, pitch",
        "share, layer 1 &rarr; last (%)",
        "of white noise (%)",
        "with DC (%)",
        "diversity, mean (px)",
        "of uniform (%)",
    )
    return (
        '<div class="scroll"><table><thead><tr>'
        + "".join(f"<th>{cell}</th>" for cell in head)
        + f"</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


# -- Single images ----------------------------------------------------------------------------------------------------


def _gallery(measured: Sequence[Measured], shown: Sequence[Example], number: int, sources: str) -> str:
    parts = []
    for i, (name, image, spectrum) in enumerate(shown):
        top = _tile("input", image) + _tile("its spectrum", _heat(spectrum))
        rows = [f'<div class="tiles">{top}</div>']
        for one in measured:
            if not one.pictures:
                continue
            picture = one.pictures[i]
            tiles = [_tile(f"energy {n}", _heat(e.numpy())) for n, e in enumerate(picture.energy, start=1)]
            maps = (
                ("class token", picture.class_attention),
                ("rollout", picture.rollout),
                ("Grad-CAM", picture.grad_cam),
            )
            tiles += [_tile(text, _over(image, found.numpy())) for text, found in maps if found is not None]
            rows.append(f'<h4>{html.escape(one.name)}</h4><div class="tiles">{"".join(tiles)}</div>')
        parts.append(f"<section><h3>{html.escape(name)}</h3>{''.join(rows)}</section>")
    caption = (
        "Single images: the input and its Fourier amplitude (logarithm, frequency 0 in the middle); the energy of "
        "each layer's tokens after taking out their mean; what the class token attends to in the last layer that has "
        "one, over the image (mean of the heads, scaled to the brightest place). Examples, not evidence: no single "
        "image counts for or against a claim."
    )
    return (
        f'<figure id="pictures"><h2>Single images</h2>{"".join(parts)}<figcaption><b>Figure {number}.</b> {caption} '
        f"<small>{len(shown)} images. {html.escape(sources)}.</small></figcaption></figure>"
    )


def _tile(text: str, pixels: Any) -> str:
    """(H, W, 3) in 0..1 as an image with a line below it."""
    import numpy as np
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray((np.clip(pixels, 0, 1) * 255 + 0.5).astype(np.uint8)).save(png, "png")
    data = base64.b64encode(png.getvalue()).decode()
    return f'<div class="tile"><img alt="{text}" src="data:image/png;base64,{data}"><span>{text}</span></div>'


def _heat(values: Any) -> Any:
    """(h, w) in 0..1 -> colours (h, w, 3)."""
    from matplotlib import colormaps

    from eit.analysis.figures import HEAT

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


def to_json(measured: Sequence[Measured], folder: Path) -> str:
    return json.dumps(dict(report=str(folder / "report.html"), models=summary(measured)), indent=2)
