"""Two runs on the same data compared: is the difference more than chance?

    compared = compare(output_dir / "results.json", other / "results.json")
    print(format_comparison(compared))

Differences have 95 % intervals of a paired bootstrap over products. Recalls are fractions, printed in percent.
"""

from pathlib import Path
from typing import Any

import numpy as np

from aliblip.retrieval.metrics import RECALL_AT, RESAMPLES, bootstrap_means, hits, interval
from aliblip.retrieval.rankings import read_ranks
from aliblip.retrieval.results import DIRECTION_NAMES, RANKINGS
from aliblip.runtime.files import read_json
from aliblip.runtime.mistakes import UsageError, first_line


def compare(here: Path, other: Path) -> dict[str, Any]:
    """Paired bootstrap of two runs on the same data: the differences here minus other, with intervals.

    Only queries that both runs have are counted; the same products are drawn for both in each resample.

    Args:
        here, other: results.json files, each with its rankings beside it.

    Returns:
        {"here", "other": model names, "text_to_image": {"num_queries", "only_in_one", "recall@k" and "mean_recall":
        {"here", "other", "difference", "interval", "p"}}, ...}. `p`: share of resamples whose difference has not the
        sign of the whole, doubled (two-sided), at most 1.

    Raises:
        UsageError: a file is missing or is not such a file, or the two runs are not on the same data.
    """
    compared: dict[str, Any] = {"here": _results_of(here)["model"], "other": _results_of(other)["model"]}
    for name in DIRECTION_NAMES:
        files = [path.parent / RANKINGS.format(name) for path in (here, other)]
        if name == "image_to_text" and not all(file.is_file() for file in files):
            continue
        compared[name] = _compare_direction(*map(read_ranks, files), other)
    return compared


def check_comparable(other: Path) -> None:
    """Look before a long run whether it can be compared with another one.

    Raises:
        UsageError: as `compare`.
    """
    _results_of(other)
    read_ranks(other.parent / RANKINGS.format("text_to_image"))


def _results_of(path: Path) -> dict:
    try:
        results = read_json(path)
        results["model"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{path} is not a results.json of evaluate_retrieval.py ({first_line(error)})") from error
    return results


def _compare_direction(here: dict, other: dict, path: Path) -> dict[str, Any]:
    mine, theirs = ({query: place for place, query in enumerate(run["query"])} for run in (here, other))
    shared = [query for query in here["query"] if query in theirs]
    identity = [key for key in ("product_id", "query_text") if key in here and key in other]
    pairs = [(mine[query], theirs[query]) for query in shared]
    different = sum(any(here[key][a] != other[key][b] for key in identity) for a, b in pairs)
    if not shared or different:
        raise UsageError(
            f"{path} is of other data: {different} of {len(shared)} common queries have another title or product"
        )
    ranks = np.array([(here["rank"][a], other["rank"][b]) for a, b in pairs])
    product_id = np.array([here["product_id"][a] for a, _ in pairs])
    found = (ranks > 0).all(axis=1)
    ranks, product_id = ranks[found], product_id[found]
    result: dict[str, Any] = {
        "num_queries": len(ranks),
        "only_in_one": len(mine) + len(theirs) - 2 * len(shared),
    }
    if not len(ranks):
        return result
    each = [hits(column) for column in ranks.T]
    each = [np.column_stack([values, values.mean(axis=1)]) for values in each]
    draws = bootstrap_means(each[0] - each[1], product_id)
    for number, key in enumerate([*(f"recall@{k}" for k in RECALL_AT), "mean_recall"]):
        values = [float(side[:, number].mean()) for side in each]
        difference = values[0] - values[1]
        against = (draws[:, number] <= 0) if difference > 0 else (draws[:, number] >= 0)
        result[key] = {
            "here": values[0],
            "other": values[1],
            "difference": difference,
            "interval": interval(draws[:, number]),
            "p": min(1.0, 2 * float(against.mean())),
        }
    return result


def format_comparison(compared: dict) -> str:
    """A comparison as lines for a terminal; recalls and differences in percent points."""
    lines = [f"{compared['here']} (here) against {compared['other']} (other)"]
    for name, direction in DIRECTION_NAMES.items():
        if name not in compared:
            continue
        run = compared[name]
        lines.append(f"{direction}: {run['num_queries']} queries of both, {run['only_in_one']} of one alone")
        for key in [*(f"recall@{k}" for k in RECALL_AT), "mean_recall"]:
            if key not in run:
                continue
            row = run[key]
            low, high = (100 * value for value in row["interval"])
            p = f"p = {row['p']:.3f}" if row["p"] >= 2 / RESAMPLES else f"p < {2 / RESAMPLES:.3f}"
            lines.append(
                f"  {key:<12}{100 * row['here']:8.1f}{100 * row['other']:8.1f}   difference "
                f"{100 * row['difference']:+.1f} (95 %: {low:+.1f} to {high:+.1f}, {p})"
            )
    return "\n".join(lines)


__all__ = ["check_comparable", "compare", "format_comparison"]
