"""Train AliBLIP, from scratch, from trained towers or from a trained model, on a streamed table of photos and titles.

    python train.py --config recipes/demo.yaml --output_dir outputs/demo                  # one process
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 4 train.py \
        --config_name base --data_dir my_catalogue --output_dir outputs/mine               # four GPUs of this machine
    accelerate launch --config_file accelerate_configs/deepspeed_zero2.yaml train.py \
        --config recipes/aliproducts_large.yaml --train_file train.json --image_dir photos --output_dir outputs/large
    python train.py --model_name_or_path Salesforce/blip-itm-base-coco --image_size 224 --data_dir my_catalogue \
        --output_dir outputs/finetuned                                                     # from BLIP

The data (`--data_dir`, `--dataset_name` or `--train_file`) has a photo column, a title column and, where one product
has several rows, a product column. Everything can stand in a recipe (`--config`), which flags override; see `--help`.

What a run leaves in `--output_dir`: `best/` and `last/` (models for `from_pretrained`, each with its `results.json`),
`log.jsonl` (every log line), `skipped.jsonl` (rows that could not be used), `arguments.json`, `manifest.json` (of the
data), `machine.json`, `status.json` (how it stands, or how it ended), and with `--checkpointing_steps` checkpoints,
from which `--resume_from_checkpoint last` goes on. SIGTERM, SIGUSR1 or Ctrl-C write one more and end the run.
`--push_to_hub --hub_model_id me/name` uploads the best model so far with a card, in the background.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from signal import Signals

import torch
from accelerate.utils import set_seed

import aliblip  # noqa: F401  (registers the classes, so that from_pretrained takes this code for AliBLIP folders)
from aliblip.data.augment import TrainAugmentation
from aliblip.data.collate import Collator
from aliblip.data.loader import EvalLoader, TrainLoader
from aliblip.data.manifest import manifest_changes
from aliblip.data.products import tell_sources
from aliblip.data.sources import open_source, require_usable_row
from aliblip.models.backbones import (
    Backbone,
    check_backbone_vocabulary,
    read_text_backbone,
    read_vision_backbone,
    start_from_backbone,
    starting_report,
)
from aliblip.models.loading import build_processor, load_pretrained
from aliblip.models.original import is_original
from aliblip.models.upload import (
    SECONDS_AFTER_A_STOP,
    SECONDS_AT_THE_END,
    HubArguments,
    Publisher,
    check_hub_arguments,
    connect,
)
from aliblip.retrieval.evaluation import check_k_rerank, evaluate_retrieval
from aliblip.runtime.accelerator import AliBlipAccelerator, build_accelerator, describe_machine, end
from aliblip.runtime.arguments import check_range, json_mapping, parse
from aliblip.runtime.distributed import all_gather_objects, assert_equal_on_ranks, launched_rank, launched_world_size
from aliblip.runtime.files import repair, write_json
from aliblip.runtime.interrupts import StopSignals
from aliblip.runtime.mistakes import UsageError, first_line, main_with_usage_errors
from aliblip.training.arguments import ModelArguments, TrainDataArguments, TrainingArguments
from aliblip.training.carried import MOMENTUM_FILE, check_momentum, read_momentum
from aliblip.training.checkpoint import (
    Training,
    checkpoints,
    find_checkpoint,
    load_checkpoint,
    random_states,
    read_progress,
    remove_later_checkpoints,
    save_checkpoint,
    save_model,
)
from aliblip.training.momentum import MomentumState
from aliblip.training.objective import RetrievalObjective
from aliblip.training.optim import (
    alpha_schedule,
    learning_rate_schedule,
    parameter_groups,
    set_learning_rate,
    total_optimizer_steps,
)
from aliblip.training.progress import Log, RunStatus, SkippedRows, Unfailing
from aliblip.training.step import backward_and_step, clamp_parameter
from configuration_aliblip import SIZES, AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

TEMPERATURE_RANGE = (0.001, 0.5)  # of the published code
OUTPUT_FOLDERS = ("best", "last", "logs")
ROWS_TO_JUDGE = 1000  # before the end of an epoch, a few rows more or less say little about the data


# --- what the arguments ask for: all of it is checked before a process group starts -----------------------------------


def read_backbones(args: ModelArguments) -> list[Backbone]:
    """The trained towers that a new model starts from."""
    backbones = []
    if args.vision_model_name_or_path is not None:
        backbones.append(read_vision_backbone(args.vision_model_name_or_path))
    if args.text_model_name_or_path is not None:
        backbones.append(read_text_backbone(args.text_model_name_or_path))
    return backbones


def new_processor(args: ModelArguments, backbones: list[Backbone]) -> AliBlipProcessor:
    """The processor of a new model: around the tokenizer asked for, with what its towers were trained with."""
    tokenizer_name = args.tokenizer_name or args.text_model_name_or_path or "bert-base-uncased"
    processor = build_processor(tokenizer_name, args.max_length)
    for backbone in backbones:
        if backbone.tower == "text_encoder":
            check_backbone_vocabulary(backbone, processor)
        for name, value in backbone.pixel_statistics.items():
            setattr(processor.image_processor, name, value)
    return processor


def build_config(args: ModelArguments, processor: AliBlipProcessor, backbones: list[Backbone]) -> AliBlipConfig:
    """The configuration of a model to train from scratch; a trained ViT has its own photo size at first."""
    towers = {backbone.tower: backbone.config for backbone in backbones}
    vision = towers.get("vision_model", {}) | json_mapping("vision_config", args.vision_config)
    text = towers.get("text_encoder", {}) | json_mapping("text_config", args.text_config)
    if args.image_size is not None and "vision_model" not in towers:
        vision["image_size"] = args.image_size
    text |= {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
    fields = {"enc_token_id": processor.enc_token_id}
    for name in ("image_text_hidden_size", "temperature_init"):
        if getattr(args, name) is not None:
            fields[name] = getattr(args, name)
    size = args.config_name or "base"  # two trained towers need no name
    if size in SIZES:
        return AliBlipConfig.from_size(size, vision_config=vision, text_config=text, **fields)
    try:
        base = AliBlipConfig.from_pretrained(args.config_name).to_dict()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no configuration {args.config_name!r} ({first_line(error)}): give --config_name {' or '.join(SIZES)}, "
            f"or a folder with a config.json"
        ) from error
    return AliBlipConfig(
        **{
            **base,
            **fields,
            "vision_config": {**base["vision_config"], **vision},
            "text_config": {**base["text_config"], **text},
        }
    )


def build_model(args: ModelArguments, config: AliBlipConfig, backbones: list[Backbone]) -> AliBlipForImageTextRetrieval:
    """A model with new weights of the global random state, and those of trained towers. Always fp32: mixed precision
    casts later."""
    model = AliBlipForImageTextRetrieval(config)
    if args.attn_implementation is not None:
        model.set_attn_implementation(args.attn_implementation)
    copied = [name for backbone in backbones for name in start_from_backbone(model, backbone)]
    if args.image_size is not None:
        model.resize_image(args.image_size)
    if backbones and launched_rank() == 0:
        print(starting_report(model, backbones, copied))
    return model


def open_sources(data_args: TrainDataArguments, args: TrainingArguments):
    """The training rows, and the validation rows (None without evaluation)."""
    wanted = [(data_args.train_split_name, data_args.train_file)]
    if args.evaluate_every:
        if data_args.train_file is not None and data_args.validation_file is None:
            raise UsageError(
                "--train_file without --validation_file: name the rows to evaluate on, or --evaluate_every 0"
            )
        wanted.append((data_args.validation_split_name, data_args.validation_file))
    shared = (
        "dataset_name",
        "dataset_config_name",
        "data_dir",
        "image_dir",
        "image_column",
        "caption_column",
        "product_id_column",
        "reading",
    )
    options = {name: getattr(data_args, name) for name in shared}
    options["index_dir"] = str(Path(args.output_dir) / "tar_index")
    sources = [open_source(split=split, data_files=data_files, **options) for split, data_files in wanted]
    return sources[0], sources[1] if args.evaluate_every else None


def build_augmentation(args: TrainDataArguments, image_size: int) -> TrainAugmentation | None:
    if args.augmentation == "none":
        return None
    return TrainAugmentation(
        image_size,
        scale=(args.min_crop_scale, 1.0),
        flip=args.horizontal_flip,
        randaugment=(2, 5) if args.augmentation == "blip" else None,
    )


def check_arguments(
    model_args: ModelArguments, data_args: TrainDataArguments, args: TrainingArguments, hub_args: HubArguments
) -> None:
    trained = model_args.model_name_or_path
    new = (model_args.config_name, model_args.vision_model_name_or_path, model_args.text_model_name_or_path)
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
        if trained is not None and getattr(model_args, name) is not None:
            raise UsageError(f"--{name} is for training from scratch: a trained model brings its own, leave it out")
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
        dataloader_num_workers=(data_args.dataloader_num_workers, 0, None),
        shuffle_window=(data_args.shuffle_window, 1, None),
        min_crop_scale=(data_args.min_crop_scale, 0.01, 1),
        max_skipped_fraction=(data_args.max_skipped_fraction, 0, 1),
    )
    if args.push_to_hub:
        check_hub_arguments(hub_args)
    elif hub_args.hub_model_id is not None:
        raise UsageError("--hub_model_id without --push_to_hub would upload nothing: give both, or neither")


def check_output_dir(args: TrainingArguments) -> None:
    """Refuse to mix two runs in one folder, or to find out after an epoch that it can't be written to."""
    output_dir = Path(args.output_dir)
    holds_a_run = (output_dir / "arguments.json").exists()
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
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe = output_dir / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"can't write into {output_dir}: {error.strerror}; give another --output_dir") from error


