"""Waiting for another process's lock: a wait is told after some seconds, and has an end."""

from __future__ import annotations

from collections.abc import Callable

from filelock import FileLock, Timeout

from aliblip.runtime.mistakes import UsageError

__all__ = ["acquired"]


def acquired(
    file: str, *, tell_after: float, longest: float, tell: Callable[[], object], mistake: Callable[[], str]
) -> FileLock:
    """The lock of a file, taken; release it.

    Args:
        tell_after: seconds after which `tell` is called.
        longest: seconds of waiting after that.
        mistake: what to say when they are over.

    Raises:
        UsageError: another process has held it for so long.
        OSError, NotImplementedError: the file system takes no locks.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=tell_after)
    except Timeout:
        tell()
        try:
            lock.acquire(timeout=longest)
        except Timeout:
            raise UsageError(mistake()) from None
    return lock
