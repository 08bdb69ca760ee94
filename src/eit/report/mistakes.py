"""The page of an evaluation: mistakes as pictures, confusions, calibration."""

from pathlib import Path
from typing import Any

from eit.data.images import Preprocessing
from eit.inference.evaluate import Metrics
from eit.pages.render import write_page
from eit.report.outcome import describe


def write_mistakes(
    file: Path, model: Any, metrics: Metrics, images: Any, view: Preprocessing, settings: dict[str, Any], command: str
) -> None:
    """Write the page of an evaluation that kept `outcome.MISTAKES` mistakes.

    Args:
        settings: checkpoint, data, precision and flip, as the command was given them.

    Raises:
        UserError: the file cannot be written.
    """
    outcome = describe(model, metrics, images, view)
    write_page(file, "report/mistakes.html.j2", outcome=outcome, size=view.size, command=command, **settings)
