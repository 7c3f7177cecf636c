"""Parameter groups, learning-rate schedules and durations: one owner for each.

Schedules are pure functions of the optimizer step, so there is no schedule state to save, to prepare or to step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import SchedulerType, get_scheduler

from aliblip.runtime.mistakes import UsageError, usage_errors
from aliblip.training.freezing import frozen_parts

COSINE_PER_EPOCH = "cosine_per_epoch"


_LAYER = re.compile(r"(vision_model\.encoder\.layers|text_encoder\.encoder\.layer)\.(\d+)\.")


@dataclass(frozen=True)
class RateScales:
    """Learning rates of parts of the model, as shares of `--learning_rate`.

    Attributes:
        temperature: of the parameter named `temp`.
        vision: of `vision_model`.
        text: of `text_encoder`, its cross-attention included.
        layer_decay: factor from a layer of a tower to the one below it: the last layer has this factor once, the first
            of n layers n times, and the embeddings once more (BEiT, https://arxiv.org/abs/2106.08254). What follows
            the layers of a tower has none.
        vision_layers, text_layers: of the towers.
    """

    temperature: float = 1.0
    vision: float = 1.0
    text: float = 1.0
    layer_decay: float = 1.0
    vision_layers: int = 0
    text_layers: int = 0

    def of(self, name: str) -> float:
        """The share of a parameter, by its name."""
        root = name.partition(".")[0]
        if name.rpartition(".")[2] == "temp":
            return self.temperature
        if root not in ("vision_model", "text_encoder"):
            return 1.0
        scale, layers = (self.vision, self.vision_layers) if root == "vision_model" else (self.text, self.text_layers)
        if match := _LAYER.match(name):
            return scale * self.layer_decay ** (layers - int(match[2]))
        return scale * self.layer_decay ** (layers + 1) if ".embeddings." in name else scale


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_everything: bool = False, scales: RateScales | None = None
) -> list[dict]:
    """AdamW's parameter groups, trainable parameters only.

    Args:
        model: any module; the ITC temperature is the parameter named `temp`.
        weight_decay: of the weight matrices and the word and position tables. Everything with one dimension (biases,
            LayerNorms, the temperature) and the class token are not decayed, as is usual for transformers.
        decay_everything: decay all, as the published retrieval code does.
        scales: learning rates as shares of the run's (group entry "lr_scale"); None: all have the same.

    Raises:
        ValueError: no parameter is trainable.
    """
    scales = scales or RateScales()
    groups: dict[tuple[bool, float], list] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.dim() > 1 and not name.endswith("class_embedding")
            groups.setdefault((decay_everything or matrix, scales.of(name)), []).append(parameter)
    if not groups:
        raise ValueError("the model has no trainable parameter: unfreeze some before training")
    return [
        {"params": parameters, "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
        for (decayed, scale), parameters in groups.items()
    ]


def rate_scales(args, vision_layers: int, text_layers: int) -> RateScales:
    """The shares that the arguments ask for.

    Args:
        args: the `TrainingArguments`.
        vision_layers, text_layers: of the towers.

    Raises:
        UsageError: rates of parts beside a `--learning_rate` of 0, of which they can be no share, or of frozen parts.
    """
    rates = {
        "temperature": args.temperature_learning_rate,
        "vision": args.vision_learning_rate,
        "text": args.text_learning_rate,
    }
    frozen = frozen_parts(args.freeze)
    for part, rate in rates.items():
        # The cross-attention has the rate of the text tower.
        is_frozen = part in frozen and (part != "text" or "cross_attention" in frozen)
        if rate is not None and is_frozen:
            raise UsageError(f"--{part}_learning_rate is of a part that --freeze names: leave out one of the two")
    if not args.learning_rate:
        given = [part for part in ("vision", "text") if rates[part] is not None]
        if given:
            raise UsageError(
                f"--{given[0]}_learning_rate beside --learning_rate 0: give a rate above 0, and --freeze what shall "
                "not be trained"
            )
        return RateScales()
    shares = {part: 1.0 if rate is None else rate / args.learning_rate for part, rate in rates.items()}
    return RateScales(**shares, layer_decay=args.layer_decay, vision_layers=vision_layers, text_layers=text_layers)


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


def long_warmup(warmup_steps: int, total_steps: int) -> str | None:
    """What is wrong with a warm-up that is not over before its run; None: it is."""
    if warmup_steps < total_steps:
        return None
    return (
        f"--warmup_steps {warmup_steps} is not below the {total_steps} steps of the run: the learning rate never "
        "reaches its peak; lower it"
    )


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
    "RateScales",
    "alpha_schedule",
    "learning_rate_schedule",
    "long_warmup",
    "parameter_groups",
    "rate_scales",
    "set_learning_rate",
    "total_optimizer_steps",
]
