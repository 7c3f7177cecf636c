"""Retrieval metrics as pure functions of arrays, with many-to-many truth.

Truth is explicit: every query and every gallery item carries a product id, and the positives of a query are the gallery
items with its id. A query may have several positives or none. A photo that several products share carries the ids of
all of them (`Products`).

    rank        position of a query's best-placed positive, counted from 1; 0 for a query without any positive
    recall@k    share of the queries whose rank is at most k (one positive among the k best is a hit), as a fraction

Queries without a positive are left out of every average; `summarize_ranks` counts them. Ties go to the lower gallery
id, everywhere.

Legend: Q queries, N gallery items, n items of one chunk, K length of a ranking.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

RECALL_AT = (1, 5, 10)

ScoreChunks = Callable[[], Iterable[tuple[int, Tensor]]]


@dataclass(frozen=True)
class Products:
    """The products of N queries or gallery items: of each `first` (N,) int64, and `further` ones, (X, 2) int64 of item
    and product, where a photo is that of several."""

    first: Tensor
    further: Tensor

    @classmethod
    def of(cls, products: "Products | Tensor") -> "Products":
        """Products as they are, or (N,) int64 of one product each."""
        if isinstance(products, cls):
            return products
        return cls(products, products.new_zeros(0, 2))

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, chosen: slice) -> "Products":
        start, stop, _ = chosen.indices(len(self))
        inside = (self.further[:, 0] >= start) & (self.further[:, 0] < stop)
        return Products(self.first[chosen], self.further[inside] - self.further.new_tensor([start, 0]))

    def to(self, device: torch.device) -> "Products":
        return Products(self.first.to(device), self.further.to(device))


def positives_among(queries: Products, items: Products) -> Tensor:
    """(Q, n) bool: whether query and item show the same product."""
    positive = queries.first[:, None] == items.first[None, :]
    for query, item in _shared(queries, items):
        positive[query, item] = True
    return positive


def _shared(queries: Products, items: Products) -> Iterable[tuple[Tensor, Tensor]]:
    """Pairs of a query and an item that share a product which is not the first of both."""
    if len(items.further):
        item, product = items.further.unbind(1)
        query, place = (queries.first[:, None] == product[None, :]).nonzero(as_tuple=True)
        yield query, item[place]
    if len(queries.further):
        query, product = queries.further.unbind(1)
        place, item = (product[:, None] == items.first[None, :]).nonzero(as_tuple=True)
        yield query[place], item
    if len(queries.further) and len(items.further):
        mine, theirs = (queries.further[:, None, 1] == items.further[None, :, 1]).nonzero(as_tuple=True)
        yield queries.further[mine, 0], items.further[theirs, 0]


def positives_in(rankings: Tensor, queries: Products, items: Products) -> Tensor:
    """(Q, K) bool: which of the ranked items show the query's product."""
    hit = items.first[rankings] == queries.first[:, None]
    keys = [query * len(items) + item for query, item in _shared(queries, items)]
    if keys:
        pairs = torch.arange(len(queries), device=rankings.device)[:, None] * len(items) + rankings
        hit |= torch.isin(pairs, torch.cat(keys))
    return hit


