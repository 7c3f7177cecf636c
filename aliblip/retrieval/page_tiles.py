"""Results of the search page as HTML: tiles of whole photos with their captions below, and a table of all scores.

    html = tiles_html("3 of 400 photos, ordered by ITC similarity", [Tile(1, ["striped blue mug"], "ITC 0.95", photo)])

Pure functions of texts and photos. Every text comes from somebody's data and is escaped; photos are part of the page
(`data:` addresses), so that no file has to be served.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

THUMBNAIL_SIDE = 384
MOST_CHARACTERS = 300  # of a line below a photo; the table has all of it
_JPEG_QUALITY = 85

# Two columns on a phone, three on a tablet, four beside the form and more where there is room.
CSS = """
.found { color: var(--body-text-color); font-size: 14px; }
.found-head { margin: 0 0 12px; }
.found-mistake { margin: 0; padding: 12px 16px; border: 1px solid var(--border-color-primary); border-radius: 8px; }
.tiles { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; margin: 0; padding: 0; }
@media (min-width: 640px) { .tiles { grid-template-columns: repeat(3, minmax(0, 1fr)); } }
@media (min-width: 1000px) { .tiles { grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 16px; } }
@media (min-width: 1500px) { .tiles { grid-template-columns: repeat(6, minmax(0, 1fr)); } }
.tile { margin: 0; min-width: 0; border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden; }
.tile-photo { position: relative; display: block; aspect-ratio: 1; background: var(--background-fill-secondary); }
.tile-photo img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; cursor: zoom-in; }
.tile-photo input { position: absolute; opacity: 0; width: 100%; height: 100%; margin: 0; }
.tile-photo input:focus-visible ~ img { outline: 3px solid var(--color-accent); outline-offset: -3px; }
.tile-photo input:checked ~ img { position: fixed; z-index: 1000; padding: 4vmin; box-sizing: border-box;
  background: var(--body-background-fill); cursor: zoom-out; }
.tile-none { position: absolute; inset: 0; display: flex; align-items: center; justify-content: center; padding: 12px;
  text-align: center; opacity: .75; }
.tile figcaption { padding: 8px 10px; overflow-wrap: anywhere; line-height: 1.35; }
.tile-more, .tile-score { opacity: .75; font-size: 12px; }
.scores { overflow-x: auto; color: var(--body-text-color); }
.scores table { border-collapse: collapse; font-size: 13px; min-width: 100%; }
.scores th, .scores td { padding: 4px 10px; border-bottom: 1px solid var(--border-color-primary); text-align: left;
  vertical-align: top; max-width: 40ch; overflow-wrap: anywhere; }
.scores th { overflow-wrap: normal; white-space: nowrap; }
.scores .number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.examples { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; color: var(--body-text-color); }
.examples button { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 6px 12px;
  background: var(--background-fill-secondary); color: var(--body-text-color); font-size: 14px; text-align: left;
  cursor: pointer; }
.examples button:hover, .examples button:focus-visible { border-color: var(--color-accent); }
.examples img { display: block; width: 72px; height: 72px; object-fit: contain; }
"""


@dataclass
class Tile:
    """A result as the page shows it.

    Attributes:
        rank: from 1 on.
        lines: of the caption, the first one stands out.
        score: what is said of the scores, below the lines.
        photo: JPEG bytes; None: it can't be shown.
        problem: why it can't.
    """

    rank: int
    lines: Sequence[str]
    score: str
    photo: bytes | None
    problem: str | None = None


def to_jpeg(photo: Image.Image) -> bytes:
    """A thumbnail of the whole photo, at most `THUMBNAIL_SIDE` pixels wide and high. One in RGB is made smaller
    itself, since a copy of a large one takes much memory."""
    photo = photo if photo.mode == "RGB" else photo.convert("RGB")
    photo.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    data = io.BytesIO()
    photo.save(data, "JPEG", quality=_JPEG_QUALITY)
    return data.getvalue()


def escaped(text: str) -> str:
    """Text for HTML, in elements and in attributes. Signs with a meaning in templates become references too."""
    text = html.escape(text, quote=True)
    return text.replace("{", "&#123;").replace("}", "&#125;").replace("$", "&#36;").replace("`", "&#96;")


def cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"


def tiles_html(heading: str, tiles: Sequence[Tile]) -> str:
    """The results: a line about them, and a tile for each."""
    body = "".join(map(_tile_html, tiles))
    return f'<div class="found"><p class="found-head">{escaped(heading)}</p><div class="tiles">{body}</div></div>'


def _tile_html(tile: Tile) -> str:
    first, *others = [cut(line) for line in tile.lines]
    if tile.photo is None:
        photo = f'<div class="tile-photo"><span class="tile-none">{escaped(tile.problem or "no photo")}</span></div>'
    else:
        # A label and its box: a click, or the space bar, shows the photo as large as the window, and back.
        photo = (
            f'<label class="tile-photo"><input type="checkbox" aria-label="{escaped(f"enlarge photo {tile.rank}")}">'
            f'<img alt="{escaped(first)}" src="{_address(tile.photo)}"></label>'
        )
    more = "".join(f'<div class="tile-more">{escaped(line)}</div>' for line in others)
    return (
        f'<figure class="tile">{photo}<figcaption><div class="tile-title">{tile.rank}. {escaped(first)}</div>{more}'
        f'<div class="tile-score">{escaped(tile.score)}</div></figcaption></figure>'
    )


def _address(photo: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(photo).decode()}"


def mistake_html(message: str) -> str:
    """What a visitor reads instead of results."""
    return f'<div class="found"><p class="found-mistake" role="alert">{escaped(message)}</p></div>'


def table_html(columns: Sequence[str], rows: Sequence[Sequence[str | int | float]]) -> str:
    """Rows of texts and numbers as a table that scrolls by itself where it is wider than the window."""
    head = "".join(f"<th>{escaped(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell_html, row))}</tr>" for row in rows)
    return f'<div class="scores"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell_html(value: str | int | float) -> str:
    if isinstance(value, str):
        return f"<td>{escaped(value)}</td>"
    return f'<td class="number">{value if isinstance(value, int) else f"{value:.4f}"}</td>'


def examples_html(examples: Sequence[str | bytes]) -> str:
    """Titles or photos to try, each a button with its number in `data-example`."""
    buttons = []
    for number, example in enumerate(examples):
        shown = escaped(example) if isinstance(example, str) else f'<img alt="" src="{_address(example)}">'
        name = "" if isinstance(example, str) else f' aria-label="{escaped(f"search for example {number + 1}")}"'
        buttons.append(f'<button type="button" data-example="{number}"{name}>{shown}</button>')
    return f'<div class="examples"><span>Try</span>{"".join(buttons)}</div>'


__all__ = ["CSS", "Tile", "cut", "escaped", "examples_html", "mistake_html", "table_html", "tiles_html", "to_jpeg"]
