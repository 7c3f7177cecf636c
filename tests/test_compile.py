"""`--compile`: the same losses, the same names, and few graphs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
import torch
from helpers import ROOT, assert_succeeded, run_ranks
from runs import TINY, steps_of, write_split
from safetensors.torch import load_file

from aliblip.runtime.mistakes import UsageError
from aliblip.training.compiling import CompiledTowers
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from modeling_aliblip import AliBlipForImageTextRetrieval, DropPath

COMPILED = ROOT / "tests" / "compiled_train.py"
WITHOUT_DROPOUT = '{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, '
WITHOUT_DROPOUT += '"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}'


@pytest.fixture
def dynamo_as_before(monkeypatch):
    monkeypatch.setattr(DropPath, "dropped", DropPath.dropped)
    torch._dynamo.reset()
    with torch.fx.experimental._config.patch("use_duck_shape", True):
        yield
    torch._dynamo.reset()


def losses_and_gradients(
    compiled: bool, steps: int = 3, cached: int | None = None, **changes
) -> tuple[list, dict, CompiledTowers | None]:
    """Of steps with titles of other lengths each."""
    model = tiny.model(**changes)
    momentum = MomentumState(model, queue_size=12, embedding_size=16)
    towers = CompiledTowers(model) if compiled else None
    objective = RetrievalObjective(model, hardest_negatives=True, cached_batch_size=cached).train()
    losses = []
    for step in range(steps):
        batch = tiny.batch(6, length=6 + 4 * step, seed=step)
        output = objective(batch, momentum.encode(batch), alpha=0.2)
        output.loss.backward()
        losses.append(output.loss.item())
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}, towers


def test_compiled_towers_give_the_losses_and_gradients_of_plain_ones(dynamo_as_before):
    small = {"vision_config": {"num_hidden_layers": 1}, "text_config": {"num_hidden_layers": 1}}
    losses, gradients, _ = losses_and_gradients(False, **small)
    compiled_losses, compiled_gradients, towers = losses_and_gradients(True, **small)
    assert compiled_losses == pytest.approx(losses, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert towers.graphs == 3  # the ViT's, the BERT's without photos and with
    assert re.fullmatch(r"compiled 3 graphs of the towers' layers in \d+ s", towers.told())


def test_compiled_towers_compute_rows_again_as_plain_ones_do(dynamo_as_before, monkeypatch):
    monkeypatch.setattr(CompiledTowers, "backend", "aot_eager")
    small = {"vision_config": {"num_hidden_layers": 1}, "text_config": {"num_hidden_layers": 1}}
    losses, gradients, _ = losses_and_gradients(False, 2, **small)
    cached_losses, cached_gradients, _ = losses_and_gradients(True, 2, cached=4, **small)
    assert cached_losses == pytest.approx(losses, rel=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(cached_gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_neither_depth_nor_drop_path_nor_the_length_of_titles_makes_graphs(dynamo_as_before, monkeypatch):
    monkeypatch.setattr(CompiledTowers, "backend", "aot_eager")
    graphs = []
    for layers, steps in ((3, 2), (4, 4)):
        torch._dynamo.reset()
        changes = {"vision_config": {"num_hidden_layers": layers, "drop_path_rate": 0.2}}
        *_, towers = losses_and_gradients(True, steps, **changes, text_config={"num_hidden_layers": layers})
        graphs.append(towers.graphs)
    assert graphs[0] == graphs[1]


def test_nothing_is_compiled_while_it_pauses(dynamo_as_before, monkeypatch):
    monkeypatch.setattr(CompiledTowers, "backend", "aot_eager")
    model, plain, batch = tiny.model().eval(), tiny.model().eval(), tiny.batch()
    towers = CompiledTowers(model)
    with torch.no_grad(), towers.paused():
        features = model.get_image_features(batch["pixel_values"]).pooler_output
        assert torch.equal(features, plain.get_image_features(batch["pixel_values"]).pooler_output)
    assert towers.graphs == 0
    model.get_image_features(batch["pixel_values"])
    assert towers.graphs == 1


def test_a_machine_that_can_not_compile_is_told_at_once(dynamo_as_before, monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch._dynamo, "lookup_backend", lambda name: broken)
    with pytest.raises(UsageError, match="^--compile can't be used here .*: install what is missing, or leave it out$"):
        CompiledTowers(tiny.model())


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder / "data", "train", 48)
    write_split(folder / "data", "validation", 8)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    flags = [*TINY, "--data_dir", folder / "data", "--tokenizer_name", folder / "tokenizer"]
    flags += ["--text_config", WITHOUT_DROPOUT, "--per_device_train_batch_size", 4, "--max_train_steps", 4]
    return [*flags, "--checkpointing_steps", 2]


@pytest.mark.parametrize("config, recompute", [("cpu_2_processes.yaml", "true"), ("deepspeed_zero2_cpu.yaml", "false")])
def test_a_compiled_run_trains_saves_and_resumes_as_a_plain_one(flags, tmp_path, config, recompute):
    flags = [*flags, "--gradient_checkpointing", recompute]

    def start(name: str, *more) -> tuple[Path, str]:
        result = run_ranks(config, COMPILED, [*flags, "--output_dir", tmp_path / name, *more])
        assert_succeeded(result)
        return tmp_path / name, result.stdout

    plain, _ = start("plain")
    compiled, printed = start("compiled", "--compile", "true")
    resumed, _ = start("resumed", "--compile", "true", "--resume_from_checkpoint", compiled / "checkpoint-2")
    assert re.search(r"^compiled \d+ graphs of the towers' layers in \d+ s$", printed, re.MULTILINE)
    expected, steps = steps_of(plain), steps_of(compiled)
    assert sorted(steps) == [1, 2, 3, 4]
    for step, values in expected.items():
        assert steps[step] == pytest.approx(values, rel=1e-4), step
    assert steps_of(resumed) == {step: values for step, values in steps.items() if step > 2}

    one, other = (load_file(folder / "last" / "model.safetensors") for folder in (plain, compiled))
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=1e-3, msg=name)
    model = AliBlipForImageTextRetrieval.from_pretrained(compiled / "last")
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(value.numel() for value in other.values())
    results = [json.loads((folder / "last" / "results.json").read_text()) for folder in (plain, compiled)]
    assert results[0]["num_images"] == results[1]["num_images"] == 8