def best_positive_ranks(
    score_chunks: ScoreChunks, query_product_id: Products | Tensor, gallery_product_id: Products | Tensor
) -> Tensor:
    """Exact rank of every query's best positive in the whole gallery, without a sort and without the whole score
    matrix.

    The rank is one more than the number of gallery items with a higher score, or with the same score and a lower id.
    That needs the score of the best positive first, so the chunks are read twice.

    Args:
        score_chunks: called twice; each call yields `(start, scores)` over the gallery, `scores` (Q, n) for the items
            `start .. start + n - 1`. Both calls have to yield the same bits.
        query_product_id: of the Q queries, (Q,) int64 where each has one.
        gallery_product_id: of the N gallery items, (N,) int64 where each has one.

    Returns:
        (Q,) int64 ranks from 1, 0 where the gallery holds no positive.

    Raises:
        ValueError: if the chunks do not cover the gallery exactly once, in order.
    """
    queries, gallery = Products.of(query_product_id), Products.of(gallery_product_id)
    device = queries.first.device
    best_score = torch.full(queries.first.shape, -torch.inf, device=device)  # (Q,)
    best_id = torch.full(queries.first.shape, -1, dtype=torch.int64, device=device)  # (Q,)
    seen = 0
    for start, scores in score_chunks():
        if start != seen:
            raise ValueError(
                f"score chunks must follow one another: expected a chunk from {seen}, got one from {start}"
            )
        seen = start + scores.shape[1]
        positive = positives_among(queries, gallery[start:seen])  # (Q, n)
        # max(dim) returns the first of equal maxima, which is the lower id
        score, index = scores.masked_fill(~positive, -torch.inf).max(dim=1)
        better = positive.any(dim=1) & ((best_id < 0) | (score > best_score))
        best_score = torch.where(better, score, best_score)
        best_id = torch.where(better, index + start, best_id)
    if seen != len(gallery):
        raise ValueError(f"score chunks cover {seen} gallery items, the product ids {len(gallery)}")

    ahead = torch.zeros_like(best_id)  # (Q,)
    for start, scores in score_chunks():
        ids = torch.arange(start, start + scores.shape[1], device=device)
        equal_and_lower = (scores == best_score[:, None]) & (ids[None, :] < best_id[:, None])  # (Q, n)
        ahead += ((scores > best_score[:, None]) | equal_and_lower).sum(dim=1)
    return torch.where(best_id >= 0, ahead + 1, 0)


def ranks_in_rankings(
    rankings: Tensor, query_product_id: Products | Tensor, gallery_product_id: Products | Tensor
) -> Tensor:
    """Rank of the best positive inside rankings that may be shorter than the gallery.

    Args:
        rankings: (Q, K) int64 gallery ids, best first.
        query_product_id, gallery_product_id: as in `best_positive_ranks`.

    Returns:
        (Q,) int64 ranks from 1, 0 where no positive stands among the K.
    """
    hit = positives_in(rankings, Products.of(query_product_id), Products.of(gallery_product_id))  # (Q, K)
    return torch.where(hit.any(dim=1), hit.int().argmax(dim=1) + 1, 0)


def ranks_after_reranking(
    reranked: Tensor,
    first_ranks: Tensor,
    query_product_id: Products | Tensor,
    gallery_product_id: Products | Tensor,
) -> Tensor:
    """Ranks when the K best of a first stage were put into a new order and everything else follows in the order of that
    stage.

    Re-ordering the K best leaves every later place alone: the rank is the place inside `reranked` if a positive stands
    there, and the rank of the first stage otherwise.

    Args:
        reranked: (Q, K) int64 gallery ids, the K best of the first stage in their new order.
        first_ranks: (Q,) int64 from `best_positive_ranks`.
        query_product_id, gallery_product_id: as there.

    Returns:
        (Q,) int64 ranks from 1, 0 where the gallery holds no positive.
    """
    inside = ranks_in_rankings(reranked, query_product_id, gallery_product_id)
    return torch.where(inside > 0, inside, first_ranks)


def ranks_from_positives(rankings: Sequence[Sequence[int]], positives: Sequence[Sequence[int]]) -> np.ndarray:
    """Ranks for truth given as lists of gallery ids instead of product ids.

    Args:
        rankings: for each query gallery ids, best first; whole rankings, or the part that recall is asked about.
        positives: for each query the ids of its positives; may be empty.

    Returns:
        (Q,) int64 ranks from 1; 0 for a query without positives; one more than the length of the ranking if no positive
        stands in it (a lower bound of the true rank: right for recall up to that length, not for mean or median).

    Raises:
        ValueError: if the two lists differ in length.
    """
    if len(rankings) != len(positives):
        raise ValueError(
            f"one list of positives per ranking is needed: got {len(rankings)} rankings, {len(positives)} lists"
        )
    ranks = np.zeros(len(rankings), dtype=np.int64)
    for query, (ranking, right) in enumerate(zip(rankings, positives, strict=True)):
        right = set(right)
        if right:
            ranks[query] = next((place for place, item in enumerate(ranking, 1) if item in right), len(ranking) + 1)
    return ranks


