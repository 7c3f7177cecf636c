"""Where photos and titles come from: Parquet, WebDataset, ImageFolder, Hub names, JSON lists.

    source = open_source(data_dir="catalogue", split="train")
    for row in source.read(shard_index=0, start=10, stop=20):
        example = decode(row)

A source is a list of shards whose row counts are known without decoding (or even reading) a single photo, so that an
epoch can be planned from it. `read` skips inside a shard and yields rows as they are stored; `decode` turns one of them
into an RGB photo and a title, or raises `UnusableItem` with a plain reason.

Which files belong to which split is always decided by `datasets`. Parquet is read by `datasets` streaming as well. Tars
and folders are read here, because a single bad record (a metadata line without its file, JSON that does not parse, a
sample without a title) makes `datasets` raise inside its generator, which ends the stream; here it is one unusable row.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image

from aliblip.data.manifest import DataFile, file_names
from aliblip.data.remote import (
    RemoteReadError,
    is_remote,
    open_file,
    read_file,
    read_patiently,
    resumed,
    storage_options,
    take_over_retries,
)
from aliblip.data.tar_index import TarIndex, indexed_tar
from reading_aliblip import IMAGE_FORMATS, UnusableItem, clean_title, read_photo

__all__ = [
    "Example",
    "Row",
    "Shard",
    "Source",
    "decode",
    "open_source",
    "product_id_of",
    "require_usable_row",
]

# Parquet row groups are joined to shards of at least this many rows: small enough to mix well, few enough to open.
PARQUET_SHARD_ROWS = 1024
# Read from the end of a Parquet file at once: nearly always the whole footer.
PARQUET_TAIL_BYTES = 2**16
# Undecoded rows of a Parquet file that are converted at once.
PARQUET_BATCH_ROWS = 64
# Rows of a folder can be read in any order at no cost: small shards mix them well.
FOLDER_SHARD_ROWS = 64
TAR_IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2")
TAR_TEXT_FIELDS = ("txt", "text", "transcript", "caption", "title")
COLUMN_PROBE_ROWS = 1000


@dataclass(frozen=True)
class Shard:
    """A run of rows that is read as one piece.

    `first_row` is the global number of its first row.
    """

    index: int
    name: str
    num_rows: int
    first_row: int


@dataclass
class Row:
    """One undecoded row.

    `row` is its number in the source, `image` bytes, a path or a PIL image, `text` the stored value, `product_id` an
    int64, `name` the file name or key for reports, `problem` the reason why the row could not be read, if so, `others`
    the values of further columns that were asked for.
    """

    row: int
    image: Any
    text: Any
    product_id: int
    name: str
    problem: str | None = None
    others: dict[str, Any] = field(default_factory=dict)


@dataclass
class Example:
    """A decoded row: `image` PIL RGB, `text` str, `product_id` int64, `row` the number in the source. The side that was
    not asked for is None."""

    image: Image.Image | None
    text: str | None
    product_id: int
    row: int


# ------------------------------------------------------------------------------------------------------ decoding


def decode(row: Row, sides: str = "both") -> Example:
    """Decode one row: the photo as a person sees it, and its title.

    EXIF orientation and colour profile are applied, transparency lies over white, an animation is its first picture.

    Args:
        row: from a source.
        sides: "both", or only the "images" or the "titles".

    Raises:
        UnusableItem: with a plain reason; no other exception leaves this function, whatever the bytes are.
    """
    if row.problem is not None:
        raise UnusableItem(row.problem)
    text = clean_title(row.text) if sides != "images" else None  # first, since it costs nothing
    image = read_photo(row.image, _fetch) if sides != "titles" else None
    return Example(image, text, row.product_id, row.row)


def _fetch(address: str, most_bytes: int) -> bytes:
    """A photo's address of any kind, read again where the network fails."""
    try:
        return read_file(address, most_bytes)
    except RemoteReadError as error:
        raise UnusableItem(f"the image can't be fetched ({error})") from None


# ---------------------------------------------------------------------------------------------------- product ids


def product_id_of(value: Any, row: int, sides: str = "both") -> int:
    """The int64 product id of a stored value.

    Integers (and floats of whole value, which tables with gaps make of integers) stay as they are; everything else, and
    integers beyond int64, becomes a 64-bit BLAKE2 hash. A null or blank (or a value that has no JSON form) is no
    product: it becomes an id of its own, hashed from the row number (and from the `sides` of its source), so that two
    rows without id never count as one product.
    """
    if isinstance(value, str) and not value.strip():
        value = None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        of = "" if sides == "both" else f" of {sides}"
        return _hash64(f"null product id of row {row}{of}".encode())
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        value = int(value)
        return value if -(2**63) <= value < 2**63 else _hash64(str(value).encode())
    if isinstance(value, bytes):
        return _hash64(value)
    if not isinstance(value, str):
        try:
            value = json.dumps(value, sort_keys=True, default=str)
        except (TypeError, ValueError, RecursionError):  # keys of several types, or lists in lists in lists
            return product_id_of(None, row, sides)
    return _hash64(value.encode("utf-8", "surrogatepass"))


