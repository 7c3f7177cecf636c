"""A model and its processor, from any folder, file or Hub name that holds one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aliblip.models.original import Original, is_original, model_of_original, original_config, read_original
from aliblip.retrieval.model_folder import (
    DEFAULT_MAX_LENGTH,
    LOADING_ERRORS,
    check_tokenizer,
    check_vocabulary,
    load_folder,
    load_tokenizer,
)
from aliblip.runtime.mistakes import UsageError, usage_errors
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

__all__ = ["DEFAULT_TOKENIZER", "build_processor", "load_pretrained"]

DEFAULT_TOKENIZER = "bert-base-uncased"


def build_processor(tokenizer_name: str, max_length: int | None = None) -> AliBlipProcessor:
    """A new processor around a tokenizer: a folder, a `vocab.txt` or a Hub name.

    Raises:
        UsageError: there is none, or it is none that the model can read (`check_tokenizer`).
    """
    name = tokenizer_name
    told = f"no tokenizer at {name!r} ({{}}): --tokenizer_name takes a folder, a vocab.txt or a Hub name"
    with usage_errors(*LOADING_ERRORS, told=told):
        tokenizer = load_tokenizer(name)
        tokenizer.tokenize("red cup")  # of a vocabulary without [UNK] tokenizers tells when it is used
    processor = AliBlipProcessor(tokenizer=tokenizer, max_length=max_length or DEFAULT_MAX_LENGTH)
    check_tokenizer(name, processor)
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
    tokenizer = None if tokenizer_name is None else build_processor(tokenizer_name).tokenizer
    model, processor = load_folder(name, attn_implementation=attn_implementation, with_tokenizer=tokenizer)
    processor.max_length = max_length or processor.max_length
    return model, processor, None


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
