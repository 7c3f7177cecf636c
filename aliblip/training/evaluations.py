"""When a run is evaluated: by epochs, by steps, or both."""

from __future__ import annotations

from dataclasses import dataclass

from aliblip.runtime.mistakes import UsageError
from aliblip.training.arguments import TrainingArguments


@dataclass(frozen=True)
class Evaluations:
    """The optimizer steps after which an evaluation is due, each once, and after the last.

    Attributes:
        every_epochs: 0: not by epochs.
        every_steps: None: not by steps. Without both there is none at all.
        steps_per_epoch: optimizer steps.
        total_steps: of the run.
    """

    every_epochs: int
    every_steps: int | None
    steps_per_epoch: int
    total_steps: int

    def are_due(self, step: int) -> bool:
        """Whether there is one after so many steps."""
        if step == 0 or not (self.every_epochs or self.every_steps):
            return False
        by_steps = self.every_steps is not None and step % self.every_steps == 0
        by_epochs = self.every_epochs > 0 and step % (self.every_epochs * self.steps_per_epoch) == 0
        return by_steps or by_epochs or step == self.total_steps

    def end_an_epoch(self, step: int) -> bool:
        """Whether an epoch, or the run, ends with so many steps."""
        return step % self.steps_per_epoch == 0 or step == self.total_steps

    def count(self, after: int = 0) -> int:
        """Evaluations of a run that has so many steps behind it."""
        return sum(self.are_due(step) for step in range(after + 1, self.total_steps + 1))


def evaluations_of(args: TrainingArguments, steps_per_epoch: int, total_steps: int) -> Evaluations:
    """What the arguments ask for."""
    return Evaluations(args.evaluate_every, args.eval_steps, steps_per_epoch, total_steps)


def check_early_stopping(args: TrainingArguments) -> None:
    """Refuse to wait for what never comes.

    Raises:
        UsageError: nothing is evaluated.
    """
    if args.early_stopping_patience is not None and not args.evaluates:
        raise UsageError(
            "--early_stopping_patience counts evaluations, and --evaluate_every 0 makes none: give --eval_steps, or "
            "leave it out"
        )


__all__ = ["Evaluations", "check_early_stopping", "evaluations_of"]
