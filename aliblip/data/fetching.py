"""Photos of addresses that a table names, fetched from servers that nobody knows: slowly, and within limits.

    fetch = PoliteFetch(rate=10, seconds=30, most_bytes=20 * 2**20)
    data = fetch("https://shop.example/a.jpg", 2**29)          # raises UnusableItem with a plain reason

An address may come from anywhere, and its server may do anything: answer never or a byte a second, without end, with a
page in place of the photo, or send the reader on into the network that this machine stands in. So the time of an
address is limited from first to last, all tries included; an answer is cut off at its largest size; and every
connection, after each redirect anew, is made to an address that was looked at, and not to a name that may be looked up
once more with another result. Certificates are checked.
"""

from __future__ import annotations

import errno
import http.client
import ipaddress
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from aliblip.data import remote
from aliblip.data.remote import RemoteReadError, read_file
from aliblip.runtime.retries import Tries, sleep_about, trouble_of
from reading_aliblip import UnusableItem

__all__ = ["PoliteFetch", "read_address"]

# Seconds before the second and third try.
WAITS = (1.0, 4.0)
MOST_REDIRECTS = 5
# A try of a photo in training: long for a photo, and short enough that few of them do not stop a run.
SECONDS_OF_A_TRY, SECONDS_OF_AN_ADDRESS = 30.0, 90.0
NO_PHOTOS = ("application/json", "application/xhtml+xml")
PIECE = 2**16
USER_AGENT = "Mozilla/5.0 (compatible; aliblip-prepare)"


class _Refused(Exception):
    """What is not fetched, whoever asks; the message is the reason."""


# Where photos may lie beside web servers: the Hub and buckets, as fsspec calls them.
STORES = ("hf", "s3", "gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "r2")


class PoliteFetch:
    """Fetches photos by address. Sent to another process, it begins there anew.

    Args:
        rate: photos a second, of this object.
        seconds: until a photo must be there.
        most_bytes: that a photo may have.
        private: whether addresses of this machine and of private networks are fetched, too.
    """

    def __init__(self, rate: float, seconds: float, most_bytes: int, private: bool = False):
        self.rate, self.seconds, self.most_bytes, self.private = rate, seconds, most_bytes, private
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._next = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("rate", "seconds", "most_bytes", "private")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._begin()

    def __call__(self, address: str, most_bytes: int) -> bytes:
        """The photo of an address.

        Raises:
            UnusableItem: it is not to be had, or is no photo by what the server says.
        """
        self._take_turn()
        most_bytes = min(most_bytes, self.most_bytes)
        if not address.startswith(("http://", "https://")):
            return self._from_store(address, most_bytes)
        end = time.monotonic() + self.seconds
        tries = 0
        while True:
            try:
                return self._fetch(address, most_bytes, end)
            except Exception as error:  # urllib, ssl and http have kinds of their own
                reason, passes = _reason_of(error)
                if reason is None:
                    raise
                if time.monotonic() >= end:
                    reason, passes = f"it took longer than {self.seconds:g} seconds", False
                if not passes or tries == len(WAITS) or time.monotonic() + WAITS[tries] >= end:
                    raise UnusableItem(f"the photo can't be fetched ({address[:300]}: {reason})") from None
            time.sleep(WAITS[tries])
            tries += 1

    def _take_turn(self) -> None:
        with self._lock:
            turn = max(self._next, time.monotonic())
            self._next = turn + 1 / self.rate
        time.sleep(max(turn - time.monotonic(), 0))

    @staticmethod
    def _from_store(address: str, most_bytes: int) -> bytes:
        """Of a bucket or of the Hub, which the user has the keys of."""
        scheme = address.partition("://")[0]
        if scheme not in STORES:  # fsspec has others, chained ones too, that lead to this machine
            raise UnusableItem(f"the photo can't be fetched ({scheme}:// is none of {', '.join(STORES)}, http, https)")
        try:
            data = read_file(address, most_bytes + 1)
        except (RemoteReadError, FileNotFoundError) as error:
            raise UnusableItem(f"the photo can't be fetched ({error})") from None
        if len(data) > most_bytes:
            raise UnusableItem(f"the photo at {address[:300]} is larger than {most_bytes / 2**20:g} MB")
        return data

    def _fetch(self, address: str, most_bytes: int, end: float) -> bytes:
        return _get(address, most_bytes, end, self.private)


def read_address(address: str, most_bytes: int) -> bytes:
    """The photo of an http(s) address that the user's own table names, in training: from private networks, too, and
    with as many tries as other files of the network have, each within `SECONDS_OF_A_TRY` from first to last, and
    all of them begun within `SECONDS_OF_AN_ADDRESS`.

    Raises:
        FileNotFoundError: the server has no such file.
        RemoteReadError: the server did not give it, or it has more bytes.
    """
    tries, last_begin = Tries(remote.WAITS, what=address, wait=sleep_about), time.monotonic() + SECONDS_OF_AN_ADDRESS
    while True:
        end = time.monotonic() + SECONDS_OF_A_TRY
        try:
            return _get(address, most_bytes, end, private=True, whatever=True)
        except Exception as error:
            reason, passes = _reason_of(error)
            if reason is None:
                raise
            if _has_status(error) and error.code in (404, 410):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), address) from None
            if time.monotonic() >= end:
                reason, passes = f"it took longer than {SECONDS_OF_A_TRY:g} seconds", False
            if passes and time.monotonic() < last_begin and tries.again(error):
                continue
            tried = f" (tried {tries.failures} times in {tries.seconds:.0f} seconds)" if tries.failures else ""
            raise RemoteReadError(f"{address[:300]} can't be read: {reason}{tried}") from None


