"""What a training step takes, as it is told beforehand, against what autograd keeps and what files hold."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import tiny
import torch
from helpers import ROOT

from aliblip.training.building import set_checkpointed_layers
from aliblip.training.freezing import freeze
from aliblip.training.memory import Work, activations, largest_batch, state_of, training_memory
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from aliblip.training.patches import drop_patches
from configuration_aliblip import AliBlipConfig

ROWS, LENGTH, QUEUE = 8, 12, 50


def kept_by_autograd(model, attention: str, dtype, **options) -> int:
    """Bytes of all storages that the backward pass of one batch would read, weights left out."""
    batch = tiny.batch(rows=ROWS, length=LENGTH, image_size=64)
    batch["attention_mask"][:] = 1
    title_length = LENGTH if options else 0
    momentum = MomentumState(
        model, queue_size=QUEUE, embedding_size=16, autocast_dtype=dtype, title_length=title_length
    )
    if options:
        momentum.queue_lengths.fill_(LENGTH)
    targets = momentum.encode(batch)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
        return tensor

    autocast = torch.autocast("cpu", dtype) if dtype else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        RetrievalObjective(model, longest_title=LENGTH, **options).train()(batch, targets, 0.4)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("checkpointed", [(0, 0), (1, 0), (2, 2)])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("attention", "dropout"), [("sdpa", 0.0), ("sdpa", 0.1), ("eager", 0.0), ("eager", 0.1)])
def test_activations_are_those_that_autograd_keeps(attention, dropout, dtype, checkpointed):
    text = {"num_hidden_layers": 3, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = tiny.model(image_size=64, vision_config={"num_hidden_layers": 3}, text_config=text)
    model.set_attn_implementation(attention)
    if any(checkpointed):
        set_checkpointed_layers(model, *checkpointed)
    work = Work(LENGTH, LENGTH, bf16=dtype is not None, attention=attention, checkpointed=checkpointed)
    told = activations(model.config, state_of(model.config, QUEUE), work, ROWS)
    assert 0.97 < told / kept_by_autograd(model, attention, dtype) < 1.13


@pytest.mark.parametrize("frozen", [("vision",), ("text",), ("vision", "text"), ("vision", "text", "cross_attention")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_frozen_keeps_little(dropout, dtype, frozen):
    text = {"num_hidden_layers": 3, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = tiny.model(image_size=64, vision_config={"num_hidden_layers": 3}, text_config=text)
    freeze(model, frozen)
    work = Work(LENGTH, LENGTH, bf16=dtype is not None, frozen=frozen)
    state = state_of(model.config, QUEUE, model)
    told = activations(model.config, state, work, ROWS)
    # Where the heads alone are trained, kilobytes are left, and a view that autocast copies is none.
    assert 0.97 < told / kept_by_autograd(model, "sdpa", dtype) < (1.3 if len(frozen) == 3 else 1.18)
    assert told < activations(model.config, state, replace(work, frozen=()), ROWS)


def test_several_negatives_and_titles_of_the_queue_take_memory():
    model = tiny.model(image_size=64)
    options = {"itm_negatives": 3, "itm_queue_titles": 4}
    told = activations(model.config, state_of(model.config, QUEUE), Work(LENGTH, LENGTH, **options), ROWS)
    kept = kept_by_autograd(model, "sdpa", None, itm_listwise=1.0, **options)
    assert 0.97 < told / kept < 1.13
    titles = state_of(model.config, QUEUE, title_length=LENGTH).queues - state_of(model.config, QUEUE).queues
    assert titles == QUEUE * (LENGTH + 1) * 4


def test_of_rows_computed_again_little_is_kept_and_told():
    model = tiny.model(image_size=64, vision_config={"num_hidden_layers": 3})
    state, work = state_of(model.config, QUEUE), Work(LENGTH, LENGTH, cached=2)
    told = activations(model.config, state, work, ROWS)
    whole = activations(model.config, state, Work(LENGTH, LENGTH), ROWS)
    chunk = activations(model.config, state, Work(LENGTH, LENGTH), 2)
    kept = kept_by_autograd(
        model, "sdpa", None, cached_batch_size=2
    )  # between the passes, where nothing is computed again
    assert kept < told < 1.15 * kept + chunk
    assert told < whole / 2
    available = training_memory(model.config, state, Work(LENGTH, LENGTH), 100).total
    assert largest_batch(model.config, state, work, available) > 200


def test_patches_that_are_left_out_take_nothing():
    model = tiny.model(image_size=64, vision_config={"num_hidden_layers": 3})
    state, told, kept = state_of(model.config, QUEUE), [], []
    for rate in (0.0, 0.5):
        drop_patches(model, rate)
        told.append(activations(model.config, state, Work(LENGTH, LENGTH, patch_dropout=rate), ROWS))
        kept.append(kept_by_autograd(model, "sdpa", None))
    assert told[1] < 0.7 * told[0]
    assert told[1] / kept[1] == pytest.approx(told[0] / kept[0], rel=0.03)


def test_the_state_is_that_of_the_modules():
    model = tiny.model()
    model.itm_head.requires_grad_(False)
    momentum = MomentumState(model, queue_size=QUEUE, embedding_size=16)
    state = state_of(model.config, QUEUE, model)
    assert state.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert state.trainable == state.parameters - sum(parameter.numel() for parameter in model.itm_head.parameters())
    assert state.momentum == 4 * sum(parameter.numel() for parameter in momentum.encoders.parameters())
    assert state.queues == sum(value.nbytes for name, value in momentum.named_buffers() if "queue" in name)
    assert (
        state.cast
        == sum(p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "embeddings." not in name)
        + model.vision_model.embeddings.patch_embedding.weight.numel()
    )


def test_what_the_launcher_starts_counts():
    model = tiny.model()
    state, work = state_of(model.config, QUEUE), Work(LENGTH, 8)
    alone = training_memory(model.config, state, work, ROWS)
    assert (alone.parameters, alone.gradients, alone.optimizer) == tuple(state.parameters * n for n in (4, 4, 8))
    two = training_memory(model.config, state, replace(work, processes=2), ROWS)
    assert two.gradients == 2 * alone.gradients and two.optimizer == alone.optimizer  # DDP's buckets
    zero = training_memory(model.config, state, replace(work, processes=4, zero_stage=2, bf16=True), ROWS)
    assert zero.parameters == 2 * state.parameters
    assert zero.optimizer == 12 * state.trainable // 4  # moments and fp32 weights, a quarter of them
    offloaded = replace(work, processes=4, zero_stage=2, bf16=True, offloads=True)
    assert training_memory(model.config, state, offloaded, ROWS).optimizer == 0
    # A GPU's fused attention has dropout in it, and keeps no scores.
    dropping = tiny.config(text_config={"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1})
    on_gpu = training_memory(dropping, state, replace(work, on_gpu=True), ROWS).activations
    assert on_gpu < training_memory(dropping, state, work, ROWS).activations


def test_the_largest_batch_fits_and_one_more_does_not():
    model = tiny.model()
    state, work = state_of(model.config, QUEUE), Work(LENGTH, 8)
    available = training_memory(model.config, state, work, 100).total
    assert largest_batch(model.config, state, work, available) == 100
    assert largest_batch(model.config, state, work, available - 1) == 99
    assert largest_batch(model.config, state, work, 1000) == 0
    longer = replace(work, longest=30, matched=30)
    assert largest_batch(model.config, state, longer, available) < 100


def test_what_is_told_is_a_little_above_what_a_gpu_allocated():
    """Peaks of whole steps on an H200, as benchmarks/gpu_steps.py measured them; its titles have 6 to 20 tokens."""
    measured = json.loads((ROOT / "benchmarks" / "results" / "gpu_steps.json").read_text())["variants"]
    config = AliBlipConfig.from_size("large", vision_config={"image_size": 384})
    state = state_of(config, 57_600)
    ratios = []
    for variant in measured:
        if "peak_gb" in variant and not variant["compiled"] and not variant["checkpointing"]:
            bf16, attention = variant["precision"] == "bf16", variant["attention"]
            work = Work(longest=20, matched=14.75, bf16=bf16, on_gpu=True, attention=attention)
            told = training_memory(config, state, work, variant["batch"]).total
            ratios.append(told / (variant["peak_gb"] * 1e9))
    assert len(ratios) >= 6 and all(1.05 < ratio < 1.2 for ratio in ratios)
