"""Locks that a killed build of an operator left behind.

DeepSpeed compiles small C++ operators at their first use. torch guards such a build by a file called `lock`, which
exists as long as the build runs. A process that is killed in between leaves the file, and every later run waits for
it, without a word and without an end. `release_left_locks` finds such files before DeepSpeed does.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

import psutil

SECONDS_OF_REST = 120.0  # a folder in which nothing has changed for so long isn't being built in


def release_left_locks(
    folder: str | os.PathLike | None = None,
    *,
    seconds_of_rest: float = SECONDS_OF_REST,
    seconds_between_looks: float = 1.0,
) -> list[Path]:
    """Remove the locks of builds that have ended. A lock that a process of this machine holds is left, and told.

    Where no process that can be seen holds it, the holder was killed, or runs on another machine or in another
    container that shares the folder. So it is removed once nothing in its folder has changed for `seconds_of_rest`,
    and until then this waits and says why. One process of a machine should call it.

    Args:
        folder: where torch builds; None: where it does by default, or `TORCH_EXTENSIONS_DIR`.
        seconds_of_rest: without a change, in seconds.
        seconds_between_looks: of the waiting, in seconds.

    Returns:
        The files that were removed; each is told on standard error.
    """
    removed = []
    for lock in _locks(folder):
        seen, since = None, 0.0
        while lock.exists():
            holder = next((process.pid for process in psutil.process_iter() if _holds(process, lock)), None)
            if holder is not None:
                _tell(f"process {holder} builds in {lock.parent}: DeepSpeed waits until it has ended")
                break
            changed = _last_change(lock)
            if changed != seen:
                since = time.monotonic()
                if seen is None:
                    since -= max(time.time() - changed, 0.0)  # at rest for so long, if the clocks agree
            if time.monotonic() - since >= seconds_of_rest:
                lock.unlink(missing_ok=True)
                _tell(f"removed {lock}: the build that it guarded was killed")
                removed.append(lock)
                break
            if seen is None:
                _tell(
                    f"waiting for {seconds_of_rest:g} s without a change in {lock.parent}: no process here holds its "
                    "lock; where no other machine builds in it either, delete the file `lock` to go on at once"
                )
            seen = changed
            time.sleep(seconds_between_looks)
    return removed


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _locks(folder: str | os.PathLike | None) -> list[Path]:
    if folder is None:
        folder = os.environ.get("TORCH_EXTENSIONS_DIR")
    if folder is not None:
        return sorted(Path(folder).glob("*/lock"))
    from torch.utils.cpp_extension import get_default_build_root  # slow to import

    return sorted(Path(get_default_build_root()).glob("*/*/lock"))


def _last_change(lock: Path) -> float:
    """When something beside a lock has changed last, by the clock of its file system."""
    times = [0.0]
    for entry in [lock, *lock.parent.iterdir()]:
        with contextlib.suppress(FileNotFoundError):  # the compiler's own files come and go
            times.append(entry.stat().st_mtime)
    return max(times)


def _holds(process: psutil.Process, lock: Path) -> bool:
    try:
        return any(os.path.samefile(file.path, lock) for file in process.open_files())
    except (psutil.Error, OSError):  # another user's, or just ended
        return False
