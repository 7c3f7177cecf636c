"""Rows that are given in Python: photos or titles in a list, dictionaries, a data set of `datasets` or its column.

    source = open_rows(["mug.jpg", "lamp.jpg"])                                            # photos
    source = open_rows(["striped blue mug", "red steel lamp"], sides="titles")
    source = open_rows([{"image": "mug.jpg", "caption": "striped blue mug", "price": 9}], other_columns=ALL)
    source = open_rows(load_dataset("me/photos", split="train"))                            # stays undecoded

A photo is a path, an address, bytes, a PIL image or {"bytes", "path"} as `datasets` stores it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from aliblip.data.columns import ALL, Asked, Columns, Request, choose_columns
from aliblip.data.manifest import DataFile
from aliblip.data.products import CHUNK_ROWS, ProductIds
from aliblip.data.rows import Row, Shard, Source
from aliblip.runtime.mistakes import UsageError

__all__ = ["ALL", "PythonSource", "open_rows"]

# Rows can be read in any order at no cost: small shards mix them well.
SHARD_ROWS = 64
# Whose keys are the columns, of dictionaries that are not in memory.
PROBED_ROWS = 1000
# Rows that the digest of a data set on the disk covers; of rows in memory it covers all.
DIGESTED_ROWS = 1000


def open_rows(
    rows: Iterable[Any],
    *,
    sides: str = "images",
    image_column: str | None = None,
    caption_column: str | None = None,
    product_id_column: str | None = None,
    other_columns: Sequence[str] | str = (),
    name: str = "the data",
) -> PythonSource:
    """A source of rows that are given in Python.

    Args:
        rows: a sequence, or anything that can be made a list of, of photos, of titles, or of dictionaries with columns;
            a map-style data set of `datasets` or a column of one, whose photos stay undecoded until a row is read.
        sides: what a row must have: "images", "titles" or "both" (dictionaries).
        image_column, caption_column: of dictionaries; default "image", and "caption", then "text".
        product_id_column: default "product_id" if there is such a column, otherwise a photo is a product.
        other_columns: further columns for `Row.others`; or `ALL`, every one but the photo's.
        name: for messages.

    Raises:
        UsageError: no rows, a column that is not there, or rows of a kind that can't be read.
    """
    asked = Asked(image_column, caption_column, product_id_column, other_columns, sides, by_flags=False)
    request = Request(name, "rows", [], asked)
    rows, features = _undecoded(request, rows)
    if not len(rows):
        raise UsageError(f"{name} has no rows: give at least one")
    if features is not None:
        columns = list(features)
        selected = choose_columns(request, columns, ("image",))
        rows = rows.select_columns(selected.names())
    elif any(map(_has_columns, _first(rows))):
        # Of what is in memory all rows: a column may come late.
        looked_at = rows if isinstance(rows, (list, tuple)) else _first(rows)
        columns = list(dict.fromkeys(key for row in looked_at if _has_columns(row) for key in row))
        selected = choose_columns(request, columns, ("image",))
    else:
        columns, selected = _of_bare_values(request)
    return PythonSource(request, columns, selected, rows, features)


def _undecoded(request: Request, rows: Iterable[Any]) -> tuple[Sequence[Any], Any]:
    """The rows as a sequence whose photos are not decoded; and, of a data set of `datasets`, its features."""
    if isinstance(rows, (str, bytes, Mapping)):
        raise UsageError(f"{request.name} is one {_kind_of(rows)}: give a list, also of a single row")
    is_of_datasets = hasattr(rows, "features")
    if not is_of_datasets and (hasattr(rows, "columns") or hasattr(rows, "column_names")):
        raise UsageError(
            f"{request.name} is a {_kind_of(rows)}: give a list of dictionaries (a DataFrame's to_dict('records'), a "
            "table's to_pylist())"
        )
    if not is_of_datasets and not isinstance(rows, Iterable) and not hasattr(rows, "__getitem__"):
        raise UsageError(f"{request.name} is {rows!r}: give a list or a data set")
    if not is_of_datasets:
        return (rows if hasattr(rows, "__len__") and hasattr(rows, "__getitem__") else list(rows)), None
    if not hasattr(rows, "__len__"):
        raise UsageError(
            f"{request.name} is a stream, which has no number of rows: give a data set that is not streamed, or open "
            "its files with open_source"
        )
    if hasattr(rows, "column_name"):  # a column of a data set
        column, rows = rows.column_name, rows.source
        if not hasattr(rows, "cast_column"):
            raise UsageError(f"{request.name} is a column inside a column: give a list of its values")
        return _BareColumn(_cast(rows.select_columns([column])), column), None
    return _cast(rows.with_format(None)), rows.features


def _cast(data_set: Any) -> Any:
    """A data set that gives photos as they are stored: one that is damaged must not end the reading."""
    for column, feature in data_set.features.items():
        if getattr(feature, "decode", False):
            data_set = data_set.cast_column(column, replace(feature, decode=False))
    return data_set


class _BareColumn(Sequence):
    """The values of one column of a data set."""

    def __init__(self, data_set: Any, column: str):
        self._data_set, self._column = data_set, column

    def __len__(self) -> int:
        return len(self._data_set)

    def __getitem__(self, position: int) -> Any:
        return self._data_set[position][self._column]


def _of_bare_values(request: Request) -> tuple[list[str], Columns]:
    asked = request.asked
    if asked.sides == "both":
        raise UsageError(f"{request.name} has no columns: give dictionaries with a photo and a title each")
    role = "image" if asked.sides == "images" else "caption"
    named = [column for column in (asked.image, asked.caption, asked.product_id) if column is not None]
    named += [] if asked.others == ALL else asked.others
    if named:
        raise UsageError(f"{request.name} has no column '{named[0]}': give dictionaries with columns")
    columns = {"image": None, "caption": None, "product_id": None, role: role}
    return [role], Columns(**columns, photos=frozenset({"image"}))


def _first(rows: Sequence[Any]) -> Iterator[Any]:
    return (rows[i] for i in range(min(len(rows), PROBED_ROWS)))


def _has_columns(row: Any) -> bool:
    return isinstance(row, Mapping) and not _is_stored_photo(row)


def _is_stored_photo(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and set(value) <= {"bytes", "path"}


class PythonSource(Source):
    """Rows that are given in Python; made by `open_rows`.

    Args:
        rows: a sequence.
        features: of a data set of `datasets`; else None.
    """

    random_access = True

    def __init__(self, request: Request, columns: Sequence[str], selected: Columns, rows: Sequence[Any], features: Any):
        starts = range(0, len(rows), SHARD_ROWS)
        sizes = [(f"rows[{start}]", min(SHARD_ROWS, len(rows) - start)) for start in starts]
        super().__init__(request, columns, selected, sizes)
        self._rows, self._features = rows, features

    def product_ids(self) -> Iterator[ProductIds] | None:
        key = self.selected.product_id
        if key is None or key in self.photo_keys:
            return None  # of photos in memory, too: those that were not loaded yet would stay there
        rows = self._rows if self._features is None else self._rows.select_columns([key])
        values = (row.get(key) if _has_columns(row) else None for row in (rows[i] for i in range(len(rows))))
        return (ProductIds.of(chunk) for chunk in iter(lambda: list(islice(values, CHUNK_ROWS)), []))

    def schema_of_others(self) -> pa.Schema | None:
        if self._features is None:
            return None
        schema = self._features.arrow_schema
        return pa.schema([schema.field(column).remove_metadata() for column in self.selected.others])

    def manifest(self) -> dict[str, Any]:
        """As `Source.manifest`, of one "file", the rows. Its digest covers paths, addresses, titles and other values as
        they are given, and the bytes and pixels of photos in memory; of a data set a thousand rows spread over it."""
        if not self.files:
            self.files = [DataFile("rows", self.num_rows, 0, self._digest())]
        return super().manifest()

    def _digest(self) -> str:
        digest, step = hashlib.blake2b(digest_size=16), 1
        if self._features is not None or isinstance(self._rows, _BareColumn):
            step = max(self.num_rows // DIGESTED_ROWS, 1)
        for position in range(0, self.num_rows, step):
            _add_value(digest, self._rows[position])
        return digest.hexdigest()

    def _read(self, shard: Shard, start: int, stop: int) -> Iterator[Row]:
        for number in range(shard.first_row + start, shard.first_row + stop):
            yield self._row_of(number, self._rows[number])

    def _row_of(self, number: int, value: Any) -> Row:
        if self._features is not None or _has_columns(value):
            fields = dict(value)
        elif len(self.columns) == 1:  # a bare photo or title
            fields = {self.columns[0]: value}
        else:
            return self._row(number, None, None, {}, None, f"the row is not a dictionary but {_kind_of(value)}")
        image, name = fields.get(self.selected.image), None
        if _is_stored_photo(image):
            name = image.get("path")
            image = image["bytes"] if image.get("bytes") is not None else name
        if isinstance(image, os.PathLike):
            image = os.fspath(image)
        if isinstance(image, str):
            name = image
        return self._row(number, image, fields.get(self.selected.caption), fields, name)


def _kind_of(value: Any) -> str:
    return type(value).__name__


def _add_value(digest: Any, value: Any) -> None:
    """Take a value into a digest, with its type and length, so that no two rows of values run into each other."""
    if isinstance(value, Mapping):
        for key in value:
            _add_value(digest, key)
            _add_value(digest, value[key])
        value = len(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add_value(digest, item)
        value = len(value)
    if isinstance(value, Image.Image):
        data = repr((value.mode, value.size)).encode() + value.tobytes()
    elif isinstance(value, np.ndarray):
        data = repr((value.dtype, value.shape)).encode() + value.tobytes()
    elif isinstance(value, (bytes, bytearray, memoryview)):
        data = bytes(value)
    else:
        data = json.dumps(value, default=str).encode()
    digest.update(f"{_kind_of(value)} {len(data)} ".encode())
    digest.update(data)
