"""kill -9 at random moments under every setting, resume, and compare with the run that was never killed: `make soak`.

    python tests/soak.py --seed 0 --json benchmarks/results/soak.json      # about half an hour on two cores

Every second kill is aimed at the time in which a checkpoint is being written. A kill hits the launcher and all that it
started, or, in every second setting of several ranks, one of them. The killed run has to end with the same losses,
gradient norms, rows and weights, bit by bit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tiny
import torch
from helpers import assert_succeeded, launch
from runs import TINY, BackgroundRun, rows_of, steps_of, write_split
from safetensors.torch import load_file

from aliblip.runtime.files import write_json
from aliblip.training.checkpoint import checkpoints
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


def kill_at_random(going: BackgroundRun, rng: random.Random, total: int, during_save: bool, one_rank: bool) -> dict:
    """Kill a run at a moment of the generator's choice; what was done."""
    after = rng.randint(1, total - 3)
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


def soak_one(number: int, setting: tuple, scratch: Path, flags: list, seed: int) -> dict:
    """One setting: a whole run, a killed and resumed one, and what is different between them."""
    workers, accumulation, recompute, config = setting
    run_flags = [
        *flags,
        *("--dataloader_num_workers", workers, "--gradient_accumulation_steps", accumulation),
        *("--gradient_checkpointing", str(recompute).lower()),
    ]
    total = ROWS // (BATCH * (1 if config == "cpu.yaml" else 2)) // accumulation * EPOCHS
    whole, resumed = scratch / f"whole{number}", scratch / f"resumed{number}"
    whole.mkdir()
    whole_flags = [*run_flags, "--output_dir", whole]
    assert_succeeded(launch(config, RECORDED, whole_flags, env={"ALIBLIP_ROWS": str(whole)}))
    rng = random.Random(f"{seed} {number}")  # its own: settings run at the same time
    # Half of the kills, spread evenly over every flag: by chance a whole soak could miss them.
    one_rank = (workers > 0) ^ (accumulation > 1) ^ recompute
    going = BackgroundRun(config, resumed, run_flags)
    killed = kill_at_random(going, rng, total, during_save=number % 2 == 1, one_rank=one_rank)
    again = BackgroundRun(config, resumed, [*run_flags, "--resume_from_checkpoint", "last"])
    different = compare(whole, resumed) if again.wait(300) == 0 else ["the resumed run did not end well"]
    if different:
        print(again.printed[-4000:], flush=True)
    return {
        "launcher": config,
        "workers": workers,
        "accumulation": accumulation,
        "gradient_checkpointing": recompute,
        **killed,
        "different": different,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--settings", type=int, help="only the first so many settings")
    parser.add_argument("--at_once", type=int, default=2, help="settings that run at the same time")
    args = parser.parse_args()
    # The launcher changes fastest, so that a soak that is cut short has seen all of them.
    settings = list(itertools.product((0, 2), (1, 2), (False, True), LAUNCHERS))[: args.settings]
    about = {"seed": args.seed, "settings": len(settings), "at_once": args.at_once, **circumstances()}
    kills: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.at_once) as pool:
        flags = make_data(Path(scratch))
        going = [pool.submit(soak_one, *task, Path(scratch), flags, args.seed) for task in enumerate(settings)]
        try:
            for done in as_completed(going):
                kills.append(done.result())
                print(json.dumps(kills[-1]), flush=True)
                if args.json:  # after each, so that nothing is lost when the soak is stopped
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    write_json(args.json, {**about, "kills": kills})
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C: those that go on are enough to wait for
    equal = sum(not kill["different"] for kill in kills)
    during = sum(kill["checkpoint_was_being_written"] for kill in kills)
    print(
        f"{equal} of {len(kills)} killed runs ended bit-equal to the uninterrupted one; {during} were killed in a save"
    )
    return 0 if equal == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main())
