"""Turns photos and titles, in whatever form they come, into what the model's processor takes: PIL RGB and clean text.

    photo = read_photo("mug.jpg")          # or bytes, an http(s) address, a PIL image, {"bytes", "path"} of `datasets`
    title = clean_title("  striped blue mug ")

Training, evaluation, galleries and pipeline all read with this file, so that they see the same pixels. What can't be
used raises `UnusableItem` with a plain reason, whatever the bytes are.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import stat
import threading
import time
import unicodedata
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

try:
    from PIL import Image, ImageOps
except ImportError:  # titles can be read without it
    Image = ImageOps = None
try:  # photos of phones, as Pillow alone does not read them
    import pillow_heif

    pillow_heif.register_heif_opener()
except ImportError:
    pillow_heif = None

# Pillow warns of odd EXIF, palettes and sizes; here only the pixels and the limits below count. Switched off for the
# whole process, since `catch_warnings` in several threads can leave a process without any warnings.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow warns above this size and refuses only above twice as much; a product photo of 90 megapixels is an attack or a
# mistake.
MAX_PIXELS = 89_478_485
# More than any photo of that many pixels takes, and little enough to be read by every worker at once.
MAX_FILE_BYTES = 512 * 2**20
# Encoders usually write about ten. Each scan covers the whole photo, so that a few kilobytes of scans can take minutes.
MAX_JPEG_SCANS = 100
# A title keeps about 35 tokens: what follows this many characters can't matter, but would take the tokenizer seconds.
MAX_TITLE_CHARACTERS = 10_000
# Formats a shop would use. Others stay out: Pillow starts a PostScript interpreter for EPS, for instance.
IMAGE_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "HEIF")
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1")
EXIF_ORIENTATION = 0x0112
# After so long without an answer a photo's address counts as unreachable.
TIMEOUT_SECONDS = 60


class _Room:
    """Pixels that the threads of a process hold decoded together, `MAX_PIXELS` at most: who finds no room waits."""

    def __init__(self):
        self._free, self._changed, self._turn = MAX_PIXELS, threading.Condition(), threading.Lock()

    @contextlib.contextmanager
    def of(self, size: tuple[int, int]) -> Iterator[None]:
        pixels = min(size[0] * size[1], MAX_PIXELS)
        with self._turn, self._changed:  # in turn: a large photo would wait for ever among many small ones
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


_room = _Room()
if hasattr(os, "register_at_fork"):  # what another thread held is nobody's in the child
    os.register_at_fork(after_in_child=_room.__init__)


class UnusableItem(ValueError):
    """A photo or title that can't be used; the message is a plain reason for the report."""


class MissingFile(UnusableItem):
    """A photo whose file is not there."""


def reads_heic() -> bool:
    """Whether HEIC photos can be read: with `pillow-heif`."""
    return Image is not None and "HEIF" in _formats()


def clean_title(value: Any) -> str:
    """The title as the tokenizer gets it: stripped, cut at `MAX_TITLE_CHARACTERS`, without half characters.

    Raises:
        UnusableItem: not text, or nothing that a reader would see.
    """
    if value is None:
        raise UnusableItem("the title is null")
    if not isinstance(value, str):
        raise UnusableItem(f"the title is not text but {type(value).__name__}")
    # Lone surrogates (half an emoji) can't be encoded, and would make the tokenizer fail for the whole batch.
    # Stripped before it is cut: a title that begins with very many blanks would seem to be empty.
    text = value.strip()[:MAX_TITLE_CHARACTERS].encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()
    # Not separators, controls, format characters, unassigned ones, nor combining marks with nothing below them.
    if all(unicodedata.category(character)[0] in "ZCM" for character in text):
        raise UnusableItem("the title is empty" if not value else "the title has no visible character")
    return text


def fetch(address: str, most_bytes: int) -> bytes:
    """The first bytes, at most `most_bytes`, of what an http(s) address gives within `TIMEOUT_SECONDS`.

    Raises:
        UnusableItem: it can't be fetched.
    """
    if not address.startswith(("http://", "https://")):
        raise UnusableItem(f"the address {address} is neither http:// nor https://")
    data, end = bytearray(), time.monotonic() + TIMEOUT_SECONDS
    problems: list[Exception] = [TimeoutError(f"not within {TIMEOUT_SECONDS} seconds")]

    def read() -> None:
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT_SECONDS) as answer:
                while piece := answer.read1(min(most_bytes - len(data), 2**20)):
                    data.extend(piece)
                    if time.monotonic() > end:
                        return
            problems.clear()
        except Exception as error:  # urllib, http and ssl have kinds of their own
            problems[0] = error

    # A server that gives a byte now and then would never end the call: its headers alone can last for days.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(TIMEOUT_SECONDS)
    if problems:
        reason = " ".join(str(problems[0]).split())[:200]
        raise UnusableItem(f"the image can't be fetched ({address}: {reason})")
    return bytes(data)


