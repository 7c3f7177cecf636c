"""What the search page filters by: columns of a gallery with few values, or with numbers.

    filters = choose_filters(gallery, ["category", "price"])
    condition = condition_of(filters, {"category": ["mug", "lamp"], "price": (None, 50)})
    pipe(title, gallery=gallery, where=condition.where, values=condition.values)

What a visitor chose reaches the gallery as values, never as a part of the condition's text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from aliblip.retrieval.where import column_name
from aliblip.runtime.mistakes import UsageError

MOST_CHOICES = 50
# Whole numbers with more different values than this are asked for by bounds.
MOST_NUMBERS = 20
MOST_DEFAULT_FILTERS = 4


class VisitorMistake(ValueError):
    """What a visitor of the page gave and can mend; the message is shown to him."""


@dataclass(frozen=True)
class Filter:
    """A column to filter by.

    Attributes:
        column: its name.
        kind: "text", "integer", "number" or "flag" (true or false).
        choices: the values to choose from, as text; None: two bounds of numbers.
    """

    column: str
    kind: str
    choices: tuple[str, ...] | None


@dataclass
class Condition:
    """What the gallery takes as `where` and `values`, and how the page words it."""

    where: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)


def kind_of(gallery: Any, column: str) -> str | None:
    """The kind of a `Filter`; None for what can't be filtered by, such as a list."""
    kind = gallery.schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "text"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_floating(kind):
        return "number"
    return "flag" if pa.types.is_boolean(kind) else None


