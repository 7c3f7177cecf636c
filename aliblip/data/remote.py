"""Files that are not on this machine: how they are opened, and what is tried again when the connection fails.

    with open_file("http://host/train-0.parquet") as stream: ...
    data = read_file("http://host/a.jpg", most_bytes=2**26)
    rows = resumed(lambda done: read_rows(start=done), "http://host/train-0.parquet")

Dropped connections, timeouts and the answers 408, 429 and 5xx are trouble that passes: they are tried again, with waits
that double from `FIRST_WAIT` to `LONGEST_WAIT` seconds. `TRIES` failures in a row without a single new item end in
`RemoteReadError`. Each incident is one warning in the log. Everything else, and any error of a local file, is raised at
once.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import random
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec

__all__ = [
    "RemoteReadError",
    "is_remote",
    "open_file",
    "read_file",
    "resumed",
    "retried",
    "storage_options",
    "take_over_retries",
]

# Eight tries with these waits end after 45 to 91 seconds, beside the time that the tries take themselves.
TRIES = 8
FIRST_WAIT = 1.0
LONGEST_WAIT = 30.0
# Seconds until a silent HTTP server counts as a dropped connection. There is no limit for a whole file.
CONNECT_TIMEOUT = 30
READ_TIMEOUT = 60

T = TypeVar("T")
logger = logging.getLogger(__name__)
# Without state: waiting must not move the random numbers of a run, and forked workers must not wait in step.
_jitter = random.SystemRandom()
_held: dict[int, Any] = {}

# By module, since an error of a module that was never imported can't occur. The Hub's client is httpx or its successor.
_CONNECTION_ERRORS = {
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
    "httpx": ("TransportError",),
    "httpx2": ("TransportError",),
    "botocore.exceptions": ("HTTPClientError",),
}


class RemoteReadError(OSError):
    """A remote file can't be read; the message names it and says why, and how often it was tried."""


def is_remote(file: str) -> bool:
    """Whether a path is an address of another machine."""
    return "://" in file and not file.startswith(("file://", "local://"))


def storage_options(file: str) -> dict[str, dict[str, Any]]:
    """Options by protocol, for fsspec and `datasets`: proxies as the environment says, and timeouts."""
    protocol = file.rsplit("::", 1)[-1].split("://")[0]
    if protocol not in ("http", "https"):
        return {}
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=READ_TIMEOUT)
    return {protocol: {"client_kwargs": {"trust_env": True, "timeout": timeout}}}


def open_file(file: str) -> Any:
    """A local or remote file for binary reading, as a context manager."""
    return fsspec.open(file, "rb", **storage_options(file))


def read_file(file: str, most_bytes: int) -> bytes:
    """The first `most_bytes` of a local or remote file, with retries.

    Raises:
        FileNotFoundError: there is no such file.
        RemoteReadError: the server did not give it.
    """

    def fetch() -> bytes:
        file_system, path = fsspec.url_to_fs(file, **storage_options(file))
        return file_system.cat_file(path, start=0, end=most_bytes)[:most_bytes]

    return retried(fetch, file)


def retried(call: Callable[[], T], file: str) -> T:
    """The result of `call`, which reads `file`, with retries if that is remote.

    Raises:
        FileNotFoundError: there is no such remote file.
        RemoteReadError: as for `resumed`.
    """
    return next(resumed(lambda done: iter([call()]), file))


def resumed(read: Callable[[int], Iterator[T]], file: str) -> Iterator[T]:
    """The items of `read(0)`; where the connection to `file` fails, it goes on with `read(items so far)`.

    Args:
        read: `read(n)` gives the items without the first n.
        file: where they come from; a local file is read without retries.

    Raises:
        FileNotFoundError: there is no such remote file.
        RemoteReadError: `TRIES` failures in a row, or the server refuses.
    """
    if not is_remote(file):
        yield from read(0)
        return
    done = failures = 0
    began = 0.0
    while True:
        try:
            for item in read(done):
                done += 1
                failures = 0
                yield item
            return
        except Exception as error:
            passes, reason = _judge(error)
            if not passes:
                # fsspec says nothing but the address; whoever else raises OSError has put it in words.
                if reason is None or (isinstance(error, OSError) and str(error) != file):
                    raise
                if isinstance(error, FileNotFoundError) and reason.startswith(("404", "410")):
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), file) from None
                raise RemoteReadError(f"{file} can't be read: {reason}") from error
            failures += 1
            if failures == 1:
                began = time.monotonic()
                logger.warning("%s: %s; trying again, up to %d times", file, reason, TRIES - 1)
            if failures >= TRIES:
                seconds = time.monotonic() - began
                raise RemoteReadError(
                    f"{file} can't be read: {reason} (tried {failures} times in {seconds:.0f} seconds)"
                ) from error
            time.sleep(min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT) * _jitter.uniform(0.5, 1.0))


def _judge(error: BaseException) -> tuple[bool, str | None]:
    """Whether an error is trouble that passes, and what the connection or the server said (None: nothing)."""
    passes, reason = False, None
    link: BaseException | None = error
    # The innermost knows most: fsspec makes "not found" of every failure to look at a file over HTTP, and datasets
    # "disconnected" of every answer that is an error.
    while link is not None:
        status = _status(link)
        if status is not None:
            message = getattr(link, "message", "")  # of aiohttp, whose text also repeats the address
            return status in (408, 429) or status >= 500, f"{status} {message}" if message else _told(link)
        if isinstance(link, ValueError) and ("range requests" in str(link) or "seek streaming" in str(link)):
            return False, "its server can't give parts of a file (HTTP Range), which streaming needs"
        # Offline is what the Hub's client says, as an error of the connection, when the user has asked for no network;
        # datasets leaves no more of it than its name.
        offline = "OfflineModeIsEnabled" in f"{type(link).__name__} {link}"
        if isinstance(link, (RemoteReadError, ssl.SSLCertVerificationError)) or offline:
            return False, _told(link)
        if isinstance(link, _connection_errors()):
            passes, reason = True, _told(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return passes, reason


def _connection_errors() -> tuple[type[BaseException], ...]:
    found: list[type[BaseException]] = [ConnectionError, TimeoutError, asyncio.TimeoutError]
    for module, names in _CONNECTION_ERRORS.items():
        if module in sys.modules:
            found += [getattr(sys.modules[module], name) for name in names]
    return tuple(found)


def _status(error: BaseException) -> int | None:
    """The HTTP status of an error of aiohttp (status), httpx (response.status_code) or botocore (a dict)."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        value = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        value = getattr(response, "status_code", getattr(error, "status", None))
    return value if isinstance(value, int) and 400 <= value < 600 else None


def _told(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@functools.lru_cache(maxsize=1)
def take_over_retries() -> None:
    """Switch off the retries inside `datasets`.

    They are 20 tries of 5 seconds and more for every single read, also of answers that will not change, with a line for
    each; within ours they would make an hour of a minute.
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
