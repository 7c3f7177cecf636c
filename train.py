"""Train AliBLIP, from scratch or from a trained model, on a streamed table of photos and titles.

    python train.py --config recipes/demo.yaml --output_dir outputs/demo                  # one process
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml --num_processes 4 train.py \
        --config_name base --data_dir my_catalogue --output_dir outputs/mine               # four GPUs of this machine
    accelerate launch --config_file accelerate_configs/deepspeed_zero2.yaml train.py \
        --config recipes/aliproducts_large.yaml --train_file train.json --image_dir photos --output_dir outputs/large

The data (`--data_dir`, `--dataset_name` or `--train_file`) has a photo column, a title column and, where one product
has
several rows, a product column. Everything can stand in a recipe (`--config`); flags override it. `--help` lists all.

What a run leaves in `--output_dir`: `best/` and `last/` (models for `from_pretrained`, each with its `results.json`),
`log.jsonl` (every log line), `skipped.jsonl` (rows that could not be used), `arguments.json`, and checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BertTokenizer, BlipImageProcessorPil

import aliblip  # noqa: F401  (registers the classes, so that from_pretrained takes this code for AliBLIP folders)
from aliblip.accelerator import backward_and_step, build_accelerator, clamp_parameter
from aliblip.arguments import (
    ModelArguments,
    TrainDataArguments,
    TrainingArguments,
    UsageError,
    check_range,
    json_mapping,
    main_with_usage_errors,
    parse,
)
from aliblip.checkpoint import find_checkpoint, read_progress, save_checkpoint, save_model
from aliblip.data.augment import TrainAugmentation
from aliblip.data.collate import Collator
from aliblip.data.loader import EvalLoader, TrainLoader
from aliblip.data.sources import open_source, require_usable_row
from aliblip.distributed import all_gather_objects, assert_equal_on_ranks, is_main, reduce_sum
from aliblip.evaluation import check_k_rerank, evaluate_retrieval, format_table
from aliblip.files import write_json, write_json_lines
from aliblip.momentum import MomentumState
from aliblip.objective import RetrievalObjective
from aliblip.optim import (
    alpha_schedule,
    learning_rate_schedule,
    parameter_groups,
    set_learning_rate,
    total_optimizer_steps,
)
from configuration_aliblip import SIZES, AliBlipConfig
from modeling_aliblip import AliBlipForImageTextRetrieval
from processing_aliblip import AliBlipProcessor

TEMPERATURE_RANGE = (0.001, 0.5)  # of the published code
# What a head scores that always answers the prior, one match in three pairs.
ITM_PRIOR_LOSS = -(math.log(1 / 3) + 2 * math.log(2 / 3)) / 3
PARTS = (
    "loss_itc",
    "loss_itm",
    "itm_accuracy_positive",
    "itm_accuracy_negative",
    "positives_per_row",
    "rows_without_negative",
)
NON_FINITE_STEPS_ALLOWED = 10  # in a row
ROWS_TO_JUDGE = 1000  # before the end of an epoch, a few rows more or less say little about the data
LINE = (
    "step {step} epoch {epoch:.2f} loss_itc {loss_itc:.4f} loss_itm {loss_itm:.4f} lr {learning_rate:.2e} "
    "temperature {temperature:.4f} itm_accuracy positive {itm_accuracy_positive:.2f} negative "
    "{itm_accuracy_negative:.2f} queue {queue_fill:.0%} grad_norm {grad_norm:.2f} "
    "samples/s {samples_per_second:.1f} data_wait {data_wait:.0%}"
)


# --- what the arguments ask for: all of it is checked before a process group starts -----------------------------------


def build_processor(args: ModelArguments) -> AliBlipProcessor:
    """The processor of a trained model, or a new one around the tokenizer asked for."""
    if args.model_name_or_path is not None:
        processor = AliBlipProcessor.from_pretrained(args.model_name_or_path)
        if args.max_length is not None:
            processor.max_length = args.max_length
    else:
        name = args.tokenizer_name or "bert-base-uncased"
        try:
            is_file = os.path.isfile(name)
            tokenizer = BertTokenizer(vocab=name) if is_file else AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError) as error:
            raise UsageError(
                f"no tokenizer at {name!r} ({_first_line(error)}): --tokenizer_name takes a folder, a vocab.txt or a "
                "Hub name"
            ) from error
        if not tokenizer.is_fast or getattr(tokenizer, "cls_token_id", None) is None:
            raise UsageError(f"the tokenizer {name!r} is no fast WordPiece tokenizer with [CLS]: take a BERT tokenizer")
        processor = AliBlipProcessor(BlipImageProcessorPil(), tokenizer, max_length=args.max_length or 35)
    return processor


def build_config(args: ModelArguments, processor: AliBlipProcessor) -> AliBlipConfig:
    """The configuration of a model to train from scratch."""
    vision, text = json_mapping("vision_config", args.vision_config), json_mapping("text_config", args.text_config)
    if args.image_size is not None:
        vision["image_size"] = args.image_size
    text |= {"vocab_size": len(processor.tokenizer), "pad_token_id": processor.tokenizer.pad_token_id}
    fields = {"enc_token_id": processor.enc_token_id}
    for name in ("image_text_hidden_size", "temperature_init"):
        if getattr(args, name) is not None:
            fields[name] = getattr(args, name)
    if args.config_name in SIZES:
        return AliBlipConfig.from_size(args.config_name, vision_config=vision, text_config=text, **fields)
    try:
        base = AliBlipConfig.from_pretrained(args.config_name).to_dict()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no configuration {args.config_name!r} ({_first_line(error)}): give --config_name {' or '.join(SIZES)}, "
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


def build_model(args: ModelArguments, config: AliBlipConfig | None) -> AliBlipForImageTextRetrieval:
    """The model with trained weights, or with new ones of the global random state. Always fp32: mixed precision casts
    later."""
    if config is not None:
        model = AliBlipForImageTextRetrieval(config)
        if args.attn_implementation is not None:
            model.set_attn_implementation(args.attn_implementation)
        return model
    model = AliBlipForImageTextRetrieval.from_pretrained(
        args.model_name_or_path, dtype=torch.float32, attn_implementation=args.attn_implementation
    )
    # from_pretrained makes every parameter trainable; nothing is frozen here.
    if args.image_size is not None:
        model.resize_image(args.image_size)
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
    )
    options = {name: getattr(data_args, name) for name in shared}
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


def check_arguments(model_args: ModelArguments, data_args: TrainDataArguments, args: TrainingArguments) -> None:
    if (model_args.model_name_or_path is None) == (model_args.config_name is None):
        raise UsageError(
            "give either --config_name base, large or a folder (to train from scratch), or --model_name_or_path (to go "
            "on from a trained model)"
        )
    for name in ("vision_config", "text_config", "image_text_hidden_size", "temperature_init", "tokenizer_name"):
        if model_args.model_name_or_path is not None and getattr(model_args, name) is not None:
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
        dataloader_num_workers=(data_args.dataloader_num_workers, 0, None),
        shuffle_window=(data_args.shuffle_window, 1, None),
        min_crop_scale=(data_args.min_crop_scale, 0.01, 1),
        max_skipped_fraction=(data_args.max_skipped_fraction, 0, 1),
    )


def check_output_dir(args: TrainingArguments) -> None:
    """Refuse to mix two runs in one folder, or to find out after an epoch that it can't be written to."""
    output_dir = Path(args.output_dir)
    holds_a_run = (output_dir / "arguments.json").exists()
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
    """Remove what an earlier run left. Called once nothing can be refused any more."""
    for old in ("best", "last", "logs", *(path.name for path in output_dir.glob("checkpoint-*"))):
        shutil.rmtree(output_dir / old, ignore_errors=True)
    for old in ("log.jsonl", "skipped.jsonl", "arguments.json"):
        (output_dir / old).unlink(missing_ok=True)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# --- the run ----------------------------------------------------------------------------------------------------------


