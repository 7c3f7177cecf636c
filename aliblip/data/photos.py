"""Folders of photos without any table: of bare photos, or with a text or JSON file beside each."""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from aliblip.data.columns import Request, choose_columns
from aliblip.data.documents import RepeatedKey, json_value
from aliblip.data.folders import count_of
from aliblip.data.places import Place
from aliblip.data.records import RecordSource, Rows
from aliblip.data.storage import Blocks
from aliblip.data.tables import Table, Unreadable

__all__ = ["open_photos", "open_sided"]

# Photos whose JSON files are looked at, spread over all, to know their columns.
PROBED_SIDES = 10_000


def open_photos(request: Request) -> RecordSource:
    """All photos of a folder and its subfolders, sorted by name: the order a directory is listed in is chance."""
    names = sorted(request.survey.photo_names())
    table = _table(os.path.join(request.folder, "photos"), ({"file_name": name} for name in names))
    request = replace(request, asked=replace(request.asked, image=None))
    selected = choose_columns(request, ["file_name"], ("file_name",))
    return RecordSource(request, ["file_name"], selected, [Rows(table, Place(request.folder))], "file_name")


def _table(file: str, records: Iterable[Any]) -> Table:
    content, size = hashlib.blake2b(digest_size=16), 0

    def data() -> Iterator[bytes]:
        nonlocal size
        for record in records:
            line = json.dumps(record).encode()
            content.update(line)
            size += len(line)
            yield line

    stored = Blocks(data())
    return Table(file, size, content.hexdigest(), _stored=stored)


def open_sided(request: Request) -> RecordSource:
    """Photos with a .txt (or .caption) of the same name, which is the title, or a .json, whose keys are columns.

    That is what img2dataset writes as its format `files`, and how photos are kept for fine-tuning image generators.
    """
    folders = {posixpath.normpath(file) for file in request.files}
    root = request.survey.root
    wanted = [
        [photo, sides]
        for photo, sides in request.survey.sided_photos()
        if os.path.normpath(os.path.join(root, posixpath.dirname(photo))) in folders
    ]
    wanted.sort()
    plain = _table(os.path.join(root, "photos with texts"), wanted)
    fields = {name: getattr(plain, name) for name in ("file", "size", "digest", "_stored")}
    encoding = request.reading.encoding or "utf-8-sig"
    table = _SidedTable(**fields, root=root, encoding=encoding)
    step = max(len(wanted) // PROBED_SIDES, 1)
    columns: dict[str, None] = {"image": None}
    for position in range(0, len(wanted), step):
        for record in table.read(position, position + 1):
            columns.update(dict.fromkeys(record if isinstance(record, dict) else ()))
    columns.pop("file_name", None)
    selected = choose_columns(request, list(columns), ("image",), ("caption", "text", "txt"), ("file_name",))
    without = sum(1 for _ in request.survey.photo_names(request.below)) - len(wanted)
    request.told.append(f"{count_of(len(wanted), 'photo')} with a text or JSON file of the same name")
    apart = request.survey.side_folders
    apart = [(photos, apart[photos]) for photos in apart if posixpath.normpath(os.path.join(root, photos)) in folders]
    for photos, folder in apart[:1]:
        more = f", and those of {count_of(len(apart) - 1, 'further folder')} likewise" if len(apart) > 1 else ""
        request.told.append(f"the files of the photos of {photos} lie in {folder}{more}")
    titles = [name for name in ("caption", "text", "txt") if name in columns]
    if len(titles) > 1:
        request.told.append(
            f"the title is {selected.caption}; {', '.join(t for t in titles if t != selected.caption)} as well"
        )
    if without:
        request.told.append(f"{count_of(without, 'photo')} without one are no rows")
    return RecordSource(request, list(columns), selected, [Rows(table, Place(root))], "file_name")


@dataclass
class _SidedTable(Table):
    """Records that are read from the files beside photos: [photo, side files] are what is stored."""

    root: str = ""
    encoding: str = "utf-8-sig"

    def read(self, start: int, stop: int) -> Iterator[Any]:
        for photo, sides in super().read(start, stop):
            yield _record(self.root, photo, sides, self.encoding)


def _record(root: str, photo: str, sides: list[str], encoding: str) -> dict[str, Any] | Unreadable:
    record: dict[str, Any] = {"file_name": photo}
    for side in sides:
        try:
            with open(os.path.join(root, side), encoding=encoding) as stream:
                text = stream.read()
            if side.lower().endswith(".json"):
                value = json_value(text)
                record |= value if isinstance(value, dict) else {}
            else:
                record["caption" if side.lower().endswith(".caption") else "txt"] = text.strip()
        except FileNotFoundError:
            return Unreadable(f"{side} is gone")
        except UnicodeDecodeError:
            return Unreadable(f"{side} is not in {encoding.removesuffix('-sig')} (--encoding tells another encoding)")
        except RepeatedKey as error:
            return Unreadable(f"{side}: {error}")
        except ValueError:
            return Unreadable(f"{side} is not valid JSON")
    return {**record, "file_name": photo}
