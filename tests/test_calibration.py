"""How far the match probability can be believed, measured, and the fit that makes it so: on numbers made by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from evaluation_fixtures import K, retrieve
from handmade import NAMES, random_retrieval

from aliblip.retrieval import calibration
from aliblip.retrieval.calibration import BINS, candidates_of_all, candidates_with_truth, fit, reliability
from aliblip.retrieval.results import calibration_told, measure


def drawn(count, slope, offset, seed=0, spread=4.0):
    """Margins, and truth that follows sigmoid(slope x margin + offset)."""
    generator = np.random.default_rng(seed)
    margins = generator.normal(0, spread, count)
    return margins, generator.random(count) < 1 / (1 + np.exp(-(slope * margins + offset)))


def logit(probability):
    return math.log(probability / (1 - probability))


# --- measuring --------------------------------------------------------------------------------------------------------


def test_the_calibration_error_is_the_one_computed_by_hand():
    probabilities, right = [0.05, 0.05, 0.15, 0.95, 0.95, 0.93], [0, 1, 0, 1, 1, 0]
    block = np.array([logit(each) for each in probabilities]), np.array(right, bool)
    found = reliability([block])
    by_hand = (2 * abs(0.05 - 1 / 2) + abs(0.15 - 0) + 3 * abs((0.95 + 0.95 + 0.93) / 3 - 2 / 3)) / 6
    assert found["expected_calibration_error"] == pytest.approx(by_hand)
    assert found["brier_score"] == pytest.approx(
        sum((p - y) ** 2 for p, y in zip(probabilities, right, strict=True)) / 6
    )
    losses = [-math.log(p if y else 1 - p) for p, y in zip(probabilities, right, strict=True)]
    assert found["log_loss"] == pytest.approx(sum(losses) / 6)
    assert (found["candidates"], found["share_right"]) == (6, 0.5)
    bins = found["bins"]
    assert [row["candidates"] for row in bins] == [2, 1, 0, 0, 0, 0, 0, 0, 0, 3] and len(bins) == BINS
    assert (bins[9]["above"], bins[9]["up_to"]) == (0.9, 1.0)
    assert bins[9]["mean_probability"] == pytest.approx(2.83 / 3) and bins[9]["share_right"] == pytest.approx(2 / 3)
    assert bins[4]["mean_probability"] is None and bins[4]["share_right"] is None
    assert json.loads(json.dumps(found)) == found


def test_a_probability_on_an_edge_belongs_to_the_bin_below_and_the_extremes_to_theirs():
    margins = np.array([0.0, -1e4, 1e4, 1e-9])  # 0.5, 0, 1, a little above 0.5
    found = reliability([(margins, np.array([True, False, True, True]))])
    assert [row["candidates"] for row in found["bins"]] == [1, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    assert found["log_loss"] == pytest.approx(2 * math.log(2) / 4)
    assert reliability([(np.array([-1e4]), np.array([True]))])["log_loss"] == pytest.approx(1e4)
    assert reliability([(np.array([4.0]), np.array([True]))], slope=0.5, offset=-2.0) == reliability(
        [(np.array([0.0]), np.array([True]))]
    )


def test_what_was_drawn_with_its_probability_is_calibrated_and_in_blocks_the_same():
    margins, right = drawn(40_000, 1.0, 0.0)
    found = reliability([(margins, right)])
    assert found["expected_calibration_error"] < 0.01
    assert reliability([(margins, right)], slope=3.0)["expected_calibration_error"] > 0.03
    blocks = reliability([(margins[at : at + 999], right[at : at + 999]) for at in range(0, 40_000, 999)])
    assert blocks["bins"][3]["candidates"] == found["bins"][3]["candidates"]
    for name in ("expected_calibration_error", "brier_score", "log_loss"):
        assert blocks[name] == pytest.approx(found[name])


def test_the_truth_of_every_candidate_is_looked_up_by_product(monkeypatch):
    monkeypatch.setattr(calibration, "_QUERY_BLOCK", 7)
    products = [n // 2 for n in range(40)]
    found = random_retrieval(product_id=products, depths=(2, 5))
    # a photo of two products, and a title without any photo of its product
    found.images.further = torch.tensor([[3, 19]])
    found.titles.product_id = found.titles.product_id.clone()
    found.titles.product_id[0] = 99
    seen = list(candidates_of_all(found))
    shown = [{product} for product in products]
    shown[3].add(19)
    asked = [{99}, *({product} for product in products[1:])]
    for (name, direction, queries, gallery), sides in zip(
        found.directions(), ((asked, shown), (shown, asked)), strict=True
    ):
        slow = [
            (float(direction.candidates.margins[query, place]), bool(sides[0][query] & sides[1][item]))
            for query in range(40)
            for place, item in enumerate(direction.candidates.ids[query].tolist())
        ]
        own = list(candidates_with_truth(direction.candidates, 5, queries, gallery))
        assert len(own) == 6 and [len(block[0]) for block in own] == [35] * 5 + [25]
        margins, right = (np.concatenate(part).tolist() for part in zip(*own, strict=True))
        assert list(zip(margins, right, strict=True)) == slow, name
        assert any(right for _, right in slow)
    assert len(seen) == 12


# --- the fit ----------------------------------------------------------------------------------------------------------


def slow_fit(margins, right):
    """The least loss of a grid, whose middle moves to the best place and which then grows finer."""
    sure, unsure = (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2)
    target = np.where(right, sure, unsure)

    def loss(slope, offset):
        logits = slope * margins + offset
        return float(np.mean(np.log1p(np.exp(-np.abs(logits))) + np.maximum(logits, 0) - target * logits))

    best, width = (1.0, 0.0), 4.0
    while width > 1e-7:
        around = [best[0] + width * n / 4 for n in range(-4, 5)], [best[1] + width * n / 4 for n in range(-4, 5)]
        nearer = min(((slope, offset) for slope in around[0] for offset in around[1]), key=lambda at: loss(*at))
        width = width / 1.5 if nearer == best else width
        best = nearer
    return best, loss


@pytest.mark.parametrize(
    "margins, right",
    [
        drawn(300, 0.5, -2.0),
        drawn(300, 2.0, 1.0, seed=1, spread=0.3),
        (np.arange(-10.0, 10.0), np.arange(-10.0, 10.0) > 3),  # told apart
        (np.array([3.0, 4.0, 1.0]), np.array([True, False, True])),
    ],
)
def test_the_fit_is_the_least_loss_of_a_grid(margins, right):
    (slope, offset), loss = slow_fit(margins, right)
    if slope < 0:  # the last one
        assert fit(lambda: [(margins, right)]) == (0.0, pytest.approx(logit(np.mean([0.75, 1 / 3, 0.75])), rel=1e-5))
        return
    cut = len(margins) // 3
    found = fit(lambda: [(margins[:cut], right[:cut]), (margins[cut:], right[cut:])])
    assert found == (pytest.approx(slope, rel=1e-4), pytest.approx(offset, rel=1e-4, abs=1e-4))
    assert loss(*found) <= loss(slope, offset) + 1e-9 and found[0] > 0


@pytest.mark.parametrize("right", [[False] * 4, [True] * 4, [True, False, False, False]])
def test_margins_that_say_nothing_give_the_share_of_right_ones(right):
    right = np.array(right)
    slope, offset = fit(lambda: [(np.full(4, 2.5), right)])
    count = int(right.sum())
    share = (count * (count + 1) / (count + 2) + (4 - count) / (6 - count)) / 4
    assert math.isfinite(slope) and slope >= 0
    assert 1 / (1 + math.exp(-(slope * 2.5 + offset))) == pytest.approx(share, rel=1e-4)


def test_far_margins_and_many_candidates_are_fitted():
    margins, right = drawn(20_000, 0.002, -3.0, spread=900.0)
    slope, offset = fit(lambda: [(margins, right)])
    assert slope == pytest.approx(0.002, rel=0.1) and offset == pytest.approx(-3.0, rel=0.1)


def test_a_head_that_is_too_sure_becomes_believable_on_another_split():
    tuned, measured = (drawn(8_000, 0.6, -2.5, seed=seed) for seed in (0, 1))
    slope, offset = fit(lambda: [tuned])
    assert slope == pytest.approx(0.6, abs=0.05) and offset == pytest.approx(-2.5, abs=0.15)
    before, after = reliability([measured]), reliability([measured], slope, offset)
    assert after["expected_calibration_error"] < 0.02 < 0.2 < before["expected_calibration_error"]
    assert after["log_loss"] < before["log_loss"] and after["brier_score"] < before["brier_score"]


# --- in the results ---------------------------------------------------------------------------------------------------


def test_results_have_the_calibration_of_the_largest_depth_and_say_it_in_one_line():
    found = random_retrieval(depths=(2, 4))
    results = measure(found, **NAMES)
    for name, direction, queries, gallery in found.directions():
        assert results[name]["calibration"] == reliability(
            candidates_with_truth(direction.candidates, 4, queries, gallery)
        )
        assert results[name]["calibration"]["candidates"] == 4 * 40
    found.slope, found.offset = 0.5, -2.0
    fitted = measure(found, **NAMES)
    assert (fitted["itm_slope"], fitted["itm_offset"]) == (0.5, -2.0)
    assert fitted["text_to_image"]["itm"] == results["text_to_image"]["itm"], "it orders nothing"
    assert fitted["text_to_image"]["calibration"]["log_loss"] != results["text_to_image"]["calibration"]["log_loss"]
    told = calibration_told(results)
    error = results["image_to_text"]["calibration"]["expected_calibration_error"]
    assert "as trained: " in told and f"{error:.3f} image to text (10 bins; " in told
    assert f"{100 * results['image_to_text']['calibration']['share_right']:.1f} % of the 4 best are right)" in told
    assert "\n" not in told and "sigmoid(0.5 x margin -2): " in calibration_told(fitted)
    for direction in (found.text_to_image, found.image_to_text):
        direction.candidates.margins = None  # as where all pairs were scored
    told = calibration_told(measure(found, **NAMES))
    assert told == "itm_probability: not measured, since --k_rerank all keeps the match logits alone"
    assert calibration_told(measure(random_retrieval(score="itc"), **NAMES)) == ""


def test_margins_are_those_of_each_pair_alone_also_beside_listed_ones(model, loader):
    found = retrieve(model, loader, list_at_least=10)
    source, titles = loader.source, found.titles
    for title in (0, 5):
        for place in (0, K - 1):
            photo = int(found.text_to_image.candidates.ids[title, place])
            row = next(iter(source.read_range(int(found.images.rows[photo]), int(found.images.rows[photo]) + 1)))
            pixels = loader.collator([row])["pixel_values"]
            with torch.no_grad():
                output = model(pixels, titles.input_ids[title, None], titles.attention_mask[title, None])
            expected = float(output.itm_logits[0, 1] - output.itm_logits[0, 0])
            assert float(found.text_to_image.candidates.margins[title, place]) == pytest.approx(expected, abs=1e-4)
    margins = found.text_to_image.candidates.margins
    assert margins[:, K:].isnan().all() and not margins[:, :K].isnan().any()
