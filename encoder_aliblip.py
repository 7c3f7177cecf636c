"""The model and its processor as galleries and pipeline use them, from many threads; and what tells it from another.

    encoder = Encoder(model, processor)
    vectors, tokens = encoder.embed_pixels(pixel_values)
    gallery.check_model(encoder.fingerprint)

Legend: N items, E embedding, P image tokens, D width, L text tokens, H side of the photos.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file

try:
    from .modeling_aliblip import is_finite, weights_not_finite
    from .reading_aliblip import clean_title, decoded_photo
    from .retrieval_aliblip import embed_images, embed_texts
except ImportError:
    if __package__:  # inside a package (the Hub cache) a failure is real
        raise
    from modeling_aliblip import is_finite, weights_not_finite
    from reading_aliblip import clean_title, decoded_photo
    from retrieval_aliblip import embed_images, embed_texts

try:
    from accelerate.utils.modeling import get_state_dict_offloaded_model
except ImportError:  # no model can be offloaded then
    get_state_dict_offloaded_model = None

# Image tokens are rounded to it wherever they come from, so that a logit does not depend on whether they were stored.
TOKEN_TYPE = torch.bfloat16


class Encoder:
    """A model and its processor, usable from many threads.

    Args:
        model: in evaluation mode.
        processor: an `AliBlipProcessor`.
        dtype: type of the autocast of the passes; None: the type of the weights.

    Raises:
        ValueError: the model is in training mode.
    """

    def __init__(self, model, processor, dtype: torch.dtype | None = None):
        if model.training:
            raise ValueError("the model is in training mode, where dropout changes what it sees: call model.eval()")
        self.model, self.processor, self.dtype = model, processor, dtype
        # A fast tokenizer keeps padding and truncation as state, and refuses two threads at once.
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    @cached_property
    def fingerprint(self) -> str:
        """`fingerprint` of both, computed at the first use: the weights are expected to stay as they are."""
        with self._lock:
            return fingerprint(self.model, self.processor)

    def pixels(self, photo: Any) -> Tensor:
        """Whatever `read_photo` takes to (3, H, H)."""
        with decoded_photo(photo) as image:
            return self.processor(images=[image], return_tensors="pt")["pixel_values"][0]

    def tokenize(self, titles: Sequence[str]) -> tuple[Tensor, Tensor]:
        """`input_ids` and `attention_mask` (N, L)."""
        with self._lock:
            batch = self.processor(text=[clean_title(title) for title in titles], return_tensors="pt")
        return batch["input_ids"], batch["attention_mask"]

    @torch.no_grad()
    def embed_pixels(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, H) to unit vectors (N, E) fp32 and image tokens (N, P, D) bf16, both on the CPU."""
        vectors, tokens = embed_images(self.model, pixel_values, self.dtype)
        return finite(vectors.cpu(), "vectors of photos", self.model), tokens.to(TOKEN_TYPE).cpu()

    @torch.no_grad()
    def embed_titles(self, titles: Sequence[str]) -> Tensor:
        """Unit vectors (N, E) fp32 on the CPU."""
        vectors = embed_texts(self.model, *self.tokenize(titles), self.dtype)
        return finite(vectors.cpu(), "vectors of titles", self.model)


# Its tokens change with lower-casing, accents, scripts and the treatment of marks.
_PROBE_TITLE = "Caf\u00e9 T-Shirt 2x, \u7ea2\u8272 \u043a\u0440\u0443\u0436\u043a\u0430 XXL"


