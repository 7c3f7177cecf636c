"""The operations that a training step is said to need, against those that torch counts."""

import pytest
import tiny
import torch
from torch.utils.flop_counter import FlopCounterMode

from aliblip.training.flops import training_flops
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective


@pytest.mark.parametrize("rows, length, queue", [(4, 9, 32), (6, 17, 256)])
def test_training_flops_are_those_that_torch_counts(rows, length, queue):
    model = tiny.model(vision_config={"hidden_size": 64}, text_config={"hidden_size": 48, "intermediate_size": 96})
    model.set_attn_implementation("eager")  # what a fused kernel does in its backward pass is counted by no formula
    momentum = MomentumState(model, queue_size=queue, embedding_size=16)
    objective = RetrievalObjective(model).train()
    batch = tiny.batch(rows, length)
    batch["attention_mask"] = torch.ones_like(batch["attention_mask"])  # padding is work that no formula counts
    with FlopCounterMode(display=False) as counter:
        objective(batch, momentum.encode(batch), 0.4).loss.backward()
    assert counter.get_total_flops() / rows == pytest.approx(training_flops(model.config, length, queue), rel=0.03)
