"""What every kind of data gives: shards of undecoded rows, which `decode` turns into a photo and a title.

    for row in source.read(shard_index=0, start=10, stop=20):
        example = decode(row)

A source is a list of shards whose row counts are known without decoding (or even reading) a single photo, so that the
order of an epoch follows from them. `read` skips inside a shard and yields rows as they are stored; `decode` turns one
of them into an RGB photo and a title, or raises `UnusableItem` with a plain reason.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import posixpath
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from aliblip.data.columns import Columns, Request
from aliblip.data.fetching import read_address
from aliblip.data.manifest import DataFile, file_names
from aliblip.data.missing import why_missing
from aliblip.data.products import CHUNK_ROWS, ProductIds, content_id, own_id, photo_id_of, product_id_of, shown
from aliblip.data.remote import RemoteReadError, is_remote, read_file, resumed
from aliblip.runtime.mistakes import UsageError
from reading_aliblip import MissingFile, UnusableItem, clean_title, open_image, read_photo

# Pillow keeps pictures in blocks of 16 MB, which the heap of a thread keeps for itself once they are free: a gigabyte
# for each of a server's threads. Larger ones go back to the system.
if "PILLOW_BLOCK_SIZE" not in os.environ:
    with suppress(AttributeError):
        Image.core.set_block_size(64 * 2**20)

__all__ = [
    "Example",
    "Row",
    "Shard",
    "Source",
    "decode",
    "path_inside",
    "stored_photo",
]


@dataclass(frozen=True)
class Shard:
    """A run of rows that is read as one piece.

    `first_row` is the global number of its first row.
    """

    index: int
    name: str
    num_rows: int
    first_row: int


@dataclass
class Row:
    """One undecoded row.

    Attributes:
        row: its number in the source.
        image: bytes, a path or address, or a PIL image.
        text: the stored value.
        product_id: an int64, see `aliblip.data.products`.
        name: the file name or key, for reports.
        problem: why the row could not be read, if so.
        others: values of the further columns that were asked for, as Python has them.
        stored_id: the product id as the data has it.
    """

    row: int
    image: Any
    text: Any
    product_id: int
    name: str
    problem: str | None = None
    others: dict[str, Any] = field(default_factory=dict)
    stored_id: Any = field(default=None, compare=False)  # a NaN is not equal to itself


@dataclass
class Example:
    """A decoded row: `image` PIL RGB, `text` str, `product_id` int64, `row` the number in the source, `photo_id` int64,
    equal for equal files and different for others (see `content_id`). The side that was not asked for is None."""

    image: Image.Image | None
    text: str | None
    product_id: int
    row: int
    photo_id: int | None = None


# ------------------------------------------------------------------------------------------------------ decoding


def decode(row: Row, sides: str = "both", suffices: Callable[[int, int], bool] | None = None) -> Example:
    """Decode one row: the photo as a person sees it, and its title.

    EXIF orientation and colour profile are applied, transparency lies over white, an animation is its first picture.

    Args:
        row: from a source.
        sides: "both", or only the "images" or the "titles".
        suffices: see `read_photo`.

    Raises:
        UnusableItem: with a plain reason; no other exception leaves this function, whatever the bytes are.
    """
    if row.problem is not None:
        raise UnusableItem(row.problem)
    text = clean_title(row.text) if sides != "images" else None  # first, since it costs nothing
    if sides == "titles":
        return Example(None, text, row.product_id, row.row)
    ids: list[int] = []
    try:
        image = read_photo(row.image, _fetch, suffices, told=lambda data: ids.append(content_id(data)))
    except MissingFile:
        if not isinstance(row.image, str) or is_remote(row.image):
            raise
        raise MissingFile(why_missing(row.image)) from None
    return Example(image, text, row.product_id, row.row, ids[0])


def stored_photo(row: Row, fetch: Callable[[str, int], bytes] | None = None) -> bytes:
    """The file of a row's photo as it is stored, without a look at what it holds.

    Args:
        row: from a source.
        fetch: reads an address, at most so many bytes of it, or raises `UnusableItem`; None: as training does.

    Raises:
        UnusableItem: with a plain reason.
    """
    if row.problem is not None:
        raise UnusableItem(row.problem)
    try:
        return _read_bytes(row.image, fetch or _fetch)
    except MissingFile:
        if not isinstance(row.image, str) or is_remote(row.image):
            raise
        raise MissingFile(why_missing(row.image)) from None


def _read_bytes(value: Any, fetch: Callable[[str, int], bytes]) -> bytes:
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise UnusableItem("the image is null")
    try:
        return open_image(value, fetch).getvalue()
    except UnusableItem:
        raise
    except FileNotFoundError:
        raise MissingFile("the image file is missing") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UnusableItem(f"the image can't be read ({type(error).__name__}: {reason})") from None


def _fetch(address: str, most_bytes: int) -> bytes:
    """A photo's address of any kind, read again where the network fails."""
    try:
        if address.startswith(("http://", "https://")):
            return read_address(address, most_bytes)
        return read_file(address, most_bytes)
    except RemoteReadError as error:
        raise UnusableItem(f"the image can't be fetched ({error})") from None


