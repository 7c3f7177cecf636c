"""Two-stage retrieval evaluation, its work spread over all processes: embed, search (ITC), re-rank (ITM), measure.

    results = evaluate_retrieval(model, loader, model_name=..., dataset_name=..., split=...)  # as in results.json
    evaluation = run_evaluation(model, loader, ...)  # the same, with rankings and skipped rows

Every row of the source is one image and one title: both galleries have the same ids, 0 .. N - 1, the usable rows in
source order. A title's positives are the images of equal product id, and the other way round.

Work is cut into fixed units by global id (the loader's units of rows; blocks of queries in the search), and a unit is
computed whole by rank `unit % world size`. What is computed together, padding included, therefore never depends on the
number of processes, and neither do the results.

Both functions are collectives: every rank calls them, and every rank gets the results. Each gather is marked.
"""

import contextlib
import functools
import importlib.metadata
import logging
import platform
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

import retrieval_aliblip as engine
from aliblip.distributed import all_gather_objects, broadcast_object, is_main, rank, world_size
from aliblip.files import write_json, write_json_lines
from aliblip.metrics import RECALL_AT, best_positive_ranks, ranks_after_reranking

logger = logging.getLogger(__name__)

DEFAULT_K_RERANK = 128

_METRIC = Path(__file__).resolve().parent.parent / "metrics" / "retrieval_recall"
_PACKAGES = ("torch", "transformers", "accelerate")


@dataclass
class Rankings:
    """One direction: every query's `k_rerank` candidates. Ids are usable rows (see `Evaluation.rows`), all tensors on
    the CPU.

    `ids`, `scores`: (Q, k) in their final order, score = match logit + ITC similarity. `itc_ids`, `itc_scores`: (Q, k)
    in the order of the first stage. `ranks`, `itc_ranks`: (Q,) rank of the best positive in the whole gallery, 0
    without one.
    """

    ids: Tensor
    scores: Tensor
    ranks: Tensor
    itc_ids: Tensor
    itc_scores: Tensor
    itc_ranks: Tensor


@dataclass
class Evaluation:
    """`results` is the content of results.json; `rows` (N,) the source row of every usable row; `product_id` (N,);
    `skipped` lists the unusable rows as {"row", "name", "reason"}; `seconds` by stage."""

    results: dict
    rows: Tensor
    product_id: Tensor
    text_to_image: Rankings
    image_to_text: Rankings
    skipped: list[dict] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def check_k_rerank(k_rerank: int | None, gallery_size: int) -> None:
    """Refuse an explicit number of candidates that the gallery does not have. Call it as soon as the source is open.

    Raises:
        ValueError: a number below 1 or above the gallery size. None (128, or the whole gallery where it is smaller)
            always fits.
    """
    if k_rerank is not None and not 1 <= k_rerank <= gallery_size:
        raise ValueError(
            f"k_rerank is {k_rerank}, but the gallery has {gallery_size} items: "
            f"give a number from 1 to {gallery_size}, or leave it out"
        )


def evaluate_retrieval(model, loader, **options) -> dict:
    """`run_evaluation`, of which only the results dict is kept; equal on all ranks."""
    return run_evaluation(model, loader, **options).results


