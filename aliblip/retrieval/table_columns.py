"""Which columns of the data a gallery's table has, under which names and types, and rows in that form.

    kept = kept_columns(source, columns=None, id_column="sku")
    schema = kept.schema(width=256, ...)
    batch = kept.batch(schema, rows, ...)

Types are those of the data where it has any (Parquet, `datasets`). Otherwise they follow from all values of records and
Python rows, whose reading costs little, and from the first values of tars. CSV files hold texts alone: which of their
columns are numbers, `aliblip.data.cell_types` says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aliblip.data.cell_types import (
    NOT_OF_THE_TYPE,
    Likeness,
    array_of,
    fitting_value,
    is_number,
    joined_type,
    like_texts,
    number_in,
    storable,
    types_of_texts,
)
from aliblip.data.collate import printable
from aliblip.data.parquet import ParquetSource
from aliblip.data.python_rows import PythonSource
from aliblip.data.remote import open_file
from aliblip.data.rows import Source
from aliblip.retrieval.tables import ID, OWN_COLUMNS, PATH, TEXT, THUMBNAIL, TOKENS, VECTOR
from aliblip.runtime.mistakes import UsageError

__all__ = [
    "PRIMARY_KEY",
    "FromTool",
    "KeptColumns",
    "Lost",
    "ids_told_ahead",
    "kept_columns",
    "table_names",
]

# Of data that has no types, and whose rows cost as much to read as photos.
SURVEYED_ROWS = 1000
_BLOCK = 4096
# What results hold beside the columns, and what Lance keeps for itself.
_RESERVED = (
    *OWN_COLUMNS,
    *("itc", "itm_logit", "itm_probability", "position", "score"),
    *("query_index", "_distance", "_score"),
)

# How an argument is written by whoever was called: "--id_column" of a command, "id_column" in Python.
FromTool = Callable[[str], str]


@dataclass
class KeptColumns:
    """The columns of a gallery that come from the data.

    Attributes:
        names: from the data's name of each kept column to the table's.
        types: by the data's name.
        ids: where the ids come from: "column" (`id_column`), "name", or "row".
        id_column: of the data.
        id_type: of the ids in the table.
        left_out: columns of the data that were not asked for.
        notes: what was decided, for the user.
        from_texts: whether numbers come as texts, see `Source.has_texts_alone`.
    """

    names: dict[str, str]
    types: dict[str, pa.DataType]
    ids: str
    id_column: str | None
    id_type: pa.DataType
    left_out: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)
    from_texts: bool = False

    @property
    def renamed(self) -> dict[str, str]:
        return {name: kept for name, kept in self.names.items() if name != kept}

    def schema(self, *, kind: str, width: int, token_shape: tuple[int, int] | None, thumbnails: bool) -> pa.Schema:
        """Of the table: ids first, own columns last."""
        fields = [pa.field(ID, self.id_type, nullable=False, metadata=PRIMARY_KEY)]
        fields += [pa.field(self.names[name], self.types[name]) for name in self.names]
        fields.append(pa.field(TEXT if kind == "text" else PATH, pa.string()))
        fields.append(pa.field(VECTOR, pa.list_(pa.float32(), width), nullable=False))
        if thumbnails:
            fields.append(pa.field(THUMBNAIL, pa.binary()))
        if token_shape is not None:
            fields.append(pa.field(TOKENS, pa.list_(pa.int16(), token_shape[0] * token_shape[1])))
        return pa.schema(fields)

    def id_of(self, number: int, name: str, others: Mapping[str, Any]) -> str | int | None:
        """The id of a row, or None where it is null.

        Raises:
            UsageError: it is neither text nor a whole number, or not of the type of the others.
        """
        if self.ids == "row":
            return number
        if self.ids == "name":
            return name
        value = others.get(self.id_column)
        if isinstance(value, np.generic):
            value = value.item()
        if self.from_texts and pa.types.is_integer(self.id_type):
            value = number_in(value)
        if value is None:
            return None
        if pa.types.is_string(self.id_type):
            fits = isinstance(value, str)
        else:
            fits = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
        if not fits:
            raise UsageError(
                f"the id of row {number} is {value!r}, and ids of this gallery are "
                f"{'text' if pa.types.is_string(self.id_type) else 'whole numbers of 64 bits'}: make them all the same"
            )
        return printable(value) if isinstance(value, str) else value

    def columns(self, schema: pa.Schema, others: Sequence[Mapping[str, Any]], lost: Lost) -> dict[str, pa.Array]:
        """The rows' values as columns of the table, by its names. What does not fit is counted in `lost`."""
        arrays = {}
        for name, kept in self.names.items():
            values = [row.get(name) for row in others]
            if self.from_texts and is_number(schema.field(kept).type):
                values = list(map(number_in, values))
            try:
                arrays[kept] = array_of(values, schema.field(kept).type)
            except NOT_OF_THE_TYPE:
                fitting = [fitting_value(value, schema.field(kept).type) for value in values]
                gone = [one is None and value is not None for one, value in zip(fitting, values, strict=True)]
                lost.misfits[name] += sum(gone)
                arrays[kept] = pa.array(fitting, schema.field(kept).type)
        known = {*self.names, *self.left_out, self.id_column}
        for row in others:
            lost.columns.update(name for name, value in row.items() if value is not None and name not in known)
        return arrays


