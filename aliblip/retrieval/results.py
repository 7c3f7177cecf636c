"""From rankings to numbers: results.json, its table, intervals and slices.

    results = measure(retrieval, model_name=..., dataset_name=..., split=...)
    print(format_table(results))
    write_results(output_dir, retrieval, results)

Recalls are fractions, in the files and everywhere else but in the tables. Intervals are 95 % bootstrap intervals over
products.
"""

import importlib.metadata
import os
import platform
import shutil
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aliblip.retrieval.calibration import BINS, candidates_with_truth, reliability
from aliblip.retrieval.metrics import RECALL_AT, RESAMPLES, bootstrap_means, hits, interval, summarize_ranks
from aliblip.retrieval.rankings import MATRIX, Retrieval, Side, final_order, ranks_of, write_rankings
from aliblip.runtime.distributed import world_size
from aliblip.runtime.files import read_json, write_json, write_json_lines
from aliblip.runtime.mistakes import UsageError
from aliblip.runtime.sameness import changes, told

_PACKAGES = ("torch", "transformers", "accelerate")
# Slices that are computed from the title; all others are columns of the data.
TITLE_SLICES = ("title_length", "script")
MOST_SLICES = 20
DIRECTION_NAMES = {"text_to_image": "text to image", "image_to_text": "image to text"}

# Files of an evaluation's folder.
RESULTS = "results.json"
RANKINGS = "rankings_{}.parquet"
COMPARISON = "comparison.json"
# In a model's folder: results of its evaluations that lie elsewhere.
EVALUATIONS = "evaluations"


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(
    retrieval: Retrieval,
    *,
    model_name: str,
    dataset_name: str,
    split: str,
    intervals: bool = False,
    slices: tuple[str, ...] = (),
    seconds_of_depth: dict[int, float] | None = None,
) -> dict[str, Any]:
    """The content of results.json.

    Args:
        retrieval: with or without truth; without, there are no recalls.
        model_name, dataset_name, split: for the results only.
        intervals: also 95 % bootstrap intervals.
        slices: columns of the data, "title_length" (in tokens) or "script", by whose values the recalls are split.
        seconds_of_depth: how long a run at each depth takes.

    Returns:
        A dict that JSON can hold. Everything but its `run` part depends on the model and the data alone.
    """
    stage = "itc" if retrieval.score == "itc" else "itm"
    results: dict[str, Any] = {
        "model": model_name,
        "dataset": dataset_name,
        "split": split,
        "num_images": len(retrieval.images),
        "num_texts": len(retrieval.titles),
        "k_rerank": retrieval.depths[-1],
        "score": retrieval.score,
        "fusion_weight": retrieval.fusion_weight,
        "itm_slope": retrieval.slope,
        "itm_offset": retrieval.offset,
    }
    if retrieval.has_truth:
        for name, direction, queries, gallery in retrieval.directions():
            results[name] = _measure_direction(retrieval, direction, queries, gallery, intervals)
        names = [name for name, *_ in retrieval.directions()]
        recalls = [results[name][stage][f"recall@{k}"] for name in names for k in RECALL_AT]
        results["mean_recall"] = float(np.mean(recalls))
        if intervals:
            results["mean_recall_interval"] = interval(_mean_recalls(retrieval, stage))
        if slices:
            results["slices"] = {name: _slice(retrieval, name, stage) for name in slices}
    results["run"] = {
        "num_processes": world_size(),
        "seconds": round(retrieval.seconds["total"], 3),
        "seconds_by_stage": {name: round(value, 3) for name, value in retrieval.seconds.items() if name != "total"},
        "versions": {
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in _PACKAGES},
        },
    }
    if retrieval.resumed_units:
        results["run"]["units_from_an_earlier_start"] = retrieval.resumed_units
    elif seconds_of_depth:
        results["run"]["seconds_by_k"] = {str(depth): round(value, 3) for depth, value in seconds_of_depth.items()}
    return results


