"""What was expensive is there after anything that fails, damage is noticed, and the restart command always works."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
from accelerate.state import AcceleratorState
from runs import TINY, log_of, trained_in_process, write_split

import train
from aliblip.runtime.mistakes import UsageError


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
