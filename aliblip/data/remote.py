"""Files that are not on this machine: how they are opened, and what is tried again when the connection fails.

    with open_file("http://host/train-0.parquet") as stream: ...
    data = read_file("http://host/a.jpg", most_bytes=2**26)
    rows = resumed(lambda done: read_rows(start=done), "http://host/train-0.parquet")

What may pass is tried again (`aliblip.runtime.retries` says what that is), after the waits of `WAITS`. As many failures
in a row without a single new item end in `RemoteReadError`. A row of failures is one warning in the log. Everything
else, and any error of a local file, is raised at once.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec

from aliblip.runtime.retries import GaveUp, Tries, sleep_about, trouble_of

__all__ = [
    "RemoteReadError",
    "is_remote",
    "open_file",
    "read_file",
    "read_patiently",
    "resumed",
    "storage_options",
    "take_over_retries",
]

# Seconds, of which each wait takes half or more. Eight tries end after 45 to 91 seconds, beside the time that the tries
# take themselves.
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0)
# Seconds until a silent HTTP server counts as a dropped connection. There is no limit for a whole file, but one for how
# slowly it may come (`http_answers`).
CONNECT_TIMEOUT = 30
READ_TIMEOUT = 60

T = TypeVar("T")
logger = logging.getLogger(__name__)
_held: dict[int, Any] = {}


class RemoteReadError(GaveUp):
    """A remote file can't be read; the message names it and says why, and how often it was tried."""


def is_remote(file: str) -> bool:
    """Whether a path is an address of another machine."""
    return "://" in file and not file.startswith(("file://", "local://"))


def storage_options(file: str) -> dict[str, dict[str, Any]]:
    """Options by protocol, for fsspec and `datasets`: the proxies of the environment, and timeouts."""
    protocol = file.rsplit("::", 1)[-1].split("://")[0]
    if protocol not in ("http", "https"):
        return {}
    import aiohttp

    from aliblip.data.http_answers import BoundedResponse  # imports aiohttp, which takes half a second

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
    return {protocol: {"client_kwargs": {"trust_env": True, "timeout": timeout, "response_class": BoundedResponse}}}


def open_file(file: str) -> Any:
    """A local or remote file for binary reading, as a context manager."""
    return fsspec.open(file, "rb", **storage_options(file))


def read_file(file: str, most_bytes: int) -> bytes:
    """The first `most_bytes` of a local or remote file, with more tries if it is remote.

    Raises:
        FileNotFoundError: there is no such file.
        RemoteReadError: the server did not give it.
    """

    def fetch() -> bytes:
        file_system, path = fsspec.url_to_fs(file, **storage_options(file))
        return file_system.cat_file(path, start=0, end=most_bytes)[:most_bytes]

    return read_patiently(fetch, file)


def read_patiently(call: Callable[[], T], file: str) -> T:
    """The result of `call`, which reads `file`, with more tries if that is remote.

    Raises:
        FileNotFoundError: there is no such remote file.
        RemoteReadError: as for `resumed`.
    """
    return next(resumed(lambda done: iter([call()]), file))


def resumed(read: Callable[[int], Iterator[T]], file: str) -> Iterator[T]:
    """The items of `read(0)`; where the connection to `file` fails, it goes on with `read(items so far)`.

    Args:
        read: `read(n)` gives the items without the first n.
        file: where they come from; a local file is read without further tries.

    Raises:
        FileNotFoundError: there is no such remote file.
        RemoteReadError: as many failures in a row as `WAITS` allows, or the server refuses.
    """
    if not is_remote(file):
        yield from read(0)
        return
    done, tries = 0, Tries(WAITS, what=file, wait=sleep_about, tell=logger.warning)
    while True:
        try:
            for item in read(done):
                done += 1
                tries.succeeded()
                yield item
            return
        except Exception as error:
            if tries.again(error):
                continue
            if (told := _told(error, file, tries)) is None:
                raise
            raise told from error


def _told(error: Exception, file: str, tries: Tries) -> OSError | None:
    """An error that names the file and says why it can't be read; None if this one does so itself."""
    trouble = trouble_of(error)
    if trouble.passes:
        tried = f"tried {tries.failures} times in {tries.seconds:.0f} seconds"
        return RemoteReadError(f"{file} can't be read: {trouble.reason} ({tried})")
    # The message of fsspec is only the address, and an answer's is without it; every other OSError says what happened.
    says_all = isinstance(error, OSError) and str(error) != file and type(error) is not GaveUp
    if trouble.reason is None or says_all:
        return None
    if isinstance(error, FileNotFoundError) and trouble.status in (404, 410):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file)
    return RemoteReadError(f"{file} can't be read: {trouble.reason}")


@functools.lru_cache(maxsize=1)
def take_over_retries() -> None:
    """Switch off the retries inside `datasets`.

    It tries 20 times, with 5 seconds and more between, for every single read and after answers that will not change
    too, and logs a line each time; inside of our tries a minute would become an hour.
    """
    from datasets import config

    config.STREAMING_OPEN_MAX_RETRIES = config.STREAMING_READ_MAX_RETRIES = 1
    config.STREAMING_OPEN_RETRY_INTERVAL = config.STREAMING_READ_RETRY_INTERVAL = 0  # it waits after the last one too
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
    logging.getLogger("datasets.utils.file_utils").addFilter(
        lambda record: "remote data host" not in record.getMessage()
    )


def _keep_connections() -> None:
    """Before a fork, hold what the child must not close.

    fsspec drops the file systems that a child inherits. That would close their connections, and so take them out of the
    event loop of the parent, with which the child still shares the kernel's part of it; the parent would wait for
    answers until its timeout.
    """
    if "fsspec.asyn" in sys.modules:
        classes = [sys.modules["fsspec.asyn"].AsyncFileSystem]
        for cls in classes:
            classes += cls.__subclasses__()
            _held.update((id(instance), instance) for instance in list(cls._cache.values()))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_keep_connections)
