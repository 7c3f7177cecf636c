"""The shards of a prepared catalogue: what stands in which, and their writing out of the parts.

    plan = ShardPlan(...)                # once, when all parts are there
    plan.save(folder)
    write_shard(folder, 3)               # by any process

A shard holds rows that follow each other in the data, so that each part is read about once for each split.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from aliblip.data.cell_types import is_number, number_in
from aliblip.data.prepare_parts import OTHER, column_of, facts_file, read_photos, written_to
from aliblip.runtime.files import new_file, write_bytes, write_json

__all__ = ["Shard", "ShardPlan", "final_schema", "num_shards", "write_shard"]

PARTS, SHARDS, PLAN = "parts", "data", "plan"
# Of a row group of a shard.
GROUP_BYTES, GROUP_ROWS = 16 * 2**20, 128
# Columns of the parts that the shards do not need.
UNUSED = ("thumb", "digest", "reason", "width", "height")


@dataclass(frozen=True)
class Shard:
    """A file of the catalogue, with the rows [begin, end) of the plan's order."""

    file: str
    split: str
    begin: int
    end: int


@dataclass
class ShardPlan:
    """Which rows come where.

    Attributes:
        shards: all files.
        rows: (kept,) int64, the numbers of the rows in the order in which they are written.
        products: (kept,) int64, their products.
        firsts: (tasks,) int64, the first row of each part.
        schema: of the shards.
        names: from a column of the data to its name in the shards.
    """

    shards: list[Shard]
    rows: np.ndarray
    products: np.ndarray
    firsts: np.ndarray
    schema: pa.Schema
    names: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write the plan into a folder; `plan.json` comes last, and makes it whole."""
        place = folder / PLAN
        with written_to(place):
            place.mkdir(parents=True, exist_ok=True)
            for name in ("rows", "products", "firsts"):
                with new_file(place / f"{name}.npy") as file:
                    np.save(file, getattr(self, name))
            write_bytes(place / "schema.arrow", self.schema.serialize().to_pybytes())
            shards = [vars(shard) for shard in self.shards]
            write_json(place / "plan.json", {"shards": shards, "names": self.names})

    @classmethod
    def load(cls, folder: Path) -> ShardPlan:
        """The plan that `save` wrote; its arrays stay on the disk."""
        place = folder / PLAN
        known = json.loads((place / "plan.json").read_text(encoding="utf-8"))
        arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in ("rows", "products", "firsts")}
        schema = pa.ipc.read_schema(pa.py_buffer((place / "schema.arrow").read_bytes()))
        return cls([Shard(**shard) for shard in known["shards"]], **arrays, schema=schema, names=known["names"])


def num_shards(rows: int, size: int, shard_bytes: int, multiple: int) -> int:
    """How many shards a split gets: files of about `shard_bytes`, and a multiple of the readers to come (processes
    times workers), so that each gets as many; fewer only where there are fewer rows.

    Args:
        rows: of the split.
        size: bytes of its photos.
        multiple: of what.
    """
    count = max(math.ceil(size / shard_bytes), 1)
    count = math.ceil(count / multiple) * multiple
    return max(min(count, rows), 1)


def cut(split: str, begin: int, rows: int, count: int) -> Iterator[Shard]:
    """The shards of a split, of equal numbers of rows but for one."""
    edges = [begin + rows * index // count for index in range(count + 1)]
    for index in range(count):
        yield Shard(f"{split}-{index:05d}-of-{count:05d}.parquet", split, edges[index], edges[index + 1])


def final_schema(types: Mapping[str, pa.DataType], names: Mapping[str, str], extra: Sequence[str]) -> pa.Schema:
    """The schema of the shards, with what `datasets` writes beside it so that `image` is decoded as a photo.

    Args:
        types: of the data's columns.
        names: of those that are kept, and what they are called.
        extra: further columns of the parts that are kept.
    """
    from datasets import Features, Image, Value

    features = {"image": Image(), "caption": Value("string"), "product_id": Value("int64")}
    features |= {name: Value("string") for name in extra if name not in features}
    for name, called in names.items():
        features |= Features.from_arrow_schema(pa.schema([pa.field(called, types[name])]))
    features["source_row"] = Value("int64")
    return Features(features).arrow_schema


def write_shard(folder: Path, number: int) -> int:
    """Write a shard out of the parts. Returns its rows.

    Args:
        folder: with the plan and the parts; the shard comes into its sub-folder `data`.
        number: of the shard in the plan.

    Raises:
        UsageError: the disk does not take it.
    """
    plan = ShardPlan.load(folder)
    shard = plan.shards[number]
    rows = np.asarray(plan.rows[shard.begin : shard.end])
    products = np.asarray(plan.products[shard.begin : shard.end])
    place = folder / SHARDS / shard.file
    with written_to(place.parent):
        place.parent.mkdir(exist_ok=True)
        with new_file(place) as file:
            options = {"compression": "zstd", "use_content_defined_chunking": True, "write_page_index": True}
            with pq.ParquetWriter(file, plan.schema, **options) as writer:
                for table in _tables(folder, plan, rows, products):
                    writer.write_table(table, row_group_size=GROUP_ROWS)
    return len(rows)


def _tables(folder: Path, plan: ShardPlan, rows: np.ndarray, products: np.ndarray) -> Iterator[pa.Table]:
    """The rows of a shard, as many at once as make a row group."""
    waiting: list[pa.Table] = []
    for facts, photos in _pieces(folder, plan, rows, products):
        start = 0
        gathered: list[bytes] = []
        for photo in photos:
            gathered.append(photo)
            count = sum(map(len, waiting)) + len(gathered)
            if count >= GROUP_ROWS or sum(map(len, gathered)) >= GROUP_BYTES:
                waiting.append(_with_photos(facts.slice(start, len(gathered)), gathered, plan))
                yield pa.concat_tables(waiting)
                start, gathered, waiting = start + len(gathered), [], []
        if gathered:
            waiting.append(_with_photos(facts.slice(start, len(gathered)), gathered, plan))
    if waiting:
        yield pa.concat_tables(waiting)


def _pieces(
    folder: Path, plan: ShardPlan, rows: np.ndarray, products: np.ndarray
) -> Iterator[tuple[pa.Table, Iterator[bytes]]]:
    """By part: the facts of its rows, and their photos."""
    parts = np.searchsorted(plan.firsts, rows, side="right") - 1
    for part in np.unique(parts).tolist():
        chosen = parts == part
        numbers = rows[chosen]
        file = facts_file(folder / PARTS, part)
        facts = pq.read_table(file, columns=[name for name in pq.read_schema(file).names if name not in UNUSED])
        facts = facts.take(numbers - int(plan.firsts[part]))
        facts = facts.set_column(facts.schema.get_field_index("product_id"), "product_id", pa.array(products[chosen]))
        photos = (photo for _, photo in read_photos(folder / PARTS, part, numbers.tolist()))
        yield facts, photos


def _with_photos(facts: pa.Table, photos: Sequence[bytes], plan: ShardPlan) -> pa.Table:
    given = {called: f"{OTHER}{name}" for name, called in plan.names.items()}
    columns: list[pa.Array] = []
    for field in plan.schema:
        name = field.name
        if name == "image":
            values = [pa.array(photos, pa.binary()), _joined(facts["path"])]
            columns.append(pa.StructArray.from_arrays(values, names=["bytes", "path"]))
        elif name in given:
            columns.append(_cast(facts, given[name], field.type))
        else:
            columns.append(_joined(facts["row" if name == "source_row" else name]))
    return pa.table(columns, schema=plan.schema)


def _joined(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _cast(facts: pa.Table, name: str, kind: pa.DataType) -> pa.Array:
    """A column of the data in the type that it has in all parts together."""
    if name not in facts.column_names:
        return pa.nulls(len(facts), kind)
    column = _joined(facts[name])
    if column.type == kind:
        return column
    values = column.to_pylist()
    if is_number(kind) and pa.types.is_string(column.type):  # of data that has texts alone
        values = list(map(number_in, values))
    return column_of(values, kind)
