"""Rows of tables that name photos by file or by address: folders with metadata, CSV, JSON, titles a line."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from aliblip.data.columns import ALL, SHARE_OF_IDS, Columns, Request, Roles, choose_columns
from aliblip.data.folders import REASONS, Left
from aliblip.data.listings import with_photos
from aliblip.data.manifest import DataFile
from aliblip.data.places import Place, find_place, folders_below, folders_beside, share_found, with_ending
from aliblip.data.remote import is_remote
from aliblip.data.rows import Row, Shard, Source
from aliblip.data.tables import NoTable, Table, Unreadable, open_table
from aliblip.data.values import Facts, photos_of, titles_of
from aliblip.runtime.mistakes import UsageError

__all__ = ["RecordSource", "Rows", "open_metadata", "open_records", "told_facts", "told_unnamed"]

# Rows of a folder can be read in any order at no cost: small shards mix them well.
SHARD_ROWS = 64
# Of the photos of a folder that are compared with those that rows name, at once.
PHOTOS_AT_ONCE = 100_000
EXAMPLES = 3


@dataclass
class Rows:
    """The rows that a table gives: one of each record, or several where a record holds a list.

    Attributes:
        table: the records.
        place: where their photos lie.
        ends: (records,) int64, the rows up to each record and with it; None if each is one row.
        image_lists, caption_lists: whether text of that column writes out lists.
    """

    table: Table
    place: Place
    ends: np.ndarray | None = None
    image_lists: bool = False
    caption_lists: bool = False

    def __len__(self) -> int:
        return len(self.table) if self.ends is None else int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, stop: int) -> Iterator[tuple[Any, int]]:
        """(record, which of its rows) of the rows [start, stop)."""
        if self.ends is None:
            yield from ((record, 0) for record in self.table.read(start, stop))
            return
        first, last = (int(place) for place in np.searchsorted(self.ends, (start, stop - 1), side="right"))
        row = int(self.ends[first - 1]) if first else 0
        for record, end in zip(self.table.read(first, last + 1), self.ends[first : last + 1].tolist(), strict=True):
            yield from ((record, number - row) for number in range(max(row, start), min(end, stop)))
            row = end


class RecordSource(Source):
    """Rows of records; only the places of the records are held in memory.

    Args:
        tables: the rows of each file.
        image_key: the key under which a record names its photo; None if none does.
        photo_key: the same where the photo is not read, but tells the product.
    """

    random_access = True

    def __init__(
        self,
        request: Request,
        columns: Sequence[str],
        selected: Columns,
        tables: Sequence[Rows],
        image_key: str | None,
        photo_key: str | None = None,
    ):
        pieces = [
            (table_index, start, min(start + SHARD_ROWS, len(rows)))
            for table_index, rows in enumerate(tables)
            for start in range(0, len(rows), SHARD_ROWS)
        ]
        super().__init__(
            request,
            columns,
            selected,
            [(f"{tables[t].table.name}[{start}:{stop}]", stop - start) for t, start, stop in pieces],
            [DataFile(rows.table.file, len(rows), rows.table.size, rows.table.digest) for rows in tables],
        )
        # A file that tells splits itself has the one that was asked for.
        self.split = next((rows.table.split for rows in tables if rows.table.split), self.split)
        self._pieces = pieces
        self._tables = tables
        self._image_key = image_key
        self._photo_key = photo_key or image_key
        self.photo_keys |= {self._photo_key} - {None}
        self.has_texts_alone = bool(tables) and all(rows.table.is_delimited for rows in tables)

    def _file_of(self, shard: Shard) -> str:
        return self._tables[self._pieces[shard.index][0]].table.file

    def _read(self, shard: Shard, start: int, stop: int) -> Iterator[Row]:
        table_index, first, _ = self._pieces[shard.index]
        rows = self._tables[table_index]
        for position, (record, part) in enumerate(rows.read(first + start, first + stop), start=start):
            yield self._convert(rows, record, part, shard.first_row + position)

    def _convert(self, rows: Rows, record: Any, part: int, number: int) -> Row:
        if isinstance(record, str) and not isinstance(record, Unreadable) and self.selected.image is None:
            record = {self.selected.caption: record}  # a list of bare titles
        if not isinstance(record, dict):
            problem = str(record) if isinstance(record, Unreadable) else "the metadata record is not a JSON object"
            return self._row(number, None, None, {}, None, problem, number - part)
        photos = photos_of(record.get(self._image_key), rows.image_lists)
        titles = titles_of(record.get(self.selected.caption), rows.caption_lists)
        image, name, problem = rows.place.find(photos[part % len(photos)])
        photo = image
        if self._photo_key != self._image_key:
            photo = rows.place.find(photos_of(record.get(self._photo_key), rows.image_lists)[0])[0]
        elif part % len(photos):
            photo = rows.place.find(photos[0])[0]
        return self._row(number, image, titles[part % len(titles)], record, name, problem, number - part, photo)


# -------------------------------------------------------------------------------------------------------------- openers


def open_metadata(request: Request) -> RecordSource:
    """Open a folder of photos by the `metadata.*` files in it; their names are relative to each of them.

    Raises:
        UsageError: a file can't be read as a table, or there is no column that was named.
    """
    asked = request.asked
    # datasets calls the photo of file_name "image".
    named = replace(asked, image="file_name") if asked.image == "image" else asked
    tables = _open(request, Roles(named))
    columns = ["image" if column == "file_name" else column for column in _columns(tables)]
    selected = _choose(request, tables, columns, ("image",), photos=("file_name",))
    has_names = "file_name" in _columns(tables)
    key = "file_name" if selected.image == "image" and has_names else selected.image
    if selected.product_id == "image" and has_names and asked.image in (None, "image"):
        selected = replace(selected, product_id="file_name")
    return _source(request, columns, selected, tables, key)


def open_records(request: Request) -> RecordSource:
    """Open tables, or text files with a title a line.

    Raises:
        UsageError: a file is damaged, or there is no column that was named.
    """
    roles = Roles(request.asked)
    tables = _open(request, roles)
    columns = _columns(tables, titles_only=request.asked.sides == "titles")
    if not columns:
        if any(len(table) for table in tables):
            raise UsageError(
                f'{request.name} has no records: expected a JSON list of {{"product": file name, "caption": text}}'
            )
        rows = [Rows(table, Place(None)) for table in tables]
        return RecordSource(request, columns, Columns(None, None, None), rows, None)
    key = _id_of_photos(request, tables, columns, roles)
    if key is None:
        selected = _choose(request, tables, columns, ("product", "image", "file_name"))
        return _source(request, columns, selected, tables, selected.image)
    named = replace(request, asked=replace(request.asked, image=key))
    selected = _choose(named, tables, columns, (key,))
    # Beside the photo it stays what it is: an id.
    others = tuple(column for column in columns if request.asked.others == ALL or column in request.asked.others)
    selected = replace(selected, others=others, photos=frozenset())
    return _source(request, columns, selected, tables, key)


def _id_of_photos(request: Request, tables: Sequence[Table], columns: Sequence[str], roles: Roles) -> str | None:
    """The column of ids by which the photos of all tables are called, where no column is called as one of photos is;
    None if there is none, or several are.

    Photos must lie there for nearly all ids that are looked at: an id is no promise of a photo.
    """
    if any(roles.of(column) == "image" for column in columns):
        return None
    found = []
    for column in filter(roles.is_id, columns):
        facts = [table.facts.get(column) for table in tables]
        if all(
            each is not None and _are_there(request, table, each) for table, each in zip(tables, facts, strict=True)
        ):
            found.append(column)
    if len(found) != 1:
        return None
    request.told.append(f"'{found[0]}' is how the photos are called (--image_column names another column)")
    return found[0]


def _are_there(request: Request, table: Table, facts: Facts) -> bool:
    """Whether photos lie there by nearly all names of a column."""
    if is_remote(table.file) or not facts.sample or facts.addresses:
        return False
    place, _ = _looked_for(request, table, facts)
    return share_found(facts.sample, place) >= SHARE_OF_IDS


def _choose(
    request: Request, tables: Sequence[Table], columns: Sequence[str], *defaults: Any, **options: Any
) -> Columns:
    """`choose_columns`, whose message also says what may be wrong with a table of one column."""
    try:
        return choose_columns(request, columns, *defaults, **options, by_likeness=True)
    except UsageError as error:
        alone = next((table for table in tables if len(table.columns) == 1 and table.is_delimited), None)
        if alone is None:
            raise
        raise UsageError(
            f"{error}; if {alone.name} has several columns, give what is between them as --csv_delimiter"
        ) from None


def _open(request: Request, roles: Roles) -> list[Table]:
    """The tables of the request; of a folder, files of JSON and XML that hold no table are left and counted."""
    tables, no_tables = [], []
    for file in request.files:
        try:
            tables.append(open_table(file, request.reading, roles, request.asked_split or request.split))
        except NoTable as error:
            if request.survey is None or len(request.files) == 1:
                raise
            no_tables.append((file, error))
    if not tables:
        raise no_tables[0][1]
    for file, _ in no_tables:
        request.survey.leave("files of JSON or XML without records", os.path.relpath(file, request.survey.root))
    return _with_columns(request, with_photos(request, tables, roles), roles)


def _with_columns(request: Request, tables: list[Table], roles: Roles) -> list[Table]:
    """Of a folder's tables those that have photos or titles; the others are left and counted."""
    if request.survey is None or len(tables) == 1:
        return tables
    found = [table for table in tables if table.bare or any(map(roles.of, table.columns))]
    for table in tables:
        if found and table not in found:
            name = os.path.relpath(table.file, request.survey.root)
            request.survey.leave(REASONS["unrelated"], name)
    return found or tables