def _hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


# -------------------------------------------------------------------------------------------------------- sources


@dataclass(frozen=True)
class _Columns:
    image: str | None
    caption: str | None
    product_id: str | None
    others: tuple[str, ...] = ()

    def all(self) -> list[str]:
        return [key for key in dict.fromkeys((self.image, self.caption, self.product_id, *self.others)) if key]


@dataclass(frozen=True)
class _Asked:
    """What the user asked for, and which sides a row must have: "both", "images" or "titles"."""

    image: str | None
    caption: str | None
    product_id: str | None
    others: tuple[str, ...]
    sides: str


class Source:
    """Photos and titles in shards.

    Attributes:
        name: what was opened, for messages.
        split: the split.
        columns: all columns there are.
        num_rows: rows in all shards.
        shards: list of `Shard`, in a fixed order.
        files: list of `DataFile` that the rows come from; photos that a file only names are none.
        folder: the local folder that was opened, if one was.
        sides: what its rows have: "both", or only "images" or "titles".
        random_access: whether rows can be read in any order at no cost (folders), rather than shard by shard.
    """

    random_access = False
    folder: str | None = None
    sides = "both"

    def __init__(
        self,
        name: str,
        split: str,
        columns: Sequence[str],
        selected: _Columns,
        sizes: Sequence[tuple[str, int]],
        files: Sequence[DataFile] = (),
    ):
        self.name = name
        self.split = split
        self.columns = list(columns)
        self.selected = selected
        self.shards: list[Shard] = []
        first_row = 0
        for index, (shard_name, num_rows) in enumerate(sizes):
            self.shards.append(Shard(index, shard_name, num_rows, first_row))
            first_row += num_rows
        self._firsts = np.array([shard.first_row for shard in self.shards], dtype=np.int64)
        self.files = list(files)
        self.num_rows = first_row
        if not first_row:
            raise ValueError(f"{name} has no rows in split '{split}': give data with at least one row")

    def manifest(self) -> dict[str, Any]:
        """What the rows come from, as JSON can hold it: to be kept beside a run, and compared when it goes on.

        Returns:
            {"name", "split", "columns": {"image", "caption", "product_id"}, "rows",
            "files": [{"file", "rows", "size", "digest"}]}, the files as `file_names` calls them. The digest is BLAKE2
            of the footer of a Parquet file, of the member names, offsets and lengths of a tar, and of all bytes of a
            metadata file or list. The photos that a metadata file, a list or a column names are not looked at.
        """
        names = file_names([file.file for file in self.files], self.folder)
        return {
            "name": self.name,
            "split": self.split,
            "columns": {role: getattr(self.selected, role) for role in ("image", "caption", "product_id")},
            "rows": self.num_rows,
            "files": [
                {"file": name, "rows": file.rows, "size": file.size, "digest": file.digest}
                for name, file in zip(names, self.files, strict=True)
            ],
        }

    def read(self, shard_index: int, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """Undecoded rows [start, stop) of one shard; `stop` None or beyond the end means the end.

        Raises:
            OSError: the file can't be read; if it is remote, after retries (`RemoteReadError`).
        """
        shard = self.shards[shard_index]
        stop = shard.num_rows if stop is None else min(stop, shard.num_rows)
        start = max(start, 0)
        if start < stop:
            yield from resumed(lambda done: self._read(shard, start + done, stop), self._file_of(shard))

    def read_range(self, start: int, stop: int) -> Iterator[Row]:
        """Undecoded rows [start, stop) by their global numbers; raises as `read`."""
        index = max(int(np.searchsorted(self._firsts, start, side="right")) - 1, 0)
        while index < len(self.shards) and self.shards[index].first_row < stop:
            first = self.shards[index].first_row
            yield from self.read(index, start - first, stop - first)
            index += 1

    def _read(self, shard: Shard, start: int, stop: int) -> Iterator[Row]:
        raise NotImplementedError

    def _file_of(self, shard: Shard) -> str:
        return shard.name

    def _row(
        self, number: int, image: Any, text: Any, fields: dict, name: str | None, problem: str | None = None
    ) -> Row:
        key = self.selected.product_id
        # A photo and a title without id, of two sources, have the same row number and are not the same product.
        product_id = number if key is None else product_id_of(fields.get(key), number, self.sides)
        others = {column: fields.get(column) for column in self.selected.others}
        return Row(number, image, text, product_id, name or f"row {number}", problem, others)


@dataclass(frozen=True)
class _Piece:
    """Row groups of one Parquet file that make a shard; `rows_before` lie before them, of `file_groups` in all.

    `schema` is that of the columns that are read.
    """

    name: str
    file: str
    first_group: int
    group_rows: tuple[int, ...]
    rows_before: int
    file_groups: int
    schema: Any


class ParquetSource(Source):
    """Parquet files, read by `datasets` streaming; a shard is one or several row groups of one file."""

    def __init__(self, name, split, columns, selected, pieces, files, image_dir, cache_dir):
        sizes = [(piece.name, sum(piece.group_rows)) for piece in pieces]
        super().__init__(name, split, columns, selected, sizes, files)
        self._pieces = pieces
        self._image_dir = image_dir
        self._cache_dir = cache_dir
        # By process: a forked one must neither use the open stream of its parent nor close it.
        self._cursors: dict[int, tuple[int, int, Iterator[tuple[Any, int]]]] = {}

    def _read(self, shard: Shard, start: int, stop: int) -> Iterator[Row]:
        position, cells = self._take_cursor(shard, start)
        while position < stop:
            table, i = next(cells)
            if position >= start:
                yield self._convert(table, i, shard.first_row + position)
            position += 1
        self._cursors[os.getpid()] = (shard.index, position, cells)

    def _file_of(self, shard: Shard) -> str:
        return self._pieces[shard.index].file

    def _take_cursor(self, shard: Shard, start: int) -> tuple[int, Iterator[tuple[Any, int]]]:
        """An open stream that is not past row `start` of a shard, and the place of its next row.

        An evaluation reads small units in rising order: were each read from the begin of its row group, a file of one
        large group would be read once per unit. So the last stream stays open, and goes on where that is shorter.
        """
        piece = self._pieces[shard.index]
        begins = np.cumsum([0, *piece.group_rows])
        group = int(np.searchsorted(begins, start, side="right")) - 1
        cursor = self._cursors.pop(os.getpid(), None)
        if cursor is not None and cursor[0] == shard.index and begins[group] < cursor[1] <= start:
            return cursor[1], cursor[2]
        groups = _stream_row_groups(piece.file, piece.schema, self._cache_dir)
        if groups.num_shards != piece.file_groups:
            # A datasets that can't cut Parquet into row groups (before May 2026): from the start of the file.
            return -piece.rows_before, _cells([groups])
        wanted = range(piece.first_group + group, piece.first_group + len(piece.group_rows))
        streams = (groups.shard(num_shards=groups.num_shards, index=index, contiguous=True) for index in wanted)
        return int(begins[group]), _cells(streams)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cursors": {}}  # an open stream can't travel to another process

    def _convert(self, table, i: int, number: int) -> Row:
        fields, problem = {}, None
        for key in table.column_names:
            try:
                fields[key] = table.column(key)[i].as_py()
            except Exception as error:
                fields[key] = None
                problem = problem or f"column '{key}' can't be read ({type(error).__name__})"
        image, name = fields.get(self.selected.image), None
        if isinstance(image, dict):  # the storage of datasets.Image
            name = image.get("path") if isinstance(image.get("path"), str) else None
            image = image["bytes"] if image.get("bytes") is not None else image.get("path")
        if isinstance(image, str) and problem is None:
            if self._image_dir is None:
                problem = "the image is a path, and no image folder was given (--image_dir)"
            else:
                name, (image, problem) = image, _inside(self._image_dir, image)
        return self._row(number, image, fields.get(self.selected.caption), fields, name, problem)


def _cells(streams: Iterable[Any]) -> Iterator[tuple[Any, int]]:
    """(table, row in it) of streamed datasets, one after the other.

    Tables, not Python rows: a cell that can't be converted (text that is not UTF-8) is then one bad row.
    """
    for stream in streams:
        for table in stream.with_format("arrow").iter(batch_size=PARQUET_BATCH_ROWS):
            for i in range(table.num_rows):
                yield table, i


def _stream_row_groups(file: str, schema, cache_dir: str | None):
    """A streamed dataset of one Parquet file whose shards are its row groups (where `datasets` can do that).

    Args:
        file: the file, as `datasets` resolved it.
        schema: Arrow schema of the columns to read.
        cache_dir: cache of `datasets`.
    """
    from datasets import Features, load_dataset
    from datasets.data_files import DataFilesList

    take_over_retries()
    stream = load_dataset(
        "parquet",
        # Resolved, and with the columns known: the file need not be looked up and opened once more for either.
        data_files={"train": DataFilesList([file], origin_metadata=[()])},
        features=Features.from_arrow_schema(schema),
        split="train",
        streaming=True,
        columns=schema.names,
        batch_size=PARQUET_BATCH_ROWS,  # the default is a whole row group
        cache_dir=cache_dir,
        storage_options=storage_options(file),
    )
    return stream.reshard() if hasattr(stream, "reshard") else stream


class TarSource(Source):
    """WebDataset tars; a shard is one tar, and one indexed scan of its headers finds every sample."""

    def __init__(self, name, split, columns, selected, tars):
        sizes = [(os.path.basename(file), len(index)) for file, index in tars]
        files = [DataFile(file, len(index), index.size, index.digest) for file, index in tars]
        super().__init__(name, split, columns, selected, sizes, files)
        self._indexes: list[TarIndex] = [index for _, index in tars]

    def _file_of(self, shard: Shard) -> str:
        return self.files[shard.index].file

    def _read(self, shard: Shard, start: int, stop: int) -> Iterator[Row]:
        index = self._indexes[shard.index]
        with open_file(self._file_of(shard)) as stream:
            for position in range(start, stop):
                fields, problem = {}, None
                for field, (offset, size) in index.members(position).items():
                    if not self._is_wanted(field):
                        continue
                    stream.seek(offset)
                    data = stream.read(size)
                    if len(data) < size:
                        problem = problem or "the tar ends within this sample"
                    try:
                        _add_tar_field(fields, field, data)
                    except ValueError:
                        fields.setdefault(field, None)
                        problem = problem or f"field '{field}' can't be read as text or JSON"
                yield self._row(
                    shard.first_row + position,
                    next((fields[key] for key in self._image_keys() if fields.get(key) is not None), None),
                    fields.get(self.selected.caption),
                    fields,
                    index.key(position),
                    problem,
                )

    def _image_keys(self) -> Sequence[str]:
        # A sample is a photo of any usual extension, unless the user named one.
        return TAR_IMAGE_FIELDS if self.selected.image == "image" else (self.selected.image,)

    def _is_wanted(self, field: str) -> bool:
        wanted = (*self._image_keys(), self.selected.caption, self.selected.product_id, *self.selected.others)
        return field in wanted or field == "json"


def _add_tar_field(fields: dict, field: str, data: bytes) -> None:
    """Decode one member; the keys of a `json` member count as columns of their own."""
    extension = field.rsplit(".", 1)[-1]
    if extension in ("json", "jsn"):
        value = json.loads(data)
        fields[field] = value
        if isinstance(value, dict):
            for key, item in value.items():
                fields.setdefault(key, item)
    elif extension in TAR_TEXT_FIELDS:
        fields[field] = data.decode("utf-8")
    elif extension in ("cls", "cls2", "id", "index", "product_id"):
        text = data.decode("utf-8").strip()
        fields[field] = int(text) if re.fullmatch(r"[+-]?\d{1,400}", text) else (text or None)
    else:
        fields[field] = data


class RecordSource(Source):
    """An image folder with records in JSON lines, CSV or a JSON list; only their places are held in memory."""

    random_access = True

    def __init__(self, name, split, columns, selected, tables, image_keys):
        pieces = [
            (table_index, start, min(start + FOLDER_SHARD_ROWS, len(table)))
            for table_index, table in enumerate(tables)
            for start in range(0, len(table), FOLDER_SHARD_ROWS)
        ]
        super().__init__(
            name,
            split,
            columns,
            selected,
            [(f"{tables[t].name}[{start}:{stop}]", stop - start) for t, start, stop in pieces],
            [DataFile(table.file, len(table), table.size, table.digest) for table in tables],
        )
        self._pieces = pieces
        self._tables = tables
        self._image_keys = image_keys

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
            image, problem = (None, None) if file is None else _inside(table.image_dir, file)
            name = file if isinstance(file, str) else None
            yield self._row(number, image, record.get(self.selected.caption), record, name, problem)


class _Records:
    """Records of one metadata file: where each begins and ends, parsed when read.

    Args:
        file: the file, of `size` bytes, whose BLAKE2 is `digest`.
        image_dir: the folder that its file names are relative to.
        spans: (records, 2) int64, byte offsets in the file, or in `data` if that is given.
    """

    def __init__(self, file: str, image_dir: str, spans: np.ndarray, size: int, digest: str, data: bytes | None = None):
        self.file, self.image_dir, self.size, self.digest = file, image_dir, size, digest
        self.name = posixpath.basename(file.replace(os.sep, "/"))
        self._spans, self._data = spans, data

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, start: int, stop: int) -> Iterator[Any]:
        with io.BytesIO(self._data) if self._data is not None else open_file(self.file) as stream:
            for begin, end in self._spans[start:stop]:
                stream.seek(int(begin))
                try:
                    yield json.loads(stream.read(int(end - begin)), strict=False)
                except (ValueError, RecursionError):  # bad JSON or bad UTF-8: one bad row, not the end of the stream
                    yield None

    @classmethod
    def open(cls, file: str, image_dir: str) -> _Records:
        content = hashlib.blake2b(digest_size=16)

        def told(data: bytes) -> bytes:
            content.update(data)
            return data

        with open_file(file) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            data = None
            if _extension(file) == ".csv":
                text = io.TextIOWrapper(
                    io.BytesIO(told(stream.read())), encoding="utf-8-sig", errors="replace", newline=""
                )
                # An empty CSV cell is the only way to write a null.
                spans, data = _spans_of_values(
                    {key: value or None for key, value in row.items()} for row in csv.DictReader(text)
                )
            elif _extension(file) == ".txt":
                # A title a line; an empty line is an unusable row, so that line n stays row n.
                text = told(stream.read()).decode("utf-8-sig", "replace")
                spans, data = _spans_of_values(text.splitlines())
            else:
                head = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
                stream.seek(0)
                if head.startswith(b"["):
                    spans = _spans_of_list(told(stream.read()), posixpath.basename(file.replace(os.sep, "/")))
                else:
                    spans = _spans_of_lines(told(line) for line in stream)
        return cls(file, image_dir, spans, size, content.hexdigest(), data)


