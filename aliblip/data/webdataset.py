"""WebDataset tars: a shard is one tar, and one indexed scan of its headers finds every sample."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from aliblip.data.columns import CAPTION_NAMES, Columns, Request, choose_columns, listed, similar_name
from aliblip.data.manifest import DataFile
from aliblip.data.products import ProductIds, shown
from aliblip.data.rows import Row, Shard, Source
from aliblip.data.tar_index import TarIndex, indexed_tar
from aliblip.data.tar_members import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    JSON_FIELDS,
    TEXT_FIELDS,
    Wanted,
    open_tar,
    value_of,
)
from aliblip.data.tar_samples import HAS_ID
from aliblip.data.values import titles_of
from aliblip.runtime.mistakes import UsageError
from reading_aliblip import MAX_FILE_BYTES

__all__ = ["TarSource", "open_tars"]

# The name of a sample, as a column.
KEY = "__key__"
# The longest title, JSON or label that is read.
MOST_TEXT_BYTES = 2**24
# Samples that are read in the order of their bytes: going back in a compressed tar starts again at its beginning.
BLOCK_ROWS = 64


class TarSource(Source):
    """Samples of tars.

    Args:
        images: fields that hold the photo: of a sample the first that is there counts.
        captions: fields and keys that hold the title: of a sample the first with a text counts.
        any_photo: whether a photo of another field will do, where a sample has just one.
    """

    def __init__(
        self,
        request: Request,
        columns: Sequence[str],
        selected: Columns,
        tars: Sequence[tuple[str, TarIndex]],
        images: Sequence[str],
        captions: Sequence[str],
        any_photo: bool,
    ):
        # Of lists of titles each is a row.
        counts = [index.arrays["titles"] for _, index in tars]
        has_lists = selected.caption is not None and any((count > 1).any() for count in counts)
        self._ends = [np.cumsum(count, dtype=np.int64) for count in counts] if has_lists else None
        rows = [int(count.sum()) if has_lists else len(count) for count in counts]
        sizes = [(os.path.basename(file), num_rows) for (file, _), num_rows in zip(tars, rows, strict=True)]
        files = [
            DataFile(file, num_rows, index.size, index.digest)
            for (file, index), num_rows in zip(tars, rows, strict=True)
        ]
        super().__init__(request, columns, selected, sizes, files)
        self._indexes: list[TarIndex] = [index for _, index in tars]
        self._images, self._captions, self._any_photo = images, captions, any_photo
        self._encoding = request.reading.encoding
        self.photo_keys |= frozenset(images)
        # By process: a forked one must neither use the open stream of its parent nor close it.
        self._streams: dict[int, tuple[int, ExitStack, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_streams": {}}  # an open stream can't travel to another process

    def titles_only(self) -> TarSource:
        alone = super().titles_only()
        alone._streams = {}
        return alone

    def product_ids(self) -> Iterator[ProductIds] | None:
        key = self.selected.product_id
        return None if key is None or key in self.photo_keys else map(self._ids_of, self._indexes)

    def _ids_of(self, index: TarIndex) -> ProductIds:
        if self.selected.product_id == KEY:
            return ProductIds.of(map(index.key, range(len(index))))
        states = index.arrays["id_state"]
        counts = index.arrays["titles"] if self._ends is not None else np.ones(len(index), dtype=np.int32)
        absent = Counter(index.about["absent"])
        if nothing := int(counts[states == 0].sum()):
            absent["null"] += nothing
        known = np.repeat(states == HAS_ID, counts)
        return ProductIds(np.repeat(index.arrays["id"], counts), known, np.zeros(len(known), dtype=bool), absent)

    def _file_of(self, shard: Shard) -> str:
        return self.files[shard.index].file

    # --- reading ---

    def _read(self, shard: Shard, start: int, stop: int) -> Iterator[Row]:
        first, last, ends = start, stop, None
        if self._ends is not None:
            ends = self._ends[shard.index]
            first, last = (int(i) for i in np.searchsorted(ends, (start, stop - 1), side="right") + (0, 1))
        for position, rows in self._read_samples(shard, first, last):
            before = position if ends is None else int(ends[position - 1]) if position else 0
            end = before + 1 if ends is None else int(ends[position])
            yield from (
                rows(shard.first_row + before, row - before) for row in range(max(before, start), min(end, stop))
            )

    def _read_samples(self, shard: Shard, start: int, stop: int) -> Iterator[tuple[int, Callable[[int, int], Row]]]:
        if self._indexes[shard.index].about["compression"] is None:
            with open_tar(self._file_of(shard), None) as stream:
                for position in range(start, stop):
                    yield from self._samples(stream, shard, range(position, position + 1))
            return
        for begin in range(start, stop, BLOCK_ROWS):
            with self._kept_stream(shard) as stream:
                samples = self._samples(stream, shard, range(begin, min(begin + BLOCK_ROWS, stop)))
            yield from samples

    @contextmanager
    def _kept_stream(self, shard: Shard) -> Iterator[Any]:
        """The stream of the last call, if it was of this shard: reading that goes on need not start again."""
        number, stack, stream = self._streams.pop(os.getpid(), (None, None, None))
        if number != shard.index:
            if stack is not None:
                stack.close()
            stack = ExitStack()
            compression = self._indexes[shard.index].about["compression"]
            stream = stack.enter_context(open_tar(self._file_of(shard), compression))
        try:
            yield stream
        except BaseException:
            stack.close()
            raise
        self._streams[os.getpid()] = shard.index, stack, stream

    def _samples(self, stream: Any, shard: Shard, positions: range) -> list[tuple[int, Callable[[int, int], Row]]]:
        """(position, maker of its rows) of samples."""
        index = self._indexes[shard.index]
        members = [index.members(position) for position in positions]
        photos = [self._photo_of(fields, index) for fields in members]
        places = [
            (*place, i, field)
            for i, fields in enumerate(members)
            for field, place in fields.items()
            if field == photos[i] or self._is_wanted(field)
        ]
        found: list[dict[str, bytes | str]] = [{} for _ in members]
        for offset, size, i, field in sorted(places):
            most = MAX_FILE_BYTES if field == photos[i] else MOST_TEXT_BYTES
            found[i][field] = _bytes_at(stream, offset, size, most)
        return [
            (position, self._sample(index.key(position), fields, photo, data))
            for position, fields, photo, data in zip(positions, members, photos, found, strict=True)
        ]

    def _photo_of(self, fields: Iterable[str], index: TarIndex) -> str | None:
        """The field that holds the photo of a sample."""
        if self.selected.image is None:
            return None
        plain = next((field for field in self._images if field in fields), None)
        if plain is not None or not self._any_photo:
            return plain
        others = [field for field in fields if _holds_a_photo(field, index)]
        return others[0] if len(others) == 1 else None

    def _is_wanted(self, field: str) -> bool:
        selected = self.selected
        if _last(field) in JSON_FIELDS or field in (*self._captions, selected.product_id, *selected.others):
            return True
        return selected.takes_all and field not in selected.photos and field not in self._images

    def _sample(
        self, key: str, there: Iterable[str], photo: str | None, data: dict[str, bytes | str]
    ) -> Callable[[int, int], Row]:
        """What makes the rows of a sample: of its first row's number, and which one of them."""
        fields, problem = {KEY: key} if KEY in self.selected.names() else {}, None
        # In the order of the archive: of JSON members with the same key the first counts.
        for field in (field for field in there if field in data):
            if isinstance(value := data[field], str):  # the reason why there are no bytes
                fields[field], problem = None, problem or value
                continue
            try:
                fields[field] = value_of(_last(field), value, self._encoding)
            except (ValueError, RecursionError) as error:
                fields[field] = None
                problem = problem or _why_unreadable(field, error)
        for field in [field for field in fields if _last(field) in JSON_FIELDS]:
            for name, item in fields[field].items() if isinstance(fields[field], dict) else ():
                if fields.get(name) is None:
                    fields[name] = item
        if photo is None and self.selected.image is not None and problem is None:
            problem = self._why_no_photo(there)
        titles = self._titles(fields)

        def row(first: int, part: int) -> Row:
            title = titles[part % len(titles)]
            return self._row(first + part, fields.get(photo), title, fields, key, problem, first)

        return row

    def _titles(self, fields: dict[str, Any]) -> list[Any]:
        stored = [fields[name] for name in self._captions if fields.get(name) is not None]
        return titles_of(next(filter(_has_text, stored), stored[0] if stored else None))

    def _why_no_photo(self, there: Iterable[str]) -> str | None:
        others = [field for field in there if _last(field) in IMAGE_FIELDS]
        if not others:
            return None
        return f"of its photos ({listed(others)}) none is called as others are: --image_column names one"


