"""Write the report: one HTML page that needs no other file, figures as PNG and SVG, measurements as CSV."""

import csv
import io
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eit.analysis.analyzed_model import AnalyzedModel, curves
from eit.analysis.compare import Comparison
from eit.analysis.figures import FIGURES, figures
from eit.analysis.findings import LAYER_TABLE, TOKEN_TABLE, faults, layer_table, sentences, token_table
from eit.analysis.panels import Figure
from eit.analysis.tables import TABLES, tables
from eit.files import write_file
from eit.pages.render import Drawing, draw_inline, figure_settings, heat_map, heat_over, picture, render
from eit.plots import save

# -- Files ------------------------------------------------------------------------------------------------------------


def write(folder: Path, compared: Comparison, data: str, command: str) -> Path:
    """Write report.html, csv/ and figures/ into `folder`, replacing an earlier report, and return the page's path.

    Everything is written to a hidden folder first, so an interruption keeps the earlier report complete.
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
        save_for_print(figure, aside / "figures")
    write_file(aside / "report.html", _page(compared, drawn, data, command))
    ours = [f"csv/{name}.csv" for name in TABLES]
    ours += [f"figures/{key}{ending}" for key in FIGURES for ending in (".png", ".svg")]
    for name in [*ours, "report.html"]:
        (folder / name).parent.mkdir(exist_ok=True)
        if (aside / name).exists():
            os.replace(aside / name, folder / name)
        else:  # only in the earlier report
            (folder / name).unlink(missing_ok=True)
    shutil.rmtree(aside)
    return folder / "report.html"


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _legend(figure: Figure, ink: str) -> list[Any]:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], label=model.name, **model.style()) for model in figure.legend]
    if figure.noise:
        handles.append(Line2D([], [], label="white noise", linestyle=":", linewidth=1.2, color=ink))
    return handles


def save_for_print(figure: Figure, folder: Path) -> None:
    """Save the figure for print, 7 inches wide (two columns), as KEY.png with 300 dpi and KEY.svg."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    ink = "#222222"
    columns = min(len(figure.panels), 3 if len(figure.panels) != 4 else 2)
    rows = -(-len(figure.panels) // columns)
    with matplotlib.rc_context(figure_settings(ink) | {"svg.hashsalt": figure.key, "svg.fonttype": "path"}):
        handles = _legend(figure, ink)
        per_row = (
            len(handles) if len(handles) < 4 else min(4, -(-len(handles) // 2))
        )  # a model above its initial values
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
        canvas.set_layout_engine("none")  # the layout of the PNG stays
        save(canvas, folder / f"{figure.key}.svg", metadata={"Date": None})


# -- The page ---------------------------------------------------------------------------------------------------------


def _panel(figure: Figure, number: int) -> Drawing:
    panel = figure.panels[number]
    label = f"{figure.title}: {panel.title}".removesuffix(": ")
    return draw_inline(f"{figure.key}{number}", panel.draw, panel.title, label)


def _page(compared: Comparison, drawn: Sequence[Figure], data: str, command: str) -> bytes:
    measured = compared.measured
    missing = [f"{model.name}: no {text}" for model in measured if not model.is_initial for text in model.missing]
    all_maps = [maps for model in measured for maps in model.image_maps]
    count = measured[0].analysis.images
    return render(
        "analysis/report.html.j2",
        names=_names(measured),
        count=f"{count:,} image{'s' * (count > 1)}",
        data=data,
        sources=[model.loaded.provenance for model in measured],
        faults=faults(measured),
        findings=sentences(measured),
        layer_table=(*layer_table(measured), "frequencies and heads", LAYER_TABLE),
        token_table=(*token_table(measured), "class token, attention and tokens", TOKEN_TABLE),
        missing=[*compared.left_out, *missing],
        figures=[(figure, [_panel(figure, i) for i in range(len(figure.panels))]) for figure in drawn],
        images=_gallery([model for model in measured if model.image_maps]),
        has_rollout=any(maps.rollout is not None for maps in all_maps),
        has_grad_cam=any(maps.grad_cam is not None for maps in all_maps),
        command=command,
    )


def _names(measured: Sequence[AnalyzedModel]) -> str:
    names = [model.name for model in curves(measured) if not model.is_initial]
    return " and ".join((", ".join(names[:-1]), names[-1])) if len(names) > 1 else names[0]


# -- Single images ----------------------------------------------------------------------------------------------------


class _Tile(NamedTuple):
    """A small picture with a line of text below it, and a longer text for screen readers (`alt`)."""

    text: str
    alt: str
    picture: str  # address


class _ImageRows(NamedTuple):
    """Rows of tiles for one image: first the image itself, without a model's name, then one row per model."""

    name: str
    rows: list[tuple[str, list[_Tile]]]


def _gallery(measured: Sequence[AnalyzedModel]) -> list[_ImageRows]:
    """The tiles of each shown image; all `measured` models have image maps."""
    images = []
    largest = max(measured, key=lambda model: model.analysis.image_size, default=None)
    for i, (name, image, spectrum) in enumerate(largest.shown_images if largest else []):
        rows = [("", [_tile("input", name, image), _tile("its spectrum", name, heat_map(spectrum))])]
        for model in measured:
            shown, maps, about = model.shown_images[i].image, model.image_maps[i], f"{name}, {model.name}"
            tiles = [_tile("its input", about, shown)] if shown.shape != image.shape else []
            tiles += [_tile(f"energy {n}", about, heat_map(e.numpy())) for n, e in enumerate(maps.energy, start=1)]
            named = {"class token": maps.class_attention, "rollout": maps.rollout, "Grad-CAM": maps.grad_cam}
            tiles += [_tile(text, about, heat_over(shown, m.numpy())) for text, m in named.items() if m is not None]
            rows.append((model.name, tiles))
        images.append(_ImageRows(name, rows))
    return images


def _tile(text: str, about: str, pixels: Any) -> _Tile:
    """A tile of pixels (H, W, 3) in 0..1."""
    return _Tile(text, f"{text}: {about}", picture(pixels))