def _no_spans() -> np.ndarray:
    return np.zeros((0, 2), dtype=np.int64)


def _spans_of_values(values: Iterable[Any]) -> tuple[np.ndarray, bytes]:
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
    """Byte ranges of the elements of a JSON list, found by parsing them one after the other."""
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
        raise ValueError(f"{name} is not a valid JSON list (line {line}): repair or rewrite it") from None
    return np.array(spans, dtype=np.int64) if spans else _no_spans()


def _inside(folder: str, file: Any) -> tuple[str | None, str | None]:
    """(path, None) of a file name inside the folder, or (None, the reason why not).

    By the name alone: links that stand in the folder were put there by its owner (the Hub cache consists of them).
    """
    if not isinstance(file, str) or not file.strip():
        return None, "the image file name is empty" if isinstance(file, str) else "the image file name is not text"
    normal = posixpath.normpath(file.replace("\\", "/"))
    if normal.startswith(("/", "../")) or normal == ".." or re.match(r"[A-Za-z]:|[a-z0-9+]+://", file):
        return None, "the image file name leads outside the image folder"
    if "\0" in file:
        return None, "the image file name contains a NUL character"
    return f"{folder.rstrip('/')}/{normal}" if "://" in folder else os.path.join(folder, normal), None


# -------------------------------------------------------------------------------------------------------- opening


