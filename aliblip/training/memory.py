"""What a training run needs of memory and of disk, told before it starts.

    state = state_of(model.config, args.queue_size)
    memory = training_memory(model.config, state, work, 64)
    print(memory.total, largest_batch(model.config, state, work, available))

Legend: B rows of a batch on one rank, Q queue slots, K = B + Q keys, E width of the shared space, P image tokens,
L text tokens, D width of a tower, F width of a layer's MLP, H heads.

Arithmetic alone: nothing is computed. What autograd keeps of a forward pass is counted operator by operator, and a test
compares that with what it does keep.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import nn

from aliblip.retrieval.plan import tokens_per_image
from aliblip.training.flops import pairs_of_a_row
from aliblip.training.momentum import MomentumState
from aliblip.training.patches import patches_kept
from modeling_aliblip import AliBlipForImageTextRetrieval

FP32 = 4
# Of what a step takes beside its state: the allocator's gaps, and buffers of the libraries.
RESERVE = 0.08
LARGEST_BATCH = 65536
ADAM_MOMENTS = 2
GROUPS = 4  # of pairs of similar length, see `objective.match_by_length`
RANDOM_STATE_BYTES = 12_000  # of one rank, about


@dataclass(frozen=True)
class State:
    """Sizes of what a run holds from its first step to its last, in elements or bytes."""

    parameters: int  # elements of the model
    trainable: int  # of these, elements that are trained
    cast: int  # elements of weights that a pass in bf16 casts
    largest: int  # elements of the largest parameter
    momentum: int  # bytes of the momentum encoders
    slots: int  # of each queue
    queues: int  # bytes of both queues, with ids and titles
    frozen_cast: int = 0  # of those that a pass in bf16 casts, elements that are frozen
    frozen_text_cast: int = 0  # of these, elements of the BERT

    @property
    def model_bytes(self) -> int:
        """Of the weights in a file."""
        return self.parameters * FP32

    def checkpoint_bytes(self, processes: int = 1) -> int:
        """Of one checkpoint: weights, AdamW's moments, momentum encoders, queues, random states."""
        moments = ADAM_MOMENTS * self.trainable * FP32
        return self.model_bytes + moments + self.momentum + self.queues + processes * RANDOM_STATE_BYTES


def state_of(config, queue_size: int, model: nn.Module | None = None, title_length: int = 0) -> State:
    """The sizes of a model of this configuration and of what is trained around it.

    Args:
        config: an `AliBlipConfig`.
        queue_size: slots of the queue.
        model: tells which parameters are trained; default: all.
        title_length: tokens that the queue keeps of a title; 0: it keeps none.
    """
    with torch.device("meta"):
        empty = AliBlipForImageTextRetrieval(config)
    embedding_size = config.image_text_hidden_size
    momentum = MomentumState(empty, queue_size=1, embedding_size=embedding_size, title_length=title_length)
    slot = sum(buffer.numel() * buffer.element_size() for buffer in momentum.buffers(recurse=False))
    shapes = [parameter.numel() for parameter in empty.parameters()]
    kinds = (nn.Linear, nn.Conv2d)
    matrices = {
        f"{name}.weight": module.weight.numel() for name, module in empty.named_modules() if isinstance(module, kinds)
    }
    own = list((empty if model is None else model).named_parameters())
    trained = {name for name, parameter in own if parameter.requires_grad}
    frozen = {name: size for name, size in matrices.items() if name not in trained}
    return State(
        parameters=sum(shapes),
        trainable=sum(parameter.numel() for name, parameter in own if name in trained),
        cast=sum(matrices.values()),
        largest=max(shapes),
        momentum=sum(parameter.numel() for parameter in momentum.encoders.parameters()) * FP32,
        slots=queue_size,
        queues=queue_size * slot,
        frozen_cast=sum(frozen.values()),
        frozen_text_cast=sum(size for name, size in frozen.items() if name.startswith("text_encoder.")),
    )