def clear_output_dir(output_dir: Path) -> None:
    """Remove what an earlier run left, as `check_output_dir` allowed. Called once nothing can be refused any more."""
    repair(output_dir)
    for old in (*OUTPUT_FOLDERS, *(path.name for path in checkpoints(output_dir))):
        shutil.rmtree(output_dir / old, ignore_errors=True)
    for old in ("log.jsonl", "skipped.jsonl", "arguments.json", "manifest.json", "machine.json", "status.json"):
        (output_dir / old).unlink(missing_ok=True)


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Progress:
    """The counters of a run, as they stand in a checkpoint."""

    step: int = 0  # optimizer steps whose rows are used up: the position in the data
    left_out: int = 0  # of these, steps that changed nothing; schedules count the others
    left_out_in_a_row: int = 0
    average_is_due: bool = True  # the momentum encoders have not followed the last step yet
    best_mean_recall: float = -1.0

    @classmethod
    def of(cls, state: dict) -> Progress:
        return cls(**{field.name: state[field.name] for field in dataclasses.fields(cls)})


@dataclasses.dataclass
class Setup:
    """What a run needs before its processes meet."""

    processor: AliBlipProcessor
    model: AliBlipForImageTextRetrieval  # on the CPU, the same weights on every rank
    momentum_start: dict[str, torch.Tensor] | None  # momentum encoders and queues that came with the model
    loader: TrainLoader
    validation_loader: EvalLoader | None
    steps_per_epoch: int  # optimizer steps, as are all steps unless they are called batches
    total_steps: int
    learning_rate: Callable[[int], float]
    checkpoint: Path | None
    progress: Progress
    arguments: dict  # of the run that is resumed
    order: dict  # what the order of the rows depends on
    manifest: dict  # of the training data
    publisher: Publisher | None  # of the main process, if it was asked for


