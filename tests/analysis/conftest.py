"""Reports whose figures are not drawn: drawing takes most of the time of a report."""

import pytest
from markupsafe import Markup

from eit.analysis import report
from eit.pages.render import Drawing


@pytest.fixture
def no_figure_files(monkeypatch):
    """Figures are drawn in the page alone."""
    monkeypatch.setattr(report, "save_for_print", lambda figure, folder: None)


@pytest.fixture
def no_figures(no_figure_files, monkeypatch):
    """The page has each figure with its caption, and nothing in it."""
    monkeypatch.setattr(report, "_panel", lambda *_: Drawing("", "", "0 0 1 1", Markup()))
