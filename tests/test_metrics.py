"""The metrics against full sorts in plain Python."""

import random

import numpy as np
import pytest
import torch
from helpers import ROOT

from aliblip.retrieval import metrics


def slow_rankings(scores):
    """Full rankings: higher score first, of equal ones the lower id."""
    return [sorted(range(len(row)), key=lambda item: (-row[item], item)) for row in scores.tolist()]


def slow_rank(ranking, query_id, gallery_ids):
    return next((place for place, item in enumerate(ranking, 1) if gallery_ids[item] == query_id), 0)


def chunks_of(scores, size):
    return lambda: ((start, scores[:, start : start + size]) for start in range(0, scores.shape[1], size))


def example(seed, dtype=torch.float32):
    """Scores with many ties, several positives, and queries without any."""
    generator = torch.Generator().manual_seed(seed)
    queries, gallery = 40, 53
    scores = torch.randint(-4, 5, (queries, gallery), generator=generator).to(dtype) / 4
    query_ids = torch.randint(0, 30, (queries,), generator=generator)
    gallery_ids = torch.randint(5, 25, (gallery,), generator=generator)
    return scores, query_ids, gallery_ids


@pytest.mark.parametrize("chunk", [1, 7, 52, 53, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunked_ranks_equal_a_full_sort(chunk, dtype):
    for seed in range(5):
        scores, query_ids, gallery_ids = example(seed, dtype)
        ranks = metrics.best_positive_ranks(chunks_of(scores, chunk), query_ids, gallery_ids)
        expected = [
            slow_rank(ranking, int(query), gallery_ids.tolist())
            for ranking, query in zip(slow_rankings(scores), query_ids, strict=True)
        ]
        assert ranks.tolist() == expected
        assert 0 in expected and max(expected) > 10  # the example has queries without a positive, and late hits


def test_scores_of_minus_infinity_still_rank():
    scores = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    ranks = metrics.best_positive_ranks(chunks_of(scores, 2), torch.tensor([7]), torch.tensor([1, 2, 7]))
    assert ranks.tolist() == [3]


def test_chunks_have_to_cover_the_gallery_in_order():
    scores, query_ids, gallery_ids = example(0)
    with pytest.raises(ValueError, match="cover 50 gallery items, the product ids 53"):
        metrics.best_positive_ranks(chunks_of(scores[:, :50], 10), query_ids, gallery_ids)
    with pytest.raises(ValueError, match="expected a chunk from 0, got one from 3"):
        metrics.best_positive_ranks(lambda: [(3, scores[:, 3:])], query_ids, gallery_ids)


@pytest.mark.parametrize("k", [1, 8, 53])
def test_ranks_after_reranking_equal_the_full_final_ranking(k):
    for seed in range(5):
        scores, query_ids, gallery_ids = example(seed)
        first = torch.tensor(slow_rankings(scores))
        generator = torch.Generator().manual_seed(seed)
        new_order = torch.rand(len(first), k, generator=generator).argsort(dim=1)
        reranked = first[:, :k].gather(1, new_order)
        final = torch.cat([reranked, first[:, k:]], dim=1)
        first_ranks = metrics.best_positive_ranks(chunks_of(scores, 10), query_ids, gallery_ids)
        ranks = metrics.ranks_after_reranking(reranked, first_ranks, query_ids, gallery_ids)
        expected = [
            slow_rank(ranking, int(query), gallery_ids.tolist())
            for ranking, query in zip(final.tolist(), query_ids, strict=True)
        ]
        assert ranks.tolist() == expected


def test_short_rankings_give_zero_where_no_positive_is_inside():
    rankings = torch.tensor([[2, 0], [1, 3], [0, 1]])
    ranks = metrics.ranks_in_rankings(rankings, torch.tensor([10, 11, 12]), torch.tensor([10, 11, 12, 11]))
    assert ranks.tolist() == [2, 1, 0]


def test_summary_leaves_out_and_counts_queries_without_a_positive():
    ranks = np.array([1, 0, 3, 7, 20, 0])
    summary = metrics.summarize_ranks(ranks)
    assert summary == {
        "recall@1": 1 / 4,
        "recall@5": 2 / 4,
        "recall@10": 3 / 4,
        "mean_recall": 0.5,
        "median_rank": 5.0,
        "mean_rank": 31 / 4,
        "num_queries": 4,
        "num_queries_without_positive": 2,
    }


def test_summary_equals_counting_by_hand():
    generator = random.Random(0)
    for _ in range(20):
        ranks = [generator.randrange(0, 30) for _ in range(generator.randrange(1, 40))]
        counted = sorted(rank for rank in ranks if rank)
        if not counted:
            continue
        summary = metrics.summarize_ranks(ranks, k=(3,))
        middle = len(counted) // 2
        median = counted[middle] if len(counted) % 2 else (counted[middle - 1] + counted[middle]) / 2
        assert summary["recall@3"] == sum(rank <= 3 for rank in counted) / len(counted)
        assert summary["median_rank"] == median
        assert summary["mean_rank"] == pytest.approx(sum(counted) / len(counted))


def test_no_query_with_a_positive_gives_nan_and_not_zero():
    summary = metrics.summarize_ranks([0, 0])
    assert np.isnan(summary["recall@1"]) and np.isnan(summary["median_rank"])
    assert summary["num_queries_without_positive"] == 2


@pytest.mark.parametrize("k", [(), (0,), (5, -1)])
def test_k_below_one_is_refused(k):
    with pytest.raises(ValueError, match="k"):
        metrics.summarize_ranks([1, 2], k=k)


def test_truth_as_lists_of_ids():
    ranks = metrics.ranks_from_positives([[4, 0, 2], [1, 3, 0], [0, 1]], [[2, 9], [], [5]])
    assert ranks.tolist() == [3, 0, 3]
    with pytest.raises(ValueError, match="2 rankings, 1 lists"):
        metrics.ranks_from_positives([[0], [1]], [[0]])


def test_the_evaluate_metric_takes_rankings_or_ranks():
    evaluate = pytest.importorskip("evaluate")
    metric = evaluate.load(str(ROOT / "metrics" / "retrieval_recall"), keep_in_memory=True)
    rankings, positives = [[4, 0, 2], [1, 3, 0], [0, 1, 2]], [[0], [1, 3], []]
    expected = metrics.summarize_ranks([2, 1, 0], k=(1, 3))
    assert metric.compute(predictions=rankings, references=positives, k=[1, 3]) == expected
    assert metric.compute(predictions=[2, 1, 9], references=[1, 2, 0], k=[1, 3]) == expected
    # a first query without positives decides nothing about the form
    assert metric.compute(predictions=rankings[::-1], references=positives[::-1], k=[1, 3]) == expected
