"""Pictures: curves of a run, confusion matrices, image grids, published results. Matplotlib is imported when needed."""

import io
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eit.console import say
from eit.errors import UserError, shorten
from eit.files import write_file

PICTURES = (".png", ".pdf", ".svg")


def curves(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Loss and top-1 by epoch, from the lines of a run's log."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=100)
    figure.subplots_adjust(
        left=0.06, right=0.98, bottom=0.14, top=0.9, wspace=0.15
    )  # a layout solver would cost 0.1 s per epoch
    left, right = figure.subplots(1, 2)
    epochs = [line["epoch"] + 1 for line in lines]
    series = [
        (left, "train_loss", "training (augmented)", "#0072b2"),
        (left, "val_loss", "validation", "#d55e00"),
        (right, "val_top1", "weights", "#d55e00"),
        (right, "ema_top1", "moving average", "#009e73"),
    ]
    for axis, key, label, colour in series:
        values = [line.get(key) for line in lines]
        if any(value is not None for value in values):
            axis.plot(epochs, values, label=label, color=colour, marker="." if len(lines) < 40 else None)
    for axis, title in ((left, "loss"), (right, "validation top-1 (%)")):
        axis.set(xlabel="epoch", title=title)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend(frameon=False)
    save(figure, file)


def lr_curve(rates: Sequence[float], losses: Sequence[float], suggestion: float, file: Path) -> None:
    """Loss by learning rate, of `eit lr`, with the suggested rate."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.4), dpi=100, layout="constrained")
    axis = figure.subplots()
    axis.plot(rates, losses, color="#0072b2")
    axis.axvline(suggestion, color="#d55e00", linestyle="--", label=f"suggestion {suggestion:.1e}")
    axis.set(xscale="log", xlabel="learning rate", ylabel="training loss (moving average)")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    save(figure, file)


def confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], file: Path) -> None:
    """Draw a confusion matrix, counts[truth][prediction], as .png, .pdf or .svg.

    The colour is the share of the row. Up to 20 classes have counts in the cells, up to 40 have names at the axes.
    """
    import numpy as np
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    table = np.array(counts)
    assert table.shape == (len(classes), len(classes))
    totals = table.sum(axis=1, keepdims=True)
    shares = table / np.maximum(totals, 1)
    n = len(classes)
    inches = max(2.4, 0.5 * n) if n <= 20 else max(8, 0.24 * n) if n <= 40 else 7.5
    figure = Figure(
        figsize=(inches + 2.4, inches + 1.6), dpi=min(max(100, n // 6), 400)
    )  # at least one pixel per class
    axis = figure.subplots()
    # The square root makes confusions of a few percent visible.
    image = axis.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 1), interpolation="none" if n <= 40 else "nearest")
    axis.set_xlabel("prediction")
    axis.set_ylabel("truth")
    axis.set_title(
        f"top-1 {100 * table.trace() / max(table.sum(), 1):.2f}% of {table.sum():,} images", fontsize="medium"
    )
    bar = figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03, ticks=[0, 0.01, 0.05, 0.1, 0.2, 0.5, 1])
    bar.ax.set_yticklabels(["0", "1%", "5%", "10%", "20%", "50%", "100%"])
    bar.set_label("share of the true class")
    if n <= 40:
        names = [shorten(name, 24) for name in classes]
        upright = max(map(len, names)) > 3
        axis.set_xticks(range(n), names, parse_math=False, rotation=90 if upright else 0)
        axis.set_yticks(range(n), names, parse_math=False)
        axis.tick_params(length=0, labelsize="small")
    if n <= 20:
        size = min(9.0, 36 / (0.65 * len(str(table.max()))))  # points; a cell is 36 wide
        for (row, column), count in np.ndenumerate(table):
            colour = "white" if shares[row, column] > 0.4 else "black" if count else "#bbbbbb"
            axis.text(column, row, str(count), ha="center", va="center", fontsize=size, color=colour)
    save(figure, file, bbox_inches="tight")


class Tile(NamedTuple):
    """An image, (height, width, 3 or 1) in 0..1, and the text below it."""

    pixels: Any
    label: str


def grid(sections: Sequence[tuple[str, Sequence[Tile]]], file: Path, columns: int = 8) -> None:
    """Images in rows, in sections with titles."""
    from matplotlib.figure import Figure

    rows = [-(-len(tiles) // columns) for _, tiles in sections]
    inch = 1.5
    figure = Figure(figsize=(inch * columns, (inch + 0.25) * sum(rows) + 0.5 * len(sections)), dpi=110)
    parts = figure.subfigures(len(sections), 1, height_ratios=[n * (inch + 0.25) + 0.5 for n in rows], squeeze=False)
    for part, (title, tiles), n in zip(parts[:, 0], sections, rows, strict=True):
        height = n * (inch + 0.25) + 0.5
        part.suptitle(title, fontsize="large", y=1 - 0.1 / height, va="top", parse_math=False)
        axes = part.subplots(n, columns, squeeze=False).ravel()
        part.subplots_adjust(0.01, 0.27 / height, 0.99, 1 - 0.45 / height, wspace=0.06, hspace=0.25)
        for axis in axes:
            axis.set_axis_off()
        for axis, tile in zip(axes, tiles, strict=False):
            grey = tile.pixels.shape[2] == 1
            axis.imshow(tile.pixels[..., 0] if grey else tile.pixels, cmap="gray", vmin=0, vmax=1)
            name = shorten(tile.label, 28)
            size = min(8.0, 8 * 22 / max(len(name), 1))
            axis.text(
                0.5, -0.03, name, transform=axis.transAxes, ha="center", va="top", fontsize=size, parse_math=False
            )
    save(figure, file)


class Point(NamedTuple):
    """A model: parameters in millions, multiply-accumulates in G, ImageNet-1K top-1 in percent."""

    family: str
    model: str
    params_m: float
    gmacs: float
    top1: float
    pyramid: bool
    measured: bool = False


def results(points: Sequence[Point], file: Path, highlight: str = "EIT", **options: Any) -> None:
    """Draw top-1 against parameters and against multiply-accumulates: one line per family.

    Lines of families without a pyramid are dashed. Published results are hollow, measured results filled.
    `options` are those of `save`.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(14.5, 6.6), dpi=110)
    panels = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(left=0.045, right=0.86, bottom=0.085, top=0.975, wspace=0.04)
    families = sorted({p.family for p in points}, key=lambda name: (name != highlight, name))
    palette = [colormaps["tab20"](i) for i in (2, 4, 8, 10, 12, 16, 18, 3, 5, 9, 11, 13, 17, 19, 14, 6, 15, 7)]
    colours = {name: "#0057b8" if name == highlight else palette[i % len(palette)] for i, name in enumerate(families)}
    handles = []
    for name in reversed(families):
        own = [p for p in points if p.family == name]
        ours, colour, dash = name == highlight, colours[name], "-" if own[0].pyramid else (0, (4, 2))
        order, width = (5, 2.6) if ours else (2, 1.3)
        for axis, key in zip(panels, ("params_m", "gmacs"), strict=True):
            line = sorted([p for p in own if not p.measured] or own, key=lambda p: getattr(p, key))
            x, y = [getattr(p, key) for p in line], [p.top1 for p in line]
            axis.plot(x, y, color=colour, linestyle=dash, linewidth=width, zorder=order)
            for p in own:
                place = getattr(p, key), p.top1
                fill, size = colour if p.measured else "white", 40 if ours else 22
                axis.scatter(*place, s=size, facecolors=fill, edgecolors=colour, zorder=order + 1 + p.measured)
                if ours and not p.measured:
                    axis.annotate(p.model, place, (7, -13), textcoords="offset points", fontsize=9, color=colour)
        handles.append(Line2D([], [], color=colour, linestyle=dash, linewidth=width, label=name))
    ticks: tuple[list[float], ...] = ([2, 3, 5, 10, 20, 30, 50, 100], [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20])
    labels = ("parameters (millions)", "multiply-accumulates of one 224x224 image (G)")
    for axis, marks, label in zip(panels, ticks, labels, strict=True):
        axis.set_xscale("log")
        axis.set_xticks(marks, [f"{mark:g}" for mark in marks])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_xlabel(label)
        axis.grid(alpha=0.25, which="major")
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("ImageNet-1K top-1 (%)" + ("" if any(p.measured for p in points) else ", as published"))
    handles.reverse()
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=(0.868, 0.985), frameon=False, fontsize=9)
    styles = (("-", "pyramid"), ((0, (4, 2)), "no pyramid"))
    note = [Line2D([], [], color="#555555", linestyle=dash, label=text) for dash, text in styles]
    if any(p.measured for p in points):
        note.append(Line2D([], [], color="#777777", marker="o", linestyle="", label="measured here"))
    figure.legend(handles=note, loc="lower left", bbox_to_anchor=(0.868, 0.07), frameon=False, fontsize=9)
    save(figure, file, **options)


