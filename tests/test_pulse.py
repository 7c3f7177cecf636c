"""A process of a run that stands still ends the others, with its name."""

from __future__ import annotations

import time

import psutil
import pytest
import tiny
import torch.distributed as dist
from helpers import spawn
from runs import TINY, BackgroundRun, write_split

from aliblip.runtime import pulse
from aliblip.runtime.distributed import barrier, rank
from aliblip.runtime.pulse import Pulse


def _busy_and_silent() -> list[str]:
    pulse.SECONDS_BETWEEN_SIGNS, pulse.SILENT_AFTER, pulse.end_now = 0.1, 1.0, lambda: None
    told: list[str] = []
    with Pulse(told.append):
        end = time.monotonic() + 2.0
        while time.monotonic() < end:  # busy for longer than that: a process that works gives signs
            sum(range(1000))
        barrier()
    assert told == []
    silent = Pulse(told.append)
    with silent:
        if rank() == 1:
            silent._ended.set()  # its thread says goodbye: it is done, and no other waits for it
        time.sleep(2.0)
        barrier()
    assert told == []
    pulse.Pulse._say = lambda self, what, to: None  # now nobody says anything
    with Pulse(told.append):
        end = time.monotonic() + 60
        while not told and time.monotonic() < end:
            time.sleep(0.05)
    dist.barrier()
    return told


def test_processes_that_work_give_signs_and_silent_ones_are_named():
    for number, told in enumerate(spawn(_busy_and_silent, 2)):
        assert len(told) == 1 and told[0].startswith(f"rank {1 - number} on "), told
        assert "has given no sign of life for " in told[0]


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_run(tmp_path, stopped):
    write_split(tmp_path / "data", "train", 40)
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    flags = [*TINY, "--data_dir", tmp_path / "data", "--tokenizer_name", tmp_path / "tokenizer", "--evaluate_every", 0]
    flags += ["--num_train_epochs", 1000, "--per_device_train_batch_size", 4]
    going = BackgroundRun("cpu_2_processes.yaml", tmp_path / "run", flags, launched=False, ALIBLIP_SILENT="3")
    going.wait_until(lambda: going.step() >= 2)
    psutil.Process(going.processes[stopped].pid).suspend()
    try:
        assert going.processes[1 - stopped].wait(100) == 1
    finally:
        going.kill()
    assert f"rank {stopped} on " in going.printed and "has given no sign of life for" in going.printed
    status = going.status()
    assert status["status"] == "failed" and f"rank {stopped} on " in status["reason"]
