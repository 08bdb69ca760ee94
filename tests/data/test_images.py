import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

from eit.data.images import (
    MAX_PIXELS,
    Preprocessing,
    UnreadableImage,
    careful_pillow,
    decode,
    image_formats,
    normalise,
    pillow_open,
    resize_and_crop,
    to_uint8,
)

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
    with pytest.raises(UnreadableImage, match=r"a\.png: 20x10 is more than data\.max_pixels=199 allows"):
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
    ours = normalise(Preprocessing(224, 256, "bicubic", mean, std).pixels(image)[None], mean, std)[0]
    torch.testing.assert_close(
        ours, create_transform(224, interpolation="bicubic", crop_pct=0.875)(image), atol=1e-5, rtol=0
    )


# -- Contents decide, and only the orientation is read


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) show\n%%EOF\n"


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.eps", "x.ps"])
def test_postscript_is_not_interpreted_whatever_it_is_called(tmp_path, monkeypatch, name):
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", "/must/not/be/started")
    (tmp_path / name).write_bytes(EPS)
    for file in (tmp_path / name, io.BytesIO(EPS)):
        with pytest.raises(UnreadableImage, match="no image, or of a format that is not read"):
            decode(file)
    with careful_pillow(MAX_PIXELS), pytest.raises(UnreadableImage):
        Image.open(tmp_path / name)
    assert Image.open is pillow_open and not {"EPS", "IPTC", "FITS", "WMF"} & set(image_formats())


def test_other_packages_open_images_as_we_do_while_they_are_asked_to(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = saved(tmp_path, Image.fromarray(RAMP[:, :4]), "r.png", exif=exif)
    few = pytest.raises(UnreadableImage, match="more than data.max_pixels=20")
    with careful_pillow(MAX_PIXELS), careful_pillow(20), few:
        Image.open(file)
    with careful_pillow(MAX_PIXELS), Image.open(file) as image:
        assert image.size == (8, 4) and not image.getexif()


def tiff_of(*entries, order="<"):
    """EXIF data: (tag, type, count, four bytes) of each entry."""
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(entries))
    return head + b"".join(struct.pack(f"{order}HHI", *entry[:3]) + entry[3] for entry in entries) + bytes(4)


def jpeg_with(*segments):
    buffer = io.BytesIO()
    Image.fromarray(RAMP[:, :4]).save(buffer, "jpeg", quality=100)
    plain = buffer.getvalue()
    return plain[:2] + b"".join(b"\xff" + m + struct.pack(">H", len(s) + 2) + s for m, s in segments) + plain[2:]


def png_with(*chunks):
    buffer = io.BytesIO()
    Image.fromarray(RAMP[:, :4]).save(buffer, "png")
    plain = buffer.getvalue()
    return (
        plain[:33]
        + b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", crc) for k, d, crc in chunks)
        + plain[33:]
    )


def crc(kind, data):
    return kind, data, zlib.crc32(kind + data)


TURNED = (0x0112, 3, 1, struct.pack("<HH", 6, 0))
DIVIDED = (0x011A, 10, 1, struct.pack("<I", 6))  # a rational of 0
BEYOND = (0x010F, 2, 2**31, struct.pack("<I", 2**31))
METADATA = {
    "jpeg, exif that cannot be written": jpeg_with((b"\xe1", b"Exif\0\0" + tiff_of(TURNED, DIVIDED))),
    "jpeg, exif beyond its end": jpeg_with((b"\xe1", b"Exif\0\0" + tiff_of(BEYOND, TURNED))),
    "jpeg, short jfif": jpeg_with((b"\xe0", b"JFIF\0"), (b"\xe1", b"Exif\0\0" + tiff_of(TURNED))),
    "jpeg, mpf of noise": jpeg_with((b"\xe2", b"MPF\0II*\0" + b"\xff" * 40), (b"\xe1", b"Exif\0\0" + tiff_of(TURNED))),
    "jpeg, icc of noise": jpeg_with((b"\xe2", b"ICC_PROFILE\0"), (b"\xe1", b"Exif\0\0" + tiff_of(TURNED))),
    "png, wrong checksum of a text": png_with((b"tEXt", b"a\0b", 7), crc(b"eXIf", tiff_of(TURNED))),
    "png, text that is too large": png_with(
        crc(b"zTXt", b"a\0\0" + zlib.compress(bytes(2**21))), crc(b"eXIf", tiff_of(TURNED))
    ),
    "png, cut sizes": png_with(crc(b"pHYs", b"\0"), crc(b"gAMA", b""), crc(b"eXIf", tiff_of(DIVIDED, TURNED))),
}  # fmt: skip


@pytest.mark.parametrize("kind", METADATA)
def test_damaged_metadata_cost_no_image_and_the_orientation_is_read(tmp_path, kind):
    (tmp_path / "x").write_bytes(METADATA[kind])
    expected = np.rot90(RAMP[:, :4], -1)
    for file in (tmp_path / "x", io.BytesIO(METADATA[kind])):
        assert np.abs(np.asarray(decode(file, 1)).astype(int) - expected).max() <= 2
    with careful_pillow(MAX_PIXELS):
        assert Image.open(tmp_path / "x").size == (8, 4)


