"""What columns of Parquet unpack to, looked at before they are decoded.

    check_columns("train-0.parquet", {"image", "caption"}, groups=[3])

A value that is stored once, in a dictionary or as the beginning of the next one, can stand in any number of rows, and
pages are packed: a file of four kilobytes can hold more than any memory. The sizes in the footer are only told. So the
headers of the pages are read, which Arrow goes by; and where these allow for it, values are counted before they are
written out.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aliblip.data.encodings import MOST_TIMES, MOST_UNPACKED, check_unpacked
from aliblip.data.remote import is_remote, open_file, read_patiently
from aliblip.runtime.mistakes import UsageError

__all__ = ["check_columns", "check_rows"]

# Rows that any file may have, and rows of a byte of it: a photo and a title do not shrink to less.
MOST_ROWS, MOST_ROWS_OF_A_BYTE = 2**24, 200
# What a value takes that is no text: as many as there are rows of, no file is refused for.
BYTES_OF_A_VALUE, BYTES_OF_A_ROW = 8, 64
HEADER_BYTES, LONGEST_HEADER_BYTES = 2**10, 2**20
BATCH_ROWS = 8192
_DICTIONARY_PAGE, _DELTA_BYTE_ARRAY = 2, 7  # a kind of page, an encoding


def check_rows(file: str, size: int, rows: int, group_rows: Collection[int]) -> None:
    """Refuse a footer with numbers of rows that contradict each other, or that no file of this size has.

    Raises:
        UsageError: with the numbers.
    """
    if min(group_rows, default=0) < 0 or sum(group_rows) != rows:
        raise UsageError(
            f"{file} is not a readable Parquet file (its numbers of rows contradict each other): repair it"
        )
    if rows > MOST_ROWS and rows > MOST_ROWS_OF_A_BYTE * size:
        raise UsageError(
            f"{file} has {rows:,} rows in {size:,} bytes, as no photos and titles have: give a file without such rows"
        )


def check_columns(file: str, columns: Collection[str], groups: Collection[int] | None = None) -> None:
    """Refuse a file some column of which unpacks to absurdly more than it takes, see `check_unpacked`.

    Args:
        file: path or address; of an address only the first page of a column is looked at.
        columns: that are about to be read.
        groups: row groups; None: all.

    Raises:
        UsageError: which column, and what it unpacks to.
        OSError: the file can't be read.
    """
    stamp = None if is_remote(file) else (os.stat(file).st_size, os.stat(file).st_mtime_ns)
    seen, columns = _seen(file, stamp), frozenset(columns)

    def left() -> list[int]:
        wanted = range(seen.metadata.num_row_groups) if groups is None else groups
        return [group for group in wanted if (group, columns) not in seen.checked]

    def check() -> None:
        with open_file(file) as stream:  # once: of an address it takes a request
            seen.metadata = seen.metadata or pq.read_metadata(stream)
            for group in left():
                _check_group(stream, file, seen.metadata.row_group(group), group, columns)
                seen.checked.add((group, columns))

    if seen.metadata is None or left():
        read_patiently(check, file)


@dataclass
class _Seen:
    """What is known of a file: its footer, and the row groups whose columns were looked at."""

    metadata: pq.FileMetaData | None = None
    checked: set[tuple[int, frozenset[str]]] = field(default_factory=set)


@functools.lru_cache(maxsize=64)
def _seen(file: str, stamp: Any) -> _Seen:
    return _Seen()


def _check_group(stream: Any, file: str, rows: pq.RowGroupMetaData, group: int, columns: Collection[str]) -> None:
    for chunk in map(rows.column, range(rows.num_columns)):
        if chunk.path_in_schema.split(".")[0] in columns:
            _check_chunk(stream, file, group, chunk, rows.num_rows)


def _check_chunk(stream: Any, file: str, group: int, chunk: pq.ColumnChunkMetaData, rows: int) -> None:
    packed = min(chunk.total_compressed_size, stream.seek(0, os.SEEK_END))
    what = f"column '{chunk.path_in_schema.split('.')[0]}' of {file}"
    unpacked = values = longest = 0  # the last: bytes of a value that may stand in many rows
    is_dictionary = True
    for page in _pages(stream, chunk, first_only=is_remote(file)):
        unpacked, values = unpacked + page.unpacked, values + page.values
        longest = max(longest, page.unpacked) if page.repeats else longest
        is_dictionary = is_dictionary and page.encoding != _DELTA_BYTE_ARRAY
        check_unpacked(unpacked, packed, what)
    values = max(chunk.num_values, values, rows)
    most = max(MOST_UNPACKED, MOST_TIMES * packed, BYTES_OF_A_ROW * rows)
    if values * BYTES_OF_A_VALUE > most:
        check_unpacked(values * BYTES_OF_A_VALUE, packed, what)
    if chunk.physical_type == "BYTE_ARRAY" and values * longest > most:
        path, total = chunk.path_in_schema, 0
        at_once = max(most // (longest * -(-values // max(rows, 1))), 1)
        counted = _sizes_of_repeated(stream, group, path) if is_dictionary else _sizes(stream, group, path, at_once)
        for size in counted:
            total += size
            if total > most:
                check_unpacked(total, packed, what)


def _sizes_of_repeated(stream: Any, group: int, path: str) -> Iterator[int]:
    """Bytes of all values of a column, batch by batch, while each that is repeated is held once."""
    stream.seek(0)
    table = pq.ParquetFile(stream, read_dictionary=[path])
    for batch in table.iter_batches(BATCH_ROWS, row_groups=[group], columns=[path]):
        values = batch.column(0)
        while not pa.types.is_dictionary(values.type):
            if pa.types.is_struct(values.type):
                values = values.field(0)
            elif hasattr(values, "flatten") and hasattr(values.type, "value_type"):
                values = values.flatten()
            else:  # not stored as a dictionary: what the pages say is all
                return
        indices = values.indices.drop_null().to_numpy()
        lengths = pc.fill_null(pc.binary_length(values.dictionary), 0).to_numpy(zero_copy_only=False)
        yield int(lengths.astype(np.int64)[indices].sum()) if len(indices) else 0


def _sizes(stream: Any, group: int, path: str, rows: int) -> Iterator[int]:
    """The same by writing out so many rows at a time: of values that are told by those before them."""
    stream.seek(0)
    for batch in pq.ParquetFile(stream).iter_batches(min(rows, BATCH_ROWS), row_groups=[group], columns=[path]):
        yield batch.nbytes


# --- headers of pages -------------------------------------------------------------------------------------------------


class _Page(NamedTuple):
    """What the header of a page tells: its sizes, how many values it has, and how they are encoded."""

    kind: int
    unpacked: int
    packed: int
    values: int
    encoding: int | None

    @property
    def repeats(self) -> bool:
        """Whether one of its values can stand in rows that take no bytes."""
        return self.kind == _DICTIONARY_PAGE or self.encoding == _DELTA_BYTE_ARRAY


def _pages(stream: Any, chunk: pq.ColumnChunkMetaData, first_only: bool) -> Iterator[_Page]:
    """The pages of a column chunk, by their headers; what is no header ends them, for Arrow to tell."""
    starts = (chunk.dictionary_page_offset if chunk.has_dictionary_page else None, chunk.data_page_offset)
    position = min((start for start in starts if start), default=0)
    end = position + chunk.total_compressed_size
    while position < end:
        found = _header_at(stream, position)
        if found is None:
            return
        page, length = found
        yield page
        position += length + page.packed
        if first_only:
            return


def _header_at(stream: Any, position: int) -> tuple[_Page, int] | None:
    """A page by its header, and the bytes of that."""
    for most in (HEADER_BYTES, LONGEST_HEADER_BYTES):
        stream.seek(position)
        header = _Compact(stream.read(most))
        try:
            fields = header.struct()
        except (IndexError, RecursionError):  # longer than what was read, or no header
            continue
        numbers = [fields.get(name) for name in (1, 2, 3)]
        if any(not isinstance(number, int) or number < 0 for number in numbers):
            return None
        data, data_v2 = fields.get(5) or {}, fields.get(8) or {}
        values, encoding = (data_v2.get(1), data_v2.get(4)) if data_v2 else (data.get(1), data.get(2))
        return _Page(*numbers, values if isinstance(values, int) else 0, encoding), header.at
    return None


class _Compact:
    """A structure of Thrift's compact protocol, of which whole numbers are kept."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def struct(self, depth: int = 0) -> dict[int, Any]:
        if depth > 20:
            raise RecursionError
        fields: dict[int, Any] = {}
        name = 0
        while byte := self._byte():
            name = name + (byte >> 4) if byte >> 4 else self._number()
            fields[name] = self._value(byte & 15, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (4, 5, 6):  # whole numbers
            return self._number()
        if kind in (3, 7):  # a byte, a float
            self.at += 1 if kind == 3 else 8
        elif kind == 8:  # bytes or text
            self.at += self._plain()
        elif kind in (9, 10):  # a list, a set
            head = self._byte()
            for _ in range(self._plain() if head >> 4 == 15 else head >> 4):
                self._value(head & 15, depth + 1)
        elif kind == 12:
            return self.struct(depth + 1)
        elif kind not in (1, 2):  # true, false
            raise IndexError
        return None

    def _byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def _plain(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128 or shift > 70:
                return value

    def _number(self) -> int:
        value = self._plain()
        return value >> 1 ^ -(value & 1)
