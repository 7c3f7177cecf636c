"""What was expensive is there after anything that fails, damage is noticed, and the restart command always works."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from runs import TINY, log_of, trained_in_process, write_split
from safetensors.torch import save
from transformers import AutoModel

import train
from aliblip.retrieval.arguments import EvaluationArguments
from aliblip.retrieval.model_folder import load_folder
from aliblip.retrieval.writing import store_with_the_model
from aliblip.runtime.mistakes import UsageError
from aliblip.training import checkpoint
from aliblip.training import run as course
from aliblip.training.carried import read_momentum
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder / "data", "train", 16)
    write_split(folder / "data", "validation", 8)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return ["--data_dir", str(folder / "data"), "--tokenizer_name", str(folder / "tokenizer")]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """A run of two epochs, a checkpoint after each of its four steps."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    trained_in_process([*flags, "--checkpointing_steps", 1, "--num_train_epochs", 2], folder)
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def refused(flags, monkeypatch):
    def message(folder: Path, *more) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", *TINY, *flags, "--output_dir", str(folder), *map(str, more)])
        for stream in ("stdout", "stderr"):
            monkeypatch.setattr(sys, stream, getattr(sys, stream))
        try:
            with pytest.raises(UsageError) as raised:
                train.main()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return message


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


# --- checksums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model", "optimizer", "momentum", "ranks"])
def test_one_flipped_bit_is_refused_and_an_older_checkpoint_proposed(name, copied, refused):
    file = copied / "checkpoint-3" / f"{name}.safetensors"
    flip(file, file.stat().st_size - 5)
    shutil.rmtree(copied / "checkpoint-4")
    told = refused(copied, "--resume_from_checkpoint", "last")
    assert (
        f"checkpoint-3 is damaged (the checksum of {name}.safetensors is another): go on from the one before it" in told
    )
    assert told.endswith(f"--resume_from_checkpoint {copied / 'checkpoint-2'}")
    # nothing is left to go back to
    first = copied / "checkpoint-1" / f"{name}.safetensors"
    flip(first, first.stat().st_size - 5)
    assert "resume from another checkpoint" in refused(copied, "--resume_from_checkpoint", copied / "checkpoint-1")


def test_a_changed_counter_is_refused_too_and_a_checkpoint_without_checksums_is_taken(copied, refused, flags):
    state = copied / "checkpoint-4" / "state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps({**content, "left_out": 1}))
    assert "damaged (the checksum of state.json is another)" in refused(copied, "--resume_from_checkpoint", "last")
    # of version 0.1
    state.write_text(json.dumps({key: value for key, value in content.items() if not key.startswith("checksum")}))
    trained_in_process([*flags, "--num_train_epochs", 3, "--resume_from_checkpoint", "last"], copied)
    assert [entry["step"] for entry in log_of(copied) if "loss_itc" in entry] == [1, 2, 3, 4, 5, 6]


# --- a checkpoint is a model ------------------------------------------------------------------------------------------


def test_a_checkpoint_is_a_model(finished):
    model = AliBlipForImageTextRetrieval.from_pretrained(finished / "checkpoint-4")
    last = AliBlipForImageTextRetrieval.from_pretrained(finished / "last")
    assert all(torch.equal(value, last.state_dict()[name]) for name, value in model.state_dict().items())
    processor = AliBlipProcessor.from_pretrained(finished / "checkpoint-4")
    assert len(processor.tokenizer) == model.config.text_config.vocab_size
    assert isinstance(AutoModel.from_pretrained(finished / "checkpoint-4"), AliBlipForImageTextRetrieval)
    beside = {path.name for path in (finished / "last").iterdir() if path.suffix != ".py"} - {"results.json"}
    assert beside <= {path.name for path in (finished / "checkpoint-4").iterdir()}
    # the run's own average and queues are for the run that goes on
    assert read_momentum(finished / "checkpoint-4") is None


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_one_flipped_bit_is_refused_where_a_checkpoint_is_taken_as_a_model(name, copied):
    folder = copied / "checkpoint-4"
    load_folder(str(folder))
    flip(folder / name, -9)
    with pytest.raises(UsageError, match=f"checkpoint-4 is damaged \\(the checksum of {name} is another\\)"):
        load_folder(str(folder))


def test_what_is_tuned_on_a_checkpoint_leaves_it_to_its_run(copied, capsys):
    folder = copied / "checkpoint-3"
    before = contents(folder)
    store_with_the_model("the weight", {"fusion_weight": 7.0}, "give --x 7", EvaluationArguments(str(folder)))
    assert contents(folder) == before
    assert "the weight is not stored with the model (a checkpoint, " in capsys.readouterr().out


# --- the epoch before its evaluation ----------------------------------------------------------------------------------


