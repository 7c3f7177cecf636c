"""BLIP checkpoints to AliBLIP folders, and back.

    python -m aliblip.convert --model_name_or_path model_base_retrieval_coco.pth --output_dir models/blip
    python -m aliblip.convert --model_name_or_path Salesforce/blip-itm-base-coco --output_dir models/blip
    python -m aliblip.convert --model_name_or_path models/blip --to transformers --output_dir models/for_transformers
    python -m aliblip.convert --model_name_or_path models/blip --to original --output_dir models/for_original

What is read:

- **Original files**: `{"model": state dict}` of the BLIP code or of the published AliProduct-BLIP (`epoch_N_nccl.pth`,
  with or without `module.` before the names). Retrieval checkpoints and the base ones (`model_base.pth`, ...) fit:
  both have the two encoders, both projections, the matching head and the temperature. The text decoder of base
  checkpoints is dropped: retrieval generates no text. Captioning and VQA checkpoints lack the matching head and are
  refused. Sizes are read off the tensors; heads are 64 wide, as in all of BLIP, unless `--vision_config` /
  `--text_config` say otherwise.
- **transformers' `BlipForImageTextRetrieval`**, folder or Hub name (model type `blip`). It has no temperature: ours
  starts at 0.07. Its ViT has a LayerNorm epsilon of 1e-5 where the original code has 1e-6; each is kept.
  `AliBlipForImageTextRetrieval.from_pretrained` takes these directly too.
- **AliBLIP folders**, for the way back or another `--image_size`.

A weight that is missing, too many or of another shape is refused with its name. `--momentum encoders` writes the
momentum encoders of an original file into `momentum.safetensors` beside the weights, `--momentum all` its queues too;
`train.py` starts from that file where it finds it, with a `--queue_size` of as many slots. The queues hold product ids:
carry them only to go on with the same data under the same ids, since an equal id makes a photo of the queue a positive.

`[ENC]` or `[CLS]`? BLIP's text encoder reads `[CLS]` first when it sees text alone (ITC), and `[ENC]` in its place when
it looks at a photo (ITM). AliBLIP, like the original code, does that inside the model: ids stay as the tokenizer gives
them. transformers' BLIP takes ids as they are. For the same ITM logits there:

    input_ids[:, 0] = tokenizer.convert_tokens_to_ids("[ENC]")  # = config.enc_token_id
    logits = blip(input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values).itm_score

and the ids as they were for ITC, `use_itm_head=False`.
"""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    BlipProcessor,
)

from aliblip.arguments import (
    ConvertArguments,
    UsageError,
    check_range,
    first_line,
    json_mapping,
    main_with_usage_errors,
    parse,
)
from aliblip.checkpoint import save_model
from aliblip.files import NewFolder, write_tensors
from aliblip.momentum import MOMENTUM_FILE, MomentumState, check_momentum, read_momentum
from configuration_aliblip import AliBlipConfig, training_defaults
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

ORIGINAL_FILE = "model.pth"

