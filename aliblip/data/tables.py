"""One file of records: CSV in its forms, JSON in its forms, titles a line; packed or not, in any encoding.

    table = open_table("products.csv", Reading(), Roles(asked), split="train")
    table.columns, len(table), table.told
    for record in table.read(10, 20): ...          # a dict; a str of a bare title; or `Unreadable`

A row of the file is a row of the table, or the file is refused with the numbers of the lines that are none.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import lzma
import os
import posixpath
import re
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

from aliblip.data.columns import Reading, Roles, listed
from aliblip.data.delimited import (
    Form,
    Line,
    Record,
    find_form,
    lines_of_bytes,
    lines_of_text,
    parse,
    scan,
)
from aliblip.data.documents import REPEATED, Document, json_records, table_in
from aliblip.data.encodings import check_encoding, guess_encoding, is_packed, unicode_of, unpacked
from aliblip.data.feeds import FEED_NAMESPACE, feed_items, is_xml
from aliblip.data.remote import is_remote, open_file, resumed
from aliblip.data.shop_forms import (
    WOOCOMMERCE_PRODUCT,
    feed_notes,
    is_shopify,
    is_woocommerce,
    merchant_product,
    shopify_rows,
    woocommerce_rows,
)
from aliblip.data.storage import Blocks, Spans
from aliblip.data.values import Facts, looks_like_photo_name
from aliblip.runtime.mistakes import UsageError, one_line

__all__ = [
    "PACKINGS",
    "TABLES",
    "NoTable",
    "Table",
    "Unreadable",
    "base_name",
    "extension_of",
    "ids_in",
    "is_table_of_text",
    "may_hold_rows",
    "open_table",
    "plain_extension",
]

TABLES = {
    **dict.fromkeys((".csv", ".tsv", ".tab", ".psv"), "csv"),
    **dict.fromkeys((".json", ".jsonl", ".ndjson", ".ldjson"), "json"),
    ".txt": "text",
    ".xml": "feed",
}
PACKINGS = (".gz", ".bz2", ".xz", ".zst")
# Bytes that are looked at for marks and forms.
# How files begin that are no tables, in small letters, and what to do.
NO_TABLES = {
    b"pk\3\4": "a zip file or a spreadsheet, whatever it is called: unpack it, or save it as CSV in UTF-8",
    b"\xd0\xcf\x11\xe0": "a spreadsheet, whatever it is called: save it as CSV in UTF-8",
    b"par1": "a Parquet file, whatever it is called: call it .parquet",
    b"%pdf": "a PDF, whatever it is called: save its table as CSV in UTF-8",
    b"<!doctype html": "a web page, whatever it is called: get the file itself",
    b"<html": "a web page, whatever it is called: get the file itself",
}
_JSON_RECORDS = re.compile(rb'(?:\xef\xbb\xbf)?\s*(?:\[\s*)?\{\s*"[^"]*"\s*:')
HEAD_BYTES = 2**16
COPY_BYTES = 2**20
# Lines that are named in a message.
NAMED_LINES = 5
# Bad lines of a file in UTF-8 are rows of their own up to this share of the lines beyond ASCII; more are an encoding.
BAD_SHARE = 0.1
BAD_LINES_OF_JSON = 3
# Lines among which the names of the columns are looked for, if they are not on the first one.
MOST_LINES_ABOVE = 10


class NoTable(UsageError):
    """A file of JSON or XML that holds no records."""


class Unreadable(str):
    """Why a record can't be read, in its place."""


