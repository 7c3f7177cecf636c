"""Files of other people have the form that their readers take for granted, or are refused with the place."""

from __future__ import annotations

import pytest

from aliblip.runtime.forms import NUMBER, Each, check_form
from aliblip.runtime.mistakes import UsageError

FORM = {"rows": int, "name?": str, "both?": (NUMBER, NUMBER), "counts": Each({"n": int}), "files?": list}
GOOD = {"rows": 3, "counts": {"a": {"n": 1, "more": None}}}


@pytest.mark.parametrize(
    "change", [{}, {"name": "x"}, {"both": [1, 0.5]}, {"counts": {}}, {"files": [{}]}, {"unknown": object}]
)
def test_what_has_the_form_is_accepted(change):
    check_form(GOOD | change, FORM, "no ({})")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "it is a list and no names with values"),
        ({}, "rows is missing"),
        (GOOD | {"rows": "3"}, "rows is a str and no int"),
        (GOOD | {"rows": True}, "rows is a bool and no int"),
        (GOOD | {"rows": None}, "rows is a NoneType and no int"),
        (GOOD | {"name": None}, "name is a NoneType and no str"),
        (GOOD | {"both": [1]}, "both is no list of 2 values"),
        (GOOD | {"both": [1, float("nan")]}, r"both\[1\] is not a finite number"),
        (GOOD | {"both": [False, 1]}, r"both\[0\] is not a finite number"),
        (GOOD | {"counts": {"a": {}}}, "counts.a.n is missing"),
        (GOOD | {"counts": {"a": {"n": 1.5}}}, "counts.a.n is a float and no int"),
    ],
)
def test_what_has_another_form_is_refused_with_the_place(value, problem):
    with pytest.raises(UsageError, match=rf"^no \({problem}\)$"):
        check_form(value, FORM, "no ({})")
