"""Parquet files: a shard is one or several row groups of one file, read by `datasets` streaming."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aliblip.data.columns import ALL, Columns, Request, choose_columns, listed
from aliblip.data.manifest import DataFile
from aliblip.data.products import CHUNK_ROWS, ProductIds, photo_id_of, shown
from aliblip.data.remote import open_file, read_patiently, resumed, storage_options, take_over_retries
from aliblip.data.rows import Row, Shard, Source, path_inside
from aliblip.runtime.mistakes import UsageError, usage_errors

__all__ = ["ParquetSource", "open_parquet"]

# Row groups are joined to shards of at least this many rows: small enough to mix well, few enough to open.
SHARD_ROWS = 1024
# Read from the end of a file at once: nearly always the whole footer.
TAIL_BYTES = 2**16
# Undecoded rows that are converted at once.
BATCH_ROWS = 64

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Footer:
    """What the end of a Parquet file tells: its schema and the rows of each row group."""

    file: DataFile
    schema: pa.Schema
    group_rows: list[int]


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
    """Rows of Parquet files."""

    def __init__(
        self,
        request: Request,
        columns: Sequence[str],
        selected: Columns,
        pieces: Sequence[_Piece],
        footers: Sequence[_Footer],
    ):
        sizes = [(piece.name, sum(piece.group_rows)) for piece in pieces]
        super().__init__(request, columns, selected, sizes, [footer.file for footer in footers])
        self._pieces = pieces
        self._schemas = [footer.schema for footer in footers]
        self._image_dir = request.image_dir
        self._cache_dir = request.cache_dir
        # By process: a forked one must neither use the open stream of its parent nor close it.
        self._cursors: dict[int, tuple[int, int, Iterator[tuple[Any, int]]]] = {}

    def schema_of_others(self) -> pa.Schema | None:
        try:
            schema = pa.unify_schemas([s.remove_metadata() for s in self._schemas], promote_options="permissive")
        except pa.ArrowException:  # files that do not agree on the type of a column
            return None
        return pa.schema([_plain(schema.field(column)) for column in self.selected.others])

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

        An evaluation reads small units in rising order. If each were read from the beginning of its row group, a file
        of one large group would be read once per unit; so the last stream stays open, and is used where it saves time.
        """
        piece = self._pieces[shard.index]
        begins = np.cumsum([0, *piece.group_rows])
        group = int(np.searchsorted(begins, start, side="right")) - 1
        cursor = self._cursors.pop(os.getpid(), None)
        if cursor is not None and cursor[0] == shard.index and begins[group] < cursor[1] <= start:
            return cursor[1], cursor[2]
        groups = _stream_row_groups(piece.file, piece.schema, self._cache_dir)
        if groups.num_shards != piece.file_groups:
            # `datasets` before May 2026 can't cut Parquet into row groups: from the start of the file.
            return -piece.rows_before, _cells([groups])
        wanted = range(piece.first_group + group, piece.first_group + len(piece.group_rows))
        streams = (groups.shard(num_shards=groups.num_shards, index=index, contiguous=True) for index in wanted)
        return int(begins[group]), _cells(streams)

    def product_ids(self) -> Iterator[ProductIds] | None:
        key = self.selected.product_id
        # Only where the photos are paths is their column small enough to be read for this.
        photo = self.selected.image if self._holds_paths(self.selected.image) else None
        if photo is None and (key is None or key in self.photo_keys):
            return None
        return self._product_ids(key if key not in self.photo_keys else None, photo)

    def _holds_paths(self, column: str | None) -> bool:
        kinds = [schema.field(column).type for schema in self._schemas if column in schema.names]
        return bool(kinds) and all(pa.types.is_string(kind) or pa.types.is_large_string(kind) for kind in kinds)

    def _product_ids(self, key: str | None, photo: str | None) -> Iterator[ProductIds]:
        for file, schema in zip(self.files, self._schemas, strict=True):
            columns = [name for name in (key, photo) if name in schema.names]
            if columns:
                yield from resumed(functools.partial(self._product_ids_in, file.file, columns, key, photo), file.file)
            elif file.rows:
                yield ProductIds.of([None] * file.rows)

    def _product_ids_in(self, file: str, columns: list[str], key: str | None, photo: str | None, done: int):
        with open_file(file) as stream, pq.ParquetFile(stream) as table:
            batches = table.iter_batches(CHUNK_ROWS, columns=columns)
            for batch in islice(batches, done, None):
                cells = {name: _values(batch.column(name)) for name in batch.schema.names}
                nothing = [None] * batch.num_rows
                photos = (self._photo_id(value) for value in cells[photo]) if photo in cells else None
                yield ProductIds.of(cells.get(key, nothing), photos)

    def product_name(self, row: int) -> str:
        key, before = self.selected.product_id, 0
        if key is None or key in self.photo_keys:
            return super().product_name(row)
        for file in self.files:
            if row < before + file.rows:
                break
            before += file.rows
        return read_patiently(lambda: _cell(file.file, key, row - before), file.file)

    def _photo_id(self, value: Any) -> int | None:
        image = path_inside(self._image_dir, value)[0] if self._image_dir is not None else None
        return photo_id_of(image, self._photo_root)

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
                name, (image, problem) = image, path_inside(self._image_dir, image)
        return self._row(number, image, fields.get(self.selected.caption), fields, name, problem)


