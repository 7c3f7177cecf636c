"""One version of a gallery's table, opened, and what is asked of it.

A view is never changed, only replaced by one of another version: what a call reads through one view belongs together.

Legend: Q queries, E width, k results of a query.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from aliblip.data.collate import printable
from aliblip.data.rows import Row, decode
from aliblip.retrieval.exact import FEW_CHOSEN, VectorCache, rows_left, search_exactly
from aliblip.retrieval.indexing import FEW_MATCHES, IndexSettings, nearest, recall
from aliblip.retrieval.tables import ID, PHOTO_ROOT, THUMBNAIL, TOKENS, VECTOR, Facts, indexed_columns, reason_of
from aliblip.retrieval.where import Where, columns_told, filter_of
from aliblip.runtime.mistakes import UsageError, shortened, usage_errors
from encoder_aliblip import TOKEN_TYPE, is_finite

__all__ = ["IndexReport", "View", "checked_ids", "checked_queries", "photo_at"]

# Columns that only come if they are asked for by name, and that never come.
_LARGE, _HIDDEN = (THUMBNAIL,), (VECTOR, TOKENS)
# Ids or positions in one condition.
AT_ONCE = 1000
RECALL_AT = 10


@dataclass(frozen=True)
class IndexReport:
    """What `create_index` made. `str` makes it readable.

    Attributes:
        rows: of the gallery.
        settings: of the vector index; None: there is none, exact search is fast enough.
        columns: that have an index of their own, for filters.
        seconds: that it took.
        recall_at_10: share of the ten best by exact search that the index finds, over `queries` of the gallery's own
            vectors; None: not measured.
        milliseconds: of a query, one after another, in that measurement.
    """

    rows: int
    settings: IndexSettings | None
    columns: tuple[str, ...]
    seconds: float
    queries: int = 0
    recall_at_10: float | None = None
    milliseconds: float | None = None

    def __str__(self) -> str:
        if self.settings is None:
            told = f"{self.rows:,} rows: no index of the vectors, exact search is fast enough"
        else:
            given = ", ".join(f"{name} {value}" for name, value in self.settings.as_json().items() if name != "kind")
            told = f"{self.rows:,} rows: {self.settings.kind}, {given}"
        told += f"; indexed for filters: {', '.join(self.columns) or 'no column'} ({self.seconds:.1f} s)"
        if self.recall_at_10 is not None:
            told += f"\nrecall@10 {self.recall_at_10:.4f} of exact search, {self.milliseconds:.1f} ms a query"
            told += f" ({self.queries:,} vectors of the gallery searched for)"
        return told


@dataclass(frozen=True)
class View:
    """One version of the table `items`.

    Attributes:
        dataset: Lance's, at that version.
        facts: of the gallery.
        cache: of its vectors, shared by all views of a gallery.
    """

    dataset: Any
    facts: Facts
    cache: VectorCache

    @cached_property
    def rows(self) -> int:
        return self.dataset.count_rows()

    @cached_property
    def schema(self) -> pa.Schema:
        return self.dataset.schema

    @cached_property
    def photo_root(self) -> str | None:
        """The folder of the photos where the gallery was built."""
        return self.dataset.config().get(PHOTO_ROOT)

    @cached_property
    def index(self) -> IndexSettings | None:
        """Of the vector index, if there is one."""
        found = indexed_columns(self.dataset).get(VECTOR)
        if found is None:
            return None
        kept = self.facts.index or {}
        numbers = [value for name, value in kept.items() if name != "kind"]
        if kept.get("kind") == found.index_type and all(isinstance(value, int) and value > 0 for value in numbers):
            with suppress(TypeError):  # one is missing
                return IndexSettings.from_json(kept)
        return IndexSettings(found.index_type, 1, nprobes=64, refine_factor=10)  # made by somebody else

    @cached_property
    def searchable(self) -> pa.Schema:
        """The columns that a filter may name."""
        return pa.schema([field for field in self.schema if field.name not in (*_HIDDEN, *_LARGE)])

    def names(self, columns: Sequence[str] | None) -> list[str]:
        """The columns that are asked for, and the id; None: all but the large ones.

        Raises:
            UsageError: one that is not there, or is never given.
        """
        if columns is None:
            return self.searchable.names
        if isinstance(columns, str):
            raise UsageError(f"columns is {columns!r}: give a list of names")
        for name in columns:
            if name in _HIDDEN:
                raise UsageError(f"the column {name!r} is not given with results: leave it out")
            if name not in self.schema.names:
                raise UsageError(f"the gallery has no column {name!r}: {columns_told(self.searchable)}")
        return list(dict.fromkeys([ID, *columns]))

    # --- filters ------------------------------------------------------------------------------------------------------

    @contextmanager
    def filtered(self, where: Where | None, values: Mapping[str, Any] | None = None) -> Iterator[str | None]:
        """The filter as Lance takes it, and what goes wrong with it as a UsageError."""
        text = filter_of(where, values, self.searchable)
        try:
            yield text
        except UsageError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            if text is None:
                raise
            try:
                self.dataset.count_rows(text)
            except (OSError, ValueError, RuntimeError) as again:
                if "not found" in str(again).lower():
                    raise
                told = f"the filter {shortened(repr(where))} can't be used ({reason_of(again)})"
                raise UsageError(f"{told}; {columns_told(self.searchable)}") from error
            raise

    # --- search -------------------------------------------------------------------------------------------------------

    def hits(
        self,
        queries: Tensor,
        k: int,
        where: Where | None,
        values: Mapping[str, Any] | None,
        approximate: bool | None,
        columns: Sequence[str] | None,
    ) -> list[list[dict[str, Any]]]:
        """As `Gallery.search`."""
        names = self.names(columns)
        with self.filtered(where, values) as text:
            found = self.found(queries, k, text, approximate)
            rows = self.take((position for positions, _ in found for position in positions), names)
        return [
            [
                {ID: rows[position][ID], "itc": score, "position": position, **rows[position]}
                for position, score in zip(positions.tolist(), scores.tolist(), strict=True)
            ]
            for positions, scores in found
        ]

    def found(
        self, queries: Tensor, k: int, where: str | None, approximate: bool | None
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Positions and scores of the k best of each query."""
        k = min(k, max(self.rows, 1))
        if approximate and self.index is None:
            raise UsageError("the gallery has no index: call create_index(), or leave approximate out")
        share = 1.0
        if where is not None:
            pieces = self.cache.ready(self.dataset) if self.index is None or approximate is False else ()
            matches = rows_left(self.dataset, where, self.cache, self.rows, pieces).rows
            if matches <= FEW_MATCHES:  # read in less time than what is kept of all rows is looked through
                return search_exactly(self.dataset, queries, k, rows=self.rows, where=where)
            share = matches / self.rows
            if share <= FEW_CHOSEN and approximate is None:  # the best of what a filter leaves lie in many lists
                approximate = False if self.cache.is_quick(self.dataset, self.rows, queries.shape[1]) else None
        if self.index is None or approximate is False:
            return self._exactly(queries, k, where)
        found = nearest(self.dataset, queries, k, self.index, where, share)
        lacking = [query for query, (positions, _) in enumerate(found) if len(positions) < min(k, self.rows)]
        if lacking:  # the filter leaves no more, or the index has not found them
            for query, result in zip(lacking, self._exactly(queries[lacking], k, where), strict=True):
                found[query] = result
        return found

    def _exactly(self, queries: Tensor, k: int, where: str | None) -> list[tuple[np.ndarray, np.ndarray]]:
        return search_exactly(self.dataset, queries, k, rows=self.rows, where=where, cache=self.cache)

    def measured_recall(self, count: int) -> dict[str, Any]:
        """Of the index against exact search, as `IndexReport` has it, with vectors of the gallery as queries."""
        positions = self.some_positions(count, seed=0)
        queries = torch.cat(
            [self._vectors(some) for some in np.split(positions, range(AT_ONCE, len(positions), AT_ONCE))]
        )
        start = time.perf_counter()
        found = nearest(self.dataset, queries, RECALL_AT, self.index)
        milliseconds = (time.perf_counter() - start) / len(queries) * 1000
        wanted = self._exactly(queries, RECALL_AT, None)
        share = recall([one for one, _ in found], [one for one, _ in wanted])
        return {"queries": len(queries), "recall_at_10": share, "milliseconds": milliseconds}

    def _vectors(self, positions: Iterable[int]) -> Tensor:
        """(n, E) of some rows, in any order."""
        column = self._at(positions, [VECTOR]).column(VECTOR).combine_chunks().flatten()
        return torch.from_numpy(column.to_numpy(zero_copy_only=False).reshape(-1, self.facts.width).copy())

    # --- rows ---------------------------------------------------------------------------------------------------------

    def _at(self, positions: Iterable[int], names: Sequence[str]) -> pa.Table:
        where = f"_rowid IN ({', '.join(str(int(position)) for position in positions)})"
        return self.dataset.scanner(columns=list(names), filter=where, with_row_id=True).to_table()

    def take(self, positions: Iterable[int], names: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Rows by position."""
        found, positions = {}, iter(dict.fromkeys(int(position) for position in positions))
        while some := list(islice(positions, AT_ONCE)):
            table = self._at(some, names)
            rows = table.drop_columns(["_rowid"]).to_pylist()
            found |= dict(zip(table.column("_rowid").to_pylist(), rows, strict=True))
        return found

    def take_tokens(self, positions: Sequence[int]) -> tuple[list[int], Tensor]:
        """Image tokens (n, P, D) bf16 of rows, and the positions that they are of; rows that are gone or have no tokens
        are missing."""
        table = self._at(dict.fromkeys(positions), [TOKENS])
        table = table.filter(table.column(TOKENS).is_valid())
        bits = table.column(TOKENS).combine_chunks().flatten().to_numpy(zero_copy_only=False)
        tokens = torch.from_numpy(bits.reshape(len(table), *self.facts.token_shape).copy()).view(TOKEN_TYPE)
        return table.column("_rowid").to_pylist(), tokens

    def with_ids(self, ids: Sequence[str | int], names: Sequence[str]) -> dict[Any, dict[str, Any]]:
        """Rows by id, with their positions."""
        found = {}
        for start in range(0, len(ids), AT_ONCE):
            with self.filtered(f"{ID} IN :ids", {"ids": list(ids[start : start + AT_ONCE])}) as text:
                table = self.dataset.scanner(columns=list(names), filter=text, with_row_id=True).to_table()
            for position, row in zip(
                table.column("_rowid").to_pylist(), table.drop_columns(["_rowid"]).to_pylist(), strict=True
            ):
                found[row[ID]] = {ID: row[ID], "position": position, **row}
        return found

    def some_positions(self, count: int, seed: int) -> np.ndarray:
        """Positions of `count` rows, randomly chosen, rising; of all where there are fewer."""
        positions = self.dataset.scanner(columns=[], with_row_id=True).to_table().column("_rowid").to_numpy()
        if count < len(positions):
            positions = np.random.default_rng(seed).choice(positions, max(count, 0), replace=False)
        return np.sort(positions.astype(np.int64))

    def distinct(self, column: str, limit: int) -> list[Any] | None:
        """As `Gallery.values`."""
        if pa.types.is_nested(self.schema.field(self.names([column])[-1]).type):
            return None
        found: set = set()
        for batch in self.dataset.scanner(columns=[column]).to_batches():
            found |= set(batch.column(0).unique().to_pylist())
            if len(found - {None}) > limit:
                return None
        return sorted(found - {None})


# --- what comes from outside ------------------------------------------------------------------------------------------


def checked_queries(vectors: Tensor, width: int) -> Tensor:
    """(Q, E) fp32 on the CPU.

    Raises:
        UsageError: another width, or values that are not finite.
    """
    with usage_errors(TypeError, ValueError, RuntimeError, told="the queries are no vectors ({}): give (Q, E) numbers"):
        queries = torch.as_tensor(vectors).detach().cpu().float()
    if queries.dim() == 1:
        queries = queries[None]
    if queries.dim() != 2 or queries.shape[1] != width:
        raise UsageError(f"queries of shape {tuple(queries.shape)} given, the gallery takes (Q, {width})")
    if not is_finite(queries):
        raise UsageError("the queries are not all finite: the model's weights or its precision are broken")
    return queries.contiguous()


def checked_ids(ids: Iterable[str | int], schema: pa.Schema) -> list[str | int]:
    """Ids as the gallery has them, in their order.

    Raises:
        UsageError: they are of another type than the gallery's.
    """
    if isinstance(ids, (str, bytes, int, Mapping)) or not isinstance(ids, Iterable):
        raise UsageError(f"ids is {shortened(repr(ids))}: give a list")
    is_text = pa.types.is_string(schema.field(ID).type)
    ids = [value.item() if isinstance(value, np.generic) else value for value in ids]
    for value in ids:
        is_whole = isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
        if not (isinstance(value, str) if is_text else is_whole):
            what = "text" if is_text else "whole numbers of 64 bits"
            raise UsageError(f"{shortened(repr(value))} is no id of this gallery: its ids are {what}")
    return list(map(printable, ids)) if is_text else ids


def photo_at(path: str):
    """The photo at a path or an address, as PIL RGB.

    Raises:
        UnusableItem: it can't be read.
    """
    return decode(Row(0, path, None, 0, path), "images").image
