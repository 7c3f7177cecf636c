"""Momentum encoders and feature queues: the training state behind the soft targets and the extra negatives of ITC.

MoCo (https://arxiv.org/abs/1911.05722) for the queue, ALBEF (https://arxiv.org/abs/2107.07651) for the soft targets.

Legend: B rows of a batch on one rank, G rows of all ranks, Q queue slots, E width of the features.

This state is not part of the model and never goes through `accelerator.prepare`: DDP would broadcast the queues at
every
forward, and an engine that casts to bf16 would stop the average dead (a step of 0.005 of the distance is below the
spacing of bf16). It stays in fp32 on every rank, equal on all of them, since each rank applies the same updates.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aliblip.runtime.distributed import all_gather
from aliblip.training.profiling import MOMENTUM, record_function
from aliblip.training.step import weights_to_follow

QUEUES = ("image_queue", "text_queue", "queue_ids", "queue_filled")
# Photos of the slots; not in the files that come with a model, whose queues know products alone.
QUEUE_PHOTOS = "queue_photos"
# Titles of the slots, where the objective draws negatives from them.
QUEUE_TITLES = ("queue_titles", "queue_lengths")
UNUSED = ("crossattention", "itm_head")  # the features don't need them


@dataclass
class Targets:
    """What the momentum side gives to one forward of the objective. All fp32 without gradient."""

    image: Tensor  # (B, E) unit features of the batch's photos
    text: Tensor  # (B, E) unit features of the batch's titles
    image_queue: Tensor  # (Q, E)
    text_queue: Tensor  # (Q, E)
    queue_ids: Tensor  # (Q,) int64 products of the slots
    queue_photos: Tensor  # (Q,) int64 photos of the slots, 0: not known
    queue_filled: Tensor  # (Q,) bool, False: the slot holds a random unit vector, a negative for everybody
    queue_pointer: int = 0  # the slot that was to be written next
    titles: Tensor | None = None  # (B, L) int32 ids of the batch's titles, 0 behind their ends; of a queue with titles
    lengths: Tensor | None = None  # (B,) int32, their tokens
    queue_titles: Tensor | None = None  # (Q, L)
    queue_lengths: Tensor | None = None  # (Q,), 0: not known


class MomentumState(nn.Module):
    """An exponential moving average of a model's two encoders, and a queue of their features.

    Args:
        model: the model that is trained, unwrapped and with its initial weights: has `get_image_features(pixel_values)`
            and `get_text_features(input_ids, attention_mask)`. It is copied; cross-attention and the matching head,
            which the features don't need, are left out of the copy.
        queue_size: slots of each queue; any size from 1.
        embedding_size: width of the features.
        momentum: share of the average that stays at each update.
        warmup: let the average follow quickly at first: update n keeps at most (1 + n) / (10 + n).
        dropout: keep dropout and drop-path of the copy on, as the published code does; off gives steadier targets.
        autocast_dtype: type in which the encoders run under autocast; None: fp32. The average is fp32 in any case.
        seed: for the random unit vectors of the slots not yet filled; the same on all ranks.
        title_length: keep the titles of the slots too, each of so many tokens at most; 0: don't.

    Raises:
        ValueError: a queue without slots or a momentum outside [0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        queue_size: int,
        embedding_size: int,
        momentum: float = 0.995,
        warmup: bool = False,
        dropout: bool = False,
        autocast_dtype: torch.dtype | None = None,
        seed: int = 0,
        title_length: int = 0,
    ):
        super().__init__()
        if queue_size < 1:
            raise ValueError(f"a queue of {queue_size} slots: give at least 1")
        if not 0.0 <= momentum <= 1.0:
            raise ValueError(f"momentum {momentum}: give a number from 0 to 1 (0.995 is usual)")
        self.momentum = momentum
        self.warmup = warmup
        self.autocast_dtype = autocast_dtype
        self.encoders = copy.deepcopy(model).float().requires_grad_(False).train(dropout)
        for module in self.encoders.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = False  # there is no backward pass to recompute for
            for unused in UNUSED:
                if hasattr(module, unused):
                    setattr(module, unused, None)
        generator = torch.Generator().manual_seed(seed)
        for name in ("image_queue", "text_queue"):
            queue = F.normalize(torch.randn(queue_size, embedding_size, generator=generator), dim=1)
            self.register_buffer(name, queue)
        self.register_buffer("queue_ids", torch.zeros(queue_size, dtype=torch.int64))
        self.register_buffer(QUEUE_PHOTOS, torch.zeros(queue_size, dtype=torch.int64))
        self.register_buffer("queue_filled", torch.zeros(queue_size, dtype=torch.bool))
        self.title_length = title_length
        if title_length:
            # Ids of a vocabulary fit into 32 bits: 140 bytes a slot of 35 tokens.
            self.register_buffer("queue_titles", torch.zeros(queue_size, title_length, dtype=torch.int32))
            self.register_buffer("queue_lengths", torch.zeros(queue_size, dtype=torch.int32))
        self.register_load_state_dict_pre_hook(_slots_of_other_runs)
        self.pointer = 0  # the slot that is written next
        self.updates = 0  # updates of the average so far

    def get_extra_state(self) -> dict[str, int]:
        return {"pointer": self.pointer, "updates": self.updates}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.pointer, self.updates = state["pointer"], state["updates"]

    @torch.no_grad()
    def start_from(self, tensors: dict[str, Tensor]) -> None:
        """Take the encoders, and the queues where there are some, of a `read_momentum` that `check_momentum` accepted.
        The slot that is written next is the first one."""
        own = self.state_dict()
        for name, value in tensors.items():
            own[name].copy_(value)

    @property
    def queue_size(self) -> int:
        return self.queue_ids.shape[0]

    @torch.no_grad()
    @record_function(MOMENTUM)
    def update(self, model: nn.Module) -> None:
        """Move the average towards the (unwrapped) model's present weights: once per optimizer step, before
        `encode`."""
        keep = min(self.momentum, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.momentum
        trained = weights_to_follow(model)
        averages = dict(self.encoders.named_parameters())
        weights = [trained[name] for name in averages]
        averages = list(averages.values())
        if any(weight.dtype != torch.float32 for weight in weights):  # of an engine in bf16
            copies = [torch.empty_like(average) for average in averages]
            torch._foreach_copy_(copies, weights)
            weights = copies
        # The same numbers as parameter by parameter; on a GPU in a few launches instead of hundreds.
        torch._foreach_lerp_(averages, weights, 1.0 - keep)
        self.updates += 1

    @torch.no_grad()
    @record_function(MOMENTUM)
    def encode(self, batch: dict[str, Tensor]) -> Targets:
        """The momentum features of this rank's batch, with both queues as they are now."""
        device_type = batch["pixel_values"].device.type
        autocast = torch.autocast(device_type, self.autocast_dtype) if self.autocast_dtype else nullcontext()
        with autocast:
            image = self.encoders.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
            texts = batch["input_ids"], batch["attention_mask"]
            text = self.encoders.get_text_features(*texts, return_dict=True).pooler_output
        # Clones: `enqueue` writes into the buffers before the backward pass of the next micro-batch has read them.
        return Targets(
            image.float(),
            text.float(),
            self.image_queue.clone(),
            self.text_queue.clone(),
            self.queue_ids.clone(),
            self.queue_photos.clone(),
            self.queue_filled.clone(),
            self.pointer,
            **self._titles(batch),
        )

    def _titles(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The titles of the batch and of the slots, where they are kept."""
        if not self.title_length:
            return {}
        mask = batch["attention_mask"]
        titles = F.pad(batch["input_ids"] * mask, (0, self.title_length - mask.shape[1])).int()
        return {
            "titles": titles,
            "lengths": mask.sum(dim=1, dtype=torch.int32),
            "queue_titles": self.queue_titles.clone(),
            "queue_lengths": self.queue_lengths.clone(),
        }

    @torch.no_grad()
    @record_function(MOMENTUM)
    def enqueue(self, targets: Targets, product_id: Tensor) -> None:
        """Put the momentum features of all ranks' batches into the queues, over the oldest ones. A collective.

        Args:
            targets: of this rank's batch, B rows, as many on every rank.
            product_id: (B,) int64; or (B, 2), products and photos.
        """
        image, text = all_gather(torch.cat([targets.image, targets.text], dim=1)).chunk(2, dim=1)  # (G, E) each
        product_id = all_gather(product_id)  # (G,) or (G, 2)
        product_id, photo_id = product_id.unbind(1) if product_id.dim() == 2 else (product_id, None)
        # Of a batch larger than the queue only the last rows would survive: writing just these keeps the slots
        # distinct.
        rows = min(product_id.shape[0], self.queue_size)
        dropped = product_id.shape[0] - rows
        slots = (self.pointer + dropped + torch.arange(rows, device=product_id.device)) % self.queue_size
        self.image_queue[slots] = image[dropped:]
        self.text_queue[slots] = text[dropped:]
        self.queue_ids[slots] = product_id[dropped:]
        self.queue_photos[slots] = torch.zeros_like(slots) if photo_id is None else photo_id[dropped:]
        if self.title_length:
            titles = all_gather(torch.cat([targets.titles, targets.lengths[:, None]], dim=1))[dropped:]  # (rows, L + 1)
            self.queue_titles[slots], self.queue_lengths[slots] = titles[:, :-1], titles[:, -1]
        self.queue_filled.index_fill_(0, slots, True)  # an assignment would copy the True to the device, and wait
        self.pointer = (self.pointer + dropped + rows) % self.queue_size

    @torch.no_grad()
    def rewind(self, targets: Targets) -> None:
        """Put the queues back to where they were when `targets` was encoded: a step that is left out enqueues
        nothing, also of the micro-batches that came before the one that broke it."""
        for name in (*QUEUES, QUEUE_PHOTOS, *(QUEUE_TITLES if self.title_length else ())):
            getattr(self, name).copy_(getattr(targets, name))
        self.pointer = targets.queue_pointer

    def queue_fill(self) -> Tensor:
        """Share of the slots that hold features, 0 to 1; a scalar on the device."""
        return self.queue_filled.float().mean()


def _slots_of_other_runs(momentum: MomentumState, state: dict, prefix: str, *_) -> None:
    """Checkpoints of version 0.1 have no photos of their slots, and those of runs that don't draw from the queue no
    titles: the slots are empty until they are filled anew. Titles that nobody asks for are left out."""
    if f"{prefix}queue_ids" not in state:
        return
    state.setdefault(f"{prefix}{QUEUE_PHOTOS}", torch.zeros_like(state[f"{prefix}queue_ids"]))
    for name in QUEUE_TITLES:
        if not momentum.title_length:
            state.pop(f"{prefix}{name}", None)
        else:
            state.setdefault(f"{prefix}{name}", torch.zeros_like(getattr(momentum, name)))


__all__ = ["MomentumState", "Targets"]