def open_source(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    data_dir: str | None = None,
    data_files: str | Sequence[str] | dict | None = None,
    image_dir: str | None = None,
    split: str,
    image_column: str | None = None,
    caption_column: str | None = None,
    product_id_column: str | None = None,
    sides: str = "both",
    other_columns: Sequence[str] = (),
    any_split: bool = False,
    cache_dir: str | None = None,
    index_dir: str | None = None,
) -> Source:
    """Open one split of a data set; no photo is read.

    Everything may lie on another machine (`http://`, `https://`, `hf://`, `s3://` and what else fsspec knows); opening
    and reading then survive a bad connection, see `aliblip.data.remote`.

    Args:
        dataset_name: a Hub name, or a local folder.
        dataset_config_name: configuration of that data set, if it has several.
        data_dir: a local folder of Parquet files, WebDataset tars, or photos with `metadata.jsonl`; or, together with
            `dataset_name`, a folder inside that data set.
        data_files: paths, globs or addresses of Parquet files, tars, metadata files or JSON lists of
            `{"product": file name, "caption": text}`; or a dict of them by split. An HTTP server has no globs: name
            every file. The way to open a folder of millions of photos is its `metadata.jsonl`: `datasets` looks at
            every file of a `data_dir`.
        image_dir: the folder that file names in a JSON list, or in a Parquet column, are relative to (default: where
            the JSON list lies).
        split: e.g. "train" or "validation".
        image_column: default "image" ("product", "image" or "file_name" in a JSON list).
        caption_column: default "caption", then "text".
        product_id_column: default "product_id" if there is such a column, otherwise every row is a product of its own.
        sides: what a row must have, "both", or only the "images" (a plain folder of photos will do then, in the order
            of their names) or only the "titles" (a text file with a title a line, or a JSON list of strings will do).
        other_columns: further columns to read, for `Row.others`.
        any_split: take the only split there is, if it is not the one that was named.
        cache_dir: cache of `datasets`.
        index_dir: folder to keep where the samples of tars lie, so that no later run or other process of this machine
            has to scan them; default: they are scanned each time.

    Raises:
        ValueError: in one line, what was given, what is there, and what to do.
    """
    asked = _Asked(image_column, caption_column, product_id_column, tuple(other_columns), sides)
    if sides == "images" and data_dir is not None and dataset_name is None and _is_folder_of_photos(data_dir):
        return _open_photos(data_dir, asked)
    name, kind, files, folder_of_list, split = _resolve(
        dataset_name, dataset_config_name, data_dir, data_files, split, any_split, cache_dir
    )
    if image_dir is not None and "://" not in image_dir and not os.path.isdir(image_dir):
        raise ValueError(f"the image folder '{image_dir}' does not exist: give an existing folder as --image_dir")
    if kind == "text" and sides != "titles":
        raise ValueError(f"{name} holds titles only: a text file can be searched for, but has no photos")
    try:
        if kind == "parquet":
            source = _open_parquet(name, split, files, asked, image_dir, cache_dir)
        elif kind == "webdataset":
            source = _open_tars(name, split, files, asked, index_dir)
        elif kind == "imagefolder":
            source = _open_folder(name, split, files, asked)
        elif kind in ("json", "csv", "text"):
            source = _open_list(name, split, files, asked, image_dir or folder_of_list)
        else:
            raise ValueError(
                f"{name} holds data of the kind '{kind}': accepted are Parquet, WebDataset tars, photos with "
                "metadata.jsonl, and JSON lists; convert it to Parquet with datasets' to_parquet()"
            )
    except RemoteReadError as error:
        raise ValueError(_one_line(error)) from None
    except OSError as error:
        raise ValueError(f"{name} can't be read: {_one_line(error)}") from None
    opened = dataset_name or data_dir
    source.folder = opened if opened is not None and os.path.isdir(opened) else None
    source.sides = sides
    return source


