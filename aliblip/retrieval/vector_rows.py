"""Rows that are embedded already, as Arrow has them: into a new gallery, or into one that is there."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from aliblip.data.cell_types import storable
from aliblip.retrieval.building import check_place
from aliblip.retrieval.table_columns import PRIMARY_KEY, table_names
from aliblip.retrieval.tables import ID, ITEMS, KINDS, VECTOR, Facts, aligned, lance_options, library, table_uri
from aliblip.runtime.mistakes import UsageError, first_line

__all__ = ["as_rows", "write_vectors"]

_BATCH_ROWS = 2**16


def write_vectors(
    rows: pa.Table | pa.RecordBatchReader,
    uri: str,
    *,
    kind: str,
    model: str | None,
    overwrite: bool,
    storage_options: Mapping[str, Any] | None,
) -> None:
    """Make a gallery of rows with `id` and `vector`; see `Gallery.from_vectors`."""
    if kind not in KINDS:
        raise UsageError(f"kind is {kind!r}: choose one of {', '.join(KINDS)}")
    check_place(uri, overwrite, storage_options)
    lance = library()
    from lance.fragment import write_fragments

    given = rows.schema
    width = _width(given)
    names = table_names([name for name in given.names if name not in (ID, VECTOR)], ID, kind)
    fields = [pa.field(ID, _id_type(given), nullable=False, metadata=PRIMARY_KEY)]
    fields += [pa.field(names[name], storable(given.field(name).type)) for name in names]
    schema = pa.schema([*fields, pa.field(VECTOR, pa.list_(pa.float32(), width), nullable=False)])
    facts = Facts(
        kind=kind,
        width=width,
        model=model,
        id_column=ID,
        columns=tuple(names.values()),
        renamed={name: kept for name, kept in names.items() if name != kept},
        build=secrets.token_hex(6),
    )
    ids: list[pa.Array] = []
    mistakes: list[UsageError] = []

    def converted() -> Iterator[pa.RecordBatch]:
        for batch in _batches(rows):
            try:
                table = as_rows(pa.Table.from_batches([batch]), schema, names)
            except UsageError as error:
                mistakes.append(error)
                raise
            ids.extend(table.column(ID).chunks)
            yield from table.to_batches()

    options = lance_options(storage_options)
    reader = pa.RecordBatchReader.from_batches(schema, converted())
    place = table_uri(uri, ITEMS)
    try:
        fragments = write_fragments(reader, place, schema=schema, mode="overwrite", storage_options=options)
    except OSError:
        if mistakes:  # which Lance gives back as an error of its own, with the traceback as text
            raise mistakes[0] from None
        raise
    total = sum(map(len, ids))
    if not total:
        raise UsageError("no rows given: a gallery has at least one")
    if twice := total - pc.count_distinct(pa.chunked_array(ids)).as_py():
        raise UsageError(f"some ids come twice ({twice:,} of {total:,} rows are too many): make them unique")
    operation = lance.LanceOperation.Overwrite(facts.in_metadata(schema), fragments)
    dataset = lance.LanceDataset.commit(place, operation, storage_options=options, enable_stable_row_ids=True)
    dataset.create_scalar_index(ID, "BTREE")


def _batches(rows: pa.Table | pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    if isinstance(rows, pa.Table):
        return iter(rows.to_batches(max_chunksize=_BATCH_ROWS))
    return iter(rows)


def as_rows(table: pa.Table, schema: pa.Schema, names: Mapping[str, str]) -> pa.Table:
    """A table as rows of a gallery's schema: columns by name, null where one is missing.

    Args:
        names: from the table's names to the schema's, where they differ.

    Raises:
        UsageError: no ids or vectors, a column that the schema has not, values of other types or that are not finite.
    """
    if not isinstance(table, pa.Table):
        raise UsageError(f"the rows are a {type(table).__name__}: give an Arrow table")
    columns = {names.get(name, name): table.column(name) for name in table.column_names}
    for name in (ID, VECTOR):
        if name not in columns or columns[name].null_count:
            raise UsageError(f"the rows need the column {name!r}, without null: there are {', '.join(columns)}")
    if unknown := [name for name in columns if name not in schema.names]:
        raise UsageError(f"the gallery has no column {unknown[0]!r}: there are {', '.join(schema.names)}")
    made = []
    for field in schema:
        try:
            column = columns.get(field.name)
            made.append(pa.nulls(len(table), field.type) if column is None else column.cast(field.type))
        except pa.ArrowException as error:
            raise UsageError(f"the column {field.name!r} does not fit {field.type}: {first_line(error)}") from error
    rows = aligned(pa.Table.from_arrays(made, schema=schema))
    for chunk in rows.column(VECTOR).chunks:
        if not np.isfinite(chunk.flatten().to_numpy(zero_copy_only=False)).all():
            raise UsageError("the vectors are not all finite")
    return rows


def _width(schema: pa.Schema) -> int:
    kind = schema.field(VECTOR).type if VECTOR in schema.names else None
    if kind is None or not pa.types.is_fixed_size_list(kind):
        raise UsageError(
            f"the column {VECTOR!r} is {kind or 'not there'}: give lists of one size, pa.list_(pa.float32(), width)"
        )
    return kind.list_size


def _id_type(schema: pa.Schema) -> pa.DataType:
    kind = storable(schema.field(ID).type) if ID in schema.names else None
    if kind is not None and pa.types.is_integer(kind):
        return pa.int64()
    if kind is not None and pa.types.is_string(kind):
        return pa.string()
    raise UsageError(f"the column {ID!r} is {kind or 'not there'}: ids are text or whole numbers")
