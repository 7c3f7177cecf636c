"""Whole training runs: the plain way to compute a step against ours, or a recipe with one technique changed at a time.

    python benchmarks/bench_training.py --json benchmarks/results/training.json --picture docs/training-both-ways.png
    python benchmarks/bench_training.py --change itm_listwise=0 itm_queue_titles=0 \
        --json benchmarks/results/techniques.json --picture docs/techniques.png
    python benchmarks/bench_training.py --also mixed_precision=bf16 --change fp8=true --seeds 42      # needs torchao
    python benchmarks/bench_training.py --epochs 0.1 --seeds 42       # a minute, to try it

Each run is a process of its own with one thread: the demo's recipe on its catalogue, which `demo/make_catalogue.py`
draws, as one process of 32 rows. Ours is `train.py` with all on that leaves the result what it is, `--unpad` too.
The plain way computes the same losses as the published code does, in our own words (`bench_step.py` says what that is).
Both begin with the same weights and see the same rows; sums in another order, and other draws of negatives, then lead
them apart as two seeds are apart. With `--change` the recipe stands beside itself with one flag set to another value;
`fp8=true` computes the roundings of 8 bits on a CPU, slowly.

Measured is the model after the last step on the split `test`: recall@1 of both directions before and after re-ranking
with the model's own weight, the mean of the six recalls, and the step at which the matching head calls half of the true
pairs a match. Runs in `--folder` that were finished with the very same command are not run again, so that ours is
trained once for both tables. The ratio is the mean of the six recalls of ours over that of the last side, by means over
the seeds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import yaml
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import aliblip.training.step
import train
from aliblip.runtime.mistakes import main_with_usage_errors
from aliblip.training.fp8 import Float8Towers
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from aliblip.training.progress import MatchingHead
from benchmarks.bench_step import PLAIN, PlainModel, follow_one_by_one, padded, plain_parts
from benchmarks.common import finish, parser

ROOT = Path(__file__).resolve().parent.parent
# First arguments of a process that trains the plain way, or in 8 bits as a CPU can.
PLAINLY, IN_8_BITS = "--plainly", "--in_8_bits"
OURS, PLAIN_WAY = "ours", "plain way"
CURVES = ("step", "loss_itc", "loss_itm", "itm_accuracy_positive", "itm_accuracy_negative")
DIRECTIONS = ("text_to_image", "image_to_text")


def main(command_line: Sequence[str] | None = None) -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--config", type=Path, default=ROOT / "recipes" / "demo.yaml")
    arguments.add_argument("--data_dir", default=str(ROOT / "demo" / "catalogue"))
    arguments.add_argument("--tokenizer_name", default=str(ROOT / "demo" / "catalogue" / "tokenizer"))
    arguments.add_argument("--split_name", default="test", help="what is measured")
    arguments.add_argument("--rows", type=int, default=32, help="of a batch")
    arguments.add_argument("--epochs", type=float, help="default: the recipe's")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    arguments.add_argument("--change", nargs="+", default=[], metavar="FLAG=VALUE", help="instead of the plain way")
    arguments.add_argument("--also", nargs="+", default=[], metavar="FLAG=VALUE", help="of all sides")
    arguments.add_argument("--jobs", type=int, default=2, help="runs at a time")
    arguments.add_argument("--folder", type=Path, default=Path("outputs/bench_training"), help="of the runs")
    arguments.add_argument("--picture", type=Path, help="curves of all runs (needs matplotlib)")
    args = arguments.parse_args(command_line)
    for name in ("change", "also"):
        if any("=" not in given for given in getattr(args, name)):
            arguments.error(
                f"--{name} takes FLAG=VALUE, as in itm_listwise=0; given were {' '.join(getattr(args, name))}"
            )
    if args.picture is not None and importlib.util.find_spec("matplotlib") is None:
        arguments.error("--picture needs matplotlib: pip install matplotlib")
    also = flags_of(args.also)
    sides = {OURS: ["--unpad", "true", *also]}
    for change in args.change:
        first = [IN_8_BITS] if change.startswith("fp8=") else []
        sides[change] = [*first, *sides[OURS], *flags_of([change])]
    if not args.change:
        sides[PLAIN_WAY] = [PLAINLY, "--attn_implementation", "eager", *also]
    runs = [(side, seed) for seed in args.seeds for side in sides]  # in turn
    with ThreadPoolExecutor(args.jobs) as pool:
        measured = list(pool.map(lambda run: run_one(args, *run, sides[run[0]]), runs))
    report: dict[str, dict[str, dict]] = {side: {} for side in sides}
    for (side, seed), result in zip(runs, measured, strict=True):
        report[side][str(seed)] = result
    for side, by_seed in report.items():
        print(told(side, list(by_seed.values())))
    if args.picture is not None:
        draw(report, args.picture)
    means = [statistics.mean(result["mean_of_six"] for result in by_seed.values()) for by_seed in report.values()]
    told_paths = {name: str(value).removeprefix(f"{ROOT}/") for name, value in vars(args).items()}
    settings = {name: value for name, value in told_paths.items() if name not in ("json", "folder", "picture")}
    finish("training", means[0] / means[-1], {"sides": report, "settings": settings}, args.json)


def flags_of(given: Sequence[str]) -> list[str]:
    return [part for pair in given for part in (f"--{pair.split('=', 1)[0]}", pair.split("=", 1)[1])]


def told(side: str, results: list[dict]) -> str:
    def numbers(key: str, digits: int = 1) -> str:
        return ", ".join("never" if result[key] is None else f"{result[key]:.{digits}f}" for result in results)

    return (
        f"{side}: R@1 ITC {numbers('itc')}, re-ranked {numbers('itm')} (gain {numbers('gain')}); mean of the six "
        f"{numbers('mean_of_six')}; head awake at step {numbers('awake', 0)}; CPU minutes {numbers('cpu_minutes')}"
    )


def run_one(args, side: str, seed: int, flags: list[str]) -> dict:
    """Train, unless that is done, and measure."""
    output = args.folder / f"{side}-{seed}".replace(" ", "-").replace("/", "-")
    special = [flag for flag in flags if flag in (PLAINLY, IN_8_BITS)]
    program = [str(Path(__file__).resolve()), *special] if special else [str(ROOT / "train.py")]
    command = [
        *program,
        *("--config", str(args.config), "--data_dir", args.data_dir, "--tokenizer_name", args.tokenizer_name),
        *("--output_dir", str(output), "--overwrite_output_dir", "true", "--seed", str(seed)),
        *("--per_device_train_batch_size", str(args.rows), "--negatives_from_all_ranks", "false"),
        *(("--num_train_epochs", str(args.epochs)) if args.epochs else ()),
        *(flag for flag in flags if flag not in special),
    ]
    file = output / "finished.json"
    finished = json.loads(file.read_text()) if file.exists() else {}
    if finished.get("command") != command:
        finished = {"command": command, "cpu_seconds": run_process(command, args.folder / f"{output.name}.log")}
        file.write_text(json.dumps(finished))
    evaluation = output / "measured"
    command = [str(ROOT / "evaluate_retrieval.py"), "--model_name_or_path", str(output / "last")]
    command += ["--data_dir", args.data_dir, "--split_name", args.split_name, "--output_dir", str(evaluation)]
    command += ["--k_rerank", str(yaml.safe_load(args.config.read_text())["k_rerank"])]
    run_process([*command, "--overwrite_output_dir", "true"], args.folder / f"{output.name}-measured.log")
    results = json.loads((evaluation / "results.json").read_text())
    itc, itm = ([100 * results[direction][stage]["recall@1"] for direction in DIRECTIONS] for stage in ("itc", "itm"))
    six = [100 * results[direction]["itm"][f"recall@{k}"] for direction in DIRECTIONS for k in (1, 5, 10)]
    itc_six = [100 * results[direction]["itc"][f"recall@{k}"] for direction in DIRECTIONS for k in (1, 5, 10)]
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    curves = [{key: line[key] for key in CURVES} for line in lines if "loss_itc" in line]
    head = MatchingHead(curves[-1]["step"], 0)
    for point in curves:
        head.wakes_up(point["step"], point["itm_accuracy_positive"], point["itm_accuracy_negative"])
    return {
        "itc_by_direction": itc,
        "itm_by_direction": itm,
        "itc": statistics.mean(itc),
        "itm": statistics.mean(itm),
        "gain": statistics.mean(itm) - statistics.mean(itc),
        "mean_of_six": statistics.mean(six),
        "gain_of_six": statistics.mean(six) - statistics.mean(itc_six),
        "awake": head.awake_at,
        "cpu_minutes": finished["cpu_seconds"] / 60,
        "curves": curves,
    }


def run_process(command: list[str], log: Path) -> float:
    """Its CPU seconds."""
    log.parent.mkdir(parents=True, exist_ok=True)
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with log.open("w") as file:
        process = subprocess.Popen([sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=one_thread)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}; {log} says why")
    return usage.ru_utime + usage.ru_stime


# --- the plain way ----------------------------------------------------------------------------------------------------


@contextmanager
def plain_training() -> Iterator[None]:
    """What `bench_step.py` does to a step, for a whole run of `train.py`."""
    encode, forward = MomentumState.encode, RetrievalObjective.forward
    build_objective = train.build_objective

    def pairs_by_themselves(model, args, longest_title=None):
        objective = build_objective(model, args, longest_title)
        objective.model = PlainModel(model)
        return objective

    with (
        plain_parts(PLAIN),
        mock.patch.object(MomentumState, "encode", lambda self, batch: encode(self, padded(batch))),
        mock.patch.object(MomentumState, "update", follow_one_by_one),
        mock.patch.object(
            RetrievalObjective, "forward", lambda self, batch, *rest: forward(self, padded(batch), *rest)
        ),
        mock.patch.object(train, "build_objective", pairs_by_themselves),
        mock.patch.object(aliblip.training.step, "_step_if_finite", step_one_by_one),
    ):
        yield


def step_one_by_one(optimizer, norm: Tensor, scaler=None) -> None:
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = False, False
    if norm.isfinite():
        optimizer.step()


# --- the picture ------------------------------------------------------------------------------------------------------


def draw(report: dict[str, dict[str, dict]], file: Path) -> None:
    from matplotlib.figure import Figure

    panels = {
        "loss (ITC + ITM)": lambda point: point["loss_itc"] + point["loss_itm"],
        "true pairs that the matching head calls a match": lambda point: point["itm_accuracy_positive"],
    }
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for number, (side, by_seed) in enumerate(report.items()):
            for seed, result in by_seed.items():
                steps = [point["step"] for point in result["curves"]]
                values = [value(point) for point in result["curves"]]
                label = side if seed == next(iter(by_seed)) else None
                axes.plot(steps, values, color=f"C{number}", linewidth=1.2, alpha=0.8, label=label)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("step")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    if IN_8_BITS in sys.argv[1:2]:
        del sys.argv[1]
        Float8Towers.emulate = True
        main_with_usage_errors("train.py", train.main)
    if PLAINLY in sys.argv[1:2]:
        del sys.argv[1]
        with plain_training():
            main_with_usage_errors("train.py", train.main)
    main()
