"""kill -9 under every setting, resume, and compare with the run that was never killed: `make soak`.

    python tests/soak.py --seed 0 --json benchmarks/results/soak.json      # about half an hour on two cores

Kills are aimed at all moments in turn: between saves, while a checkpoint, `last/` or `best/` is written, while an old
checkpoint is removed, and in an evaluation. A kill hits the launcher and all that it started, or, in every second
setting of several ranks, one of them. The killed run has to end with the same losses, gradient norms, rows and weights,
bit by bit. Then runs go on with other numbers of processes and readers after every kill, and have to read the same rows
in every step; and a second run starts in the folder of a living one, is refused with its name, and changes nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import psutil
import tiny
import torch
from helpers import ROOT, assert_succeeded, launch, run
from runs import TINY, BackgroundRun, rows_of, steps_of, write_split
from safetensors.torch import load_file
from test_elastic import config_of, rows_by_step

from aliblip.runtime.files import write_json
from aliblip.training.checkpoint import checkpoints
from benchmarks.common import circumstances

ROWS, BATCH, EPOCHS = 50, 4, 3
RECORDED = Path(__file__).resolve().parent / "recorded_train.py"
MOMENTS = {
    "between saves": lambda folder: True,
    "a checkpoint is written": lambda folder: list(folder.glob(".checkpoint-*.tmp")),
    "a checkpoint is removed": lambda folder: len(checkpoints(folder)) > LIMIT,
    "last/ is written": lambda folder: (folder / ".last.tmp").exists(),
    "an evaluation": lambda folder: (folder / "last").exists() and not (folder / "last" / "results.json").exists(),
    "best/ is written": lambda folder: (folder / ".best.tmp").exists(),
}
LIMIT = 3
LAUNCHERS = ("cpu.yaml", "cpu_2_processes.yaml", "deepspeed_zero2_cpu.yaml")


def make_data(folder: Path) -> list:
    broken = {17: {"image": {"bytes": b"", "path": "x"}}, 30: {"caption": " "}}
    write_split(folder / "data", "train", ROWS, broken)
    write_split(folder / "data", "validation", 8)
    tiny.tokenizer().save_pretrained(folder / "tokenizer")
    return [
        *TINY,
        *("--data_dir", folder / "data", "--tokenizer_name", folder / "tokenizer"),
        *("--per_device_train_batch_size", BATCH, "--num_train_epochs", EPOCHS, "--evaluate_every", 1),
        *("--max_skipped_fraction", 0.5, "--checkpointing_steps", 1, "--save_total_limit", LIMIT),
    ]


def kill_at_random(going: BackgroundRun, rng: random.Random, total: int, moment: str, one_rank: bool) -> dict:
    """Kill a run at a moment of one kind, after a step of the generator's choice; what was done."""
    after = rng.randint(1, max(total // 2, 1))
    going.wait_until(lambda: going.step() >= after and checkpoints(going.folder))
    try:
        going.wait_until(lambda: MOMENTS[moment](going.folder))
        time.sleep(rng.uniform(0.0, 0.3) if moment == "between saves" else rng.uniform(0.0, 0.01))
    except AssertionError:  # the run was faster: it is over, or about to be
        moment = f"missed: {moment}"
    if one_rank and len(ranks := going.ranks()) > 1:
        with suppress(psutil.NoSuchProcess):
            ranks[rng.randrange(len(ranks))].kill()
        going.wait(90)
        whom = "one rank"
    else:
        going.kill()
        whom = "all"
    return {"after_step": going.step(), "killed": whom, "moment": moment}


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
    moment = list(MOMENTS)[(number + number // len(LAUNCHERS)) % len(MOMENTS)]  # every launcher meets all of them
    killed = kill_at_random(going, rng, total, moment, one_rank)
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


def soak_elastic(number: int, scratch: Path, flags: list, seed: int) -> dict:
    """A run that goes on with other processes and readers after each kill; whether every step has the same rows."""
    rng = random.Random(f"{seed} elastic {number}")
    config, folder, batch = "cpu.yaml", scratch / f"elastic{number}", 8
    steps = ROWS // batch * EPOCHS
    planned, seen, phases, different = {}, set(), [], []
    for phase in range(6):
        processes = 1 if phase == 0 else rng.choice((1, 2, 4))
        readers, accumulation = rng.randrange(4), rng.choice((1, 2))
        config = config_of(processes, scratch)
        where = scratch / f"planned{number}" if phase == 0 else folder
        run_flags = [
            *flags,
            *("--per_device_train_batch_size", batch // processes // accumulation),
            *("--gradient_accumulation_steps", accumulation, "--dataloader_num_workers", readers),
            *("--resume_from_checkpoint", "last", "--evaluate_every", 0),
        ]
        going = BackgroundRun(config, where, run_flags, launched=False)
        if 0 < phase < 5:
            after = phase * steps // 5
            going.wait_until(lambda going=going, after=after: going.step() >= after and checkpoints(folder))
            time.sleep(rng.uniform(0.0, 0.2))
            going.kill()
        elif going.wait(300):
            different.append(f"phase {phase} did not end well")
        read = rows_by_step(where, accumulation, batch)
        if phase == 0:
            planned = read
        elif wrong := [step for step, rows in read.items() if rows != planned[step]]:
            different.append(f"rows of {wrong}")
        seen |= set(read) if phase else set()
        phases.append(f"{processes} processes, {readers} readers, {accumulation} batches")
    if seen != set(planned):
        different.append(f"{len(set(planned) - seen)} steps were read by nobody")
    return {"elastic": phases[1:], "different": different}


def soak_owned(number: int, scratch: Path, flags: list) -> dict:
    """A second run in the folder of a living one; whether it is refused, and the first ends as if nothing had been."""
    config, folder, different = LAUNCHERS[number % len(LAUNCHERS)], scratch / f"owned{number}", []
    going = BackgroundRun(config, folder, flags, ALIBLIP_PAUSE="2")  # it lives until the second one has been refused
    going.wait_until(lambda: going.step() >= 1)
    how = ["--resume_from_checkpoint", "last"] if number % 2 else ["--overwrite_output_dir", "true"]
    second = run([sys.executable, ROOT / "train.py", *flags, *how, "--output_dir", folder])
    if second.returncode != 2 or "is in use by train.py (process " not in second.stderr:
        different.append(
            f"the second one was not refused: {second.returncode} {(second.stdout + second.stderr)[-300:]}"
        )
    if going.wait(300):
        different.append("the first one did not end well")
    whole = scratch / f"alone{number}"
    if BackgroundRun(config, whole, flags).wait(300) == 0:
        different += compare(whole, folder)
    return {"owned": config, "second": how[0], "different": different}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--settings", type=int, help="only the first so many settings")
    parser.add_argument("--others", type=int, default=3, help="runs with other processes, and in a folder in use")
    parser.add_argument("--at_once", type=int, default=2, help="settings that run at the same time")
    args = parser.parse_args()
    # The launcher changes fastest, so that a soak that is cut short has seen all of them.
    settings = list(itertools.product((0, 2), (1, 2), (False, True), LAUNCHERS))[: args.settings]
    about = {"seed": args.seed, "settings": len(settings), "at_once": args.at_once, **circumstances()}
    kills: list[dict] = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(args.at_once) as pool:
        flags = make_data(Path(scratch))
        going = [pool.submit(soak_one, *task, Path(scratch), flags, args.seed) for task in enumerate(settings)]
        going += [pool.submit(soak_elastic, number, Path(scratch), flags, args.seed) for number in range(args.others)]
        going += [pool.submit(soak_owned, number, Path(scratch), flags) for number in range(args.others)]
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
    moments = Counter(kill["moment"] for kill in kills if "moment" in kill)
    print(f"{equal} of {len(kills)} faults survived, bit by bit or row by row; kills: {dict(moments)}")
    return 0 if equal == len(kills) else 1


if __name__ == "__main__":
    sys.exit(main())