def _get(address: str, most_bytes: int, end: float, private: bool, whatever: bool = False) -> bytes:
    sockets: list[socket.socket] = []
    opener = urllib.request.build_opener(*_handlers(private, sockets, end))
    headers = {"User-Agent": USER_AGENT, "Accept": "image/*"}
    if whatever:  # no more than that is wanted, and most servers can give a part
        headers["Range"] = f"bytes=0-{most_bytes - 1}"
    request = urllib.request.Request(_quoted(address), headers=headers)
    # A server that gives a byte now and then keeps every read from its own limit.
    watchdog = threading.Timer(max(end - time.monotonic(), 0), _hang_up, [sockets])
    watchdog.daemon = True
    watchdog.start()
    try:
        with opener.open(request, timeout=max(end - time.monotonic(), 0.001)) as answer:
            data = _body(answer, most_bytes, whatever)
        if time.monotonic() >= end:  # where no length was told, the watchdog's end looks like that of the photo
            raise TimeoutError
        return data
    finally:
        watchdog.cancel()
        for each in sockets:
            each.close()


def _body(answer: Any, most_bytes: int, whatever: bool) -> bytes:
    """Up to `most_bytes`; more, and what says that it is no photo, is refused, the latter unless whatever is taken."""
    kind = answer.headers.get_content_type()
    if not whatever and (kind.startswith(("text/", "video/", "audio/")) or kind in NO_PHOTOS):
        raise _Refused(f"the answer is no photo but {kind}")
    told = answer.headers.get("Content-Length", "")
    size = int(told) if told.isdigit() else None
    too_large = f"the photo is larger than {most_bytes / 2**20:g} MB"
    if size is not None and size > most_bytes:
        raise _Refused(too_large)
    data = bytearray()
    while piece := answer.read(min(PIECE, most_bytes + 1 - len(data))):
        data += piece
        if len(data) > most_bytes:
            raise _Refused(too_large)
    if size is not None and len(data) < size:
        raise http.client.IncompleteRead(bytes(data[:0]), size - len(data))
    return bytes(data)


def _hang_up(sockets: list[socket.socket]) -> None:
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)


def _quoted(address: str) -> str:
    """An address with blanks and letters beyond ASCII as servers take it; what is quoted already stays."""
    address = address.strip().split("#", 1)[0]
    parts = urlsplit(address)
    host = parts.hostname or ""
    with suppress(UnicodeError):
        host = host.encode("idna").decode()
    place = f"[{host}]" if ":" in host else host
    place = place if parts.port is None else f"{place}:{parts.port}"
    rest = parts._replace(scheme="", netloc="").geturl()
    return f"{parts.scheme}://{place}{urllib.request.quote(rest, safe='/?&=%:+,;@!$()*~[]-._')}"


