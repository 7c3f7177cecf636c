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
        counts[torch.arange(4), index[:, 0]] += 1
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
    _, _, is_match, weight, _ = itm_pairs(index, exists, index, exists)
    assert weight.tolist() == [1.0] * 3 + [0.0] * 6 and torch.equal(is_match, weight.bool())
    logits = torch.randn(9, 2)
    torch.testing.assert_close(itm_loss(logits, is_match, weight), itm_loss(logits[:3], is_match[:3]))


def test_pairs_of_an_itm_step():
    image_exists, text_exists = torch.tensor([[True], [True], [False]]), torch.tensor([[True], [False], [True]])
    pairs = itm_pairs(torch.tensor([[1], [0], [1]]), image_exists, torch.tensor([[2], [0], [0]]), text_exists)
    weight = pairs.weight
    assert weight.shape == (9,)
    assert list(zip(*(part[weight > 0].tolist() for part in pairs[:3]), strict=True)) == [
        *[(0, 0, True), (1, 1, True), (2, 2, True)],
        *[(1, 0, False), (0, 1, False)],  # texts 0 and 1 with their negative images
        *[(0, 2, False), (2, 0, False)],  # images 0 and 2 with their negative texts
    ]


def test_pairs_that_are_missing_weigh_nothing():
    """The loss and its gradient are those of the pairs that are there."""
    weight = torch.tensor([1.0, 1, 1, 0, 1, 0])
    logits, is_match = torch.randn(6, 2, requires_grad=True), torch.arange(6) < 2
    loss = itm_loss(logits, is_match, weight)
    loss.backward()
    there = logits.detach()[weight > 0].requires_grad_()
    expected = itm_loss(there, is_match[weight > 0])
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(logits.grad[weight > 0], there.grad)
    assert (logits.grad[weight == 0] == 0).all()


@pytest.mark.parametrize("count", [1, 5])
def test_the_draw_is_that_of_multinomial(count):
    """Bit by bit, and it leaves the generator where multinomial leaves it."""
    similarity, product_id = torch.randn(64, 64) * 5, torch.arange(64) // 3
    positive = positives(product_id, product_id)
    ours, theirs = (torch.Generator().manual_seed(7) for _ in range(2))
    for _ in range(20):
        index, _ = hard_negatives(similarity, positive, count, generator=ours)
        probability = similarity.masked_fill(positive, -torch.inf).softmax(1)
        assert torch.equal(index, torch.multinomial(probability, count, generator=theirs))
    assert torch.equal(ours.get_state(), theirs.get_state())


def test_the_prior_scores_the_loss_that_the_log_warns_of():
    is_match = torch.tensor([True, False, False])
    prior = torch.tensor([2 / 3, 1 / 3]).log().expand(3, 2)
    assert itm_loss(prior, is_match).item() == pytest.approx(0.6365, abs=1e-4)