def _columns(tables: Sequence[Table], titles_only: bool = False) -> list[str]:
    columns = dict.fromkeys(column for table in tables for column in table.columns)
    if titles_only and any(table.bare for table in tables):
        columns.setdefault("caption")
    return list(columns)


def _source(
    request: Request, columns: Sequence[str], selected: Columns, tables: Sequence[Table], key: str | None
) -> RecordSource:
    for table in tables:
        _check_columns(table, key, selected, request)
    products = {table.product_column for table in tables}
    if selected.product_id is None and len(products) == 1:
        selected = replace(selected, product_id=products.pop())
    rows = [_rows(request, table, key, selected) for table in tables]
    if len(rows) > 1 and not any(is_remote(table.file) for table in tables):
        _refuse_repeats(request, rows, key, selected)
    if key is not None and request.survey is not None:
        named = [(each.place, each.table.facts[key]) for each in rows if key in each.table.facts]
        told_unnamed(request, named)
    for each in rows:
        request.told.extend(each.table.told)
        each.table.facts = {}  # they served the opening
    product_id = selected.product_id
    names_photos = key is None and product_id is not None and Roles(request.asked).of(product_id) == "image"
    return RecordSource(request, columns, selected, rows, key, product_id if names_photos else None)


def _check_columns(table: Table, key: str | None, selected: Columns, request: Request) -> None:
    """Refuse a table that lacks a column of the others: all of its rows would be unusable."""
    if table.bare or not len(table):
        return
    for column, role in ((key, "image"), (selected.caption, "caption")):
        if column is not None and column not in table.columns:
            raise UsageError(
                f"{table.file} has no column '{column}' ({request.asked.name_of(f'{role}_column')}) that the other "
                "tables have: rename its column, move it out, or name the tables that are meant by flags"
            )


