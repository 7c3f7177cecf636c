"""The tables of a gallery, as LanceDB has them, and what all of their users share: opening, facts, changes.

A gallery is a database of LanceDB, a folder or an address such as `s3://bucket/gallery`, with two tables:

    items.lance     a row for each photo or title: `id`, `vector`, the columns of the data, and, where there are any,
                    `path` (of a photo) or `text` (a title), `thumbnail` (a JPEG file), `image_tokens` (bf16 as int16)
    skipped.lance   the rows that could not be used, with their reasons

`Facts` stand in the metadata of the schema of `items`, so that table and facts change in one commit. The folder of the
photos on this machine stands in the table's configuration, which no file of data repeats. Rows have stable row ids,
which a gallery calls positions: a row keeps its number through updates and compaction.

Lance's threads do not survive a fork: a process that was forked from one that has used Lance is refused.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from aliblip.runtime.installation import install_hint
from aliblip.runtime.locks import acquired
from aliblip.runtime.mistakes import UsageError, first_line, shortened

logger = logging.getLogger(__name__)

# Read when the library is imported. It logs what it decides for itself; what goes wrong comes as an exception.
os.environ.setdefault("LANCE_LOG", "error")
try:
    import lance
except ImportError:
    lance = None
# Its remark at every fork: the readers of our loader are forks that never touch a gallery, others are refused below.
warnings.filterwarnings("ignore", message="lance is not fork-safe")

__all__ = [
    "FORMAT",
    "ID",
    "ITEMS",
    "KINDS",
    "OWN_COLUMNS",
    "PATH",
    "PHOTO_ROOT",
    "SKIPPED",
    "TEXT",
    "THUMBNAIL",
    "TOKENS",
    "VECTOR",
    "WRITER_LOCK",
    "Facts",
    "LanceMissing",
    "aligned",
    "changed",
    "enough_room",
    "indexed_columns",
    "is_address",
    "is_conflict",
    "is_damage",
    "is_from_lance",
    "lance_options",
    "library",
    "one_writer",
    "open_dataset",
    "reason_of",
    "table_exists",
    "table_uri",
    "tidy_uri",
]

FORMAT = 2  # 1 was the folder of gallery.json
KINDS = ("image", "text")
LARGEST_THUMBNAIL = 4096
ITEMS, SKIPPED = "items", "skipped"
ID, VECTOR, PATH, TEXT, THUMBNAIL, TOKENS = "id", "vector", "path", "text", "thumbnail", "image_tokens"
# The folder that relative paths of photos are of, on the machine that built the gallery.
PHOTO_ROOT = "aliblip.photo_root"
OWN_COLUMNS = (ID, VECTOR, PATH, TEXT, THUMBNAIL, TOKENS)

# Files in a gallery's folder by which processes keep out of each other's way.
WRITER_LOCK = ".writer.lock"

_METADATA = b"aliblip"
_CONFLICTS = ("commit conflict", "concurrent writers", "preempted by concurrent")
# Under many writers a change may come too late several times.
_TRIES = 30

T = TypeVar("T")
_used_by: int | None = None


class LanceMissing(UsageError, ImportError):
    """LanceDB is not installed."""


def library():
    """Lance, for this process.

    Raises:
        LanceMissing: it is not installed.
        RuntimeError: this process was forked from one that had used it.
    """
    global _used_by
    if lance is None:
        raise LanceMissing(f"a stored gallery needs LanceDB: {install_hint('gallery')}")
    if _used_by is None:
        _used_by = os.getpid()
    elif _used_by != os.getpid():
        raise RuntimeError(
            "this process was forked from one that had used a gallery, and LanceDB's threads do not survive a fork: "
            "start it with multiprocessing's 'spawn' or 'forkserver', or open galleries only in the new processes"
        )
    return lance


# --- facts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    """What holds for a whole gallery.

    Attributes:
        kind: "image" or "text", what the items are.
        width: of the vectors.
        model: fingerprint of model and processor; None: not known, every query is taken.
        ids: where the ids come from: "column" (`id_column`), "name" (of the photo's file), or "row" (its number).
        id_column: the data's name of that column.
        columns: those of the data, as the table calls them, in the data's order.
        renamed: from the data's names to the table's, where they differ.
        token_shape: (P, D) of the image tokens; None: there are none.
        thumbnail_side: longest side of the thumbnails; None: there are none.
        build: tells one build from another.
        skipped: how many rows of the build could not be used.
        is_foreign: whether it came from the Hub.
        index: settings of the vector index, as `aliblip.retrieval.indexing` has them; None: there is none.
    """

    kind: str
    width: int
    model: str | None = None
    ids: str = "column"
    id_column: str | None = None
    columns: tuple[str, ...] = ()
    renamed: dict[str, str] = field(default_factory=dict)
    token_shape: tuple[int, int] | None = None
    thumbnail_side: int | None = None
    build: str = ""
    skipped: int = 0
    is_foreign: bool = False
    index: dict[str, Any] | None = None

    @property
    def items(self) -> str:
        """What the items are, for people."""
        return "photos" if self.kind == "image" else "titles"

    def in_metadata(self, schema: pa.Schema) -> pa.Schema:
        """The schema with these facts."""
        return schema.with_metadata({**(schema.metadata or {}), _METADATA: json.dumps(self.as_json()).encode()})

    def as_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    def as_lance_metadata(self) -> dict[str, str]:
        """The same as an update of the schema's metadata."""
        return {_METADATA.decode(): json.dumps(self.as_json())}

    @classmethod
    def of(cls, schema: pa.Schema, uri: str) -> Facts:
        """The facts in a schema.

        Raises:
            UsageError: there are none, or not those of a gallery that this code reads.
        """
        data = (schema.metadata or {}).get(_METADATA)
        if data is None:
            raise UsageError(f"the table in {uri} was not made by Gallery.build: give the place of a gallery")
        try:
            found = dict(json.loads(data))
            version = found.pop("format")
            if version == FORMAT:
                known = {name: found[name] for name in (field.name for field in fields(cls)) if name in found}
                facts = replace(cls(**known), columns=tuple(found.get("columns", ())))
                facts._check(schema)
                return facts
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UsageError(f"the gallery {uri} is damaged ({first_line(error)}): build it again") from error
        raise UsageError(f"the gallery {uri} has the format {version!r}, this code reads {FORMAT}: build it again")

    def _check(self, schema: pa.Schema) -> None:
        """Compare with the table: both may come from somebody else."""
        kinds = {
            "width": int,
            "model": (str, type(None)),
            "ids": str,
            "id_column": (str, type(None)),
            "renamed": dict,
            "thumbnail_side": (int, type(None)),
            "build": str,
            "skipped": int,
            "is_foreign": bool,
            "index": (dict, type(None)),
        }
        wrong = [name for name, kind in kinds.items() if not isinstance(getattr(self, name), kind)]
        wrong += ["columns"] * (not all(isinstance(name, str) for name in self.columns))
        wrong += ["renamed"] * (not all(isinstance(name, str) for name in self.renamed.values()))
        wrong += ["ids"] * (self.ids not in ("column", "name", "row"))
        if not wrong and self.thumbnail_side is not None and not 1 <= self.thumbnail_side <= LARGEST_THUMBNAIL:
            wrong = ["thumbnail_side"]
        if wrong:
            raise ValueError(f"{wrong[0]} is {shortened(repr(getattr(self, wrong[0])), 80)}")
        vector = schema.field(VECTOR).type
        if self.kind not in KINDS or not pa.types.is_fixed_size_list(vector) or vector.list_size != self.width:
            raise ValueError(f"kind {self.kind!r}, width {self.width!r}, vectors of the type {vector}")
        if vector.value_type != pa.float32():
            raise ValueError(f"vectors of the type {vector}")
        if self.token_shape is not None:
            patches, width = (int(size) for size in self.token_shape)
            if min(patches, width) < 1 or schema.field(TOKENS).type != pa.list_(pa.int16(), patches * width):
                raise ValueError(f"image tokens of the type {schema.field(TOKENS).type}")
        missing = [name for name in (ID, *self.columns) if name not in schema.names]
        if missing or {ID, VECTOR} & set(self.columns):
            raise ValueError(f"the columns {', '.join(missing) or 'of the data'} are not those of the table")


# --- places -----------------------------------------------------------------------------------------------------------


def is_address(uri: str) -> bool:
    """Whether it is no folder of this machine."""
    return "://" in uri


def tidy_uri(uri: str | os.PathLike) -> str:
    """A gallery's place as it is kept: a folder's absolute path (`~` is the home folder), or an address."""
    text = os.fspath(uri) if isinstance(uri, os.PathLike) else uri
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise UsageError(f"the gallery's place is {uri!r}: give a folder, or an address such as s3://bucket/gallery")
    text = text.removeprefix("file://")
    return text.rstrip("/") if is_address(text) else str(Path(text).expanduser().absolute())


def table_uri(uri: str, name: str) -> str:
    return f"{uri}/{name}.lance"


def open_dataset(uri: str, name: str = ITEMS, version: int | None = None, storage_options: Mapping | None = None):
    """A table of the gallery at `uri`, at its newest version or an older one.

    Raises:
        UsageError: there is none, or the place can't be reached.
    """
    module = library()
    try:
        return module.dataset(table_uri(uri, name), version=version, storage_options=lance_options(storage_options))
    except (OSError, ValueError, RuntimeError) as error:
        if "not found" in str(error).lower():
            raise UsageError(_not_there(uri, version)) from error
        if not is_address(uri) and os.path.isfile(uri):
            raise UsageError(f"{uri} is a file: give the folder of a gallery") from error
        raise UsageError(f"the gallery {shortened(uri)} can't be opened: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """What an error of Lance says to a user: without the place in its source."""
    return shortened(re.sub(r",\s*/\S+\.rs:\d+(:\d+)?.*$", "", first_line(error).removeprefix("Invalid user input: ")))


def is_from_lance(error: BaseException) -> bool:
    """Whether an error was raised within Lance, which names the place in its source, rather than by us."""
    return re.search(r"\.rs:\d+", str(error)) is not None


def is_damage(error: BaseException) -> bool:
    """Whether Lance could not read its own files; not whether it could not do what was asked for."""
    return isinstance(error, OSError) or any(word in str(error) for word in ("LanceError(IO)", "Corrupt", "corrupt"))


def lance_options(storage_options: Mapping | None) -> dict[str, str] | None:
    """As Lance takes them: text."""
    return None if storage_options is None else {str(name): str(value) for name, value in storage_options.items()}


def _not_there(uri: str, version: int | None) -> str:
    if version is not None:
        return f"the gallery {uri} has no version {version}: see Gallery.versions(), optimize() removes old ones"
    if not is_address(uri):
        if os.path.exists(os.path.join(uri, "gallery.json")):
            return (
                f"{uri} holds a gallery of version 0.1, whose format is no longer read: build it again, with "
                "python -m aliblip.gallery or Gallery.build"
            )
        if os.path.isdir(os.path.join(uri, "build")):
            return f"the gallery {uri} was not built to its end: call the build again, it goes on where it was"
        if not os.path.exists(uri):
            return f"{uri} does not exist: give the folder of a gallery, its address or its Hub name"
    return f"{uri} is no gallery: give what python -m aliblip.gallery or Gallery.build made"


def indexed_columns(dataset) -> dict[str, Any]:
    """The columns that have an index, with what Lance says of it."""
    return {one.field_names[0]: one for one in dataset.describe_indices() if len(one.field_names) == 1}


def table_exists(uri: str, name: str = ITEMS, storage_options: Mapping | None = None) -> bool:
    """Whether the place holds such a table, of ours or not."""
    if not is_address(uri):  # without a thread of Lance: readers may still be forked from this process
        return os.path.isdir(os.path.join(table_uri(uri, name), "_versions"))
    try:
        library().dataset(table_uri(uri, name), storage_options=lance_options(storage_options))
    except (OSError, ValueError, RuntimeError) as error:
        if "not found" in str(error).lower():
            return False
        raise UsageError(f"the place {uri} can't be reached: {reason_of(error)}") from error
    return True


def aligned(table: pa.Table) -> pa.Table:
    """The same in memory as Lance wants it: values of 16 bytes, such as decimals, can't lie just anywhere. What was
    read from a mapped file may."""
    columns = []
    for column in table.columns:
        buffers = (buffer for chunk in column.chunks for buffer in chunk.buffers() if buffer is not None)
        if any(buffer.address % 64 for buffer in buffers):
            column = column.take(pa.array(range(len(column)), pa.int64()))
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=table.schema)


# --- changes ----------------------------------------------------------------------------------------------------------


def changed(change: Callable[[], T], tries: int = _TRIES) -> T:
    """Make a change that may come too late because another writer was faster; then it is made again.

    Args:
        change: opens the newest version and changes it, whole or not at all.
    """
    for number in range(1, tries + 1):
        try:
            with enough_room():
                return change()
        except UsageError:
            raise
        except (OSError, RuntimeError, ValueError) as error:
            if number == tries or not is_conflict(error):
                raise
            time.sleep(random.SystemRandom().uniform(0, min(0.02 * 2**number, 1.0)))
    raise AssertionError("the last try returns or raises")


def is_conflict(error: BaseException) -> bool:
    """Whether another writer was faster."""
    return any(words in str(error).lower() for words in _CONFLICTS)


@contextmanager
def enough_room() -> Iterator[None]:
    """Tell of a full disk in one line: every change is made whole or not at all, so there is nothing to repair."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        if getattr(error, "errno", None) != errno.ENOSPC and "No space left on device" not in str(error):
            raise
        raise UsageError(
            "the disk is full, and the gallery is as it was: make room, and call the same again"
        ) from error


TELL_AFTER_SECONDS = 5  # of waiting for another writer
LONGEST_CHANGE_SECONDS = 3600


@contextmanager
def one_writer(uri: str) -> Iterator[bool]:
    """Wait until no other process or thread puts rows into this gallery; whether that could be made sure of.

    Two writers of the same new id would both insert it: an index on the ids says nothing of rows that are not committed
    yet. A system that takes no locks, or an address, gives False; then rows have to be put in without the index, which
    Lance checks against those of other writers. A wait is told after a few seconds.

    Raises:
        UsageError: another one has been changing the gallery for an hour.
    """
    if is_address(uri):
        yield False
        return
    file = os.path.join(uri, WRITER_LOCK)
    try:
        lock = acquired(
            file,
            tell_after=TELL_AFTER_SECONDS,
            longest=LONGEST_CHANGE_SECONDS,
            tell=lambda: logger.warning("another process or thread changes %s: waiting for it", uri),
            mistake=lambda: (
                f"{uri} has been changed by another process for {LONGEST_CHANGE_SECONDS / 60:.0f} minutes: see which "
                f"one holds {file}, or try again later"
            ),
        )
    except (OSError, NotImplementedError):
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
