"""Two-stage retrieval, its work spread over all processes: embed, search (ITC), re-rank (ITM).

    retrieval = retrieve(model, loader, k_rerank=(16, 128))               # rankings with both raw scores
    results = evaluate_retrieval(model, loader, model_name=..., ...)      # the same, measured: as in results.json
    retrieval = retrieve(model, photos, queries=titles)                   # two sources instead of one table

In a table every usable row gives a title, and a photo if none before it has the same one: a photo is one image however
many rows name it, by one file name or as copies. A title's positives are the photos of its product, its own among them;
a photo's are the titles of all products whose rows name it. Where the data has no product ids, a photo is a product.

Work is cut into fixed units by global id (the loader's units of rows; blocks of queries in the search), and a unit is
computed whole by rank `unit % world size`. What is computed together, padding included, therefore never depends on the
number of processes, and neither do the results. The stages: `embedding`, `searching`, `reranking`.

The functions are collectives: every rank calls them, and every rank gets the results. Each gather is marked.
"""

import contextlib
import logging
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

import retrieval_aliblip as engine
from aliblip.retrieval.embedding import TokenMemory, embed, undisturbed
from aliblip.retrieval.plan import batch_tokens_now, free_for_tokens
from aliblip.retrieval.rankings import MATRIX, Direction, Retrieval, final_order, ranks_of
from aliblip.retrieval.reranking import Reranking
from aliblip.retrieval.results import measure
from aliblip.retrieval.searching import Search
from aliblip.runtime.distributed import all_gather_objects, is_main, together
from aliblip.runtime.mistakes import UsageError
from aliblip.runtime.parts import Parts

logger = logging.getLogger(__name__)

DEFAULT_K_RERANK = 128
ALL = "all"
# Of an exhaustive retrieval this many of a query's items are listed; its logits are in a file, all of them.
LISTED = 128

Depth = int | str


def parse_k_rerank(text: str | None) -> list[Depth] | None:
    """ "16,32,all" as [16, 32, "all"]; None stays None, which means 128, or the whole gallery where it is smaller.

    Raises:
        UsageError: something else than whole numbers of at least 1 and the word all.
    """
    if text is None:
        return None
    depths: list[Depth] = []
    for part in str(text).split(","):
        part = part.strip()
        if part != ALL and not (part.isdecimal() and int(part) >= 1):
            raise UsageError(
                f"--k_rerank is {text}: give a number of at least 1, several separated by commas (16,32,64), or all"
            )
        depths.append(ALL if part == ALL else int(part))
    return depths


def check_k_rerank(k_rerank: Depth | Sequence[Depth] | None, gallery_size: int) -> None:
    """Refuse an explicit number of candidates that the gallery does not have. Call it as soon as the source is open.

    Raises:
        UsageError: a number below 1 or above the gallery size. None (128, or the whole gallery where it is smaller)
            always fits.
    """
    for depth in _as_depths(k_rerank):
        if depth != ALL and not 1 <= depth <= gallery_size:
            raise UsageError(
                f"k_rerank is {depth}, but the gallery has {gallery_size} items: "
                f"give a number from 1 to {gallery_size}, or leave it out"
            )


def _as_depths(k_rerank: Depth | Sequence[Depth] | None) -> list[Depth]:
    if k_rerank is None:
        return []
    return [k_rerank] if isinstance(k_rerank, (int, str)) else list(k_rerank)


def evaluate_retrieval(model, loader, *, model_name: str, dataset_name: str, split: str, **options) -> dict:
    """`retrieve`, measured: what results.json holds (see `aliblip.retrieval.results.measure`), equal on all ranks."""
    start = time.perf_counter()
    retrieval = retrieve(model, loader, **options)

    def measured() -> dict:
        results = measure(retrieval, model_name=model_name, dataset_name=dataset_name, split=split)
        results["run"]["seconds"] = round(time.perf_counter() - start, 3)
        return results

    # The same on all ranks, and bootstraps take a while: one process is enough.
    return together(is_main(), measured, "measure the results")  # collective


