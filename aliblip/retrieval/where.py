"""Filters on the columns of a gallery: SQL text or a mapping, into which values go quoted by their type, never pasted.

    filter_of("price < :most AND category = :kind", {"most": 50, "kind": "mug"}, schema)
    filter_of({"category": ["mug", "cup"], "price": ("<", 50), "colour": None}, None, schema)

Both give the text that Lance takes. In SQL text a column whose name is no plain word stands between backticks, text
between single quotes, `:name` is a value, and a field of a nested column is `column.field`.
"""

from __future__ import annotations

import datetime
import decimal
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from aliblip.data.collate import printable
from aliblip.runtime.mistakes import UsageError

__all__ = ["Where", "column_name", "columns_told", "filter_of", "literal"]

Where = str | Mapping[str, Any]

OPERATORS = ("=", "!=", "<", "<=", ">", ">=", "in", "not in", "like", "not like")
# Quoted text and names as a whole, so that no placeholder is seen in them; a cast `::`; a placeholder; the rest.
_TOKENS = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|::|:[A-Za-z_]\w*|--|/\*|.", re.DOTALL)


def filter_of(where: Where | None, values: Mapping[str, Any] | None, schema: pa.Schema) -> str | None:
    """The filter as SQL text with all values in it; None for no filter.

    Args:
        where: SQL text over the columns, with `:name` for values; or a mapping from columns to a value (equal to it), a
            list (one of its values), None (is null), or a pair of an operator of `OPERATORS` and a value.
        values: by the names of the placeholders.
        schema: of the columns that may be named.

    Raises:
        UsageError: a column or a placeholder that is not there, or a value of no known type.
    """
    if where is None or (isinstance(where, Mapping) and not where):
        if values:
            raise UsageError(f"values for a filter are given ({_listed(values)}), and no filter")
        return None
    if isinstance(where, Mapping):
        if values:
            raise UsageError("values belong to a filter of text: in a mapping each value stands beside its column")
        return " AND ".join(_condition(name, wanted, schema) for name, wanted in where.items())
    if not isinstance(where, str):
        raise UsageError(f"the filter is a {type(where).__name__}: give SQL text or a mapping from columns to values")
    if not where.strip():
        raise UsageError(f"the filter is empty: leave it out, or give a condition; {columns_told(schema)}")
    return f"({''.join(_filled(where, values or {}))})"


def _filled(where: str, values: Mapping[str, Any]) -> Iterator[str]:
    used = set()
    for token in _TOKENS.findall(where):
        if token in ("--", "/*"):
            raise UsageError(f"the filter {where!r} holds a comment: leave it out")
        if token[0] == ":" and token != "::" and len(token) > 1:
            name = token[1:]
            if name not in values:
                given = f"given are {_listed(values)}" if values else "none are given"
                raise UsageError(f"the filter {where!r} names the value :{name}, and values has no {name!r}: {given}")
            used.add(name)
            yield literal(values[name], name)
        else:
            yield token
    if unused := [name for name in values if name not in used]:
        raise UsageError(f"the filter {where!r} does not name the value :{unused[0]}: name it, or leave the value out")


def _condition(name: str, wanted: Any, schema: pa.Schema) -> str:
    kind, column = _type_of(name, schema), column_name(name)
    operator, wanted = _operator(name, wanted)
    if operator in ("in", "not in"):
        if not wanted:  # no value is in an empty list, and SQL has none
            return "false" if operator == "in" else "true"
        listed = ", ".join(_fitting(value, name, kind) for value in wanted)
        return f"{column} {operator.upper()} ({listed})"
    if wanted is None:
        if operator not in ("=", "!="):
            raise UsageError(f"the filter of {name!r} compares by {operator!r} with nothing: give a value")
        return f"{column} IS NULL" if operator == "=" else f"{column} IS NOT NULL"
    if pa.types.is_integer(kind) and isinstance(wanted, float) and math.isfinite(wanted) and not wanted.is_integer():
        operator, wanted = _between_integers(operator, wanted)
        if wanted is None:
            return operator
    return f"{column} {operator.upper()} {_fitting(wanted, name, kind)}"


