"""Two-stage retrieval, its work spread over all processes: embed, search (ITC), re-rank (ITM).

    retrieval = retrieve(model, loader, k_rerank=(16, 128))               # rankings with both raw scores
    results = evaluate_retrieval(model, loader, model_name=..., ...)      # the same, measured: as in results.json
    retrieval = retrieve(model, photos, queries=titles)                   # two sources instead of one table

In a table every row is one image and one title: both galleries have the same ids, 0 .. N - 1, the usable rows in source
order. A title's positives are the images of equal product id, and the other way round.

Work is cut into fixed units by global id (the loader's units of rows; blocks of queries in the search), and a unit is
computed whole by rank `unit % world size`. What is computed together, padding included, therefore never depends on the
number of processes, and neither do the results.

The functions are collectives: every rank calls them, and every rank gets the results. Each gather is marked.
"""

import contextlib
import functools
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import retrieval_aliblip as engine
from aliblip.retrieval.embedding import TokenMemory, embed, undisturbed
from aliblip.retrieval.metrics import best_positive_ranks
from aliblip.retrieval.rankings import Candidates, Direction, Rankings, Retrieval, Side, final_order, ranks_of, score_of
from aliblip.retrieval.results import MATRIX, measure
from aliblip.runtime.distributed import all_gather_objects, is_main, together
from aliblip.runtime.parts import Parts, stage_of
from aliblip.runtime.units import gather_units, own_units, unit_bar

logger = logging.getLogger(__name__)

DEFAULT_K_RERANK = 128
ALL = "all"
# Of an exhaustive retrieval this many of a query's items are listed; its logits are in a file, all of them.
LISTED = 128

MATRIX_STAGE = "all-pairs"

Depth = int | str


def parse_k_rerank(text: str | None) -> list[Depth] | None:
    """ "16,32,all" as [16, 32, "all"]; None stays None, which means 128, or the whole gallery where it is smaller.

    Raises:
        ValueError: something else than whole numbers of at least 1 and the word all.
    """
    if text is None:
        return None
    depths: list[Depth] = []
    for part in str(text).split(","):
        part = part.strip()
        if part != ALL and not (part.isdecimal() and int(part) >= 1):
            raise ValueError(
                f"--k_rerank is {text}: give a number of at least 1, several separated by commas (16,32,64), or all"
            )
        depths.append(ALL if part == ALL else int(part))
    return depths


