"""Packed images come back to the bit, each part can be trained on alone, and a part that is not right is named."""

import io
import json
import zipfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import pack
from eit.data.folders import read_folder
from eit.errors import UserError
from tests.helpers.images import save_digits

PART_MIB = 0.012  # three parts of the digits below


@pytest.fixture
def digits(tmp_path):
    return save_digits(tmp_path / "digits", classes=4, train=30, val=8)


@pytest.fixture
def packed(digits, tmp_path):
    pack.pack(digits, tmp_path / "packed", PART_MIB)
    return tmp_path / "packed"


def rewrite(part, change_index=None, change_mosaic=None, compression=zipfile.ZIP_STORED):
    """Write a part anew, with a changed index or a changed first mosaic, and zip checksums that are right."""
    with zipfile.ZipFile(part) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    if change_index:
        index = json.loads(contents["index.json"])
        contents["index.json"] = json.dumps(change_index(index) or index).encode()
    if change_mosaic:
        contents["0.webp"] = change_mosaic(contents["0.webp"])
    with zipfile.ZipFile(part, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)


def refuse(where):
    """The one line that says why `where` is not read."""
    with pytest.raises(UserError) as error:
        pack.read(where)
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
    return str(error.value)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_come_back_identical_and_in_the_order_of_the_folder(digits, tmp_path, capsys, mode):
    rng = np.random.default_rng(0)
    for file in digits.rglob("*.png"):
        noise = rng.integers(0, 256, (16, 12, 3), dtype=np.uint8)
        Image.fromarray(noise if mode == "RGB" else noise[..., 0]).save(file)
    pack.main(["pack", str(digits), str(tmp_path / "packed"), "--part-mib", "0.02"])
    assert "120 train, 32 val of 4 classes" in capsys.readouterr().out
    assert len(list((tmp_path / "packed").iterdir())) > 1
    pack.main(["unpack", str(tmp_path / "packed"), str(tmp_path / "again")])
    for split, images in zip(pack.SPLITS, pack.read(tmp_path / "packed"), strict=True):
        source, again = read_folder(digits / split), read_folder(tmp_path / "again" / split)
        assert images.digest() == source.digest() == again.digest()
        for pixels, *files in zip(images.sources, source.sources, again.sources, strict=True):
            for file in files:
                with Image.open(file) as image:
                    assert image.mode == mode and np.array_equal(image, pixels)


def test_any_part_alone_has_an_equal_share_of_every_class_and_both_splits(digits, packed):
    files = sorted(packed.iterdir())
    assert [file.name for file in files] == ["part-0.zip", "part-1.zip", "part-2.zip"]
    together = {split: [] for split in pack.SPLITS}
    for file in files:
        assert file.stat().st_size <= PART_MIB * 2**20
        for split, images in zip(pack.SPLITS, pack.read(file), strict=True):
            assert images.classes == ["digit0", "digit1", "digit2", "digit3"]
            counts = Counter(images.labels)
            assert len(counts) == 4 and max(counts.values()) - min(counts.values()) <= 1
            together[split] += images.names
    for split, names in together.items():
        assert sorted(names) == read_folder(digits / split).names


def test_no_part_is_over_the_limit_by_a_byte(digits, packed, tmp_path):
    """The number of parts is estimated without their indexes: they are cut again where that was too few."""
    largest = max(file.stat().st_size for file in packed.iterdir())
    pack.pack(digits, tmp_path / "out", (largest - 1) / 2**20)
    sizes = [file.stat().st_size for file in (tmp_path / "out").iterdir()]
    assert len(sizes) == 4 and max(sizes) < largest
    assert len(pack.read(tmp_path / "out")[0]) == 120


def test_a_part_is_shuffled_and_the_same_each_time(digits, packed, tmp_path):
    pack.pack(digits, tmp_path / "again", PART_MIB)
    for file in packed.iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes()
    numbers = [int(Path(name).stem) for name in pack.read(packed / "part-0.zip")[0].names if "digit0" in name]
    assert len({b - a for a, b in pairwise(numbers)}) > 1  # not every third image


def test_check_prints_what_is_there(packed, capsys):
    (packed / "part-1.zip").unlink()
    pack.main(["check", str(packed)])
    assert "2 of 3 parts: 80 train" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "mode", "what"),
    [((20, 16), "RGB", "20x16 pixels, mode RGB"), ((16, 16), "L", "mode L"), ((16, 16), "RGBA", "mode RGBA")],
)
def test_images_that_differ_are_refused_in_one_line(digits, tmp_path, capsys, size, mode, what):
    Image.new(mode, size).save(digits / "val" / "digit1" / "003.png")
    with pytest.raises(SystemExit, match="2"):
        pack.main(["pack", str(digits), str(tmp_path / "packed")])
    line = capsys.readouterr().err
    assert line.startswith("pack: ") and line.count("\n") == 1
    assert "003.png" in line and what in line and not (tmp_path / "packed").exists()


def test_a_mode_that_would_lose_something_is_refused(digits, tmp_path):
    for file in digits.rglob("*.png"):
        Image.new("RGBA", (16, 16)).save(file)
    with pytest.raises(UserError, match="mode RGBA"):
        pack.pack(digits, tmp_path / "packed", PART_MIB)