def test_damaged_tags_of_a_tiff_cost_no_image(tmp_path):
    exif = Image.Exif()
    exif[0x010F], exif[0x013B] = "a maker of cameras", "an artist"
    file = saved(tmp_path, Image.fromarray(RAMP[:, :4]), "x.tif", exif=exif, compression="tiff_lzw")
    content = bytearray(file.read_bytes())
    start = struct.unpack("<I", content[4:8])[0]
    for i in range(struct.unpack("<H", content[start : start + 2])[0]):
        entry = start + 2 + 12 * i
        if struct.unpack("<H", content[entry : entry + 2])[0] in (0x010F, 0x013B):
            content[entry + 4 : entry + 8] = b"\xff" * 4  # the number of letters
    file.write_bytes(content)
    assert np.array_equal(np.asarray(decode(file, 1)), RAMP[:, :4])


# -- The range of pixels of more than 8 bits


WIDE = {
    "png": lambda values: Image.fromarray(values.astype(np.uint16)),
    "tif": lambda values: Image.fromarray(values.astype(np.uint16)),
    "int.tif": lambda values: Image.fromarray(values.astype(np.int32)),
    "float.tif": lambda values: Image.fromarray(values.astype(np.float32)),
}


@pytest.mark.parametrize("kind", WIDE)
@pytest.mark.parametrize("span", [(0, 4095), (-0.0, 1023), (100, 355), (0, 65535)])
def test_a_range_makes_the_whole_of_8_bits(tmp_path, kind, span):
    low, high = span
    levels = np.linspace(low, high, 64).reshape(8, 8).round()
    file = saved(tmp_path, WIDE[kind](levels), f"x.{kind}")
    pixels = np.asarray(decode(file, 1, pixel_range=span))
    assert np.array_equal(pixels, ((levels - low) * 255 / (high - low) + 0.5).astype(np.uint8))
    assert (pixels.min(), pixels.max()) == (0, 255)
    colour = saved(tmp_path, Image.fromarray(RAMP), "8.png")
    assert np.array_equal(np.asarray(decode(colour, 1, pixel_range=span)), RAMP)  # 8 bits have their own range


def test_pixels_without_a_known_range_are_refused(tmp_path):
    for name, values in (("f.tif", RAMP.astype(np.float32)), ("i.tif", RAMP.astype(np.int32) * 1000)):
        with pytest.raises(UnreadableImage, match=r"no defined range \(here 0 to .*set data\.pixel_range="):
            decode(saved(tmp_path, Image.fromarray(values), name))
    broken = saved(tmp_path, Image.fromarray(np.full((8, 8), np.nan, np.float32)), "n.tif")
    with pytest.raises(UnreadableImage, match="not finite"):
        decode(broken, pixel_range=(0, 1))


def test_colours_of_16_bits_have_no_range(tmp_path):
    body = b"".join(b"\0" + struct.pack(">6H", *range(0, 6000, 1000)) for _ in range(2))
    header = b"\x89PNG\r\n\x1a\n"
    for kind, data in (
        (b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(body)),
        (b"IEND", b""),
    ):
        header += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (tmp_path / "c.png").write_bytes(header)
    assert decode(tmp_path / "c.png").getpixel((0, 0)) == (0, 1000 >> 8, 2000 >> 8)
    with pytest.raises(UnreadableImage, match="data.pixel_range is for grey pixels"):
        decode(tmp_path / "c.png", pixel_range=(0, 4095))


# -- What TIFF files say of their pixels


def tiff(values, photometric=1, sample_format=1):
    """A TIFF file of one uncompressed strip, as instruments write it. `photometric` 0: the least value is white."""
    height, width = values.shape
    bits = values.dtype.itemsize * 8
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 0, 277: 1, 278: height}
    tags |= {279: values.nbytes, 339: sample_format}
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return io.BytesIO(struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + values.tobytes())


SCALED = RAMP.astype(np.uint16) * 257


@pytest.mark.parametrize(
    "values, photometric, sample_format, pixel_range",
    [
        (255 - RAMP, 0, 1, None),
        (65535 - SCALED, 0, 1, None),
        (4095 - (SCALED >> 4), 0, 1, (0, 4095)),
        ((1 - RAMP / 255).astype(np.float32), 0, 3, (0, 1)),
        (SCALED, 1, 1, None),
        (SCALED.astype(np.uint32) * 65537, 1, 1, (0, 2**32 - 1)),
        (SCALED.astype(np.int32) - 40000, 1, 2, (-40000, 25535)),
    ],
    ids=["white 8", "white 16", "white 12 in 16", "white float", "black 16", "unsigned 32", "signed 32"],
)
def test_pixels_of_a_tiff_are_what_its_tags_say(values, photometric, sample_format, pixel_range):
    found = decode(tiff(values, photometric, sample_format), channels=1, name="x.tif", pixel_range=pixel_range)
    assert np.abs(np.asarray(found).astype(int) - RAMP).max() <= 1


@pytest.mark.parametrize(
    "values, sample_format, message",
    [
        ((RAMP.astype(int) - 128).astype(np.int8), 2, "signed pixels of 8 bits are not read"),
        (SCALED.astype(np.uint32) * 65537, 1, r"pixels go up to 4244438268: set data.pixel_range=\[0,4244438268\]"),
        (RAMP.astype(np.float32), 3, r"have no defined range \(here 0 to 252\)"),
    ],
    ids=["signed 8", "unsigned 32", "float"],
)
def test_pixels_that_would_be_taken_for_others_are_refused(values, sample_format, message):
    with pytest.raises(UnreadableImage, match=message):
        decode(tiff(values, 1, sample_format), name="x.tif")


def test_readers_of_other_packages_see_a_white_tiff_as_it_is(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(65535 - SCALED, 0).read())
    with careful_pillow(MAX_PIXELS):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "x.tif")), RAMP)
