"""`--lora_rank`: train adapters of a trained model, and nothing else of it."""

from __future__ import annotations

import os

from aliblip.models.original import is_original
from aliblip.retrieval.adapters import add_lora, has_peft, is_adapter
from aliblip.runtime.installation import install_hint
from aliblip.runtime.mistakes import UsageError
from aliblip.training.arguments import ModelArguments, TrainingArguments
from modeling_aliblip import AliBlipForImageTextRetrieval


def check_lora(model_args: ModelArguments, args: TrainingArguments) -> None:
    """Refuse what adapters don't go with.

    Raises:
        UsageError: what, and what to do instead.
    """
    if args.lora_rank is None:
        if args.lora_alpha is not None:
            raise UsageError("--lora_alpha without --lora_rank says nothing: give both, or neither")
        return
    name = model_args.model_name_or_path
    if name is None:
        raise UsageError("--lora_rank adapts a trained model: give --model_name_or_path")
    if not has_peft():
        raise UsageError(f"--lora_rank needs PEFT: {install_hint('peft')}")
    for told, is_given in {
        "an original file": is_original(name),
        "an adapter": is_adapter(name),
    }.items():
        if is_given:
            raise UsageError(
                f"--lora_rank: {name} is {told}, which an adapter can't name as its model: convert it first, python -m "
                f"aliblip.convert --model_name_or_path {name}"
            )
    if model_args.image_size is not None:
        raise UsageError(
            "--image_size with --lora_rank: an adapter keeps no position embedding; convert the model to that size "
            "first, python -m aliblip.convert --image_size"
        )
    refused = {
        "freeze": args.freeze is not None,
        "temperature_learning_rate": args.temperature_learning_rate is not None,
        "compile": args.compile,
        "push_to_hub": args.push_to_hub,
    }
    reasons = {
        "freeze": "adapters alone are trained anyway",
        "temperature_learning_rate": "the temperature is not trained",
        "compile": "layers with adapters are not compiled",
        "push_to_hub": "merge the adapter and publish the model, python -m aliblip.publish",
    }
    for flag, is_given in refused.items():
        if is_given:
            raise UsageError(f"--{flag} with --lora_rank: {reasons[flag]}; leave out one of the two")


def adapt(model: AliBlipForImageTextRetrieval, model_args: ModelArguments, args: TrainingArguments) -> None:
    """Put the adapters that the arguments ask for into a trained model; with weights of the global random state."""
    name = model_args.model_name_or_path
    base = os.path.abspath(name) if os.path.isdir(name) else name
    alpha = 2.0 * args.lora_rank if args.lora_alpha is None else args.lora_alpha
    add_lora(model, args.lora_rank, alpha, base)


__all__ = ["adapt", "check_lora"]
