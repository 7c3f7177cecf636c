"""What a run tells about itself: log lines, rows it could not use, and how it stands.

Everything written here is told on the way: a disk that is full must not end a run that could go on.
"""

from __future__ import annotations

import math
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import datetime, timezone
from pathlib import Path

import torch
from tqdm.auto import tqdm

from aliblip.retrieval.results import format_table
from aliblip.runtime.arrival import Arrival
from aliblip.runtime.distributed import all_gather_objects, is_main, rank, reduce_max, reduce_sum, sum_numbers
from aliblip.runtime.files import append_json_line, read_json, read_json_lines, write_json, write_json_lines
from aliblip.runtime.mistakes import UsageError
from aliblip.training.meters import Meters, peak_memory_gb

# What a head scores that always answers the prior, one match in three pairs.
ITM_PRIOR_LOSS = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3
LINES_TO_BE_DEAD = 5
STEPS_TO_BE_YOUNG = 200
PARTS = (
    "loss_itc",
    "loss_itm",
    "itm_accuracy_positive",
    "itm_accuracy_negative",
    "positives_per_row",
    "rows_without_negative",
)
OF_LISTS = ("loss_pairs", "loss_lists")  # further parts of a run with a listwise loss
LINE = (
    "step {step} epoch {epoch:.2f} loss_itc {loss_itc:.4f} loss_itm {loss_itm:.4f} lr {learning_rate:.2e} "
    "temperature {temperature:.4f} itm_accuracy positive {itm_accuracy_positive:.2f} negative "
    "{negative} queue {queue_fill:.0%} grad_norm {grad_norm:.2f} "
    "samples/s {samples_per_second:.1f} data_wait {data_wait:.0%} memory {peak_memory_gb:.2f} GB"
)


def tell_if_not_written(what: str, write: Callable[[], None]) -> None:
    """Write a file that the run can do without; what went wrong is printed."""
    try:
        write()
    except OSError as error:
        print(f"warning: {what} could not be written: {error.strerror or error}", file=sys.stderr, flush=True)


