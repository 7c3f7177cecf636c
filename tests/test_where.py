"""Filters: values go in quoted by their type, and what can't be used is told in one line."""

import datetime
import decimal

import numpy as np
import pyarrow as pa
import pytest
from gallery_case import unit_vectors, vector_table

from aliblip import Gallery
from aliblip.retrieval.where import filter_of, literal
from aliblip.runtime.mistakes import UsageError

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("price", pa.float64()),
        ("stock", pa.int64()),
        ("exact", pa.decimal128(5, 2)),
        ("size", pa.struct([("width", pa.int64())])),
        ("a b", pa.int64()),
    ]
)
HOSTILE = [
    *("it's", "' OR '1'='1", "'; DROP TABLE t; --", "\\", "\\'", "a\\'b", '"', "`", "%", "_", "--", "/*", "*/", ";"),
    *(":x", "::", "$1", "?", "", " ", "new\nline", "nul\0", "\N{GRINNING FACE}", "\u202e", "NULL", "TRUE", "' || '"),
]


@pytest.mark.parametrize(
    ("where", "values", "text"),
    [
        (None, None, None),
        ({}, None, None),
        ("price < :m", {"m": 5}, "(price < 5)"),
        ("price < :m AND id IN :ids", {"m": 2.5, "ids": ["a", "b"]}, "(price < 2.5 AND id IN ('a', 'b'))"),
        ("id = ':m' AND price::int < :m", {"m": 5}, "(id = ':m' AND price::int < 5)"),
        ('id = ":m" AND `a b` < :m', {"m": 5}, '(id = ":m" AND `a b` < 5)'),
        ("id = 'it''s :m' OR price = :m", {"m": 5}, "(id = 'it''s :m' OR price = 5)"),
        ({"id": "x", "price": ("<", 5)}, None, "`id` = 'x' AND `price` < 5"),
        ({"id": ["x", "y"]}, None, "`id` IN ('x', 'y')"),
        ({"id": ("!=", ["x"])}, None, "`id` NOT IN ('x')"),
        ({"id": []}, None, "false"),
        ({"id": ("not in", [])}, None, "true"),
        ({"id": None}, None, "`id` IS NULL"),
        ({"id": ("!=", None)}, None, "`id` IS NOT NULL"),
        ({"id": ("Not  LIKE", "a%")}, None, "`id` NOT LIKE 'a%'"),
        ({"a b": 1}, None, "`a b` = 1"),
        ({"size.width": (">=", 3)}, None, "`size`.`width` >= 3"),
        ({"stock": ("<", 1.5)}, None, "`stock` <= 1"),
        ({"stock": (">", -1.5)}, None, "`stock` >= -1"),
        ({"stock": 1.5}, None, "false"),
        ({"stock": ("!=", 1.5)}, None, "true"),
        ({"stock": 2.0}, None, "`stock` = 2"),
        ({"exact": ("<", 2.5)}, None, "`exact` < CAST('2.5' AS DECIMAL(5, 2))"),
    ],
)
def test_filters(where, values, text):
    assert filter_of(where, values, SCHEMA) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "TRUE"),
        (np.float32(0.5), "0.5"),
        (np.int64(7), "7"),
        (1e300, "1e+300"),
        (7.0, "7"),
        (-0.25, "-0.25"),
        (2**64 - 1, "18446744073709551615"),
        ("it's", "'it''s'"),
        (b"\x00\xff", "X'00ff'"),
        (datetime.date(2026, 1, 2), "date '2026-01-02'"),
        (datetime.datetime(2026, 1, 2, 3, 4, 5), "timestamp '2026-01-02 03:04:05'"),
        (decimal.Decimal("1.50"), "1.50"),
        ([1, "x"], "(1, 'x')"),
    ],
)
def test_literals(value, text):
    assert literal(value) == text


@pytest.mark.parametrize(
    ("where", "values", "message"),
    [
        ("price < :m", None, "names the value :m, and values has no 'm': none are given"),
        ("price < :m", {"n": 1}, "given are 'n'"),
        ("price < 3", {"m": 1}, "does not name the value :m"),
        ("  ", None, "the filter is empty.*the columns are id .string., price .double."),
        ("price < 3 -- and more", None, "holds a comment"),
        ("price < 3 /* and */", None, "holds a comment"),
        (7, None, "the filter is a int: give SQL text or a mapping"),
        (None, {"m": 1}, "values for a filter are given .'m'., and no filter"),
        ({"price": 1}, {"m": 1}, "in a mapping each value stands beside its column"),
        ({"colour": 1}, None, "the column 'colour', which is not there; the columns are"),
        ({"size.height": 1}, None, "the column 'size.height', which is not there"),
        ({"id.x": 1}, None, "the column 'id.x', which is not there"),
        ({"price": ("~", 1)}, None, "has the operator '~': give one of =, !="),
        ({"price": (1, 2, 3)}, None, "give a pair of an operator and a value"),
        ({"price": ("in", 1)}, None, "is 'in' 1: give a list"),
        ({"price": ("<", [1])}, None, "give one value"),
        ({"price": ("<", None)}, None, "compares by '<' with nothing"),
        ({"price": float("nan")}, None, "give a finite number"),
        ({"price": 2**70}, None, "more than 64 bits"),
        ({"price": object()}, None, "a filter takes text, numbers"),
        ({"price": [[]]}, None, "lists of them that are not empty"),
    ],
)
def test_mistakes(where, values, message):
    with pytest.raises(UsageError, match=message) as raised:
        filter_of(where, values, SCHEMA)
    assert "\n" not in str(raised.value)


def test_hostile_text_is_a_value_and_nothing_else(tmp_path):
    table = vector_table(unit_vectors(len(HOSTILE)), list(range(len(HOSTILE))), word=HOSTILE)
    gallery = Gallery.from_vectors(table, tmp_path / "g")
    for number, word in enumerate(HOSTILE):
        for where, values in (("word = :word", {"word": word}), ({"word": word}, None), ({"word": [word]}, None)):
            hits = gallery.search(unit_vectors(1), 99, where=where, values=values)[0]
            assert [hit["id"] for hit in hits] == [number], word
    assert gallery.remove(where={"word": "' OR '1'='1"}) == 1 and len(gallery) == len(HOSTILE) - 1


def test_names_of_columns_that_are_no_words(tmp_path):
    names = ["a b", "Grösse", "select", "a-b", "a'b", 'a"b', "A", "1"]
    table = vector_table(unit_vectors(3), [0, 1, 2], **{name: [0, 1, 2] for name in names})
    gallery = Gallery.from_vectors(table, tmp_path / "g")
    assert gallery.columns == names
    for name in names:
        assert [hit["id"] for hit in gallery.search(unit_vectors(1), 9, where={name: 1})[0]] == [1]
        assert [hit["id"] for hit in gallery.search(unit_vectors(1), 9, where=f"`{name}` > 1")[0]] == [2]
