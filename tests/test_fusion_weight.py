"""The fusion weight, from where it is tuned to wherever results are ordered; and evaluations, to the model's card."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from evaluation_fixtures import flags, retrieve
from safetensors.torch import load_file, save_file

from aliblip import Gallery
from aliblip.models.card import all_results, model_card
from aliblip.retrieval.page_search import Searcher
from aliblip.retrieval.results import split_told
from aliblip.runtime.mistakes import UsageError
from aliblip.runtime.sameness import weights_of
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval
from pipeline_aliblip import AliBlipImageTextRetrievalPipeline


@pytest.fixture
def own_model(model_folder, tmp_path):
    """A copy of the model, into which an evaluation may write."""
    return shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("evaluations"))


def test_the_configuration_has_the_weight(tmp_path):
    assert tiny.config().fusion_weight == 1.0
    assert AliBlipConfig(**{**tiny.config().to_dict(), "fusion_weight": 22.6}).fusion_weight == 22.6
    for wrong in (-1, "much", True, float("nan"), float("inf"), None):
        with pytest.raises(ValueError, match=r"config\.fusion_weight is .*: it must be a number of at least 0"):
            tiny.config(fusion_weight=wrong)
    tiny.model(fusion_weight=22.6).save_pretrained(tmp_path)
    assert AliBlipForImageTextRetrieval.from_pretrained(tmp_path).config.fusion_weight == 22.6


def test_evaluation_pipeline_and_page_order_by_the_models_weight(model, loader, tmp_path):
    expected = retrieve(model, loader, fusion_weight=7.0)
    assert not torch.equal(
        retrieve(model, loader).text_to_image.rankings.scores, expected.text_to_image.rankings.scores
    )
    model.config.fusion_weight = 7.0
    try:
        found = retrieve(model, loader)
    finally:
        model.config.fusion_weight = 1.0
    assert found.fusion_weight == 7.0
    assert torch.equal(found.text_to_image.rankings.scores, expected.text_to_image.rankings.scores)
    words = len(tiny.tokenizer()) + 2
    pipe = AliBlipImageTextRetrievalPipeline(
        model=tiny.spread_model(vocab_size=words, fusion_weight=7.0), processor=tiny.processor()
    )
    photos, options = tiny.photos(tmp_path / "photos", 5), {"direction": "text-to-image"}
    assert pipe("red cup", gallery=photos, **options) == pipe("red cup", gallery=photos, fusion_weight=7.0, **options)
    assert pipe("red cup", gallery=photos, **options) != pipe("red cup", gallery=photos, fusion_weight=1.0, **options)
    gallery = Gallery.build(photos, str(tmp_path / "gallery"), model=pipe.model, processor=pipe.processor)
    assert Searcher(pipe, gallery).fusion_weight == 7.0
    assert Searcher(pipe, gallery, fusion_weight=2.0).fusion_weight == 2.0


def test_the_weight_is_tuned_on_another_split_stored_and_used(own_model, catalogue, tmp_path, run_script):
    both = tmp_path / "both"
    shutil.copytree(catalogue, both)
    shutil.copytree(both / "validation", both / "tuning")
    arguments = flags(own_model, both, tmp_path / "out", "--data_files", both / "validation" / "metadata.jsonl")
    arguments[arguments.index("--data_dir") : arguments.index("--data_dir") + 2] = ["--seed", "0"]
    with pytest.raises(UsageError, match="are the rows that are measured"):  # a copy is no other split
        run_script(*arguments, "--tune_fusion", both / "tuning" / "metadata.jsonl")
    lines = (both / "tuning" / "metadata.jsonl").read_text().splitlines(keepends=True)
    (both / "tuning" / "metadata.jsonl").write_text("".join(reversed(lines)))
    (both / "tuning" / "metadata.jsonl").rename(both / "tuning" / "tuned.jsonl")
    code, printed = run_script(*arguments, "--tune_fusion", both / "tuning" / "tuned.jsonl")
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    tuned = results["fusion_weight_tuned_on"]["mean_recall"]
    assert code == 0 and f"fusion weight {results['fusion_weight']:g}, chosen on" in printed.out
    # the same pairs in another order: their best mean recall is that of the measured split with this weight
    assert results["mean_recall"] == pytest.approx(max(tuned.values()))
    # each says which file it is of
    assert (results["split"], results["fusion_weight_tuned_on"]["split"]) == ("metadata.jsonl", "tuned.jsonl")
    # the model has the weight now, and nothing else of it has changed
    assert results["fusion_weight"] != 1.0 and "stored as the model's fusion_weight" in printed.out
    config = json.loads((own_model / "config.json").read_text())
    assert config["fusion_weight"] == results["fusion_weight"]
    assert AliBlipForImageTextRetrieval.from_pretrained(own_model).config.fusion_weight == results["fusion_weight"]
    assert run_script(*arguments, "--output_dir", tmp_path / "again")[0] == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert (again["fusion_weight"], again["mean_recall"]) == (results["fusion_weight"], results["mean_recall"])
    # at another size it says nothing about the model as it is
    resized = ("--tune_fusion", both / "tuning" / "tuned.jsonl", "--image_size", 48, "--output_dir", tmp_path / "48")
    code, printed = run_script(*arguments, *resized)
    assert code == 0 and "the weight is not stored with the model (at another --image_size)" in printed.out
    assert json.loads((own_model / "config.json").read_text()) == config


def test_the_card_finds_the_evaluation_of_its_weights_wherever_it_lies(own_model, catalogue, tmp_path, run_script):
    assert all_results(own_model) == []
    code, printed = run_script(*flags(own_model, catalogue, tmp_path / "out"))
    assert code == 0 and "for the model's card" in printed.out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["weights"] == weights_of(own_model) and all_results(own_model) == [results]
    moved = own_model.rename(tmp_path / "moved")
    assert all_results(moved) == [results] and "27 photos, 27 titles" in model_card(moved, "me/name")
    # what is measured at another size is not of these weights
    arguments = flags(moved, catalogue, tmp_path / "48", "--image_size", 48)
    assert run_script(*arguments, "--overwrite_output_dir")[0] == 0
    assert all_results(moved) == []
    # the default place: it says of which weights it is, and its age does not matter
    arguments = flags(moved, catalogue, moved / "evaluation")
    assert run_script(*arguments)[0] == 0
    (found,) = all_results(moved)
    weights = load_file(moved / "model.safetensors")
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt", "saved": "again"})
    assert all_results(moved) == [found]
    weights["itm_head.bias"][0] += 1e-6
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert all_results(moved) == []


def test_the_weights_are_those_whatever_file_they_lie_in(tmp_path):
    for name, shards in (("one", "1GB"), ("many", "20KB")):
        tiny.model().save_pretrained(tmp_path / name, max_shard_size=shards)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 1
    assert weights_of(tmp_path / "one") == weights_of(tmp_path / "many") is not None
    tiny.model(seed=1).save_pretrained(tmp_path / "other")
    assert weights_of(tmp_path / "other") != weights_of(tmp_path / "one")
    assert weights_of(tmp_path) is None


def test_the_split_is_the_file_that_was_measured():
    assert split_told("validation", None) == "validation"
    assert (
        split_told("validation", "lists/test.json") == split_told("validation", "s3://there/test.json") == "test.json"
    )
