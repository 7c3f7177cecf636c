"""The competition's file: both forms, and one plain sentence for every mistake in it."""

from __future__ import annotations

import hashlib
import json
import os
from difflib import get_close_matches

import numpy as np
import pytest
import torch

from aliblip.retrieval import submission
from aliblip.retrieval.submission import read_submission, submission_rows, verify_submission, write_submission

TITLES = ["red cap", 'mug 12" "blue"', "чашка \u2028 杯子", "half an emoji \ud83d", "red cap"]
NAMES = [f"{number}.jpg" for number in range(9)] + [
    "it's.jpg",
    'a "b", c].jpg',
    "杯子.jpg",
    "back\\slash\n.jpg",
    "\udcff.jpg",
]


@pytest.fixture
def ids():
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(len(NAMES), generator=generator)[:12] for _ in TITLES])


@pytest.fixture
def rows(ids):
    return submission_rows(TITLES, NAMES, ids)


def verified(path, rows, titles=TITLES, names=NAMES, **options):
    path.write_text(json.dumps(rows))
    return verify_submission(path, titles, names, **options)


@pytest.mark.parametrize("stringified", [False, True])
def test_what_is_written_is_read_and_right(stringified, rows, ids, tmp_path):
    path = write_submission(tmp_path / "new" / "submission.json", rows, stringified)
    assert [file.name for file in path.parent.iterdir()] == ["submission.json"]
    assert read_submission(path) == rows
    assert verify_submission(path, TITLES, NAMES) == []
    stored = json.loads(path.read_text(encoding="ascii"))
    assert [list(row) for row in stored] == [["caption", "top5", "top10"]] * len(TITLES)
    for row, title, best in zip(stored, TITLES, ids.tolist(), strict=True):
        names = [NAMES[index] for index in best]
        expected = {"caption": title, "top5": names[:5], "top10": names[:10]}
        if stringified:
            expected |= {"top5": str(names[:5]), "top10": str(names[:10])}
        assert row == expected


def test_arrays_and_small_galleries(rows, ids, tmp_path):
    assert submission_rows(TITLES, NAMES, ids.numpy().astype(np.int32)) == rows
    few = submission_rows(["a"], NAMES[:3], np.array([[2, 0, 1]]))
    assert few == [{"caption": "a", "top5": ["2.jpg", "0.jpg", "1.jpg"], "top10": ["2.jpg", "0.jpg", "1.jpg"]}]
    assert verified(tmp_path / "few.json", few, ["a"], NAMES[:3]) == []
    seven = submission_rows(["a"], NAMES[:7], np.arange(7)[None])
    assert seven[0]["top5"] == NAMES[:5] and seven[0]["top10"] == NAMES[:7]
    assert submission_rows([], NAMES, torch.empty(0, 10, dtype=torch.int64)) == submission_rows([], [], []) == []
    path = write_submission(tmp_path / "none.json", [])
    assert json.loads(path.read_text()) == [] == verify_submission(path, [], NAMES) == read_submission(path)


@pytest.mark.parametrize(
    ("names", "ids", "message"),
    [
        (
            ["x.jpg", "y.jpg"] * 6,
            np.arange(12)[None],
            r"share a file name: 'x.jpg', 'y.jpg'; give every",
        ),
        (NAMES, np.arange(9)[None], r"shape \(1, 9\): 1 titles and 14 photos need \(1, 10 or more\)"),
        (NAMES, np.arange(10), r"shape \(10,\)"),
        (NAMES, np.tile(np.arange(10), (2, 1)), r"shape \(2, 10\)"),
        (NAMES, np.arange(10.0)[None], "type float64: give integers"),
        (NAMES, np.arange(5, 15)[None], "reach from 5 to 14, but the gallery has 14 photos"),
        (NAMES, np.arange(-1, 9)[None], "reach from -1 to 8"),
        (NAMES, np.array([[0, 1, 2, 3, 4, 5, 6, 7, 8, 3]]), "row 0 of the ids has a photo twice"),
    ],
)
def test_ids_that_do_not_fit_are_refused(names, ids, message):
    with pytest.raises(ValueError, match=message):
        submission_rows(["a title"], names, ids)


def change(key, value):
    return lambda row: row.update({key: value})


def swap(row):
    row["top10"][3], row["top10"][7] = row["top10"][7], row["top10"][3]


