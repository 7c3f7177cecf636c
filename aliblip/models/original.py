"""Checkpoints of the original BLIP code: their names and tensors, to ours and back, and transformers' BLIP."""

from __future__ import annotations

import copy
import math
import os
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BlipConfig, BlipForImageTextRetrieval, BlipProcessor

from aliblip.runtime.mistakes import UsageError, usage_errors
from configuration_aliblip import AliBlipConfig, training_defaults
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

ORIGINAL_FILE = "model.pth"

# Beginnings of names, the original one and ours; # stands for a number. Other names are the same in both.
_NAMES: list[tuple[str, str]] = [
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.norm.", "vision_model.post_layernorm."),
    ("visual_encoder.blocks.#.norm#.", "vision_model.encoder.layers.#.layer_norm#."),
    ("visual_encoder.blocks.#.attn.qkv.", "vision_model.encoder.layers.#.self_attn.qkv."),
    ("visual_encoder.blocks.#.attn.proj.", "vision_model.encoder.layers.#.self_attn.projection."),
    ("visual_encoder.blocks.#.mlp.", "vision_model.encoder.layers.#.mlp."),
]

_MOMENTUM = re.compile(r"^(visual_encoder|text_encoder|vision_proj|text_proj)_m\.")
# Of the weights that have a momentum copy, in the original code's names.
ENCODER_NAMES = re.compile(r"^(visual_encoder|text_encoder|vision_proj|text_proj)\.")
_QUEUE_NAMES = {"image_queue", "text_queue", "idx_queue", "ptr_queue"}
NOT_FILLED = -100  # the product id of an empty slot in `idx_queue`


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for beginning, replacement in pairs:
        if found := re.match(r"(\d+)".join(map(re.escape, beginning.split("#"))), name):
            numbers = iter(found.groups())
            return re.sub("#", lambda _, numbers=numbers: next(numbers), replacement) + name[found.end() :]
    return name


def our_name(original: str) -> str:
    """The name of one weight of the original code in ours."""
    return _rename(original, _NAMES)


def original_name(ours: str) -> str:
    """The name of one of our weights in the original code."""
    return _rename(ours, ((mine, original) for original, mine in _NAMES))


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


def check_weights(
    source: str | os.PathLike,
    given: dict[str, Tensor],
    expected: dict[str, Tensor],
    name_in_source: Callable[[str], str] = str,
) -> None:
    """Refuse weights that do not fit one to one.

    Raises:
        UsageError: names what is missing, too many or of another shape, in the names of the source.
    """
    wrong = {
        "missing": [name_in_source(name) for name in expected if name not in given],
        "unexpected": [name_in_source(name) for name in given if name not in expected],
        "of another shape": [
            f"{name_in_source(name)} {tuple(given[name].shape)} for {tuple(value.shape)}"
            for name, value in expected.items()
            if name in given and given[name].shape != value.shape
        ],
    }
    if any(wrong.values()):
        raise UsageError(f"the weights of {source} do not fit ({_listed_by_kind(wrong)})")


def _listed_by_kind(wrong: dict[str, list[str]], most: int = 8) -> str:
    """The names of each kind of problem, of many the first few."""
    return "; ".join(
        f"{what}: {', '.join(names[:most])}{f' and {len(names) - most} more' if len(names) > most else ''}"
        for what, names in wrong.items()
        if names
    )


# --- original files ---------------------------------------------------------------------------------------------------


@dataclass
class Original:
    """A file of the original code, sorted. The weights are in fp32 and under our names."""

    path: str
    weights: dict[str, Tensor]
    momentum: dict[str, Tensor]
    queues: dict[str, Tensor]
    dropped: dict[str, int]  # what a retrieval model does not need: kind -> number of tensors


def is_original(name: str) -> bool:
    """Whether a `--model_name_or_path` is a file of the original code.

    Raises:
        UsageError: it has the name of such a file, and is not there.
    """
    if os.path.isfile(name):
        return True
    if name.endswith((".pth", ".pt")):
        raise UsageError(f"there is no file {name}: give the path of the checkpoint (an address: download it first)")
    return False


