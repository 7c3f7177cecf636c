"""The whole evaluation against every pair scored one by one."""

from __future__ import annotations

import json
import random

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from evaluation_fixtures import BROKEN, NAMES, ROWS, UNTITLED, K, retrieve
from PIL import Image

from aliblip.retrieval import evaluation, reranking
from aliblip.retrieval import results as numbers
from aliblip.runtime.parts import Parts

RECALLS = ("recall@1", "recall@5", "recall@10")


@torch.no_grad()
def slow_results(model, processor, catalogue, k=K):
    """Every pair through the plain forward, full sorts, counting by hand."""
    lines = [json.loads(line) for line in (catalogue / "validation" / "metadata.jsonl").read_text().splitlines()]
    lines = [line for row, line in enumerate(lines) if row not in (BROKEN, UNTITLED)]
    photos = [Image.open(catalogue / "validation" / line["file_name"]).convert("RGB") for line in lines]
    pixels = processor(images=photos, return_tensors="pt")["pixel_values"]
    products = [line["product_id"] for line in lines]
    itc, itm = np.zeros((2, len(lines), len(lines)))
    model.eval()
    for t, line in enumerate(lines):
        title = processor(text=[line["caption"]], return_tensors="pt")
        for i in range(len(lines)):
            output = model(pixels[i : i + 1], title["input_ids"], title["attention_mask"])
            itc[t, i] = float(output.image_embeds[0] @ output.text_embeds[0])
            itm[t, i] = itc[t, i] + float(output.itm_logits[0, 1])

    def measured(rankings):
        ranks = []
        for query, ranking in enumerate(rankings):
            ranks.append(next(place for place, item in enumerate(ranking, 1) if products[item] == products[query]))
        result = {f"recall@{at}": sum(rank <= at for rank in ranks) / len(ranks) for at in (1, 5, 10)}
        return {**result, "mean_recall": sum(result.values()) / 3, "median_rank": float(np.median(ranks))}, ranks

    expected, all_rankings = {}, {}
    for direction, first, second in (("text_to_image", itc, itm), ("image_to_text", itc.T, itm.T)):
        rankings = [sorted(range(len(row)), key=lambda item: (-row[item], item)) for row in first]
        final = []
        for query, ranking in enumerate(rankings):
            final.append(sorted(ranking[:k], key=lambda item: (-second[query, item], item)) + ranking[k:])
        itc_numbers, ranks = measured(rankings)
        expected[direction] = {
            "itc": itc_numbers,
            "itm": measured(final)[0],
            "itc_recall@k_rerank": sum(rank <= k for rank in ranks) / len(ranks),
        }
        all_rankings[direction] = [ranking[:k] for ranking in final]
    return expected, all_rankings


def test_results_equal_every_pair_scored_one_by_one(model, processor, catalogue, loader):
    expected, rankings = slow_results(model, processor, catalogue)
    found = retrieve(model, loader, k_rerank=(3, K))
    results = numbers.measure(found, **NAMES)
    assert list(results) == [
        *("model", "dataset", "split", "num_images", "num_texts", "k_rerank", "score", "fusion_weight"),
        *("itm_slope", "itm_offset"),
        *("text_to_image", "image_to_text", "mean_recall", "run"),
    ]
    assert (results["num_images"], results["num_texts"], results["k_rerank"]) == (ROWS - 2, ROWS - 2, K)
    less, _ = slow_results(model, processor, catalogue, k=3)
    for direction in ("text_to_image", "image_to_text"):
        of_direction = getattr(found, direction)
        assert of_direction.rankings.ids.tolist() == rankings[direction]
        for stage in ("itc", "itm"):
            assert results[direction][stage] == pytest.approx(expected[direction][stage])
            assert list(results[direction][stage]) == [*RECALLS, "mean_recall", "median_rank"]
        assert results[direction]["itc_recall@k_rerank"] == pytest.approx(expected[direction]["itc_recall@k_rerank"])
        for row, of_depth in zip(results[direction]["by_k"], (less, expected), strict=True):
            slow = of_depth[direction]
            assert {key: row[key] for key in RECALLS} == pytest.approx({key: slow["itm"][key] for key in RECALLS})
            assert row["ceiling"] == pytest.approx(slow["itc_recall@k_rerank"])
            assert row["gain"] == pytest.approx(slow["itm"]["mean_recall"] - slow["itc"]["mean_recall"])
        assert (results[direction]["num_queries"], results[direction]["num_queries_without_positive"]) == (ROWS - 2, 0)
        # the example can tell the stages apart
        assert not torch.equal(of_direction.rankings.ids, of_direction.candidates.ids)
    assert less != expected, "the example can tell the depths apart"
    assert results["text_to_image"] != results["image_to_text"]
    six = [expected[d]["itm"][f"recall@{k}"] for d in expected for k in (1, 5, 10)]
    assert results["mean_recall"] == pytest.approx(sum(six) / 6)
    assert set(results["run"]) == {"num_processes", "seconds", "seconds_by_stage", "versions"}
    assert results["run"]["num_processes"] == 1 and results["run"]["seconds"] > 0
    assert set(reranking.seconds_by_depth(model.config, found)) == {3, K}


