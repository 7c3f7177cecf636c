"""Splits of a prepared catalogue: no product, and no duplicate of a photo, stands on two sides."""

import json
from collections import defaultdict
from datetime import datetime

import numpy as np
import pytest
from prepare_case import draw, encoded, needs_prepare, picture, rejected_of, rows_of

from aliblip.data.prepare_arguments import shares_of
from aliblip.data.prepare_splits import as_named, by_product, by_time, split_of_value, time_of_value
from aliblip.prepare import main
from aliblip.runtime.mistakes import UsageError

pytestmark = needs_prepare


@pytest.fixture(autouse=True)
def without_languages(monkeypatch):
    monkeypatch.setattr("aliblip.data.prepare_card._Titles.languages", lambda titles: ())


def prepare(output, *flags):
    return main([*map(str, flags), "--output_dir", str(output), "--workers", "1"])


def keys_of(groups, rows, seed=0):
    return np.random.default_rng(seed).integers(0, groups, rows) * 7919 - 10**12


def sides_of_groups(keys, side):
    found = defaultdict(set)
    for key, where in zip(keys.tolist(), side.tolist(), strict=True):
        found[key].add(where)
    return found


def test_a_product_is_on_one_side_and_stays_there_as_the_catalogue_grows():
    keys = keys_of(2000, 6000)
    sides = by_product(keys, {"validation": 0.1, "test": 0.2}, seed=3)
    found = sides_of_groups(keys, sides.side)
    assert all(len(where) == 1 for where in found.values())
    shares = np.bincount(sides.side) / len(keys)
    assert sides.names == ["train", "validation", "test"] and abs(shares - [0.7, 0.1, 0.2]).max() < 0.03
    more = np.concatenate([keys_of(5000, 9000, seed=1), keys])
    grown = by_product(more, {"validation": 0.1, "test": 0.2}, seed=3)
    assert (grown.side[9000:] == sides.side).all()
    assert (by_product(keys, {"validation": 0.1, "test": 0.2}, seed=4).side != sides.side).any()


def test_the_newest_products_are_held_out():
    keys, rng = keys_of(300, 1000), np.random.default_rng(0)
    times = rng.uniform(0, 1e9, 1000)
    times[::100] = np.nan
    sides = by_time(keys, times, {"validation": 0.1, "test": 0.2})
    there = ~np.isnan(times)
    assert (sides.side[~there] == -1).all() and set(sides.reasons) == set(np.flatnonzero(~there).tolist())
    assert all(len(where) == 1 for where in sides_of_groups(keys[there], sides.side[there]).values())
    oldest = {key: times[there][keys[there] == key].min() for key in keys[there].tolist()}
    by_side = [[oldest[key] for key in set(keys[there][sides.side[there] == side].tolist())] for side in range(3)]
    assert max(by_side[0]) <= min(by_side[1]) and max(by_side[1]) <= min(by_side[2])
    assert abs((sides.side == 2).sum() / there.sum() - 0.2) < 0.02


def test_what_leaks_between_given_splits_is_rejected_or_moved():
    keys = np.array([1, 1, 2, 2, 3, 4, 4, 4])
    named = ["train", "test", "validation", "train", "train", "validation", "test", None]
    kept = as_named(keys, named, "reject")
    place = {name: number for number, name in enumerate(kept.names)}
    assert [None if side < 0 else kept.names[side] for side in kept.side] == [
        *(None, "test", "validation", None, "train", None, "test", None)
    ]
    assert kept.reasons[0] == "the product, or a duplicate of the photo, is in the split 'test'"
    assert kept.reasons[7] == "the row names no split"
    moved = as_named(keys, named, "train")
    assert moved.side.tolist() == [place["train"]] * 7 + [-1]
    assert kept.told and moved.told


def test_dates_in_any_form_and_names_of_splits():
    day = datetime.fromisoformat("2024-01-31T00:00:00+00:00").timestamp()
    for value in ("2024-01-31", "20240131", "2024-01-31T00:00:00Z", day, str(day), day * 1000, datetime(2024, 1, 31)):
        assert time_of_value(value) == day, value
    assert all(np.isnan(time_of_value(value)) for value in (None, "", "soon", True, []))
    assert [split_of_value(value) for value in ("Val", "dev", " training ", "season_1", "", None)] == [
        *("validation", "validation", "train", "season_1", None, None)
    ]
    with pytest.raises(UsageError, match="can't be a split"):
        split_of_value("../up")