@dataclass(frozen=True)
class Work:
    """How a step is done, as far as its memory depends on it.

    Attributes:
        longest: tokens of the longest title of a batch.
        matched: mean length of a title in the passes of ITM, which groups pairs by length.
        bf16: whether the matrix products run in it, or in fp16.
        on_gpu: whether it is a GPU; autocast and dropout keep other things there than on a CPU.
        attention: "sdpa", "eager" or "flash_attention_2".
        processes: of the run.
        zero_stage: of DeepSpeed, or 0.
        offloads: whether DeepSpeed keeps AdamW's state in the host's memory.
        checkpointed: the last so many layers of the ViT and of the BERT that are computed again.
        negatives_from_all_ranks: of the objective, with several processes.
        frozen: parts that are not trained, see `aliblip.training.freezing`.
        itm_negatives, itm_queue_titles: of the objective.
        cached: rows that go through the model at a time; None: the whole batch.
        patch_dropout: share of the patches that are left out.
    """

    longest: int
    matched: float
    bf16: bool = False
    on_gpu: bool = False
    attention: str = "sdpa"
    processes: int = 1
    zero_stage: int = 0
    offloads: bool = False
    checkpointed: tuple[int, int] = (0, 0)
    negatives_from_all_ranks: bool = False
    frozen: tuple[str, ...] = ()
    itm_negatives: int = 1
    itm_queue_titles: int = 0
    cached: int | None = None
    patch_dropout: float = 0.0

    def trains(self, part: str) -> bool:
        return part not in self.frozen

    def at_a_time(self, rows: int) -> int:
        """Of so many rows those that the model sees together."""
        return rows if self.cached is None else min(self.cached, rows)

    @property
    def pairs(self) -> int:
        """Pairs of ITM for each row."""
        return pairs_of_a_row(self.itm_negatives, self.itm_queue_titles)

    @property
    def element(self) -> int:
        """Bytes of a number in a matrix product."""
        return 2 if self.bf16 else FP32

    @property
    def casts(self) -> bool:
        """Whether autocast makes the copies in bf16; an engine of DeepSpeed holds its weights in it."""
        return self.bf16 and not self.zero_stage


@dataclass(frozen=True)
class TrainingMemory:
    """What one process needs on its device, in bytes.

    `parameters`: the weights, and under ZeRO in bf16 the working copies; `optimizer`: AdamW's moments, and under ZeRO
    the fp32 weights; `gradients`: with the buckets of DDP or ZeRO; `momentum`, `queues`; `activations`: what autograd
    keeps of one batch; `workspace`: the widest moment beside them; `reserve`: a share of the two for the allocator.
    """

    parameters: int
    gradients: int
    optimizer: int
    momentum: int
    queues: int
    activations: int
    workspace: int
    reserve: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def training_memory(config, state: State, work: Work, batch_size: int) -> TrainingMemory:
    """The memory of one process for batches of `batch_size` rows.

    Args:
        config: an `AliBlipConfig`.
        state: `state_of` it.
    """
    kept = activations(config, state, work, batch_size)
    workspace = _workspace(config, work, batch_size)
    parameters, gradients, optimizer = _weights(state, work)
    return TrainingMemory(
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer,
        momentum=state.momentum,
        queues=state.queues,
        activations=kept,
        workspace=workspace,
        reserve=int(RESERVE * (kept + workspace)),
    )


def largest_batch(config, state: State, work: Work, available: float) -> int:
    """Rows of the largest batch of one process that fits into so many bytes; 0: not even one row does."""
    fits, fails = 0, LARGEST_BATCH + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        if training_memory(config, state, work, middle).total <= available:
            fits = middle
        else:
            fails = middle
    return fits


