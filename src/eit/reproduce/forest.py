"""The forest plot on the page of claims: each difference in accuracy with its interval, one line per data set."""

import hashlib
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eit import plots
from eit.reproduce.experiment import Claim
from eit.reproduce.verdict import FAILS, HOLDS, Effect, Verdict

COLOURS = {HOLDS: "#0057b8", FAILS: "#d55e00"}
OTHER = "#777777"  # undecided, or not decided yet
WIDTH = 62  # characters per line of a claim


class Row(NamedTuple):
    """One interval of one claim."""

    claim: Claim
    verdict: Verdict
    effect: Effect


def digest(rows: Sequence[Row]) -> str:
    """A digest of everything that the figure shows."""
    shown = [(row.claim.says, row.claim.primary, row.claim.within, row.verdict.word, row.effect) for row in rows]
    return hashlib.sha256(repr(shown).encode()).hexdigest()[:16]


def draw_forest(rows: Sequence[Row], file: Path) -> None:
    """Draw the difference in points and its interval: one block per claim, one line per data set.

    A marker is filled if all planned runs are finished, otherwise hollow. The colour shows the claim's verdict. A grey
    band is the margin of an equivalence.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    y, ticks, labels = 0.0, [], []
    figure = Figure(dpi=110)
    axis = figure.add_subplot()
    for number, row in enumerate(rows):
        first = number == 0 or rows[number - 1].claim is not row.claim
        if first:
            mark = "" if row.claim.primary else "exploratory: "
            lines = textwrap.wrap(f"{mark}{row.claim.says}", WIDTH)
            y += 0.45 + 0.62 * len(lines)
            axis.text(
                -0.01, y - 0.55, "\n".join(lines), transform=axis.get_yaxis_transform(), ha="right", va="bottom",
                fontsize=8, weight="bold" if row.claim.primary else "normal", linespacing=1.15,
            )  # fmt: skip
        effect = row.effect
        assert effect.low is not None and effect.high is not None
        colour = COLOURS.get(row.verdict.word, OTHER)
        fill = colour if effect.judged and row.verdict.p is not None else "white"
        axis.plot([effect.low, effect.high], [y, y], color=colour, linewidth=1.6, zorder=3)
        shape = "D" if effect.data == "mean" else "o"
        axis.plot([effect.difference], [y], shape, color=colour, markerfacecolor=fill, markersize=5.5, zorder=4)
        if row.claim.equal:
            axis.fill_between([-row.claim.within, row.claim.within], y - 0.5, y + 0.5, color="#000000", alpha=0.08)
        ticks.append(y)
        labels.append(f"{effect.data.replace('_', ' ')}  {effect.runs[0]}, {effect.runs[1]}")
        y += 1
    figure.set_size_inches(10.2, 1.2 + 0.235 * y)
    axis.set_ylim(y - 0.3, -0.1)
    axis.axvline(0, color="#333333", linewidth=0.8, zorder=1)
    axis.set_yticks(ticks, labels, fontsize=7.5)
    axis.yaxis.tick_right()
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel(
        "difference in top-1 after the last epoch, points (95% interval; 90% for an equivalence)", fontsize=8.5
    )
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right", "left"]].set_visible(False)
    words = {HOLDS: COLOURS[HOLDS], FAILS: COLOURS[FAILS], "undecided, or runs are missing": OTHER}
    handles = [Line2D([], [], color=c, marker="o", markersize=5, label=word) for word, c in words.items()]
    axis.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False, fontsize=8)
    figure.subplots_adjust(
        left=0.44, right=0.845, top=1 - 0.42 / figure.get_figheight(), bottom=0.55 / figure.get_figheight()
    )
    plots.save(figure, file, metadata={"Software": None, "Description": digest(rows)})
