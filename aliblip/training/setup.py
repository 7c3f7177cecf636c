"""Everything that can be wrong with a run, looked at before its processes meet and before any long work.

    setup = set_up(model_args, data_args, args, hub_args)
    accelerator = meet(setup)

What a user got wrong raises `UsageError` here, in one line that says what to do.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, set_seed
from transformers import PreTrainedTokenizerFast

from aliblip.data.collate import Collator
from aliblip.data.loader import EvalLoader, TrainLoader
from aliblip.data.manifest import manifest_changes
from aliblip.data.products import tell_sources
from aliblip.data.rows import Source
from aliblip.data.sources import open_source, require_usable_row
from aliblip.data.titles import look_at_titles, tell_cut_titles
from aliblip.data.wordpiece import SMALLEST_VOCABULARY
from aliblip.models.backbones import Backbone
from aliblip.models.original import is_original
from aliblip.models.upload import HubArguments, Publisher, check_hub_arguments, connect
from aliblip.retrieval.evaluation import check_k_rerank
from aliblip.runtime.accelerator import AliBlipAccelerator, build_accelerator, sum_in_order
from aliblip.runtime.arguments import check_range
from aliblip.runtime.checks import part
from aliblip.runtime.distributed import launched_rank, launched_world_size
from aliblip.runtime.files import repair
from aliblip.runtime.installation import install_hint
from aliblip.runtime.mistakes import UsageError, usage_errors
from aliblip.training.arguments import ModelArguments, TrainDataArguments, TrainingArguments
from aliblip.training.building import (
    Beginning,
    begin,
    build_augmentation,
    build_model,
    carried_momentum,
    check_shape,
    read_backbones,
)
from aliblip.training.checkpoint import Progress, checkpoints, find_checkpoint, read_state
from aliblip.training.optim import learning_rate_schedule, total_optimizer_steps
from aliblip.training.tokenizer import (
    TRAINED_TOKENIZER,
    check_trained_tokenizer,
    learn_tokenizer,
    load_trained_tokenizer,
)
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

# Flags of the data that hold for every split.
OF_ALL_SPLITS = (
    *("dataset_name", "dataset_config_name", "data_dir", "image_dir", "fetch_photos"),
    *("image_column", "caption_column", "product_id_column", "reading"),
)
MODELS = ("best", "last")
OUTPUT_FOLDERS = (*MODELS, "logs", TRAINED_TOKENIZER)
# By the arguments a folder is known for that of a run: they are written over, and never missing.
ARGUMENTS = "arguments.json"
OUTPUT_FILES = ("log.jsonl", "skipped.jsonl", "manifest.json", "machine.json", "status.json")
# What the order of the rows depends on, and what sets it; the number of rows is the data's.
ORDER_FLAGS = {
    "processes": "accelerate launch --num_processes",
    "per_device_train_batch_size": "--per_device_train_batch_size",
    "dataloader_num_workers": "--dataloader_num_workers",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "shuffle_window": "--shuffle_window",
    "seed": "--seed",
}


@dataclasses.dataclass
class Setup:
    """What a run needs before its processes meet."""

    model_args: ModelArguments
    data_args: TrainDataArguments
    args: TrainingArguments
    processor: AliBlipProcessor
    model: AliBlipForImageTextRetrieval  # on the CPU, the same weights on every rank
    momentum_start: dict[str, torch.Tensor] | None  # momentum encoders and queues that came with the model
    loader: TrainLoader
    validation_loader: EvalLoader | None
    steps_per_epoch: int  # optimizer steps, as are all steps unless they are called batches
    total_steps: int
    learning_rate: Callable[[int], float]
    order: dict  # what the order of the rows depends on
    manifest: dict  # of the training data
    checkpoint: Path | None  # from which the run goes on
    progress: Progress
    arguments_before: dict  # of the run that is resumed
    publisher: Publisher | None  # of the main process, if it was asked for

    @property
    def output_dir(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def arguments(self) -> dict:
        """What `arguments.json` and checkpoints hold."""
        groups = (self.model_args, self.data_args, self.args)
        return {key: value for group in groups for key, value in dataclasses.asdict(group).items()}

    @property
    def rows_per_step(self) -> int:
        """Of all processes."""
        return self.args.gradient_accumulation_steps * self.loader.world_size * self.args.per_device_train_batch_size


class Start:
    """What a run is made of before its processes meet. Each part is made when it is first asked for, and raises
    `UsageError`: what is wrong with it, and what to do.

    `CHECKS` lists those that can be wrong, for a run to go through, and for a doctor.

    Args:
        model_args, data_args, args, hub_args: what was asked for.
        is_a_try: nothing is written, on the Hub either, and no weights are drawn for a new model.
        processes: of the run; None: as the launcher says.
        tell: takes the lines about the data.
    """

    def __init__(
        self,
        model_args: ModelArguments,
        data_args: TrainDataArguments,
        args: TrainingArguments,
        hub_args: HubArguments,
        *,
        is_a_try: bool = False,
        processes: int | None = None,
        tell: Callable[[str], object] = print,
    ):
        self.model_args, self.data_args, self.args, self.hub_args = model_args, data_args, args, hub_args
        self.is_a_try, self.tell = is_a_try, tell
        self.processes = launched_world_size() if processes is None else processes

    # --- flags, which say more than one thing about a run ---

    @part
    def origin(self) -> None:
        check_where_the_model_comes_from(self.model_args)

    @part
    def folder(self) -> Path:
        """The output folder, as it is named."""
        if self.args.output_dir is None:
            raise UsageError("--output_dir is missing: name the folder for models and logs")
        return Path(self.args.output_dir)

    @part
    def named_tokenizer(self) -> None:
        check_trained_tokenizer(self.model_args)

    @part
    def numbers(self) -> None:
        check_ranges(self.model_args, self.data_args, self.args)

    @part
    def ways(self) -> None:
        check_cached_batch_size(self.args)
        check_unpad(self.args)

    @part
    def trackers(self) -> None:
        check_trackers(self.args.report_to)

    @part
    def validation(self) -> None:
        check_validation_is_named(self.data_args, self.args)

    @part
    def publishing(self) -> None:
        check_publishing(self.args, self.hub_args)

    @part
    def settled_args(self) -> TrainingArguments:
        """The arguments of the run: of a new one, if there is no checkpoint yet that `last` could mean."""
        if self.args.resume_from_checkpoint is None:
            return self.args
        if launched_rank() == 0 and not self.is_a_try:
            repair(self.folder)
        return anew_without_checkpoint(self.folder, self.args, self.tell)

    # --- the model ---

    @part
    def backbones(self) -> list[Backbone]:
        """Trained towers of a new model."""
        _ = self.origin
        return [] if self.model_args.model_name_or_path is not None else read_backbones(self.model_args)

    @part
    def shape(self) -> None:
        check_shape(self.model_args, self.backbones)

    @part
    def tokenizer(self) -> PreTrainedTokenizerFast | None:
        """One that is learned from the titles, or was by the run that goes on; None if it was not asked for. All
        processes learn it, from the same titles, before they meet: the same bytes."""
        _ = self.named_tokenizer
        if not self.model_args.train_tokenizer:
            return None
        checkpoint = self.resumed[0]
        if checkpoint is not None:
            return load_trained_tokenizer(checkpoint.parent / TRAINED_TOKENIZER)
        source = self._open(self.data_args.train_split_name, self.data_args.train_file, sides="titles")
        return learn_tokenizer(self.model_args, source, self.tell if launched_rank() == 0 else lambda line: None)

    @part
    def beginning(self) -> Beginning:
        return begin(self.model_args, self.backbones, self.tokenizer)

    @part
    def momentum_start(self) -> dict[str, torch.Tensor] | None:
        """Momentum encoders and queues that came with the model."""
        if self.beginning.model is None or self.settled_args.resume_from_checkpoint is not None:
            return None
        name = self.model_args.model_name_or_path
        return carried_momentum(name, self.beginning, self.beginning.model, self.args.queue_size)

    @part
    def model(self) -> AliBlipForImageTextRetrieval:
        """On the CPU, the same weights on every rank; in a try, a new one has shapes alone."""
        set_seed(self.args.seed)
        is_empty = self.is_a_try and not self.beginning.backbones
        with torch.device("meta") if is_empty else nullcontext():
            model = build_model(self.model_args, self.beginning)
        check_model(model, self.beginning.processor, self.args)
        return model

    # --- the data ---

    @part
    def train_source(self) -> Source:
        return self._open(self.data_args.train_split_name, self.data_args.train_file)

    @part
    def validation_source(self) -> Source | None:
        """None without evaluation."""
        _ = self.validation
        if not self.args.evaluate_every:
            return None
        return self._open(self.data_args.validation_split_name, self.data_args.validation_file)

    def _open(self, split: str, data_files: str | None, **more: str) -> Source:
        options = {name: getattr(self.data_args, name) for name in OF_ALL_SPLITS}
        index_dir = None if self.is_a_try else str(self.folder / "tar_index")
        return open_source(split=split, data_files=data_files, index_dir=index_dir, **options, **more)

    @property
    def _of_loaders(self) -> dict[str, int]:
        # By the launcher's word: there is no process group yet. The accelerator compares both when it is built.
        workers = self.data_args.dataloader_num_workers
        return {"rank": launched_rank(), "world_size": self.processes, "num_workers": workers}

    @part
    def told(self) -> None:
        """What the training data is, is told."""
        self._tell_data(self.train_source)

    @part
    def told_validation(self) -> None:
        if self.validation_source is not None:
            self._tell_data(self.validation_source)

    def _tell_data(self, source: Source) -> None:
        tell_sources(source, tell=self.tell)
        if self.is_a_try:  # a doctor looks at more of the titles than how many are cut
            return
        processor = self.beginning.processor
        look = partial(look_at_titles, source, processor.tokenizer, processor.max_length)
        tell_cut_titles(source, look, self.tell)

    @part
    def usable(self) -> None:
        require_usable_row(self.train_source)

    @part
    def usable_validation(self) -> None:
        if self.validation_source is not None:
            check_k_rerank(self.args.k_rerank, self.validation_source.num_rows)
            require_usable_row(self.validation_source)

    @part
    def batches(self) -> TrainLoader:
        """The order of the training rows of this rank; `loader` makes batches of them."""
        batch_size, window = self.args.per_device_train_batch_size, self.data_args.shuffle_window
        options = {"batch_size": batch_size, "seed": self.args.seed, "window": window}
        return TrainLoader(self.train_source, None, **options, **self._of_loaders)

    @part
    def loader(self) -> TrainLoader:
        augmentation = build_augmentation(self.data_args, self.beginning.image_size)
        self.batches.collator = Collator(self.beginning.processor, augmentation, seed=self.args.seed)
        return self.batches

    @part
    def validation_loader(self) -> EvalLoader | None:
        if self.validation_source is None:
            return None
        collator, unit_size = Collator(self.beginning.processor), self.args.per_device_eval_batch_size
        return EvalLoader(self.validation_source, collator, unit_size=unit_size, **self._of_loaders)

    # --- the course ---

    @part
    def steps_per_epoch(self) -> int:
        """Optimizer steps."""
        batches, accumulation = self.batches.steps_per_epoch, self.args.gradient_accumulation_steps
        if batches < accumulation:
            raise UsageError(
                f"an epoch has {batches} batches, fewer than --gradient_accumulation_steps {accumulation}: lower it or "
                "the batch size"
            )
        return batches // accumulation

    @part
    def total_steps(self) -> int:
        return total_optimizer_steps(self.steps_per_epoch, self.args.num_train_epochs, self.args.max_train_steps)

    @part
    def learning_rate(self) -> Callable[[int], float]:
        args = self.args
        return learning_rate_schedule(
            args.lr_scheduler_type, args.learning_rate, args.warmup_steps, self.total_steps, self.steps_per_epoch
        )

    @part
    def order(self) -> dict:
        """What the order of the rows depends on: a run resumes only where all of this is the same."""
        return {
            "rows": self.train_source.num_rows,
            "processes": self.processes,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "dataloader_num_workers": self.data_args.dataloader_num_workers,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "shuffle_window": self.data_args.shuffle_window,
            "seed": self.args.seed,
        }

    @part
    def manifest(self) -> dict:
        return self.train_source.manifest()

    @part
    def resumed(self) -> tuple[Path | None, Progress, dict]:
        """The checkpoint to go on from, how far it is, and the arguments of its run; None, nothing and none without
        one."""
        wanted = self.settled_args.resume_from_checkpoint
        if wanted is None:
            return None, Progress(), {}
        checkpoint = find_checkpoint(self.folder, wanted)
        manifest = self.manifest
        state = read_state(checkpoint, self.order, ORDER_FLAGS, lambda before: manifest_changes(before, manifest))
        progress = Progress.of(state)
        if progress.step > self.total_steps:
            raise UsageError(
                f"{checkpoint} is at step {progress.step}, after the {self.total_steps} steps that are asked for: "
                "raise --num_train_epochs or --max_train_steps, or resume from an earlier checkpoint"
            )
        return checkpoint, progress, state["arguments"]

    @part
    def output_dir(self) -> Path:
        """The folder of the run, of the main process: nothing stands in its way."""
        check_output_dir(self.folder, self.settled_args)
        if not self.is_a_try:
            make_output_dir(self.folder)
        return self.folder

    @part
    def publisher(self) -> Publisher | None:
        """Of the main process, if it was asked for."""
        _ = self.publishing
        if not self.args.push_to_hub:
            return None
        return Publisher(*connect(self.hub_args, make=not self.is_a_try), license=self.hub_args.hub_license)


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that can be wrong with a run.

    Attributes:
        group: what it is about.
        part: of a `Start`, whose making is the check.
        name: what is looked at.
        by: "all" processes, or the "main" one.
    """

    group: str
    part: str
    name: str
    by: str = "all"

    def make(self, start: Start) -> Any:
        """What the part is.

        Raises:
            UsageError: what is wrong.
            AlreadyTold: it needs a part of which that has been told.
        """
        return getattr(start, self.part)


