"""A model, its processor or a tokenizer, from a folder or the Hub: no code of it is run.

    model, processor = load_folder("my_model")
    tokenizer = load_tokenizer("bert-base-uncased")

transformers runs the code that a folder names (`auto_map`) once somebody has said yes, and reads the settings of other
models on the way. Here nobody is asked, and everything is loaded by the classes of this package.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from PIL import Image
from torch import nn
from transformers import AutoTokenizer, BertTokenizer, BlipImageProcessorPil, PreTrainedTokenizerFast
from transformers.utils import cached_file

from aliblip.retrieval.adapters import ADAPTER, merged
from aliblip.retrieval.calibration import forget_fit
from aliblip.runtime.files import MOST_JSON_BYTES, checksum_of, read_json
from aliblip.runtime.mistakes import UsageError, usage_errors
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

__all__ = [
    "CHECKPOINT_STATE",
    "DEFAULT_MAX_LENGTH",
    "LOADING_ERRORS",
    "check_settings",
    "check_size",
    "check_tokenizer",
    "check_vocabulary",
    "load_folder",
    "load_image_processor",
    "load_tokenizer",
    "read_settings",
]

DEFAULT_MAX_LENGTH = 35
# What transformers, tokenizers, safetensors and torch raise where the files of a folder or Hub name are not there,
# damaged or made up: anything at all (a KeyError for an unknown activation, a bare Exception for half a tokenizer). So
# only the one call that reads them may stand inside.
LOADING_ERRORS = (Exception,)

# A model for retrieval has none; one of ImageNet that begins as a tower has up to 21,843.
MOST_LABELS = 100_000
# In a checkpoint of a run, which is a model too: the checksums of its files, and where the run goes on.
CHECKPOINT_STATE = "state.json"
_SETTINGS = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
# Others that transformers reads.
_OTHER_SETTINGS = (
    *("tokenizer.json", "vocab.txt", "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *("model.safetensors.index.json", "chat_template.jinja", ADAPTER),
)
# Classes that ours stand for: what a folder says of them is never looked at.
_OURS = ("AutoConfig", "AutoModel", "AutoProcessor")
# Of several scripts, with capitals and signs; and one that is cut.
_PROBES = ("red cup", "Café T-Shirt 2x, 红色 кружка XXL", "a " * 600)
# Four bits are the least that a parameter is stored in. What differs by less is told by the names of the weights.
_MOST_PER_BYTE, _SLACK = 4, 2**20


def load_folder(
    name: str,
    *,
    dtype: torch.dtype | str = torch.float32,
    attn_implementation: str | None = None,
    with_tokenizer: PreTrainedTokenizerFast | None = None,
) -> tuple[AliBlipForImageTextRetrieval, AliBlipProcessor]:
    """A model and its processor, from an AliBLIP or `blip` folder or Hub name. An adapter is merged into the model that
    it names.

    Args:
        name: the folder or Hub name.
        dtype: of the weights; "auto": as they are stored.
        attn_implementation: as in transformers.
        with_tokenizer: instead of the folder's own.

    Raises:
        UsageError: what can't be read, brings code of its own or does not fit, by name.
    """
    if _is_a_path(name) and not os.path.exists(name):  # for transformers it would be a wrong name on the Hub
        raise UsageError(f"there is no folder {name}: give the folder of a model, its name on the Hub, or a .pth file")
    check_settings(name)
    whole = read_settings(name, ADAPTER).get("base_model_name_or_path", name)  # of an adapter the model that it names
    if not isinstance(whole, str) or not whole:
        raise UsageError(f"{ADAPTER} of {name} names no model: it is damaged, bring it back")
    if whole != name:
        check_settings(whole)
    with usage_errors(*LOADING_ERRORS, told=f"can't load the model {whole}: {{}}"):
        config = AliBlipConfig.from_pretrained(whole, trust_remote_code=False)
        check_size(whole, partial(AliBlipForImageTextRetrieval, config))
    with usage_errors(*LOADING_ERRORS, told=f"can't load the model {name}: {{}}"):
        model = AliBlipForImageTextRetrieval.from_pretrained(
            name, dtype=dtype, attn_implementation=attn_implementation, trust_remote_code=False
        )
    model = merged(model)
    if whole != name:
        forget_fit(model.config)
    processor = _load_processor(name, with_tokenizer, model.config.vision_config.image_size)
    longest = model.config.text_config.max_position_embeddings
    if processor.max_length > longest:
        raise UsageError(f"max_length of {name} is {processor.max_length}: its model takes at most {longest} tokens")
    check_vocabulary(name, processor, model.config.text_config.vocab_size, model.config.enc_token_id)
    check_tokenizer(name, processor)
    return model, processor


def _load_processor(name: str, tokenizer: PreTrainedTokenizerFast | None, side: int) -> AliBlipProcessor:
    """The processor of a folder for photos of `side` pixels, tried on one."""
    with usage_errors(*LOADING_ERRORS, told=f"can't load the processor of {name}: {{}}"), np.errstate(all="ignore"):
        tokenizer = tokenizer or AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        max_length = read_settings(name, "processor_config.json").get("max_length", DEFAULT_MAX_LENGTH)
        processor = AliBlipProcessor(load_image_processor(name), tokenizer, max_length=max_length)
        # Whatever it says: the model takes no other size, and neither cropping nor borders can lead to it.
        processor.image_processor.size = {"height": side, "width": side}
        processor.image_processor.do_center_crop = processor.image_processor.do_pad = False
        pixels = processor(images=[Image.new("RGB", (9, 9), "white")], return_tensors="pt")["pixel_values"]
    if pixels.shape != (1, 3, side, side) or not pixels.isfinite().all():
        shape = f"{tuple(pixels.shape)} of a photo, not (1, 3, {side}, {side})"
        made = shape if pixels.isfinite().all() else "values of a photo that are not finite"
        raise UsageError(f"the processor of {name} makes {made}: correct the settings of its photos")
    return processor


def load_image_processor(name: str) -> BlipImageProcessorPil:
    """The image processor of a folder or Hub name, by its settings and never by its class. Raises what transformers
    does."""
    return BlipImageProcessorPil.from_pretrained(name, trust_remote_code=False)


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer: a folder, a `vocab.txt` or a Hub name.

    Args:
        options: of `from_pretrained`.

    Raises:
        UsageError: it brings code of its own.
        Exception: there is none, or it can't be read (`LOADING_ERRORS`).
    """
    if os.path.isfile(name):
        return BertTokenizer(vocab=name)
    check_settings(name)
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)