def fingerprint(model, processor) -> str:
    """32 hexadecimal digits that change with the model's weights, with the pixels and token ids that its processor
    makes, and with the settings that its results depend on.

    Equal in every process and on every device, compiled by `torch.compile` or not. Types are not part of it: weights
    are rounded to bf16 first, so that a gallery of a model can be searched by its bf16 copy and the other way round. A
    copy that is rounded differently, in fp16 or quantised to 8 bits, is told by the files that it was loaded from, if
    its weights are a rounding of those; without them it counts as another model. Nor is the longest title: longer
    queries do not change what a photo is. Takes a second or two for 200 million weights.
    """
    digest = hashlib.blake2b(digest_size=16)
    model = getattr(model, "_orig_mod", model)  # as torch.compile calls it
    config = model.config
    settings = {
        "enc_token_id": getattr(config, "enc_token_id", None),
        **{
            f"{tower}.{name}": getattr(getattr(config, tower, None), name, None)
            for tower, names in (
                ("vision_config", ("image_size", "patch_size", "num_attention_heads", "hidden_act", "layer_norm_eps")),
                ("text_config", ("num_attention_heads", "hidden_act", "layer_norm_eps")),
            )
            for name in names
        },
        "pixels": {
            name: value
            for name, value in processor.image_processor.to_dict().items()
            if name in ("size", "resample", "rescale_factor", "image_mean", "image_std") or name.startswith("do_")
        },
        "vocabulary": processor.tokenizer.get_vocab(),
        "probe": processor.tokenizer(_PROBE_TITLE)["input_ids"],
    }
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    weights = _weights(model)
    if not all(map(_rounds_to_bf16, weights.values())):
        weights = weights | (_loaded_from(model, weights) or {})
    for name, value in sorted(weights.items()):
        value = _plain(value)
        digest.update(f"{name} {tuple(value.shape)} ".encode())
        value = value.detach().to(torch.bfloat16) if value.is_floating_point() else value.detach()
        digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _weights(model) -> dict[str, Tensor]:
    """The state dict, also of a model whose weights `device_map` has put on disk or whose parts are compiled."""
    state = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    if not any(value.is_meta for value in state.values()):
        return state
    if get_state_dict_offloaded_model is None:
        raise ImportError("weights that lie on disk are read with accelerate: pip install accelerate")
    return state | get_state_dict_offloaded_model(model)  # which leaves out what belongs to no submodule


def _rounds_to_bf16(value: Tensor) -> bool:
    """Whether rounding to bf16 gives what the full-precision weight gives."""
    return type(value) is Tensor and (not value.is_floating_point() or value.dtype in (torch.float32, torch.bfloat16))


def _plain(value: Tensor) -> Tensor:
    """A weight as numbers: quantised ones are tensors of classes of their own."""
    return value if type(value) is Tensor else value.dequantize()


def _loaded_from(model, weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The full-precision weights of the files that a model was loaded from; None: there are none, or the model's are
    not a rounding of them."""
    found = {}
    for path in _files_of(model):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys() if name in weights}  # noqa: SIM118
    is_all = found and all(name in found or _rounds_to_bf16(value) for name, value in weights.items())
    if not is_all or not all(_is_rounding(weights[name], full) for name, full in found.items()):
        return None
    return found


def _files_of(model) -> Iterator[str | Path]:
    name = getattr(model, "name_or_path", "")
    if os.path.isdir(name):
        yield from sorted(Path(name).glob("model*.safetensors"))
    elif name:
        commit = getattr(model.config, "_commit_hash", None)
        try:
            yield cached_file(name, "model.safetensors", revision=commit, local_files_only=True)
        except OSError:  # not in the cache, in several files, or no name on the Hub
            return


def _is_rounding(value: Tensor, full: Tensor) -> bool:
    if value.shape != full.shape or not full.is_floating_point():
        return False
    if type(value) is Tensor:
        return torch.equal(value.detach().cpu(), full.to(value.dtype))
    # Eight bits have 127 steps up to the largest weight of a row.
    step = full.float().abs().reshape(len(full), -1).amax(dim=1) / 127
    error = (value.dequantize().detach().cpu().float() - full.float()).abs().reshape(len(full), -1).amax(dim=1)
    return bool((error <= step).all())


def finite(values: Tensor, name: str, model) -> Tensor:
    """The values, which nothing could be ordered by if they were not finite.

    Raises:
        ValueError: they are not; the message names the model's weights that are not either.
    """
    if not is_finite(values):
        raise ValueError(f"the {name} are not all finite: {cause_of(model)}")
    return values


def cause_of(model) -> str:
    """Why what a model gives is not finite, in words."""
    if broken := weights_not_finite(model):
        return f"these weights of the model are not: {broken}"
    return "its weights are, so its precision is not enough; use fp32 or bf16"


__all__ = ["TOKEN_TYPE", "Encoder", "cause_of", "finite", "fingerprint", "is_finite"]
