"""What an evaluation found, to look at: a contact sheet, drawn with Pillow, and a page of HTML.

rows = [SheetRow("red cotton t-shirt", [Hit(photo, 3.21, right=True), ...], rank=1), ...]
contact_sheet(rows, "sheet.png", heading="Demo")
html_report("report.html", heading="Demo", examples=[Examples("Worst misses", rows)])
"""

import base64
import html
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from aliblip.runtime.files import write_bytes, write_text
from aliblip.runtime.mistakes import UsageError

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

# Of an HTML page: side in pixels and JPEG quality of its photos; the next step where all together take more bytes.
_THUMBNAILS = ((160, 80), (120, 70), (80, 60))
_MOST_PHOTO_BYTES = 1_000_000  # base64 adds a third
_MOST_TITLE_CHARACTERS = 400
_CURVE_POINTS = 120  # more can't be seen


@dataclass
class Hit:
    """One retrieved photo: `image`, its `score`, whether it is a `right` one, its `place` in the ranking (None: as in
    the list), and a `name` for the page."""

    image: Image.Image
    score: float
    right: bool
    place: int | None = None
    name: str = ""


@dataclass
class SheetRow:
    """One query: its `title`, its best photos in order, and the `rank` of its best right photo in the whole gallery (0:
    none)."""

    title: str
    hits: list[Hit] = field(default_factory=list)
    rank: int = 0


@dataclass
class Curve:
    """One line of a chart: its `recall`s as fractions at the numbers `k`, which ascend from at least 1; `dashed` marks
    a bound."""

    name: str
    k: Sequence[int]
    recall: Sequence[float]
    dashed: bool = False

    def __post_init__(self):
        self.k, self.recall = [int(k) for k in self.k], [float(recall) for recall in self.recall]
        if not self.k or len(self.k) != len(self.recall):
            raise ValueError(f"curve {self.name!r} has {len(self.k)} k and {len(self.recall)} recalls")
        if self.k[0] < 1 or any(later <= k for k, later in zip(self.k, self.k[1:], strict=False)):
            raise ValueError(f"curve {self.name!r}: its k have to ascend from at least 1")
        if not all(0 <= recall <= 1 for recall in self.recall):
            raise ValueError(f"curve {self.name!r}: its recalls have to be fractions from 0 to 1")


@dataclass
class Chart:
    """`curves` over k, on a log axis named `x_label`."""

    heading: str
    curves: Sequence[Curve]
    x_label: str = "k"
    note: str = ""


@dataclass
class Reliability:
    """How often what is called probable is right: `curves` from names to points (mean probability, share right, how
    many), as fractions, by rising probability; the diagonal is drawn beside them."""

    heading: str
    curves: Mapping[str, Sequence[tuple[float, float, int]]]
    note: str = ""