def _measure_direction(retrieval: Retrieval, direction, queries: Side, gallery: Side, intervals: bool) -> dict:
    rankings, depths = direction.rankings, retrieval.depths
    ranks = {"itc": rankings.itc_ranks}
    if retrieval.score != "itc":
        ranks["itm"] = rankings.ranks
    measured: dict[str, Any] = {}
    for stage, of_queries in ranks.items():
        summary = _summary(of_queries, [*RECALL_AT, depths[-1]])
        measured[stage] = {f"recall@{k}": summary[f"recall@{k}"] for k in RECALL_AT}
        measured[stage]["mean_recall"] = float(np.mean(list(measured[stage].values())))
        measured[stage]["median_rank"] = summary["median_rank"]
        if intervals:
            measured[stage]["intervals"] = _intervals(of_queries, queries.product_id)
    if retrieval.score != "itc":
        measured["itc_recall@k_rerank"] = _summary(ranks["itc"], [depths[-1]])[f"recall@{depths[-1]}"]
        measured["by_k"] = []
        for depth in depths:
            at_depth = rankings.ranks
            if depth != depths[-1]:
                order = final_order(direction.candidates, depth, retrieval.score, retrieval.fusion_weight)
                at_depth = ranks_of(order, depth, rankings.itc_ranks, queries, gallery)
            summary = _summary(at_depth, RECALL_AT)
            measured["by_k"].append(
                {
                    "k": depth,
                    "ceiling": _summary(ranks["itc"], [depth])[f"recall@{depth}"],
                    **{f"recall@{k}": summary[f"recall@{k}"] for k in RECALL_AT},
                    "mean_recall": summary["mean_recall"],
                    "gain": summary["mean_recall"] - measured["itc"]["mean_recall"],
                }
            )
    if direction.candidates.margins is not None:
        blocks = candidates_with_truth(direction.candidates, depths[-1], queries, gallery)
        measured["calibration"] = reliability(blocks, retrieval.slope, retrieval.offset)
    measured["num_queries"] = int((rankings.itc_ranks > 0).sum())
    measured["num_queries_without_positive"] = int((rankings.itc_ranks == 0).sum())
    return measured


def _summary(ranks: Tensor, k) -> dict:
    return summarize_ranks(ranks.numpy(), sorted({*k}))


def _intervals(ranks: Tensor, product_id: Tensor) -> dict[str, list[float]]:
    found = ranks > 0
    if not found.any():
        return {}
    means = bootstrap_means(hits(ranks[found].numpy()), product_id[found].numpy())
    named = {f"recall@{k}": interval(means[:, number]) for number, k in enumerate(RECALL_AT)}
    return {**named, "mean_recall": interval(means.mean(axis=1))}


def _mean_recalls(retrieval: Retrieval, stage: str) -> np.ndarray:
    """Bootstrap resamples of the mean over all directions and k: the same products are drawn in both directions."""
    each = []
    for _, direction, queries, _ in retrieval.directions():
        ranks = direction.rankings.itc_ranks if stage == "itc" else direction.rankings.ranks
        found = ranks > 0
        if not found.any():
            return np.full(RESAMPLES, np.nan)
        each.append(bootstrap_means(hits(ranks[found].numpy()), queries.product_id[found].numpy()).mean(axis=1))
    return np.mean(each, axis=0)


def split_told(split: str, data_files: str | None) -> str:
    """What was measured: the split, or the file that was named in its place."""
    return split if data_files is None else data_files.rstrip("/").rpartition("/")[2]


# --- slices -----------------------------------------------------------------------------------------------------------


def _slice(retrieval: Retrieval, name: str, stage: str) -> list[dict[str, Any]]:
    """Recalls of the queries of each value, the most frequent values first."""
    values = {}
    for direction, _, queries, _ in retrieval.directions():
        values[direction] = _values(retrieval.titles, name)
        if queries is retrieval.images:  # of a table, a photo has the title of its row, the first one that names it
            places = torch.searchsorted(retrieval.titles.rows, retrieval.images.rows).tolist()
            values[direction] = [values[direction][place] for place in places]
    counts = Counter(value for of_queries in values.values() for value in of_queries)
    shown = [value for value, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_SLICES]]
    if name == "title_length":
        shown = [value for value in _LENGTHS if value in counts]
    rows = []
    for value in [*shown, None]:
        row: dict[str, Any] = {"value": value if value is not None else f"{len(counts) - len(shown)} other values"}
        for direction, found, _, _ in retrieval.directions():
            chosen = torch.tensor([v == value if value is not None else v not in shown for v in values[direction]])
            ranks = found.rankings.itc_ranks if stage == "itc" else found.rankings.ranks
            of_value, of_value_itc = ranks[chosen], found.rankings.itc_ranks[chosen]
            row[direction] = {"num_queries": int((of_value > 0).sum())}
            if row[direction]["num_queries"]:
                row[direction]["itc"] = {"mean_recall": _summary(of_value_itc, RECALL_AT)["mean_recall"]}
                summary = _summary(of_value, RECALL_AT)
                row[direction][stage] = {
                    **{f"recall@{k}": summary[f"recall@{k}"] for k in RECALL_AT},
                    "mean_recall": summary["mean_recall"],
                }
        if value is not None or len(counts) > len(shown):
            rows.append(row)
    return rows


