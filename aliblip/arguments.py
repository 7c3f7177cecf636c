"""Command-line arguments of both scripts, and recipes.

    python train.py --config recipes/demo.yaml --learning_rate 1e-4

A recipe is a YAML mapping of flag names to values: it sets defaults, flags override. Every mistake raises `UsageError`
with one line: what was given, what is accepted, what to do.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

SECONDS_FOR_THE_FIRST_PROCESS = 30


class UsageError(ValueError):
    """A mistake in what the user gave; the message is the one line to show."""


def _option(default, text: str, **kwargs):
    return field(default=default, metadata={"help": text, **kwargs})


@dataclass
class ModelArguments:
    """Where the model comes from: either a trained one, or a configuration and a tokenizer to train from scratch, with
    trained towers or without."""

    model_name_or_path: str | None = _option(
        None, "Model to start from: folder or Hub name of AliBLIP or of transformers' BLIP, or an original .pth file."
    )
    config_name: str | None = _option(
        None, "To train from scratch: base (ViT-B/16), large (ViT-L/16), or a folder with a config.json."
    )
    vision_model_name_or_path: str | None = _option(
        None, "A trained ViT (model type vit, as google/vit-*) for the photo tower; the rest is as --config_name says."
    )
    text_model_name_or_path: str | None = _option(
        None, "A trained BERT (model type bert) for the title tower; the rest is as --config_name says."
    )
    vision_config: str | None = _option(
        None, 'Fields of the ViT to change, as JSON or a recipe\'s mapping: {"hidden_size": 192}.'
    )
    text_config: str | None = _option(None, "Fields of the BERT to change, as JSON or a recipe's mapping.")
    image_text_hidden_size: int | None = _option(None, "Width of the shared embedding space (256 from scratch).")
    temperature_init: float | None = _option(None, "Initial ITC temperature (0.07 from scratch).")
    tokenizer_name: str | None = _option(
        None,
        "Tokenizer: folder, vocab.txt or Hub name (default: that of the model or of --text_model_name_or_path, else "
        "bert-base-uncased).",
    )
    image_size: int | None = _option(
        None, "Side of the photos in pixels; a trained model's position embedding is interpolated to it."
    )
    max_length: int | None = _option(None, "Longest title in tokens, [CLS] and [SEP] included (35 from scratch).")
    attn_implementation: str | None = _option(None, "sdpa (default), eager or flash_attention_2.")


@dataclass
class DataArguments:
    """The table of photos and titles."""

    dataset_name: str | None = _option(None, "Data set on the Hub, read by streaming.")
    dataset_config_name: str | None = _option(None, "Configuration of the Hub data set.")
    data_dir: str | None = _option(None, "Local folder: Parquet files, WebDataset tars or an image folder.")
    image_dir: str | None = _option(None, "Folder of the photos that JSON lists name (default: that of each list).")
    image_column: str | None = _option(None, "Column of the photo (default: image).")
    caption_column: str | None = _option(None, "Column of the title (default: caption, then text).")
    product_id_column: str | None = _option(
        None, "Column of the product; equal values are positives (default: product_id, otherwise each row is one)."
    )
    dataloader_num_workers: int = _option(2, "Processes that read and decode, per rank; 0: in the main process.")


@dataclass
class TrainDataArguments(DataArguments):
    train_split_name: str = _option("train", "Split to train on.")
    validation_split_name: str = _option("validation", "Split to evaluate on.")
    train_file: str | None = _option(
        None,
        'Instead of a data set: a file or glob to train on; a JSON list of {"product": file, "caption": text} too.',
    )
    validation_file: str | None = _option(None, "The same for the evaluation.")
    shuffle_window: int = _option(4096, "Rows that are permuted among themselves, undecoded; more mixes better.")
    augmentation: str = _option(
        "blip", "blip (crop, flip, RandAugment), crop_flip, or none.", choices=["blip", "crop_flip", "none"]
    )
    min_crop_scale: float = _option(0.5, "Smallest area of the random resized crop, as a share of the photo.")
    horizontal_flip: bool = _option(True, "Mirror every second photo (not for catalogues where text or side matters).")
    max_skipped_fraction: float = _option(0.05, "Stop the run when more than this share of the rows is unusable.")


@dataclass
class TrainingArguments:
    """How to train."""

    output_dir: str | None = _option(None, "Folder for models, checkpoints and logs (required).")
    overwrite_output_dir: bool = _option(False, "Train into a folder that holds an earlier run, and replace it.")
    per_device_train_batch_size: int = _option(16, "Rows per step and process.")
    per_device_eval_batch_size: int = _option(32, "Rows encoded at a time in the evaluation.")
    num_train_epochs: float = _option(6, "Epochs to train.")
    max_train_steps: int | None = _option(None, "Optimizer steps to train, instead of epochs.")
    gradient_accumulation_steps: int = _option(1, "Batches per optimizer step.")
    learning_rate: float = _option(1e-5, "Peak learning rate of AdamW.")
    temperature_learning_rate: float | None = _option(
        None, "Peak learning rate of the ITC temperature (default: as the rest). A small one keeps it from collapsing."
    )
    lr_scheduler_type: str = _option(
        "cosine", "Schedule of transformers by name (per step), or cosine_per_epoch as in the published code."
    )
    warmup_steps: int = _option(0, "Optimizer steps of linear warm-up.")
    weight_decay: float = _option(0.05, "Weight decay of AdamW.")
    decay_everything: bool = _option(False, "Decay biases, LayerNorms and the temperature too, as the published code.")
    adam_beta1: float = _option(0.9, "First beta of AdamW.")
    adam_beta2: float = _option(0.999, "Second beta of AdamW.")
    adam_epsilon: float = _option(1e-8, "Epsilon of AdamW.")
    max_grad_norm: float = _option(1.0, "Clip gradients to this norm; 0: don't.")
    queue_size: int = _option(57600, "Features kept as extra contrastive keys.")
    momentum: float = _option(0.995, "Share of the momentum encoders that stays at each step.")
    momentum_warmup: bool = _option(False, "Let the momentum encoders follow quickly at first.")
    momentum_dropout: bool = _option(False, "Keep dropout on in the momentum encoders, as the published code does.")
    alpha: float = _option(
        0.4, "Weight of the momentum encoders' opinion in the ITC targets, from the second epoch on."
    )
    in_batch_itc: float = _option(
        0.0, "Share of the ITC loss between present features of the batch, 0 to 1; 0: the published objective."
    )
    negatives_from_all_ranks: bool = _option(False, "Choose ITM's hard negatives among all processes' batches.")
    hardest_negatives: bool = _option(False, "Take the most similar candidate as hard negative instead of drawing.")
    gradient_checkpointing: bool = _option(False, "Recompute activations in the backward pass: slower, less memory.")
    gradient_checkpointing_vision_layers: int | None = _option(None, "Only the last so many ViT layers (default: all).")
    gradient_checkpointing_text_layers: int | None = _option(None, "Only the last so many BERT layers (default: all).")
    mixed_precision: str | None = _option(None, "no or bf16 (default: as the launcher says).", choices=["no", "bf16"])
    seed: int = _option(42, "Seed of weights, order, augmentation, dropout and negatives.")
    k_rerank: int | None = _option(
        None, "Candidates that ITM re-ranks in the evaluation (default: 128 or the gallery)."
    )
    evaluate_every: int = _option(1, "Evaluate every so many epochs, and after the last; 0: never.")
    logging_steps: int = _option(50, "Optimizer steps between log lines.")
    report_to: str = _option("none", "Trackers of accelerate: tensorboard, wandb, ..., all or none.")
    checkpointing_steps: int | None = _option(
        None, "Optimizer steps between checkpoints to resume from; one is written at each epoch's end too."
    )
    save_total_limit: int | None = _option(None, "Checkpoints to keep, the newest ones (default: all).")
    resume_from_checkpoint: str | None = _option(None, "A checkpoint folder, or last.")
    push_to_hub: bool = _option(False, "Upload the best model with its card to --hub_model_id at each save.")
    max_non_finite_steps: int = _option(
        10, "Give up after so many steps in a row with a loss or gradient that is not finite; each changes nothing."
    )


@dataclass
class HubArguments:
    """Where on the Hub to publish. Kept apart from what a run records: the token is a secret."""

    hub_model_id: str | None = _option(None, "Repository on the Hub, me/name; it is made if it is not there.")
    hub_private_repo: bool = _option(False, "Make a new repository private, whatever your account says.")
    hub_token: str | None = _option(None, "Token with write permission (default: HF_TOKEN, or that of hf auth login).")
    hub_license: str | None = _option(None, "License of the weights for the card, as the Hub calls it: apache-2.0.")


@dataclass
class PublishArguments:
    """What to publish."""

    model_name_or_path: str | None = _option(None, "Folder of a trained model, such as outputs/mine/best (required).")


@dataclass
class EvaluationDataArguments(DataArguments):
    split_name: str = _option("validation", "Split to evaluate.")
    data_files: str | None = _option(None, "Instead of a data set: a file or glob, a JSON list of pairs too.")
    gallery: str | None = _option(
        None, "Photos to search, without titles: a folder of photos, a file or glob as --data_files, or a Hub data set."
    )
    queries: str | None = _option(
        None, "Titles to search for in --gallery: a text file (one a line), JSON, CSV, Parquet, or a Hub data set."
    )


@dataclass
class EvaluationArguments:
    """How to evaluate."""

    model_name_or_path: str | None = _option(None, "Folder or Hub name of the model (required).")
    output_dir: str | None = _option(None, "Folder for the results (default: evaluation/ in that of a local model).")
    overwrite_output_dir: bool = _option(
        False, "Replace results of another model or data set in the output folder, and drop unfinished work there."
    )
    image_size: int | None = _option(None, "Side of the photos in pixels (default: the model's).")
    k_rerank: str | None = _option(
        None,
        "Candidates that ITM re-ranks (default: 128, or the gallery where smaller). Several, 16,32,64: each is "
        "measured. all: every pair is scored, its match logits go to itm_logits.npy.",
    )
    score: str = _option(
        "fused",
        "What orders the candidates: fused (match logit + weight x ITC similarity), itm, or itc (no re-ranking).",
        choices=["fused", "itm", "itc"],
    )
    fusion_weight: float | None = _option(None, "Weight of the ITC similarity in the fused score (default: 1).")
    tune_fusion: str | None = _option(
        None, "Choose the weight on this split (with --data_files: this file) first; not on the one that is measured."
    )
    per_device_eval_batch_size: int = _option(32, "Rows encoded at a time.")
    rerank_batch_tokens: int | None = _option(
        None, "Text tokens of one re-ranking pass (default: what the memory holds, at most 8192)."
    )
    image_token_memory_gb: float | None = _option(
        None, "Host memory of a process for image tokens; others are encoded twice (default: half of what is free)."
    )
    mixed_precision: str | None = _option(None, "no or bf16 (default: as the launcher says).", choices=["no", "bf16"])
    slices: str | None = _option(
        None, "Also split the results by these columns, separated by commas; title_length and script are always there."
    )
    compare: str | None = _option(
        None, "results.json of another run on the same data: is the difference more than chance?"
    )
    contact_sheet: str | None = _option(None, "Draw queries with their best photos into this PNG or JPEG file.")
    contact_sheet_rows: str | None = _option(
        None, "Rows of the titles to draw, separated by commas (default: chosen at random)."
    )
    report: str | None = _option(None, "Write one HTML page with the results, recall curves, misses and hits here.")
    submission: str | None = _option(None, "Write the competition's answer file, the best photos of each title, here.")
    submission_stringified: bool = _option(False, "Write its lists as text, as the published solution did.")
    verify_submission: str | None = _option(
        None, "Only check this answer file against the titles and photos of the data; no model is needed."
    )
    dry_run: bool = _option(False, "Only print memory, work and expected time.")
    seed: int = _option(0, "Seed of the choice of queries for the contact sheet.")


@dataclass
class ConvertArguments:
    """What to convert to what."""

    model_name_or_path: str | None = _option(
        None, "An original .pth file, or folder or Hub name of transformers' BLIP or of AliBLIP (required)."
    )
    output_dir: str | None = _option(None, "New folder for the result (required).")
    to: str = _option(
        "aliblip",
        "aliblip; transformers (a folder for BlipForImageTextRetrieval); original (a model.pth for the original code).",
        choices=["aliblip", "transformers", "original"],
    )
    tokenizer_name: str | None = _option(
        None, "Folder, vocab.txt or Hub name (default: the folder's own; for .pth files bert-base-uncased)."
    )
    max_length: int | None = _option(None, "Longest title in tokens (default: the folder's own, or 35).")
    image_size: int | None = _option(None, "Interpolate the position embedding to photos of this side in pixels.")
    momentum: str = _option(
        "none",
        "Training state of a .pth file to carry: none, encoders, or all (queues too: for the same data and ids).",
        choices=["none", "encoders", "all"],
    )
    vision_config: str | None = _option(
        None, 'Fields that the tensors of a .pth file don\'t tell, as JSON: {"num_attention_heads": 6}.'
    )
    text_config: str | None = _option(None, "The same for the BERT.")


@dataclass
class GalleryDataArguments(DataArguments):
    split_name: str = _option("train", "Split to embed; if there is only one, that one.")
    data_files: str | None = _option(None, "Instead of a data set: a file or glob, a JSON list too.")
    id_column: str | None = _option(
        None,
        "Column of the ids, text or whole numbers (default: the names of the files of a folder, else numbers of rows).",
    )
    dataloader_num_workers: int = _option(2, "Threads of each process that read and decode photos ahead.")


@dataclass
class GalleryArguments:
    """How to build a gallery."""

    model_name_or_path: str | None = _option(None, "Folder or Hub name of the model, or an original file (required).")
    tokenizer_name: str | None = _option(
        None, "Folder, vocab.txt or Hub name (default: the model's own; for original files bert-base-uncased)."
    )
    output_dir: str | None = _option(None, "Folder for the gallery (required).")
    overwrite_output_dir: bool = _option(False, "Replace a gallery, or the beginning of another one, that is there.")
    kind: str = _option("image", "What to embed: photos (image) or titles (text).", choices=["image", "text"])
    dtype: str = _option(
        "float32",
        "How vectors are stored: float32, float16 (half the space) or int8 (a quarter).",
        choices=["float32", "float16", "int8"],
    )
    store_tokens: bool = _option(
        False, "Keep image tokens, so that re-ranking needs no photo: 0.9 MB a photo with base at 384 px."
    )
    duplicates: str = _option(
        "error", "Where an id comes twice: error, or first (the others are skipped).", choices=["error", "first"]
    )
    faiss: bool = _option(False, "Add an approximate index (FAISS), for millions of photos.")
    measure_recall: int = _option(
        1000, "Search so many of the items to tell what smaller types and FAISS lose against exact fp32; 0: don't."
    )
    per_device_eval_batch_size: int = _option(32, "Photos or titles embedded at a time.")
    unit_size: int = _option(256, "Items that one process embeds together, and that a kill loses at most.")
    mixed_precision: str | None = _option(None, "no or bf16 (default: as the launcher says).", choices=["no", "bf16"])


@dataclass
class ServeArguments:
    """What the search page searches, and where it listens. Each can also be given as a variable of the environment,
    such as ALIBLIP_GALLERY; flags win."""

    model_name_or_path: str | None = _option(None, "Folder or Hub name of the model, or an original file (required).")
    tokenizer_name: str | None = _option(
        None, "Folder, vocab.txt or Hub name (default: the model's own; for original files bert-base-uncased)."
    )
    gallery: str | None = _option(
        None,
        "What to search (required): a folder of photos, of Parquet files or tars, embedded at the start; or the folder "
        "or Hub name of a gallery.",
    )
    split_name: str = _option("train", "Split to search, where the photos' folder has several.")
    gallery_dir: str | None = _option(
        None, "Folder to keep the embedded photos in, for the next start (default: embedded at each start)."
    )
    update_gallery: bool = _option(
        False, "Embed the photos that are new since --gallery_dir was built, and drop those that are gone."
    )
    store_tokens: bool = _option(
        True,
        "Keep image tokens of the embedded photos, so that re-ranking is fast: 0.9 MB a photo with base at 384 px.",
    )
    photo_root: str | None = _option(None, "Folder of the photos that a gallery names by relative paths.")
    top_k: int = _option(12, "Results at first; the visitor may choose others.")
    rerank: int = _option(64, "Candidates that ITM re-ranks at first; 0: ITC alone.")
    fusion_weight: float = _option(
        1.0, "Weight of the ITC similarity beside the match logit; evaluate_retrieval.py --tune_fusion finds one."
    )
    max_upload_mb: int = _option(20, "Largest photo that can be dropped, in MiB.")
    server_name: str | None = _option(
        None,
        "Address to listen on; 0.0.0.0: everywhere (default: GRADIO_SERVER_NAME, or 127.0.0.1: this machine only).",
    )
    server_port: int | None = _option(None, "Port (default: GRADIO_SERVER_PORT, or the first free one from 7860 on).")


class _Parser(HfArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message}; see --help")


def parse(dataclass_types: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None) -> tuple:
    """Parse flags and the recipe that `--config` names into one instance per dataclass.

    Raises:
        UsageError: an unknown flag or key, a value of the wrong type, a recipe that can't be read.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _Parser(
        dataclass_types,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="Recipe: a YAML mapping of these flags' names to values; flags override it.")
    names = {f.name: f for dataclass_type in dataclass_types for f in dataclasses.fields(dataclass_type)}
    recipe = _config_value(argv)
    if recipe is not None:
        # As flags before the given ones: argparse converts and checks both alike, and the later one wins.
        argv = [*_recipe_flags(recipe, names), *argv]
    parsed = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    if parsed[-1]:
        flag = parsed[-1][0]
        raise UsageError(f"unknown argument {flag}: {_suggest(flag.lstrip('-').split('=')[0], names)}; see --help")
    return tuple(parsed[: len(dataclass_types)])


