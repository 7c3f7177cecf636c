"""The model card: a README.md for a model's folder, written from what the run has left beside it, and nothing else.

    write_card(Path("outputs/mine/best"), "me/name", license="apache-2.0")

Facts come from the folder (`config.json`, weights, processor, `results.json`, `evaluation/`, `evaluations/`) and from
that of the run around it (`arguments.json`, `manifest.json`, `machine.json`, `log.jsonl`). What is not known is said to
be unknown. Cards are public: of folders of this machine they have the name, not the path.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from safetensors import SafetensorError, safe_open

from aliblip.retrieval.calibration import BINS
from aliblip.retrieval.metrics import RECALL_AT
from aliblip.retrieval.results import DIRECTION_NAMES, EVALUATIONS
from aliblip.runtime.files import read_json, write_text
from aliblip.runtime.forms import NUMBER, Each, check_form
from aliblip.runtime.mistakes import usage_errors
from aliblip.runtime.sameness import weights_of

CARD = "README.md"
# A card with this line is replaced; somebody who edits a card removes the line.
MARK = "<!-- written by aliblip.publish, which replaces it: to keep your own edits, remove this line -->"
# The Hub has no task for image-text retrieval. It lists CLIP, SigLIP and their kind under this one, where people look
# for such models; the pipeline's own name is a tag.
PIPELINE_TAG = "zero-shot-image-classification"
TASK = "image-text-retrieval"
TAGS = [TASK, "cross-modal-retrieval", "image-text-matching", "product-search", "blip", "aliblip", "custom_code"]
# Arguments that concern one machine or one start of the run.
_NOT_OF_THE_RECIPE = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "push_to_hub", "report_to", "project_name"),
    *("run_name", "peak_tflops", "profile"),
}
_LOCAL = ("data_dir", "dataset_name", "image_dir", "train_file", "validation_file", "model_name_or_path", "config_name")
_LOCAL += ("vision_model_name_or_path", "text_model_name_or_path", "tokenizer_name")

# What the card asks of the files.
_CONFIG = {
    "vision_config": dict.fromkeys(("num_hidden_layers", "hidden_size", "image_size", "patch_size"), int),
    "text_config": dict.fromkeys(("num_hidden_layers", "hidden_size", "vocab_size"), int),
    **{"image_text_hidden_size": int, "itm_slope?": NUMBER, "itm_offset?": NUMBER},
}
_MANIFEST = {"rows": int, "name": str, "split": str, "files": list}
_MACHINE = {"launcher": str, "hardware": str, "precision": str, "versions": Each(str)}
_RECALLS = tuple(f"recall@{k}" for k in RECALL_AT)
_STAGE = {
    **dict.fromkeys((*_RECALLS, "mean_recall", "median_rank"), NUMBER),
    "intervals?": Each((NUMBER, NUMBER)),
}
_DIRECTION = {"itc?": _STAGE, "itm?": _STAGE, "calibration?": {"expected_calibration_error": NUMBER}}
_RESULTS = {
    **{"dataset": str, "split": str, "num_images": int, "num_texts": int, "score": str, "k_rerank": int},
    **{"mean_recall": NUMBER, "mean_recall_interval?": (NUMBER, NUMBER), "fusion_weight": NUMBER},
    **{"itm_slope?": NUMBER, "itm_offset?": NUMBER, "itm_probability_tuned_on?": {"k_rerank": int, "split": str}},
    **{f"{direction}?": _DIRECTION for direction in DIRECTION_NAMES},
}

_TEMPLATE = """\
---
{metadata}
---
{mark}

# {title}

Finds photos by title and titles by photo. BLIP's retrieval design: a ViT and a BERT give every photo and every title a
vector, compared by cosine similarity (ITC); the best candidates are looked at again, photo and title together, by the
BERT with cross-attention (ITM). {architecture}

## Results

{results}

## Use

Needs `torch`, `transformers` and `pillow`. The model's code lies in this repository, hence `trust_remote_code`: read it
first, and pin `revision=` to what you have read.

Compare photos and titles:

```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
photos = [Image.open("mug.jpg").convert("RGB"), Image.open("lamp.jpg").convert("RGB")]
batch = processor(images=photos, text=["striped blue mug", "red steel lamp"], return_tensors="pt")
with torch.no_grad():
    output = model(**batch)
print(output.image_embeds @ output.text_embeds.T)  # ITC: cosine similarities of all photos with all titles
print(output.itm_logits.softmax(-1)[:, 1])  # ITM: probability that photo i shows title i
```