class Unfailing:
    """A stream to the screen, or to a file on a disk that may be full: what can't be written is dropped."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()


def shared_out(states: list[dict], rank: int, processes: int) -> dict:
    """What a rank goes on with of what each rank kept of log and skipped rows, where their number may be another one:
    nothing is counted twice, and nothing is lost.

    Args:
        states: {"log": of `Log.state`, "skipped": of `SkippedRows.state`} of each rank of before.
        rank, processes: of now.
    """
    own = states[rank::processes]
    first, sums = states[0]["log"], [_sums_of(state["log"]) for state in own]
    log = {**first, "sums": None if first["sums"] is None else sum(sums, torch.zeros(2, len(PARTS))).tolist()}
    skipped = {
        "rows": [row for state in own for row in state["skipped"]["rows"]],
        "seen": sum(state["skipped"]["seen"] for state in own),
        "met": sum(state["skipped"]["met"] for state in own),
    }
    return {"log": log, "skipped": skipped}


def _sums_of(state: dict) -> torch.Tensor:
    if state["sums"] is None:
        return torch.zeros(2, len(PARTS))
    sums = torch.tensor(state["sums"])
    # Of version 0.1.0, in which all parts were of all batches.
    return torch.stack([sums, torch.full_like(sums, state["batches"])]) if sums.dim() == 1 else sums


class SkippedRows:
    """Rows that could not be used: counted, listed, and a reason to stop when they are too many."""

    def __init__(self, max_fraction: float, device: torch.device, file: Path):
        self.max_fraction = max_fraction
        self.device = device
        self.file = file
        self.rows: dict[int, dict] = {}  # of this rank, each once, however many epochs met it
        self.seen = self.met = 0

    def state(self) -> dict:
        return {"rows": list(self.rows.values()), "seen": self.seen, "met": self.met}

    def load_state(self, state: dict) -> None:
        self.rows = {row["row"]: row for row in state["rows"]}
        self.seen, self.met = state["seen"], state["met"]

    def add(self, batch: dict) -> None:
        skipped = batch.pop("skipped")
        self.seen += batch["row"].shape[0]
        self.met += len(skipped)
        self.rows.update((row["row"], row) for row in skipped)

    def collect(self) -> list[dict]:
        """The rows of all ranks, in order. A collective."""
        merged = {row["row"]: row for rows in all_gather_objects(list(self.rows.values())) for row in rows}
        return [merged[row] for row in sorted(merged)]

    def write(self) -> None:
        """Write the list so far. A collective."""
        rows = self.collect()
        if is_main():
            tell_if_not_written(self.file.name, lambda: write_json_lines(self.file, rows))

    def check(self, at_least: int = 0) -> None:
        """Stop, on all ranks, when too large a share of at least `at_least` rows was unusable. A collective."""
        seen, met = sum_numbers([self.seen, self.met], self.device)
        if met > self.max_fraction * seen and seen >= at_least:
            self.write()
            rows = self.collect()
            listed = "; ".join(f"{row['name']} ({row['reason']})" for row in rows[:20])
            more = f"; and {len(rows) - 20} more" if len(rows) > 20 else ""
            raise UsageError(
                f"{met} of {seen} rows could not be used, more than --max_skipped_fraction {self.max_fraction}: "
                f"{listed}{more} (all: {self.file})"
            )


def _log_entries(file: Path) -> tuple[list[dict], int]:
    """The lines of a log, and how many are none: cut off by a kill, or damaged."""
    rows = read_json_lines(file)
    entries = [row for row in rows if isinstance(row, dict) and isinstance(row.get("step"), int)]
    return entries, sum(1 for line in file.read_bytes().splitlines() if line.strip()) - len(entries)


class MatchingHead:
    """Notices when a matching head wakes up, and one that is dead: it answers "no match" to every pair, and does not
    learn.

    A head answers so at first in every run from scratch, and scores the loss of the prior. One that learns goes below
    it, by little, long before it calls the first pair a match; a dead one stays. So only lines after the first quarter
    of the run and after the warm-up count, and only those that are not below the prior; `LINES_TO_BE_DEAD` of them in
    a row tell.

    Args:
        total_steps, warmup_steps: of the run.
    """

    def __init__(self, total_steps: int, warmup_steps: int):
        self.young_until = max(STEPS_TO_BE_YOUNG, total_steps / 4, warmup_steps)
        self.lines = 0  # in a row that look dead
        self.awake_at: int | None = None  # step of the first line in which it tells half of the true pairs

    def wakes_up(self, step: int, accuracy_positive: float | None, accuracy_negative: float | None) -> bool:
        """Judge one log line; True once in a run. A head that calls everything a match, as a new one may, sleeps."""
        if self.awake_at is not None or (accuracy_positive or 0.0) < 0.5 or (accuracy_negative or 0.0) < 2 / 3:
            return False
        self.awake_at = step
        return True

    def looks_dead(self, step: int, loss_pairs: float, accuracy_positive: float) -> bool:
        """Judge one log line; True once for each row of lines."""
        at_prior = -0.002 < loss_pairs - ITM_PRIOR_LOSS < 0.01 and accuracy_positive < 0.05
        self.lines = self.lines + 1 if at_prior and step > self.young_until else 0
        return self.lines == LINES_TO_BE_DEAD


class Log:
    """Log lines: means over all steps and ranks since the last one, to the screen, to `log.jsonl` and to the trackers.

    The bar is for a terminal alone: in a file it would leave a line, or an empty one, at every step.

    Args:
        accelerator: of the run.
        output_dir: where `log.jsonl` stands.
        total_steps, warmup_steps: of the run.
        first_step: the position of a resumed run; later lines of its log are taken out.
        meters: of this process; None: only its speed is measured.
    """

    def __init__(
        self,
        accelerator,
        output_dir: Path,
        *,
        total_steps: int,
        warmup_steps: int,
        first_step: int,
        meters: Meters | None = None,
    ):
        self.accelerator = accelerator
        self.meters = meters or Meters(torch.device("cpu"))
        self.file = output_dir / "log.jsonl"
        on_terminal = accelerator.is_main_process and sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc="train", unit="step", leave=False, disable=not on_terminal
        )
        self.matching_head = MatchingHead(total_steps, warmup_steps)
        self.batches_of_step: list[torch.Tensor] = []
        self.parts = PARTS
        if accelerator.is_main_process and self.file.exists():
            # A resumed run repeats the steps after its checkpoint, and an evaluation at it: their lines would stand
            # there twice.
            every, damaged = _log_entries(self.file)
            if damaged:
                lines = "1 line" if damaged == 1 else f"{damaged} lines"
                self.tell(f"warning: {lines} of {self.file} can't be read: left out from now on")
            entries = [entry for entry in every if entry["step"] <= first_step]
            entries = [entry for entry in entries if entry["step"] < first_step or "evaluation" not in entry]
            for entry in entries:  # whether it woke up before is in these lines, and told
                accuracies = (entry.get(f"itm_accuracy_{side}") for side in ("positive", "negative"))
                self.matching_head.wakes_up(entry["step"], *accuracies)
            tell_if_not_written(self.file.name, lambda: write_json_lines(self.file, entries))
        self._restart()

    def _restart(self) -> None:
        self.sums: torch.Tensor | None = None  # (2, PARTS): the sums, and of how many batches each is
        self.batches = self.left_out = 0
        self.meters.restart()

    def state(self) -> dict:
        """What the next line has gathered so far, for a run that stops before it is written."""
        sums = None if self.sums is None else self.sums.tolist()
        near_prior = self.matching_head.lines
        return {"sums": sums, "batches": self.batches, "left_out": self.left_out, "near_prior": near_prior}

    def load_state(self, state: dict) -> None:
        self.batches, self.left_out, self.matching_head.lines = state["batches"], state["left_out"], state["near_prior"]
        if state["sums"] is not None:
            self.sums = _sums_of(state).to(self.accelerator.device)

    def tell(self, text: str) -> None:
        """Print a line, in the main process; the bar makes way for it."""
        if self.accelerator.is_main_process:
            self.bar.write(text)
            sys.stdout.flush()  # a file is read while the run goes on

    def close(self) -> None:
        """End the bar, so that what is printed afterwards begins on a line of its own."""
        self.bar.close()

    def paused(self) -> AbstractContextManager:
        """What takes place inside is no training, and does not count in its speed."""
        return self.meters.paused()

    def add_batch(self, output) -> None:
        values = {"loss_itc": output.parts["itc"], "loss_itm": output.parts["itm"], **output.report}
        self.parts = PARTS + OF_LISTS if "loss_lists" in values else PARTS
        parts = torch.stack([values[name].float() for name in self.parts])
        # NaN is no value: a batch of one product has no negatives. (In a step that is not finite none of it counts.)
        self.batches_of_step.append(torch.stack([parts.nan_to_num(nan=0.0), (~parts.isnan()).float()]))

    def end_step(self, left_out: bool) -> None:
        """The batches since the last call were a step. One that was left out doesn't count in the means."""
        for values in self.batches_of_step:
            if not left_out:
                # A run that goes on with a listwise loss, or without, counts other parts from there on.
                same = self.sums is not None and self.sums.shape == values.shape
                self.sums = self.sums + values if same else values
                self.batches += 1
        self.left_out += left_out
        self.batches_of_step.clear()
        self.bar.update()

    def line(self, step: int, epoch: float, on_device: dict[str, torch.Tensor], **values: float) -> None:
        """A line of the means since the last one. A collective; waits once for the device.

        Args:
            on_device: further scalars of this moment, read together with the means.
            values: those that the host knows.
        """
        is_scaled = "loss_scale" in on_device
        speed = self.meters.read(self.accelerator.num_processes)
        entry = {"step": step, "epoch": round(epoch, 4)}
        if self.batches:  # equal on all ranks
            sums, counts = reduce_sum(self.sums)
            values_of_now = torch.stack([value.float() for value in on_device.values()])
            # Of the process that takes the most.
            memory = reduce_max(torch.full((1,), peak_memory_gb(self.meters.device), device=sums.device))
            read = Arrival(torch.cat([sums / counts, values_of_now, memory])).read()
            read = [None if math.isnan(value) else value for value in read]
            names = [*self.parts, *on_device, "peak_memory_gb"]
            entry |= {**dict(zip(names, read, strict=True)), **values, **speed}
        if self.left_out:
            entry["steps_left_out"] = self.left_out
        if self.accelerator.is_main_process:
            self.write(entry)
        if self.batches:
            negative = entry["itm_accuracy_negative"]
            more = "" if entry["mfu"] is None else f" mfu {entry['mfu']:.1%}"
            more += f" loss_scale {entry['loss_scale']:.0f}" if "loss_scale" in entry else ""
            self.tell(LINE.format(**entry, negative="none" if negative is None else f"{negative:.2f}") + more)
            loss_pairs, accuracy = entry.get("loss_pairs", entry["loss_itm"]), entry["itm_accuracy_positive"]
            if self.matching_head.wakes_up(step, accuracy, negative):
                self.tell(
                    f"the matching head is awake since step {step}: it calls half of the true pairs a match, and at "
                    "most a third of the others"
                )
            if self.matching_head.looks_dead(step, loss_pairs, accuracy):
                self.tell(
                    f"warning: ITM's pair loss sits at {ITM_PRIOR_LOSS:.4f} since {LINES_TO_BE_DEAD} log lines: the "
                    'matching head answers "no match" to everything. Usual causes: a learning rate that is too high, '
                    "or titles that don't fit their photos."
                )
        if self.left_out:
            self.tell(
                f"warning: {self.left_out} steps up to step {step} had a loss or gradient that is not finite: they "
                "changed nothing"
                + (" (in fp16 a few are usual: the loss scale is lowered until it fits)" if is_scaled else "")
            )
        self._track({key: value for key, value in entry.items() if key != "step" and value is not None}, step)
        self._restart()

    def _track(self, values: dict, step: int) -> None:
        try:
            self.accelerator.log(values, step=step)
        except (
            Exception
        ) as error:  # trackers raise all sorts of things, TensorBoard that of its thread; none ends a run
            self.tell(f"warning: the trackers could not be written: {type(error).__name__}: {error}")

    def write(self, entry: dict) -> None:
        tell_if_not_written("a line of log.jsonl", lambda: append_json_line(self.file, entry))

    def evaluation(self, step: int, epoch: float, after: str, results: dict) -> None:
        """The results of an evaluation; `after` says of when it is."""
        if self.accelerator.is_main_process:
            self.write({"step": step, "epoch": epoch, "evaluation": results})
            self.tell(f"evaluation {after}\n{format_table(results)}")
        flat = {"eval/mean_recall": results["mean_recall"]}
        for direction in ("text_to_image", "image_to_text"):
            for stage in ("itc", "itm"):
                flat |= {f"eval/{direction}/{stage}/{key}": value for key, value in results[direction][stage].items()}
        self._track(flat, step)