def read_photo(
    value: Any,
    fetch: Callable[[str, int], bytes] = fetch,
    suffices: Callable[[int, int], bool] | None = None,
    told: Callable[[bytes], None] | None = None,
) -> Image.Image:
    """A PIL image, bytes, a path, an address, or {"bytes", "path"} as `datasets` stores photos, to PIL RGB as a person
    sees it: EXIF orientation and colour profile applied, transparency over white, of an animation the first picture.

    Args:
        fetch: reads an address, at most so many bytes of it, or raises `UnusableItem`.
        suffices: whether a picture of (width, height) pixels is large enough. A JPEG is then decoded at the smallest
            of 1/2, 1/4 and 1/8 of its sides that is, which takes less time; None: as large as it is.
        told: gets the bytes of the file before they are decoded; of a PIL image its size and the bytes of the result.

    Raises:
        UnusableItem: with a plain reason; no other exception leaves this function, whatever the bytes are.
        ImportError: Pillow is not installed.
    """
    with decoded_photo(value, fetch, suffices, told) as image:
        return image


@contextlib.contextmanager
def decoded_photo(value: Any, *options: Any) -> Iterator[Image.Image]:
    """As `read_photo`, for the time that the picture is in use: threads together hold at most `MAX_PIXELS`, and those
    of large photos wait for each other. Inside none may ask for another one."""
    with contextlib.ExitStack() as held:
        yield _decode(held, value, *options)


