"""What is tuned on another split than the one that is measured, and stored with the model.

chosen, told = tune(setup, work)        # collective; `chosen` goes to `retrieve`, `told` into results.json
"""

from __future__ import annotations

from typing import Any

from aliblip.retrieval.calibration import candidates_of_all, fit, reliability
from aliblip.retrieval.evaluation import retrieve
from aliblip.retrieval.rankings import Retrieval, tune_fusion
from aliblip.retrieval.results import split_told
from aliblip.retrieval.setup import Setup
from aliblip.retrieval.writing import store_with_the_model
from aliblip.runtime.distributed import is_main, together


def tune(setup: Setup, work: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Search `setup.tuned_on`, choose what was asked for, print it, and store it with the model (collective). Where
    nothing was asked for, do nothing.

    Args:
        work: options of every `retrieve`.

    Returns:
        Further options of `retrieve`, equal on all ranks, and what results.json says about them.
    """
    options, source = setup.options, setup.tuned_on
    chosen, told = {"fusion_weight": options.fusion_weight}, {}
    if source is None:
        return chosen, told
    retrieval = retrieve(setup.model, setup.loader(source), parts=setup.tuning_parts, **work)
    split = split_told(source.split, options.tuning_split if setup.data.data_files is not None else None)
    tuned_on = {"dataset": source.name, "split": split}
    # One process is enough, and its numbers are those of all.
    if options.tune_fusion:
        chosen["fusion_weight"], found = together(
            is_main(), lambda: _tune_weight(retrieval, tuned_on, setup), "tune the weight"
        )  # collective
        told["fusion_weight_tuned_on"] = tuned_on | found
    if options.tune_probability:
        chosen["probability"], found = together(
            is_main(), lambda: _tune_probability(retrieval, tuned_on, setup), "tune the match probability"
        )  # collective
        told["itm_probability_tuned_on"] = tuned_on | found
    return chosen, told


def _tune_weight(retrieval: Retrieval, tuned_on: dict, setup: Setup) -> tuple[float, dict]:
    weight, recall_by_weight = tune_fusion(retrieval)
    best, own = (100 * recall_by_weight[each] for each in (weight, retrieval.fusion_weight))
    print(
        f"fusion weight {weight:g}, chosen on {tuned_on['dataset']}, {tuned_on['split']}: mean recall {best:.2f} there,"
        f" {own:.2f} with the model's own weight {retrieval.fusion_weight:g}"
    )
    otherwise = "give it as fusion_weight where you search"
    store_with_the_model("the weight", {"fusion_weight": weight}, otherwise, setup.options)
    return weight, {"mean_recall": {f"{tried:g}": recall for tried, recall in recall_by_weight.items()}}


def _tune_probability(retrieval: Retrieval, tuned_on: dict, setup: Setup) -> tuple[tuple[float, float], dict]:
    def candidates():
        return candidates_of_all(retrieval)

    slope, offset = fit(candidates)
    before = reliability(candidates(), retrieval.slope, retrieval.offset)
    after = reliability(candidates(), slope, offset)
    compared = {
        name: {"before": before[name], "after": after[name]}
        for name in ("expected_calibration_error", "brier_score", "log_loss")
    }
    error, loss = compared["expected_calibration_error"], compared["log_loss"]
    print(
        f"match probability sigmoid({slope:g} x margin {offset:+g}), fitted on {tuned_on['dataset']}, "
        f"{tuned_on['split']}, the {retrieval.depths[-1]} best of each query: log loss {loss['before']:.4f} -> "
        f"{loss['after']:.4f}, expected calibration error {error['before']:.4f} -> {error['after']:.4f}"
    )
    values = {"itm_slope": slope, "itm_offset": offset}
    otherwise = f"set model.config.itm_slope = {slope:g} and itm_offset = {offset:g} where you search"
    store_with_the_model("the match probability", values, otherwise, setup.options)
    told = {"k_rerank": retrieval.depths[-1], "candidates": after["candidates"], "share_right": after["share_right"]}
    return (slope, offset), told | compared


__all__ = ["tune"]