class SkippedRows:
    """Rows that could not be used: counted, listed, and a reason to stop when they are too many."""

    def __init__(self, max_fraction: float, device: torch.device, file: Path):
        self.max_fraction = max_fraction
        self.device = device
        self.file = file
        self.rows: dict[int, dict] = {}  # of this rank, each once, however many epochs met it
        if file.exists():  # of the run that is resumed
            rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
            self.rows.update((row["row"], row) for row in rows)
        self.seen = self.met = 0

    def add(self, batch: dict) -> None:
        skipped = batch.pop("skipped")
        self.seen += batch["row"].shape[0]
        self.met += len(skipped)
        self.rows.update((row["row"], row) for row in skipped)

    def collect(self) -> list[dict]:
        """The rows of all ranks, in order. A collective."""
        merged = {row["row"]: row for rows in all_gather_objects(list(self.rows.values())) for row in rows}
        return [merged[row] for row in sorted(merged)]

    def write(self) -> None:
        """Write the list so far. A collective."""
        rows = self.collect()
        if is_main():
            write_json_lines(self.file, rows)

    def check(self, at_least: int = 0) -> None:
        """Stop, on all ranks, when too large a share of at least `at_least` rows was unusable. A collective."""
        seen, met = reduce_sum(torch.tensor([self.seen, self.met], device=self.device)).tolist()
        if met > self.max_fraction * seen and seen >= at_least:
            self.write()
            rows = self.collect()
            listed = "; ".join(f"{row['name']} ({row['reason']})" for row in rows[:20])
            more = f"; and {len(rows) - 20} more" if len(rows) > 20 else ""
            raise UsageError(
                f"{met} of {seen} rows could not be used, more than --max_skipped_fraction {self.max_fraction}: "
                f"{listed}{more} (all: {self.file})"
            )


