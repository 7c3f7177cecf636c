"""What of a model is trained, and how fast: frozen parts, a learning rate for each tower, layer-wise decay."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
import torch
from helpers import assert_succeeded, run_ranks
from runs import TINY, log_of, steps_of, trained_in_process, write_split
from safetensors.torch import load_file

import train
from aliblip.runtime.mistakes import UsageError
from aliblip.training.arguments import TrainingArguments
from aliblip.training.building import build_optimizer
from aliblip.training.freezing import PARTS, freeze, frozen_parts, part_of
from aliblip.training.optim import RateScales, rate_scales, set_learning_rate


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list:
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder / "data", "train", 32)
    write_split(folder / "data", "validation", 8)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return ["--data_dir", folder / "data", "--tokenizer_name", folder / "tokenizer"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


# --- which part, which rate -------------------------------------------------------------------------------------------


def test_every_parameter_is_of_one_part():
    model = tiny.model()
    names = [name for name, _ in model.named_parameters()]
    assert {part_of(name) for name in names} == PARTS.keys()
    assert part_of("text_encoder.encoder.layer.1.crossattention.self.key.weight") == "cross_attention"
    assert part_of("text_encoder.encoder.layer.1.attention.self.key.weight") == "text"
    freeze(model, ["text", "itm_head"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {name for name in names if part_of(name) in ("text", "itm_head")}
    freeze(model, [])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_flag_is_a_list_of_parts():
    assert frozen_parts(None) == frozen_parts("") == ()
    assert frozen_parts("temperature, vision,vision") == ("vision", "temperature")
    with pytest.raises(UsageError, match="--freeze names 'visual': give a list of vision, text, cross_attention, "):
        frozen_parts("text,visual")
    with pytest.raises(UsageError, match="--freeze leaves nothing to train"):
        frozen_parts("vision,text,cross_attention,projections,itm_head")  # the temperature alone is no training


def test_rates_of_towers_and_layers():
    scales = RateScales(temperature=0.1, vision=0.5, text=2.0, layer_decay=0.8, vision_layers=2, text_layers=3)
    of = {
        "temp": 0.1,
        "itm_head.weight": 1.0,
        "vision_proj.bias": 1.0,
        "vision_model.post_layernorm.weight": 0.5,
        "vision_model.encoder.layers.1.mlp.fc1.weight": 0.5 * 0.8,
        "vision_model.encoder.layers.0.mlp.fc1.weight": 0.5 * 0.8**2,
        "vision_model.embeddings.class_embedding": 0.5 * 0.8**3,
        "text_encoder.encoder.layer.2.crossattention.self.key.weight": 2.0 * 0.8,
        "text_encoder.encoder.layer.0.output.dense.bias": 2.0 * 0.8**3,
        "text_encoder.embeddings.word_embeddings.weight": 2.0 * 0.8**4,
    }
    assert {name: scales.of(name) for name in of} == pytest.approx(of)


def test_the_optimizer_has_the_rates_and_not_what_is_frozen():
    model = tiny.model()
    freeze(model, ["cross_attention", "temperature"])
    args = TrainingArguments(
        learning_rate=1e-3, vision_learning_rate=1e-4, layer_decay=0.5, freeze="cross_attention,temperature"
    )
    optimizer = build_optimizer(model, args)
    set_learning_rate(optimizer, 1e-3 / 2)  # half-way through a schedule
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {n for n in names.values() if part_of(n) not in ("cross_attention", "temperature")}
    assert rates["vision_model.encoder.layers.1.mlp.fc2.weight"] == pytest.approx(1e-4 / 2 * 0.5)
    assert rates["vision_model.embeddings.class_embedding"] == pytest.approx(1e-4 / 2 * 0.5**3)
    assert rates["text_encoder.encoder.layer.0.attention.self.query.bias"] == pytest.approx(1e-3 / 2 * 0.5**2)
    assert rates["itm_head.bias"] == pytest.approx(1e-3 / 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"freeze": "vision", "vision_learning_rate": 1e-4}, "--vision_learning_rate is of a part that --freeze names"),
        ({"freeze": "temperature", "temperature_learning_rate": 0.0}, "--temperature_learning_rate is of a part"),
        ({"freeze": "text,cross_attention", "text_learning_rate": 1.0}, "--text_learning_rate is of a part"),
        ({"learning_rate": 0.0, "text_learning_rate": 1e-4}, "--text_learning_rate beside --learning_rate 0"),
    ],
)
def test_rates_that_say_nothing_are_refused(given, message):
    with pytest.raises(UsageError, match=message):
        rate_scales(TrainingArguments(**given), 2, 2)


def test_a_frozen_text_tower_leaves_a_rate_for_its_cross_attention():
    assert rate_scales(TrainingArguments(freeze="text", text_learning_rate=1e-6), 2, 2).text == pytest.approx(0.1)


# --- runs -------------------------------------------------------------------------------------------------------------

SHORT = ["--num_train_epochs", 2, "--max_train_steps", 6, "--evaluate_every", 0, "--checkpointing_steps", 2]


@pytest.mark.parametrize("frozen", ["vision", "text,temperature", "cross_attention,projections,itm_head"])
def test_what_is_frozen_stays_and_a_resumed_run_repeats_it(flags, tmp_path, capsys, frozen):
    rates = ["--layer_decay", 0.7, "--temperature_learning_rate", 1e-4] if frozen == "vision" else []
    flags = [*flags, *SHORT, *rates, "--freeze", frozen]
    whole = tmp_path / "whole"
    trained_in_process(flags, whole)
    assert " M frozen) for 6 steps" in capsys.readouterr().out
    first, last = weights_of(whole / "checkpoint-2"), weights_of(whole / "checkpoint-6")
    parts = frozen.split(",")
    for name, value in last.items():
        assert torch.equal(first[name], value) == (part_of(name) in parts or "position_ids" in name), name
    # The momentum encoders of what is frozen are its copies, to the last bit.
    momentum = load_file(whole / "checkpoint-6" / "momentum.safetensors")
    for name, value in momentum.items():
        inner = name.removeprefix("encoders.")
        if name != inner:
            assert torch.equal(value, last[inner]) == (part_of(inner) in parts), name
    optimizer = load_file(whole / "checkpoint-6" / "optimizer.safetensors")
    assert {part_of(key.partition(".")[2]) for key in optimizer} == PARTS.keys() - set(parts)

    trained_in_process([*flags, "--resume_from_checkpoint", whole / "checkpoint-2"], tmp_path / "resumed")
    assert steps_of(tmp_path / "resumed") == {step: values for step, values in steps_of(whole).items() if step > 2}
    resumed = weights_of(tmp_path / "resumed" / "last")
    assert all(torch.equal(value, resumed[name]) for name, value in weights_of(whole / "last").items())


def test_a_run_that_goes_on_with_other_parts_says_so(flags, tmp_path, capsys):
    folder = tmp_path / "run"
    trained_in_process([*flags, *SHORT, "--freeze", "vision"], folder)
    more = ["--freeze", "text", "--num_train_epochs", 4, "--max_train_steps", 8, "--resume_from_checkpoint", "last"]
    trained_in_process([*flags, *SHORT, *more], folder)
    assert "freeze was vision, is text" in capsys.readouterr().out
    before, after = weights_of(folder / "checkpoint-6"), weights_of(folder / "checkpoint-8")
    moved = {part_of(name) for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == PARTS.keys() - {"text"}


def test_two_processes_and_zero2_keep_what_is_frozen(flags, tmp_path):
    """Under ZeRO-2 in bf16 the engine casts frozen weights too: what is saved, and what the momentum encoders follow,
    are the fp32 ones."""
    flags = [*TINY, *flags, *SHORT, "--per_device_train_batch_size", 4, "--freeze", "vision,temperature"]
    saved = {}
    for name in ("cpu_2_processes", "deepspeed_zero2_cpu_bf16"):
        folder = tmp_path / name
        assert_succeeded(run_ranks(f"{name}.yaml", "train.py", [*flags, "--output_dir", folder]))
        saved[name] = weights_of(folder / "last")
        momentum = load_file(folder / "checkpoint-6" / "momentum.safetensors")
        for weight, value in saved[name].items():
            if part_of(weight) == "vision":
                assert torch.equal(momentum[f"encoders.{weight}"], value)
    ddp, zero = saved.values()
    for name, value in ddp.items():
        frozen = part_of(name) in ("vision", "temperature")
        assert torch.equal(value, zero[name]) == frozen, name
    # bf16 has none of these numbers.
    assert not torch.equal(
        ddp["vision_model.encoder.layers.0.mlp.fc1.weight"].bfloat16().float(),
        ddp["vision_model.encoder.layers.0.mlp.fc1.weight"],
    )
    ddp, zero = (steps_of(tmp_path / name) for name in saved)
    assert all(zero[step][:2] == pytest.approx(values[:2], rel=0.05) for step, values in ddp.items())
    # It goes on, and with more that is frozen too: the optimizer's state of that has no place any more.
    folder = tmp_path / "deepspeed_zero2_cpu_bf16"
    more = ["--freeze", "vision,text", "--num_train_epochs", 3, "--max_train_steps", 8]
    more += ["--resume_from_checkpoint", "last", "--output_dir", folder]
    assert_succeeded(run_ranks("deepspeed_zero2_cpu_bf16.yaml", "train.py", [*flags, *more]))
    after = weights_of(folder / "last")
    moved = {part_of(name) for name, value in after.items() if not torch.equal(value, saved[folder.name][name])}
    assert moved == {"cross_attention", "projections", "itm_head", "temperature"}
    assert max(entry["step"] for entry in log_of(folder)) == 8


def test_mistakes_are_told_before_anything_starts(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["train.py", *TINY, *map(str, flags), "--output_dir", str(tmp_path / "run"), "--freeze", "bert"]
    )
    with pytest.raises(UsageError, match="--freeze names 'bert'"):
        train.main()
    assert not (tmp_path / "run").exists()


def test_the_doctor_knows_what_is_frozen(flags, tmp_path, monkeypatch, capsys):
    told = []
    for frozen in ([], ["--freeze", "vision"]):
        argv = ["train.py", *TINY, *flags, "--output_dir", tmp_path / "run", "--dry_run", "--compared_rows", 0, *frozen]
        monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
        assert train.main() == 0
        told.append(capsys.readouterr().out)
    assert "--freeze: vision" in told[1] and "--freeze" not in told[0]

    def numbers(printed: str) -> tuple[str, str]:
        memory = next(line for line in printed.splitlines() if "activations" in line)
        return memory, next(line for line in printed.splitlines() if " FLOPs: " in line)

    assert all(one != other for one, other in zip(*map(numbers, told), strict=True))
