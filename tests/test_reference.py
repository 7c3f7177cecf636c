"""Parity with recordings of the published training code: losses, gradients, momentum encoders, queues, evaluation.

Every run that `recordings` finds: one is part of the repository, and `ALIBLIP_REFERENCE_DIR` names a folder of more.
Sizes, steps, batch and number of processes come from a run's `expected.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import recordings
import torch
from helpers import spawn
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from aliblip.models.original import split_original
from aliblip.runtime.distributed import assert_equal_on_ranks, rank, world_size
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from aliblip.training.optim import parameter_groups
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval

RUNS = recordings.runs()
each_run = pytest.mark.parametrize("run", RUNS, ids=recordings.name_of)


def test_a_recording_is_part_of_the_repository():
    assert "one_rank-small" in map(recordings.name_of, RUNS)


@pytest.mark.skipif(
    not (recordings.WHOLE / "one_rank").is_dir(),
    reason=f"no whole recordings in {recordings.WHOLE} (set ALIBLIP_REFERENCE_DIR)",
)
def test_the_small_recording_is_what_is_made_of_the_whole_one(tmp_path):
    recordings.make_small(recordings.WHOLE / "one_rank", tmp_path / "small")
    for made in (tmp_path / "small").iterdir():
        assert made.read_bytes() == (recordings.COMMITTED / "one_rank" / made.name).read_bytes(), made.name


def load(run: Path):
    expected = json.loads((run / "expected.json").read_text())
    text = {**expected["text"]}
    vision = {**expected["vision"]}
    config = AliBlipConfig(
        vision_config={
            **{
                key: vision[key]
                for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
            },
            "intermediate_size": int(vision["hidden_size"] * vision["mlp_ratio"]),
            "image_size": expected["image_size"],
            "patch_size": expected["patch_size"],
        },
        text_config={
            key: text[key]
            for key in (
                *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
                *("max_position_embeddings", "hidden_act", "layer_norm_eps", "hidden_dropout_prob"),
                *("attention_probs_dropout_prob", "pad_token_id"),
            )
        },
        image_text_hidden_size=expected["embed_dim"],
        enc_token_id=expected["enc_token_id"],
    )
    weights, momentum, queues = split_original(recordings.initial_state(run))
    model = AliBlipForImageTextRetrieval(config)
    model.load_state_dict(weights)
    return expected, model, momentum, queues


def load_momentum(expected, model, weights, queues) -> MomentumState:
    state = MomentumState(
        model,
        queue_size=expected["queue_size"],
        embedding_size=expected["embed_dim"],
        momentum=expected["momentum"],
    )
    # The recordings also average the cross-attention, which no feature depends on.
    state.encoders.load_state_dict(
        {name: weights[name] for name in state.encoders.state_dict() if name != "temp"}, strict=False
    )
    state.image_queue.copy_(queues["image_queue"].t())
    state.text_queue.copy_(queues["text_queue"].t())
    ids = queues["idx_queue"].flatten()
    state.queue_ids.copy_(ids)
    state.queue_filled.copy_(ids != -100)
    state.pointer = int(queues["ptr_queue"])
    return state


def train(run: Path) -> dict:
    """The recorded steps through our objective; in as many processes as the recording had."""
    expected, model, momentum_weights, queues = load(run)
    momentum = load_momentum(expected, model, momentum_weights, queues)
    model.train()
    objective = RetrievalObjective(
        model, negatives_from_all_ranks=expected["negative_all_rank"], hardest_negatives=True
    )
    wrapped = DistributedDataParallel(objective, broadcast_buffers=False) if world_size() > 1 else objective
    settings = expected["optimizer"]
    optimizer = torch.optim.AdamW(
        parameter_groups(model, settings["weight_decay"], decay_everything=True),
        lr=settings["lr"],
        betas=settings["betas"],
        eps=settings["eps"],
    )
    batches = load_file(run / "batches.safetensors")
    rows = slice(rank() * expected["batch_size_per_rank"], (rank() + 1) * expected["batch_size_per_rank"])
    measured = []
    for recorded in expected["steps_by_rank"][rank()]:
        step = recorded["step"]
        batch = {
            "pixel_values": batches["images"][step, rows],
            "input_ids": batches["input_ids"][step, rows],
            "attention_mask": batches["attention_mask"][step, rows],
            "product_id": batches["ids"][step, rows],
        }
        momentum.update(model)
        targets = momentum.encode(batch)
        output = wrapped(batch, targets, alpha=recorded["alpha"])
        output.loss.backward()
        grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
        optimizer.step()
        optimizer.zero_grad()
        temp_after = model.temp.item()
        model.temp.data.clamp_(0.001, 0.5)
        momentum.enqueue(targets, batch["product_id"])
        measured.append(
            {
                "loss_ita": output.parts["itc"].item(),
                "loss_itm": output.parts["itm"].item(),
                "grad_norm": grad_norm,
                "temp_after": temp_after,
                "queue_ptr": momentum.pointer,
            }
        )
    assert_equal_on_ranks("momentum state", {k: v for k, v in momentum.state_dict().items() if torch.is_tensor(v)})
    return {"steps": measured, "model": model.state_dict(), "momentum": momentum.state_dict()}


@each_run
def test_training_steps_equal_the_recording(run):
    expected = json.loads((run / "expected.json").read_text())
    processes = expected["world_size"]
    ranks = spawn(train, processes, run) if processes > 1 else [train(run)]
    assert len(ranks) == len(expected["steps_by_rank"])
    for measured, recorded in zip(ranks, expected["steps_by_rank"], strict=True):
        assert len(measured["steps"]) == len(recorded) > 0
        for ours, theirs in zip(measured["steps"], recorded, strict=True):
            for key in ("loss_ita", "loss_itm", "grad_norm", "temp_after"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (theirs["step"], key)
            assert ours["queue_ptr"] == theirs["queue_ptr"]

    weights, momentum, queues = split_original(load_file(run / "final.safetensors"))
    final = ranks[0]
    assert final["model"].keys() == weights.keys()
    width = expected["vision"]["hidden_size"]
    for name, theirs in weights.items():
        difference = (recordings.like(final["model"][name], theirs) - theirs).abs()
        if name.endswith("self_attn.qkv.bias"):
            # A key bias changes no output: its gradient is rounding noise, which Adam divides by itself.
            difference = torch.cat([difference[:width], difference[2 * width :]])
        elif name.endswith("self.key.bias"):
            continue
        assert difference.max() < 1e-3, name
        assert difference.mean() < 1e-5, name
    compared = 0
    for name, ours in final["momentum"].items():
        if name.startswith("encoders.") and name != "encoders.temp":
            theirs = momentum[name.removeprefix("encoders.")]
            torch.testing.assert_close(recordings.like(ours, theirs), theirs, rtol=0, atol=1e-4)
            compared += 1
    assert compared > 20
    torch.testing.assert_close(final["momentum"]["image_queue"], queues["image_queue"].t(), rtol=0, atol=1e-4)
    torch.testing.assert_close(final["momentum"]["text_queue"], queues["text_queue"].t(), rtol=0, atol=1e-4)
    ids, filled = queues["idx_queue"].flatten(), final["momentum"]["queue_filled"]
    assert torch.equal(filled, ids != -100)
    assert torch.equal(final["momentum"]["queue_ids"][filled], ids[filled])


def recalls(matrix: torch.Tensor) -> dict[str, float]:
    """The recordings' rule: the positive of query i is item i; descending scores, ties to the lower index."""
    order = matrix.sort(dim=1, descending=True, stable=True).indices
    position = (order == torch.arange(len(matrix))[:, None]).float().argmax(dim=1)
    return {f"r{k}": (position < k).float().mean().item() for k in (1, 5, 10)}


