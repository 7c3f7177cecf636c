"""LoRA in `train.py`: adapters of a trained model are trained, saved alone, and merged by one command."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from helpers import assert_succeeded, run_ranks
from runs import TINY, log_of, steps_of, trained_in_process, write_split
from safetensors.torch import load_file
from transformers import AutoModel

import evaluate_retrieval
import train
from aliblip import convert
from aliblip.models.loading import load_pretrained
from aliblip.retrieval import adapters
from aliblip.runtime.mistakes import UsageError
from aliblip.training import lora
from aliblip.training.arguments import ModelArguments, TrainingArguments
from aliblip.training.flops import training_flops
from aliblip.training.lora import check_lora
from modeling_aliblip import AliBlipForImageTextRetrieval

needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="PEFT is not installed (the extra peft)"
)
# Of TINY what a trained model brings itself is left out.
OF_A_NEW_MODEL = ("--config_name", "--vision_config", "--text_config", "--image_size", "--image_text_hidden_size")
TRAINED = [word for flag in zip(TINY[::2], TINY[1::2], strict=True) if flag[0] not in OF_A_NEW_MODEL for word in flag]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder, "train", 40)
    write_split(folder, "validation", 12)
    return folder


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    processor = tiny.processor()
    tiny.model(vocab_size=len(processor.tokenizer)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def flags(data, base) -> list:
    return ["--data_dir", data, "--model_name_or_path", base, "--lora_rank", 4, "--learning_rate", 1e-2]


def adapted(flags: list, folder: Path) -> None:
    """`trained_in_process` of a model that brings its own shape."""
    trained_in_process(flags, folder, TRAINED)


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    adapted([*flags, "--num_train_epochs", 2, "--checkpointing_steps", 4, "--peak_tflops", 1], folder)
    return folder


def logits(model) -> torch.Tensor:
    batch = tiny.batch(4, vocab_size=20)
    with torch.no_grad():
        return model.eval()(batch["pixel_values"], batch["input_ids"], batch["attention_mask"]).logits_per_image


@needs_peft
def test_adapters_alone_are_trained_and_saved(whole, base):
    own = load_file(base / "model.safetensors")
    first, last = (load_file(whole / f"checkpoint-{step}" / "model.safetensors") for step in (4, 10))
    of_base = {name.replace(".base_layer", ""): value for name, value in last.items() if ".lora_" not in name}
    assert of_base.keys() == own.keys() and all(torch.equal(value, own[name]) for name, value in of_base.items())
    moved = [name for name, value in last.items() if not torch.equal(value, first[name])]
    # 2 ViT layers of two matrices, 2 BERT layers of six, three heads: two matrices for each.
    assert len(moved) == 2 * (2 * 2 + 2 * 6 + 3) and all(".lora_" in name for name in moved)
    optimizer = load_file(whole / "checkpoint-10" / "optimizer.safetensors")
    assert {key.partition(".")[2] for key in optimizer} == set(moved)
    for name in ("best", "last"):
        files = {file.name for file in (whole / name).iterdir()}
        assert {"adapter_model.safetensors", "adapter_config.json", "results.json", "tokenizer.json"} <= files
        assert not {"model.safetensors", "config.json"} & files
        assert (whole / name / "adapter_model.safetensors").stat().st_size < (base / "model.safetensors").stat().st_size
    written = json.loads((whole / "best" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["r"], written["lora_alpha"]) == (str(base), 4, 8.0)
    assert all(entry["mfu"] > 0 for entry in log_of(whole) if "loss_itc" in entry)


@needs_peft
def test_a_run_of_adapters_resumes_bit_by_bit(whole, flags, tmp_path):
    more = ["--num_train_epochs", 2, "--resume_from_checkpoint", whole / "checkpoint-4"]
    adapted([*flags, *more], tmp_path / "run")
    assert steps_of(tmp_path / "run") == {step: values for step, values in steps_of(whole).items() if step > 4}
    one, other = (load_file(f / "last" / "adapter_model.safetensors") for f in (whole, tmp_path / "run"))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@needs_peft
def test_an_adapter_is_loaded_measured_and_merged(whole, base, data, tmp_path, monkeypatch):
    expected = logits(AutoModel.from_pretrained(whole / "last"))
    assert not torch.allclose(logits(AutoModel.from_pretrained(base)), expected, atol=1e-2)
    model, _, _ = load_pretrained(str(whole / "last"))
    assert not adapters.is_adapted(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-4)

    argv = ["convert", "--model_name_or_path", str(whole / "last"), "--output_dir", str(tmp_path / "merged")]
    monkeypatch.setattr(sys, "argv", argv)
    convert.main()
    plain = AliBlipForImageTextRetrieval.from_pretrained(tmp_path / "merged")
    assert plain.state_dict().keys() == tiny.model().state_dict().keys()
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-4)

    # The evaluation of the run is that of its adapter.
    told = json.loads((whole / "last" / "results.json").read_text())
    argv = ["evaluate_retrieval.py", "--model_name_or_path", whole / "last", "--data_dir", data, "--k_rerank", 4]
    argv += ["--split_name", "validation", "--output_dir", tmp_path / "measured", "--dataloader_num_workers", 0]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    try:
        evaluate_retrieval.main()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    measured = json.loads((tmp_path / "measured" / "results.json").read_text())
    assert measured["mean_recall"] == pytest.approx(told["mean_recall"])


@pytest.mark.parametrize("named", [None, 3, ""])
def test_an_adapter_that_names_no_model_is_refused(named, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    with pytest.raises(UsageError, match="adapter_config.json of .* names no model"):
        load_pretrained(str(tmp_path))


@needs_peft
def test_under_zero2_in_bf16_adapters_are_trained_and_saved_in_fp32(flags, base, tmp_path):
    folder = tmp_path / "run"
    more = ["--max_train_steps", 2, "--evaluate_every", 0, "--checkpointing_steps", 1, "--output_dir", folder]
    more += ["--per_device_train_batch_size", 4]
    assert_succeeded(run_ranks("deepspeed_zero2_cpu_bf16.yaml", "train.py", [*TRAINED, *flags, *more]))
    saved = load_file(folder / "last" / "adapter_model.safetensors")
    assert all(value.dtype == torch.float32 for value in saved.values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in saved.values())
    own = load_file(base / "model.safetensors")
    for name, value in load_file(folder / "checkpoint-2" / "model.safetensors").items():
        if ".lora_" not in name:
            assert torch.equal(value, own[name.replace(".base_layer", "")]), name


def test_what_adapters_do_not_go_with_is_refused(base, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "has_peft", lambda: True)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")

    def refused(model: dict, **given) -> str:
        with pytest.raises(UsageError) as raised:
            check_lora(ModelArguments(**model), TrainingArguments(**given))
        assert "\n" not in str(raised.value)
        return str(raised.value)

    trained = {"model_name_or_path": str(base)}
    check_lora(ModelArguments(**trained), TrainingArguments(lora_rank=4, layer_decay=0.8))
    assert "--lora_alpha without --lora_rank" in refused(trained, lora_alpha=8.0)
    assert "give --model_name_or_path" in refused({"config_name": "base"}, lora_rank=4)
    (tmp_path / "model.pth").touch()
    assert "is an original file" in refused({"model_name_or_path": str(tmp_path / "model.pth")}, lora_rank=4)
    assert "is an adapter" in refused({"model_name_or_path": str(tmp_path / "adapter")}, lora_rank=4)
    assert "--image_size with --lora_rank" in refused({**trained, "image_size": 64}, lora_rank=4)
    assert "--freeze with --lora_rank: adapters alone" in refused(trained, lora_rank=4, freeze="vision")
    assert "--compile with --lora_rank" in refused(trained, lora_rank=4, compile=True)
    assert "--push_to_hub with --lora_rank: merge" in refused(trained, lora_rank=4, push_to_hub=True)
    assert "--temperature_learning_rate with" in refused(trained, lora_rank=4, temperature_learning_rate=1.0)
    monkeypatch.setattr(lora, "has_peft", lambda: False)
    message = refused(trained, lora_rank=4)
    assert message.startswith("--lora_rank needs PEFT: ") and "peft" in message.partition(": ")[2]


@needs_peft
def test_the_doctor_knows_adapters(whole, flags, tmp_path, monkeypatch, capsys):
    argv = ["train.py", *TRAINED, *flags, "--output_dir", tmp_path / "run", "--dry_run", "--compared_rows", 0]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    assert train.main() == 0
    matrices = load_file(whole / "last" / "adapter_model.safetensors").values()
    told = f"adapters of rank 4 are trained alone: {sum(matrix.numel() for matrix in matrices):,} parameters"
    assert told in capsys.readouterr().out


def test_adapters_spare_the_gradients_of_the_weights():
    config = tiny.config()
    everything, some = training_flops(config, 9, 64), training_flops(config, 9, 64, adapters=True)
    assert 0.6 < some / everything < 0.75  # forward and one of two in the backward pass
