"""The fitted match probability, from where it is fitted to where it is shown: script, model, pipeline, card, page."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
import torch
from evaluation_fixtures import K, flags, retrieve, without_run
from helpers import assert_succeeded, run_ranks
from test_report import Page

from aliblip.models.card import model_card
from aliblip.retrieval.calibration import forget_fit
from aliblip.retrieval.report import Reliability, html_report
from aliblip.runtime.mistakes import UsageError
from aliblip.training.arguments import ModelArguments
from aliblip.training.building import begin
from configuration_aliblip import AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval
from pipeline_aliblip import AliBlipImageTextRetrievalPipeline


@pytest.fixture
def own_model(model_folder, tmp_path):
    """A copy of the model, into which an evaluation may write."""
    return shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("evaluations"))


@pytest.fixture(scope="module")
def two_splits(catalogue, tmp_path_factory):
    """The catalogue's split, and another one, of every second row."""
    folder = tmp_path_factory.mktemp("splits")
    shutil.copytree(catalogue / "validation", folder / "validation")
    shutil.copytree(catalogue / "validation", folder / "test")
    lines = (folder / "test" / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "test" / "metadata.jsonl").write_text("".join(lines[::2]))
    return folder


def of_config(folder):
    config = json.loads((folder / "config.json").read_text())
    return config.get("itm_slope", 1.0), config.get("itm_offset", 0.0)


def test_the_configuration_has_slope_and_offset(tmp_path):
    assert (tiny.config().itm_slope, tiny.config().itm_offset) == (1.0, 0.0)
    before = {name: value for name, value in tiny.config().to_dict().items() if not name.startswith("itm_")}
    assert AliBlipConfig(**before).to_dict() == tiny.config().to_dict(), "files of models from before there was a fit"
    for wrong in (-0.1, None, "much", True, float("inf")):
        with pytest.raises(ValueError, match=r"config\.itm_slope is .*: it must be a number of at least 0"):
            tiny.config(itm_slope=wrong)
    for wrong in (float("nan"), float("inf"), -float("inf"), True, "low"):
        with pytest.raises(ValueError, match=r"config\.itm_offset is .*: it must be a"):
            tiny.config(itm_offset=wrong)
    tiny.model(itm_slope=0.25, itm_offset=-3).save_pretrained(tmp_path)
    config = AliBlipForImageTextRetrieval.from_pretrained(tmp_path).config
    assert (config.itm_slope, config.itm_offset) == (0.25, -3.0)
    assert AliBlipConfig(**config.to_dict()).itm_offset == -3.0
    forget_fit(config)
    assert (config.itm_slope, config.itm_offset) == (1.0, 0.0)


def test_the_pipeline_shows_it_and_orders_as_before(tmp_path):
    words = len(tiny.tokenizer()) + 2
    pipe = AliBlipImageTextRetrievalPipeline(model=tiny.spread_model(vocab_size=words), processor=tiny.processor())
    found = [({"id": n, "itc": 0.0, "position": n}) for n in range(64)]
    logits = torch.randn(64, 2, generator=torch.Generator().manual_seed(0)) * 8
    logits[:2] = torch.tensor([[90.0, -90.0], [-90.0, 90.0]])
    asked = {"model_outputs": {"found": (found, logits)}, "top_k": 64}
    trained = pipe.postprocess(**asked)
    own = {result["id"]: result.pop("itm_probability") for result in trained}
    assert [own[n] for n in range(64)] == logits.softmax(dim=1)[:, 1].tolist(), "not fitted: bit by bit as it was"
    pipe.model.config.itm_slope, pipe.model.config.itm_offset = 0.3, -2.5
    fitted = pipe.postprocess(**asked)
    margins = (logits[:, 1] - logits[:, 0]).double()
    expected = torch.sigmoid(0.3 * margins - 2.5)
    for result in fitted:
        assert result.pop("itm_probability") == pytest.approx(float(expected[result["id"]]), rel=1e-5, abs=1e-30)
    assert fitted == trained, "ids, scores and match logits stay"
    # and so do those of a whole search
    photos, options = tiny.photos(tmp_path / "photos", 5), {"direction": "text-to-image"}
    fitted = pipe("red cup", gallery=photos, **options)
    forget_fit(pipe.model.config)
    trained = pipe("red cup", gallery=photos, **options)
    kept = ("id", "score", "itc", "itm_logit")
    assert [[each[name] for name in kept] for each in fitted] == [[each[name] for name in kept] for each in trained]
    assert all(one["itm_probability"] != other["itm_probability"] for one, other in zip(fitted, trained, strict=True))


def test_evaluation_takes_the_models_and_ranks_as_before(model, loader):
    trained = retrieve(model, loader)
    model.config.itm_slope, model.config.itm_offset = 0.5, -2.0
    try:
        fitted = retrieve(model, loader)
    finally:
        forget_fit(model.config)
    assert (trained.slope, trained.offset, fitted.slope, fitted.offset) == (1.0, 0.0, 0.5, -2.0)
    for one, other in ((trained.text_to_image, fitted.text_to_image), (trained.image_to_text, fitted.image_to_text)):
        assert torch.equal(one.rankings.ids, other.rankings.ids)
        assert torch.equal(one.rankings.scores, other.rankings.scores)
        assert torch.equal(one.rankings.itm_logits, other.rankings.itm_logits)
    chosen = retrieve(model, loader, probability=(0.1, 3.0))
    assert (chosen.slope, chosen.offset) == (0.1, 3.0)


