"""One folder, one writer: who writes into a folder owns it, and others are refused with the owner's name.

    with Owner.of(output_dir, "train.py"):
        ...                                # nobody else writes here

The owner stands in a file of the folder, made by a hard link, which network file systems do one at a time; locks of the
system are not kept everywhere. The owner gives a sign of life in it every few seconds. One of the same machine that is
dead is known by its process at once; one of another machine by a file that rests for `DEAD_AFTER` seconds. A dead
owner's folder is taken over, and that is told. An owner that stood still for so long that somebody else took its folder
ends at once: what it would write is not its own any more.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil

from aliblip.runtime.files import read_bytes
from aliblip.runtime.mistakes import UsageError

__all__ = ["OWNER", "Owner", "check_copies"]

OWNER = ".owner.json"
SECONDS_BETWEEN_SIGNS = 5.0
DEAD_AFTER = 45.0
SECONDS_FOR_A_SIGN = 10.0  # that the end of a run waits for one
MOST_BYTES = 2**16  # of the file
# Who starts copies of a process, and says how many, where no launcher of ours has made one run of them.
COPIES = {"SLURM": ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), "MPI": ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")}

_held: dict[str, Owner] = {}  # of this process, by their tokens


class Owner:
    """This process as the owner of a folder; a context manager.

    Args:
        folder: which folder; None: of nothing, for processes that write nothing.
        file: where the owner stands; None where the folder takes no files, which is told elsewhere.
        entry: what stands there.
    """

    def __init__(self, folder: Path | str | None = None, file: Path | None = None, entry: dict[str, Any] | None = None):
        self.folder, self.file, self.entry = folder, file, entry or {}
        self._ended, self._writing = threading.Event(), threading.Lock()
        if file is not None:
            _held[self.entry["token"]] = self
            threading.Thread(target=self._give_signs, name=f"owner of {folder}", daemon=True).start()

    @classmethod
    def of(
        cls, folder: Path | str, what: str, *, tell: Callable[[str], object] = print, place: Path | None = None
    ) -> Owner:
        """Become the owner of a folder.

        Args:
            folder: it exists, if no other place is given.
            what: the command, as others are told.
            tell: takes the line about a dead owner.
            place: the file to stand in, where the folder is on no file system.

        Raises:
            UsageError: somebody else owns it; who, where and since when.
        """
        file = Path(folder) / OWNER if place is None else place
        entry = {
            "what": what,
            **{"host": socket.gethostname(), "pid": os.getpid(), "began": psutil.Process().create_time()},
            "machine": _machine(),
            "since": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "token": uuid.uuid4().hex,
            "signs": 0,
        }
        while True:
            try:
                _make(file, entry)
                return cls(folder, file, entry)
            except FileExistsError:
                pass
            except OSError:
                return cls(folder)
            before = _read(file)
            if before is None:  # gone again, or half written: by one of another kind of file system, for a moment
                time.sleep(0.05)
                if (before := _read(file)) is None and file.exists():
                    before = {}
            if before is None:
                continue
            _refuse_if_alive(folder, file, before, tell)
            if _put_away(file, before):
                tell(f"{folder}: its owner, {_told(before)}, is dead, and the folder is taken over")

    @staticmethod
    def look(folder: Path, tell: Callable[[str], object] = print) -> None:
        """Only look whether somebody owns a folder.

        Raises:
            UsageError: as `of`.
        """
        if (before := _read(folder / OWNER)) is not None:
            _refuse_if_alive(folder, folder / OWNER, before, tell)

    def release(self) -> None:
        """Give the folder up; does nothing the second time, and in a process that was forked off."""
        if self.file is None or self._ended.is_set() or self.entry["pid"] != os.getpid():
            return
        self._ended.set()
        _held.pop(self.entry["token"], None)
        # A sign that is being given would put the file back. One that never ends, on a file system that is stuck,
        # leaves it there: the entry of a dead process, as the next owner sees.
        if self._writing.acquire(timeout=SECONDS_FOR_A_SIGN):
            try:
                with suppress(OSError):
                    if _token(_read(self.file)) == self.entry["token"]:
                        self.file.unlink()
            finally:
                self._writing.release()

    def __enter__(self) -> Owner:
        return self

    def __exit__(self, *error) -> None:
        self.release()

    def _give_signs(self) -> None:
        while not self._ended.wait(SECONDS_BETWEEN_SIGNS):
            with self._writing:
                if not self._ended.is_set():
                    self._give_sign()

    def _give_sign(self) -> None:
        found = _read(self.file)
        if found is None and not self.file.exists() and self.file.parent.exists():
            with suppress(OSError):  # somebody has tidied up
                _make(self.file, self.entry)
            return
        if found and _token(found) != self.entry["token"]:
            self._lost(found)
        self.entry["signs"] += 1
        with suppress(OSError):  # a full disk, or a server that is away for a moment
            _write(self.file, self.entry)

    def _lost(self, other: Mapping[str, Any]) -> None:
        print(
            f"{self.folder} was taken over by {_told(other)} while this process stood still: it ends, so that two "
            "don't write there",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


@atexit.register
def _release_all() -> None:
    for owner in list(_held.values()):
        owner.release()


def check_copies() -> None:
    """Refuse copies of one command that a cluster started and that know nothing of each other.

    Raises:
        UsageError: who started them, and how they become one run.
    """
    if "WORLD_SIZE" in os.environ:
        return
    for who, names in COPIES.items():
        name = next((name for name in names if name in os.environ), None)
        if name is not None and os.environ[name].isdecimal() and int(os.environ[name]) > 1:
            raise UsageError(
                f"{who} starts {os.environ[name]} copies of this command ({name}), which know nothing of each other: "
                "start it once on each machine, by accelerate launch, which starts the processes and tells them; for "
                f"one single process, unset {name}"
            )


def _machine() -> str:
    """The same for processes that see each other by their numbers."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _make(file: Path, entry: dict[str, Any]) -> None:
    """Write the file if there is none; `FileExistsError` if there is. One of two that try at once does."""
    beside = file.with_name(f"{file.name}.{entry['token']}")
    try:
        _write(beside, entry)
        try:
            os.link(beside, file)
        except FileExistsError:
            raise
        except OSError:  # no hard links here
            os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            _write(file, entry)
    finally:
        beside.unlink(missing_ok=True)


