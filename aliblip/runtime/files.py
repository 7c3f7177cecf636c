"""The one place that writes files and folders to keep: a reader, or a crash, never finds half of one."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors.torch import save_file

# Ends the names of files that a killed process left half written.
PARTIAL = ".partial"
# Of a file of settings, results or state; no run writes one of a tenth of it.
MOST_JSON_BYTES = 256 * 2**20


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write piece by piece beside its place; it is synced, and then put there, if nothing failed.

    Raises:
        OSError: writing failed, or a folder, a pipe or a device lies there, which is not replaced.
    """
    check_place(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def mapped_array(folder: Path, shape: tuple[int, ...], kind: Any) -> np.ndarray:
    """An array on the disk, whose pages the system takes back when it needs memory. Its file has no name, and is gone
    with the process.

    Raises:
        OSError: there is no room for it; it is asked for here, since to write there later would end the process.
    """
    size = prod(shape) * np.dtype(kind).itemsize
    if not size or not hasattr(os, "posix_fallocate"):
        return np.empty(shape, kind)
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, kind, "r+", shape=shape)


def check_place(path: Path) -> None:
    """Whether a file may come here. As root /dev/null could be replaced, for everybody.

    Raises:
        OSError: there is something that is no file.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EEXIST, "There is a folder, a pipe or a device, and no file", str(path))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file beside its place, synced, and then put it there."""
    with new_file(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: list[dict]) -> None:
    """`write_text` of one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_json_line(path: Path, row: dict) -> None:
    """Add one JSON object to a file of lines. What a kill or a full disk left of a line before is taken out first, so
    that every program reads the file.

    Raises:
        OSError: writing failed; the file ends as it did before.
    """
    line = json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"
    with open(path, "ab+", buffering=0) as file:
        end = _end_of_lines(file)
        file.truncate(end)
        try:
            while line:  # a nearly full disk takes a part, and refuses the rest
                line = line[file.write(line) :]
        except OSError:
            file.truncate(end)
            raise


def _end_of_lines(file: BinaryIO) -> int:
    """Where the last whole line of a file ends; a last line that lacks nothing but its end gets it."""
    size = file.seek(0, os.SEEK_END)
    start, rest = size, b""
    while start and b"\n" not in rest:
        step = min(start, 65536)
        start -= step
        file.seek(start)
        rest = file.read(step) + rest
    cut = rest.rpartition(b"\n")[2]
    if not cut:
        return size
    with suppress(ValueError):
        json.loads(cut)
        file.write(b"\n")
        return size + 1
    return size - len(cut)


def read_bytes(path: str | Path, most: int = MOST_JSON_BYTES) -> bytes:
    """The bytes of a file that somebody named: a pipe is not waited for, and a device not read without end.

    Raises:
        OSError: it can't be read.
        ValueError: it is a pipe or a device, or has more than `most` bytes.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is a pipe or a device, and no file")
        data = b"" if status.st_size > most else file.read(most + 1)
    if max(len(data), status.st_size) > most:
        raise ValueError(f"it has {max(len(data), status.st_size):,} bytes")
    return data


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def read_json(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file of settings or results, whoever wrote it.

    Raises:
        OSError: it can't be read.
        ValueError: no JSON, no object, nested without end, or of a size that no such file has; or `read_bytes`.
    """
    data = read_bytes(path)
    try:
        found = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} and no names with values")
    return found


def read_json_lines(path: Path) -> list[dict]:
    """The whole lines of a file that `append_json_line` or `write_json_lines` wrote."""
    rows = []
    for line in path.read_bytes().splitlines():
        with suppress(ValueError, RecursionError):  # cut off, perhaps in the middle of a character
            rows.append(json.loads(line))
    return rows


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file. Unlike the others not put in place at the end: it belongs into a `NewFolder`.

    Raises:
        SafetensorError: the system refused it; the message says why.
    """
    # transformers asks for the format of a model's weights.
    save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata={"format": "pt"})


def checksum_of(path: Path) -> str:
    """Eight hexadecimal digits (CRC-32) that change with any flipped bit of a file, at 2 to 4 GB a second."""
    value = 0
    with open(path, "rb") as file:
        while data := file.read(2**22):
            value = zlib.crc32(data, value)
    return f"{value:08x}"


class NewFolder:
    """A folder that is filled beside its place, synced, and then swapped in; a failure leaves the old one as it was.

        with NewFolder(output_dir / "last", size=bytes_needed) as beside:
            write_tensors(beside / "model.safetensors", weights)

    A process killed at any moment leaves the old folder or the new one, complete; `repair` clears up what it left.

    Args:
        folder: the place.
        size: bytes that will be written, to look at the free space before; 0: not known.

    Raises:
        OSError: there is less free space, or writing failed. Nothing is left of the attempt.
    """

    def __init__(self, folder: Path, size: int = 0):
        self.folder, self.size = folder, size
        self.beside = folder.with_name(f".{folder.name}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.beside, ignore_errors=True)
        free = shutil.disk_usage(self.folder.parent).free
        if free < self.size:
            raise OSError(
                errno.ENOSPC,
                f"{self.folder.name} needs {self.size / 1e6:,.0f} MB and {free / 1e6:,.0f} MB are free",
            )
        self.beside.mkdir(parents=True)
        return self.beside

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                _sync_tree(self.beside)
                _swap_in(self.beside, self.folder)
        finally:
            shutil.rmtree(self.beside, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")


def _swap_in(beside: Path, folder: Path) -> None:
    old = _old(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    try:
        beside.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    descriptor = os.open(folder.parent, os.O_RDONLY)  # the names of the folders are data of their parent
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    shutil.rmtree(old, ignore_errors=True)


def repair(parent: Path) -> None:
    """Clear up after a process that was killed while it wrote a `NewFolder` in `parent`."""
    for old in parent.glob(".*.old"):
        folder = parent / old.name[1 : -len(".old")]
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(folder)
    for beside in parent.glob(".*.tmp"):
        shutil.rmtree(beside, ignore_errors=True)


__all__ = [
    "PARTIAL",
    "NewFolder",
    "append_json_line",
    "check_place",
    "checksum_of",
    "mapped_array",
    "new_file",
    "read_bytes",
    "read_json",
    "read_json_lines",
    "repair",
    "write_bytes",
    "write_json",
    "write_json_lines",
    "write_tensors",
    "write_text",
]
