"""Images -> pixels as a model sees them: decoding, upright, 8 bits, resized, normalised."""

import hashlib
import io
import os
import re
import stat
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from typing import IO, Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from eit.errors import first_line

MAX_PIXELS = 89_478_485  # Pillow's own bound on what it decodes without a warning

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # `decode` refuses before it decodes
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")  # about metadata, which are not used

PixelRange = tuple[float, float]  # the values that become black and white


class UnreadableImage(Exception):
    """An image that cannot be decoded, or is too large to decode. The message names it and the reason."""


class TooManyPixels(UnreadableImage):
    """An image of more pixels than are allowed."""


# -- Formats ----------------------------------------------------------------------------------------------------------

# Pillow would start Ghostscript (EPS), open what is inside in any format (IPTC), or unpack without a bound (FITS). The
# others it does not decode.
REFUSED_FORMATS = {"EPS", "IPTC", "FITS", "BUFR", "GRIB", "HDF5", "WMF", "MPEG", "FPX", "MIC", "PDF", "PALM"}


COMMON_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # tried first


def image_extensions() -> frozenset[str]:
    """Extensions, in lower case, of all formats that this Pillow reads, plugins such as pillow-heif included."""
    return _registry()[0]


def image_formats() -> tuple[str, ...]:
    """Pillow's names of these formats. What a file contains decides, not its name."""
    return _registry()[1]


def is_image_name(name: str) -> bool:
    """Whether a file has the extension of an image that is read."""
    return os.path.splitext(name)[1].lower() in image_extensions()


def _registry() -> tuple[frozenset[str], tuple[str, ...]]:
    Image.init()
    return _read_registry(len(Image.EXTENSION))


@cache
def _read_registry(_: int) -> tuple[frozenset[str], tuple[str, ...]]:
    known = {ending: "JPEG" if form == "MPO" else form for ending, form in Image.EXTENSION.items()}
    read = {e: f for e, f in known.items() if f in Image.OPEN and f not in REFUSED_FORMATS}
    common = [form for form in COMMON_FORMATS if form in read.values()]
    return frozenset(read), tuple(dict.fromkeys([*common, *read.values()]))


# -- Metadata ---------------------------------------------------------------------------------------------------------

ORIENTATION = 0x0112  # EXIF tag; 1: upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


