"""Evaluation by steps and by epochs, the best model of all of them, and a run that ends early."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState
from helpers import assert_succeeded, run_ranks
from runs import TINY, log_of, steps_of, trained_in_process, write_split
from safetensors.torch import load_file

import train
from aliblip.runtime.mistakes import UsageError
from aliblip.training import run as course
from aliblip.training.checkpoint import Progress
from aliblip.training.evaluations import Evaluations


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list:
    """Five steps an epoch."""
    folder = tmp_path_factory.mktemp("catalogue")
    write_split(folder / "data", "train", 40)
    write_split(folder / "data", "validation", 12)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return ["--data_dir", folder / "data", "--tokenizer_name", folder / "tokenizer"]


def evaluations(folder: Path) -> dict[int, tuple[float, float]]:
    """Step -> epoch and mean recall."""
    return {e["step"]: (e["epoch"], e["evaluation"]["mean_recall"]) for e in log_of(folder) if "evaluation" in e}


@pytest.mark.parametrize(
    ("by_epochs", "by_steps", "due"),
    [
        (1, None, [5, 10, 12]),
        (2, None, [10, 12]),
        (0, None, []),
        (0, 4, [4, 8, 12]),
        (1, 4, [4, 5, 8, 10, 12]),
        (2, 5, [5, 10, 12]),
        (0, 100, [12]),
    ],
)
def test_when_an_evaluation_is_due(by_epochs, by_steps, due):
    times = Evaluations(by_epochs, by_steps, steps_per_epoch=5, total_steps=12)
    assert [step for step in range(13) if times.are_due(step)] == due
    assert times.count() == len(due) and times.count(after=5) == sum(step > 5 for step in due)
    assert [step for step in range(1, 13) if times.end_an_epoch(step)] == [5, 10, 12]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    trained_in_process([*flags, *BY_STEPS], folder)
    return folder


BY_STEPS = ["--num_train_epochs", 2, "--eval_steps", 3, "--checkpointing_steps", 3, "--learning_rate", 3e-3]


def test_steps_and_epochs_are_evaluated_and_the_best_of_all_is_kept(flags, whole, tmp_path):
    found = evaluations(whole)
    assert {step: epoch for step, (epoch, _) in found.items()} == {3: 0.6, 5: 1, 6: 1.2, 9: 1.8, 10: 2}
    best = json.loads((whole / "best" / "results.json").read_text())
    recalls = {step: recall for step, (_, recall) in found.items()}
    assert best["mean_recall"] == max(recalls.values()) and len(set(recalls.values())) > 1
    (best_step, *_) = [step for step, recall in recalls.items() if recall == best["mean_recall"]]
    last = json.loads((whole / "last" / "results.json").read_text())
    assert last["mean_recall"] == recalls[10]
    # They change nothing of the training.
    without = tmp_path / "without"
    trained_in_process([*flags, *BY_STEPS, "--evaluate_every", 0, "--eval_steps", 100], without)
    assert steps_of(without) == steps_of(whole) and list(evaluations(without)) == [10]
    if best_step in (3, 6, 9, 10):
        kept, there = load_file(whole / "best" / "model.safetensors"), whole / f"checkpoint-{best_step}"
        assert all(torch.equal(value, kept[name]) for name, value in load_file(there / "model.safetensors").items())


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_that_dies_before_its_evaluation_makes_it_when_it_goes_on(flags, whole, tmp_path, monkeypatch, step):
    """The checkpoint of a step is older than the evaluation of this step."""
    folder = tmp_path / "run"
    plain = course.evaluate_retrieval
    left = [2 if step == 6 else 0]

    def dies(*args, **kwargs):
        if left[0] == 0:
            raise OSError("the disk is gone")
        left[0] -= 1
        return plain(*args, **kwargs)

    monkeypatch.setattr(course, "evaluate_retrieval", dies)
    with pytest.raises(OSError, match="the disk is gone"):
        trained_in_process([*flags, *BY_STEPS], folder)
    monkeypatch.setattr(course, "evaluate_retrieval", plain)
    assert (folder / f"checkpoint-{step}").exists() and step not in evaluations(folder)
    assert (folder / "last" / "model.safetensors").exists()
    trained_in_process([*flags, *BY_STEPS, "--resume_from_checkpoint", "last"], folder)
    assert steps_of(folder) == steps_of(whole) and evaluations(folder) == evaluations(whole)
    for name in ("best", "last"):
        one, other = (load_file(f / name / "model.safetensors") for f in (folder, whole))
        assert all(torch.equal(value, other[key]) for key, value in one.items())


# --- early stopping ---------------------------------------------------------------------------------------------------

PATIENT = ["--num_train_epochs", 3, "--eval_steps", 2, "--early_stopping_patience", 2, "--checkpointing_steps", 3]


@pytest.fixture
def recalls(monkeypatch):
    """Evaluations say what the test wants, step by step."""

    def say(of: dict[int, float]) -> None:
        plain = course.evaluate_retrieval
        course_of = {}
        init = course.Run.__init__

        def started(run, *args, **kwargs):
            course_of["run"] = run
            init(run, *args, **kwargs)

        def evaluated(*args, **kwargs):
            return plain(*args, **kwargs) | {"mean_recall": of[course_of["run"].progress.step]}

        monkeypatch.setattr(course.Run, "__init__", started)
        monkeypatch.setattr(course, "evaluate_retrieval", evaluated)

    return say


def test_a_run_ends_after_evaluations_without_gain(flags, tmp_path, capsys, recalls):
    folder = tmp_path / "run"
    recalls({2: 0.2, 4: 0.1, 5: 0.3, 6: 0.3, 8: 0.1, 10: 0.9, 12: 0.9, 14: 0.9, 15: 0.9})
    trained_in_process([*flags, *PATIENT], folder)
    assert list(evaluations(folder)) == [2, 4, 5, 6, 8] and max(steps_of(folder)) == 8
    printed = capsys.readouterr().out
    assert "ended early, after step 8: 2 evaluations without a better mean recall than 0.3000" in printed
    assert "8 steps, 64 samples" in printed and "(mean recall 0.3000)" in printed
    status = json.loads((folder / "status.json").read_text())
    assert (status["status"], status["step"], status["ended_early"]) == ("completed", 8, True)
    assert json.loads((folder / "best" / "results.json").read_text())["mean_recall"] == 0.3
    last = load_file(folder / "last" / "model.safetensors")

    # From any of its checkpoints it comes to the same end: 6 was written before the first evaluation without gain.
    for step in (3, 6):
        again = tmp_path / f"again{step}"
        shutil.copytree(folder, again)
        resume = ["--resume_from_checkpoint", again / f"checkpoint-{step}"]
        trained_in_process([*flags, *PATIENT, *resume], again)
        assert steps_of(again) == steps_of(folder) and evaluations(again) == evaluations(folder)
        other = load_file(again / "last" / "model.safetensors")
        assert all(torch.equal(value, other[name]) for name, value in last.items())


def test_a_run_can_end_early_at_the_end_of_an_epoch_and_when_it_goes_on(flags, tmp_path, capsys, recalls):
    folder = tmp_path / "run"
    recalls({5: 0.2, 6: 0.1, 10: 0.1, 12: 0.3, 15: 0.3})
    flags = [*flags, "--num_train_epochs", 3, "--eval_steps", 6, "--checkpointing_steps", 6]
    flags += ["--early_stopping_patience", 2]
    trained_in_process(flags, folder)
    assert list(evaluations(folder)) == [5, 6, 10]
    assert "ended early, after step 10" in capsys.readouterr().out
    trained_in_process([*flags, "--resume_from_checkpoint", "last"], folder)  # of step 10
    assert list(evaluations(folder)) == [5, 6, 10]
    assert "ended early, after step 10" in capsys.readouterr().out
    # With more patience it goes on.
    trained_in_process([*flags, "--resume_from_checkpoint", "last", "--early_stopping_patience", 3], folder)
    assert list(evaluations(folder)) == [5, 6, 10, 12, 15]


def test_two_processes_evaluate_between_epochs_and_end_early_together(flags, tmp_path):
    folder = tmp_path / "run"
    more = ["--per_device_train_batch_size", 4, "--num_train_epochs", 3, "--eval_steps", 2, "--learning_rate", 0]
    more += ["--early_stopping_patience", 1, "--output_dir", folder]
    assert_succeeded(run_ranks("cpu_2_processes.yaml", "train.py", [*TINY, *flags, *more]))
    # Nothing is learned, so the second evaluation is no better than the first.
    assert list(evaluations(folder)) == [2, 4] and max(steps_of(folder)) == 4
    assert json.loads((folder / "status.json").read_text())["ended_early"] is True


def test_checkpoints_from_before_have_counted_nothing():
    state = {"step": 4, "left_out": 0, "left_out_in_a_row": 0, "average_is_due": True, "best_mean_recall": 0.5}
    assert Progress.of({**state, "epoch": 0.5}) == Progress(**state, evaluations_without_gain=0)


def test_patience_needs_evaluations(flags, tmp_path, monkeypatch):
    argv = ["train.py", *TINY, *flags, "--output_dir", tmp_path / "run", "--evaluate_every", 0]
    monkeypatch.setattr(sys, "argv", [*map(str, argv), "--early_stopping_patience", "2"])
    try:
        with pytest.raises(UsageError, match="--early_stopping_patience counts evaluations"):
            train.main()
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_the_plan_counts_them(flags, tmp_path, monkeypatch, capsys):
    argv = ["train.py", *TINY, *flags, "--output_dir", tmp_path / "run", "--dry_run", *BY_STEPS]
    monkeypatch.setattr(sys, "argv", [str(word) for word in argv])
    train.main()
    assert "10 steps of 8 rows, 2 epochs: 80 samples, 5 evaluations" in capsys.readouterr().out