# -------------------------------------------------------------------------------------------------------- sources


class Source:
    """Photos and titles in shards. Each kind of data is a subclass with a `_read`; see `aliblip.data.sources`.

    Attributes:
        name: what was opened, for messages.
        split: the split.
        columns: all columns there are.
        num_rows: rows in all shards.
        shards: list of `Shard`, in a fixed order.
        files: list of `DataFile` that the rows come from, without the photos that a file only names.
        folder: the local folder that was opened, if one was.
        sides: what its rows have: "both", or only "images" or "titles".
        selected: the `Columns` that are read.
        random_access: whether rows can be read in any order at no cost (folders), rather than shard by shard.
        told: what is to be said of the data at the start, a line each: see `report`.
        photo_keys: columns that name the photo itself; as a product column, equal photos are one product.
        has_texts_alone: whether its files know no other values than texts (CSV).
    """

    random_access = False
    has_texts_alone = False

    def __init__(
        self,
        request: Request,
        columns: Sequence[str],
        selected: Columns,
        sizes: Sequence[tuple[str, int]],
        files: Sequence[DataFile] = (),
    ):
        self.name = request.name
        self.split = request.split
        self.folder = request.folder
        self.sides = request.asked.sides
        self.columns = list(columns)
        self.selected = selected
        self.told = request.told
        self.shards: list[Shard] = []
        first_row = 0
        for index, (shard_name, num_rows) in enumerate(sizes):
            self.shards.append(Shard(index, shard_name, num_rows, first_row))
            first_row += num_rows
        self._firsts = np.array([shard.first_row for shard in self.shards], dtype=np.int64)
        self.files = list(files)
        self._stamps = {file.file: _stamp(file.file) for file in self.files}
        self.num_rows = first_row
        self.photo_keys = frozenset({selected.image} if selected.image else ())
        # What the names of photos are relative to, so that a catalogue that moves keeps the ids of its photos.
        self._photo_root = request.image_dir or request.folder or _folder_of_all([file.file for file in files])
        if not first_row:
            raise UsageError(f"{self.name} has no rows in split '{self.split}': give data with at least one row")

    def report(self) -> list[str]:
        """What was found, read and left, for people: one line, and further ones that are indented."""
        head = f"{self.name} ({self.split}): {self.num_rows:,} rows"
        columns = {"photo": self.selected.image, "title": self.selected.caption, "product": self.selected.product_id}
        columns = ", ".join(f"{role} in '{column}'" for role, column in columns.items() if column is not None)
        return [head, *(f"  {line}" for line in ([columns] if columns else []) + self.told)]

    def manifest(self) -> dict[str, Any]:
        """What the rows come from, as JSON can hold it: to be kept beside a run, and compared when it goes on.

        Returns:
            {"name", "split", "columns": {"image", "caption", "product_id"}, "rows",
            "files": [{"file", "rows", "size", "digest"}]}, the files as `file_names` calls them. The digest is BLAKE2
            of the footer of a Parquet file, of the member names, offsets and lengths of a tar, and of all bytes of a
            metadata file or list. Photos that are only named, by a list or a column, are not looked at.
        """
        names = file_names([file.file for file in self.files], self.folder)
        return {
            "name": self.name,
            "split": self.split,
            "columns": {role: getattr(self.selected, role) for role in ("image", "caption", "product_id")},
            "rows": self.num_rows,
            "files": [
                {"file": name, "rows": file.rows, "size": file.size, "digest": file.digest}
                for name, file in zip(names, self.files, strict=True)
            ],
        }

    def described(self) -> str:
        """What the rows are, in a line that differs where the files, or the columns that are read, differ."""
        content = json.dumps([self.manifest(), self.selected.others], sort_keys=True)
        digest = hashlib.blake2b(content.encode(), digest_size=6).hexdigest()
        return f"{self.name}, {self.split} ({self.num_rows} rows, {digest})"

    def read(self, shard_index: int, start: int = 0, stop: int | None = None) -> Iterator[Row]:
        """Undecoded rows [start, stop) of one shard; `stop` None or beyond the end means the end.

        Raises:
            OSError: the file can't be read; if it is remote, after retries (`RemoteReadError`).
            UsageError: the file is not the one that was opened any more.
        """
        shard = self.shards[shard_index]
        file = self._file_of(shard)
        if (opened := self._stamps.get(file)) is not None and _stamp(file) != opened:
            # Its rows lie elsewhere now: they would be other ones, or half of one.
            raise UsageError(
                f"{file} was replaced or changed after it was opened: bring the old file back and go on with "
                "--resume_from_checkpoint last, or start anew"
            )
        stop = shard.num_rows if stop is None else min(stop, shard.num_rows)
        start = max(start, 0)
        if start < stop:
            yield from resumed(lambda done: self._read(shard, start + done, stop), self._file_of(shard))

    def read_range(self, start: int, stop: int) -> Iterator[Row]:
        """Undecoded rows [start, stop) by their global numbers; raises as `read`."""
        index = max(int(np.searchsorted(self._firsts, start, side="right")) - 1, 0)
        while index < len(self.shards) and self.shards[index].first_row < stop:
            first = self.shards[index].first_row
            yield from self.read(index, start - first, stop - first)
            index += 1

    def titles_only(self) -> Source:
        """The titles of the same rows, without photos and products; nothing is opened anew."""
        alone = copy.copy(self)
        alone.sides, alone.selected = "titles", Columns(None, self.selected.caption, None)
        return alone

    def schema_of_others(self) -> pa.Schema | None:
        """Arrow types of `selected.others`, where the data has types (Parquet); else None."""
        return None

    def _read(self, shard: Shard, start: int, stop: int) -> Iterator[Row]:
        """Rows [start, stop) of a shard, 0 <= start < stop <= shard.num_rows; what a kind of data has to bring."""
        raise NotImplementedError

    def _file_of(self, shard: Shard) -> str:
        """The path or address that a shard is read from."""
        return shard.name

    def product_ids(self) -> Iterator[ProductIds] | None:
        """The product ids of all rows in order, in pieces, without decoding anything; None if only reading the photos
        would tell.

        Raises:
            OSError: they can't be read.
        """
        return self.read_product_ids() if self.random_access else None

    def read_product_ids(self) -> Iterator[ProductIds]:
        """The same by reading all rows, photos that they hold included; raises as `read`."""
        rows = self.read_range(0, self.num_rows)
        while chunk := [
            (row.stored_id, None if row.image is None else row.product_id) for row in islice(rows, CHUNK_ROWS)
        ]:
            stored, photos = zip(*chunk, strict=True)
            yield ProductIds.of(stored, photos)

    def product_name(self, row: int) -> str:
        """What to call the product of a row in a message: its id as the data has it, or its photo."""
        found = next(self.read_range(row, row + 1))
        return shown(found.name if product_id_of(found.stored_id) is None else found.stored_id)

    def _row(
        self,
        number: int,
        image: Any,
        text: Any,
        fields: dict,
        name: str | None,
        problem: str | None = None,
        record: int | None = None,
        photo: Any = None,
    ) -> Row:
        """A row.

        Args:
            record: the first of the rows that one record gives, which are one product.
            photo: what tells the photo of that record from others, where it is not `image`.
        """
        key, record = self.selected.product_id, number if record is None else record
        stored = None if key is None or key in self.photo_keys else fields.get(key)
        product_id = product_id_of(stored)
        if product_id is None:
            product_id = photo_id_of(image if photo is None else photo, self._photo_root)
        if product_id is None:
            product_id = record if key is None else own_id(record, self.sides)
        others = {column: fields.get(column) for column in self.selected.others}
        if self.selected.takes_all:
            others |= {key: value for key, value in fields.items() if key not in self.selected.photos}
        return Row(number, image, text, product_id, name or f"row {number}", problem, others, stored)


