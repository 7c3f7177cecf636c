"""The processor: the pixels of transformers' BLIP through Pillow, the tokens of BLIP."""

from __future__ import annotations

import os

import numpy as np
import pytest
import tiny
import torch
from helpers import ROOT
from PIL import Image
from transformers import BertTokenizer, BlipImageProcessorPil

import aliblip  # noqa: F401  (registers the configuration, so that the saved folder needs no trust_remote_code)
from processing_aliblip import AliBlipProcessor

VOCABULARY = os.environ.get("ALIBLIP_VOCABULARY", str(ROOT.parent / "shared" / "tokenizer" / "vocab.txt"))
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def photo(width: int = 50, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_pixels_are_a_bicubic_square_with_clip_statistics():
    pixels = tiny.processor()(images=[photo()], return_tensors="pt")["pixel_values"]
    square = np.asarray(photo().resize((32, 32), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    expected = torch.from_numpy((square - np.array(MEAN)) / np.array(STD)).permute(2, 0, 1).float()
    assert pixels.shape == (1, 3, 32, 32) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[0], expected, rtol=0, atol=1e-5)


class FromTorchvision:
    """A processor as transformers gives it where torchvision is installed."""

    def to_dict(self):
        return {
            "size": {"height": 40, "width": 40},
            "image_mean": [0.5] * 3,
            "image_processor_type": "BlipImageProcessor",
        }


def test_another_backend_is_replaced_by_pillow_with_its_settings():
    processor = AliBlipProcessor(FromTorchvision(), tiny.tokenizer())
    assert type(processor.image_processor) is BlipImageProcessorPil
    assert processor.image_size == 40 and list(processor.image_processor.image_mean) == [0.5] * 3


def test_titles_are_padded_to_the_longest_and_cut_at_max_length():
    processor = tiny.processor()
    batch = processor(text=["red cup", "small blue steel lamp", "red " * 60], return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape == (3, 35)
    assert batch["attention_mask"].sum(1).tolist() == [4, 6, 35]
    assert (batch["input_ids"][:, 0] == processor.tokenizer.cls_token_id).all()
    short = processor(text=["red cup"], padding="max_length", max_length=10, return_tensors="pt")
    assert short["input_ids"].shape == (1, 10)
    assert processor(text=["red " * 60], text_kwargs={"max_length": 8}, return_tensors="pt")["input_ids"].shape == (
        1,
        8,
    )


def test_round_trip(tmp_path):
    processor = tiny.processor()
    processor.max_length = 12
    processor.save_pretrained(tmp_path)
    again = AliBlipProcessor.from_pretrained(tmp_path)
    assert type(again.image_processor) is BlipImageProcessorPil
    assert (again.max_length, again.image_size, again.enc_token_id) == (12, 32, processor.enc_token_id)
    inputs = {"images": [photo()], "text": ["red cotton shirt"], "return_tensors": "pt"}
    first, second = processor(**inputs), again(**inputs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_added_tokens_are_added_once():
    processor = tiny.processor()
    size = len(processor.tokenizer)
    again = AliBlipProcessor(processor.image_processor, processor.tokenizer)
    assert len(again.tokenizer) == size == 5 + len(tiny.WORDS) + 2
    assert processor.enc_token_id == size - 1
    assert processor.tokenizer.convert_tokens_to_ids("[DEC]") == size - 2


def test_wrong_settings_are_refused():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        AliBlipProcessor(BlipImageProcessorPil())
    with pytest.raises(ValueError, match="max_length is 2"):
        AliBlipProcessor(tokenizer=tiny.tokenizer(), max_length=2)


@pytest.mark.skipif(not os.path.isfile(VOCABULARY), reason=f"no BERT vocabulary at {VOCABULARY} (ALIBLIP_VOCABULARY)")
def test_ids_of_the_bert_vocabulary_are_blips():
    processor = AliBlipProcessor(tokenizer=BertTokenizer(vocab=VOCABULARY))
    assert processor.tokenizer.convert_tokens_to_ids("[DEC]") == 30522
    assert processor.enc_token_id == 30523 and len(processor.tokenizer) == 30524
    ids = processor(text=["a red T-shirt"])["input_ids"][0]
    assert ids == [101, 1037, 2417, 1056, 1011, 3797, 102]
