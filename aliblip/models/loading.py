"""A model and its processor, from any folder, file or Hub name that holds one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, BertTokenizer, BlipImageProcessorPil

from aliblip.models.adapters import merged
from aliblip.models.original import Original, is_original, model_of_original, original_config, read_original
from aliblip.runtime.mistakes import UsageError, usage_errors
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

__all__ = [
    "DEFAULT_MAX_LENGTH",
    "DEFAULT_TOKENIZER",
    "LOADING_ERRORS",
    "build_processor",
    "check_template",
    "check_vocabulary",
    "load_pretrained",
]

DEFAULT_TOKENIZER, DEFAULT_MAX_LENGTH = "bert-base-uncased", 35
# What transformers raises where a folder or Hub name does not hold what it should, and for damaged files of it; and our
# Hub files, for a configuration that no model can be built from and for weights that do not fit.
LOADING_ERRORS = (OSError, ValueError, ImportError, SafetensorError)


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


def check_template(source: str, processor: AliBlipProcessor) -> None:
    """Refuse a tokenizer that does not put [CLS] before a title and [SEP] behind it.

    Raises:
        UsageError: the model makes [ENC] of the first token, and would lose a word.
    """
    tokenizer = processor.tokenizer
    ids = tokenizer("a")["input_ids"]
    if len(ids) < 2 or (ids[0], ids[-1]) != (tokenizer.cls_token_id, tokenizer.sep_token_id):
        shown = " ".join(tokenizer.convert_ids_to_tokens(ids))
        raise UsageError(
            f"the tokenizer of {source} writes 'a' as {shown!r}, without [CLS] before and [SEP] behind it: take a BERT "
            "tokenizer, or add this template to the post_processor of its tokenizer.json"
        )


def build_processor(
    tokenizer_name: str, max_length: int | None = None, image_processor: BlipImageProcessorPil | None = None
) -> AliBlipProcessor:
    """A new processor around a tokenizer: a folder, a `vocab.txt` or a Hub name.

    Raises:
        UsageError: there is none, or it is not a fast WordPiece tokenizer.
    """
    name = tokenizer_name
    told = f"no tokenizer at {name!r} ({{}}): --tokenizer_name takes a folder, a vocab.txt or a Hub name"
    with usage_errors(*LOADING_ERRORS, told=told):
        if os.path.isfile(name):
            tokenizer = BertTokenizer(vocab=name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    if not tokenizer.is_fast or getattr(tokenizer, "cls_token_id", None) is None:
        raise UsageError(f"the tokenizer {name!r} is not a fast WordPiece tokenizer with [CLS]: take a BERT tokenizer")
    processor = AliBlipProcessor(image_processor, tokenizer, max_length=max_length or DEFAULT_MAX_LENGTH)
    check_template(name, processor)
    return processor


def load_pretrained(
    name: str,
    *,
    tokenizer_name: str | None = None,
    max_length: int | None = None,
    vision_config: dict[str, Any] | None = None,
    text_config: dict[str, Any] | None = None,
    attn_implementation: str | None = None,
) -> tuple[AliBlipForImageTextRetrieval, AliBlipProcessor, Original | None]:
    """A model in fp32 with its processor, from an AliBLIP or `blip` folder or Hub name, or from an original file. An
    adapter is merged into the model that it names.

    Args:
        name: the folder, Hub name or file.
        tokenizer_name: instead of the folder's tokenizer; for an original file the default is the tokenizer.json beside
            it, as `--to original` writes it, or else bert-base-uncased.
        max_length: longest title in tokens; None: as in the folder, or 35.
        vision_config, text_config: of an original file, see `original_config`.
        attn_implementation: as in transformers.

    Returns:
        Model, processor and, of an original file, all that it holds.

    Raises:
        UsageError: what can't be read or does not fit, by name.
    """
    if is_original(name):
        return _load_original(name, tokenizer_name, max_length, vision_config, text_config, attn_implementation)
    if vision_config or text_config:
        raise UsageError("--vision_config and --text_config: the model brings its own, leave them out")
    if _is_a_path(name) and not os.path.exists(name):  # for transformers it would be a wrong name on the Hub
        raise UsageError(f"there is no folder {name}: give the folder of a model, its name on the Hub, or a .pth file")
    with usage_errors(*LOADING_ERRORS, told=f"can't load the model {name}: {{}}"):
        model = AliBlipForImageTextRetrieval.from_pretrained(
            name, dtype=torch.float32, attn_implementation=attn_implementation
        )
    model = merged(model)
    with usage_errors(*LOADING_ERRORS, told=f"can't load the processor of {name}: {{}}"):
        if tokenizer_name is None:
            processor = AliBlipProcessor.from_pretrained(name)
        else:
            image_processor = BlipImageProcessorPil.from_pretrained(name)
            processor = build_processor(tokenizer_name, image_processor=image_processor)
    processor.max_length = max_length or processor.max_length
    check_vocabulary(name, processor, model.config.text_config.vocab_size, model.config.enc_token_id)
    check_template(name, processor)
    return model, processor, None


def _is_a_path(name: str) -> bool:
    """Whether a name can't be one of the Hub, which is `name` or `owner/name`."""
    return os.path.isabs(name) or name.count("/") > 1 or name.startswith((".", "~"))


def _load_original(
    path: str,
    tokenizer_name: str | None,
    max_length: int | None,
    vision_config: dict[str, Any] | None,
    text_config: dict[str, Any] | None,
    attn_implementation: str | None,
) -> tuple[AliBlipForImageTextRetrieval, AliBlipProcessor, Original]:
    original = read_original(path)
    beside = Path(path).parent
    own = str(beside) if (beside / "tokenizer.json").is_file() else DEFAULT_TOKENIZER
    processor = build_processor(tokenizer_name or own, max_length)
    text_config = {"pad_token_id": processor.tokenizer.pad_token_id, **(text_config or {})}
    words = original.weights.get("text_encoder.embeddings.word_embeddings.weight")
    if words is not None:  # else `original_config` tells it
        check_vocabulary(path, processor, words.shape[0])
    config = original_config(original, vision_config or {}, text_config, processor.enc_token_id)
    model = model_of_original(original, config)
    if attn_implementation is not None:
        with usage_errors(ValueError, ImportError, told="--attn_implementation: {}"):
            model.set_attn_implementation(attn_implementation)
    size = config.vision_config.image_size
    processor.image_processor.size = {"height": size, "width": size}
    return model, processor, original
