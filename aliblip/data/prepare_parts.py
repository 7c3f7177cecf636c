"""What a task leaves: one file of its rows' facts, and one of their photos, each whole or not there.

    writer = PartWriter(folder, task_number, types)
    writer.add(row, ...); writer.reject(row, reason)
    writer.close()
    facts = read_facts(folder, count, ["row", "product_id"])

The photos are written first, piece by piece, so that memory does not grow with them; the facts end the task.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aliblip.data.cell_types import (
    NOT_OF_THE_TYPE,
    Likeness,
    fitting_value,
    joined_type,
    like_texts,
    storable,
    types_of_texts,
)
from aliblip.data.collate import printable
from aliblip.data.prepare_photos import THUMB_SIDE, PreparedPhoto
from aliblip.runtime.files import new_file
from aliblip.runtime.mistakes import usage_errors

__all__ = [
    "OTHER",
    "PartWriter",
    "column_of",
    "facts_file",
    "photos_file",
    "read_facts",
    "read_photos",
    "unified_others",
    "written_to",
]

# Begins the names of the data's own columns among the facts.
OTHER = "other:"
# Of such a column, in the metadata of its field: what is to be told of it; and of data that has texts alone, what all
# of its texts read like. These stay texts in the parts: whether they are numbers depends on those of all parts.
NOTE, LIKENESS = b"told", b"likeness"
# Photos that are written at once, and are one row group then.
GROUP_BYTES, GROUP_ROWS = 8 * 2**20, 256

FACTS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("split", pa.string()),
        pa.field("name", pa.string()),
        pa.field("reason", pa.string()),  # why it is rejected, or null
        pa.field("path", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("caption_given", pa.string()),  # where it was cleaned
        pa.field("product_id", pa.int64()),
        pa.field("product_given", pa.string()),  # the id as the data has it, or null
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("bytes_given", pa.int64()),
        pa.field("bytes", pa.int64()),
        pa.field("digest", pa.binary(16)),
        pa.field("thumb", pa.binary(THUMB_SIDE * THUMB_SIDE * 3)),
    ]
)
PHOTOS = pa.schema([pa.field("row", pa.int64(), nullable=False), pa.field("image", pa.binary(), nullable=False)])


def written_to(folder: Path) -> AbstractContextManager[None]:
    """Around what is written: a disk that does not take it is told in one line."""
    return usage_errors(OSError, told=f"{folder} can't be written ({{}}): make room, and the same command goes on")


def facts_file(folder: Path, task: int) -> Path:
    return folder / f"facts-{task:06d}.parquet"


def photos_file(folder: Path, task: int) -> Path:
    return folder / f"photos-{task:06d}.parquet"


class PartWriter:
    """The part of one task, written while it is read.

    Args:
        folder: of all parts.
        task: its number.
        types: of the data's columns, where it has types; others follow from the values.
        has_texts_alone: whether all values are texts, see `Source`.

    Raises:
        UsageError: of all methods: the disk does not take it.
    """

    def __init__(self, folder: Path, task: int, types: pa.Schema | None = None, has_texts_alone: bool = False):
        self._folder, self._task, self._types = folder, task, types
        self._has_texts_alone = has_texts_alone
        self._facts: list[dict[str, Any]] = []
        self._others: list[Mapping[str, Any]] = []
        self._rejected: list[Mapping[str, Any]] = []
        self._photos: list[tuple[int, bytes]] = []
        self._size = 0
        self._stack = ExitStack()
        with written_to(folder):
            file = self._stack.enter_context(new_file(photos_file(folder, task)))
        # Compressed files gain nothing from being compressed once more.
        self._writer = pq.ParquetWriter(file, PHOTOS, compression="none", write_statistics=["row"])

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None:
            self._give_up(error)
            return
        try:
            self._flush()
            with written_to(self._folder):
                self._writer.close()
                self._stack.close()
        except BaseException as failure:
            self._give_up(failure)
            raise
        with written_to(self._folder), new_file(facts_file(self._folder, self._task)) as file:
            pq.write_table(self._table(), file, compression="zstd")

    def _give_up(self, error: BaseException) -> None:
        """Close what is open, whose file goes; what counts is the first error."""
        with suppress(OSError, ValueError, pa.ArrowException):
            self._writer.close()
        self._writer.is_open = False  # else it tries again when it is collected, and tells its trouble on its own
        with suppress(OSError):
            self._stack.__exit__(type(error), error, error.__traceback__)

    def add(self, fact: Mapping[str, Any], photo: PreparedPhoto, others: Mapping[str, Any]) -> None:
        """A row that is kept: `fact` has what is no property of the photo."""
        self._facts.append(
            {
                **fact,
                "width": photo.width,
                "height": photo.height,
                "bytes_given": photo.size,
                "bytes": len(photo.data),
                "digest": photo.digest,
                "thumb": photo.thumb,
            }
        )
        self._others.append(others)
        self._photos.append((fact["row"], photo.data))
        self._size += len(photo.data)
        if self._size >= GROUP_BYTES or len(self._photos) >= GROUP_ROWS:
            self._flush()

    def reject(self, fact: Mapping[str, Any], reason: str, others: Mapping[str, Any]) -> None:
        """A row that is not kept. Its texts count for what those of a column read like, as in the data itself."""
        self._facts.append({**fact, "reason": printable(reason)})
        self._others.append({})
        self._rejected.append(others)

    def _flush(self) -> None:
        if self._photos:
            rows, photos = zip(*self._photos, strict=True)
            with written_to(self._folder):
                self._writer.write_table(pa.table([rows, pa.array(photos, pa.binary())], schema=PHOTOS))
            self._photos, self._size = [], 0

    def _table(self) -> pa.Table:
        facts = pa.Table.from_pylist(self._facts, schema=FACTS)
        names = dict.fromkeys(name for row in self._others for name in row)
        names |= dict.fromkeys(self._types.names if self._types is not None else ())
        if self._has_texts_alone:  # else a column of rejected rows would be one without values
            names |= dict.fromkeys(name for row in self._rejected for name in row)
        for name in names:
            column, note = self._column(name)
            metadata = {NOTE: note} if note else {}
            if self._has_texts_alone:
                texts = (row.get(name) for row in (*self._others, *self._rejected))
                metadata[LIKENESS] = like_texts(Likeness.BLANK, texts).name
            field = pa.field(f"{OTHER}{name}", column.type, metadata=metadata or None)
            facts = facts.append_column(field, column)
        return facts

    def _column(self, name: str) -> tuple[pa.Array, str]:
        values = [row.get(name) for row in self._others]
        if self._types is not None and name in self._types.names:
            return column_of(values, storable(self._types.field(name).type)), ""
        kind, note = joined_type(name, pa.null(), values)
        return column_of(values, kind), note


def column_of(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Values as a column; one that is not of the type becomes text where that is the type, else null."""
    try:
        return pa.array(values, kind)
    except NOT_OF_THE_TYPE:
        return pa.array([fitting_value(value, kind) for value in values], kind)


