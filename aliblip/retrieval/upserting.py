"""Putting rows into a gallery that is there: embedded as in its build, and merged by id in one commit."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import torch

from aliblip.data.loader import EvalLoader
from aliblip.data.rows import Source
from aliblip.retrieval.building import collator_of, embedded_rows, some_of
from aliblip.retrieval.embedding import EmbeddedUnit, embedded_units, undisturbed
from aliblip.retrieval.table_columns import FromTool, KeptColumns, Lost
from aliblip.retrieval.tables import ID, OWN_COLUMNS, Facts, aligned, changed, one_writer, open_dataset
from aliblip.runtime.distributed import broadcast_object, is_main, rank, together, world_size
from aliblip.runtime.mistakes import UsageError
from aliblip.runtime.units import gather_units, own_units
from encoder_aliblip import TOKEN_TYPE

__all__ = ["UpsertReport", "merged", "upserted"]


@dataclass
class UpsertReport:
    """What came of it.

    Attributes:
        inserted, updated: rows with new ids, and in place of others.
        skipped: rows that could not be used, as {"row", "name", "reason"}.
        lost: what of the rows' columns is not in the gallery.
    """

    inserted: int = 0
    updated: int = 0
    skipped: list[dict[str, Any]] = field(default_factory=list)
    lost: Lost = field(default_factory=Lost)

    def __str__(self) -> str:
        told = [f"rows inserted: {self.inserted:,}", f"replaced: {self.updated:,}"]
        if self.skipped:
            first = self.skipped[0]
            told.append(f"could not be used: {len(self.skipped):,}, the first {first['name']!r} ({first['reason']})")
        return "; ".join([*told, *self.lost.told()])


def upserted(
    source: Source,
    uri: str,
    schema: pa.Schema,
    facts: Facts,
    root: str | None,
    model,
    processor,
    *,
    id_column: str | None,
    batch_size: int,
    dtype: torch.dtype | None,
    num_workers: int,
    duplicates: str,
    progress: bool,
    storage_options: Mapping[str, Any] | None,
    flag: FromTool,
) -> UpsertReport:
    """Embed the rows of a source and put them into the gallery (collective).

    Args:
        source: with its further columns as `other_columns`.
        schema, facts: of the gallery's table.
        root: the gallery's folder of photos.
        id_column: of the source; None: the one that the gallery was built with.
        duplicates: as in `Build`, among these rows.

    Raises:
        UsageError: rows without the gallery's ids, an id that comes twice.
    """
    kept = _kept(source, schema, facts, id_column, flag)
    loader = EvalLoader(
        source,
        collator_of(processor, facts.kind, facts.thumbnail_side),
        unit_size=batch_size,
        rank=rank(),
        world_size=world_size(),
        num_workers=num_workers,
    )
    folder = broadcast_object(tempfile.mkdtemp(prefix="aliblip-upsert-") if is_main() else None)  # collective
    own: list[tuple[int, dict]] = []
    try:

        def embed() -> None:
            with undisturbed(model):
                units = own_units(loader.num_units)
                for unit in embedded_units(model, loader, units, dtype=dtype, progress=progress, what="rows"):
                    own.append((unit.number, _spool(unit, kept, schema, facts, root, folder)))

        together(True, embed, "embed its part of the rows")  # collective
        infos = gather_units("embedding", own, loader.num_units)  # collective
        report = UpsertReport(skipped=[entry for info in infos for entry in info["skipped"]])
        for info in infos:
            report.lost.update(info["misfits"], info["columns"])

        def merge() -> tuple[int, int, list[dict]]:
            files = [info["file"] for info in infos if info["file"] is not None]
            table = pa.concat_tables([_read(file, schema) for file in files] or [schema.empty_table()])
            table, dropped = _each_id_once(table, duplicates, flag)
            return *merged(table, uri, storage_options), dropped

        report.inserted, report.updated, dropped = together(is_main(), merge, "change the gallery")  # collective
        report.skipped += dropped
        return report
    finally:
        if is_main():
            shutil.rmtree(folder, ignore_errors=True)


def _kept(source: Source, schema: pa.Schema, facts: Facts, id_column: str | None, flag: FromTool) -> KeptColumns:
    """The gallery's columns, as this source has to give them."""
    ids, column = facts.ids, id_column or facts.id_column
    if id_column is not None:
        ids = "column"
    if ids == "row":
        raise UsageError(
            "the ids of this gallery are the numbers of the rows that it was built of, by which no row can be put in: "
            f"name the column of ids with {flag('id_column')}"
        )
    if ids == "column" and column not in source.columns and column not in source.selected.others:
        there = ", ".join(map(repr, source.columns))
        raise UsageError(f"{source.name} has no column {column!r} with the gallery's ids: there are {there}")
    data_names = {kept: name for name, kept in facts.renamed.items()}
    names = {data_names.get(kept, kept): kept for kept in facts.columns}
    names |= {name: name for name in schema.names if name not in (*facts.columns, *OWN_COLUMNS)}  # added by LanceDB
    types = {name: schema.field(kept).type for name, kept in names.items()}
    column = column if ids == "column" else None
    return KeptColumns(names, types, ids, column, schema.field(ID).type, from_texts=source.has_texts_alone)


