"""What the system refuses on paths that the user named: a full disk, no permission, a name that is too long.

    remember_given(["my_data", "outputs/mine"])      # what stood on the command line and in the recipe
    refusal(error)                                   # "/data/x can't be used (Permission denied): ..."; "" of a bug

Such an error can come up wherever a file is touched, and none of them is a bug. One of a path that nobody named stays
what it is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable

__all__ = ["refusal", "remember_given"]

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ESTALE}

_given: set[str] = set()


def remember_given(values: Iterable[object]) -> None:
    """Keep what the user gave: any of the texts may be a path."""
    _given.update(os.path.abspath(value) for value in values if isinstance(value, str) and value and "\0" not in value)


def refusal(error: BaseException) -> str:
    """What the system refused and what to do, in a line; empty for any other error."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # pathlib's own, of a link to itself
        error = error.__context__
    if not isinstance(error, OSError):
        return ""
    name = os.fspath(error.filename) if isinstance(error.filename, (str, os.PathLike)) else ""
    if error.errno in _NO_ROOM:
        what = f"{_shown(name)} can't be written" if name else "a file can't be written"
        return f"{what} ({error.strerror}): make room there, or give another folder, and type the same command again"
    if error.errno in _REFUSED and name and _is_given(os.path.abspath(name)):
        return f"{_shown(name)} can't be used ({error.strerror}): give another path, or see to this one"
    return ""


def _is_given(path: str) -> bool:
    return any(path == given or path.startswith(given.rstrip(os.sep) + os.sep) for given in _given)


def _shown(path: str, length: int = 200) -> str:
    return path if len(path) <= length else f"{path[: length - 3]}..."
