"""The operations that a training step is said to need, against those that torch counts."""

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from aliblip.training.flops import training_flops
from aliblip.training.freezing import freeze
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from aliblip.training.patches import drop_patches


def counted(model, rows: int, length: int, queue: int, negatives: int = 1, patch_dropout: float = 0.0) -> float:
    """Of a sample, by torch."""
    model.set_attn_implementation("eager")  # what a fused kernel does in its backward pass is counted by no formula
    momentum = MomentumState(model, queue_size=queue, embedding_size=16)
    if patch_dropout:
        drop_patches(model, patch_dropout)
    objective = RetrievalObjective(model, itm_negatives=negatives).train()
    batch = tiny.batch(rows, length)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])  # padding is work that no formula counts
    with FlopCounterMode(display=False) as counter:
        objective(batch, momentum.encode(batch), 0.4).loss.backward()
    return counter.get_total_flops() / rows


@pytest.mark.parametrize("rows, length, queue, negatives", [(4, 9, 32, 1), (6, 17, 256, 1), (6, 17, 32, 3)])
def test_training_flops_are_those_that_torch_counts(rows, length, queue, negatives):
    model = tiny.model(vision_config={"hidden_size": 64}, text_config={"hidden_size": 48, "intermediate_size": 96})
    told = training_flops(model.config, length, queue, pairs=1 + 2 * negatives)
    assert counted(model, rows, length, queue, negatives) == pytest.approx(told, rel=0.03)


@pytest.mark.parametrize("frozen", [[], ["vision"]])
def test_patches_that_are_left_out_take_nothing(frozen):
    model = tiny.model(vision_config={"hidden_size": 64}, text_config={"hidden_size": 48, "intermediate_size": 96})
    freeze(model, frozen)
    told = training_flops(model.config, 9, 32, frozen=frozen, patch_dropout=0.5)
    assert counted(model, 4, 9, 32, patch_dropout=0.5) == pytest.approx(told, rel=0.03)
    assert told < training_flops(model.config, 9, 32, frozen=frozen)


@pytest.mark.parametrize(
    "frozen",
    [
        ["vision"],
        ["text"],
        ["cross_attention"],
        ["vision", "text"],
        ["vision", "cross_attention"],
        ["text", "cross_attention"],
        ["vision", "text", "cross_attention"],
        ["vision", "text", "projections"],
    ],
)
def test_frozen_parts_take_what_torch_counts(frozen):
    text = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3}
    model = tiny.model(vision_config={"hidden_size": 64}, text_config=text)
    freeze(model, frozen)
    told = training_flops(model.config, 13, 64, frozen=frozen)
    assert counted(model, 4, 13, 64) == pytest.approx(told, rel=0.03)
    assert told < training_flops(model.config, 13, 64)


def test_nothing_is_counted_as_frozen_of_a_model_that_is_trained():
    config = tiny.config()
    everything = training_flops(config, 13, 64)
    only_the_head = training_flops(config, 13, 64, frozen=["itm_head"])
    assert only_the_head == pytest.approx(everything, rel=0.001)  # both ways of counting say the same
