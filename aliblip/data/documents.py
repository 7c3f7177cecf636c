"""JSON in the forms that people have: a list, lines, one object after the other, or one object that holds a table.

for record in json_records(stream): ...        # of a list, lines, or one object after the other
table = table_in(json.loads(text))             # COCO, Karpathy's files, columns, a map from photos to titles
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from aliblip.data.splits import split_word
from aliblip.data.values import looks_like_photo_name
from aliblip.runtime.mistakes import UsageError

__all__ = ["Document", "JsonRecord", "json_records", "table_in"]

# Characters that are read at once of a list.
READ_BYTES = 2**22
# Objects within objects in which a table is looked for.
MOST_LEVELS = 4
_GAP = re.compile(r"[ \t\r\n]*")
_SPLITS_OF_KARPATHY = {"restval": "train", "val": "validation"}


@dataclass
class JsonRecord:
    """One value of a JSON file.

    Attributes:
        begin, end: its bytes [begin, end).
        value: what it is; None if it can't be read, and then `problem` says why.
        is_whole: whether it is not an element of a list, and so may be all that the file holds.
        not_utf8: the bytes, where they are not in UTF-8.
    """

    begin: int
    end: int
    value: Any
    problem: str | None = None
    is_whole: bool = True
    not_utf8: bytes | None = None


def json_records(stream: Any, name: str) -> Iterator[JsonRecord]:
    """The records of a JSON list, of JSON lines, or of objects one after the other; of one object that object.

    Args:
        stream: binary, of UTF-8; it can be sought.
        name: for messages.

    Raises:
        UsageError: a list that is no valid JSON.
    """
    skipped = 3 if stream.read(3) == b"\xef\xbb\xbf" else 0
    stream.seek(skipped)
    head = stream.read(2**16).lstrip()[:1]
    stream.seek(skipped)
    if head == b"[":
        yield from _list_items(_Text(stream, skipped), name)
        return
    if head == b"{":
        first = next((line for line in stream if line.strip()), b"")
        stream.seek(skipped)
        if _record(first, 0, "").problem is not None:  # an object that does not end on its line, or a bad line
            items = _objects(_Text(stream, skipped), name)
            first_item = next(items, None)
            if first_item is not None:
                yield first_item
                yield from items
                return
            stream.seek(skipped)
    yield from _lines(stream, skipped)


REPEATED = "stands twice in one object"


def json_value(data: str | bytes) -> Any:
    """The value of a JSON text, in which no object has a key twice: of two values one would be lost without a word.

    Raises:
        ValueError: as `json.loads`, or with the key that is repeated.
    """
    return json.loads(data, strict=False, object_pairs_hook=_each_key_once)


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise RepeatedKey(f"the key '{counts.most_common(1)[0][0]}' {REPEATED}")
    return value


class RepeatedKey(ValueError):
    """An object of a JSON text has a key twice."""


_ONCE = json.JSONDecoder(strict=False, object_pairs_hook=_each_key_once)
_ANY = json.JSONDecoder(strict=False)


def _record(data: bytes, begin: int, place: str, is_whole: bool = True) -> JsonRecord:
    value, problem, not_utf8 = None, None, None
    try:
        value = json_value(data)
    except RepeatedKey as error:
        problem = f"{place}: {error}"
    except UnicodeDecodeError:
        problem = f"{place} is not a JSON object in UTF-8 (--encoding tells another encoding)"
        not_utf8 = data
    except json.JSONDecodeError as error:
        problem = f"{place} is not a JSON object ({error.msg} at character {error.pos + 1})"
    except (ValueError, RecursionError) as error:
        problem = f"{place} is not a JSON object ({type(error).__name__})"
    return JsonRecord(begin, begin + len(data), value, problem, is_whole, not_utf8)


def _lines(stream: Any, position: int) -> Iterator[JsonRecord]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield _record(line, position, f"line {number:,}")
        position += len(line)


class _Text:
    """A stream as text, read as it is needed; bytes that are not UTF-8 are lone surrogates in it.

    Attributes:
        text: what is held.
        ended: whether that is the rest of the stream.
    """

    def __init__(self, stream: Any, begin: int):
        self._stream, self.text, self.ended = stream, "", False
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._character, self._byte = 0, begin  # a place of the text that is known as a place of the file
        self._newlines = 0  # before the text
        self.more(0)

    def more(self, position: int) -> None:
        """Read on, twice as much each time, and let go what is before `position`, which then is 0."""
        self.byte_of(position)
        self._character = 0
        self._newlines += self.text.count("\n", 0, position)
        kept = self.text[position:]
        data = self._stream.read(max(READ_BYTES, len(kept)))
        self.ended = not data
        self.text = kept + self._decoder.decode(data, final=self.ended)

    def bytes(self, begin: int, end: int) -> bytes:
        return self.text[begin:end].encode("utf-8", "surrogateescape")

    def byte_of(self, position: int) -> int:
        """Where in the file a character lies, which is not before the last one that was asked for."""
        self._byte += len(self.bytes(self._character, position))
        self._character = position
        return self._byte

    def line_of(self, position: int) -> int:
        return self._newlines + self.text.count("\n", 0, position) + 1


# In place of a value: its text has to be looked at again, for what is wrong with it.
_AGAIN = object()


def _decode(source: _Text, position: int) -> tuple[int, int, Any]:
    """(begin, end, value) of the value at a position, after reading on as far as it needs."""
    decoder = _ONCE
    while True:
        try:
            value, end = decoder.raw_decode(source.text, position)
            if end < len(source.text) or source.ended:  # a number could go on
                return position, end, value if decoder is _ONCE else _AGAIN
        except RepeatedKey:  # where it ends, another one tells
            decoder = _ANY
            continue
        except (json.JSONDecodeError, RecursionError):
            if source.ended:
                raise
        source.more(position)
        position = 0


def _found(source: _Text, begin: int, end: int, value: Any, place: str, is_whole: bool) -> JsonRecord:
    """The record of a value."""
    first = source.byte_of(begin)
    if value is not _AGAIN:
        try:
            last = first + len(source.text[begin:end].encode())
        except UnicodeEncodeError:  # bytes that are not UTF-8
            value = _AGAIN
        else:
            source.byte_of(end)
            return JsonRecord(first, last, value, None, is_whole)
    return _record(source.bytes(begin, end), first, place, is_whole)


def _after_gap(source: _Text, position: int) -> int:
    position = _GAP.match(source.text, position).end()
    while position == len(source.text) and not source.ended:
        source.more(position)
        position = _GAP.match(source.text, 0).end()
    return position


def _list_items(source: _Text, name: str) -> Iterator[JsonRecord]:
    number, position = 0, _after_gap(source, 0) + 1
    try:
        position = _after_gap(source, position)
        while source.text[position : position + 1] != "]":
            begin, end, value = _decode(source, position)
            number += 1
            yield _found(source, begin, end, value, f"element {number:,}", is_whole=False)
            position = _after_gap(source, end)
            if source.text[position : position + 1] == ",":
                position = _after_gap(source, position + 1)
            elif source.text[position : position + 1] != "]":
                raise json.JSONDecodeError("expected ',' or ']'", source.text, position)
        position = _after_gap(source, position + 1)
        if position < len(source.text):
            raise json.JSONDecodeError("text follows the list", source.text, position)
    except (json.JSONDecodeError, RecursionError) as error:
        line = source.line_of(getattr(error, "pos", position))
        raise UsageError(f"{name} is not a valid JSON list (line {line}): repair or rewrite it") from None


def _objects(source: _Text, name: str) -> Iterator[JsonRecord]:
    """Objects one after the other, over any number of lines; none, if already the first is damaged."""
    number, position = 0, _after_gap(source, 0)
    while position < len(source.text):
        number += 1
        try:
            begin, end, value = _decode(source, position)
        except (json.JSONDecodeError, RecursionError) as error:
            if number == 1:
                return
            line = source.line_of(getattr(error, "pos", position))
            raise UsageError(
                f"{name} is not valid JSON: object {number:,} (line {line}) is damaged: repair or rewrite it"
            ) from None
        yield _found(source, begin, end, value, f"object {number:,}", is_whole=True)
        position = _after_gap(source, end)
        if source.text[position : position + 1] == ",":
            position = _after_gap(source, position + 1)


# ------------------------------------------------------------------------------------------------ one object is a table


@dataclass
class Document:
    """The table that one JSON object holds.

    Attributes:
        records: objects with columns.
        told: what was understood, for the report.
        split: the split that the records are, where the file itself tells splits.
    """

    records: Sequence[dict[str, Any]]
    told: list[str] = field(default_factory=list)
    split: str | None = None


def table_in(
    document: dict[str, Any], split: str, name: str, is_record: Callable[[dict[str, Any]], bool]
) -> Document | None:
    """The table that one object holds, or None if it is a record by itself.

    Args:
        split: of a file of Karpathy's, whose records tell theirs.
        name: for messages.
        is_record: whether an object has the keys of a photo and a title.

    Raises:
        UsageError: an object of an unknown form, or without records of the split.
    """
    document, way = _unwrapped(document, is_record)
    lists = {key: value for key, value in document.items() if _is_table(value)}
    if {"images", "annotations"} <= set(lists):
        return _coco(lists["images"], lists["annotations"], name)
    if len(lists) > 1 and (splits := {split_word(key) for key in lists}) and None not in splits:
        return _of_split(lists, split, name)
    if len(lists) == 1:
        ((key, records),) = lists.items()
        if any("sentences" in record and "split" in record for record in records[:1000]):
            return _karpathy(records, split, name)
        return Document(records, [f"the records are under the key '{'.'.join([*way, key])}'"])
    if len(lists) > 1:
        raise UsageError(
            f"{name} holds several lists of records ({', '.join(repr(key) for key in lists)}): save the one that is "
            "meant as a file of its own"
        )
    if not document or any(not isinstance(value, (list, dict, str)) for value in document.values()):
        return None
    found = _columns_or_map(document, name)
    if found is not None and way:
        found.told.insert(0, f"the records are under the key '{'.'.join(way)}'")
    return found


def _unwrapped(
    document: dict[str, Any], is_record: Callable[[dict[str, Any]], bool]
) -> tuple[dict[str, Any], list[str]]:
    """The object that holds the table, which may lie below others of which it is the only list or object, as servers
    answer: {"status": "ok", "data": {"products": [...]}}; and the keys that lead there."""
    way: list[str] = []
    while len(way) < MOST_LEVELS:
        inner = [(key, value) for key, value in document.items() if isinstance(value, (list, dict)) and value]
        if len(inner) != 1:
            break
        ((key, below),) = inner
        if not isinstance(below, dict) or is_record(below) or looks_like_photo_name(key) or not _holds_table(below):
            break
        way.append(key)
        document = below
    return document, way


def _holds_table(value: dict[str, Any]) -> bool:
    """Whether an object holds a list of records, or records by their keys, at any depth."""
    inner = [each for each in value.values() if isinstance(each, (list, dict)) and each]
    if any(map(_is_table, inner)):
        return True
    if inner and all(isinstance(each, dict) for each in value.values()):
        return len(inner) > 1 or _holds_table(inner[0])
    return len(inner) == 1 and isinstance(inner[0], dict) and _holds_table(inner[0])


def _of_split(lists: dict[str, list[dict]], split: str, name: str) -> Document:
    """Records in lists that are called as splits are."""
    there = ", ".join(f"'{key}' ({len(records):,})" for key, records in lists.items())
    wanted = [(key, records) for key, records in lists.items() if split in (key, split_word(key))]
    if not wanted:
        raise UsageError(f"{name} has no list of the split '{split}': there are {there}")
    if len(wanted) > 1:
        keys = ", ".join(repr(key) for key, _ in wanted)
        raise UsageError(
            f"{name} has {len(wanted)} lists of the split '{split}' ({keys}): join them, or rename "
            "those that are not meant"
        )
    key, records = wanted[0]
    return Document(records, [f"the records are under the key '{key}', of {there}"], split)


def _is_table(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _coco(images: list[dict], annotations: list[dict], name: str) -> Document:
    """COCO: a photo with all its captions is one record."""
    if not any("caption" in annotation for annotation in annotations):
        raise UsageError(f"{name} is a COCO file without captions: give the one of the captions (captions_*.json)")
    records = {image.get("id"): {**image, "caption": []} for image in images}
    lost = 0
    for annotation in annotations:
        record = records.get(annotation.get("image_id"))
        if record is None or annotation.get("caption") is None:
            lost += 1
        else:
            record["caption"].append(annotation["caption"])
    found = [record for record in records.values() if record["caption"]]
    told = [f"a COCO file: {len(found):,} photos with {sum(len(r['caption']) for r in found):,} captions"]
    if without := len(records) - len(found):
        told.append(f"{without:,} of its photos have no caption and are no rows")
    if lost:
        told.append(f"{lost:,} of its annotations have no caption or name no photo of the file, and are no rows")
    return Document(found, told)


def _karpathy(records: list[dict], split: str, name: str) -> Document:
    """Karpathy's split of COCO or Flickr: the records of one split, and "restval" with "train", as is usual."""
    counts = Counter(str(record.get("split")) for record in records)
    wanted = [record for record in records if _split_of(record) == _SPLITS_OF_KARPATHY.get(split, split)]
    there = ", ".join(f"'{key}' ({count:,})" for key, count in counts.items())
    if not wanted:
        raise UsageError(f"{name} has no photos of the split '{split}': there are {there}")
    for record in wanted:
        if record.get("filepath") and record.get("filename"):
            record["filename"] = f"{record['filepath']}/{record['filename']}"
    return Document(wanted, [f"photos by their key 'split': {len(wanted):,} of '{split}', of {there}"], split)


