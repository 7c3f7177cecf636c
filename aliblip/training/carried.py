"""Momentum encoders and queues that came with a model: `momentum.safetensors` beside its weights.

`aliblip.convert --momentum` writes the file from a checkpoint of the original code, under the names of our checkpoints,
and `train.py` goes on from it. The queue is turned so that its oldest slot is the first: no pointer has to be kept.
"""

from __future__ import annotations

import copy
import os

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from aliblip.models.original import ENCODER_NAMES, NOT_FILLED, Original, check_weights, original_name
from aliblip.retrieval.model_folder import CHECKPOINT_STATE
from aliblip.runtime.mistakes import UsageError, usage_errors
from aliblip.training.momentum import QUEUE_PHOTOS, QUEUES, UNUSED, MomentumState
from modeling_aliblip import AliBlipForImageTextRetrieval

# Beside the weights of a model that was converted with its training state.
MOMENTUM_FILE = "momentum.safetensors"


def read_momentum(model_name_or_path: str | os.PathLike) -> dict[str, Tensor] | None:
    """The tensors of the `momentum.safetensors` in a local model folder; None where there is none. That of a checkpoint
    belongs to its run, which goes on with all of it: a new run from its weights begins with their own encoders.

    Raises:
        UsageError: a file that is not what its name says.
    """
    file = os.path.join(model_name_or_path, MOMENTUM_FILE)
    if not os.path.isfile(file) or os.path.isfile(os.path.join(model_name_or_path, CHECKPOINT_STATE)):
        return None
    with usage_errors(SafetensorError, told=f"{file} is no safetensors file ({{}})"):
        return load_file(file)


def check_momentum(tensors: dict[str, Tensor], model: nn.Module, queue_size: int | None = None) -> None:
    """Refuse momentum encoders and queues that do not belong to a model.

    Args:
        tensors: of `read_momentum`.
        model: the model, as it is to be trained.
        queue_size: slots that the queues are to have; None: any.

    Raises:
        UsageError: names what is missing, too many or of another shape, or says both lengths of the queues.
    """
    carried = tensors["image_queue"].shape[0] if "image_queue" in tensors else None
    if None not in (carried, queue_size) and carried != queue_size:
        raise UsageError(
            f"{MOMENTUM_FILE} beside the model has queues of {carried} slots, --queue_size is {queue_size}: give "
            f"--queue_size {carried}, or remove that file to start with the model's own encoders and empty queues"
        )
    weights = {name: value for name, value in model.state_dict().items() if not any(part in name for part in UNUSED)}
    shapes = {f"encoders.{name}": tuple(value.shape) for name, value in weights.items()}
    if any(name in tensors for name in QUEUES):
        features = (carried, model.config.image_text_hidden_size)
        shapes |= {name: features if name in QUEUES[:2] else (carried,) for name in QUEUES}
    wrong = [f"{name} is missing" for name in shapes if name not in tensors]
    wrong += [f"{name} is unexpected" for name in tensors if name not in shapes]
    wrong += [
        f"{name} is {tuple(tensors[name].shape)} for {shape}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    if wrong:
        raise UsageError(
            f"{MOMENTUM_FILE} beside the model is of another model or photo size ({'; '.join(wrong)}): convert again, "
            "or remove that file to start with the model's own encoders"
        )


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
    expected = {k: v for k, v in encoders.state_dict().items() if ENCODER_NAMES.match(original_name(k))}
    check_weights(
        f"the momentum encoders of {original.path}",
        original.momentum,
        expected,
        lambda name: ENCODER_NAMES.sub(r"\1_m.", original_name(name)),
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
        state.queue_filled.copy_(ids[columns] != NOT_FILLED)
    tensors = {k: v for k, v in state.state_dict().items() if torch.is_tensor(v) and k != QUEUE_PHOTOS}
    return {name: value for name, value in tensors.items() if with_queues or name.startswith("encoders.")}
