"""Runs that are killed, signalled or starved of disk, in real processes, go on as if nothing had happened."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import test_elastic
import test_evaluation_resume
import test_evaluations
import test_files
import test_fp16
import test_loader
import test_lora
import test_manifest
import test_nothing_lost
import test_owners
import test_pulse
import test_readers
import test_towers
import tiny
import torch
from forks import FORK_RANKS
from helpers import PATIENCE, ROOT, assert_succeeded, launch, run, run_forked, run_ranks
from runs import TINY, BackgroundRun, rows_of, steps_of, write_split
from safetensors.torch import load_file

import train
from aliblip.data.loader import TrainLoader
from aliblip.data.order import Layout
from aliblip.data.sources import open_source
from aliblip.runtime.arguments import parse
from aliblip.runtime.mistakes import UsageError
from aliblip.training.checkpoint import checkpoints
from aliblip.training.setup import set_up

TRAIN_ROWS, BATCH, EPOCHS = 50, 4, 3
RECORDED = ROOT / "tests" / "recorded_train.py"


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list:
    """Flags of a run of three epochs on 50 rows, two of them unusable."""
    folder = tmp_path_factory.mktemp("survival")
    write_split(
        folder / "data", "train", TRAIN_ROWS, {17: {"image": {"bytes": b"", "path": "x"}}, 30: {"caption": " "}}
    )
    write_split(folder / "data", "validation", 8)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return [
        *TINY,
        *("--data_dir", folder / "data", "--tokenizer_name", folder / "tokenizer"),
        *("--per_device_train_batch_size", BATCH, "--num_train_epochs", EPOCHS, "--evaluate_every", 2),
        *("--max_skipped_fraction", 0.5, "--checkpointing_steps", 2, "--warmup_steps", 3),
    ]


def recorded(config: str, folder: Path, flags: list, **env: str) -> None:
    """One run from start to end."""
    folder.mkdir()
    env = {"ALIBLIP_ROWS": str(folder), **env}
    assert_succeeded(run_ranks(config, RECORDED, [*flags, "--output_dir", folder], env=env))


def interrupt(how: str, going: BackgroundRun) -> None:
    """Interrupt a run by a name such as "SIGTERM launcher" or "SIGKILL rank 1", and check how it ends."""
    name, whom = how.split(" ", 1)
    number = getattr(signal, name)
    if whom == "all":
        going.kill()
        assert going.status()["status"] == "running"
        return
    ranks = going.ranks()
    target = going.launcher if whom == "launcher" else ranks[int(whom.split()[1])]
    if whom == "launcher" and len(ranks) == 1:
        name = "SIGUSR1"  # the launcher of one process passes nothing on; it dies, and that is heard of
    target.send_signal(number)
    assert going.wait(PATIENCE) != 0
    status = going.status()
    if number == signal.SIGKILL:
        assert status["status"] in ("failed", "running")
        assert f"Signal 9 (SIGKILL) received by PID {target.pid}" in going.printed
    else:
        assert (status["status"], status["reason"]) == ("stopped", name)
        assert Path(status["checkpoint"]).name == f"checkpoint-{status['step']}"
        assert going.printed.count(f"stopped by {name} after step {status['step']}") == 1


# Every pair of settings stands in some row: launcher, workers, accumulation, gradient checkpointing.
CASES = [
    ("cpu.yaml", 0, 1, False, ("SIGKILL all", "SIGTERM launcher")),
    ("cpu.yaml", 2, 2, True, ("SIGHUP rank 0", "SIGKILL all")),
    ("cpu_2_processes.yaml", 0, 2, False, ("SIGKILL rank 1", "SIGUSR1 rank 1")),
    ("cpu_2_processes.yaml", 2, 1, True, ("SIGTERM launcher", "SIGKILL all")),
    ("deepspeed_zero2_cpu.yaml", 0, 1, True, ("SIGTERM rank 1", "SIGKILL all")),
    ("deepspeed_zero2_cpu.yaml", 2, 2, False, ("SIGKILL all", "SIGTERM launcher")),
]


@pytest.mark.parametrize("config, workers, accumulation, recompute, interruptions", CASES)
def test_an_interrupted_run_repeats_the_uninterrupted_one(
    flags, tmp_path, config, workers, accumulation, recompute, interruptions
):
    flags = [
        *flags,
        *("--dataloader_num_workers", workers, "--gradient_accumulation_steps", accumulation),
        *("--gradient_checkpointing", str(recompute).lower()),
    ]
    world = 1 if config == "cpu.yaml" else 2
    steps_per_epoch = TRAIN_ROWS // (BATCH * world) // accumulation
    total = steps_per_epoch * EPOCHS
    recorded(config, tmp_path / "whole", flags)
    expected = steps_of(tmp_path / "whole")
    assert sorted(expected) == list(range(1, total + 1))

    folder, resume = tmp_path / "interrupted", []
    # In the middle of the first epoch, and of a later one.
    for how, after in zip(interruptions, (steps_per_epoch // 2, steps_per_epoch + steps_per_epoch // 2), strict=True):
        going = BackgroundRun(config, folder, [*flags, *resume], launched=not how.endswith(" all"))
        going.wait_until(lambda going=going, after=after: going.step() >= after and checkpoints(folder))
        interrupt(how, going)
        assert going.step() < total, "it was to be interrupted in its middle"
        resume = ["--resume_from_checkpoint", "last"]
    assert BackgroundRun(config, folder, [*flags, *resume], launched=False).wait() == 0

    assert steps_of(folder) == expected  # losses, gradient norms, schedule and temperature, bit by bit
    whole, resumed = (
        json.loads((tmp_path / name / "last" / "results.json").read_text()) for name in ("whole", "interrupted")
    )
    assert {**resumed, "model": "", "run": ""} == {**whole, "model": "", "run": ""}
    for name in ("model", "optimizer", "momentum", "ranks"):
        one, other = (load_file(checkpoints(f)[-1] / f"{name}.safetensors") for f in (tmp_path / "whole", folder))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name
    assert (folder / "skipped.jsonl").read_text() == (tmp_path / "whole" / "skipped.jsonl").read_text()
    assert json.loads((folder / "status.json").read_text())["status"] == "completed"

    # The rows are those of the plan: none lost, none twice; an unusable one leaves a hole that its batch fills.
    seen = rows_of(folder)
    assert seen == rows_of(tmp_path / "whole")
    source = open_source(data_dir=str(flags[flags.index("--data_dir") + 1]), split="train")
    options = {"batch_size": BATCH, "accumulation": accumulation, "seed": 42, "num_workers": workers}
    loader = TrainLoader(source, None, **options, rank=0, world_size=world)
    for epoch in range(EPOCHS):
        planned = set(range(TRAIN_ROWS)) - set(loader.order(epoch).leftover())
        rows = [row for (_, e, _), rows in seen.items() if e == epoch for row in rows]
        assert set(rows) == planned - {17, 30}
        holes = len(planned & {17, 30})
        assert len(rows) == len(planned) and len(set(rows)) == len(rows) - holes


@pytest.mark.parametrize("config", ["cpu.yaml", "cpu_2_processes.yaml", "deepspeed_zero2_cpu.yaml"])
def test_a_step_that_is_not_finite_changes_nothing_and_many_end_the_run(flags, tmp_path, config):
    # Two batches a step, of which the second breaks: what the first one put into the queues has to go again.
    flags = [*flags, "--gradient_accumulation_steps", 2, "--checkpointing_steps", 1, "--max_train_steps", 5]
    flags += ["--evaluate_every", 0, "--per_device_train_batch_size", 2, "--num_train_epochs", 1]
    folder = tmp_path / "one"
    recorded(config, folder, flags, ALIBLIP_BREAK="5")  # the third step
    for name in ("model", "optimizer", "momentum"):
        before, after, later = (load_file(folder / f"checkpoint-{step}" / f"{name}.safetensors") for step in (2, 3, 4))
        encoders = [key for key in before if key.startswith("encoders.")]
        # The average follows the second step at the begin of the third; the broken third itself moves nothing.
        assert all(torch.equal(before[key], after[key]) for key in before if key not in encoders), name
        assert all(torch.equal(after[key], later[key]) for key in encoders), name
        assert any(not torch.equal(after[key], later[key]) for key in after if key not in encoders), name
    states = [json.loads((folder / f"checkpoint-{step}" / "state.json").read_text()) for step in (2, 3, 4)]
    assert [state["left_out"] for state in states] == [0, 1, 1]
    assert states[0]["momentum"]["_extra_state"]["pointer"] == states[1]["momentum"]["_extra_state"]["pointer"]
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log[2] == {"step": 3, "epoch": log[2]["epoch"], "steps_left_out": 1}
    assert log[3]["learning_rate"] == pytest.approx(1e-3 * 2 / 3)  # the third step that was taken

    folder = tmp_path / "many"
    folder.mkdir()
    flags += ["--max_non_finite_steps", 2, "--checkpointing_steps", 100]
    broken = {"ALIBLIP_ROWS": str(folder), "ALIBLIP_BREAK": "5 7 9", FORK_RANKS: "1"}
    result = launch(config, RECORDED, [*flags, "--output_dir", folder], env=broken)
    assert result.returncode != 0
    told = "no finite loss or gradient in 2 steps in a row (up to step 4, whose rows are "
    assert result.stderr.count(told) == 1 and "checkpoint-2 is from before them" in result.stderr
    assert json.loads((folder / "status.json").read_text())["status"] == "failed"
    ranks = 1 if config == "cpu.yaml" else 2
    rows = rows_of(folder)
    listed = sorted(row for rank in range(ranks) for batch in (6, 7) for row in rows[rank, 0, batch])
    assert f"{told}{', '.join(map(str, listed))})" in result.stderr
    before, there = (load_file(f / "checkpoint-2" / "model.safetensors") for f in (tmp_path / "one", folder))
    assert all(torch.equal(before[key], there[key]) for key in before)

    # Nothing is wrong with the rows this time: the run goes on where it was before them, bit by bit.
    recorded(config, tmp_path / "good", flags)
    resume = [*flags, "--resume_from_checkpoint", folder / "checkpoint-2"]
    recorded(config, tmp_path / "resumed", resume)
    expected = {step: values for step, values in steps_of(tmp_path / "good").items() if step > 2}
    assert steps_of(tmp_path / "resumed") == expected and len(expected) == 3


@pytest.mark.parametrize("config", ["cpu.yaml", "cpu_2_processes.yaml"])
def test_an_error_on_one_rank_ends_the_job_with_that_error(flags, tmp_path, config):
    # With readers: Python waits for them at its end, and they must not wait for Python.
    going = BackgroundRun(config, tmp_path / "run", [*flags, "--dataloader_num_workers", 2], ALIBLIP_RAISE="3")
    going.wait_until(lambda: going.step() >= 3 or "broken on purpose" in going.printed)
    assert going.wait(PATIENCE) != 0
    last_rank = 0 if config == "cpu.yaml" else 1
    assert "ValueError: broken on purpose" in going.printed
    status = going.status()
    assert status["status"] == "failed" and status["reason"] == f"rank {last_rank}: ValueError: broken on purpose"
    assert Path(status["checkpoint"]).name == "checkpoint-2"


def test_the_second_ctrl_c_ends_at_once(flags, tmp_path):
    an_hour = "3600"
    going = BackgroundRun("cpu_2_processes.yaml", tmp_path / "run", flags, ALIBLIP_PAUSE=an_hour)
    going.wait_until(lambda: (tmp_path / "run" / "status.json").exists() and len(going.ranks()) == 2)
    time.sleep(2)
    going.launcher.send_signal(signal.SIGINT)
    time.sleep(2)
    assert len(going.ranks()) == 2, "the first one waits for the end of the step"
    going.launcher.send_signal(signal.SIGINT)
    assert going.wait(PATIENCE) != 0, "not at the end of the step"


def test_a_launcher_that_is_killed_takes_a_checkpoint_with_it(flags, tmp_path):
    going = BackgroundRun("cpu_2_processes.yaml", tmp_path / "run", [*flags, "--num_train_epochs", 1000])
    going.wait_until(lambda: going.step() >= 2)
    ranks = going.ranks()
    going.launcher.kill()
    going.processes[0].wait()
    for rank in ranks:
        rank.wait(PATIENCE)
    status = going.status()
    assert status["status"] == "stopped"
    assert Path(status["checkpoint"]).name == f"checkpoint-{status['step']}"


def test_a_full_disk_keeps_the_run_and_the_old_checkpoint(flags, tmp_path):
    folder = tmp_path / "run"
    flags = [*flags, "--num_train_epochs", 1, "--evaluate_every", 0, "--output_dir", folder]
    python = [sys.executable, ROOT / "train.py"]
    assert_succeeded(run_forked([*python, *flags, "--max_train_steps", 4]))
    kept = {file.name: file.read_bytes() for file in (folder / "checkpoint-4").iterdir()}
    # A limit on the size of a file stands for a full disk: the system refuses the bytes in the same place.
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *python, *flags, "--resume_from_checkpoint", "last"]
    result = run(limited)
    assert result.returncode == 2
    printed = result.stdout + result.stderr
    assert "warning: checkpoint-6 could not be written (" in printed and "the run goes on" in printed
    assert f"the last checkpoint is {folder / 'checkpoint-4'}" in printed
    assert "the run is through, but its model could not be written" in printed
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    assert {file.name: file.read_bytes() for file in (folder / "checkpoint-4").iterdir()} == kept
    assert not list(folder.glob(".*"))
    assert max(steps_of(folder)) == 12
    # With room again it ends well, from the checkpoint that was kept.
    assert_succeeded(run_forked([*python, *flags, "--resume_from_checkpoint", "last", "--save_total_limit", 2]))
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-10", "checkpoint-12"]


# --- in this process --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "run"
    command = [sys.executable, ROOT / "train.py", *flags, "--max_train_steps", 2, "--evaluate_every", 0]
    assert_succeeded(run_forked([*command, "--output_dir", folder]))
    return folder / "checkpoint-2"


@pytest.fixture
def refused(flags, tmp_path, monkeypatch):
    def message(*more, **env) -> str:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        argv = ["train.py", *flags, "--output_dir", tmp_path / "run", *more]
        monkeypatch.setattr(sys, "argv", [str(part) for part in argv])
        with pytest.raises(UsageError) as raised:
            train.main()
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return message


def test_a_changed_world_is_refused_with_the_values_that_work(refused, checkpoint, monkeypatch):
    resume = ("--resume_from_checkpoint", checkpoint)
    told = refused(*resume, "--per_device_train_batch_size", 8)
    assert told.endswith("rows would be lost or seen twice: resume with --per_device_train_batch_size 4")
    told = refused(*resume, "--gradient_accumulation_steps", 2)
    assert told.endswith("resume with --gradient_accumulation_steps 1")
    told = refused(*resume, WORLD_SIZE="2")
    assert told.endswith("resume with --per_device_train_batch_size 2")
    told = refused(*resume, WORLD_SIZE="3")
    assert told.endswith("resume with accelerate launch --num_processes 2 --per_device_train_batch_size 2")
    monkeypatch.delenv("WORLD_SIZE")
    told = refused(*resume, "--data_partitions", 2)
    assert told.endswith(
        "(data_partitions was 4, is 2), and rows would be lost or seen twice: resume with --data_partitions 4"
    )


def test_a_checkpoint_of_version_0_1_0_goes_on_in_its_order(checkpoint, flags, tmp_path, monkeypatch):
    """Its order was of processes and readers; now any number of readers reads it."""
    copy = tmp_path / "checkpoint-2"
    shutil.copytree(checkpoint, copy)
    state = json.loads((copy / "state.json").read_text())
    state["order"] = {
        **{"rows": TRAIN_ROWS, "processes": 1, "per_device_train_batch_size": BATCH, "dataloader_num_workers": 3},
        **{"gradient_accumulation_steps": 1, "shuffle_window": 8, "seed": 42},
    }
    del state["checksums"], state["checksum"]
    (copy / "state.json").write_text(json.dumps(state))
    argv = ["train.py", *flags, "--output_dir", tmp_path / "run", "--resume_from_checkpoint", copy]
    monkeypatch.setattr(sys, "argv", [str(part) for part in argv])
    setup = set_up(*parse(train.GROUPS, description="")[:4])
    assert setup.loader.layout == Layout(1, BATCH, 8, lanes=3, staggered=False)
    assert setup.order == state["order"] and setup.steps_per_epoch == 12 and setup.progress.step == 2


def test_changed_data_is_refused_with_what_changed(refused, checkpoint, flags, tmp_path):
    flags = dict(zip(flags[::2], flags[1::2], strict=True))
    write_split(tmp_path / "data", "train", TRAIN_ROWS + 1)
    write_split(tmp_path / "data", "validation", 8)
    told = refused("--resume_from_checkpoint", checkpoint, "--data_dir", tmp_path / "data")
    assert "train-00000-of-00001.parquet has 51 rows, it had 50" in told
    assert (tmp_path / "data").name == Path(flags["--data_dir"]).name


def test_a_damaged_checkpoint_is_refused_by_name(refused, checkpoint, tmp_path):
    assert "no checkpoint (it has no state.json)" in refused("--resume_from_checkpoint", tmp_path)
    copy = tmp_path / "checkpoint-2"
    copy.mkdir()
    for file in checkpoint.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    with (copy / "optimizer.safetensors").open("r+b") as file:
        file.truncate(1000)
    told = refused("--resume_from_checkpoint", copy)
    assert "is damaged (optimizer.safetensors has 1,000 bytes instead of " in told
    (copy / "state.json").write_text("{")
    assert "is damaged (state.json can't be read)" in refused("--resume_from_checkpoint", copy)


def test_checkpoints_are_those_of_version_0_1_0(checkpoint):
    """What stands where, by the names of version 0.1.0: its checkpoints resume, and a change of names is another
    format."""
    state = json.loads((checkpoint / "state.json").read_text())
    assert state["format"] == 1
    assert set(state) == {
        *("format", "step", "left_out", "left_out_in_a_row", "average_is_due", "best_mean_recall", "epoch", "samples"),
        *("order", "manifest", "arguments", "momentum", "ranks", "files"),
        *("checksums", "checksum", "evaluations_without_gain"),  # came later
    }
    assert list(state["order"]) == ["rows", "global_batch", "data_partitions", "shuffle_window", "seed"]
    assert set(state["momentum"]) == {"_extra_state"} and set(state["momentum"]["_extra_state"]) == {
        "pointer",
        "updates",
    }
    (of_rank,) = state["ranks"]
    assert {name: set(entry) for name, entry in of_rank.items()} == {
        "log": {"sums", "batches", "left_out", "near_prior"},
        "skipped": {"rows", "seen", "met"},
    }
    tensors = {f"{name}.safetensors" for name in ("model", "optimizer", "momentum", "ranks")}
    assert {name for name in state["files"] if name.endswith(".safetensors")} == tensors
    assert set(state["checksums"]) == set(state["files"])
    model, optimizer, momentum, ranks = (
        load_file(checkpoint / f"{name}.safetensors") for name in ("model", "optimizer", "momentum", "ranks")
    )
    assert {key.partition(".")[0] for key in optimizer} == {"exp_avg", "exp_avg_sq", "step"}
    assert {key.partition(".")[2] for key in optimizer} == set(model)
    queues = {"image_queue", "text_queue", "queue_ids", "queue_photos", "queue_filled"}
    assert {key.removeprefix("encoders.") for key in momentum} - queues < set(model) and queues < set(momentum)
    assert set(ranks) == {"0.numpy", "0.numpy_gauss", "0.python", "0.python_gauss", "0.torch"}


def test_a_checkpoint_of_another_format_is_refused(refused, checkpoint, tmp_path):
    copy = tmp_path / "checkpoint-2"
    copy.mkdir()
    state = json.loads((checkpoint / "state.json").read_text())
    (copy / "state.json").write_text(json.dumps({"format": 2}))
    told = refused("--resume_from_checkpoint", copy)
    assert told == f"{copy} is of format 2, this version reads 1: use the version that wrote it"
    (copy / "state.json").write_text(json.dumps({name: value for name, value in state.items() if name != "left_out"}))
    assert "is damaged (state.json has no 'left_out')" in refused("--resume_from_checkpoint", copy)


class _Payload:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_a_checkpoint_from_untrusted_hands_runs_no_code(refused, checkpoint, tmp_path):
    assert {file.suffix for file in checkpoint.iterdir()} == {".json", ".safetensors"}
    for name in ("model", "optimizer", "momentum", "ranks"):
        copy = tmp_path / name / "checkpoint-2"
        copy.mkdir(parents=True)
        for file in checkpoint.iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        torch.save({"weights": _Payload(tmp_path / "ran")}, copy / f"{name}.safetensors")
        state = json.loads((copy / "state.json").read_text())
        state["files"][f"{name}.safetensors"] = (copy / f"{name}.safetensors").stat().st_size
        del state["checksums"], state["checksum"]  # those of version 0.1 have none
        (copy / "state.json").write_text(json.dumps(state))
        assert f"{copy} does not fit" in refused("--resume_from_checkpoint", copy, "--overwrite_output_dir", "true")
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(_Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists(), "the payload works where pickles are loaded"


def test_a_checkpoint_of_another_model_is_refused(refused, checkpoint):
    resume = ("--resume_from_checkpoint", checkpoint)
    assert "the weights are those of another model" in refused(*resume, "--image_text_hidden_size", 24)
    told = refused(*resume, "--queue_size", 7, "--overwrite_output_dir", "true")
    assert "momentum encoders or queues" in told and "size mismatch" in told


# --- the list of docs/resuming.md -------------------------------------------------------------------------------------

PROMISES = {
    "Exact.": [
        test_an_interrupted_run_repeats_the_uninterrupted_one,
        test_towers.test_what_is_frozen_stays_and_a_resumed_run_repeats_it,
        test_lora.test_a_run_of_adapters_resumes_bit_by_bit,
        test_fp16.test_a_step_that_overflows_changes_nothing_and_halves_the_scale,
        test_evaluations.test_a_run_that_dies_before_its_evaluation_makes_it_when_it_goes_on,
        test_evaluations.test_a_run_ends_after_evaluations_without_gain,
    ],
    "No row lost, none twice": [test_an_interrupted_run_repeats_the_uninterrupted_one],
    "Signals.": [
        test_an_interrupted_run_repeats_the_uninterrupted_one,
        test_the_second_ctrl_c_ends_at_once,
        test_a_launcher_that_is_killed_takes_a_checkpoint_with_it,
    ],
    "A dead rank ends the job": [
        test_an_interrupted_run_repeats_the_uninterrupted_one,
        test_an_error_on_one_rank_ends_the_job_with_that_error,
    ],
    "Whole or not at all.": [test_files.test_a_kill_at_any_call_leaves_a_whole_folder],
    "A full disk": [test_a_full_disk_keeps_the_run_and_the_old_checkpoint],
    "Only finite steps count.": [test_a_step_that_is_not_finite_changes_nothing_and_many_end_the_run],
    "Any number of processes and readers.": [
        test_elastic.test_a_run_goes_on_with_other_numbers_of_processes_and_readers,
        test_loader.test_a_step_has_the_same_rows_for_any_number_of_processes_and_readers,
    ],
    "Changed data or another global batch": [
        test_a_changed_world_is_refused_with_the_values_that_work,
        test_changed_data_is_refused_with_what_changed,
    ],
    "Checkpoints are data": [test_a_checkpoint_from_untrusted_hands_runs_no_code],
    "A flipped bit is noticed.": [
        test_nothing_lost.test_one_flipped_bit_is_refused_and_an_older_checkpoint_proposed,
        test_evaluation_resume.test_one_flipped_bit_in_a_part_is_noticed_and_it_is_made_again,
    ],
    "An epoch is saved before it is measured": [test_nothing_lost.test_an_evaluation_that_fails_costs_no_epoch],
    "Nothing is deleted too early.": [test_nothing_lost.test_nothing_is_deleted_before_the_trackers_have_begun],
    "Data files that change during a run": [
        test_manifest.test_a_file_that_is_replaced_after_it_was_opened_is_noticed,
    ],
    "Every wait has an end, and a reason.": [
        test_readers.test_a_reader_that_is_killed_ends_the_wait_with_what_killed_it,
        test_readers.test_a_reader_that_does_nothing_ends_the_wait,
        test_readers.test_a_signal_ends_a_wait_in_which_nothing_comes,
        test_readers.test_no_shared_memory_of_a_file_system_is_needed,
        test_pulse.test_a_stopped_rank_ends_the_run,
    ],
    "One folder, one writer.": [
        test_owners.test_the_commands_refuse_a_folder_in_use_and_leave_it_free,
        test_owners.test_copies_without_a_launcher_are_refused,
    ],
    "The log stays readable.": [test_files.test_a_line_that_was_cut_off_is_repaired_before_the_next],
}


def test_each_promise_of_the_docs_has_a_test():
    section = (ROOT / "docs" / "resuming.md").read_text().split("Promised, ")[1].split("Not promised:")[0]
    assert re.findall(r"^- \*\*(.+?)\*\*", section, flags=re.MULTILINE) == list(PROMISES)
    assert all(test.__name__.startswith("test_") for tests in PROMISES.values() for test in tests)