@dataclass
class Table:
    """A file of records.

    Attributes:
        file: path or address, of `size` bytes, whose BLAKE2 is `digest`.
        columns: of all of its records.
        told: how it was read, for the report.
        facts: of the columns that may be photos or titles, by name; for the opening only.
        bare: whether records are bare titles.
        is_delimited: whether it is a CSV file.
        problems: why records can't be read, by their numbers.
        product_column: the column of products, where the form of the table says which.
        split: that its records are, where the file itself tells splits.
        photo_folders: in which its photos are looked for first, where the form says that.
    """

    file: str
    size: int
    digest: str
    columns: list[str] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    facts: dict[str, Facts] = field(default_factory=dict)
    bare: bool = False
    is_delimited: bool = False
    problems: dict[int, str] = field(default_factory=dict)
    product_column: str | None = None
    split: str | None = None
    photo_folders: list[str] = field(default_factory=list)
    _stored: Spans | Blocks = field(default_factory=lambda: Blocks([]))
    _parse: Callable[[bytes], Any] = json.loads

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def name(self) -> str:
        """Of the file, for messages."""
        return base_name(self.file)

    def rewrite(self, records: Iterable[Any], roles: Roles) -> None:
        """Take other records in the place of what is there, from which they may come one by one."""
        gatherer = _Gatherer(self, roles)

        def gathered() -> Iterator[Any]:
            for record in records:
                gatherer.add(None if isinstance(record, Unreadable) else record)
                yield record

        stored = Blocks.of_values(gathered())
        self._stored, self._parse = stored, json.loads
        gatherer.done()

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """Records [start, stop)."""
        for position, data in enumerate(self._stored.read(start, stop), start=start):
            if position in self.problems:
                yield Unreadable(self.problems[position])
                continue
            try:
                yield self._parse(data)
            except (ValueError, RecursionError, csv.Error):  # the file has changed
                yield Unreadable("the record can't be read any more: did its file change?")


def base_name(file: str) -> str:
    """The last part of a path or an address."""
    return posixpath.basename((urlsplit(file).path if is_remote(file) else file).replace(os.sep, "/"))


def extension_of(file: str) -> str:
    """The end of a path's or an address's name, ".json"."""
    return os.path.splitext(urlsplit(file).path if is_remote(file) else file)[1].lower()


def plain_extension(file: str) -> str:
    """The same without that of a packing: ".csv" of "feed.csv.gz"."""
    extension = extension_of(file)
    if extension in PACKINGS:
        path = urlsplit(file).path if is_remote(file) else file
        return os.path.splitext(path[: -len(extension)])[1].lower()
    return extension


def open_table(file: str, reading: Reading, roles: Roles, split: str, kind: str | None = None) -> Table:
    """Open a file of records, and look at all of them once.

    Args:
        reading: how the user says that it is written.
        roles: which columns to gather facts of.
        split: for files whose records tell their split.
        kind: "csv", "json" or "text"; by default as the file's name ends, or as it begins.

    Raises:
        UsageError: the file can't be read as a table; the message names lines.
        OSError: it can't be read at all.
    """
    kind = kind or TABLES.get(plain_extension(file))
    with _raw(file) as raw, _unpacking(file, raw):
        opened = _Opened(file, raw, reading, roles, split)
        opened.add_digest()
        _check_content(opened)
        if is_xml(opened.head):
            return _of_feed(opened)
        if kind == "csv" and opened.reading.delimiter is None and _JSON_RECORDS.match(opened.head):
            kind = "json"  # whatever its name says
        if kind is None:  # a file whose name says nothing
            kind = "json" if opened.head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"[") else "csv"
        if kind == "text" and not _is_table_in_text(opened):
            return _titles(opened)
        return _of_json(opened) if kind == "json" else _of_csv(opened)


def _check_content(opened: _Opened) -> None:
    """Refuse a file that is called as a table is, and is something else."""
    head = opened.head.lstrip(b"\xef\xbb\xbf \t\r\n")[:64].lower()
    what = next((what for begin, what in NO_TABLES.items() if head.startswith(begin)), None)
    if what is not None:
        raise UsageError(f"{opened.file} is {what}")


@contextmanager
def _unpacking(file: str, raw: Any) -> Iterator[None]:
    """What goes wrong with a packed file is told in its name."""
    try:
        yield
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        raw.seek(0)
        if is_packed(raw.read(8)) is None:
            raise
        raise UsageError(f"{file} can't be unpacked ({one_line(error, 200)}): repair it") from error