def _decode(held: contextlib.ExitStack, value: Any, fetch=fetch, suffices=None, told=None) -> Image.Image:
    if Image is None:
        raise ImportError("photos are read with Pillow: pip install pillow")
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise UnusableItem("the image is null")
    try:
        if isinstance(value, Image.Image):
            held.enter_context(_room.of(value.size))
            image = _to_rgb(value)
            if told is not None:
                told(f"{image.size} ".encode() + image.tobytes())
            return image
        data = open_image(value, fetch)
        if told is not None:
            told(data.getvalue())
        with Image.open(data, formats=_formats()) as image:
            _refuse_hidden_bombs(image, data)
            if suffices is not None and image.format == "JPEG":
                _decode_smaller(image, suffices)
            held.enter_context(_room.of(image.size))
            return _to_rgb(image)
    except UnusableItem:
        raise
    except Image.DecompressionBombError:
        raise UnusableItem(f"the image has more than {MAX_PIXELS:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise UnusableItem(_unidentified(data)) from None
    except FileNotFoundError:
        raise MissingFile("the image file is missing") from None
    except Exception as error:  # Pillow's plugins raise anything at all on damaged files
        reason = " ".join(str(error).split())[:200]
        raise UnusableItem(f"the image can't be decoded ({type(error).__name__}: {reason})") from None


def _unidentified(data: io.BytesIO) -> str:
    if data.getvalue()[4:8] != b"ftyp" or data.getvalue()[8:12] not in HEIC_BRANDS:
        return "the file is not an image of a known format"
    missing = "which is read where pillow-heif is installed (the extra heic)"
    return "the photo is HEIC and damaged" if reads_heic() else f"the photo is HEIC, {missing}"


def _formats() -> list[str]:
    Image.init()
    return [name for name in IMAGE_FORMATS if name in Image.OPEN]


def open_image(value: Any, fetch: Callable[[str, int], bytes]) -> io.BytesIO:
    if isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
    elif isinstance(value, (str, os.PathLike)):
        path, size, data = os.fspath(value), 0, b""
        if "://" in path:
            data = fetch(path, MAX_FILE_BYTES + 1)
        elif not stat.S_ISREG((status := os.stat(path)).st_mode):  # a named pipe would be read for ever
            raise UnusableItem("the image is a folder or a device, not a file")
        elif (size := status.st_size) <= MAX_FILE_BYTES:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        if max(len(data), size) > MAX_FILE_BYTES:
            raise UnusableItem(f"the image file is larger than {MAX_FILE_BYTES // 2**20} MiB")
    else:
        raise UnusableItem(f"the image is neither bytes nor a path but {type(value).__name__}")
    if not data:
        raise UnusableItem("the image file is empty")
    return io.BytesIO(data)


def _refuse_hidden_bombs(image: Image.Image, data: io.BytesIO) -> None:
    """Refuse files that take very much more time or memory than the size of their picture says."""
    # A marker never occurs inside compressed data, where 0xFF is always followed by a zero.
    if image.info.get("progressive") and data.getvalue().count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise UnusableItem(f"the JPEG has more than {MAX_JPEG_SCANS} scans")
    if image.format == "TIFF":
        width, height = (image.tag_v2.get(tag, 0) for tag in (322, 323))  # TileWidth, TileLength
        if width * height > MAX_PIXELS:
            raise UnusableItem(f"a tile of the TIFF has more than {MAX_PIXELS:,} pixels")


def _decode_smaller(image: Image.Image, suffices: Callable[[int, int], bool]) -> None:
    """Let a JPEG that isn't loaded yet be decoded at the smallest scale that suffices."""
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnusableItem(f"the image has more than {MAX_PIXELS:,} pixels")
    for part in (8, 4, 2):
        if suffices(-(-width // part), -(-height // part)):  # libjpeg rounds up
            image.draft(None, (max(width // part, 1), max(height // part, 1)))
            return


def _to_rgb(image: Image.Image) -> Image.Image:
    if not image.width or not image.height:
        raise UnusableItem("the image has no pixels")
    if image.width * image.height > MAX_PIXELS:
        raise UnusableItem(f"the image has more than {MAX_PIXELS:,} pixels")
    is_turned = image.format == "TIFF"  # when it is loaded, after which some versions of Pillow keep the tag
    image = loaded = _load(image)
    with contextlib.suppress(Exception):  # damaged EXIF: every viewer then shows the photo as it is stored
        if not is_turned and image.getexif().get(EXIF_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode == "F" or image.mode.startswith("I"):
        image = _to_eight_bits(image)
    alpha = None
    if _has_transparency(image):
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        alpha = image.getchannel("A")
        image = image.convert("L" if image.mode == "LA" else "RGB")
    image = _to_srgb(image, profile)
    if alpha is not None:
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=alpha)
        image = white
    if image is loaded:
        image = image.copy()  # so that no file handle travels on
    image.info = {}  # a profile that is applied already would be written into every copy that is saved
    return image


def _load(image: Image.Image) -> Image.Image:
    """The decoded picture, corrected where Pillow reads transparency differently from viewers."""
    tile = image.tile[0] if getattr(image, "tile", None) else None  # which loading forgets
    image.load()
    key = image.info.get("transparency")
    if tile is None:
        return image
    _, box, _, stored = tile
    if image.format == "PNG" and key is not None:
        # The transparent shade is given in the depth of the file, and Pillow looks for it among values of 8 bits.
        if stored in ("L;2", "L;4"):
            image.info["transparency"] = key * (85 if stored == "L;2" else 17)
        elif stored == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in key)
    if image.format == "GIF" and key is None and box != (0, 0, *image.size):
        # The first picture of a GIF may cover only a part: the rest is empty, and not the palette's first colour.
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image.crop(box), box)
        return white
    return image


def _has_transparency(image: Image.Image) -> bool:
    # Not Image.has_transparency_data, which older Pillow lacks.
    in_palette = image.mode == "P" and image.palette.mode == "RGBA"
    return image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info or in_palette


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Greyscale of 16 or 32 bits, or floats, to 8 bits by its range (Pillow's own conversion cuts at 255)."""
    # In bands, since intermediate results of a whole large picture would take gigabytes.
    rows = max(2**20 // image.width, 1)
    edges = [(0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows)]

    def bands() -> Iterator[np.ndarray]:
        for edge in edges:
            values = np.asarray(image.crop(edge))
            yield np.nan_to_num(values, nan=0.0, posinf=255.0, neginf=0.0) if image.mode == "F" else values

    largest = max(band.max() for band in bands())
    if image.mode == "F":
        scale = 255.0 if largest <= 1.0 else 1.0
    elif image.mode.startswith("I;16") or 255 < largest <= 65535:
        scale = 1 / 257
    else:
        scale = 1.0 if largest <= 255 else 1 / 16_843_009
    grey = np.concatenate([np.rint(np.clip(band * scale, 0, 255)).astype(np.uint8) for band in bands()])
    picture = Image.fromarray(grey)
    if (key := image.info.get("transparency")) is not None:
        alpha = np.concatenate([np.where(band == key, 0, 255).astype(np.uint8) for band in bands()])
        picture = Image.merge("LA", (picture, Image.fromarray(alpha)))
    return picture


def _to_srgb(image: Image.Image, profile: Any) -> Image.Image:
    """The image in RGB, by its colour profile if it has one that can be read."""
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    convert = _conversion(profile, image.mode) if isinstance(profile, bytes) else None
    if convert is not None:
        return convert(image)
    return image.convert("RGB") if image.mode != "RGB" else image


@functools.lru_cache(maxsize=16)  # a catalogue has few different profiles, and building a conversion takes milliseconds
def _conversion(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """The conversion from a colour profile to sRGB, or None if there is nothing to convert."""
    try:
        from PIL import ImageCms

        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        convert = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB").apply
        if mode == "CMYK":
            return convert
        steps = np.indices((6, 6, 6)).reshape(3, -1).T * 51
        probe = Image.fromarray(steps.astype(np.uint8)[None]).convert(mode)
        difference = np.asarray(convert(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    except Exception:  # a broken profile or one of other colours, which viewers ignore; or Pillow without LittleCMS
        return None
    return convert if np.abs(difference).max() > 2 else None  # sRGB itself, whose many versions differ in rounding


__all__ = [
    *("HEIC_BRANDS", "IMAGE_FORMATS", "MAX_FILE_BYTES", "MAX_TITLE_CHARACTERS", "MissingFile", "UnusableItem"),
    *("clean_title", "decoded_photo", "open_image", "read_photo", "reads_heic"),
]
