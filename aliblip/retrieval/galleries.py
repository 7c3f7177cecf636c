"""The rows of a catalogue as the items of a gallery, and a gallery built by one process or several."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from aliblip.data.rows import Row, Source, decode
from aliblip.runtime.distributed import is_main, rank, together, world_size
from gallery_aliblip import Gallery, begin_units, encode_units, join_units
from reading_aliblip import UnusableItem


class SourceItems(Sequence):
    """The rows of a source as the items of a gallery, {"id", "image" or "text"}; undecoded, and read where they are
    asked for, fastest in order.

    The id is that of `id_column`; without one the file's name in a folder of photos, else the number of the row.

    Args:
        source: opened with `sides` "images" or "titles", and with the column of the ids as `other_columns`.
        id_column: its name.
    """

    def __init__(self, source: Source, id_column: str | None = None):
        self._source, self._id_column = source, id_column
        self._rows: Iterator[Row] = iter(())
        self._next = -1

    def __len__(self) -> int:
        return self._source.num_rows

    def __getitem__(self, position: int) -> dict:
        if not 0 <= position < len(self):
            raise IndexError(position)
        row = self.row(position)
        content = row.image if self._source.sides == "images" else row.text
        if row.problem is not None:
            content = UnusableItem(row.problem)
        return {"id": self._id_of(row), "image" if self._source.sides == "images" else "text": content}

    def row(self, position: int) -> Row:
        """The source's own row."""
        if position != self._next:
            self._rows = self._source.read_range(position, len(self))
        self._next = position + 1
        return next(self._rows)

    @cached_property
    def positions(self) -> dict | range:
        """Positions by id; without an `id_column`, whose values only reading all rows would tell."""
        if not self._source.random_access:
            return range(len(self))
        return {row.name: row.row for row in self._source.read_range(0, len(self))}

    def photo_of(self, item: dict) -> Image.Image:
        """The decoded photo of a gallery's item, by its id. May be called by several threads.

        Raises:
            UnusableItem: there is none, or it can't be read.
        """
        if item["id"] not in self.positions:
            raise UnusableItem("no row has this id")
        position = self.positions[item["id"]]
        return decode(next(self._source.read_range(position, position + 1)), "images").image

    def _id_of(self, row: Row) -> Any:
        if self._id_column is not None:
            return row.others.get(self._id_column)
        return row.name if self._source.random_access else row.row


def build_gallery(
    model,
    processor,
    items: Iterable,
    folder: str | Path,
    *,
    measure_recall: int = 0,
    overwrite: bool = False,
    **options,
) -> Gallery:
    """`Gallery.build` as a collective: every rank calls it with the same arguments, and gets the gallery.

    Args:
        model: the plain model (unwrapped), with the weights of every rank equal.
        items: as in `Gallery.build`; a generator is read by every rank, of a sequence each rank reads its part.
        folder: one that all processes see.

    The ranks wait for each other, and after a resume one of them may have all the work that was left: give the process
    group a timeout as long as that.

    Raises:
        ValueError, OSError: as in `Gallery.build`.
        RuntimeError: another rank has failed; the message says which and why.
    """
    options.setdefault("progress", is_main())
    part = "build its part of the gallery"
    together(is_main(), lambda: begin_units(model, processor, items, folder, overwrite=overwrite, **options), part)
    share = {"rank": rank(), "world_size": world_size()}
    together(True, lambda: encode_units(model, processor, items, folder, **share, **options), part)
    together(is_main(), lambda: join_units(folder, measure_recall=measure_recall), part)
    return Gallery.load(folder)
