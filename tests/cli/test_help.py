"""What `--help` says: examples that parse, options in groups, metavars alone, 80 columns."""

import re
import shlex

import pytest

from eit.cli.help import FEW, GROUP_OF, GROUPS, OTHERS
from eit.config import load_recipe
from tests.cli.test_output import COMMANDS, LEAVES


def groups(command, path=""):
    if hasattr(command, "commands"):
        yield path.strip(), command
        for name, inner in command.commands.items():
            yield from groups(inner, f"{path} {name}")


ALL = dict(groups(COMMANDS)) | LEAVES


def help_of(name, columns=80):
    command = ALL[name]
    context = command.make_context(f"eit {name}".strip(), [], resilient_parsing=True, terminal_width=columns)
    return command.get_help(context)


def examples(text):
    """The command lines in a help text; what follows one after some spaces tells what it does."""
    joined = re.sub(r"\\\n +", "", text)
    return [re.split("  +", line.strip())[0] for line in joined.splitlines() if line.startswith("  eit ")]


def parse(line):
    """Parse an example as the program does; raise where it would be refused."""
    command, words = COMMANDS, shlex.split(line)[1:]
    words = words[: words.index(">")] if ">" in words else words
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    assert command is not COMMANDS, line
    given = command.make_context("eit", list(words)).params
    if given.get("overrides"):
        load_recipe(given.get("recipe", "photos"), given["overrides"])
    return given


@pytest.mark.parametrize("name", ALL)
def test_each_command_has_two_or_three_examples_that_parse(name):
    found = examples(help_of(name))
    assert 2 <= len(found) <= 3 and len(set(found)) == len(found)
    for line in found:
        parse(line)
    assert any(line == f"eit {name}" or line.startswith(f"eit {name} ") for line in found) or not name


@pytest.mark.parametrize(
    "line", ["eit eval x --colour", "eit train digits train.epoch=1", "eit export", "eit demo --share"]
)
def test_an_example_that_is_wrong_would_be_noticed(line):
    with pytest.raises(Exception, match=r"No such option|no key|unknown|Missing|epoch"):
        parse(line)


@pytest.mark.parametrize("name", ALL)
def test_help_has_80_columns_and_plain_metavars(name):
    text = help_of(name)
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"<[\w|\[\]]+>|[{}]|x>=|<=x|\b(?:TEXT|INTEGER|FLOAT|PATH_LIST)\b|\.\.\.\.", text)
    for parameter in ALL[name].params:
        flag = getattr(parameter, "is_flag", False)
        assert flag or parameter.metavar, f"{parameter.name} has no metavar"
        assert (parameter.help or "").endswith((".", "none")) or not parameter.help, parameter.name


@pytest.mark.parametrize("name", LEAVES)
def test_each_option_is_told_once_and_long_lists_are_in_groups(name):
    text, command = help_of(name), LEAVES[name]
    options = [p for p in command.params if p.param_type_name == "option"]
    for option in options:
        assert len(re.findall(rf"^  (?:-\w, )?{option.opts[0]}\b", text, re.MULTILINE)) == 1
    titles = re.findall(r"^([A-Z]\w+):", text, re.MULTILINE)
    if len(options) + 1 > FEW:  # and --help
        assert len(titles) > 3 and titles[-1] == OTHERS
        assert sum(option.opts[0] not in GROUP_OF for option in options) <= FEW
    else:
        assert set(titles) <= {"Usage", "Arguments", OTHERS}


def test_the_groups_name_options_that_exist():
    known = {option for command in LEAVES.values() for parameter in command.params for option in parameter.opts}
    assert set(GROUP_OF) <= known and len(GROUP_OF) == sum(map(len, GROUPS.values()))
