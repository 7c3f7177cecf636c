"""`--fp8`: the linear layers of the towers multiply in 8 bits (https://arxiv.org/abs/2209.05433), by torchao.

    towers = Float8Towers(model, momentum.encoders)
    ...train...

Only the products of a training step are in 8 bits, those of the forward and of the backward pass, each tensor with a
scale of its own that is computed anew. Weights, gradients and the optimizer's state stay what they are, in their names
and places: a checkpoint goes on with the flag or without. An evaluation runs without, and a saved model knows nothing
of it. It pays on GPUs that multiply 8 bits faster than 16, in large layers, together with `--compile`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from aliblip.runtime.accelerator import TRAINING_PRECISIONS, launched_precision
from aliblip.runtime.installation import install_hint
from aliblip.runtime.mistakes import UsageError
from aliblip.training.arguments import TrainingArguments

FIRST_CAPABILITY = (8, 9)  # Ada; Hopper is (9, 0)
MULTIPLE = 16  # of both sides of a weight, for the GPU's kernels


def check_fp8(args: TrainingArguments, device: torch.device | None) -> None:
    """Refuse what can't be done in 8 bits.

    Args:
        device: that the launcher gives; None: not looked at.

    Raises:
        UsageError: what, and what to do instead.
    """
    if not args.fp8:
        return
    if importlib.util.find_spec("torchao") is None:
        raise UsageError(f"--fp8 needs torchao: {install_hint('fp8')}")
    if args.lora_rank is not None:
        raise UsageError("--fp8 with --lora_rank: layers with adapters stay as they are; leave out one of the two")
    precision = launched_precision(args.mixed_precision, TRAINING_PRECISIONS).replace("no", "fp32")
    if precision != "bf16":
        raise UsageError(
            f"--fp8 is for the linear layers of a run in bf16, and this one is in {precision}: "
            "give --mixed_precision bf16, or leave it out"
        )
    if device is not None:
        check_fp8_device(device)


def check_fp8_device(device: torch.device) -> None:
    """
    Raises:
        UsageError: it has no instructions for products of 8 bits.
    """
    if Float8Towers.emulate:
        return
    if device.type != "cuda":
        raise UsageError(
            f"--fp8 needs a GPU (Ada, Hopper or newer), and this run is on the {device.type.upper()}: leave it out"
        )
    if torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
        raise UsageError(
            f"--fp8 needs a GPU that multiplies in 8 bits (Ada, Hopper or newer), and this one is a "
            f"{torch.cuda.get_device_name(device)}: leave it out"
        )


class Float8Towers:
    """Towers whose linear layers multiply in 8 bits until they are asked not to.

    Args:
        models: each with `vision_model` and `text_encoder`; changed in place, before they are prepared or compiled.
    """

    emulate = False  # compute the same numbers where there are no instructions for it, slowly

    def __init__(self, *models: nn.Module):
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig(emulate=self.emulate, pad_inner_dim=True)  # batches have any number of tokens
        self._swapped: list[tuple[nn.Module, str, nn.Linear, nn.Linear]] = []
        for model in models:
            for layers in (model.vision_model.encoder.layers, model.text_encoder.encoder.layer):
                plain = {name: module for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
                convert_to_float8_training(layers, config=config, module_filter_fn=_fits)
                for name, module in plain.items():
                    parent, _, child = name.rpartition(".")
                    now = layers.get_submodule(name)
                    if now is not module:
                        self._swapped.append((layers.get_submodule(parent), child, module, now))
        self.total = sum(isinstance(module, nn.Linear) for model in models for module in model.modules())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, everything runs as if nothing were in 8 bits."""
        for parent, name, plain, _ in self._swapped:
            setattr(parent, name, plain)
        try:
            yield
        finally:
            for parent, name, _, in_8_bits in self._swapped:
                setattr(parent, name, in_8_bits)

    def told(self) -> str:
        return f"{len(self._swapped)} of {self.total} linear layers multiply in 8 bits, momentum encoders included"


def _fits(module: nn.Module, name: str) -> bool:
    return module.in_features % MULTIPLE == 0 and module.out_features % MULTIPLE == 0


__all__ = ["Float8Towers", "check_fp8", "check_fp8_device"]