@dataclass
class Lost:
    """What of the rows' columns is not in the table.

    Attributes:
        misfits: values of another type than their column, which are null; by the data's name.
        columns: rows with a column that the table does not have, by its name.
    """

    misfits: Counter = field(default_factory=Counter)
    columns: Counter = field(default_factory=Counter)

    def update(self, misfits: Mapping[str, int], columns: Mapping[str, int]) -> None:
        self.misfits.update(misfits)
        self.columns.update(columns)

    def told(self) -> list[str]:
        """For the user, a line each."""
        lines = []
        if misfits := +self.misfits:
            lines.append(f"values of another type than their column, which are left out: {_counted(misfits)}")
        if columns := +self.columns:
            lines.append(f"columns that the gallery does not have, which are left out: {_counted(columns)}")
        return lines


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in counts.items())


# Lets Lance compare rows that are put in with those of another writer.
PRIMARY_KEY = {"lance-schema:unenforced-primary-key": "true"}


# --- from a source ----------------------------------------------------------------------------------------------------


def kept_columns(
    source: Source, *, columns: Sequence[str] | None, id_column: str | None, flag: FromTool, kind: str
) -> KeptColumns:
    """Decide on names, types and ids.

    Args:
        source: opened with the columns as `other_columns`.
        columns: those to keep; None: all.
        id_column: of the data; None: "id" where there is one, otherwise the names of the files of a folder or list of
            photos, otherwise the numbers of the rows.
        flag: how the tool that was called writes an argument.
        kind: "image" or "text".

    Raises:
        UsageError: a column that is not there, or one of ids that are neither text nor whole numbers.
    """
    found, likeness = _types(source)
    for name in columns or ():
        if name not in found and name not in source.columns:
            raise UsageError(
                f"{source.name} has no column {name!r} ({flag('columns')}): there are {_listed(source.columns)}"
            )
    if id_column is not None and id_column not in found:
        raise UsageError(
            f"{source.name} has no column {id_column!r} ({flag('id_column')}): there are {_listed(source.columns)}"
        )
    notes: list[str] = []
    ids, id_column = _where_ids_come_from(source, id_column, found, kind)
    texts = {name: like for name, like in likeness.items() if columns is None or name in columns}
    types, told = types_of_texts(texts, (id_column, source.selected.product_id))
    found |= {name: (kind, "") for name, kind in types.items()}
    notes += told
    kept = {}
    for name, (type_, note) in found.items():
        if columns is None or name in columns:
            notes += [note] if note else []
            kept[name] = type_
    names = table_names(kept, id_column, kind)
    notes += [f"the column {name!r} is called {names[name]!r} in the gallery" for name in names if names[name] != name]
    id_type = pa.string() if ids == "name" else pa.int64()
    if ids == "column":
        id_type = _id_type(source, id_column, found[id_column][0], flag)
    left_out = tuple(name for name in found if name not in names)
    types = {name: kept[name] for name in names}
    return KeptColumns(names, types, ids, id_column, id_type, left_out, notes, source.has_texts_alone)