def is_table_of_text(file: str, reading: Reading, roles: Roles) -> bool:
    """Whether a local .txt is a table rather than a title a line."""
    with _raw(file) as raw, _unpacking(file, raw):
        return bool(raw.read(1)) and _is_table_in_text(_Opened(file, raw, reading, roles, ""))


def may_hold_rows(file: str, reading: Reading, roles: Roles) -> bool:
    """Whether the beginning of a local table has a column of photos and one of titles; a broken one may, too."""
    try:
        columns = _first_columns(file, reading, roles)
    except UsageError:
        return True
    return {"image", "caption"} <= set(map(roles.of, columns))


def ids_in(file: str, reading: Reading, roles: Roles) -> list[set[str]]:
    """Of a local table with titles, and without a column that is called as photos are: some ids of each column of them;
    none of a broken one."""
    try:
        columns = _first_columns(file, reading, roles)
        found = set(map(roles.of, columns))
        if "image" in found or "caption" not in found or not any(map(roles.is_id, columns)):
            return []
        facts = open_table(file, reading, roles, "").facts
    except UsageError:
        return []
    return [set(map(str, each.sample)) for column, each in facts.items() if roles.is_id(column) and each.sample]


def _first_columns(file: str, reading: Reading, roles: Roles) -> list[str]:
    with _raw(file) as raw, _unpacking(file, raw):
        opened = _Opened(file, raw, reading, roles, "")
        is_json = TABLES.get(plain_extension(file)) == "json"
        return _first_keys(opened.head) if is_json else _form_of(opened)[1]


def _first_keys(head: bytes) -> list[str]:
    """Keys of the first record of JSON, and those around it if it lies in an object."""
    text = head.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
    try:
        value, _ = json.JSONDecoder(strict=False).raw_decode(text[1:].lstrip() if text.startswith("[") else text)
    except (ValueError, RecursionError):  # longer than what was read
        keys = []
        for key in re.findall(r'("(?:[^"\\]|\\.)*")\s*:', text):
            with suppress(ValueError):  # an escape that is none
                keys.append(json.loads(key, strict=False))
        return [*keys, *(["caption"] if "images" in keys else [])]  # whose captions come after all photos
    inner = value.values() if isinstance(value, dict) else ()
    records = [each[0] for each in inner if isinstance(each, list) and each and isinstance(each[0], dict)]
    return [key for record in (value, *records) if isinstance(record, dict) for key in record]


@contextmanager
def _raw(file: str) -> Iterator[Any]:
    """The file as a binary stream that can be sought; a remote one is copied to the disk for as long."""
    if not is_remote(file):
        with open(file, "rb") as stream:
            yield stream
        return

    def chunks(done: int) -> Iterator[bytes]:
        with open_file(file) as stream:
            stream.seek(done * COPY_BYTES)
            while chunk := stream.read(COPY_BYTES):
                yield chunk

    with tempfile.SpooledTemporaryFile(max_size=64 * COPY_BYTES) as stream:
        for chunk in resumed(chunks, file):
            stream.write(chunk)
        yield stream


