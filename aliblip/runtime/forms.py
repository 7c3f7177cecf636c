"""Whether a JSON file, which may come from somebody else, has the form that its reader takes for granted.

    check_form(read_json(path), {"rows": int, "name?": str, "counts": Each(int)}, f"{path} is not what a run writes {}")

A form is a type; NUMBER, a finite one; {name: form}, where a name with ? may be missing and others may stand beside;
Each(form), under whatever names; or a tuple of forms, for a list of so many values. What is checked here need not be
guarded by an `except` around its readers, which would take their own faults for those of the file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from aliblip.runtime.mistakes import UsageError

__all__ = ["NUMBER", "Each", "check_form"]

NUMBER = "a finite number"


@dataclass(frozen=True)
class Each:
    """Names with values of one form."""

    form: Any


def check_form(value: Any, form: Any, told: str) -> None:
    """Refuse a value of another form.

    Args:
        told: the message, `{}` for what is wrong and where.

    Raises:
        UsageError: it has another form.
    """
    if problem := _problem(value, form, ""):
        raise UsageError(told.replace("{}", problem))


def _problem(value: Any, form: Any, place: str) -> str | None:
    if form == NUMBER:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if is_number and math.isfinite(value) else f"{place or 'it'} is not {NUMBER}"
    if isinstance(form, type):
        is_of_it = isinstance(value, form) and (form is bool or not isinstance(value, bool))
        return None if is_of_it else f"{place or 'it'} is a {type(value).__name__} and no {form.__name__}"
    if isinstance(form, tuple):
        if not isinstance(value, list) or len(value) != len(form):
            return f"{place or 'it'} is no list of {len(form)} values"
        return _first(
            _problem(one, inner, f"{place}[{i}]") for i, (one, inner) in enumerate(zip(value, form, strict=True))
        )
    if not isinstance(value, dict):
        return f"{place or 'it'} is a {type(value).__name__} and no names with values"
    before = f"{place}." if place else ""
    if isinstance(form, Each):
        return _first(_problem(one, form.form, f"{before}{name}") for name, one in value.items())
    return _first(_problem_of_one(value, name, inner, before) for name, inner in form.items())


def _problem_of_one(value: dict[str, Any], name: str, form: Any, before: str) -> str | None:
    key = name.removesuffix("?")
    if key not in value:
        return None if name.endswith("?") else f"{before}{key} is missing"
    return _problem(value[key], form, f"{before}{key}")


def _first(problems: Iterable[str | None]) -> str | None:
    return next((problem for problem in problems if problem), None)