# All that can be wrong before the processes meet, in the order in which a run looks at it.
CHECKS = (
    Check("flags", "origin", "where the model comes from"),
    Check("flags", "folder", "the output folder"),
    Check("flags", "named_tokenizer", "which tokenizer"),
    Check("flags", "numbers", "numbers"),
    Check("flags", "ways", "ways to compute a step"),
    Check("flags", "trackers", "trackers"),
    Check("flags", "validation", "what to evaluate on"),
    Check("flags", "publishing", "what to publish"),
    Check("flags", "settled_args", "whether it goes on or begins"),
    Check("model", "backbones", "trained towers"),
    Check("model", "shape", "configuration"),
    Check("model", "tokenizer", "a tokenizer of the titles"),
    Check("model", "beginning", "tokenizer"),
    Check("model", "momentum_start", "momentum encoders"),
    Check("training data", "train_source", "rows to train on"),
    Check("validation data", "validation_source", "rows to evaluate on"),
    Check("training data", "told", "what is in it"),
    Check("validation data", "told_validation", "what is in it"),
    Check("training data", "usable", "usable rows"),
    Check("training data", "batches", "batches"),
    Check("validation data", "usable_validation", "usable rows and candidates"),
    Check("training data", "loader", "loader"),
    Check("validation data", "validation_loader", "loader"),
    Check("course", "total_steps", "steps"),
    Check("model", "model", "weights"),
    Check("course", "learning_rate", "schedule"),
    Check("course", "resumed", "the checkpoint to go on from"),
    Check("output", "output_dir", "the folder", by="main"),
    Check("Hub", "publisher", "access", by="main"),
)


