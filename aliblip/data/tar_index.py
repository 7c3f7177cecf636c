"""Where the samples of a WebDataset tar lie: one scan of its headers, kept for the next run.

    index = indexed_tar("train-0.tar", index_dir="output/tar_index", wanted=Wanted())
    for field, (offset, size) in index.members(17).items(): ...

S samples, M members, K bytes of keys.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from aliblip.data.remote import read_patiently, storage_options
from aliblip.data.tar_members import Wanted, compression_of, read_members
from aliblip.data.tar_samples import Members
from aliblip.runtime.files import write_bytes
from aliblip.runtime.locks import acquired

__all__ = ["TarIndex", "indexed_tar"]

FORMAT = "2"
TELL_AFTER_SECONDS = 10  # of waiting for another process that looks through the same tar
LONGEST_LOOK_SECONDS = 6 * 3600
# What a file system tells about a file, and what changes with its content: the size; for local files the time of
# modification; over HTTP, S3, Google Cloud and the Hub one of the others.
STAMP_KEYS = ("size", "mtime", "ETag", "etag", "Last-Modified", "LastModified", "updated", "blob_id")
# What makes the digest of a manifest; the rest follows from the bytes of members and from what was asked.
PLACES = ("field", "key_ends", "keys", "length", "member_ends", "offset")


class TarIndex:
    """Samples of a tar, in arrays: small, and shared by forked workers, which lists of Python objects would not be.

    Attributes:
        size: bytes of the tar.
        fields: names of the fields, as the members number them.
        arrays: "keys" (K,) uint8 and "key_ends" (S,) int64, "member_ends" (S,) int64, "field" (M,) int32,
            "offset" (M,) int64, "length" (M,) int64; "id" (S,) int64, "id_state" (S,) int8 and
            "titles" (S,) int32 as `Samples` has them.
        about: "compression" of the tar, and of `Samples` all but fields and arrays.
        digest: BLAKE2 of the names, offsets and lengths of all members.
        check: BLAKE2 of everything.
    """

    def __init__(self, size: int, fields: Sequence[str], arrays: dict[str, np.ndarray], about: dict[str, Any]):
        self.size = size
        self.fields = list(fields)
        self.arrays = arrays
        self.about = about
        content = hashlib.blake2b(json.dumps(self.fields).encode(), digest_size=16)
        for name in PLACES:
            _take_in(content, name, arrays[name])
        self.digest = content.hexdigest()
        for name in ("id", "id_state", "titles"):
            _take_in(content, name, arrays[name])
        content.update(json.dumps(about).encode())
        self.check = content.hexdigest()

    def __len__(self) -> int:
        return len(self.arrays["key_ends"])

    def key(self, sample: int) -> str:
        """The name that the members of a sample share."""
        begin, end = self._span("key_ends", sample)
        return self.arrays["keys"][begin:end].tobytes().decode("utf-8", "surrogateescape")

    def members(self, sample: int) -> dict[str, tuple[int, int]]:
        """{field: (offset, length)} of a sample."""
        begin, end = self._span("member_ends", sample)
        columns = (self.arrays[name][begin:end].tolist() for name in ("field", "offset", "length"))
        return {self.fields[field]: (offset, length) for field, offset, length in zip(*columns, strict=True)}

    def _span(self, name: str, sample: int) -> tuple[int, int]:
        ends = self.arrays[name]
        return (int(ends[sample - 1]) if sample else 0), int(ends[sample])


def _take_in(content: Any, name: str, array: np.ndarray) -> None:
    content.update(f"{name} {array.dtype}".encode())
    content.update(np.ascontiguousarray(array))


def indexed_tar(file: str, index_dir: str | None, wanted: Wanted) -> TarIndex:
    """The index of a tar: a kept one, or else the tar is scanned and the index kept.

    A kept index is valid as long as the tar has the same size and the same time of modification (remote files: the same
    ETag, or what the server has of that kind). Of several processes of a machine one scans, and the others wait.

    Args:
        file: path or address of the tar, compressed or not.
        index_dir: folder of the kept indexes, which is made where it is missing; None keeps nothing.
        wanted: where titles and product ids may stand; each has an index of its own.

    Raises:
        UsageError: the file is not a tar that can be read whole.
        OSError: it can't be read, or the index can't be written.
    """
    stamp = read_patiently(lambda: _stamp(file), file)
    if index_dir is None:
        return _scan(file, stamp["size"], wanted)
    Path(index_dir).mkdir(parents=True, exist_ok=True)
    asked = json.dumps(asdict(wanted))
    name = hashlib.blake2b(f"{file} {asked}".encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    path = Path(index_dir) / f"{name}.safetensors"
    what = {"format": FORMAT, "file": json.dumps(file), "stamp": json.dumps(stamp), "wanted": asked}
    index = _load(path, what, stamp["size"])
    if index is None:
        with _alone(f"{path}.lock", file):
            index = _load(path, what, stamp["size"])  # written by another process while this one waited
            if index is None:
                index = _scan(file, stamp["size"], wanted)
                found = {"fields": json.dumps(index.fields), "about": json.dumps(index.about), "check": index.check}
                write_bytes(path, save(index.arrays, what | found))
    return index


@contextmanager
def _alone(lock_file: str, file: str) -> Iterator[None]:
    lock = acquired(
        lock_file,
        tell_after=TELL_AFTER_SECONDS,
        longest=LONGEST_LOOK_SECONDS,
        tell=lambda: print(
            f"waiting for another process that looks through {file} (its lock: {lock_file})", flush=True
        ),
        mistake=lambda: (
            f"another process has held {lock_file} for {LONGEST_LOOK_SECONDS / 3600:.0f} hours: end it, and start again"
        ),
    )
    try:
        yield
    finally:
        lock.release()


def _stamp(file: str) -> dict[str, str | int]:
    file_system, path = fsspec.url_to_fs(file, **storage_options(file))
    info = file_system.info(path)
    return {key: info[key] if key == "size" else str(info[key]) for key in STAMP_KEYS if info.get(key) is not None}


def _load(path: Path, what: dict[str, str], size: int) -> TarIndex | None:
    try:
        with safe_open(path, framework="numpy") as kept:
            metadata = kept.metadata()
            if any(metadata[key] != value for key, value in what.items()):
                return None
            arrays = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 (not a dict)
        index = TarIndex(size, json.loads(metadata["fields"]), arrays, json.loads(metadata["about"]))
        return index if index.check == metadata["check"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError):  # none there yet, or damaged
        return None


def _scan(file: str, size: int, wanted: Wanted) -> TarIndex:
    compression = read_patiently(lambda: compression_of(file), file)
    members = Members()
    for member in read_members(file, size, compression, wanted):
        members.add(member)
    samples = members.samples()
    about = {
        "compression": compression,
        "photo_fields": samples.photo_fields,
        "keys": samples.keys,
        "absent": samples.absent,
        "counts": samples.counts,
        "left": samples.left,
        "alone": samples.alone,
    }
    return TarIndex(size, samples.fields, samples.arrays, json.loads(json.dumps(about)))
