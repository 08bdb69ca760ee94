"""The commands put together: the parser, exit status, and signals."""

import os
import signal
import sys
from typing import Annotated, Any, NoReturn

import typer

import eit
from eit.cli.analyze import analyze
from eit.cli.bench import bench
from eit.cli.convert import convert
from eit.cli.data import data
from eit.cli.demo import demo
from eit.cli.eval import evaluate
from eit.cli.export import export
from eit.cli.help import Group, Program
from eit.cli.lr import lr
from eit.cli.models import models
from eit.cli.output import drop_output, has_option, prepare_streams, print_error, use_options_of
from eit.cli.predict import predict
from eit.cli.push import push
from eit.cli.recipes import recipes
from eit.cli.report import report as report_run
from eit.cli.reproduce import reproduce
from eit.cli.train import finetune, train
from eit.errors import UserError, first_line, is_out_of_memory


class Commands(Group):
    """Exit status: 0 done, 2 the user's mistake, 130 or 143 stopped by a signal, 1 anything else."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, command, words = super().resolve_command(ctx, args)
        own: Any = command
        for word in words:
            if word not in getattr(own, "commands", {}):
                break
            own = own.commands[word]
        use_options_of(own)
        return name, command, words

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except (Exception, KeyboardInterrupt) as error:
            if (status := report(error)) is None:
                raise
            raise typer.Exit(status) from None


def report(error: BaseException) -> int | None:
    """Print one line for the error; return the exit status, or None for a fault in this code and for typer's Exit."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, UserError):
        print_error(error)
        return 2
    if hasattr(error, "format_message"):  # of the parser
        message = error.format_message().rstrip(".").replace("Value error, ", "")  # which pydantic adds
        message = message.replace("Input should", "it should")
        print_error(UserError(message + _hint(error)))
        return 2
    if isinstance(error, OSError):
        try:
            sys.stdout.flush()
        except OSError as fault:
            drop_output()
            if isinstance(fault, BrokenPipeError):  # `eit models | head -1`
                return 1
            error = OSError(fault.errno, f"{fault.strerror}: the output is not whole")
        print_error(
            OSError(f"{error.filename}: {error.strerror}" if error.filename else error.strerror or first_line(error))
        )
        return 1
    if isinstance(error, FloatingPointError):
        print_error(error)
        return 1
    if line := _known_failure(error):
        print_error(RuntimeError(line))
        return 1
    return None


# Packages whose errors are about the user's input, the network or the machine, if no code of ours has explained them
OTHERS = {
    *("httpx", "httpx2", "huggingface_hub", "jinja2", "onnxruntime", "PIL", "pydantic_core", "requests", "safetensors"),
    *("safetensors_rust", "tarfile", "urllib3", "webdataset", "yaml", "zipfile", "zlib"),
}


def _known_failure(error: BaseException) -> str | None:
    """One line for an error of another package that needs no traceback; None for any other error."""
    assert isinstance(error, Exception)
    if is_out_of_memory(error):
        smaller = " or ".join(option for option in ("--batch-size", "--size") if has_option(option))
        advice = f"give a smaller {smaller}" if smaller else "end other programs, or take a larger machine"
        return f"out of memory: {advice}"
    if "DataLoader worker" in str(error):
        hint = "it was killed, or memory or /dev/shm ran out: try fewer data.workers"
        return f"a loader process died ({str(error).splitlines()[0].rstrip('. ')}); {hint}"
    if "Too many open files" in str(error) or "received 0 items of ancdata" in str(error):
        return "too many open files: raise the limit (ulimit -n 4096), or use fewer loader processes"
    if type(error).__name__.startswith("Dist") or "gloo" in str(error):  # torch's DistError and its subclasses
        return "another process of this run ended; its own error line says why"
    if type(error).__module__.partition(".")[0] in OTHERS:
        return f"{first_line(error)} ({type(error).__module__.partition('.')[0]}: {type(error).__name__})"
    return None


app = Program(
    cls=Commands,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="""EIT: a vision transformer with a decreasing share of convolution (arXiv 2203.07116).

    \b
    eit train digits                       train a small model
    eit predict runs/digits 7.png          predict images
    eit demo                               try models on a local page
    """,
)


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        print(f"eit {eit.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


# In the order in which `eit -h` lists them
app.command()(train)
app.command()(finetune)
app.command(name="eval")(evaluate)
app.command()(predict)
app.command(name="report")(report_run)
app.command()(demo)
app.command()(export)
app.command()(push)
app.command()(analyze)
app.command()(bench)
app.command()(lr)
app.command()(convert)
app.add_typer(reproduce, name="reproduce")
app.add_typer(models, name="models")
app.add_typer(recipes, name="recipes")
app.add_typer(data, name="data")


def main() -> None:
    prepare_streams()
    # Until training has its own handler, Ctrl-C ends at once: an exception in the middle of an import would be lost.
    signal.signal(signal.SIGINT, _interrupted)
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()  # of the help, which is printed before a command is invoked
    except Exception as error:
        status = report(error)
        if status is None:
            sys.excepthook(type(error), error, error.__traceback__)
            status = 1
    _leave(status or 0)


def _hint(error: Any) -> str:
    """What to do about an error of the parser."""
    if (context := getattr(error, "ctx", None)) is None:
        return ""
    if context.info_name in ("train", "finetune") and "No such option" in error.format_message():
        return "; settings are key=value, such as train.epochs=2"
    return f"; see {context.command_path} -h"


def _leave(status: int) -> NoReturn:
    """End the process. Where it failed next to other ranks, end it at once: NCCL would wait for them, and torchrun for
    this process."""
    distributed = sys.modules.get("eit.distributed")
    if distributed is not None and distributed.is_group():
        if status:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        distributed.stop()
    sys.exit(status)


def _interrupted(*_: object) -> None:
    os.write(2, b"eit: interrupted\n")
    os._exit(130)