class RunStatus:
    """`status.json`: how a run stands, or how it ended; launchers change exit codes and drop messages. A context
    manager that writes down the error with which the run ends.

    `status` is "running" (also of a run that was killed: `pid` and `host` tell which process to look for),
    "completed", "stopped" (a signal; `checkpoint` is where it goes on) or "failed" (`reason`).

    Args:
        file: the place.
        is_new: whether the run is to replace an earlier one, whose file stays what it is until this one has begun.
    """

    def __init__(self, file: Path, is_new: bool = False):
        self.file, self.is_new = file, is_new
        self.entry: dict = {}
        self.began = time.perf_counter()

    def __enter__(self) -> RunStatus:
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        if error is not None:
            self.failed(error)

    def minutes(self) -> float:
        """Since the run began, in this process."""
        return (time.perf_counter() - self.began) / 60

    def write(self, status: str, **values) -> None:
        """Write, in the main process, the status with all values so far."""
        self.entry |= {
            "status": status,
            **values,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        if is_main():
            tell_if_not_written(self.file.name, lambda: write_json(self.file, self.entry))

    def failed(self, error: BaseException) -> None:
        """Write, in any process, why the run failed; the first reason stays: the others follow from it."""

        if self.is_new and not self.entry and self.file.exists():
            return

        def write() -> None:
            before = self.entry
            with suppress(FileNotFoundError, ValueError):  # one that is damaged is replaced
                before = read_json(self.file)
            if before.get("status") != "failed":
                lines = str(error).strip().splitlines()
                reason = f"rank {rank()}: {type(error).__name__}: {lines[0][:500] if lines else ''}"
                write_json(self.file, {**before, "status": "failed", "reason": reason})

        tell_if_not_written(self.file.name, write)


__all__ = [
    "ITM_PRIOR_LOSS",
    "Log",
    "MatchingHead",
    "RunStatus",
    "SkippedRows",
    "Unfailing",
    "shared_out",
    "tell_if_not_written",
]
