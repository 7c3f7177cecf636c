"""kill -9 at random moments under every setting, resume, and compare with the run that was never killed: `make soak`.

    python tests/soak.py --seed 0 --json benchmarks/results/soak.json      # about a quarter of an hour on two cores

Every second kill is aimed at the time in which a checkpoint is being written. A kill hits the launcher and all that it
started, or one rank. The killed run has to end with the same losses, gradient norms, rows and weights, bit by bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny
import torch
from helpers import assert_succeeded, launch
from runs import TINY, BackgroundRun, rows_of, steps_of, write_split
from safetensors.torch import load_file

from aliblip.checkpoint import checkpoints
from benchmarks.common import circumstances

ROWS, BATCH, EPOCHS = 50, 4, 3
RECORDED = Path(__file__).resolve().parent / "recorded_train.py"
LAUNCHERS = ("cpu.yaml", "cpu_2_processes.yaml", "deepspeed_zero2_cpu.yaml")


def make_data(folder: Path) -> list:
    broken = {17: {"image": {"bytes": b"", "path": "x"}}, 30: {"caption": " "}}
    write_split(folder / "data", "train", ROWS, broken)
    write_split(folder / "data", "validation", 8)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return [
        *TINY,
        *("--data_dir", folder / "data", "--tokenizer_name", folder / "tokenizer"),
        *("--per_device_train_batch_size", BATCH, "--num_train_epochs", EPOCHS, "--evaluate_every", 2),
        *("--max_skipped_fraction", 0.5, "--checkpointing_steps", 1, "--save_total_limit", 3),
    ]


def kill_at_random(going: BackgroundRun, rng: random.Random, total: int, during_save: bool) -> dict:
    """Kill a run at a moment of the generator's choice; what was done."""
    after = rng.randint(1, total - 3)
    one_rank = rng.random() < 0.3
    pause = rng.uniform(0.0, 0.3)
    going.wait_until(lambda: going.step() >= after and checkpoints(going.folder))
    if during_save:
        going.wait_until(lambda: list(going.folder.glob(".checkpoint-*.tmp")))
    else:
        time.sleep(pause)
    writing = bool(list(going.folder.glob(".checkpoint-*.tmp")))
    if one_rank and len(ranks := going.ranks()) > 1:
        ranks[rng.randrange(len(ranks))].kill()
        going.wait(90)
        whom = "one rank"
    else:
        going.kill()
        whom = "all"
    return {"after_step": going.step(), "killed": whom, "checkpoint_was_being_written": writing}


def compare(whole: Path, resumed: Path) -> list[str]:
    """What is different between the two runs."""
    different = []
    if steps_of(whole) != steps_of(resumed):
        different.append("losses, gradient norms, learning rates or temperatures")
    if rows_of(whole) != rows_of(resumed):
        different.append("rows")
    for name in ("model", "optimizer", "momentum", "ranks"):
        one, other = (load_file(checkpoints(folder)[-1] / f"{name}.safetensors") for folder in (whole, resumed))
        if one.keys() != other.keys() or not all(torch.equal(one[key], other[key]) for key in one):
            different.append(f"{name}.safetensors")
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--settings", type=int, help="only the first so many settings")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    settings = list(itertools.product(LAUNCHERS, (0, 2), (1, 2), (False, True)))[: args.settings]
    kills = []
    with tempfile.TemporaryDirectory() as scratch:
        flags = make_data(Path(scratch))
        for number, (config, workers, accumulation, recompute) in enumerate(settings):
            run_flags = [
                *flags,
                *("--dataloader_num_workers", workers, "--gradient_accumulation_steps", accumulation),
                *("--gradient_checkpointing", str(recompute).lower()),
            ]
            total = ROWS // (BATCH * (1 if config == "cpu.yaml" else 2)) // accumulation * EPOCHS
            whole, resumed = Path(scratch, f"whole{number}"), Path(scratch, f"resumed{number}")
            whole.mkdir()
            whole_flags = [*run_flags, "--output_dir", whole]
            assert_succeeded(launch(config, RECORDED, whole_flags, env={"ALIBLIP_ROWS": str(whole)}))
            killed = kill_at_random(BackgroundRun(config, resumed, run_flags), rng, total, during_save=number % 2 == 1)
            again = BackgroundRun(config, resumed, [*run_flags, "--resume_from_checkpoint", "last"])
            different = compare(whole, resumed) if again.wait(300) == 0 else ["the resumed run did not end well"]
            entry = {
                "launcher": config,
                "workers": workers,
                "accumulation": accumulation,
                "gradient_checkpointing": recompute,
                **killed,
                "different": different,
            }
            kills.append(entry)
            print(json.dumps(entry), flush=True)
            if different:
                print(again.printed[-4000:])
    equal = sum(not kill["different"] for kill in kills)
    during = sum(kill["checkpoint_was_being_written"] for kill in kills)
    print(
        f"{equal} of {len(kills)} killed runs ended bit-equal to the uninterrupted one; {during} were killed in a save"
    )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"seed": args.seed, "kills": kills, **circumstances()}, indent=1) + "\n")
    return 0 if equal == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main())
