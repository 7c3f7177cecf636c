"""Parameter groups, learning-rate schedules and durations: one owner for each.

Schedules are pure functions of the optimizer step, so there is no schedule state to save, to prepare or to step.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler

from aliblip.runtime.mistakes import UsageError, usage_errors

COSINE_PER_EPOCH = "cosine_per_epoch"


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_everything: bool = False, temperature_scale: float = 1.0
) -> list[dict]:
    """AdamW's parameter groups, trainable parameters only.

    Args:
        model: any module; the ITC temperature is the parameter named `temp`.
        weight_decay: of the weight matrices and the word and position tables. Everything with one dimension (biases,
            LayerNorms, the temperature) and the class token are not decayed, as is usual for transformers.
        decay_everything: decay all, as the published retrieval code does.
        temperature_scale: the temperature's learning rate as a share of the others' (group entry "lr_scale").

    Raises:
        ValueError: no parameter is trainable.
    """
    groups: dict[tuple[bool, bool], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() > 1 and not name.endswith("class_embedding")
            is_temperature = name.rpartition(".")[2] == "temp" and temperature_scale != 1.0
            groups.setdefault((decay_everything or matrix, is_temperature), []).append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameter: unfreeze some before training")
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if decayed else 0.0,
            "lr_scale": temperature_scale if is_temperature else 1.0,
        }
        for (decayed, is_temperature), parameters in groups.items()
    ]


def learning_rate_schedule(
    name: str, learning_rate: float, warmup_steps: int, total_steps: int, steps_per_epoch: int
) -> Callable[[int], float]:
    """The learning rate as a function of the optimizer step (0: the first).

    Args:
        name: a schedule of transformers by its name (linear, cosine, constant_with_warmup, ...), stepped per optimizer
            step; or `cosine_per_epoch`, BLIP's: constant within an epoch, half a cosine to 0 over the epochs.
        warmup_steps: optimizer steps of linear warm-up from 0.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of an epoch.

    Raises:
        UsageError: an unknown name, or a schedule of transformers that is no function of the step.
    """
    if name == COSINE_PER_EPOCH:
        epochs = math.ceil(total_steps / steps_per_epoch)

        def factor(step: int) -> float:
            warm = min(1.0, step / warmup_steps) if warmup_steps else 1.0
            return warm * 0.5 * (1.0 + math.cos(math.pi * (step // steps_per_epoch) / epochs))
    else:
        accepted = sorted([COSINE_PER_EPOCH, *(kind.value for kind in SchedulerType)])
        if name not in accepted:
            raise UsageError(f"there is no lr_scheduler_type {name!r}: choose one of {', '.join(accepted)}")
        # transformers builds its schedules around an optimizer; only the function inside is wanted.
        carrier = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        with usage_errors(
            TypeError, ValueError, told=f"lr_scheduler_type {name!r} needs settings that no flag sets: {{}}"
        ):
            scheduler = get_scheduler(name, carrier, num_warmup_steps=warmup_steps, num_training_steps=total_steps)
        if not isinstance(scheduler, LambdaLR):
            raise UsageError(f"lr_scheduler_type {name!r} is no function of the step alone: choose cosine or linear")
        factor = scheduler.lr_lambdas[0]
    return lambda step: learning_rate * factor(step)


def set_learning_rate(optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group; also of an optimizer that accelerate or DeepSpeed wrapped."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)


def alpha_schedule(alpha: float, micro_step: int, micro_steps_per_epoch: int) -> float:
    """Weight of the momentum opinion: from 0 linearly to `alpha` over the micro-batches of the first epoch, then
    constant."""
    return alpha * min(1.0, micro_step / micro_steps_per_epoch)


def total_optimizer_steps(steps_per_epoch: int, num_train_epochs: float, max_train_steps: int | None) -> int:
    """Optimizer steps of the run: `max_train_steps` where given, otherwise the epochs' worth, a fraction of one rounded
    up.

    Raises:
        UsageError: nothing to train.
    """
    total = max_train_steps if max_train_steps is not None else math.ceil(num_train_epochs * steps_per_epoch)
    if total < 1:
        raise UsageError(
            f"nothing to train: num_train_epochs {num_train_epochs}, max_train_steps {max_train_steps}; give more "
            "than 0"
        )
    return total


__all__ = [
    "alpha_schedule",
    "learning_rate_schedule",
    "parameter_groups",
    "set_learning_rate",
    "total_optimizer_steps",
]
