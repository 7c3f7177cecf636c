"""The types of columns that are written: one for the values of all rows, of Arrow, whatever the data has.

kind, note = joined_type("price", pa.null(), [1, 2.5, None])      # float64
value = fitting_value(7, pa.string())                              # "7"
kind = type_of_texts(pa.null(), ["12.50", "", "7"])                # float64: a CSV file has texts alone
value = number_in("12.50")                                         # 12.5
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from aliblip.data.collate import printable

__all__ = [
    "NOT_OF_THE_TYPE",
    "array_of",
    "fitting_value",
    "joined_type",
    "number_in",
    "storable",
    "type_of_texts",
    "unified_type",
]

# Numbers as people write prices and counts. Leading zeros, signs of plus and more digits than numbers have: codes.
_WHOLE = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,14})[.][0-9]+")
_TEXT_TYPES = (pa.null(), pa.int64(), pa.float64(), pa.string())

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


def type_of_texts(kind: pa.DataType, texts: Iterable[Any]) -> pa.DataType:
    """The type of a column of a file that holds texts alone: numbers where all texts that are not blank are numbers.

    Args:
        kind: of the values before these; null where there were none.
    """
    found = {type(number_in(text)) for text in texts}
    others = [_TEXT_TYPES[3] for one in found if one not in (int, float, type(None))]
    kinds = [kind, *([pa.int64()] if int in found else []), *([pa.float64()] if float in found else []), *others]
    return max(kinds, key=_TEXT_TYPES.index)
