"""Pictures whose colours are known, the bytes of unusual and hostile image files, and colour profiles."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]
WIDTH, HEIGHT = 48, 32
POINTS = ((11, 7), (35, 7), (11, 23), (35, 23))  # the centres of the four quarters of `picture`
SHADES = ((50, 80), (110, 140), (170, 200))  # of the three channels of a colour of `picture`, in any order


# --- pictures and files -----------------------------------------------------------------------------------------------


def picture(rng: np.random.Generator) -> tuple[Image.Image, dict[tuple[int, int], Colour]]:
    """A photo of four plain quarters, and the colours at their centres."""
    # Of colours that are plain enough to change in another profile.
    quarters = np.stack([rng.permutation([rng.integers(*span) for span in SHADES]) for _ in range(4)])
    pixels = np.empty((HEIGHT, WIDTH, 3), dtype=np.uint8)
    for quarter, colour in enumerate(quarters):
        top, left = quarter // 2 * HEIGHT // 2, quarter % 2 * WIDTH // 2
        pixels[top : top + HEIGHT // 2, left : left + WIDTH // 2] = colour
    return Image.fromarray(pixels), dict(zip(POINTS, (tuple(map(int, c)) for c in quarters), strict=True))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    if format == "JPEG" and image.mode != "CMYK":
        options = {"quality": 95, "subsampling": 0, **options}
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png(width: int, height: int, depth: int, colour_type: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of filtered `rows`, for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts)


def gif_of_a_corner(width: int, height: int) -> bytes:
    """A GIF whose one picture, 2 x 1 of blue, covers its top right corner only; the palette begins with red."""
    palette = bytes([255, 0, 0, 0, 0, 255])
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + palette
    # LZW codes of 3 bits: clear, 1, clear, 1, end.
    codes = sum(code << 3 * place for place, code in enumerate((4, 1, 4, 1, 5)))
    data = codes.to_bytes(2, "little")
    return screen + b"," + struct.pack("<HHHHB", width - 2, 0, 2, 1, 0) + b"\x02\x02" + data + b"\x00;"


def tiff_of_a_tile(side: int, tile_side: int) -> bytes:
    """A grey TIFF of black whose one tile, packed by deflate, is larger than the picture."""
    data = zlib.compress(bytes(tile_side * tile_side), 1)
    values = {256: side, 257: side, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile_side, 323: tile_side, 324: 0}
    values[325] = len(data)
    values[324] = 8 + 2 + 12 * len(values) + 4  # where the tile begins
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(values.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + struct.pack("<I", 0) + data


def write_sparse_file(path: Path) -> None:
    """600 MiB that take no room on the disk."""
    with open(path, "wb") as file:
        file.truncate(600 * 2**20)


def jpeg_of_scans(image: Image.Image, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encoded(image, "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * scans + data[-2:]


def ycck(image: Image.Image) -> bytes:
    """The JPEG that Photoshop writes of CMYK: inverted, its first three channels as YCbCr, and Adobe's marker."""
    cyan, magenta, yellow, black = image.split()
    inks = Image.merge("RGB", (cyan, magenta, yellow)).convert("YCbCr")
    # Pillow inverts all four channels as it writes them.
    stored = Image.merge("CMYK", (*(channel.point(lambda v: 255 - v) for channel in inks.split()), black))
    data = bytearray(encoded(stored, "JPEG", quality=95))
    data[data.index(b"Adobe") + 11] = 2  # the transform: YCCK
    return bytes(data)


# --- colour profiles --------------------------------------------------------------------------------------------------

# Columns: XYZ of red, green and blue, adapted to D50.
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
DISPLAY_P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
D50 = np.array([0.9642, 1.0, 0.8249])
# CIELab of the corners of the cube of inks, as on coated paper: bits are cyan, magenta, yellow. Black covers all.
INKS = {0: (100, 0, 0), 1: (89, -5, 93), 2: (48, 74, -3), 3: (47, 68, 48), 4: (55, -37, -50), 5: (50, -65, 27)}
INKS |= {6: (24, 17, -46), 7: (23, 0, 0)}
BLACK = (16, 0, 0)


def to_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def from_linear(values: np.ndarray) -> np.ndarray:
    values = np.clip(values, 0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def in_colours_of(image: Image.Image, matrix: np.ndarray, gamma: float | None) -> Image.Image:
    """An sRGB photo as it is stored with a profile of these primaries (gamma None: sRGB's curve)."""
    linear = to_linear(np.asarray(image) / 255) @ np.linalg.inv(matrix).dot(SRGB).T
    values = from_linear(linear) if gamma is None else np.clip(linear, 0, 1) ** (1 / gamma)
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))


def lab_to_srgb(lab: Sequence[float]) -> Colour:
    lightness, a, b = lab
    f = np.array([(lightness + 16) / 116 + a / 500, (lightness + 16) / 116, (lightness + 16) / 116 - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50
    return tuple(int(v) for v in np.rint(from_linear(np.linalg.inv(SRGB) @ xyz) * 255))


def _profile(device: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": _text("a test profile"), b"cprt": _text("none"), b"wtpt": _xyz(D50), **tags}
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        table += tag + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I4sI4s4s4s", start + len(body), b"\0" * 4, 0x04300000, device, space, connection)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _fixed(*D50)
    return header.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _fixed(*values: float) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(*values)


def _text(text: str) -> bytes:
    data = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II2s2sII", 1, 12, b"en", b"US", len(data), 28) + data


def _curve(gamma: float | None) -> bytes:
    if gamma is not None:
        return b"para\0\0\0\0" + struct.pack(">HH", 0, 0) + _fixed(gamma)
    return b"para\0\0\0\0" + struct.pack(">HH", 3, 0) + _fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def rgb_profile(matrix: np.ndarray, gamma: float | None) -> bytes:
    tags = {name + b"XYZ": _xyz(matrix[:, i]) for i, name in enumerate((b"r", b"g", b"b"))}
    tags |= {name + b"TRC": _curve(gamma) for name in (b"r", b"g", b"b")}
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """A press that prints the inks of `INKS`."""
    corners = [BLACK if corner & 1 else INKS[corner >> 1] for corner in range(16)]
    table = bytes(v for light, a, b in corners for v in (round(light * 2.55), a + 128, b + 128))  # of 8 bits each
    identity = _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut = b"mft1\0\0\0\0" + struct.pack(">4B", 4, 3, 2, 0) + identity
    lut += bytes(range(256)) * 4 + table + bytes(range(256)) * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut})
