"""What is decided when all photos are read: duplicates, products, splits, shards.

    facts = Facts.load(folder, tasks)                   # a few numbers of each row; no photo
    decided = decide(facts, pairs, options, ...)
    decided.plan.save(folder)

Everything here is done by one process, over some hundred bytes a row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from aliblip.data.cell_types import NOT_OF_THE_TYPE
from aliblip.data.clean_titles import title_key, words_key
from aliblip.data.columns import Columns
from aliblip.data.duplicates import Pairs, exact_pairs, groups_of
from aliblip.data.prepare_arguments import PrepareArguments, shares_of
from aliblip.data.prepare_parts import OTHER, read_facts, unified_others
from aliblip.data.prepare_photos import THUMB_SIDE
from aliblip.data.prepare_shards import PARTS, ShardPlan, cut, final_schema, num_shards
from aliblip.data.prepare_splits import Sides, as_named, by_product, by_time, split_of_value, time_of_value
from aliblip.data.prepare_tasks import Task
from aliblip.data.splits import TRAIN
from aliblip.runtime.files import new_file
from aliblip.runtime.mistakes import UsageError

__all__ = ["Decided", "Facts", "Found", "decide", "find_exact", "write_duplicates", "write_rejected", "write_thumbs"]

_COLUMNS = ("row", "split", "reason", "caption", "product_id", "product_given", "width", "height", "bytes_given")
_KEYS = ("bytes", "digest", "caption_given")
_DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])


@dataclass
class Facts:
    """Numbers of the rows that can be used, in the order of the data; (k,) each.

    Attributes:
        row: their numbers in the data.
        split: of `split_names`, the one that they were given in.
        product: int64.
        digest: of the file of the photo.
        title, words: keys of the title; see `aliblip.data.clean_titles`.
        width, height: of the photo as it is kept.
        given, kept: bytes of the photo before and after.
        rejected: reasons, and how many rows each has.
        total: rows, those that can't be used included.
        stated: whether any product is given by the data, and differs from its number.
        cleaned: titles that were cleaned.
    """

    row: np.ndarray
    split: np.ndarray
    product: np.ndarray
    digest: np.ndarray
    title: np.ndarray
    words: np.ndarray
    width: np.ndarray
    height: np.ndarray
    given: np.ndarray
    kept: np.ndarray
    split_names: list[str]
    rejected: Counter
    total: int
    stated: bool
    cleaned: int

    def __len__(self) -> int:
        return len(self.row)

    @classmethod
    def load(cls, folder: Path, tasks: int) -> Facts:
        """From the parts of all tasks.

        Raises:
            UsageError: no row can be used; the reasons are in the message.
        """
        names: dict[str, int] = {}
        rejected: Counter = Counter()
        total, stated, cleaned = 0, False, 0
        columns: list[list[np.ndarray]] = [[] for _ in range(10)]
        for table in read_facts(folder / PARTS, tasks, [*_COLUMNS, *_KEYS]):
            total += len(table)
            rejected.update(reason for reason in table["reason"].to_pylist() if reason is not None)
            table = table.filter(pc.is_null(table["reason"]))
            titles = table["caption"].to_pylist()
            numbers = [names.setdefault(split, len(names)) for split in table["split"].to_pylist()]
            products = table["product_id"].to_pylist()
            stated = stated or any(
                given is None or given != str(product)
                for given, product in zip(table["product_given"].to_pylist(), products, strict=True)
            )
            cleaned += len(table) - table["caption_given"].null_count
            digests = np.frombuffer(b"".join(table["digest"].to_pylist()), _DIGEST)
            sizes = [table[name].to_numpy() for name in ("width", "height", "bytes_given", "bytes")]
            keys = [np.array([key(title) for title in titles], np.int64) for key in (title_key, words_key)]
            numbers = np.array(numbers, np.int16)
            pieces = (table["row"].to_numpy(), numbers, np.array(products, np.int64), digests, *keys, *sizes)
            for column, piece in zip(columns, pieces, strict=True):
                column.append(piece)
        arrays = []
        for column in columns:  # one after the other, so that little is held twice
            arrays.append(np.concatenate(column))
            column.clear()
        if not len(arrays[0]):
            told = "; ".join(f"{reason} ({count:,})" for reason, count in rejected.most_common(3))
            raise UsageError(f"none of the {total:,} rows can be used: {told}")
        return cls(*arrays, list(names), rejected, total, stated, cleaned)


def write_thumbs(folder: Path, tasks: int, wanted: np.ndarray, place: Path) -> None:
    """Write the thumbs of some rows, which ascend, as one array that can be mapped."""
    header = np.lib.format.header_data_from_array_1_0(np.zeros(0, np.uint8))
    header["shape"] = (len(wanted), THUMB_SIDE, THUMB_SIDE, 3)
    with new_file(place) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for table in read_facts(folder / PARTS, tasks, ["row", "thumb"]):
            rows = table["row"].to_numpy()
            chosen = np.flatnonzero(np.isin(rows, wanted, assume_unique=True))
            file.write(b"".join(table["thumb"].take(pa.array(chosen)).to_pylist()))


# --- duplicates -------------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """Duplicates, as pairs of places in `Facts`.

    Attributes:
        exact: photos of equal files, each with the first of them.
        near: photos that are nearly the same, of different files.
        titles: rows of equal titles, each with the first of them.
        words: rows whose titles have the same words, but are not equal.
    """

    exact: Pairs
    near: Pairs
    titles: Pairs
    words: Pairs


def find_exact(facts: Facts, near: Pairs) -> Found:
    """What can be found by keys, beside the near duplicates."""
    titles, words = exact_pairs(facts.title), exact_pairs(facts.words)
    chosen = facts.title[words.first] != facts.title[words.second]
    words = Pairs(words.first[chosen], words.second[chosen], words.similarity[chosen])
    return Found(exact_pairs(facts.digest), near, titles, words)


def between_products(facts: Facts, pairs: Pairs) -> np.ndarray:
    """(p,) bool: whether a pair is of two products."""
    return facts.product[pairs.first] != facts.product[pairs.second]


def write_duplicates(path: Path, facts: Facts, found: Found) -> None:
    """All pairs: kind, both rows, similarity, whether they are one product in the data."""
    tables = []
    for kind, pairs in vars(found).items():
        columns = {
            "kind": pa.array([kind] * len(pairs), pa.string()),
            "first_row": pa.array(facts.row[pairs.first], pa.int64()),
            "second_row": pa.array(facts.row[pairs.second], pa.int64()),
            "similarity": pa.array(pairs.similarity, pa.float32()),
            "same_product": pa.array(~between_products(facts, pairs)),
        }
        tables.append(pa.table(columns))
    with new_file(path) as file:
        pq.write_table(pa.concat_tables(tables), file, compression="zstd")


# --- what is decided --------------------------------------------------------------------------------------------------


@dataclass
class Decided:
    """The catalogue to come.

    Attributes:
        plan: its shards.
        sides: the split of each row of the facts.
        product: (k,) int64, after merging.
        rows: split -> rows.
        products: split -> products.
        merged: products that went up in others.
        told: what was done, for people.
    """

    plan: ShardPlan
    sides: Sides
    product: np.ndarray
    rows: dict[str, int]
    products: dict[str, int]
    merged: int
    told: list[str] = field(default_factory=list)


def decide(
    folder: Path, tasks: Sequence[Task], facts: Facts, found: Found, selected: Sequence[Columns], args: PrepareArguments
) -> Decided:
    """Products, splits and shards.

    Args:
        folder: of the work.
        selected: the columns that are read, of each source.

    Raises:
        UsageError: the flags of the splits do not fit the data.
    """
    products, inverse = np.unique(facts.product, return_inverse=True)
    inverse = inverse.reshape(-1)
    kinds = {"exact": [found.exact], "near": [found.exact, found.near], "titles": [found.titles]}
    merging = [_of_products(pairs, inverse) for kind in args.merged for pairs in kinds[kind]]
    product = _merged(facts, products, inverse, groups_of(len(products), *merging))
    apart = [_of_products(pairs, inverse) for pairs in (found.exact, found.near)]
    keys = products[groups_of(len(products), *merging, *apart)][inverse]
    sides = _sides(folder, len(tasks), facts, keys, args)
    told = list(sides.told)
    merged = len(products) - len(np.unique(product))
    if args.merged:
        told.append(f"{merged:,} products are merged with others by {' and '.join(args.merged)}")
        told += _large_group(product)
    ids = {columns.product_id for columns in selected}
    types, notes = unified_others(folder / PARTS, len(tasks), ids, _written_as_ours(facts, selected))
    names, extra, renamed = _names(types, facts, selected)
    types = {name: _decodable(kind) for name, kind in types.items()}
    plan, rows, counts = _shards(facts, product, sides, args)
    plan.schema, plan.names = final_schema(types, names, extra), names
    plan.firsts = np.array([task.first_row for task in tasks], np.int64)
    return Decided(plan, sides, product, rows, counts, merged, [*told, *notes, *renamed])


def _of_products(pairs: Pairs, product: np.ndarray) -> Pairs:
    return Pairs.of(product[pairs.first], product[pairs.second], pairs.similarity)


def _merged(facts: Facts, products: np.ndarray, inverse: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """(k,) int64: the product of each row; a group has the id of the product whose row comes first."""
    first = np.full(len(products), len(facts))
    np.minimum.at(first, groups[inverse], np.arange(len(facts)))
    return facts.product[first[groups[inverse]]]


def _large_group(product: np.ndarray) -> Iterator[str]:
    counts = np.unique(product, return_counts=True)[1]
    if counts.max() > max(100, len(product) // 20):
        yield (
            f"warning: the largest product has {counts.max():,} of {len(product):,} rows: photos that many products "
            "share, such as one that says that there is no photo, or titles that say little, merge what is different"
        )


def _sides(folder: Path, tasks: int, facts: Facts, keys: np.ndarray, args: PrepareArguments) -> Sides:
    if args.split_by == "product":
        return by_product(keys, shares_of(args.split_shares), args.seed)
    if args.split_by == "time":
        times = np.fromiter(map(time_of_value, _cells(folder, tasks, args.split_column)), np.float64)
        return by_time(keys, times, shares_of(args.split_shares))
    if args.split_by == "column":
        named = [split_of_value(value) for value in _cells(folder, tasks, args.split_column)]
        return as_named(keys, named, args.leaks)
    return as_named(keys, [facts.split_names[number] for number in facts.split.tolist()], args.leaks)


def _cells(folder: Path, tasks: int, column: str) -> Iterator[Any]:
    """A column of the data, of the rows that can be used."""
    there = False
    for table in read_facts(folder / PARTS, tasks, ["reason", f"{OTHER}{column}"]):
        table = table.filter(pc.is_null(table["reason"]))
        if f"{OTHER}{column}" in table.column_names:
            there = True
            yield from table[f"{OTHER}{column}"].to_pylist()
        else:
            yield from [None] * len(table)
    if not there:
        raise UsageError(f"the data has no column '{column}' (--split_column)")


def _decodable(kind: pa.DataType) -> pa.DataType:
    """The type, or text where `datasets` has none for it."""
    from datasets import Features

    try:
        Features.from_arrow_schema(pa.schema([pa.field("x", kind)]))
    except (*NOT_OF_THE_TYPE, NotImplementedError):
        return pa.string()
    return kind


def _written_as_ours(facts: Facts, selected: Sequence[Columns]) -> set[str | None]:
    """The data's columns that `caption` and `product_id` hold already."""
    ids = {columns.product_id for columns in selected}
    return {columns.caption for columns in selected} | (ids & {"product_id"} if not facts.stated else set())


