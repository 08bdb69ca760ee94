"""YAML without surprises: a value is read as the type that the schema wants, and text stays as it is written.

Without a schema, YAML 1.1 reads `no` as false, 1.10 as 1.1, 010 as 8, 12:30 as 750 and 2024-05-01 as a date, even
where a name is wanted.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from eit.errors import UserError, first_line, shorten

try:
    from yaml import CBaseLoader as Loader  # ten times as fast; needs libyaml
except ImportError:
    from yaml import BaseLoader as Loader  # type: ignore[assignment]

MOST_VALUES = 200_000  # aliases can stand for more values than memory holds
MOST_LEVELS = 50
NULLS = ("", "~", "null", "Null", "NULL")
BOOLEANS = dict(true=True, false=False, yes=True, no=False, on=True, off=False)
INTEGER = re.compile(r"[-+]?(0|[1-9](_?[0-9]){0,300})")
NUMBER = re.compile(r"[-+]?([0-9](_?[0-9]){0,300}(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class KeysOf:
    """`Annotated[dict[str, Any], KeysOf(M)]`: a dictionary of some keys of the pydantic model M."""

    model: type[BaseModel]


def read_yaml(text: str, schema: Any, last_wins: bool = False) -> Any:
    """The value of a YAML document; None if it is empty.

    Args:
        text: one document, without tags. Anchors, aliases and merge keys are allowed.
        schema: a type annotation, such as a pydantic model. Text, keys, and values whose type the schema
            does not give, stay a str.
        last_wins: of a key that is given twice, the last value counts.

    Raises:
        UserError: not YAML, a tag, a key that is given twice, or too many values; with the line.
    """
    try:
        levels = 0
        for event in yaml.parse(text, Loader):
            levels += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if levels > MOST_LEVELS:
                raise _error(event, f"more than {MOST_LEVELS} levels of lists and mappings")
            if (tag := getattr(event, "tag", None)) is not None:
                raise _error(event, f"the tag {tag!r} is not allowed: write the value without it")
        node = yaml.compose(text, Loader)
    except UserError:
        raise
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"it is not plain YAML{line}: {shorten(error.problem or str(error), 80)}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"it is not plain YAML: {shorten(first_line(error), 80)}") from None
    return None if node is None else _Values(last_wins).read(node, schema)


def alternatives(schema: Any) -> list[Any]:
    """The types of a union, without their constraints."""
    if get_origin(schema) is Annotated:
        inner, *notes = get_args(schema)
        return [note.model for note in notes if isinstance(note, KeysOf)] or alternatives(inner)
    if get_origin(schema) in (Union, UnionType):
        return [kind for member in get_args(schema) for kind in alternatives(member)]
    return [schema]


def member(schema: Any, key: str) -> Any:
    """The type of the value at `key` of a mapping; str if the schema has no such key."""
    for kind in alternatives(schema):
        if isinstance(kind, type) and issubclass(kind, BaseModel) and key in kind.model_fields:
            field = kind.model_fields[key]  # pydantic keeps the notes of Annotated apart
            return Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
        if get_origin(kind) is dict:
            return get_args(kind)[1]
    return str


def read_scalar(text: str, kinds: list[Any]) -> Any:
    """A plain scalar as a value of one of `kinds`. If str is one, all but null, booleans and numbers stay text."""
    is_text = str in kinds
    if NoneType in kinds and text in NULLS:
        return None
    if bool in kinds and text.lower() in (("true", "false") if is_text else BOOLEANS):
        return BOOLEANS[text.lower()]
    if (int in kinds or float in kinds) and INTEGER.fullmatch(text):
        return int(text)
    if float in kinds and NUMBER.fullmatch(text):
        return float(text)
    return text


class _Values:
    """The values of a document's nodes. An alias counts as often as it is used."""

    def __init__(self, last_wins: bool) -> None:
        self.count, self.last_wins = 0, last_wins

    def read(self, node: yaml.Node, schema: Any, level: int = 0) -> Any:
        self.count += 1
        if self.count > MOST_VALUES or level > MOST_LEVELS:
            raise _error(node, f"its aliases stand for more than {MOST_VALUES:,} values")
        kinds = alternatives(schema)
        if isinstance(node, yaml.MappingNode):
            return {key: self.read(value, member(schema, key), level + 1) for key, value in self._items(node, level)}
        if isinstance(node, yaml.SequenceNode):
            lists = [kind for kind in kinds if get_origin(kind) in (list, tuple)]
            items = [item for kind in lists for item in get_args(kind) if item is not Ellipsis]
            item = Union[tuple(items)] if items else str  # noqa: UP007
            return [self.read(value, item, level + 1) for value in node.value]
        assert isinstance(node, yaml.ScalarNode)
        if node.style:  # quoted
            return node.value
        return None if node.value == "" else read_scalar(node.value, kinds)

    def _items(self, node: yaml.MappingNode, level: int) -> Iterator[tuple[str, yaml.Node]]:
        """Keys and values, those of merge keys included."""
        self.count += 1
        if self.count > MOST_VALUES or level > MOST_LEVELS:
            raise _error(node, f"its aliases stand for more than {MOST_VALUES:,} values")
        own: set[str] = set()
        merged: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _error(key, "a list or mapping cannot be a key")
            if key.value == "<<" and not key.style:
                sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
                for source in sources:
                    if not isinstance(source, yaml.MappingNode):
                        raise _error(value, "<< needs a mapping, or a list of mappings")
                    for name, inherited in self._items(source, level + 1):
                        self.count += 1
                        merged.setdefault(name, inherited)
                continue
            if key.value in own and not self.last_wins:
                raise _error(key, f"the key {shorten(key.value, 60)!r} is given twice")
            own.add(key.value)
            yield key.value, value
        yield from ((name, value) for name, value in merged.items() if name not in own)


def _error(where: yaml.Node | yaml.Event, what: str) -> UserError:
    assert where.start_mark is not None
    return UserError(f"line {where.start_mark.line + 1}: {what}")
