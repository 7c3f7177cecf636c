"""The first stage of an evaluation (ITC), and the order of all pairs: exact, in blocks of queries, on all processes.

    search = Search(asking=titles, searched=images, device=device, chunk=16384, has_truth=True)
    candidates, itc_ranks = search.candidates(k=128)
    rankings = search.order_all(logits, k=128, score="fused", weight=1.0)

The methods are collectives: every rank calls them, and every rank gets the results. A block of queries is searched
whole by one rank, so the results do not depend on the number of processes.

Legend: Q queries, N gallery items, k listed items of a query.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

import retrieval_aliblip as engine
from aliblip.retrieval.metrics import best_positive_ranks
from aliblip.retrieval.rankings import Candidates, Rankings, Side, score_of
from aliblip.runtime.units import gather_units, own_units


class Search:
    """One direction of a retrieval: photos of titles, or titles of photos.

    Args:
        asking, searched: the embedded queries (Q) and gallery (N).
        device: where the products are computed.
        chunk: gallery items scored at a time.
        has_truth: whether equal product ids are right answers. Otherwise there are no ranks.
    """

    def __init__(self, asking: Side, searched: Side, *, device: torch.device, chunk: int, has_truth: bool):
        self.asking, self.searched, self.device = asking, searched, device
        self.chunk, self.has_truth = chunk, has_truth
        self._queries, self._gallery = asking.embeds.to(device), searched.embeds.to(device)

    def candidates(self, k: int) -> tuple[Candidates, Tensor | None]:
        """The k best of every query, and the exact ranks (Q,) of the best positives in the whole gallery; None without
        truth. On the CPU (collective)."""

        def found(own: slice) -> tuple[Tensor, ...]:
            scores, ids = engine.search(self._queries[own], self._gallery, k, self.chunk)
            # the same products in the same shapes as the search's: ranks and rankings agree to the last bit
            return scores, ids, self._ranks(lambda: self._products(own), own)

        scores, ids, ranks = self._by_blocks("search", found)  # collective
        return Candidates(ids=ids, itc=scores), ranks if self.has_truth else None

    def order_all(self, logits: np.ndarray, k: int, score: str, weight: float) -> Rankings:
        """The k best of all pairs, and exact ranks, on the CPU (collective).

        Args:
            logits: (Q, N), the memory-mapped match logits of all pairs.
            score, weight: as in `score_of`.
        """

        def found(own: slice) -> tuple[Tensor, ...]:
            def read(start: int, stop: int) -> Tensor:
                return torch.from_numpy(np.array(logits[own, start:stop])).to(self.device)

            def scored() -> Iterator[tuple[int, Tensor]]:
                for start, itc in self._products(own):
                    yield start, score_of(itc, read(start, start + itc.shape[1]), score, weight)

            scores, ids = engine.running_top_k(scored(), k)
            itc = torch.empty_like(scores)
            itm = torch.empty_like(scores)
            for start, values in self._products(own):
                stop = start + values.shape[1]
                here = (ids >= start) & (ids < stop)
                place = torch.where(here, ids - start, 0)
                itc = torch.where(here, values.gather(1, place), itc)
                itm = torch.where(here, read(start, stop).gather(1, place), itm)
            return scores, ids, itc, itm, self._ranks(scored, own)

        scores, ids, itc, itm, ranks = self._by_blocks("ordering", found)  # collective
        return Rankings(ids=ids, scores=scores, itc=itc, itm_logits=itm, ranks=ranks if self.has_truth else None)

    def _products(self, own: slice) -> Iterator[tuple[int, Tensor]]:
        return engine.score_chunks(self._queries[own], self._gallery, self.chunk)

    def _ranks(self, chunks: Callable[[], Iterator[tuple[int, Tensor]]], own: slice) -> Tensor:
        asking = self.asking.products[own]
        if not self.has_truth:
            return torch.zeros(len(asking), dtype=torch.int64)
        return best_positive_ranks(chunks, asking.to(self.device), self.searched.products.to(self.device))

    def _by_blocks(self, name: str, found: Callable[[slice], tuple[Tensor, ...]]) -> list[Tensor]:
        """`found(slice of queries)` of all blocks of queries, each by one rank, joined on the CPU of all ranks."""
        block = engine.QUERY_BLOCK
        num_units = -(-len(self.asking) // block)
        results = [
            (unit, [value.cpu().numpy() for value in found(slice(unit * block, (unit + 1) * block))])
            for unit in own_units(num_units)
        ]
        results = gather_units(name, results, num_units)  # collective
        return [torch.from_numpy(np.concatenate(values)) for values in zip(*results, strict=True)]


__all__ = ["Search"]
