"""fp16 with loss scaling: steps that overflow change nothing, the scale follows, and a resumed run has it again.

accelerate scales on a GPU alone; here its Accelerator is given torch's scaler for the CPU.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import tiny
import torch
from pretended import DEVICE, PretendedDevice, accelerator_on_it
from runs import log_of, steps_of, trained_in_process, write_split
from safetensors.torch import load_file

from aliblip.runtime.accelerator import check_launch, describe_machine
from aliblip.runtime.mistakes import UsageError
from aliblip.training import setup as setting
from aliblip.training.objective import RetrievalObjective
from aliblip.training.run import Run
from aliblip.training.step import load_loss_scale_state, loss_scale_state


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list:
    """Five steps an epoch."""
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder / "data", "train", 40)
    write_split(folder / "data", "validation", 8)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return ["--data_dir", folder / "data", "--tokenizer_name", folder / "tokenizer", "--evaluate_every", 0]


SHORT = ["--num_train_epochs", 2, "--checkpointing_steps", 2]


@pytest.fixture
def in_fp16(monkeypatch):
    """Lets runs be in fp16, whose scale begins where the test says."""
    plain = setting.build_accelerator

    def begin(scale: float, growth_interval: int = 3) -> None:
        def build(**options):
            assert options.pop("mixed_precision") == "fp16" and "fp16" in options["precisions"]
            accelerator = plain(**options)
            accelerator.state._mixed_precision = "fp16"
            accelerator.native_amp = True
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
            assert accelerator.autocast_dtype == torch.float16
            assert describe_machine(accelerator)["precision"] == "fp16 mixed precision"
            return accelerator

        monkeypatch.setattr(setting, "build_accelerator", build)

    return begin


FP16 = ["--mixed_precision", "fp16"]


def tensors(folder: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / f"{name}.safetensors")


def test_a_run_in_fp16_is_near_the_one_in_fp32_and_ends_with_a_model(flags, tmp_path, in_fp16):
    flags = [*flags, "--evaluate_every", 1, "--num_train_epochs", 1]
    trained_in_process(flags, tmp_path / "fp32")
    in_fp16(1024.0)
    trained_in_process([*flags, *FP16], tmp_path / "fp16")
    plain, half = steps_of(tmp_path / "fp32"), steps_of(tmp_path / "fp16")
    assert plain.keys() == half.keys() and plain != half
    for step, values in plain.items():
        assert half[step] == pytest.approx(values, rel=0.02), step
    assert all(value.dtype == torch.float32 for value in load_file(tmp_path / "fp16/best/model.safetensors").values())
    scales = [entry["loss_scale"] for entry in log_of(tmp_path / "fp16") if "loss_itc" in entry]
    assert scales == [1024.0, 1024.0, 2048.0, 2048.0, 2048.0]  # three good steps double it


def test_a_step_that_overflows_changes_nothing_and_halves_the_scale(flags, tmp_path, in_fp16, capsys):
    folder = tmp_path / "whole"
    in_fp16(2.0**14, growth_interval=4)
    flags = [*flags, *SHORT, *FP16, "--checkpointing_steps", 1]
    trained_in_process(flags, folder)
    left_out = [entry["step"] for entry in log_of(folder) if "steps_left_out" in entry]
    assert 1 in left_out and 10 not in left_out, "the scale is too high at first, and fits at last"
    scales = [tensors(folder, step, "ranks")["0.loss_scale"].item() for step in range(1, 11)]
    before = 2.0**14
    for step, scale in enumerate(scales, 1):
        assert scale == before / 2 if step in left_out else scale in (before, 2 * before), (step, scales)
        before = scale
    for step in left_out[1:]:
        for name in ("model", "optimizer"):
            one, other = tensors(folder, step - 1, name), tensors(folder, step, name)
            assert all(torch.equal(value, other[key]) for key, value in one.items()), (step, name)
    (taken, *_) = [step for step in range(2, 11) if step not in left_out]
    one, other = tensors(folder, taken - 1, "model"), tensors(folder, taken, "model")
    assert any(not torch.equal(value, other[key]) for key, value in one.items())
    assert "in fp16 a few are usual: the loss scale is lowered until it fits" in capsys.readouterr().out

    # In the middle of that it goes on with the scale that it had, and the steps since it last changed.
    for step in (1, taken + 1):
        again = tmp_path / f"again{step}"
        trained_in_process([*flags, "--resume_from_checkpoint", folder / f"checkpoint-{step}"], again)
        entries = [entry for entry in log_of(folder) if entry["step"] > step]
        for one, other in zip(entries, log_of(again), strict=True):
            for name in ("loss_itc", "loss_itm", "grad_norm", "learning_rate", "loss_scale", "steps_left_out"):
                assert one.get(name) == other.get(name), (one["step"], name)
        for name in ("model", "optimizer", "momentum", "ranks"):
            one, other = tensors(folder, 10, name), tensors(again, 10, name)
            assert all(torch.equal(value, other[key]) for key, value in one.items()), name


def test_a_loss_that_is_not_finite_ends_an_fp16_run_as_any_other(flags, tmp_path, in_fp16, monkeypatch):
    in_fp16(1024.0)
    forward, calls = RetrievalObjective.forward, []

    def broken(self, *args):
        calls.append(1)
        output = forward(self, *args)
        return dataclasses.replace(output, loss=output.loss * torch.nan) if len(calls) > 3 else output

    monkeypatch.setattr(RetrievalObjective, "forward", broken)
    folder = tmp_path / "run"
    with pytest.raises(UsageError, match="no finite loss or gradient in 2 steps in a row"):
        trained_in_process([*flags, *SHORT, *FP16, "--max_non_finite_steps", 2], folder)
    # The checkpoint is from before them, with the scale of then.
    assert tensors(folder, 3, "ranks")["0.loss_scale"].item() == 2048.0
    assert json.loads((folder / "checkpoint-3" / "state.json").read_text())["left_out"] == 0
    monkeypatch.setattr(RetrievalObjective, "forward", forward)
    trained_in_process([*flags, *SHORT, *FP16, "--resume_from_checkpoint", "last"], folder)
    trained_in_process([*flags, *SHORT, *FP16], tmp_path / "whole")
    assert steps_of(folder) == steps_of(tmp_path / "whole")


def test_the_scale_of_another_precision_begins_anew():
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    assert loss_scale_state(scaler) == loss_scale_state(None) == {}
    load_loss_scale_state(scaler, {"torch": torch.zeros(1)})
    load_loss_scale_state(None, {"loss_scale": torch.tensor(2.0)})
    scaler.scale(torch.tensor(1.0))
    assert scaler.get_scale() == 8.0
    load_loss_scale_state(scaler, {"loss_scale": torch.tensor(2.0), "loss_scale_steps": torch.tensor(7)})
    assert {name: value.item() for name, value in loss_scale_state(scaler).items()} == {
        "loss_scale": 2.0,
        "loss_scale_steps": 7,
    }


@pytest.mark.filterwarnings("ignore:CUDA is not available")  # so nothing is cast; the scaler does all that it does
def test_a_step_in_fp16_waits_no_more_often_than_others(flags, tmp_path, in_fp16, monkeypatch):
    in_fp16(1024.0)
    waits = []
    plain = Run.after_step
    with PretendedDevice() as device, accelerator_on_it():

        def after_step(run, *args):
            plain(run, *args)
            assert next(run.training.model.parameters()).device == DEVICE
            waits.append(device.waits.total())
            device.waits.clear()

        monkeypatch.setattr(Run, "after_step", after_step)
        more = ["--max_train_steps", 4, "--logging_steps", 4, "--momentum_dropout", "true"]
        trained_in_process([*flags, *FP16, *more], tmp_path / "run")
    assert waits[1:3] == [1, 1] and waits[3] <= 2


def test_what_fp16_needs_is_told_at_once(monkeypatch):
    given = {"mixed_precision": "fp16", "gradient_accumulation_steps": 1, "max_grad_norm": 1.0}
    given["per_device_train_batch_size"] = 4
    with pytest.raises(UsageError, match="fp16 needs a GPU, and there is none"):
        check_launch(**given, precisions=("no", "bf16", "fp16"))
    with pytest.raises(UsageError, match="--mixed_precision is 'fp16'; accepted are no, bf16: use bf16"):
        check_launch(**given)  # of an evaluation
    assert check_launch(**given, precisions=("no", "bf16", "fp16"), elsewhere=True).precision == "fp16"  # of a plan
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert str(check_launch(**given, precisions=("no", "bf16", "fp16"))) == "1 process on GPU, fp16 mixed precision"
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UsageError, match="fp16 is not done under DeepSpeed"):
        check_launch(**given, precisions=("no", "bf16", "fp16"))
