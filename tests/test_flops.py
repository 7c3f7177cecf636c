"""The operations that a training step is said to need, against those that torch counts."""

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from aliblip.training.flops import training_flops
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective


@pytest.mark.parametrize("rows, length, queue, negatives", [(4, 9, 32, 1), (6, 17, 256, 1), (6, 17, 32, 3)])
def test_training_flops_are_those_that_torch_counts(rows, length, queue, negatives):
    model = tiny.model(vision_config={"hidden_size": 64}, text_config={"hidden_size": 48, "intermediate_size": 96})
    model.set_attn_implementation("eager")  # what a fused kernel does in its backward pass is counted by no formula
    momentum = MomentumState(model, queue_size=queue, embedding_size=16)
    objective = RetrievalObjective(model, itm_negatives=negatives).train()
    batch = tiny.batch(rows, length)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])  # padding is work that no formula counts
    with FlopCounterMode(display=False) as counter:
        objective(batch, momentum.encode(batch), 0.4).loss.backward()
    told = training_flops(model.config, length, queue, pairs=1 + 2 * negatives)
    assert counter.get_total_flops() / rows == pytest.approx(told, rel=0.03)
