"""A WordPiece learned from titles: what it makes equal, what it can spell, and that it is the same everywhere."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import tiny
from helpers import environment
from languages import LANGUAGES, PRODUCTS, title
from transformers import AutoTokenizer, BertTokenizer

from aliblip.data.titles import FARTHEST, title_report
from aliblip.data.wordpiece import SMALLEST_VOCABULARY, train_wordpiece
from processing_aliblip import AliBlipProcessor

TITLES = [title(*product, language) for product in PRODUCTS for language in LANGUAGES]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([*TITLES, "हिन्दी कप", "ราคา ชา", "Ấm trà", "ёлка"] * 2)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("ＣＵＰ　１２", "cup 12"),  # full width
        ("ﬁne", "fine"),  # a ligature
        ("Hóngsè BĒIZI", "hongse beizi"),
        ("Lǜsè", "luse"),
        ("Ấm TRÀ", "am tra"),  # two marks on a letter
        ("İstanbul", "istanbul"),
        ("ЖЁЛТЫЙ", "желтый"),
        ("فِنْجَانٌ", "فنجان"),
        ("فنـــجان", "فنجان"),
        ("ﻓﻨﺠﺎﻥ", "فنجان"),  # presentation forms
        ("红色杯子", "红 色 杯 子"),
    ],
)
def test_what_is_written_in_several_ways_is_one(tokenizer, written, meant):
    assert tokenizer(written)["input_ids"] == tokenizer(meant)["input_ids"]


def test_marks_that_make_letters_stay(tokenizer):
    for one, other in (("синий", "синии"), ("हिन्दी", "हनद"), ("ราคา", "รคา")):
        assert tokenizer(one)["input_ids"] != tokenizer(other)["input_ids"]
    assert tokenizer.unk_token_id not in tokenizer("हिन्दी ราคา синий")["input_ids"]


def test_every_word_of_known_characters_can_be_spelled(tokenizer):
    rng, letters = (
        random.Random(0),
        sorted({c for word in TITLES for c in word.lower() if c.isalpha() and c < "\u0500"}),
    )
    words = ["".join(rng.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(12)) for _ in range(50)]
    words += ["".join(rng.choice(letters) for _ in range(9)) for _ in range(50)]
    assert not any(tokenizer.unk_token_id in tokenizer(word)["input_ids"] for word in words)
    assert tokenizer.unk_token_id in tokenizer("日")["input_ids"]  # never seen


def test_common_words_are_tokens_and_the_vocabulary_is_bounded():
    tokenizer = train_wordpiece(TITLES, vocab_size=400)
    assert len(tokenizer) <= 400 and len(train_wordpiece(TITLES, vocab_size=280)) <= 280
    assert len(train_wordpiece(["striped mug round lamp leather chair"] * 3, vocab_size=90 + 10)) == 100
    assert {"чашка", "فنجان", "hongse", "杯"} <= tokenizer.get_vocab().keys()
    assert max(tokenizer.get_vocab().values()) == len(tokenizer) - 1
    # Characters leave room for words: of many the common ones are taken.
    many = [chr(0x4E00 + i) * (2 if i < 100 else 1) for i in range(3000)]
    small = train_wordpiece([*many, "mug mug", "mug"], vocab_size=400)
    chosen = [token for token in small.get_vocab() if token[0] >= "\u4e00"]
    assert len(chosen) == 400 // 2 - 72 and all(ord(token) < 0x4E00 + 128 for token in chosen if len(token) == 1)
    with pytest.raises(ValueError, match="at least 100"):
        train_wordpiece(TITLES, vocab_size=SMALLEST_VOCABULARY - 1)


SCRIPT = """
import hashlib, sys
from aliblip.data.wordpiece import train_wordpiece
sys.path.insert(0, "tests")
from test_wordpiece import TITLES
print(hashlib.sha256(train_wordpiece(TITLES, int(sys.argv[1])).backend_tokenizer.to_str().encode()).hexdigest())
"""


@pytest.mark.parametrize("size", ["300", "30000"])  # with room for the commoner characters, and for all
def test_other_processes_learn_the_same_bytes(size):
    """Whatever their hash seeds and threads are."""
    found = set()
    for seed in ("1", "2"):
        env = environment(PYTHONHASHSEED=seed, RAYON_NUM_THREADS=seed, TOKENIZERS_PARALLELISM="true")
        command = [sys.executable, "-c", SCRIPT, size]
        found.add(subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout)
    assert len(found) == 1 and found.pop().strip()


def test_it_is_saved_and_loaded_as_any_tokenizer(tokenizer, tmp_path):
    AliBlipProcessor(tokenizer=train_wordpiece(TITLES)).save_pretrained(tmp_path)
    loaded = AliBlipProcessor.from_pretrained(tmp_path)
    plain = train_wordpiece(TITLES)
    for text in TITLES[:10]:
        assert loaded(text=[text])["input_ids"][0] == plain(text)["input_ids"]
    assert loaded.enc_token_id == len(plain) + 1
    assert AutoTokenizer.from_pretrained(tmp_path).tokenize("Hóngsè 杯子") == plain.tokenize("hongse 杯子")
    ids = plain("hongse")["input_ids"]
    assert (ids[0], ids[-1]) == (plain.cls_token_id, plain.sep_token_id)


def test_titles_are_not_looked_at_for_ever():
    titles = [" ".join(["red"] * 2000), "red чайник"]
    report = title_report(tiny.tokenizer(), titles, max_length=35)
    assert report.lengths.tolist() == [FARTHEST, 4] and (report.cut, report.unknown) == (1, 1)
    assert title_report(tiny.tokenizer(), titles, max_length=1000).cut == 1


def test_a_report_counts_tokens_unknown_ones_and_cut_titles():
    report = title_report(tiny.tokenizer(), ["red cup", "red чайник", "small blue cotton shirt"], max_length=5)
    assert report.lengths.tolist() == [4, 4, 6]
    assert (report.tokens, report.unknown, report.examples) == (8, 1, ("чайник",))
    assert report.cut == 1 and report.cut_share == pytest.approx(1 / 3)
    assert report.longest == 5 and report.mean == pytest.approx(13 / 3)
    nothing = title_report(tiny.tokenizer(), [], max_length=5)
    assert (nothing.cut, nothing.cut_share, nothing.unknown_share, nothing.longest) == (0, 0.0, 0.0, 5)
    assert not list(nothing.cut_lines())


def test_of_english_titles_it_is_bert_with_another_vocabulary():
    titles = ["sale: striped mug, 2 pcs", "Round Lamp (steel)", "mug-lamp & co. 'x'"] * 3
    tokenizer = train_wordpiece(titles, vocab_size=150)
    assert tokenizer(titles)["input_ids"] == BertTokenizer(vocab=tokenizer.get_vocab())(titles)["input_ids"]
