"""Parquet files: a shard is one or several row groups of one file, read by `datasets` streaming."""

from __future__ import annotations

import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aliblip.data.columns import ALL, Columns, Request, choose_columns, listed
from aliblip.data.encodings import check_unpacked
from aliblip.data.manifest import DataFile
from aliblip.data.parquet_cells import Cells, look_at_cells
from aliblip.data.parquet_pages import check_columns, check_rows
from aliblip.data.products import CHUNK_ROWS, ProductIds, photo_id_of, shown
from aliblip.data.remote import open_file, read_patiently, resumed, storage_options, take_over_retries
from aliblip.data.rows import Row, Shard, Source
from aliblip.data.values import photos_of, titles_of
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
    sizes: dict[str, tuple[int, int]]  # by column: bytes of that row group which unpacks the most, unpacked and packed


@dataclass(frozen=True)
class _Piece:
    """Row groups of one Parquet file that make a shard; `rows_before` lie before them, of `file_groups` in all.

    `schema` is that of the columns that are read. `ends` are the rows up to each record of the file's groups and with
    it, where records hold lists; else None, and a record is a row.
    """

    name: str
    file: str
    first_group: int
    group_rows: tuple[int, ...]
    rows_before: int
    file_groups: int
    schema: Any
    ends: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        return sum(self.group_rows) if self.ends is None else int(self.ends[-1])

    def rows_of(self, record: int) -> tuple[int, int]:
        """[begin, end) of the rows of a record."""
        if self.ends is None:
            return record, record + 1
        return (int(self.ends[record - 1]) if record else 0), int(self.ends[record])


class ParquetSource(Source):
    """Rows of Parquet files."""

    def __init__(
        self,
        request: Request,
        columns: Sequence[str],
        selected: Columns,
        pieces: Sequence[_Piece],
        footers: Sequence[_Footer],
        cells: Cells,
    ):
        sizes = [(piece.name, piece.num_rows) for piece in pieces]
        files = [replace(footer.file, rows=cells.rows_of(footer.file)) for footer in footers]
        super().__init__(request, columns, selected, sizes, files)
        self._pieces = pieces
        self._lists = cells.image_lists, cells.caption_lists
        self._counts = cells.counts
        self._place = cells.place
        self._schemas = [footer.schema for footer in footers]
        self._cache_dir = request.cache_dir
        # By process: a forked one must neither use the open stream of its parent nor close it.
        self._cursors: dict[int, tuple[int, int, Iterator[tuple[Any, int]]]] = {}

    def titles_only(self) -> ParquetSource:
        alone = super().titles_only()
        alone._cursors = {}
        alone._pieces = [
            replace(piece, schema=pa.schema([piece.schema.field(self.selected.caption)])) for piece in self._pieces
        ]
        return alone

    def schema_of_others(self) -> pa.Schema | None:
        try:
            schema = pa.unify_schemas([s.remove_metadata() for s in self._schemas], promote_options="permissive")
        except pa.ArrowException:  # files that do not agree on the type of a column
            return None
        return pa.schema([_plain(schema.field(column)) for column in self.selected.others])

    def _read(self, shard: Shard, start: int, stop: int) -> Iterator[Row]:
        piece = self._pieces[shard.index]
        wanted = start if piece.ends is None else int(np.searchsorted(piece.ends, start, side="right"))
        record, cells = self._take_cursor(shard, wanted)
        end = 0
        while end < stop:
            table, i = next(cells)
            if record >= wanted:
                begin, end = piece.rows_of(record)
                for row in range(max(begin, start), min(end, stop)):
                    yield self._convert(table, i, row - begin, shard.first_row + row)
            record += 1
        if end > stop:  # the rest of the record comes next
            record, cells = record - 1, itertools.chain([(table, i)], cells)
        self._cursors[os.getpid()] = (shard.index, record, cells)

    def _file_of(self, shard: Shard) -> str:
        return self._pieces[shard.index].file

    def _take_cursor(self, shard: Shard, start: int) -> tuple[int, Iterator[tuple[Any, int]]]:
        """An open stream that is not past record `start` of a shard, and the place of its next record.

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
            check_columns(piece.file, piece.schema.names)
            return -piece.rows_before, _cells([groups])
        wanted = range(piece.first_group + group, piece.first_group + len(piece.group_rows))

        def streams() -> Iterator[Any]:
            for index in wanted:  # a row group is decoded as a whole
                check_columns(piece.file, piece.schema.names, [index])
                yield groups.shard(num_shards=groups.num_shards, index=index, contiguous=True)

        return int(begins[group]), _cells(streams())

    def product_ids(self) -> Iterator[ProductIds] | None:
        key = self.selected.product_id
        # Only where the photos are paths is their column small enough to be read for this.
        photo = self.selected.image if self._holds_paths(self.selected.image) else None
        if photo is None and (key is None or key in self.photo_keys):
            return None
        return self._product_ids(None if key in self.photo_keys else key, photo)

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
        counts, record = self._counts.get(file), 0
        check_columns(file, columns)
        with open_file(file) as stream, pq.ParquetFile(stream) as table:
            for number, batch in enumerate(table.iter_batches(CHUNK_ROWS, columns=columns)):
                end = record + batch.num_rows
                if number >= done:
                    cells = {name: _values(batch.column(name)) for name in batch.schema.names}
                    photos = map(self._photo_id, cells[photo]) if photo in cells else None
                    own_counts = None if counts is None else counts[record:end]
                    yield ProductIds.of(cells.get(key, [None] * batch.num_rows), photos, own_counts)
                record = end

    def _photo_id(self, value: Any) -> int | None:
        return photo_id_of(self._place.find(photos_of(value, self._lists[0])[0])[0], self._photo_root)

    def product_name(self, row: int) -> str:
        key = self.selected.product_id
        if key is None or key in self.photo_keys:
            return super().product_name(row)
        for file in self.files:
            if row < file.rows:
                break
            row -= file.rows
        if (counts := self._counts.get(file.file)) is not None:
            row = int(np.searchsorted(np.cumsum(counts), row, side="right"))
        return read_patiently(lambda: _cell(file.file, key, row), file.file)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cursors": {}}  # an open stream can't travel to another process

    def _convert(self, table, i: int, part: int, number: int) -> Row:
        fields, problem = {}, None
        for key in table.column_names:
            try:
                fields[key] = table.column(key)[i].as_py()
            except Exception as error:
                fields[key] = None
                problem = problem or f"column '{key}' can't be read ({type(error).__name__})"
        photos = photos_of(fields.get(self.selected.image), self._lists[0])
        titles = titles_of(fields.get(self.selected.caption), self._lists[1])
        image, name, reason = self._place.find(photos[part % len(photos)])
        photo = image if part % len(photos) == 0 else self._place.find(photos[0])[0]
        text = titles[part % len(titles)]
        return self._row(number, image, text, fields, name, problem or reason, number - part, photo)


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
    check_columns(file, [column])
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
    """Open Parquet files by their footers, and by the columns whose cells are lists, names or addresses.

    Raises:
        UsageError: a file is not Parquet or lacks a column, or a column that was named is not there.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        footers = list(pool.map(_open_footer, request.files))
    columns = list(dict.fromkeys(name for footer in footers for name in footer.schema.names))
    selected = choose_columns(request, columns, ("image",), by_likeness=True)
    selected = _without_unreadable(request, selected, footers)
    for footer in footers:
        _check_columns(footer, footers[0], selected)
        for name, (plain, packed) in footer.sizes.items():
            if name in selected.names():
                check_unpacked(plain, packed, f"column '{name}' of {footer.file.file}")
    cells = look_at_cells(request, selected, [(footer.file, footer.schema) for footer in footers])
    pieces = [piece for footer in footers for piece in _pieces(footer, selected, cells.counts.get(footer.file.file))]
    return ParquetSource(request, columns, selected, pieces, footers, cells)


