"""Pictures of a retrieval, drawn with Pillow.

rows = [SheetRow("red cotton t-shirt", [Hit(photo, 3.21, right=True), ...], rank=1), ...]
contact_sheet(rows, "sheet.png", heading="Demo")
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

_PAPER = "#ffffff"
_BAND = "#f4f5f7"
_INK = "#1d2433"
_QUIET = "#6b7280"
_LINE = "#d5d9e0"
_RIGHT = "#14924a"

_MARGIN = 24
_GAP = 16
_TITLE_WIDTH = 300
_FRAME = 5


@dataclass
class Hit:
    """One retrieved photo: `image`, its `score`, and whether it is a `right` one."""

    image: Image.Image
    score: float
    right: bool


@dataclass
class SheetRow:
    """One query: its `title`, its best photos in order, and the `rank` of its best right photo in the whole gallery (0:
    none)."""

    title: str
    hits: list[Hit] = field(default_factory=list)
    rank: int = 0


def contact_sheet(
    rows: Sequence[SheetRow], path: str | os.PathLike, *, photo_size: int = 168, heading: str | None = None
) -> Path:
    """Draw one line per query: the title, then its photos, best first, the right ones framed in green.

    Args:
        rows: the queries; they may have unequal numbers of photos.
        path: where the picture goes; the ending names the format. Its folder is created.
        photo_size: side of the square that each photo is fitted into, in pixels.
        heading: one line above all.

    Raises:
        ValueError: no rows, or an ending that is not the name of a picture format.
    """
    path = Path(path)
    if not rows:
        raise ValueError("a contact sheet needs at least one query")
    file_format = Image.registered_extensions().get(path.suffix.lower())
    if file_format not in Image.SAVE:
        raise ValueError(f"{path} is not a picture file name: give one that ends in .png or .jpg")
    text, bold, small = _font(17), _font(22), _font(14)
    row_height = photo_size + 2 * _GAP + 2 * _FRAME + 26
    columns = max(len(row.hits) for row in rows)
    cell = photo_size + 2 * _FRAME + _GAP
    width = 2 * _MARGIN + _TITLE_WIDTH + _GAP + columns * cell
    top = 72 if heading else _GAP
    sheet = Image.new("RGB", (width, top + row_height * len(rows) + 44), _PAPER)
    draw = ImageDraw.Draw(sheet)
    if heading:
        line = _wrap(heading, bold, width - 2 * _MARGIN, 1)[0]
        draw.text((_MARGIN, top / 2), line, fill=_INK, font=bold, anchor="lm")
    for number, row in enumerate(rows):
        y = top + number * row_height
        if number % 2 == 0:
            draw.rectangle((0, y, width, y + row_height - 1), fill=_BAND)
        _draw_title(draw, row, y, row_height, text, small)
        for place, hit in enumerate(row.hits):
            x = _MARGIN + _TITLE_WIDTH + _GAP + place * cell
            _draw_hit(sheet, draw, hit, place, x, y + _GAP, photo_size, small)
    _draw_legend(draw, sheet.height - 22, small)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        sheet.save(partial, format=file_format)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _draw_title(draw: ImageDraw.ImageDraw, row: SheetRow, y: int, height: int, font, small) -> None:
    line_height = 23
    most = max(1, (height - 2 * _GAP - 26) // line_height)
    lines = _wrap(row.title, font, _TITLE_WIDTH, most)
    at = y + (height - len(lines) * line_height - 26) / 2
    for line in lines:
        draw.text((_MARGIN, at), line, fill=_INK, font=font)
        at += line_height
    if row.rank:
        found = row.rank <= len(row.hits)
        draw.text((_MARGIN, at + 6), f"right photo at place {row.rank}", fill=_RIGHT if found else _QUIET, font=small)


def _draw_hit(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, hit: Hit, place: int, x: int, y: int, size: int, font
) -> None:
    outer = size + 2 * _FRAME
    if hit.right:
        draw.rectangle((x, y, x + outer - 1, y + outer - 1), fill=_RIGHT)
    else:
        draw.rectangle((x + _FRAME - 1, y + _FRAME - 1, x + outer - _FRAME, y + outer - _FRAME), outline=_LINE)
    fitted = ImageOps.contain(hit.image.convert("RGB"), (size, size), Image.Resampling.BICUBIC)
    draw.rectangle((x + _FRAME, y + _FRAME, x + _FRAME + size - 1, y + _FRAME + size - 1), fill=_PAPER)
    sheet.paste(fitted, (x + _FRAME + (size - fitted.width) // 2, y + _FRAME + (size - fitted.height) // 2))
    draw.text((x + _FRAME, y + outer + 5), f"{place + 1}.", fill=_QUIET, font=font)
    score = f"{hit.score:.2f}"
    draw.text((x + outer - _FRAME, y + outer + 5), score, fill=_RIGHT if hit.right else _QUIET, font=font, anchor="ra")


def _draw_legend(draw: ImageDraw.ImageDraw, y: int, font) -> None:
    draw.rectangle((_MARGIN, y - 7, _MARGIN + 13, y + 6), outline=_RIGHT, width=3)
    draw.text((_MARGIN + 22, y), "right photo", fill=_QUIET, font=font, anchor="lm")


def _wrap(text: str, font, width: int, most_lines: int) -> list[str]:
    """Break a title at spaces, and inside a word only where it is wider than a line; what does not fit ends in an
    ellipsis."""
    lines, line = [], ""
    for word in text.split():
        joined = f"{line} {word}".strip()
        if font.getlength(joined) <= width:
            line = joined
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    lines.append(line)
    if len(lines) > most_lines:
        last = lines[most_lines - 1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines = [*lines[: most_lines - 1], f"{last.rstrip()}..."]
    return lines


def _font(size: int):
    # Pillow's own font: the same picture on every machine.
    return ImageFont.load_default(size)
