"""All figures of a report, in order."""

from collections.abc import Callable, Sequence

from eit.analysis import accuracy_figures, attention_figures, frequency_figures, token_figures
from eit.analysis.analyzed_model import AnalyzedModel, curves
from eit.analysis.panels import Figure

FIGURES: dict[str, Callable[[Sequence[AnalyzedModel]], Figure | None]] = {  # by the names of their files
    "class_token": token_figures.class_token,
    "share": frequency_figures.share,
    "sweep": frequency_figures.sweep,
    "parts": frequency_figures.parts,
    "transfer": frequency_figures.transfer,
    "amplitude": frequency_figures.amplitude,
    "spectra": frequency_figures.spectra,
    "smoothing": token_figures.smoothing,
    "distances": attention_figures.distances,
    "diversity": attention_figures.head_diversity,
    "filter": attention_figures.attention_filter,
    "attention": attention_figures.class_mass,
    "uses": accuracy_figures.filtered_accuracy,
    "robustness": accuracy_figures.band_noise_cost,
    "paired": accuracy_figures.paired,
}


def figures(measured: Sequence[AnalyzedModel]) -> list[Figure]:
    """All figures for which there are measurements.

    The runs of a group are shown as one curve, with a band of ± one standard deviation over the runs.
    """
    shown = curves(measured)
    chosen = [draw(measured if key == "paired" else shown) for key, draw in FIGURES.items()]
    drawn = [figure for figure in chosen if figure is not None]
    if any(model.members for model in shown):
        for figure in drawn:
            if figure.key not in ("paired", "distances", "spectra"):
                figure.caption += " For several runs: mean, and a band of ± one standard deviation over the runs."
    return drawn
