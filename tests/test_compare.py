"""Two runs on the same data, compared by a paired bootstrap."""

from __future__ import annotations

import json

import numpy as np
import pytest
from handmade import random_retrieval, written

from aliblip.retrieval.compare import check_comparable, compare, format_comparison
from aliblip.retrieval.metrics import bootstrap_means, hits, interval
from aliblip.runtime.mistakes import UsageError


def test_comparison_is_paired_and_knows_chance_from_difference(tmp_path):
    options = {"size": 120, "signal": 3.0, "depths": (120,)}
    better, worse = random_retrieval(**options), random_retrieval(**options, weight=20.0)
    here, other = written(tmp_path / "a", better, model_name="a"), written(tmp_path / "b", worse, model_name="b")
    compared = compare(here, other)
    row = compared["text_to_image"]["mean_recall"]
    assert compared["here"] == "a" and compared["text_to_image"]["num_queries"] == 120
    results = [json.loads(path.read_text())["text_to_image"]["itm"]["mean_recall"] for path in (here, other)]
    assert [row["here"], row["other"]] == pytest.approx(results)
    assert row["difference"] > 0 and row["interval"][0] > 0 and row["p"] < 0.01
    # hits of two runs on the same queries go together: the interval is narrower than that of independent runs
    ranks = [run.text_to_image.rankings.ranks.numpy() for run in (better, worse)]
    apart = [bootstrap_means(hits(r), np.arange(120), seed=s).mean(axis=1) for s, r in enumerate(ranks)]
    low, high = interval(apart[0] - apart[1])
    assert row["interval"][1] - row["interval"][0] < high - low
    same = compare(here, here)["text_to_image"]["mean_recall"]
    assert (same["difference"], same["interval"], same["p"]) == (0.0, [0.0, 0.0], 1.0)
    back = compare(other, here)["text_to_image"]["mean_recall"]
    assert back["difference"] == pytest.approx(-row["difference"]) and back["p"] == row["p"]
    text = format_comparison(compared)
    assert "a (here) against b (other)" in text and "difference +" in text


def test_what_can_not_be_compared_is_refused(tmp_path):
    here = written(tmp_path / "a", random_retrieval())
    other = written(tmp_path / "b", random_retrieval(product_id=[n // 2 for n in range(40)]))
    with pytest.raises(UsageError, match="is of other data: 39 of 40"):
        compare(here, other)
    with pytest.raises(UsageError, match=r"is not a results\.json"):
        check_comparable(tmp_path / "nowhere" / "results.json")
    blind = written(tmp_path / "c", random_retrieval(truth=False))
    with pytest.raises(UsageError, match="without truth can't be compared"):
        check_comparable(blind)
    (tmp_path / "a" / "rankings_text_to_image.parquet").unlink()
    with pytest.raises(UsageError, match="can't be read"):
        check_comparable(here)
