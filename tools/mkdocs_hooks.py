"""For mkdocs: README.md is the index, and links between files of the repository hold on the site too.

The pages are written for readers of the repository. Here a link to a page becomes a link to its place on the site. A
file that is linked or shown (results/, src/) is copied. A link to a folder becomes one to its report.html if there is
one, otherwise only the name of the folder. commands.md gets the help of every command.
"""

import re
from collections.abc import Iterator
from os.path import dirname, join, normpath, relpath
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from eit.cli.app import app

ROOT = Path(__file__).parents[1]
COMMANDS = "<!-- commands -->"  # stands for the help of every command
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
MOVED = {"README.md": "index.md"} | {name: name for name in OUTSIDE}  # pages outside docs/ -> on the site
# Code, which stays as it is, or a link or an image to a path: mark, text, path, anchor
LINK = re.compile(r"^```.*?^```|(?<!\[)`[^`\n]+`|(!?)\[([^\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", re.M | re.S)


def source(page: str) -> str:
    """A page's path on the site -> in the repository."""
    return next((name for name, moved in MOVED.items() if moved == page), f"docs/{page}")


def linked(found: re.Match[str], page: str) -> tuple[str, str | None]:
    """What a link leads to: its path in the repository, and on the site; none for a folder without a page."""
    target = normpath(join(dirname(source(page)), found[3]))
    if (ROOT / target).is_dir():
        target += "/report.html"
        return target, target if (ROOT / target).is_file() else None
    return target, MOVED.get(target, target.removeprefix("docs/"))


def links(text: str) -> Iterator[re.Match[str]]:
    return (found for found in LINK.finditer(text) if found[3])


def on_files(files: Files, config: MkDocsConfig) -> None:
    for name, page in MOVED.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for page in [file.src_uri for file in files.documentation_pages()]:
        for found in links((ROOT / source(page)).read_text(encoding="utf-8")):
            target, path = linked(found, page)
            if path and not files.get_file_from_path(path) and (ROOT / target).is_file():
                files.append(File.generated(config, path, abs_src_path=str(ROOT / target)))


def command_reference() -> str:
    """The help of every command, as Markdown."""
    return "\n".join(command_help(typer.main.get_command(app), "eit"))


def command_help(command: Any, name: str) -> Iterator[str]:
    """The help of a command and of those below it."""
    if not command.hidden:
        context = command.context_class(command, info_name=name, terminal_width=100)
        yield from (f"## {name}", "", "```text", command.get_help(context).strip(), "```", "")
        for word, found in getattr(command, "commands", {}).items():
            yield from command_help(found, f"{name} {word}")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    name = page.file.src_uri

    def replace(found: re.Match[str]) -> str:
        if not found[3]:
            return found[0]
        path = linked(found, name)[1]
        if path is None:
            return found[2]
        return f"{found[1]}[{found[2]}]({relpath(path, dirname(name) or '.')}{found[4] or ''})"

    return LINK.sub(replace, markdown.replace(COMMANDS, command_reference() if COMMANDS in markdown else ""))
