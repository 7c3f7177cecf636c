"""A corpus of hostile and unusual rows, drawn from a seed, each with what has to come of it.

    cases = corpus(seed=0, multiple_of=8)  # with good rows in between
    write_image_folder(tmp_path / "folder", cases)
    write_parquet(tmp_path / "parquet", cases)

Both return the cases they wrote, in row order. A folder holds all of them. A Parquet file has typed cells, so that a
case may stand there in its closest form:

- Product ids are text: numbers become their digits, and lists are left out.
- Titles and file names are text: numbers, lists and half surrogate pairs are left out.
- An image that a folder lacks, or whose name leads out of it, is a path without bytes.
- Damaged metadata lines, and files that are no regular files, are left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiny
from hostile_files import (
    ADOBE_RGB,
    BLACK,
    DISPLAY_P3,
    HEIGHT,
    INKS,
    POINTS,
    SRGB,
    WIDTH,
    Colour,
    cmyk_profile,
    encoded,
    gif_of_a_corner,
    grey_profile,
    in_colours_of,
    jpeg_of_scans,
    lab_to_srgb,
    picture,
    png,
    rgb_profile,
    tiff_of_a_tile,
    to_linear,
    write_sparse_file,
    ycck,
)
from PIL import Image, features

WHITE = (255, 255, 255)
BEYOND = "../outside.png"
MISSING = object()  # left to the corpus
ABSENT = object()  # not in the metadata


@dataclass(frozen=True)
class Case:
    """One row, and what has to come of it.

    What is stored: `image` the bytes of the file, None for no file; `file` the name in the metadata; `caption`;
    `product_id`; `line` a whole metadata line that takes the place of these; `make` writes something else than a
    regular file of bytes at a path.

    What is expected: `reason` a part of the reason why the row is skipped, or None for a usable row, then `size`,
    `colours` at points within `tolerance`, `title`, `reads_like` a title of the same tokens, `id` the
    int64 product id, or None for an id that no other row has.

    `parquet` holds the fields that differ in Parquet, None where the case does not exist there.
    """

    name: str
    image: bytes | None = None
    file: Any = MISSING
    caption: Any = MISSING
    product_id: Any = MISSING
    line: bytes | None = None
    make: Callable[[Path], None] | None = None
    reason: str | None = None
    size: tuple[int, int] | None = None
    colours: dict[tuple[int, int], Colour] = field(default_factory=dict)
    tolerance: int = 0
    title: str | None = None
    reads_like: str | None = None
    id: int | None = None
    parquet: dict[str, Any] | None = field(default_factory=dict)

    def listed_as(self, row: int) -> str:
        """The name in `skipped.jsonl`."""
        if self.line is not None or not isinstance(self.file, str):
            return f"row {row}"
        return self.file.encode("utf-8", "backslashreplace").decode("utf-8")


# --- the cases --------------------------------------------------------------------------------------------------------


def corpus(seed: int = 0, multiple_of: int = 8) -> list[Case]:
    """All cases with a good row after every second one, and as many more as make the rows a multiple of a batch."""
    rng = np.random.default_rng(seed)
    mixed: list[Case] = []
    for number, case in enumerate([*_damaged(rng), *_formats(rng), *_colours(rng), *_titles(rng), *_ids(rng)]):
        mixed += [case] if number % 2 else [case, _good(rng, len(mixed))]
    while len(mixed) % multiple_of:
        mixed.append(_good(rng, len(mixed)))
    assert len({case.name for case in mixed}) == len(mixed)
    return [_complete(case, row) for row, case in enumerate(mixed)]


def _complete(case: Case, row: int) -> Case:
    """Fill in what a case leaves to the corpus."""
    changes: dict[str, Any] = {}
    if case.file is MISSING:
        changes["file"] = f"{case.name.replace(' ', '_')}.{_extension(case.image)}"
    if case.caption is MISSING:
        words = tiny.WORDS[row % len(tiny.WORDS)], tiny.WORDS[row * 7 % len(tiny.WORDS)]
        changes |= {"caption": " ".join(words), "title": " ".join(words)}
    elif case.title is None:
        changes["title"] = case.caption
    if case.product_id is MISSING:
        changes |= {"product_id": f"id of {case.name}", "id": hashed(f"id of {case.name}")}
    elif case.id is None and isinstance(case.product_id, str) and case.product_id.strip():
        changes["id"] = hashed(case.product_id)
    return replace(case, **changes)


def hashed(value: str) -> int:
    return struct.unpack("<q", hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest())[0]


def _extension(data: bytes | None) -> str:
    magic = {b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp", b"II*\0": "tif", b"\0\0\0\x0c": "jp2"}
    return magic.get((data or b"")[:4], "jpg")


def _good(rng: np.random.Generator, row: int) -> Case:
    image, colours = picture(rng)
    return Case(f"good {row:03d}", encoded(image, "JPEG"), size=image.size, colours=colours, tolerance=3)


def _damaged(rng: np.random.Generator) -> list[Case]:
    """Files that are no photo, or not a whole one, or too much of one; and rows without a file."""
    image, _ = picture(rng)
    noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    good = encoded(image, "PNG")
    wide = Image.new("RGB", (9, 7))

    def cut(name: str, format: str, share: float = 0.5, **options) -> Case:
        data = encoded(noise, format, **options)
        return Case(name, data[: int(len(data) * share)], reason="can't be decoded")

    return [
        cut("JPEG cut in half", "JPEG"),
        cut("JPEG without its last tenth", "JPEG", 0.9),
        cut("progressive JPEG cut in half", "JPEG", progressive=True),
        cut("PNG cut in half", "PNG"),
        cut("WebP cut in half", "WEBP"),
        cut("GIF cut in half", "GIF"),
        cut("TIFF cut in half", "TIFF"),
        Case("JPEG of its first two bytes", b"\xff\xd8", reason="not an image"),
        Case("zero bytes", b"", reason="empty"),
        Case("HTML as JPEG", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", reason="not an image"),
        Case("PostScript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", reason="not an image"),
        Case("SVG", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', reason="not an image"),
        Case("random bytes", rng.bytes(4096), reason="not an image"),
        Case("PNG of no pixels", png(0, 9, 8, 0, b""), reason="not an image"),
        Case(
            "JPEG of no pixels",
            encoded(wide, "JPEG").replace(struct.pack(">HH", 7, 9), bytes(4)),
            reason="not an image",
        ),
        # Bombs: 112 MB of rows in 0.5 MB; a canvas, a tile, a number of scans that the header only claims.
        Case("PNG bomb", png(30_000, 30_000, 1, 0, bytes(3751 * 30_000)), reason="pixels"),
        Case("PNG that says it is huge", png(2**31 - 1, 2**31 - 1, 8, 2, b""), reason="pixels"),
        Case("GIF of a huge canvas", gif_of_a_corner(65_535, 65_535), reason="pixels"),
        Case("TIFF of a huge tile", tiff_of_a_tile(10, 10_000), reason="tile"),
        Case("JPEG of a thousand scans", jpeg_of_scans(image, 1000), reason="scans"),
        Case("sparse file of 600 MiB", make=write_sparse_file, reason="MiB", parquet=None),
        Case("folder as a photo", make=Path.mkdir, reason="folder or a device", parquet=None),
        Case("named pipe as a photo", make=os.mkfifo, reason="folder or a device", parquet=None),
        Case("null image", file=None, reason="null"),
        Case("number as file name", file=5, reason="not text", parquet=None),
        Case("blank file name", file=" ", reason="empty", parquet={"reason": "--image_dir"}),
        *(
            Case(name, file=file, reason=reason, parquet={"reason": "address" if name == "address" else "--image_dir"})
            for name, file, reason in (
                ("missing file", "gone.jpg", "missing"),
                ("file name longer than any file system takes", "x" * 5000 + ".jpg", "can't be decoded"),
                ("parent folder", BEYOND, "outside"),
                ("parent folder behind a folder", "sub/../../outside.png", "outside"),
                ("parent folder with backslashes", "..\\outside.png", "outside"),
                ("absolute path", "/etc/hostname", "outside"),
                ("drive letter", "C:\\outside.png", "outside"),
                ("address", "http://localhost/outside.png", "--fetch_photos"),
                ("file name with NUL", "a\0.png", "NUL"),
            )
        ),
        Case("file name with half a surrogate pair", file="\ud83d.png", reason="can't be decoded", parquet=None),
        Case("line that is no JSON", line=b'{"file_name": "a.png", "caption": ', reason="JSON object", parquet=None),
        Case("line of a list", line=b"[1, 2]", reason="JSON object", parquet=None),
        Case("line of bad UTF-8", line=b'{"file_name": "\xff\xfe"}', reason="JSON object", parquet=None),
        Case("line of brackets", line=b"[" * 100_000, reason="JSON object", parquet=None),
        Case("row without a title", good, caption=ABSENT, reason="title is null", parquet={"caption": None}),
    ]


def _formats(rng: np.random.Generator) -> list[Case]:
    """Photos of unusual make that every viewer shows."""
    cases = []

    def add(name: str, data: bytes, tolerance: int = 0, size=(WIDTH, HEIGHT), **changes) -> None:
        colours = changes.pop("colours", seen)
        cases.append(Case(name, data, size=size, colours=colours, tolerance=tolerance, **changes))

    image, seen = picture(rng)
    add("PNG named JPEG", encoded(image, "PNG"), file="a_png.jpg")
    add("JPEG named PNG", encoded(image, "JPEG"), 3, file="a_jpeg.png")
    add("WebP without extension", encoded(image, "WEBP", lossless=True), file="a_webp")
    add("progressive JPEG", encoded(image, "JPEG", progressive=True), 3)
    add("several photos in one JPEG", encoded(image, "MPO", save_all=True, append_images=[image.rotate(180)]), 12)
    add("JPEG followed by other bytes", encoded(image, "JPEG") + rng.bytes(999), 3)
    add("BMP", encoded(image, "BMP"))
    if features.check("jpg_2000"):
        add("JPEG 2000", encoded(image, "JPEG2000", irreversible=False))
    Image.init()
    if "AVIF" in Image.SAVE:  # not before Pillow 11.3
        add("AVIF", encoded(image, "AVIF", quality=100, subsampling="4:4:4"), 4, file="a.avif")

    # EXIF: stored turned or mirrored, seen upright.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    for orientation, transpose in undo.items():
        exif[0x0112] = orientation
        add(f"EXIF orientation {orientation}", encoded(image.transpose(transpose), "JPEG", exif=exif), 3)
    exif[0x0112] = 6
    turned = image.transpose(undo[6])
    for format, options in (("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        add(f"EXIF orientation in {format}", encoded(turned, format, exif=exif, **options))
    exif[0x0112] = 9
    add("EXIF orientation that does not exist", encoded(image, "PNG", exif=exif))
    add("damaged EXIF", encoded(image, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"))

    # Animations: the first picture.
    frames = [image.transpose(undo[3]), image.transpose(undo[2])]
    add("animated WebP", encoded(image, "WEBP", save_all=True, append_images=frames, lossless=True))
    add("animated PNG", encoded(image, "PNG", save_all=True, append_images=frames))
    add("TIFF of several pages", encoded(image, "TIFF", save_all=True, append_images=frames))
    add("animated GIF", encoded(image, "GIF", save_all=True, append_images=frames))
    add(
        "GIF whose picture covers a corner",
        gif_of_a_corner(8, 4),
        size=(8, 4),
        colours={(0, 0): WHITE, (7, 3): WHITE, (6, 0): (0, 0, 255), (7, 0): (0, 0, 255)},
    )

    for size in ((1, 1), (20_000, 1), (1, 20_000)):
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        data = encoded(Image.new("RGB", size, colour), "PNG")
        add(
            f"{size[0]} x {size[1]} pixels",
            data,
            size=size,
            colours={(0, 0): colour, (size[0] - 1, size[1] - 1): colour},
        )
    return cases


def _colours(rng: np.random.Generator) -> list[Case]:
    """Transparency, depths, palettes, inks and profiles."""
    cases = []

    def add(name: str, data: bytes, colours=None, tolerance: int = 0, size=(WIDTH, HEIGHT)) -> None:
        cases.append(Case(name, data, size=size, colours=colours or seen, tolerance=tolerance))

    image, seen = picture(rng)
    # The left half is transparent, and a quarter of the right half lets half of the white through.
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, WIDTH // 2, HEIGHT))
    alpha.paste(128, (WIDTH // 2, 0, WIDTH, HEIGHT // 2))

    def over_white(colours: dict) -> dict:
        shares = (0, 128, 0, 255)
        mixed = [
            tuple(round((value * share + 255 * (255 - share)) / 255) for value in colours[point])
            for point, share in zip(POINTS, shares, strict=True)
        ]
        return dict(zip(POINTS, mixed, strict=True))

    rgba = image.copy()
    rgba.putalpha(alpha)
    grey = image.convert("L")
    grey_seen = {point: (grey.getpixel(point),) * 3 for point in POINTS}
    la = Image.merge("LA", (grey, alpha))
    add("RGBA PNG", encoded(rgba, "PNG"), over_white(seen), 1)
    add("RGBA WebP", encoded(rgba, "WEBP", lossless=True, exact=True), over_white(seen), 1)
    add("RGBA TIFF", encoded(rgba, "TIFF"), over_white(seen), 1)
    add("LA PNG", encoded(la, "PNG"), over_white(grey_seen), 1)
    add("grey JPEG", encoded(grey, "JPEG"), grey_seen, 3)

    quarters = Image.new("P", image.size)
    quarters.putpalette([value for colour in seen.values() for value in colour])
    for index, (x, y) in enumerate(POINTS):
        quarters.paste(index, (x // 24 * 24, y // 16 * 16, x // 24 * 24 + 24, y // 16 * 16 + 16))
    add("palette PNG", encoded(quarters, "PNG"))
    add(
        "palette PNG with alpha bytes",
        encoded(quarters, "PNG", transparency=bytes([0, 128, 0, 255])),
        over_white(seen),
        1,
    )
    keyed = {**seen, POINTS[2]: WHITE}
    add("palette PNG with one transparent entry", encoded(quarters, "PNG", transparency=2), keyed)
    add("palette GIF with one transparent entry", encoded(quarters, "GIF", transparency=2), keyed)
    add("RGB PNG with a transparent colour", encoded(image, "PNG", transparency=seen[POINTS[2]]), keyed)
    shades = struct.pack(">2H", 0x1234, 0x5678)
    add("16-bit grey PNG with a transparent shade", png(2, 1, 16, 0, b"\0" + shades, (b"tRNS", shades[:2])),
        {(0, 0): WHITE, (1, 0): (0x56,) * 3}, 1, (2, 1))  # fmt: skip
    add("4-bit grey PNG with a transparent shade", png(2, 1, 4, 0, b"\0\x1a", (b"tRNS", b"\0\x01")),
        {(0, 0): WHITE, (1, 0): (0xAA,) * 3}, 0, (2, 1))  # fmt: skip
    colours = struct.pack(">6H", 0x1234, 0x2345, 0x3456, 0x4567, 0x5678, 0x6789)
    add("16-bit RGB PNG with a transparent colour", png(2, 1, 16, 2, b"\0" + colours, (b"tRNS", colours[:6])),
        {(0, 0): WHITE, (1, 0): (0x45, 0x56, 0x67)}, 1, (2, 1))  # fmt: skip

    add("1-bit PNG", encoded(grey.point(lambda v: 255 * (v > 128)).convert("1"), "PNG"),
        {point: (255 * (value[0] > 128),) * 3 for point, value in grey_seen.items()})  # fmt: skip
    wide = np.asarray(grey).astype(np.uint16) * 257
    for format in ("PNG", "TIFF"):
        add(f"16-bit grey {format}", encoded(Image.fromarray(wide), format), grey_seen, 1)
    add("32-bit TIFF", encoded(Image.fromarray(wide.astype(np.int32) * 2**15), "TIFF"),
        {point: (value[0] // 2,) * 3 for point, value in grey_seen.items()}, 1)  # fmt: skip
    shares = np.asarray(grey).astype(np.float32) / 255
    shares[0, 0] = np.nan
    add("TIFF of floats", encoded(Image.fromarray(shares), "TIFF"), grey_seen, 1)

    # Inks. Without a profile they are filters of white; with one they are what the press prints.
    corners = dict(zip(POINTS, ((0, 0, 0, 0), (0, 255, 255, 0), (255, 255, 0, 0), (0, 0, 0, 255)), strict=True))
    inks = Image.new("CMYK", image.size)
    for (x, y), ink in corners.items():
        inks.paste(ink, (x // 24 * 24, y // 16 * 16, x // 24 * 24 + 24, y // 16 * 16 + 16))
    plain = dict(zip(POINTS, (WHITE, (255, 0, 0), (0, 0, 255), (0, 0, 0)), strict=True))
    add("CMYK JPEG", encoded(inks, "JPEG", quality=95), plain, 5)
    add("YCCK JPEG", ycck(inks), plain, 5)
    add("CMYK TIFF", encoded(inks, "TIFF"), plain)
    if features.check("littlecms2"):
        printed = dict(zip(POINTS, map(lab_to_srgb, (INKS[0], INKS[3], INKS[6], BLACK)), strict=True))
        add("CMYK JPEG with a profile", encoded(inks, "JPEG", quality=95, icc_profile=cmyk_profile()), printed, 6)
        add("CMYK TIFF with a profile", encoded(inks, "TIFF", icc_profile=cmyk_profile()), printed, 6)
        for name, matrix, gamma in (("Display P3", DISPLAY_P3, None), ("Adobe RGB", ADOBE_RGB, 563 / 256)):
            stored, profile = in_colours_of(image, matrix, gamma), rgb_profile(matrix, gamma)
            assert max(abs(a - b) for p in POINTS for a, b in zip(stored.getpixel(p), seen[p], strict=True)) > 8
            add(f"{name} JPEG", encoded(stored, "JPEG", icc_profile=profile), None, 5)
            add(f"{name} PNG", encoded(stored, "PNG", icc_profile=profile), None, 2)
            stored.putalpha(alpha)
            add(f"{name} PNG with alpha", encoded(stored, "PNG", icc_profile=profile), over_white(seen), 2)
        linear = grey.point([round(255 * float(to_linear(np.array(v / 255)))) for v in range(256)])
        add("grey PNG of linear light", encoded(linear, "PNG", icc_profile=grey_profile(1.0)), grey_seen, 5)
    add("sRGB profile", encoded(image, "PNG", icc_profile=rgb_profile(SRGB, None)))
    add("profile of random bytes", encoded(image, "PNG", icc_profile=rng.bytes(600)))
    add("profile cut in half", encoded(image, "PNG", icc_profile=rgb_profile(ADOBE_RGB, 2.2)[:250]))
    add("profile of other colours", encoded(image, "PNG", icc_profile=cmyk_profile()))
    return cases


def _titles(rng: np.random.Generator) -> list[Case]:
    image, colours = picture(rng)
    photo = {"image": encoded(image, "PNG"), "size": image.size, "colours": colours}
    unusable = [
        Case(f"title {name}", photo["image"], caption=caption, reason=reason, parquet=parquet)
        for name, caption, reason, parquet in (
            ("null", None, "title is null", {}),
            ("empty", "", "title is empty", {}),
            ("of blanks", " \t\n\u00a0\u3000", "no visible", {}),
            ("of invisible characters", "\u200b\u200f\u0000\u0007", "no visible", {}),
            ("of combining marks alone", "\u0301\u0302", "no visible", {}),
            ("a whole number", 17, "not text but int", None),
            ("a number", 3.5, "not text but float", None),
            ("no number", math.nan, "not text but float", None),
            ("a truth value", True, "not text but bool", None),
            ("a list", [["red cup"]], "not text but list", None),
            ("an object", {"en": "red cup"}, "not text but dict", None),
        )
    ]
    usable = [
        Case(f"title with {name}", caption=caption, title=title, reads_like=tokens, parquet=parquet, **photo)
        for name, caption, title, tokens, parquet in (
            ("NUL", "red\0 cup", "red\0 cup", "red cup", {}),
            ("control characters", "\x07red \x1b[31mcup\x7f", None, "red [31mcup", {}),
            ("blanks around it", "  \t red cup \r\n", "red cup", "red cup", {}),
            ("line breaks", "red\r\n\r\ncup", "red\r\n\r\ncup", "red cup", {}),
            ("right-to-left text", "حذاء أحمر", "حذاء أحمر", None, {}),
            ("direction marks", "\u202ered\u202c \u200fcup", "\u202ered\u202c \u200fcup", "red cup", {}),
            ("emoji", "red 👟 cup 👩‍👩‍👧", "red 👟 cup 👩‍👩‍👧", None, {}),
            ("combining marks", "re\u0301d cu\u0308p", "re\u0301d cu\u0308p", "red cup", {}),
            ("a thousand marks on one letter", "r" + "\u0301" * 1000 + "ed cup", None, "red cup", {}),
            ("CJK characters", "红色的杯子", "红色的杯子", None, {}),
            ("digits alone", "17", "17", None, {}),
            ("half a surrogate pair", "red \ud83d cup", "red \ufffd cup", "red cup", None),
            ("1 MB of words", "red cup " * 131_072, "red cup " * 1249 + "red cup", "red cup " * 40, {}),
            ("1 MB of one word", "r" * 2**20, "r" * 10_000, None, {}),
            ("1 MB of CJK characters", "杯" * 350_000, "杯" * 10_000, None, {}),
            ("1 MB of blanks before it", " " * 2**20 + "red cup", "red cup", "red cup", {}),
        )
    ]
    return [*unusable, *usable]


def _ids(rng: np.random.Generator) -> list[Case]:
    def another_photo() -> dict:  # rows without an id that hold the same bytes are one product
        image, colours = picture(rng)
        return {"image": encoded(image, "PNG"), "size": image.size, "colours": colours}

    photo = another_photo()
    deep: Any = "id"
    for _ in range(200):
        deep = [deep]

    def text(value: Any) -> dict:
        changes = {"product_id": str(value), "id": hashed(str(value))}
        if not isinstance(value, bool) and value == int(value):  # a whole number is itself, as a text too
            del changes["id"]
        return changes

    return [
        Case("id of two rows", product_id="twice", **photo),
        Case("id of two rows again", product_id="twice", **photo),
        Case("id of digits", product_id="0017", **photo),
        Case("id that is not ASCII", product_id="größe 鞋 👟", **photo),
        Case("id of 10,000 characters", product_id="x" * 10_000, **photo),
        Case("id null", product_id=None, **another_photo()),
        Case("id absent", product_id=ABSENT, parquet={"product_id": None}, **another_photo()),
        Case("id empty", product_id="", **another_photo()),
        Case("id of blanks", product_id="   ", **another_photo()),
        Case("id of half a surrogate pair", product_id="\ud83d", parquet=None, **photo),
        *(
            Case(f"id {name}", product_id=value, id=expected, parquet=text(value), **photo)
            for name, value, expected in (
                ("zero", 0, 0),
                ("below zero", -5, -5),
                ("the largest of int64", 2**63 - 1, 2**63 - 1),
                ("beyond int64", 2**63, hashed(str(2**63))),
                ("of 300 digits", 10**300, hashed(str(10**300))),
                ("a float of whole value", 17.0, 17),
                ("a fraction", 1.5, hashed("1.5")),
                ("a truth value", True, hashed("true")),
            )
        ),
        Case("id a list", product_id=["a", 1], id=hashed('["a", 1]'), parquet=None, **photo),
        Case("id a list of lists", product_id=deep, id=hashed("[" * 200 + '"id"' + "]" * 200), parquet=None, **photo),
    ]


# --- layouts ----------------------------------------------------------------------------------------------------------


def write_image_folder(folder: Path, cases: Sequence[Case], split: str = "train") -> list[Case]:
    """Write photos and `metadata.jsonl`, and a photo outside the folder that some names lead to."""
    (folder / split).mkdir(parents=True)
    (folder / split / BEYOND).write_bytes(encoded(Image.new("RGB", (9, 9)), "PNG"))
    lines = []
    for case in cases:
        if case.make is not None:
            case.make(folder / split / case.file)
        elif case.image is not None:
            (folder / split / case.file).write_bytes(case.image)
        record = {"file_name": case.file, "caption": case.caption, "product_id": case.product_id}
        record = {key: value for key, value in record.items() if value is not ABSENT}
        lines.append(json.dumps(record).encode() if case.line is None else case.line)
    (folder / split / "metadata.jsonl").write_bytes(b"\n".join(lines))
    return list(cases)


def write_parquet(folder: Path, cases: Sequence[Case], split: str = "train", row_group_size: int = 16) -> list[Case]:
    """Write the cases that Parquet can hold, with the bytes of the photos."""
    folder.mkdir(parents=True)
    kept = [replace(case, **case.parquet) for case in cases if case.parquet is not None]
    images = [{"bytes": case.image, "path": case.file} for case in kept]
    columns = {
        "image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        "caption": pa.array([case.caption for case in kept], pa.string()),
        "product_id": pa.array([case.product_id for case in kept], pa.string()),
    }
    file = folder / f"{split}-00000-of-00001.parquet"
    pq.write_table(pa.table(columns), file, row_group_size=row_group_size)
    return kept