@dataclass
class Table:
    """`rows` of as many cells as `columns`: text as it is, integers, numbers with one decimal, None for a dash."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.heading!r} has {len(self.columns)} columns, but a row of {len(row)}: {row}"
                )


@dataclass
class Examples:
    """Queries with their photos."""

    heading: str
    rows: Sequence[SheetRow]
    note: str = ""


def contact_sheet(
    rows: Sequence[SheetRow],
    path: str | os.PathLike,
    *,
    photo_size: int = 168,
    heading: str | None = None,
    legend: str = "right photo",
) -> Path:
    """Draw one line per query: the title, then its photos, best first, the right ones framed in green.

    Args:
        rows: the queries; they may have unequal numbers of photos.
        path: where the picture goes; the ending names the format. Its folder is created.
        photo_size: side of the square that each photo is fitted into, in pixels.
        heading: one line above all.
        legend: what the green frame says.

    Raises:
        ValueError: no rows.
        UsageError: an ending that is not the name of a picture format.
    """
    path = Path(path)
    if not rows:
        raise ValueError("a contact sheet needs at least one query")
    file_format = Image.registered_extensions().get(path.suffix.lower())
    if file_format not in Image.SAVE:
        raise UsageError(f"{path} is not a picture file name: give one that ends in .png or .jpg")
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
    _draw_legend(draw, sheet.height - 22, small, legend)
    data = io.BytesIO()
    sheet.save(data, format=file_format)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data.getvalue())
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
    draw.text((x + _FRAME, y + outer + 5), f"{hit.place or place + 1}.", fill=_QUIET, font=font)
    score = f"{hit.score:.2f}"
    draw.text((x + outer - _FRAME, y + outer + 5), score, fill=_RIGHT if hit.right else _QUIET, font=font, anchor="ra")


def _draw_legend(draw: ImageDraw.ImageDraw, y: int, font, legend: str) -> None:
    draw.rectangle((_MARGIN, y - 7, _MARGIN + 13, y + 6), outline=_RIGHT, width=3)
    draw.text((_MARGIN + 22, y), legend, fill=_QUIET, font=font, anchor="lm")


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


# --- the page ---------------------------------------------------------------------------------------------------------


def html_report(
    path: str | os.PathLike,
    *,
    heading: str,
    note: str = "",
    tables: Sequence[Table] = (),
    charts: Sequence[Chart] = (),
    reliability: Reliability | None = None,
    slices: Sequence[Table] = (),
    examples: Sequence[Examples] = (),
    run: Mapping[str, Any] | None = None,
) -> Path:
    """Write one HTML file that needs no other file, no network and no script.

    Everything but the heading may be absent. Texts are shown as they are, whatever is in them. Photos become JPEGs of
    at most 160 pixels, smaller ones where there are hundreds.

    Args:
        path: where the page goes; ends in .html. Its folder is created.
        heading: above all, and the title of the page.
        note: a line below it.
        tables: the results.
        charts: recall curves. Those without a curve are left out, like empty tables and examples.
        reliability: of the match probability, below the curves.
        slices: tables of parts of the data, below that.
        examples: queries with their photos; the `right` ones are framed as in the contact sheet.
        run: names and values at the end of the page; a mapping as a value becomes one line.

    Raises:
        UsageError: the path does not end in .html or .htm.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path} is not a page's file name: give one that ends in .html")
    sections = [f"<h1>{_text(heading)}</h1>"]
    if note:
        sections.append(f'<p class="quiet">{_text(note)}</p>')
    sections += [_table(table) for table in tables if table.rows]
    sections += [_chart(chart) for chart in charts if chart.curves]
    if reliability is not None:
        sections.append(_reliability(reliability))
    sections += [_table(table) for table in slices if table.rows]
    shown = [group for group in examples if group.rows]
    photos = _photos([hit.image for group in shown for row in group.rows for hit in row.hits])
    sections += [_examples(group, photos) for group in shown]
    if run:
        sections.append(_run(run))
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "\n".join(sections)
    write_text(
        path,
        f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(heading)}</title>
<style>{_STYLE}</style>
</head>
<body>
{body}
</body>
</html>
""",
    )
    return path


def _text(value: Any) -> str:
    """Text of unknown origin as HTML, in attributes too. Characters that a page can't hold are replaced: controls, and
    lone surrogates, which can't be encoded."""
    text = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", str(value))
    return html.escape(text)


def _clipped(title: str) -> str:
    return title if len(title) <= _MOST_TITLE_CHARACTERS else f"{title[:_MOST_TITLE_CHARACTERS].rstrip()}..."


def _section(heading: str, note: str, body: str) -> str:
    note = f'<p class="quiet">{_text(note)}</p>\n' if note else ""
    return f"<section>\n<h2>{_text(heading)}</h2>\n{note}{body}\n</section>"


def _table(table: Table) -> str:
    return _section(table.heading, table.note, _grid(table.columns, table.rows))