class _Opened:
    """A file of records while it is opened: its bytes, unpacked, and its encoding."""

    def __init__(self, file: str, raw: Any, reading: Reading, roles: Roles, split: str):
        self.file, self.reading, self.roles, self.split = file, reading, roles, split
        self._raw = raw
        self.table = Table(file, raw.seek(0, os.SEEK_END), "")
        raw.seek(0)
        self.packing = is_packed(raw.read(8))
        self.head = self.stream().read(HEAD_BYTES)
        if not self.head and not self.table.size:
            raise UsageError(f"{file} is empty (0 bytes): remove it, or write it again")
        self.encoding = unicode_of(self.head) or "utf-8"
        self.is_told = reading.encoding is not None
        if self.is_told:
            told = check_encoding(reading.encoding)
            marked = unicode_of(self.head)
            self.encoding = marked if marked and told in ("utf-8", "utf-16", "utf-32") else told

    @property
    def name(self) -> str:
        return self.table.name

    def is_known(self, name: str) -> bool:
        """Whether a column's name is one that is looked for."""
        return self.roles.of(name) is not None

    def add_digest(self) -> None:
        """Of all bytes, as they are packed."""
        content = hashlib.blake2b(digest_size=16)
        self._raw.seek(0)
        while chunk := self._raw.read(COPY_BYTES):
            content.update(chunk)
        self.table.digest = content.hexdigest()

    @property
    def in_place(self) -> bool:
        """Whether records can be read again from where they lie."""
        return self.packing is None and not self.encoding.startswith(("utf-16", "utf-32"))

    def stream(self) -> Any:
        """The unpacked bytes from the start."""
        self._raw.seek(0)
        return unpacked(self.packing, self._raw)

    def lines(self) -> Iterator[Line]:
        if self.encoding.startswith(("utf-16", "utf-32")):
            return self._wide_lines()
        return lines_of_bytes(self.stream(), self.encoding)

    def _wide_lines(self) -> Iterator[Line]:
        try:
            yield from lines_of_text(self.stream(), self.encoding)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"{self.file} is not in {self.encoding} (byte {error.start:,} of a part): give the right --encoding"
            ) from None

    def store(self, begins: array, ends: array, texts: list[bytes] | None) -> None:
        self.table._stored = Spans.of(self.file, begins, ends) if texts is None else Blocks(texts)


# ---------------------------------------------------------------------------------------------------------------- CSV


def _of_csv(opened: _Opened) -> Table:
    _settle_encoding(opened)
    table, reading = opened.table, opened.reading
    form, names = _form_of(opened)
    result, bad = _scan_csv(opened, form, names)
    if bad.count:
        for other in _other_forms(opened, form):
            again, bad_again = _scan_csv(opened, other, names)
            if not bad_again.count:
                form, result, bad = other, again, bad_again
                break
    if bad.count and reading.bad_lines != "skip":
        raise UsageError(_bad_lines(opened, form, names, bad, len(result.begins)))
    if opened.in_place and not is_remote(opened.file):
        table._stored = Spans.of(opened.file, result.begins, result.ends)
        table._parse = partial(_csv_record, names=names, form=form, encoding=opened.encoding)
    else:
        records = (record.text.encode() for record in _rows_of(opened, form, names))
        table._stored = Blocks(records)
        table._parse = partial(_csv_record, names=names, form=form, encoding="utf-8")
    table.columns, table.facts, table.problems, table.is_delimited = names, result.facts, result.problems, True
    table.told = [_told_csv(opened, form)]
    if bad.count:
        table.told.append(f"{bad.count:,} lines of {table.name} are not rows ({bad.named()}), and are skipped")
    if is_shopify(names):
        _as_export(table, opened.roles, shopify_rows, "Handle")
    elif is_woocommerce(names):
        _as_export(table, opened.roles, woocommerce_rows, WOOCOMMERCE_PRODUCT)
    elif (group := merchant_product(names)) is not None:
        table.product_column = group
        table.told += ["a feed of Google Merchant", *feed_notes(names)]
    return table


def _told_csv(opened: _Opened, form: Form) -> str:
    parts = [form.told(), "" if opened.encoding in ("utf-8", "utf-8-sig") else opened.encoding, opened.packing or ""]
    told = ", ".join(filter(None, parts))
    return f"{opened.name}: {told}" if told else f"{opened.name}: one column"


def _csv_record(data: bytes, names: Sequence[str], form: Form, encoding: str) -> dict[str, str | None]:
    fields = parse(data.decode("utf-8" if encoding == "utf-8-sig" else encoding), form)
    # An empty cell is the only way to write a null.
    return {name: value or None for name, value in zip(names, fields, strict=False)}


