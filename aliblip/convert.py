"""Names of the original BLIP code and ours.

The original retrieval model keeps its momentum encoders and queues beside the weights; here they are training state.
"""

from __future__ import annotations

import re

from torch import Tensor

# Original name -> ours, tried in this order; what no pattern touches has the same name in both.
ORIGINAL_NAMES: list[tuple[str, str]] = [
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm(\d)\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
]

_MOMENTUM = re.compile(r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.")
_QUEUE_NAMES = {"image_queue", "text_queue", "idx_queue", "ptr_queue"}


def our_name(original: str) -> str:
    """The name of one weight of the original code in ours."""
    for pattern, replacement in ORIGINAL_NAMES:
        renamed, count = re.subn(pattern, replacement, original)
        if count:
            return renamed
    return original


def split_original(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """An original state dict as the model's weights, the momentum encoders' weights (both under our names) and the
    queues (original names and layout: features (E, Q), `idx_queue` (1, Q), -100 in a slot not yet filled)."""
    weights, momentum, queues = {}, {}, {}
    for name, value in state.items():
        if name in _QUEUE_NAMES:
            queues[name] = value
        elif _MOMENTUM.match(name):
            momentum[our_name(_MOMENTUM.sub(r"\1.", name))] = value
        else:
            weights[our_name(name)] = value.reshape(1) if name == "temp" else value
    return weights, momentum, queues


__all__ = ["ORIGINAL_NAMES", "our_name", "split_original"]
