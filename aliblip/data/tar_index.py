"""Where the samples of a WebDataset tar lie: one scan of its headers, kept for the next run.

    index = indexed_tar("train-0.tar", index_dir="output/tar_index")
    for field, (offset, size) in index.members(17).items(): ...

S samples, M members, K bytes of keys.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import numpy as np
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from aliblip.data.remote import open_file, read_patiently, resumed, storage_options
from aliblip.runtime.files import write_bytes
from aliblip.runtime.mistakes import UsageError

__all__ = ["TarIndex", "indexed_tar"]

FORMAT = "1"
# What a file system tells about a file, and what changes with its content: the size; for local files the time of
# modification; over HTTP, S3, Google Cloud and the Hub one of the others.
STAMP_KEYS = ("size", "mtime", "ETag", "etag", "Last-Modified", "LastModified", "updated", "blob_id")
# datasets' rule: the key is the path up to the first dot of the base name.
_MEMBER = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")


class TarIndex:
    """Samples of a tar, in arrays: small, and shared by forked workers, which lists of Python objects would not be.

    Attributes:
        size: bytes of the tar.
        fields: names of the fields, as the members number them.
        arrays: "keys" (K,) uint8 and "key_ends" (S,) int64, "member_ends" (S,) int64, "field" (M,) int32,
            "offset" (M,) int64, "length" (M,) int64.
        digest: BLAKE2 of the names, offsets and lengths of all members.
    """

    def __init__(self, size: int, fields: Sequence[str], arrays: dict[str, np.ndarray]):
        self.size = size
        self.fields = list(fields)
        self.arrays = arrays
        content = hashlib.blake2b(json.dumps(self.fields).encode(), digest_size=16)
        for name in sorted(arrays):
            content.update(f"{name} {arrays[name].dtype}".encode())
            content.update(np.ascontiguousarray(arrays[name]))
        self.digest = content.hexdigest()

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


def indexed_tar(file: str, index_dir: str | None) -> TarIndex:
    """The index of a tar: a kept one, or else the tar is scanned and the index kept.

    A kept index is valid as long as the tar has the same size and the same time of modification (remote files: the same
    ETag, or what the server has of that kind). Of several processes of a machine one scans, and the others wait.

    Args:
        file: path or address of the tar.
        index_dir: folder of the kept indexes, which is made where it is missing; None keeps nothing.

    Raises:
        UsageError: the file is not a readable, uncompressed tar.
        OSError: it can't be read, or the index can't be written.
    """
    stamp = read_patiently(lambda: _stamp(file), file)
    if index_dir is None:
        return _scan(file, stamp["size"])
    Path(index_dir).mkdir(parents=True, exist_ok=True)
    path = Path(index_dir) / f"{hashlib.blake2b(file.encode(), digest_size=16).hexdigest()}.safetensors"
    index = _load(path, file, stamp)
    if index is None:
        with FileLock(f"{path}.lock"):
            index = _load(path, file, stamp)  # written by another process while this one waited
            if index is None:
                index = _scan(file, stamp["size"])
                about = {"format": FORMAT, "file": file, "stamp": json.dumps(stamp), "digest": index.digest}
                write_bytes(path, save(index.arrays, {**about, "fields": json.dumps(index.fields)}))
    return index


def _stamp(file: str) -> dict[str, str | int]:
    file_system, path = fsspec.url_to_fs(file, **storage_options(file))
    info = file_system.info(path)
    return {key: info[key] if key == "size" else str(info[key]) for key in STAMP_KEYS if info.get(key) is not None}


def _load(path: Path, file: str, stamp: dict[str, str | int]) -> TarIndex | None:
    try:
        with safe_open(path, framework="numpy") as kept:
            about = kept.metadata()
            if (about["format"], about["file"], about["stamp"]) != (FORMAT, file, json.dumps(stamp)):
                return None
            arrays = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118 (not a dict)
        index = TarIndex(stamp["size"], json.loads(about["fields"]), arrays)
        return index if index.digest == about["digest"] else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):  # none there yet, or damaged
        return None


def _scan(file: str, size: int) -> TarIndex:
    fields: dict[str, int] = {}
    keys, last = bytearray(), None
    key_ends, member_ends, offsets, lengths, numbers = array("q"), array("q"), array("q"), array("q"), array("i")
    present: set[str] = set()
    for name, offset, length in _members(file):
        match = _MEMBER.match(name)
        if not match:
            continue
        key, field = match.group(1), match.group(2).lower()
        if key != last:
            last, present = key, set()
            keys += key.encode("utf-8", "surrogateescape")
            key_ends.append(len(keys))
            member_ends.append(len(numbers))
        if field not in present:  # of two members of one name the first counts
            present.add(field)
            numbers.append(fields.setdefault(field, len(fields)))
            offsets.append(offset)
            lengths.append(length)
            member_ends[-1] = len(numbers)
    arrays = {
        "keys": np.frombuffer(bytes(keys), dtype=np.uint8),
        "key_ends": np.array(key_ends, dtype=np.int64),
        "member_ends": np.array(member_ends, dtype=np.int64),
        "field": np.array(numbers, dtype=np.int32),
        "offset": np.array(offsets, dtype=np.int64),
        "length": np.array(lengths, dtype=np.int64),
    }
    return TarIndex(size, list(fields), arrays)


def _members(file: str) -> Iterator[tuple[str, int, int]]:
    """Name, offset and length of every regular file in a tar."""
    offset = 0

    def read(done: int) -> Iterator[tuple[str, int, int]]:
        nonlocal offset
        with open_file(file) as stream:
            stream.seek(offset)
            with tarfile.open(fileobj=stream, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # it keeps a kilobyte of each
                    offset = tar.offset  # where the next header is, and a new connection goes on
                    if member.isfile():
                        yield member.name, member.offset_data, member.size

    try:
        yield from resumed(read, file)
    except tarfile.ReadError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{file} is not a readable, uncompressed tar ({reason}): repair or remove it") from error