def test_it_is_fitted_on_another_split_stored_shown_and_equal_over_processes(
    own_model, two_splits, tmp_path, run_script
):
    report = tmp_path / "out" / "report.html"
    arguments = flags(
        own_model, two_splits, tmp_path / "out", "--split_name", "test", "--tune_probability", "validation"
    )
    config = (own_model / "config.json").read_text()
    code, printed = run_script(*arguments, "--report", report)
    assert code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    tuned = results["itm_probability_tuned_on"]
    assert (tuned["split"], tuned["k_rerank"], tuned["candidates"]) == ("validation", K, 2 * 27 * K)
    assert tuned["log_loss"]["after"] < tuned["log_loss"]["before"]
    assert "fusion_weight_tuned_on" not in results and results["fusion_weight"] == 1.0
    slope, offset = results["itm_slope"], results["itm_offset"]
    told = f"match probability sigmoid({slope:g} x margin {offset:+g}), fitted on"
    assert told in printed.out and f"the {K} best of each query" in printed.out
    assert "stored as the model's itm_slope and itm_offset in" in printed.out
    # stored, and nothing else of the model has changed
    assert (slope, offset) == of_config(own_model) != (1.0, 0.0)
    now = json.loads((own_model / "config.json").read_text())
    assert now == json.loads(config) | {"itm_slope": slope, "itm_offset": offset}
    # the page and the card show it
    page = Page(report)
    page.assert_self_contained()
    assert "Match probability" in page.texts("h2")
    card = model_card(own_model, "me/name")
    assert f"is sigmoid({slope:g} x (match - no match logit) {offset:+g}), fitted to the {K} candidates of" in card
    error = results["text_to_image"]["calibration"]["expected_calibration_error"]
    assert f"expected calibration error is {error:.3f} text to image, " in card and "(10 bins)" in card
    # measured again, the model has it; with two processes all is the same
    assert run_script(*arguments[:-2], "--output_dir", tmp_path / "again")[0] == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again["text_to_image"] == results["text_to_image"] and again["itm_slope"] == slope
    (own_model / "config.json").write_text(config)
    assert_succeeded(
        run_ranks("cpu_2_processes.yaml", "evaluate_retrieval.py", [*arguments, "--output_dir", tmp_path / "two"])
    )
    two = json.loads((tmp_path / "two" / "results.json").read_text())
    assert two["run"]["num_processes"] == 2 and without_run(two) == without_run(results)
    assert of_config(own_model) == (slope, offset)


def test_weight_and_probability_are_tuned_together_and_mistakes_are_told(own_model, two_splits, tmp_path, run_script):
    arguments = flags(own_model, two_splits, tmp_path / "out", "--split_name", "test")
    for more, message in (
        (("--tune_probability", "test"), "--tune_probability is test, which is measured: .*name another split"),
        (("--tune_probability", "validation", "--score", "itc"), "re-ranks nothing: leave out --tune_probability"),
        (
            ("--tune_probability", "validation", "--k_rerank", "all"),
            "--tune_probability with --k_rerank all: tune with",
        ),
        (("--tune_probability", "train", "--tune_fusion", "validation"), "name one split for both"),
    ):
        with pytest.raises(UsageError, match=message):
            run_script(*arguments, *more)
    both = ("--tune_fusion", "validation", "--tune_probability", "validation", "--image_size", 48)
    code, printed = run_script(*arguments, *both)
    assert code == 0 and "the weight is not stored with the model (at another --image_size)" in printed.out
    assert "the match probability is not stored with the model (at another --image_size): set model.config." in (
        printed.out
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {"fusion_weight_tuned_on", "itm_probability_tuned_on"} <= results.keys()
    assert of_config(own_model) == (1.0, 0.0) != (results["itm_slope"], results["itm_offset"])


def test_the_fit_of_other_weights_is_forgotten_in_training(own_model):
    config = json.loads((own_model / "config.json").read_text())
    (own_model / "config.json").write_text(json.dumps(config | {"itm_slope": 0.5, "itm_offset": -2.0}))
    card = model_card(own_model, "me/name")
    assert "Not measured." in card and "is sigmoid(0.5 x (match - no match logit) -2)." in card
    assert AliBlipForImageTextRetrieval.from_pretrained(own_model).config.itm_slope == 0.5
    beginning = begin(ModelArguments(model_name_or_path=str(own_model)), [])
    assert (beginning.config.itm_slope, beginning.config.itm_offset) == (1.0, 0.0)
    assert beginning.model.config is beginning.config


def test_the_picture_has_its_points_where_the_numbers_are(tmp_path):
    points = [(0.0, 0.0, 900), (0.5, 0.25, 80), (1.0, 1.0, 20)]
    found = Reliability("Match probability", {"text to image": points, "<b>": points[:1]}, note="10 bins")
    page = Page(html_report(tmp_path / "report.html", heading="h", reliability=found))
    page.assert_self_contained()
    lines = [attributes["points"] for _, attributes, _ in page.all("polyline")]
    left, right, top, bottom = 46, 466, 12, 236
    assert (
        lines[0] == f"{left}.0,{bottom}.0 {(left + right) / 2:.1f},{bottom - (bottom - top) / 4:.1f} {right}.0,{top}.0"
    )
    assert lines[2] == f"{left}.0,{bottom}.0 {right}.0,{top}.0", "the diagonal"
    assert page.texts("li") == ["text to image", "<b>", "as it should be"]
    assert page.texts("td")[4:8] == ["text to image", "50.0", "25.0", "80"]
