"""Signs of life between the processes of a run: one that stands still ends the others within a minute.

    with Pulse():
        ...                      # collectives

A process that dies is its launcher's business. One that is stopped, or whose machine has gone, dies for nobody: the
others would wait for it in a collective until its limit, half an hour or a day. So a thread of each process gives a
sign every few seconds to the first one, which answers. What the main thread does makes no difference, however long it
takes.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import select
import socket
import sys
import threading
import time
from collections.abc import Callable

from aliblip.runtime.distributed import all_gather_objects, broadcast_object, is_main, rank, world_size

__all__ = ["Pulse", "give_up"]

SECONDS_BETWEEN_SIGNS = 3.0
SILENT_AFTER = 45.0
_SIGN, _GOODBYE = b"+", b"-"
# Of the pulses that beat: what is told why this process ends.
_hearers: list[Callable[[str], object]] = []


class Pulse:
    """A context manager (collective) inside which processes notice that another one stands still.

    Args:
        on_silence: called, in a thread, with the line that says which process is silent, or of `give_up`, before this
            process ends.
    """

    def __init__(self, on_silence: Callable[[str], object] = lambda line: None):
        self.on_silence = on_silence
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Pulse:
        _hearers.append(self.on_silence)
        if world_size() == 1:
            return self
        hosts = all_gather_objects(socket.gethostname())  # collective
        self._names = [f"rank {number} on {host}" for number, host in enumerate(hosts)]
        address = socket.gethostbyname(os.environ.get("MASTER_ADDR", "127.0.0.1"))  # of the first process
        listening = socket.create_server((address, 0)) if is_main() else None
        place = (listening.getsockname()[1], secrets.token_bytes(16)) if listening is not None else None
        port, token = broadcast_object(place)  # collective
        if listening is not None:
            self._thread = threading.Thread(target=self._listen, args=(listening, token), daemon=True)
        else:
            self._thread = threading.Thread(target=self._follow, args=(address, port, token), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        if self.on_silence in _hearers:
            _hearers.remove(self.on_silence)
        self._ended.set()
        if self._thread is not None:
            self._thread.join(2 * SECONDS_BETWEEN_SIGNS)

    def _listen(self, listening: socket.socket, token: bytes) -> None:
        """Of the first process: hear all others, and answer."""
        heard = dict.fromkeys(range(1, world_size()), time.monotonic())
        ranks: dict[socket.socket, int | None] = {}  # None: has not said yet who it is
        next_sign = 0.0
        with listening:
            while heard and not self._ended.is_set():
                for ready in select.select([listening, *ranks], [], [], 0.2)[0]:
                    if ready is listening:
                        accepted, _ = listening.accept()
                        accepted.settimeout(1.0)
                        ranks[accepted] = None
                    else:
                        self._hear(ready, ranks, heard, token)
                if time.monotonic() >= next_sign:
                    next_sign = time.monotonic() + SECONDS_BETWEEN_SIGNS
                    self._say(_SIGN, [one for one, number in ranks.items() if number is not None])
                for number, last in heard.items():
                    self._judge(number, last)
            self._say(_GOODBYE, list(ranks))
        for one in ranks:
            one.close()

    def _hear(self, ready: socket.socket, ranks: dict, heard: dict[int, float], token: bytes) -> None:
        data = b""
        with contextlib.suppress(OSError):
            data = ready.recv(64)
        if ranks[ready] is None and hmac.compare_digest(data[: len(token)], token):
            ranks[ready] = int.from_bytes(data[len(token) : len(token) + 4], "big")
            data = _SIGN
        number = ranks[ready]
        if number in heard and data:
            heard[number] = time.monotonic()
            if _GOODBYE in data:
                del heard[number]
        if not data or number is None:  # its end, which the launcher sees to, or a stranger
            del ranks[ready]
            ready.close()

    def _follow(self, address: str, port: int, token: bytes) -> None:
        """Of the others: give signs to the first process, and hear its own."""
        last, next_sign = time.monotonic(), 0.0
        one: socket.socket | None = None
        while not self._ended.is_set():
            with contextlib.suppress(OSError):
                if one is None:
                    one = socket.create_connection((address, port), timeout=1.0)
                    one.sendall(token + rank().to_bytes(4, "big"))
                if time.monotonic() >= next_sign:
                    next_sign = time.monotonic() + SECONDS_BETWEEN_SIGNS
                    self._say(_SIGN, [one])
                if select.select([one], [], [], 0.2)[0]:
                    data = one.recv(64)
                    last = time.monotonic() if data else last
                    if _GOODBYE in data:
                        break
                    if not data:
                        self._ended.wait(1.0)
            self._judge(0, last)
        if one is not None:
            self._say(_GOODBYE, [one])
            one.close()

    def _say(self, what: bytes, to: list[socket.socket]) -> None:
        for one in to:
            with contextlib.suppress(OSError):
                one.sendall(what)

    def _judge(self, number: int, last: float) -> None:
        silent = time.monotonic() - last
        if silent > SILENT_AFTER and not self._ended.is_set():
            self._ended.set()
            line = (
                f"{self._names[number]} has given no sign of life for {silent:.0f} seconds: it is stopped, or its "
                "machine or the network is gone. See to it, and go on with the same command"
            )
            print(line, file=sys.stderr, flush=True)
            try:
                self.on_silence(line)
            finally:
                end_now()


def give_up(line: str) -> None:
    """End this process from a thread, where the main one waits for what may never come: with exit code 2, as a mistake
    does that is found in time."""
    print(f"error: {line}", file=sys.stderr, flush=True)
    try:
        for hear in list(_hearers):
            hear(line)
    finally:
        end_now(2)


def end_now(code: int = 1) -> None:
    """From a thread, since the main one waits for another process."""
    os._exit(code)