TEN = [f"{number}.jpg" for number in range(9)] + ["it's.jpg"]
OTHER_KEYS = "has other keys than caption, top5, top10:"
NO_START = "row 1: top5 is not the start of top10, they part at place"
MIXED = "9 lists stand as JSON lists and 1 as text: use one form for all"


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda row: row.pop("top5"), ["row 1 lacks top5"]),
        (lambda row: row.pop("caption"), ["row 1 lacks caption"]),
        (change("score", 3), [f"row 1 {OTHER_KEYS} 'score'"]),
        (lambda row: row.update(top_10=row.pop("top10")), [f"row 1 lacks top10 and {OTHER_KEYS} 'top_10'"]),
        (change("caption", "blue"), ["row 1 has the title 'blue', the data has 'mug 12\" \"blue\"'"]),
        (change("caption", None), ["row 1: the caption is not text but NoneType"]),
        (change("top5", TEN[:4]), ["row 1: top5 has 4 names instead of 5"]),
        (change("top10", [*TEN, "杯子.jpg"]), ["row 1: top10 has 11 names instead of 10"]),
        (change("top10", []), ["row 1: top10 has 0 names instead of 10", f"{NO_START} 1"]),
        (change("top10", 3), ["row 1: top10 is not a list but int"]),
        (change("top10", [*TEN[:9], None]), ["row 1: top10 holds None, which is no file name"]),
        (change("top10", [*TEN[:9], "8.jpg"]), ["row 1: top10 has '8.jpg' 2 times"]),
        (swap, [f"{NO_START} 4"]),
        (change("top5", str(TEN[:5])), [MIXED]),
        (change("top5", "0.jpg, 1.jpg"), [MIXED, "row 1: top5 is text that is no Python list: '0.jpg, 1.jpg'"]),
        (change("top5", "{'0.jpg'}"), [MIXED, "row 1: top5 is text that is no Python list: \"{'0.jpg'}\""]),
    ],
)
def test_every_mistake_is_one_sentence(edit, expected, rows, tmp_path):
    rows[1] = {"caption": TITLES[1], "top5": TEN[:5], "top10": list(TEN)}
    edit(rows[1])
    assert verified(tmp_path / "s.json", rows) == expected


@pytest.mark.parametrize(
    ("name", "closest"),
    [
        ("photos/it's.jpg", '"it\'s.jpg"'),
        ("IT'S.PNG", '"it\'s.jpg"'),
        ("it´s.jpg", '"it\'s.jpg"'),
        ("cafe\u0301.jpg", r"'caf\xe9.jpg'"),
        ("qqqqqqq", None),
    ],
)
def test_a_name_that_no_photo_has_comes_with_the_closest_one(name, closest, rows, tmp_path):
    rows[1] = {"caption": TITLES[1], "top5": [name, *TEN[:4]], "top10": [name, *TEN[:9]]}
    (problem,) = verified(tmp_path / "s.json", rows, names=[*NAMES, "caf\u00e9.jpg"])
    more = f"; the closest is {closest}" if closest else ""
    assert problem == f"row 1: {name!r} in top5 and top10 is no photo of the gallery{more}"


def test_titles_that_are_missing_or_in_another_order(rows, tmp_path):
    (problem,) = verified(tmp_path / "s.json", rows[1:])
    assert problem.startswith(
        "the file has 4 titles, the data has 5, and the first that differs: row 0 has the title 'mug"
    )
    assert verified(tmp_path / "s.json", rows[:-1]) == ["the file has 4 titles, the data has 5"]
    (problem,) = verified(tmp_path / "s.json", [rows[1], rows[0], *rows[2:]])
    assert problem.startswith("the titles are those of the data in another order, 2 differ: row 0 has the title 'mug")
    # equal titles: which of them is meant can't be told
    assert verified(tmp_path / "s.json", [rows[4], *rows[1:4], rows[0]]) == []


def test_titles_are_shown_where_they_differ(rows, tmp_path):
    long = "a very long title " * 20
    rows[0]["caption"] = f"{long}red{long}"
    (problem,) = verified(tmp_path / "s.json", rows, [f"{long}blue{long}", *TITLES[1:]])
    assert "title red" in problem and "title blue" in problem and len(problem) < 250
    rows[0]["caption"] = "cafe\u0301"
    (problem,) = verified(tmp_path / "s.json", rows, ["caf\u00e9", *TITLES[1:]])
    assert problem == r"row 0 has the title 'cafe\u0301', the data has 'caf\xe9'"