def require_usable_row(source: Source, tries: int = 1000) -> None:
    """Check before a long run that the data holds something: decode rows from the start until one is usable.

    Raises:
        ValueError: none of the first `tries` rows is usable; the first reasons are in the message.
    """
    reasons, tried = [], 0
    for row in source.read_range(0, min(tries, source.num_rows)):
        try:
            decode(row, source.sides)
            return
        except UnusableItem as error:
            tried += 1
            if len(reasons) < 3:
                reasons.append(f"{row.name}: {error}")
    raise ValueError(
        f"none of the first {tried} rows of {source.name} (split '{source.split}') is usable ({'; '.join(reasons)}): "
        "check the image and caption columns and the files"
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


_KIND_OF_EXTENSION = {
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".txt": "text",
}


def _resolve(
    dataset_name, config, data_dir, data_files, split, any_split, cache_dir
) -> tuple[str, str, list[str], str, str]:
    """Name for messages, kind, the files of the split as `datasets` resolves them, the folder of the first one, and the
    split."""
    from datasets import load_dataset_builder

    if data_files is not None:
        name = _name_of_files(data_files)
        if not isinstance(data_files, dict):
            data_files = {split: data_files}  # files given without split names are the split that is asked for
        if split not in data_files:
            raise ValueError(f"{name} has no split '{split}': there are {_listed(data_files)}")
        if dataset_name is None:
            kind = _kind_of_files(data_files[split], name)
    if dataset_name is None and data_dir is None and data_files is None:
        raise ValueError("no data given: set --dataset_name, --data_dir or --data_files")
    if data_dir is not None and dataset_name is None and "://" not in data_dir and not os.path.isdir(data_dir):
        raise ValueError(f"the data folder '{data_dir}' does not exist: give an existing folder as --data_dir")
    if data_files is None:
        name = dataset_name or data_dir
    given = _as_list(data_files[split]) if data_files is not None else [data_dir or ""]
    if dataset_name is None and data_files is not None and all(map(_is_plain_address, given)):
        # Nothing to resolve; and fsspec, asked whether a file is there, says no to any failure over HTTP.
        return name, kind, given, posixpath.dirname(given[0]), split
    options: dict[str, Any] = {"data_dir": data_dir, "data_files": data_files, "cache_dir": cache_dir}
    if dataset_name is not None:
        loader, options["name"] = dataset_name, config
    elif data_files is not None:
        loader = kind
    else:
        loader, options["data_dir"], options["name"] = data_dir, None, config
    on_the_hub = dataset_name is not None and not os.path.exists(dataset_name)
    address = f"hf://datasets/{dataset_name}" if on_the_hub else next(filter(is_remote, given), "")
    try:
        builder = read_patiently(lambda: load_dataset_builder(loader, **options), address)
    except Exception as error:  # datasets and the Hub client have some dozens of classes for "not there"
        raise ValueError(f"{name} can't be opened: {_one_line(error)}") from None
    resolved = builder.config.data_files or {}
    splits = {str(key): files for key, files in resolved.items()}
    if any_split and split not in splits and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        raise ValueError(f"{name} has no split '{split}': there are {_listed(splits)}")
    module = type(builder).__module__.rsplit(".", 1)[-1]
    if module not in ("parquet", "webdataset", "imagefolder", "json", "csv"):
        # A configured builder of a Hub data set is a subclass made in another module.
        bases = [base.__module__.rsplit(".", 1)[-1] for base in type(builder).__mro__]
        module = next(
            (base for base in bases if base in ("parquet", "webdataset", "imagefolder", "json", "csv")), module
        )
    files = [str(file) for file in splits[split]]
    if not files:
        raise ValueError(f"{name} matches no files for split '{split}': check the path or the glob")
    return name, module, files, posixpath.dirname(files[0].replace(os.sep, "/")), split


def _listed(names) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def _name_of_files(data_files) -> str:
    if isinstance(data_files, (str, os.PathLike)):
        return str(data_files)
    values = list(data_files.values() if isinstance(data_files, dict) else data_files)
    first = values[0] if values else "no files"
    first = first if isinstance(first, (str, os.PathLike)) else next(iter(first), "no files")
    return str(first) if len(values) < 2 else f"{first} and {len(values) - 1} more"


def _as_list(files) -> list[str]:
    return [str(files)] if isinstance(files, (str, os.PathLike)) else [str(file) for file in files]


def _is_plain_address(file: str) -> bool:
    return file.startswith(("http://", "https://")) and not re.search(r"[*\[]", urlsplit(file).path)


def _extension(file: str) -> str:
    return os.path.splitext(urlsplit(file).path if is_remote(file) else file)[1].lower()


def _kind_of_files(files, name: str) -> str:
    extensions = set(map(_extension, _as_list(files)))
    kinds = {_KIND_OF_EXTENSION.get(extension) for extension in extensions}
    if len(kinds) != 1 or None in kinds:
        raise ValueError(
            f"{name} is of no known kind: accepted are .parquet, .tar, .json, .jsonl or .csv files of one kind, and "
            "for titles alone .txt"
        )
    return kinds.pop()


def _select(
    name: str, columns: Sequence[str], asked: _Asked, image_defaults, caption_defaults=("caption", "text")
) -> _Columns:
    """Columns as the user named them, or by default; a named one that is absent is an error listing what there is."""
    chosen = {}
    for role, defaults, needed in (
        ("image", image_defaults, asked.sides != "titles"),
        ("caption", caption_defaults, asked.sides != "images"),
        ("product_id", ("product_id",), False),
    ):
        chosen[role] = None
        given = getattr(asked, role)
        if role != "product_id" and not needed:
            continue
        if given is not None:
            if given not in columns:
                raise ValueError(f"{name} has no column '{given}' (--{role}_column): there are {_listed(columns)}")
            chosen[role] = given
            continue
        chosen[role] = next((column for column in defaults if column in columns), None)
        if chosen[role] is None and needed:
            raise ValueError(
                f"{name} has no column {' or '.join(repr(d) for d in defaults)}: there are {_listed(columns)}; "
                f"name one with --{role}_column"
            )
    missing = [column for column in asked.others if column not in columns]
    if missing:
        raise ValueError(f"{name} has no column '{missing[0]}': there are {_listed(columns)}")
    return _Columns(**chosen, others=asked.others)


def _open_parquet(name, split, files, asked, image_dir, cache_dir) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def footer(file: str) -> tuple[Any, list[int], DataFile]:
        try:
            size, data = read_patiently(lambda: _read_footer(file), file)
            metadata = pq.read_metadata(pa.BufferReader(data))
            groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            digest = hashlib.blake2b(data, digest_size=16).hexdigest()
            return metadata.schema.to_arrow_schema(), groups, DataFile(file, metadata.num_rows, size, digest)
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(
                f"{file} is not a readable Parquet file ({_one_line(error)}): repair or remove it"
            ) from None

    with ThreadPoolExecutor(max_workers=8) as pool:
        footers = list(pool.map(footer, files))
    columns = footers[0][0].names
    selected = _select(name, columns, asked, ("image",))
    wanted = selected.all()
    pieces = []
    for file, (schema, groups, _) in zip(files, footers, strict=True):
        missing = [key for key in wanted if key not in schema.names]
        if missing:
            raise ValueError(
                f"{file} has no column '{missing[0]}' that the first file has: there are {_listed(schema.names)}"
            )
        schema = pa.schema([schema.field(key) for key in wanted], metadata=schema.metadata)
        label, first, rows, before = os.path.basename(file), 0, [], 0
        for index, num_rows in enumerate(groups):
            rows.append(num_rows)
            if sum(rows) >= PARQUET_SHARD_ROWS or index == len(groups) - 1:
                suffix = "" if len(rows) == len(groups) else f"#{first}-{index}"
                if sum(rows):
                    pieces.append(_Piece(label + suffix, file, first, tuple(rows), before, len(groups), schema))
                first, rows, before = index + 1, [], before + sum(rows)
    return ParquetSource(name, split, columns, selected, pieces, [file for *_, file in footers], image_dir, cache_dir)


def _read_footer(file: str) -> tuple[int, bytes]:
    """Size of a Parquet file, and its last bytes: metadata, length of the metadata (4 bytes), magic number."""
    with open_file(file) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - PARQUET_TAIL_BYTES, 0))
        tail = stream.read()
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < length <= size:
            stream.seek(size - length)
            tail = stream.read()
    return size, tail[-length:]


