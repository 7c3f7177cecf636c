"""Intervals, slices, the fusion weight, and the files of an evaluation, on rankings made by hand."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from handmade import NAMES, TITLES, random_retrieval, written

from aliblip.retrieval import results as numbers
from aliblip.retrieval.metrics import bootstrap_means, hits, interval
from aliblip.retrieval.rankings import tune_fusion
from aliblip.runtime.mistakes import UsageError

# --- intervals --------------------------------------------------------------------------------------------------------


def test_bootstrap_means_are_those_of_whole_products_drawn_one_by_one():
    values = np.array([[1.0, 5.0], [0.0, 5.0], [1.0, 6.0], [0.0, 7.0], [0.0, 1.0]])
    product_id = np.array([7, 7, 3, 9, 3])
    means = bootstrap_means(values, product_id, resamples=20, seed=4)
    generator, products = np.random.default_rng(4), [3, 7, 9]
    for row in means:
        drawn = [products[number] for number in generator.integers(3, size=3)]
        slow = np.concatenate([values[product_id == product] for product in drawn])
        assert row == pytest.approx(slow.mean(axis=0))
    assert bootstrap_means(values, product_id, resamples=20, seed=5).tolist() != means.tolist()
    with pytest.raises(ValueError, match="at least one query"):
        bootstrap_means(values[:0], product_id[:0])


def test_intervals_hold_the_truth_as_often_as_they_say():
    generator = np.random.default_rng(0)
    held = 0
    for trial in range(200):
        sample = (generator.random((100, 1)) < 0.3).astype(float)
        low, high = interval(bootstrap_means(sample, np.arange(100), resamples=300, seed=trial)[:, 0])
        held += low <= 0.3 <= high
    assert 0.89 <= held / 200 <= 0.99  # 0.95, give or take the trials' own three deviations


def test_queries_of_one_product_make_the_interval_wider():
    ranks = np.repeat([1, 50], 25)
    apart = interval(bootstrap_means(hits(ranks), np.arange(50))[:, 0])
    together = interval(bootstrap_means(hits(ranks), np.repeat(np.arange(10), 5))[:, 0])
    assert together[1] - together[0] > 1.5 * (apart[1] - apart[0])


def test_results_carry_intervals_around_the_recalls():
    results = numbers.measure(random_retrieval(), **NAMES, intervals=True)
    for direction in ("text_to_image", "image_to_text"):
        for stage in ("itc", "itm"):
            measured = results[direction][stage]
            for key, (low, high) in measured["intervals"].items():
                assert low <= measured[key] <= high and high - low > 0.01
    low, high = results["mean_recall_interval"]
    assert low < results["mean_recall"] < high
    table = numbers.format_table(results)
    assert table.count("95 %") == 5 and f"{100 * low:.2f} to {100 * high:.2f}" in table
    assert "re-ranked" in table and json.loads(json.dumps(results)) == results


# --- the fusion weight ------------------------------------------------------------------------------------------------


def test_the_fusion_weight_is_the_one_of_the_highest_mean_recall():
    found = random_retrieval(size=60, depths=(60,))
    weight, recalls = tune_fusion(found)
    assert recalls[weight] == max(recalls.values()) > recalls[0.0]
    for tried, recall in recalls.items():
        again = random_retrieval(size=60, depths=(60,), weight=tried)
        assert numbers.measure(again, **NAMES)["mean_recall"] == pytest.approx(recall)
    itc_alone = random_retrieval(score="itc")
    itc_alone.text_to_image.candidates.itm_logits = None
    for nothing in (itc_alone, random_retrieval(truth=False)):
        with pytest.raises(ValueError, match="can be tuned only where"):
            tune_fusion(nothing)


# --- slices -----------------------------------------------------------------------------------------------------------


def test_slices_split_the_queries_and_their_recalls():
    found = random_retrieval(size=36)
    results = numbers.measure(found, **NAMES, slices=("category", "script", "title_length"))
    ranks = found.text_to_image.rankings.ranks
    for row in results["slices"]["category"]:
        own = ranks[0 if row["value"] == "even" else 1 :: 2]
        assert row["text_to_image"]["num_queries"] == 18
        assert row["text_to_image"]["itm"]["recall@5"] == pytest.approx(float((own <= 5).double().mean()))
    assert [(row["value"], row["text_to_image"]["num_queries"]) for row in results["slices"]["script"]] == [
        ("Latin", 18),
        ("Cjk", 6),
        ("Cyrillic", 6),
        ("no letters", 6),
    ]
    lengths = {row["value"]: row["text_to_image"]["num_queries"] for row in results["slices"]["title_length"]}
    assert lengths == {"1 to 5 tokens": 30, "6 to 10 tokens": 6}
    assert "by script" in numbers.format_table(results)


def test_rare_values_are_put_together():
    found = random_retrieval(size=40)
    for number, others in enumerate(found.titles.others):
        others["category"] = f"c{min(number, 30)}"
    rows = numbers.measure(found, **NAMES, slices=("category",))["slices"]["category"]
    assert rows[0]["value"] == "c30" and len(rows) == numbers.MOST_SLICES + 1
    assert rows[-1]["value"] == "11 other values"
    assert sum(row["text_to_image"]["num_queries"] for row in rows) == 40


# --- queries without an answer ----------------------------------------------------------------------------------------


def test_queries_without_a_right_answer_are_left_out_and_counted():
    found = random_retrieval()
    order = found.text_to_image.rankings
    order.ranks, order.itc_ranks = order.ranks.clone(), order.itc_ranks.clone()
    order.ranks[:7] = order.itc_ranks[:7] = 0
    results = numbers.measure(found, **NAMES, intervals=True)
    measured = results["text_to_image"]
    assert (measured["num_queries"], measured["num_queries_without_positive"]) == (33, 7)
    assert measured["itm"]["recall@1"] == pytest.approx(float((order.ranks[7:] == 1).double().mean()))
    assert "without a right answer in the gallery, left out: 7" in numbers.format_table(results)
    order.ranks[:] = order.itc_ranks[:] = 0
    nothing = numbers.measure(found, **NAMES, intervals=True)["text_to_image"]
    assert nothing["num_queries"] == 0 and np.isnan(nothing["itm"]["recall@1"])


# --- files and comparisons --------------------------------------------------------------------------------------------


def test_rankings_are_kept_with_both_raw_scores_and_the_names(tmp_path):
    found = random_retrieval(size=12)
    written(tmp_path, found)
    table = pq.read_table(tmp_path / "rankings_text_to_image.parquet").to_pylist()
    order = found.text_to_image.rankings
    for query, row in enumerate(table):
        assert (row["query"], row["query_name"], row["query_text"]) == (2 * query, f"{query}.jpg", TITLES[query % 6])
        assert row["ids"] == (2 * order.ids[query]).tolist()
        assert row["names"] == [f"{photo}.jpg" for photo in order.ids[query].tolist()]
        assert row["score"] == pytest.approx([a + b for a, b in zip(row["itc"], row["itm_logit"], strict=True)])
        assert (row["rank"], row["rank_itc"]) == (int(order.ranks[query]), int(order.itc_ranks[query]))
    other = pq.read_table(tmp_path / "rankings_image_to_text.parquet")
    assert "query_text" not in other.column_names and other.num_rows == 12


def test_rankings_that_could_not_be_written_leave_no_older_results_beside_them(tmp_path, monkeypatch):
    written(tmp_path, random_retrieval())

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(numbers, "write_rankings", full)
    with pytest.raises(OSError, match="no space"):
        written(tmp_path, random_retrieval())
    assert not (tmp_path / "results.json").exists()


def test_without_truth_there_are_rankings_and_no_recall(tmp_path):
    found = random_retrieval(truth=False)
    results = numbers.measure(found, **NAMES, intervals=True, slices=("script",))
    assert "mean_recall" not in results and "text_to_image" not in results
    assert "no right answers are known" in numbers.format_table(results)
    numbers.write_results(tmp_path, found, results)
    assert "rank" not in pq.read_schema(tmp_path / "rankings_text_to_image.parquet").names


def test_results_of_others_are_not_written_over(tmp_path):
    numbers.check_results_of_others(tmp_path, *NAMES.values())
    written(tmp_path, random_retrieval())
    numbers.check_results_of_others(tmp_path, *NAMES.values())
    with pytest.raises(UsageError, match=r"holds other results \(model was m, is other\): give another --output_dir"):
        numbers.check_results_of_others(tmp_path, "other", "d", "validation")
    (tmp_path / "results.json").write_text("[1]")
    with pytest.raises(UsageError, match=r"results\.json can't be read as results: give another --output_dir"):
        numbers.check_results_of_others(tmp_path, *NAMES.values())