def _where_ids_come_from(source: Source, id_column: str | None, found: Mapping, kind: str) -> tuple[str, str | None]:
    if id_column is not None:
        return "column", id_column
    if ID in found:
        return "column", ID
    if kind == "text":
        return "row", None
    if isinstance(source, PythonSource):
        # Photos that are given as paths and nothing else; other rows in memory have no name.
        bare = source.columns == ["image"] and all(
            isinstance(row.image, str) for row in source.read_range(0, source.num_rows)
        )
        return ("name" if bare else "row"), None
    return ("name" if source.random_access else "row"), None


def _id_type(source: Source, id_column: str, kind: pa.DataType, flag: FromTool) -> pa.DataType:
    if pa.types.is_integer(kind):
        return pa.int64()
    if pa.types.is_string(kind):
        return pa.string()
    raise UsageError(
        f"the column {id_column!r} of {source.name} holds {kind}: an id is text or a whole number, name another column "
        f"with {flag('id_column')}"
    )


def table_names(columns: Iterable[str], id_column: str | None, kind: str) -> dict[str, str]:
    """The table's name of each column. The id's own column is not kept twice where it is called `id` anyway."""
    free = {TEXT} if kind == "image" else {PATH, THUMBNAIL, TOKENS}
    names: dict[str, str] = {}
    taken = set(columns)
    for name in columns:
        if name == ID == id_column:
            continue
        kept = re.sub(r"[.`\x00]", "_", name) or "column"
        if (kept in _RESERVED and kept not in free) or kept.startswith("_row"):
            kept = f"data_{kept.lstrip('_')}"
        while kept in names.values() or (kept != name and kept in taken):
            kept += "_"
        names[name] = kept
    return names


def _types(source: Source) -> tuple[dict[str, tuple[pa.DataType, str]], dict[str, Likeness]]:
    """The type of each column of a source, and what is to be told of it; of texts alone, what these read like."""
    schema = source.schema_of_others()
    if schema is not None:
        return {name: (storable(schema.field(name).type), "") for name in schema.names}, {}
    rows = source.read_range(0, source.num_rows if source.random_access else min(source.num_rows, SURVEYED_ROWS))
    found: dict[str, tuple[pa.DataType, str]] = {name: (pa.null(), "") for name in source.selected.others}
    likeness = dict.fromkeys(found, Likeness.BLANK) if source.has_texts_alone else {}
    others = (row.others for row in rows if row.problem is None or row.others)
    while block := list(islice(others, _BLOCK)):
        for name in dict.fromkeys(name for row in block for name in row):
            before, note = found.get(name, (pa.null(), ""))
            if source.has_texts_alone:
                likeness[name] = like_texts(likeness.get(name, Likeness.BLANK), (row.get(name) for row in block))
            elif not note:  # else it is text already
                found[name] = joined_type(name, before, [row.get(name) for row in block])
    found |= dict.fromkeys(likeness, (pa.string(), ""))
    return {name: (storable(kind), note) for name, (kind, note) in found.items()}, likeness


# --- ids before the work ----------------------------------------------------------------------------------------------


def ids_told_ahead(source: Source, kept: KeptColumns) -> Iterator[tuple[int, Any]] | None:
    """(row, id) of all rows before anything is embedded, where that costs little; else None.

    A row that can't be read has None.
    """
    if kept.ids == "row":
        return None  # each once
    if isinstance(source, ParquetSource):
        return enumerate(_parquet_values(source, kept.id_column))
    if not source.random_access:
        return None
    return ((row.row, kept.id_of(row.row, printable(row.name), row.others)) for row in _rows(source))


def _rows(source: Source) -> Iterator:
    return source.read_range(0, source.num_rows)


def _parquet_values(source: ParquetSource, column: str) -> Iterator[Any]:
    for file in source.files:
        with open_file(file.file) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(columns=[column]):
                yield from batch.column(0).to_pylist()


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
