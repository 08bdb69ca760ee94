"""The program as a whole: start, help, exit status, signals."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import eit
from eit.benchmark.bench import MODES, RUNTIMES
from eit.cli.bench import Mode, Runtime
from eit.cli.export import Format
from eit.cli.options import Precision, PrecisionOrAuto
from eit.export.exporter import SUFFIXES
from eit.precision import PRECISIONS
from tests.cli.conftest import failed
from tests.helpers.commands import run_eit


def test_version():
    assert run_eit("--version").stdout.strip() == f"eit {eit.__version__}"


def test_version_needs_no_torch():
    code = (
        "import sys; sys.argv = ['eit', '--version']; from eit.cli.app import app; app(standalone_mode=False); "
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_installed_command_is_this_one():
    command = Path(sys.executable).with_name("eit")
    assert subprocess.run([command, "--version"], capture_output=True, text=True).stdout.startswith("eit ")


def test_the_choices_of_options_are_those_of_the_package():
    """The command line names them again, for it starts without torch."""
    assert tuple(Precision) == PRECISIONS and get_args(PrecisionOrAuto) == ("auto", *PRECISIONS)
    assert tuple(Mode) == MODES and tuple(Runtime) == RUNTIMES and get_args(Format) == tuple(SUFFIXES)


def test_usage_errors_have_status_2():
    for words, message in (
        (["evaluate"], "No such command 'evaluate'"),
        (["predict"], "Missing argument 'CKPT'; see python -m eit predict -h"),
        (["eval", "x", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["train", "digits", "--momentum", "2"], "No such option: --momentum; settings are key=value"),
    ):
        error = failed(2, *words)
        assert message in error and error.startswith("eit: ") and "\n" not in error


def test_help_is_for_people():
    text = run_eit().stdout
    assert text == run_eit("-h").stdout
    assert all(name in text for name in ("train", "eval", "predict", "models", "recipes", "convert", "data"))
    assert "..." not in text.split("Commands")[1]


def test_lists_of_commands_have_whole_sentences():
    for name in ("reproduce", "data", "models", "recipes"):
        text = run_eit(name, "-h").stdout
        assert text.startswith(f"Usage: python -m eit {name} ") and "..." not in text.split("Commands")[1]


def test_ctrl_c_while_starting_ends_at_once(tmp_path):
    """Sent into the imports, where an exception would be swallowed by somebody's except."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "eit", "--version"], stdout=subprocess.DEVNULL, check=True)
    start = time.monotonic() - began  # the handler is there by then
    for factor in (1.2, 1.7, 2.5):
        words = [sys.executable, "-m", "eit", "train", "digits"]
        process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        time.sleep(factor * start)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert process.stderr.read() == "eit: interrupted\n"
