"""The objective: one forward, nothing changed, padding and processes without influence."""

from __future__ import annotations

import random
from itertools import accumulate, pairwise

import pytest
import tiny
import torch
from helpers import spawn
from torch.nn.parallel import DistributedDataParallel

import aliblip.training.objective
import losses_aliblip
from aliblip.runtime.distributed import rank
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective, length_groups, match_by_length


def objective_and_momentum(**options):
    model = tiny.model()
    return RetrievalObjective(model, **options), MomentumState(model, queue_size=12, embedding_size=16)


def test_matching_in_groups_of_similar_length_equals_one_call():
    model = tiny.model().eval()
    for rows in (1, 2, 3, 11):
        batch = tiny.batch(rows, length=12)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        image_kv = model.project_image_kv(model.encode_image(batch["pixel_values"]))
        index = torch.arange(rows).flip(0)
        plain = model.match(ids, mask, image_kv, index)
        lengths = mask.sum(1).tolist()
        # What the host knows may be the lengths, or no more than a bound of some of them.
        for longest in (lengths, [length if i % 3 else 12 for i, length in enumerate(lengths)], [12] * rows):
            grouped = match_by_length(model, ids, mask, image_kv, index, longest, tokens_per_pass=1)
            torch.testing.assert_close(grouped, plain, rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 24])
def test_titles_are_cut_into_quarters_of_which_some_stay_together(size):
    generator = random.Random(size)
    lengths = sorted(generator.randrange(3, 36) for _ in range(size))
    quarters = [part.tolist() for part in torch.tensor(lengths).tensor_split(min(4, size))]
    assert length_groups(lengths[::-1], 0) == [(len(part), part[-1]) for part in quarters]
    for tokens_per_pass in (1, 5, 20, 1000):
        groups = length_groups(lengths, tokens_per_pass)
        assert sum(titles for titles, _ in groups) == size
        ends = list(accumulate(titles for titles, _ in groups))
        assert [length for _, length in groups] == [lengths[end - 1] for end in ends]
        assert set(ends) <= set(accumulate(len(part) for part in quarters))
        for (titles, length), (_, longer) in pairwise(groups):  # each cut pays for itself
            assert titles * (longer - length) >= tokens_per_pass
    assert length_groups(lengths, 1000) == [(size, lengths[-1])]


def test_forward_changes_no_state_and_reaches_every_parameter():
    objective, momentum = objective_and_momentum()
    batch = tiny.batch()
    targets = momentum.encode(batch)
    before = {name: value.clone() for name, value in (*objective.state_dict().items(), *momentum.named_buffers())}
    output = objective(batch, targets, alpha=0.4)
    output.loss.backward()
    after = dict((*objective.state_dict().items(), *momentum.named_buffers()))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert output.loss.item() == pytest.approx((output.parts["itc"] + output.parts["itm"]).item(), rel=1e-6)
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and (name.endswith("key.bias") or parameter.grad.abs().sum() > 0), name


def test_report():
    objective, momentum = objective_and_momentum(hardest_negatives=True)
    batch = {**tiny.batch(), "product_id": torch.tensor([0, 0, 1, 2])}
    momentum.queue_ids[:3] = torch.tensor([0, 1, 0])
    momentum.queue_filled[:2] = True  # slot 2 is not filled: no positive, whatever its id says
    report = objective(batch, momentum.encode(batch), alpha=0.0).report
    assert report["positives_per_row"].item() == pytest.approx((3 + 3 + 2 + 1) / 4)
    assert report["rows_without_negative"].item() == 0
    assert report["temperature"].item() == pytest.approx(0.07)
    assert 0 <= report["itm_accuracy_positive"].item() <= 1 and 0 <= report["itm_accuracy_negative"].item() <= 1
    batch["product_id"] = torch.zeros(4, dtype=torch.long)
    output = objective(batch, momentum.encode(batch), alpha=0.0)
    assert output.report["rows_without_negative"].item() == 8
    assert output.report["itm_accuracy_negative"].isnan()  # of no pairs: neither 0 nor 1
    assert torch.isfinite(output.loss)


def gradients_with_negatives_from_all_ranks():
    """Both ranks' batches in one process give the loss of each rank; their mean has the gradient that DDP averages."""
    objective, momentum = objective_and_momentum(negatives_from_all_ranks=True, hardest_negatives=True)
    wrapped = DistributedDataParallel(objective, broadcast_buffers=False)
    whole = tiny.batch(6, length=9)
    rows = slice(3 * rank(), 3 * rank() + 3)
    batch = {name: value[rows] for name, value in whole.items()}
    longest = 9 if rank() == 0 else int(batch["attention_mask"].sum(1).max())  # ranks pad differently
    batch |= {name: batch[name][:, :longest] for name in ("input_ids", "attention_mask")}
    output = wrapped(batch, momentum.encode(batch), alpha=0.3)
    output.loss.backward()
    return output.loss.item(), {name: p.grad.clone() for name, p in objective.named_parameters()}


