"""Everything that can be wrong with a run, looked at before its processes meet and before any long work.

    setup = set_up(model_args, data_args, args, hub_args)
    accelerator = meet(setup)

What a user got wrong raises `UsageError` here, in one line that says what to do.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, set_seed

from aliblip.data.collate import Collator
from aliblip.data.loader import EvalLoader, TrainLoader
from aliblip.data.manifest import manifest_changes
from aliblip.data.rows import Source
from aliblip.data.sources import open_source, require_usable_row
from aliblip.models.original import is_original
from aliblip.models.upload import HubArguments, Publisher, check_hub_arguments, connect
from aliblip.retrieval.evaluation import check_k_rerank
from aliblip.runtime.accelerator import AliBlipAccelerator, build_accelerator
from aliblip.runtime.arguments import check_range
from aliblip.runtime.distributed import launched_rank, launched_world_size
from aliblip.runtime.files import repair
from aliblip.runtime.installation import install_hint
from aliblip.runtime.mistakes import UsageError, usage_errors
from aliblip.training.arguments import ModelArguments, TrainDataArguments, TrainingArguments
from aliblip.training.building import Beginning, begin, build_augmentation, build_model, carried_momentum
from aliblip.training.checkpoint import Progress, checkpoints, find_checkpoint, read_state
from aliblip.training.optim import learning_rate_schedule, total_optimizer_steps
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

MODELS = ("best", "last")
OUTPUT_FOLDERS = (*MODELS, "logs")
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


def set_up(
    model_args: ModelArguments, data_args: TrainDataArguments, args: TrainingArguments, hub_args: HubArguments
) -> Setup:
    """Look at the arguments, open the data, make or load the model, find the checkpoint and ask the Hub.

    Raises:
        UsageError: what is wrong with any of these, and what to do.
    """
    check_arguments(model_args, data_args, args, hub_args)
    args = anew_without_checkpoint(args)
    beginning = begin(model_args)
    momentum_start = None
    if beginning.model is not None and args.resume_from_checkpoint is None:
        name = model_args.model_name_or_path
        momentum_start = carried_momentum(name, beginning, beginning.model, args.queue_size)
    train_source, validation_source = open_sources(data_args, args)
    loader, validation_loader = build_loaders(train_source, validation_source, beginning, data_args, args)
    steps_per_epoch = loader.steps_per_epoch // args.gradient_accumulation_steps
    if not steps_per_epoch:
        raise UsageError(
            f"an epoch has {loader.steps_per_epoch} batches, fewer than --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}: lower it or the batch size"
        )
    set_seed(args.seed)
    model = build_model(model_args, beginning)
    check_model(model, beginning.processor, args)
    total_steps = total_optimizer_steps(steps_per_epoch, args.num_train_epochs, args.max_train_steps)
    learning_rate = learning_rate_schedule(
        args.lr_scheduler_type, args.learning_rate, args.warmup_steps, total_steps, steps_per_epoch
    )
    order = order_of(train_source, data_args, args)
    manifest = train_source.manifest()
    checkpoint, progress, arguments_before = find_progress(args, order, manifest, total_steps)
    publisher = None
    if launched_rank() == 0:
        check_output_dir(args)
        if args.push_to_hub:
            publisher = Publisher(*connect(hub_args), license=hub_args.hub_license)
    return Setup(
        model_args=model_args,
        data_args=data_args,
        args=args,
        processor=beginning.processor,
        model=model,
        momentum_start=momentum_start,
        loader=loader,
        validation_loader=validation_loader,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        learning_rate=learning_rate,
        order=order,
        manifest=manifest,
        checkpoint=checkpoint,
        progress=progress,
        arguments_before=arguments_before,
        publisher=publisher,
    )


def meet(setup: Setup) -> AliBlipAccelerator:
    """Let the processes meet.

    Raises:
        UsageError: the launcher and the arguments contradict each other.
    """
    args = setup.args
    return build_accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=None if args.report_to == "none" else args.report_to,
        project_dir=setup.output_dir / "logs",
        max_grad_norm=args.max_grad_norm,
        per_device_train_batch_size=args.per_device_train_batch_size,
    )


# --- arguments --------------------------------------------------------------------------------------------------------


def check_arguments(
    model_args: ModelArguments, data_args: TrainDataArguments, args: TrainingArguments, hub_args: HubArguments
) -> None:
    """What arguments alone can tell."""
    check_where_the_model_comes_from(model_args)
    if args.output_dir is None:
        raise UsageError("--output_dir is missing: name the folder for models and logs")
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
        warmup_steps=(args.warmup_steps, 0, None),
        max_train_steps=(args.max_train_steps, 1, None),
        max_grad_norm=(args.max_grad_norm, 0, None),
        queue_size=(args.queue_size, 1, None),
        momentum=(args.momentum, 0, 1),
        alpha=(args.alpha, 0, 1),
        in_batch_itc=(args.in_batch_itc, 0, 1),
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
    check_trackers(args.report_to)
    if args.evaluate_every and data_args.train_file is not None and data_args.validation_file is None:
        raise UsageError("--train_file without --validation_file: name the rows to evaluate on, or --evaluate_every 0")
    if args.push_to_hub:
        check_hub_arguments(hub_args)
    elif hub_args.hub_model_id is not None:
        raise UsageError("--hub_model_id without --push_to_hub would upload nothing: give both, or neither")


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


# --- data -------------------------------------------------------------------------------------------------------------


def open_sources(data_args: TrainDataArguments, args: TrainingArguments) -> tuple[Source, Source | None]:
    """The training rows, and the validation rows (None without evaluation)."""
    wanted = [(data_args.train_split_name, data_args.train_file)]
    if args.evaluate_every:
        wanted.append((data_args.validation_split_name, data_args.validation_file))
    shared = (
        "dataset_name",
        "dataset_config_name",
        "data_dir",
        "image_dir",
        "image_column",
        "caption_column",
        "product_id_column",
    )
    options = {name: getattr(data_args, name) for name in shared}
    options["index_dir"] = str(Path(args.output_dir) / "tar_index")
    sources = [open_source(split=split, data_files=data_files, **options) for split, data_files in wanted]
    return sources[0], sources[1] if args.evaluate_every else None


def build_loaders(
    train_source: Source,
    validation_source: Source | None,
    beginning: Beginning,
    data_args: TrainDataArguments,
    args: TrainingArguments,
) -> tuple[TrainLoader, EvalLoader | None]:
    """Loaders of this rank, once at least one row of each source can be used."""
    # By the launcher's word: there is no process group yet. The accelerator compares both when it is built.
    shared = {
        "rank": launched_rank(),
        "world_size": launched_world_size(),
        "num_workers": data_args.dataloader_num_workers,
    }
    processor, augmentation = beginning.processor, build_augmentation(data_args, beginning.image_size)
    require_usable_row(train_source)
    loader = TrainLoader(
        train_source,
        Collator(processor, augmentation, seed=args.seed),
        batch_size=args.per_device_train_batch_size,
        seed=args.seed,
        window=data_args.shuffle_window,
        **shared,
    )
    if validation_source is None:
        return loader, None
    check_k_rerank(args.k_rerank, validation_source.num_rows)
    require_usable_row(validation_source)
    unit_size = args.per_device_eval_batch_size
    return loader, EvalLoader(validation_source, Collator(processor), unit_size=unit_size, **shared)


def order_of(source: Source, data_args: TrainDataArguments, args: TrainingArguments) -> dict:
    """What the order of the rows depends on: a run resumes only where all of this is the same."""
    return {
        "rows": source.num_rows,
        "processes": launched_world_size(),
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "dataloader_num_workers": data_args.dataloader_num_workers,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "shuffle_window": data_args.shuffle_window,
        "seed": args.seed,
    }


# --- an earlier run ---------------------------------------------------------------------------------------------------


def anew_without_checkpoint(args: TrainingArguments) -> TrainingArguments:
    """The arguments of a new run, if `last` is asked for and the run died before its first checkpoint: the command that
    restarts it is then the same at any moment of its death.

    Raises:
        UsageError: there is no checkpoint, but there are models, which a new run would replace.
    """
    output_dir = Path(args.output_dir)
    if args.resume_from_checkpoint != "last":
        return args
    if launched_rank() == 0:
        repair(output_dir)
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
        print(f"{output_dir} has no checkpoint yet: the run starts anew")
    return dataclasses.replace(args, resume_from_checkpoint=None, overwrite_output_dir=True)


def find_progress(
    args: TrainingArguments, order: dict, manifest: dict, total_steps: int
) -> tuple[Path | None, Progress, dict]:
    """The checkpoint to go on from, how far it is, and the arguments of its run; None, nothing and none without one."""
    if args.resume_from_checkpoint is None:
        return None, Progress(), {}
    checkpoint = find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
    state = read_state(checkpoint, order, ORDER_FLAGS, lambda before: manifest_changes(before, manifest))
    progress = Progress.of(state)
    if progress.step > total_steps:
        raise UsageError(
            f"{checkpoint} is at step {progress.step}, after the {total_steps} steps that are asked for: raise "
            "--num_train_epochs or --max_train_steps, or resume from an earlier checkpoint"
        )
    return checkpoint, progress, state["arguments"]


def check_output_dir(args: TrainingArguments) -> None:
    """Refuse to mix two runs in one folder, or to find out after an epoch that it can't be written to."""
    output_dir = Path(args.output_dir)
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
    with usage_errors(OSError, told=f"can't write into {output_dir} ({{}}): give another --output_dir"):
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()


def earlier_outputs(output_dir: Path) -> list[Path]:
    """What an earlier run left, which `check_output_dir` allows to replace: models and checkpoints, and all files but
    the arguments. Of the trackers' folder single files, since the new run's begin beside them."""
    repair(output_dir)
    folders = [output_dir / name for name in MODELS] + checkpoints(output_dir)
    logs = [path for path in (output_dir / "logs").rglob("*") if path.is_file()]
    return [path for path in (*folders, *logs, *(output_dir / name for name in OUTPUT_FILES)) if path.exists()]


def remove(outputs: list[Path]) -> None:
    """Remove them, now that nothing can be refused any more."""
    for path in outputs:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


__all__ = ["ARGUMENTS", "Setup", "check_arguments", "earlier_outputs", "meet", "remove", "set_up"]
