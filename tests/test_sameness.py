"""What differs between facts of then and now, and how it is told."""

from __future__ import annotations

import json
from pathlib import Path

from aliblip.runtime.sameness import Change, changes, told, way_back


def test_facts_that_differ_in_the_order_of_now():
    before = {"seed": 42, "rows": 10, "gone": "x"}
    now = {"rows": 11, "seed": 42, "new": True}
    assert changes(before, now) == [Change("rows", 10, 11), Change("new", None, True), Change("gone", "x", None)]
    assert changes(before, now, ["gone", "seed"]) == [Change("gone", "x", None)]
    assert changes(before, dict(before)) == []


def test_a_file_gives_back_what_was_written_into_it():
    now = {"file": Path("a/b"), "size": (224, 224), "rate": 1e-5, "nested": {"k": (1, None)}}
    before = json.loads(json.dumps(now, default=str))
    assert before != now and changes(before, now) == []
    assert changes(before, {**now, "size": (224, 384)}) == [Change("size", [224, 224], [224, 384])]


def test_a_fact_that_is_not_there_is_none():
    assert changes({}, {"limit": None}) == []
    assert str(changes({}, {"limit": 0})[0]) == "limit was none, is 0"


def test_sentences():
    changed = changes({"a": 1, "b": "cosine", "c": False}, {"a": 2, "b": "linear", "c": True})
    assert told(changed) == "a was 1, is 2; b was cosine, is linear; c was false, is true"
    assert told(changed, most=1) == "a was 1, is 2; and 2 more"
    assert told([]) == ""
    assert told(["a.parquet is gone"]) == "a.parquet is gone"


def test_the_flags_that_bring_the_facts_back():
    flags = {"seed": "--seed", "window": "--shuffle_window", "limit": "--limit"}
    changed = changes({"window": 4096, "seed": 42, "rows": 5}, {"seed": 7, "window": 16, "rows": 6, "limit": 3})
    assert way_back(changed, flags) == "--seed 42 --shuffle_window 4096"  # nothing sets rows, and limit had no value
    assert way_back(changes({"rows": 5}, {"rows": 6}), flags) == ""