def set_up(
    model_args: ModelArguments, data_args: TrainDataArguments, args: TrainingArguments, hub_args: HubArguments
) -> Setup:
    """Look at the arguments, open the data, make or load the model, find the checkpoint and ask the Hub.

    Raises:
        UsageError: what is wrong with any of these, and what to do.
    """
    start = Start(model_args, data_args, args, hub_args)
    is_main = launched_rank() == 0
    for check in CHECKS:
        if is_main or check.by == "all":
            check.make(start)
    checkpoint, progress, arguments_before = start.resumed
    return Setup(
        model_args=model_args,
        data_args=data_args,
        args=start.settled_args,
        processor=start.beginning.processor,
        model=start.model,
        momentum_start=start.momentum_start,
        loader=start.loader,
        validation_loader=start.validation_loader,
        steps_per_epoch=start.steps_per_epoch,
        total_steps=start.total_steps,
        learning_rate=start.learning_rate,
        order=start.order,
        manifest=start.manifest,
        checkpoint=checkpoint,
        progress=progress,
        arguments_before=arguments_before,
        publisher=start.publisher if is_main else None,
    )


def meet(setup: Setup) -> AliBlipAccelerator:
    """Let the processes meet.

    Raises:
        UsageError: the launcher and the arguments contradict each other.
    """
    args = setup.args
    if args.deterministic:
        sum_in_order()
    return build_accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=setup.output_dir / "logs",
        max_grad_norm=args.max_grad_norm,
        per_device_train_batch_size=args.per_device_train_batch_size,
    )


