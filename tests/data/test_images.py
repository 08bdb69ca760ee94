import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from eit.data.images import UnreadableImage, View, decode, normalise, resize_and_crop, to_uint8

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def saved(tmp_path, image, name, **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_grey_becomes_three_equal_channels_or_stays_one(tmp_path):
    file = saved(tmp_path, Image.fromarray(RAMP), "g.png")
    colour = to_uint8(decode(file))
    assert colour.shape == (3, 8, 8)
    assert all(torch.equal(channel, torch.from_numpy(RAMP)) for channel in colour)
    assert torch.equal(to_uint8(decode(file, channels=1)), torch.from_numpy(RAMP)[None])


@pytest.mark.parametrize("name", ["g.png", "g.tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, name):
    file = saved(tmp_path, Image.fromarray(RAMP.astype(np.uint16) * 257), name)
    assert torch.equal(to_uint8(decode(file, channels=1))[0], torch.from_numpy(RAMP))


def test_transparency_and_palettes_are_dropped(tmp_path):
    colour = np.random.RandomState(0).randint(0, 255, (8, 8, 4), dtype=np.uint8)
    rgba = Image.fromarray(colour, "RGBA")
    assert np.array_equal(np.asarray(decode(saved(tmp_path, rgba, "a.png"))), colour[:, :, :3])
    palette = Image.fromarray(RAMP).convert("P")
    file = saved(tmp_path, palette, "p.png", transparency=bytes([0] * 256))
    assert np.array_equal(np.asarray(decode(file, 1)), RAMP)


@pytest.mark.parametrize(("name", "mode"), [("a.webp", "RGB"), ("a.jpg", "CMYK"), ("a.bmp", "1"), ("a.tiff", "LA")])
def test_other_formats_and_modes(tmp_path, name, mode):
    file = saved(tmp_path, Image.new(mode, (9, 7)), name)
    assert (decode(file).mode, decode(file).size) == ("RGB", (9, 7))
    assert decode(file, 1).mode == "L"


def test_webp_keeps_its_pixels(tmp_path):
    colour = np.random.RandomState(0).randint(0, 255, (8, 8, 3), dtype=np.uint8)
    file = saved(tmp_path, Image.fromarray(colour), "a.webp", lossless=True)
    assert np.array_equal(np.asarray(decode(file)), colour)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.fromarray(RAMP[:, :4])
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    file = saved(tmp_path, image, "r.png", exif=exif)
    assert np.array_equal(np.asarray(decode(file, 1)), np.rot90(RAMP[:, :4], -1))


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (60_000, 60_000)])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path, width, height):
    file = tmp_path / "bomb.png"
    file.write_bytes(png_header(width, height))
    with pytest.raises(UnreadableImage, match=r"bomb\.png"):
        decode(file)


def test_the_pixel_cap_can_be_set(tmp_path):
    file = saved(tmp_path, Image.new("L", (20, 10)), "a.png")
    assert decode(file, max_pixels=200).size == (20, 10)
    with pytest.raises(
        UnreadableImage,
        match=r"a\.png: 20x10 is more than data\.max_pixels=199 allows; to read it, set data\.max_pixels=200",
    ):
        decode(file, max_pixels=199)


def damaged():
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64), dtype=np.uint8)).save(buffer, "png")
    whole = buffer.getvalue()
    yield "empty", b""
    yield "text", b"not an image"
    yield "truncated", whole[: len(whole) // 2]
    yield "broken", whole[:60] + bytes(200) + whole[260:]


@pytest.mark.parametrize(("kind", "content"), list(damaged()))
def test_damaged_files_are_named(tmp_path, kind, content):
    file = tmp_path / f"{kind}.png"
    file.write_bytes(content)
    with pytest.raises(UnreadableImage, match=kind):
        decode(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UnreadableImage, match=r"gone\.png: No such file"):
        decode(tmp_path / "gone.png")


def test_evaluation_resizes_the_shorter_side_and_crops_the_centre():
    image = Image.fromarray(np.tile(np.arange(100, dtype=np.uint8), (50, 1)))  # 100 wide, 50 high
    cropped = resize_and_crop(image, 50, 40, "bicubic")
    assert cropped.size == (40, 40)
    assert np.array_equal(np.asarray(cropped)[0], np.arange(30, 70))
    assert resize_and_crop(image, 25, 20, "bilinear").size == (20, 20)


def test_a_thread_of_an_image_does_not_grow_without_bound():
    image = Image.fromarray(np.tile(np.arange(2, dtype=np.uint8)[:, None], (1, 60_000)))  # 60,000 wide, 2 high
    assert resize_and_crop(image, 256, 224, "bicubic").size == (224, 224)
    wide = Image.fromarray(np.random.RandomState(0).randint(0, 255, (16, 16 * 9), dtype=np.uint8))
    whole = wide.resize((9 * 32, 32), Image.Resampling.BICUBIC).crop((4 * 32, 0, 5 * 32, 32))
    assert np.abs(np.asarray(resize_and_crop(wide, 32, 32, "bicubic")) - np.asarray(whole, int)).max() <= 1


def test_float_pixels_are_named(tmp_path):
    file = saved(tmp_path, Image.fromarray(RAMP.astype(np.float32)), "f.tif")
    with pytest.raises(UnreadableImage, match=r"f\.tif: 32-bit float pixels"):
        decode(file)


def test_evaluation_sees_what_timm_sees():
    from timm.data import create_transform

    image = Image.fromarray(np.random.RandomState(0).randint(0, 255, (300, 200, 3), dtype=np.uint8))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    ours = normalise(View(224, 256, "bicubic", mean, std).pixels(image)[None], mean, std)[0]
    torch.testing.assert_close(
        ours, create_transform(224, interpolation="bicubic", crop_pct=0.875)(image), atol=1e-5, rtol=0
    )