def _names(
    types: dict[str, pa.DataType], facts: Facts, selected: Sequence[Columns]
) -> tuple[dict[str, str], list[str], list[str]]:
    """What the data's columns are called, which of our own come beside them, and what is to be told of it."""
    ours = _written_as_ours(facts, selected)
    own = {"image", "caption", "product_id", "source_row"}
    extra = ["caption_given"] if facts.cleaned else []
    told: list[str] = []
    names: dict[str, str] = {}
    for name in types:
        if name in ours:
            if name not in own:
                told.append(f"the data's column '{name}' is called 'caption'")
            continue
        called = name
        while called in own or called in extra or called in names.values():
            called = f"{called}_given"
        names[name] = called
        if called != name:
            told.append(f"the data's column '{name}' is called '{called}'")
    return names, extra, told


def _shards(
    facts: Facts, product: np.ndarray, sides: Sides, args: PrepareArguments
) -> tuple[ShardPlan, dict[str, int], dict[str, int]]:
    order, shards, rows, products, begin = [], [], {}, {}, 0
    for number, name in enumerate(sides.names):
        chosen = np.flatnonzero(sides.side == number)
        if not len(chosen):
            continue
        multiple = args.for_ranks * args.for_workers if name == TRAIN else 1
        count = num_shards(len(chosen), int(facts.kept[chosen].sum()), args.shard_mb * 2**20, multiple)
        shards += cut(name, begin, len(chosen), count)
        order.append(chosen)
        begin += len(chosen)
        rows[name], products[name] = len(chosen), len(np.unique(product[chosen]))
    if not order:
        raise UsageError("no row is in any split: see --split_by")
    chosen = np.concatenate(order)
    return ShardPlan(shards, facts.row[chosen], product[chosen], None, None, {}), rows, products


def write_rejected(path: Path, folder: Path, tasks: int, facts: Facts, sides: Sides) -> int:
    """Every row that is not in the catalogue: its number, split, name and reason. Returns how many.

    Args:
        path: of the Parquet file.
        folder: of the work.
    """
    schema = pa.schema(
        [("source_row", pa.int64()), ("split", pa.string()), ("name", pa.string()), ("reason", pa.string())]
    )
    reasons = {int(facts.row[place]): reason for place, reason in sides.reasons.items()}
    count = 0
    with new_file(path) as file, pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for table in read_facts(folder / PARTS, tasks, ["row", "split", "name", "reason"]):
            late = [reasons.get(row) for row in table["row"].to_pylist()] if reasons else [None] * len(table)
            told = [one or other for one, other in zip(table["reason"].to_pylist(), late, strict=True)]
            table = table.set_column(3, "reason", pa.array(told, pa.string()))
            table = table.filter(pc.is_valid(table["reason"])).rename_columns(schema.names)
            count += len(table)
            writer.write_table(table.cast(schema))
    return count