def test_only_the_first_problems_are_listed(rows, tmp_path):
    for row in rows:
        row["caption"] += "!"
    problems = verified(tmp_path / "s.json", rows, most=2)
    assert len(problems) == 3 and problems[0].startswith("row 0") and problems[2] == "and 3 more"
    assert len(verified(tmp_path / "s.json", rows, most=5)) == 5


def test_names_that_several_photos_have_are_a_problem_of_the_gallery(rows, tmp_path):
    (problem,) = verified(tmp_path / "s.json", rows, names=[*NAMES, "0.jpg"])
    assert problem == "photos of the gallery share a file name: '0.jpg'"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"[{]", "is not JSON"),
        (b"\xff\xfe\xfa", "is not JSON"),
        (b"[" * 200_000, "is not JSON"),
        (b'{"caption": "a"}', "is not a list of objects but dict"),
        (b"[3]", "row 0"),
        (b'[{"caption": "a", "top5": []}]', "row 0"),
        (b'[{"caption": null, "top5": [], "top10": []}]', "the caption is not text but NoneType"),
        (b'[{"caption": "a", "top5": [], "top10": [3]}]', "top10 holds 3"),
    ],
)
def test_files_that_are_no_submission(content, message, tmp_path):
    path = tmp_path / "s.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_submission(path)
    problems = verify_submission(path, ["a"], [])
    assert any(message in problem for problem in problems)


def test_files_that_are_missing_or_too_large(tmp_path, monkeypatch):
    assert "No such file" in verify_submission(tmp_path / "none.json", [], [])[0]
    with pytest.raises(FileNotFoundError):
        read_submission(tmp_path / "none.json")
    monkeypatch.setattr(submission, "MAX_FILE_BYTES", 2**20)
    assert "/dev/zero is no submission (it is a pipe or a device" in verify_submission("/dev/zero", [], [])[0]
    (tmp_path / "large.json").write_bytes(bytes(2**20 + 1))
    assert (
        "is no submission (it has 1,048,577 bytes, and at most 1,048,576 are read)"
        in verify_submission(tmp_path / "large.json", [], [])[0]
    )


@pytest.mark.parametrize(
    "hostile",
    [
        "__import__('os').system('touch {}')",
        "[open('{}', 'w').name]",
        "[" * 60_000,
        "-" * 60_000 + "1",
        "[" + "+1" * 30_000 + "]",
        "['a'] * 1000000000",
        "['a', 'b'",
        "\x00",
        "'" + "a" * 2**17 + "'",
    ],
)
def test_text_is_parsed_and_never_run(hostile, tmp_path):
    marker = tmp_path / "touched"
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"caption": "a", "top5": hostile.replace("{}", str(marker)), "top10": "[]"}]))
    (problem,) = verify_submission(path, ["a"], [])
    assert problem.startswith("row 0: top5 is ") and len(problem) < 150
    assert not marker.exists()
    with pytest.raises(ValueError, match="row 0: top5 is"):
        read_submission(path)


def test_a_failed_write_leaves_the_old_file(rows, tmp_path, monkeypatch):
    path = write_submission(tmp_path / "s.json", rows)
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write_submission(path, rows[:1])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_of_a_whole_competition_only_the_listed_names_are_looked_for_and_few_are_spelled_out(tmp_path, monkeypatch):
    names = [f"{hashlib.md5(str(number).encode()).hexdigest()}.jpg" for number in range(50_000)]
    titles = [f"title {number}" for number in range(2_000)]
    ids = (np.arange(len(titles))[:, None] * 17 + np.arange(10)) % len(names)
    path = write_submission(tmp_path / "s.json", submission_rows(titles, names, ids), stringified=True)
    compared = []

    def counted(name, candidates, n):
        compared.append(len(candidates))
        return get_close_matches(name, candidates, n)

    monkeypatch.setattr(submission.difflib, "get_close_matches", counted)
    assert verify_submission(path, titles, names) == []
    # all names unknown: only those that are listed may cost a look through the gallery
    problems = verify_submission(path, titles, [f"x{name}" for name in names], most=3)
    assert len(problems) == 4
    for problem, name in zip(problems[:3], names, strict=False):
        assert problem == f"row 0: {name!r} in top5 and top10 is no photo of the gallery; the closest is {'x' + name!r}"
    # a full comparison of one name's spelling with all takes up to 20 seconds
    assert compared == [50, 50, 50]