def _values(titles: Side, name: str) -> list[str]:
    if name == "title_length":
        return [_length(int(tokens) - 2) for tokens in titles.attention_mask.sum(dim=1)]
    if name == "script":
        return [_script(text) for text in titles.texts]
    return [str(others.get(name)) for others in titles.others]


_LENGTHS = ("1 to 5 tokens", "6 to 10 tokens", "11 to 15 tokens", "16 to 20 tokens", "more than 20 tokens")


def _length(tokens: int) -> str:
    return _LENGTHS[min(max(tokens - 1, 0) // 5, 4)]


def _script(text: str) -> str:
    """The script of most letters of a title, as Unicode names it."""
    scripts = Counter(unicodedata.name(letter, "UNKNOWN").split()[0] for letter in text if letter.isalpha())
    return scripts.most_common(1)[0][0].capitalize() if scripts else "no letters"


# --- tables -----------------------------------------------------------------------------------------------------------


def format_table(results: dict) -> str:
    """The results as lines for a terminal; recalls in percent."""
    lines = [
        f"{results['model']} on {results['dataset']}, {results['split']}: "
        f"{results['num_images']:,} photos, {results['num_texts']:,} titles"
    ]
    run = results["run"]
    processes = "process" if run["num_processes"] == 1 else "processes"
    cost = f"({run['seconds']:.1f} s, {run['num_processes']} {processes})"
    if "mean_recall" not in results:
        return "\n".join([*lines, f"no right answers are known: rankings, and no recall   {cost}"])
    lines += ["", f"{'':<36}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'mean':>8}{'median rank':>14}"]
    scored = "" if results["score"] == "fused" else ", by ITM alone"
    for key, direction in DIRECTION_NAMES.items():
        if key not in results:
            continue
        indent = f"{'':<{len(direction)}}  "
        for stage, name in (("itc", "ITC"), ("itm", f"ITM of the {results['k_rerank']} best")):
            if stage not in results[key]:
                continue
            row = results[key][stage]
            recalls = "".join(f"{100 * row[f'recall@{k}']:8.1f}" for k in RECALL_AT)
            label = f"{direction}  {name}" if stage == "itc" else f"{indent}{name}"
            lines.append(f"{label:<36}{recalls}{100 * row['mean_recall']:8.1f}{row['median_rank']:14g}")
            if "intervals" in row:
                bounds = [row["intervals"].get(f"recall@{k}") for k in RECALL_AT] + [
                    row["intervals"].get("mean_recall")
                ]
                shown = ", ".join(f"{100 * low:.1f} to {100 * high:.1f}" for low, high in filter(None, bounds))
                lines.append(f"{indent}  95 %: {shown}")
        if "by_k" in results[key]:
            ceiling = 100 * results[key]["itc_recall@k_rerank"]
            lines.append(f"{indent}ceiling of re-ranking, ITC recall@{results['k_rerank']}: {ceiling:.1f}")
        if missing := results[key]["num_queries_without_positive"]:
            lines.append(f"{indent}queries without a right answer in the gallery, left out: {missing}")
    if calibrated := calibration_told(results):
        lines += ["", calibrated]
    if any(len(results[key].get("by_k", ())) > 1 for key in DIRECTION_NAMES if key in results):
        lines += ["", *_depth_lines(results)]
    for name, rows in results.get("slices", {}).items():
        lines += ["", *_slice_lines(name, rows)]
    what = "ITC" if results["score"] == "itc" else "ITM"
    six = "six" if "image_to_text" in results else "three"
    around = ""
    if "mean_recall_interval" in results:
        around = " (95 %: {:.2f} to {:.2f})".format(*(100 * value for value in results["mean_recall_interval"]))
    lines += ["", f"mean of the {six} {what} recalls{scored}: {100 * results['mean_recall']:.2f}{around}   {cost}"]
    return "\n".join(lines)


def calibration_told(results: dict) -> str:
    """How far the match probability can be believed, in one line; empty where nothing was re-ranked."""
    if results["score"] == "itc":
        return ""
    measured = {key: results[key]["calibration"] for key in DIRECTION_NAMES if "calibration" in results.get(key, {})}
    if not measured:
        return "itm_probability: not measured, since --k_rerank all keeps the match logits alone"
    errors = ", ".join(
        f"{each['expected_calibration_error']:.3f} {DIRECTION_NAMES[key]}" for key, each in measured.items()
    )
    shares = " and ".join(f"{100 * each['share_right']:.1f} %" for each in measured.values())
    made = "as trained"
    if (results["itm_slope"], results["itm_offset"]) != (1.0, 0.0):
        made = f"sigmoid({results['itm_slope']:g} x margin {results['itm_offset']:+g})"
    return (
        f"itm_probability, {made}: expected calibration error {errors} ({BINS} bins; {shares} of the "
        f"{results['k_rerank']} best are right)"
    )


def _depth_lines(results: dict) -> list[str]:
    """What each number of re-ranked candidates gives and costs."""
    seconds = results["run"].get("seconds_by_k", {})
    lines = [f"{'re-ranked':<20}{'k':>8}{'ceiling':>10}{'R@1':>8}{'mean':>8}{'gain':>8}{'seconds':>10}"]
    for key, direction in DIRECTION_NAMES.items():
        for number, row in enumerate(results.get(key, {}).get("by_k", ())):
            took = f"{seconds[str(row['k'])]:10.1f}" if str(row["k"]) in seconds else f"{'':>10}"
            lines.append(
                f"{direction if not number else '':<20}{row['k']:>8}{100 * row['ceiling']:10.1f}"
                f"{100 * row['recall@1']:8.1f}{100 * row['mean_recall']:8.1f}{100 * row['gain']:+8.1f}{took}"
            )
    if seconds:
        lines.append("seconds: a run of both stages; the largest k was measured, the others follow from their work")
    return lines


def _slice_lines(name: str, rows: list[dict]) -> list[str]:
    present = [key for key in DIRECTION_NAMES if any(key in row for row in rows)]
    header = "".join(f"{DIRECTION_NAMES[key]:>16}{'R@1':>8}{'mean':>8}" for key in present)
    lines = [f"{'by ' + name:<28}{header}"]
    for row in rows:
        cells = ""
        for key in present:
            measured = row[key].get("itm", row[key].get("itc", {}))
            shown = [f"{100 * measured[k]:8.1f}" if k in measured else f"{'':>8}" for k in ("recall@1", "mean_recall")]
            cells += f"{row[key]['num_queries']:>16}{''.join(shown)}"
        lines.append(f"{row['value'][:27]:<28}{cells}")
    return lines


# --- files ------------------------------------------------------------------------------------------------------------


def check_results_of_others(output_dir: Path, model_name: str, dataset_name: str, split: str) -> None:
    """Refuse to write over the results of another model, data set or split.

    Raises:
        UsageError: there are some; the message says of what.
    """
    path = output_dir / RESULTS
    if not path.is_file():
        return
    try:
        before = read_json(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read as results: give another --output_dir") from error
    if changed := changes(before, now := {"model": model_name, "dataset": dataset_name, "split": split}, names=now):
        raise UsageError(
            f"{path} holds other results ({told(changed)}): give another --output_dir, or --overwrite_output_dir to "
            "replace them"
        )


def write_results(output_dir: Path, retrieval: Retrieval, results: dict) -> list[Path]:
    """Write `results.json`, the rankings as Parquet, `skipped.jsonl` where rows were skipped, and put the match logits
    of all pairs beside them where there are any. Main process only.

    Returns:
        The files written.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    written = []
    skipped = output_dir / "skipped.jsonl"
    # What an earlier run left in this folder would be read as this one's.
    for name in (RESULTS, skipped.name, MATRIX, COMPARISON, *map(RANKINGS.format, DIRECTION_NAMES)):
        (output_dir / name).unlink(missing_ok=True)
    if retrieval.skipped:
        write_json_lines(skipped, retrieval.skipped)
        written.append(skipped)
    for name, direction, queries, gallery in retrieval.directions():
        path = output_dir / RANKINGS.format(name)
        write_rankings(path, direction, queries, gallery)
        written.append(path)
    if retrieval.matrix is not None:
        # A second name for the file: if this start ends before all is written, the next one finds it with the parts.
        written.append(output_dir / MATRIX)
        try:
            os.link(retrieval.matrix, written[-1])
        except OSError:  # a file system without links
            shutil.copyfile(retrieval.matrix, written[-1])
    write_json(output_dir / RESULTS, results)  # last: where it is, all is there
    return [output_dir / RESULTS, *written]


__all__ = [
    "COMPARISON",
    "DIRECTION_NAMES",
    "EVALUATIONS",
    "RANKINGS",
    "RESULTS",
    "TITLE_SLICES",
    "calibration_told",
    "check_results_of_others",
    "format_table",
    "measure",
    "split_told",
    "write_results",
]