def _open_tars(name, split, files, asked, index_dir) -> Source:
    with ThreadPoolExecutor(max_workers=8) as pool:
        tars = list(zip(files, pool.map(lambda file: indexed_tar(file, index_dir), files), strict=True))
    fields = dict.fromkeys(field for _, index in tars for field in index.fields)
    # The keys inside JSON members are known only by reading some.
    fields.update(dict.fromkeys(read_patiently(lambda: _json_keys(*tars[0]), files[0])))
    columns = list(fields)
    if any(field in TAR_IMAGE_FIELDS for field in columns) and asked.image in (None, "image"):
        asked = replace(asked, image="image")
        selected = _select(name, [*columns, "image"], asked, ("image",), ("caption", "text", "txt"))
    else:
        selected = _select(name, columns, asked, ("image",), ("caption", "text", "txt"))
    return TarSource(name, split, columns, selected, tars)


def _json_keys(file: str, index: TarIndex) -> list[str]:
    keys: dict[str, None] = {}
    samples = (index.members(sample) for sample in range(len(index)))
    with open_file(file) as stream:
        for offset, size in islice((members["json"] for members in samples if "json" in members), 20):
            stream.seek(offset)
            with contextlib.suppress(ValueError):
                value = json.loads(stream.read(size))
                keys.update(dict.fromkeys(value if isinstance(value, dict) else ()))
    return list(keys)