def test_what_cannot_be_packed_is_named(digits, packed, tmp_path):
    with pytest.raises(UserError, match="packed is there already"):
        pack.pack(digits, packed, PART_MIB)
    with pytest.raises(UserError, match="--part-mib 0.002 is too little"):
        pack.pack(digits, tmp_path / "out", 0.002)
    (digits / "val" / "digit2" / "000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="000.png cannot be read"):
        pack.pack(digits, tmp_path / "out", PART_MIB)
    (digits / "val" / "digit2" / "000.png").rename(digits / "val" / "digit2" / "000.jpg")
    with pytest.raises(UserError, match="000.jpg cannot be packed"):
        pack.pack(digits, tmp_path / "out", PART_MIB)
    (digits / "val").rename(digits / "test")
    with pytest.raises(UserError, match="has no val/ folder"):
        pack.pack(digits, tmp_path / "out", PART_MIB)
    assert not (tmp_path / "out").exists()


def other_pixels(content):
    with Image.open(io.BytesIO(content)) as image:
        changed = np.array(image)
    changed[0, 0] ^= 1
    buffer = io.BytesIO()
    Image.fromarray(changed).save(buffer, "webp", lossless=True)
    return buffer.getvalue()


def larger(content):
    buffer = io.BytesIO()
    Image.new("RGB", (16_000, 16_000)).save(buffer, "webp", lossless=True)
    return buffer.getvalue()


@pytest.mark.parametrize("change", [other_pixels, larger, lambda c: c[:40], lambda c: b"", lambda c: b"RIFF" * 20])
def test_a_mosaic_that_is_not_the_one_that_was_packed_is_refused(packed, change):
    rewrite(packed / "part-1.zip", change_mosaic=change)
    line = refuse(packed)
    assert "part-1.zip is damaged" in line
    assert "checksum" in line or change is not other_pixels
    assert pack.read(packed / "part-0.zip")


@pytest.mark.parametrize("damage", [lambda c: c[:-200], lambda c: b"", lambda c: c.replace(b"index", b"other")])
def test_a_damaged_zip_file_is_named(packed, damage):
    part = packed / "part-2.zip"
    part.write_bytes(damage(part.read_bytes()))
    assert "part-2.zip is damaged" in refuse(packed)


def test_a_flipped_bit_anywhere_in_a_part_changes_no_pixel_unseen(packed):
    part = packed / "part-0.zip"
    content, expected = part.read_bytes(), pack.read(part)
    for position in range(7, len(content), len(content) // 60):
        part.write_bytes(content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :])
        try:
            found = pack.read(part)
        except UserError as error:
            assert "part-0.zip is damaged" in str(error)
        else:  # in a field of the zip file that nothing depends on
            for a, b in zip(found, expected, strict=True):
                assert a.digest() == b.digest() and np.array_equal(a.sources, b.sources)


def set_mosaic(**fields):
    return lambda index: index["mosaics"][0].update(fields)


def set_name(name):
    return lambda index: index["mosaics"][0]["names"].__setitem__(0, name)


HOSTILE = {
    "a path that leaves the folder": set_name("../../x.png"),
    "an absolute path": set_name("/tmp/x.png"),
    "a Windows path": set_name("c:x.png"),
    "a hidden file": set_name(".x.png"),
    "a name that moves the cursor": set_name("\x1b[2J.png"),
    "no name": set_name(""),
    "a name without .png": set_name("x.py"),
    "a class that leaves the folder": lambda index: index["classes"].__setitem__(0, ".."),
    "a class twice": lambda index: index["classes"].__setitem__(0, "digit1"),
    "an image twice": lambda index: index["mosaics"].append(index["mosaics"][0]),
    "tiles without end": set_mosaic(tiles=2**40),
    "more tiles than names": set_mosaic(tiles=900),
    "sizes without end": lambda index: index.update(size=[2**40, 16]),
    "more pixels than the limit": lambda index: index.update(size=[400, 16_000]),
    "a label of no class": lambda index: index["mosaics"][0]["labels"].__setitem__(0, 4),
    "a label that is a word": lambda index: index["mosaics"][0]["labels"].__setitem__(0, "1"),
    "no training images": lambda index: index["mosaics"].pop(0) and None,
    "a part of none": lambda index: index.update(parts=0),
    "another format": lambda index: index.update(format=2),
    "an unknown key\n": lambda index: index.update({"a\nb": 2}),
    "a missing key": lambda index: index.pop("channels") and None,
    "no object": lambda index: [1],
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_index_is_refused_before_anything_is_decoded(packed, tmp_path, monkeypatch, change):
    rewrite(packed / "part-0.zip", change_index=change)
    monkeypatch.setattr(pack, "decode", lambda *_: pytest.fail("decoded"))
    assert "part-0.zip is damaged" in refuse(packed / "part-0.zip")
    with pytest.raises(UserError):
        pack.unpack(packed, tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_a_part_that_unzips_to_more_than_the_limit_is_refused(packed, monkeypatch):
    monkeypatch.setattr(pack, "MAX_INDEX_BYTES", 1000)
    assert "index.json is of more than 1000 bytes" in refuse(packed / "part-0.zip")
    rewrite(packed / "part-1.zip", compression=zipfile.ZIP_BZIP2)
    monkeypatch.undo()
    assert "not deflated" in refuse(packed / "part-1.zip")


def test_parts_of_different_sets_are_refused(digits, packed, tmp_path):
    Image.new("RGB", (16, 16)).save(digits / "train" / "digit0" / "000.png")  # one image differs
    pack.pack(digits, tmp_path / "other", PART_MIB)
    (packed / "part-1.zip").write_bytes((tmp_path / "other" / "part-1.zip").read_bytes())
    assert "part-0.zip and" in (line := refuse(packed)) and "are of different sets" in line
    (packed / "part-1.zip").write_bytes((packed / "part-0.zip").read_bytes())
    assert "has a part twice" in refuse(packed)


def test_no_parts_is_one_line(tmp_path, capsys):
    assert "has no parts of packed images" in refuse(tmp_path)
    assert "has no parts of packed images" in refuse(tmp_path / "nowhere")
    with pytest.raises(SystemExit) as end:
        pack.main(["check", str(tmp_path)])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("pack: ") and error.count("\n") == 1
