"""LoRA adapters of PEFT: put into a model to be trained, and merged into its weights where one is loaded.

An adapter folder holds the adapter alone and names its model; `from_pretrained` takes it where PEFT is installed. A
command that loads one computes with the merged model, a plain one.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import nn

from modeling_aliblip import AliBlipForImageTextRetrieval

# All attention, and what makes features and matches of it.
TARGETS = ("qkv", "projection", "query", "key", "value", "vision_proj", "text_proj", "itm_head")
ADAPTER = "adapter_config.json"


def has_peft() -> bool:
    """Whether PEFT is installed (the extra peft)."""
    return importlib.util.find_spec("peft") is not None


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / ADAPTER).is_file()


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters in it."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def add_lora(model: AliBlipForImageTextRetrieval, rank: int, alpha: float, base: str) -> None:
    """Put new adapters into a model, in place: nothing else of it is trained then. They begin as nothing, so the model
    computes what it did.

    Args:
        rank: of the matrices.
        alpha: they count alpha / rank times.
        base: what the adapter will name as its model.
    """
    from peft import LoraConfig

    model.name_or_path = base
    model.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(TARGETS)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def merged(model: AliBlipForImageTextRetrieval) -> AliBlipForImageTextRetrieval:
    """A model with its adapters in its weights; the model itself if it has none. It is used up."""
    if not is_adapted(model):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            model.set_submodule(name, module.get_base_layer())
    # A new one: the loaded one would be saved under the names that the adapter gave to its weights.
    plain = AliBlipForImageTextRetrieval(model.config)
    plain.to(model.dtype).load_state_dict(model.state_dict())
    plain.name_or_path = model.name_or_path
    return plain.train(model.training)


__all__ = ["ADAPTER", "add_lora", "has_peft", "is_adapted", "is_adapter", "merged"]