def _rows(request: Request, table: Table, key: str | None, selected: Columns) -> Rows:
    image, caption = table.facts.get(key), table.facts.get(selected.caption)
    place = _place(request, table, image)
    counts = [facts.counts() for facts in (image, caption) if facts is not None]
    counts = [np.frombuffer(each, dtype=np.int32) for each in counts if each is not None and len(each)]
    ends = None
    if counts:
        ends = np.cumsum(np.maximum.reduce(counts), dtype=np.int64)
        request.told.append(f"{table.name}: {len(table):,} records with lists give {ends[-1]:,} rows")
    for column, facts in ((key, image), (selected.caption, caption)):
        if facts is not None:
            told_facts(request, column, facts)
    return Rows(table, place, ends, bool(image and image.as_lists), bool(caption and caption.as_lists))


def told_facts(request: Request, column: str, facts: Facts) -> None:
    """Say what is unusual about the cells of a column.

    Raises:
        UsageError: its photos are addresses, and it was not asked for them to be fetched.
    """
    if facts.addresses:
        hosts = ", ".join(host for host, _ in facts.hosts.most_common(EXAMPLES))
        hosts += ", ..." if len(facts.hosts) > EXAMPLES else ""
        if request.asked.fetch:
            request.told.append(f"{facts.addresses:,} photos come from the network ({hosts})")
        elif facts.has_addresses and request.asked.sides != "titles":
            raise UsageError(
                f"{request.name}: photos of the column '{column}' are addresses ({hosts}), which are fetched only when "
                f"asked for: give {request.asked.name_of('fetch_photos')} to fetch each of them every time that its "
                "row is read, or fetch them first, and name their files in the column"
            )
        elif request.asked.sides != "titles":
            request.told.append(f"{facts.addresses:,} photos are addresses ({hosts}), which are not fetched")
    if facts.doubtful:
        request.told.append(
            f"{facts.doubtful:,} texts of '{column}' are written as lists and the others are not: they stay text"
        )


