"""A run trained by the command, and commands that fail."""

import pytest

from eit.cli import output
from tests.helpers.commands import run_eit
from tests.helpers.images import save_digits
from tests.helpers.training import TINY


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with data/ and runs/mine, trained by the command."""
    home = tmp_path_factory.mktemp("home")
    save_digits(home / "data")
    done = run_eit("train", "cifar10", "data.root=data", "name=mine", *TINY, cwd=home)
    assert done.returncode == 0, done.stderr
    assert "run folder runs/mine" in done.stdout and "next: python -m eit eval runs/mine" in done.stdout
    return home


def failed(status, *words, **options):
    """The error of a command that ends with `status`."""
    done = run_eit(*words, **options)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


def assert_mistake(folder, words, said):
    """That a command in an empty folder ends with status 2 and one line with each of `said`, and writes nothing."""
    error = failed(2, *words, cwd=folder)
    assert error.startswith("eit: ") and "\n" not in error
    assert not [part for part in said if part not in error], error
    assert not any(folder.iterdir())


@pytest.fixture(autouse=True)
def no_options(monkeypatch):
    """A command that a test before ran in this process has left its options, which errors would name."""
    monkeypatch.setattr(output, "_options", set())