Search a few photos, both stages:

```python
from transformers import pipeline

search = pipeline("image-text-retrieval", model="{name}", trust_remote_code=True)
for found in search("striped blue mug", gallery=["mug.jpg", "lamp.jpg"], direction="text-to-image"):
    print(found["path"], found["score"])
```

Search many: embed them once, in a folder.

```python
from transformers import pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

search = pipeline("image-text-retrieval", model="{name}", trust_remote_code=True)
MemoryGallery = get_class_from_dynamic_module("gallery_aliblip.MemoryGallery", "{name}")
gallery = MemoryGallery.build(search.encoder, ["mug.jpg", "lamp.jpg"], store_tokens=True)
print(search("striped blue mug", gallery=gallery, top_k=1))
```

## Training

{training}

## Limits

{limits}
"""


def write_card(folder: Path, name: str, license: str | None = None) -> bool:
    """Write the card of a model into its folder, unless one is there that somebody has edited.

    Args:
        folder: the model.
        name: what `from_pretrained` finds it by: the repository, or a folder.
        license: of the weights, as the Hub calls it; None: the card names none.

    Returns:
        Whether the folder's card is ours.

    Raises:
        UsageError: a file of the folder can't be read.
        OSError: the card can't be written.
    """
    path = folder / CARD
    before = path.read_text(encoding="utf-8") if path.is_file() else MARK
    if MARK not in before:
        return False
    text = model_card(folder, name, license)
    if text != before:
        write_text(path, text)
    return True


def model_card(folder: Path, name: str, license: str | None = None) -> str:
    """The text of the card; see `write_card`."""
    config = _checked(_read(folder / "config.json"), _CONFIG, folder / "config.json")
    processor = _read(folder / "processor_config.json")
    arguments = _read(folder.parent / "arguments.json")
    if manifest := _read(folder.parent / "manifest.json"):
        _checked(manifest, _MANIFEST, folder.parent / "manifest.json")
    if machine := _read(folder.parent / "machine.json"):
        _checked(machine, _MACHINE, folder.parent / "machine.json")
    measured = all_results(folder)
    title = name.rstrip("/").split("/")[-1]
    return _TEMPLATE.format(
        metadata=_metadata(title, arguments, measured, license).to_yaml(),
        mark=MARK,
        title=title,
        name=name,
        architecture=_architecture(folder, config),
        results=_results(config, measured),
        training=_training(folder, arguments, manifest, machine),
        limits="\n".join(f"- {limit}" for limit in _limits(config, processor, measured)),
    )


def _results(config: dict[str, Any], measured: list[dict[str, Any]]) -> str:
    tables = [_table(results) for results in measured] or ["Not measured."]
    return "\n\n".join([*tables, *_probability(config, measured)])


def all_results(folder: Path) -> list[dict[str, Any]]:
    """The evaluations of exactly these weights, one for each data set and split.

    Those of `evaluate_retrieval.py` (in `evaluation/`, or kept in `evaluations/` where the output lies elsewhere) are
    preferred to the training's own: they have intervals. They say which weights they are of; one that does not, and is
    older than the weights, is left out.
    """
    written = max(path.stat().st_mtime for path in folder.glob("model*.safetensors"))
    weights = weights_of(folder)
    found: dict[tuple, dict] = {}
    kept = sorted((folder / EVALUATIONS).glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in (folder / "evaluation" / "results.json", *kept, folder / "results.json"):
        results = _read(path)
        is_of_others = path.parent != folder and results and path.stat().st_mtime < written
        if "weights" in results:
            is_of_others = results["weights"] != weights
        if "mean_recall" in results and not is_of_others:
            _checked(results, _RESULTS, path)
            found.setdefault((results["dataset"], results["split"]), results)
    return list(found.values())


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    with usage_errors(OSError, ValueError, told=f"{path} can't be read ({{}}): repair or remove it"):
        return read_json(path)


def _checked(content: dict[str, Any], form: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a file holds, which somebody else may have written, if it is what the card will ask for."""
    check_form(content, form, f"{path} is not what a run writes ({{}}): repair or remove it")
    return content


def _public(value: Any) -> Any:
    """The name of a folder or file of this machine, without its path; everything else as it is."""
    is_local = isinstance(value, str) and "://" not in value and (os.path.isabs(value) or os.path.exists(value))
    return value.rstrip("/").split("/")[-1] if is_local else value