def read_original(path: str | os.PathLike) -> Original:
    """Read a checkpoint of the original code, without running any code in it.

    Raises:
        UsageError: the file is not a checkpoint, or holds Python objects beside its tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        raise UsageError(
            f"{path} can't be read as tensors alone ({found.group(1) if found else 'damaged, or not a checkpoint'}): "
            "it could run code when it is loaded. If you trust it, write one of its weights: "
            f'torch.save({{"model": torch.load("{path}", weights_only=False)["model"]}}, "weights.pth")'
        ) from error
    except Exception as error:  # damaged bytes raise errors of every kind
        raise UsageError(
            f"{path} can't be read: it is damaged, or not a checkpoint ({' '.join(str(error).split())[:200]})"
        ) from error
    state = content.get("model", content) if isinstance(content, dict) else None
    is_state = isinstance(state, dict) and all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items())
    if not is_state or not state:
        raise UsageError(f'{path} is not a checkpoint of the original code: it has to hold {{"model": state dict}}')
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    kept, dropped = {}, {}
    for name, value in state.items():
        if name.startswith("text_decoder."):
            dropped["text decoder"] = dropped.get("text decoder", 0) + 1
        elif name.endswith(".position_ids") and torch.equal(value.flatten(), torch.arange(value.numel())):
            dropped["position_ids"] = dropped.get("position_ids", 0) + 1
        else:
            kept["ptr_queue" if name == "queue_ptr" else name] = value.float() if value.is_floating_point() else value
    return Original(str(path), *split_original(kept), dropped)


def original_config(
    original: Original, vision: dict[str, Any], text: dict[str, Any], enc_token_id: int
) -> AliBlipConfig:
    """The configuration of an original file, its sizes read off the tensors.

    Args:
        original: the file.
        vision, text: fields that can't be read off the tensors, or that shall differ (heads, dropout, epsilons).
        enc_token_id: id of [ENC].

    Raises:
        UsageError: tensors that sizes are read from are missing or of a strange shape, or a value is not accepted.
    """
    dimensions = {
        (patches := "vision_model.embeddings.patch_embedding.weight"): 4,
        (positions := "vision_model.embeddings.position_embedding"): 3,
        (vision_mlp := "vision_model.encoder.layers.0.mlp.fc1.weight"): 2,
        (words := "text_encoder.embeddings.word_embeddings.weight"): 2,
        (text_positions := "text_encoder.embeddings.position_embeddings.weight"): 2,
        (text_mlp := "text_encoder.encoder.layer.0.intermediate.dense.weight"): 2,
        (projection := "vision_proj.weight"): 2,
    }
    shapes = {name: tuple(original.weights[name].shape) for name in dimensions if name in original.weights}
    wrong = {
        "missing": [original_name(name) for name in dimensions if name not in shapes],
        "of another shape": [
            f"{original_name(name)} {shape} instead of {dimensions[name]} dimensions"
            for name, shape in shapes.items()
            if len(shape) != dimensions[name]
        ],
    }
    if not any(wrong.values()):
        grid = math.isqrt(max(shapes[positions][1] - 1, 0))
        if grid**2 + 1 != shapes[positions][1]:
            wrong["of another shape"] = [f"{original_name(positions)} {shapes[positions]}: not a square of patches"]
    if any(wrong.values()):
        raise UsageError(
            f"{original.path} is not a retrieval or base checkpoint of BLIP ({_listed_by_kind(wrong)}); captioning "
            "and VQA checkpoints can't be converted"
        )
    width, depth = shapes[patches][0], _layers(original.weights, r"^vision_model\.encoder\.layers\.(\d+)\.")
    patch_size = shapes[patches][3]
    text_width = shapes[words][1]
    told = f"no model can be built from {original.path} with these --vision_config and --text_config: {{}}"
    with usage_errors(ValueError, told=told):
        return AliBlipConfig(
            vision_config={
                **training_defaults(width, depth),
                "hidden_size": width,
                "intermediate_size": shapes[vision_mlp][0],
                "num_hidden_layers": depth,
                "num_attention_heads": vision.get("num_attention_heads") or _heads("vision", width),
                "image_size": grid * patch_size,
                "patch_size": patch_size,
                **vision,
            },
            text_config={
                "vocab_size": shapes[words][0],
                "hidden_size": text_width,
                "intermediate_size": shapes[text_mlp][0],
                "num_hidden_layers": _layers(original.weights, r"^text_encoder\.encoder\.layer\.(\d+)\."),
                "num_attention_heads": text.get("num_attention_heads") or _heads("text", text_width),
                "max_position_embeddings": shapes[text_positions][0],
                **text,
            },
            image_text_hidden_size=shapes[projection][0],
            enc_token_id=enc_token_id,
        )


def _layers(weights: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match.group(1)) for name in weights if (match := re.match(pattern, name)))


def _heads(tower: str, width: int) -> int:
    if width % 64:
        raise UsageError(
            f"a {tower} tower {width} wide can't be divided into BLIP's heads of 64: give the number of heads, "
            f"--{tower}_config '{{\"num_attention_heads\": N}}'"
        )
    return width // 64


def model_of_original(original: Original, config: AliBlipConfig) -> AliBlipForImageTextRetrieval:
    """The model with the weights of an original file.

    Raises:
        UsageError: they don't fit one to one.
    """
    with torch.device("meta"):  # every weight is given: there is nothing to draw
        model = AliBlipForImageTextRetrieval(config)
    check_weights(original.path, original.weights, model.state_dict(), original_name)
    model.load_state_dict(original.weights, assign=True)
    return model


def to_original(
    model: AliBlipForImageTextRetrieval, momentum: dict[str, Tensor] | None = None
) -> dict[str, dict[str, Tensor]]:
    """What an original file holds: the weights, momentum encoders (which the original code demands), and queues where
    there are any.

    Args:
        model: the model.
        momentum: of a `momentum.safetensors`; without one the momentum encoders are copies of the encoders, as at the
            start of a training. Cross-attention, on which no momentum feature depends, is always a copy.
    """
    momentum = momentum or {}
    state = {}
    for name, value in model.state_dict().items():
        theirs = original_name(name)
        state[theirs] = value.reshape(()) if name == "temp" else value
        if ENCODER_NAMES.match(theirs):
            state[ENCODER_NAMES.sub(r"\1_m.", theirs)] = momentum.get(f"encoders.{name}", value).clone()
    if "image_queue" in momentum:
        state["image_queue"] = momentum["image_queue"].t().contiguous()
        state["text_queue"] = momentum["text_queue"].t().contiguous()
        state["idx_queue"] = momentum["queue_ids"].masked_fill(~momentum["queue_filled"], NOT_FILLED)[None]
        state["ptr_queue"] = torch.zeros(1, dtype=torch.int64)
    return {"model": state}


# --- transformers' BLIP -----------------------------------------------------------------------------------------------


def to_transformers(
    model: AliBlipForImageTextRetrieval, processor: AliBlipProcessor
) -> tuple[BlipForImageTextRetrieval, BlipProcessor]:
    """The same model and processor as transformers' own. The temperature has no place there and is lost."""
    ours, tokenizer = model.config, processor.tokenizer
    vision, text = ours.vision_config, ours.text_config
    vision_fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size")
    vision_fields += ("patch_size", "hidden_act", "layer_norm_eps", "attention_dropout", "initializer_range")
    text_fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text_fields += ("max_position_embeddings", "hidden_act", "layer_norm_eps", "hidden_dropout_prob")
    text_fields += ("attention_probs_dropout_prob", "initializer_range", "pad_token_id")
    config = BlipConfig(
        vision_config={name: getattr(vision, name) for name in vision_fields},
        text_config={
            **{name: getattr(text, name) for name in text_fields},
            "bos_token_id": tokenizer.bos_token_id,
            "sep_token_id": tokenizer.sep_token_id,
        },
        image_text_hidden_size=ours.image_text_hidden_size,
        enc_token_id=ours.enc_token_id,  # not used there; kept for the way back
    )
    theirs = BlipForImageTextRetrieval(config)
    weights = {name: value for name, value in model.state_dict().items() if name != "temp"}
    check_weights("this model", weights, theirs.state_dict())
    theirs.load_state_dict(weights)
    return theirs, BlipProcessor(plain_copy(processor.image_processor), plain_copy(tokenizer))


def plain_copy(processor):
    """A copy of a tokenizer or image processor that does not name our processor as code to load with it."""
    processor = copy.deepcopy(processor)
    for fields in (vars(processor), getattr(processor, "init_kwargs", {})):
        fields.pop("auto_map", None)
    return processor


__all__ = [
    "ENCODER_NAMES",
    "NOT_FILLED",
    "ORIGINAL_FILE",
    "Original",
    "check_weights",
    "is_original",
    "model_of_original",
    "original_config",
    "original_name",
    "our_name",
    "plain_copy",
    "read_original",
    "split_original",
    "to_original",
    "to_transformers",
]
