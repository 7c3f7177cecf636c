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
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import PreTrainedTokenizerFast

from aliblip.data.collate import Collator
from aliblip.data.loader import EvalLoader, TrainLoader
from aliblip.data.manifest import manifest_changes
from aliblip.data.order import Layout, default_window, facts_of, most_partitions
from aliblip.data.products import ProductReport, tell_sources
from aliblip.data.rows import Source
from aliblip.data.sources import open_source, require_usable_row
from aliblip.data.titles import look_at_titles, tell_cut_titles, titles_of
from aliblip.data.wordpiece import SMALLEST_VOCABULARY
from aliblip.models.backbones import Backbone
from aliblip.models.original import is_original
from aliblip.models.upload import HubArguments, Publisher, check_hub_arguments, connect
from aliblip.retrieval.evaluation import check_k_rerank
from aliblip.retrieval.model_folder import DEFAULT_MAX_LENGTH
from aliblip.retrieval.plan import launched_device
from aliblip.runtime.accelerator import TRAINING_PRECISIONS, AliBlipAccelerator, build_accelerator, sum_in_order
from aliblip.runtime.arguments import check_range
from aliblip.runtime.checks import part
from aliblip.runtime.distributed import launched_rank, launched_world_size
from aliblip.runtime.files import repair
from aliblip.runtime.mistakes import UsageError, usage_errors
from aliblip.runtime.owners import Owner, check_copies
from aliblip.runtime.sameness import Change, way_back
from aliblip.training.arguments import ModelArguments, TrainDataArguments, TrainingArguments
from aliblip.training.building import (
    Beginning,
    begin,
    build_augmentation,
    build_model,
    carried_momentum,
    check_shape,
    read_backbones,
    set_checkpointed_layers,
)
from aliblip.training.checkpoint import Progress, checkpoints, find_checkpoint, order_of, read_state
from aliblip.training.evaluations import check_early_stopping
from aliblip.training.fp8 import check_fp8
from aliblip.training.freezing import freeze, frozen_parts
from aliblip.training.lora import adapt, check_lora
from aliblip.training.optim import learning_rate_schedule, rate_scales, total_optimizer_steps
from aliblip.training.profiling import check_profile
from aliblip.training.tokenizer import (
    TRAINED_TOKENIZER,
    check_trained_tokenizer,
    learn_tokenizer,
    load_trained_tokenizer,
)
from aliblip.training.trackers import IDS as TRACKER_IDS
from aliblip.training.trackers import check_trackers, named_trackers
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