def _is_hub_name(value: Any) -> bool:
    return isinstance(value, str) and bool(re.fullmatch(r"[\w.-]+/[\w.-]+", value)) and not os.path.exists(value)


# --- the Hub's metadata -----------------------------------------------------------------------------------------------


def _metadata(title: str, arguments: dict, measured: list[dict], license: str | None) -> ModelCardData:
    bases = [arguments.get(f"{tower}model_name_or_path") for tower in ("", "vision_", "text_")]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        tags=TAGS,
        license=license,
        base_model=[base for base in bases if _is_hub_name(base)] or None,
        datasets=[arguments["dataset_name"]] if _is_hub_name(arguments.get("dataset_name")) else None,
        metrics=["recall"] if measured else None,
        model_name=title,
        eval_results=[result for results in measured for result in _eval_results(results)] or None,
    )


def _eval_results(results: dict) -> list[EvalResult]:
    named = []
    for key, direction in DIRECTION_NAMES.items():
        for stage in ("itc", "itm"):
            for k in RECALL_AT if stage in results.get(key, {}) else ():
                named.append((f"{direction} R@{k} ({stage.upper()})", results[key][stage][f"recall@{k}"]))
    named.append(("mean recall", results["mean_recall"]))
    return [
        EvalResult(
            task_type=TASK,
            task_name="Image-Text Retrieval",
            dataset_type=results["dataset"] if _is_hub_name(results["dataset"]) else "custom",
            dataset_name=_public(results["dataset"]),
            dataset_split=results["split"],
            metric_type="recall",
            metric_name=metric,
            metric_value=round(100 * value, 2),
        )
        for metric, value in named
    ]


# --- sections ---------------------------------------------------------------------------------------------------------


def _architecture(folder: Path, config: dict) -> str:
    vision, text = config["vision_config"], config["text_config"]
    return (
        f"{_parameters(folder) / 1e6:.1f} M parameters: ViT {vision['num_hidden_layers']} x {vision['hidden_size']}, "
        f"{vision['image_size']} px in patches of {vision['patch_size']}; BERT {text['num_hidden_layers']} x "
        f"{text['hidden_size']}, {text['vocab_size']} tokens; vectors of {config['image_text_hidden_size']}."
    )


def _parameters(folder: Path) -> int:
    count = 0
    for path in folder.glob("model*.safetensors"):
        with (
            usage_errors(OSError, SafetensorError, told=f"{path} can't be read ({{}}): save the model again"),
            safe_open(path, "pt") as file,
        ):
            for name in file.keys():  # noqa: SIM118  (not a dict)
                count += math.prod(file.get_slice(name).get_shape())
    return count


