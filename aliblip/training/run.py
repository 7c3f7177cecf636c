"""What happens around a step: the position in the data, undoing, the log, checkpoints, signals, evaluation, publishing.

    with Run(setup, accelerator, training, signals, status, changed) as run:
        for epoch in run.epochs():
            for step in run.steps(epoch):
                for batch, alpha in run.batches(step):
                    ...
                    run.after_batch(step, batch, targets, output)
                run.after_step(step, output, outcome)
            if run.stopped_by:
                return run.stop()
            run.after_epoch(epoch)
        run.finish()

What a step is stands in `train.py`. All methods are collectives unless they say otherwise: every rank calls them, in
the same order.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from signal import Signals
from typing import Any

import torch
from torch import Tensor

from aliblip.data.arguments import DataArguments
from aliblip.data.collate import Normalisation
from aliblip.retrieval.arguments import EvaluationDataArguments
from aliblip.retrieval.evaluation import evaluate_retrieval
from aliblip.retrieval.results import split_told
from aliblip.runtime.accelerator import AliBlipAccelerator, describe_machine
from aliblip.runtime.distributed import all_gather_objects, assert_equal_on_ranks, together
from aliblip.runtime.files import write_json
from aliblip.runtime.installation import script_command
from aliblip.runtime.interrupts import StopSignals
from aliblip.runtime.mistakes import UsageError, usage_errors
from aliblip.runtime.sameness import changes, told
from aliblip.training.arguments import TrainDataArguments
from aliblip.training.building import ChangedTowers
from aliblip.training.checkpoint import (
    Progress,
    Training,
    checkpoints,
    load_checkpoint,
    random_states,
    remove_later_checkpoints,
    save_checkpoint,
    save_model,
    save_results,
)
from aliblip.training.evaluations import evaluations_of
from aliblip.training.feed import Feed
from aliblip.training.flops import sample_flops
from aliblip.training.meters import Meters, peak_tflops_of
from aliblip.training.momentum import Targets
from aliblip.training.objective import ObjectiveOutput
from aliblip.training.optim import alpha_schedule, long_warmup
from aliblip.training.profiling import Profiler
from aliblip.training.progress import Log, RunStatus, SkippedRows, shared_out
from aliblip.training.setup import ARGUMENTS, PROFILE, Setup, earlier_outputs, lone_rows, remove
from aliblip.training.step import Outcome, fp32_value, loss_scale_state
from aliblip.training.tokenizer import TRAINED_TOKENIZER, save_trained_tokenizer, tokenizer_bytes
from aliblip.training.trackers import continued, named_trackers, new_ones, remember, settings

ROWS_TO_JUDGE = 1000  # before the end of an epoch, a few rows more or less say little about the data
# These differ in every resumed run, and say nothing about its training.
NOT_OF_THE_TRAINING = ("resume_from_checkpoint", "output_dir", "overwrite_output_dir", "peak_tflops", "profile")


@dataclasses.dataclass
class Step:
    """An optimizer step: what it begins with, and what its micro-batches leave for its end."""

    average_is_due: bool  # False after a step that was left out: the average has followed the one before
    taken: int  # steps before this one that changed something; schedules count these
    learning_rate: float
    targets: Targets | None = None  # of the first micro-batch, with the queues as they were then
    rows: list[Tensor] = dataclasses.field(default_factory=list)


class Run:
    """A run in its course. A context manager, so that the screen is in order for what is told about an error.

    Args:
        setup: what was asked for.
        accelerator: the processes that have met.
        training: the state that a checkpoint holds.
        signals: that ask the run to stop.
        status: `status.json`.
        changed: what computes the towers in another way in training, of `change_towers`.

    Raises:
        UsageError: the checkpoint to go on from does not fit the model, or a tracker can't begin.
        RuntimeError: the ranks do not begin with the same state.
    """

    def __init__(
        self,
        setup: Setup,
        accelerator: AliBlipAccelerator,
        training: Training,
        signals: StopSignals,
        status: RunStatus,
        changed: Sequence[ChangedTowers] = (),
    ):
        self.setup, self.args, self.output_dir = setup, setup.args, setup.output_dir
        self.accelerator, self.training, self.signals, self.status = accelerator, training, signals, status
        self.changed = changed
        self.progress = setup.progress
        self.normalise = Normalisation(setup.processor.image_processor)
        self.stopped_by: Signals | None = None
        self.ended_early = False  # by --early_stopping_patience
        self._tracked: dict[str, dict[str, Any]] = {}  # what each tracker is told of its run
        self.evaluations = evaluations_of(self.args, setup.steps_per_epoch, setup.total_steps)
        # A checkpoint is older than the evaluation of its step.
        self._owes_evaluation = setup.checkpoint is not None and self.evaluations.are_due(self.progress.step)
        of_rank = None
        if setup.checkpoint is None:
            self._begin_anew()
        else:
            of_ranks = load_checkpoint(setup.checkpoint, training)
            of_rank = shared_out(of_ranks, accelerator.process_index, accelerator.num_processes)
            self._processes_before = len(of_ranks)
            self._can_begin()
        self.log = Log(
            accelerator,
            self.output_dir,
            total_steps=setup.total_steps,
            warmup_steps=self.args.warmup_steps,
            first_step=self.progress.step,
            meters=self._meters(),
        )
        fraction, device = setup.data_args.max_skipped_fraction, accelerator.device
        self.skipped = SkippedRows(fraction, device, self.output_dir / "skipped.jsonl")
        of_main = self.args.profile if accelerator.is_main_process else 0
        self.profiler = Profiler(of_main, self.output_dir / PROFILE, device)
        self._results: dict | None = None  # of the last evaluation
        self._problem: str | None = None  # why the last model could not be written
        self._last_norm = 0.0
        if of_rank is not None:
            self._resume(setup.checkpoint, of_rank)
        self._write_what_it_is()
        self._announce()
        self._before = self._position()
        # The readers begin with the first batch, and last until the run leaves.
        batches = self.args.gradient_accumulation_steps
        self._batches = setup.loader.batches(self.progress.step * batches, setup.total_steps * batches)
        self._feed = Feed(self._batches, accelerator.device)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *error) -> None:
        self._batches.close()
        self._tell_profile(self.profiler.finish())
        self.log.close()

    def _meters(self) -> Meters:
        """Of this process."""
        device, precision = self.accelerator.device, self.accelerator.mixed_precision
        peak = peak_tflops_of(device, precision, self.args.peak_tflops)
        config, args = self.training.model.config, self.args
        return Meters(device, lambda tokens: sample_flops(config, args, tokens), peak)

    # --- the begin ----------------------------------------------------------------------------------------------------

    def _begin_anew(self) -> None:
        """Replace what an earlier run left in the folder, once a new one can begin."""
        is_main, arguments = self.accelerator.is_main_process, self.output_dir / ARGUMENTS
        earlier = earlier_outputs(self.output_dir) if is_main else []
        is_first = is_main and not arguments.exists()
        if is_first:  # a run that dies now can be started again: the folder is known for its own
            write_json(arguments, self.setup.arguments)
        try:
            self._can_begin()
        except BaseException:
            if is_first:
                arguments.unlink(missing_ok=True)
            raise
        remove(earlier)

    def _can_begin(self) -> None:
        """Try the last things that can be refused: until here nothing of an earlier run has been changed."""
        # On several machines this finds a folder that is not the same for all of them, too.
        tokenizer = tokenizer_bytes(self.setup.processor.tokenizer)
        more = {"step": torch.tensor(self.progress.step), "tokenizer": tokenizer}
        self._assert_equal("step, tokenizer, momentum encoders and queues", **more)
        if not self.accelerator.log_with:
            return
        told = f"--report_to {self.args.report_to} can't begin ({{}}): see to it, or give --report_to none"

        step = self.progress.step if self._goes_back else None
        trackers = named_trackers(self.args.report_to)
        self._tracked = continued(trackers, self.output_dir, self.args.run_name, step)

        def begin() -> None:
            with usage_errors(Exception, told=told):  # each tracker has errors of its own
                config = settings(self.setup.arguments)
                self.accelerator.init_trackers(self.args.project_name, config=config, init_kwargs=self._tracked)

        together(True, begin, "begin the trackers")

    def _resume(self, checkpoint: Path, of_rank: dict[str, Any]) -> None:
        self.log.load_state(of_rank["log"])
        self.skipped.load_state(of_rank["skipped"])
        step, arguments = self.progress.step, self.setup.arguments
        names = [name for name in arguments if name not in NOT_OF_THE_TRAINING]
        changed = changes(self.setup.arguments_before, arguments, names)
        differently = f"; other than before: {told(changed, len(changed))}" if changed else ""
        self.log.tell(f"resumed from {checkpoint} at step {step}{differently}")
        if (before := self._processes_before) != (now := self.accelerator.num_processes):
            self.log.tell(
                f"{before} process{'es' if before > 1 else ''} before, {now} now: the rows of every step stay the "
                "same; dropout and negatives are drawn anew"
            )
        if self._goes_back and new_ones(list(self._tracked)):
            self.log.tell(f"trackers that begin a new run: {', '.join(new_ones(list(self._tracked)))}")
        if self._goes_back and self.accelerator.is_main_process:
            later = remove_later_checkpoints(self.output_dir, step)
            if later:
                self.log.tell(f"removed, since they were written after that step: {', '.join(later)}")

    @property
    def _goes_back(self) -> bool:
        """Whether it goes on from a checkpoint of its own folder, and not of another run."""
        checkpoint = self.setup.checkpoint
        return checkpoint is not None and checkpoint.resolve().parent == self.output_dir.resolve()

    def _write_what_it_is(self) -> None:
        if self.accelerator.is_main_process:
            remember(self.accelerator, self._tracked, self.output_dir)
            write_json(self.output_dir / ARGUMENTS, self.setup.arguments)
            write_json(self.output_dir / "manifest.json", self.setup.manifest)
            write_json(self.output_dir / "machine.json", describe_machine(self.accelerator))
            if self.setup.model_args.train_tokenizer:
                save_trained_tokenizer(self.setup.processor.tokenizer, self.output_dir / TRAINED_TOKENIZER)

    def _announce(self) -> None:
        processes, accumulation = self.accelerator.num_processes, self.args.gradient_accumulation_steps
        parameters = list(self.training.model.parameters())
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        frozen = sum(parameter.numel() for parameter in parameters) - trained
        self.log.tell(
            f"training {trained / 1e6:.1f} M parameters{f' ({frozen / 1e6:.1f} M frozen)' if frozen else ''} for "
            f"{self.setup.total_steps} steps "
            f"({self.setup.total_steps / self.setup.steps_per_epoch:.4g} epochs) of "
            f"{self.args.per_device_train_batch_size} rows x {processes} process{'es' if processes > 1 else ''}"
            f"{f' x {accumulation} batches' if accumulation > 1 else ''}, "
            f"{self.accelerator.distributed_type.value}, {self.accelerator.mixed_precision} mixed precision\n"
            f"{self.setup.loader.describe()}"
        )
        if self.log.meters.peak_tflops is not None:
            self.log.tell(f"mfu: of {self.log.meters.peak_tflops:g} TFLOP/s a device")
        checkpoint = None if self.setup.checkpoint is None else str(self.setup.checkpoint)
        total_steps = self.setup.total_steps
        for warning in (long_warmup(self.args.warmup_steps, total_steps), lone_rows(self.args, processes)):
            if warning is not None:
                self.log.tell(f"warning: {warning}")
        self.status.write("running", step=self.progress.step, total_steps=total_steps, checkpoint=checkpoint)

    # --- the position -------------------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """Epochs that are still to do, until the run ends early. A run that comes back to the end of one does again
        what is due there; the training is not changed by it. No collective."""
        per_epoch = self.setup.steps_per_epoch
        for epoch in range(max(self.progress.step - 1, 0) // per_epoch, math.ceil(self.setup.total_steps / per_epoch)):
            if not self.ended_early:
                yield epoch

    def steps(self, epoch: int) -> Iterator[Step]:
        """Steps of an epoch that are still to do, until a signal stops the run or it ends early."""
        per_epoch = self.setup.steps_per_epoch
        if self._owes_evaluation and not self.evaluations.end_an_epoch(self.progress.step):
            self._after_steps()
        self._owes_evaluation = False
        if self.ended_early:
            return
        last = min(self.setup.total_steps, (epoch + 1) * per_epoch)
        while self.progress.step < last and not self.stopped_by and not self.ended_early:
            with self.log.paused():
                self.profiler.begin_step(last - self.progress.step, per_epoch)
            yield self._begin_step()
        with self.log.paused():
            self._tell_profile(self.profiler.finish())

    def _begin_step(self) -> Step:
        progress = self.progress
        average_is_due, progress.average_is_due = progress.average_is_due, False  # the loop lets it follow at once
        if not progress.left_out_in_a_row:
            self._before = self._position()
        taken = progress.step - progress.left_out
        return Step(average_is_due, taken, self.setup.learning_rate(taken))

    def _position(self) -> tuple[Progress, dict[str, Tensor]]:
        """Counters, random states, and in fp16 the loss scale: with the state of the training, which a step that is
        left out does not change, all that a run goes back to."""
        moving = random_states(self.accelerator.device) | loss_scale_state(self.training.scaler)
        return dataclasses.replace(self.progress), moving

    def batches(self, step: Step) -> Iterator[tuple[dict[str, Any], float]]:
        """The micro-batches of a step, on the device, each with its weight of the momentum encoders' opinion. No
        collective."""
        accumulation = self.args.gradient_accumulation_steps
        batches_per_epoch = self.setup.steps_per_epoch * accumulation
        for micro_step in range(accumulation):
            batch = self._feed.take()
            self.skipped.add(batch)
            alpha = alpha_schedule(self.args.alpha, step.taken * accumulation + micro_step, batches_per_epoch)
            # Another title of the same photo is no negative, whatever its product is called.
            ids = torch.stack([batch.pop("product_id"), batch.pop("photo_id")], dim=1)
            yield batch | {"pixel_values": self.normalise(batch["pixel_values"]), "product_id": ids}, alpha

    def after_batch(self, step: Step, batch: dict[str, Any], targets: Targets, output: ObjectiveOutput) -> None:
        """Keep of a micro-batch what the end of its step needs, and fetch the next. No collective."""
        step.targets = step.targets or targets
        step.rows.append(batch["row"])
        self.log.add_batch(output)
        self.log.meters.add(batch["row"].shape[0], sum(batch["title_lengths"]), self._feed.waited)
        self._feed.fetch()

    def after_step(self, step: Step, output: ObjectiveOutput, outcome: Outcome) -> None:
        """All that is due once the weights have moved, or were kept from it."""
        grad_norm, number = outcome.read()
        with self.log.paused():
            self._tell_profile(self.profiler.end_step(sum(map(len, step.rows))))
        self.progress.step += 1
        is_finite = math.isfinite(grad_norm)
        self.log.end_step(left_out=not is_finite)
        if is_finite:
            self._take(grad_norm)
        else:
            self._leave_out(step)
        if self._log_line_is_due():
            self._log_line(step, output)
        self.stopped_by = self.signals.known_to_all(number)
        if self.stopped_by or self._checkpoint_is_due():
            self._save_checkpoint(*self._position())
        step = self.progress.step
        if not self.stopped_by and self.evaluations.are_due(step) and not self.evaluations.end_an_epoch(step):
            self._after_steps()

    def _tell_profile(self, line: str | None) -> None:
        if line is not None:
            self.log.tell(line)

    # --- steps that are not finite ------------------------------------------------------------------------------------

    def _take(self, grad_norm: float) -> None:
        self.progress.average_is_due, self.progress.left_out_in_a_row = True, 0
        self._last_norm = grad_norm

    def _leave_out(self, step: Step) -> None:
        """The optimizer has changed nothing; put the queues back too, and give up when that happened too often."""
        self.training.momentum.rewind(step.targets)
        self.progress.left_out += 1
        self.progress.left_out_in_a_row += 1
        if self.progress.left_out_in_a_row >= self.args.max_non_finite_steps:
            self._give_up(step)

    def _give_up(self, step: Step) -> None:
        """Leave a checkpoint from before the first of these steps, and end the run with the rows of the last."""
        before = self._before[0].step
        is_saved = self._save_checkpoint(*self._before)
        if is_saved and self.accelerator.is_main_process:
            remove_later_checkpoints(self.output_dir, before)
        rows = sorted(sum(all_gather_objects(torch.cat(step.rows).tolist()), []))
        kept = f"checkpoint-{before} is from before them" if is_saved else "no checkpoint was written"
        raise UsageError(
            f"no finite loss or gradient in {self.progress.left_out_in_a_row} steps in a row (up to step "
            f"{self.progress.step}, whose rows are {', '.join(map(str, rows))}); {kept}: look at the rows, or resume "
            "with a lower --learning_rate"
        )

    # --- the log ------------------------------------------------------------------------------------------------------

    def _log_line_is_due(self) -> bool:
        return self.progress.step % self.args.logging_steps == 0 or self.progress.step == self.setup.total_steps

    def _log_line(self, step: Step, output: ObjectiveOutput) -> None:
        scale = loss_scale_state(self.training.scaler)
        values = {"temperature": output.report["temperature"], "queue_fill": self.training.momentum.queue_fill()}
        self.log.line(
            self.progress.step,
            self.progress.step / self.setup.steps_per_epoch,
            values | ({"loss_scale": scale["loss_scale"].squeeze()} if scale else {}),
            learning_rate=step.learning_rate,
            grad_norm=self._last_norm,
        )
        self.skipped.check(at_least=ROWS_TO_JUDGE)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _checkpoint_is_due(self) -> bool:
        """Every so many steps, and at the end of an epoch: before its evaluation, which can take longer than a launcher
        waits."""
        step, every = self.progress.step, self.args.checkpointing_steps
        if every is None:
            return False
        ends_epoch = step % self.setup.steps_per_epoch == 0 or step == self.setup.total_steps
        return step % every == 0 or ends_epoch

    def _save_checkpoint(self, at: Progress, random: dict[str, Tensor]) -> bool:
        """Write a checkpoint; one that can't be written is told, and the run goes on."""
        with self.log.paused():
            self._set_fusion_weight()
            self.skipped.write()
            counters = {
                **dataclasses.asdict(at),
                "epoch": at.step / self.setup.steps_per_epoch,
                "samples": at.step * self.setup.rows_per_step,
                "order": self.setup.order,
                "manifest": self.setup.manifest,
                "arguments": self.setup.arguments,
            }
            of_rank = {"log": self.log.state(), "skipped": self.skipped.state()}
            limit = self.args.save_total_limit
            problem = save_checkpoint(
                self.training,
                self.setup.processor,
                self.output_dir,
                counters,
                of_rank=of_rank,
                random=random,
                limit=limit,
            )
            if problem is None:
                self.status.write("running", step=at.step, checkpoint=str(self.output_dir / f"checkpoint-{at.step}"))
            else:
                last = self.status.entry["checkpoint"]
                kept = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
                self.log.tell(
                    f"warning: checkpoint-{at.step} could not be written ({problem}): the run goes on, {kept}"
                )
            return problem is None

    # --- evaluation, at the end of an epoch and between ---------------------------------------------------------------

    def after_epoch(self, epoch: int) -> None:
        """Judge the data, keep the model, evaluate, keep the best, publish. Nothing of a run that has ended early, in
        the middle of the epoch: it has done that."""
        if self.ended_early:
            return
        self.skipped.check()
        self._keep_and_evaluate(epoch + 1, f"epoch {epoch + 1}", f"after epoch {epoch + 1} (step {self.progress.step})")

    def _after_steps(self) -> None:
        """The same in the middle of an epoch, when --eval_steps says so; a profile ends there."""
        self._tell_profile(self.profiler.finish())
        self.skipped.check(at_least=ROWS_TO_JUDGE)
        step = self.progress.step
        epoch = round(step / self.setup.steps_per_epoch, 4)
        self._keep_and_evaluate(epoch, f"step {step}", f"after step {step} (epoch {epoch:.2f})")

    def _keep_and_evaluate(self, epoch: float, of: str, after: str) -> None:
        with self.log.paused():
            self._set_fusion_weight()
            self.skipped.write()
            # The model first: whatever goes wrong in its evaluation, its weights are there.
            self._problem = self._save("last", None)
            results = self._evaluate(epoch, after) if self.evaluations.are_due(self.progress.step) else None
            if results is not None and self._problem is None:
                self._problem = save_results(results, self.output_dir / "last")
            self._problem = self._judge(results) or self._problem
            if self._problem is not None:
                self.log.tell(f"warning: the model of {of} could not be written ({self._problem})")
            self._publish(of)

    def _set_fusion_weight(self) -> None:
        """Match logits that the listwise loss has trained are on the scale of ITC's logits, similarity / temperature:
        by their sum such a model orders what it finds. Others keep the weight of their configuration, and so do
        adapters, which are saved without one."""
        if self.args.itm_listwise and self.args.lora_rank is None:
            model = self.training.model
            model.config.fusion_weight = round(1.0 / fp32_value(model.temp).item(), 4)

    def _evaluate(self, epoch: float, after: str) -> dict:
        source = self.setup.validation_loader.source
        with ExitStack() as plainly:
            for towers in self.changed:
                plainly.enter_context(towers.paused())
            self._results = evaluate_retrieval(
                self.training.model,
                self.setup.validation_loader,
                model_name=str(self.output_dir / "last"),
                dataset_name=source.name,
                split=split_told(source.split, self.setup.data_args.validation_file),
                k_rerank=self.args.k_rerank,
                dtype=self.accelerator.autocast_dtype,
            )
        self.log.evaluation(self.progress.step, epoch, after, self._results)
        return self._results

    def _judge(self, results: dict | None) -> str | None:
        """Keep the model if it is the best so far, or end the run if none was for long; why the model could not be
        written."""
        if results is None:
            return None
        if results["mean_recall"] > self.progress.best_mean_recall:
            problem = self._save("best", {**results, "model": str(self.output_dir / "best")})
            if problem is None:
                self.progress.best_mean_recall = results["mean_recall"]
            self.progress.evaluations_without_gain = 0
            return problem
        self.progress.evaluations_without_gain += 1
        patience, step = self.args.early_stopping_patience, self.progress.step
        if (
            patience is not None
            and self.progress.evaluations_without_gain >= patience
            and step < self.setup.total_steps
        ):
            self.ended_early = True
            times = f"{patience} evaluations" if patience > 1 else "one evaluation"
            self.log.tell(
                f"ended early, after step {step}: {times} without a better mean recall than "
                f"{self.progress.best_mean_recall:.4f}"
            )
        return None

    def _save(self, name: str, results: dict | None) -> str | None:
        return save_model(self.training.model, self.setup.processor, self.output_dir / name, results)

    def _publish(self, of: str) -> None:
        if self.setup.publisher is None:  # of the main process
            return
        # A resumed run comes by here with the best model of before, which may not be on the Hub yet.
        kept = self.output_dir / ("best" if (self.output_dir / "best").exists() else "last")
        if kept.exists():
            self.setup.publisher.push(kept, f"Model of {of}")

    # --- the end ------------------------------------------------------------------------------------------------------

    def stop(self) -> Signals:
        """Tell how a signal stopped the run, and how it goes on. The signal."""
        self.log.close()
        step, checkpoint = self.progress.step, self.status.entry["checkpoint"]
        self.status.write("stopped", step=step, reason=self.stopped_by.name)
        if checkpoint is None:
            goes_on = "no checkpoint could be written"
        else:
            is_new = checkpoint.endswith(f"checkpoint-{step}")
            goes_on = f"{checkpoint} is {'written' if is_new else 'the last checkpoint'}; the same command with "
            goes_on += "--resume_from_checkpoint last goes on"
        self.accelerator.print(f"stopped by {self.stopped_by.name} after step {step}: {goes_on}")
        return self.stopped_by

    def finish(self) -> None:
        """The run is through: tell what came of it.

        Raises:
            UsageError: the last model could not be written.
            RuntimeError: the ranks do not end with the same momentum encoders and queues.
        """
        self.log.close()
        self._assert_equal("momentum encoders and queues")
        if self._problem is not None:
            has_any = bool(checkpoints(self.output_dir))
            way_out = "resume from the last checkpoint" if has_any else "use --checkpointing_steps next time"
            raise UsageError(
                f"the run is through, but its model could not be written to {self.output_dir} ({self._problem}): make "
                f"room, and {way_out}"
            )
        unusable = self.skipped.collect()
        self.status.write("completed", step=self.progress.step, ended_early=self.ended_early)
        if self.accelerator.is_main_process:
            self._tell_what_came_of_it(unusable)

    def _tell_what_came_of_it(self, unusable: list[dict]) -> None:
        step, last, best = self.progress.step, self.output_dir / "last", self.output_dir / "best"
        samples = step * self.setup.rows_per_step
        print(f"done in {self.status.minutes():.1f} minutes: {step} steps, {samples} samples")
        for towers in self.changed:
            print(towers.told())
        if unusable:
            names = ", ".join(row["name"] for row in unusable[:5]) + (", ..." if len(unusable) > 5 else "")
            print(f"{len(unusable)} rows could not be used ({names}): see {self.skipped.file}")
        if self._results is None or not best.exists():
            print(f"model: {last}")
        else:
            print(f"best model: {best} (mean recall {self.progress.best_mean_recall:.4f}); last model: {last}")
            print(f"next: {evaluation_command(best, self.setup.data_args)}")

    def _assert_equal(self, what: str, **more: Tensor) -> None:
        momentum = {
            name: value for name, value in self.training.momentum.state_dict().items() if torch.is_tensor(value)
        }
        assert_equal_on_ranks(what, {**momentum, **more})


def evaluation_command(model: Path, data: TrainDataArguments) -> str:
    """The command that evaluates a model on what its training was evaluated on."""
    shared = {field.name: field.default for field in dataclasses.fields(DataArguments)}
    flags = {name: getattr(data, name) for name, default in shared.items() if getattr(data, name) != default}
    flags.pop("dataloader_num_workers", None)
    if data.validation_file is not None:
        flags["data_files"] = data.validation_file
    if data.validation_split_name != EvaluationDataArguments.split_name:
        flags["split_name"] = data.validation_split_name
    typed = [f"--{name} {shlex.quote(str(value))}" for name, value in {"model_name_or_path": model, **flags}.items()]
    return " ".join([script_command("evaluate_retrieval.py"), *typed])


__all__ = ["Run", "Step", "evaluation_command"]