# Flags of the data that hold for every split.
OF_ALL_SPLITS = (
    *("dataset_name", "dataset_config_name", "data_dir", "image_dir", "fetch_photos"),
    *("image_column", "caption_column", "product_id_column", "reading"),
)
MODELS = ("best", "last")
PROFILE = "profile"
OUTPUT_FOLDERS = (*MODELS, "logs", TRAINED_TOKENIZER, PROFILE)
# By the arguments a folder is known for that of a run: they are written over, and never missing.
ARGUMENTS = "arguments.json"
OUTPUT_FILES = (TRACKER_IDS, "log.jsonl", "skipped.jsonl", "manifest.json", "machine.json", "status.json")
# What sets a fact that the order of the rows depends on; the number of rows is the data's, and the global batch has
# several flags.
ORDER_FLAGS = {"data_partitions": "--data_partitions", "shuffle_window": "--shuffle_window", "seed": "--seed"}


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
    owner: Owner  # of the output folder; of nothing in other processes

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
        return self.loader.rows_per_step


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
        check_trained_tokenizer(self.model_args, "tokenizer_name", "model_name_or_path", "text_model_name_or_path")

    @part
    def numbers(self) -> None:
        check_ranges(self.model_args, self.data_args, self.args)

    @part
    def rates(self) -> tuple[str, ...]:
        """The parts that are frozen; the others have rates that make sense."""
        check_lora(self.model_args, self.args)
        rate_scales(self.args, 0, 0)
        return frozen_parts(self.args.freeze)

    @part
    def ways(self) -> None:
        check_cached_batch_size(self.args)
        check_unpad(self.args)
        check_fp8(self.args, None if self.is_a_try else launched_device())

    @part
    def trackers(self) -> None:
        check_trackers(self.args.report_to, self.args.project_name)

    @part
    def validation(self) -> None:
        check_validation_is_named(self.data_args, self.args)

    @part
    def publishing(self) -> None:
        check_publishing(self.args, self.hub_args)

    @part
    def settled_args(self) -> TrainingArguments:
        """The arguments of the run: of a new one, if there is no checkpoint yet that `last` could mean."""
        _ = self.owner  # before anything is read or tidied up that another run is about to write
        if self.args.resume_from_checkpoint is None:
            return self.args
        if launched_rank() == 0 and not self.is_a_try:
            repair(self.folder)
        return anew_without_checkpoint(self.folder, self.args, self.tell)

    @part
    def copies(self) -> None:
        check_copies()

    @part
    def owner(self) -> Owner:
        """Of an output folder that is there already: its main process. That of a new one is `new_owner`. A try looks
        whether it could be."""
        if launched_rank() or not self.folder.is_dir():
            return Owner()
        if self.is_a_try:
            Owner.look(self.folder, self.tell)
            return Owner()
        return Owner.of(self.folder, "train.py", tell=self.tell)

    @part
    def new_owner(self) -> Owner:
        """The same, once the folder is there."""
        _ = self.output_dir
        return self.owner if self.is_a_try or self.owner.folder else Owner.of(self.folder, "train.py", tell=self.tell)

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
        source = self.train_source
        return learn_tokenizer(
            self.model_args,
            titles_of(source.titles_only()),
            f"{source.name} ({source.split})",
            source.num_rows,
            self.model_args.max_length or DEFAULT_MAX_LENGTH,
            self.tell if launched_rank() == 0 else lambda line: None,
        )

    @part
    def beginning(self) -> Beginning:
        return begin(self.model_args, self.backbones, self.tokenizer)

    @part
    def momentum_start(self) -> dict[str, torch.Tensor] | None:
        """Momentum encoders and queues that came with the model."""
        if self.beginning.model is None or self.settled_args.resume_from_checkpoint is not None:
            return None
        name = self.model_args.model_name_or_path
        if self.args.lora_rank is not None:  # of a model without adapters
            return None
        return carried_momentum(name, self.beginning, self.beginning.model, self.args.queue_size)

    @part
    def model(self) -> AliBlipForImageTextRetrieval:
        """On the CPU, the same weights on every rank; in a try, a new one has shapes alone."""
        set_seed(self.args.seed)
        is_empty = self.is_a_try and not self.beginning.backbones
        with torch.device("meta") if is_empty else nullcontext():
            model = build_model(self.model_args, self.beginning)
        check_model(model, self.beginning.processor, self.args)
        if self.args.lora_rank is None:
            freeze(model, self.rates)
        else:
            set_seed(self.args.seed)
            adapt(model, self.model_args, self.args)
        return model

    # --- the data ---

    @part
    def train_source(self) -> Source:
        return self._open(self.data_args.train_split_name, self.data_args.train_file)

    @part
    def validation_source(self) -> Source | None:
        """None without evaluation."""
        _ = self.validation
        if not self.args.evaluates:
            return None
        return self._open(self.data_args.validation_split_name, self.data_args.validation_file)

    def _open(self, split: str, data_files: str | None) -> Source:
        options = {name: getattr(self.data_args, name) for name in OF_ALL_SPLITS}
        index_dir = None if self.is_a_try else str(self.folder / "tar_index")
        return open_source(split=split, data_files=data_files, index_dir=index_dir, **options)

    @property
    def _of_loaders(self) -> dict[str, int]:
        # By the launcher's word: there is no process group yet. The accelerator compares both when it is built.
        workers = self.data_args.dataloader_num_workers
        return {"rank": launched_rank(), "world_size": self.processes, "num_workers": workers}

    @part
    def told(self) -> ProductReport | None:
        """What the training data is, is told; what was found out about its products."""
        return self._tell_data(self.train_source)

    @part
    def told_validation(self) -> ProductReport | None:
        return None if self.validation_source is None else self._tell_data(self.validation_source)

    def _tell_data(self, source: Source) -> ProductReport | None:
        (found,) = tell_sources(source, tell=self.tell) or (None,)
        if self.is_a_try:  # a doctor looks at more of the titles than how many are cut
            return found
        processor = self.beginning.processor
        look = partial(look_at_titles, source, processor.tokenizer, processor.max_length)
        tell_cut_titles(source, look, self.tell)
        return found

    @part
    def usable(self) -> None:
        require_usable_row(self.train_source)

    @part
    def usable_validation(self) -> None:
        if self.validation_source is not None:
            check_k_rerank(self.args.k_rerank, self.validation_source.num_rows)
            require_usable_row(self.validation_source)

    @part
    def order_before(self) -> dict | None:
        """The order of the rows of the run that goes on; None of a new one. `resumed` tells what is wrong with it."""
        wanted = self.settled_args.resume_from_checkpoint
        with suppress(UsageError):
            return None if wanted is None else order_of(find_checkpoint(self.folder, wanted))
        return None

    @part
    def order(self) -> dict:
        """What the order of the rows depends on: a run resumes only where all of this is the same."""
        before = {} if self.order_before is None else facts_of(self.order_before)
        partitions, window = self.data_args.data_partitions, self.data_args.shuffle_window
        rows, processes = self.args.per_device_train_batch_size, self.processes
        global_batch = rows * processes * self.args.gradient_accumulation_steps
        if partitions is None:
            partitions = before.get("data_partitions") or most_partitions(global_batch, processes)
        if window is None:
            window = before.get("shuffle_window") or default_window(global_batch)
        return {
            "rows": self.train_source.num_rows,
            "global_batch": global_batch,
            "data_partitions": partitions,
            "shuffle_window": window,
            "seed": self.args.seed,
        }

    @part
    def batches(self) -> TrainLoader:
        """The order of the training rows of this rank; `loader` makes batches of them."""
        check_negatives(self.args, self.processes)
        before, order, layout = self.order_before, self.order, None
        if before is not None and facts_of(before) != order:  # `resumed` refuses it
            order = {**order, "data_partitions": most_partitions(order["global_batch"], self.processes)}
        elif before is not None and before != order:
            layout = Layout.of_version_0_1_0(before, order["rows"])
        return TrainLoader(
            self.train_source,
            None,
            batch_size=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            seed=self.args.seed,
            window=order["shuffle_window"],
            partitions=order["data_partitions"],
            layout=layout,
            **self._of_loaders,
        )

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
        loader, accumulation = self.batches, self.args.gradient_accumulation_steps
        if not loader.steps_per_epoch:
            batches = self.train_source.num_rows // (loader.batch_size * loader.world_size)
            raise UsageError(
                f"an epoch has {batches} batches, fewer than --gradient_accumulation_steps {accumulation}: lower it or "
                "the batch size"
            )
        return loader.steps_per_epoch // accumulation

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
    def profiled(self) -> None:
        check_profile(self.args.profile, self.total_steps, self.steps_per_epoch)

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
        state = read_state(checkpoint, self.order, self._flags_back, lambda before: manifest_changes(before, manifest))
        progress = Progress.of(state)
        if progress.step > self.total_steps:
            raise UsageError(
                f"{checkpoint} is at step {progress.step}, after the {self.total_steps} steps that are asked for: "
                "raise --num_train_epochs or --max_train_steps, or resume from an earlier checkpoint"
            )
        return checkpoint, progress, state["arguments"]

    def _flags_back(self, changed: list[Change]) -> str:
        """The flags that bring the order of a checkpoint back, with the processes of now if they can."""
        flags = [way_back(changed, ORDER_FLAGS)]
        if any(change.name in ("global_batch", "data_partitions") for change in changed):
            facts, args = facts_of(self.order_before), self.args
            flags.insert(0, flags_of_global_batch(facts, self.processes, args))
        return " ".join(filter(None, flags))

    @part
    def free_folder(self) -> Path:
        """The folder of the run, of the main process: nothing stands in its way. Nothing is changed."""
        check_output_dir(self.folder, self.settled_args)
        return self.folder

    @part
    def output_dir(self) -> Path:
        """The same, and it is there, unless it is a try."""
        folder = self.free_folder
        if not self.is_a_try:
            make_output_dir(folder)
        return folder

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
    Check("flags", "copies", "who starts the processes"),
    Check("flags", "folder", "the output folder"),
    Check("flags", "named_tokenizer", "which tokenizer"),
    Check("flags", "numbers", "numbers"),
    Check("flags", "rates", "what is trained"),
    Check("flags", "ways", "ways to compute a step"),
    Check("flags", "trackers", "trackers"),
    Check("flags", "validation", "what to evaluate on"),
    Check("flags", "publishing", "what to publish"),
    Check("flags", "settled_args", "whether it goes on or begins"),
    Check("output", "free_folder", "the folder", by="main"),
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
    Check("course", "profiled", "the steps to profile"),
    Check("course", "resumed", "the checkpoint to go on from"),
    Check("output", "output_dir", "the folder", by="main"),
    Check("output", "new_owner", "its owner", by="main"),
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
    try:
        for check in CHECKS:
            if is_main or check.by == "all":
                check.make(start)
    except BaseException:
        for name in ("owner", "new_owner"):
            if name in vars(start):
                vars(start)[name].release()
        raise
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
        order=start.order_before or start.order,
        manifest=start.manifest,
        checkpoint=checkpoint,
        progress=progress,
        arguments_before=arguments_before,
        publisher=start.publisher if is_main else None,
        owner=start.new_owner if is_main else start.owner,
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
        log_with=named_trackers(args.report_to) or None,
        project_dir=setup.output_dir / "logs",
        max_grad_norm=args.max_grad_norm,
        per_device_train_batch_size=args.per_device_train_batch_size,
        precisions=TRAINING_PRECISIONS,
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
        itm_negatives=(args.itm_negatives, 1, None),
        itm_queue_titles=(args.itm_queue_titles, 0, None),
        itm_negative_ceiling=(args.itm_negative_ceiling, -1, 1),
        itm_listwise=(args.itm_listwise, 0, None),
        cached_batch_size=(args.cached_batch_size, 1, None),
        patch_dropout=(args.patch_dropout, 0, 0.99),
        logging_steps=(args.logging_steps, 1, None),
        evaluate_every=(args.evaluate_every, 0, None),
        eval_steps=(args.eval_steps, 1, None),
        early_stopping_patience=(args.early_stopping_patience, 1, None),
        checkpointing_steps=(args.checkpointing_steps, 1, None),
        save_total_limit=(args.save_total_limit, 1, None),
        max_non_finite_steps=(args.max_non_finite_steps, 1, None),
        vision_learning_rate=(args.vision_learning_rate, 0, None),
        text_learning_rate=(args.text_learning_rate, 0, None),
        temperature_learning_rate=(args.temperature_learning_rate, 0, None),
        lora_rank=(args.lora_rank, 1, None),
        lora_alpha=(args.lora_alpha, 0, None),
        layer_decay=(args.layer_decay, 0.01, 1),
        peak_tflops=(args.peak_tflops, 0.001, None),
        profile=(args.profile, 0, None),
        seed=(args.seed, 0, 2**31 - 1),  # NumPy takes a little more, and each process adds its number
        dataloader_num_workers=(data_args.dataloader_num_workers, 0, None),
        shuffle_window=(data_args.shuffle_window, 1, None),
        data_partitions=(data_args.data_partitions, 1, None),
        min_crop_scale=(data_args.min_crop_scale, 0.01, 1),
        max_skipped_fraction=(data_args.max_skipped_fraction, 0, 1),
    )


