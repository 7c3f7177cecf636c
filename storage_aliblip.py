"""What a gallery is made of: vectors, items and image tokens in memory or in mapped files, and the files themselves.

A folder holds `gallery.json`, which names all its other files with sizes and checksums, and is replaced last and in one
step: whenever a process is killed, the folder holds the gallery from before or the one from after.

    vectors-*.npy           (N, E) fp32, fp16 or int8        scales-*.npy   (N,) fp32, with int8
    items-*.jsonl           {"id", "path" or "text"} a line  offsets-*.npy  (N + 1,) where each line begins
    tokens-*.safetensors    image tokens (n, P, D) bf16, if they were asked for
    skipped-*.jsonl         what could not be read: {"id", "reason"}        faiss-*.index   an approximate index, if any

Legend: N items, n of a segment, E embedding, P image tokens, D width.
"""

import hashlib
import io
import json
import os
import re
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

try:
    from .retrieval_aliblip import GALLERY_CHUNK
except ImportError:
    if __package__:  # inside a package (the Hub cache) a failure is real
        raise
    from retrieval_aliblip import GALLERY_CHUNK

try:
    import fcntl
except ImportError:  # not on Windows, where two processes must not save into one folder at the same time
    fcntl = None

VECTOR_TYPES = {"float32": torch.float32, "float16": torch.float16, "int8": torch.int8}
FORMAT = 1
MANIFEST = "gallery.json"
BUILD = "gallery.build"

_OWN_FILES = re.compile(
    r"(vectors|scales|items|offsets|skipped|tokens|faiss)-[0-9a-f]{12}\.(npy|jsonl|safetensors|index)"
)
_ROLES = {"vectors", "items", "offsets", "skipped"}  # of the files that every gallery has
_TOKEN_FILE_ITEMS = 256


class Lines(Sequence):
    """The JSON objects of a memory-mapped file of lines."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray):
        self._data, self._offsets = data, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, row: int) -> dict:
        return json.loads(self._data[self._offsets[row] : self._offsets[row + 1]].tobytes())

    def __iter__(self) -> Iterator[dict]:
        for start in range(0, len(self), 4096):
            stop = min(start + 4096, len(self))
            yield from map(json.loads, self._data[self._offsets[start] : self._offsets[stop]].tobytes().splitlines())


class TokenFiles(Sequence):
    """Image tokens (P, D) by row, in files of their own; `files` are the manifest's entries."""

    def __init__(self, folder: Path, files: Sequence[dict]):
        self.folder, self.files = folder, list(files)
        self.starts = np.cumsum([0, *(file["items"] for file in self.files)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, row: int) -> Tensor:
        index = bisect_right(self.starts, row) - 1
        try:
            with safe_open(self.folder / self.files[index]["name"], framework="pt") as file:
                return file.get_slice("tokens")[row - int(self.starts[index])]
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"the image tokens of the gallery {self.folder} can't be read ({error}): it was saved again or damaged "
                "since it was loaded; load it again"
            ) from error


@dataclass(frozen=True)
class Segment:
    """Items that were embedded together; `vectors` (n, E), `scales` (n,) with int8, `tokens` n times (P, D) or None."""

    vectors: Tensor
    scales: Tensor | None
    items: Sequence[dict]
    tokens: Sequence[Tensor] | None = None

    def to(self, device: torch.device | str) -> "Segment":
        """Vectors and scales on another device; items and tokens stay."""
        scales = None if self.scales is None else self.scales.to(device)
        return replace(self, vectors=self.vectors.to(device), scales=scales)