@torch.no_grad()
def run_evaluation(
    model,
    loader,
    *,
    model_name: str,
    dataset_name: str,
    split: str,
    k_rerank: int | None = None,
    dtype: torch.dtype | None = None,
    rerank_batch_tokens: int = engine.RERANK_BATCH_TOKENS,
    gallery_chunk: int = engine.GALLERY_CHUNK,
    image_token_memory_gb: float = 4.0,
    progress: bool = False,
) -> Evaluation:
    """Evaluate a model on all rows of a loader, in both directions.

    The model is put into evaluation mode and back, module by module, and all random states are left as they were: an
    evaluation in the middle of a training run does not change the run.

    Args:
        model: the plain model (unwrapped), with the weights of every rank equal.
        loader: an `EvalLoader`, made with this run's rank and world size.
        model_name, dataset_name, split: for the results only.
        k_rerank: candidates of the second stage; None: 128 or the whole gallery. An explicit number is checked against
            the rows of the source; unusable rows found later can only lower it.
        dtype: type of the autocast of the model's passes; None: the type of the weights.
        rerank_batch_tokens: bound on the text tokens of one re-ranking pass.
        gallery_chunk: gallery items scored at a time in the search.
        image_token_memory_gb: host memory that each process may fill with image tokens between the stages. Images
            beyond it are read and encoded once more. Either way gives the same results.
        progress: show a progress bar on the main process.

    Raises:
        ValueError: no usable row, or an explicit `k_rerank` out of range.
        RuntimeError: if a unit of work was lost or done twice.
    """
    start = time.perf_counter()
    check_k_rerank(k_rerank, loader.source.num_rows)
    seconds = {}
    with _undisturbed(model), _timed(seconds, "total"):
        with _timed(seconds, "embed"):
            catalogue, kept = _embed(model, loader, dtype, image_token_memory_gb, progress)
        gallery_size = len(catalogue.rows)
        if (k_rerank or DEFAULT_K_RERANK) > gallery_size and is_main():
            logger.info("k_rerank is the whole gallery, %d, instead of %d", gallery_size, k_rerank or DEFAULT_K_RERANK)
        k_rerank = min(k_rerank or DEFAULT_K_RERANK, gallery_size)
        device = next(model.parameters()).device
        with _timed(seconds, "search"):
            images, texts = catalogue.image_embeds.to(device), catalogue.text_embeds.to(device)
            product_id = catalogue.product_id.to(device)
            text_to_image = _search(texts, images, product_id, k_rerank, gallery_chunk)
            image_to_text = _search(images, texts, product_id, k_rerank, gallery_chunk)
        with _timed(seconds, "rerank"):
            pairs = engine.candidate_pairs(text_to_image[1], image_to_text[1], gallery_size, gallery_size)
            logits = _rerank(model, loader, catalogue, kept, pairs, dtype, rerank_batch_tokens, progress)
            queries = torch.arange(gallery_size)[:, None]
            text_logits = logits[pairs.locate(text_to_image[1], queries)]
            image_logits = logits[pairs.locate(queries, image_to_text[1])]
        text_to_image = _final_order(*text_to_image, text_logits, catalogue.product_id)
        image_to_text = _final_order(*image_to_text, image_logits, catalogue.product_id)
        # The metric writes a copy of itself into a cache folder: one process is enough.
        measured = [_measure(text_to_image, k_rerank), _measure(image_to_text, k_rerank)] if is_main() else None
        measured = broadcast_object(measured)  # collective
    recalls = [direction["itm"][f"recall@{k}"] for direction in measured for k in RECALL_AT]
    results = {
        "model": model_name,
        "dataset": dataset_name,
        "split": split,
        "num_images": gallery_size,
        "num_texts": gallery_size,
        "k_rerank": k_rerank,
        "text_to_image": measured[0],
        "image_to_text": measured[1],
        "mean_recall": float(np.mean(recalls)),
        "run": {
            "num_processes": world_size(),
            "seconds": round(time.perf_counter() - start, 3),
            "versions": {
                "python": platform.python_version(),
                **{package: importlib.metadata.version(package) for package in _PACKAGES},
            },
        },
    }
    return Evaluation(
        results=results,
        rows=catalogue.rows,
        product_id=catalogue.product_id,
        text_to_image=text_to_image,
        image_to_text=image_to_text,
        skipped=catalogue.skipped,
        seconds=seconds,
    )


# --- stages -----------------------------------------------------------------------------------------------------------


@dataclass
class _Catalogue:
    """What all ranks know of all usable rows, N, after the first stage."""

    rows: Tensor  # (N,) source rows
    product_id: Tensor  # (N,)
    image_embeds: Tensor  # (N, E) fp32
    text_embeds: Tensor  # (N, E) fp32
    input_ids: Tensor  # (N, L), padded to the longest title of all
    attention_mask: Tensor  # (N, L)
    first: list[int]  # unit -> its first id; one entry more than units
    skipped: list[dict]


def _embed(model, loader, dtype, memory_gb: float, progress: bool) -> tuple[_Catalogue, dict[int, Tensor]]:
    """Both embeddings of all rows on all ranks, and the image tokens of own units as far as the memory allows."""
    parts, kept, kept_bytes, own_units, token_bytes = [], {}, 0, 0, 0
    units = range(rank(), loader.num_units, world_size())
    for unit, batch in _bar(loader, len(units), "embedding", progress):
        part = {"rows": batch["row"], "product_id": batch["product_id"], "skipped": batch["skipped"]}
        if len(batch["row"]):
            image_embeds, tokens = engine.embed_images(model, batch["pixel_values"], dtype)
            part["image_embeds"] = image_embeds
            part["text_embeds"] = engine.embed_texts(model, batch["input_ids"], batch["attention_mask"], dtype)
            part["input_ids"], part["attention_mask"] = batch["input_ids"], batch["attention_mask"]
            own_units += 1
            size = tokens.numel() * tokens.element_size()
            token_bytes += size
            if kept_bytes + size <= memory_gb * 1e9:
                kept[unit] = tokens.cpu()
                kept_bytes += size
        # as arrays: a pickled tensor may drag along the whole storage that it is a view of
        parts.append((unit, {key: _to_numpy(value) for key, value in part.items()}))
    if is_main():
        logger.info(
            "image tokens of %d of %d units of this process stay in host memory (%.2f of %.2f GB, at most %g GB); %s",
            len(kept),
            own_units,
            kept_bytes / 1e9,
            token_bytes / 1e9,
            memory_gb,
            "nothing is encoded twice"
            if len(kept) == own_units
            else "the others are read and encoded again to re-rank",
        )
    parts = _gather_units("embedding", parts, loader.num_units)  # collective
    return _catalogue(parts), kept