# Tags of TIFF that the pixels need: layout, compression, colours, orientation
PIXEL_TAGS = {254, *range(256, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, *range(320, 326)}
PIXEL_TAGS |= {332, 334, 338, 339, 347, *range(529, 533)}


def orientation(image: Image.Image) -> int:
    """The orientation by EXIF or XMP, 1 to 8; 1 if there is none, or it cannot be read."""
    exif = image.info.get("exif")
    exif = exif.removeprefix(b"Exif\0\0") if isinstance(exif, bytes) else b""
    order: Any = "little" if exif[:2] == b"II" else "big"
    entry = _tiff_tags(exif).get(ORIENTATION, b"")
    if entry[2:4] == (3).to_bytes(2, order):  # a short; Pillow reads it only if all before it are whole
        value = int.from_bytes(entry[8:10], order)
    else:
        try:
            value = image.getexif().get(ORIENTATION, 1)
        except Exception:  # of Pillow's parsers
            value = 1
    return value if value in TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """The image as its orientation says. Other metadata are not read: they can be damaged."""
    image.load()
    turn = TURNS.get(orientation(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    for key in ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"):  # it has been turned
        turned.info.pop(key, None)
    return turned


def without_metadata(content: bytes) -> tuple[bytes, bytes | None] | None:
    """A PNG, JPEG, TIFF or AVIF file without metadata, and its EXIF data if stored apart; None for other formats.

    For files that Pillow refuses: damaged metadata must not keep the pixels from being read.
    """
    exif = None
    if content[:8] == b"\x89PNG\r\n\x1a\n":
        kept, start = [content[:8]], 8
        while start + 12 <= len(content):
            kind, end = content[start + 4 : start + 8], start + 12 + int.from_bytes(content[start : start + 4])
            if kind == b"eXIf":
                exif = b"Exif\0\0" + content[start + 8 : end - 4]
            if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
                kept.append(content[start:end])
            start = end
        return b"".join(kept), exif
    if content[:2] == b"\xff\xd8":
        kept, start = [content[:2]], 2
        while start + 4 <= len(content) and content[start] == 0xFF and content[start + 1] != 0xDA:  # start of scan
            marker, length = content[start + 1], int.from_bytes(content[start + 2 : start + 4])
            if marker == 0xFF:  # a fill byte
                start += 1
                continue
            segment = content[start : start + 2 + length]
            if marker == 0xE1 and segment[4:8] == b"Exif":
                exif = segment[4:]
            # Kept of APP0 to APP15 and comments: JFIF and Adobe's APP14, which tell the colour space
            if marker == 0xEE or not (0xE0 <= marker <= 0xEF or marker == 0xFE) or (marker == 0xE0 and length >= 16):
                kept.append(segment)
            start += 2 + length
        return b"".join((*kept, content[start:])), exif
    if tags := _tiff_tags(content):
        order: Any = "little" if content[:2] == b"II" else "big"
        start = int.from_bytes(content[4:8], order)
        needed = b"".join(entry for tag, entry in tags.items() if tag in PIXEL_TAGS)
        first = (len(needed) // 12).to_bytes(2, order) + needed + bytes(4)  # no further images
        return content[:start] + first + content[start + len(first) :], None
    if content[4:8] == b"ftyp":
        return re.sub(rb"(infe[\s\S]{8})Exif", rb"\1skip", content[: 1 << 20]) + content[1 << 20 :], None
    return None


def _tiff_tags(content: bytes) -> dict[int, bytes]:
    """Tag -> its 12 bytes, of the first directory of a TIFF file, or of EXIF data, which have the same form."""
    if content[:4] not in (b"II*\0", b"MM\0*"):
        return {}
    order: Any = "little" if content[:2] == b"II" else "big"
    start = int.from_bytes(content[4:8], order)
    count = int.from_bytes(content[start : start + 2], order)
    entries = [content[start + 2 + 12 * i : start + 14 + 12 * i] for i in range(count)]
    return {int.from_bytes(entry[:2], order): entry for entry in entries if len(entry) == 12}


# -- Pixels -----------------------------------------------------------------------------------------------------------


def is_wide(image: Image.Image) -> bool:
    """Whether the pixels are of one channel of more than 8 bits."""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def pixel_kind(image: Image.Image) -> str:
    """What the pixels of an opened, not yet loaded file are, as `eit data check` reports it."""
    if image.mode == "F":
        return "float"
    if is_wide(image):
        return "32 bits" if image.mode == "I" else "16 bits"
    return "16 bits, of which Pillow reads the upper 8" if _is_reduced(image) else "8 bits"


def _is_reduced(image: Image.Image) -> bool:
    """Whether an opened file has 16 bits per channel in colour or with transparency, of which Pillow reads 8."""
    tile = next(iter(getattr(image, "tile", ())), None)
    arguments = tile[3] if tile else ""
    raw_mode = str(arguments[0] if isinstance(arguments, tuple) else arguments)
    return not is_wide(image) and re.search(";16[BLN]", raw_mode) is not None


UNSIGNED = 2**31  # the first value that signed pixels of 32 bits do not have


def declared_range(image: Image.Image, pixel_range: PixelRange | None = None) -> PixelRange | None:
    """The values of black and white in an opened TIFF file that says what its grey pixels mean; else `pixel_range`.

    They may have fewer than 16 bits, such as 12, or 0 may be white.

    Raises:
        ValueError: pixels that Pillow misreads: signed ones of 8 bits, and unsigned ones of 32 bits above 2^31.
    """
    tags = getattr(image, "tag_v2", {})
    bits = (tags.get(258) or (16,))[0]  # BitsPerSample
    if bits == 8 and 2 in tags.get(339, ()):  # SampleFormat
        raise ValueError("signed pixels of 8 bits are not read: store them in 16 bits, or unsigned")
    if not is_wide(image):
        return pixel_range
    if bits == 32 and image.mode == "I" and 2 not in tags.get(339, ()) and max(pixel_range or (0,)) < UNSIGNED:
        values = np.asarray(image)  # Pillow reads unsigned pixels as signed ones
        if values.min() < 0:
            largest = values.view(np.uint32).max()
            raise ValueError(f"32-bit pixels go up to {largest}: set data.pixel_range=[0,{largest}]")
    if pixel_range is None and image.mode == "I;16" and bits < 16:
        pixel_range = (0, 2**bits - 1)
    if tags.get(262) != 0:  # PhotometricInterpretation: not WhiteIsZero, which Pillow heeds for 8 bits alone
        return pixel_range
    low, high = pixel_range or (0, 65535)
    return None if pixel_range is None and image.mode == "F" else (high, low)


def to_8_bits(image: Image.Image, pixel_range: PixelRange | None = None) -> Image.Image:
    """A grey image of more than 8 bits -> mode L. 0 to 65535 become black to white, or `pixel_range`.

    Raises:
        ValueError: float pixels, or those of 32 bits beyond 0..65535, without a range; pixels that are not numbers.
    """
    values = np.asarray(image)
    if pixel_range is not None and max(pixel_range) >= UNSIGNED and image.mode == "I":
        values = values.view(np.uint32)
    if image.mode == "F" and not np.isfinite(values).all():
        raise ValueError("some pixels are not finite numbers")
    if pixel_range is not None:
        low, high = pixel_range
        scaled = (values.astype(np.float32) - low) * (255 / (high - low))
        return Image.fromarray((scaled.clip(0, 255) + 0.5).astype(np.uint8))
    if image.mode == "F" or (image.mode == "I" and (values.min() < 0 or values.max() > 65535)):
        kind = "32-bit float pixels" if image.mode == "F" else "32-bit pixels"
        raise ValueError(
            f"{kind} have no defined range (here {values.min():g} to {values.max():g}): set data.pixel_range=[LOW,HIGH]"
        )
    return Image.fromarray((values / 257 + 0.5).astype(np.uint8))


def to_mode(image: Image.Image, channels: int, pixel_range: PixelRange | None = None) -> Image.Image:
    """An image of any mode -> RGB (3 channels) or L (1)."""
    if is_wide(image):
        image = to_8_bits(image, pixel_range)
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert({1: "L", 3: "RGB"}[channels])


# -- Files ------------------------------------------------------------------------------------------------------------

pillow_open = Image.open  # which `careful_pillow` replaces for a while
Load = Callable[[Image.Image, int], Image.Image]  # of an image, decoded or not, and the number of channels
ImageFile = str | os.PathLike[str] | IO[bytes]


def decode(
    file: ImageFile,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    name: str = "",
    load: Load | None = None,
    pixel_range: PixelRange | None = None,
    examine: Callable[[Image.Image], None] | None = None,
) -> Image.Image:
    """An image file -> upright PIL image of mode RGB (3 channels) or L (1), whatever it was stored as.

    `name` stands for the file in messages if it is an open one. `load` decodes instead of `whole`. `examine` is
    called with the opened file first.

    The orientation is applied; other metadata are not read, and may be damaged. Grey pixels of more than 8 bits are
    scaled to 8 (`to_8_bits`), transparency is dropped, as torchvision and timm do.

    Raises:
        UnreadableImage: not an image, of a format that is not read, damaged, or of more than `max_pixels` pixels.
    """

    def convert(image: Image.Image) -> Image.Image:
        if pixel_range is not None and _is_reduced(image):
            raise UnreadableImage(
                f"{name or file}: data.pixel_range is for grey pixels, and this is a colour image; leave "
                "data.pixel_range out, or store the image in grey"
            )
        used_range = declared_range(image, pixel_range)
        if examine is not None:
            examine(image)
        if is_wide(image):
            image = to_mode(upright(image), channels, used_range)
        return (load or whole)(image, channels)

    return _open(file, max_pixels, name, convert)


def whole(image: Image.Image, channels: int) -> Image.Image:
    """An opened file -> all of its pixels, upright, of mode RGB or L."""
    return to_mode(upright(image), channels)


def _open(file: ImageFile, max_pixels: int, name: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`convert` of the opened file; a second time without its metadata if that fails."""
    where = name or file
    try:
        if isinstance(file, str | os.PathLike) and not stat.S_ISREG(os.stat(file).st_mode):
            raise UnreadableImage(f"{where}: no regular file")  # a pipe would be waited for
        if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = max_pixels
        try:
            return _convert(file, max_pixels, where, convert)
        except (UnreadableImage, MemoryError, Image.DecompressionBombError):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno:  # the file cannot be read
                raise
            if (again := _convert_pixels(file, max_pixels, where, convert)) is None:
                raise
            return again
    except UnreadableImage:
        raise
    except UnidentifiedImageError:
        raise UnreadableImage(f"{where}: no image, or of a format that is not read") from None
    except Image.DecompressionBombError as error:
        raise UnreadableImage(f"{where}: {error}") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImage(f"{where}: {reason or type(error).__name__}") from None


def _convert(file: Any, max_pixels: int, where: Any, convert: Any, exif: bytes | None = None) -> Image.Image:
    with pillow_open(file, formats=image_formats()) as image:
        width, height = image.size
        if not width * height:
            raise UnreadableImage(f"{where}: it has no pixels ({width}x{height})")
        if width * height > max_pixels:
            raise TooManyPixels(
                f"{where}: {width}x{height} is more than data.max_pixels={max_pixels} allows; "
                f"to read it, set data.max_pixels={width * height}"
            )
        if exif:
            image.info["exif"] = exif
        result: Image.Image = convert(image)
        return result


def _convert_pixels(file: Any, max_pixels: int, where: Any, convert: Any) -> Image.Image | None:
    """As `_convert`, of the file without its metadata; None if that fails too."""
    try:
        if isinstance(file, str | os.PathLike):
            with open(file, "rb") as opened:
                content = opened.read(LARGEST_REPAIR + 1)
        else:
            file.seek(0)
            content = file.read(LARGEST_REPAIR + 1)
        if len(content) > LARGEST_REPAIR:
            return None
        if (stripped := without_metadata(content)) is None:
            return None
        return _convert(io.BytesIO(stripped[0]), max_pixels, where, convert, stripped[1])
    except UnreadableImage:
        raise
    except Exception:
        return None


LARGEST_REPAIR = 1 << 28  # bytes of a file
_limits: list[int] = []  # max_pixels of each `careful_pillow` that is open
_lock = threading.Lock()


@contextmanager
def careful_pillow(max_pixels: int) -> Iterator[None]:
    """In the context, other packages' `PIL.Image.open` reads as `decode` does: its formats, at most `max_pixels`.

    What it returns is decoded and upright. For readers of data sets, which open images themselves.
    """

    def careful_open(file: Any, mode: str = "r", formats: Any = None) -> Image.Image:
        return _open(file, min(_limits, default=MAX_PIXELS), "an image" if hasattr(file, "read") else "", _plain)

    with _lock:
        if not _limits:
            Image.open = careful_open  # type: ignore[assignment]
        _limits.append(max_pixels)
    try:
        yield
    finally:
        with _lock:
            _limits.remove(max_pixels)
            if not _limits:
                Image.open = pillow_open


def _plain(image: Image.Image) -> Image.Image:
    declared = declared_range(image)
    plain = upright(image).copy()
    plain.info = {key: value for key, value in plain.info.items() if key == "transparency"}
    return to_8_bits(plain, declared) if declared else plain


# -- Sets of images ---------------------------------------------------------------------------------------------------


class Source(Protocol):
    """Where an image lies, if not in a file of its own."""

    def open(self) -> IO[bytes] | Image.Image: ...


@dataclass
class Images:
    """Labelled images. `classes[labels[i]]` is the class of image i.

    `sources` are paths, uint8 arrays (H, W) or (H, W, 3), or objects of `Source`.
    """

    classes: list[str]
    labels: list[int]
    names: list[str]
    sources: list[Any]
    max_pixels: int = MAX_PIXELS
    pixel_range: PixelRange | None = None  # of grey images of more than 8 bits, see `to_8_bits`
    left_out: Counter[str] = field(default_factory=Counter)  # what lies next to the images and was not read
    held_out: float | None = None  # the share of a folder's images that these validation images are

    def __len__(self) -> int:
        return len(self.labels)

    def read(
        self,
        index: int,
        channels: int,
        load: Load | None = None,
        examine: Callable[[Image.Image], None] | None = None,
    ) -> Image.Image:
        """Image `index` as RGB (3 channels) or L (1): whole, or what `load` makes of the file or of the whole image.

        Raises:
            UnreadableImage
        """
        source = self.sources[index]
        if isinstance(source, str):
            return decode(source, channels, self.max_pixels, "", load, self.pixel_range, examine)
        name = self.names[index]
        opened: Any
        try:
            if isinstance(source, np.ndarray):
                opened = Image.fromarray(source)
            else:
                with careful_pillow(self.max_pixels):  # a data set of another package may decode
                    opened = source.open()
            image = None
            if isinstance(opened, Image.Image):
                if examine is not None:
                    examine(opened)
                image = to_mode(opened, channels, self.pixel_range)
        except Exception as error:  # packages that read data sets raise their own
            raise UnreadableImage(f"{name}: {first_line(error)}") from None
        if image is not None:
            return load(image, channels) if load else image
        with opened:
            return decode(opened, channels, self.max_pixels, name, load, self.pixel_range, examine)

    def subset(self, indices: Iterable[int]) -> "Images":
        indices = list(indices)
        return replace(
            self,
            labels=[self.labels[i] for i in indices],
            names=[self.names[i] for i in indices],
            sources=[self.sources[i] for i in indices],
        )

    def evenly(self, count: int) -> "Images":
        """At most `count` images, evenly spaced."""
        count = min(count, len(self))
        return self.subset(i * len(self) // count for i in range(count))

    def sizes(self) -> list[int]:
        """Bytes of each image as stored; -1 if not known, or if the file is gone."""
        with ThreadPoolExecutor(32) as pool:  # network disks answer slowly, but many at a time
            parts = [self.sources[start : start + 4096] for start in range(0, len(self), 4096)]
            return [size for part in pool.map(lambda part: [_size(source) for source in part], parts) for size in part]

    def pixel_sizes(self, most: int) -> list[tuple[int, int]]:
        """(width, height) as stored, of at most `most` images, evenly spaced. Only headers of files are read."""
        sizes: list[tuple[int, int]] = []

        def look(image: Image.Image, channels: int) -> Image.Image:
            sizes.append(image.size)
            return Image.new("L", (1, 1))

        sample = self.evenly(most)
        for index in range(len(sample)):
            with suppress(UnreadableImage):
                sample.read(index, 3, look)
        return sizes

    def digest(self) -> str:
        """A hash of classes, names and labels: two processes with the same one see the same data."""
        lines = "\n".join([*self.classes, *(f"{n} {y}" for n, y in zip(self.names, self.labels, strict=True))])
        return hashlib.sha256(lines.encode(errors="surrogateescape")).hexdigest()[:16]

    def content_digest(self) -> str:
        """A hash of the sizes in bytes of all images, and of the first 64 KiB of 64 of them, evenly spaced."""
        parts = [*map(str, self.sizes()), *map(hash_start, self.evenly(SAMPLES).sources)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16]


SAMPLES = 64  # images of a set whose content is compared when a run resumes
START = 1 << 16  # bytes


def hash_start(source: Any) -> str:
    """A hash of the first 64 KiB of an image as stored; empty if it cannot be read, or is of another package."""
    if recorded := getattr(source, "stored_hash", ""):
        return str(recorded)
    if isinstance(source, np.ndarray):
        start = source.tobytes()[:START]
    else:
        try:
            if isinstance(source, str) and not stat.S_ISREG(os.stat(source).st_mode):
                return ""
            with open(source, "rb") if isinstance(source, str) else source.open_stored() as file:
                start = file.read(START)
        except (OSError, AttributeError):
            return ""
    return hashlib.sha256(start).hexdigest()[:16]


def _size(source: Any) -> int:
    if isinstance(source, str):
        try:
            return os.stat(source).st_size
        except OSError:
            return -1
    return source.nbytes if isinstance(source, np.ndarray) else getattr(source, "stored_size", -1)


def compose(name: str) -> str:
    """A name in Unicode's composed form (NFC), in which names are compared: macOS may write the decomposed one."""
    return unicodedata.normalize("NFC", name)


# -- Views -------------------------------------------------------------------------------------------------------------


def limit_aspect_ratio(image: Image.Image) -> Image.Image:
    """The centre of an image that is more than 8 times as long as wide: resized, it would grow without bound."""
    width, height = image.size
    if max(width, height) > 8 * min(width, height):
        image = TF.center_crop(image, [min(height, 4 * width), min(width, 4 * height)])
    return image


def resize_and_crop(image: Image.Image, resize: int, size: int, interpolation: str) -> Image.Image:
    """Shorter side to `resize` pixels, then the centre `size` x `size`: what evaluation and prediction see."""
    image = limit_aspect_ratio(image)
    if min(image.size) != resize:
        image = TF.resize(image, [resize], InterpolationMode(interpolation), antialias=True)
    return TF.center_crop(image, [size]) if image.size != (size, size) else image


def to_uint8(image: Image.Image) -> Tensor:
    """PIL image of mode RGB or L -> (channels, height, width) uint8."""
    array = torch.from_numpy(np.array(image))
    return array[None] if array.ndim == 2 else array.permute(2, 0, 1).contiguous()


def normalise(images: Tensor, mean: Iterable[float] | Tensor, std: Iterable[float] | Tensor) -> Tensor:
    """(B, channels, height, width) uint8 -> float, (x / 255 - mean) / std; tensors must be on the images' device."""
    given = (v if isinstance(v, Tensor) else _on_device(tuple(v), images.device) for v in (mean, std))
    mean_, std_ = (v.view(-1, 1, 1) for v in given)
    return (images.float() / 255 - mean_) / std_


@cache
def _on_device(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32, made once: the host waits for each copy to the device."""
    with torch.inference_mode(False):  # of use in a backward pass too
        return torch.tensor(values, dtype=torch.float32, device=device)


class Normaliser:
    """`normalise` of training batches, as they lie in memory: (B, height, width, channels) uint8.

    Its constants wait on the device, so that no step waits for a copy. On the CPU images are processed one
    by one, so that each fits into the cache.
    """

    def __init__(self, view: "Preprocessing", device: torch.device) -> None:
        mean, std = torch.tensor(view.mean), torch.tensor(view.std)
        row = torch.stack((1 / (255 * std), -mean / std)).repeat(1, view.size)  # (2, size * channels)
        self.scale, self.shift = row.to(device)
        self.at_once = device.type != "cpu"

    def __call__(self, images: Tensor) -> Tensor:
        """-> (B, channels, height, width) float, channels last."""
        batch, height, width, channels = images.shape
        rows = images.view(batch, height, width * channels)
        out = torch.empty(rows.shape, device=rows.device)
        step = batch if self.at_once else 1
        for raw, part in zip(rows.split(step), out.split(step), strict=True):
            torch.addcmul(self.shift, raw.float(), self.scale, out=part)
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


def denormalise(images: Tensor, mean: Iterable[float], std: Iterable[float]) -> Tensor:
    """The inverse of `normalise`, to look at: (..., channels, height, width) -> the same in 0..1, on the CPU."""
    mean_, std_ = (torch.tensor(tuple(v)).view(-1, 1, 1) for v in (mean, std))
    return (images.cpu() * std_ + mean_).clamp(0, 1)


@dataclass
class Preprocessing:
    """Size, crop, interpolation and normalisation of images, for training, evaluation and prediction."""

    size: int
    resize: int
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return len(self.mean)

    def pixels(self, image: Image.Image) -> Tensor:
        """PIL image -> (channels, size, size) uint8, as evaluation sees it."""
        return to_uint8(resize_and_crop(image, self.resize, self.size, self.interpolation))
