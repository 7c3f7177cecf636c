"""Which rows a step of training reads: the same ones, however many processes share them.

    layout = Layout.of(global_batch=256, partitions=64, shuffle_window=4096)
    order = EpochOrder(shard_rows, layout, seed=42, epoch=3)
    window, index = order.place(partition=5, step=17)

All shards of an epoch in a seeded permutation are one sequence of rows; it is turned by a seeded offset, so that the
few rows left over differ from epoch to epoch; and it is cut into partitions of equal length, a fixed number of them.
Each step takes the next rows of every partition, equally many. So the rows of a step depend on the seed, the epoch, the
shards and the layout alone, and any number of processes that divides the partitions can share them out. A partition
consists of windows; the undecoded rows of a window are read and permuted. The windows of the partitions begin at
different steps, so that they are not all read at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

__all__ = ["EpochOrder", "Layout", "default_window", "facts_of", "most_partitions"]

# Numbers of the seeded streams, so that no two draws share one.
SHARD_ORDER, WINDOW_ORDER = 0, 1
MOST_PARTITIONS = 64
# A window holds the rows of so many steps, at least, where nobody says how many rows.
STEPS_OF_A_WINDOW = 16
LEAST_WINDOW = 4096


@dataclass(frozen=True)
class Layout:
    """How the rows of a step lie in the sequence of an epoch.

    Attributes:
        partitions: parts of the sequence that are read side by side.
        rows: of each partition in a turn.
        window: rows of a partition that are permuted among themselves, whole turns.
        turns: of a step; the rows of a step are turns * partitions * rows.
        lanes: windows of a partition that take turns; 1, but for checkpoints of version 0.1.0.
        staggered: whether the windows of the partitions begin at different turns.
    """

    partitions: int
    rows: int
    window: int
    turns: int = 1
    lanes: int = 1
    staggered: bool = True

    @property
    def rows_per_step(self) -> int:
        """Of all partitions."""
        return self.turns * self.partitions * self.rows

    @classmethod
    def of(cls, global_batch: int, partitions: int, shuffle_window: int, num_rows: int) -> Layout:
        """The layout of a run.

        Args:
            global_batch: rows of an optimizer step, of all processes.
            partitions: a divisor of it.
            shuffle_window: rows that are permuted, of all partitions together; rounded down to whole steps, at least
                one.
            num_rows: of the data. Where a window holds them all, nothing is gained by reading it in turn.
        """
        rows = global_batch // partitions
        window = max(shuffle_window // global_batch, 1) * rows
        return cls(partitions, rows, window, staggered=shuffle_window < num_rows)

    @classmethod
    def of_version_0_1_0(cls, order: Mapping[str, Any], num_rows: int) -> Layout:
        """The layout of a checkpoint of version 0.1.0: a partition for each process it had, and a lane for each reader
        of a process.

        Args:
            order: what its `state.json` says.
            num_rows: of the data.
        """
        processes, rows = order["processes"], order["per_device_train_batch_size"]
        lanes = max(order["dataloader_num_workers"], 1)
        # With several readers a window was at most the share of one of them.
        window = min(order["shuffle_window"], -(-(num_rows // (processes * rows)) // lanes) * rows)
        turns = order["gradient_accumulation_steps"]
        return cls(processes, rows, max(window // rows, 1) * rows, turns, lanes, staggered=False)


def default_window(global_batch: int) -> int:
    """Rows that are permuted, of all partitions together, where nobody says how many."""
    return max(LEAST_WINDOW, STEPS_OF_A_WINDOW * global_batch)


def facts_of(order: Mapping[str, Any]) -> dict[str, Any]:
    """What the order of the rows depends on, of what a checkpoint says of it.

    Returns:
        {"rows", "global_batch", "data_partitions", "shuffle_window", "seed"}; the order of a checkpoint of version
        0.1.0 named processes, readers and batches instead.
    """
    if "processes" not in order:
        return dict(order)
    processes, batch = order["processes"], order["per_device_train_batch_size"]
    return {
        "rows": order["rows"],
        "global_batch": processes * batch * order["gradient_accumulation_steps"],
        "data_partitions": processes,
        "shuffle_window": order["shuffle_window"],
        "seed": order["seed"],
    }


def most_partitions(global_batch: int, processes: int, most: int = MOST_PARTITIONS) -> int:
    """The largest divisor of a global batch, up to `most`, that so many processes share equally; their number, if that
    is larger."""
    share = global_batch // processes
    return processes * max(divisor for divisor in range(1, max(most // processes, 1) + 1) if share % divisor == 0)


class EpochOrder:
    """Which rows each partition has in an epoch, in which windows and which order: a pure function of its arguments.

    Args:
        shard_rows: rows of each shard.
        layout: partitions, rows and windows.
        seed, epoch: of the order.

    Attributes:
        turns: of the epoch; each takes `layout.rows` of every partition.
        leftover_rows: rows of this epoch that no step sees; fewer than a step has.
    """

    def __init__(self, shard_rows: Sequence[int], layout: Layout, *, seed: int, epoch: int):
        self._key = (seed, epoch)
        rows = np.asarray(shard_rows, dtype=np.int64)
        self._firsts = np.cumsum(rows) - rows  # global number of the first row of each shard
        self.num_rows = int(rows.sum())
        self.layout = layout
        self.turns = self.num_rows // (layout.partitions * layout.rows)
        self.partition_rows = self.turns * layout.rows
        self.leftover_rows = self.num_rows - layout.partitions * self.partition_rows
        rng = np.random.default_rng([SHARD_ORDER, seed, epoch])
        self._order = rng.permutation(len(rows))
        self._starts = np.cumsum(rows[self._order]) - rows[self._order]  # where each shard begins in the sequence
        self._rows = rows
        self._offset = int(rng.integers(self.num_rows)) if self.num_rows else 0

    def segments(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, first row, row after the last) of the turned sequence's positions [start, stop)."""
        pieces = []
        for begin, end in self._unturned(start, stop):
            place = int(np.searchsorted(self._starts, begin, side="right")) - 1
            while begin < end:
                shard, first = int(self._order[place]), int(self._starts[place])
                upto = min(end, first + int(self._rows[shard]))
                if upto > begin:
                    pieces.append((shard, begin - first, upto - first))
                    begin = upto
                place += 1
        return pieces

    def _unturned(self, start: int, stop: int) -> list[tuple[int, int]]:
        begin, end = start + self._offset, stop + self._offset
        if begin >= self.num_rows:
            return [(begin - self.num_rows, end - self.num_rows)]
        if end > self.num_rows:
            return [(begin, self.num_rows), (0, end - self.num_rows)]
        return [(begin, end)]

    def num_windows(self, partition: int) -> int:
        """Windows of a partition."""
        rest = self.partition_rows - self._first_window(partition)
        return (self.partition_rows > 0) + max(-(-rest // self.layout.window), 0)

    def _first_window(self, partition: int) -> int:
        """Rows of the first window of a partition."""
        layout = self.layout
        if not layout.staggered:
            return layout.window
        return (partition * (layout.window // layout.rows) // layout.partitions + 1) * layout.rows

    def _window_range(self, partition: int, window: int) -> tuple[int, int]:
        """[begin, end) of a window, in rows of its partition."""
        end = self._first_window(partition) + window * self.layout.window
        return max(end - self.layout.window, 0), min(end, self.partition_rows)

    def window_segments(self, partition: int, window: int) -> list[tuple[int, int, int]]:
        """Segments, in reading order, of one window of one partition."""
        begin, end = self._window_range(partition, window)
        return self.segments(partition * self.partition_rows + begin, partition * self.partition_rows + end)

    def window_turns(self, partition: int, window: int) -> int:
        """Turns that the rows of a window are for; the first and the last one may be shorter."""
        begin, end = self._window_range(partition, window)
        return (end - begin) // self.layout.rows

    def window_order(self, partition: int, window: int) -> np.ndarray:
        """Permutation of the rows of one window, as places in their reading order."""
        begin, end = self._window_range(partition, window)
        key = [WINDOW_ORDER, *self._key, partition * self.partition_rows + begin]
        return np.random.default_rng(key).permutation(end - begin)

    def place(self, partition: int, turn: int) -> tuple[int, int]:
        """(window, turn within it) of the rows that a partition has for a turn of the epoch."""
        if self.layout.lanes > 1:
            return self._dealt[turn]
        row = turn * self.layout.rows
        window = max(row - self._first_window(partition), -1) // self.layout.window + 1
        return window, (row - self._window_range(partition, window)[0]) // self.layout.rows

    @cached_property
    def _dealt(self) -> list[tuple[int, int]]:
        """The places of all turns where lanes take turns, without those that are done; window w is of lane
        w % lanes."""
        lanes = self.layout.lanes
        queues = [
            [
                (window, index)
                for window in range(lane, self.num_windows(0), lanes)
                for index in range(self.window_turns(0, window))
            ]
            for lane in range(lanes)
        ]
        longest = max(map(len, queues))
        return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]

    def lanes(self) -> np.ndarray:
        """The lane of every turn, the same in each partition and epoch."""
        return np.array([window % self.layout.lanes for window, _ in self._dealt], dtype=np.int64)

    def rows_of(self, segments: Sequence[tuple[int, int, int]]) -> list[int]:
        """Global row numbers of segments."""
        return [int(self._firsts[shard]) + row for shard, start, stop in segments for row in range(start, stop)]

    def leftover(self) -> list[int]:
        """Global numbers of the rows that no turn sees in this epoch."""
        return self.rows_of(self.segments(self.layout.partitions * self.partition_rows, self.num_rows))