def _reason_of(error: Exception) -> tuple[str | None, bool]:
    """(why an address gave nothing, whether trying again can help); None for what is no matter of the network."""
    inner = error.reason if isinstance(error, urllib.error.URLError) and not _has_status(error) else error
    if isinstance(inner, _Refused):
        return str(inner), False
    if _has_status(error):
        return f"{error.code} {error.reason}", error.code in (408, 429) or error.code >= 500
    if isinstance(inner, Exception):
        trouble = trouble_of(inner)
        if trouble.reason is not None:
            return trouble.reason, trouble.passes
    if isinstance(inner, (OSError, http.client.HTTPException, ValueError, UnicodeError)):
        return " ".join(str(inner).split())[:200] or type(inner).__name__, False
    return (str(inner)[:200], False) if inner is not error else (None, False)


def _has_status(error: Exception) -> bool:
    return isinstance(error, urllib.error.HTTPError)


# --- connections to addresses that were looked at ---------------------------------------------------------------------


def _handlers(private: bool, sockets: list[socket.socket], end: float) -> list[Any]:
    connect = _connector(private, sockets, end)

    class Plain(http.client.HTTPConnection):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self._create_connection = connect

    class Secure(http.client.HTTPSConnection):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self._create_connection = connect

    class PlainHandler(urllib.request.HTTPHandler):
        def http_open(self, request: urllib.request.Request) -> Any:
            _check_name(request, private)
            return self.do_open(Plain, request)

    class SecureHandler(urllib.request.HTTPSHandler):
        def https_open(self, request: urllib.request.Request) -> Any:
            _check_name(request, private)
            return self.do_open(Secure, request)

    class Redirects(urllib.request.HTTPRedirectHandler):
        max_redirections = MOST_REDIRECTS

        def redirect_request(self, request: Any, stream: Any, code: int, message: str, headers: Any, place: str) -> Any:
            if not place.startswith(("http://", "https://")):
                raise _Refused(f"it is redirected to {place[:100]}")
            return super().redirect_request(request, stream, code, message, headers, _quoted(place))

    return [PlainHandler(), SecureHandler(), Redirects()]


def _check_name(request: urllib.request.Request, private: bool) -> None:
    """Refuse a private address that is written as such; behind a proxy nothing else can be looked at."""
    host = (urlsplit(request.full_url).hostname or "").rstrip(".")
    if not host:
        raise _Refused("the address names no server")
    if private:
        return
    try:
        is_open = ipaddress.ip_address(host).is_global
    except ValueError:
        is_open = host != "localhost" and not host.endswith((".localhost", ".local", ".internal"))
    if not is_open:
        raise _Refused(f"{host} is an address of a private network (--fetch_private fetches from there)")


def _connector(private: bool, sockets: list[socket.socket], end: float) -> Callable[..., socket.socket]:
    """`socket.create_connection` to addresses that are not private."""
    proxies = {urlsplit(address).hostname for address in urllib.request.getproxies().values() if "://" in address}

    def connect(place: tuple[str, int], timeout: Any = None, source_address: Any = None) -> socket.socket:
        host, port = place
        last: OSError | None = None
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
            found = ipaddress.ip_address(address[0].split("%")[0])
            if not private and host not in proxies and not _is_open(found):
                raise _Refused(f"{host} is {found}, of a private network (--fetch_private fetches from there)")
            opened = socket.socket(family, kind, protocol)
            # Before it connects: the watchdog ends that, too. A second one, since TLS takes the first one over.
            twin = opened.dup()
            sockets.append(twin)
            try:
                opened.settimeout(max(end - time.monotonic(), 0.001))
                opened.connect(address)
                return opened
            except OSError as error:
                opened.close()
                sockets.remove(twin)
                twin.close()
                last = error
        raise last or OSError(f"{host} has no address")

    return connect


def _is_open(address: Any) -> bool:
    """Whether an address is one of the public network; also what is written into an address of version 6."""
    inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None)
    return address.is_global and not address.is_multicast and (inner is None or inner.is_global)