def _form_of(opened: _Opened) -> tuple[Form, list[str]]:
    """The form of a CSV file, and the names of its columns."""
    reading = opened.reading
    sample = list(islice(opened.lines(), 200))
    delimiter = reading.delimiter or {".tsv": "\t", ".tab": "\t", ".psv": "|"}.get(plain_extension(opened.file))
    if delimiter is not None and reading.delimiter is None and not any(delimiter in line.text for line in sample):
        delimiter = None  # a table whose name is wrong
    form = find_form(sample, delimiter, reading.quotes, opened.is_known)
    _refuse_lines_above(opened, sample, form.skipped_lines, delimiter)
    first = next(scan(iter(sample), form, 0), None)
    if first is None:
        raise UsageError(f"{opened.file} has no lines: write its columns on the first one")
    names = [name.strip().lstrip("\ufeff") for name in first.fields]
    if reading.names is not None:
        if len(names) != len(reading.names):
            raise UsageError(
                f"--csv_columns names {len(reading.names)} columns, {opened.name} has {len(names)} on its first line"
            )
        return form, _distinct(reading.names, opened)
    if any(looks_like_photo_name(name) or "://" in name for name in names):
        raise UsageError(
            f"{opened.name} has no header: its first line is '{first.text.strip()[:100]}'; add a line with the names "
            "of the columns, or give them as --csv_columns file_name,caption"
        )
    return form, _distinct(names, opened)


def _refuse_lines_above(opened: _Opened, sample: Sequence[Line], skipped: int, delimiter: str | None) -> None:
    """Refuse a table whose columns are not named on its first line: exports begin with a title, a date or a remark.

    Args:
        sample: the first lines.
        skipped: of these, what is known to be no row.
    """
    if opened.reading.names is not None:
        return
    above = None
    for number, line in enumerate(sample[:MOST_LINES_ABOVE]):
        if number < skipped or not line.text.strip():
            continue
        form = find_form(sample[number:], delimiter, opened.reading.quotes, opened.is_known)
        record = next(scan(iter(sample[number:]), form, 0), None)
        known = 0 if record is None else sum(opened.is_known(name.strip()) for name in record.fields)
        if above is None:
            if known:
                return
            above = line.text.strip()[:100]
        elif known > 1:
            raise UsageError(
                f"{opened.file}: the columns are named on line {number + 1}, and above stands "
                f"'{above}': remove what is above them"
            )


def _distinct(names: Sequence[str], opened: _Opened) -> list[str]:
    """Names of columns, each once; the one without a name is called by its number."""
    found: list[str] = []
    for number, name in enumerate(names, start=1):
        if name in found and opened.roles.of(name) is not None:
            raise UsageError(
                f"{opened.name} has two columns '{name}' ({found.index(name) + 1} and {number}): rename one of them"
            )
        name = name or f"column {number}"
        found.append(name if name not in found else f"{name} ({number})")
    return found


# What --csv_quotes may be, and what a file then means.
QUOTES = {
    "doubled": "each quote is right as it is",
    "backslash": "backslashes stand before quotes",
    "none": "quotes are text",
}


@dataclass
class _Scanned:
    """What a scan of a CSV file gives."""

    facts: dict[str, Facts]
    begins: array = field(default_factory=lambda: array("q"))
    ends: array = field(default_factory=lambda: array("q"))
    problems: dict[int, str] = field(default_factory=dict)