# --- arguments --------------------------------------------------------------------------------------------------------


def check_where_the_model_comes_from(args: ModelArguments) -> None:
    trained = args.model_name_or_path
    new = (args.config_name, args.vision_model_name_or_path, args.text_model_name_or_path)
    if (trained is None) == (new == (None, None, None)):
        raise UsageError(
            "give either --config_name base, large or a folder (to train from scratch) and for trained towers "
            "--vision_model_name_or_path and --text_model_name_or_path, or --model_name_or_path (to go on from a "
            "trained model)"
        )
    of_new_models = ["image_text_hidden_size", "temperature_init"]
    if trained is not None and not is_original(trained):  # of a .pth file they tell what its tensors don't
        of_new_models += ["vision_config", "text_config"]
    for name in of_new_models:
        if trained is not None and getattr(args, name) is not None:
            raise UsageError(f"--{name} is for training from scratch: a trained model brings its own, leave it out")


def check_ranges(model_args: ModelArguments, data_args: TrainDataArguments, args: TrainingArguments) -> None:
    check_range(
        per_device_train_batch_size=(args.per_device_train_batch_size, 1, None),
        per_device_eval_batch_size=(args.per_device_eval_batch_size, 1, None),
        gradient_accumulation_steps=(args.gradient_accumulation_steps, 1, None),
        learning_rate=(args.learning_rate, 0, None),
        adam_beta1=(args.adam_beta1, 0, 0.9999999),
        adam_beta2=(args.adam_beta2, 0, 0.9999999),
        adam_epsilon=(args.adam_epsilon, 0, None),
        weight_decay=(args.weight_decay, 0, None),
        max_length=(model_args.max_length, 3, None),
        tokenizer_vocab_size=(model_args.tokenizer_vocab_size, SMALLEST_VOCABULARY, None),
        tokenizer_titles=(model_args.tokenizer_titles, 1, None),
        warmup_steps=(args.warmup_steps, 0, None),
        max_train_steps=(args.max_train_steps, 1, None),
        max_grad_norm=(args.max_grad_norm, 0, None),
        queue_size=(args.queue_size, 1, None),
        momentum=(args.momentum, 0, 1),
        alpha=(args.alpha, 0, 1),
        in_batch_itc=(args.in_batch_itc, 0, 1),
        cached_batch_size=(args.cached_batch_size, 1, None),
        patch_dropout=(args.patch_dropout, 0, 0.99),
        logging_steps=(args.logging_steps, 1, None),
        evaluate_every=(args.evaluate_every, 0, None),
        checkpointing_steps=(args.checkpointing_steps, 1, None),
        save_total_limit=(args.save_total_limit, 1, None),
        max_non_finite_steps=(args.max_non_finite_steps, 1, None),
        seed=(args.seed, 0, 2**31 - 1),  # NumPy takes a little more, and each process adds its number
        dataloader_num_workers=(data_args.dataloader_num_workers, 0, None),
        shuffle_window=(data_args.shuffle_window, 1, None),
        min_crop_scale=(data_args.min_crop_scale, 0.01, 1),
        max_skipped_fraction=(data_args.max_skipped_fraction, 0, 1),
    )


