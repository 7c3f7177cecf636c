"""Towers that start from a ViT and a BERT compute what these compute."""

from __future__ import annotations

import io
import json
import logging

import pytest
import tiny
import torch
from blip_stub import CLOSE, HOW, VOCABULARY, spoilt
from safetensors.torch import load_file, save_file
from transformers import BertModel, ViTModel

from aliblip.models.backbones import read_text_backbone, read_vision_backbone, start_from_backbone
from aliblip.runtime.mistakes import UsageError
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval


@torch.no_grad()
def test_towers_compute_what_their_backbones_compute(vit, bert):
    vision, text = read_vision_backbone(str(vit)), read_text_backbone(str(bert))
    assert vision.dropped == ["classifier.bias", "classifier.weight"]
    assert vision.pixel_statistics == {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    assert "embeddings.token_type_embeddings.weight[1]" in text.dropped
    assert any(name.startswith("cls.predictions") for name in text.dropped)
    torch.manual_seed(0)
    model = AliBlipForImageTextRetrieval(
        AliBlipConfig(vision_config=vision.config, text_config={**text.config, "vocab_size": VOCABULARY})
    ).eval()
    fresh = model.text_encoder.embeddings.word_embeddings.weight[-2:].clone()
    copied = start_from_backbone(model, vision) + start_from_backbone(model, text)
    assert (
        len(copied)
        == len(set(copied))
        == sum(
            name.startswith(("vision_model.", "text_encoder.")) and "crossattention" not in name
            for name in model.state_dict()
        )
    )
    batch = tiny.batch(image_size=16, vocab_size=VOCABULARY)
    expected = ViTModel.from_pretrained(vit, add_pooling_layer=False).eval()(batch["pixel_values"]).last_hidden_state
    torch.testing.assert_close(model.encode_image(batch["pixel_values"]), expected, **CLOSE)
    titles = batch["input_ids"], batch["attention_mask"]
    expected = BertModel.from_pretrained(bert, add_pooling_layer=False).eval()(*titles).last_hidden_state
    tokens = model.get_text_features(*titles).last_hidden_state
    torch.testing.assert_close(tokens * titles[1][..., None], expected * titles[1][..., None], **CLOSE)
    assert torch.equal(model.text_encoder.embeddings.word_embeddings.weight[-2:], fresh)


def test_what_is_left_out_is_told_once(vit, bert):
    """Not by transformers' table too, of which a user can't know what it means here."""
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    logging.getLogger("transformers").addHandler(handler)
    try:
        ViTModel.from_pretrained(vit, add_pooling_layer=False)
        table = told.getvalue()
        read_vision_backbone(str(vit))
        read_text_backbone(str(bert))
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert "classifier.weight" in table
    assert told.getvalue() == table


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("tower", ["vit", "bert"])
def test_a_backbone_that_does_not_fit_is_refused_by_name(how, tower, vit, bert, tmp_path):
    folder, read = (vit, read_vision_backbone) if tower == "vit" else (bert, read_text_backbone)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if "layer.1" in name and "query.weight" in name)
    save_file(spoilt(state, how, name), tmp_path / "model.safetensors", {"format": "pt"})
    # transformers tells its module's own name, which differs in prefix and from version to version
    named = {"missing": "missing: .*1.*q", "unexpected": "something.else", "of another shape": r"1.*q.*\(3, 5\)"}[how]
    with pytest.raises(UsageError, match=named):
        read(str(tmp_path))
    other = read_text_backbone if tower == "vit" else read_vision_backbone
    with pytest.raises(UsageError, match=f"is of model type '{tower}'"):
        other(str(tmp_path))


@pytest.mark.parametrize(
    ("tower", "fields", "message"),
    [
        (
            "vit",
            {"num_hidden_layers": 10**7},
            "num_hidden_layers is 10000000: it must be",
        ),
        ("vit", {"intermediate_size": 2**24}, r"a model of \d,\d\d\d,\d\d\d,\d\d\d parameters, its weights have"),
        ("vit", {"num_labels": 10**12}, "names 1,000,000,000,000 labels"),
        ("vit", {"hidden_act": "nope"}, "hidden_act is 'nope': it must be one of gelu, "),
        ("bert", {"vocab_size": 10**12}, "vocab_size is 1000000000000: it must be"),
        ("bert", {"type_vocab_size": 10**9}, r"a model of \d+,\d\d\d,\d\d\d,\d\d\d parameters, its weights have"),
    ],
)
def test_a_backbone_of_an_absurd_size_is_refused_before_it_is_built(tower, fields, message, vit, bert, tmp_path):
    folder, read = (vit, read_vision_backbone) if tower == "vit" else (bert, read_text_backbone)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | fields))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=message) as told:
        read(str(tmp_path))
    assert "\n" not in str(told.value)