def _open_folder(name, split, files, asked) -> Source:
    metadata = [
        file for file in files if posixpath.basename(file.replace(os.sep, "/")) in ("metadata.jsonl", "metadata.csv")
    ]
    if not metadata:
        raise ValueError(
            f"{name} has photos but no metadata.jsonl or metadata.csv in split '{split}': add one with the columns "
            "file_name and caption, or give a JSON list as --data_files with --image_dir"
        )
    tables = [_open_records(file, posixpath.dirname(file.replace(os.sep, "/")) or ".") for file in metadata]
    # datasets calls the photo of file_name "image".
    columns = ["image" if column == "file_name" else column for column in _record_columns(tables)]
    selected = _select(name, columns, asked, ("image",))
    key = "file_name" if selected.image == "image" else selected.image
    return RecordSource(name, split, columns, selected, tables, (key,))


def _open_list(name, split, files, asked, image_dir) -> Source:
    tables = [_open_records(file, image_dir or ".") for file in files]
    columns = _record_columns(tables, titles_only=asked.sides == "titles")
    if not columns and any(len(table) for table in tables):
        raise ValueError(f'{name} has no records: expected a JSON list of {{"product": file name, "caption": text}}')
    selected = _select(name, columns, asked, ("product", "image", "file_name")) if columns else _Columns("", "", None)
    return RecordSource(name, split, columns, selected, tables, (selected.image,))


