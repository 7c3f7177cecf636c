"""Processes that read and decode ahead, each with a channel of its own to the process that takes what they give.

    with Readers([items_of_first, items_of_second], ahead=4) as readers:
        item = readers.take(0)               # the next item of the first reader, in its order

Tensors travel in memory that belongs to no file system: a small /dev/shm, 64 MB in a container of Docker, is no limit.
No two readers share a lock or a pipe, so one that is killed takes nothing with it: its channel ends, and that is heard.

Every wait has an end. A reader that died ends it at once, with what killed it; one that neither computes nor reads a
byte for `PATIENCE` seconds ends it with what it was reading; and a signal that asks the run to stop ends it after
`SECONDS_AFTER_A_SIGNAL`, where no item comes. A process that reads by itself is watched likewise (`ReadingHere`).
"""

from __future__ import annotations

import atexit
import contextlib
import mmap
import multiprocessing
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from aliblip.runtime.interrupts import let_the_trainer_decide, stop_asked
from aliblip.runtime.mistakes import UsageError
from aliblip.runtime.pulse import give_up

__all__ = ["PATIENCE", "PATIENCE_REMOTE", "Readers", "ReadingHere", "now_reading"]

# Seconds without any sign of life. A silent server has a limit of its own, which is heard of first.
PATIENCE, PATIENCE_REMOTE = 45.0, 180.0
# Launchers kill 30 seconds after their SIGTERM.
SECONDS_AFTER_A_SIGNAL = 10.0
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_END = 5.0
# A copy of this process is there at once, whatever is Python's default (since 3.14 another): a new one would import
# torch and all else first, for seconds.
START_METHOD = "fork" if sys.platform.startswith("linux") else "spawn"

ITEM, END, ERROR, PLACE = b"I", b"E", b"X", b"P"
_HEAD = struct.Struct("<cQQ")  # kind, bytes of the pickled part, bytes in the memory that is passed beside it
_FEWER = "give a smaller --dataloader_num_workers, --shuffle_window or batch"
DEATHS = {
    signal.SIGKILL: f"as the system does where memory runs out: {_FEWER}, or the job more memory",
    signal.SIGBUS: "a file that it read was cut short, or a disk or /dev/shm is full: see to these",
    signal.SIGSEGV: "a damaged file, or a library that does not fit: read it with --dataloader_num_workers 0 to see",
}

# Of a reader: its channel, for `now_reading`; of a process that reads by itself: what it reads.
_own_channel: _Outgoing | None = None
_read_here = ""


def now_reading(place: str) -> None:
    """Tell the process that waits, or the thread that watches this one, what is read now."""
    global _read_here
    _read_here = place
    if _own_channel is not None:
        _own_channel.send(PLACE, place.encode("utf-8", "backslashreplace")[:500])


class Readers:
    """Processes, one for each of `works`, that iterate it and give its items.

    Args:
        works: iterables that can be sent to a process; an exception that one raises is raised by `take`.
        ahead: items that a reader makes before they are asked for.
        patience: seconds without a sign of life after which a reader counts as stuck.
    """

    def __init__(self, works: Sequence[Iterable[Any]], ahead: int, patience: float = PATIENCE):
        self._patience = patience
        self._readers: list[_Reader] = []
        try:
            for number, work in enumerate(works):
                self._readers.append(_Reader(number, work, ahead))
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def take(self, number: int) -> Any:
        """The next item of a reader.

        Raises:
            RuntimeError: there is none.
            UsageError: the reader died or is stuck, or a signal asked the run to stop while nothing came; the message
                says what happened and what helps.
            Exception: whatever the reader met.
        """
        reader = self._readers[number]
        wait = _Wait(reader, self._patience)
        while True:
            kind, content = reader.receive(wait)
            if kind == PLACE:
                reader.place = content
            elif kind == ITEM:
                return content
            elif kind == END:
                raise RuntimeError(f"{reader} has nothing more to give")
            else:
                raise content

    def close(self) -> None:
        """End the readers, whatever they do: they ignore SIGTERM."""
        for reader in self._readers:
            reader.channel.close()
        _end([reader.process for reader in self._readers])
        self._readers = []