@torch.no_grad()
def retrieve(
    model,
    loader,
    *,
    queries=None,
    has_truth: bool = True,
    k_rerank: Depth | Sequence[Depth] | None = None,
    score: str = "fused",
    fusion_weight: float | None = None,
    probability: tuple[float, float] | None = None,
    dtype: torch.dtype | None = None,
    rerank_batch_tokens: int | None = None,
    gallery_chunk: int = engine.GALLERY_CHUNK,
    image_token_memory_gb: float = 4.0,
    list_at_least: int = 0,
    photos_by_name: bool = False,
    parts: Parts | None = None,
    progress: bool = False,
) -> Retrieval:
    """Search all photos for all titles and, where both are rows of one table, all titles for all photos.

    The model is put into evaluation mode and back, module by module, and all random states are left as they were: an
    evaluation in the middle of a training run does not change the run.

    Args:
        model: the plain model (unwrapped), with the weights of every rank equal.
        loader: an `EvalLoader` of photos and titles or, with `queries`, of photos; made with this run's rank and world
            size.
        queries: an `EvalLoader` of titles, whose photos are searched for. No titles are searched for then.
        has_truth: whether equal product ids are right answers. Otherwise there are rankings and no ranks.
        k_rerank: candidates of the second stage; several: the largest counts, the others are measured too; "all": all
            pairs are scored. None: 128 or the whole gallery. An explicit number is checked against the rows of the
            source; unusable rows found later can only lower it. "all" needs `parts`, in a folder that all processes
            see: the match logits lie there in a file, see `Retrieval.matrix`.
        score: what orders the candidates: "fused", "itm" or "itc" (no second stage).
        fusion_weight: of the ITC similarity in the fused score; None: the model's.
        probability: slope and offset of the probability of a match; None: the model's. They order nothing.
        dtype: type of the autocast of the model's passes; None: the type of the weights.
        rerank_batch_tokens: bound on the text tokens of one re-ranking pass; None: what suits the device and its free
            memory.
        gallery_chunk: gallery items scored at a time in the search.
        image_token_memory_gb: host memory that each process may fill with image tokens between the stages, beside what
            is free on its GPU. Images beyond are read and encoded once more. Either way gives the same results.
        list_at_least: items that the rankings hold of every query, where fewer are re-ranked.
        photos_by_name: whether copies of a photo under several names are several photos; their rows have to be
            described by the loader's collator.
        parts: where finished units are kept, and those of an earlier start are found; None: nowhere.
        progress: show a progress bar on the main process.

    Raises:
        UsageError: no usable row, an explicit `k_rerank` out of range, or features or match logits that are not finite.
        ValueError: "all" without `parts`.
        OSError: "all", and the disk has no room for the file.
        RuntimeError: if a unit of work was lost or done twice.
    """
    fusion_weight = model.config.fusion_weight if fusion_weight is None else fusion_weight
    slope, offset = (model.config.itm_slope, model.config.itm_offset) if probability is None else probability
    asked = _as_depths(k_rerank)
    check_k_rerank(asked, loader.source.num_rows)
    exhaustive = ALL in asked and score != "itc"
    if exhaustive and parts is None:
        raise ValueError('k_rerank "all" needs a place for its file: give parts')
    seconds: dict[str, float] = {}
    with undisturbed(model), _timed(seconds, "total"):
        with _timed(seconds, "embed"):
            memory = TokenMemory(image_token_memory_gb * 1e9, free_for_tokens(next(model.parameters()).device))
            images, titles, resumed = embed(
                model,
                loader,
                queries,
                dtype=dtype,
                memory=memory,
                photos_by_name=photos_by_name,
                parts=parts,
                progress=progress,
            )
        sides = ((titles, images), (images, titles))[: 2 if queries is None else 1]
        depths = _depths(asked, max(len(searched) for _, searched in sides), score)
        reranked = max(depths[:-1], default=0) if exhaustive else depths[-1]
        listed = max(reranked, list_at_least, LISTED if exhaustive else 0)
        with _timed(seconds, "search"):
            device = next(model.parameters()).device
            searches = [Search(*pair, device=device, chunk=gallery_chunk, has_truth=has_truth) for pair in sides]
            found, itc_ranks = zip(
                *(search.candidates(min(listed, len(search.searched))) for search in searches), strict=True
            )
        if has_truth and not itc_ranks[0].any():
            has_truth, itc_ranks = False, [None] * len(searches)
            if is_main():
                logger.warning("no title has the product id of any photo: rankings, and no recall")
            for search in searches:
                search.has_truth = False
        if score != "itc":
            with _timed(seconds, "rerank"):
                if rerank_batch_tokens is None:  # the same on all ranks
                    longest = titles.input_ids.shape[1]
                    rerank_batch_tokens = min(all_gather_objects(batch_tokens_now(model, longest, dtype)))  # collective
                options = {"dtype": dtype, "batch_tokens": rerank_batch_tokens, "progress": progress}
                work = Reranking(model, loader, images, titles, memory, **options)
                resumed += work.all_pairs(found, parts) if exhaustive else work.candidates(found, reranked, parts)
        if exhaustive:
            with _timed(seconds, "order"):
                whole = np.load(parts.folder / MATRIX, mmap_mode="r")  # (images, titles)
                rankings = [
                    search.order_all(of_direction, min(listed, len(search.searched)), score, fusion_weight)
                    for search, of_direction in zip(searches, (whole.T, whole), strict=False)
                ]
        else:
            rankings = [final_order(candidates, depths[-1], score, fusion_weight) for candidates in found]
        for order, ranks, (asking, searched) in zip(rankings, itc_ranks, sides, strict=True):
            order.itc_ranks = ranks
            if has_truth and not exhaustive:
                order.ranks = ranks_of(order, depths[-1], ranks, asking, searched)
    directions = [Direction(candidates, order) for candidates, order in zip(found, rankings, strict=True)]
    return Retrieval(
        images=images,
        titles=titles,
        text_to_image=directions[0],
        image_to_text=directions[1] if queries is None else None,
        depths=depths,
        score=score,
        fusion_weight=fusion_weight,
        seconds=seconds,
        resumed_units=sum(all_gather_objects(resumed)),  # collective
        matrix=parts.folder / MATRIX if exhaustive else None,
        slope=slope,
        offset=offset,
    )


def _depths(asked: list[Depth], gallery_size: int, score: str) -> list[int]:
    """How many candidates are re-ranked, rising; unusable rows may have made the gallery smaller than what was asked
    for."""
    wanted = [gallery_size if depth == ALL else depth for depth in asked] or [DEFAULT_K_RERANK]
    if max(wanted) > gallery_size and is_main():
        logger.info("k_rerank is the whole gallery, %d, instead of %d", gallery_size, max(wanted))
    depths = sorted({min(depth, gallery_size) for depth in wanted})
    # without a second stage it is only how many are listed
    return depths[-1:] if score == "itc" else depths


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


__all__ = [
    "ALL",
    "DEFAULT_K_RERANK",
    "check_k_rerank",
    "evaluate_retrieval",
    "parse_k_rerank",
    "retrieve",
]
