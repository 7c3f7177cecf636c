"""The plan of a training run: its steps and work, how long they take, and what is written where.

plan = training_plan(start, title_tokens)
print(plan.flops, plan.seconds(samples_per_second=400))
print(disk_of(start, state).needed)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from aliblip.retrieval.evaluation import DEFAULT_K_RERANK
from aliblip.retrieval.plan import memory_plan
from aliblip.training.checkpoint import checkpoints
from aliblip.training.evaluations import evaluations_of
from aliblip.training.flops import sample_flops
from aliblip.training.memory import State
from aliblip.training.setup import Start

__all__ = ["Disk", "TrainingPlan", "disk_of", "training_plan"]

MODELS = ("best", "last")
SMALL_FILES = 2_000_000  # tokenizer, configuration, code and card of a model: about


@dataclass(frozen=True)
class TrainingPlan:
    """Steps and work of a run from where it begins to its end, of all processes.

    Attributes:
        steps: optimizer steps that are still to do.
        total_steps: of the whole run.
        epochs: of the whole run.
        rows_per_step: rows of a step.
        sample_flops: operations for one row in a step, `sample_flops`.
        evaluations: that are due.
        evaluation_flops: operations of one of them.
    """

    steps: int
    total_steps: int
    epochs: float
    rows_per_step: int
    sample_flops: int
    evaluations: int
    evaluation_flops: int

    @property
    def samples(self) -> int:
        return self.steps * self.rows_per_step

    @property
    def flops(self) -> int:
        return self.samples * self.sample_flops + self.evaluations * self.evaluation_flops

    def seconds(self, samples_per_second: float) -> float:
        """At a rate of training, evaluations included as the same work takes as long."""
        return self.flops / (samples_per_second * self.sample_flops)


def training_plan(start: Start, title_tokens: float) -> TrainingPlan:
    """The plan of what a `Start` begins.

    Args:
        title_tokens: mean length of a title.

    Raises:
        AlreadyTold: a part that it needs has a problem.
    """
    config, args = start.model.config, start.args
    validation, per_epoch = start.validation_source, start.steps_per_epoch
    step = start.resumed[1].step
    evaluations = evaluation_flops = 0
    if validation is not None:
        evaluations = evaluations_of(args, per_epoch, start.total_steps).count(after=step)
        rows = validation.num_rows
        depth = args.k_rerank or min(DEFAULT_K_RERANK, rows)
        work = memory_plan(config, rows, rows, depth, title_tokens=title_tokens, rerank_batch_tokens=1)
        evaluation_flops = work.embed_flops + work.search_flops + work.rerank_flops
    return TrainingPlan(
        steps=start.total_steps - step,
        total_steps=start.total_steps,
        epochs=start.total_steps / per_epoch,
        rows_per_step=args.gradient_accumulation_steps * start.processes * args.per_device_train_batch_size,
        sample_flops=sample_flops(config, args, title_tokens),
        evaluations=evaluations,
        evaluation_flops=evaluation_flops,
    )


@dataclass(frozen=True)
class Disk:
    """What a run writes, in bytes.

    Attributes:
        model: one model; a run keeps two.
        checkpoint: one checkpoint.
        written: checkpoints that are written in all.
        kept: checkpoints that are kept at a time.
        there: bytes of this run's models and checkpoints that are there already, and that new ones replace.
    """

    model: int
    checkpoint: int
    written: int
    kept: int
    there: int

    @property
    def most(self) -> int:
        """At a time: what is new is written beside what it replaces."""
        beside = max(self.model, self.checkpoint if self.written else 0)
        return len(MODELS) * self.model + self.kept * self.checkpoint + beside

    @property
    def needed(self) -> int:
        """Free space that it takes."""
        return max(self.most - self.there, 0)

    def checkpoints_that_fit(self, free: int) -> int:
        """Checkpoints that may be kept in so many free bytes; 0 if not even one fits."""
        rest = free + self.there - len(MODELS) * self.model - max(self.model, self.checkpoint)
        return max(int(rest // self.checkpoint), 0)


def disk_of(start: Start, state: State) -> Disk:
    """What the run of a `Start` writes.

    Raises:
        AlreadyTold: a part that it needs has a problem.
    """
    args, per_epoch, total = start.args, start.steps_per_epoch, start.total_steps
    written = 0
    if args.checkpointing_steps is not None:
        first = start.resumed[1].step
        at = {*range(args.checkpointing_steps, total + 1, args.checkpointing_steps)}
        at |= {*range(per_epoch, total + 1, per_epoch), total}
        written = sum(step > first for step in at)
    folder = start.folder
    old = checkpoints(folder) if args.resume_from_checkpoint or args.overwrite_output_dir else []
    replaced = [*old, *(folder / name for name in MODELS)]
    kept = written + (len(old) if args.resume_from_checkpoint else 0)
    return Disk(
        model=state.model_bytes + SMALL_FILES,
        checkpoint=state.checkpoint_bytes(start.processes),
        written=written,
        kept=kept if args.save_total_limit is None else min(kept, args.save_total_limit),
        there=sum(map(_bytes_of, replaced)),
    )


def _bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
