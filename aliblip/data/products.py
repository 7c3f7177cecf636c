"""Which product a row shows: what the data says; where it says nothing, the photo.

    product_id_of("P7")                    # an int64, or None for what is no id
    for line in report(source).lines(): print(line)

Equal ids make rows positives of each other, so what counts as equal decides what is learned:

- A whole number is itself, whatever its type: 100, 100.0, Decimal("100"), "100" and "100.0" are one product. Tables
  with gaps and CSV files written from them make floats of whole numbers; no other text is taken for a number. "0100",
  "+100", "1e2" and "100.00" are texts: a leading zero is information.
- A text is itself without the blanks around it; upper and lower case differ.
- What says that there is no id is none: null, NaN, a text of `NO_ID`, a text without any letter, digit or symbol.

A row without an id belongs to its photo: rows that name the same file or address, or hold the same bytes, are one
product. So several titles of one photo are positives of each other without being told.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np

from aliblip.data.remote import is_remote
from aliblip.runtime.distributed import launched_rank
from aliblip.runtime.mistakes import one_line

__all__ = [
    "CHUNK_ROWS",
    "NO_ID",
    "ProductIds",
    "ProductReport",
    "content_id",
    "counted_ids",
    "own_id",
    "photo_id_of",
    "product_id_of",
    "report",
    "shown",
    "tell_sources",
]

# Texts that stand for "no id", in lower case: what spreadsheets, databases and data frames write.
NO_ID = frozenset(
    (
        "nan",
        "-nan",
        "na",
        "n/a",
        "n.a.",
        "<na>",
        "#n/a",
        "#n/a n/a",
        "#na",
        "none",
        "null",
        "(null)",
        "[null]",
        "<null>",
    )
    + ("nil", "undefined", "\\n", "1.#qnan", "-1.#qnan", "1.#ind", "-1.#ind")
    + ("#null!", "#value!", "#ref!", "#name?", "#num!", "#div/0!")
)
_WHOLE_NUMBER = re.compile(r"(0|-?[1-9][0-9]*)(\.0)?", re.ASCII)
# Names of columns that may hold product ids.
_IDS = re.compile(
    r"(?i)(^|[^a-z])(id|ids|sku|spu|asin|gtin|ean|upc|isbn|mpn|pid|handle|product|item|article|group)($|[^a-z])"
)
# A long number, as a spreadsheet saves it.
_SHORTENED = re.compile(r"'\d(?:[.,]\d+)?E\+\d\d'")
# Rows whose ids are counted at once.
CHUNK_ROWS = 65536
# A product of more rows than these is told: a text that means "no id" in one shop, or a column of categories.
MANY_ROWS, MANY_SHARE = 100, 0.05
# In small tables: one of at least so many rows, of such a share, and far larger than the others.
FEW_ROWS, FEW_SHARE, TIMES_THE_OTHERS = 10, 0.25, 5
# Local data of at most so many bytes is read for the number of its photos, if nothing else tells it: in some seconds.
READ_FOR_COUNTING = 2**28
# Products whose names are told.
LARGEST = 3


# ------------------------------------------------------------------------------------------------------------- the ids


def product_id_of(value: Any) -> int | None:
    """The int64 product id of a stored value, or None if it is none.

    Whole numbers that fit stay as they are. Everything else becomes a 64-bit BLAKE2 hash: of the text, of the bytes, or
    of the JSON form of a list or dictionary. A value without such a form is no id.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int) and not isinstance(value, bool):
        return _whole(value)
    if isinstance(value, (float, Decimal)):
        if not math.isfinite(value):
            return None
        return _whole(int(value)) if value == int(value) else _hash64(str(value).encode())
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = bytes(value)
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return _hash64(value)
    if isinstance(value, str):
        return _id_of_text(value.strip())
    if value is None or (isinstance(value, (list, tuple, dict, set)) and not value):
        return None
    if not isinstance(value, (bool, list, tuple, dict, set)):
        return _id_of_text(str(value).strip())  # UUIDs and dates, which other files hold as texts
    try:
        return _hash64(json.dumps(value, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    except (TypeError, ValueError, RecursionError):  # keys of several types, or lists in lists in lists
        return None


def _id_of_text(text: str) -> int | None:
    if number := _WHOLE_NUMBER.fullmatch(text):
        # Longer ones Python would refuse to read; they are hashed as the texts that they are.
        return _whole(int(number[1])) if len(number[1]) <= 20 else _hash64(number[1].encode())
    if text.lower() in NO_ID or all(map(_says_nothing, text)):
        return None
    return _hash64(text.encode("utf-8", "surrogatepass"))


def _says_nothing(character: str) -> bool:
    # Punctuation, separators, control and format characters, signs of mathematics and currency.
    category = unicodedata.category(character)
    return category[0] in "PZ" or category in ("Cc", "Cf", "Sm", "Sc", "Sk")


def _whole(value: int) -> int:
    return value if -(2**63) <= value < 2**63 else _hash64(str(value).encode())


def photo_id_of(image: Any, root: str | None = None) -> int | None:
    """The product id of a row that has none: of its photo, or None if nothing tells that from others.

    Args:
        image: bytes, a path or an address. A PIL image is the file that it was opened from.
        root: the folder or address that the photos lie under. Names below it count without it, so that ids are the same
            wherever the data lies. Two links to one photo are two photos, two ways through linked folders are one.
    """
    if isinstance(image, (bytes, bytearray, memoryview)):
        return content_id(image)
    if isinstance(image, os.PathLike):
        image = os.fspath(image)
    elif not isinstance(image, str):
        image = getattr(image, "filename", None)
    if not isinstance(image, str) or not image:
        return None
    return _hash64(_photo_name(image, root).encode("utf-8", "surrogatepass"))


def _photo_name(image: str, root: str | None) -> str:
    if is_remote(image) or image.startswith("data:"):
        address = image.split("#", 1)[0] if image.startswith(("http://", "https://")) else image
        start = f"{root.rstrip('/')}/" if root else "//"
        return address[len(start) :] if address.startswith(start) else address
    folder, name = posixpath.split(os.path.normpath(image).replace(os.sep, "/"))
    below = _below(folder, root)
    return f"{below}/{name}" if below else name


@functools.lru_cache(maxsize=65536)
def _below(folder: str, root: str | None) -> str:
    """A folder as it is called from `root` on; all of its path if it lies elsewhere."""
    if not root or is_remote(root):
        return folder
    here, there = os.path.realpath(folder), os.path.realpath(root)
    if os.path.commonpath([here, there]) != there:
        return here.replace(os.sep, "/")
    below = os.path.relpath(here, there).replace(os.sep, "/")
    return "" if below == "." else below


def own_id(row: int, sides: str = "both") -> int:
    """The product id of a row that has neither an id nor a photo: no other row has it.

    A photo and a title without id, of two sources, have the same row number and are not the same product.
    """
    of = "" if sides == "both" else f" of {sides}"
    return _hash64(f"null product id of row {row}{of}".encode())


def content_id(data: bytes | bytearray | memoryview) -> int:
    """An int64 by which equal files are one photo, whatever they are called."""
    return _hash64(data)


def _hash64(data: bytes | bytearray | memoryview) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


# ------------------------------------------------------------------------------------------------------------ counting


@dataclass
class ProductIds:
    """Product ids of rows that follow each other.

    Attributes:
        ids: (n,) int64; of rows without an id that of the photo, where it is known.
        known: (n,) bool, whether the data gives the id.
        photos: (n,) bool, whether `ids` has the photo's.
        absent: what stands where there is no id, and how often.
    """

    ids: np.ndarray
    known: np.ndarray
    photos: np.ndarray
    absent: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(
        cls, values: Iterable[Any], photos: Iterable[int | None] | None = None, counts: np.ndarray | None = None
    ) -> ProductIds:
        """Of stored values, and the ids of the photos beside them if these are known; each of `counts` rows."""
        values = list(values)
        ids, absent = [product_id_of(value) for value in values], Counter()
        known = np.array([value is not None for value in ids], dtype=bool)
        of_photos = [None] * len(ids) if photos is None else list(photos)
        for position in np.flatnonzero(~known):
            absent[shown(values[position])] += 1 if counts is None else int(counts[position])
            ids[position] = of_photos[position]
        by_photo = ~known & np.array([value is not None for value in ids], dtype=bool)
        columns = (np.array([value or 0 for value in ids], dtype=np.int64), known, by_photo)
        return cls(*(column if counts is None else np.repeat(column, counts) for column in columns), absent)


def shown(value: Any) -> str:
    """A stored value for a message."""
    if value is None:
        return "null"
    if isinstance(value, (bytes, bytearray, memoryview)):
        value = bytes(value).decode("utf-8", "replace")
    text = " ".join(str(value).split())
    text = "".join(character if character.isprintable() else "\ufffd" for character in text[:61])
    return f"'{text[:60]}…'" if len(text) > 60 else f"'{text}'" if isinstance(value, str) else text


@dataclass(frozen=True)
class ProductReport:
    """What a source's rows are, by products.

    Attributes:
        source: its name and split.
        column: of the product ids, or None.
        rows: all.
        products: different ids that the data gives; without a column, different photos; None if not counted.
        largest: (name, rows) of the products of most rows, of those with several.
        without: rows without an id; where photos are the products, rows without a photo.
        absent: what stands in their place, and how often.
        photos: different photos of the rows without an id, or None if only reading them would tell.
        columns: that may hold ids, for a hint.
        why_not: why nothing was counted, if so.
        ids: (products,) int64, ascending, of all rows that have one, photos of rows without an id included.
        first: (products,) int64, the first row of each.
    """

    source: str
    column: str | None
    rows: int
    products: int | None = None
    largest: tuple[tuple[str, int], ...] = ()
    without: int = 0
    absent: tuple[tuple[str, int], ...] = ()
    photos: int | None = None
    columns: tuple[str, ...] = ()
    why_not: str | None = None
    ids: np.ndarray | None = field(default=None, repr=False, compare=False)
    first: np.ndarray | None = field(default=None, repr=False, compare=False)

    def lines(self) -> list[str]:
        """For people: what was understood."""
        return list(self._told())

    def _told(self) -> Iterator[str]:
        if self.column is None:
            hint = f" (--product_id_column names one of: {', '.join(self.columns[:8])})" if self.columns else ""
            if self.products is None:
                yield f"no product column{hint}: each photo is a product; not counted, {self.why_not}"
                return
            photos = _count(self.products, "photo")
            yield f"no product column{hint}: each photo is a product, {photos}{self._most()}"
            return
        if self.products is None:
            yield f"products by the column '{self.column}'; not counted, {self.why_not}"
            return
        yield f"{_count(self.products, 'product')} by the column '{self.column}'{self._most()}"
        if self.without and self.column is not None:
            names = ", ".join(f"{value} {count:,}" for value, count in self.absent[:5])
            names += f", {len(self.absent) - 5} other texts" if len(self.absent) > 5 else ""
            of = "" if self.photos is None else f", {_count(self.photos, 'photo')}"
            yield f"{_count(self.without, 'row')} without an id ({names}){of}: each photo is a product"

    def _most(self) -> str:
        if not self.largest:
            return ", each of one row" if self.products else ""
        return "; the largest: " + ", ".join(f"{name} ({_count(rows, 'row')})" for name, rows in self.largest)

    def warnings(self) -> list[str]:
        """Products of an unlikely share of the rows, and ids that a spreadsheet has spoiled."""
        return [*self._shortened(), *self._unlikely()]

    def _shortened(self) -> list[str]:
        name = next((name for name, _ in self.largest if _SHORTENED.fullmatch(name)), None)
        if name is None:
            return []
        return [
            f"{self.source}: the id {name} is a number that a spreadsheet has shortened, so that different products "
            "have the same id: write the column as text, and save it again"
        ]

    def _unlikely(self) -> list[str]:
        there = self.rows - self.without
        mean = (there - self.largest[0][1]) / max((self.products or 1) - 1, 1) if self.largest else 0
        unlikely = [
            f"{name} ({rows / self.rows:.0%} of the rows)"
            for name, rows in self.largest
            if (rows > MANY_ROWS and rows > MANY_SHARE * self.rows)
            or (rows >= FEW_ROWS and rows > FEW_SHARE * self.rows and rows > TIMES_THE_OTHERS * mean)
        ]
        if not unlikely:
            return []
        what = "one product" if len(unlikely) == 1 else "few products"
        flag = "give another --product_id_column" if self.column else "name a --product_id_column, or repair the names"
        return [
            f"{self.source}: {', '.join(unlikely)}: unlikely for {what}, and all of these rows count as right answers "
            f"to each other; empty such a value if it means that there is no id, or {flag}"
        ]


def report(source: Any) -> ProductReport:
    """Count the products of a `Source`; only ids are read, and 8 bytes a row are held.

    Raises:
        OSError: the ids can't be read.
    """
    about = {"source": f"{source.name} ({source.split})", "column": source.selected.product_id, "rows": source.num_rows}
    others = [column for column in source.columns if column not in (source.selected.image, source.selected.caption)]
    about["columns"] = tuple(column for column in others if _IDS.search(column))
    chunks = counted_ids(source)
    if chunks is None:
        return ProductReport(**about, why_not="since that would read every photo")
    by_photo = about["column"] is None or about["column"] in source.photo_keys
    ids, known, photos, absent = [], [], [], Counter()
    for chunk in chunks:
        ids.append(chunk.ids)
        known.append(chunk.photos if by_photo else chunk.known)
        photos.append(chunk.photos)
        absent += chunk.absent
    ids, known, photos = np.concatenate(ids), np.concatenate(known), np.concatenate(photos)
    there = np.flatnonzero(known | photos)
    own, place = np.unique(ids[there], return_index=True)
    rows = np.flatnonzero(known)
    _, first, count = np.unique(ids[rows], return_index=True, return_counts=True)
    order = np.lexsort((first, -count))[:LARGEST]
    without = int(len(ids) - len(rows))
    return ProductReport(
        **about,
        products=len(count),
        largest=tuple((source.product_name(int(rows[first[i]])), int(count[i])) for i in order if count[i] > 1),
        without=without,
        absent=(("no photo", without),) if by_photo else tuple(absent.most_common()),
        photos=len(np.unique(ids[photos])) if not by_photo and photos.sum() == without else None,
        ids=own,
        first=there[place],
    )


def counted_ids(source: Any) -> Iterator[ProductIds] | None:
    """The product ids of all rows of a `Source`, in pieces; None if that would read too many photos.

    Raises:
        OSError: they can't be read.
    """
    chunks = source.product_ids()
    if chunks is None and sum(file.size for file in source.files) <= READ_FOR_COUNTING and _is_here(source):
        chunks = source.read_product_ids()
    return chunks


def _is_here(source: Any) -> bool:
    return bool(source.files) and not any(is_remote(file.file) for file in source.files)


def tell_sources(
    *sources: Any, tell: Callable[[str], object] = print, products: bool = True
) -> list[ProductReport | None]:
    """Tell, by the first process of a launch, what was understood of each `Source`: what was read and left, products.

    What can't be counted ends no run. Products are left out where it does not matter what they are.

    Returns:
        what was found out about the products of each; of other processes nothing.
    """
    reports: list[ProductReport | None] = []
    if launched_rank() != 0:
        return reports
    for source in dict.fromkeys(source for source in sources if source is not None):
        for line in source.report():
            tell(line)
        reports.append(None)
        if not products or (source.sides == "titles" and source.selected.product_id is None):
            continue  # titles without photos are no products
        try:
            found = report(source)
        except OSError as error:
            tell(f"warning: {source.name} ({source.split}): the products were not counted ({one_line(error)})")
            continue
        reports[-1] = found
        for line in found.lines():
            tell(f"  {line}")
        for warning in found.warnings():
            tell(f"warning: {warning}")
    return reports


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
