"""Trying again: which errors may pass, how long to wait between tries, and what is told.

    address = retried(lambda: api.create_commit(...), what="the upload to me/name")

    tries = Tries(WAITS, what="http://host/train-0.parquet")     # to go on where it stopped
    while True:
        try:
            ...
            tries.succeeded()
        except Exception as error:
            if not tries.again(error):
                raise

Broken connections, timeouts and the answers 408, 429 and 5xx may pass. A refusal (401, 404, ...), a certificate that is
not accepted, a switched off network, a full disk and every error of our own may not: they are raised at once. The first
failure of a row of failures is told, in one line.
"""

from __future__ import annotations

import asyncio
import errno
import http.client
import json
import logging
import random
import socket
import ssl
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from aliblip.runtime.mistakes import one_line

__all__ = ["WAITS", "GaveUp", "Tries", "Trouble", "may_pass", "retried", "sleep_about", "trouble_of"]

# Seconds before the second, third ... try.
WAITS = (1.0, 5.0, 20.0, 60.0)

T = TypeVar("T")
logger = logging.getLogger(__name__)
# Without state: waiting must not move the random numbers of a run, and forked workers must not wait in step.
_jitter = random.SystemRandom()

# By module, since an error of a module that was never imported can't occur. The Hub's client is httpx or its successor.
_CONNECTION_ERRORS = {
    "aiohttp": ("ClientConnectionError", "ClientPayloadError"),
    "httpx": ("TransportError",),
    "httpx2": ("TransportError",),
    "requests.exceptions": ("ConnectionError", "Timeout", "ChunkedEncodingError"),
    "botocore.exceptions": ("HTTPClientError",),
}
_NETWORK_ERRNOS = {errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH}


class GaveUp(OSError):
    """Something has been tried as often as it may be: an outer layer does not try it again."""


@dataclass(frozen=True)
class Trouble:
    """What an error says about a connection.

    Attributes:
        passes: whether trying again can help.
        reason: what the server or the connection said; None if the error is not one of a connection.
        status: the HTTP status, if a server answered.
    """

    passes: bool
    reason: str | None = None
    status: int | None = None


def may_pass(error: BaseException) -> bool:
    """Whether trying again can help after this error."""
    return trouble_of(error).passes


def trouble_of(error: BaseException) -> Trouble:
    """Judge an error by itself and by all that caused it.

    The innermost error knows most: fsspec makes "not found" of every failure to look at a file over HTTP, and datasets
    "disconnected" of every answer that is an error.
    """
    found, seen = Trouble(passes=False), set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        judged = _trouble_of_one(link)
        if judged is not None and (judged.status is not None or not judged.passes):
            return judged
        found = judged or found
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return found


def _trouble_of_one(error: BaseException) -> Trouble | None:
    """The trouble that this error stands for by itself; None if it says nothing about a connection."""
    status = _status(error)
    if status is not None:
        message = getattr(error, "message", "")  # of aiohttp, whose text also repeats the address
        reason = f"{status} {message}" if message else one_line(error)
        return Trouble(status in (408, 429) or status >= 500, reason, status)
    if isinstance(error, ValueError) and ("range requests" in str(error) or "seek streaming" in str(error)):
        return Trouble(False, "its server can't give parts of a file (HTTP Range), which streaming needs")
    # The Hub's client says "offline" as an error of the connection when the user has asked for no network; datasets
    # leaves no more of it than its name.
    is_offline = "OfflineModeIsEnabled" in f"{type(error).__name__} {error}"
    is_of_the_uploader = type(error).__module__ == "hf_xet"  # which has a kind of its own only for what it refuses
    if isinstance(error, (GaveUp, ssl.SSLCertVerificationError)) or is_offline or is_of_the_uploader:
        return Trouble(False, one_line(error))
    if isinstance(error, _connection_errors()) or _is_network_error(error):
        return Trouble(True, one_line(error))
    return None


def _is_network_error(error: BaseException) -> bool:
    """Trouble of a connection that comes as an error of a general kind."""
    if isinstance(error, json.JSONDecodeError):  # the page of a busy proxy in place of the Hub's JSON
        return True
    if isinstance(error, OSError):
        return error.errno in _NETWORK_ERRNOS
    # The Hub's uploader in native code has no error of its own for most troubles. Native code has no frames.
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    is_of_the_hub = bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("huggingface_hub.")
    return type(error) is RuntimeError and is_of_the_hub


def _connection_errors() -> tuple[type[BaseException], ...]:
    found: list[type[BaseException]] = [ConnectionError, TimeoutError, asyncio.TimeoutError]
    found += [socket.gaierror, http.client.IncompleteRead]
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


def sleep_about(seconds: float) -> None:
    """Sleep for half of the time to all of it: processes that failed together do not come back together."""
    time.sleep(seconds * _jitter.uniform(0.5, 1.0))


class Tries:
    """The tries of one thing that may fail several times in a row.

    Args:
        waits: seconds before the second, third ... try after a success; so one more failure in a row is the last.
        what: what is tried, for the line that is told.
        wait: waits so many seconds; a true value ends the tries.
        tell: gets one line at the first failure of a row.

    Attributes:
        failures: in a row.
        seconds: since the first of them.
    """

    def __init__(
        self,
        waits: Sequence[float] = WAITS,
        *,
        what: str,
        wait: Callable[[float], object] = time.sleep,
        tell: Callable[[str], object] = logger.warning,
    ):
        self.waits, self.what, self.wait, self.tell = tuple(waits), what, wait, tell
        self.failures = 0
        self._began = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began if self.failures else 0.0

    def succeeded(self) -> None:
        """Whatever failed before counts no longer."""
        self.failures = 0

    def again(self, error: BaseException) -> bool:
        """Whether to try again after this error; if so, the wait is over when this returns."""
        trouble = trouble_of(error)
        if not trouble.passes:
            return False
        self.failures += 1
        if self.failures == 1:
            self._began = time.monotonic()
        if self.failures > len(self.waits):
            return False
        if self.failures == 1:
            times = f"up to {len(self.waits)} times" if len(self.waits) > 1 else "once"
            self.tell(f"{self.what}: {trouble.reason}; trying again, {times}")
        return not self.wait(self.waits[self.failures - 1])


def retried(
    call: Callable[[], T],
    waits: Sequence[float] = WAITS,
    wait: Callable[[float], object] = time.sleep,
    *,
    what: str,
    tell: Callable[[str], object] = logger.warning,
) -> T:
    """Call until it succeeds, fails for good, or has failed once more than there are waits.

    Args:
        call: what may fail.
        waits, wait, what, tell: as for `Tries`.

    Raises:
        Exception: of the last try.
    """
    tries = Tries(waits, what=what, wait=wait, tell=tell)
    while True:
        try:
            return call()
        except Exception as error:
            if not tries.again(error):
                raise
