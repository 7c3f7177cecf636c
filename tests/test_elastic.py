"""A run goes on with any number of processes and readers: the same rows in every step, none lost, none twice."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest
import tiny
import torch
from data_stub import MemorySource
from helpers import ROOT, assert_succeeded, run_ranks
from runs import TINY, BackgroundRun, steps_of, write_split

from aliblip.data.loader import TrainLoader
from aliblip.runtime.mistakes import UsageError
from aliblip.training.arguments import TrainingArguments
from aliblip.training.checkpoint import checkpoints
from aliblip.training.progress import PARTS, shared_out
from aliblip.training.setup import flags_of_global_batch

RECORDED = ROOT / "tests" / "recorded_train.py"
ROWS, GLOBAL_BATCH, EPOCHS = 102, 16, 2
TOTAL = ROWS // GLOBAL_BATCH * EPOCHS
NO_DROPOUT = '"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0'


def config_of(processes: int, folder: Path) -> str:
    if processes == 1:
        return "cpu.yaml"
    text = (ROOT / "accelerate_configs" / "cpu_2_processes.yaml").read_text()
    file = folder / f"cpu_{processes}.yaml"
    file.write_text(text.replace("num_processes: 2", f"num_processes: {processes}"))
    return str(file)


def rows_by_step(folder: Path, accumulation: int, global_batch: int = GLOBAL_BATCH) -> dict[tuple[int, int], list[int]]:
    """(epoch, step) -> the rows of all ranks, of the steps that all of them have read; takes the lists away."""
    found = defaultdict(list)
    for file in sorted(folder.glob("rows-rank*.jsonl")):
        for line in file.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else a kill cut it off
                entry = json.loads(line)
                found[entry["epoch"], entry["batch"] // accumulation] += entry["rows"]
        file.unlink()
    return {step: sorted(rows) for step, rows in found.items() if len(rows) == global_batch}


def test_a_run_goes_on_with_other_numbers_of_processes_and_readers(tmp_path):
    """4, 2, 1 and 2 processes, the last with two batches a step; killed in between."""
    broken = {17: {"image": {"bytes": b"", "path": "x"}}, 30: {"caption": " "}}
    write_split(tmp_path / "data", "train", ROWS, broken)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    text = dict(zip(TINY[::2], TINY[1::2], strict=True))["--text_config"]
    flags = [
        *TINY,
        *("--data_dir", tmp_path / "data", "--tokenizer_name", tmp_path / "tokenizer", "--evaluate_every", 0),
        # What does not depend on how the rows are divided: no dropout, no draws, keys and negatives of all processes.
        *("--text_config", text.replace("{", f"{{{NO_DROPOUT}, ", 1)),
        *("--in_batch_itc", 1, "--negatives_from_all_ranks", "true", "--hardest_negatives", "true"),
        *("--num_train_epochs", EPOCHS, "--checkpointing_steps", 1, "--max_skipped_fraction", 0.5),
        *("--queue_size", 32, "--shuffle_window", 48),
    ]
    whole = tmp_path / "whole"
    whole.mkdir()
    batch = ["--per_device_train_batch_size", GLOBAL_BATCH]
    env = {"ALIBLIP_ROWS": str(whole)}
    assert_succeeded(run_ranks("cpu.yaml", RECORDED, [*flags, *batch, "--output_dir", whole], env=env))
    expected, planned = steps_of(whole), rows_by_step(whole, 1)
    assert sorted(expected) == list(range(1, TOTAL + 1)) and len(planned) == TOTAL

    folder, seen = tmp_path / "elastic", set()
    phases = ((4, 1, 0, 2), (2, 1, 3, 5), (1, 1, 1, 8), (2, 2, 0, None))
    for processes, accumulation, readers, killed_after in phases:
        batch = ["--per_device_train_batch_size", GLOBAL_BATCH // processes // accumulation]
        batch += ["--gradient_accumulation_steps", accumulation, "--dataloader_num_workers", readers]
        resume = ["--resume_from_checkpoint", "last"]
        config = config_of(processes, tmp_path)
        going = BackgroundRun(config, folder, [*flags, *batch, *resume], launched=False)
        if killed_after is None:
            assert going.wait() == 0
        else:
            going.wait_until(lambda going=going, after=killed_after: going.step() >= after and checkpoints(folder))
            going.kill()
        for step, rows in rows_by_step(folder, accumulation).items():
            assert rows == planned[step], (processes, readers, step)
            seen.add(step)
    assert seen == set(planned)
    taken = steps_of(folder)
    assert sorted(taken) == list(range(1, TOTAL + 1))
    for step in range(1, 8):  # the last one again: with two batches a step each has its own keys and negatives
        assert taken[step] == pytest.approx(expected[step], rel=1e-4), step
    state = json.loads((checkpoints(folder)[-1] / "state.json").read_text())
    assert state["order"]["data_partitions"] == GLOBAL_BATCH and len(state["ranks"]) == 2
    printed = going.printed
    assert "4 processes before, 2 now: the rows of every step stay the same" in printed
    skipped = [json.loads(line)["row"] for line in (folder / "skipped.jsonl").read_text().splitlines()]
    assert skipped == [17, 30]


@pytest.mark.parametrize(
    "processes, batch, accumulation, told",
    [
        (2, 8, 1, "--gradient_accumulation_steps 2"),
        (2, 16, 1, ""),
        (4, 16, 1, "--per_device_train_batch_size 8"),
        (1, 6, 2, "--per_device_train_batch_size 4 --gradient_accumulation_steps 8"),
        (3, 8, 1, "accelerate launch --num_processes 2 --gradient_accumulation_steps 2"),
    ],
)
def test_the_flags_for_another_number_of_processes(processes, batch, accumulation, told):
    facts = {"global_batch": 32, "data_partitions": 16}
    args = TrainingArguments(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
    assert flags_of_global_batch(facts, processes, args) == told


def test_partitions_that_can_not_be_shared_are_told():
    options = {"batch_size": 4, "seed": 0, "rank": 0}
    with pytest.raises(UsageError, match="--data_partitions is 3: .* give a divisor of that: 1, 2, 4, 8"):
        TrainLoader(MemorySource([100]), None, **options, world_size=2, partitions=3)
    with pytest.raises(UsageError, match="2 processes can't share 1 partitions .* start 1 processes"):
        TrainLoader(MemorySource([100]), None, **options, world_size=2, partitions=1)
    loader = TrainLoader(MemorySource([100]), None, **options, world_size=2, partitions=4, num_workers=7)
    assert loader.num_workers == 2  # a reader for each partition of the rank
    assert loader.describe().endswith(
        "; 5 of 7 readers are not used: a process has 2 partitions, more --data_partitions let more read"
    )


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_what_the_ranks_have_counted_is_shared_out_whole(processes):
    states = [
        {
            "log": {"sums": torch.full((2, len(PARTS)), float(rank)).tolist(), "batches": 5, "left_out": 1}
            | {"near_prior": 2},
            "skipped": {"rows": [{"row": rank}], "seen": 10 + rank, "met": 1},
        }
        for rank in range(3)
    ]
    shares = [shared_out(states, rank, processes) for rank in range(processes)]
    assert sum(torch.tensor(share["log"]["sums"]) for share in shares).eq(3).all()
    assert {share["log"]["batches"] for share in shares} == {5}
    assert sum(share["skipped"]["seen"] for share in shares) == 33
    assert sorted(row["row"] for share in shares for row in share["skipped"]["rows"]) == [0, 1, 2]
    nothing = [{**state, "log": {**state["log"], "sums": None}} for state in states]
    assert shared_out(nothing, 0, processes)["log"]["sums"] is None
