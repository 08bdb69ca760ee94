import os

import pytest

from eit.errors import UserError
from eit.files import expand_path, read_text, sync_folder, write_file


@pytest.mark.parametrize(
    ("path", "expanded"),
    [
        ("~", "/home/me"),
        ("~/a b", "/home/me/a b"),
        ("$HOME/x", "/home/me/x"),
        ("${HOME}/x", "/home/me/x"),
        ("/scratch/$EIT_USER/x", "/scratch/me/x"),
        ("a/~/b", "a/~/b"),
        ("$EIT_UNKNOWN/x", "$EIT_UNKNOWN/x"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name/x"),
        ("price$", "price$"),
        ("pipe:curl $HOME", "pipe:curl $HOME"),
        ("https://host/~me/$HOME", "https://host/~me/$HOME"),
        ("sklearn:digits", "sklearn:digits"),
        ("", ""),
    ],
)
def test_paths_are_expanded(monkeypatch, path, expanded):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("EIT_USER", "me")
    monkeypatch.delenv("EIT_UNKNOWN", raising=False)
    assert expand_path(path) == expanded


def test_text_files_are_read_or_named(tmp_path):
    file = tmp_path / "f.yaml"
    for content, text in ((b"", ""), (b"\xef\xbb\xbfa: 1", "a: 1"), ("犬".encode(), "犬")):
        file.write_bytes(content)
        assert read_text(file, "recipe") == text
    for content in (b"\xff\xfea", b"caf\xe9"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="cannot read recipe .*is not UTF-8"):
            read_text(file, "recipe")
    special = [tmp_path]
    if hasattr(os, "mkfifo"):  # not on Windows
        os.mkfifo(tmp_path / "pipe")
        special += [tmp_path / "pipe", "/dev/zero"]
    for path, reason in (
        *((path, "it is not a file") for path in special),
        (tmp_path / "gone", "No such file"),
        ("a\0b", "null"),
    ):
        with pytest.raises(UserError, match=f"cannot read recipe .*: .*{reason}"):
            read_text(path, "recipe")


def test_a_file_is_written_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    """As on Windows."""
    original = os.open

    def refuse_folders(path, *more, **options):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *more, **options)

    monkeypatch.setattr(os, "open", refuse_folders)
    write_file(tmp_path / "f", "text")
    sync_folder(tmp_path)
    assert (tmp_path / "f").read_text() == "text"