def _catalogue(parts: list[dict]) -> _Catalogue:
    skipped = [row for part in parts for row in part["skipped"]]
    usable = [part for part in parts if len(part["rows"])]
    if not usable:
        reason = f"; the first: row {skipped[0]['row']}, {skipped[0]['reason']}" if skipped else ""
        raise ValueError(f"none of the {len(skipped)} rows is usable{reason}")

    def joined(key: str) -> Tensor:
        return torch.from_numpy(np.concatenate([part[key] for part in usable]))

    longest = max(part["input_ids"].shape[1] for part in usable)
    for part in usable:
        missing = ((0, 0), (0, longest - part["input_ids"].shape[1]))
        part["input_ids"] = np.pad(part["input_ids"], missing)
        part["attention_mask"] = np.pad(part["attention_mask"], missing)
    rows = joined("rows")
    if not (rows[1:] > rows[:-1]).all():
        raise RuntimeError("the gathered rows are not in source order: a row was embedded twice")
    return _Catalogue(
        rows=rows,
        product_id=joined("product_id"),
        image_embeds=joined("image_embeds"),
        text_embeds=joined("text_embeds"),
        input_ids=joined("input_ids"),
        attention_mask=joined("attention_mask"),
        first=np.cumsum([0] + [len(part["rows"]) for part in parts]).tolist(),
        skipped=skipped,
    )


