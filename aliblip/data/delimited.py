"""CSV and its kin, read strictly: a record has as many fields as the header, or the line where it goes wrong is named.

Python's `csv` is lenient by default: one quote that is never closed swallows the rows that follow, without a word. Its
strict mode tells, and a reader that is fed line by line knows where each record lies. What is accepted: any of four
delimiters, quotes that are doubled or escaped by a backslash, files that have no quoting at all (an inch sign is an
inch sign), line ends of every system, and line breaks within quotes.

    form = find_form(lines, asked)
    for record in scan(lines, form, columns=3): ...
"""

from __future__ import annotations

import codecs
import csv
import io
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from aliblip.data.values import looks_like_photo_name

__all__ = ["Form", "Line", "Record", "find_form", "lines_of_bytes", "lines_of_text", "parse", "scan"]

DELIMITERS = (",", "\t", ";", "|")
DELIMITER_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
# Of a table of one column, whose rows are whole lines.
NO_DELIMITER = "\x1f"
SAMPLE_LINES = 200
# A quoted field of more lines than this has lost its end.
MOST_LINES = 2_000
_PIECES = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$")

csv.field_size_limit(2**31 - 1)  # the default of 131,072 characters would be a traceback


@dataclass(frozen=True)
class Form:
    """How a table is written.

    Attributes:
        delimiter: between fields.
        quotes: what stands for a quote within quotes: "doubled" (two quotes), "backslash" (one before it), or "none":
            quotes are text.
        skip_space: whether a space after a delimiter is no part of the field.
        skipped_lines: lines before the header.
        is_told: whether the user says how quotes are written: then a field over many lines is what it seems.
    """

    delimiter: str
    quotes: str = "doubled"
    skip_space: bool = False
    skipped_lines: int = 0
    is_told: bool = False

    def options(self) -> dict[str, Any]:
        """For `csv.reader`."""
        options: dict[str, Any] = {"delimiter": self.delimiter, "strict": True, "skipinitialspace": self.skip_space}
        if self.quotes == "none":
            return {**options, "quoting": csv.QUOTE_NONE, "quotechar": None}
        return {**options, "escapechar": "\\"} if self.quotes == "backslash" else options

    def told(self) -> str:
        """For people."""
        parts = [DELIMITER_NAMES.get(self.delimiter, f"'{self.delimiter}'")] if self.delimiter != NO_DELIMITER else []
        if self.quotes != "doubled":
            parts.append("quotes are text" if self.quotes == "none" else "quotes are escaped by backslashes")
        return ", ".join(parts)


@dataclass
class Line:
    """One line of a file: its bytes [begin, end), its text with the line's end, and whether the bytes are no text."""

    begin: int
    end: int
    text: str
    damaged: bool = False


@dataclass
class Record:
    """One record: where it lies, its line, its fields; or `problem`, why it can't be read."""

    begin: int
    end: int
    line: int
    fields: list[str]
    text: str
    problem: str | None = None


def lines_of_bytes(stream: Iterable[bytes], encoding: str) -> Iterator[Line]:
    """Lines of a binary stream in an encoding whose line ends are single bytes."""
    position, is_utf8 = 0, encoding in ("utf-8", "utf-8-sig")
    for raw in stream:
        pieces = _PIECES.findall(raw) if raw.count(b"\r") > raw.endswith(b"\r\n") else (raw,)
        for piece in pieces:
            begin, position = position, position + len(piece)
            if is_utf8 and piece.startswith(codecs.BOM_UTF8):  # of each of several files that were joined to one
                begin, piece = begin + 3, piece[3:]
            try:
                yield Line(begin, position, piece.decode("utf-8" if is_utf8 else encoding))
            except UnicodeDecodeError:
                yield Line(begin, position, piece.decode("latin-1"), damaged=True)


def lines_of_text(stream: Any, encoding: str) -> Iterator[Line]:
    """Lines of a binary stream in an encoding of several bytes a character; their places are not told."""
    text = io.TextIOWrapper(stream, encoding=encoding, newline="")
    try:
        for number, line in enumerate(text):
            yield Line(0, 0, line.lstrip("\ufeff") if not number else line)
    finally:
        text.detach()


def find_form(lines: Sequence[Line], delimiter: str | None, quotes: str | None, known: Callable[[str], bool]) -> Form:
    """The form of a table by its first lines.

    Args:
        lines: the first ones.
        delimiter, quotes: as the user gave them.
        known: whether a header's name is one that we would look for.
    """
    is_told, quotes = quotes is not None, quotes or "doubled"
    skipped, told = 0, None
    if lines and (match := re.fullmatch(r"sep=(.)\s*", lines[0].text, re.IGNORECASE)):  # which Excel writes and obeys
        skipped, told = 1, match.group(1)
    lines = lines[skipped:]
    header = next((line.text for line in lines if line.text.strip()), "")
    delimiters = (delimiter,) if delimiter else (told,) if told else DELIMITERS
    best, best_rank = Form(delimiter or told or NO_DELIMITER, quotes, False, skipped, is_told), None
    for candidate in delimiters:
        if candidate not in header:
            continue
        spaced = candidate != "\t" and header.count(candidate) == header.count(f"{candidate} ")
        form = Form(candidate, quotes, spaced, skipped, is_told)
        names = _names(header, form)
        if len(names) < 2:
            continue
        counts = [len(record.fields) == len(names) for record in scan(lines, form, len(names))]
        rank = (sum(map(known, names)) > 0, sum(counts) / max(len(counts), 1), len(names))
        if best_rank is None or rank > best_rank:
            best, best_rank = form, rank
    return best


