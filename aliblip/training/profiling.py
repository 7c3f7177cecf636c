"""`--profile N`: a trace of N steps of the main process, and one page that says where their time goes.

    profiler = Profiler(steps, output_dir / "profile", device)
    for each step:
        profiler.begin_step(left_in_epoch, steps_per_epoch)
        ...with record_function(FORWARD): ...
        profiler.end_step(samples)
    profiler.finish()

`trace.json.gz` opens in https://ui.perfetto.dev or chrome://tracing; `summary.md` is the page.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch.autograd.profiler import record_function
from torch.profiler import ProfilerActivity, profile

from aliblip.runtime.mistakes import UsageError

STEP = "training step"
READ, MOMENTUM, FORWARD, BACKWARD, OPTIMIZER = "read data", "momentum encoders", "forward", "backward", "optimizer"
PHASES = (READ, MOMENTUM, FORWARD, BACKWARD, OPTIMIZER)
REST = "rest"
WARM_UP = 3  # steps of a process before its speed is usual
OPERATORS = 15  # on the page


def begins_here(wanted: int, passed: int, left_in_epoch: int, steps_per_epoch: int) -> bool:
    """Whether a profile of `wanted` steps begins with this one, after `passed` others of its process: all of them are
    of one epoch, if an epoch has as many."""
    return wanted > 0 and passed >= WARM_UP and left_in_epoch >= min(wanted, steps_per_epoch)


def check_profile(wanted: int, total_steps: int, steps_per_epoch: int) -> None:
    """Refuse a profile to which a run never comes.

    Raises:
        UsageError: its steps are too few.
    """
    for step in range(total_steps if wanted else 0):
        end = min((step // steps_per_epoch + 1) * steps_per_epoch, total_steps)
        if begins_here(wanted, step, end - step, steps_per_epoch):
            return
    if wanted:
        raise UsageError(
            f"--profile {wanted} does not fit into a run of {total_steps} steps, whose first {WARM_UP} are left out: "
            "give fewer, or train longer"
        )


class Profiler:
    """Profiles N steps in a row, once the first steps have passed, see `begins_here`.

    Args:
        steps: N; 0: nothing is done.
        folder: where the two files go; made when they are written.
        device: of the process.
    """

    def __init__(self, steps: int, folder: Path, device: torch.device):
        self.wanted, self.folder, self.device = steps, folder, device
        self.passed = 0  # steps of this process
        self.seconds: list[float] = []  # of the profiled steps
        self.samples = 0
        self._profile: profile | None = None
        self._range: record_function | None = None
        self._began = 0.0

    def begin_step(self, left_in_epoch: int, steps_per_epoch: int) -> None:
        """Before a step reads its data.

        Args:
            left_in_epoch: steps of the epoch, this one included.
            steps_per_epoch: of a whole one.
        """
        if self._profile is None and begins_here(self.wanted, self.passed, left_in_epoch, steps_per_epoch):
            on_gpu = self.device.type == "cuda"
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            self._profile = profile(activities=activities)
            self._profile.start()
        if self._profile is not None:
            self._synchronize()
            self._range = record_function(STEP)
            self._range.__enter__()
            self._began = time.perf_counter()

    def end_step(self, samples: int) -> str | None:
        """After a step, before its checkpoint or evaluation. What is to be told when it was the last.

        Args:
            samples: rows of the step on this process.
        """
        self.passed += 1
        if self._range is None:
            return None
        self._synchronize()
        self._range.__exit__(None, None, None)
        self._range = None
        self.seconds.append(time.perf_counter() - self._began)
        self.samples += samples
        return self.finish() if len(self.seconds) == self.wanted else None

    def finish(self) -> str | None:
        """Write both files of what has been profiled so far, if anything. What is to be told."""
        if self._profile is None:
            return None
        ended, self._profile, self.wanted = self._profile, None, 0
        if self._range is not None:  # an error in the middle of the step
            self._range.__exit__(None, None, None)
            self._range = None
        ended.stop()
        if not self.seconds:
            return None
        page, trace, steps = self.folder / "summary.md", self.folder / "trace.json.gz", len(self.seconds)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            ended.export_chrome_trace(str(trace))
            page.write_text(summary(ended.events(), self.seconds, self.samples, self.device), encoding="utf-8")
        except OSError as error:
            return f"warning: the profile could not be written: {error.strerror or error}"
        return f"profiled {steps} step{'s' if steps > 1 else ''}: {page}, {trace}"

    def _synchronize(self) -> None:
        """Let a step begin and end with an idle device: its time is then its own."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def summary(events, seconds: list[float], samples: int, device: torch.device) -> str:
    """The page of a profile, in Markdown.

    Args:
        events: `profile.events()`; what does not belong to a `STEP` does not count.
        seconds: of each step.
        samples: of all these steps on this process.
        device: of the process.
    """
    on_gpu = device.type == "cuda"
    here = [event for event in events if str(event.device_type).endswith("CPU")]
    steps = [event.time_range for event in here if event.name == STEP]
    own_thread = next((event.thread for event in here if event.name == STEP), threading.get_ident())
    host: Counter[str] = Counter()
    busy: Counter[str] = Counter()
    operators: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0])
    for event in here:
        if not any(step.start <= event.time_range.start <= step.end for step in steps):
            continue
        phase = _phase_of(event, own_thread)
        on_host, on_device = event.self_cpu_time_total / 1e3, event.self_device_time_total / 1e3
        if event.thread == own_thread:  # others run beside it
            host[phase] += on_host
        busy[phase] += on_device
        if event.name not in (STEP, *PHASES):
            entry = operators[event.name]
            entry[0], entry[1], entry[2] = entry[0] + on_host, entry[1] + on_device, entry[2] + 1
    count, wall = len(seconds), sum(seconds) * 1e3
    name = torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    lines = [
        f"# Where the time of {count} step{'s' if count > 1 else ''} goes",
        "",
        f"{name}, torch {torch.__version__}: {wall / count:.1f} ms a step (the fastest {min(seconds) * 1e3:.1f}, the "
        f"slowest {max(seconds) * 1e3:.1f}), {samples / wall * 1e3:.1f} samples/s of this process, under the profiler.",
    ]
    if on_gpu:
        lines[-1] += f" The device works {sum(busy.values()) / wall:.0%} of the time."
    lines += ["", "| part of a step | host, ms | share |" + (" device, ms | share |" if on_gpu else "")]
    lines += ["| --- | --- | --- |" + (" --- | --- |" if on_gpu else "")]
    for phase in (*PHASES, REST):
        line = f"| {phase} | {host[phase] / count:.2f} | {host[phase] / wall:.1%} |"
        if on_gpu:
            line += f" {busy[phase] / count:.2f} | {busy[phase] / wall:.1%} |"
        lines.append(line)
    order = 1 if on_gpu else 0
    lines += ["", f"| operator, by its own time on the {'device' if on_gpu else 'host'} | ms a step | share | calls |"]
    lines += ["| --- | --- | --- | --- |"]
    slowest = sorted(operators.items(), key=lambda item: item[1][order], reverse=True)[:OPERATORS]
    for operator, values in slowest:
        spent, calls = values[order], values[2] / count
        lines.append(f"| `{operator[:70]}` | {spent / count:.2f} | {spent / wall:.1%} | {calls:.4g} |")
    calls = sum(values[2] for name, values in operators.items() if name.startswith("aten::"))
    lines += ["", f"{calls / count:,.0f} operators of torch a step. The trace beside this file shows each of them."]
    return "\n".join(lines) + "\n"


def _phase_of(event, own_thread: int) -> str:
    """The innermost part of the step in which an event lies. What other threads do is the backward pass: autograd has
    a thread for each GPU."""
    while event is not None:
        if event.name in PHASES:
            return event.name
        if event.cpu_parent is None and event.thread != own_thread:
            return BACKWARD
        event = event.cpu_parent
    return REST


__all__ = [
    "BACKWARD",
    "FORWARD",
    "MOMENTUM",
    "OPTIMIZER",
    "READ",
    "Profiler",
    "check_profile",
    "record_function",
    "summary",
]