def test_negatives_from_all_ranks_have_exact_gradients():
    ranks = spawn(gradients_with_negatives_from_all_ranks, 2)
    objective, momentum = objective_and_momentum()
    model, whole = objective.model, tiny.batch(6, length=9)
    image = model.get_image_features(whole["pixel_values"])
    text = model.get_text_features(whole["input_ids"], whole["attention_mask"])
    similarity = (image.pooler_output @ text.pooler_output.t() / model.temp).detach()
    similarity.fill_diagonal_(-torch.inf)
    negative_text, negative_image = similarity.argmax(1), similarity.argmax(0)
    targets = momentum.encode(whole)
    losses = []
    for r in range(2):
        own = range(3 * r, 3 * r + 3)
        itc = 0.0
        for features, keys, queue, opinion in (
            (image.pooler_output, targets.text, targets.text_queue, targets.image),
            (text.pooler_output, targets.image, targets.image_queue, targets.text),
        ):
            keys = torch.cat([keys[list(own)], queue])
            for i in own:
                hard = torch.zeros(len(keys))
                hard[i - 3 * r] = 1.0
                with torch.no_grad():
                    target = 0.3 * (keys @ opinion[i] / model.temp).softmax(0) + 0.7 * hard
                itc = itc - (target * (keys @ features[i] / model.temp).log_softmax(0)).sum() / 6
        pairs = [(i, i, 1) for i in own]
        pairs += [(negative_image[i].item(), i, 0) for i in own] + [(i, negative_text[i].item(), 0) for i in own]
        logits = []
        for i, t, _ in pairs:
            image_kv = model.project_image_kv(image.last_hidden_state[i : i + 1])
            ids, mask = whole["input_ids"][t : t + 1], whole["attention_mask"][t : t + 1]
            logits.append(model.match(ids, mask, image_kv, torch.tensor([0])))
        itm = torch.nn.functional.cross_entropy(torch.cat(logits), torch.tensor([match for *_, match in pairs]))
        losses.append(itc + itm)
    for (loss, _), expected in zip(ranks, losses, strict=True):
        assert loss == pytest.approx(expected.item(), rel=1e-5)
    (sum(losses) / 2).backward()
    for name, parameter in objective.named_parameters():
        for _, gradients in ranks:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def in_batch_gradient():
    weights = torch.nn.Linear(6, 16, bias=False)
    with torch.no_grad():
        weights.weight.copy_(torch.randn(16, 6, generator=torch.Generator().manual_seed(0)))
    wrapped = DistributedDataParallel(weights) if torch.distributed.is_initialized() else weights
    whole = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(1))
    product_id = torch.tensor([0, 1, 2, 3, 0, 4, 5, 1])  # positives on both sides of the cut
    rows = slice(4 * rank(), 4 * rank() + 4) if torch.distributed.is_initialized() else slice(0, 8)
    features = torch.nn.functional.normalize(wrapped(whole[:, rows]), dim=-1)
    objective = RetrievalObjective(torch.nn.Identity(), in_batch_itc=1.0)
    loss = objective._in_batch_itc(features[0], features[1], product_id[rows], torch.tensor([0.1]))
    loss.backward()
    return loss.item(), weights.weight.grad


def test_in_batch_contrast_of_two_processes_equals_one():
    expected_loss, expected = in_batch_gradient()
    ranks = spawn(in_batch_gradient, 2)
    assert sum(loss for loss, _ in ranks) / 2 == pytest.approx(expected_loss, rel=1e-5)
    for _, gradient in ranks:
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_share_of_in_batch_contrast():
    batch, losses = tiny.batch(), {}
    for share in (0.0, 0.25, 1.0):
        objective, momentum = objective_and_momentum(in_batch_itc=share)
        losses[share] = objective(batch, momentum.encode(batch), alpha=0.2).parts["itc"].item()
    assert losses[0.25] == pytest.approx(0.75 * losses[0.0] + 0.25 * losses[1.0], rel=1e-5)
    model = tiny.model()
    out = model(batch["pixel_values"], batch["input_ids"], batch["attention_mask"])
    own = torch.arange(4)
    clip = sum(torch.nn.functional.cross_entropy(x, own) for x in (out.logits_per_image, out.logits_per_text)) / 2
    assert losses[1.0] == pytest.approx(clip.item(), rel=1e-5)


def test_similarities_are_fp32_under_autocast(monkeypatch):
    """bf16 has a spacing of 0.004 near 1: over a temperature of 0.07 an error of up to 0.03 in a logit."""
    seen = []

    def spy(logits, targets):
        seen.append(logits)
        return losses_aliblip.itc_loss(logits, targets)

    monkeypatch.setattr(aliblip.training.objective, "itc_loss", spy)
    objective, momentum = objective_and_momentum(in_batch_itc=0.5)
    batch = tiny.batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = objective(batch, momentum.encode(batch), alpha=0.4)
    assert len(seen) == 4 and output.loss.dtype == torch.float32
    for logits in seen:
        assert logits.dtype == torch.float32
        assert not torch.equal(logits, logits.bfloat16().float())


def test_features_that_are_not_finite_reach_the_loss():
    objective, momentum = objective_and_momentum()
    batch = tiny.batch()
    targets = momentum.encode(batch)
    batch["pixel_values"][1] = torch.nan
    assert not torch.isfinite(objective(batch, targets, alpha=0.0).loss)
