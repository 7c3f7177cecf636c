"""Processes that read ahead: what they give arrives whole, and every way in which they can fail ends the wait."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import select
import signal
import sys
import time
from multiprocessing import active_children
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from aliblip.data import readers
from aliblip.data.readers import Readers, ReadingHere, now_reading
from aliblip.runtime.interrupts import StopSignals, stop_asked
from aliblip.runtime.mistakes import UsageError
from aliblip.runtime.pulse import Pulse

BATCH = {
    "pixel_values": torch.arange(3 * 4 * 5 * 5, dtype=torch.uint8).view(4, 3, 5, 5)[:, :, :4],  # not contiguous
    "input_ids": torch.arange(8).view(4, 2),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(1.5),
    "skipped": [{"row": 1, "reason": "no photo"}],
    "others": (np.arange(3), "text", b"\0" * 100_000, None),
}


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    assert not active_children()


def equal(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return np.array_equal(one, other) if isinstance(one, np.ndarray) else one == other


@pytest.mark.parametrize("has_memory", [True, False])
def test_items_arrive_as_they_are_given(monkeypatch, has_memory):
    if not has_memory:  # as on systems that can't pass memory
        monkeypatch.setattr(readers, "_HAS_MEMORY", False)
    works = [[(number, BATCH) for number in range(first, 20, 3)] for first in range(3)]
    with Readers(works, ahead=2) as reading:
        kept = [reading.take(number % 3) for number in range(20)]
        with pytest.raises(RuntimeError, match=r"reader 0 \(process \d+\) has nothing more to give"):
            reading.take(0)
    for number, (place, batch) in enumerate(kept):
        assert place == number and equal(batch, BATCH)
        batch["pixel_values"].add_(1)  # its own memory
    assert kept[0][1]["pixel_values"][0, 0, 0, 0] == 1


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory can't be passed on this system")
def test_no_shared_memory_of_a_file_system_is_needed():
    """A container of Docker has 64 MB of /dev/shm: readers that filled it died, and the run waited for them."""

    def mapped(name):  # by this process, which other tests may have left some of
        return {line.split()[0] for line in Path("/proc/self/maps").read_text().splitlines() if name in line}

    before = mapped("/dev/shm/")
    with Readers([[torch.zeros(2**20, dtype=torch.uint8)] * 3], ahead=3) as reading:
        batches = [reading.take(0) for _ in range(3)]
        assert len(mapped("memfd:aliblip-batch")) >= 3 and not mapped("/dev/shm/") - before
        assert not any(batch.is_shared() for batch in batches)
    assert all(batch.sum() == 0 for batch in batches)  # it lives as long as the batch


def test_a_reader_works_ahead_and_no_further(tmp_path):
    def work():
        for number in range(100):
            (tmp_path / str(number)).touch()
            yield number

    with Readers([work()], ahead=3) as reading:
        assert reading.take(0) == 0
        end = time.monotonic() + 60
        while not (tmp_path / "4").exists() and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(list(tmp_path.iterdir())) == 5  # one was taken, three are ready, one waits for room


class Broken(RuntimeError):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")  # can't be unpickled


def test_what_a_reader_raises_is_raised_where_it_is_waited_for():
    def work(error):
        yield 1
        raise error

    for error, kind, text in (
        (UsageError("one line"), UsageError, "one line"),
        (KeyError("here"), KeyError, "here"),
        (Broken("it", "broke"), RuntimeError, "Broken: it broke"),
    ):
        with Readers([work(error)], ahead=2) as reading:
            assert reading.take(0) == 1
            with pytest.raises(kind, match=text) as raised:
                reading.take(0)
        # A mistake is one line; a bug has the traceback of the reader.
        assert (raised.value.__cause__ is None) == (kind is UsageError)
        if kind is not UsageError:
            assert "in work" in str(raised.value.__cause__)


def kill_at(number: int):
    now_reading("train-3.tar")
    yield 1
    faulthandler.disable()  # pytest's would print where it was
    os.kill(os.getpid(), number)
    yield 2


@pytest.mark.parametrize(
    "number, why",
    [
        (signal.SIGKILL, "was killed by SIGKILL while it read train-3.tar, as the system does where memory runs out"),
        (signal.SIGBUS, "was killed by SIGBUS while it read train-3.tar, a file that it read was cut short, or a disk"),
        (signal.SIGSEGV, "was killed by SIGSEGV while it read train-3.tar, a damaged file"),
        (signal.SIGABRT, "was killed by SIGABRT while it read train-3.tar: give a smaller --dataloader_num_workers"),
    ],
)
def test_a_reader_that_is_killed_ends_the_wait_with_what_killed_it(number, why):
    with Readers([kill_at(number), [5, 6]], ahead=1) as reading:
        assert reading.take(0) == 1
        with pytest.raises(UsageError, match=why):
            reading.take(0)
        assert reading.take(1) == 5  # the others go on
    told = r"ended before its work was done \(exit code 3\)"
    with Readers([(os._exit(3) for _ in range(1))], ahead=1) as reading, pytest.raises(UsageError, match=told):
        reading.take(0)


def test_a_reader_that_is_killed_in_the_middle_of_a_batch_ends_the_wait(monkeypatch):
    monkeypatch.setattr(readers, "_HAS_MEMORY", False)
    with Readers([[b"\1" * 50_000_000]], ahead=1) as reading:
        process = reading._readers[0].process
        assert select.select([reading._readers[0].channel], [], [], 60)[0]  # it sends, and waits for room there
        psutil.Process(process.pid).kill()
        process.join()
        with pytest.raises(UsageError, match="was killed by SIGKILL"):
            reading.take(0)


def stuck():
    now_reading("/mnt/photos")
    yield 1
    time.sleep(3600)


def test_a_reader_that_does_nothing_ends_the_wait(monkeypatch):
    monkeypatch.setattr(readers, "SECONDS_BETWEEN_LOOKS", 0.05)
    with Readers([stuck()], ahead=1, patience=0.5) as reading:
        assert reading.take(0) == 1
        with pytest.raises(UsageError, match="which reads /mnt/photos, has done nothing for .* seconds: a file system"):
            reading.take(0)


def slow():
    end = time.monotonic() + 3
    while time.monotonic() < end:
        sum(range(10_000))
    yield 1


def test_a_reader_that_works_is_waited_for(monkeypatch):
    monkeypatch.setattr(readers, "SECONDS_BETWEEN_LOOKS", 0.25)
    with Readers([slow()], ahead=1, patience=1.5) as reading:
        assert reading.take(0) == 1


def test_a_signal_ends_a_wait_in_which_nothing_comes(monkeypatch):
    monkeypatch.setattr(readers, "SECONDS_BETWEEN_LOOKS", 0.05)
    monkeypatch.setattr(readers, "SECONDS_AFTER_A_SIGNAL", 0.3)
    with StopSignals(), Readers([stuck()], ahead=1) as reading:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop_asked() == signal.SIGTERM
        assert reading.take(0) == 1  # what comes is still taken
        with pytest.raises(UsageError, match="stopped by SIGTERM, without another checkpoint: nothing has come from"):
            reading.take(0)
    assert stop_asked() is None


def _end_of_a_child(work, file: Path) -> int:
    """The exit code of a process that takes items of an iterator in itself; what it prints goes into a file."""
    child = os.fork()
    if child == 0:
        readers.SECONDS_BETWEEN_LOOKS, readers.SECONDS_AFTER_A_SIGNAL = 0.05, 0.3
        sys.stderr = file.open("w")
        pulse = Pulse(lambda line: print(f"status: {line}", file=sys.stderr, flush=True))
        with pulse, ReadingHere([work], patience=1.0) as reading, contextlib.suppress(StopIteration):
            while True:
                reading.take(0)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def blocked(pipe: Path):
    """Reads a pipe that nobody writes to, as a file of a file system that does not answer."""
    yield 1
    now_reading("/mnt/photos/a.jpg")
    yield pipe.read_bytes()


def blocked_after_a_signal(pipe: Path):
    with StopSignals():
        os.kill(os.getpid(), signal.SIGTERM)
        yield from blocked(pipe)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="a system that does not tell what a thread does")
def test_a_process_that_reads_by_itself_ends_where_nothing_comes(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert _end_of_a_child(blocked(tmp_path / "pipe"), tmp_path / "printed") == 2
    error, status = (tmp_path / "printed").read_text().splitlines()
    assert error.startswith("error: this process (") and "which reads /mnt/photos/a.jpg, has done nothing for" in error
    assert status == error.replace("error", "status", 1)
    assert _end_of_a_child(blocked_after_a_signal(tmp_path / "pipe"), tmp_path / "printed") == 2
    assert "error: stopped by SIGTERM, without another checkpoint" in (tmp_path / "printed").read_text()


def test_a_process_that_reads_by_itself_and_works_is_left_alone(tmp_path):
    assert _end_of_a_child(slow(), tmp_path / "printed") == 0
    assert not (tmp_path / "printed").read_text()


def test_readers_end_with_the_process_that_started_them():
    """Also those of the training, whose channels are open in those that an evaluation has started since."""
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        both = [Readers([iter(int, 1)], ahead=2), Readers([iter(int, 1)], ahead=2)]
        for reading in both:
            reading.take(0)
        os.write(theirs, " ".join(str(reading._readers[0].process.pid) for reading in both).encode())
        os._exit(0)
    os.waitpid(child, 0)
    for pid in os.read(ours, 40).split():
        with contextlib.suppress(psutil.NoSuchProcess):
            reader = psutil.Process(int(pid))
            try:
                reader.wait(60)
            finally:
                with contextlib.suppress(psutil.NoSuchProcess):
                    reader.kill()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a process can't be copied")
def test_readers_are_copies_of_the_process_whatever_is_the_default():
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        with Readers([(number for number in range(3))], ahead=1) as reading:  # can't be sent to a new process
            assert [reading.take(0) for _ in range(3)] == [0, 1, 2]
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_memory_is_given_back():
    with Readers([iter([torch.ones(2**22, dtype=torch.uint8)] * 40)], ahead=2) as reading:
        for _ in range(40):
            reading.take(0)
        assert Path("/proc/self/maps").read_text().count("memfd:aliblip-batch") <= 2
        assert len(list(Path("/proc/self/fd").iterdir())) < 100