def test_all_pairs_equal_every_pair_scored_one_by_one(model, processor, catalogue, loader, tmp_path):
    everything = ROWS - 2
    expected, rankings = slow_results(model, processor, catalogue, k=everything)
    parts = Parts(tmp_path / "parts", {"model": "m"})
    found = retrieve(model, loader, k_rerank=(K, "all"), parts=parts, gallery_chunk=10)
    assert found.depths == [K, everything]
    results = numbers.measure(found, **NAMES)
    six, _ = slow_results(model, processor, catalogue)
    for direction in ("text_to_image", "image_to_text"):
        order = getattr(found, direction).rankings
        assert order.ids.tolist() == rankings[direction]
        assert results[direction]["itm"] == pytest.approx(expected[direction]["itm"])
        assert results[direction]["by_k"][0]["mean_recall"] == pytest.approx(six[direction]["itm"]["mean_recall"])
        torch.testing.assert_close(order.scores, order.itc + order.itm_logits)
    # the same by candidates, and the file holds every logit
    by_candidates = retrieve(model, loader, k_rerank=everything)
    assert by_candidates.text_to_image.rankings.ids.tolist() == rankings["text_to_image"]
    paths = numbers.write_results(tmp_path / "out", found, results)
    assert [path.name for path in paths if path.suffix == ".npy"] == ["itm_logits.npy"]
    logits = torch.from_numpy(np.load(tmp_path / "out" / "itm_logits.npy"))
    assert logits.shape == (everything, everything)
    order = by_candidates.text_to_image.rankings
    expected_logits = torch.empty_like(logits).scatter_(0, order.ids.T, order.itm_logits.T)
    torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=0)


def test_scores_by_itm_alone_and_by_itc_alone(model, loader):
    fused, itm, itc = (retrieve(model, loader, score=score) for score in ("fused", "itm", "itc"))
    candidates = fused.text_to_image.candidates
    order = itm.text_to_image.rankings
    assert torch.equal(order.scores, candidates.itm_logits.sort(dim=1, descending=True).values)
    assert torch.equal(itc.text_to_image.rankings.ids, candidates.ids)
    assert itc.text_to_image.rankings.itm_logits is None and "rerank" not in itc.seconds
    results = numbers.measure(itc, **NAMES)
    assert "itm" not in results["text_to_image"] and "mean of the six ITC recalls" in numbers.format_table(results)
    weighed = retrieve(model, loader, fusion_weight=3.0).text_to_image.rankings
    torch.testing.assert_close(weighed.scores, weighed.itm_logits + 3 * weighed.itc)


