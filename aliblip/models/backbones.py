"""Towers that start from a trained ViT or BERT of transformers, the rest fresh.

    train.py --config_name base --vision_model_name_or_path google/vit-base-patch16-224-in21k \
        --text_model_name_or_path google-bert/bert-base-uncased --image_size 384 ...

All weights that have a place here are copied: with them a tower computes what its backbone computes (BERT's first token
type, which it adds to every token, is added to our position embeddings once). Poolers and heads of pre-training have no
place and are dropped. Cross-attention, projections, matching head and temperature are fresh, and so are the embeddings
of `[DEC]` and `[ENC]`. A backbone with any other weight, or without one of them, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, BertModel, BlipImageProcessorPil, PreTrainedConfig, ViTModel
from transformers.utils import logging

from aliblip.models.original import check_weights
from aliblip.retrieval.model_folder import LOADING_ERRORS, check_settings, check_size
from aliblip.runtime.mistakes import UsageError, usage_errors
from configuration_aliblip import AliBlipTextConfig, AliBlipVisionConfig, training_defaults
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

# Names of ViTModel -> ours; the names of the numbered layers depend on the version of transformers.
_VIT_NAMES = [
    (r"^embeddings\.cls_token$", "embeddings.class_embedding"),
    (r"^embeddings\.position_embeddings$", "embeddings.position_embedding"),
    (r"^embeddings\.patch_embeddings\.projection\.", "embeddings.patch_embedding."),
    (r"^layernorm\.", "post_layernorm."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.layernorm_before\.", r"encoder.layers.\1.layer_norm1."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.layernorm_after\.", r"encoder.layers.\1.layer_norm2."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:attention\.)?(query|key|value)\.", r"qkv.\1.\2."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.attention\.q_proj\.", r"qkv.\1.query."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.attention\.k_proj\.", r"qkv.\1.key."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.attention\.v_proj\.", r"qkv.\1.value."),
    (
        r"^(?:encoder\.layer|layers)\.(\d+)\.attention\.(?:output\.dense|o_proj)\.",
        r"encoder.layers.\1.self_attn.projection.",
    ),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.(?:intermediate\.dense|mlp\.fc1)\.", r"encoder.layers.\1.mlp.fc1."),
    (r"^(?:encoder\.layer|layers)\.(\d+)\.(?:output\.dense|mlp\.fc2)\.", r"encoder.layers.\1.mlp.fc2."),
]
# Of pre-training and other tasks; a retrieval model has no use for them.
_VIT_DROPPED = r"(^|\.)(pooler\.|classifier\.|decoder\.|embeddings\.mask_token$|lm_head\.)"
_BERT_DROPPED = r"(^|\.)(pooler\.|cls\.|classifier\.|qa_outputs\.|embeddings\.position_ids$)"

_WORDS = "text_encoder.embeddings.word_embeddings.weight"
_LARGEST_PADDING = 127  # word embeddings are padded to multiples of 128 at most


@dataclass
class Backbone:
    """A trained tower."""

    source: str
    tower: str  # vision_model or text_encoder
    config: dict[str, Any]  # fields of our sub-configuration
    weights: dict[str, Tensor]  # fp32, under our names
    dropped: list[str]
    pixel_statistics: dict[str, Any] = field(default_factory=dict)  # image_mean and image_std that it was trained with


def read_vision_backbone(name: str) -> Backbone:
    """A ViT as photo tower. Raises UsageError for another kind of model, or one that lacks a weight."""
    config = _config(name, "vit", "--vision_model_name_or_path takes a ViT such as google/vit-base-patch16-224-in21k")
    if config.num_channels != 3:
        raise UsageError(f"{name} looks at {config.num_channels} channels: photos have 3")
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    fields += ("patch_size", "hidden_act", "layer_norm_eps")
    given = {field: getattr(config, field) for field in fields}
    _check_config(name, config, AliBlipVisionConfig, given, ViTModel)
    state, dropped = _load(ViTModel, name, _VIT_DROPPED)
    weights: dict[str, Tensor] = {}
    projections: dict[str, Tensor] = {}  # query, key and value, which are one weight here
    for theirs, value in state.items():
        for pattern, replacement in _VIT_NAMES:
            renamed, count = re.subn(pattern, replacement, theirs)
            if count:
                break
        else:
            raise UsageError(f"{name} has a weight {theirs} that has no place here")
        (projections if renamed.startswith("qkv.") else weights)[renamed] = value
    for layer in range(config.num_hidden_layers):
        for kind, of_none in (("weight", None), ("bias", torch.zeros(config.hidden_size))):
            three = [projections.get(f"qkv.{layer}.{of}.{kind}", of_none) for of in ("query", "key", "value")]
            weights[f"encoder.layers.{layer}.self_attn.qkv.{kind}"] = torch.cat(three)
    return Backbone(
        name,
        "vision_model",
        {
            **training_defaults(config.hidden_size, config.num_hidden_layers),
            **given,
            "attention_dropout": config.attention_probs_dropout_prob,
        },
        {f"vision_model.{ours}": value for ours, value in weights.items()},
        dropped,
        _pixel_statistics(name),
    )


def read_text_backbone(name: str) -> Backbone:
    """A BERT as title tower. Raises UsageError for another kind of model, or one that lacks a weight."""
    config = _config(name, "bert", "--text_model_name_or_path takes a BERT such as google-bert/bert-base-uncased")
    positions = getattr(config, "position_embedding_type", "absolute")
    if positions != "absolute":
        raise UsageError(f"{name} has {positions} position embeddings: take a BERT with absolute ones")
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act")
    fields += ("max_position_embeddings", "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob")
    given = {field: getattr(config, field) for field in fields}
    _check_config(name, config, AliBlipTextConfig, given | {"vocab_size": config.vocab_size}, BertModel)
    weights, dropped = _load(BertModel, name, _BERT_DROPPED)
    types = weights.pop("embeddings.token_type_embeddings.weight")
    # Every token of a title is of the first type: adding it to the positions once gives the same sums.
    weights["embeddings.position_embeddings.weight"] = weights["embeddings.position_embeddings.weight"] + types[0]
    dropped += [f"embeddings.token_type_embeddings.weight[{i}]" for i in range(1, len(types))]
    return Backbone(
        name,
        "text_encoder",
        given,
        {f"text_encoder.{ours}": value for ours, value in weights.items()},
        dropped,
    )


def check_backbone_vocabulary(backbone: Backbone, processor: AliBlipProcessor) -> None:
    """Refuse a tokenizer that is not the BERT's.

    Raises:
        UsageError: with both numbers of tokens.
    """
    rows = backbone.weights[_WORDS].shape[0]
    tokens = len(processor.tokenizer)
    new = {token for token in ("[DEC]", "[ENC]") if processor.tokenizer.convert_tokens_to_ids(token) >= rows}
    if not 0 <= rows - (tokens - len(new)) <= _LARGEST_PADDING:
        raise UsageError(
            f"{backbone.source} has word embeddings for {rows} tokens, the tokenizer has {tokens - len(new)}: leave "
            "out --tokenizer_name to take the model's own"
        )


def start_from_backbone(model: AliBlipForImageTextRetrieval, backbone: Backbone) -> list[str]:
    """Copy a backbone's weights into its tower, in place.

    Args:
        model: built with the backbone's configuration, at its photo size.
        backbone: of `read_vision_backbone` or `read_text_backbone`.

    Returns:
        The names of the model's parameters that were copied.

    Raises:
        UsageError: a weight of the tower is missing, too many or of another shape.
    """
    own = model.state_dict()
    expected = {k: v for k, v in own.items() if k.startswith(f"{backbone.tower}.") and ".crossattention." not in k}
    weights = dict(backbone.weights)
    if _WORDS in weights:
        rows = min(len(weights[_WORDS]), len(own[_WORDS]))
        weights[_WORDS] = torch.cat([weights[_WORDS][:rows], own[_WORDS][rows:]])
    check_weights(backbone.source, weights, expected)
    model.load_state_dict(weights, strict=False)
    return list(weights)


def starting_report(model: AliBlipForImageTextRetrieval, backbones: list[Backbone], copied: list[str]) -> str:
    """What was copied, what was dropped and what is fresh, for the screen."""
    lines = []
    for backbone in backbones:
        line = f"{backbone.tower}: {len(backbone.weights)} tensors copied from {backbone.source}"
        if backbone.tower == "text_encoder":
            rows, tokens = len(backbone.weights[_WORDS]), model.config.text_config.vocab_size
            line += f" (word embeddings: {min(rows, tokens)} rows copied, {max(tokens - rows, 0)} fresh)"
        if backbone.dropped:
            line += f"; dropped: {', '.join(backbone.dropped)}"
        lines.append(line)
    names = list(model.state_dict())
    fresh = sorted(set(names) - set(copied))
    groups = []
    for top in sorted({name.split(".")[0] for name in fresh}):
        of_top = [name for name in fresh if name.split(".")[0] == top]
        whole = len(of_top) == sum(name.split(".")[0] == top for name in names)
        groups.append(top if whole else f"{top}.encoder.layer.*.crossattention")
    return "\n".join([*lines, f"fresh: {len(fresh)} tensors ({', '.join(groups)})"])


def _config(name: str, model_type: str, hint: str):
    check_settings(name)
    with usage_errors(*LOADING_ERRORS, told=f"no model at {name!r} ({{}}): {hint}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.model_type != model_type:
        raise UsageError(f"{name} is of model type {config.model_type!r}: {hint}")
    return config


def _check_config(name: str, config: PreTrainedConfig, ours: type, fields: dict[str, Any], theirs: type) -> None:
    """Refuse, before its weights are loaded, a tower that we can't build, or of a size that its weights don't have."""
    told = f"config.json of {name} does not fit ({{}}): take another model, or bring the file back"
    with usage_errors(ValueError, TypeError, told=told):
        ours(**fields)
    with usage_errors(*LOADING_ERRORS, told=told):
        check_size(name, partial(theirs, config))


def _load(model_class, name: str, dropped_pattern: str) -> tuple[dict[str, Tensor], list[str]]:
    """Weights in fp32, and the names of those that are left out on purpose."""
    with usage_errors(*LOADING_ERRORS, told=f"can't load the weights of {name}: {{}}"), _without_its_report():
        model, info = model_class.from_pretrained(
            name,
            add_pooling_layer=False,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    dropped = sorted(key for key in info["unexpected_keys"] if re.search(dropped_pattern, key))
    wrong = [f"missing: {', '.join(sorted(info['missing_keys']))}"] if info["missing_keys"] else []
    if unexpected := sorted(set(info["unexpected_keys"]) - set(dropped)):
        wrong.append(f"unexpected: {', '.join(unexpected)}")
    if misshaped := [f"{n} {tuple(given)} for {tuple(own)}" for n, given, own in info["mismatched_keys"]]:
        wrong.append(f"of another shape: {', '.join(sorted(misshaped))}")
    if wrong:
        raise UsageError(f"the weights of {name} do not fit ({'; '.join(wrong)})")
    return model.state_dict(), dropped


@contextmanager
def _without_its_report() -> Iterator[None]:
    """Without transformers' table of missing and unexpected weights: ours says the same, or refuses them."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _pixel_statistics(name: str) -> dict[str, Any]:
    """Mean and deviation that a ViT was trained with; empty where its folder doesn't tell (CLIP's then)."""
    try:
        settings, _ = BlipImageProcessorPil.get_image_processor_dict(name)
    except (OSError, ValueError):
        return {}
    return {key: settings[key] for key in ("image_mean", "image_std") if key in settings}


__all__ = [
    "Backbone",
    "check_backbone_vocabulary",
    "read_text_backbone",
    "read_vision_backbone",
    "start_from_backbone",
    "starting_report",
]