@dataclass
class _Bad:
    """Lines that are no rows: how many, and (line, problem) of the first."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)

    def add(self, line: int, problem: str) -> None:
        self.count += 1
        if len(self.first) < NAMED_LINES:
            self.first.append((line, problem))

    def named(self) -> str:
        numbers = ", ".join(f"{line:,}" for line, _ in self.first)
        more = f" and {self.count - len(self.first):,} more" if self.count > len(self.first) else ""
        return f"line{'s' if self.count > 1 else ''} {numbers}{more}"


def _rows_of(opened: _Opened, form: Form, names: Sequence[str]) -> Iterator[Record]:
    records = scan(opened.lines(), form, len(names))
    return records if opened.reading.names is not None else islice(records, 1, None)


def _scan_csv(opened: _Opened, form: Form, names: Sequence[str]) -> tuple[_Scanned, _Bad]:
    """The places of all rows, and the lines that are none."""
    names_photos = any(opened.roles.of(name) == "image" for name in names)
    of = opened.roles.of if names_photos else opened.roles.watched
    roles = [(place, name, of(name)) for place, name in enumerate(names)]
    watched = [(place, name, role) for place, name, role in roles if role is not None]
    result = _Scanned({name: Facts(role == "image") for _, name, role in watched})
    bad = _Bad()
    are_rows = opened.reading.bad_lines == "skip"
    gathered = [(place, result.facts[name].add) for place, name, _ in watched]
    for record in _rows_of(opened, form, names):
        if record.problem is not None:
            bad.add(record.line, record.problem)
            if are_rows:
                result.problems[len(result.begins)] = f"line {record.line:,} of {opened.name}: {record.problem}"
        for place, add in gathered:
            add(None if record.problem is not None else record.fields[place])
        result.begins.append(record.begin)
        result.ends.append(record.end)
    return result, bad


def _other_forms(opened: _Opened, form: Form) -> Iterator[Form]:
    """Forms to try where quotes go wrong."""
    if opened.reading.quotes is not None:
        return
    has_backslashes = has_quoted = False
    for line in opened.lines():
        if '"' in line.text:
            has_backslashes = has_backslashes or '\\"' in line.text
            cells = line.text.rstrip("\r\n").split(form.delimiter)
            has_quoted = has_quoted or any(
                len(cell) > 1 and cell.strip().startswith('"') and cell.strip().endswith('"') for cell in cells
            )
    if has_backslashes:
        yield Form(form.delimiter, "backslash", form.skip_space, form.skipped_lines)
    if not has_quoted:  # else its quotes are more than signs of inches
        yield Form(form.delimiter, "none", form.skip_space, form.skipped_lines)


def _quotes_that_fit(opened: _Opened, form: Form, names: Sequence[str]) -> list[str]:
    """The values of --csv_quotes by which each line of a file is a row."""
    forms = {quotes: Form(form.delimiter, quotes, form.skip_space, form.skipped_lines, True) for quotes in QUOTES}
    if not any('\\"' in line.text for line in opened.lines()):
        del forms["backslash"]
    return [
        quotes
        for quotes, other in forms.items()
        if all(record.problem is None for record in _rows_of(opened, other, names))
    ]


def _bad_lines(opened: _Opened, form: Form, names: Sequence[str], bad: _Bad, rows: int) -> str:
    line, problem = bad.first[0]
    what = f"{opened.file}, line {line:,}: {problem}"
    if "field" in problem and "header" in problem:
        remedy = "put text that holds the delimiter in double quotes, as spreadsheets do when they save CSV"
    elif "quote" in problem:
        remedy = 'put a text that has quotes in double quotes, and write each of its own twice, as in "12"" pan"'
        fitting = _quotes_that_fit(opened, form, names)
        remedy += "".join(
            f", or, if {meaning}, give --csv_quotes {each}" for each, meaning in QUOTES.items() if each in fitting
        )
    elif "encoding" in problem:
        remedy = "give the right --encoding"
    else:
        remedy = "repair it"
    tail = f"; {bad.count:,} of {rows:,} rows can't be read whole ({bad.named()})" if bad.count > 1 else ""
    return f"{what}{tail}: {remedy}; or --bad_lines skip, which counts such lines as unusable rows"


def _as_export(table: Table, roles: Roles, rows_of: Callable[[list[Any]], tuple[list[Any], str]], product: str) -> None:
    """Rows of a shop's export, which need others of it: photos of a product whose title stands in its first row."""
    rows, told = rows_of(list(table.read(0, len(table))))
    table.rewrite(rows, roles)
    table.problems = {place: str(row) for place, row in enumerate(rows) if isinstance(row, Unreadable)}
    table.product_column = product
    table.told.append(told)


# --------------------------------------------------------------------------------------------------------------- JSON