def check_negatives(args: TrainingArguments, processes: int) -> None:
    """Whether a batch has as many rows beside a row itself. One is the default, and may be missing."""
    rows = args.per_device_train_batch_size * (processes if args.negatives_from_all_ranks else 1)
    if args.itm_negatives > max(rows - 1, 1):
        more = "" if processes == 1 or args.negatives_from_all_ranks else ", or --negatives_from_all_ranks true"
        raise UsageError(
            f"--itm_negatives is {args.itm_negatives}, but they are drawn from {rows} rows: give at most {rows - 1}, a "
            f"larger --per_device_train_batch_size{more}; --itm_queue_titles draws from the queue"
        )


def lone_rows(args: TrainingArguments, processes: int) -> str | None:
    """What is wrong with batches in which a row has no other beside it; None: they are larger, or take other titles."""
    rows = args.per_device_train_batch_size * (processes if args.negatives_from_all_ranks else 1)
    if rows > 1 or args.itm_queue_titles:
        return None
    return (
        "--per_device_train_batch_size 1 leaves no row that a photo or title does not match: the matching head learns "
        "that everything does; raise it, or give --itm_queue_titles"
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
    check_early_stopping(args)
    if args.evaluates and data_args.train_file is not None and data_args.validation_file is None:
        raise UsageError("--train_file without --validation_file: name the rows to evaluate on, or --evaluate_every 0")


def check_publishing(args: TrainingArguments, hub_args: HubArguments) -> None:
    if args.push_to_hub:
        check_hub_arguments(hub_args)
    elif hub_args.hub_model_id is not None:
        raise UsageError("--hub_model_id without --push_to_hub would upload nothing: give both, or neither")


def check_model(model: AliBlipForImageTextRetrieval, processor: AliBlipProcessor, args: TrainingArguments) -> None:
    """What only the model can tell about arguments; sets its gradient checkpointing."""
    longest = model.config.text_config.max_position_embeddings
    if processor.max_length > longest:
        raise UsageError(f"--max_length is {processor.max_length}: the model takes at most {longest} tokens")
    if args.gradient_checkpointing:
        with usage_errors(ValueError):  # more layers than it has
            set_checkpointed_layers(
                model, args.gradient_checkpointing_vision_layers, args.gradient_checkpointing_text_layers
            )


def flags_of_global_batch(facts: dict, processes: int, args: TrainingArguments) -> str:
    """The flags with which a number of processes, or the next smaller one that can, has the rows of a global batch: as
    many batches of the present size, or the next smaller one, as it takes."""
    total, partitions = facts["global_batch"], facts["data_partitions"]
    able = next(number for number in range(min(processes, partitions), 0, -1) if partitions % number == 0)
    share = total // able
    rows = next(n for n in range(min(args.per_device_train_batch_size, share), 0, -1) if share % n == 0)
    wanted = {
        "accelerate launch --num_processes": (able, processes),
        "--per_device_train_batch_size": (rows, args.per_device_train_batch_size),
        "--gradient_accumulation_steps": (share // rows, args.gradient_accumulation_steps),
    }
    return " ".join(f"{flag} {value}" for flag, (value, now) in wanted.items() if value != now)


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
    folders = [output_dir / name for name in (*MODELS, TRAINED_TOKENIZER, PROFILE)] + checkpoints(output_dir)
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
    "PROFILE",
    "Check",
    "Setup",
    "Start",
    "earlier_outputs",
    "existing_parent",
    "lone_rows",
    "meet",
    "remove",
    "set_up",
]
