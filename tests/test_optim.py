"""Parameter groups and schedules."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from transformers import get_scheduler

from aliblip.runtime.mistakes import UsageError
from aliblip.training.optim import (
    RateScales,
    alpha_schedule,
    learning_rate_schedule,
    parameter_groups,
    set_learning_rate,
    total_optimizer_steps,
)


def test_every_trainable_parameter_is_in_one_group():
    model = tiny.model()
    model.vision_proj.weight.requires_grad_(False)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, 0.05, scales=RateScales(temperature=0.1))
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(set(names.values()) - {"vision_proj.weight"})
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay"] == (
                0.05 if name.endswith("weight") and parameter.dim() > 1 or "position" in name else 0.0
            ), name
            assert group["lr_scale"] == (0.1 if name == "temp" else 1.0)
    (everything,) = parameter_groups(model, 0.05, decay_everything=True)
    assert everything["weight_decay"] == 0.05 and len(everything["params"]) == len(grouped)
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(model.requires_grad_(False), 0.05)


def test_learning_rate_reaches_every_group_by_its_scale():
    optimizer = torch.optim.AdamW(parameter_groups(tiny.model(), 0.05, scales=RateScales(temperature=0.1)))
    set_learning_rate(optimizer, 2.0)
    assert sorted(group["lr"] for group in optimizer.param_groups) == pytest.approx([0.2, 2.0, 2.0])


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup", "polynomial"])
def test_schedules_of_transformers_equal_transformers(name):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=12)
    rate = learning_rate_schedule(name, 0.3, warmup_steps=3, total_steps=12, steps_per_epoch=4)
    for step in range(12):
        if name != "polynomial":  # its end depends on the optimizer's own learning rate
            assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        assert 0 <= rate(step) <= 0.3 + 1e-12
        optimizer.step()
        scheduler.step()


def test_cosine_per_epoch_is_the_published_one():
    rate = learning_rate_schedule("cosine_per_epoch", 5e-6, warmup_steps=0, total_steps=60, steps_per_epoch=10)
    for step in range(60):
        assert rate(step) == pytest.approx(5e-6 * 0.5 * (1 + math.cos(math.pi * (step // 10) / 6)))


def test_unknown_schedules_are_refused():
    with pytest.raises(UsageError, match="no lr_scheduler_type 'cosin': choose one of .*cosine"):
        learning_rate_schedule("cosin", 1.0, 0, 10, 5)
    with pytest.raises(UsageError, match="reduce_lr_on_plateau"):
        learning_rate_schedule("reduce_lr_on_plateau", 1.0, 0, 10, 5)


def test_alpha_rises_over_the_first_epoch():
    assert [alpha_schedule(0.4, step, 4) for step in (0, 1, 2, 4, 9)] == pytest.approx([0.0, 0.1, 0.2, 0.4, 0.4])


def test_durations():
    assert total_optimizer_steps(10, 2.5, None) == 25
    assert total_optimizer_steps(10, 0.01, None) == 1
    assert total_optimizer_steps(10, 3, 7) == 7
    with pytest.raises(UsageError, match="nothing to train"):
        total_optimizer_steps(10, 0, None)
