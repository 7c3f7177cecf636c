"""Exact search of a gallery's table, the reference for every index: all vectors, read in batches or kept in memory.

Of equal scores the lower position comes first, and equal vectors have equal scores: what is multiplied together is
always a multiple of 64 rows, since the last bits of a product depend on where in a remainder its row stands.

Legend: Q queries, E width, n rows of a chunk, k results of a query.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aliblip.retrieval.tables import VECTOR
from retrieval_aliblip import GALLERY_CHUNK, QUERY_BLOCK, order_by_score, running_top_k

__all__ = ["CACHE_BYTES", "VectorCache", "search_exactly"]

# Vectors of a table that is not larger stay in memory, so that a small gallery needs no index.
CACHE_BYTES = 2**28
_MULTIPLE = 64


class VectorCache:
    """The vectors of the newest version of a table that were asked for, if they are few. Safe from many threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._kept: tuple[int, np.ndarray, Tensor] | None = None

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def of(self, dataset, rows: int, width: int) -> tuple[np.ndarray, Tensor] | None:
        """Positions (rising) and vectors (N, E) of a version; None: they are too many."""
        if rows * width * 4 > CACHE_BYTES:
            return None
        with self._lock:
            kept = self._kept
            if kept is not None and kept[0] == dataset.version:
                return kept[1:]
            chunks = list(_chunks(dataset, None, width))
            positions = np.concatenate([one for one, _ in chunks] or [np.empty(0, np.int64)])
            vectors = torch.cat([one for _, one in chunks] or [torch.empty(0, width)])
            order = np.argsort(positions, kind="stable")
            if not np.array_equal(order, np.arange(len(order))):
                positions, vectors = positions[order], vectors[torch.from_numpy(order)]
            if kept is None or kept[0] < dataset.version:  # not that of an older snapshot
                self._kept = (dataset.version, positions, vectors)
            return positions, vectors


def search_exactly(
    dataset, queries: Tensor, k: int, *, rows: int, where: str | None = None, cache: VectorCache | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """As `aliblip.retrieval.indexing.nearest`, by comparing all rows that the filter leaves."""
    width = queries.shape[1]
    kept = None if cache is None else cache.of(dataset, rows, width)
    found = []
    for block in queries.split(QUERY_BLOCK):
        best = None
        for positions, vectors in _kept_chunks(dataset, kept, where) if kept else _chunks(dataset, where, width):
            scores, ids = _best_of_chunk(block, positions, vectors, k)
            if best is not None:
                scores, ids = torch.cat([best[0], scores], dim=1), torch.cat([best[1], ids], dim=1)
                scores, ids = order_by_score(scores, ids)
            best = scores[:, :k], ids[:, :k]
        if best is None:
            best = torch.empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.int64)
        found += [(ids.numpy(), scores.numpy()) for scores, ids in zip(*best, strict=True)]
    return found


def _best_of_chunk(queries: Tensor, positions: np.ndarray, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    padding = -len(vectors) % _MULTIPLE
    padded = F.pad(vectors, (0, 0, 0, padding)) if padding else vectors
    scores = (queries @ padded.t())[:, : len(vectors)]
    scores, columns = running_top_k([(0, scores)], min(k, len(vectors)))
    return scores, torch.from_numpy(positions)[columns]


def _kept_chunks(dataset, kept: tuple[np.ndarray, Tensor], where: str | None) -> Iterator[tuple[np.ndarray, Tensor]]:
    positions, vectors = kept
    chosen = None
    if where is not None:
        allowed = dataset.scanner(columns=[], with_row_id=True, filter=where).to_table().column("_rowid").to_numpy()
        chosen = np.searchsorted(positions, np.sort(allowed.astype(np.int64)))
    for start in range(0, len(positions) if chosen is None else len(chosen), GALLERY_CHUNK):
        if chosen is None:
            yield positions[start : start + GALLERY_CHUNK], vectors[start : start + GALLERY_CHUNK]
        else:
            places = chosen[start : start + GALLERY_CHUNK]
            yield positions[places], vectors[torch.from_numpy(places)]


def _chunks(dataset, where: str | None, width: int) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Positions and vectors (n, E) of a version in chunks, the positions of each rising."""
    scanner = dataset.scanner(columns=[VECTOR], with_row_id=True, filter=where, batch_size=GALLERY_CHUNK)
    for batch in scanner.to_batches():
        if not len(batch):
            continue
        positions = batch.column("_rowid").to_numpy().astype(np.int64)
        column = batch.column(VECTOR)
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        if not (positions[1:] > positions[:-1]).all():
            order = np.argsort(positions)
            positions, values = positions[order], values[order]
        # A copy where Arrow's memory is read only, which torch does not like.
        yield positions, torch.from_numpy(values if values.flags.writeable else values.copy())
