"""A finished retrieval as pictures: fills the contact sheet and the HTML report with its photos and numbers."""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from aliblip.data.sources import Source, decode
from aliblip.retrieval.metrics import RECALL_AT
from aliblip.retrieval.rankings import Retrieval
from aliblip.retrieval.report import (
    Chart,
    Curve,
    Examples,
    Hit,
    Reliability,
    SheetRow,
    Table,
    contact_sheet,
    html_report,
)
from aliblip.retrieval.results import DIRECTION_NAMES, calibration_told
from aliblip.runtime.mistakes import UsageError, usage_errors
from reading_aliblip import UnusableItem

SHEET_QUERIES = 8
SHEET_PHOTOS = 3
REPORT_QUERIES = 10
REPORT_PHOTOS = 5


def draw_contact_sheet(
    path: Path, retrieval: Retrieval, photos: Source, heading: str, rows: Sequence[int] | None = None, seed: int = 0
) -> Path:
    """Draw titles with their best photos.

    Args:
        photos: the source of the photos.
        rows: source rows of the titles; None: some, drawn at random with `seed`.

    Raises:
        UsageError: rows that are not there, or could not be used, or a photo that can't be read any more.
    """
    titles = retrieval.titles
    if rows is None:
        chosen = random.Random(seed).sample(range(len(titles)), min(SHEET_QUERIES, len(titles)))
    else:
        place = {row: index for index, row in enumerate(titles.rows.tolist())}
        if missing := [row for row in rows if row not in place]:
            raise UsageError(f"--contact_sheet_rows: title {missing[0]} is not among the {len(titles)} usable ones")
        chosen = [place[row] for row in rows]
    drawn = [_sheet_row(retrieval, photos, query, SHEET_PHOTOS) for query in chosen]
    return contact_sheet(drawn, path, heading=heading)


def write_report(path: Path, retrieval: Retrieval, photos: Source, results: dict, heading: str) -> Path:
    """The whole run as one HTML page.

    Raises:
        UsageError: a photo can't be read any more.
    """
    run = results["run"] | {"score": results["score"], "fusion weight": results["fusion_weight"]}
    note = f"{results['num_images']:,} photos, {results['num_texts']:,} titles"
    if not retrieval.has_truth:
        found = random.Random(0).sample(range(len(retrieval.titles)), min(REPORT_QUERIES, len(retrieval.titles)))
        rows = [_sheet_row(retrieval, photos, query, REPORT_PHOTOS) for query in found]
        return html_report(path, heading=heading, note=note, examples=[Examples("Some titles", rows)], run=run)
    ranks = retrieval.text_to_image.rankings.ranks
    with_positive = torch.nonzero(ranks > 0).flatten()
    worst = with_positive[ranks[with_positive].argsort(descending=True, stable=True)]
    scores = retrieval.text_to_image.rankings.scores[:, 0]
    first = torch.nonzero(ranks == 1).flatten()
    best = first[scores[first].argsort(descending=True, stable=True)]
    examples = [
        Examples("Worst misses", _pictured(retrieval, photos, worst[ranks[worst] > 1]), "the right photo comes last"),
        Examples("Best hits", _pictured(retrieval, photos, best), "right photos of the highest score"),
    ]
    return html_report(
        path,
        heading=heading,
        note=note,
        tables=_tables(results),
        charts=_charts(retrieval, results),
        reliability=_reliability(results),
        slices=_slices(results),
        examples=examples,
        run=run,
    )


def _sheet_row(retrieval: Retrieval, photos: Source, query: int, count: int, with_right: bool = False) -> SheetRow:
    found, images = retrieval.text_to_image.rankings, retrieval.images
    places = list(range(min(count, found.ids.shape[1])))
    rank = 0 if found.ranks is None else int(found.ranks[query])
    if with_right and len(places) < rank <= found.ids.shape[1]:
        places.append(rank - 1)
    hits = []
    for place in places:
        photo = int(found.ids[query, place])
        row = int(images.rows[photo])
        with usage_errors(UnusableItem, told=f"the photo of row {row} can't be read any more: {{}}"):
            image = decode(next(iter(photos.read_range(row, row + 1))), "images").image
        right = found.ranks is not None and retrieval.is_right(query, photo)
        name = images.names[photo] if images.names else f"row {row}"
        score = found.scores[query, place]
        # a photo beyond those that were re-ranked has its ITC similarity alone
        hits.append(Hit(image, float(found.itc[query, place] if score.isnan() else score), right, place + 1, name))
    return SheetRow(retrieval.titles.texts[query], hits, rank=rank)