def test_an_evaluation_that_fails_costs_no_epoch(flags, finished, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise RuntimeError("out of memory")

    folder = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(course, "evaluate_retrieval", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            trained_in_process([*flags, "--num_train_epochs", 1], folder)
    saved = AliBlipForImageTextRetrieval.from_pretrained(folder / "last").state_dict()
    after = AliBlipForImageTextRetrieval.from_pretrained(finished / "checkpoint-2").state_dict()
    assert saved.keys() == after.keys() and not (folder / "last" / "results.json").exists()
    # the schedules of one epoch and of two differ; the step of the first is the same
    assert not torch.equal(saved["vision_proj.weight"], tiny.model().vision_proj.weight)
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"
    results = json.loads((finished / "last" / "results.json").read_text())
    assert results == log_of(finished)[-1]["evaluation"]


def test_nothing_is_deleted_before_the_trackers_have_begun(copied, refused, flags, monkeypatch):
    before = contents(copied)

    def fails(*args, **kwargs):
        raise PermissionError("no access to the tracking server")

    with monkeypatch.context() as patched:
        patched.setattr("accelerate.Accelerator.init_trackers", fails)
        told = refused(copied, "--overwrite_output_dir", "--report_to", "tensorboard")
    assert told == (
        "--report_to tensorboard can't begin (no access to the tracking server): see to it, or give --report_to none"
    )
    assert contents(copied) == before
    # nor what comes after a checkpoint that is gone back to, nor its lines of the log
    with monkeypatch.context() as patched:
        patched.setattr("accelerate.Accelerator.init_trackers", fails)
        resume = ("--resume_from_checkpoint", copied / "checkpoint-2")
        assert "can't begin" in refused(copied, *resume, "--report_to", "tensorboard", "--num_train_epochs", 2)
    assert "momentum encoders or queues" in refused(copied, *resume, "--queue_size", 7)
    before.pop("status.json"), (status := contents(copied)).pop("status.json")
    assert status == before
    # and then what was there goes, and what the trackers have begun stays
    (copied / "logs").mkdir()
    (copied / "logs" / "events.old").write_text("old")
    flags = [*flags, "--overwrite_output_dir", "--report_to", "tensorboard", "--num_train_epochs", 1]
    trained_in_process(flags, copied)
    assert not list(copied.glob("checkpoint-*")) and not (copied / "logs" / "events.old").exists()
    assert [path for path in (copied / "logs").rglob("*") if "tfevents" in path.name]
    assert max(entry["step"] for entry in log_of(copied)) == 2


def test_a_begin_that_fails_in_a_new_folder_leaves_it_new(tmp_path, refused, monkeypatch):
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda *_, **__: int("no"))
    assert "can't begin" in refused(tmp_path / "run", "--report_to", "tensorboard")
    assert not (tmp_path / "run" / "arguments.json").exists()


# --- the restart command ----------------------------------------------------------------------------------------------


def test_the_restart_command_works_at_any_moment(flags, tmp_path, refused, capsys):
    folder = tmp_path / "run"
    command = [*flags, "--checkpointing_steps", 1, "--num_train_epochs", 1, "--resume_from_checkpoint", "last"]
    trained_in_process(command, folder)  # before the very first start
    assert f"{folder} has no checkpoint yet: the run starts anew" in capsys.readouterr().out
    whole = contents(folder / "last")
    for name in ("checkpoint-1", "checkpoint-2", "best", "last"):  # a run that died before its first checkpoint
        shutil.rmtree(folder / name)
    (folder / "log.jsonl").write_text('{"step": 1, "loss_itc": 3.0}\n{"st')
    trained_in_process(command, folder)
    assert "the run starts anew" in capsys.readouterr().out
    assert contents(folder / "last")["model.safetensors"] == whole["model.safetensors"]
    assert [entry["step"] for entry in log_of(folder) if "loss_itc" in entry] == [1, 2]
    trained_in_process(command, folder)  # and when all is done
    assert "starts anew" not in capsys.readouterr().out
    # models that no checkpoint goes with are not replaced unasked
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.rmtree(folder / name)
    told = refused(folder, "--resume_from_checkpoint", "last")
    assert "has no checkpoint to go on from, but the model 'last' that starting anew would replace" in told
    assert contents(folder / "last")["model.safetensors"] == whole["model.safetensors"]
    trained_in_process([*command, "--overwrite_output_dir"], folder)
    assert "the run starts anew" in capsys.readouterr().out


# --- forged checkpoints -----------------------------------------------------------------------------------------------

FORGED = {
    "files": [],
    "checksums": "all",
    "ranks": {"0": {}},
    "momentum": [1],
    "order": 7,
    "manifest": {},
    "arguments": None,
    "step": "four",
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_state_with_a_right_checksum_is_refused_in_one_line(name, copied, refused):
    file = copied / "checkpoint-4" / "state.json"
    state = json.loads(file.read_text()) | {name: FORGED[name]}
    file.write_text(json.dumps(state | {"checksum": checkpoint._checksum(state)}))
    told = refused(copied, "--resume_from_checkpoint", "last")
    assert "checkpoint-4 is damaged (" in told and name in told and "--resume_from_checkpoint" in told


def test_a_state_nested_without_end_and_states_of_other_things_are_refused_in_one_line(copied, refused):
    file = copied / "checkpoint-4" / "state.json"
    state = json.loads(file.read_text())
    (copied / "checkpoint-4" / "ranks.safetensors").write_bytes(save({"0.python": torch.zeros(3)}))
    del state["checksums"], state["checksum"]
    size = (copied / "checkpoint-4" / "ranks.safetensors").stat().st_size
    file.write_text(json.dumps(state | {"files": state["files"] | {"ranks.safetensors": size}}))
    assert "does not fit: its random states" in refused(copied, "--resume_from_checkpoint", "last")
    file.write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    assert "state.json can't be read" in refused(copied, "--resume_from_checkpoint", "last")
