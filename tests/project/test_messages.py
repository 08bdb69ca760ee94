"""Every message of the package, as tools/list_messages.py lists them."""

import importlib.util
import re
from pathlib import Path

from eit.config import recipe_keys
from tests.cli.test_output import LEAVES

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("list_messages", ROOT / "tools" / "list_messages.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
MESSAGES = {
    f"{file.relative_to(tool.SOURCE)}:{line}": text
    for file in sorted(tool.SOURCE.rglob("*.py"))
    for line, _, text in tool.messages(file)
}
OTHERS_OPTIONS = {"--nproc-per-node", "--master-addr", "--master-port", "--node-rank"}  # of torchrun


def test_the_list_has_messages_of_every_kind(capsys):
    assert len(MESSAGES) > 300
    tool.main("is not key=value")
    assert capsys.readouterr().out.startswith("config.py:")


def test_messages_are_one_line():
    assert not {place: text for place, text in MESSAGES.items() if "\n" in text}


def test_options_and_keys_that_messages_name_exist():
    options = {option for command in LEAVES.values() for parameter in command.params for option in parameter.opts}
    keys, sections = set(recipe_keys()), ("data", "train", "model", "loss", "optim", "augment")
    wrong = {}
    for place, text in MESSAGES.items():
        plain = re.sub(r"\{[^}]*\}|<.*>", "{}", text)
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", plain)) - options - OTHERS_OPTIONS
        named |= set(re.findall(rf"(?<![\w.{{/])(?:{'|'.join(sections)})\.[a-z_0-9]+(?=[= ;,)]|$)", plain)) - keys
        if named:
            wrong[place] = named
    assert not wrong
