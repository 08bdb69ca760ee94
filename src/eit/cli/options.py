"""Options and arguments that several commands share, with their checks and the shell's completion of them."""

import importlib
import os
import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from eit.cli.help import Group
from eit.cli.output import program
from eit.errors import UserError, shorten
from eit.files import expand_path

if TYPE_CHECKING:
    import torch

# -- Completion -------------------------------------------------------------------------------------------------------


def complete_recipe(incomplete: str) -> list[str]:
    """Names of the included recipes."""
    from eit.config import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


def complete_recipe_key(incomplete: str) -> list[str]:
    """Keys of a recipe; only the user knows their values."""
    from eit.config import recipe_keys

    return [f"{key}=" for key in recipe_keys() if key.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Names of the zoo, alone and with a family; timm's once `timm/` is typed."""
    from eit.models.registry import FAMILIES, MODELS, TIMM, VARIANTS

    names = [*MODELS, *(f"{family}/{name}" for family in FAMILIES for name in VARIANTS), TIMM]
    if incomplete.startswith(TIMM):
        import timm

        names = [TIMM + name for name in timm.list_models()]
    return [name for name in names if name.startswith(incomplete)]


# -- Types ------------------------------------------------------------------------------------------------------------


class Precision(StrEnum):
    """As `eit.precision.PRECISIONS`, which is not imported here, because it needs torch."""

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"
    fp16 = "fp16"


PrecisionOrAuto = Literal["auto", "fp32", "tf32", "bf16", "fp16"]

Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CKPT",
        parser=expand_path,
        help="A weights file, a run folder (its best.safetensors is used), the included weights digits, "
        "or hf-hub:USER/NAME.",
        show_default=False,
    ),
]
RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        parser=expand_path,
        help="An included recipe (eit recipes lists them), or PATH.yaml.",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Change a key of the recipe, such as train.epochs=100; eit recipes show RECIPE prints all keys.",
        show_default=False,
        autocompletion=complete_recipe_key,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Compute on auto, cpu, mps, cuda or cuda:N.")]
Workers = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, help="Number of loader processes; default: one per core, at most 16."),
]
MaxPixels = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="Refuse images of more pixels than N; default: the limit used in training."),
]
Size = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, max=4096, help="Input height and width in pixels; default: each model's own."),
]
ValFraction = Annotated[
    float | None,
    typer.Option(
        metavar="FRACTION",
        min=0,
        max=1,
        help="Hold out this share of train/ if there is no val/, as data.val_fraction does; default: none.",
    ),
]


# -- Checks -----------------------------------------------------------------------------------------------------------


class RedirectingGroup(Group):
    """A group of commands that answers a known wrong spelling with the right one."""

    def redirect(self, words: list[str]) -> list[str] | None:
        """What to type in place of `words`, the first of which is not a command; None if that is unknown."""
        return None

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and (right := self.redirect(list(args))):
            raise UserError(
                f"{ctx.command_path} {shlex.join(args)} is not a command: type {program()} {shlex.join(right)}"
            )
        return super().parse_args(ctx, args)


def refuse_before_command(context: typer.Context, **options: bool) -> None:
    """Raise a UserError if an option of the group alone is given before a command, which would ignore it."""
    if context.invoked_subcommand is not None and (given := [f"--{name}" for name, value in options.items() if value]):
        command = context.invoked_subcommand
        raise UserError(f"{context.command_path} {given[0]} {command}: put {given[0]} after {command}, or leave it out")


def file_to_write(name: str, option: str, also: str | None = None) -> Path:
    """The path of a picture, or of a file that ends in `also`, in a folder that exists.

    Raises:
        UserError: another ending, or no such folder; before anything is computed.
    """
    from eit.plots import PICTURES

    file = named_file(name, option, *PICTURES, *([also] if also else []))
    if file.suffix.lower() in PICTURES:
        try:
            importlib.import_module("matplotlib")
        except Exception as error:  # of its settings, such as MPLBACKEND
            raise UserError(f"{option} {name}: Matplotlib cannot be imported: {shorten(str(error), 120)}") from None
    return file


def named_file(name: str, option: str, *endings: str) -> Path:
    """The path of a file with one of these `endings`, in a folder that exists. Raises a UserError for another one."""
    _check_named(name, option)
    file = Path(name)
    if file.suffix.lower() not in endings:
        known = " or ".join(filter(None, (", ".join(endings[:-1]), endings[-1])))
        raise UserError(f"{option} {name}: give a file name that ends in {known}")
    if not file.parent.is_dir():
        raise UserError(f"{option} {name}: there is no folder {file.parent}; make it, or give another one")
    return file


def _check_named(name: str, option: str) -> None:
    """Raise a UserError for an empty name, as of a variable that is not set: it would be the current folder."""
    if not name.strip():
        raise UserError(f"{option} '': it is empty; give a name")


def folder_to_write(name: str, option: str) -> Path:
    """A folder that exists or can be made: checked before anything is computed, made once there is a result."""
    _check_named(name, option)
    folder = Path(name)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        reason = "read-only" if there.is_dir() else "a file"
        raise UserError(f"{option} {name} cannot be written: {there} is {reason}; give another folder")
    return folder


def device_for(checkpoint: str, device: str) -> str:
    """`device`, but the CPU for an exported file."""
    from eit.inference.exported_models import is_exported

    if not is_exported(checkpoint):
        return device
    if device not in ("auto", "cpu"):
        raise UserError(f"--device {device}: {checkpoint} runs on the CPU; leave --device out")
    return "cpu"


def start_alone(device: str, command: str) -> "torch.device":
    """The device of a command that runs in one process."""
    from eit.distributed import start, world_size

    found = start(device)
    if world_size() > 1:
        raise UserError(f"{command} runs in one process, torchrun started {world_size()}: start it without torchrun")
    return found
