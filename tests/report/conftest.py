"""A run with names that attack a page, and its pages."""

import pytest

from eit.config import load_recipe
from eit.training.trainer import train
from tests.helpers.images import save_digits
from tests.helpers.training import TINY

NAMES = ["<img src=x onerror=alert(1)>", "\"'><b>&amp;{{ 7*7 }}", "evil\u202egnp", "long" * 60]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with data/ and the finished run runs/tiny."""
    folder = tmp_path_factory.mktemp("pages")
    save_digits(folder / "data", classes=len(NAMES))
    for part in ("train", "val"):
        for number, name in enumerate(NAMES):
            (folder / "data" / part / f"digit{number}").rename(folder / "data" / part / name)
    first = folder / "data" / "val" / NAMES[0]
    (first / "000.png").rename(first / "<script>alert(2)<\u202e.png")
    train(load_recipe("cifar10", [*TINY, f"data.root={folder / 'data'}", f"out={folder / 'runs' / 'tiny'}"]))
    return folder