@pytest.mark.parametrize("text", ["test", "test=2", "train=0.1", "test=0.6,validation=0.5", ""])
def test_shares_that_are_none_are_refused(text):
    with pytest.raises(UsageError, match="--split_shares"):
        shares_of(text)


def test_a_split_that_would_be_empty_is_refused():
    with pytest.raises(UsageError, match="the split 'test' stays empty"):
        by_product(np.zeros(10, np.int64), {"test": 0.01}, seed=0)


def test_duplicates_of_a_photo_follow_it_though_their_products_differ(tmp_path):
    """Every product has a second one with the same photo, compressed once more."""
    flags = draw(tmp_path, 60, broken=0, products=1)
    rows = json.loads((tmp_path / "train.json").read_text())
    for i in range(60):
        (tmp_path / "photos" / f"copy{i}.jpg").write_bytes(encoded(picture(i), 40))
        rows.append({"product": f"copy{i}.jpg", "caption": f"copy {i}", "product_id": f"Q{i}"})
    (tmp_path / "train.json").write_text(json.dumps(rows))
    prepare(tmp_path / "out", *flags, "--split_by", "product", "--split_shares", "validation=0.3,test=0.3")
    splits = ("train", "validation", "test")
    sides = {row["source_row"]: split for split in splits for row in rows_of(tmp_path / "out", split)}
    assert len(sides) == 120 and set(sides.values()) == set(splits)
    assert all(sides[i] == sides[60 + i] for i in range(60))


def test_splits_by_column_and_by_files(tmp_path):
    flags = draw(tmp_path, 30, broken=0, products=1)
    rows = json.loads((tmp_path / "train.json").read_text())
    for i, row in enumerate(rows):
        row["part"] = ["train", "train", "dev"][i % 3]
    rows[1]["product_id"] = rows[2]["product_id"]  # which is in dev
    (tmp_path / "train.json").write_text(json.dumps(rows))
    prepare(tmp_path / "column", *flags, "--split_by", "column", "--split_column", "part")
    assert [row["source_row"] for row in rows_of(tmp_path / "column", "validation")] == list(range(2, 30, 3))
    assert rejected_of(tmp_path / "column") == {
        1: "the product, or a duplicate of the photo, is in the split 'validation'"
    }

    (tmp_path / "train.json").write_text(json.dumps(rows[:20]))
    (tmp_path / "test.json").write_text(json.dumps(rows[20:]))
    prepare(tmp_path / "files", *flags, "--test_file", tmp_path / "test.json")
    assert [row["source_row"] for row in rows_of(tmp_path / "files", "test")] == list(range(20, 30))
    with pytest.raises(UsageError, match="the data has no column 'parts'"):
        prepare(tmp_path / "wrong", *flags, "--split_by", "column", "--split_column", "parts")


def test_a_split_that_comes_to_be_called_otherwise_is_told(tmp_path, capsys):
    draw(tmp_path / "data", 6, broken=0, products=1)
    (tmp_path / "data/train.json").rename(tmp_path / "data/test.json")
    prepare(tmp_path / "out", "--data_dir", tmp_path / "data")
    told = "data has one split, 'test': it is prepared as 'train' (--split_names test keeps its name)"
    assert told in capsys.readouterr().out
    prepare(tmp_path / "own", "--data_dir", tmp_path / "data", "--split_names", "test")
    assert "is prepared as" not in capsys.readouterr().out and len(rows_of(tmp_path / "own", "test")) == 6


def test_splits_by_time(tmp_path):
    flags = draw(tmp_path, 30, broken=0, products=1)
    rows = json.loads((tmp_path / "train.json").read_text())
    for i, row in enumerate(rows):
        row["added"] = f"2024-03-{30 - i:02d}"
    (tmp_path / "train.json").write_text(json.dumps(rows))
    given = ["--split_by", "time", "--split_column", "added", "--split_shares", "validation=0.1,test=0.2"]
    prepare(tmp_path / "out", *flags, *given)
    assert [row["source_row"] for row in rows_of(tmp_path / "out", "test")] == list(range(6))
    assert [row["source_row"] for row in rows_of(tmp_path / "out", "validation")] == [6, 7, 8]
