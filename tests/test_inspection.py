"""A look at data before a run: which rows it takes, and what it finds on both sides of a split."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
from drawing import COUNT, NAMES, draw, json_lines, open_at, parquet, picture, records

from aliblip.data import inspection
from aliblip.data.inspection import decoded_sample, leakage, sample_rows


@pytest.mark.parametrize(("count", "places"), [(1, 8), (5, 2), (7, 3), (8, 8), (11, 4), (12, 3), (50, 8), (0, 8)])
def test_a_sample_comes_from_all_over_the_data(tmp_path, count, places):
    parquet(tmp_path / "train.parquet", range(COUNT))
    rows = [row.row for row in sample_rows(open_at(tmp_path), count, places)]
    assert len(rows) == min(count, COUNT) and rows == sorted(set(rows))
    if 1 < places <= count < COUNT:
        assert rows[0] == 0 and rows[-1] >= COUNT * (places - 1) // places


def test_samples_of_any_size_take_no_row_twice():
    for rows in range(1, 40):
        source = SimpleNamespace(num_rows=rows, read_range=range)
        for count in range(1, rows + 1):
            for places in range(1, count + 1):
                taken = list(sample_rows(source, count, places))
                assert taken == sorted(set(taken)) and len(taken) == count and taken[-1] < rows


def test_unusable_rows_of_a_sample_are_counted_by_reason(tmp_path):
    draw(tmp_path)
    (tmp_path / NAMES[3]).write_bytes(b"")
    (tmp_path / NAMES[4]).unlink()
    (tmp_path / "metadata.jsonl").write_text(json_lines(records("file_name")))
    sample = decoded_sample(open_at(tmp_path))
    assert (sample.rows, sample.unusable, sample.is_all) == (COUNT, 2, True)
    assert sum(sample.reasons.values()) == 2 and {"03.png", "04.png"} == set(sample.names.values())
    assert sample.sizes() == "5 px" and "03.png" in sample.told_reasons()


def sides(tmp_path, train: list[int], validation: list[int], kind: str):
    """Sources of rows that are drawn by their numbers, as Parquet files or as names of files in folders."""
    for split, rows in (("train", train), ("validation", validation)):
        folder = tmp_path / split
        if kind == "parquet":
            parquet(folder / f"{split}.parquet", [row % COUNT for row in rows])
        else:
            folder.mkdir()
            names = [f"{split}-{row}.png" for row in rows]
            for name, row in zip(names, rows, strict=True):
                (folder / name).write_bytes(picture(row))
            titles = [f"title {row}" for row in rows]
            (folder / "metadata.jsonl").write_text(json_lines(records("file_name", names=names, titles=titles)))
    return open_at(tmp_path / "train"), open_at(tmp_path / "validation", any_split=True, split="validation")


@pytest.mark.parametrize("kind", ["parquet", "folder"])
def test_equal_photos_are_found_whatever_they_are_called(tmp_path, kind):
    found = leakage(*sides(tmp_path, [0, 1, 2, 3, 4, 5], [4, 5, 6, 7], kind))
    assert (found.photos, found.compared, found.compared_with, found.is_all) == (2, 4, 6, True)
    assert len(found.photo_names) == 2
    nothing = leakage(
        *sides(tmp_path / "other", [0, 1, 2], [4, 5], kind) if (tmp_path / "other").mkdir() is None else ()
    )
    assert (nothing.photos, nothing.photo_names) == (0, ())


def test_files_are_read_only_where_sizes_are_equal(tmp_path, monkeypatch):
    train, validation = sides(tmp_path, [0, 1, 2], [4, 5], "folder")
    (tmp_path / "train" / "train-1.png").write_bytes(picture(1) + b"0" * 1000)
    read = []
    digest = inspection._digest
    monkeypatch.setattr(inspection, "_digest", lambda image: read.append(str(image)) or digest(image))
    leakage(train, validation)
    assert not any(name.endswith("train-1.png") for name in read) and len(read) == 4


def test_a_named_pipe_is_not_waited_for(tmp_path):
    train, validation = sides(tmp_path, [0, 1, 2], [4, 5], "folder")
    (tmp_path / "train" / "train-1.png").unlink()
    os.mkfifo(tmp_path / "train" / "train-1.png")
    (tmp_path / "validation" / "validation-4.png").write_bytes(b"")  # of the size that a pipe has
    assert leakage(train, validation).photos == 0


def test_data_on_other_machines_is_not_fetched(tmp_path, monkeypatch):
    train, validation = sides(tmp_path, [0, 1], [0, 1], "parquet")
    monkeypatch.setattr(inspection, "is_remote", lambda file: True)
    found = leakage(train, validation)
    assert (found.compared, found.compared_with, found.photos) == (0, 0, 0)