def _place(request: Request, table: Table, facts: Facts | None) -> Place:
    """Where the photos of a table lie."""
    place, told = _looked_for(request, table, facts)
    if told:
        request.told.append(f"{table.name}: {told}")
    return place


def _looked_for(request: Request, table: Table, facts: Facts | None) -> tuple[Place, str | None]:
    """The place, and what to say of it."""
    own = posixpath.dirname(table.file.replace(os.sep, "/")) or "."
    if is_remote(table.file):
        host, fetch = urlsplit(table.file).netloc, request.asked.fetch
        return Place(request.image_dir or own, is_own=False, host=host, fetch=fetch), None
    # All lists of a data set lie together: photos are looked for beside the first.
    first = posixpath.dirname(request.files[0].replace(os.sep, "/")) or "."
    folder = request.image_dir or (own if request.survey is not None else first)
    roots = [os.path.abspath(root) for root in (folder, own, request.folder) if root is not None and "://" not in root]
    place = Place(folder, tuple(dict.fromkeys(roots)), fetch=request.asked.fetch)
    if facts is None or not facts.sample:
        return place, None
    return find_place(facts.sample, place, table.photo_folders, *tiers_of(request, table.file, folder))


def tiers_of(request: Request, table: str, folder: str) -> list[list[str]]:
    """Folders in which the photos of a local table may lie, if not in `folder`: first the nearest."""
    own = os.path.dirname(table) or "."
    near = [own, *folders_below(own), os.path.dirname(os.path.realpath(table))]
    further = [*([request.folder] if request.folder else []), *folders_below(folder)]
    if request.survey is not None:
        further += [os.path.join(request.survey.root, each) for each in sorted(request.survey.photo_folders())[:64]]
    # Beside a folder of tables there is often one of photos.
    beside = [] if request.image_dir else folders_beside(own)
    return [[each for each in dict.fromkeys(tier) if each != folder] for tier in (near, further, beside)]


