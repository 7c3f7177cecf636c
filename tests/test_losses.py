"""The vectorised losses against loops that spell them out."""

from __future__ import annotations

import math

import pytest
import torch

from losses_aliblip import hard_negatives, itc_loss, itm_loss, itm_pairs, positives, soft_targets


def test_itc_with_several_positives_equals_the_loop():
    torch.manual_seed(0)
    product_id, key_id = torch.tensor([3, 5, 3]), torch.tensor([3, 5, 3, 5, 9, 3])
    valid = torch.tensor([True, True, True, False, True, True])
    logits, momentum = torch.randn(3, 6), torch.randn(3, 6)
    targets = soft_targets(positives(product_id, key_id, valid), momentum, alpha=0.4)
    total = 0.0
    for i in range(3):
        mine = [j for j in range(6) if valid[j] and key_id[j] == product_id[i]]
        opinion = momentum[i].exp() / momentum[i].exp().sum()
        for j in range(6):
            target = 0.4 * opinion[j] + 0.6 * (1 / len(mine) if j in mine else 0.0)
            assert targets[i, j].item() == pytest.approx(target.item(), abs=1e-6)
            total += -target * (logits[i, j] - logits[i].logsumexp(0))
    assert itc_loss(logits, targets).item() == pytest.approx((total / 3).item(), rel=1e-5)


def test_targets_without_momentum_are_the_positives_alone():
    positive = torch.tensor([[True, False, True], [False, True, False]])
    expected = torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]])
    assert torch.equal(soft_targets(positive), expected)
    assert torch.equal(soft_targets(positive, torch.randn(2, 3), alpha=0.0), expected)


def test_losses_run_in_fp32_on_half_precision_logits():
    logits = torch.randn(4, 8).bfloat16()
    targets = soft_targets(torch.eye(4, 8, dtype=torch.bool))
    assert itc_loss(logits, targets).dtype == torch.float32
    assert itm_loss(torch.randn(4, 2).bfloat16(), torch.ones(4, dtype=torch.bool)).dtype == torch.float32


def test_negatives_are_drawn_by_similarity_and_never_of_the_same_product():
    product_id = torch.tensor([1, 1, 2, 3])
    similarity = torch.tensor([[9.0, 9.0, 0.0, math.log(3.0)]] * 4)
    positive = positives(product_id, product_id)
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(4, 4)
    for _ in range(2000):
        index, exists = hard_negatives(similarity, positive, generator=generator)
        assert exists.all()
        counts[torch.arange(4), index] += 1
    assert (counts[positive] == 0).all()
    # Rows 0 and 1 may draw items 2 and 3, whose similarities stand 1 : 3.
    assert (counts[:2, 3] / counts[:2, 2]).tolist() == pytest.approx([3.0, 3.0], rel=0.2)


def test_a_far_better_positive_does_not_spoil_the_draw():
    """softmax over all candidates gives 0 for every allowed one here."""
    similarity = torch.tensor([[1000.0, 0.0, 1.0]])
    index, exists = hard_negatives(similarity, torch.tensor([[True, False, False]]), hardest=True)
    assert index.item() == 2 and exists.item()
    index, _ = hard_negatives(similarity, torch.tensor([[True, False, False]]))
    assert index.item() in (1, 2)


def test_rows_of_one_product_have_no_negative_and_are_left_out():
    same = torch.tensor([4, 4, 4])
    index, exists = hard_negatives(torch.randn(3, 3), positives(same, same))
    assert not exists.any() and (index == 0).all()
    image_index, text_index, is_match = itm_pairs(index, exists, index, exists)
    assert image_index.tolist() == text_index.tolist() == [0, 1, 2] and is_match.all()


def test_pairs_of_an_itm_step():
    image_index, text_index, is_match = itm_pairs(
        torch.tensor([1, 0, 1]),
        torch.tensor([True, True, False]),
        torch.tensor([2, 0, 0]),
        torch.tensor([True, False, True]),
    )
    assert list(zip(image_index.tolist(), text_index.tolist(), is_match.tolist(), strict=True)) == [
        *[(0, 0, True), (1, 1, True), (2, 2, True)],
        *[(1, 0, False), (0, 1, False)],  # texts 0 and 1 with their negative images
        *[(0, 2, False), (2, 0, False)],  # images 0 and 2 with their negative texts
    ]


def test_the_prior_scores_the_loss_that_the_log_warns_of():
    is_match = torch.tensor([True, False, False])
    prior = torch.tensor([2 / 3, 1 / 3]).log().expand(3, 2)
    assert itm_loss(prior, is_match).item() == pytest.approx(0.6365, abs=1e-4)