def _table(results: dict) -> str:
    lines = [
        f"On `{_public(results['dataset'])}`, {results['split']}: {results['num_images']:,} photos, "
        f"{results['num_texts']:,} titles. Recall in percent; a right answer is any row of the same product"
        + (", in brackets 95 % bootstrap intervals over products." if _has_intervals(results) else ".")
    ]
    lines += ["", "| | R@1 | R@5 | R@10 | mean | median rank |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for key, direction in DIRECTION_NAMES.items():
        for stage, name in (("itc", "ITC"), ("itm", f"ITM of the {results['k_rerank']} best")):
            row = results.get(key, {}).get(stage)
            if row is None:
                continue
            cells = [_cell(row[n], row.get("intervals", {}).get(n)) for n in (*_RECALLS, "mean_recall")]
            lines.append(f"| {direction}, {name} | {' | '.join(cells)} | {row['median_rank']:g} |")
    mean = _cell(results["mean_recall"], results.get("mean_recall_interval"), digits=2)
    stage = "ITC" if results["score"] == "itc" else "ITM"
    order = f" Re-ranked by match logit + {results['fusion_weight']:g} x ITC (`fusion_weight`)."
    return "\n".join(
        [*lines, "", f"Mean of all {stage} recalls: {mean}.{order if results['score'] == 'fused' else ''}"]
    )


def _probability(config: dict, measured: list[dict]) -> list[str]:
    """How far the match probability can be believed, where it was measured as it is now or fitted."""
    now = config.get("itm_slope", 1.0), config.get("itm_offset", 0.0)
    is_fitted, lines, fitted_on = now != (1.0, 0.0), [], ""
    for results in measured:
        if (results.get("itm_slope"), results.get("itm_offset")) != now:
            continue
        calibrated = {k: results[k]["calibration"] for k in DIRECTION_NAMES if "calibration" in results.get(k, {})}
        errors = [f"{each['expected_calibration_error']:.3f} {DIRECTION_NAMES[k]}" for k, each in calibrated.items()]
        if errors:
            lines.append(
                f"Over the {results['k_rerank']} candidates of each query of `{_public(results['dataset'])}`, "
                f"{results['split']}, its expected calibration error is {', '.join(errors)} ({BINS} bins)."
            )
        if is_fitted and (tuned := results.get("itm_probability_tuned_on")):
            fitted_on = f", fitted to the {tuned['k_rerank']} candidates of each query of {tuned['split']}"
    if not is_fitted and not lines:
        return []
    made = "as its loss trains it, where one pair in three is a match"
    if is_fitted:
        made = f"sigmoid({now[0]:g} x (match - no match logit) {now[1]:+g}){fitted_on}"
    return [" ".join([f"`itm_probability`, that a re-ranked candidate is right, is {made}.", *lines])]


def _has_intervals(results: dict) -> bool:
    return any("intervals" in stage for key in DIRECTION_NAMES for stage in _stages(results.get(key, {})))


def _stages(direction: dict) -> list[dict]:
    return [direction[stage] for stage in ("itc", "itm") if stage in direction]


def _cell(value: float, bounds: list[float] | None, digits: int = 1) -> str:
    shown = f"{100 * value:.{digits}f}"
    if bounds is not None:
        shown += " ({:.{d}f} to {:.{d}f})".format(*(100 * bound for bound in bounds), d=digits)
    return shown


_LAUNCHERS = {"NO": "one process", "MULTI_GPU": "DDP", "MULTI_CPU": "DDP", "DEEPSPEED": "DeepSpeed"}


def _training(folder: Path, arguments: dict, manifest: dict, machine: dict) -> str:
    if not arguments:
        return "Not known: the folder that this model came from holds no record of a run."
    lines = []
    if manifest:
        files = len(manifest["files"])
        lines.append(
            f"On {manifest['rows']:,} rows of `{_public(manifest['name'])}`, {manifest['split']}"
            f" ({files} file{'s' if files != 1 else ''})."
        )
    if (saved := _saved_at(folder)) is not None:
        lines.append(f"These are the weights after step {saved['step']:,} (epoch {saved['epoch']}).")
    if machine:
        launcher = _LAUNCHERS.get(machine["launcher"], machine["launcher"])
        lines.append(f"Hardware: {machine['hardware']}; {launcher}, {machine['precision']}.")
        lines.append(
            "Versions: " + ", ".join(f"{package} {version}" for package, version in machine["versions"].items()) + "."
        )
    recipe = {
        key: _public(value) if key in _LOCAL else value
        for key, value in arguments.items()
        if value is not None and key not in _NOT_OF_THE_RECIPE
    }
    shown = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()
    return "\n".join(
        [*lines, "", "<details><summary>All settings, as a recipe</summary>", "", "```yaml", shown, "```", "</details>"]
    ).strip()


def _saved_at(folder: Path) -> dict | None:
    """The entry of the log for the evaluation after which these weights were saved."""
    own, log = _read(folder / "results.json"), folder.parent / "log.jsonl"
    if "mean_recall" not in own or not log.is_file():
        return None
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # cut off by a kill
            continue
        evaluation = entry.get("evaluation") if isinstance(entry, dict) else None
        if isinstance(evaluation, dict) and evaluation.get("run") == own.get("run"):
            return _checked(entry, {"step": int, "epoch": NUMBER}, log)
    return None


def _limits(config: dict, processor: dict, measured: list[dict]) -> list[str]:
    size = config["vision_config"]["image_size"]
    limits = [
        f"Photos are scaled to {size} x {size} pixels whatever their proportions: small print and details are lost."
    ]
    if "max_length" in processor:
        limits.append(f"Titles are cut after {processor['max_length']} tokens, [CLS] and [SEP] included.")
    if measured:
        most = max(results["num_images"] for results in measured)
        limits.append(
            f"Measured among {most:,} photos at most. Recall falls as a gallery grows, and on photos and titles unlike "
            "those of the training."
        )
    else:
        limits.append("How good it is has not been measured: measure it on your own data before you rely on it.")
    limits.append(
        "Nothing is known about other languages than those of the training titles, about biases of the training data, "
        "or about uses other than retrieval."
    )
    return limits


__all__ = ["CARD", "MARK", "PIPELINE_TAG", "TAGS", "all_results", "model_card", "write_card"]
