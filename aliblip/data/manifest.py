"""What a data set consisted of when a run began, and what has changed since."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aliblip.data.remote import is_remote

__all__ = ["DataFile", "file_names", "manifest_changes"]

MOST_CHANGES = 10
# The data set and revision of an address on the Hub; the revision changes with every commit.
_HUB = re.compile(r"hf://[^@]+@[^/]+/")


@dataclass(frozen=True)
class DataFile:
    """A file that rows come from: its path or address, rows, bytes, and a digest of what it holds."""

    file: str
    rows: int
    size: int
    digest: str


def file_names(files: Sequence[str], folder: str | None) -> list[str]:
    """Names that stay the same when a catalogue moves.

    Local files are named relative to `folder`, or to the folder that holds them all; files of the Hub relative to their
    data set; other remote files by their address.
    """
    local = [os.path.abspath(file) for file in files if not is_remote(file)]
    if folder is not None:
        folder = os.path.realpath(folder)  # as datasets does with the folder it looks into
    if local and (folder is None or os.path.commonpath([folder, *local]) != folder):
        folder = os.path.commonpath([os.path.dirname(file) for file in local])
    return [
        _HUB.sub("", file, count=1) if is_remote(file) else os.path.relpath(file, folder).replace(os.sep, "/")
        for file in files
    ]


def manifest_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two manifests of `Source.manifest`, in plain sentences; an empty list if nothing does.

    The name of the source is left out: a catalogue may move. At most `MOST_CHANGES` sentences, and a count of the rest.
    """
    changes = list(_changes(before, now))
    if len(changes) > MOST_CHANGES:
        changes[MOST_CHANGES:] = [f"and {len(changes) - MOST_CHANGES:,} more"]
    return changes


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if before["split"] != now["split"]:
        yield f"the split was '{before['split']}', it is '{now['split']}'"
    for role, column in now["columns"].items():
        if before["columns"][role] != column:
            yield f"the {role} column was {_quoted(before['columns'][role])}, it is {_quoted(column)}"
    files = [entry["file"] for entry in now["files"]]
    files_before = [entry["file"] for entry in before["files"]]
    for file in (Counter(files_before) - Counter(files)).elements():
        yield f"{file} is gone"
    entries = {entry["file"]: entry for entry in now["files"]}
    for entry in before["files"]:
        if entry["file"] in entries:
            yield from _file_changes(entry, entries[entry["file"]])
    for file in (Counter(files) - Counter(files_before)).elements():
        yield f"{file} is new"
    if files != files_before and sorted(files) == sorted(files_before):
        yield "the files come in another order"


def _file_changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    if now["rows"] != before["rows"]:
        yield f"{now['file']} has {now['rows']:,} rows, it had {before['rows']:,}"
    elif now["size"] != before["size"]:
        yield f"{now['file']} has other content ({now['size']:,} bytes, it had {before['size']:,})"
    elif now["digest"] != before["digest"]:
        yield f"{now['file']} has other content (same size)"


def _quoted(column: str | None) -> str:
    return "none" if column is None else f"'{column}'"
