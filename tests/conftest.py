"""Settings that must come before torch is imported, and fixtures of several folders."""

import gc
import logging
import os
import subprocess

import pytest

# The processes of pytest -n have one thread each. They inherit the environment of the first one, which sets two.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from PIL import Image

from eit import plots
from eit.report import run as report_of_run
from tests.helpers.images import save_digits
from tests.helpers.shared import SHARED, require

gc.disable()  # imports make no garbage, and looking for it takes a third of their time
logging.getLogger("torch.__trace").disabled = True  # pytest would keep pages of it for each test that compiles
torch.set_num_threads(min(int(os.environ["OMP_NUM_THREADS"]), os.cpu_count() or 1))


CURVES, REPORT = plots.curves, report_of_run.write_after_training


def pytest_collection_finish():
    """What was imported stays: the collector need not walk through it."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def curves_of_one_pixel():
    """For runs in this process: drawing curves and report took three quarters of the time of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "curves", lambda lines, file: Image.new("RGB", (1, 1)).save(file))
        patch.setattr(report_of_run, "write_after_training", lambda run, device=None: None)
        yield


@pytest.fixture
def drawn_curves(monkeypatch):
    """Curves as users see them."""
    monkeypatch.setattr(plots, "curves", CURVES)


@pytest.fixture
def written_report(monkeypatch):
    """The page that follows training, as users see it."""
    monkeypatch.setattr(report_of_run, "write_after_training", REPORT)


@pytest.fixture(scope="session")
def cifar10(tmp_path_factory):
    """The CIFAR-10 ImageFolder of shared/data, unpacked."""
    archive = SHARED / "data" / "cifar10.tar.gz"
    require(archive.exists(), "shared/data/cifar10.tar.gz is not beside the checkout")
    folder = tmp_path_factory.mktemp("cifar10")
    subprocess.run(["tar", "xzf", archive, "-C", folder], check=True)
    return folder / "cifar10"


@pytest.fixture
def folder(tmp_path):
    return save_digits(tmp_path / "digits")
