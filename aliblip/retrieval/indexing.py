"""The approximate index of a gallery: which one for how many rows, how it is asked, and how good it is.

    settings = index_settings(rows=1_000_000, width=256)     # None: exact search is fast enough
    create_index(dataset, settings)
    positions, scores = nearest(dataset, queries, k=10, settings=settings, where=None)

An inverted file (IVF) sorts the vectors into lists, of which a query looks at the nearest `nprobes`. The vectors in
them are compared in a short form (PQ, SQ), and of the best `refine_factor` x k the true scores are computed.

Legend: Q queries, E width, k results of a query.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from torch import Tensor

from aliblip.retrieval.tables import VECTOR
from aliblip.runtime.mistakes import UsageError

__all__ = ["FEW_MATCHES", "INDEX_KINDS", "IndexSettings", "create_index", "index_settings", "nearest", "recall"]

INDEX_KINDS = ("IVF_FLAT", "IVF_PQ", "IVF_SQ", "IVF_HNSW_SQ", "IVF_HNSW_PQ")
# Below it, all vectors are compared in less time than a page takes to show the photos.
FEWEST_ROWS = 50_000
# A filter that leaves no more rows is faster, and exact, without the index.
FEW_MATCHES = 5_000
# At most so many times `nprobes` lists are looked at for a filter: the best of what it leaves lie further away.
MOST_PROBES = 16
# Of a product quantiser, which learns so many codes a part.
PQ_ROWS = 256


@dataclass(frozen=True)
class IndexSettings:
    """How an index is built and asked.

    Attributes:
        kind: one of `INDEX_KINDS`.
        num_partitions: lists.
        num_sub_vectors: parts that a vector's short form has; None: no PQ.
        nprobes: lists that a query looks at; with a filter more, see `nearest`.
        refine_factor: so many times k of the found are compared again by their true vectors; None: none.
        ef: candidates that a graph (HNSW) keeps during a search; None: no graph.
    """

    kind: str
    num_partitions: int
    num_sub_vectors: int | None = None
    nprobes: int = 20
    refine_factor: int | None = None
    ef: int | None = None

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> IndexSettings:
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in found.items() if name in known})


def index_settings(rows: int, width: int, kind: str | None = None) -> IndexSettings | None:
    """The settings for so many rows, chosen for a recall@10 of 0.95 and more.

    Args:
        kind: one of `INDEX_KINDS`; None: the best for the size, or none at all below 50,000 rows.

    Raises:
        UsageError: an unknown kind, or too few rows for it.
    """
    if kind is None:
        if rows < FEWEST_ROWS:
            return None
        kind = "IVF_PQ"
    if kind not in INDEX_KINDS:
        raise UsageError(f"the kind of the index is {kind!r}: choose one of {', '.join(INDEX_KINDS)}")
    if kind.endswith("PQ") and rows < PQ_ROWS:
        raise UsageError(f"an index of the kind {kind} takes {PQ_ROWS} rows, the gallery has {rows}: leave it out")
    lists = max(round(rows**0.5), 1)
    if "HNSW" in kind:
        lists = max(rows // 500_000, 1)
    return IndexSettings(
        kind=kind,
        num_partitions=lists,
        num_sub_vectors=_sub_vectors(width) if kind.endswith("PQ") else None,
        nprobes=max(1, min(lists, 64 if rows <= 2_000_000 else 160)) if "HNSW" not in kind else lists,
        refine_factor=None if kind == "IVF_FLAT" else 10,
        ef=200 if "HNSW" in kind else None,
    )


def _sub_vectors(width: int) -> int:
    """Parts of about four numbers each."""
    return next(count for count in range(max(width // 4, 1), 0, -1) if width % count == 0)


def create_index(dataset, settings: IndexSettings) -> None:
    """Make the index, in place of one that is there. One commit."""
    options: dict[str, Any] = {"num_partitions": settings.num_partitions}
    if settings.num_sub_vectors is not None:
        options["num_sub_vectors"] = settings.num_sub_vectors
    dataset.create_index(VECTOR, settings.kind, metric="dot", replace=True, **options)


def nearest(
    dataset, queries: Tensor, k: int, settings: IndexSettings, where: str | None = None, share: float = 1.0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The k best of each query by the index, with a filter applied before; rows that came after it are compared too.

    Args:
        queries: (Q, E) fp32.
        share: of the rows that the filter leaves. The smaller, the further away are the best of them, and the more
            lists are looked at.

    Returns:
        For each query the positions (int64) and scores (fp32) of at most k rows, best first, of equal scores the lower
        position first.
    """
    probes = min(settings.num_partitions, round(settings.nprobes * min(1 / share, MOST_PROBES)))
    # Not `minimum_nprobes`: with it Lance ends the search by a rule of its own, which finds less.
    options: dict[str, Any] = {"column": VECTOR, "k": k, "metric": "dot", "nprobes": probes}
    if settings.refine_factor is not None:
        options["refine_factor"] = settings.refine_factor
    if settings.ef is not None:
        options["ef"] = max(settings.ef, k * (settings.refine_factor or 1))
    found = []
    for query in queries.numpy():
        table = dataset.scanner(
            columns=["_distance"], nearest={"q": query, **options}, filter=where, prefilter=True, with_row_id=True
        ).to_table()
        positions = table.column("_rowid").to_numpy().astype(np.int64)
        scores = 1 - table.column("_distance").to_numpy()  # Lance's distance of dot products
        order = np.lexsort((positions, -scores))
        found.append((positions[order], scores[order].astype(np.float32)))
    return found


def recall(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Share of the wanted positions that were found, over all queries."""
    shares = [len(np.intersect1d(one, other)) / max(len(other), 1) for one, other in zip(found, wanted, strict=True)]
    return float(np.mean(shares)) if shares else 1.0
