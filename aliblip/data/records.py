"""Records that name photos by file: image folders with metadata, JSON lists and lines, CSV, titles a line."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from aliblip.data.columns import Asked, Columns, Request, choose_columns
from aliblip.data.manifest import DataFile
from aliblip.data.remote import is_remote, open_file, read_patiently, resumed
from aliblip.data.rows import Row, Shard, Source, path_inside
from aliblip.runtime.mistakes import UsageError

__all__ = [
    "METADATA_FILES",
    "RecordSource",
    "Records",
    "extension_of",
    "open_image_folder",
    "open_list",
    "spans_of_values",
]

METADATA_FILES = ("metadata.jsonl", "metadata.csv")
# Rows of a folder can be read in any order at no cost: small shards mix them well.
SHARD_ROWS = 64
# The keys of the first rows are the columns.
PROBED_ROWS = 1000
# Of which one read looks for a key that the first rows lack.
SEARCHED_BYTES = 2**22


class RecordSource(Source):
    """Rows of records; only the places of the records are held in memory.

    Args:
        tables: the files.
        image_keys: keys under which a record may name its photo.
    """

    random_access = True

    def __init__(
        self,
        request: Request,
        columns: Sequence[str],
        selected: Columns,
        tables: Sequence[Records],
        image_keys: Sequence[str | None],
    ):
        pieces = [
            (table_index, start, min(start + SHARD_ROWS, len(table)))
            for table_index, table in enumerate(tables)
            for start in range(0, len(table), SHARD_ROWS)
        ]
        super().__init__(
            request,
            columns,
            selected,
            [(f"{tables[t].name}[{start}:{stop}]", stop - start) for t, start, stop in pieces],
            [DataFile(table.file, len(table), table.size, table.digest) for table in tables],
        )
        self._pieces = pieces
        self._tables = tables
        self._image_keys = image_keys
        self.photo_keys |= frozenset(key for key in image_keys if key)

    def _file_of(self, shard: Shard) -> str:
        return self._tables[self._pieces[shard.index][0]].file

    def _read(self, shard: Shard, start: int, stop: int) -> Iterator[Row]:
        table_index, first, _ = self._pieces[shard.index]
        table = self._tables[table_index]
        for position, record in enumerate(table.read(first + start, first + stop), start=start):
            number = shard.first_row + position
            if isinstance(record, str) and self.selected.image is None:
                record = {self.selected.caption: record}  # a list of bare titles
            if not isinstance(record, dict):
                yield self._row(number, None, None, {}, None, "the metadata record is not a JSON object")
                continue
            file = next((record[key] for key in self._image_keys if record.get(key) is not None), None)
            image, problem = (None, None) if file is None else path_inside(table.image_dir, file)
            name, photo = file if isinstance(file, str) else None, image
            if self.selected.image is None:  # of titles: the photo is not read, but may tell the product
                image = problem = name = None
            yield self._row(number, image, record.get(self.selected.caption), record, name, problem, photo)


class Records:
    """Records of one file: where each begins and ends. They are parsed when they are read.

    Args:
        file: the file, of `size` bytes, whose BLAKE2 is `digest`.
        image_dir: the folder that its file names are relative to.
        spans: (records, 2) int64, byte offsets in the file, or in `data` if that is given.
    """

    def __init__(self, file: str, image_dir: str, spans: np.ndarray, size: int, digest: str, data: bytes | None = None):
        self.file, self.image_dir, self.size, self.digest = file, image_dir, size, digest
        self.name = _base_name(file)
        self._spans, self._data = spans, data

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """Records [start, stop); None for one that can't be parsed."""
        with io.BytesIO(self._data) if self._data is not None else open_file(self.file) as stream:
            for begin, end in self._spans[start:stop]:
                stream.seek(int(begin))
                try:
                    yield json.loads(stream.read(int(end - begin)), strict=False)
                except (ValueError, RecursionError):  # bad JSON or bad UTF-8: one bad row, not the end of the stream
                    yield None

    def has_key(self, key: str, start: int) -> bool:
        """Whether a record from `start` on has a key. Only records near one that spells it are parsed."""
        # What is not ASCII can be written in many ways: then every record is parsed.
        spelling = json.dumps(key).encode() if key.isascii() else b"{"
        with io.BytesIO(self._data) if self._data is not None else open_file(self.file) as stream:
            while start < len(self):
                begin = int(self._spans[start][0])
                stop = max(int(np.searchsorted(self._spans[:, 1], begin + SEARCHED_BYTES)), start + 1)
                stream.seek(begin)
                data = stream.read(int(self._spans[stop - 1][1]) - begin)
                if spelling in data and any(
                    isinstance(record, dict) and key in record for record in self.read(start, stop)
                ):
                    return True
                start = stop
        return False

    @classmethod
    def open(cls, file: str, image_dir: str) -> Records:
        """Find the records of a .csv, .txt, .json or .jsonl file.

        Raises:
            UsageError: a JSON list that can't be parsed.
        """
        content = hashlib.blake2b(digest_size=16)

        def told(data: bytes) -> bytes:
            content.update(data)
            return data

        with open_file(file) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            data = None
            if extension_of(file) == ".csv":
                text = io.TextIOWrapper(
                    io.BytesIO(told(stream.read())), encoding="utf-8-sig", errors="replace", newline=""
                )
                # An empty CSV cell is the only way to write a null.
                spans, data = spans_of_values(
                    {key: value or None for key, value in row.items()} for row in csv.DictReader(text)
                )
            elif extension_of(file) == ".txt":
                # A title a line; an empty line is an unusable row, so that line n stays row n.
                text = told(stream.read()).decode("utf-8-sig", "replace")
                spans, data = spans_of_values(text.splitlines())
            else:
                head = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
                stream.seek(0)
                if head.startswith(b"["):
                    spans = _spans_of_list(told(stream.read()), _base_name(file))
                else:
                    spans = _spans_of_lines(told(line) for line in stream)
        return cls(file, image_dir, spans, size, content.hexdigest(), data)