def unified_others(
    folder: Path, count: int, ids: Collection[str | None] = (), unused: Collection[str | None] = ()
) -> tuple[dict[str, pa.DataType], list[str]]:
    """The types of the data's columns over all parts, and what is to be told of them.

    Args:
        ids: columns that are known to hold ids.
        unused: columns that are written under names of ours: no word of whether their texts are numbers.
    """
    found: dict[str, pa.DataType] = {}
    likeness: dict[str, Likeness] = {}
    notes: dict[str, str] = {}
    for task in range(count):
        for field in pq.read_schema(facts_file(folder, task)):
            if not field.name.startswith(OTHER):
                continue
            name, metadata = field.name.removeprefix(OTHER), field.metadata or {}
            found.setdefault(name, pa.null())
            if LIKENESS in metadata:
                read = Likeness[metadata[LIKENESS].decode()]
                likeness[name] = max(read, likeness.get(name, read))
            else:
                _join(found, notes, name, field.type, metadata.get(NOTE, b"").decode())
    types, told = types_of_texts({name: like for name, like in likeness.items() if name not in unused}, ids)
    for name, kind in types.items():
        _join(found, notes, name, pa.null() if likeness[name] == Likeness.BLANK else kind)
    for name, kind in found.items():
        if pa.types.is_floating(kind) and _has_long_numbers(folder, count, f"{OTHER}{name}"):
            found[name] = pa.string()
            notes[name] = f"the column {name!r} holds fractions, and whole numbers too long beside them: kept as text"
    return {name: storable(kind) for name, kind in found.items()}, [*told, *notes.values()]


def _join(found: dict[str, pa.DataType], notes: dict[str, str], name: str, kind: pa.DataType, note: str = "") -> None:
    """Let a column's type be one for further values; text, with a note, where there is none."""
    if name in notes:
        return
    found[name], remark = joined_type(name, found[name], pa.nulls(0, kind))
    if note := remark or note:
        notes[name] = note


def _has_long_numbers(folder: Path, count: int, column: str) -> bool:
    """Whether some part has whole numbers in a column that a floating-point number would change."""
    for task in range(count):
        file = facts_file(folder, task)
        schema = pq.read_schema(file)
        if column in schema.names and pa.types.is_integer(schema.field(column).type):
            least, most = pc.min_max(pq.read_table(file, columns=[column])[column]).as_py().values()
            if least is not None and max(-least, most) > 2**53:
                return True
    return False


def read_facts(folder: Path, count: int, columns: Sequence[str]) -> Iterator[pa.Table]:
    """Columns of the facts of all tasks, one table each; a column that a part lacks is left out."""
    for task in range(count):
        file = facts_file(folder, task)
        there = set(pq.read_schema(file).names)
        yield pq.read_table(file, columns=[name for name in columns if name in there])


def read_photos(folder: Path, task: int, rows: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """(row, file) of some rows of a task, which ascend. Only the row groups that hold them are read."""
    wanted = set(rows)
    if not wanted:
        return
    first, last = min(wanted), max(wanted)
    with pq.ParquetFile(photos_file(folder, task)) as parts:
        for group in range(parts.num_row_groups):
            bounds = parts.metadata.row_group(group).column(0).statistics
            if bounds is not None and (bounds.max < first or bounds.min > last):
                continue
            numbers = parts.read_row_group(group, columns=["row"])["row"].to_pylist()
            if wanted.isdisjoint(numbers):
                continue
            photos = parts.read_row_group(group, columns=["image"])["image"]
            for number, photo in zip(numbers, photos, strict=True):
                if number in wanted:
                    yield number, photo.as_py()