def _spool(
    unit: EmbeddedUnit, kept: KeptColumns, schema: pa.Schema, facts: Facts, root: str | None, folder: str
) -> dict[str, Any]:
    """Write an embedded unit to a file; its name, and what was left out."""
    if unit.image_tokens is not None:
        unit.image_tokens = unit.image_tokens.to(TOKEN_TYPE).cpu()
    rows = embedded_rows([unit], kept, schema, facts, root)
    file = None
    if len(rows.table):
        file = os.path.join(folder, f"{unit.number:08d}.arrow")
        with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_table(rows.table)
    return {"file": file, "skipped": rows.skipped, "misfits": rows.lost.misfits, "columns": rows.lost.columns}


def _read(file: str, schema: pa.Schema) -> pa.Table:
    try:
        source = pa.memory_map(file)
    except FileNotFoundError as error:
        raise UsageError(
            "rows are put in by processes of one machine, and a file of another process is not here: start them on one"
        ) from error
    return aligned(pa.ipc.open_file(source).read_all().cast(schema))


def _each_id_once(table: pa.Table, duplicates: str, flag: FromTool) -> tuple[pa.Table, list[dict]]:
    ids = table.column(ID).to_pylist()
    seen: set = set()
    keep = [not (value in seen or seen.add(value)) for value in ids]
    if all(keep):
        return table, []
    left = [value for value, is_first in zip(ids, keep, strict=True) if not is_first]
    if duplicates == "error":
        twice = list(dict.fromkeys(left))
        raise UsageError(
            f"some ids come twice among these rows: {some_of(twice)}. Make them unique, or keep the first of each with "
            f"{flag('duplicates', 'first')}"
        )
    dropped = [{"row": None, "name": str(value), "reason": "the id comes twice"} for value in left]
    return table.filter(pa.array(keep)), dropped


def merged(table: pa.Table, uri: str, storage_options: Mapping[str, Any] | None) -> tuple[int, int]:
    """Put rows of the gallery's own schema in, by id, in one commit; how many were inserted and how many replaced.

    Raises:
        UsageError: an id comes twice, of which Lance would put in both.
    """
    if not len(table):
        return 0, 0
    counts = Counter(table.column(ID).to_pylist())
    if len(counts) < len(table):
        twice = [value for value, count in counts.items() if count > 1]
        raise UsageError(f"some ids come twice among these rows: {some_of(twice)}. Give each of them once")

    def merge() -> dict[str, int]:
        with one_writer(uri) as alone:
            dataset = open_dataset(uri, storage_options=storage_options)
            builder = dataset.merge_insert(ID).when_matched_update_all().when_not_matched_insert_all()
            return builder.use_index(alone).execute(table)

    counts = changed(merge)
    return counts["num_inserted_rows"], counts["num_updated_rows"]