@each_run
@torch.no_grad()
def test_evaluation_equals_the_recording(run):
    expected, model, _, _ = load(run)
    model.eval()
    data = load_file(run / "evaluation.safetensors")
    image = model.get_image_features(data["images"])
    text = model.get_text_features(data["input_ids"], data["attention_mask"])
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(image.last_hidden_state, data["image_hidden"], **close)
    torch.testing.assert_close(image.pooler_output, data["image_embeds"], **close)
    torch.testing.assert_close(text.pooler_output, data["text_embeds"], **close)
    itc = image.pooler_output @ text.pooler_output.t()
    torch.testing.assert_close(itc, data["itc_similarity"], **close)

    # Every pair, both ways to ask: one image with all titles (dense), and pairs of many images.
    count = len(itc)
    image_kv = model.project_image_kv(image.last_hidden_state)
    dense = torch.stack(
        [
            model.match(
                data["input_ids"],
                data["attention_mask"],
                tuple((key[i : i + 1], value[i : i + 1]) for key, value in image_kv),
                torch.zeros(count, dtype=torch.int64),
            )
            for i in range(count)
        ]
    )
    torch.testing.assert_close(dense, data["itm_logits"], **close)
    everywhere = torch.arange(count).repeat_interleave(count), torch.arange(count).repeat(count)
    paired = model.match(
        data["input_ids"][everywhere[1]], data["attention_mask"][everywhere[1]], image_kv, everywhere[0]
    )
    torch.testing.assert_close(paired.view(count, count, 2), data["itm_logits"], **close)

    for name, scores in (("i2t", itc), ("t2i", itc.t())):
        assert recalls(scores) == pytest.approx(expected[f"itc_recall_{name}"], abs=1e-6)
        k = expected["k_test"]
        match = dense[..., 1] if name == "i2t" else dense[..., 1].t()
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        reranked = torch.full_like(scores, -100.0).scatter(1, best, (match + scores).gather(1, best))
        torch.testing.assert_close(reranked, data[f"rerank_{name}"], **close)
        assert recalls(reranked) == pytest.approx(expected[f"itm_recall_{name}"], abs=1e-6)
