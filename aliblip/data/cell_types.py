"""The types of columns that are written: one for the values of all rows, of Arrow, whatever the data has.

kind, note = joined_type("price", pa.null(), [1, 2.5, None])      # float64
value = fitting_value(7, pa.string())                              # "7"

A CSV file has texts alone. Which of its columns are numbers follows from all of their texts, in any order:

likeness = like_texts(Likeness.BLANK, ["12.50", "", "7"])          # DECIMAL
types, told = types_of_texts({"price": likeness}, ids=["sku"])     # float64
value = number_in("12.50")                                         # 12.5
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from enum import IntEnum
from typing import Any

import pyarrow as pa

from aliblip.data.collate import printable

__all__ = [
    "NOT_OF_THE_TYPE",
    "Likeness",
    "array_of",
    "fitting_value",
    "is_number",
    "joined_type",
    "like_texts",
    "number_in",
    "storable",
    "types_of_texts",
    "unified_type",
]

# Numbers as people write prices and counts. Leading zeros, signs of plus and more digits than numbers have: codes.
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,14})[.][0-9]+")
# 12,50 or 1.234,56 or 1,234.56: no number here, but meant as one.
_WITH_COMMAS = re.compile(
    r"-?([0-9]+,[0-9]+|[0-9]{1,3}([. '\u00a0\u202f][0-9]{3})+(,[0-9]+)?|[0-9]{1,3}(,[0-9]{3})+([.][0-9]+)?)"
)
# Digits of a whole number. All of a column with as many as codes have, such as EANs and phone numbers, are codes;
# beyond those of numbers a fraction beside it could not be kept.
_CODE_DIGITS, _NUMBER_DIGITS = 10, 15
# The last word of a column's name that says that it holds codes, whatever they look like.
_CODE_WORDS = frozenset(
    (
        *("id", "ids", "uid", "uuid", "guid", "productid", "itemid", "articleid", "groupid", "categoryid", "sku"),
        *("skus", "ean", "gtin", "upc", "isbn", "asin", "mpn", "barcode", "code", "codes", "key", "handle"),
        *("phone", "telephone", "tel", "mobile", "fax", "zip", "zipcode", "postcode", "plz"),
    )
)
_NUMBERED = frozenset({"number", "nr", "no"})  # "article number", but not "number"

# What Arrow raises for values that it can't make a column of.
NOT_OF_THE_TYPE = (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeError)


def array_of(values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values as a column of a type.

    Raises:
        one of `NOT_OF_THE_TYPE`: a value is not of it; Arrow alone would cut 1.5 off to a whole number.
    """
    if pa.types.is_integer(kind):
        cut = next((value for value in values if isinstance(value, float) and not value.is_integer()), None)
        if cut is not None:
            raise ValueError(f"{cut} is no whole number")
    return pa.array(values, kind)


def fitting_value(value: Any, kind: pa.DataType) -> Any:
    """A single value in its column's type, or None."""
    if pa.types.is_string(kind) and value is not None:
        return _as_text(value)
    try:
        return array_of([value], kind)[0].as_py()
    except NOT_OF_THE_TYPE:
        return None


def _as_text(value: Any) -> str:
    return printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str))


def joined_type(name: str, kind: pa.DataType, values: list[Any]) -> tuple[pa.DataType, str]:
    """The type of a column so far, and of more values; text, and a remark, where they have none in common."""
    try:
        return unified_type(kind, pa.array(values).type), ""
    except NOT_OF_THE_TYPE:
        return (
            pa.string(),
            f"the column {name!r} holds values of several types, or of none that a table has: kept as text",
        )


def unified_type(*kinds: pa.DataType) -> pa.DataType:
    """The type that holds the values of all.

    Raises:
        ArrowException: there is none.
    """
    schemas = [pa.schema([pa.field("x", kind)]) for kind in kinds]
    return pa.unify_schemas(schemas, promote_options="permissive").field("x").type