class ReadingHere:
    """Iterators that are read in this process, while a thread watches: a file system that does not answer would hold
    the process for ever, and no signal would end it. A context manager.

    Args:
        works: the iterators.
        patience: as of `Readers`.
    """

    number = 0

    def __init__(self, works: Sequence[Iterator[Any]], patience: float = PATIENCE):
        self._works, self._patience = works, patience
        self._ended = threading.Event()
        self._wait: _Wait | None = None
        self._thread = threading.get_native_id()
        self._process = psutil.Process()
        self._sign: tuple[Any, ...] | None = None

    def __enter__(self) -> ReadingHere:
        threading.Thread(target=self._watch, name="watches reading", daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        self._ended.set()

    def __str__(self) -> str:
        return f"this process ({os.getpid()})"

    @property
    def place(self) -> str:
        return _read_here

    def take(self, number: int) -> Any:
        """The next item of an iterator."""
        self._wait = _Wait(self, self._patience)
        try:
            return next(self._works[number])
        finally:
            self._wait = None

    def sign(self) -> object:
        """What changes while the thread that reads does something, or others compute or read for it: these do a little
        in any case, so only what is more than that counts."""
        own: list[str] = []
        for name in ("schedstat", "io"):
            with contextlib.suppress(OSError):
                own.append(Path(f"/proc/self/task/{self._thread}/{name}").read_text())
        if not own:  # of a system that tells nothing
            return object()
        seconds = data = 0.0
        with contextlib.suppress(psutil.Error, AttributeError, OSError, NotImplementedError, RuntimeError):
            seconds, data = sum(self._process.cpu_times()[:2]), self._process.io_counters().read_chars
        if self._sign is None or self._sign[0] != own or seconds - self._sign[1] > 1 or data - self._sign[2] > 2**20:
            self._sign = own, seconds, data
        return self._sign

    def _watch(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_LOOKS):
            if (wait := self._wait) is None:
                continue
            try:
                wait.look()
            except UsageError as error:
                if wait is self._wait and not self._ended.is_set():
                    give_up(str(error))


class _Reader:
    """A reader process, as the process that takes its items sees it."""

    def __init__(self, number: int, work: Iterable[Any], ahead: int):
        self.number, self.place = number, ""
        self.channel, theirs = socket.socketpair()
        self.channel.settimeout(SECONDS_BETWEEN_LOOKS)
        context = multiprocessing.get_context(START_METHOD)
        self.process: BaseProcess = context.Process(target=_read, args=(work, theirs, ahead, os.getpid()), daemon=True)
        self.process.start()
        theirs.close()  # else its end would not be heard, by this process or by readers that are started later

    def __str__(self) -> str:
        return f"reader {self.number} (process {self.process.pid})"

    def sign(self) -> object:
        return _sign_of_life(self.process.pid)

    @property
    def at(self) -> str:
        return f" while it read {self.place}" if self.place else ""

    def receive(self, wait: _Wait) -> tuple[bytes, Any]:
        data, passed = self._receive_some(_HEAD.size, wait)
        try:
            data += self._receive(_HEAD.size - len(data), wait)
            kind, pickled, beside = _HEAD.unpack(data)
            content = self._receive(pickled, wait)
            if kind == PLACE:
                return kind, content.decode("utf-8")
            buffers = _views(passed[0], beside) if beside else []
        finally:
            for descriptor in passed:
                os.close(descriptor)
        if kind == ITEM:
            with contextlib.suppress(OSError):  # one that has given its last item is gone
                self.channel.send(b"\0")
        return kind, _unpacked(pickle.loads(content, buffers=buffers))

    def _receive_some(self, most: int, wait: _Wait) -> tuple[bytes, list[int]]:
        """Some bytes, and the memory that was passed with them."""
        while True:
            try:
                data, passed, _, _ = socket.recv_fds(self.channel, most, 1)
            except TimeoutError:
                wait.look()
                continue
            except ConnectionError:
                data, passed = b"", []
            if not data:
                wait.died()
            return data, passed

    def _receive(self, size: int, wait: _Wait) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            parts += self._receive_some(min(size - len(parts), 2**20), wait)[0]
        return bytes(parts)


class _Wait:
    """One wait for one reader, and the reasons to end it."""

    def __init__(self, reader: _Reader | ReadingHere, patience: float):
        self.reader, self.patience = reader, patience
        self._sign: object = None
        self._seen = self._began = time.monotonic()

    def look(self) -> None:
        """Called every second.

        Raises:
            UsageError: the wait has lasted long enough.
        """
        now, sign = time.monotonic(), self.reader.sign()
        if sign != self._sign:
            self._sign, self._seen = sign, now
        reading = f", which reads {self.reader.place}," if self.reader.place else ""
        asked = stop_asked()
        # A process that reads by itself and works comes to its next step, and writes a checkpoint.
        waited = now - (self._seen if isinstance(self.reader, ReadingHere) else self._began)
        if asked is not None and waited > SECONDS_AFTER_A_SIGNAL:
            raise UsageError(
                f"stopped by {asked.name}, without another checkpoint: nothing has come from {self.reader}{reading} "
                f"for {now - self._began:.0f} seconds; --resume_from_checkpoint last goes on from the last one"
            )
        if now - self._seen > self.patience:
            raise UsageError(
                f"{self.reader}{reading} has done nothing for {now - self._seen:.0f} seconds: a file system that does "
                "not answer, or a stopped process. See to it, and go on with --resume_from_checkpoint last"
            )

    def died(self) -> None:
        """The channel has ended.

        Raises:
            UsageError: how the reader did.
        """
        process = self.reader.process
        process.join(5)
        code = process.exitcode
        if code is not None and code < 0:
            number = signal.Signals(-code)
            why = f"was killed by {number.name}{self.reader.at}"
            why += f", {DEATHS[number]}" if number in DEATHS else f": {_FEWER}, and go on"
        else:
            why = f"ended before its work was done (exit code {code}){self.reader.at}: "
            why += "--dataloader_num_workers 0 shows more"
        raise UsageError(f"{self.reader} {why}")


def _sign_of_life(pid: int) -> object:
    """What changes as long as a process computes, or reads a byte, or only wakes."""
    signs: list[object] = []
    with contextlib.suppress(OSError):  # in nanoseconds, on Linux
        signs.append(Path(f"/proc/{pid}/schedstat").read_text())
    with contextlib.suppress(psutil.Error, AttributeError, OSError, NotImplementedError, RuntimeError):
        process = psutil.Process(pid)
        signs.append(process.cpu_times()[:2])
        signs.append(process.io_counters().read_chars)
    return signs or object()  # of a system that tells nothing: nobody is taken for stuck there


# --- in a reader ------------------------------------------------------------------------------------------------------


class _Outgoing:
    """The channel of a reader to its parent; a parent that is gone ends the reader."""

    def __init__(self, channel: socket.socket, ahead: int, parent: int):
        self.channel, self.room, self.parent = channel, ahead, parent
        channel.settimeout(5.0)

    def wait_for_room(self) -> None:
        """Until the parent has taken enough of what was given."""
        while not self.room:
            try:
                taken = self.channel.recv(64)
            except TimeoutError:
                self._look()
                continue
            if not taken:
                os._exit(1)
            self.room += len(taken)

    def give(self, kind: bytes, content: Any) -> None:
        buffers: list[pickle.PickleBuffer] = []
        data = pickle.dumps(_packed(content), protocol=5, buffer_callback=buffers.append if _HAS_MEMORY else None)
        self.room -= 1
        if not buffers:
            self.send(kind, data)
            return
        descriptor, size = _memory_of([buffer.raw() for buffer in buffers])
        try:
            self.send(kind, data, descriptor, size)
        finally:
            os.close(descriptor)

    def send(self, kind: bytes, data: bytes, descriptor: int | None = None, size: int = 0) -> None:
        rest = memoryview(_HEAD.pack(kind, len(data), size) + data)
        passed = [] if descriptor is None else [descriptor]
        while rest:
            try:
                sent = socket.send_fds(self.channel, [rest], passed) if passed else self.channel.send(rest)
            except TimeoutError:
                self._look()
                continue
            except ConnectionError:  # the parent is gone, or has what it wanted
                os._exit(1)
            rest, passed = rest[sent:], []

    def _look(self) -> None:
        if os.getppid() != self.parent:
            os._exit(1)


def _read(work: Iterable[Any], channel: socket.socket, ahead: int, parent: int) -> None:
    """What a reader does."""
    global _own_channel
    torch.set_num_threads(1)  # the cores belong to the readers and the model, not to each reader's own pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a pool that was used before the fork does not live in the child
    let_the_trainer_decide()
    _own_channel = outgoing = _Outgoing(channel, ahead, parent)
    try:
        for item in work:
            outgoing.wait_for_room()
            outgoing.give(ITEM, item)
        outgoing.give(END, None)
    except Exception as error:
        outgoing.give(ERROR, _sendable(error))


def _sendable(error: Exception) -> Exception:
    """An error as it is, with the text of its traceback as its cause; of one that can't travel, the text."""
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return _InReader(error, text)


class _InReader(Exception):
    """Carries an error to the parent, where it has the traceback of the reader as its cause."""

    def __init__(self, error: Exception, text: str):
        super().__init__(error, text)

    def __reduce__(self):
        return _with_cause, self.args


class _Traceback(Exception):
    """The traceback of another process."""

    def __init__(self, text: str):
        super().__init__(text)

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def _with_cause(error: Exception, text: str) -> Exception:
    error.__cause__ = None if isinstance(error, UsageError) else _Traceback(text)
    return error


# --- how items travel -------------------------------------------------------------------------------------------------

_HAS_MEMORY = hasattr(os, "memfd_create")  # Linux; elsewhere the bytes go through the channel
_ALIGNMENT = 64


class _Array:
    """A tensor as its bytes travel: pickled by torch, they would be copied into the message."""

    def __init__(self, array: np.ndarray):
        self.array = array


def _packed(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _Array(value.contiguous().numpy())
    if isinstance(value, dict):
        return {key: _packed(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_packed(entry) for entry in value)
    return value


def _unpacked(value: Any) -> Any:
    if isinstance(value, _Array):
        return torch.from_numpy(value.array if value.array.flags.writeable else value.array.copy())
    if isinstance(value, dict):
        return {key: _unpacked(entry) for key, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_unpacked(entry) for entry in value)
    return value


def _memory_of(parts: Sequence[memoryview]) -> tuple[int, int]:
    """Memory that holds parts, each after its length, as a descriptor to pass on; and its size."""
    descriptor = os.memfd_create("aliblip-batch")
    try:
        size = 0
        for part in parts:
            for data in (struct.pack("<Q", part.nbytes).ljust(_ALIGNMENT, b"\0"), part.cast("B")):
                view = memoryview(data)
                while view:
                    written = os.pwrite(descriptor, view, size)
                    size, view = size + written, view[written:]
            size = -(-size // _ALIGNMENT) * _ALIGNMENT
        os.ftruncate(descriptor, size)
        return descriptor, size
    except BaseException:
        os.close(descriptor)
        raise


def _views(descriptor: int, size: int) -> Iterator[memoryview]:
    """The parts of passed memory, which lives as long as one of them."""
    whole = memoryview(mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE | getattr(mmap, "MAP_POPULATE", 0)))
    views, at = [], 0
    while at < size:
        (length,) = struct.unpack_from("<Q", whole, at)
        at += _ALIGNMENT
        views.append(whole[at : at + length])
        at = -(-(at + length) // _ALIGNMENT) * _ALIGNMENT
    return iter(views)


def _end(readers: Sequence[BaseProcess]) -> None:
    """Kill readers and see them end. One that a dead file system holds can't end: nobody waits for it."""
    for reader in readers:
        reader.kill()
    end = time.monotonic() + SECONDS_TO_END
    for reader in readers:
        reader.join(max(end - time.monotonic(), 0.0))
        if reader.is_alive():
            # Python would wait for it at its own end. There is no public call for it.
            getattr(multiprocessing.process, "_children", set()).discard(reader)


@atexit.register
def _end_all() -> None:
    """An error can leave readers behind. Python asks them with SIGTERM to end, and would wait for them for ever."""
    _end(multiprocessing.active_children())
