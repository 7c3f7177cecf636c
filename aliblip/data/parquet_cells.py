"""What the cells of Parquet columns are that are not simply bytes and text: lists, names of files, addresses.

A list gives several rows, and their number has to be known before a row is read: so such columns are read once when the
files are opened. Columns of bytes and of plain titles are not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aliblip.data.columns import Columns, Request
from aliblip.data.manifest import DataFile
from aliblip.data.parquet_pages import check_columns
from aliblip.data.places import Place, find_place
from aliblip.data.records import tiers_of, told_facts, told_unnamed
from aliblip.data.remote import is_remote, open_file, read_patiently
from aliblip.data.values import Facts, listed_text
from aliblip.runtime.mistakes import usage_errors

__all__ = ["Cells", "look_at_cells"]

BATCH_ROWS = 8192
# Titles that are looked at, whether they write out lists.
PROBED = 64


@dataclass
class Cells:
    """What cells are.

    Attributes:
        place: where photos lie that are named.
        counts: by file, the rows of each record, where records hold lists.
        image_lists, caption_lists: whether text of that column writes out lists.
    """

    place: Place
    counts: dict[str, np.ndarray] = field(default_factory=dict)
    image_lists: bool = False
    caption_lists: bool = False

    def rows_of(self, file: DataFile) -> int:
        """Rows that the records of a file give."""
        counts = self.counts.get(file.file)
        return file.rows if counts is None else int(counts.sum())


def look_at_cells(request: Request, selected: Columns, files: Sequence[tuple[DataFile, pa.Schema]]) -> Cells:
    """Look at the columns of photos and titles, as far as their types ask for it."""
    cells = Cells(_first_place(request))
    images = [] if selected.image is None else [schema.field(selected.image).type for _, schema in files]
    captions = [] if selected.caption is None else [schema.field(selected.caption).type for _, schema in files]
    if any(_is_text(kind) or _is_list(kind) for kind in images):
        facts = _facts(files, selected.image, photos=True)
        told_facts(request, selected.image, facts)
        cells.image_lists = facts.as_lists
        cells.place = _place(request, cells.place, facts.sample)
        _enter(cells, files, facts.counts())
        if request.survey is not None:
            told_unnamed(request, [(cells.place, facts)])
    elif images and pa.types.is_struct(images[0]) and not is_remote(files[0][0].file):
        paths = _paths(files[0][0].file, selected.image, images[0])
        if paths is not None:
            cells.place = _place(request, cells.place, paths)
    if any(map(_is_list, captions)) or (any(map(_is_text, captions)) and _writes_lists(files, selected.caption)):
        facts = _facts(files, selected.caption, photos=False)
        told_facts(request, selected.caption, facts)
        cells.caption_lists = facts.as_lists
        _enter(cells, files, facts.counts())
    if cells.counts:
        records, rows = (sum(each) for each in zip(*((f.rows, cells.rows_of(f)) for f, _ in files), strict=True))
        request.told.append(f"{records:,} records with lists give {rows:,} rows")
    return cells


def _is_text(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _columns_of(file: str, columns: list[str], batch_rows: int = BATCH_ROWS) -> Iterator[pa.Array]:
    check_columns(file, columns)
    with open_file(file) as stream:
        for batch in pq.ParquetFile(stream).iter_batches(batch_rows, columns=columns):
            yield batch.column(0)


def _facts(files: Sequence[tuple[DataFile, pa.Schema]], column: str, photos: bool) -> Facts:
    facts = Facts(photos)
    for file, schema in files:
        kind = schema.field(column).type
        if not _is_text(kind) and not _is_list(kind):  # bytes, which are one photo each
            facts.skip(file.rows)
            continue
        take = _add_lengths if _is_list(kind) and not _is_told_by_values(kind.value_type) else _add_values
        with usage_errors(pa.ArrowException, told=f"{file.file}: column '{column}' can't be read ({{}})"):
            arrays: Iterator[pa.Array] = _columns_of(file.file, [column])
            if is_remote(file.file):  # after a failure from the start again: a column of text is small
                arrays = iter(read_patiently(lambda file=file: list(_columns_of(file.file, [column])), file.file))
            for values in arrays:
                take(facts, values)
    return facts


def _is_told_by_values(kind: pa.DataType) -> bool:
    """Whether elements of lists are looked at: photos in bytes are only counted."""
    kinds = [field.type for field in kind] if pa.types.is_struct(kind) else [kind]
    return not any(pa.types.is_binary(each) or pa.types.is_large_binary(each) for each in kinds)


def _add_lengths(facts: Facts, lists: pa.Array) -> None:
    for length in pc.list_value_length(lists).to_pylist():
        facts.add_list(length or 0)


def _add_values(facts: Facts, array: pa.Array) -> None:
    for value in _values(array):
        facts.add(value)


def _values(array: pa.Array) -> Iterator[Any]:
    for cell in array:
        try:
            yield cell.as_py()
        except (UnicodeDecodeError, pa.ArrowException):  # one bad row, which says so when it is read
            yield None


def _enter(cells: Cells, files: Sequence[tuple[DataFile, pa.Schema]], counts: Any) -> None:
    """Enter the rows of each record; of photos and titles the larger number."""
    if counts is None:
        return
    counts, start = np.frombuffer(counts, dtype=np.int32), 0
    for file, _ in files:
        own = counts[start : start + file.rows]
        before = cells.counts.get(file.file)
        cells.counts[file.file] = own if before is None else np.maximum(before, own)
        start += file.rows


def _writes_lists(files: Sequence[tuple[DataFile, pa.Schema]], column: str) -> bool:
    """Whether the first titles all write out lists."""
    first = next((file.file for file, _ in files if file.rows), None)
    if first is None:
        return False
    values = read_patiently(lambda: next(_columns_of(first, [column], PROBED)), first)
    texts = [value for value in _values(values) if value is not None]
    return bool(texts) and all(text.lstrip().startswith("[") and listed_text(text) is not None for text in texts)


def _paths(file: str, column: str, kind: pa.StructType) -> list[str] | None:
    """The first paths of photos that are stored as {bytes, path}; None if they are stored otherwise."""
    names = {kind.field(place).name for place in range(kind.num_fields)}
    if "path" not in names:
        return None
    check_columns(file, [column])
    with open_file(file) as stream:
        batches = pq.ParquetFile(stream).iter_batches(PROBED, columns=[f"{column}.path"])
        batch = next(batches, None)
    if batch is None:
        return []
    paths = pc.struct_field(batch.column(0), "path")
    return [path for path in paths.to_pylist() if isinstance(path, str)]


def _first_place(request: Request) -> Place:
    first = request.files[0]
    if is_remote(first):
        return Place(request.image_dir, is_own=False, host=urlsplit(first).netloc, fetch=request.asked.fetch)
    folders = (request.image_dir, request.folder, os.path.dirname(first))
    roots = dict.fromkeys(os.path.abspath(folder) for folder in folders if folder is not None and "://" not in folder)
    return Place(request.image_dir, tuple(roots), fetch=request.asked.fetch)


def _place(request: Request, place: Place, sample: list[Any]) -> Place:
    """Where the photos lie: in the folder that was given, else where some of them are found."""
    if is_remote(request.files[0]) or not sample:
        return place
    own = os.path.dirname(request.files[0]) or "."
    start = place if place.folder is not None else replace(place, folder=own)
    found, told = find_place(sample, start, *tiers_of(request, request.files[0], start.folder))
    if told is None and place.folder is None and not _any_there(found, sample):
        return place
    if told:
        request.told.append(told)
    return found


def _any_there(place: Place, sample: list[Any]) -> bool:
    return any(isinstance(path, str) and os.path.isfile(path) for path, _, _ in map(place.find, sample))