def check_k_rerank(k_rerank: Depth | Sequence[Depth] | None, gallery_size: int) -> None:
    """Refuse an explicit number of candidates that the gallery does not have. Call it as soon as the source is open.

    Raises:
        ValueError: a number below 1 or above the gallery size. None (128, or the whole gallery where it is smaller)
            always fits.
    """
    for depth in _as_depths(k_rerank):
        if depth != ALL and not 1 <= depth <= gallery_size:
            raise ValueError(
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

    # The metric writes a copy of itself into a cache folder: one process is enough.
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
    fusion_weight: float = 1.0,
    dtype: torch.dtype | None = None,
    rerank_batch_tokens: int = engine.RERANK_BATCH_TOKENS,
    gallery_chunk: int = engine.GALLERY_CHUNK,
    image_token_memory_gb: float = 4.0,
    list_at_least: int = 0,
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
        fusion_weight: of the ITC similarity in the fused score.
        dtype: type of the autocast of the model's passes; None: the type of the weights.
        rerank_batch_tokens: bound on the text tokens of one re-ranking pass.
        gallery_chunk: gallery items scored at a time in the search.
        image_token_memory_gb: host memory that each process may fill with image tokens between the stages. Images
            beyond it are read and encoded once more. Either way gives the same results.
        list_at_least: items that the rankings hold of every query, where fewer are re-ranked.
        parts: where finished units are kept, and those of an earlier start are found; None: nowhere.
        progress: show a progress bar on the main process.

    Raises:
        ValueError: no usable row, or an explicit `k_rerank` out of range.
        OSError: "all", and the disk has no room for the file.
        RuntimeError: if a unit of work was lost or done twice.
    """
    asked = _as_depths(k_rerank)
    check_k_rerank(asked, loader.source.num_rows)
    exhaustive = ALL in asked and score != "itc"
    if exhaustive and parts is None:
        raise ValueError('k_rerank "all" needs a place for its file: give parts')
    seconds: dict[str, float] = {}
    with undisturbed(model), _timed(seconds, "total"):
        with _timed(seconds, "embed"):
            memory = TokenMemory(image_token_memory_gb * 1e9)
            images, titles, resumed = embed(
                model, loader, queries, dtype=dtype, memory=memory, parts=parts, progress=progress
            )
        depths = _depths(asked, len(images), score)
        reranked = max(depths[:-1], default=0) if exhaustive else depths[-1]
        listed = min(max(reranked, list_at_least, LISTED if exhaustive else 0), len(images))
        device = next(model.parameters()).device
        with _timed(seconds, "search"):
            embeds = images.embeds.to(device), titles.embeds.to(device)
            found = [_search(embeds[1], embeds[0], titles, images, listed, gallery_chunk, has_truth)]
            if queries is None:
                found.append(_search(embeds[0], embeds[1], images, titles, listed, gallery_chunk, has_truth))
        if has_truth and not found[0][1].any():
            has_truth = False
            if is_main():
                logger.warning("no title has the product id of any photo: rankings, and no recall")
            found = [(candidates, None) for candidates, _ in found]
        rankings: list[Rankings] = []
        if score != "itc":
            with _timed(seconds, "rerank"):
                work = _Reranking(model, loader, images, titles, memory, dtype, rerank_batch_tokens, progress)
                if exhaustive:
                    logits, again = work.all_pairs([candidates for candidates, _ in found], parts)
                else:
                    logits, again = work.candidates([candidates for candidates, _ in found], reranked, parts)
                resumed += again
                for (candidates, _), values in zip(found, logits, strict=True):
                    candidates.itm_logits = values
        if exhaustive:
            with _timed(seconds, "order"):
                whole = np.load(parts.folder / MATRIX, mmap_mode="r")
                options = (listed, gallery_chunk, score, fusion_weight, has_truth)
                rankings.append(_order_all(whole.T, embeds[1], embeds[0], titles, images, *options))
                if queries is None:
                    rankings.append(_order_all(whole, embeds[0], embeds[1], images, titles, *options))
        sides = ((titles, images), (images, titles))
        for number, (candidates, itc_ranks) in enumerate(found):
            if not exhaustive:
                order = final_order(candidates, depths[-1], score, fusion_weight)
                if has_truth:
                    asking, gallery = (side.product_id for side in sides[number])
                    order.ranks = ranks_of(order, depths[-1], itc_ranks, asking, gallery)
                rankings.append(order)
            rankings[number].itc_ranks = itc_ranks
    directions = [Direction(candidates, order) for (candidates, _), order in zip(found, rankings, strict=True)]
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


# --- stages -----------------------------------------------------------------------------------------------------------


def _search(
    queries: Tensor, gallery: Tensor, asking: Side, searched: Side, k: int, chunk: int, has_truth: bool
) -> tuple[Candidates, Tensor | None]:
    """Candidates, and exact ranks of the best positive (Q,), on the CPU of all ranks."""

    def found(own: slice):
        scores, ids = engine.search(queries[own], gallery, k, chunk)
        # the same products in the same shapes as the search's: ranks and rankings agree to the last bit
        chunks = functools.partial(engine.score_chunks, queries[own], gallery, chunk)
        return scores, ids, _ranks(chunks, asking.product_id[own], searched.product_id, scores.device, has_truth)

    scores, ids, ranks = _by_blocks("search", len(queries), found)  # collective
    return Candidates(ids=ids, itc=scores), ranks if has_truth else None


def _order_all(
    logits: np.ndarray,
    queries: Tensor,
    gallery: Tensor,
    asking: Side,
    searched: Side,
    k: int,
    chunk: int,
    score: str,
    weight: float,
    has_truth: bool,
) -> Rankings:
    """The k best of all pairs, and exact ranks, from the memory-mapped logits (Q, N) of all of them."""

    def found(own: slice):
        def read(start: int, stop: int) -> Tensor:
            return torch.from_numpy(np.array(logits[own, start:stop])).to(queries.device)

        def chunks() -> Iterator[tuple[int, Tensor]]:
            for start, itc in engine.score_chunks(queries[own], gallery, chunk):
                yield start, score_of(itc, read(start, start + itc.shape[1]), score, weight)

        scores, ids = engine.running_top_k(chunks(), k)
        itc = torch.empty_like(scores)
        itm = torch.empty_like(scores)
        for start, values in engine.score_chunks(queries[own], gallery, chunk):
            stop = start + values.shape[1]
            here = (ids >= start) & (ids < stop)
            place = torch.where(here, ids - start, 0)
            itc = torch.where(here, values.gather(1, place), itc)
            itm = torch.where(here, read(start, stop).gather(1, place), itm)
        ranks = _ranks(chunks, asking.product_id[own], searched.product_id, scores.device, has_truth)
        return scores, ids, itc, itm, ranks

    scores, ids, itc, itm, ranks = _by_blocks("ordering", len(queries), found)  # collective
    return Rankings(ids=ids, scores=scores, itc=itc, itm_logits=itm, ranks=ranks if has_truth else None)


def _ranks(chunks, asking: Tensor, searched: Tensor, device: torch.device, has_truth: bool) -> Tensor:
    if not has_truth:
        return torch.zeros(len(asking), dtype=torch.int64)
    return best_positive_ranks(chunks, asking.to(device), searched.to(device))


def _by_blocks(name: str, num_queries: int, found) -> list[Tensor]:
    """`found(slice of queries)` of all blocks of queries, each by one rank, joined on the CPU of all ranks."""
    block = engine.QUERY_BLOCK
    num_units = -(-num_queries // block)
    results = [
        (unit, [value.cpu().numpy() for value in found(slice(unit * block, (unit + 1) * block))])
        for unit in own_units(num_units)
    ]
    results = gather_units(name, results, num_units)  # collective
    return [torch.from_numpy(np.concatenate(values)) for values in zip(*results, strict=True)]


def seconds_by_depth(config, retrieval: Retrieval) -> dict[int, float]:
    """How long a run takes at each depth: the largest was measured; of the others the re-ranking is taken in proportion
    to its floating-point operations."""
    if "rerank" not in retrieval.seconds:
        return {}
    length = round(float(retrieval.titles.attention_mask.sum(dim=1).double().mean()))
    work = {depth: _rerank_flops(config, retrieval, depth, length) for depth in retrieval.depths}
    before = retrieval.seconds["embed"] + retrieval.seconds["search"]
    rerank = retrieval.seconds["rerank"] + retrieval.seconds.get("order", 0.0)
    return {depth: before + rerank * work[depth] / work[retrieval.depths[-1]] for depth in work}


def _rerank_flops(config, retrieval: Retrieval, depth: int, length: int) -> int:
    images, titles = len(retrieval.images), len(retrieval.titles)
    if depth >= images:
        used, num_pairs = images, images * titles
    else:
        ids = [direction.candidates.ids[:, :depth] for _, direction, _, _ in retrieval.directions()]
        text_ids = ids[1] if len(ids) > 1 else torch.empty(0, 1, dtype=torch.int64)
        pairs = engine.candidate_pairs(ids[0], text_ids, images, titles)
        used, num_pairs = int((pairs.first[1:] > pairs.first[:-1]).sum()), len(pairs)
    return used * engine.image_kv_flops(config) + num_pairs * engine.match_flops(config, length)


class _Reranking:
    """The second stage. A unit of photos is re-ranked by the rank that embedded it, with all its candidate titles."""

    def __init__(self, model, loader, images: Side, titles: Side, memory, dtype, batch_tokens: int, progress: bool):
        self.model, self.loader, self.images, self.titles = model, loader, images, titles
        self.memory, self.dtype, self.batch_tokens, self.progress = memory, dtype, batch_tokens, progress

    def candidates(self, found: list[Candidates], depth: int, parts: Parts | None) -> tuple[list[Tensor], int]:
        """Match logits of the first `depth` candidates of one direction or both, each (Q, K) with nan for those that
        follow, on all ranks; and the units that an earlier start had finished."""
        images, titles = len(self.images), len(self.titles)
        none = torch.empty(0, 1, dtype=torch.int64)
        image_ids = found[0].ids[:, :depth]
        text_ids = found[1].ids[:, :depth] if len(found) > 1 else none
        pairs = engine.candidate_pairs(image_ids, text_ids, images, titles)
        # Parts of other candidates (another k) have other names.
        digest = hashlib.blake2b(str(self.batch_tokens).encode(), digest_size=8)
        digest.update(pairs.image_id.numpy().tobytes() + pairs.text_id.numpy().tobytes())
        own = own_units(self.loader.num_units)
        with stage_of(parts, f"rerank-{digest.hexdigest()}") as stage:  # collective
            done = [unit for unit in own if unit in stage]
            results = [(unit, stage.load(unit)[0]["logits"].numpy()) for unit in done]
            todo = [unit for unit in own if unit not in stage]
            for unit in unit_bar(todo, len(todo), "re-ranking", self.progress):
                logits = self._unit(unit, pairs.texts_of)
                stage.add(unit, {"logits": logits})
                results.append((unit, logits.numpy()))
        logits = torch.from_numpy(np.concatenate(gather_units("re-ranking", results, self.loader.num_units)))
        if len(logits) != len(pairs):
            raise RuntimeError(f"re-ranking gave {len(logits)} logits for {len(pairs)} pairs")
        located = [logits[pairs.locate(image_ids, torch.arange(titles)[:, None])]]
        if len(found) > 1:
            located.append(logits[pairs.locate(torch.arange(images)[:, None], text_ids)])
        padded = [
            F.pad(values, (0, candidates.ids.shape[1] - depth), value=float("nan"))
            for values, candidates in zip(located, found, strict=True)
        ]
        return padded, len(done)

    def all_pairs(self, found: list[Candidates], parts: Parts) -> tuple[list[Tensor], int]:
        """Write the match logits of all pairs, (images, titles) fp32, and give those of the candidates as `candidates`
        does.

        Every unit of photos is a block of rows of the file, which all processes write into; the parts of this stage
        only say which blocks are done.
        """
        num_images, num_titles = len(self.images), len(self.titles)
        name = f"{MATRIX_STAGE}-{self.batch_tokens}"
        together(is_main(), lambda: _make_matrix(parts, (num_images, num_titles), name), "make the file")  # collective
        matrix = np.load(parts.folder / MATRIX, mmap_mode="r+")
        every_title = torch.arange(num_titles)
        own = own_units(self.loader.num_units)
        with parts.stage(name, before_write=matrix.flush, needed=True) as stage:  # collective
            todo = [unit for unit in own if unit not in stage]
            for unit in unit_bar(todo, len(todo), "scoring all pairs", self.progress):
                images = slice(self.images.first[unit], self.images.first[unit + 1])
                matrix[images] = self._unit(unit, lambda _: every_title).view(-1, num_titles).numpy()
                stage.add(unit, {})
        gather_units("scoring all pairs", [(unit, None) for unit in own], self.loader.num_units)  # collective
        places = [(found[0].ids.numpy(), np.arange(num_titles)[:, None])]
        places += [(np.arange(num_images)[:, None], candidates.ids.numpy()) for candidates in found[1:]]
        return [torch.from_numpy(matrix[place]) for place in places], len(own) - len(todo)

    def _unit(self, unit: int, texts_of) -> Tensor:
        """Match logits of a unit's photos with their titles, photo by photo."""
        images = range(self.images.first[unit], self.images.first[unit + 1])
        text_ids = [texts_of(image) for image in images]
        if not sum(map(len, text_ids)):
            return torch.empty(0)
        tokens = self.memory.take(unit)
        if tokens is None:
            batch = self.loader.read_unit(unit)
            if not torch.equal(batch["row"], self.images.rows[images.start : images.stop]):
                raise RuntimeError(
                    f"unit {unit} gave other rows when it was read again: the data changed during the run"
                )
            _, tokens = engine.embed_images(self.model, batch["pixel_values"], self.dtype)
        titles = self.titles
        return engine.rerank(
            self.model, tokens, text_ids, titles.input_ids, titles.attention_mask, self.batch_tokens, self.dtype
        )


# --- around the work --------------------------------------------------------------------------------------------------


def _make_matrix(parts: Parts, shape: tuple[int, int], stage: str) -> None:
    """The file for all match logits, all of its space taken at once; kept if it is there from an earlier start."""
    file = parts.folder / MATRIX
    parts.folder.mkdir(parents=True, exist_ok=True)
    parts.forget(MATRIX_STAGE, keep=stage)  # their blocks will be written over
    with contextlib.suppress(OSError, ValueError):
        if np.load(file, mmap_mode="r").shape == shape:
            return
    parts.forget(MATRIX_STAGE, keep="")  # blocks of a file that is gone
    partial = file.with_name(f".{file.name}.partial")
    np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape).flush()
    if hasattr(os, "posix_fallocate"):  # writing to a hole of a mapped file on a full disk would end the process
        with open(partial, "r+b") as opened:
            os.posix_fallocate(opened.fileno(), 0, partial.stat().st_size)
    partial.replace(file)


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
    "seconds_by_depth",
]