def _write(file: Path, entry: dict[str, Any]) -> None:
    """In place, since the name is what others see: opened and closed, so that other machines see it, too."""
    data = (json.dumps(entry) + "\n").encode()
    with open(file, "r+b" if file.exists() else "wb", buffering=0) as stream:
        stream.write(data)
        stream.truncate(len(data))


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads(read_bytes(file, MOST_BYTES)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _token(entry: Mapping[str, Any] | None) -> str | None:
    return None if entry is None else entry.get("token")


def _told(entry: Mapping[str, Any]) -> str:
    if not entry:
        return "somebody whose entry can't be read"
    return f"{entry.get('what')} (process {entry.get('pid')} on {entry.get('host')}, since {entry.get('since')})"


def _refuse_if_alive(folder: Path | str, file: Path, entry: Mapping[str, Any], tell: Callable[[str], object]) -> None:
    if _is_alive(entry, file, tell):
        raise UsageError(
            f"{folder} is in use by {_told(entry)}: wait until that has ended, or end it, or give another folder"
        )


def _is_alive(entry: Mapping[str, Any], file: Path, tell: Callable[[str], object]) -> bool:
    if entry.get("machine") == _machine():
        try:
            process = psutil.Process(entry["pid"])
            is_dead = process.status() == psutil.STATUS_ZOMBIE
            return not is_dead and abs(process.create_time() - entry["began"]) < 2
        except (psutil.NoSuchProcess, TypeError, KeyError, ValueError, OverflowError):
            return False
    tell(f"{file.parent} has an owner, {_told(entry)}: looking for up to {DEAD_AFTER:.0f} seconds whether it lives")
    before, end = _look(file), time.monotonic() + DEAD_AFTER
    while time.monotonic() < end:
        time.sleep(min(1.0, DEAD_AFTER / 10))
        now = _look(file)
        if now is None:
            return False
        if now != before:
            return True
    return False


def _look(file: Path) -> tuple[bytes, int] | None:
    """What changes with a sign of life. Opened: on a network file system the bare status may be a minute old."""
    try:
        return read_bytes(file, MOST_BYTES), os.stat(file).st_mtime_ns
    except (OSError, ValueError):
        return None


def _put_away(file: Path, dead: Mapping[str, Any]) -> bool:
    """Take a dead owner's file away. False if it was not there any more, or was another's by then."""
    aside = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        os.rename(file, aside)
    except OSError:
        return False
    found = _read(aside) or {}
    is_it = _token(found) == _token(dead)
    if not is_it:
        with suppress(OSError):  # somebody else was faster: it is theirs
            os.link(aside, file)
    with suppress(OSError):
        aside.unlink()
    return is_it