def set_up(
    model_args: ModelArguments, data_args: TrainDataArguments, args: TrainingArguments, hub_args: HubArguments
) -> Setup:
    """Look at everything that can be wrong, before the processes meet and before any long work.

    Raises:
        ValueError, OSError, ImportError: in the first line, what is wrong and what to do.
    """
    check_arguments(model_args, data_args, args, hub_args)
    model = config = momentum_start = None
    if model_args.model_name_or_path is None:
        backbones = read_backbones(model_args)
        processor = new_processor(model_args, backbones)
        config = build_config(model_args, processor, backbones)
        image_size = model_args.image_size or config.vision_config.image_size
    else:
        # from_pretrained makes every parameter trainable; nothing is frozen here.
        model, processor, original = load_pretrained(
            model_args.model_name_or_path,
            tokenizer_name=model_args.tokenizer_name,
            max_length=model_args.max_length,
            vision_config=json_mapping("vision_config", model_args.vision_config),
            text_config=json_mapping("text_config", model_args.text_config),
            attn_implementation=model_args.attn_implementation,
        )
        image_size = model_args.image_size or model.config.vision_config.image_size
        model.resize_image(image_size)
        if args.resume_from_checkpoint is None:
            momentum_start = read_momentum(model_args.model_name_or_path)
            if momentum_start is not None:
                check_momentum(momentum_start, model, args.queue_size)
            elif original is not None and original.momentum and launched_rank() == 0:
                print(
                    f"{model_args.model_name_or_path} also holds momentum encoders, which are not taken over: convert "
                    "it first, python -m aliblip.convert --momentum encoders"
                )
    processor.image_processor.size = {"height": image_size, "width": image_size}

    train_source, validation_source = open_sources(data_args, args)
    tell_sources(train_source, validation_source)
    # By the launcher's word: there is no process group yet. The accelerator compares both when it is built.
    shared = {
        "rank": launched_rank(),
        "world_size": launched_world_size(),
        "num_workers": data_args.dataloader_num_workers,
    }
    require_usable_row(train_source)
    loader = TrainLoader(
        train_source,
        Collator(processor, build_augmentation(data_args, image_size), seed=args.seed),
        batch_size=args.per_device_train_batch_size,
        seed=args.seed,
        window=data_args.shuffle_window,
        **shared,
    )
    validation_loader = None
    if validation_source is not None:
        check_k_rerank(args.k_rerank, validation_source.num_rows)
        require_usable_row(validation_source)
        unit_size = args.per_device_eval_batch_size
        validation_loader = EvalLoader(validation_source, Collator(processor), unit_size=unit_size, **shared)

    steps_per_epoch = loader.steps_per_epoch // args.gradient_accumulation_steps
    if not steps_per_epoch:
        raise UsageError(
            f"an epoch has {loader.steps_per_epoch} batches, fewer than --gradient_accumulation_steps "
            f"{args.gradient_accumulation_steps}: lower it or the batch size"
        )
    set_seed(args.seed)
    if model is None:
        model = build_model(model_args, config, backbones)
    longest = model.config.text_config.max_position_embeddings
    if processor.max_length > longest:
        raise UsageError(f"--max_length is {processor.max_length}: the model takes at most {longest} tokens")
    if args.gradient_checkpointing:
        model.set_checkpointed_layers(
            args.gradient_checkpointing_vision_layers, args.gradient_checkpointing_text_layers
        )
    total_steps = total_optimizer_steps(steps_per_epoch, args.num_train_epochs, args.max_train_steps)
    learning_rate = learning_rate_schedule(
        args.lr_scheduler_type, args.learning_rate, args.warmup_steps, total_steps, steps_per_epoch
    )
    order = {
        "rows": train_source.num_rows,
        "processes": shared["world_size"],
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "dataloader_num_workers": shared["num_workers"],
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "shuffle_window": data_args.shuffle_window,
        "seed": args.seed,
    }
    manifest = train_source.manifest()
    checkpoint, progress, arguments = None, Progress(), {}
    if args.resume_from_checkpoint is not None:
        if shared["rank"] == 0:
            repair(Path(args.output_dir))
        checkpoint = find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
        flags = {name: f"--{name}" for name in order} | {"processes": "accelerate launch --num_processes"}
        del flags["rows"]
        state = read_progress(checkpoint, order, flags, lambda before: manifest_changes(before, manifest))
        progress, arguments = Progress.of(state), state["arguments"]
        if progress.step > total_steps:
            raise UsageError(
                f"{checkpoint} is at step {progress.step}, after the {total_steps} steps that are asked for: raise "
                "--num_train_epochs or --max_train_steps, or resume from an earlier checkpoint"
            )
    publisher = None
    if shared["rank"] == 0:
        check_output_dir(args)
        if args.push_to_hub:
            publisher = Publisher(*connect(hub_args), license=hub_args.hub_license)
    return Setup(
        processor,
        model,
        momentum_start,
        loader,
        validation_loader,
        steps_per_epoch,
        total_steps,
        learning_rate,
        checkpoint,
        progress,
        arguments,
        order,
        manifest,
        publisher,
    )