def told_unnamed(request: Request, named: Sequence[tuple[Place, Facts]]) -> None:
    """Count the photos of the folder that no row names, and the rows whose photo is not in it."""
    survey = request.survey
    survey.is_compared = True
    if any(place.folder is None or place.names_otherwise for place, _ in named) or request.asked.sides == "titles":
        return
    root = os.path.abspath(survey.root)
    lookups = [(_relative_to(root, place), place.ending, _sorted(facts.names)) for place, facts in named]
    lookups += [(lambda path: f"{root}/{path}", "", _sorted(facts.names)) for _, facts in named if facts.absolute]
    seen = [np.zeros(0, np.int64) for _ in lookups]
    unnamed = Left()
    for chunk in _chunks(survey.photo_names(request.below), PHOTOS_AT_ONCE):
        is_named = np.zeros(len(chunk), dtype=bool)
        for place, (relative, ending, names) in enumerate(lookups):
            hashes = np.array([_hash(relative(path), ending) for path in chunk], dtype=np.int64)
            is_named |= (found := np.isin(hashes, names))
            seen[place] = np.union1d(seen[place], hashes[found])
        for place in np.flatnonzero(~is_named).tolist():
            unnamed.add(chunk[place])
    if unnamed.count:
        survey.left["photos that no row names"] = unnamed
    if not any(facts.absolute for _, facts in named):
        gone = sum(len(names) - len(found) for (_, _, names), found in zip(lookups, seen, strict=True))
        if gone and all(place.folder.startswith(root) for place, _ in named):
            what = "photo that a row names is" if gone == 1 else "photos that rows name are"
            request.told.append(f"{gone:,} {what} not in the folder")


def _names_apart(tables: Sequence[Table]) -> list[str]:
    """Names of tables for a message: their whole paths, if two have the same name."""
    names = [table.name for table in tables]
    return names if len(set(names)) == len(names) else [table.file for table in tables]


def _relative_to(root: str, place: Place) -> Any:
    """How the path of a photo, relative to the root, is written in the table of a place."""
    if place.unicode:
        form, relative = {"NFD": "NFC", "NFC": "NFD"}[place.unicode], _relative_to(root, replace(place, unicode=""))
        return lambda path: None if (found := relative(path)) is None else unicodedata.normalize(form, found)
    if place.capitals:
        capitals, relative = (
            {"upper": "lower", "lower": "upper"}[place.capitals],
            _relative_to(root, replace(place, capitals="")),
        )
        return lambda path: None if (found := relative(path)) is None else with_ending(found, capitals)
    way = os.path.relpath(os.path.abspath(place.folder), os.path.abspath(root)).replace(os.sep, "/")
    if way == ".":
        return lambda path: path
    if way.startswith(".."):
        back = os.path.relpath(os.path.abspath(root), os.path.abspath(place.folder)).replace(os.sep, "/")
        return lambda path: f"{back}/{path}"
    return lambda path: path[len(way) + 1 :] if path.startswith(f"{way}/") else None


def _hash(path: str | None, ending: str) -> int:
    return hash(path if path is None or not ending else path.removesuffix(ending))


def _sorted(names: array) -> np.ndarray:
    return np.unique(np.frombuffer(names, dtype=np.int64)) if len(names) else np.zeros(0, np.int64)


def _chunks(items: Iterator[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _refuse_repeats(request: Request, tables: Sequence[Rows], key: str | None, selected: Columns) -> None:
    """Refuse tables that hold the same rows: each would be trained on twice."""
    before = np.zeros(0, np.int64)
    for index, rows in enumerate(tables):
        pairs = array("q")
        for record in rows.table.read(0, len(rows.table)):
            if isinstance(record, dict):
                value = record.get(key)
                photo = rows.place.find(value)[0] if isinstance(value, str) else None
                photo = photo if isinstance(photo, str) else str(value)
                pairs.append(hash((photo, str(record.get(selected.caption)))))
        pairs = np.unique(np.frombuffer(pairs, dtype=np.int64)) if len(pairs) else np.zeros(0, np.int64)
        shared = len(np.intersect1d(pairs, before, assume_unique=True))
        if shared and shared * 2 >= min(len(pairs), len(before)):
            own, *named = _names_apart([rows.table, *(other.table for other in tables[:index][:EXAMPLES])])
            others = " or ".join(named)
            raise UsageError(
                f"{own} holds rows that are in {others} too ({shared:,} of {len(rows.table):,}, the same "
                "photos and titles): keep one of the files, or name the one that is meant by flags"
            )
        if shared:
            request.told.append(f"{shared:,} rows of {rows.table.name} are in another table too, and are read twice")
        before = np.union1d(before, pairs)