def check_size(name: str, build: Callable[[], nn.Module]) -> None:
    """Refuse a configuration of a model so large that these weights can't be its own, before it takes the memory.

    Args:
        name: the folder or Hub name of the weights.
        build: makes the model of the configuration.

    Raises:
        UsageError: with both sizes.
    """
    size = _bytes_of_weights(name)
    if size is None:
        return
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build().parameters())
    if parameters > _MOST_PER_BYTE * size + _SLACK:
        raise UsageError(
            f"config.json of {name} describes a model of {parameters:,} parameters, its weights have {size:,} bytes: "
            "they do not belong together, or one of them is damaged"
        )


def _bytes_of_weights(name: str) -> int | None:
    """Of the files of weights of a folder or Hub name; None: there are none that are known."""
    if os.path.isdir(name):
        files = [*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")]
    else:
        shards = read_settings(name, "model.safetensors.index.json").get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else {"model.safetensors"}
        try:
            files = [Path(cached_file(name, file)) for file in names]
        except OSError:  # told when the model is loaded
            return None
    return sum(file.stat().st_size for file in files) or None


# --- settings ---------------------------------------------------------------------------------------------------------


def check_settings(name: str) -> None:
    """Refuse a folder or Hub name whose settings name code that loading it would run, or labels without end, of which
    transformers makes a list; and a checkpoint in which a file is another one than was written.

    Raises:
        UsageError: with the file and what it names.
    """
    if os.path.isdir(name):
        _check_files(name)
        _check_checksums(name)
    for file in _SETTINGS:
        if not os.path.isdir(name) and not constants.HF_HUB_OFFLINE:
            try:
                hf_hub_download(name, file)
            except (LocalEntryNotFoundError, HFValidationError):  # not reached, or no name: told when it is loaded
                return
            except (OSError, HfHubHTTPError):
                pass
        for key, value in _entries(read_settings(name, file)):
            named = None
            if key == "auto_map":
                classes = value if isinstance(value, dict) else {"AutoTokenizer": value}  # as older files have it
                named = ", ".join(sorted(kind for kind in classes if not kind.startswith(_OURS)))
            elif key == "audio_tokenizer":
                named = "audio_tokenizer"
            elif key == "attn_implementation" and "/" in str(value):
                named = f"attn_implementation {value}"
            elif key == "num_labels" and isinstance(value, (int, float)) and value > MOST_LABELS:
                raise UsageError(f"{file} of {name} names {value:,} labels: it is damaged, bring it back")
            if named:
                raise UsageError(
                    f"{name} asks for code that does not belong to AliBLIP ({file}: {named}), and no command runs it: "
                    "take one without, such as a BERT tokenizer or a model that AliBLIP has saved"
                )


def _check_files(folder: str) -> None:
    """Refuse a folder in which a file of settings is none, or so large that reading it would take the memory."""
    for file in (*_SETTINGS, *_OTHER_SETTINGS):
        path = os.path.join(folder, file)
        if not os.path.exists(path):
            continue
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{file} of {folder} is a folder, a pipe or a device: bring the file back")
        if status.st_size > MOST_JSON_BYTES:
            raise UsageError(f"{file} of {folder} has {status.st_size:,} bytes: it is damaged, bring it back")


def _check_checksums(folder: str) -> None:
    checksums = read_settings(folder, CHECKPOINT_STATE).get("checksums")
    if not isinstance(checksums, dict):  # no checkpoint, or one of version 0.1
        return
    for file in (*_SETTINGS, *_OTHER_SETTINGS, "model.safetensors"):
        path = Path(folder, file)
        if file in checksums and not (path.is_file() and checksum_of(path) == checksums[file]):
            raise UsageError(f"{folder} is damaged (the checksum of {file} is another): take another checkpoint")


def read_settings(name: str, file: str) -> dict[str, Any]:
    """A JSON file of a folder or Hub name; empty if there is none.

    Raises:
        UsageError: it is damaged: very large, nested very deeply, or not a JSON object.
    """
    try:
        path = Path(name, file) if os.path.isdir(name) else Path(cached_file(name, file))
        return read_json(path)
    except OSError:  # not there; what can't be reached at all is told when the model is loaded
        return {}
    except ValueError as error:
        raise UsageError(f"{file} of {name} can't be read ({error}): it is damaged, bring it back") from None


def _entries(settings: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """All keys and values of nested settings."""
    waiting: list[Any] = [settings]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _is_a_path(name: str) -> bool:
    """Whether a name can't be one of the Hub, which is `name` or `owner/name`."""
    return os.path.isabs(name) or name.count("/") > 1 or name.startswith((".", "~"))


# --- tokenizers -------------------------------------------------------------------------------------------------------


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


def check_tokenizer(source: str, processor: AliBlipProcessor) -> None:
    """Try a tokenizer on titles: what it makes of them, and whether it makes the same once it is saved and loaded.

    Raises:
        UsageError: it is not a fast one, has no padding, has ids beyond its number of tokens, does not put [CLS] before
            a title and [SEP] behind it (the model makes [ENC] of the first token, and would lose a word), or comes back
            as another.
    """
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast or tokenizer.cls_token_id is None or tokenizer.pad_token_id is None:
        raise UsageError(
            f"the tokenizer of {source} is not a fast one with tokens for [CLS] and [PAD]: take a BERT tokenizer"
        )
    if (highest := max(tokenizer.get_vocab().values())) >= len(tokenizer):
        raise UsageError(
            f"the tokenizer of {source} has {len(tokenizer):,} tokens, and {highest:,} is the id of one: ids must be "
            "counted from 0 without a gap, take a BERT tokenizer"
        )
    with usage_errors(*LOADING_ERRORS, told=f"the tokenizer of {source} can't write a title ({{}}): take another"):
        written = _written(processor)
    for ids, mask in written:
        title = ids[: sum(mask)]
        if len(title) < 2 or (title[0], title[-1]) != (tokenizer.cls_token_id, tokenizer.sep_token_id):
            shown = " ".join(tokenizer.convert_ids_to_tokens(title[:8]))
            raise UsageError(
                f"the tokenizer of {source} writes a title as {shown!r}, without [CLS] before and [SEP] behind it: "
                "take a BERT tokenizer, or add this template to the post_processor of its tokenizer.json"
            )
    with TemporaryDirectory() as folder:
        # Of a full disk tokenizers makes a bare Exception.
        told = f"the tokenizer of {source} can't be saved for a try in {folder} ({{}}): make room there, or set TMPDIR"
        with usage_errors(Exception, told=told):
            tokenizer.save_pretrained(folder)
        told = f"the tokenizer of {source} can't be loaded again once it is saved ({{}}): take a BERT tokenizer"
        with usage_errors(*LOADING_ERRORS, told=told):
            again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            again = AliBlipProcessor(tokenizer=again, max_length=processor.max_length)
    if (_written(again), again.enc_token_id) != (written, processor.enc_token_id):
        first, second = (one.tokenizer.tokenize(_PROBES[0], add_special_tokens=True) for one in (processor, again))
        raise UsageError(
            f"the tokenizer of {source} is another one after it is saved and loaded (it writes {_PROBES[0]!r} as "
            f"{' '.join(first)!r}, then as {' '.join(second)!r}): take a BERT tokenizer"
        )


def _written(processor: AliBlipProcessor) -> list[tuple[list[int], list[int]]]:
    """Ids and mask of some titles, each as long as the longest: padded, or cut."""
    batch = processor(text=list(_PROBES), padding="max_length")
    return list(zip(batch["input_ids"], batch["attention_mask"], strict=True))
