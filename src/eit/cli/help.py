"""The format of `eit COMMAND --help`: plain text in 80 columns, one plain name for each value, options in groups."""

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

FEW = 8  # options that need no groups
OTHERS = "Options"
GROUPS = {
    "Images": ("--data", "--dataset", "--split", "--images", "--size", "--crop-ratio", "--flip", "--max-pixels"),
    "Measurements": (
        *("--mode", "--naive", "--memory", "--rounds", "--pictures", "--bands", "--filters", "--rollout", "--grad-cam"),
        *("--initial", "--rho", "--renormalize"),
    ),
    "Preprocessing": ("--mean", "--std", "--interpolation", "--like"),
    "Quantisation": ("--int8", "--max-drop"),
    "Computing": ("--precision", "--runtime", "--batch-size", "--workers", "--threads", "--keep-freed", "--device"),
    "Output": ("--format", "--out", "--confusion", "--json"),
}
GROUP_OF = {option: group for group, options in GROUPS.items() for option in options}


def _name(parameter: Any) -> str:
    """`FILE`, `IMAGE...`, `--top N`, `--initial / --no-initial`."""
    value = parameter.metavar or parameter.name.upper()
    if parameter.param_type_name == "argument":
        return value if parameter.nargs == 1 or value.endswith("...") else f"{value}..."
    options = ", ".join(sorted(parameter.opts, key=len))
    if parameter.secondary_opts:
        return f"{options} / {', '.join(parameter.secondary_opts)}"
    return options if parameter.is_flag else f"{options} {value}"


def _help(parameter: Any) -> str:
    default = getattr(parameter.default, "value", parameter.default)
    notes = ""
    if parameter.param_type_name == "option" and parameter.required:
        notes = "  [required]"
    elif getattr(parameter, "secondary_opts", None):
        notes = f"  [default: {(parameter.opts if default else parameter.secondary_opts)[0]}]"
    elif parameter.show_default and default is not None and not getattr(parameter, "is_flag", False):
        notes = f"  [default: {default}]"
    return (parameter.help or "") + notes


def _format_options(command: Any, context: Any, formatter: Any) -> None:
    """Write the arguments, then the options. A long list of options is divided into groups, with `OTHERS` last."""
    shown = [p for p in command.get_params(context) if not p.hidden]
    options = [p for p in shown if p.param_type_name == "option"]
    sections: dict[str, list[Any]] = {title: [] for title in ("Arguments", *GROUPS, OTHERS)}
    for parameter in shown:
        group = GROUP_OF.get(parameter.opts[0], OTHERS) if len(options) > FEW else OTHERS
        sections["Arguments" if parameter.param_type_name == "argument" else group].append(parameter)
    for title, parameters in sections.items():
        if parameters:
            with formatter.section(title):
                formatter.write_dl([(_name(p), _help(p)) for p in parameters])


class Command(TyperCommand):
    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        shown: list[Any] = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return ["[OPTIONS]", *(_name(p) if p.required else f"[{_name(p)}]" for p in shown)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _format_options(self, ctx, formatter)


class Group(TyperGroup):
    def format_options(self, ctx: Any, formatter: Any) -> None:
        _format_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)


class Program(typer.Typer):
    """Commands with this help."""

    def __init__(self, cls: type[TyperGroup] = Group, **options: Any) -> None:
        super().__init__(cls=cls, rich_markup_mode=None, **options)

    def command(self, name: str | None = None, **options: Any) -> Any:
        return super().command(name, cls=Command, **options)