def _plain(field: pa.Field) -> pa.Field:
    """A field with the type of its values: a dictionary is only a way to store them."""
    return field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field


def _cells(streams: Iterable[Any]) -> Iterator[tuple[Any, int]]:
    """(table, row in it) of streamed datasets, one after the other.

    Tables, not Python rows: a cell that can't be converted (text that is not UTF-8) is then one bad row.
    """
    for stream in streams:
        for table in stream.with_format("arrow").iter(batch_size=BATCH_ROWS):
            for i in range(table.num_rows):
                yield table, i


def _values(column: pa.Array) -> list[Any]:
    """Cells as Python has them; one that can't be read is null."""
    try:
        return column.to_pylist()
    except (UnicodeDecodeError, pa.ArrowException, OverflowError):
        pass
    values = []
    for cell in column:
        try:
            values.append(cell.as_py())
        except (UnicodeDecodeError, pa.ArrowException, OverflowError):
            values.append(None)
    return values


def _cell(file: str, column: str, row: int) -> str:
    """One cell as a message shows it, of the one column chunk that holds it."""
    with open_file(file) as stream, pq.ParquetFile(stream) as table:
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if row < rows:
                return shown(_values(table.read_row_group(group, columns=[column]).column(0).slice(row, 1))[0])
            row -= rows
    raise IndexError(f"{file} has no row {row}")


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
        batch_size=BATCH_ROWS,  # the default is a whole row group
        cache_dir=cache_dir,
        storage_options=storage_options(file),
    )
    return stream.reshard() if hasattr(stream, "reshard") else stream


def open_parquet(request: Request) -> ParquetSource:
    """Open Parquet files by their footers.

    Raises:
        UsageError: a file is not Parquet or lacks a column, or a column that was named is not there.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        footers = list(pool.map(_open_footer, request.files))
    columns = list(dict.fromkeys(name for footer in footers for name in footer.schema.names))
    selected = choose_columns(request, columns, ("image",))
    selected = _without_unreadable(request, selected, footers)
    pieces = [piece for footer in footers for piece in _pieces(footer, selected, footers[0].schema.names)]
    return ParquetSource(request, columns, selected, pieces, footers)


def _open_footer(file: str) -> _Footer:
    broken = f"{file} is not a readable Parquet file ({{}}): repair or remove it"
    with usage_errors(pa.ArrowException, ValueError, told=broken):
        size, data = read_patiently(lambda: _read_footer(file), file)
        metadata = pq.read_metadata(pa.BufferReader(data))
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        return _Footer(DataFile(file, metadata.num_rows, size, digest), metadata.schema.to_arrow_schema(), groups)


def _without_unreadable(request: Request, selected: Columns, footers: Sequence[_Footer]) -> Columns:
    """Of `ALL` columns those that `datasets` can read; the others are told. One that was named is a mistake."""
    bad = {}
    for footer in footers:
        for field in footer.schema:
            if field.name in selected.names() and field.name not in bad and not _is_readable(field):
                bad[field.name] = field.type
    if not bad:
        return selected
    if request.asked.others != ALL:
        name, kind = next(iter(bad.items()))
        raise UsageError(f"{request.name}: column '{name}' is of type {kind}, which can't be read: name another one")
    told = ", ".join(f"'{name}' ({kind})" for name, kind in bad.items())
    logger.warning("%s: left out are columns of a type that can't be read: %s", request.name, told)
    return replace(selected, others=tuple(name for name in selected.others if name not in bad))


def _is_readable(field: pa.Field) -> bool:
    from datasets import Features

    try:
        Features.from_arrow_schema(pa.schema([field.remove_metadata()]))
    except (ValueError, NotImplementedError):  # it has no features for maps
        return False
    return True


def _pieces(footer: _Footer, selected: Columns, of_the_first: Sequence[str]) -> Iterator[_Piece]:
    """The shards of one file; `of_the_first` are the columns of the first file."""
    file, groups, schema = footer.file.file, footer.group_rows, footer.schema
    needed = {selected.image, selected.caption}  # rows of a file without product ids are products of their own
    needed |= set() if selected.takes_all else set(selected.others)
    wanted = [key for key in selected.names() if key in schema.names or key in needed]
    if missing := [key for key in wanted if key not in schema.names]:
        whose = "the first file has" if missing[0] in of_the_first else "another file has"
        raise UsageError(f"{file} has no column '{missing[0]}' that {whose}: there are {listed(schema.names)}")
    schema = pa.schema([schema.field(key) for key in wanted], metadata=schema.metadata)
    label, first, rows, before = os.path.basename(file), 0, [], 0
    for index, num_rows in enumerate(groups):
        rows.append(num_rows)
        if sum(rows) >= SHARD_ROWS or index == len(groups) - 1:
            suffix = "" if len(rows) == len(groups) else f"#{first}-{index}"
            if sum(rows):
                yield _Piece(label + suffix, file, first, tuple(rows), before, len(groups), schema)
            first, rows, before = index + 1, [], before + sum(rows)


def _read_footer(file: str) -> tuple[int, bytes]:
    """Size of a Parquet file, and its last bytes: metadata, length of the metadata (4 bytes), magic number."""
    with open_file(file) as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(size - TAIL_BYTES, 0))
        tail = stream.read()
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if len(tail) < length <= size:
            stream.seek(size - length)
            tail = stream.read()
    return size, tail[-length:]
