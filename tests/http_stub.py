"""A file server on loopback that fails now and then, as told."""

from __future__ import annotations

import contextlib
import hashlib
import re
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("500", "503", "429", "drop", "reset")


class FileServer(ThreadingHTTPServer):
    """Serves the files of a folder on 127.0.0.1, whole or in parts.

    Args:
        folder: the files.
        seed: of the failures: of the 1st, 3rd, 5th ... time that the same thing is asked for a third fails, so that
            asking again helps whoever asks and in whatever order. None: no failures.
        ranges: whether it can give parts of files.

    Attributes:
        url: its address.
        requests: (method, path, range) of all requests.
        failed: how often it failed in each way.
        always: how every request for a file fails, if it does: a status, "drop" (half of the body), "reset" (no
            answer), "hang" (none for a while), "drip" and "drip headers" (a byte now and then), or "more" (than was
            asked for).
        first: the same, for so many requests.
    """

    daemon_threads = True

    def __init__(self, folder: Path, seed: int | None = None, ranges: bool = True):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.seed, self.ranges = folder, seed, ranges
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str, str | None]] = []
        self.failed: Counter[str] = Counter()
        self.always: str | None = None
        self.first: tuple[str, int] = ("", 0)
        self._asked: Counter[tuple] = Counter()
        self._lock = threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that has gone

    def fault_of(self, request: tuple[str, str, str | None]) -> str | None:
        with self._lock:
            self.requests.append(request)
            fault = self.always
            if self.first[1]:
                fault, self.first = self.first[0], (self.first[0], self.first[1] - 1)
            if self.seed is not None:
                count = self._asked[request]
                self._asked[request] += 1
                draw = hashlib.blake2b(repr((self.seed, request[0], request[1].split("/"), request[2], count)).encode())
                if count % 2 == 0 and draw.digest()[0] < 85:
                    fault = FAULTS[draw.digest()[1] % len(FAULTS)]
            if fault is not None:
                self.failed[fault] += 1
            return fault


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FileServer

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        wanted = self.headers.get("Range") if self.server.ranges else None
        fault = self.server.fault_of((self.command, self.path, wanted))
        if fault == "hang":
            time.sleep(1.5)
        if fault in ("reset", "hang"):
            self._hang_up()
        elif fault == "drip headers" or (fault in ("drip", "more") and self.command == "GET"):
            self._send_without_end(fault)
        elif fault is not None and fault.isdigit():
            self._answer(int(fault), b"", {})
        else:
            self._send(wanted, drop=fault == "drop")

    def _send_without_end(self, fault: str) -> None:
        begin = b"HTTP/1.1 206 Partial Content\r\n"
        piece, wait = (bytes(2**20), 0) if fault == "more" else (b"x", 0.004)
        self.wfile.write(begin + (b"Name: " if fault == "drip headers" else b"\r\n"))
        with contextlib.suppress(OSError):  # until the client has enough of it
            for _ in range(2**8):
                self.wfile.write(piece)
                time.sleep(wait)
        self._hang_up()

    def _send(self, wanted: str | None, drop: bool) -> None:
        file = self.server.folder / self.path.lstrip("/").split("?")[0]
        if not file.is_file():
            self._answer(404, b"", {})
            return
        data, status, headers = file.read_bytes(), 200, {"ETag": f'"{file.stat().st_mtime_ns}"'}
        if wanted is not None:
            begin, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", wanted).groups())
            headers["Content-Range"] = f"bytes {begin}-{min(end, len(data) - 1)}/{len(data)}"
            data, status = data[begin : end + 1], 206
        self._answer(status, data, headers, drop)

    def _answer(self, status: int, data: bytes, headers: dict[str, str], drop: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) // 2] if drop else data)
        if drop:
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
