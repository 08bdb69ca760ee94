"""Every YAML document gets values of the types that are wanted, or one line, in time that its length bounds."""

from typing import Annotated, Any

import pytest
from pydantic import BaseModel

from eit.errors import UserError
from eit.plain_yaml import MOST_VALUES, KeysOf, read_yaml


class Inner(BaseModel):
    name: str = ""
    rate: float = 0
    flag: bool | None = None
    sizes: tuple[int, ...] = ()


class Outer(BaseModel):
    inner: Inner = Inner()
    weights: dict[str, float] = {}
    settings: Annotated[dict[str, Any], KeysOf(Inner)] = {}
    several: dict[str, Annotated[dict[str, Any], KeysOf(Inner)]] = {}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("inner: {name: no, rate: 1, flag: no}", {"inner": {"name": "no", "rate": 1, "flag": False}}),
        ("inner: {name: 010, rate: 1e-3, flag: ~}", {"inner": {"name": "010", "rate": 1e-3, "flag": None}}),
        ("inner: {name: 'x', rate: '1', sizes: [1, 2]}", {"inner": {"name": "x", "rate": "1", "sizes": [1, 2]}}),
        ("weights: {no: 1, 1.10: .5}", {"weights": {"no": 1, "1.10": 0.5}}),
        ("settings: {name: 1.10, rate: 2.5}", {"settings": {"name": "1.10", "rate": 2.5}}),
        ("several: {off: {name: on, flag: on}}", {"several": {"off": {"name": "on", "flag": True}}}),
        ("other: 12:30\nmore: [0x1f, 2024-05-01]", {"other": "12:30", "more": ["0x1f", "2024-05-01"]}),
        ("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a", {"a": {"x": "1"}, "b": {"y": "2", "x": "1"}, "c": {"x": "1"}}),
        ("a: &a {x: 1}\nb: {x: 3, <<: [*a, {z: 4}]}", {"a": {"x": "1"}, "b": {"x": "3", "z": "4"}}),
        ("", None),
        ("- a\n- b", ["a", "b"]),
    ],
)
def test_values_have_the_types_of_the_schema(text, value):
    assert read_yaml(text, Outer) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: !!int ''", "line 1: the tag 'tag:yaml.org,2002:int' is not allowed"),
        ("x: 1\na: !!timestamp x", "line 2: the tag"),
        ("a: !!bool x", "line 1: the tag"),
        ("a: !!float ''", "line 1: the tag"),
        ("a: !mine {}", "line 1: the tag '!mine'"),
        ("a: !!python/object/apply:os.system [x]", "line 1: the tag"),
        ("a: 1\nb: 2\na: 3", "line 3: the key 'a' is given twice"),
        ("w: {no: 1, 'no': 2}", "line 1: the key 'no' is given twice"),
        ("? [a]\n: 1", "line 1: a list or mapping cannot be a key"),
        ("a: *b", "in line 1: found undefined alias"),
        ("a: {<<: 3}", "line 1: << needs a mapping"),
        ("a: 1\n---\nb: 2", "in line 2: but found another document"),
        ("a: [1", "not plain YAML in line"),
        ("a: \x00", "not plain YAML"),
        ("a: \ud800", "not plain YAML"),
        ("[" * 60, "more than 50 levels"),
        ("a: " + "{a: " * 100_000, "more than 50 levels"),
        ("a: &a [*a]", "aliases stand for more than"),
        ("a: &a {<<: *a}", "aliases stand for more than"),
    ],
)
def test_what_is_not_plain_is_one_line(text, message):
    with pytest.raises(UserError) as error:
        read_yaml(text, Outer)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["a{n}: &a{n} {{<<: [{of}]}}", "a{n}: &a{n} [{of}]", "a{n}: &a{n} {{x: [{of}]}}"])
def test_a_bomb_of_aliases_is_refused(form):
    lines = ["a0: &a0 {x: 1}"] + [form.format(n=n, of=", ".join([f"*a{n - 1}"] * 9)) for n in range(1, 15)]
    with pytest.raises(UserError, match=f"aliases stand for more than {MOST_VALUES:,} values"):
        read_yaml("\n".join(lines), Outer)


@pytest.mark.timeout(20)
def test_many_keys_take_little_time():
    keys = {f"k{i}": float(i) for i in range(100_000)}
    assert read_yaml("weights:\n" + "".join(f"  {k}: {v}\n" for k, v in keys.items()), Outer) == {"weights": keys}
