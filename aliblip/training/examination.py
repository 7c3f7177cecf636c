"""Everything that can be wrong with a run, told at once, and then its plan. Nothing is written.

    exit_code = examine(model_args, data_args, args, hub_args, plan_args)

The checks are those of the run itself (`setup.CHECKS`, `check_launch`); what a run finds out on its way is looked at
beside them: a sample of the data, both sides of the split, titles as the tokenizer writes them, memory and disk.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from aliblip.data.inspection import Leakage, Sample, decoded_sample, leakage
from aliblip.data.rows import Source
from aliblip.data.titles import TitleReport, look_at_titles, titles_of
from aliblip.models.upload import HubArguments
from aliblip.retrieval.plan import (
    ASSUMED_SHARE,
    available_memory,
    duration_text,
    launched_device,
    measured_matmul_flops,
    size_text,
)
from aliblip.runtime.accelerator import STARTED_ALONE, TRAINING_PRECISIONS, Launch, check_launch, started_alone
from aliblip.runtime.arguments import OutOfRange, check_range
from aliblip.runtime.checks import AlreadyTold, Findings, part
from aliblip.runtime.distributed import launched_rank
from aliblip.runtime.mistakes import UsageError, usage_errors
from aliblip.training.arguments import (
    DryRunArguments,
    ModelArguments,
    PlanArguments,
    TrainDataArguments,
    TrainingArguments,
)
from aliblip.training.compiling import check_compiler
from aliblip.training.fp8 import check_fp8_device
from aliblip.training.memory import GROUPS, State, TrainingMemory, Work, largest_batch, state_of, training_memory
from aliblip.training.meters import peak_tflops_of
from aliblip.training.optim import long_warmup
from aliblip.training.plan import Disk, TrainingPlan, disk_of, training_plan
from aliblip.training.setup import CHECKS, Start, existing_parent, lone_rows

__all__ = ["check_dry_run", "examine"]

# Shares from which on a line is a warning, or a problem.
UNKNOWN_WARNING, UNKNOWN_PROBLEM = 0.02, 0.5
CUT_WARNING = 0.1
SHARED_PHOTOS_PROBLEM = 0.01
EPOCHS_TO_FILL_A_QUEUE = 2


def examine(
    model_args: ModelArguments,
    data_args: TrainDataArguments,
    args: TrainingArguments,
    hub_args: HubArguments,
    plan_args: PlanArguments,
    tell: Callable[[str], object] | None = None,
) -> int:
    """Tell all that is right, doubtful or wrong with what was asked for, and what it takes.

    Under a launcher the first process does it alone.

    Returns:
        The exit code: 2 with a problem, else 0, warnings or not.

    Raises:
        UsageError: a flag of the plan itself.
    """
    check_range(
        samples_per_second=(plan_args.samples_per_second, 0.001, None),
        device_memory_gb=(plan_args.device_memory_gb, 0.001, None),
        processes=(plan_args.processes, 1, None),
        compared_rows=(plan_args.compared_rows, 0, None),
    )
    if launched_rank() != 0:
        return 0
    findings = Findings(tell)
    _Examination(findings, model_args, data_args, args, hub_args, plan_args).run()
    findings.tell(f"\n{findings.summary()}; nothing was written")
    return findings.exit_code


def check_dry_run(args: DryRunArguments) -> bool:
    """Whether a dry run is asked for.

    Raises:
        UsageError: flags that only a dry run reads.
    """
    given = [field.name for field in dataclasses.fields(PlanArguments) if getattr(args, field.name) != field.default]
    if given and not args.dry_run:
        raise UsageError(f"--{given[0]} is for a plan: give --dry_run too, or leave it out")
    return args.dry_run


@dataclass
class _Reading:
    """How fast one process reads and decodes."""

    rows: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.rows / max(self.seconds, 1e-9)


class _Examination:
    """One method for each group of findings; parts are made when they are first asked for, as those of a `Start`."""

    def __init__(self, findings, model_args, data_args, args, hub_args, plan_args: PlanArguments):
        self.findings, self.args, self.data_args, self.plan_args = findings, args, data_args, plan_args
        self.hub_args = hub_args
        self.start = Start(
            model_args,
            data_args,
            args,
            hub_args,
            is_a_try=True,
            processes=plan_args.processes,
            tell=findings.line,
        )

    def run(self) -> None:
        groups = (
            ("flags", self._flags),
            ("launcher", self._launcher),
            ("output", self._output),
            ("model", self._model),
            ("training data", lambda: self._data("train_source")),
            ("validation data", lambda: self._data("validation_source")),
            ("splits", self._splits),
            ("titles", self._titles),
            ("course", self._course),
            ("Hub", self._hub),
            ("memory", self._memory),
            ("disk", self._disk),
            ("plan", self._plan),
        )
        assert {check.group for check in CHECKS} <= {name for name, _ in groups}, "a check that nobody looks at"
        for name, look in groups:
            self.findings.group(name)
            for check in CHECKS:
                if check.group == name:
                    self.findings.check(lambda check=check: self._made(check), name=check.name)
            look()

    def _made(self, check) -> object:
        """The part of a check; numbers out of their ranges are told, and then those of the defaults are taken."""
        try:
            return check.make(self.start)
        except OutOfRange as error:
            for group in (self.start.model_args, self.start.data_args, self.start.args):
                for field in dataclasses.fields(group):
                    if field.name in error.names:
                        setattr(group, field.name, field.default)
            raise

    def _look(self, look: Callable[[], None], name: str) -> None:
        """Look at something that needs parts; what can't be read is a problem."""

        def looked() -> None:
            with usage_errors(OSError, told=f"{name} can't be read: {{}}"):
                look()

        self.findings.check(looked, name=name)

    # --- parts ---

    @part
    def launch(self) -> Launch:
        args = self.args
        launch = check_launch(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            max_grad_norm=args.max_grad_norm,
            per_device_train_batch_size=args.per_device_train_batch_size,
            precisions=TRAINING_PRECISIONS,
            elsewhere=self.plan_args.device_memory_gb is not None,
        )
        on_gpu = launch.on_gpu or self.plan_args.device_memory_gb is not None
        return dataclasses.replace(launch, processes=self.start.processes, on_gpu=on_gpu)

    @part
    def sample(self) -> Sample:
        return decoded_sample(self.start.train_source)

    @part
    def titles(self) -> TitleReport:
        return self._look_at_titles(self.start.train_source)

    @part
    def validation_titles(self) -> TitleReport | None:
        source = self.start.validation_source
        return None if source is None else self._look_at_titles(source)

    def _look_at_titles(self, source: Source) -> TitleReport:
        processor = self.start.beginning.processor
        with usage_errors(OSError, told=f"the titles of {source.name} ({source.split}) can't be read: {{}}"):
            return look_at_titles(source, processor.tokenizer, processor.max_length)

    @part
    def state(self) -> State:
        title_length = self.start.beginning.processor.max_length if self.args.itm_queue_titles else 0
        return state_of(self.start.model.config, self.args.queue_size, self.start.model, title_length)

    @part
    def reading(self) -> _Reading:
        """Rows of the sample through the loader's own collator, augmentation included."""
        collator, rows = self.start.loader.collator, self.sample.undecoded[:64]
        begin = time.perf_counter()
        collator(rows)
        return _Reading(len(rows), time.perf_counter() - begin)

    @part
    def work(self) -> Work:
        """How a step is done, as far as its memory depends on it."""
        model, launch = self.start.model, self.launch
        towers = (model.vision_model.encoder.layers, model.text_encoder.encoder.layer)
        longest, matched = self._lengths()
        return Work(
            longest=longest,
            matched=matched,
            bf16=launch.precision != "no",
            on_gpu=launch.on_gpu,
            attention=model.config.vision_config._attn_implementation or "sdpa",
            processes=launch.processes,
            zero_stage=launch.zero_stage,
            offloads=launch.offloads,
            checkpointed=tuple(sum(layer.gradient_checkpointing for layer in layers) for layers in towers),
            negatives_from_all_ranks=self.args.negatives_from_all_ranks and launch.processes > 1,
            frozen=self.start.rates,
            itm_negatives=self.args.itm_negatives,
            itm_queue_titles=self.args.itm_queue_titles,
            cached=self.args.cached_batch_size,
            patch_dropout=self.args.patch_dropout,
        )

    def _lengths(self) -> tuple[int, float]:
        """Tokens of the longest title, and of a title of ITM's groups on average; all of them full if there is no data
        to look at."""
        try:
            titles = self.titles
        except AlreadyTold:
            longest = self.start.beginning.processor.max_length
            return longest, float(longest)
        return titles.longest, sum(titles.quantile((group + 1) / GROUPS) for group in range(GROUPS)) / GROUPS

    @part
    def plan(self) -> TrainingPlan:
        return training_plan(self.start, self.titles.mean)

    @part
    def disk(self) -> Disk:
        return disk_of(self.start, self.state)

    # --- flags, launcher, model ---

    def _flags(self) -> None:
        if not [kind for group, kind, _ in self.findings.found if group == "flags" and kind != "ok"]:
            self.findings.ok("the flags agree with each other")

    def _launcher(self) -> None:
        self.findings.check(lambda: self.launch, str)
        if started_alone() and not torch.cuda.is_available():
            self.findings.warning(STARTED_ALONE)
        if self.args.compile:
            self._device("--compile", check_compiler, "layers can be compiled on {}")
        if self.args.fp8:
            self._device("--fp8", check_fp8_device, "{} multiplies in 8 bits")
        if self.args.deterministic:
            self.findings.check(self._order_of_sums, name="--deterministic")

    def _device(self, flag: str, check: Callable[[torch.device], None], told: str) -> None:
        """Whether the device can do what a flag asks for."""
        device = launched_device()
        if self.plan_args.device_memory_gb is not None and device.type == "cpu":
            self.findings.skipped(f"{flag}: the GPUs that are planned for are not here")
            return
        self.findings.check(lambda: check(device), lambda _: f"{flag}: {told.format(device)}")

    def _order_of_sums(self) -> None:
        if self.launch.on_gpu:
            self.findings.ok("--deterministic: equal runs give equal bits, and a step takes longer")
        else:
            self.findings.ok("--deterministic changes nothing on a CPU, where equal runs give equal bits anyway")

    def _model(self) -> None:
        def tell() -> None:
            model, beginning = self.start.model, self.start.beginning
            vision, text = model.config.vision_config, model.config.text_config
            self.findings.ok(
                f"{self.state.parameters / 1e6:.1f} M parameters: ViT {vision.num_hidden_layers} x "
                f"{vision.hidden_size}, {vision.image_size} px in patches of {vision.patch_size}; BERT "
                f"{text.num_hidden_layers} x {text.hidden_size}; "
                + ("new weights" if beginning.model is None else "trained weights")
            )
            if self.args.lora_rank is not None:
                self.findings.ok(
                    f"adapters of rank {self.args.lora_rank} are trained alone: {self.state.trainable:,} parameters"
                )
            if self.start.rates:
                self.findings.ok(
                    f"{self.state.trainable / 1e6:.1f} M of them are trained; --freeze: {', '.join(self.start.rates)}"
                )
            tokenizer = beginning.processor.tokenizer
            self.findings.ok(
                f"tokenizer of {len(tokenizer):,} tokens, {self._origin(tokenizer)}; titles are cut "
                f"at {beginning.processor.max_length} tokens"
            )

        self.findings.check(tell, name="size")

    def _origin(self, tokenizer) -> str:
        model_args = self.start.model_args
        if model_args.train_tokenizer:
            return "learned from the titles"
        named = tokenizer.name_or_path or model_args.tokenizer_name or model_args.model_name_or_path
        return f"from {named}"

    # --- data ---

    def _data(self, name: str) -> None:
        is_training = name == "train_source"

        def tell() -> None:
            source = getattr(self.start, name)
            if source is None:
                self.findings.ok("none: --evaluate_every 0")
                return
            self._tell_sample(source, self.sample if is_training else decoded_sample(source))

        self._look(tell, "a sample of the rows")

    def _tell_sample(self, source: Source, sample: Sample) -> None:
        of = "all" if sample.is_all else f"{sample.rows} of"
        head = f"{of} {source.num_rows:,} rows decoded: {sample.sizes()}"
        if not sample.unusable:
            self.findings.ok(head)
            return
        share, allowed = sample.unusable / sample.rows, self.data_args.max_skipped_fraction
        told = f"{head}; {sample.unusable} are unusable ({share:.1%}): {sample.told_reasons()}"
        # A run judges the rows to train on alone. Of a sample a share near the limit says little.
        if source is self.start.train_source and share > allowed * (1 if sample.is_all else 2):
            self.findings.problem(
                f"{told}. A run stops above --max_skipped_fraction {allowed}: repair them, or raise it"
            )
        else:
            self.findings.warning(f"{told}. They are skipped, counted and listed in skipped.jsonl")

    def _splits(self) -> None:
        def tell() -> None:
            start = self.start
            if start.validation_source is None:
                self.findings.ok("there is no validation data")
                return
            reports = start.told, start.told_validation
            found = leakage(start.train_source, start.validation_source, self.plan_args.compared_rows, reports)
            self._tell_products(found)
            self._tell_photos(found)

        self._look(tell, "both sides")

    def _tell_products(self, found: Leakage) -> None:
        if found.products is None:
            self.findings.skipped("products of both sides: only reading every photo would tell them")
        elif found.products:
            names = ", ".join(found.product_names) + (", ..." if found.products > len(found.product_names) else "")
            self.findings.warning(
                f"{found.products:,} of {found.all_products:,} products of the validation data are in the training "
                f"data too ({names}): recall will say how well they are remembered, and little of new ones; split by "
                "product"
            )
        else:
            self.findings.ok(f"none of {found.all_products:,} products of the validation data is in the training data")

    def _tell_photos(self, found: Leakage) -> None:
        if not found.compared or not found.compared_with:
            self.findings.skipped("photos of both sides: the data lies on other machines, or --compared_rows is 0")
            return
        compared = f"{found.compared:,} photos of the validation data with {found.compared_with:,} of the training data"
        if found.photos:
            names = ", ".join(found.photo_names) + (", ..." if found.photos > len(found.photo_names) else "")
            told = f"{compared} compared: {found.photos:,} are there too, byte by byte ({names}): "
            told += "take them out of one side"
            tell = (
                self.findings.problem
                if found.photos > SHARED_PHOTOS_PROBLEM * found.compared
                else self.findings.warning
            )
            tell(told)
        else:
            self.findings.ok(f"{compared} compared: none is there too, byte by byte")

    def _titles(self) -> None:
        self._look(self._tell_example, "a title")
        self.findings.check(lambda: self._tell_titles(self.titles), name="titles to train on")
        self.findings.check(lambda: self._tell_titles(self.validation_titles), name="titles to evaluate on")

    def _tell_titles(self, titles: TitleReport | None) -> None:
        if titles is None:  # there is no validation data, and that is told
            return
        if not titles.titles:
            self.findings.skipped(f"{titles.source}: there is no usable title")
            return
        of = "" if titles.titles == titles.rows else " looked at"
        told = f"{titles.source}: {titles.titles:,} titles{of}: {titles}"
        examples = f" ({', '.join(map(repr, titles.examples))})" if titles.examples else ""
        if titles.unknown_share > UNKNOWN_PROBLEM:
            self.findings.problem(f"{told}{examples}: {_OTHER_TOKENIZER}")
        elif titles.unknown_share > UNKNOWN_WARNING:
            self.findings.warning(f"{told}{examples}: {_OTHER_TOKENIZER}")
        elif titles.cut_share > CUT_WARNING:
            longest = int(titles.lengths.max())
            self.findings.warning(f"{told}: raise --max_length, up to {longest} for the longest of them")
        else:
            self.findings.ok(told)
        if titles.alike:
            self.findings.warning(titles.alike_line())

    def _tell_example(self) -> None:
        text = next(titles_of(self.start.train_source, 1), None)
        if text is None:  # which is told of all titles
            return
        tokenizer = self.start.beginning.processor.tokenizer
        ids = tokenizer(text, truncation=True, max_length=self.start.beginning.processor.max_length)["input_ids"]
        shown = " ".join(tokenizer.convert_ids_to_tokens(ids[:16]))
        more = " ..." if len(ids) > 16 else ""
        self.findings.ok(
            f"{text[:60]!r} -> {shown}{more} ({', '.join(map(str, ids[:8]))}{', ...' if len(ids) > 8 else ''})"
        )

    # --- course, output, Hub ---

    def _course(self) -> None:
        def tell() -> None:
            start, args = self.start, self.args
            batches = start.batches
            self.findings.ok(batches.describe())
            self.findings.ok(f"{start.total_steps:,} steps, {start.total_steps / start.steps_per_epoch:.4g} epochs")
            for warning in (long_warmup(args.warmup_steps, start.total_steps), lone_rows(args, start.processes)):
                if warning is not None:
                    self.findings.warning(warning)
            rows = start.train_source.num_rows
            if args.queue_size > EPOCHS_TO_FILL_A_QUEUE * rows:
                self.findings.warning(
                    f"--queue_size {args.queue_size:,} takes {args.queue_size / rows:.1f} epochs to fill, and most of "
                    f"its products are in it several times: {rows:,} or less is usual for {rows:,} rows"
                )
            checkpoint = start.resumed[0]
            if checkpoint is not None:
                self.findings.ok(f"goes on from {checkpoint} at step {start.resumed[1].step:,}")

        self.findings.check(tell, name="its length")

    def _output(self) -> None:
        self.findings.check(lambda: self.start.output_dir, lambda folder: f"{folder} can be written")
        if self.args.checkpointing_steps is None:
            self.findings.warning(
                "without --checkpointing_steps a run that is stopped begins again: give a number of steps"
            )

    def _hub(self) -> None:
        if not self.args.push_to_hub:
            self.findings.ok("nothing is published")
            return
        self.findings.check(
            lambda: self.start.publisher,
            lambda publisher: f"{publisher.repo_id} can be written at {publisher.api.endpoint}",
        )

    # --- memory and disk ---

    def _memory(self) -> None:
        def tell() -> None:
            config, size = self.start.model.config, self.args.per_device_train_batch_size
            needed = training_memory(config, self.state, self.work, size)
            there, where = self._available()
            largest = largest_batch(config, self.state, self.work, there)
            told = f"{size_text(needed.total)} a process, for {size} rows a batch, of {size_text(there)} {where}"
            fits = f"the largest batch that fits is {largest:,}" if largest else "not even one row fits"
            if needed.total <= there:
                self.findings.ok(f"{told}; {fits}")
            else:
                ways = "" if all(self.work.checkpointed) else "--gradient_checkpointing, "
                smaller = f"--per_device_train_batch_size {largest} or less, " if largest else ""
                self.findings.problem(
                    f"{told}; {fits}: {smaller}{ways}a smaller --image_size or --queue_size, "
                    "DeepSpeed, or larger devices"
                )
            self.findings.plain(_told_memory(needed))
            if self.args.compile:
                self.findings.plain("as without --compile, with which the peak may be lower")

        self.findings.check(tell, name="what a step takes")

    def _available(self) -> tuple[float, str]:
        if self.plan_args.device_memory_gb is not None:
            return self.plan_args.device_memory_gb * 1e9, "(--device_memory_gb)"
        device = launched_device()
        if device.type == "cuda":
            return torch.cuda.mem_get_info(device)[0], f"free on {torch.cuda.get_device_name(device)}"
        return available_memory(), "of host memory, free"

    def _disk(self) -> None:
        def tell() -> None:
            folder, disk = self.start.folder, self.disk
            with usage_errors(OSError, told=f"the disk of {folder} can't be looked at ({{}})"):
                free = shutil.disk_usage(existing_parent(folder)).free
            told = f"{size_text(disk.needed)} needed at most, {size_text(free)} free at {existing_parent(folder)}"
            if disk.needed <= free:
                self.findings.ok(told)
                return
            fitting = disk.checkpoints_that_fit(free)
            way = f"--save_total_limit {fitting}" if disk.kept > fitting > 0 else "another --output_dir"
            self.findings.problem(f"{told}: make room, or give {way}")

        self.findings.check(tell, name="what is kept")

    # --- the plan ---

    def _plan(self) -> None:
        def tell() -> None:
            plan = self.plan
            self.findings.ok(
                f"{plan.steps:,} steps of {plan.rows_per_step:,} rows, {plan.epochs:.4g} epochs: {plan.samples:,} "
                "samples"
                + (
                    f", {plan.evaluations:,} evaluation{'s' if plan.evaluations > 1 else ''}"
                    if plan.evaluations
                    else ""
                )
            )
            self.findings.ok(
                f"{plan.flops:.3g} FLOPs: {plan.sample_flops:.3g} a sample, {plan.evaluation_flops:.3g} an evaluation"
            )
            self._tell_time(plan)

        self.findings.check(tell, name="steps and work")
        self.findings.check(self._tell_written, name="what is written")

    def _tell_time(self, plan: TrainingPlan) -> None:
        given, peak = self.plan_args.samples_per_second, self.args.peak_tflops
        if peak is None and self.plan_args.device_memory_gb is None:
            peak = peak_tflops_of(launched_device(), self.launch.precision, None)
        rate = None
        if given is not None:
            rate, why = given, f"at {given:,.4g} samples/s, as measured"
        elif peak is not None:
            devices = self.launch.processes
            rate = ASSUMED_SHARE * peak * 1e12 * devices / plan.sample_flops
            why = f"at {ASSUMED_SHARE:.0%} of {devices} x {peak:g} TFLOP/s (assumed), {rate:,.4g} samples/s"
        elif not self.launch.on_gpu:
            here = measured_matmul_flops()
            rate = ASSUMED_SHARE * here / plan.sample_flops
            why = (
                f"at {ASSUMED_SHARE:.0%} of a large fp32 matrix product just measured on this CPU, {here / 1e9:.0f} "
                f"GFLOP/s: {rate:,.4g} samples/s (assumed)"
            )
        if rate is None:
            self.findings.skipped(
                "time: give --peak_tflops (of one device, by its maker) or --samples_per_second (of a log line)"
            )
            return
        self.findings.ok(f"{duration_text(plan.seconds(rate))} {why}")
        self._tell_reading(rate)

    def _tell_reading(self, rate: float) -> None:
        workers = self.start.batches.num_workers
        readers = max(workers, 1) * self.launch.processes
        reading = self.reading
        told = (
            f"reading: one process reads and augments {reading.rate:,.0f} photos/s here ({reading.rows} measured), "
            f"{readers} of them at most {reading.rate * readers:,.0f}"
        )
        if reading.rate * readers < rate:
            self.findings.warning(f"{told}, fewer than are trained on: raise --dataloader_num_workers")
        else:
            self.findings.ok(told)

    def _tell_written(self) -> None:
        folder, disk, args = self.start.folder, self.disk, self.args
        self.findings.ok(f"{folder}/best, {folder}/last: models, {size_text(disk.model)} each")
        if args.checkpointing_steps is not None:
            self.findings.ok(
                f"{folder}/checkpoint-N: {disk.written:,} on the way, {disk.kept:,} kept, "
                f"{size_text(disk.checkpoint)} each"
            )
        self.findings.ok(
            f"{folder}: log.jsonl, skipped.jsonl, arguments.json, manifest.json, machine.json, status.json"
            + (f"; logs/ of {args.report_to}" if args.report_to != "none" else "")
            + (f"; profile/ of {args.profile} steps" if args.profile else "")
        )
        if args.push_to_hub:
            self.findings.ok(f"the Hub, {self.hub_args.hub_model_id}: the best model so far, after each evaluation")


_OTHER_TOKENIZER = "give --train_tokenizer, or a --tokenizer_name that knows these titles"


def _told_memory(memory: TrainingMemory) -> str:
    sizes = {field.name: getattr(memory, field.name) for field in dataclasses.fields(memory)}
    return ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items() if size)