class Bar(NamedTuple):
    """A measurement: median, least and most. `group` gives the colour, `pale` a lighter shade of it."""

    group: str
    label: str
    value: float
    low: float
    high: float
    note: str
    pale: bool


class Panel(NamedTuple):
    """Bars that share an axis."""

    title: str
    bars: Sequence[Bar]


def bars(panels: Sequence[Panel], file: Path) -> None:
    """Horizontal bars in panels, one below another, with whiskers from least to most and a note for each bar."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    every = [bar for panel in panels for bar in panel.bars]
    groups = list(dict.fromkeys(bar.group for bar in every))
    colours = {group: colormaps["tab10"](i % 10) for i, group in enumerate(groups)}
    rows = sum(
        len(panel.bars) + 2.2 for panel in panels
    )  # the title and the axis of a panel need the height of two bars
    names = {bar: shorten(f"{bar.group}  {bar.label}", 48) for bar in every}
    width, margin = 10.0, 0.2 + 0.066 * max(map(len, names.values()))  # inches
    figure = Figure(figsize=(width, 0.27 * rows), dpi=110)
    top = rows
    for panel in panels:
        n = len(panel.bars)
        axis = figure.add_axes((margin / width, (top - n - 1.1) / rows, 0.8 - margin / width, n / rows))
        top -= n + 2.2
        for y, bar in enumerate(panel.bars):
            colour, spread = colours[bar.group], [[bar.value - bar.low], [bar.high - bar.value]]
            axis.barh(
                y, bar.value, 0.74, color=colour, alpha=0.55 if bar.pale else 1, xerr=spread, error_kw=dict(capsize=2)
            )
            axis.annotate(bar.note, (bar.high, y), (5, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(range(n), [names[bar] for bar in panel.bars], parse_math=False, fontsize=8)
        axis.set_ylim(n - 0.4, -0.6)
        axis.set_xlim(0, None)
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(panel.title, loc="left", fontsize=10, pad=3)
    save(figure, file)


def save(figure: Any, file: Path, **options: Any) -> None:
    """Write the picture whole or not at all; the suffix chooses the format."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    picture, form = io.BytesIO(), file.suffix[1:].lower()
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", "Glyph .* missing", UserWarning)
        if form in ("png", "svg") and "bbox_inches" not in options:
            figure.set_dpi(options.pop("dpi", figure.dpi))
            draw_once(figure, form, picture, **options)
        else:
            FigureCanvasAgg(figure)
            figure.savefig(picture, format=form, **options)
    try:
        write_file(file, picture.getvalue())
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}") from None
    missing = set()
    for warning in caught:
        if found := re.match(r"Glyph (\d+) .* missing", str(warning.message)):
            missing.add(chr(int(found[1])))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if new := sorted(missing - _missing_letters):
        _missing_letters.update(new)
        say(f"{file}: the font lacks {len(new)} letters of the names ({''.join(new[:10])}); boxes are drawn instead")


def draw_once(figure: Any, form: str, file: Any, **options: Any) -> None:
    """Write a PNG or SVG in half the time of figure.savefig, which draws once for the layout and once for the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    canvas = FigureCanvasAgg(figure) if form == "png" else FigureCanvasSVG(figure)
    getattr(canvas, f"print_{form}")(file, **options)


_missing_letters: set[str] = set()  # that a line was printed about