def check_cached_batch_size(args: TrainingArguments) -> None:
    cached, batch_size = args.cached_batch_size, args.per_device_train_batch_size
    if cached is None:
        return
    if cached >= batch_size:
        raise UsageError(
            f"--cached_batch_size {cached} is not below --per_device_train_batch_size {batch_size}, of which so many "
            "rows go through the model at a time: lower it, or leave it out"
        )
    if args.gradient_checkpointing:
        raise UsageError(
            "--cached_batch_size with --gradient_checkpointing would compute everything three times: leave one of them "
            "out (a lower --cached_batch_size takes less memory too)"
        )


def check_unpad(args: TrainingArguments) -> None:
    if args.unpad and args.compile:
        raise UsageError("--unpad with --compile would compile layers that it does not call: leave one of them out")


def check_validation_is_named(data_args: TrainDataArguments, args: TrainingArguments) -> None:
    if args.evaluate_every and data_args.train_file is not None and data_args.validation_file is None:
        raise UsageError("--train_file without --validation_file: name the rows to evaluate on, or --evaluate_every 0")


def check_publishing(args: TrainingArguments, hub_args: HubArguments) -> None:
    if args.push_to_hub:
        check_hub_arguments(hub_args)
    elif hub_args.hub_model_id is not None:
        raise UsageError("--hub_model_id without --push_to_hub would upload nothing: give both, or neither")