def _of_json(opened: _Opened) -> Table:
    if opened.encoding.startswith(("utf-16", "utf-32")) or (opened.is_told and opened.encoding != "utf-8"):
        return _transcoded(opened)
    table = opened.table
    begins, ends, count, document = array("q"), array("q"), 0, None
    kept: list[bytes] | None = None if opened.in_place else []
    gatherer = _Gatherer(table, opened.roles)
    stream = opened.stream() if opened.packing != "zstd" else io.BytesIO(opened.stream().read())
    bad_lines: list[bytes] = []
    for record in json_records(stream, table.name):
        document = record.value if not count and record.is_whole else None
        count += 1
        if record.problem is not None:
            table.problems[len(begins)] = record.problem
            bad_lines += [record.not_utf8] if record.not_utf8 and len(bad_lines) < 1000 else []
        gatherer.add(record.value)
        begins.append(record.begin)
        ends.append(record.end)
        if kept is not None:
            kept.append(json.dumps(record.value).encode())
    if count == 1 and REPEATED in table.problems.get(0, ""):
        raise UsageError(
            f"{opened.file}: {table.problems[0]}, of which only one could be read: write each once (several titles of "
            "a photo as a list)"
        )
    if count and len(table.problems) == count and not bad_lines:
        first = opened.head.decode("utf-8", "replace").split("\n")[0].strip()[:100]
        raise UsageError(f"{opened.file} holds no JSON: its first line is '{first}'; write it again, or call it .csv")
    if len(bad_lines) > max(BAD_LINES_OF_JSON, count - len(bad_lines)):
        raise UsageError(f"{opened.file} is not in UTF-8: {guess_encoding(bad_lines).told()}")
    opened.store(begins, ends, kept)
    table._parse = partial(json.loads, strict=False)
    if isinstance(document, dict):
        return _of_document(opened, document) or gatherer.done()
    if opened.packing is not None:
        table.told.append(f"{table.name}: {opened.packing}")
    return gatherer.done()


def _transcoded(opened: _Opened) -> Table:
    table, gatherer = opened.table, _Gatherer(opened.table, opened.roles)
    try:
        text = opened.stream().read().decode(opened.encoding)
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{opened.file} is not in {opened.encoding} (byte {error.start:,}): give the right --encoding"
        ) from None
    values: list[Any] = []
    document = None
    for record in json_records(io.BytesIO(text.lstrip("\ufeff").encode("utf-8", "surrogatepass")), table.name):
        if record.problem is not None:
            table.problems[len(values)] = record.problem
        document = record.value if not values and record.is_whole else None
        gatherer.add(record.value)
        values.append(record.value)
    table._stored = Blocks.of_values(values)
    table.told.append(f"{table.name}: {opened.encoding}")
    if isinstance(document, dict):
        return _of_document(opened, document) or gatherer.done()
    return gatherer.done()


def _of_document(opened: _Opened, document: dict[str, Any]) -> Table | None:
    """The table that a file of one object holds; None if that object is the file's one record."""
    table, roles = opened.table, opened.roles
    is_whole = partial(_has_both, roles=roles)
    if any(roles.of(key) and not isinstance(value, (list, dict)) for key, value in document.items()):
        # A record; or the name of a shop, above a list of its products.
        with suppress(UsageError):
            found = table_in(document, opened.split, opened.name, is_whole)
            if found is not None and found.records and is_whole(found.records[0]):
                return _with_records(table, found, roles)
        return None
    found = table_in(document, opened.split, opened.name, is_whole)
    if found is None:
        raise NoTable(
            f"{opened.file} holds one object with the keys {listed(list(document)[:8])}: expected a list of records "
            'such as {"image": file name, "caption": text}'
        )
    return _with_records(table, found, roles)


def _has_both(record: dict[str, Any], roles: Roles) -> bool:
    """Whether the keys of an object name a photo and a title."""
    return {"image", "caption"} <= set(map(roles.of, record))


def _with_records(table: Table, found: Document, roles: Roles) -> Table:
    table.problems, table.split = {}, found.split
    table.rewrite(found.records, roles)
    table.told.extend(found.told)
    return table


def _of_feed(opened: _Opened) -> Table:
    """A feed of Google Merchant; other XML is none."""
    table = opened.table
    if FEED_NAMESPACE.encode() not in opened.head.replace(b"\0", b""):
        raise NoTable(
            f"{opened.file} is XML, but no feed of Google Merchant, RSS or Atom with names of {FEED_NAMESPACE}1.0: "
            "save it as such, or as CSV"
        )
    encoding = opened.encoding if opened.is_told else None
    table.rewrite(feed_items(opened.stream(), opened.file, encoding), opened.roles)
    if not len(table):
        raise NoTable(f"{opened.file} is a feed without items")
    table.product_column = merchant_product(table.columns)
    table.told += [f"{table.name}: a feed of Google Merchant (XML), {len(table):,} items", *feed_notes(table.columns)]
    return table