def _names(header: str, form: Form) -> list[str]:
    try:
        return parse(header, form)
    except csv.Error:
        return header.split(form.delimiter)


def parse(text: str, form: Form) -> list[str]:
    """The fields of one record. Raises `csv.Error`."""
    return next(csv.reader(io.StringIO(text, newline=""), **form.options()), [])


class _Feed:
    """Lines for a `csv.reader`, which can be taken back."""

    def __init__(self, lines: Iterable[Line]):
        self._lines = iter(lines)
        self._back: deque[Line] = deque()
        self.number = 0  # of the last line that was taken
        self.taken: list[Line] = []  # of the present record

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        if len(self.taken) >= MOST_LINES:
            raise csv.Error(f"a quoted field does not end within {MOST_LINES:,} lines")
        line = self._back.popleft() if self._back else next(self._lines)
        self.number += 1
        self.taken.append(line)
        return line.text

    def begin_record(self) -> None:
        self.taken = []

    def give_back(self) -> None:
        """All lines of the present record but the first."""
        self._back.extendleft(reversed(self.taken[1:]))
        self.number -= len(self.taken) - 1
        del self.taken[1:]


def scan(lines: Iterable[Line], form: Form, columns: int) -> Iterator[Record]:
    """The records of a table, from its header on; blank lines are none.

    A record that goes wrong is its first line alone, and the lines that it swallowed are records again.
    """
    feed = _Feed(islice(lines, form.skipped_lines, None))
    feed.number = form.skipped_lines
    reader = csv.reader(feed, **form.options())
    while True:
        feed.begin_record()
        problem, fields, is_torn = None, [], True
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = _told(error, feed)
        if problem is None and (not fields or (len(fields) < max(columns, 2) and not "".join(fields).strip())):
            continue
        first = feed.number - len(feed.taken) + 1
        if problem is None:
            fields = _without_surplus(fields, columns)
            problem = _misread(feed, fields)
            is_torn = problem is None
            problem = problem or _torn(fields, columns, form, feed, first)
        if problem is not None and is_torn and len(feed.taken) > 1:
            feed.give_back()
            reader = csv.reader(feed, **form.options())  # the old one may be within quotes
        begin, end = feed.taken[0].begin, feed.taken[-1].end
        yield Record(begin, end, first, fields, "".join(line.text for line in feed.taken), problem)


def _told(error: csv.Error, feed: _Feed) -> str:
    text, last = str(error), feed.number
    if "unexpected end of data" in text or "does not end within" in text:
        return "a quote opens a field and is never closed"
    if "expected after" in text:
        where = "" if len(feed.taken) == 1 else f" (the field goes on to line {last})"
        return f"text follows the quote that closes a field{where}"
    if "NUL" in text:
        return "it holds a NUL character"
    return text


def _without_surplus(fields: list[str], columns: int) -> list[str]:
    """The fields without empty ones beyond the last column."""
    while len(fields) > columns and not fields[-1].strip():
        fields = fields[:-1]
    return fields


def _misread(feed: _Feed, fields: Sequence[str]) -> str | None:
    """What is wrong with the characters of a record."""
    if any(line.damaged for line in feed.taken):
        return "it is not in the encoding of the file"
    return "it holds a NUL character" if any("\0" in field for field in fields) else None


def _torn(fields: Sequence[str], columns: int, form: Form, feed: _Feed, first: int) -> str | None:
    """What is wrong with where a record ends, or its fields do."""
    if len(fields) != columns:
        many = f"{len(fields)} field{'s' if len(fields) != 1 else ''}"
        return f"it has {many}, the header has {columns}"
    if len(feed.taken) > 1 and not form.is_told and _swallowed(fields, form):
        last = first + len(feed.taken) - 1
        return f"a quote opens a field that goes on to line {last}, over what look like rows of their own"
    return None


def _swallowed(fields: Sequence[str], form: Form) -> bool:
    """Whether a field of several lines looks like rows that a quote swallowed, not like text of several lines."""
    for field in fields:
        lines = re.split(r"\r\n|\r|\n", field)
        if len(lines) < 2:
            continue
        cells = [line.split(form.delimiter) for line in lines]
        if any(len(cell) > 1 and any(map(looks_like_photo_name, cell)) for cell in cells):
            return True
        inner = cells[1:-1]
        if len(inner) >= (2 if len(fields) > 2 else 4) and all(len(cell) == len(fields) for cell in inner):
            return True
        # Rows that are numbered from line to line.
        if _is_number(fields[0]) and any(
            len(cell) > 1 and _is_number(cell[0]) and int(cell[0]) == int(fields[0]) + step
            for step, cell in enumerate(cells)
            if step
        ):
            return True
    return False


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 19  # Python refuses to read very long ones