@dataclass(frozen=True)
class State:
    """All segments, and which of their rows are in the gallery: `rows` int64, rising, or None for all.

    Never changed, only replaced as a whole, so that no search sees half of a change.
    """

    segments: tuple[Segment, ...]
    rows: Tensor | None = None
    index: "FaissIndex | None" = None

    @cached_property
    def starts(self) -> list[int]:
        return np.cumsum([0, *(len(segment.vectors) for segment in self.segments)]).tolist()

    def __len__(self) -> int:
        return self.starts[-1] if self.rows is None else len(self.rows)

    def find(self, position: int) -> tuple[Segment, int]:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} given, the gallery has {len(self)} items")
        row = position if self.rows is None else int(self.rows[position])
        index = bisect_right(self.starts, row) - 1
        return self.segments[index], row - self.starts[index]

    def pieces(self, start: int, stop: int) -> Iterator[tuple[Segment, slice | Tensor]]:
        """The segments of positions [start, stop) and the rows of each."""
        if self.rows is not None:
            yield from self._pieces_of(self.rows[start:stop])
            return
        for first, segment in zip(self.starts, self.segments, strict=False):
            low, high = max(start - first, 0), min(stop - first, len(segment.vectors))
            if low < high:
                yield segment, slice(low, high)

    def _pieces_of(self, rows: Tensor) -> Iterator[tuple[Segment, Tensor]]:
        bounds = np.searchsorted(rows.numpy(), self.starts)
        for index, segment in enumerate(self.segments):
            low, high = bounds[index : index + 2]
            if low < high:
                yield segment, rows[low:high] - self.starts[index]

    def reads_tokens_from(self, folder: Path) -> bool:
        """Whether image tokens are read from files of the folder."""
        return any(isinstance(s.tokens, TokenFiles) and s.tokens.folder.samefile(folder) for s in self.segments)

    def items(self) -> Iterator[dict]:
        """All items in order."""
        for segment, rows in self.pieces(0, len(self)):
            if self.rows is None:
                yield from segment.items
            else:
                yield from (segment.items[row] for row in rows.tolist())

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """Vectors and scales of positions [start, stop) as they are stored, without a copy where they lie together."""
        return _joined(self.pieces(start, stop))

    def take(self, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same of single positions, which rise."""
        return _joined(self._pieces_of(positions if self.rows is None else self.rows[positions]))


def _joined(pieces: Iterable[tuple[Segment, slice | Tensor]]) -> tuple[Tensor, Tensor | None]:
    found = [
        (segment.vectors[rows], None if segment.scales is None else segment.scales[rows]) for segment, rows in pieces
    ]
    if len(found) == 1:
        return found[0]
    vectors, scales = zip(*found, strict=True)
    return torch.cat(vectors), None if scales[0] is None else torch.cat(scales)


def quantise(vectors: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """fp32 (n, E) in another type, and with int8 the scale (n,) of each vector: value = scale x stored number."""
    if dtype != "int8":
        return vectors.to(VECTOR_TYPES[dtype]), None
    scales = vectors.abs().amax(dim=1) / 127
    return (vectors / scales.clamp(min=1e-30)[:, None]).round().to(torch.int8), scales


def plain(vectors: Tensor, scales: Tensor | None) -> Tensor:
    return vectors.float() if scales is None else vectors.float().mul_(scales[:, None])


class FaissIndex:
    """An index of FAISS, made just now or in a file that is read at its first use."""

    def __init__(self, index: Any = None, path: Path | None = None):
        self._made, self._path = index, path

    @cached_property
    def _index(self) -> Any:
        if self._made is not None:
            return self._made
        try:
            import faiss
        except ImportError as error:
            raise ImportError(f"the approximate index needs FAISS: pip install faiss-cpu ({error})") from error
        return faiss.read_index(str(self._path))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        scores, positions = self._index.search(np.ascontiguousarray(queries.cpu().numpy()), k)
        return torch.from_numpy(scores), torch.from_numpy(positions)

    def data(self) -> bytes | np.ndarray:
        if self._path is not None:
            return self._path.read_bytes()
        try:
            import faiss
        except ImportError as error:  # it was there when the index was made
            raise ImportError(f"saving the approximate index needs FAISS ({error})") from error
        return faiss.serialize_index(self._made)


# --- files ------------------------------------------------------------------------------------------------------------


def write(path: Path, parts: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file beside its place, synced, and put it there; size and checksum."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    digest, size = hashlib.blake2b(digest_size=16), 0
    try:
        with open(partial, "wb") as file:
            for part in parts:
                file.write(part)
                digest.update(part)
                size += memoryview(part).nbytes
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return size, digest.hexdigest()


def write_named(folder: Path, role: str, suffix: str, parts: Iterable[bytes | memoryview]) -> dict:
    """`write` under a name that says the content, so that no file of the gallery before is touched."""
    place = folder / f".{role}.{secrets.token_hex(4)}.partial"
    size, digest = write(place, parts)
    name = f"{role}-{digest[:12]}{suffix}"
    os.replace(place, folder / name)
    return {"name": name, "size": size, "blake2b": digest}


def write_json(path: Path, value: Any) -> None:
    write(path, [json.dumps(value, indent=2, ensure_ascii=False).encode("utf-8", "surrogatepass"), b"\n"])


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def _npy(dtype: np.dtype, shape: tuple[int, ...], parts: Iterable[np.ndarray]) -> Iterator[bytes | memoryview]:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    )
    yield header.getvalue()
    for part in parts:
        yield np.ascontiguousarray(part).data.cast("B")


def _json_line(value: dict) -> bytes:
    return json.dumps(value).encode() + b"\n"


def write_gallery(
    folder: Path, state: State, *, kind: str, model: str | None, dtype: str, skipped: Sequence[dict]
) -> None:
    """Write a gallery over the one that is in the folder, whole or not at all.

    Raises:
        ValueError: the folder is a file, or holds something else.
    """
    if folder.is_file():
        raise ValueError(f"{folder} is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        refuse_foreign(folder)
        _write_alone(folder, state, {"kind": kind, "dtype": dtype, "model": model}, skipped)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One writer after another: the last thing that one does is to remove all files that are not its own."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_alone(folder: Path, state: State, facts: dict, skipped: Sequence[dict]) -> None:
    count, width = len(state), state.segments[0].vectors.shape[1]
    starts = range(0, count, GALLERY_CHUNK)

    def stored(index: int) -> Iterator[np.ndarray]:
        return (state.read(start, min(start + GALLERY_CHUNK, count))[index].cpu().numpy() for start in starts)

    offsets = np.zeros(count + 1, dtype=np.int64)

    def lines() -> Iterator[bytes]:
        for position, item in enumerate(state.items()):
            line = _json_line(item)
            offsets[position + 1] = offsets[position] + len(line)
            yield line

    files = {"vectors": write_named(folder, "vectors", ".npy", _npy(facts["dtype"], (count, width), stored(0)))}
    if state.segments[0].scales is not None:
        files["scales"] = write_named(folder, "scales", ".npy", _npy("float32", (count,), stored(1)))
    files["items"] = write_named(folder, "items", ".jsonl", lines())
    files["offsets"] = write_named(folder, "offsets", ".npy", _npy("int64", (count + 1,), [offsets]))
    files["skipped"] = write_named(folder, "skipped", ".jsonl", map(_json_line, skipped))
    if state.index is not None:
        files["faiss"] = write_named(folder, "faiss", ".index", [state.index.data()])
    tokens = _write_tokens(folder, state) if state.segments[0].tokens is not None else None
    if tokens is not None and (written := sum(entry["items"] for entry in tokens)) != count:
        raise RuntimeError(f"image tokens of {written} instead of {count} items were written: please report this")
    manifest = {
        "format": FORMAT,
        "items": count,
        "width": width,
        **facts,
        "files": files,
        "tokens": tokens,
    }
    write_json(folder / MANIFEST, manifest)
    _sync(folder)
    named = {entry["name"] for entry in (*files.values(), *(tokens or []))}
    for path in folder.iterdir():
        if path.name not in named and (_OWN_FILES.fullmatch(path.name) or path.match(".*.partial")):
            path.unlink(missing_ok=True)


def _write_tokens(folder: Path, state: State) -> list[dict]:
    """Files whose rows are all kept are linked, or copied to another disk; the rows of others are written again."""
    entries, pending = [], []

    def flush() -> None:
        if pending:
            data = to_safetensors({"tokens": torch.stack(pending)})
            entries.append({**write_named(folder, "tokens", ".safetensors", [data]), "items": len(pending)})
            pending.clear()

    for segment, rows in state.pieces(0, len(state)):
        rows = range(len(segment.vectors))[rows] if isinstance(rows, slice) else rows.tolist()
        place = 0
        while place < len(rows):
            if isinstance(segment.tokens, TokenFiles):
                source, row = segment.tokens, rows[place]
                index = bisect_right(source.starts, row) - 1
                size = source.files[index]["items"]
                here = rows[place : place + size]
                if row == source.starts[index] and len(here) == size and here[-1] == row + size - 1:
                    flush()
                    name = source.files[index]["name"]
                    _link(source.folder / name, folder / name)
                    entries.append(source.files[index])
                    place += size
                    continue
            pending.append(segment.tokens[rows[place]])
            place += 1
            if len(pending) == _TOKEN_FILE_ITEMS:
                flush()
    flush()
    return entries


def _link(source: Path, place: Path) -> None:
    if place.exists():
        if place.stat().st_size == source.stat().st_size:
            return
        place.unlink()  # torn; the right one has its name
    try:
        os.link(source, place)
    except OSError:  # another file system, or one without links
        with open(source, "rb") as file:
            write(place, iter(lambda: file.read(2**24), b""))


def refuse_foreign(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a folder")
    ours = (MANIFEST, BUILD)
    if folder.exists() and any(folder.iterdir()) and not any((folder / name).exists() for name in ours):
        raise ValueError(f"{folder} holds something else than a gallery: give a new or an empty folder")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)  # the names of files are data of their folder
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_gallery(folder: Path, verify: bool) -> tuple[State, str, str | None, str, list[dict]]:
    """What `write_gallery` has written: state (mapped), kind, model, dtype and skipped items.

    Args:
        verify: compare all checksums, not only the sizes.

    Raises:
        ValueError: no gallery, or one that is damaged or unfinished.
    """
    manifest = _read_manifest(folder, verify)
    files = {role: folder / entry["name"] for role, entry in manifest["files"].items()}
    # Copy on write, since torch wants memory that may be written; nobody does.
    vectors = torch.from_numpy(np.load(files["vectors"], mmap_mode="c"))
    scales = torch.from_numpy(np.load(files["scales"], mmap_mode="c")) if "scales" in files else None
    lines = Lines(np.memmap(files["items"], mode="r"), np.load(files["offsets"], mmap_mode="r"))
    tokens = TokenFiles(folder, manifest["tokens"]) if manifest["tokens"] is not None else None
    counts = {len(vectors), len(lines), manifest["items"], *([] if tokens is None else [len(tokens)])}
    if len(counts) > 1 or vectors.dtype != VECTOR_TYPES[manifest["dtype"]]:
        raise ValueError(f"the files of the gallery {folder} do not belong together: build or save it again")
    skipped = [json.loads(line) for line in files["skipped"].read_text("utf-8").splitlines()]
    index = FaissIndex(path=files["faiss"]) if "faiss" in files else None
    state = State((Segment(vectors, scales, lines, tokens),), index=index)
    return state, manifest["kind"], manifest["model"], manifest["dtype"], skipped


def _read_manifest(folder: Path, verify: bool) -> dict:
    path = folder / MANIFEST
    if not path.exists():
        if (folder / BUILD).exists():
            raise ValueError(f"the gallery {folder} was not built to its end: call the build again, it goes on")
        raise ValueError(f"{folder} is not a gallery: give a folder made by Gallery.build() or save(), or a Hub name")
    try:
        manifest = read_json(path)
        version = manifest["format"]
        entries = [*manifest["files"].values(), *(manifest["tokens"] or [])]
        files = [(str(entry["name"]), entry["size"], entry["blake2b"]) for entry in entries]
        missing = {"kind", "items", "dtype", "model"} - set(manifest) | _ROLES - set(manifest["files"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}): build or save the gallery again") from error
    if version != FORMAT:
        raise ValueError(f"{folder} has the format {version}, this code reads {FORMAT}")
    for name, expected, checksum in files:
        if not _OWN_FILES.fullmatch(name):
            raise ValueError(f"{path} names a file {name!r}, which no gallery has")
        file = folder / name
        size = file.stat().st_size if file.exists() else None
        if size != expected:
            problem = "is missing" if size is None else f"has {size} bytes instead of {expected}"
            raise ValueError(f"the gallery {folder} is damaged: {name} {problem}. Copy, build or save it again")
        if verify and _digest(file) != checksum:
            raise ValueError(f"the gallery {folder} is damaged: {name} was changed. Copy, build or save it again")
    if missing or manifest["dtype"] not in VECTOR_TYPES:
        problem = f"it lacks {some(missing)}" if missing else f"dtype is {manifest['dtype']!r}"
        raise ValueError(f"{path} is damaged ({problem}): build or save the gallery again")
    return manifest


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**24):
            digest.update(block)
    return digest.hexdigest()


# of a build that is going on


def some(values: Iterable) -> str:
    values = sorted(values, key=str)
    return ", ".join(map(repr, values[:5])) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


__all__ = [
    "BUILD",
    "FORMAT",
    "MANIFEST",
    "VECTOR_TYPES",
    "FaissIndex",
    "Segment",
    "State",
    "TokenFiles",
    "plain",
    "quantise",
    "read_gallery",
    "read_json",
    "refuse_foreign",
    "some",
    "write",
    "write_gallery",
    "write_json",
    "write_named",
]
