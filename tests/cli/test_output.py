"""What reaches the user: any name on any stream, one line for each error, in the words of the command."""

import ast
import io
import os
import sys
import zipfile
from typing import get_type_hints

import pytest
import typer
import typer.testing
import yaml
from pydantic import TypeAdapter
from pydantic import ValidationError as PydanticError

from eit.cli import output
from eit.cli.app import app, report
from eit.cli.options import file_to_write, folder_to_write
from eit.cli.train import summary_text
from eit.console import Messages
from eit.errors import UserError
from eit.files import expand_path
from eit.inference.evaluation_data import evaluation_config
from eit.weights.load import find_weights, read_card

COMMANDS = typer.main.get_command(app)


def leaves(command, path=""):
    """(words, command) of every command."""
    if not hasattr(command, "commands"):
        return [(path.strip(), command)]
    return [leaf for name, inner in command.commands.items() for leaf in leaves(inner, f"{path} {name}")]


LEAVES = dict(leaves(COMMANDS))
PATHS = ("PATH", "FILE", "FOLDER", "CKPT", "IMAGE...", "IN", "OUT", "ARCHIVES", "RECIPE", "RUN_FOLDER", "MODEL...")


@pytest.fixture
def options_of():
    yield lambda name: output.use_options_of(LEAVES[name])
    output._options.clear()


def callbacks(app):
    for group in app.registered_groups:
        yield from callbacks(group.typer_instance)
    yield from (command.callback for command in app.registered_commands)


@pytest.mark.parametrize("command", list(callbacks(app)), ids=lambda command: command.__name__)
def test_every_path_of_every_command_may_begin_with_the_home_folder(command):
    for name, kind in get_type_hints(command, include_extras=True).items():
        for note in getattr(kind, "__metadata__", ()):
            assert note.metavar not in PATHS or note.parser is expand_path, name


# -- Streams


@pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii", "utf-8", "koi8-r", "utf-16"])
@pytest.mark.parametrize("text", ["犬", "caf\u00e9 \u0394", "a\udcff.png", "\N{REPLACEMENT CHARACTER}"])
def test_any_name_can_be_printed(monkeypatch, encoding, text):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    output.prepare_streams()
    for stream in streams.values():
        print(text, file=stream, flush=True)
        assert stream.buffer.getvalue()


def test_names_that_are_not_utf8_can_be_read(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff.png\nb"), encoding="utf-8"))
    output.prepare_streams()
    assert [os.fsencode(line) for line in sys.stdin.read().splitlines()] == [b"a\xff.png", b"b"]


def test_closed_streams_are_empty_or_lose_what_is_written(monkeypatch):
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    output.prepare_streams()
    assert sys.stdin.read() == ""
    for stream in (sys.stdout, sys.stderr):
        print("lost", file=stream, flush=True)
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()


class Broken(io.StringIO):
    error = BrokenPipeError(32, "Broken pipe")

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error")])
def test_the_work_goes_on_if_nobody_reads_its_messages(monkeypatch, error):
    stream = Broken()
    stream.error = error
    messages = Messages(file=stream)
    messages.print("epoch 1")
    messages.print("epoch 2")
    monkeypatch.setattr(sys, "stderr", stream)
    output.print_error(UserError("x"))


# -- Errors


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a\nb"), 2, "eit: a b"),
        (FileNotFoundError(2, "No such file or directory", "x y"), 1, "eit: x y: No such file or directory"),
        (OSError(28, "No space left on device"), 1, "eit: No space left on device"),
        (OSError("checkpoint c was not written"), 1, "eit: checkpoint c was not written"),
        (OSError(24, "Too many open files"), 1, "eit: Too many open files"),
        (RuntimeError("received 0 items of ancdata"), 1, "eit: too many open files: raise the limit (ulimit -n 4096)"),
        (FloatingPointError("the loss is nan"), 1, "eit: the loss is nan"),
        (raised(lambda: yaml.safe_load("a: [")), 1, "eit: while parsing a flow node (yaml: ParserError)"),
        (raised(lambda: TypeAdapter(int).validate_python("x")), 1, "eit: 1 validation error for int (pydantic_core:"),
        (raised(lambda: zipfile.ZipFile(io.BytesIO(b"no"))), 1, "eit: File is not a zip file (zipfile: BadZipFile)"),
        (MemoryError(), 1, "eit: out of memory: end other programs"),
        (KeyboardInterrupt(), 130, ""),
        (KeyError("a fault of this package"), None, ""),
        (typer.Exit(3), None, ""),
    ],
)
def test_errors_are_one_line(capsys, error, status, line):
    assert report(error) == status
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == bool(line)
    assert isinstance(raised(lambda: TypeAdapter(int).validate_python("x")), PydanticError)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (BrokenPipeError(32, "Broken pipe"), ""),
        (OSError(28, "No space left on device"), "eit: No space left on device: the output is not whole\n"),
    ],
)
def test_output_that_cannot_be_written_is_no_traceback(monkeypatch, capfd, error, line):
    stream = Broken()
    stream.error = error
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert report(error) == 1
    assert capfd.readouterr().err == line


