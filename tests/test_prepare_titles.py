"""Titles as they come from shops, cleaned when asked; and what the data card says of them."""

import json

import numpy as np
import pytest
import torch
from prepare_case import draw, needs_prepare, rows_of
from transformers import AutoTokenizer

from aliblip.data.sources import open_source
from aliblip.data.wordpiece import train_wordpiece
from aliblip.prepare import main
from aliblip.training.tokenizer import tokenizer_bytes

pytestmark = needs_prepare


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Caf\u00c3\u00a9 mug", "Café mug"),
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("Tom &amp;amp; Jerry &lt;3", "Tom & Jerry <3"),
        ("<p>Red <b>mug</b></p><br/>large", "Red mug large"),
        ('<a href="x">mug</a><!-- no --><style>a {}</style>', "mug"),
        ("mug\u200b with\u00ad\ufeff handle", "mug with handle"),
        ("mug\u00a0 \t 500\u202fml", "mug 500 ml"),
        # What only looks like dirt.
        ("size < 5 and > 3", "size < 5 and > 3"),
        ("cable <M> to <F>", "cable <M> to <F>"),
        ("AT&T phone", "AT&T phone"),
        ("\u201cquoted\u201d \ufb01ne", "\u201cquoted\u201d \ufb01ne"),
        ("红色杯子，大号", "红色杯子，大号"),
        ("family \U0001f468\u200d\U0001f469\u200d\U0001f467", "family \U0001f468\u200d\U0001f469\u200d\U0001f467"),
        ("می\u200cخواهم", "می\u200cخواهم"),
    ],
)
def test_dirt_goes_and_words_stay(given, wanted):
    from aliblip.data.clean_titles import clean_markup

    assert clean_markup(given) == wanted
    assert clean_markup(wanted) == wanted


def test_keys_of_equal_and_of_nearly_equal_titles():
    from aliblip.data.clean_titles import title_key, words_key

    assert title_key(" Red  MUG") == title_key("red mug") != title_key("red mug!")
    assert words_key("Red mug, 2 pieces") == words_key("2 PIECES - mug red") != words_key("red mug, 3 pieces")
    assert words_key("Café") == words_key("cafe") and words_key("!!!") != words_key("???")


@pytest.fixture
def catalogue(tmp_path):
    flags = draw(tmp_path, 24, broken=0)
    rows = json.loads((tmp_path / "train.json").read_text())
    for i, row in enumerate(rows):
        row["caption"] = [f"<b>mug</b> {i} &amp; co", f"blue mug {i}", f"кружка {i}", "a " * 40 + str(i)][i % 4]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "mug", "blue", *map(str, range(24))]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    return [*flags, "--workers", "1", "--near_duplicates", "false"]


def test_titles_are_cleaned_on_request_and_kept_as_they_were(catalogue, tmp_path):
    main([*catalogue, "--output_dir", str(tmp_path / "as_is")])
    rows = rows_of(tmp_path / "as_is")
    assert rows[0]["caption"] == "<b>mug</b> 0 &amp; co" and "caption_given" not in rows[0]
    main([*catalogue, "--output_dir", str(tmp_path / "clean"), "--clean_titles", "true"])
    rows = rows_of(tmp_path / "clean")
    assert [rows[0]["caption"], rows[0]["caption_given"]] == ["mug 0 & co", "<b>mug</b> 0 &amp; co"]
    assert [rows[1]["caption"], rows[1]["caption_given"]] == ["blue mug 1", None]
    card = (tmp_path / "clean" / "README.md").read_text()
    assert "6 titles were cleaned" in card
    assert r"\<b\>mug\</b\> 0 \&amp; co | mug 0 \& co" in card


def test_the_card_tells_what_is_there(catalogue, tmp_path):
    flags = ["--split_by", "product", "--split_shares", "test=0.3", "--tokenizer_name", str(tmp_path / "vocab.txt")]
    main([*catalogue, "--output_dir", str(tmp_path / "out"), *flags, "--max_length", "20"])
    card = (tmp_path / "out" / "README.md").read_text()
    rows = {split: len(rows_of(tmp_path / "out", split)) for split in ("train", "test")}
    assert f"| train | {rows['train']} |" in card and f"| test | {rows['test']} |" in card
    assert "25.0% of the titles are cut off at 20 tokens" in card
    assert "25.0% differ from another title only in what is cut off" in card
    assert "| Latin | 75 |" in card and "| Cyrillic | 25 |" in card
    for heading in ("Splits", "Photos", "Titles", "Scripts", "Languages", "Duplicates"):
        assert f"## {heading}" in card
    page = (tmp_path / "out" / "card.html").read_text()
    assert "Some rows" in page and "кружка" in page and "<script" not in page


def test_a_tokenizer_is_learned_from_what_is_trained_on(catalogue, tmp_path, capsys):
    flags = ["--split_by", "product", "--split_shares", "test=0.3", "--train_tokenizer", "--clean_titles", "true"]
    main([*catalogue, "--output_dir", str(tmp_path / "out"), *flags, "--max_length", "20"])
    titles = [row["caption"] for row in rows_of(tmp_path / "out")]
    printed = capsys.readouterr().out
    assert f"learned from {len(titles)} titles of {len(titles)} rows" in printed and "0.00% of the tokens" in printed
    assert f"--tokenizer_name {tmp_path}/out/tokenizer" in printed.splitlines()[-1]
    kept = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    assert torch.equal(tokenizer_bytes(kept), tokenizer_bytes(train_wordpiece(titles)))
    assert "25.0% of the titles are cut off at 20 tokens" in (tmp_path / "out" / "README.md").read_text()
    # Training reads the shards, and takes the tokenizer for no table.
    source = open_source(data_dir=str(tmp_path / "out"), split="train")
    assert [row.text for row in source.read_range(0, source.num_rows)] == titles
    told = "\n".join(source.told)
    files = len(list((tmp_path / "out" / "data").glob("train-*")))
    assert "found: " in told and f"read: {files} of them, as README.md says" in told
    assert "left: files of the split 'test': 1 (data/test-00000-of-00001.parquet)" in told
    assert "files that README.md does not name: 5 (duplicates.parquet, rejected.parquet" in told


def test_alike_after_the_cut_is_that_of_the_obvious_way():
    from aliblip.data.prepare_card import _Titles

    rng = np.random.default_rng(0)
    ids = [[1, *rng.integers(0, 3, rng.integers(1, 7)).tolist(), 2] for _ in range(300)]
    titles = _Titles(4, lambda texts: [ids[int(text)] for text in texts], 300)
    titles.add([str(i) for i in range(300)], [None] * 300)
    alike = [any(a[:3] == b[:3] and a != b for b in ids) for a in ids]
    assert titles.alike() == pytest.approx(np.mean(alike))