def check_trackers(report_to: str) -> None:
    if report_to in ("none", "all"):
        return
    known = [str(kind) for kind in LoggerType if kind != LoggerType.ALL]
    if report_to not in known:
        raise UsageError(f"--report_to is {report_to!r}: give one of {', '.join(known)}, all or none")
    if report_to not in [str(kind) for kind in get_available_trackers()]:
        install = install_hint("tensorboard") if report_to == "tensorboard" else f"pip install {report_to}"
        raise UsageError(f"--report_to {report_to} is not installed: {install}, or --report_to none")


def check_model(model: AliBlipForImageTextRetrieval, processor: AliBlipProcessor, args: TrainingArguments) -> None:
    """What only the model can tell about arguments; sets its gradient checkpointing."""
    longest = model.config.text_config.max_position_embeddings
    if processor.max_length > longest:
        raise UsageError(f"--max_length is {processor.max_length}: the model takes at most {longest} tokens")
    if args.gradient_checkpointing:
        with usage_errors(ValueError):  # more layers than it has
            model.set_checkpointed_layers(
                args.gradient_checkpointing_vision_layers, args.gradient_checkpointing_text_layers
            )


# --- the output folder ------------------------------------------------------------------------------------------------


def anew_without_checkpoint(
    output_dir: Path, args: TrainingArguments, tell: Callable[[str], object]
) -> TrainingArguments:
    """The arguments of a new run, if `last` is asked for and the run died before its first checkpoint: the command that
    restarts it is then the same at any moment of its death.

    Raises:
        UsageError: there is no checkpoint, but there are models, which a new run would replace.
    """
    if args.resume_from_checkpoint != "last":
        return args
    if checkpoints(output_dir) or any(output_dir.glob(".checkpoint-*.old")):  # which the first process repairs
        return args
    models = [name for name in MODELS if (output_dir / name).exists()]
    if models and not args.overwrite_output_dir:
        raise UsageError(
            f"{output_dir} has no checkpoint to go on from, but the model {models[-1]!r} that starting anew would "
            f"replace: train from it (--model_name_or_path {output_dir / models[-1]}) into another --output_dir, or "
            "give --overwrite_output_dir, and --checkpointing_steps from now on"
        )
    if launched_rank() == 0:
        tell(f"{output_dir} has no checkpoint yet: the run starts anew")
    return dataclasses.replace(args, resume_from_checkpoint=None, overwrite_output_dir=True)


def check_output_dir(output_dir: Path, args: TrainingArguments) -> None:
    """Refuse to mix two runs in one folder, and a place where nothing can be written. Nothing is changed."""
    holds_a_run = (output_dir / ARGUMENTS).exists()
    strange = [name for name in OUTPUT_FOLDERS if (output_dir / name).exists() and not holds_a_run]
    if strange:
        raise UsageError(
            f"{output_dir} has a folder {strange[0]!r} that no run wrote and that this one would replace: give another "
            "--output_dir"
        )
    if holds_a_run and args.resume_from_checkpoint is None and not args.overwrite_output_dir:
        raise UsageError(
            f"{output_dir} holds an earlier run: give another --output_dir, --resume_from_checkpoint last to go on "
            f"with it, or --overwrite_output_dir to replace it"
        )
    there = existing_parent(output_dir)
    if not there.is_dir():
        raise UsageError(f"can't write into {output_dir} ({there} is a file): give another --output_dir")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"can't write into {output_dir} (no permission in {there}): give another --output_dir")


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = Path(os.path.abspath(path))
    return next(place for place in (path, *path.parents) if place.exists())


def make_output_dir(output_dir: Path) -> None:
    """Make the folder, and try to write into it: permissions don't tell everything."""
    with usage_errors(OSError, told=f"can't write into {output_dir} ({{}}): give another --output_dir"):
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()


def earlier_outputs(output_dir: Path) -> list[Path]:
    """What an earlier run left, which `check_output_dir` allows to replace: models and checkpoints, and all files but
    the arguments. Of the trackers' folder single files, since the new run's begin beside them."""
    repair(output_dir)
    folders = [output_dir / name for name in (*MODELS, TRAINED_TOKENIZER)] + checkpoints(output_dir)
    logs = [path for path in (output_dir / "logs").rglob("*") if path.is_file()]
    return [path for path in (*folders, *logs, *(output_dir / name for name in OUTPUT_FILES)) if path.exists()]


def remove(outputs: list[Path]) -> None:
    """Remove them, now that nothing can be refused any more."""
    for path in outputs:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


__all__ = [
    "ARGUMENTS",
    "CHECKS",
    "Check",
    "Setup",
    "Start",
    "earlier_outputs",
    "existing_parent",
    "meet",
    "remove",
    "set_up",
]
