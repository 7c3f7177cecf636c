"""Rankings made by hand, for the tests of what is computed from them."""

from __future__ import annotations

import torch

from aliblip.retrieval import results as numbers
from aliblip.retrieval.rankings import Candidates, Direction, Retrieval, Side, final_order, ranks_of

NAMES = {"model_name": "m", "dataset_name": "d", "split": "validation"}
TITLES = ["red cap", "blue cap", "зелёная кепка", "12 34", "红色 帽子", "a rather long title of a very small cap"]


def retrieval(itc, itm, product_id=None, depths=(2, 4), score="fused", weight=1.0, truth=True):
    """Both directions of square score matrices (titles, photos)."""
    size = len(itc)
    product_id = torch.arange(size) if product_id is None else torch.tensor(product_id)
    lengths = torch.tensor([len(text.split()) + 2 for text in (TITLES * size)[:size]])
    common = {"rows": torch.arange(size) * 2, "product_id": product_id, "embeds": torch.zeros(size, 1)}
    common |= {"first": [0, size], "names": [f"{n}.jpg" for n in range(size)], "texts": (TITLES * size)[:size]}
    common |= {"others": [{"category": "even" if n % 2 == 0 else "odd"} for n in range(size)]}
    mask = (torch.arange(12) < lengths[:, None]).long()
    images, titles = Side(**common), Side(**common, input_ids=mask, attention_mask=mask)
    directions = []
    for first, second in ((itc, itm), (itc.T, itm.T)):
        scores, ids = first.sort(dim=1, descending=True, stable=True)
        correct = product_id[ids] == product_id[:, None]
        itc_ranks = correct.int().argmax(dim=1) + 1
        keep = depths[-1]
        logits = second.gather(1, ids)[:, :keep]
        candidates = Candidates(ids[:, :keep], scores[:, :keep], logits, margins=logits - 0.5)
        order = final_order(candidates, keep, score, weight)
        if truth:
            order.ranks = ranks_of(order, keep, itc_ranks, titles, images)
            order.itc_ranks = itc_ranks
        directions.append(Direction(candidates, order))
    return Retrieval(images, titles, *directions, list(depths), score, weight, {"total": 1.0})


def random_retrieval(size=40, seed=0, signal=1.5, **options):
    generator = torch.Generator().manual_seed(seed)
    itc = torch.rand(size, size, generator=generator) + 0.2 * torch.eye(size)
    itm = torch.randn(size, size, generator=generator) + signal * torch.eye(size)
    return retrieval(itc, itm, **options)


def written(folder, found, **names):
    results = numbers.measure(found, **{**NAMES, **names})
    return numbers.write_results(folder, found, results)[0]