class _Gatherer:
    """Columns and facts of records, one after the other."""

    def __init__(self, table: Table, roles: Roles):
        self._table, self._roles = table, roles
        self._columns: dict[str, None] = {}
        self._facts: dict[str, Facts] = {}
        self._count = 0

    def add(self, record: Any) -> None:
        if isinstance(record, dict):
            for column in record:
                if column not in self._columns:
                    self._columns[column] = None
                    if (role := self._roles.watched(column)) is not None:
                        self._facts[column] = Facts(role == "image")
                        self._facts[column].skip(self._count)
            for column, facts in self._facts.items():
                facts.add(record.get(column))
        else:
            self._table.bare = self._table.bare or isinstance(record, str)
            for facts in self._facts.values():
                facts.add(None)
        self._count += 1

    def done(self) -> Table:
        self._table.columns, self._table.facts = list(self._columns), self._facts
        return self._table


# --------------------------------------------------------------------------------------------------------------- text


def _is_table_in_text(opened: _Opened) -> bool:
    """Whether a .txt is a table: a feed, or its lines have tabs throughout, or its first line names columns."""
    if is_xml(opened.head):
        return True
    if opened.reading.names is not None or opened.reading.delimiter is not None:
        return True
    lines = [line.text.rstrip("\r\n") for line in islice(opened.lines(), 200) if line.text.strip()]
    if not lines:
        return False
    tabs = lines[0].count("\t")
    if tabs and all(line.count("\t") == tabs for line in lines):
        return True
    for delimiter in (",", ";", "|"):
        names = [name.strip() for name in lines[0].split(delimiter)]
        roles = {opened.roles.of(name) for name in names}
        if len(names) > 1 and {"image", "caption"} <= roles:
            return True
    return False


def _titles(opened: _Opened) -> Table:
    """A title a line; an empty line is an unusable row, so that line n stays row n."""
    _settle_encoding(opened)
    table = opened.table
    titles = []
    for line in opened.lines():
        if line.damaged:
            table.problems[len(titles)] = f"line {len(titles) + 1:,} of {table.name} is not in UTF-8"
        titles.append(line.text.rstrip("\r\n"))
    table._stored, table.bare = Blocks.of_values(titles), True
    if opened.encoding not in ("utf-8", "utf-8-sig"):
        table.told.append(f"{table.name}: {opened.encoding}")
    return table


def _settle_encoding(opened: _Opened) -> None:
    """Find the encoding of a text file that is not UTF-8, or ask for it."""
    if opened.is_told or opened.encoding.startswith(("utf-16", "utf-32")):
        return
    good, bad, sample, first = 0, 0, [], None
    for number, raw in enumerate(opened.stream(), start=1):
        if raw.isascii():
            continue
        try:
            raw.decode("utf-8")
            good += 1
        except UnicodeDecodeError:
            bad += 1
            first = first or number
            if len(sample) < 1000:
                sample.append(raw)
    if not bad or bad <= good * BAD_SHARE:
        return  # in UTF-8, but for single lines
    guess = guess_encoding(sample)
    if good > bad * BAD_SHARE:
        likely = f"; most likely {guess.readings[0][0]}: '{guess.readings[0][1]}'" if guess.readings else ""
        raise UsageError(
            f"{opened.file} is in several encodings: of its lines with letters beyond ASCII {good:,} are in UTF-8, and "
            f"{bad:,} are not (line {first:,} is the first that is not{likely}): no --encoding reads both right, so "
            "write the table again, all of it in UTF-8"
        )
    if guess.encoding is None or good:
        raise UsageError(f"{opened.file} is not in UTF-8 (line {first:,} is the first that is not): {guess.told()}")
    opened.encoding = guess.encoding