# Beginnings of names, the original one and ours, # for a number; what no pair touches has the same name in both.
NAMES: list[tuple[str, str]] = [
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
_ENCODERS = re.compile(r"^(visual_encoder|text_encoder|vision_proj|text_proj)\.")
_QUEUE_NAMES = {"image_queue", "text_queue", "idx_queue", "ptr_queue"}
_NOT_FILLED = -100  # in `idx_queue`


def _rename(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for beginning, replacement in pairs:
        if found := re.match(r"(\d+)".join(map(re.escape, beginning.split("#"))), name):
            numbers = iter(found.groups())
            return re.sub("#", lambda _, numbers=numbers: next(numbers), replacement) + name[found.end() :]
    return name


def our_name(original: str) -> str:
    """The name of one weight of the original code in ours."""
    return _rename(original, NAMES)


def original_name(ours: str) -> str:
    """The way back of `our_name`."""
    return _rename(ours, ((mine, original) for original, mine in NAMES))


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
        raise UsageError(f"the weights of {source} do not fit ({_listed(wrong)})")


def _listed(wrong: dict[str, list[str]], most: int = 8) -> str:
    """The names of each kind; of whole missing towers a few are enough."""
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
    dropped: dict[str, int]  # what no retrieval model has: kind -> number of tensors


def is_original(name: str) -> bool:
    """Whether a `--model_name_or_path` is a file of the original code. Raises UsageError for one that isn't there."""
    if os.path.isfile(name):
        return True
    if name.endswith((".pth", ".pt")):
        raise UsageError(f"there is no file {name}: give the path of the checkpoint (an address: download it first)")
    return False


def read_original(path: str | os.PathLike) -> Original:
    """Read a checkpoint of the original code, without running anything that stands in it.

    Raises:
        UsageError: no checkpoint, or one with Python objects beside its tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global) (\S+)", str(error))
        raise UsageError(
            f"{path} can't be read as tensors alone ({found.group(1) if found else 'damaged, or no checkpoint'}): such "
            "a file can run code when it is loaded. If you trust it, write one of its weights: "
            f'torch.save({{"model": torch.load("{path}", weights_only=False)["model"]}}, "weights.pth")'
        ) from error
    except Exception as error:  # of any kind, as the bytes will have it
        raise UsageError(
            f"{path} can't be read, is damaged or no checkpoint ({' '.join(str(error).split())[:200]})"
        ) from error
    state = content.get("model", content) if isinstance(content, dict) else None
    is_state = isinstance(state, dict) and all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items())
    if not is_state or not state:
        raise UsageError(f'{path} is no checkpoint of the original code: it has to hold {{"model": state dict}}')
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
        vision, text: fields that no tensor tells, or that are to be other than usual (heads, dropout, epsilons).
        enc_token_id: id of [ENC].

    Raises:
        UsageError: tensors that sizes are read from are missing or of a strange shape.
        ValueError: a value that no model can be built from.
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
            wrong["of another shape"] = [f"{original_name(positions)} {shapes[positions]}: no square of patches"]
    if any(wrong.values()):
        raise UsageError(
            f"{original.path} is no retrieval or base checkpoint of BLIP ({_listed(wrong)}); for captioning and VQA "
            "checkpoints there is no way"
        )
    width, depth = shapes[patches][0], _layers(original.weights, r"^vision_model\.encoder\.layers\.(\d+)\.")
    patch_size = shapes[patches][3]
    text_width = shapes[words][1]
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
            f"a {tower} tower {width} wide is none of BLIP's, whose heads are 64 wide: say the number of heads, "
            f"--{tower}_config '{{\"num_attention_heads\": N}}'"
        )
    return width // 64


def model_of_original(original: Original, config: AliBlipConfig) -> AliBlipForImageTextRetrieval:
    """The model with the weights of an original file; raises UsageError where they don't fit one to one."""
    with torch.device("meta"):  # every weight is given: there is nothing to draw
        model = AliBlipForImageTextRetrieval(config)
    check_weights(original.path, original.weights, model.state_dict(), original_name)
    model.load_state_dict(original.weights, assign=True)
    return model


def momentum_of_original(
    original: Original, model: AliBlipForImageTextRetrieval, image_size: int, with_queues: bool
) -> dict[str, Tensor]:
    """What `momentum.safetensors` holds: the momentum encoders of an original file and, if wanted, its queues.

    Args:
        original: the file.
        model: its model, at the size of the file.
        image_size: size in pixels to which the encoders are brought.
        with_queues: the queues too; they begin with the slot that is written next.

    Raises:
        UsageError: the file has no momentum encoders or queues, or they are of another model.
    """
    encoders = copy.deepcopy(model)
    expected = {k: v for k, v in encoders.state_dict().items() if _ENCODERS.match(original_name(k))}
    check_weights(
        f"the momentum encoders of {original.path}",
        original.momentum,
        expected,
        lambda name: _ENCODERS.sub(r"\1_m.", original_name(name)),
    )
    encoders.load_state_dict(original.momentum, strict=False)
    encoders.resize_image(image_size)
    embedding_size = model.config.image_text_hidden_size
    queues = original.queues
    size = queues["image_queue"].shape[-1] if with_queues and "image_queue" in queues else 1
    if with_queues:
        expected = {
            **{name: torch.empty(embedding_size, size, device="meta") for name in ("image_queue", "text_queue")},
            "idx_queue": torch.empty(1, size, device="meta"),
            "ptr_queue": torch.empty(1, device="meta"),
        }
        try:
            check_weights(f"the queues of {original.path}", queues, expected)
        except UsageError as error:
            raise UsageError(f"{error}: take --momentum encoders") from error
    state = MomentumState(encoders, queue_size=size, embedding_size=embedding_size)
    if with_queues:
        ids = queues["idx_queue"].flatten()
        columns = (torch.arange(size) + int(queues["ptr_queue"])) % size  # the pointer becomes 0
        state.image_queue.copy_(queues["image_queue"].t()[columns])
        state.text_queue.copy_(queues["text_queue"].t()[columns])
        state.queue_ids.copy_(ids[columns])
        state.queue_filled.copy_(ids[columns] != _NOT_FILLED)
    tensors = {name: value for name, value in state.state_dict().items() if torch.is_tensor(value)}
    return {name: value for name, value in tensors.items() if with_queues or name.startswith("encoders.")}


def to_original(
    model: AliBlipForImageTextRetrieval, momentum: dict[str, Tensor] | None = None
) -> dict[str, dict[str, Tensor]]:
    """What an original file holds: the weights, momentum encoders (the original code can't load a file without), and
    queues if there are any.

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
        if _ENCODERS.match(theirs):
            state[_ENCODERS.sub(r"\1_m.", theirs)] = momentum.get(f"encoders.{name}", value).clone()
    if "image_queue" in momentum:
        state["image_queue"] = momentum["image_queue"].t().contiguous()
        state["text_queue"] = momentum["text_queue"].t().contiguous()
        state["idx_queue"] = momentum["queue_ids"].masked_fill(~momentum["queue_filled"], _NOT_FILLED)[None]
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
        enc_token_id=ours.enc_token_id,  # not used there: for whoever needs it, and for the way back
    )
    theirs = BlipForImageTextRetrieval(config)
    weights = {name: value for name, value in model.state_dict().items() if name != "temp"}
    check_weights("this model", weights, theirs.state_dict())
    theirs.load_state_dict(weights)
    return theirs, BlipProcessor(_plain(processor.image_processor), _plain(tokenizer))


def _plain(part):
    """A copy of a tokenizer or image processor that does not name our processor as code to load with it."""
    part = copy.deepcopy(part)
    for fields in (vars(part), getattr(part, "init_kwargs", {})):
        fields.pop("auto_map", None)
    return part


# --- any of them ------------------------------------------------------------------------------------------------------


def build_processor(
    tokenizer_name: str, max_length: int | None = None, image_processor: BlipImageProcessorPil | None = None
) -> AliBlipProcessor:
    """A new processor around a tokenizer: a folder, a `vocab.txt` or a Hub name.

    Raises:
        UsageError: there is none, or it is no fast WordPiece tokenizer.
    """
    name = tokenizer_name
    try:
        tokenizer = BertTokenizer(vocab=name) if os.path.isfile(name) else AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no tokenizer at {name!r} ({first_line(error)}): --tokenizer_name takes a folder, a vocab.txt or a "
            "Hub name"
        ) from error
    if not tokenizer.is_fast or getattr(tokenizer, "cls_token_id", None) is None:
        raise UsageError(f"the tokenizer {name!r} is no fast WordPiece tokenizer with [CLS]: take a BERT tokenizer")
    return AliBlipProcessor(image_processor, tokenizer, max_length=max_length or 35)


def check_vocabulary(
    source: str, processor: AliBlipProcessor, vocab_size: int, enc_token_id: int | None = None
) -> None:
    """Refuse a tokenizer whose ids are not those of the model's word embeddings.

    Raises:
        UsageError: another number of tokens, or another id of [ENC] than a configuration says.
    """
    tokens = len(processor.tokenizer)
    if tokens != vocab_size:
        raise UsageError(
            f"{source} has word embeddings for {vocab_size} tokens, the tokenizer has {tokens} ([DEC] and [ENC] "
            "included): name the tokenizer that it was trained with, --tokenizer_name"
        )
    if enc_token_id not in (None, processor.enc_token_id):
        raise UsageError(
            f"[ENC] is token {processor.enc_token_id} of the tokenizer, but enc_token_id in the config.json of "
            f"{source} is {enc_token_id} (without one: the last token): correct it, or name another --tokenizer_name"
        )


def load_pretrained(
    name: str,
    *,
    tokenizer_name: str | None = None,
    max_length: int | None = None,
    vision_config: dict[str, Any] | None = None,
    text_config: dict[str, Any] | None = None,
    attn_implementation: str | None = None,
) -> tuple[AliBlipForImageTextRetrieval, AliBlipProcessor, Original | None]:
    """A model in fp32 with its processor, from an AliBLIP or `blip` folder or Hub name, or from an original file.

    Args:
        name: the folder, Hub name or file.
        tokenizer_name: instead of the folder's tokenizer; for an original file the default is the tokenizer.json beside
            it, as `--to original` writes it, or else bert-base-uncased.
        max_length: longest title in tokens; None: as in the folder, or 35.
        vision_config, text_config: of an original file, see `original_config`.
        attn_implementation: as in transformers.

    Returns:
        Model, processor and, of an original file, all that stood in it.

    Raises:
        UsageError, ValueError, OSError: what can't be read or does not fit, by name.
    """
    if not is_original(name):
        if vision_config or text_config:
            raise UsageError("--vision_config and --text_config: the model brings its own, leave them out")
        try:
            model = AliBlipForImageTextRetrieval.from_pretrained(
                name, dtype=torch.float32, attn_implementation=attn_implementation
            )
        except OSError as error:  # whose first line need not name it
            raise OSError(f"can't load the model {name}: {first_line(error)}") from error
        if tokenizer_name is None:
            processor = AliBlipProcessor.from_pretrained(name)
        else:
            image_processor = BlipImageProcessorPil.from_pretrained(name)
            processor = build_processor(tokenizer_name, image_processor=image_processor)
        processor.max_length = max_length or processor.max_length
        check_vocabulary(name, processor, model.config.text_config.vocab_size, model.config.enc_token_id)
        return model, processor, None
    original = read_original(name)
    beside = Path(name).parent
    own = str(beside) if (beside / "tokenizer.json").is_file() else "bert-base-uncased"
    processor = build_processor(tokenizer_name or own, max_length)
    text_config = {"pad_token_id": processor.tokenizer.pad_token_id, **(text_config or {})}
    words = original.weights.get("text_encoder.embeddings.word_embeddings.weight")
    if words is not None:  # else `original_config` tells it
        check_vocabulary(name, processor, words.shape[0])
    config = original_config(original, vision_config or {}, text_config, processor.enc_token_id)
    model = model_of_original(original, config)
    if attn_implementation is not None:
        model.set_attn_implementation(attn_implementation)
    size = config.vision_config.image_size
    processor.image_processor.size = {"height": size, "width": size}
    return model, processor, original


# --- the command ------------------------------------------------------------------------------------------------------


def check_arguments(args: ConvertArguments) -> None:
    for name in ("model_name_or_path", "output_dir"):
        if getattr(args, name) is None:
            raise UsageError(f"--{name} is missing; see --help")
    check_range(image_size=(args.image_size, 1, None), max_length=(args.max_length, 3, None))
    output_dir = Path(args.output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UsageError(f"{output_dir} exists: give a new folder as --output_dir")
    if args.to == "original" and is_original(args.model_name_or_path):
        raise UsageError(f"{args.model_name_or_path} is an original file already: give another --to")
    if args.momentum != "none" and (args.to != "aliblip" or not is_original(args.model_name_or_path)):
        raise UsageError("--momentum is for the way from an original file to an AliBLIP folder: leave it out")


def convert(args: ConvertArguments) -> list[str]:
    """Do what the arguments ask for. Returns lines that tell what was taken, dropped and lost.

    Raises:
        UsageError, ValueError, OSError: nothing is written then.
    """
    check_arguments(args)
    model, processor, original = load_pretrained(
        args.model_name_or_path,
        tokenizer_name=args.tokenizer_name,
        max_length=args.max_length,
        vision_config=json_mapping("vision_config", args.vision_config),
        text_config=json_mapping("text_config", args.text_config),
    )
    image_size = args.image_size or model.config.vision_config.image_size
    momentum = None
    if args.momentum != "none":
        momentum = momentum_of_original(original, model, image_size, with_queues=args.momentum == "all")
    before = model.config.vision_config.image_size
    model.resize_image(image_size)
    processor.image_processor.size = {"height": image_size, "width": image_size}
    output_dir = Path(args.output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    told = [describe(model)]
    if before != image_size:
        told.append(f"position embedding interpolated from {before} to {image_size} px")
    if original is not None:
        told += [f"dropped: {kind} ({count} tensors)" for kind, count in original.dropped.items()]
        if original.momentum and args.momentum == "none":
            told.append("not carried over: momentum encoders (see --momentum)")
        if original.queues and args.momentum != "all":
            told.append("not carried over: queues (see --momentum)")
    with NewFolder(output_dir) as beside:
        if args.to == "aliblip":
            problem = save_model(model, processor, beside)
            if problem is not None:
                raise OSError(problem)
            if momentum is not None:
                write_tensors(beside / MOMENTUM_FILE, momentum)
                told.append(f"{MOMENTUM_FILE}: momentum encoders{_queues_told(momentum)}")
        elif args.to == "transformers":
            theirs, their_processor = to_transformers(model, processor)
            theirs.save_pretrained(beside)
            their_processor.save_pretrained(beside)
            told.append(f"lost: the temperature, {model.temp.item():.4f} (transformers' BLIP has none)")
            told.append(
                f"for the same ITM logits set input_ids[:, 0] = {model.config.enc_token_id} ([ENC]) yourself, for ITC "
                "leave them as they are"
            )
        else:
            carried = read_momentum(args.model_name_or_path)
            if carried is not None:
                check_momentum(carried, model)
            torch.save(to_original(model, carried), beside / ORIGINAL_FILE)
            _plain(processor.tokenizer).save_pretrained(beside)
            source = f"of {MOMENTUM_FILE}" if carried else "copies of the encoders"
            told.append(f"{ORIGINAL_FILE} with momentum encoders ({source})")
            told += _not_in_original(model.config)
    return [*told, f"written: {output_dir}"]


def _not_in_original(config: AliBlipConfig) -> list[str]:
    """What the original code takes for granted, and this model does otherwise: its numbers are not the same there; and
    the flags without which such a file would come back as another model, since no tensor tells them."""
    told, flags = [], []
    towers = (("vision", "ViT", config.vision_config, 1e-6), ("text", "BERT", config.text_config, 1e-12))
    for tower, name, part, epsilon in towers:
        untold = {}
        if part.layer_norm_eps != epsilon:
            untold["layer_norm_eps"] = part.layer_norm_eps
            told.append(f"differs there: the {name}'s LayerNorm epsilon is {epsilon}, here {part.layer_norm_eps}")
        if part.num_attention_heads * 64 != part.hidden_size:
            untold["num_attention_heads"] = part.num_attention_heads
            told.append(f"differs there: the {name}'s heads are 64 wide, here there are {part.num_attention_heads}")
        if untold:
            flags.append(f"--{tower}_config '{json.dumps(untold)}'")
    return [*told, f"whoever reads it here has to add {' '.join(flags)}"] if flags else []


def _queues_told(momentum: dict[str, Tensor]) -> str:
    if "queue_ids" not in momentum:
        return ""
    slots, filled = len(momentum["queue_ids"]), int(momentum["queue_filled"].sum())
    return f" and {slots} queue slots, {filled} of them filled: train with --queue_size {slots}"


def describe(model: AliBlipForImageTextRetrieval) -> str:
    """One line: parameters, towers, temperature."""
    vision, text = model.config.vision_config, model.config.text_config
    return (
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters: ViT {vision.num_hidden_layers} x "
        f"{vision.hidden_size} ({vision.num_attention_heads} heads), {vision.image_size} px in patches of "
        f"{vision.patch_size}; BERT {text.num_hidden_layers} x {text.hidden_size} ({text.num_attention_heads} heads), "
        f"{text.vocab_size} tokens; temperature {model.temp.item():.4f}"
    )


def main() -> int:
    (args,) = parse([ConvertArguments], description=__doc__)
    try:
        print("\n".join(convert(args)))
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(first_line(error)) from error
    return 0


__all__ = [
    "NAMES",
    "Original",
    "build_processor",
    "check_vocabulary",
    "check_weights",
    "convert",
    "describe",
    "is_original",
    "load_pretrained",
    "model_of_original",
    "momentum_of_original",
    "original_config",
    "original_name",
    "our_name",
    "read_original",
    "split_original",
    "to_original",
    "to_transformers",
]

if __name__ == "__main__":
    main_with_usage_errors("aliblip.convert", main)