def _has_text(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else bool(value) and not isinstance(value, bytes)


def _why_unreadable(field: str, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError) and _last(field) in TEXT_FIELDS:
        return f"field '{field}' is not in {error.encoding} (--encoding tells another encoding)"
    return f"field '{field}' can't be read as text or JSON"


def _bytes_at(stream: Any, offset: int, size: int, most: int) -> bytes | str:
    """A member's bytes, or in words why not."""
    if size > most:
        return f"a member of {size:,} bytes is larger than {most // 2**20} MiB"
    stream.seek(offset)
    data = stream.read(size)
    return data if len(data) == size else "the tar ends within this sample"


def _last(field: str) -> str:
    return field.rpartition(".")[2]


def _holds_a_photo(field: str, index: TarIndex) -> bool:
    return _last(field) in IMAGE_FIELDS or field in index.about["photo_fields"]


# ------------------------------------------------------------------------------------------------------------- opening


def open_tars(request: Request) -> TarSource:
    """Open tars by their indexes. A column is a field (the end of a member's name), or a key of the JSON members.

    Raises:
        UsageError: a file is not a tar that can be read whole, a column that was named is not there, or no photo has a
            title.
    """
    asked = request.asked
    wanted = Wanted(product_id=asked.product_id or "product_id")
    if asked.caption is not None:
        wanted = replace(wanted, captions=(asked.caption,), by_likeness=False)
    with ThreadPoolExecutor(max_workers=8) as pool:
        indexes = list(pool.map(lambda file: indexed_tar(file, request.index_dir, wanted), request.files))
    if not any(map(len, indexes)) and (left := _told_left(indexes)):
        raise UsageError(f"{request.name} has no samples: {left}")
    fields = list(dict.fromkeys(field for index in indexes for field in index.fields))
    columns = list(dict.fromkeys([*fields, *(key for index in indexes for key in index.about["keys"])]))
    unusual = sorted({field for index in indexes for field in index.about["photo_fields"]})
    images = [field for field in (*IMAGE_FIELDS, *unusual) if field in fields and "." not in field]
    any_photo = not images and any(_has_one_photo(index) for index in indexes)
    there = [*columns, KEY] if KEY in (asked.product_id, *asked.others) else list(columns)
    if asked.image in (None, "image"):
        if images or any_photo:
            request = replace(request, asked=replace(request.asked, image="image"))
            there.append("image")
    else:
        images, any_photo = [asked.image], False
    if asked.caption is None:
        captions = [name for name in CAPTION_FIELDS if name in columns] or _similar_caption(fields, columns)
        request = replace(request, asked=replace(request.asked, caption=next(iter(captions), None)))
    else:
        captions = [asked.caption]
    if asked.sides == "both":
        _require_pairs(request, indexes, columns, captions)
    photos = ("image", *IMAGE_FIELDS, *unusual, *JSON_FIELDS)  # and the JSON as a whole, whose keys are columns
    selected = choose_columns(request, there, ("image",), CAPTION_FIELDS, photos)
    tars = list(zip(request.files, indexes, strict=True))
    source = TarSource(request, columns, selected, tars, images, captions if selected.caption else (), any_photo)
    source.told.extend(_notes(indexes, asked.sides, images, captions))
    return source


def _similar_caption(fields: Sequence[str], columns: Sequence[str]) -> list[str]:
    """A column that is called like a title, or the only field of texts there is."""
    similar = similar_name(columns, CAPTION_NAMES)
    texts = [field for field in fields if _last(field) in TEXT_FIELDS]
    return [similar] if similar is not None else texts if len(texts) == 1 else []


def _photos_of_samples(index: TarIndex, fields: Iterable[str]) -> np.ndarray:
    """(S,) how many members of these fields each sample has."""
    chosen = np.isin(index.arrays["field"], [i for i, field in enumerate(index.fields) if field in fields])
    before = np.concatenate([[0], np.cumsum(chosen)])
    ends = index.arrays["member_ends"]
    return before[ends] - before[np.concatenate([[0], ends[:-1]])] if len(ends) else np.zeros(0, dtype=np.int64)


def _has_one_photo(index: TarIndex) -> bool:
    fields = [field for field in index.fields if _holds_a_photo(field, index)]
    return bool(fields) and bool((_photos_of_samples(index, fields) == 1).any())


def _require_pairs(
    request: Request, indexes: Sequence[TarIndex], columns: Sequence[str], captions: Sequence[str]
) -> None:
    """Refuse tars none of whose photos has a title."""
    counts = _sum(index.about["counts"] for index in indexes)
    if counts["whole"] or not counts["photo alone"]:
        return
    photo = f"{_number(counts['photo alone'], 'photo')} ({_first_alone(indexes, 'photo alone')})"
    if counts["title alone"]:
        title = f"{_number(counts['title alone'], 'title')} ({_first_alone(indexes, 'title alone')})"
        raise UsageError(
            f"{request.name}: of {photo} and {title} no two are called the same up to the ending: give a photo and its "
            "title one name"
        )
    if not captions:
        left = _told_left(indexes)
        flag = request.asked.name_of("caption_column")
        raise UsageError(
            f"{request.name}: of {photo} none has a title beside it, a .txt or a .json with a caption: there are "
            f"{listed(columns)}; name one with {flag}" + (f"; {left}" if left else "")
        )


def _first_alone(indexes: Sequence[TarIndex], kind: str) -> str:
    return next(shown(index.about["alone"][kind]) for index in indexes if kind in index.about["alone"])


def _sum(counts: Iterable[dict[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return total


def _notes(indexes: Sequence[TarIndex], sides: str, images: Sequence[str], captions: Sequence[str]) -> Iterator[str]:
    """What was left, guessed or merged."""
    if compressed := sum(index.about["compression"] is not None for index in indexes):
        yield f"{_number(compressed, 'tar')} compressed: photos get no smaller by it, and unpacked tars are read faster"
    counts = _sum(index.about["counts"] for index in indexes)
    if joined := counts["joined by name"]:
        yield f"{_number(joined, 'photo')} and the title whose name differs in capital letters: taken as pairs"
    if joined := counts["joined across folders"]:
        yield f"{_number(joined, 'photo')} in one folder, and the title of that name in another: taken as pairs"
    lists = [index.arrays["titles"] for index in indexes] if sides != "images" else []
    if many := int(sum((titles > 1).sum() for titles in lists)):
        rows = sum(int(titles.sum()) for titles in lists)
        yield f"{_number(many, 'sample')} with lists of titles: each title is a row, {rows:,} in all"
    if len(captions) > 1:
        yield f"of a sample the first of {listed(captions)} that has a text is the title"
    if counts["photo alone"] and sides != "images":
        first = _first_alone(indexes, "photo alone")
        yield f"{_number(counts['photo alone'], 'photo')} without a title ({first}): rows that can't be used"
    if counts["title alone"] and sides != "titles":
        first = _first_alone(indexes, "title alone")
        yield f"{_number(counts['title alone'], 'title')} without a photo ({first}): rows that can't be used"
    if left := _told_left(indexes):
        yield left
    if sides != "titles" and (beside := sum(int(_photos_beside(index, images)) for index in indexes)):
        yield f"{_number(beside, 'photo')} beside another one of their sample: not used, --image_column names them"


def _told_left(indexes: Sequence[TarIndex]) -> str:
    """What is in no sample, or an empty text."""
    left: dict[str, list[Any]] = {}
    for index in indexes:
        for what, (count, first) in index.about["left"].items():
            left.setdefault(what, [0, first])[0] += count
    told = ", ".join(f"{count:,} {what} ({shown(first)})" for what, (count, first) in left.items())
    return f"{_number(sum(count for count, _ in left.values()), 'member')} belong to no sample: {told}" if left else ""


def _photos_beside(index: TarIndex, images: Sequence[str]) -> int:
    """Photos of samples that have a photo already."""
    fields = [field for field in index.fields if _holds_a_photo(field, index)]
    if len(fields) < 2:
        return 0
    return np.maximum(_photos_of_samples(index, fields) - 1, 0).sum()


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
