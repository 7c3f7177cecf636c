"""A build of an operator that was killed holds up no later run."""

import os
import subprocess
import sys
import time

import pytest
from helpers import instead_of_sleep
from torch.utils.file_baton import FileBaton

from aliblip.runtime import extensions

BUILDER = """
import sys, time
from torch.utils.file_baton import FileBaton
baton = FileBaton(sys.argv[1])
assert baton.try_acquire()
print("holds", flush=True)
time.sleep(60)
"""


@pytest.fixture
def builder(tmp_path):
    """A process that builds, and the lock that it holds."""
    lock = tmp_path / "an_operator" / "lock"
    lock.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", BUILDER, lock], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        yield process, lock
        process.kill()


def test_a_lock_that_is_held_is_left(builder, tmp_path, capsys):
    process, lock = builder
    os.utime(lock, (0, 0))
    assert extensions.release_left_locks(tmp_path, seconds_of_rest=1) == []
    assert lock.exists()
    told = f"process {process.pid} builds in {lock.parent}: DeepSpeed waits until it has ended\n"
    assert capsys.readouterr().err == told


def test_a_lock_of_a_killed_build_is_removed_and_told(builder, tmp_path, monkeypatch, capsys):
    process, lock = builder
    process.kill()
    process.wait()
    assert not FileBaton(str(lock)).try_acquire()  # every later build would wait
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    long_ago = time.time() - extensions.SECONDS_OF_REST - 1
    os.utime(lock, (long_ago, long_ago))
    assert extensions.release_left_locks() == [lock]
    assert FileBaton(str(lock)).try_acquire()
    assert capsys.readouterr().err == f"removed {lock}: the build that it guarded was killed\n"


def test_a_fresh_lock_without_a_holder_is_waited_for(tmp_path, capsys):
    """It may be another machine's that shares the folder."""
    lock = tmp_path / "an_operator" / "lock"
    lock.parent.mkdir()
    lock.touch()
    (tmp_path / "built").mkdir()  # without a lock
    started = lock.stat().st_mtime
    assert extensions.release_left_locks(tmp_path, seconds_of_rest=0.5, seconds_between_looks=0.05) == [lock]
    assert time.time() - started >= 0.5
    waiting, removed = capsys.readouterr().err.splitlines()
    assert waiting.startswith(f"waiting for 0.5 s without a change in {lock.parent}: no process here holds its lock")
    assert removed.startswith(f"removed {lock}")


def test_a_clock_that_is_ahead_does_not_make_it_wait_longer(tmp_path):
    lock = tmp_path / "an_operator" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() + 10**6, time.time() + 10**6))
    assert extensions.release_left_locks(tmp_path, seconds_of_rest=0.2, seconds_between_looks=0.05) == [lock]


def test_a_lock_that_goes_ends_the_waiting(tmp_path, monkeypatch, capsys):
    lock = tmp_path / "an_operator" / "lock"
    lock.parent.mkdir()
    lock.touch()
    instead_of_sleep(monkeypatch, lambda _: lock.unlink())
    assert extensions.release_left_locks(tmp_path) == []
    assert "removed" not in capsys.readouterr().err