def _config_value(argv: list[str]) -> str | None:
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    try:
        return finder.parse_known_args(argv)[0].config
    except SystemExit as error:
        raise UsageError("--config needs the path of a recipe") from error


def _recipe_flags(path: str, names: dict) -> list[str]:
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"can't read the recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"the recipe {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(recipe, dict):
        raise UsageError(
            f"the recipe {path} holds a {type(recipe).__name__}: it must be a mapping of flag names to values"
        )
    flags = []
    for key, value in recipe.items():
        if key not in names:
            raise UsageError(f"unknown key {key!r} in the recipe {path}: {_suggest(str(key), names)}")
        if value is None:
            continue
        flags += [f"--{key}={json.dumps(value) if isinstance(value, (dict, bool)) else value}"]
    return flags


def _suggest(name: str, names) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"accepted are {', '.join(sorted(names))}"


def json_mapping(name: str, text: str | None) -> dict:
    """A flag that holds a JSON object, as a dictionary; empty without the flag.

    Raises:
        UsageError: something else than a JSON object.
    """
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(
            f'--{name} is not valid JSON ({error}): give an object such as {{"hidden_size": 192}}'
        ) from error
    if not isinstance(value, dict):
        raise UsageError(f'--{name} is a {type(value).__name__}: give a JSON object such as {{"hidden_size": 192}}')
    return value


def check_range(**ranges) -> None:
    """`name=(value, low, high)`; None as a bound: open; None as a value: not given.

    Raises:
        UsageError: a value out of its range.
    """
    for name, (value, low, high) in ranges.items():
        if value is not None and ((low is not None and value < low) or (high is not None and value > high)):
            accepted = f"at least {low}" if high is None else f"from {low} to {high}"
            raise UsageError(f"--{name} is {value}: it must be {accepted}")


def first_line(error: BaseException) -> str:
    """What an error of a library says first, for a `UsageError`."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def main_with_usage_errors(name: str, main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its code; a UsageError ends it with exit code 2 and one line, printed by the
    first process.

    The other processes of a launch meet the same mistake. They wait: a launcher ends all processes as soon as one has
    failed, so one that left first would cut the line off. Whoever is still there after that met a mistake of its own.
    """
    try:
        sys.exit(main())
    except UsageError as error:
        if int(os.environ.get("RANK", "0")) != 0:
            time.sleep(SECONDS_FOR_THE_FIRST_PROCESS)
        print(f"{name}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


__all__ = [
    "ConvertArguments",
    "DataArguments",
    "EvaluationArguments",
    "EvaluationDataArguments",
    "GalleryArguments",
    "GalleryDataArguments",
    "HubArguments",
    "ModelArguments",
    "PublishArguments",
    "ServeArguments",
    "TrainDataArguments",
    "TrainingArguments",
    "UsageError",
    "check_range",
    "first_line",
    "json_mapping",
    "main_with_usage_errors",
    "parse",
]