def _folder_of_all(files: Sequence[str]) -> str | None:
    """The folder or address that files lie in; None without files, and of files of several machines."""
    if not files:
        return None
    if not any(map(is_remote, files)):
        return os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    folders = {file.rpartition("/")[0] for file in files}
    return folders.pop() if len(folders) == 1 else None


def _stamp(file: str) -> tuple[int, ...] | None:
    """What changes when a local file is replaced or written to; None of a remote one."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def path_inside(folder: str, file: Any) -> tuple[str | None, str | None]:
    """(path, None) of a file name inside the folder, or (None, the reason why not).

    Only the name counts: links in the folder were put there by its owner (the Hub's cache consists of links).
    """
    if not isinstance(file, str) or not file.strip():
        return None, "the image file name is empty" if isinstance(file, str) else "the image file name is not text"
    normal = posixpath.normpath(file.replace("\\", "/"))
    if normal.startswith(("/", "../")) or normal == ".." or re.match(r"[A-Za-z]:|[a-z0-9+]+://", file):
        problem = "the image file name leads outside the image folder"
        if re.match(r"[A-Za-z]:[\\/]", file):
            problem += ": it is a whole path of another machine, so write what follows the folder of the photos"
        return None, problem
    if "\0" in file:
        return None, "the image file name contains a NUL character"
    return f"{folder.rstrip('/')}/{normal}" if "://" in folder else os.path.join(folder, normal), None