def _search(queries: Tensor, gallery: Tensor, product_id: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """ITC scores (Q, k), ids (Q, k) and exact ranks of the best positive (Q,), on the CPU of all ranks."""
    block = engine.QUERY_BLOCK
    num_units = -(-len(queries) // block)
    parts = []
    for unit in range(rank(), num_units, world_size()):
        own = slice(unit * block, (unit + 1) * block)
        scores, ids = engine.search(queries[own], gallery, k, chunk)
        # the same products in the same shapes as the search's: ranks and rankings agree to the last bit
        chunks = functools.partial(engine.score_chunks, queries[own], gallery, chunk)
        ranks = best_positive_ranks(chunks, product_id[own], product_id)
        parts.append((unit, [_to_numpy(values) for values in (scores, ids, ranks)]))
    parts = _gather_units("search", parts, num_units)  # collective
    scores, ids, ranks = (torch.from_numpy(np.concatenate(values)) for values in zip(*parts, strict=True))
    return scores, ids, ranks


def _rerank(model, loader, catalogue: _Catalogue, kept, pairs, dtype, batch_tokens: int, progress: bool) -> Tensor:
    """Match logits (M,) of all candidate pairs, on all ranks. A unit is re-ranked by the rank that embedded its
    images."""
    parts = []
    units = range(rank(), loader.num_units, world_size())
    for unit in _bar(units, len(units), "re-ranking", progress):
        images = range(catalogue.first[unit], catalogue.first[unit + 1])
        if not len(images):
            parts.append((unit, np.empty(0, dtype=np.float32)))
            continue
        tokens = kept.pop(unit, None)
        if tokens is None:
            batch = loader.read_unit(unit)
            if not torch.equal(batch["row"], catalogue.rows[images.start : images.stop]):
                raise RuntimeError(
                    f"unit {unit} gave other rows when it was read again: the data changed during the run"
                )
            _, tokens = engine.embed_images(model, batch["pixel_values"], dtype)
        text_ids = [pairs.texts_of(image) for image in images]
        logits = engine.rerank(
            model, tokens, text_ids, catalogue.input_ids, catalogue.attention_mask, batch_tokens, dtype
        )
        parts.append((unit, _to_numpy(logits)))
    logits = torch.from_numpy(np.concatenate(_gather_units("re-ranking", parts, loader.num_units)))  # collective
    if len(logits) != len(pairs):
        raise RuntimeError(f"re-ranking gave {len(logits)} logits for {len(pairs)} pairs")
    return logits


def _final_order(
    itc_scores: Tensor, itc_ids: Tensor, itc_ranks: Tensor, logits: Tensor, product_id: Tensor
) -> Rankings:
    scores, ids = engine.fuse(itc_scores, itc_ids, logits)
    return Rankings(
        ids=ids,
        scores=scores,
        ranks=ranks_after_reranking(ids, itc_ranks, product_id, product_id),
        itc_ids=itc_ids,
        itc_scores=itc_scores,
        itc_ranks=itc_ranks,
    )


def _gather_units(name: str, parts: list[tuple[int, object]], num_units: int) -> list:
    """Results of all units in unit order, on all ranks (collective).

    Raises:
        RuntimeError: if a unit is missing or came twice.
    """
    gathered = sorted((part for parts in all_gather_objects(parts) for part in parts), key=lambda part: part[0])
    if [unit for unit, _ in gathered] != list(range(num_units)):
        raise RuntimeError(
            f"{name}: {len(gathered)} results gathered for {num_units} units, some are missing or double"
        )
    return [result for _, result in gathered]


# --- measuring and writing --------------------------------------------------------------------------------------------


@functools.cache
def _metric():
    # In memory: evaluations that run at the same time on one machine would share the metric's cache file otherwise.
    return evaluate.load(str(_METRIC), keep_in_memory=True)


def _measure(rankings: Rankings, k_rerank: int) -> dict:
    """One direction of results.json."""
    numbers = {}
    for stage, ranks in (("itc", rankings.itc_ranks), ("itm", rankings.ranks)):
        at = sorted({*RECALL_AT, k_rerank})
        # every query has its own row as a positive, so a rank is never 0 here; the metric leaves such queries out all
        # the same
        summary = _metric().compute(predictions=ranks.tolist(), references=(ranks > 0).long().tolist(), k=at)
        numbers[stage] = {f"recall@{k}": summary[f"recall@{k}"] for k in RECALL_AT}
        numbers[stage]["mean_recall"] = float(np.mean(list(numbers[stage].values())))
        numbers[stage]["median_rank"] = summary["median_rank"]
        if stage == "itc":
            ceiling = summary[f"recall@{k_rerank}"]
    return {**numbers, "itc_recall@k_rerank": ceiling}


def format_table(results: dict) -> str:
    """The results as lines for a terminal; recalls in percent."""
    lines = [
        f"{results['model']} on {results['dataset']}, {results['split']}: "
        f"{results['num_images']} images, {results['num_texts']} titles",
        "",
        f"{'':<36}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'mean':>8}{'median rank':>14}",
    ]
    for key, direction in (("text_to_image", "text to image"), ("image_to_text", "image to text")):
        for stage, name in (("itc", "ITC"), ("itm", f"ITM of the {results['k_rerank']} best")):
            row = results[key][stage]
            recalls = "".join(f"{100 * row[f'recall@{k}']:8.1f}" for k in RECALL_AT)
            label = f"{direction}  {name}" if stage == "itc" else f"{'':<{len(direction)}}  {name}"
            lines.append(f"{label:<36}{recalls}{100 * row['mean_recall']:8.1f}{row['median_rank']:14g}")
        ceiling = 100 * results[key]["itc_recall@k_rerank"]
        label = f"ceiling of re-ranking, ITC recall@{results['k_rerank']}: {ceiling:.1f}"
        lines.append(f"{'':<{len(direction)}}  {label}")
    run = results["run"]
    processes = "process" if run["num_processes"] == 1 else "processes"
    lines += [
        "",
        f"mean of the six ITM recalls: {100 * results['mean_recall']:.2f}   "
        f"({run['seconds']:.1f} s, {run['num_processes']} {processes})",
    ]
    return "\n".join(lines)


def write_results(evaluation: Evaluation, output_dir: str | Path) -> Path:
    """Write `results.json`, and `skipped.jsonl` where rows were skipped. Main process only; the files appear whole or
    not at all."""
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    skipped = output_dir / "skipped.jsonl"
    if evaluation.skipped:
        write_json_lines(skipped, evaluation.skipped)
    else:
        skipped.unlink(missing_ok=True)  # the list of an earlier run in this folder would be read as this one's
    path = output_dir / "results.json"
    write_json(path, evaluation.results)
    return path


# --- around the work --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _undisturbed(model) -> Iterator[None]:
    """Evaluation mode inside; modes of all modules and all random states afterwards as before."""
    training = [module for module in model.modules() if module.training]
    states = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    # The iterator of a DataLoader draws from torch's generator. Only the own device: naming another one would occupy
    # it.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.eval()
            yield
        finally:
            for module in training:
                module.training = True
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _bar(items: Iterable, total: int, name: str, progress: bool) -> Iterable:
    return tqdm(items, total=total, desc=name, unit="unit", leave=False, disable=not (progress and is_main()))


def _to_numpy(value):
    return value.cpu().numpy() if isinstance(value, Tensor) else value
