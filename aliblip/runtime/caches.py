"""Folders in which libraries keep what they download or compile, and which variable puts each somewhere else.

    hint = cache_hint(error)    # "; the cache /home/me/.cache/huggingface can't be used: set HF_HOME to ..."

A home that is read-only, full, or on a file system without locks is common on clusters and in containers. The libraries
name a file of theirs, and not what to do.
"""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator

from datasets import config as of_datasets
from huggingface_hub import constants as of_the_hub

__all__ = ["cache_hint"]

_CANT_WRITE = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.ENOENT, errno.ENOTDIR}
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def cache_hint(error: BaseException) -> str:
    """What to do about an error that comes from a cache; empty if it does not.

    Args:
        error: of a library, with the errors that it was raised from.
    """
    for one in _chain(error):
        if isinstance(one, NotImplementedError) and "flock" in str(one):
            return _told("HF_HOME", of_the_hub.HF_HOME, "has no file locks")
        if not isinstance(one, OSError):
            continue
        found = _cache_of(one.filename) if isinstance(one.filename, (str, os.PathLike)) else None
        if one.errno in _NO_LOCKS:
            return _told(*(found or ("HF_HOME", of_the_hub.HF_HOME)), "has no file locks")
        if found is not None and one.errno in _CANT_WRITE:
            return _told(*found, f"can't be written ({one.strerror})")
    return ""


def _told(variable: str, folder: str, problem: str) -> str:
    return f"the cache {folder} {problem}: set {variable} to a folder on a disk of this machine that can be written"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def _cache_of(file: str | os.PathLike) -> tuple[str, str] | None:
    """Variable and folder of the innermost cache that a file lies in, or of the one that could not be made."""
    home = os.path.expanduser("~/.cache")
    caches = {
        "HF_HOME": of_the_hub.HF_HOME,
        "HF_HUB_CACHE": of_the_hub.HF_HUB_CACHE,
        "HF_DATASETS_CACHE": str(of_datasets.HF_DATASETS_CACHE),
        "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", os.path.join(home, "torch_extensions")),
        "TORCHINDUCTOR_CACHE_DIR": os.environ.get(
            "TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), "torchinductor_")
        ),
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", os.path.expanduser("~/.triton")),
    }
    # Those of the Hub move together: its own variable where that was set, else the one for all of them.
    for variable in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
        if variable not in os.environ:
            del caches[variable]
    place = os.path.abspath(os.fspath(file))
    folders = {variable: os.path.abspath(folder) for variable, folder in caches.items()}
    inside = [(len(folder), variable, folder) for variable, folder in folders.items() if place.startswith(folder)]
    around = [(variable, folder) for variable, folder in folders.items() if folder.startswith(place + os.sep)]
    return max(inside)[1:] if inside else next(iter(around), None)