def _pictured(retrieval: Retrieval, photos: Source, queries: Tensor) -> list[SheetRow]:
    chosen = queries[:REPORT_QUERIES].tolist()
    return [_sheet_row(retrieval, photos, query, REPORT_PHOTOS, with_right=True) for query in chosen]


def _tables(results: dict) -> list[Table]:
    columns = ["", *(f"R@{k}" for k in RECALL_AT), "mean", "95 %", "median rank"]
    rows, depths = [], []
    for key, direction in DIRECTION_NAMES.items():
        for stage in ("itc", "itm"):
            measured = results.get(key, {}).get(stage)
            if measured is None:
                continue
            bounds = measured.get("intervals", {}).get("mean_recall")
            shown = None if bounds is None else f"{100 * bounds[0]:.1f} to {100 * bounds[1]:.1f}"
            recalls = [100 * measured[f"recall@{k}"] for k in RECALL_AT]
            label = f"{direction}, {stage.upper()}"
            rows.append([label, *recalls, 100 * measured["mean_recall"], shown, measured["median_rank"]])
        for row in results.get(key, {}).get("by_k", ()):
            seconds = results["run"].get("seconds_by_k", {}).get(str(row["k"]))
            shares = [100 * row[name] for name in ("ceiling", "recall@1", "mean_recall", "gain")]
            depths.append([direction, row["k"], *shares, seconds])
    tables = [Table("Results", columns, rows, "recalls in percent; the interval is that of the mean")]
    if depths:
        columns = ["", "k", "ceiling", "R@1", "mean", "gain over ITC", "seconds"]
        tables.append(Table("By number of re-ranked candidates", columns, depths))
    return tables


def _slices(results: dict) -> list[Table]:
    tables = []
    for name, rows in results.get("slices", {}).items():
        keys = [key for key in DIRECTION_NAMES if any(key in row for row in rows)]
        columns = [name]
        for key in keys:
            columns += [f"{DIRECTION_NAMES[key]}: queries", "R@1", "mean"]
        cells = []
        for row in rows:
            line = [row["value"]]
            for key in keys:
                measured = row[key].get("itm", row[key].get("itc"))
                shares = [None, None] if measured is None else [100 * measured[k] for k in ("recall@1", "mean_recall")]
                line += [row[key]["num_queries"], *shares]
            cells.append(line)
        tables.append(Table(f"By {name}", columns, cells))
    return tables


def _charts(retrieval: Retrieval, results: dict) -> list[Chart]:
    curves, by_depth = [], []
    for key, direction, _, _ in retrieval.directions():
        name = DIRECTION_NAMES[key]
        stages = [("ITC", direction.rankings.itc_ranks)]
        if retrieval.score != "itc":
            stages.append(("ITM", direction.rankings.ranks))
        most = max(direction.rankings.ids.shape[1], max(RECALL_AT))
        for stage, ranks in stages:
            ranks = ranks[ranks > 0]
            if len(ranks):
                share = torch.bincount(ranks.clamp(max=most + 1), minlength=most + 2)[1 : most + 1].cumsum(0)
                curves.append(Curve(f"{name}, {stage}", range(1, most + 1), (share / len(ranks)).tolist()))
        rows = results[key].get("by_k", ())
        if len(rows) > 1 and results[key]["num_queries"]:
            depths = [row["k"] for row in rows]
            by_depth.append(Curve(f"{name}, R@1", depths, [row["recall@1"] for row in rows]))
            by_depth.append(Curve(f"{name}, ceiling", depths, [row["ceiling"] for row in rows], dashed=True))
    charts = [Chart("Recall at k", curves)] if curves else []
    if by_depth:
        charts.append(Chart("Recall@1 by number of re-ranked candidates", by_depth, x_label="re-ranked"))
    return charts


def _reliability(results: dict) -> Reliability | None:
    """Of the match probability; None where it was not measured."""
    curves = {}
    for key, direction in DIRECTION_NAMES.items():
        bins = results.get(key, {}).get("calibration", {}).get("bins", ())
        filled = [row for row in bins if row["candidates"]]
        if filled:
            curves[direction] = [(row["mean_probability"], row["share_right"], row["candidates"]) for row in filled]
    return Reliability("Match probability", curves, calibration_told(results)) if curves else None


__all__ = ["draw_contact_sheet", "write_report"]