def main() -> int:
    """The exit code: 0, or 128 and the number of the signal that stopped the run."""
    groups = [ModelArguments, TrainDataArguments, TrainingArguments, HubArguments]
    model_args, data_args, args, hub_args = parse(groups, description=__doc__)
    try:
        setup = set_up(model_args, data_args, args, hub_args)
        accelerator = build_accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=Path(args.output_dir) / "logs",
            max_grad_norm=args.max_grad_norm,
            per_device_train_batch_size=args.per_device_train_batch_size,
        )
        if args.report_to not in ("none", "all") and not accelerator.log_with:
            raise UsageError(f"--report_to {args.report_to} is not installed: pip install it, or --report_to none")
    except UsageError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(first_line(error)) from error
    if accelerator.is_main_process and setup.checkpoint is None:
        clear_output_dir(Path(args.output_dir))
    sys.stdout, sys.stderr = Unfailing(sys.stdout), Unfailing(sys.stderr)
    status = RunStatus(Path(args.output_dir) / "status.json")
    seconds_to_publish = SECONDS_AFTER_A_STOP
    try:
        try:
            with StopSignals() as signals:
                stopped_by = train(setup, accelerator, signals, status, model_args, data_args, args)
        except BaseException as error:
            status.failed(error)
            raise
        end(accelerator)
        if not stopped_by:
            seconds_to_publish = SECONDS_AT_THE_END
    finally:  # nobody waits for this process any more
        if setup.publisher is not None:
            setup.publisher.finish(seconds_to_publish)
    return 128 + stopped_by if stopped_by else 0


