"""The figures of a report, in order."""

from collections.abc import Sequence

from eit.analysis import accuracy_figures, attention_figures, frequency_figures, token_figures
from eit.analysis.analyzed_model import AnalyzedModel, curves
from eit.analysis.panels import Figure

FIGURES = (  # their keys
    "class_token",
    "share",
    "sweep",
    "parts",
    "transfer",
    "amplitude",
    "spectra",
    "smoothing",
    "distances",
    "diversity",
    "filter",
    "attention",
    "uses",
    "robustness",
    "paired",
)


def figures(measured: Sequence[AnalyzedModel]) -> list[Figure]:
    """All that the measurements have something to say to.

    Runs of one group are one curve, with a band of ± one standard deviation over the runs.
    """
    shown = curves(measured)
    chosen = [
        token_figures.class_token(shown),
        frequency_figures.share(shown),
        frequency_figures.sweep(shown),
        frequency_figures.parts(shown),
        frequency_figures.transfer(shown),
        frequency_figures.amplitude(shown),
        frequency_figures.spectra(shown),
        token_figures.smoothing(shown),
        attention_figures.distances(shown),
        attention_figures.head_diversity(shown),
        attention_figures.attention_filter(shown),
        attention_figures.class_mass(shown),
        accuracy_figures.uses(shown),
        accuracy_figures.band_noise_cost(shown),
        accuracy_figures.paired(measured),
    ]
    drawn = [figure for figure in chosen if figure is not None]
    if any(model.members for model in shown):
        for figure in drawn:
            if figure.key not in ("paired", "distances", "spectra"):
                figure.caption += " Several runs as one: mean, and a band of ± one standard deviation over the runs."
    return drawn
