"""`--freeze`: parts of the model that keep their weights.

    parts = frozen_parts("vision,temperature")
    freeze(model, parts)

A frozen part stands in no gradient, no optimizer and no bucket of DDP or ZeRO. Dropout and drop-path stay what they
are. Its momentum encoders follow as ever: they begin with its weights and keep them, bit by bit, and those of a
checkpoint that differ still move towards it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from aliblip.runtime.mistakes import UsageError

# Part -> what it is. `text` is all that makes the features of a title; cross-attention is what ITM sees photos with.
PARTS = {
    "vision": "the ViT",
    "text": "the BERT without its cross-attention",
    "cross_attention": "the BERT's layers that see photos",
    "projections": "both projections into the shared space",
    "itm_head": "the matching head",
    "temperature": "the ITC temperature",
}
_ROOTS = {
    "vision_model": "vision",
    "text_encoder": "text",
    "vision_proj": "projections",
    "text_proj": "projections",
    "itm_head": "itm_head",
    "temp": "temperature",
}


def part_of(name: str) -> str:
    """The part that a parameter of the model belongs to, by its name."""
    return "cross_attention" if ".crossattention." in name else _ROOTS[name.partition(".")[0]]


def frozen_parts(told: str | None) -> tuple[str, ...]:
    """The parts that `--freeze` names, each once, in the order of `PARTS`.

    Raises:
        UsageError: there is no such part, or nothing is left to train.
    """
    named = [part.strip() for part in (told or "").split(",") if part.strip()]
    for part in named:
        if part not in PARTS:
            raise UsageError(f"--freeze names {part!r}: give a list of {', '.join(PARTS)}, with commas")
    if set(named) >= PARTS.keys() - {"temperature"}:
        raise UsageError("--freeze leaves nothing to train: leave out a part of the list")
    return tuple(part for part in PARTS if part in named)


def freeze(model: nn.Module, parts: Iterable[str]) -> None:
    """Take the parts out of the training of a model; everything else is trained."""
    parts = set(parts)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) not in parts)


__all__ = ["PARTS", "freeze", "frozen_parts", "part_of"]