def train(
    setup: Setup,
    accelerator: AliBlipAccelerator,
    signals: StopSignals,
    status: RunStatus,
    model_args: ModelArguments,
    data_args: TrainDataArguments,
    args: TrainingArguments,
) -> Signals | None:
    """The run itself. Returns the signal that stopped it, on all ranks, or None when it is done."""
    started = time.perf_counter()
    output_dir = Path(args.output_dir)
    accumulation = args.gradient_accumulation_steps
    steps_per_epoch, total_steps = setup.steps_per_epoch, setup.total_steps
    model = setup.model.to(accelerator.device)
    autocast_dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    momentum = MomentumState(
        model,
        queue_size=args.queue_size,
        embedding_size=model.config.image_text_hidden_size,
        momentum=args.momentum,
        warmup=args.momentum_warmup,
        dropout=args.momentum_dropout,
        autocast_dtype=autocast_dtype,
        seed=args.seed,
    ).to(accelerator.device)
    if setup.momentum_start is not None:
        momentum.start_from(setup.momentum_start)
        queues = "and queues" if "queue_ids" in setup.momentum_start else "without queues"
        accelerator.print(f"starting from the momentum encoders {queues} in {MOMENTUM_FILE} beside the model")
    temperature_rate = args.learning_rate if args.temperature_learning_rate is None else args.temperature_learning_rate
    temperature_scale = temperature_rate / args.learning_rate if args.learning_rate else 1.0
    optimizer = torch.optim.AdamW(
        parameter_groups(model, args.weight_decay, args.decay_everything, temperature_scale),
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        fused=True,
    )
    objective = RetrievalObjective(
        model,
        negatives_from_all_ranks=args.negatives_from_all_ranks,
        hardest_negatives=args.hardest_negatives,
        in_batch_itc=args.in_batch_itc,
    ).train()
    # The momentum state and the loaders stay out: see CONTRIBUTING, "Decisions".
    objective, optimizer = accelerator.prepare(objective, optimizer)
    training = Training(model, optimizer, momentum, accelerator.device)
    set_seed(args.seed + accelerator.process_index)  # dropout and hard negatives differ from rank to rank

    progress, step = setup.progress, setup.progress.step
    log = Log(accelerator, output_dir, total_steps, step)
    skipped = SkippedRows(data_args.max_skipped_fraction, accelerator.device, output_dir / "skipped.jsonl")
    arguments = resolved_arguments(model_args, data_args, args)
    if setup.checkpoint is not None:
        try:
            of_rank = load_checkpoint(setup.checkpoint, training)
        except ValueError as error:
            raise UsageError(f"{setup.checkpoint} does not fit: {error}") from error
        log.load_state(of_rank["log"])
        skipped.load_state(of_rank["skipped"])
        accelerator.print(f"resumed from {setup.checkpoint} at step {step}{changed_since(setup.arguments, arguments)}")
        goes_back = setup.checkpoint.resolve().parent == output_dir.resolve()  # else they are of another run
        if goes_back and accelerator.is_main_process and (later := remove_later_checkpoints(output_dir, step)):
            accelerator.print(f"removed, since they were written after that step: {', '.join(later)}")
    # On several machines this finds a folder that is not the same for all of them, too.
    assert_equal_on_ranks(
        "step, momentum encoders and queues", {**momentum_tensors(momentum), "step": torch.tensor(step)}
    )
    if accelerator.is_main_process:
        write_json(output_dir / "arguments.json", arguments)
        write_json(output_dir / "manifest.json", setup.manifest)
        write_json(output_dir / "machine.json", describe_machine(accelerator))
    if accelerator.log_with:
        flat = {key: value for key, value in vars(args).items() if isinstance(value, (bool, int, float, str))}
        accelerator.init_trackers("aliblip", config=flat)
    accelerator.print(
        f"training {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters for {total_steps} steps "
        f"({total_steps / steps_per_epoch:.4g} epochs) of {args.per_device_train_batch_size} rows x "
        f"{accelerator.num_processes} process{'es' if accelerator.num_processes > 1 else ''}"
        f"{f' x {accumulation} batches' if accumulation > 1 else ''}, {accelerator.distributed_type.value}, "
        f"{accelerator.mixed_precision} mixed precision\n{setup.loader.describe()}"
    )
    status.write("running", step=step, total_steps=total_steps, checkpoint=str(setup.checkpoint or "") or None)

    def save(at: Progress, random: dict[str, torch.Tensor]) -> bool:
        """Write a checkpoint; one that can't be written is told, and the run goes on. A collective."""
        with log.paused():
            skipped.write()
            rows_per_step = accumulation * accelerator.num_processes * args.per_device_train_batch_size
            counters = {
                **dataclasses.asdict(at),
                "epoch": at.step / steps_per_epoch,
                "samples": at.step * rows_per_step,
                "order": setup.order,
                "manifest": setup.manifest,
                "arguments": arguments,
            }
            of_rank = {"log": log.state(), "skipped": skipped.state()}
            limit = args.save_total_limit
            problem = save_checkpoint(training, output_dir, counters, of_rank=of_rank, random=random, limit=limit)
            if problem is None:
                status.write("running", step=at.step, checkpoint=str(output_dir / f"checkpoint-{at.step}"))
            elif accelerator.is_main_process:
                last = status.entry["checkpoint"]
                log.bar.write(
                    f"warning: checkpoint-{at.step} could not be written ({problem}): the run goes on, "
                    f"{f'the last checkpoint is {last}' if last else 'there is no checkpoint yet'}"
                )
            return problem is None

    results, problem, last_norm = None, None, 0.0
    before = dataclasses.replace(progress), random_states(accelerator.device)
    # A run that comes back to the end of an epoch does again what is due there; the training is not changed by it.
    for epoch in range(max(step - 1, 0) // steps_per_epoch, math.ceil(total_steps / steps_per_epoch)):
        batches = setup.loader.epoch(epoch, start_step=(step - epoch * steps_per_epoch) * accumulation)
        last_step = min(total_steps, (epoch + 1) * steps_per_epoch)
        while step < last_step:
            if progress.average_is_due:
                momentum.update(model)
                progress.average_is_due = False
            if not progress.left_out_in_a_row:
                before = dataclasses.replace(progress), random_states(accelerator.device)
            taken = step - progress.left_out
            learning_rate = setup.learning_rate(taken)
            set_learning_rate(optimizer, learning_rate)
            first_targets, rows = None, []
            for micro_step in range(accumulation):
                waiting = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - waiting
                skipped.add(batch)
                batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
                with accelerator.accumulate(objective):
                    targets = momentum.encode(batch)
                    alpha = alpha_schedule(
                        args.alpha, taken * accumulation + micro_step, steps_per_epoch * accumulation
                    )
                    output = objective(batch, targets, alpha)
                    grad_norm = backward_and_step(accelerator, objective, optimizer, output.loss, args.max_grad_norm)
                momentum.enqueue(targets, batch["product_id"])
                first_targets = first_targets or targets
                rows.append(batch["row"])
                log.add_batch(output, batch["row"].shape[0], waited)
            clamp_parameter(model.temp, *TEMPERATURE_RANGE)
            progress.step = step = step + 1
            is_finite = math.isfinite(grad_norm)
            log.end_step(left_out=not is_finite)
            if is_finite:
                progress.average_is_due, progress.left_out_in_a_row, last_norm = True, 0, grad_norm
            else:
                momentum.rewind(first_targets)
                progress.left_out += 1
                progress.left_out_in_a_row += 1
                if progress.left_out_in_a_row >= args.max_non_finite_steps:
                    is_saved = save(*before)
                    if is_saved and accelerator.is_main_process:
                        remove_later_checkpoints(output_dir, before[0].step)
                    rows = sorted(sum(all_gather_objects(torch.cat(rows).tolist()), []))
                    raise UsageError(
                        f"no finite loss or gradient in {progress.left_out_in_a_row} steps in a row (up to step "
                        f"{step}, whose rows are {', '.join(map(str, rows))}); "
                        + (
                            f"checkpoint-{before[0].step} is from before them"
                            if is_saved
                            else "no checkpoint was written"
                        )
                        + ": look at the rows, or resume with a lower --learning_rate"
                    )
            if step % args.logging_steps == 0 or step == total_steps:
                log.line(
                    step,
                    step / steps_per_epoch,
                    learning_rate=learning_rate,
                    temperature=float(output.report["temperature"]),
                    queue_fill=momentum.queue_fill(),
                    grad_norm=last_norm,
                )
                skipped.check(at_least=ROWS_TO_JUDGE)
            stopped_by = signals.received_by_any_rank(accelerator.device)
            # Also before an evaluation, which can take longer than a launcher waits.
            checkpoint_is_due = args.checkpointing_steps and (step % args.checkpointing_steps == 0 or step == last_step)
            if stopped_by or checkpoint_is_due:
                save(progress, random_states(accelerator.device))
            if stopped_by:
                return finish_stopped(status, stopped_by, step, accelerator)

        skipped.check()
        problem = None
        with log.paused():
            skipped.write()
            evaluate_now = args.evaluate_every and (step == total_steps or (epoch + 1) % args.evaluate_every == 0)
            if evaluate_now:
                source = setup.validation_loader.source
                results = evaluate_retrieval(
                    model,
                    setup.validation_loader,
                    model_name=str(output_dir / "last"),
                    dataset_name=source.name,
                    split=source.split,
                    k_rerank=args.k_rerank,
                    dtype=autocast_dtype,
                )
                log.evaluation(step, epoch + 1, results)
                if results["mean_recall"] > progress.best_mean_recall:
                    best_results = {**results, "model": str(output_dir / "best")}
                    problem = save_model(model, setup.processor, output_dir / "best", best_results)
                    if problem is None:
                        progress.best_mean_recall = results["mean_recall"]
            problem = (
                save_model(model, setup.processor, output_dir / "last", results if evaluate_now else None) or problem
            )
            if problem is not None and accelerator.is_main_process:
                log.bar.write(f"warning: the model of epoch {epoch + 1} could not be written ({problem})")
            if setup.publisher is not None:
                # A resumed run comes by here with the best model of before, which may not be on the Hub yet.
                kept = output_dir / ("best" if (output_dir / "best").exists() else "last")
                if kept.exists():
                    setup.publisher.push(kept, f"Model of epoch {epoch + 1}")
    log.bar.close()
    assert_equal_on_ranks("momentum encoders and queues", momentum_tensors(momentum))
    if problem is not None:
        raise UsageError(
            f"the run is through, but its model could not be written to {output_dir} ({problem}): make room, and "
            + ("resume from the last checkpoint" if checkpoints(output_dir) else "use --checkpointing_steps next time")
        )

    unusable = skipped.collect()
    status.write("completed", step=step)
    if accelerator.is_main_process:
        minutes = (time.perf_counter() - started) / 60
        samples = step * accumulation * accelerator.num_processes * args.per_device_train_batch_size
        print(f"done in {minutes:.1f} minutes: {step} steps, {samples} samples")
        if unusable:
            names = ", ".join(row["name"] for row in unusable[:5]) + (", ..." if len(unusable) > 5 else "")
            print(f"{len(unusable)} rows could not be used ({names}): see {skipped.file}")
        last, best = output_dir / "last", output_dir / "best"
        if results is None or not best.exists():
            print(f"model: {last}")
        else:
            print(f"best model: {best} (mean recall {progress.best_mean_recall:.4f}); last model: {last}")
            print(f"next: python evaluate_retrieval.py --model_name_or_path {best} and the same data flags")
    return None


def finish_stopped(status: RunStatus, stopped_by: Signals, step: int, accelerator: AliBlipAccelerator) -> Signals:
    """Tell how a run was stopped, and how it goes on."""
    checkpoint = status.entry["checkpoint"]
    status.write("stopped", step=step, reason=stopped_by.name)
    if checkpoint is None:
        told = "no checkpoint could be written"
    else:
        told = (
            f"{checkpoint} is {'written' if checkpoint.endswith(f'checkpoint-{step}') else 'the last checkpoint'}; the "
        )
        told += "same command with --resume_from_checkpoint last goes on"
    accelerator.print(f"\nstopped by {stopped_by.name} after step {step}: {told}")
    return stopped_by


def momentum_tensors(momentum: MomentumState) -> dict[str, torch.Tensor]:
    return {name: value for name, value in momentum.state_dict().items() if torch.is_tensor(value)}


def changed_since(before: dict, now: dict) -> str:
    """What a resumed run does differently, as the end of a sentence."""
    expected = ("resume_from_checkpoint", "output_dir", "overwrite_output_dir")
    changed = [f"{k} {before.get(k)} -> {now[k]}" for k in now if before.get(k) != now[k] and k not in expected]
    return f"; other than before: {', '.join(changed)}" if changed else ""


def resolved_arguments(*groups) -> dict:
    return {key: value for group in groups for key, value in dataclasses.asdict(group).items()}


if __name__ == "__main__":
    main_with_usage_errors("train.py", main)