def _split_of(record: dict) -> str:
    split = str(record.get("split"))
    return _SPLITS_OF_KARPATHY.get(split, split)


def _columns_or_map(document: dict[str, Any], name: str) -> Document | None:
    """Columns, each a list or a map from row to value, as pandas writes them; or a map from photos to titles."""
    values, are_photos = list(document.values()), all(map(looks_like_photo_name, document))
    if all(isinstance(value, dict) for value in values):
        return Document(_columns_of_maps(document) or [{"key": key, **value} for key, value in document.items()])
    if are_photos:
        told = ["its keys are photos, and their values titles"]
        return Document([{"image": key, "caption": value} for key, value in document.items()], told)
    if set(document) >= {"columns", "data"} and all(isinstance(value, list) for value in values):
        columns, rows = document["columns"], document["data"]
        uneven = next((n for n, row in enumerate(rows) if not isinstance(row, list) or len(row) != len(columns)), None)
        if uneven is not None:
            raise UsageError(
                f"{name}: 'columns' has {len(columns)} names, and row {uneven} of 'data' not as many values"
            )
        return Document([dict(zip(columns, row, strict=True)) for row in rows])
    are_columns = len(document) > 1 and all(isinstance(value, list) for value in values)
    if are_columns and values[0] and len(set(map(len, values))) == 1:
        return Document([dict(zip(document, row, strict=True)) for row in zip(*values, strict=True)])
    return None


def _columns_of_maps(document: dict[str, dict]) -> list[dict[str, Any]] | None:
    """The rows of columns that map the same rows to values; None if these are records by their keys."""
    rows = list(next(iter(document.values())))
    if not all(list(column) == rows for column in document.values()):
        return None
    if rows and all(map(looks_like_photo_name, rows)):
        return [{"image": row, **{key: column[row] for key, column in document.items()}} for row in rows]
    if rows and all(row.isdecimal() for row in rows):
        return [{key: column[row] for key, column in document.items()} for row in rows]
    return None