def recall_at_k(ranks: np.ndarray, k: int) -> float:
    """Share of the queries (those with a positive) whose rank is at most `k`, in [0, 1]; nan if no query has one.

    Raises:
        ValueError: if `k` is smaller than 1.
    """
    if k < 1:
        raise ValueError(f"recall@k needs k of at least 1, got {k}")
    ranks = _with_positive(ranks)
    return float((ranks <= k).mean()) if len(ranks) else float("nan")


def mean_rank(ranks: np.ndarray) -> float:
    """Mean rank over the queries with a positive, at least 1; nan if there is none."""
    ranks = _with_positive(ranks)
    return float(ranks.mean()) if len(ranks) else float("nan")


def median_rank(ranks: np.ndarray) -> float:
    """Median rank over the queries with a positive (the mean of the two middle ones of an even number); nan if there is
    none."""
    ranks = _with_positive(ranks)
    return float(np.median(ranks)) if len(ranks) else float("nan")


def summarize_ranks(ranks: np.ndarray, k: Sequence[int] = RECALL_AT) -> dict[str, float | int]:
    """All numbers of one ranking direction.

    Args:
        ranks: (Q,) integers from one of the functions above, 0 for a query without a positive.
        k: the k of recall@k.

    Returns:
        `recall@k` for every k, `mean_recall` (their mean), `median_rank`, `mean_rank`, `num_queries` (that were
        averaged over) and `num_queries_without_positive` (that were not). Recalls are fractions.

    Raises:
        ValueError: if `k` is empty or holds a number below 1.
    """
    if not len(k):
        raise ValueError("recall needs at least one k, for instance (1, 5, 10)")
    ranks = np.asarray(ranks)
    summary: dict[str, float | int] = {f"recall@{at}": recall_at_k(ranks, at) for at in k}
    summary["mean_recall"] = float(np.mean([summary[f"recall@{at}"] for at in k]))
    summary["median_rank"] = median_rank(ranks)
    summary["mean_rank"] = mean_rank(ranks)
    summary["num_queries"] = int((ranks > 0).sum())
    summary["num_queries_without_positive"] = int((ranks == 0).sum())
    return summary


def _with_positive(ranks: np.ndarray) -> np.ndarray:
    ranks = np.asarray(ranks)
    return ranks[ranks > 0]


# --- intervals --------------------------------------------------------------------------------------------------------

RESAMPLES = 1000
_LEVEL = (2.5, 97.5)


def bootstrap_means(
    values: np.ndarray, product_id: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> np.ndarray:
    """Means over queries in bootstrap resamples (Efron 1979).

    Products are drawn with replacement, each with all its queries: titles of one product share their right answers, and
    drawn one by one they would make the interval too narrow. The draw depends on the set of products, the seed and
    `resamples` alone, so that means of the same products belong together: their differences are paired.

    Args:
        values: (Q, M), M numbers of every query, for instance hits of recall@1, 5 and 10.
        product_id: (Q,) int64.

    Returns:
        (resamples, M) fp64.

    Raises:
        ValueError: no query.
    """
    if not len(values):
        raise ValueError("a bootstrap needs at least one query")
    _, product, count = np.unique(product_id, return_inverse=True, return_counts=True)
    sums = np.stack([np.bincount(product, weights=column) for column in np.asarray(values, np.float64).T], axis=1)
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, sums.shape[1]))
    for row in means:
        drawn = np.bincount(generator.integers(len(count), size=len(count)), minlength=len(count))
        row[:] = drawn @ sums / (drawn @ count)
    return means


def interval(means: np.ndarray) -> list[float]:
    """The 95 % percentile interval [low, high] of (resamples,) bootstrap means."""
    return [float(value) for value in np.percentile(means, _LEVEL)]


def hits(ranks: np.ndarray, k: Sequence[int] = RECALL_AT) -> np.ndarray:
    """(Q, len(k)) fp64: 1 where the rank is at most k."""
    return (np.asarray(ranks)[:, None] <= np.asarray(k)).astype(np.float64)