def _no_spans() -> np.ndarray:
    return np.zeros((0, 2), dtype=np.int64)


def spans_of_values(values: Iterable[Any]) -> tuple[np.ndarray, bytes]:
    """Values as JSON, one after the other, and where each begins and ends."""
    lines = [json.dumps(value, default=str).encode() for value in values]
    sizes = np.array([len(line) for line in lines], dtype=np.int64)
    ends = np.cumsum(sizes, dtype=np.int64)
    return (np.stack([ends - sizes, ends], axis=1) if lines else _no_spans()), b"".join(lines)


def _spans_of_lines(lines: Iterable[bytes]) -> np.ndarray:
    spans, position = [], 0
    for line in lines:
        skip = 3 if not position and line.startswith(b"\xef\xbb\xbf") else 0
        if line[skip:].strip():
            spans.append((position + skip, position + len(line)))
        position += len(line)
    return np.array(spans, dtype=np.int64) if spans else _no_spans()


def _spans_of_list(data: bytes, name: str) -> np.ndarray:
    """Where each element of a JSON list begins and ends, in bytes; found by parsing one after the other."""
    # Latin-1 keeps one character per byte, so that positions are byte offsets; strings are decoded properly when read.
    text, decoder, gap = data.decode("latin-1"), json.JSONDecoder(strict=False), re.compile(r"[ \t\r\n]*")
    position = gap.match(text, 3 if text.startswith("\xef\xbb\xbf") else 0).end() + 1
    spans = []
    try:
        position = gap.match(text, position).end()
        while text[position : position + 1] != "]":
            _, end = decoder.raw_decode(text, position)
            spans.append((position, end))
            position = gap.match(text, end).end()
            if text[position : position + 1] == ",":
                position = gap.match(text, position + 1).end()
            elif text[position : position + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']'", text, position)
    except (json.JSONDecodeError, RecursionError) as error:
        line = text.count("\n", 0, getattr(error, "pos", position)) + 1
        raise UsageError(f"{name} is not a valid JSON list (line {line}): repair or rewrite it") from None
    return np.array(spans, dtype=np.int64) if spans else _no_spans()


def open_image_folder(request: Request) -> RecordSource:
    """Open a folder of photos with a `metadata.jsonl` or `metadata.csv` beside them.

    Raises:
        UsageError: there is no such file, or no column that was named.
    """
    metadata = [file for file in request.files if _base_name(file) in METADATA_FILES]
    if not metadata:
        raise UsageError(
            f"{request.name} has photos but no metadata.jsonl or metadata.csv in split '{request.split}': add one with "
            "the columns file_name and caption, or give a JSON list as --data_files with --image_dir"
        )
    tables = [_open_records(file, _folder_of(file)) for file in metadata]
    # datasets calls the photo of file_name "image".
    asked, is_default = request.asked, request.asked.image in (None, "image")
    if is_default and asked.product_id == "file_name":
        request = replace(request, asked=replace(asked, product_id="image"))
    columns = ["image" if column == "file_name" else column for column in _record_columns(tables, asked)]
    selected = choose_columns(request, columns, ("image",), photos=("file_name",))
    return RecordSource(request, columns, selected, tables, ("file_name" if is_default else asked.image,))


def open_list(request: Request) -> RecordSource:
    """Open JSON lists, JSON lines, CSV files, or text files with a title a line.

    Raises:
        UsageError: a file is damaged, or there is no column that was named.
    """
    # All lists of a data set lie together: photos are looked for beside the first.
    image_dir = request.image_dir or _folder_of(request.files[0])
    tables = [_open_records(file, image_dir) for file in request.files]
    columns = _record_columns(tables, request.asked)
    if not columns:
        if any(len(table) for table in tables):
            raise UsageError(
                f'{request.name} has no records: expected a JSON list of {{"product": file name, "caption": text}}'
            )
        return RecordSource(request, columns, Columns(None, None, None), tables, ())
    selected = choose_columns(request, columns, ("product", "image", "file_name"))
    return RecordSource(request, columns, selected, tables, (selected.image,))


def extension_of(file: str) -> str:
    """The end of a path's or an address's name, ".json"."""
    return os.path.splitext(urlsplit(file).path if is_remote(file) else file)[1].lower()


def _base_name(file: str) -> str:
    return posixpath.basename(file.replace(os.sep, "/"))


def _folder_of(file: str) -> str:
    return posixpath.dirname(file.replace(os.sep, "/")) or "."


def _open_records(file: str, image_dir: str) -> Records:
    return read_patiently(lambda: Records.open(file, image_dir), file)


def _record_columns(tables: Sequence[Records], asked: Asked) -> list[str]:
    """The keys of the first records, and of those that are asked for also the ones that come later."""
    columns: dict[str, None] = {}
    for table in tables:
        for record in resumed(functools.partial(table.read, stop=PROBED_ROWS), table.file):
            if isinstance(record, dict):
                columns.update(dict.fromkeys(record))
            elif isinstance(record, str) and asked.sides == "titles":
                columns["caption"] = None
    # What a folder calls "image" is the "file_name" of its records.
    for key in sorted(asked.looked_for() - {"image", "file_name", *columns}):
        if any(read_patiently(functools.partial(table.has_key, key, PROBED_ROWS), table.file) for table in tables):
            columns[key] = None
        elif key != "product_id" or asked.product_id:  # which is about to be refused, with all that there are
            columns.update(dict.fromkeys(key for table in tables for key in _all_keys(table)))
    return list(columns)


def _all_keys(table: Records) -> dict[str, None]:
    records = resumed(lambda done: table.read(done, len(table)), table.file)
    return dict.fromkeys(key for record in records if isinstance(record, dict) for key in record)