def _weights(state: State, work: Work) -> tuple[int, int, int]:
    """Bytes of weights, gradients and optimizer state on one process."""
    moments = ADAM_MOMENTS * state.trainable * FP32
    if not work.zero_stage:
        buckets = state.trainable * FP32 if work.processes > 1 else 0  # DDP reduces copies
        return state.parameters * FP32, state.trainable * FP32 + buckets, moments
    share = 1 / work.processes
    masters = state.trainable * FP32
    optimizer = 0 if work.offloads else int((moments + masters) * share)
    gradients = state.trainable * work.element
    # Stage 2 keeps the gradients of its own share in fp32, and those of a bucket on their way.
    own = int(state.trainable * FP32 * share)
    return state.parameters * work.element, own + (gradients if work.zero_stage == 1 else gradients // 2), optimizer


# --- what autograd keeps ----------------------------------------------------------------------------------------------


def activations(config, state: State, work: Work, batch_size: int) -> int:
    """Bytes that autograd keeps of the forward pass of one batch, for its backward pass."""
    rows = work.at_a_time(batch_size)
    towers, pairs = rows * (_vision(config, work) + _titles(config, work)), _matching(config, work, rows)
    kept = _contrast(config, batch_size, state)
    if rows == batch_size:
        kept += towers + pairs
    else:  # computed again, one after the other, from what is held of all rows
        kept += max(towers, pairs) + batch_size * _held(config, work)
    if work.casts:
        # The weights' copies: of those that are trained once for all passes, of others in each pass of ITM that has a
        # gradient through them.
        copies = state.cast - state.frozen_cast
        if any(work.trains(part) for part in ("vision", "text", "cross_attention")):
            copies += GROUPS * state.frozen_text_cast
        kept += copies * work.element
    return int(kept)


def _tokens(config, work: Work) -> int:
    """Of a photo, as far as training sees it."""
    return 1 + patches_kept(tokens_per_image(config) - 1, work.patch_dropout)


def _held(config, work: Work) -> float:
    """Of a row that is computed again: its photo, and the photo's tokens, by chunks, together, and as a negative."""
    e = FP32 if work.casts and work.on_gpu else work.element  # a LayerNorm has made them
    tokens = _tokens(config, work) * config.vision_config.hidden_size * e
    return 3 * config.vision_config.image_size**2 * FP32 + 3 * tokens


def _vision(config, work: Work) -> float:
    """Of one photo."""
    vision = config.vision_config
    P, D, e = _tokens(config, work), vision.hidden_size, work.element
    if not work.trains("vision"):  # only the tokens, for the weights that are applied to them
        # (The projection's input is the first of them, and a view.)
        applied = work.trains("cross_attention") or work.trains("projections")
        return P * D * e * applied + 2 * config.image_text_hidden_size * FP32
    norm = FP32 if work.casts and work.on_gpu else e  # autocast does LayerNorm in fp32 on a GPU
    pixels = 3 * vision.image_size**2 * e
    depth, again = vision.num_hidden_layers, work.checkpointed[0]
    kept = (depth - again) * _vision_layer(config, work) + again * P * D * e  # a layer's input, if it is computed again
    return pixels + kept + P * (norm * D + 8) + 2 * config.image_text_hidden_size * FP32 + D * e


def _vision_layer(config, work: Work) -> float:
    vision = config.vision_config
    P, D, F, e = _tokens(config, work), vision.hidden_size, vision.intermediate_size, work.element
    norm = FP32 if work.casts and work.on_gpu else e
    # Inputs of both LayerNorms; qkv's input, q, k, v and the attention's output; the MLP's input, and both sides of its
    # activation function.
    layer = P * (2 * (norm * D + 8) + e * (6 * D + 2 * F))
    return layer + _scores(work, vision.num_attention_heads, P, P, vision.attention_dropout, D)


def _titles(config, work: Work) -> float:
    """Of one title that sees no photo."""
    text = config.text_config
    L, depth, again = work.longest, text.num_hidden_layers, work.checkpointed[1]
    if not work.trains("text"):  # its last layer, of which the feature is a view
        return L * text.hidden_size * work.element * work.trains("projections")
    layer = _text_layer(config, work, L, L, with_image=False)
    kept = (depth - again) * layer + again * L * text.hidden_size * FP32
    return _embedding(config, work, L) + kept


def _matching(config, work: Work, B: int) -> float:
    """Of the pairs of ITM: each photo with its own title, with wrong ones, and each title with wrong photos."""
    text, vision = config.text_config, config.vision_config
    P, D, e = _tokens(config, work), text.hidden_size, work.element
    L, depth, again = work.matched, text.num_hidden_layers, work.checkpointed[1]
    if not any(work.trains(part) for part in ("vision", "text", "cross_attention")):
        return work.pairs * B * D * e  # what the matching head is applied to
    layer = _text_layer(config, work, L, L, with_image=True)
    last = _text_layer(config, work, L, 1, with_image=True)
    layers = [layer] * (depth - 1) + [last]
    kept = sum(layers[: depth - again]) + again * L * D * FP32
    if work.trains("text"):
        kept += _embedding(config, work, L)
    elif again < depth:  # nothing below the first cross-attention has a gradient
        kept -= _titles_in_layer(config, work, L, L)
    pairs = work.pairs * B * kept
    images = _images_to_match(work) * B
    # Its input is the same for all layers; autocast on a GPU makes a copy for each of its keys and values.
    copies = 2 * depth if work.casts and work.on_gpu else (2 if work.negatives_from_all_ranks else 0)
    sources = images * P * vision.hidden_size * e * copies
    projected = images * 2 * P * D * e * again  # keys and values of the photos: layers that are done once keep copies
    return pairs + sources + projected


def _images_to_match(work: Work) -> int:
    """Photos that are projected to keys and values, of each row, see `RetrievalObjective`."""
    if not work.negatives_from_all_ranks:
        return 1
    chosen = 1 + work.itm_negatives
    return min(chosen, work.processes) if work.itm_negatives > 1 else chosen


def _contrast(config, B: int, state: State) -> float:
    """Of ITC against the queue: logits over the temperature, their log-softmax and the targets, in both directions; the
    keys, beside the copies of the queues that go with a batch."""
    keys = B + state.slots
    return 6 * B * keys * FP32 + 4 * keys * config.image_text_hidden_size * FP32


def _embedding(config, work: Work, L: float) -> float:
    text = config.text_config
    return L * (FP32 * text.hidden_size + 16) + _dropped(work, text.hidden_dropout_prob, L * text.hidden_size, FP32)


def _text_layer(config, work: Work, L: float, queries: float, *, with_image: bool) -> float:
    """Of one BERT layer of one row: L tokens, of which the first `queries` are computed."""
    text = config.text_config
    D, F, H, e = text.hidden_size, text.intermediate_size, text.num_attention_heads, work.element
    dropout, of_scores = text.hidden_dropout_prob, text.attention_probs_dropout_prob
    norm = e if work.zero_stage else FP32  # the embedding is not cast, and a LayerNorm follows it in fp32
    # The end of a block: what goes into its LayerNorm, and the dropout before it.
    end = queries * (norm * D + 8) + _dropped(work, dropout, queries * D, e)
    inputs = work.trains("text")  # a frozen matrix keeps nothing of what it is applied to
    layer = _titles_in_layer(config, work, L, queries) + e * queries * (D * inputs + F * (1 + inputs)) + end
    if with_image:
        P = _tokens(config, work)
        inputs = work.trains("cross_attention")
        layer += e * D * (queries * (1 + 2 * inputs) + 2 * P) + _scores(work, H, queries, P, of_scores, D) + end
    return layer


def _titles_in_layer(config, work: Work, L: float, queries: float) -> float:
    """Of a layer's attention between the tokens of a title."""
    text = config.text_config
    D, H, e = text.hidden_size, text.num_attention_heads, work.element
    dropout, of_scores = text.hidden_dropout_prob, text.attention_probs_dropout_prob
    norm = e if work.zero_stage else FP32  # the embedding is not cast, and a LayerNorm follows it in fp32
    end = queries * (norm * D + 8) + _dropped(work, dropout, queries * D, e)
    sources = (3 if work.casts else 1) * work.trains("text")  # autocast copies the input for query, key and value
    return e * D * (sources * L + 2 * L + 2 * queries) + _scores(work, H, queries, L, of_scores, D) + end


def _scores(work: Work, heads: int, queries: float, keys: float, dropout: float, width: int) -> float:
    """Of the attention itself, D = `width`: fused kernels keep a number a query, others the scores."""
    if work.attention != "eager" and (work.on_gpu or not dropout):
        return heads * queries * FP32
    if work.attention != "eager":  # on a CPU torch falls back to plain operators, all of them in fp32
        copies = FP32 * width * (queries + 2 * keys) if work.bf16 else 0
        return heads * queries * keys * 3 * FP32 + copies
    each = FP32 + (work.element if work.bf16 else 0)  # the softmax is in fp32
    if dropout:
        each += (1 if work.on_gpu else work.element) + (0 if work.bf16 else work.element)
    return heads * queries * keys * each


def _dropped(work: Work, rate: float, elements: float, element: int) -> float:
    """Of a dropout: its mask, of numbers on a CPU and of bytes on a GPU."""
    return elements * (1 if work.on_gpu else element) if rate else 0.0


def _workspace(config, work: Work, B: int) -> int:
    """The widest moment beside what is kept, about: the backward pass of a layer, which holds gradients as large as its
    activations, and these once more if it is computed again; keys and values of the photos, and the photos."""
    vision, text = config.vision_config, config.text_config
    P, e = _tokens(config, work), work.element
    photos = B * 3 * vision.image_size**2 * FP32 if work.bf16 else 0
    if work.at_a_time(B) < B:  # the gradients of what is held of all rows
        photos += int(B * _held(config, work))
        B = work.at_a_time(B)
    projected = B * 2 * P * text.hidden_size * e * (text.num_hidden_layers - work.checkpointed[1])
    of_vision = B * _vision_layer(config, work)
    of_pairs = work.pairs * B / GROUPS * _text_layer(config, work, work.matched, work.matched, with_image=True)
    backward = max(of_vision * (2 if work.checkpointed[0] else 1), of_pairs * (2 if work.checkpointed[1] else 1))
    return int(photos + projected + backward)


__all__ = ["State", "TrainingMemory", "Work", "activations", "largest_batch", "state_of", "training_memory"]
