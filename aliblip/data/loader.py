"""Loaders that own their order and their position.

    loader = TrainLoader(source, collator, batch_size=32, seed=42, rank=rank(), world_size=world_size(), num_workers=2)
    for batch in loader.epoch(epoch=3, start_step=100):  # goes on where an epoch stopped after 100 steps
        ...

The order of an epoch is a function of the seed, the epoch and the row counts of the shards; the position in it is a
count of steps. Readers keep no state of the order: that count is all that has to be saved.

The order of an epoch (`EpochOrder`): all shards in a seeded permutation are one sequence of rows; it is turned by a
seeded offset, so that the few rows left over differ from epoch to epoch; and it is cut into one range per rank, all of
`steps * batch_size` rows. So every rank has equally many steps whatever the sizes of the shards. A range consists of
windows; the undecoded rows of a window are read, permuted and cut into batches. Window w of a rank is read by worker w
modulo the number of workers. Memory: one window of undecoded rows per worker (paths only, for folders).
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from aliblip.data.collate import Collator, NoUsableRow
from aliblip.data.remote import RemoteReadError
from aliblip.data.rows import Row, Source
from aliblip.runtime.interrupts import let_the_trainer_decide
from aliblip.runtime.mistakes import UsageError

__all__ = ["EpochOrder", "EvalLoader", "TrainLoader"]

# Numbers of the seeded streams, so that no two draws share one.
SHARD_ORDER, WINDOW_ORDER = 0, 1


class EpochOrder:
    """Which rows each rank reads in an epoch, in which windows, and in which order: a pure function of its arguments.

    Args:
        shard_rows: rows of each shard.
        seed, epoch: of the order.
        world_size, batch_size: ranks, and rows of a batch on one rank.
        window: rows that are permuted together; rounded down to whole batches, at least one.

    Attributes:
        steps: batches per rank.
        num_windows: windows per rank.
        leftover_rows: rows of this epoch that no rank sees; fewer than `world_size * batch_size`.
    """

    def __init__(
        self, shard_rows: Sequence[int], *, seed: int, epoch: int, world_size: int, batch_size: int, window: int
    ):
        self._key = (seed, epoch)
        rows = np.asarray(shard_rows, dtype=np.int64)
        self._firsts = np.cumsum(rows) - rows  # global number of the first row of each shard
        self.num_rows = int(rows.sum())
        self.batch_size = batch_size
        self.world_size = world_size
        self.steps = self.num_rows // (world_size * batch_size)
        self.rank_rows = self.steps * batch_size
        self.leftover_rows = self.num_rows - world_size * self.rank_rows
        self.window = max(batch_size, window // batch_size * batch_size)
        self.num_windows = -(-self.rank_rows // self.window)
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

    def window_segments(self, rank: int, index: int) -> list[tuple[int, int, int]]:
        """Segments, in reading order, of one window of one rank."""
        return self.segments(*self._window_range(rank, index))

    def window_batches(self, index: int) -> int:
        """Batches of a window; the last one may be shorter."""
        return (min((index + 1) * self.window, self.rank_rows) - index * self.window) // self.batch_size

    def window_order(self, rank: int, index: int) -> np.ndarray:
        """Permutation of the rows of one window, as places in their reading order."""
        start, stop = self._window_range(rank, index)
        return np.random.default_rng([WINDOW_ORDER, *self._key, start]).permutation(stop - start)

    def _window_range(self, rank: int, index: int) -> tuple[int, int]:
        first = rank * self.rank_rows
        return first + index * self.window, first + min((index + 1) * self.window, self.rank_rows)

    def rows_of(self, segments: Sequence[tuple[int, int, int]]) -> list[int]:
        """Global row numbers of segments."""
        return [int(self._firsts[shard]) + row for shard, start, stop in segments for row in range(start, stop)]

    def leftover(self) -> list[int]:
        """Global numbers of the rows that no rank sees in this epoch."""
        return self.rows_of(self.segments(self.world_size * self.rank_rows, self.num_rows))


class TrainLoader:
    """Batches of one rank, epoch by epoch.

    Every rank takes `steps_per_epoch` batches of `batch_size`, and no row comes twice in an epoch, on whatever rank. A
    batch lies within one window; with more than one worker a window is at most a worker's share of the epoch, so that a
    small data set keeps all workers busy too. So the order depends on `batch_size`, `world_size`, `num_workers`,
    `window`, the seed, the epoch and the shards, and on nothing else.

    Args:
        source: where rows come from.
        collator: `collator(rows, epoch=..., fill=True, spares=...) -> batch`.
        batch_size: rows per batch on this rank.
        seed: of the order.
        rank, world_size: this process, and how many there are.
        num_workers: processes that read and decode; 0 reads in this one.
        window: rows permuted together, and held undecoded in memory by each worker.

    Raises:
        UsageError: a batch from every rank needs more rows than there are.
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        source: Source,
        collator: Collator | Callable[..., dict[str, Any]],
        *,
        batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        num_workers: int = 0,
        window: int = 4096,
    ):
        _check_numbers(batch_size=batch_size, window=window, rank=rank, world_size=world_size, num_workers=num_workers)
        if seed < 0:
            raise ValueError(f"seed is {seed}: it must be 0 or more")
        if source.num_rows < batch_size * world_size:
            raise UsageError(
                f"{source.name} has {source.num_rows} rows in split '{source.split}', fewer than one batch of "
                f"{batch_size} on each of {world_size} process{'es' if world_size > 1 else ''}: use "
                f"--per_device_train_batch_size {max(source.num_rows // world_size, 1)} or less, or more data"
            )
        self.source = source
        self.collator = collator
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self._shard_rows = [shard.num_rows for shard in source.shards]
        steps = source.num_rows // (world_size * batch_size)
        self.window = min(window, -(-steps // max(num_workers, 1)) * batch_size)
        self.window = max(self.window // batch_size, 1) * batch_size
        self.steps_per_epoch = steps

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch, for all ranks."""
        return EpochOrder(
            self._shard_rows,
            seed=self.seed,
            epoch=epoch,
            world_size=self.world_size,
            batch_size=self.batch_size,
            window=self.window,
        )

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[dict[str, Any]]:
        """Batches of this rank from step `start_step` to the end; windows consumed whole are not read again.

        Raises:
            ValueError: `start_step` lies outside the epoch.
        """
        if epoch < 0 or not 0 <= start_step <= self.steps_per_epoch:
            raise ValueError(
                f"epoch {epoch}, step {start_step}: an epoch of this data has steps 0 to {self.steps_per_epoch}"
            )
        return self._batches(epoch, start_step)

    def _batches(self, epoch: int, start_step: int) -> Iterator[dict[str, Any]]:
        order = self.order(epoch)
        schedule = _schedule(
            [order.window_batches(index) for index in range(order.num_windows)], max(self.num_workers, 1)
        )
        shares = _shares(schedule[start_step:], max(self.num_workers, 1))
        dataset = _TrainReader(self.source, self.collator, order, self.rank, epoch, shares)
        expected = iter(schedule[start_step:])
        with closing(_deliver(dataset, self.num_workers)) as delivered:
            for place, batch in delivered:
                # Position is a count, so a batch out of order would make every later resume wrong.
                # Pinning memory turns tuples into lists in some versions of torch.
                if (place := tuple(place)) != (due := next(expected, None)):
                    raise RuntimeError(f"the workers delivered batch {place} where {due} was due")
                yield batch

    def describe(self) -> str:
        """One line on rows, shards, steps, rows left over, how good the mixing is, and the memory it takes."""
        rows = self.source.num_rows
        left = rows - self.steps_per_epoch * self.batch_size * self.world_size
        share = min(self.window * self.world_size / rows, 1.0)
        size = sum(file.size for file in self.source.files) / rows * self.window
        return (
            f"{self.source.name} ({self.source.split}): {rows:,} rows in {len(self.source.shards):,} shards, "
            f"{self.steps_per_epoch:,} steps of {self.batch_size} x {self.world_size} per epoch, {left:,} rows left "
            f"over ({left / rows:.3%}, different ones each epoch), mixed in windows of {self.window:,} rows per "
            f"process ({share:.1%} of the epoch): at most {self.window:,} rows undecoded in memory per worker"
            + (f", about {size / 1e6:,.1f} MB" if size else "")
        )


class EvalLoader:
    """Units of rows in order: unit u is rows [u * unit_size, (u + 1) * unit_size), done whole by rank u % world_size.

    What a unit holds does not depend on the number of processes or workers. Unusable rows are left out of its batch
    and stand in `batch["skipped"]`; a unit without any usable row gives a batch of 0 rows.

    Iterating gives (unit, batch) of this rank's units in rising order.

    Args:
        source, collator, rank, world_size, num_workers: as for `TrainLoader`.
        unit_size: rows per unit; the last may be shorter.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        source: Source,
        collator: Collator | Callable[..., dict[str, Any]],
        *,
        unit_size: int,
        rank: int,
        world_size: int,
        num_workers: int = 0,
    ):
        _check_numbers(unit_size=unit_size, rank=rank, world_size=world_size, num_workers=num_workers)
        self.source = source
        self.collator = collator
        self.unit_size = unit_size
        self.rank = rank
        self.world_size = world_size
        self.num_workers = num_workers
        self.num_units = -(-source.num_rows // unit_size)

    def __len__(self) -> int:
        """Units of this rank."""
        return len(range(self.rank, self.num_units, self.world_size))

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        return self.units(range(self.rank, self.num_units, self.world_size))

    def units(self, units: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """(unit, batch) of chosen units, in their order, whatever rank they belong to."""
        with closing(_deliver(_EvalReader(self, units), min(self.num_workers, len(units)))) as delivered:
            yield from delivered

    def read_unit(self, unit: int) -> dict[str, Any]:
        """The batch of any unit, read in this process."""
        if not 0 <= unit < self.num_units:
            raise IndexError(f"unit {unit}: there are {self.num_units}")
        start = unit * self.unit_size
        rows = list(self.source.read_range(start, min(start + self.unit_size, self.source.num_rows)))
        return self.collator(rows, epoch=0, fill=False)


# --------------------------------------------------------------------------------------------------------- inside


class _Reader(IterableDataset):
    """What one worker delivers."""

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.items()
        except (UsageError, RemoteReadError) as error:
            # As an item: torch would write a traceback into the message of an error that crosses processes.
            yield error

    def items(self) -> Iterator[Any]:
        raise NotImplementedError


class _TrainReader(_Reader):
    """((window, batch in the window), batch) of the share of one worker."""

    def __init__(self, source, collator, order: EpochOrder, rank: int, epoch: int, shares: list[list[tuple[int, int]]]):
        self.source, self.collator, self.order = source, collator, order
        self.rank, self.epoch, self.shares = rank, epoch, shares

    def items(self) -> Iterator[Any]:
        worker = get_worker_info()
        current, rows = None, []
        for window, index in self.shares[worker.id if worker else 0]:
            if window != current:
                rows = []  # freed before the next window is read: one window in memory, not two
                current, rows = window, self._read(window)
            size = self.order.batch_size
            chosen = rows[index * size : (index + 1) * size]
            # The spares are the rest of the window, which is read whole after a resume too: the same for every start.
            spares = (rows[(index * size + i) % len(rows)] for i in range(size, len(rows)))
            try:
                batch = self.collator(chosen, epoch=self.epoch, fill=True, spares=spares)
            except NoUsableRow as error:
                raise NoUsableRow(
                    f"a window of {len(rows)} rows of {self.source.name} has no usable row: {error}"
                ) from None
            yield (window, index), batch

    def _read(self, window: int) -> list[Row]:
        rows: list[Row] = []
        for shard, start, stop in self.order.window_segments(self.rank, window):
            before = len(rows)
            rows.extend(self.source.read(shard, start, stop))
            if len(rows) - before != stop - start:
                name = self.source.shards[shard].name
                raise RuntimeError(
                    f"{name} gave {len(rows) - before} rows of {stop - start}: did it change during the run?"
                )
        return [rows[place] for place in self.order.window_order(self.rank, window)]


class _EvalReader(_Reader):
    """(unit, batch) of the units whose turn is this worker's."""

    def __init__(self, loader: EvalLoader, units: Sequence[int]):
        self.loader, self.units = loader, units

    def items(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for unit in self.units[first::stride]:
            yield unit, self.loader.read_unit(unit)


def _schedule(window_batches: Sequence[int], workers: int) -> list[tuple[int, int]]:
    """(window, batch in it) in the order of delivery: workers take turns, without those that are done.

    Window w belongs to worker w % workers. This is the order in which torch's DataLoader hands out the batches of an
    iterable dataset.
    """
    queues = [
        [
            (window, index)
            for window in range(worker, len(window_batches), workers)
            for index in range(window_batches[window])
        ]
        for worker in range(workers)
    ]
    longest = max((len(queue) for queue in queues), default=0)
    return [queue[turn] for turn in range(longest) for queue in queues if turn < len(queue)]


def _shares(schedule: Sequence[tuple[int, int]], workers: int) -> list[list[tuple[int, int]]]:
    """The places each worker of a fresh DataLoader has to deliver so that together they give exactly `schedule`.

    After a resume in the middle of a turn the worker whose turn it is comes first.
    """
    shares: list[list[tuple[int, int]]] = [[] for _ in range(workers)]
    first = schedule[0][0] % workers if schedule else 0
    for window, index in schedule:
        shares[(window - first) % workers].append((window, index))
    return shares


def _deliver(dataset: IterableDataset, num_workers: int) -> Iterator[Any]:
    # Never handed to accelerate: the rows are divided among the ranks already, and dividing them twice would
    # lose some without a word.
    loader = DataLoader(
        dataset,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        worker_init_fn=_start_worker if num_workers else None,
        pin_memory=torch.cuda.is_available(),
        # Else DataLoader draws its base seed from the global generator, and reading data would move dropout.
        generator=torch.Generator().manual_seed(0),
    )
    iterator = iter(loader)
    try:
        for item in iterator:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        # Ended here, not when it is collected: a traceback can keep the iterator alive, and the workers of the next
        # epoch would inherit it and wait for processes that are not their children. torch has no public call for it.
        if (shut_down := getattr(iterator, "_shutdown_workers", None)) is not None:
            shut_down()
            _end_readers(iterator._workers)


def _end_readers(readers: Iterable[multiprocessing.Process] | None = None) -> None:
    """Kill the given readers, or all that there are, where they still run: they ignore SIGTERM."""
    for reader in multiprocessing.active_children() if readers is None else readers:
        if reader.is_alive():
            reader.kill()


# An error can leave readers behind. Python asks them with SIGTERM to end, and would wait for them for ever.
atexit.register(_end_readers)


def _as_it_is(item):
    return item  # the default would turn our tuples into lists


def _start_worker(worker_id: int) -> None:
    torch.set_num_threads(1)  # the cores belong to the workers and the model, not to each worker's own pool
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a pool that was used before the fork does not live in the child
    let_the_trainer_decide()


def _check_numbers(*, rank: int, world_size: int, num_workers: int, **at_least_one: int) -> None:
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of world_size {world_size}: it must be 0 to world_size - 1")
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}: it must be 0 or more")
