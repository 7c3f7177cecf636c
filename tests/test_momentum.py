"""The momentum encoders and the queues."""

from __future__ import annotations

import pytest
import tiny
import torch
from helpers import spawn

from aliblip.runtime.distributed import assert_equal_on_ranks, rank
from aliblip.training.momentum import MomentumState


def state(queue_size: int = 10, **options) -> MomentumState:
    return MomentumState(tiny.model(), queue_size=queue_size, embedding_size=16, **options)


def test_average_follows_the_formula_and_holds_no_gradient():
    model = tiny.model()
    momentum = MomentumState(model, queue_size=4, embedding_size=16, momentum=0.9)
    before = {name: value.clone() for name, value in momentum.encoders.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    momentum.update(model)
    assert not any(parameter.requires_grad for parameter in momentum.parameters())
    assert len(before) > 30 and not any("crossattention" in name or "itm_head" in name for name in before)
    for name, value in momentum.encoders.named_parameters():
        torch.testing.assert_close(value, before[name] + 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average_of_all_parameters_at_once_equals_one_by_one(dtype):
    momentum, model = state(), tiny.model(seed=3).to(dtype)
    trained = dict(model.named_parameters())
    expected = {
        name: average.lerp(trained[name].detach().float(), 0.005)
        for name, average in momentum.encoders.named_parameters()
    }
    momentum.update(model)
    for name, average in momentum.encoders.named_parameters():
        assert torch.equal(average, expected[name]), name


def test_average_of_bf16_weights_moves_in_fp32():
    """In bf16 a step of 0.005 of the distance rounds to nothing."""
    model = tiny.model()
    momentum = MomentumState(model, queue_size=4, embedding_size=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    model.bfloat16()
    name = "vision_proj.weight"
    start = dict(momentum.encoders.named_parameters())[name].clone()
    goal = dict(model.named_parameters())[name].float()
    for _ in range(400):
        momentum.update(model)
    average = dict(momentum.encoders.named_parameters())[name]
    assert average.dtype == torch.float32
    expected = goal + (start - goal) * 0.995**400
    torch.testing.assert_close(average, expected, rtol=1e-3, atol=1e-6)


def test_warmup_follows_quickly_at_first():
    model = tiny.model()
    slow, quick = state(), state(warmup=True)
    with torch.no_grad():
        model.vision_proj.weight.add_(1.0)
    for momentum, moved in ((slow, 0.005), (quick, 0.9)):
        start = momentum.encoders.vision_proj.weight.clone()
        momentum.update(model)
        assert (momentum.encoders.vision_proj.weight - start).mean().item() == pytest.approx(moved, rel=1e-3)
    quick.updates = 100_000
    start = quick.encoders.vision_proj.weight.clone()
    quick.update(model)
    torch.testing.assert_close(quick.encoders.vision_proj.weight, start.lerp(model.vision_proj.weight, 0.005))


def test_encode_is_what_the_model_says():
    model, batch = tiny.model().eval(), tiny.batch()
    targets = state().encode(batch)
    torch.testing.assert_close(targets.image, model.get_image_features(batch["pixel_values"]).pooler_output)
    texts = model.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
    torch.testing.assert_close(targets.text, texts)


def test_dropout_of_the_average_is_a_choice():
    changes = {"text_config": {"hidden_dropout_prob": 0.5}}
    batch = tiny.batch()
    for dropout in (False, True):
        momentum = MomentumState(tiny.model(**changes), queue_size=4, embedding_size=16, dropout=dropout)
        assert torch.equal(momentum.encode(batch).text, momentum.encode(batch).text) is not dropout


@pytest.mark.parametrize("sizes", [(3, 3, 3, 3, 3), (4, 1, 7, 2), (10, 5), (25, 3), (23,)])
def test_queue_of_any_size_wraps_like_a_list(sizes):
    momentum, slots, pointer = state(queue_size=10), [None] * 10, 0
    random_vectors = momentum.image_queue.clone()
    product = 0
    for n, rows in enumerate(sizes):
        targets = momentum.encode(tiny.batch(rows, seed=n))
        ids = torch.arange(product, product + rows)
        product += rows
        momentum.enqueue(targets, ids)
        for row in range(rows):
            slots[pointer] = (ids[row].item(), targets.image[row], targets.text[row])
            pointer = (pointer + 1) % 10
    assert momentum.pointer == pointer
    assert momentum.queue_filled.tolist() == [slot is not None for slot in slots]
    assert momentum.queue_fill().item() == pytest.approx(sum(slot is not None for slot in slots) / 10)
    for i, slot in enumerate(slots):
        if slot is None:
            assert torch.equal(momentum.image_queue[i], random_vectors[i])
        else:
            assert momentum.queue_ids[i].item() == slot[0]
            assert torch.equal(momentum.image_queue[i], slot[1]) and torch.equal(momentum.text_queue[i], slot[2])


def test_targets_keep_the_queue_as_it_was():
    momentum = state()
    targets = momentum.encode(tiny.batch())
    before = targets.image_queue.clone()
    momentum.enqueue(targets, torch.arange(4))
    assert torch.equal(targets.image_queue, before) and not targets.queue_filled.any()


def test_state_dict_round_trip():
    first, second = state(), state(seed=5)
    first.update(tiny.model(seed=3))
    first.enqueue(first.encode(tiny.batch()), torch.arange(4))
    second.load_state_dict(first.state_dict())
    assert (second.pointer, second.updates) == (4, 1)
    for name, value in first.state_dict().items():
        if torch.is_tensor(value):
            assert torch.equal(value, second.state_dict()[name]), name


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="a queue of 0 slots"):
        state(queue_size=0)
    with pytest.raises(ValueError, match="momentum 1.5"):
        state(momentum=1.5)


def enqueue_on_two_ranks() -> dict:
    momentum = state(queue_size=7)
    for step in range(3):
        targets = momentum.encode(tiny.batch(2, seed=10 * step + rank()))
        momentum.enqueue(targets, torch.tensor([100 * rank() + step, 100 * rank() + step + 50]))
    assert_equal_on_ranks("queues", dict(momentum.named_buffers()))
    return {name: value.clone() for name, value in momentum.named_buffers()}


def test_two_processes_fill_the_same_queue():
    first, second = spawn(enqueue_on_two_ranks, 2)
    for name, value in first.items():
        assert torch.equal(value, second[name])
    momentum = state(queue_size=7)  # the same in one process, both ranks' rows in rank order
    for step in range(3):
        parts = [momentum.encode(tiny.batch(2, seed=10 * step + r)) for r in range(2)]
        both = parts[0]
        both.image, both.text = (torch.cat([getattr(part, name) for part in parts]) for name in ("image", "text"))
        momentum.enqueue(both, torch.tensor([step, step + 50, 100 + step, 150 + step]))
    for name, value in momentum.named_buffers():
        assert torch.equal(value, first[name]), name