# -- The words of the command

LARGE = "x.png: 9x9 is more than data.max_pixels=5 allows; to read it, set data.max_pixels=81"


@pytest.mark.parametrize(
    ("command", "text", "said"),
    [
        ("predict", LARGE, "x.png: 9x9 is more than --max-pixels 5 allows; to read it, set --max-pixels 81"),
        ("data check", LARGE, "x.png: 9x9 is more than --max-pixels 5 allows; to read it, set --max-pixels 81"),
        ("train", LARGE, LARGE),
        ("data show", LARGE, LARGE),
        ("eval", "data.root is not set: data.root=PATH, a folder", "--data is not set: --data PATH, a folder"),
        ("eval", "try fewer data.workers", "try fewer --workers"),
        ("data check", "no val/: set data.val_fraction=0.1", "no val/: set --val-fraction 0.1"),
        ("data check", "left; set data.pixel_range=[0,4095]", "left; set --pixel-range 0 4095"),
        ("train", "left; set data.pixel_range=[0,4095]", "left; set data.pixel_range=[0,4095]"),
        ("eval", "data.root=[a,b] is not a folder", "--data [a,b] is not a folder"),
        ("eval", "data.root=[a,b]c is not a folder", "--data [a,b]c is not a folder"),
        ("data check", "data.root=gone is not a folder", "gone is not a folder"),
        ("analyze", "train.device=cuda:7 is not there", "--device cuda:7 is not there"),
        ("predict", "metadata.root and data.other=1", "metadata.root and data.other=1"),
    ],
)
def test_messages_name_the_option_that_the_command_has(options_of, command, text, said):
    options_of(command)
    assert output.name_options(text) == said


def test_lack_of_memory_names_options_that_are_there(options_of, capsys):
    for command, advice in (
        ("bench", "a smaller --batch-size or --size"),
        ("eval", "--batch-size"),
        ("predict", "end other"),
    ):
        options_of(command)
        report(MemoryError())
        assert advice in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["my run", "a'b", "$x", "犬 1"])
def test_suggested_commands_quote_paths(folder):
    import shlex

    summary = dict(last_top1=1.0, epochs=1, best_top1=1.0, best_epoch=0, folder=folder, report=None)
    assert folder in shlex.split(summary_text(summary).splitlines()[-1])


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a b", "犬"])
def test_the_line_of_python_after_push_is_quoted(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output, "_options", set())  # put back at the end
    done = typer.testing.CliRunner().invoke(app, ["push", "digits", "--to", name])
    called = ast.parse(done.output.rpartition("next: ")[2].partition(", after")[0]).body[0].value
    assert called.args[0].value == f"local-dir:{name}"


@pytest.mark.parametrize("name", ["", " ", "\t"])
def test_an_empty_name_is_not_the_current_folder(monkeypatch, tmp_path, name):
    monkeypatch.chdir(tmp_path)
    for call in (folder_to_write, file_to_write):
        with pytest.raises(UserError, match="--out '': it is empty; give a name"):
            call(name, "--out")
    with pytest.raises(UserError, match="no weights are named"):
        find_weights(name)
    for given in (dict(data=name), dict(dataset=name)):
        with pytest.raises(UserError, match="it is empty; leave it out"):
            evaluation_config(read_card("digits"), **given)


def test_a_picture_that_cannot_be_drawn_is_refused_before_anything_is_computed(monkeypatch, tmp_path):
    def fail(name):
        raise ValueError("Key backend: 'bogus' is not a valid value")

    monkeypatch.setattr("eit.cli.options.importlib.import_module", fail)
    with pytest.raises(UserError, match="--confusion .*png: Matplotlib cannot be imported: Key backend"):
        file_to_write(str(tmp_path / "c.png"), "--confusion", ".csv")
    assert file_to_write(str(tmp_path / "c.csv"), "--confusion", ".csv")