def _is_folder_of_photos(folder: str) -> bool:
    """Whether a local folder holds photos and nothing else that rows could come from."""
    found = False
    for _, _, files in os.walk(folder):
        for file in files:
            if file in ("metadata.jsonl", "metadata.csv") or _extension(file) in (".parquet", ".tar"):
                return False
            found = found or _extension(file) in _photo_extensions()
    return found


def _open_photos(folder: str, asked: _Asked) -> Source:
    """All photos of a folder and its subfolders, sorted by name: the order a directory is listed in is chance."""
    names = sorted(
        os.path.relpath(os.path.join(parent, file), folder).replace(os.sep, "/")
        for parent, _, files in os.walk(folder)
        for file in files
        if _extension(file) in _photo_extensions()
    )
    spans, data = _spans_of_values({"file_name": name} for name in names)
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    table = _Records(os.path.join(folder, "photos"), folder, spans, len(data), digest, data)
    selected = _select(folder, ["file_name"], replace(asked, image=None), ("file_name",))
    source = RecordSource(folder, "all photos", ["file_name"], selected, [table], ("file_name",))
    source.folder, source.sides = folder, "images"
    return source


@functools.cache
def _photo_extensions() -> frozenset[str]:
    extensions = Image.registered_extensions()
    return frozenset(extension for extension, kind in extensions.items() if kind in IMAGE_FORMATS)


def _open_records(file: str, image_dir: str) -> _Records:
    return read_patiently(lambda: _Records.open(file, image_dir), file)


def _record_columns(tables: Sequence[_Records], titles_only: bool = False) -> list[str]:
    columns: dict[str, None] = {}
    for table in tables:
        for record in resumed(functools.partial(table.read, stop=COLUMN_PROBE_ROWS), table.file):
            if isinstance(record, dict):
                columns.update(dict.fromkeys(record))
            elif isinstance(record, str) and titles_only:
                columns["caption"] = None
    return list(columns)