def _grid(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that scrolls sideways where the screen is narrow; a column with a number in it is aligned right."""
    numeric = [any(isinstance(cell, int | float) for cell in column) for column in zip(*rows, strict=True)]

    def line(cells: Sequence[str], tag: str) -> str:
        styled = [f"<{tag}{' class=num' * number}>{cell}</{tag}>" for cell, number in zip(cells, numeric, strict=True)]
        return f"<tr>{''.join(styled)}</tr>"

    head = line([_text(column) for column in columns], "th")
    body = "\n".join(line([_cell(cell) for cell in row], "td") for row in rows)
    return f'<div class="wide"><table>\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "\u2013"
    if isinstance(value, float):
        return f"{value:,.1f}"
    return f"{value:,}" if isinstance(value, int) else _text(value)


def _run(run: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {shown(inner)}" for name, inner in value.items())
        return f"{value:g}" if isinstance(value, float) else str(value)

    lines = "\n".join(f"<dt>{_text(name)}</dt><dd>{_text(shown(value))}</dd>" for name, value in run.items())
    return _section("This run", "", f"<dl>\n{lines}\n</dl>")


# --- curves

_WIDTH, _HEIGHT = 480, 280
_LEFT, _RIGHT_EDGE, _TOP, _BOTTOM = 46, 466, 12, 236  # the area of the lines
_COLOURS = 6


def _chart(chart: Chart) -> str:
    """Lines over log k, a legend, and the numbers behind them."""
    all_k = sorted({k for curve in chart.curves for k in curve.k})
    low_k, high_k = all_k[0], all_k[-1]
    if low_k == high_k:  # a single k in the middle
        low_k, high_k = low_k / 2, high_k * 2
    recalls = [100 * recall for curve in chart.curves for recall in curve.recall]
    low = min(90, 10 * math.floor(min(recalls) / 10))
    high = max(low + 10, 10 * math.ceil(max(recalls) / 10))

    def x(k: float) -> float:
        return _LEFT + (_RIGHT_EDGE - _LEFT) * math.log(k / low_k) / math.log(high_k / low_k)

    def y(percent: float) -> float:
        return _BOTTOM - (_BOTTOM - _TOP) * (percent - low) / (high - low)

    ticks = _ticks(all_k, x)
    step = 10 if high - low <= 50 else 20
    rules = _rules({f"{percent}%": y(percent) for percent in range(low + -low % step, high + 1, step)})
    rules += _columns({f"{k:,}": x(k) for k in ticks}, chart.x_label)
    lines = [
        _Line(curve.name, [(x(k), y(100 * recall)) for k, recall in _thinned(curve)], curve.dashed)
        for curve in chart.curves
    ]
    known = [dict(zip(curve.k, curve.recall, strict=True)) for curve in chart.curves]
    columns = [chart.x_label, *(curve.name for curve in chart.curves)]
    values = [[k, *(100 * recall[k] if k in recall else None for recall in known)] for k in ticks]
    return _picture(chart.heading, chart.note, rules, lines, columns, values)


def _reliability(found: Reliability) -> str:
    """Share right over mean probability, both from 0 to 100 %, and the numbers behind them."""

    def at(probability: float, share: float) -> tuple[float, float]:
        return _LEFT + (_RIGHT_EDGE - _LEFT) * probability, _BOTTOM - (_BOTTOM - _TOP) * share

    steps = [n / 5 for n in range(6)]
    rules = _rules({f"{100 * step:.0f}%": at(0, step)[1] for step in steps})
    rules += _columns(
        {f"{100 * step:.0f}%": at(step, 0)[0] for step in steps}, "mean probability; upwards: share right"
    )
    lines = [
        _Line(name, [at(probability, share) for probability, share, _ in points])
        for name, points in found.curves.items()
    ]
    lines.append(_Line("as it should be", [at(0, 0), at(1, 1)], is_dashed=True))
    rows = [
        [name, 100 * probability, 100 * share, count]
        for name, points in found.curves.items()
        for probability, share, count in points
    ]
    columns = ["", "mean probability", "share right", "candidates"]
    return _picture(found.heading, found.note, rules, lines, columns, rows)


@dataclass
class _Line:
    """A line of a picture through `points`, in its own coordinates."""

    name: str
    points: Sequence[tuple[float, float]]
    is_dashed: bool = False


def _rules(heights: Mapping[str, float]) -> list[str]:
    """Lines across at some heights, with what they are."""
    parts = []
    for name, at in heights.items():
        parts.append(f'<line class="rule" x1="{_LEFT}" y1="{at:.1f}" x2="{_RIGHT_EDGE}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{name}</text>')
    return parts


def _columns(places: Mapping[str, float], label: str) -> list[str]:
    """Lines upwards at some places, with what they are, and what they all are below."""
    parts = []
    for name, at in places.items():
        parts.append(f'<line class="rule" x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{_BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{name}</text>')
    middle = (_LEFT + _RIGHT_EDGE) / 2
    return [*parts, f'<text x="{middle:g}" y="{_HEIGHT - 6}" text-anchor="middle">{_text(label)}</text>']


def _picture(
    heading: str,
    note: str,
    parts: list[str],
    lines: Sequence[_Line],
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
) -> str:
    """A section with lines on what `parts` draw, a legend, and a table of the numbers."""
    legend = []
    for number, line in enumerate(lines):
        style = f'class="curve c{number % _COLOURS}{" dashed" * line.is_dashed}"'
        joined = " ".join(f"{across:.1f},{down:.1f}" for across, down in line.points)
        parts.append(f'<polyline {style} points="{joined}"/>')
        if len(line.points) <= 12:
            parts += [
                f'<circle class="c{number % _COLOURS}" cx="{across:.1f}" cy="{down:.1f}" r="3.5"/>'
                for across, down in line.points
            ]
        swatch = f'<line {style} x1="0" y1="5" x2="28" y2="5"/>'
        legend.append(
            f'<li><svg viewBox="0 0 28 10" width="28" height="10" aria-hidden="true">{swatch}</svg>'
            f" {_text(line.name)}</li>"
        )
    label = f"{heading}: {', '.join(line.name for line in lines)}"
    return _section(
        heading,
        note,
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_text(label)}">\n'
        + "\n".join(parts)
        + f'\n</svg>\n<ul class="legend">{"".join(legend)}</ul>\n'
        + f"<details><summary>Numbers, in percent</summary>\n{_grid(columns, rows)}\n</details>",
    )


def _ticks(all_k: list[int], x) -> list[int]:
    """The k with a number below the axis: 1, 2, 5, 10, ... where they were measured, else what was measured, as far as
    the numbers have room."""
    round_k = [k for k in all_k if str(k).rstrip("0") in ("1", "2", "5")]
    wanted = all_k if len(all_k) <= 8 else sorted({all_k[0], *round_k, all_k[-1]})
    ticks = []
    for k in wanted:
        if not ticks or x(k) - x(ticks[-1]) >= 14 + 4 * (len(str(k)) + len(str(ticks[-1]))):
            ticks.append(k)
    return ticks


def _thinned(curve: Curve) -> list[tuple[int, float]]:
    """At most `_CURVE_POINTS` or so of a curve's points, evenly over log k, the first and the last among them."""
    points = list(zip(curve.k, curve.recall, strict=True))
    if len(points) <= _CURVE_POINTS:
        return points
    first, last = math.log(curve.k[0]), math.log(curve.k[-1])
    bins = {int((_CURVE_POINTS - 1) * (math.log(k) - first) / (last - first)): (k, recall) for k, recall in points[1:]}
    return [points[0], *(bins[key] for key in sorted(bins))]


# --- photos


def _photos(images: Sequence[Image.Image]) -> dict[int, tuple[str, int, int]]:
    """For the `id` of every image its data address, width and height. An image that comes twice is encoded once."""
    distinct = {id(image): image for image in images}
    for side, quality in _THUMBNAILS:
        encoded = {}
        for key, image in distinct.items():
            small = image.convert("RGB")
            small.thumbnail((side, side), Image.Resampling.BICUBIC)
            data = io.BytesIO()
            # without the comment, which Pillow would copy from the original and which may be long
            small.save(data, "JPEG", quality=quality, optimize=True, comment=b"")
            encoded[key] = data.getvalue(), small.width, small.height
        # as often as it is shown
        if sum(len(encoded[id(image)][0]) for image in images) <= _MOST_PHOTO_BYTES:
            break
    return {
        key: (f"data:image/jpeg;base64,{base64.b64encode(data).decode()}", width, height)
        for key, (data, width, height) in encoded.items()
    }


def _examples(examples: Examples, photos: dict[int, tuple[str, int, int]]) -> str:
    rows = []
    for row in examples.rows:
        figures = []
        for number, hit in enumerate(row.hits, 1):
            source, width, height = photos[id(hit.image)]
            place = hit.place or number
            name = f": {_clipped(hit.name)}" if hit.name else ""
            alt = f"{'right photo' if hit.right else 'photo'} at place {place}{name}"
            mark = " \u2713 right" if hit.right else ""
            figures.append(
                f'<figure{" class=right" * hit.right}><span class="photo">'
                f'<img src="{source}" width="{width}" height="{height}" alt="{_text(alt)}"></span>'
                f"<figcaption><span>{place}.{mark}</span> <span>{hit.score:.2f}</span></figcaption></figure>"
            )
        found = " found" * any(hit.right for hit in row.hits)
        rank = f'\n<p class="rank{found}">right photo at place {row.rank:,}</p>' if row.rank else ""
        rows.append(
            f'<article>\n<h3 dir="auto">{_text(_clipped(row.title))}</h3>{rank}\n'
            f'<div class="photos">{"".join(figures)}</div>\n</article>'
        )
    return _section(examples.heading, examples.note, "\n".join(rows))


_STYLE = f""":root {{
  --paper: {_PAPER}; --band: {_BAND}; --ink: {_INK}; --quiet: {_QUIET}; --line: {_LINE};
  --right: {_RIGHT}; --right-text: #0f7a3c;
  --c0: #2563eb; --c1: #d9480f; --c2: #0f7a3c; --c3: #9333ea; --c4: #b4820a; --c5: #0e7490;
}}
@media (prefers-color-scheme: dark) {{
  :root {{
    --paper: #14171d; --band: #1e232c; --ink: #e6e9ef; --quiet: #9aa3b2; --line: #3a4150; --right-text: #4cc38a;
    --c0: #7aa2ff; --c1: #ff9a5c; --c2: #4cc38a; --c3: #c795ff; --c4: #e5b93c; --c5: #4cc9e0;
  }}
}}
* {{ box-sizing: border-box; }}
body {{
  margin: 0 auto; max-width: 960px; padding: 16px; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; overflow-wrap: anywhere;
}}
h1 {{ font-size: 1.6rem; line-height: 1.2; }}
h2 {{ font-size: 1.2rem; margin: 2rem 0 .5rem; }}
h3 {{ font-size: 1rem; margin: 0; }}
.quiet, .rank, figcaption, dt {{ color: var(--quiet); }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; overflow-wrap: normal; }}
th, td {{ padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }}
.num {{ text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }}
tbody tr:nth-child(odd), article {{ background: var(--band); }}
.chart {{ display: block; width: 100%; max-width: 640px; height: auto; }}
.chart text {{ font-size: 13px; fill: var(--quiet); }}
.rule {{ stroke: var(--line); stroke-width: 1; }}
.curve {{ fill: none; stroke: var(--c); stroke-width: 2.5; stroke-linejoin: round; }}
.dashed {{ stroke-dasharray: 6 4; }}
circle {{ fill: var(--c); }}
{" ".join(f".c{number} {{ --c: var(--c{number}); }}" for number in range(_COLOURS))}
.legend {{ display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: .3rem 0; padding: 0; list-style: none; }}
summary {{ cursor: pointer; color: var(--quiet); }}
article {{ margin: .6rem 0; padding: .7rem; border-radius: 6px; }}
.rank {{ margin: .1rem 0 0; font-size: .9rem; }}
.found {{ color: var(--right-text); }}
.photos {{ display: flex; flex-wrap: wrap; gap: .6rem; margin-top: .5rem; }}
figure {{ margin: 0; width: 172px; max-width: calc(50% - .3rem); }}
.photo {{
  position: relative; display: block; aspect-ratio: 1;
  background: {_PAPER}; background-clip: padding-box; border: {_FRAME}px solid transparent;
  outline: 1px solid var(--line); outline-offset: -{_FRAME}px;
}}
.right .photo {{ border-color: var(--right); outline: none; }}
.photo img {{ position: absolute; inset: 0; width: 100%; height: 100%; object-fit: scale-down; }}
figcaption {{ display: flex; justify-content: space-between; padding: 0 {_FRAME}px; font-size: .85rem; }}
.right figcaption {{ color: var(--right-text); }}
dl {{ display: grid; grid-template-columns: fit-content(45%) minmax(0, 1fr); gap: .2rem 1rem; }}
dd {{ margin: 0; }}
"""
