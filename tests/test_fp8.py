"""`--fp8`: near the plain step, refused where it can't be done, and without a trace in what is saved.

There is no GPU here: torchao computes the same roundings on the CPU. Without torchao only the refusals are tested.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import tiny
import torch
from runs import log_of, trained_in_process, write_split
from safetensors.torch import load_file
from torch import nn

from aliblip.runtime.mistakes import UsageError
from aliblip.training import fp8
from aliblip.training.arguments import TrainingArguments
from aliblip.training.fp8 import Float8Towers, check_fp8, check_fp8_device

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason='torchao is not installed (pip install -e ".[fp8]")'
)
SIZES = {
    "vision_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8},
    "text_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
}


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(Float8Towers, "emulate", True)


def itm_loss(model: nn.Module, batch: dict) -> torch.Tensor:
    """Something that photos, titles and cross-attention all have a part in."""
    return model(**batch, return_loss=True).loss


@needs_torchao
def test_products_in_8_bits_are_near_and_weights_stay_where_they_are(emulated):
    model = tiny.spread_model(text_config=SIZES["text_config"]).eval()
    batch = tiny.batch(rows=6, image_size=32) | {"product_id": torch.arange(6)}
    names, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    torch.manual_seed(0)
    exact = itm_loss(model, batch)
    exact.backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    towers = Float8Towers(model)
    assert towers.told().startswith("28 of 31 linear layers")  # not the two projections, and not the matching head
    assert list(model.state_dict()) == names and [id(parameter) for parameter in model.parameters()] == parameters
    torch.manual_seed(0)
    near = itm_loss(model, batch)
    near.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert not torch.equal(near, exact)
    torch.testing.assert_close(near, exact, rtol=0.03, atol=0)
    assert float(torch.cosine_similarity(gradient, expected, dim=0)) > 0.99
    with towers.paused():
        torch.manual_seed(0)
        assert torch.equal(itm_loss(model, batch), exact)
    torch.manual_seed(0)
    assert torch.equal(itm_loss(model, batch), near)


@needs_torchao
def test_layers_that_the_kernels_do_not_take_stay_as_they_are(emulated):
    model = tiny.model()  # BERT of width 24
    towers = Float8Towers(model)
    in_8_bits = {type(module) for module in model.text_encoder.modules()} - {nn.Linear}
    assert not any(issubclass(kind, nn.Linear) for kind in in_8_bits)
    assert towers.told() == "8 of 31 linear layers multiply in 8 bits, momentum encoders included"


@needs_torchao
def test_a_run_in_8_bits_learns_as_one_in_16_and_goes_on_without(emulated, tmp_path, accelerate_as_before, capsys):
    write_split(tmp_path / "data", "train", 40)
    write_split(tmp_path / "data", "validation", 16)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = ["--data_dir", tmp_path / "data", "--tokenizer_name", tmp_path / "tokenizer", "--mixed_precision", "bf16"]
    flags += ["--vision_config", json.dumps(SIZES["vision_config"]), "--text_config", json.dumps(SIZES["text_config"])]
    flags += ["--hardest_negatives", "true", "--checkpointing_steps", 6, "--max_train_steps", 10]
    trained_in_process(flags, tmp_path / "plain")
    trained_in_process([*flags, "--fp8", "true"], tmp_path / "fp8")
    assert "48 of 53 linear layers multiply in 8 bits, momentum encoders included" in capsys.readouterr().out
    plain, in_8_bits = (
        [line["loss_itc"] + line["loss_itm"] for line in log_of(tmp_path / name) if "loss_itc" in line]
        for name in ("plain", "fp8")
    )
    assert len(in_8_bits) == 10 and in_8_bits != plain
    assert in_8_bits == pytest.approx(plain, rel=0.05)
    first, second = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("plain", "fp8"))
    assert {key: value.dtype for key, value in first.items()} == {key: value.dtype for key, value in second.items()}
    assert "fp8" not in (tmp_path / "fp8" / "last" / "config.json").read_text()
    trained_in_process(
        [*flags, "--resume_from_checkpoint", tmp_path / "fp8" / "checkpoint-6"], tmp_path / "goes on without"
    )
    assert "resumed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, told",
    [
        ({}, "in bf16, and this one is in fp32: give --mixed_precision bf16"),
        ({"mixed_precision": "fp16"}, "this one is in fp16"),
        ({"mixed_precision": "bf16", "lora_rank": 4}, "--fp8 with --lora_rank"),
        (
            {"mixed_precision": "bf16"},
            r"needs a GPU \(Ada, Hopper or newer\), and this run is on the CPU: leave it out",
        ),
    ],
)
def test_what_can_not_be_done_in_8_bits_is_refused(flags, told, monkeypatch):
    monkeypatch.setattr(fp8.importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    with pytest.raises(UsageError, match=told):
        check_fp8(TrainingArguments(output_dir="run", fp8=True, **flags), torch.device("cpu"))
    check_fp8(TrainingArguments(output_dir="run", **flags), torch.device("cpu"))


def test_without_torchao_the_command_that_installs_it_is_named(monkeypatch):
    monkeypatch.setattr(fp8.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--fp8 needs torchao: .*pip install -e .*\[fp8\]"):
        check_fp8(TrainingArguments(output_dir="run", fp8=True, mixed_precision="bf16"), None)


def test_an_older_gpu_is_told_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UsageError, match="and this one is a NVIDIA A100: leave it out"):
        check_fp8_device(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    check_fp8_device(torch.device("cuda", 0))


@needs_torchao
def test_transformers_loads_torchao_and_nothing_is_printed():
    from helpers import ROOT, assert_succeeded, run

    result = run([sys.executable, "-c", "import train, sys; print('torchao' in sys.modules)"], cwd=ROOT)
    assert_succeeded(result)
    assert "torchao/_C" not in result.stderr and "KernelPreference" not in result.stderr
