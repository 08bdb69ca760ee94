"""List every error and warning that the package can print, with its place: python tools/list_messages.py [WORD]

A message is the text of an exception that is made, or of a call of `say`, `warn` or `print_error`. Values that are
filled in stand in braces. With WORD, only messages that contain it are listed.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "eit"
CALLS = ("say", "warn", "print_error", "same_everywhere")


def messages(file: Path) -> Iterator[tuple[int, str, str]]:
    """(line, kind, text) of the messages of a module, in order. Text that is made elsewhere is its expression."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for node in sorted(calls, key=lambda node: node.lineno):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in CALLS or name in ("UnreadableImage", "Stopped") or name.endswith("Error"):
            yield node.lineno, name, " ".join(_text(argument) for argument in node.args)


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else f"{{{_inner(part)}}}" for part in node.values)
    return f"<{ast.unparse(node)}>"


def _inner(node: ast.expr) -> str:
    return ast.unparse(node.value) if isinstance(node, ast.FormattedValue) else ast.unparse(node)


def main(word: str = "") -> None:
    for file in sorted(SOURCE.rglob("*.py")):
        for line, kind, text in messages(file):
            if word in text:
                print(f"{file.relative_to(SOURCE)}:{line}: {kind}: {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