class Log:
    """Log lines: means over all steps and ranks since the last one, to the screen, to `log.jsonl` and to the
    trackers."""

    def __init__(self, accelerator, output_dir: Path, total_steps: int, first_step: int):
        self.accelerator = accelerator
        self.file = output_dir / "log.jsonl"
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc="train", unit="step", disable=not accelerator.is_main_process
        )
        self.near_prior = 0
        if accelerator.is_main_process and self.file.exists():
            # A resumed run repeats the steps after its checkpoint: their lines would stand there twice. A line that a
            # kill cut off has no end.
            lines = self.file.read_text(encoding="utf-8").splitlines(keepends=True)
            entries = [json.loads(line) for line in lines if line.endswith("\n")]
            write_json_lines(self.file, [entry for entry in entries if entry["step"] <= first_step])
        self._restart()

    def _restart(self) -> None:
        self.sums: torch.Tensor | None = None
        self.batches = self.samples = 0
        self.waited = 0.0
        self.since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What takes place inside is no training, and does not count in its speed."""
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start

    def add(self, output, rows: int, waited: float) -> None:
        values = {"loss_itc": output.parts["itc"], "loss_itm": output.parts["itm"], **output.report}
        values = torch.stack([values[name].float() for name in PARTS])
        self.sums = values if self.sums is None else self.sums + values
        self.batches += 1
        self.samples += rows
        self.waited += waited

    def line(self, step: int, epoch: float, **values: float) -> None:
        """A collective."""
        processes = self.accelerator.num_processes
        means = (reduce_sum(self.sums) / (self.batches * processes)).tolist()
        seconds = time.perf_counter() - self.since
        entry = {
            "step": step,
            "epoch": round(epoch, 4),
            **dict(zip(PARTS, means, strict=True)),
            **values,
            "samples_per_second": self.samples * processes / seconds,
            "data_wait": self.waited / seconds,
        }
        if self.accelerator.is_main_process:
            self.write(entry)
            self.bar.write(LINE.format(**entry))
            self._watch_itm(entry)
        self.accelerator.log({key: value for key, value in entry.items() if key != "step"}, step=step)
        self._restart()

    def _watch_itm(self, entry: dict) -> None:
        stuck = abs(entry["loss_itm"] - ITM_PRIOR_LOSS) < 0.01 and entry["itm_accuracy_positive"] < 0.05
        self.near_prior = self.near_prior + 1 if stuck else 0
        if self.near_prior and self.near_prior % 5 == 0:
            self.bar.write(
                f"warning: loss_itm sits at {ITM_PRIOR_LOSS:.4f} since {self.near_prior} log lines: the matching head "
                'answers "no match" to everything. Usual causes: a learning rate that is too high, too little training '
                "yet, or titles that don't fit their photos."
            )

    def write(self, entry: dict) -> None:
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def evaluation(self, step: int, epoch: int, results: dict) -> None:
        if self.accelerator.is_main_process:
            self.write({"step": step, "epoch": epoch, "evaluation": results})
            self.bar.write(f"evaluation after epoch {epoch} (step {step})\n{format_table(results)}")
        flat = {"eval/mean_recall": results["mean_recall"]}
        for direction in ("text_to_image", "image_to_text"):
            for stage in ("itc", "itm"):
                flat |= {f"eval/{direction}/{stage}/{key}": value for key, value in results[direction][stage].items()}
        self.accelerator.log(flat, step=step)


@dataclasses.dataclass
class Setup:
    """What a run needs before its processes meet."""

    processor: AliBlipProcessor
    model: AliBlipForImageTextRetrieval  # on the CPU, the same weights on every rank
    loader: TrainLoader
    validation_loader: EvalLoader | None
    steps_per_epoch: int  # optimizer steps, as are all steps unless they are called batches
    total_steps: int
    learning_rate: Callable[[int], float]
    checkpoint: Path | None
    progress: dict


def set_up(model_args: ModelArguments, data_args: TrainDataArguments, args: TrainingArguments) -> Setup:
    """Look at everything that can be wrong, before the processes meet and before any long work.

    Raises:
        ValueError, OSError, ImportError: in the first line, what is wrong and what to do.
    """
    check_arguments(model_args, data_args, args)
    processor = build_processor(model_args)
    if model_args.model_name_or_path is None:
        config = build_config(model_args, processor)
        image_size = config.vision_config.image_size
    else:
        config = None
        trained = AliBlipConfig.from_pretrained(model_args.model_name_or_path)
        image_size = model_args.image_size or trained.vision_config.image_size
    processor.image_processor.size = {"height": image_size, "width": image_size}

    train_source, validation_source = open_sources(data_args, args)
    # By the launcher's word: there is no process group yet. The accelerator compares both when it is built.
    shared = {
        "rank": int(os.environ.get("RANK", "0")),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
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
    model = build_model(model_args, config)
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
        "dataloader_num_workers": shared["num_workers"],
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "shuffle_window": data_args.shuffle_window,
        "seed": args.seed,
    }
    checkpoint, progress = None, {"step": 0, "best_mean_recall": -1.0, "order": order}
    if args.resume_from_checkpoint is not None:
        checkpoint = find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint)
        progress = read_progress(checkpoint, order)
    if shared["rank"] == 0:
        check_output_dir(args)
    return Setup(
        processor, model, loader, validation_loader, steps_per_epoch, total_steps, learning_rate, checkpoint, progress
    )


def main() -> None:
    model_args, data_args, args = parse([ModelArguments, TrainDataArguments, TrainingArguments], description=__doc__)
    started = time.perf_counter()
    accumulation = args.gradient_accumulation_steps
    try:
        setup = set_up(model_args, data_args, args)
        output_dir = Path(args.output_dir)
        accelerator = build_accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=accumulation,
            log_with=None if args.report_to == "none" else args.report_to,
            project_dir=output_dir / "logs",
            max_grad_norm=args.max_grad_norm,
            per_device_train_batch_size=args.per_device_train_batch_size,
        )
        if args.report_to not in ("none", "all") and not accelerator.log_with:
            raise UsageError(f"--report_to {args.report_to} is not installed: pip install it, or --report_to none")
    except UsageError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(_first_line(error)) from error
    total_steps, steps_per_epoch = setup.total_steps, setup.steps_per_epoch
    if accelerator.is_main_process and setup.checkpoint is None:
        clear_output_dir(output_dir)

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
    accelerator.register_for_checkpointing(momentum)
    assert_equal_on_ranks("momentum encoders and queues", momentum_tensors(momentum))
    set_seed(args.seed + accelerator.process_index)  # dropout and hard negatives differ from rank to rank

    progress = setup.progress
    if setup.checkpoint is not None:
        accelerator.load_state(str(setup.checkpoint))
        accelerator.print(f"resumed from {setup.checkpoint} at step {progress['step']}")
    if accelerator.is_main_process:
        write_json(output_dir / "arguments.json", resolved_arguments(model_args, data_args, args))
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

    log = Log(accelerator, output_dir, total_steps, progress["step"])
    skipped = SkippedRows(data_args.max_skipped_fraction, accelerator.device, output_dir / "skipped.jsonl")
    step, left_out, results = progress["step"], 0, None
    for epoch in range(step // steps_per_epoch, math.ceil(total_steps / steps_per_epoch)):
        batches = setup.loader.epoch(epoch, start_step=(step - epoch * steps_per_epoch) * accumulation)
        last_step = min(total_steps, (epoch + 1) * steps_per_epoch)
        while step < last_step:
            learning_rate = setup.learning_rate(step)
            set_learning_rate(optimizer, learning_rate)
            if not left_out:  # else the weights are still those that the average has just followed
                momentum.update(model)
            for micro_step in range(step * accumulation, (step + 1) * accumulation):
                waiting = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - waiting
                skipped.add(batch)
                batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
                with accelerator.accumulate(objective):
                    targets = momentum.encode(batch)
                    alpha = alpha_schedule(args.alpha, micro_step, steps_per_epoch * accumulation)
                    output = objective(batch, targets, alpha)
                    grad_norm = backward_and_step(accelerator, objective, optimizer, output.loss, args.max_grad_norm)
                if grad_norm is None or math.isfinite(grad_norm):
                    momentum.enqueue(targets, batch["product_id"])
                log.add(output, batch["row"].shape[0], waited)
            clamp_parameter(model.temp, *TEMPERATURE_RANGE)
            step += 1
            log.bar.update()
            left_out = 0 if math.isfinite(grad_norm) else left_out + 1
            if left_out > NON_FINITE_STEPS_ALLOWED:
                raise RuntimeError(
                    f"no finite gradient in {left_out} steps in a row (last step {step}): lower --learning_rate, and "
                    f"look at the rows {batch['row'].tolist()} of rank {accelerator.process_index}"
                )
            if step % args.logging_steps == 0 or step == total_steps:
                log.line(
                    step,
                    step / steps_per_epoch,
                    learning_rate=learning_rate,
                    temperature=float(output.report["temperature"]),
                    queue_fill=momentum.queue_fill(),
                    grad_norm=grad_norm,
                )
                skipped.check(at_least=ROWS_TO_JUDGE)
            checkpoint_is_due = args.checkpointing_steps and step % args.checkpointing_steps == 0
            if checkpoint_is_due and step < last_step:
                with log.paused():
                    save_checkpoint(accelerator, output_dir, {**progress, "step": step})

        skipped.check()
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
                if results["mean_recall"] > progress["best_mean_recall"]:
                    progress["best_mean_recall"] = results["mean_recall"]
                    best_results = {**results, "model": str(output_dir / "best")}
                    save_model(model, setup.processor, output_dir / "best", best_results)
            save_model(model, setup.processor, output_dir / "last", results if evaluate_now else None)
            if checkpoint_is_due:  # after the evaluation, which a resumed run would not repeat
                save_checkpoint(accelerator, output_dir, {**progress, "step": step})
    log.bar.close()
    assert_equal_on_ranks("momentum encoders and queues", momentum_tensors(momentum))

    unusable = skipped.collect()
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
            print(f"best model: {best} (mean recall {progress['best_mean_recall']:.4f}); last model: {last}")
            print(f"next: python evaluate_retrieval.py --model_name_or_path {best} and the same data flags")
    accelerator.end_training()


def momentum_tensors(momentum: MomentumState) -> dict[str, torch.Tensor]:
    return {name: value for name, value in momentum.state_dict().items() if torch.is_tensor(value)}


def resolved_arguments(*groups) -> dict:
    return {key: value for group in groups for key, value in dataclasses.asdict(group).items()}


if __name__ == "__main__":
    main_with_usage_errors("train.py", main)