def _operator(name: str, wanted: Any) -> tuple[str, Any]:
    """The operator and the value, or list of values, of one column of a mapping."""
    operator = "="
    if isinstance(wanted, tuple):
        if len(wanted) != 2 or not isinstance(wanted[0], str):
            raise UsageError(f"the filter of {name!r} is {wanted!r}: give a pair of an operator and a value")
        operator, wanted = " ".join(wanted[0].lower().split()), wanted[1]
        if operator not in OPERATORS:
            raise UsageError(
                f"the filter of {name!r} has the operator {operator!r}: give one of {', '.join(OPERATORS)}"
            )
    is_list = isinstance(wanted, (list, set, frozenset, range))
    if is_list and operator in ("=", "!="):
        operator = "in" if operator == "=" else "not in"
    if (operator in ("in", "not in")) != is_list:
        needed = "a list of values" if not is_list else "one value"
        raise UsageError(f"the filter of {name!r} is {operator!r} {wanted!r}: give {needed}")
    return operator, wanted


def _between_integers(operator: str, wanted: float) -> tuple[str, int | None]:
    """A comparison of whole numbers with one that is not whole, which Lance refuses, as one with a whole number."""
    if operator in ("<", "<="):
        return "<=", math.floor(wanted)
    if operator in (">", ">="):
        return ">=", math.ceil(wanted)
    return ("false" if operator == "=" else "true"), None


def _fitting(value: Any, name: str, kind: pa.DataType) -> str:
    """A value as SQL compares it with a column of this type."""
    if pa.types.is_decimal(kind) and isinstance(value, (int, float, decimal.Decimal)) and not isinstance(value, bool):
        return f"CAST('{value}' AS DECIMAL({kind.precision}, {kind.scale}))"
    return literal(value, name)


def _type_of(name: str, schema: pa.Schema) -> pa.DataType:
    """The type of a column, or of `column.field` in a nested one."""
    column, *fields = [name] if name in schema.names else name.split(".")
    if column in schema.names:
        kind = schema.field(column).type
        for field in fields:
            kind = kind.field(field).type if pa.types.is_struct(kind) and kind.get_field_index(field) >= 0 else None
            if kind is None:
                break
        else:
            return kind
    raise UsageError(f"the filter names the column {name!r}, which is not there; {columns_told(schema)}")


def column_name(name: str) -> str:
    """A column's name, or `column.field`, as SQL has it. (A gallery's columns have neither backtick nor dot.)"""
    return ".".join(f"`{part}`" for part in name.split("."))


def literal(value: Any, name: str = "") -> str:
    """A value as SQL has it, by its type.

    Args:
        value: None, a truth value, number, text, bytes, date, time stamp, or a list of them.
        name: for the message.

    Raises:
        UsageError: a value of another type, or a number that SQL has not.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return "TRUE" if value else "FALSE"
    if isinstance(value, int):
        if not -(2**63) <= value < 2**64:
            raise UsageError(f"the value {value} of {name!r} has more than 64 bits: give it as text")
        # Of the least number SQL takes what follows the sign for a number too large.
        return f"(-{2**63 - 1} - 1)" if value == -(2**63) else str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise UsageError(f"the value of {name!r} is {value}: give a finite number")
        # A whole number is compared with columns of every kind of number.
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
    if isinstance(value, decimal.Decimal) and value.is_finite():
        return f"{value:f}"
    if isinstance(value, str):
        return "'" + printable(value).replace("'", "''") + "'"
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"X'{bytes(value).hex()}'"
    if isinstance(value, datetime.datetime):
        return f"timestamp '{value.isoformat(sep=' ')}'"
    if isinstance(value, datetime.date):
        return f"date '{value.isoformat()}'"
    if isinstance(value, (list, tuple, set, frozenset, range)) and value:
        return "(" + ", ".join(literal(one, name) for one in value) + ")"
    raise UsageError(
        f"the value of {name!r} is {value!r}, a {type(value).__name__}: a filter takes text, numbers, truth values, "
        "dates, and lists of them that are not empty"
    )


def columns_told(schema: pa.Schema) -> str:
    """The columns and their types, for a message."""
    return "the columns are " + ", ".join(f"{field.name} ({field.type})" for field in schema)


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