def storable(kind: pa.DataType) -> pa.DataType:
    """The type that a table has for one of the data."""
    if isinstance(kind, pa.BaseExtensionType):
        return storable(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return storable(kind.value_type)
    if pa.types.is_null(kind) or pa.types.is_large_string(kind) or kind == pa.string_view():
        return pa.string()
    if pa.types.is_large_binary(kind) or kind == pa.binary_view():
        return pa.binary()
    if pa.types.is_interval(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(child.name, storable(child.type)) for child in kind])
    if pa.types.is_map(kind):
        return pa.map_(kind.key_type, storable(kind.item_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(storable(kind.value_type), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.list_(storable(kind.value_type))
    return kind


def number_in(text: Any) -> Any:
    """The number that a text is, None for a blank one; anything else as it is."""
    if not isinstance(text, str):
        return text
    plain = text.strip()
    if _WHOLE.fullmatch(plain):
        return int(plain)
    if _DECIMAL.fullmatch(plain):
        return float(plain)
    return text if plain else None


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type can be compared with numbers."""
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


class Likeness(IntEnum):
    """What all texts of a column read like; that of texts together is the highest of their own."""

    BLANK = 0
    CODE = 1  # whole numbers, so long that they are none
    WHOLE = 2
    DECIMAL = 3
    COMMAS = 4  # 1.234,56
    TEXT = 5


def like_texts(before: Likeness, texts: Iterable[str | None]) -> Likeness:
    """What texts, and those before them, read like together."""
    return max([before, *map(_likeness, set(texts))])


def _likeness(text: str | None) -> Likeness:
    plain = (text or "").strip()
    if not plain:
        return Likeness.BLANK
    if _WHOLE.fullmatch(plain):
        digits = len(plain.lstrip("-"))
        if digits > _NUMBER_DIGITS:
            return Likeness.TEXT
        return Likeness.CODE if digits >= _CODE_DIGITS else Likeness.WHOLE
    if _DECIMAL.fullmatch(plain):
        return Likeness.DECIMAL
    return Likeness.COMMAS if _WITH_COMMAS.fullmatch(plain) else Likeness.TEXT


def types_of_texts(
    columns: Mapping[str, Likeness], ids: Collection[str | None] = ()
) -> tuple[dict[str, pa.DataType], list[str]]:
    """The types of columns of a file that holds texts alone, and what is to be told of them.

    Numbers become numbers, but for ids and codes: nobody compares these by size, and the next file may have one with
    letters or leading zeros.

    Args:
        columns: name -> what all of its texts read like.
        ids: columns that are known to hold ids.
    """
    types, codes = dict.fromkeys(columns, pa.string()), []
    for name, likeness in columns.items():
        is_code = name in ids or likeness == Likeness.CODE or _is_called_code(name)
        if is_code and Likeness.BLANK < likeness < Likeness.COMMAS:
            codes.append(name)
        elif likeness in (Likeness.WHOLE, Likeness.DECIMAL):
            types[name] = pa.int64() if likeness == Likeness.WHOLE else pa.float64()
    numbers = [name for name in columns if is_number(types[name])]
    commas = [name for name, likeness in columns.items() if likeness == Likeness.COMMAS]
    told = []
    if numbers:
        told.append(f"numbers, since all of their texts are: {', '.join(numbers)}")
    if codes:
        told.append(f"texts, since ids and codes are no numbers: {', '.join(codes)}")
    if commas:
        told.append(
            f"texts, since their numbers have commas or gaps: {', '.join(commas)} (write 1234.56 to compare them with "
            "numbers)"
        )
    return types, told


def _is_called_code(name: str) -> bool:
    """Whether a column is called as ids and codes are: "ean", "productId", "article_number"."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[^\W\d_A-Z]+|[A-Z]+(?![^\W\d_A-Z])", name)]
    if not words:
        return False
    return words[-1] in _CODE_WORDS or (len(words) > 1 and words[-1] in _NUMBERED)