def text_of(value: Any) -> str:
    """A value of a column as the page shows it; a float of 32 bits with its own digits, not those of 64 bits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        if not math.isfinite(value) or not 1e-4 <= abs(value) < 1e15:
            return f"{value:g}"
        single = np.float32(value)
        return np.format_float_positional(single if float(single) == value else value, trim="-")
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value):,} bytes"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(text_of, value))
    return str(value)


def choose_filters(gallery: Any, names: Sequence[str] | None, left_out: Sequence[str] = ()) -> list[Filter]:
    """The filters of a page.

    Args:
        gallery: with `columns`, `schema` and `values(column, limit)`.
        names: of the columns; None: those of texts, flags or whole numbers with few values, from 2 to `MOST_CHOICES`
            and for half as many as items at most; no more than `MOST_DEFAULT_FILTERS`.
        left_out: columns that are no default.

    Raises:
        UsageError: a column that is not there, or that can't be filtered by.
    """
    if names is None:
        made = (_filter_of(gallery, name) for name in gallery.columns if name not in left_out)
        return [one for one in made if one is not None and one.choices is not None][:MOST_DEFAULT_FILTERS]
    filters = []
    for name in require_columns(gallery, "filter_columns", names):
        made = _filter_of(gallery, name, asked=True)
        if made is None:
            raise UsageError(
                f"--filter_columns: {name!r} has neither numbers nor at most {MOST_CHOICES} different texts: give "
                "other columns"
            )
        filters.append(made)
    return filters


def require_columns(gallery: Any, flag: str, names: Sequence[str]) -> Sequence[str]:
    """The names, all of which are columns of the gallery. Raises UsageError otherwise."""
    for name in names:
        if name not in gallery.columns:
            there = ", ".join(gallery.columns) or "no columns beside the id"
            raise UsageError(f"--{flag}: the gallery has no column {name!r}; it has {there}")
    return names


def _filter_of(gallery: Any, column: str, asked: bool = False) -> Filter | None:
    """The filter of a column; None where there is none that makes sense, or only bounds that nobody asked for."""
    kind = kind_of(gallery, column)
    if kind is None:
        return None
    if kind == "number":
        return Filter(column, kind, None) if asked else None
    found = _values(gallery, column, kind)
    if found is None:
        return Filter(column, kind, None) if asked and kind == "integer" else None
    # What tells nearly every item apart is a name of it, and narrows no search.
    is_useful = found if asked else 2 <= len(found) <= len(gallery) / 2
    return Filter(column, kind, found) if is_useful else None


def _values(gallery: Any, column: str, kind: str) -> tuple[str, ...] | None:
    """The values of a column in order, as text; None: too many to choose from."""
    found = gallery.values(column, limit=MOST_NUMBERS if kind == "integer" else MOST_CHOICES)
    return None if found is None else tuple(map(text_of, sorted(value for value in found if value not in (None, ""))))


def choices_of(gallery: Any, one: Filter) -> tuple[str, ...]:
    """What there is to choose from now for a filter with choices; those it had, where there are too many by now."""
    return _values(gallery, one.column, one.kind) or one.choices


def condition_of(filters: Sequence[Filter], chosen: Mapping[str, Any]) -> Condition:
    """The condition of what was chosen.

    Args:
        filters: of the page.
        chosen: by column a value, a list of values, or bounds as (least, most) or {"min": ..., "max": ...}; None, an
            empty list and bounds of None leave the column out.

    Raises:
        VisitorMistake: a column that is no filter, a value of another kind, bounds that exclude each other.
    """
    known = {one.column: one for one in filters}
    if not isinstance(chosen, Mapping):
        raise VisitorMistake('filters: give {"column": value}')
    condition, parts = Condition(), []
    for column, given in chosen.items():
        if column not in known:
            there = ", ".join(known) or "none"
            raise VisitorMistake(f"{column!r} is no filter of this page; filters: {there}")
        if isinstance(given, (Mapping, tuple)):
            parts += _bounds(known[column], given, condition)
        elif given is not None and given != []:
            parts += _any_of(known[column], given if isinstance(given, list) else [given], condition)
    if parts:
        condition.where = " AND ".join(parts)
    return condition


def _bounds(one: Filter, given: Mapping | tuple, condition: Condition) -> list[str]:
    if isinstance(given, Mapping):
        if not set(given) <= {"min", "max"}:
            raise VisitorMistake(f'the filter {one.column!r} takes bounds as {{"min": ..., "max": ...}}')
        given = (given.get("min"), given.get("max"))
    if one.kind not in ("number", "integer") and any(bound is not None for bound in given):
        raise VisitorMistake(f"the filter {one.column!r} has no numbers: give one of its values")
    least, most = (None if bound in (None, "") else _number(one, bound) for bound in given)
    if least is not None and most is not None and least > most:
        raise VisitorMistake(f"{one.column}: the least, {least:g}, is more than the most, {most:g}")
    parts = []
    for bound, sign, word in ((least, ">=", "at least"), (most, "<=", "at most")):
        if bound is None:
            continue
        condition.told.append(f"{one.column} {word} {text_of(bound)}")
        if one.kind == "integer":  # Lance compares whole numbers with whole numbers alone
            bound = math.ceil(bound) if sign == ">=" else math.floor(bound)
        parts.append(f"{column_name(one.column)} {sign} :{_named(condition, bound)}")
    return parts


def _any_of(one: Filter, given: list, condition: Condition) -> list[str]:
    names = [f":{_named(condition, _typed(one, value))}" for value in given]
    condition.told.append(f"{one.column} {' or '.join(map(text_of, given))}")
    return [f"{column_name(one.column)} IN ({', '.join(names)})"]


def _named(condition: Condition, value: Any) -> str:
    name = f"v{len(condition.values)}"
    condition.values[name] = value
    return name


def _typed(one: Filter, value: Any) -> str | int | float | bool:
    if one.kind == "number":
        return _number(one, value)
    if one.kind == "integer":
        number = _number(one, value)
        if number == int(number):
            return int(number)
        raise VisitorMistake(f"the filter {one.column!r} takes whole numbers")
    if one.kind == "flag":
        flag = {"yes": True, "no": False}.get(value, value) if isinstance(value, str) else value
        if isinstance(flag, bool):
            return flag
    elif isinstance(value, str):
        return value
    raise VisitorMistake(f"the filter {one.column!r} takes {'yes or no' if one.kind == 'flag' else 'text'}")


def _number(one: Filter, value: Any) -> int | float:
    if isinstance(value, str):
        try:
            value = int(value) if value.strip("-").isdigit() else float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise VisitorMistake(f"the filter {one.column!r} takes numbers")
    return value


__all__ = [
    "Condition",
    "Filter",
    "VisitorMistake",
    "choices_of",
    "choose_filters",
    "condition_of",
    "kind_of",
    "require_columns",
    "text_of",
]
