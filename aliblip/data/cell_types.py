"""The types of columns that are written: one for the values of all rows, of Arrow, whatever the data has.

kind, note = joined_type("price", pa.null(), [1, 2.5, None])      # float64
value = fitting_value(7, pa.string())                              # "7"
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from aliblip.data.collate import printable

__all__ = ["NOT_OF_THE_TYPE", "fitting_value", "joined_type", "storable", "unified_type"]

# What Arrow raises for values that it can't make a column of.
NOT_OF_THE_TYPE = (pa.ArrowException, TypeError, ValueError, OverflowError, UnicodeError)


def fitting_value(value: Any, kind: pa.DataType) -> Any:
    """A single value in its column's type, or None."""
    if pa.types.is_string(kind) and value is not None:
        return _as_text(value)
    try:
        return pa.array([value], kind)[0].as_py()
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
