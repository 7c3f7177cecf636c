"""The gallery behind the search page where it is given photos: built at the first start, opened at the next ones.

    gallery = kept_gallery(source, "my_gallery", model=model, processor=processor, update=False)

A start that was killed goes on. Photos that came later are put in, and those that are gone taken out, where that is
asked for; otherwise it is a mistake to be told of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from aliblip.data.rows import Row, Shard, Source
from aliblip.retrieval.building import BUILD, Build, read_skipped, write_skipped
from aliblip.retrieval.galleries import Gallery
from aliblip.retrieval.sharing import is_hub_name
from aliblip.retrieval.table_columns import ids_told_ahead, kept_columns
from aliblip.retrieval.tables import ID, Facts, is_address, open_dataset, table_exists
from aliblip.runtime.mistakes import UsageError
from encoder_aliblip import fingerprint

_FLAGS = {"uri": "--gallery_dir", "id_column": "--id_column", "overwrite": "a new --gallery_dir"}
_ALL = 2**62


def is_gallery(name: str) -> bool:
    """Whether it names a gallery, or the beginning of one, rather than photos: what is no folder lies elsewhere."""
    if is_address(name) or is_hub_name(name):
        return True
    begun = Path(name, BUILD, f"{BUILD}.json")
    return table_exists(name) or begun.is_file() or Path(name, "gallery.json").is_file()


def flag(name: str, value: Any = None) -> str:
    """How an argument of a build is typed at the page's command, or at the one that has more of them."""
    told = "" if value in (None, True) else f" {value}"
    return _FLAGS.get(name, f"python -m aliblip.gallery --{name}{told}")


def kept_gallery(
    source: Source,
    folder: str,
    *,
    model,
    processor,
    id_column: str | None = None,
    store_tokens: bool = True,
    update: bool = False,
) -> Gallery:
    """The gallery of the source's photos in a folder: the one that is there, or a new one, with thumbnails.

    Args:
        source: of photos, its further columns as `other_columns`.
        id_column: of the source.
        store_tokens: for a new one.
        update: put in the photos that are new, and take out those that are gone.

    Raises:
        UsageError: the folder holds something else, or a gallery of other photos that is not to be updated.
    """
    if not table_exists(folder) or Path(folder, BUILD, f"{BUILD}.json").is_file():
        build = Build(source, folder, id_column=id_column, thumbnails=True, store_tokens=store_tokens, flag=flag)
        for note in build.kept.notes:
            print(f"note: {note}", flush=True)
        lost = build.run(model, processor, progress=True, before_end=lambda: _index(folder))
        for line in lost.told():
            print(f"note: {line}", flush=True)
        return Gallery.open(folder)
    gallery = Gallery.open(folder)
    gallery.check_model(fingerprint(model, processor))
    change = _change(gallery, source, id_column)
    if not change:
        return gallery
    if not update:
        raise UsageError(
            f"--gallery_dir: {folder} was built of other photos than {source.name} holds now ({change}): "
            "--update_gallery embeds the new ones and drops the others; or give a new folder"
        )
    print(f"updating {folder}: {change}", flush=True)
    _update(gallery, source, change, model, processor)
    return gallery


def _index(folder: str) -> None:
    Gallery.open(folder).create_index(measure_recall=0, quiet=True)


@dataclass
class _Change:
    """What differs between a gallery and the photos that there are now.

    Attributes:
        new: rows of the source by id.
        gone: ids of the gallery.
        forgotten: names that the gallery lists as unusable, and that are gone.
    """

    new: dict[str | int, int]
    gone: list[str | int]
    forgotten: set[str]

    def __bool__(self) -> bool:
        return bool(self.new or self.gone or self.forgotten)

    def __str__(self) -> str:
        return f"new photos: {len(self.new):,}, gone: {len(self.gone) + len(self.forgotten):,}"


def _change(gallery: Gallery, source: Source, id_column: str | None) -> _Change:
    """Compare by id; where ids are the numbers of rows, only their count tells.

    Raises:
        UsageError: it has changed, and by numbers of rows nothing can be put in.
    """
    kept = kept_columns(source, columns=None, id_column=id_column, flag=flag, kind="image")
    told = ids_told_ahead(source, kept)
    skipped = gallery.skipped
    if told is None:
        count = len(gallery) + len(skipped)
        if count != source.num_rows:
            raise UsageError(
                f"--gallery_dir: {gallery.uri} was built of {count:,} rows, {source.name} has {source.num_rows:,} now, "
                "and their ids are not known before they are read: give a new folder, or build it with "
                "python -m aliblip.gallery and its --id_column, and change it with --upsert"
            )
        return _Change({}, [], set())
    here = {value: row for row, value in told if value is not None}
    there = set(gallery.values(ID, limit=_ALL))
    new = {value: row for value, row in here.items() if value not in there}
    gone = sorted(there - set(here))
    if kept.ids == "name":
        unusable = {entry["name"] for entry in skipped}
        return _Change({name: row for name, row in new.items() if name not in unusable}, gone, unusable - set(here))
    # Of unusable rows only the numbers are known: they are the new ones where nothing else has changed.
    unusable = {entry["row"] for entry in skipped}
    if not gone and set(new.values()) <= unusable:
        new = {}
    return _Change(new, gone, set())


def _update(gallery: Gallery, source: Source, change: _Change, model, processor) -> None:
    skipped = []
    if change.new:
        rows = ChosenRows(source, sorted(change.new.values()))
        report = gallery.upsert(rows, model=model, processor=processor, flag=flag)
        skipped = [entry | {"row": rows.row_of(entry["row"])} for entry in report.skipped]
        print(report, flush=True)
    if change.gone:
        gallery.remove(change.gone)
    if skipped or change.forgotten:
        # Listed, so that the next start does not take them for new ones.
        facts = Facts.of(open_dataset(gallery.uri).schema, gallery.uri)
        listed = [one for one in read_skipped(gallery.uri, facts.build, None) if one["name"] not in change.forgotten]
        write_skipped(gallery.uri, facts.build, listed + skipped, None)


class ChosenRows(Source):
    """Some rows of a source, as a source of its own.

    Args:
        source: to read from.
        rows: their numbers there, rising.
    """

    def __init__(self, source: Source, rows: Sequence[int]):
        vars(self).update(vars(source))
        self._source, self._rows = source, list(rows)
        self.num_rows = len(self._rows)
        self.shards, self._firsts = [Shard(0, source.name, self.num_rows, 0)], np.zeros(1, dtype=np.int64)

    def row_of(self, number: int) -> int:
        """The number in the whole source."""
        return self._rows[number]

    def _read(self, shard: Shard, start: int, stop: int) -> Iterator[Row]:
        number = start
        # Runs of neighbours are read at once.
        for _, run in groupby(enumerate(self._rows[start:stop]), key=lambda pair: pair[1] - pair[0]):
            run = [row for _, row in run]
            for row in self._source.read_range(run[0], run[-1] + 1):
                yield replace(row, row=number)
                number += 1


__all__ = ["ChosenRows", "flag", "is_gallery", "kept_gallery"]
