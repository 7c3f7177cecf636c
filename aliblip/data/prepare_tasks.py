"""What is prepared, cut into tasks: runs of rows that are read, checked and written by one process.

    inputs = Inputs({"train": {"data_dir": "catalogue", ...}})
    for task in inputs.tasks(rows_per_task=1000): ...
    for split, row in inputs.read(task): ...

A row has one number in all inputs together. What a task is depends on the data and `rows_per_task` alone, so that its
output does not depend on how many processes there are.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from aliblip.data.rows import Row, Source
from aliblip.data.sources import ALL, open_source
from aliblip.runtime.mistakes import UsageError

__all__ = ["Inputs", "Task"]

# Opened sources by the key of their inputs: those of a process, which its forks inherit.
_opened: dict[str, list[Source]] = {}


@dataclass(frozen=True)
class Task:
    """Rows [start, stop) of one source, the first of which has the number `first_row` in all inputs."""

    source: int
    start: int
    stop: int
    first_row: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


class Inputs:
    """The sources that are prepared, one for each split that was given. Small to send to another process, which opens
    the data again, or finds it opened if it is a fork.

    Args:
        splits: split -> arguments of `open_source`.
        content: digest of what the sources hold, to see whether they changed; None: of what is there now.

    Raises:
        UsageError: as `open_source`; or the data is no longer what it was.
    """

    def __init__(self, splits: Mapping[str, Mapping[str, Any]], content: str | None = None):
        self.splits = {split: dict(arguments) for split, arguments in splits.items()}
        arguments = json.dumps([os.getcwd(), self.splits], sort_keys=True, default=repr)
        self.key = hashlib.blake2b(arguments.encode(), digest_size=16).hexdigest()
        if content is None:  # a start, which looks at what is there now
            _opened.pop(self.key, None)
        self.content = content or self._content()

    def sources(self) -> list[Source]:
        """The opened sources, in the order of the splits."""
        if self.key not in _opened:
            _opened[self.key] = [
                open_source(**arguments, split=split, other_columns=ALL) for split, arguments in self.splits.items()
            ]
        return _opened[self.key]

    def given(self, name: str) -> Any:
        """An argument of `open_source` that is the same for all splits."""
        return next(iter(self.splits.values())).get(name)

    def names(self) -> list[str]:
        """The split of each source."""
        return list(self.splits)

    def tasks(self, rows_per_task: int) -> list[Task]:
        """All tasks, in the order of the rows; none has rows of two sources."""
        tasks, first = [], 0
        for index, source in enumerate(self.sources()):
            for start in range(0, source.num_rows, rows_per_task):
                tasks.append(Task(index, start, min(start + rows_per_task, source.num_rows), first + start))
            first += source.num_rows
        return tasks

    def read(self, task: Task) -> Iterator[Row]:
        """The rows of a task; their numbers are those within the source.

        Raises:
            UsageError: the data can't be read, or is no longer what it was.
        """
        if self.key not in _opened and self._content() != self.content:
            raise UsageError("the data has changed since the work began: begin anew with --overwrite_output_dir")
        source = self.sources()[task.source]
        rows, done = source.read_range(task.start, task.stop), 0
        while True:
            try:
                row = next(rows, None)
            except OSError as error:
                raise UsageError(
                    f"{source.name} can't be read ({error}): when it can, the same command goes on"
                ) from error
            if row is None:
                break
            done += 1
            yield row
        if done != task.rows:
            raise UsageError(f"{source.name} gave {done:,} rows where {task.rows:,} were expected: has it changed?")

    def _content(self) -> str:
        manifests = [source.manifest() | {"columns": source.columns} for source in self.sources()]
        return hashlib.blake2b(json.dumps(manifests, sort_keys=True).encode(), digest_size=16).hexdigest()