def _check_columns(footer: _Footer, first: _Footer, selected: Columns) -> None:
    """Refuse a file that lacks a column; one without products, or without some of all columns, has nulls there."""
    needed = [selected.image, selected.caption, *(() if selected.takes_all else selected.others)]
    names = footer.schema.names
    if twice := [key for key in selected.names() if names.count(key) > 1]:
        raise UsageError(f"{footer.file.file} has the column '{twice[0]}' more than once: rename one of them")
    if missing := [key for key in needed if key is not None and key not in names]:
        whose = "the first file has" if missing[0] in first.schema.names else "other files have"
        raise UsageError(f"{footer.file.file} has no column '{missing[0]}' that {whose}: there are {listed(names)}")


def _open_footer(file: str) -> _Footer:
    broken = f"{file} is not a readable Parquet file ({{}}): repair or remove it"
    with usage_errors(pa.ArrowException, ValueError, told=broken):
        size, data = read_patiently(lambda: _read_footer(file), file)
        if not size:
            raise UsageError(f"{file} is empty (0 bytes): remove it, or write it again")
        metadata = pq.read_metadata(pa.BufferReader(data))
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        check_rows(file, size, metadata.num_rows, groups)
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        file_told = DataFile(file, metadata.num_rows, size, digest)
        return _Footer(file_told, metadata.schema.to_arrow_schema(), groups, _sizes(metadata))


def _sizes(metadata: pq.FileMetaData) -> dict[str, tuple[int, int]]:
    sizes: dict[str, tuple[int, int]] = {}
    for index in range(metadata.num_row_groups):
        group, of_group = metadata.row_group(index), {}
        for number in range(group.num_columns):
            chunk = group.column(number)
            name = chunk.path_in_schema.split(".")[0]
            plain, packed = of_group.get(name, (0, 0))
            of_group[name] = plain + chunk.total_uncompressed_size, packed + chunk.total_compressed_size
        for name, found in of_group.items():
            sizes[name] = max(sizes.get(name, (0, 0)), found)
    return sizes


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


def _pieces(footer: _Footer, selected: Columns, counts: np.ndarray | None) -> Iterator[_Piece]:
    """The shards of one file; `counts` are the rows of each of its records, None for one."""
    file, groups, schema = footer.file.file, footer.group_rows, footer.schema
    wanted = [key for key in selected.names() if key in schema.names]
    schema = pa.schema([schema.field(key) for key in wanted], metadata=schema.metadata)
    label, first, rows, before = os.path.basename(file), 0, [], 0
    for index, num_rows in enumerate(groups):
        rows.append(num_rows)
        if sum(rows) >= SHARD_ROWS or index == len(groups) - 1:
            suffix = "" if len(rows) == len(groups) else f"#{first}-{index}"
            if sum(rows):
                ends = None if counts is None else np.cumsum(counts[before : before + sum(rows)], dtype=np.int64)
                yield _Piece(label + suffix, file, first, tuple(rows), before, len(groups), schema, ends)
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
