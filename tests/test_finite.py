"""What has no order is refused with its place: NaN and infinite values in weights, features and match logits."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import tiny
import torch
from evaluation_fixtures import flags, retrieve
from safetensors.torch import load_file, save_file

from aliblip import Gallery
from aliblip.retrieval import evaluation
from aliblip.runtime.arguments import check_range
from aliblip.runtime.mistakes import UsageError
from encoder_aliblip import Encoder
from gallery_aliblip import MemoryGallery
from modeling_aliblip import AliBlipForImageTextRetrieval
from pipeline_aliblip import AliBlipImageTextRetrievalPipeline

VALUES = [torch.nan, torch.inf, -torch.inf]


def broken(model, name, value, where=(0,)):
    """A copy of a model with one wrong number."""
    made = copy.deepcopy(model).eval()
    with torch.no_grad():
        made.get_parameter(name)[where] = value
    return made


@pytest.mark.parametrize("value", VALUES)
def test_weights_that_are_not_finite_are_told_at_load_with_their_names(
    value, model_folder, catalogue, tmp_path, run_script
):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["itm_head.weight"][1, 3] = value
    weights["vision_proj.bias"][0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"weights of .* are not finite: .*itm_head\.weight"):
        AliBlipForImageTextRetrieval.from_pretrained(folder)
    with pytest.raises(UsageError, match=r"can't load the model .* not finite: .*vision_proj\.bias"):
        run_script(*flags(folder, catalogue, tmp_path / "out"))
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("value", VALUES)
def test_an_evaluation_says_the_row_and_the_weights(value, model, loader):
    with pytest.raises(UsageError, match=r"match logit of the photo of row \d+ with the title of row \d+ is not fin"):
        retrieve(broken(model, "itm_head.weight", value, (1, 0)), loader)
    with pytest.raises(UsageError, match=r"photo of row 0 are not finite: .* are not: vision_proj\.weight"):
        retrieve(broken(model, "vision_proj.weight", value), loader)
    # the evaluation in the middle of a training, which has no names of files
    with pytest.raises(UsageError, match=r"itm_head\.bias"):
        evaluation.evaluate_retrieval(
            broken(model, "itm_head.bias", value, (1,)), loader, model_name="m", dataset_name="d", split="s", k_rerank=2
        )


def test_one_word_is_enough_and_its_title_is_found(model, loader, catalogue, processor):
    lines = [json.loads(line) for line in (catalogue / "validation" / "metadata.jsonl").read_text().splitlines()]
    word = processor.tokenizer.convert_tokens_to_ids("pink")
    first = next(row for row, line in enumerate(lines) if "pink" in line["caption"].split())
    assert first > 0
    worse = broken(model, "text_encoder.embeddings.word_embeddings.weight", torch.nan, (word,))
    with pytest.raises(UsageError, match=rf"features of the title of row {first} are not finite: .*word_embeddings"):
        retrieve(worse, loader)


def test_weights_too_large_for_their_type_are_another_matter(model, loader):
    halved = copy.deepcopy(model)
    with torch.no_grad():
        halved.vision_proj.weight.mul_(1e30)
        halved.vision_proj.bias.fill_(3e38)
        halved.vision_proj.weight[0] = 3e38
    with pytest.raises(UsageError, match="its weights are, so its precision is not enough"):
        retrieve(halved, loader)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_settings_are_finite_too(value):
    with pytest.raises(UsageError, match=f"--fusion_weight is {value}: it must be a finite number"):
        check_range(fusion_weight=(value, 0, None))
    pipe = AliBlipImageTextRetrievalPipeline(
        model=tiny.spread_model(vocab_size=len(tiny.tokenizer()) + 2), processor=tiny.processor()
    )
    with pytest.raises(ValueError, match="fusion_weight is .*: give a number of at least 0"):
        pipe("red cup", gallery=["blue cup"], fusion_weight=value)


def test_galleries_and_the_pipeline_refuse(tmp_path):
    model, processor = tiny.spread_model(vocab_size=len(tiny.tokenizer()) + 2), tiny.processor()
    paths = tiny.photos(tmp_path / "photos", 3)
    pipe = AliBlipImageTextRetrievalPipeline(model=model, processor=processor)
    gallery = MemoryGallery.build(pipe.encoder, paths)
    with pytest.raises(ValueError, match="queries are not all finite"):
        gallery.search(torch.full((1, 16), torch.nan), 2)
    with pytest.raises(ValueError, match="vectors are not all finite"):
        MemoryGallery(torch.full((1, 16), torch.inf), [{"id": 1}])
    worse = broken(model, "vision_proj.weight", torch.nan)
    with pytest.raises(ValueError, match=r"vectors of photos are not all finite: .*vision_proj\.weight"):
        MemoryGallery.build(Encoder(worse, processor), paths)
    with pytest.raises(UsageError, match=r"photo of row 0 .*are not finite: .*vision_proj\.weight"):
        Gallery.build(paths, str(tmp_path / "gallery"), model=worse, processor=processor)
    assert not (tmp_path / "gallery").exists() or not list((tmp_path / "gallery").glob("items.lance/_versions/*"))
    for name, told in (("text_proj.bias", "vectors of the queries"), ("itm_head.bias", "match logits")):
        worse = broken(model, name, torch.nan)
        pipe = AliBlipImageTextRetrievalPipeline(model=worse, processor=processor)
        gallery.model = pipe.encoder.fingerprint
        with pytest.raises(ValueError, match=rf"{told} are not all finite: .*{name}"):
            pipe("red cup", gallery=gallery)
