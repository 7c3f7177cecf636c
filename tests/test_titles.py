"""Titles that are longer than the model reads are counted, and those that then look the same are told."""

import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from data_stub import MemorySource
from drawing import NAMES, draw, lines, open_at, pairs, parquet

from aliblip.data import titles
from aliblip.data.titles import look_at_titles, tell_cut_titles

LONG = " ".join(["red", "blue"] * 30)


def told_of(source, max_length=35) -> tuple[str, ...]:
    return tuple(look_at_titles(source, tiny.tokenizer(), max_length).cut_lines())


def test_the_share_of_cut_titles_is_told(tmp_path):
    draw(tmp_path)
    rows = [(name, f"{LONG} {tiny.WORDS[i]}" if i < 9 else "Red CUP") for i, name in enumerate(NAMES)]
    (tmp_path / "metadata.csv").write_text(lines(rows))
    share, alike = told_of(open_at(tmp_path))
    assert share == "  9 of 12 titles (75%) are longer than 35 tokens and are cut there (max_length)"
    assert alike.startswith(f"warning: {tmp_path} (train): 9 titles that are cut read like another one up to there")
    found = look_at_titles(open_at(tmp_path), tiny.tokenizer(), 35)
    assert (found.rows, found.titles, found.cut, found.alike) == (12, 12, 9, 9)
    # 60 words and one more, with [CLS] and [SEP]
    assert look_at_titles(open_at(tmp_path), tiny.tokenizer(), 62).cut == 9
    assert look_at_titles(open_at(tmp_path), tiny.tokenizer(), 63).cut == 0 and told_of(open_at(tmp_path), 63) == ()


def test_only_titles_that_differ_are_alike(tmp_path):
    draw(tmp_path)
    texts = [f"cup {LONG}"] * 4 + [f"CUP {LONG}"] * 2 + [f"{word} {LONG}" for word in tiny.WORDS[:6]]
    (tmp_path / "metadata.csv").write_text(lines(pairs(titles=texts)))
    (share,) = told_of(open_at(tmp_path))  # the same product again, or another beginning, is no confusion
    assert share.startswith("  12 of 12 titles (100%)")
    texts[0] = " ".join(["cup", *LONG.split()[:32]])  # which just fits
    (tmp_path / "metadata.csv").write_text(lines(pairs(titles=texts)))
    found = look_at_titles(open_at(tmp_path), tiny.tokenizer(), 35)
    assert (found.cut, found.alike) == (11, 5)


def test_titles_that_are_none_are_not_counted(tmp_path):
    draw(tmp_path)
    rows = [{"file_name": name, "caption": [LONG, None, "", 5][i % 4]} for i, name in enumerate(NAMES)]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert told_of(open_at(tmp_path)) == (
        "  3 of 3 titles looked at (100%) are longer than 35 tokens and are cut there (max_length)",
    )


@pytest.mark.parametrize("random_access", [True, False])
def test_of_much_data_some_places_are_looked_at(monkeypatch, random_access):
    monkeypatch.setattr(titles, "LOOKED_AT", 64)
    source = MemorySource([100] * 40)
    source.random_access = random_access
    found = look_at_titles(source, tiny.tokenizer(), 35)
    assert (found.rows, found.titles) == (4000, 64)
    assert {index for index, _, _ in source.reads} == {40 * place // 16 for place in range(16)}
    assert all(stop - start == 4 for _, start, stop in source.reads)
    if not random_access:
        assert all(start == 0 for _, start, _ in source.reads)
    one = MemorySource([1000])
    assert look_at_titles(one, tiny.tokenizer(), 35).titles == 64
    assert look_at_titles(MemorySource([3, 61]), tiny.tokenizer(), 35).titles == 64


def test_photos_are_not_decoded(tmp_path):
    photos = [b"no photo"] * 3
    pq.write_table(pa.table({"image": photos, "caption": [LONG, "a", "b"]}), tmp_path / "a.parquet")
    assert "1 of 3 titles" in told_of(open_at(tmp_path))[0]


def test_the_first_process_tells_and_nothing_there_ends_a_run(tmp_path, monkeypatch, capsys):
    parquet(tmp_path / "a.parquet", range(3))
    source = open_at(tmp_path)

    def fails(*args):
        raise OSError("the disk\nis gone")

    def look():
        return look_at_titles(source, tiny.tokenizer(), 3)

    tell_cut_titles(source, look)
    assert len(re.findall("3 of 3 titles", capsys.readouterr().out)) == 1
    told = []
    tell_cut_titles(source, look, told.append)
    assert len(told) == 2 and "3 of 3 titles" in told[0] and "3 titles that are cut read like" in told[1]
    monkeypatch.setattr(source, "read_range", fails)
    tell_cut_titles(source, look)
    assert "the length of titles was not looked at (the disk is gone)" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")
    tell_cut_titles(source, look)
    assert capsys.readouterr().out == ""
