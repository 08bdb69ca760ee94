"""Files of untrusted folders: regular ones alone are opened, and nothing is written through a link."""

import os
import socket

import pytest

from eit.files import open_regular, read_json, read_regular, write_file


def link(path):
    (path.parent / "elsewhere").write_text("precious")
    path.symlink_to(path.parent / "elsewhere")


def bind(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


KINDS = {
    "link": link,
    "dangling link": lambda path: path.symlink_to("gone"),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link in a circle": lambda path: path.symlink_to(path.name),
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "socket": bind,
}


@pytest.mark.parametrize("mode", ["rb", "ab", "a+"])
@pytest.mark.parametrize("kind", KINDS)
def test_only_a_regular_file_is_opened_and_nothing_is_waited_for(tmp_path, kind, mode):
    path = tmp_path / "file"
    KINDS[kind](path)
    with pytest.raises(OSError) as error:
        open_regular(path, mode)
    assert error.value.filename in (str(path), path) and error.value.strerror
    if kind == "link":
        assert (tmp_path / "elsewhere").read_text() == "precious"


def test_a_regular_file_is_opened_as_open_does(tmp_path):
    path = tmp_path / "file"
    with open_regular(path, "a", encoding="utf-8") as file:
        file.write("ä")
    assert read_regular(path) == "ä".encode()
    with pytest.raises(OSError, match="more than 1 bytes"):
        read_regular(path, most=1)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "gone")


@pytest.mark.parametrize("kind", ["link", "dangling link", "link to a device", "pipe"])
def test_a_file_is_not_written_through_what_lies_at_its_temporary_name(tmp_path, kind):
    KINDS[kind](tmp_path / ".file.tmp")
    write_file(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new" and not os.path.lexists(tmp_path / ".file.tmp")
    if kind == "link":
        assert (tmp_path / "elsewhere").read_text() == "precious"


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 200000, '{"a": ' * 100000, "9" * 5000, "NaN", '{"a": -Infinity}', "\0"]
)
def test_what_is_not_json_is_a_value_error(tmp_path, text):
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError):
        read_json(tmp_path / "file")


def test_bytes_that_are_not_text_are_a_value_error(tmp_path):
    (tmp_path / "file").write_bytes(b'{"a": "\xff\xfe"}')
    with pytest.raises(ValueError):
        read_json(tmp_path / "file")


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1.5e400", "NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_not_finite_are_not_json(tmp_path, number):
    (tmp_path / "x.json").write_text(f'{{"a": [{number}]}}')
    with pytest.raises(ValueError, match=f"has {number}, which is not a number of JSON"):
        read_json(tmp_path / "x.json")