def test_more_items_are_listed_than_are_reranked(model, loader, tmp_path):
    found, usual = retrieve(model, loader, list_at_least=10), retrieve(model, loader)
    order, candidates = found.text_to_image.rankings, found.text_to_image.candidates
    assert torch.equal(order.ids[:, :K], usual.text_to_image.rankings.ids)
    assert torch.equal(order.ids[:, K:], candidates.ids[:, K:]) and order.ids.shape[1] == 10
    numbers.write_results(tmp_path, found, numbers.measure(found, **NAMES))
    row = pq.read_table(tmp_path / "rankings_text_to_image.parquet").to_pylist()[0]
    assert row["score"][K:] == row["itm_logit"][K:] == [None] * 4 and None not in row["itc"] + row["score"][:K]
    assert order.itm_logits[:, K:].isnan().all() and not order.itm_logits[:, :K].isnan().any()
    assert torch.equal(order.ranks, usual.text_to_image.rankings.ranks)


def test_unusable_rows_are_left_out_and_listed(model, loader, tmp_path):
    found = retrieve(model, loader)
    results = numbers.measure(found, **NAMES)
    assert [row["row"] for row in found.skipped] == [BROKEN, UNTITLED]
    assert found.images.rows.tolist() == [row for row in range(ROWS) if row not in (BROKEN, UNTITLED)]
    path, *_ = numbers.write_results(tmp_path / "new", found, results)
    assert json.loads(path.read_text()) == results
    listed = [json.loads(line) for line in (tmp_path / "new" / "skipped.jsonl").read_text().splitlines()]
    assert listed == found.skipped and listed[0]["name"] == f"{BROKEN:02}.png"
    found.images.skipped.clear()
    numbers.write_results(tmp_path / "new", found, results)
    assert not (tmp_path / "new" / "skipped.jsonl").exists()


@pytest.mark.parametrize("memory_gb", [0.0, 3e-6])
def test_image_tokens_encoded_again_change_nothing(model, loader, memory_gb, caplog):
    with caplog.at_level("INFO", logger="aliblip"):
        evaluated = retrieve(model, loader, image_token_memory_gb=memory_gb)
    assert "encoded again" in caplog.text
    expected = retrieve(model, loader)
    for direction in ("text_to_image", "image_to_text"):
        got, wanted = getattr(evaluated, direction).rankings, getattr(expected, direction).rankings
        assert torch.equal(got.ids, wanted.ids) and torch.equal(got.scores, wanted.scores)


def test_chunks_and_token_budgets_change_scores_by_rounding_only(model, loader):
    expected = retrieve(model, loader)
    for options in ({"gallery_chunk": 5}, {"rerank_batch_tokens": 12}):
        evaluated = retrieve(model, loader, **options)
        for direction in ("text_to_image", "image_to_text"):
            got, wanted = getattr(evaluated, direction).rankings, getattr(expected, direction).rankings
            torch.testing.assert_close(got.scores, wanted.scores, atol=1e-4, rtol=0)
            torch.testing.assert_close(got.itc, wanted.itc, atol=1e-5, rtol=0)


def test_bf16_stays_near(model, loader):
    full, half = retrieve(model, loader), retrieve(model, loader, dtype=torch.bfloat16)
    half, full = half.text_to_image, full.text_to_image
    assert half.rankings.scores.dtype == torch.float32
    torch.testing.assert_close(half.candidates.itc, full.candidates.itc, atol=0.03, rtol=0)


def test_the_default_k_is_capped_to_the_gallery_and_said(model, loader, caplog):
    with caplog.at_level("INFO", logger="aliblip"):
        results = evaluation.evaluate_retrieval(
            model, loader, model_name="m", dataset_name="d", split="validation", k_rerank=None
        )
    assert results["k_rerank"] == ROWS - 2
    assert "k_rerank is the whole gallery, 27, instead of 128" in caplog.text
    assert results["text_to_image"]["itc_recall@k_rerank"] == 1.0


def test_training_state_is_left_alone(model, loader):
    model.train()
    model.vision_model.eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    retrieve(model, loader)
    drawn = torch.rand(1).item(), random.random(), np.random.rand()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    assert drawn == (torch.rand(1).item(), random.random(), np.random.rand())
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
