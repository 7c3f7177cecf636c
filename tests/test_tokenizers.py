"""Tokenizers of all kinds: tried on titles before anything is computed with them, and after saving and loading."""

from __future__ import annotations

import string

import pytest
import tiny
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AlbertTokenizer,
    AutoTokenizer,
    BertTokenizer,
    CLIPTokenizer,
    GPT2Tokenizer,
    MPNetTokenizer,
    PreTrainedTokenizerFast,
    RobertaTokenizer,
    XLMRobertaTokenizer,
)

from aliblip.models.loading import build_processor, load_pretrained
from aliblip.retrieval import model_folder
from aliblip.retrieval.model_folder import check_tokenizer
from aliblip.runtime.mistakes import UsageError
from processing_aliblip import AliBlipProcessor

LETTERS = string.ascii_lowercase
WORDS = [*tiny.WORDS, *LETTERS]
PIECES = [(f"\u2581{word}", -float(rank)) for rank, word in enumerate(WORDS, 1)] + [(c, -50.0) for c in LETTERS]


def numbered(*tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens)}


def pieces(*specials: str) -> list[tuple[str, float]]:
    return [(token, 0.0) for token in specials] + PIECES


def plain(template: bool = True, **specials: str) -> PreTrainedTokenizerFast:
    """A word list as somebody makes it with `tokenizers`."""
    made = Tokenizer(models.WordPiece(numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS), unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"} | specials
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


ACCEPTED = {
    "BERT": tiny.tokenizer,
    "BERT that pads on the left": lambda: BertTokenizer(vocab=tiny.tokenizer().get_vocab(), padding_side="left"),
    "XLM-R": lambda: XLMRobertaTokenizer(vocab=[*pieces("<s>", "<pad>", "</s>", "<unk>"), ("<mask>", 0.0)]),
    "RoBERTa": lambda: RobertaTokenizer(
        vocab=numbered("<s>", "<pad>", "</s>", "<unk>", "<mask>", *LETTERS, "\u0120"), merges=[]
    ),
    "MPNet": lambda: MPNetTokenizer(vocab=numbered("<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>", *WORDS)),
    "ALBERT": lambda: AlbertTokenizer(vocab=pieces("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")),
    "plain": plain,
}
REFUSED = {
    "no template": (lambda: plain(template=False), "writes a title as 'red cup', without \\[CLS\\] before"),
    "no padding": (lambda: plain(pad_token=None), "not a fast one with tokens for \\[CLS\\] and \\[PAD\\]"),
    "GPT-2": (lambda: GPT2Tokenizer(vocab=numbered("<|endoftext|>", *LETTERS), merges=[]), "not a fast one"),
    "CLIP": (
        lambda: CLIPTokenizer(
            vocab=numbered(*LETTERS, *(f"{c}</w>" for c in LETTERS), "<|startoftext|>", "<|endoftext|>"), merges=[]
        ),
        "not a fast one",
    ),
}
TITLES = ["red cup", "small blue lamp a b", "red " * 50]


@pytest.mark.parametrize("kind", ACCEPTED)
def test_an_accepted_tokenizer_begins_titles_with_its_cls_now_and_after_saving_and_loading(tmp_path, kind):
    ACCEPTED[kind]().save_pretrained(tmp_path / "given")
    processor = build_processor(str(tmp_path / "given"))
    batch = processor(text=TITLES)
    assert {ids[0] for ids in batch["input_ids"]} == {processor.tokenizer.cls_token_id}
    processor.save_pretrained(tmp_path / "saved")
    again = AliBlipProcessor.from_pretrained(tmp_path / "saved")
    assert again(text=TITLES) == batch and again.enc_token_id == processor.enc_token_id
    vocabulary = processor.tokenizer.get_vocab()
    assert vocabulary["[ENC]"] == len(processor.tokenizer) - 1 == vocabulary["[DEC]"] + 1


@pytest.mark.parametrize("kind", REFUSED)
def test_a_tokenizer_that_would_cost_a_word_is_refused_in_one_line(tmp_path, kind):
    make, message = REFUSED[kind]
    make().save_pretrained(tmp_path / "given")
    with pytest.raises(UsageError, match=message) as told:
        build_processor(str(tmp_path / "given"))
    assert "\n" not in str(told.value)


def test_the_tokenizer_of_a_model_folder_is_tried_too(tmp_path):
    processor = AliBlipProcessor(tokenizer=plain(template=False))
    tiny.model(vocab_size=len(processor.tokenizer)).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="without \\[CLS\\] before"):
        load_pretrained(str(tmp_path))


def test_a_tokenizer_that_comes_back_as_another_is_refused_before_anything_is_trained(monkeypatch):
    class Another:
        @staticmethod
        def from_pretrained(folder, **options):
            return plain(cls_token="[SEP]") if options == {"trust_remote_code": False} else None

    monkeypatch.setattr(model_folder, "AutoTokenizer", Another)
    processor = AliBlipProcessor(tokenizer=tiny.tokenizer())
    with pytest.raises(UsageError, match=r"'red cup' as '\[CLS\] red cup \[SEP\]', then as '\[CLS\] red cup \[SEP\]'"):
        check_tokenizer("it", processor)  # other ids under the same names


def test_no_token_types_whoever_calls_the_tokenizer(tmp_path):
    processor = tiny.processor()
    processor.save_pretrained(tmp_path)
    for tokenizer in (processor.tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert set(tokenizer(["red cup", "lamp"], padding=True)) == {"input_ids", "attention_mask"}


def test_titles_padded_on_the_left_are_refused_where_they_come_from():
    processor = tiny.processor()
    model = tiny.model(vocab_size=len(processor.tokenizer)).eval()
    expected = processor(text=TITLES, return_tensors="pt")
    with pytest.raises(ValueError, match="padding_side is 'left'"):
        processor(text=TITLES, padding_side="left")
    processor.tokenizer.padding_side = "left"
    again = processor(text=TITLES, return_tensors="pt")
    assert torch.equal(again["input_ids"], expected["input_ids"])
    raw = processor.tokenizer(TITLES[:2], padding=True, padding_side="left", return_tensors="pt")
    with pytest.raises(ValueError, match="padded on the left"):
        model.get_text_features(**raw)
