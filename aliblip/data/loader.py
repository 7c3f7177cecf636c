"""Loaders that own their order and their position.

    loader = TrainLoader(source, collator, batch_size=32, seed=42, rank=rank(), world_size=world_size(), num_workers=2)
    for batch in loader.batches(start=2100, stop=5000):  # goes on where a run stopped after 2,100 batches
        ...

The order of an epoch (`aliblip.data.order`) is a function of the seed, the epoch, the row counts of the shards and the
layout of a step; the position in it is a count. Readers keep no state of the order: that count is all that has to be
saved. Each process reads the partitions of its rank, and each of its readers some of these: a batch is put together of
what the readers have for it. They go on from one epoch to the next, so that its first batches are ready when the last
one of the epoch before is taken. Memory: one window of undecoded rows per partition (paths only, for folders).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from aliblip.data.collate import Collator, NoUsableRow
from aliblip.data.order import EpochOrder, Layout, most_partitions
from aliblip.data.readers import PATIENCE, PATIENCE_REMOTE, Readers, ReadingHere, now_reading
from aliblip.data.remote import is_remote
from aliblip.data.rows import Row, Source
from aliblip.runtime.mistakes import UsageError

__all__ = ["EvalLoader", "TrainLoader"]

# Items that a reader makes before they are asked for: parts of batches, or whole units.
PARTS_AHEAD, UNITS_AHEAD = 4, 2
# Rows that are tried in place of an unusable one, after those of its window.
MOST_SPARES = 64


class TrainLoader:
    """Batches of one rank, epoch after epoch.

    Every rank takes equally many batches of `batch_size`, and no row comes twice in an epoch, on whatever rank. The
    rows of a step, `accumulation` batches of every rank, depend on the layout, the seed, the epoch and the shards, and
    on nothing else: not on the number of processes or readers.

    Args:
        source: where rows come from.
        collator: `collator(rows, epoch=..., fill=True, spares=...) -> batch`.
        batch_size: rows per batch on this rank.
        seed: of the order.
        rank, world_size: this process, and how many there are.
        num_workers: processes that read and decode; 0 reads in this one. More than a rank has partitions are not used.
        accumulation: batches of a step.
        window: rows permuted together, and held undecoded in memory, of all partitions of all ranks.
        partitions: parts of the epoch that are read side by side; None: as many as `most_partitions` says.
        layout: instead of the last two: that of the run that goes on.

    Raises:
        UsageError: a batch from every rank needs more rows than there are, or the partitions can't be shared out.
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
        accumulation: int = 1,
        window: int = 4096,
        partitions: int | None = None,
        layout: Layout | None = None,
    ):
        _check_numbers(
            batch_size=batch_size,
            window=window,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
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
        self.accumulation = accumulation
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self._shard_rows = [shard.num_rows for shard in source.shards]
        self.rows_per_step = batch_size * world_size * accumulation
        if layout is None:
            partitions = most_partitions(self.rows_per_step, world_size) if partitions is None else partitions
            _check_partitions(partitions, self.rows_per_step)
            layout = Layout.of(self.rows_per_step, partitions, window, source.num_rows)
        _check_shares(layout, world_size)
        if layout.rows_per_step != self.rows_per_step:
            raise ValueError(f"a layout of {layout.rows_per_step} rows a step for steps of {self.rows_per_step}")
        self.layout = layout
        self.partitions = range(layout.partitions // world_size * rank, layout.partitions // world_size * (rank + 1))
        self.num_workers = min(num_workers, len(self.partitions) * layout.lanes)
        self._idle_workers = num_workers - self.num_workers
        self._lanes = self.order(0).lanes() if layout.lanes > 1 else None  # the same in every epoch
        self.steps_per_epoch = source.num_rows // self.rows_per_step * accumulation

    def order(self, epoch: int) -> EpochOrder:
        """The order of an epoch, for all ranks."""
        return EpochOrder(self._shard_rows, self.layout, seed=self.seed, epoch=epoch)

    def epoch(self, epoch: int, start_step: int = 0) -> Generator[dict[str, Any], None, None]:
        """The batches of one epoch, from batch `start_step` on; see `batches`.

        Raises:
            ValueError: `start_step` lies outside the epoch.
        """
        steps = self.steps_per_epoch
        if epoch < 0 or not 0 <= start_step <= steps:
            raise ValueError(f"epoch {epoch}, step {start_step}: an epoch of this data has steps 0 to {steps}")
        return self.batches(epoch * steps + start_step, (epoch + 1) * steps)

    def batches(self, start: int, stop: int) -> Generator[dict[str, Any], None, None]:
        """Batches of this rank, counted from the beginning of the first epoch: `start` is the first one, `stop` the one
        after the last. The readers begin with the first, and end when this generator does or is closed; windows
        consumed whole before `start` are not read."""
        todo = range(start, stop)
        works = [_TrainReader(self, todo, reader) for reader in range(max(self.num_workers, 1))]
        pin = torch.cuda.is_available()
        with _Deliveries(works, self.num_workers, PARTS_AHEAD, self.source) as deliveries:
            for number in todo:
                owners = self.readers_of(number % self.steps_per_epoch)
                parts = []
                for reader in np.unique(owners).tolist():
                    of, part = deliveries.take(reader)
                    # Position is a count, so a part of another batch would make every later resume wrong.
                    if of != number:
                        raise RuntimeError(f"reader {reader} delivered a part of batch {of} where {number} was due")
                    parts.append((torch.from_numpy(np.flatnonzero(owners == reader)), part))
                yield _put_together(parts, self._padding, pin)

    @property
    def _padding(self) -> int:
        """Of titles, as the tokenizer does it."""
        tokenizer = getattr(getattr(self.collator, "processor", None), "tokenizer", None)
        return getattr(tokenizer, "pad_token_id", None) or 0

    def slots(self, step: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Where the rows of a batch of this rank lie, the batch counted from the beginning of its epoch: partition,
        turn of the epoch and place in the turn, of each."""
        layout, own = self.layout, len(self.partitions)
        number, batch = divmod(step, self.accumulation)
        turn, rest = np.divmod(np.arange(self.batch_size) + batch * self.batch_size, own * layout.rows)
        row, partition = np.divmod(rest, own)
        return self.partitions.start + partition, number * layout.turns + turn, row

    def readers_of(self, step: int) -> np.ndarray:
        """Which reader has each row of a batch of an epoch: one for each partition, or lane of a partition."""
        partition, turn, _ = self.slots(step)
        stream = (partition - self.partitions.start) * self.layout.lanes
        if self._lanes is not None:
            stream = stream + self._lanes[turn]
        return stream % max(self.num_workers, 1)

    def describe(self) -> str:
        """One line on rows, shards, steps, rows left over, how good the mixing is, and the memory it takes."""
        rows, layout = self.source.num_rows, self.layout
        steps = self.steps_per_epoch // self.accumulation
        left = rows - steps * self.rows_per_step
        window = layout.window * layout.lanes
        share = min(window * layout.partitions / rows, 1.0)
        held = window * len(self.partitions)
        size = sum(file.size for file in self.source.files) / rows * held
        several = f" x {self.accumulation}" if self.accumulation > 1 else ""
        idle = (
            f"; {self._idle_workers} of {self.num_workers + self._idle_workers} readers are not used: a process has "
            f"{len(self.partitions)} partitions, more --data_partitions let more read"
            if self._idle_workers
            else ""
        )
        windows = f"windows of {window:,} row{'s' if window > 1 else ''} ({share:.1%} of the epoch)"
        return (
            f"{self.source.name} ({self.source.split}): {rows:,} rows in {len(self.source.shards):,} shards, "
            f"{steps:,} steps of {self.batch_size} x {self.world_size}{several} per epoch, {left:,} rows left "
            f"over ({left / rows:.3%}, different ones each epoch), mixed in {layout.partitions:,} partitions with "
            f"{windows}: at most {held:,} rows undecoded in the memory of a process"
            + (f", about {size / 1e6:,.1f} MB" if size else "")
            + idle
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
        workers = min(self.num_workers, len(units))
        works = [_EvalReader(self, units[reader :: max(workers, 1)]) for reader in range(max(workers, 1))]
        pin = torch.cuda.is_available()
        with _Deliveries(works, workers, UNITS_AHEAD, self.source) as deliveries:
            for place in range(len(units)):
                unit, batch = deliveries.take(place % len(works))
                yield unit, _pinned(batch) if pin else batch

    def read_unit(self, unit: int) -> dict[str, Any]:
        """The batch of any unit, read in this process."""
        if not 0 <= unit < self.num_units:
            raise IndexError(f"unit {unit}: there are {self.num_units}")
        start = unit * self.unit_size
        now_reading(f"{self.source.name}, rows from {start:,} on")
        rows = list(self.source.read_range(start, min(start + self.unit_size, self.source.num_rows)))
        return self.collator(rows, epoch=0, fill=False)


# --------------------------------------------------------------------------------------------------------- inside


class _TrainReader:
    """(batch, part of it) for those batches of a rank of which one reader has rows, numbered as in `batches`."""

    def __init__(self, loader: TrainLoader, todo: range, reader: int):
        self.loader, self.todo, self.reader = loader, todo, reader

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        begin, per_epoch = self.todo.start, self.loader.steps_per_epoch
        while begin < self.todo.stop:
            epoch = begin // per_epoch
            end = min((epoch + 1) * per_epoch, self.todo.stop)
            first = epoch * per_epoch
            for step, part in self._parts(epoch, range(begin - first, end - first)):
                yield first + step, part
            begin = end

    def _parts(self, epoch: int, steps: range) -> Iterator[tuple[int, dict[str, Any]]]:
        """Of one epoch. No window outlives it: those of two epochs are never in memory together."""
        order = self.loader.order(epoch)
        windows: dict[tuple[int, int], tuple[int, list[Row]]] = {}  # the open one of each partition and lane
        for step in steps:
            own = np.flatnonzero(self.loader.readers_of(step) == self.reader)
            if len(own):
                part = self._part(order, windows, epoch, step, own)
                if step == steps[-1]:
                    windows.clear()
                yield step, part

    def _part(self, order: EpochOrder, windows: dict, epoch: int, step: int, own: np.ndarray) -> dict[str, Any]:
        """What this reader has of a batch: the rows in the slots `own`."""
        lanes = self.loader.layout.lanes
        chosen: list[Row] = []
        places: list[tuple[list[Row], int]] = []  # the window of each, and where its turn begins
        for partition, turn, row in zip(*(values[own].tolist() for values in self.loader.slots(step)), strict=True):
            window, index = order.place(partition, turn)
            stream = partition, window % lanes
            if stream not in windows or windows[stream][0] != window:
                windows.pop(stream, None)  # freed before the next one is read: one window in memory, not two
                windows[stream] = window, self._read(order, partition, window)
            rows, begin = windows[stream][1], index * self.loader.layout.rows
            chosen.append(rows[begin + row])
            places.append((rows, begin + row))
        return self._collate(epoch, chosen, places)

    def _collate(self, epoch: int, chosen: list[Row], places: list[tuple[list[Row], int]]) -> dict[str, Any]:
        size = self.loader.layout.rows

        def spares(slot: int) -> Iterable[Row]:
            """The following rows of its turn, round its end, then those of its window, and those that follow it in the
            data: the same for any number of processes and readers, and after a resume."""
            rows, place = places[slot]
            begin = place // size * size
            yield from (rows[begin + (place - begin + i) % size] for i in range(1, size))
            yield from (rows[(begin + i) % len(rows)] for i in range(size, len(rows)))
            source, number = self.loader.source, chosen[slot].row + 1
            yield from source.read_range(number, min(number + MOST_SPARES, source.num_rows))
            yield from source.read_range(0, max(number + MOST_SPARES - source.num_rows, 0))

        try:
            return self.loader.collator(chosen, epoch=epoch, fill=True, spares=spares)
        except NoUsableRow as error:
            name = self.loader.source.name
            raise NoUsableRow(
                f"a row of {name} can't be used, nor can any of the {len(places[0][0])} of its window or the "
                f"{MOST_SPARES} that follow it: {error}"
            ) from None

    def _read(self, order: EpochOrder, partition: int, window: int) -> list[Row]:
        source = self.loader.source
        rows: list[Row] = []
        for shard, start, stop in order.window_segments(partition, window):
            name = source.shards[shard].name
            now_reading(name)
            before = len(rows)
            rows.extend(source.read(shard, start, stop))
            if len(rows) - before != stop - start:
                raise RuntimeError(
                    f"{name} gave {len(rows) - before} rows of {stop - start}: did it change during the run?"
                )
        return [rows[place] for place in order.window_order(partition, window)]


class _EvalReader:
    """(unit, batch) of some units."""

    def __init__(self, loader: EvalLoader, units: Sequence[int]):
        self.loader, self.units = loader, units

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for unit in self.units:
            yield unit, self.loader.read_unit(unit)


class _Deliveries:
    """What several works give, from processes of their own or, without any, from this one. A context manager."""

    def __init__(self, works: Sequence[Iterable[Any]], workers: int, ahead: int, source: Source):
        patience = PATIENCE_REMOTE if any(is_remote(file.file) for file in source.files) else PATIENCE
        here = ReadingHere([iter(work) for work in works], patience)
        self._readers = Readers(works, ahead, patience) if workers else here

    def __enter__(self) -> _Deliveries:
        self._readers.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._readers.__exit__(*error)

    def take(self, number: int) -> Any:
        """The next item of a work."""
        return self._readers.take(number)


def _put_together(parts: Sequence[tuple[torch.Tensor, dict[str, Any]]], padding: int, pin: bool) -> dict[str, Any]:
    """A batch of its parts.

    Args:
        parts: (which rows of the batch, those rows) of each.
        padding: token that fills titles up to the longest of all parts.
        pin: whether its tensors are to lie in pinned memory.
    """
    if len(parts) == 1:
        return _pinned(parts[0][1]) if pin else parts[0][1]
    rows = sum(len(slots) for slots, _ in parts)
    batch: dict[str, Any] = {}
    for key, first in parts[0][1].items():
        if not isinstance(first, torch.Tensor):
            batch[key] = sorted((entry for _, part in parts for entry in part[key]), key=lambda entry: entry["row"])
            continue
        longest = max(part[key].shape[-1] for _, part in parts) if first.dim() > 1 else 0
        shape = (rows, *first.shape[1:-1], longest) if first.dim() > 1 else (rows,)
        batch[key] = torch.empty(shape, dtype=first.dtype, pin_memory=pin)
        for slots, part in parts:
            value = part[key]
            if value.dim() == 2:
                value = F.pad(value, (0, longest - value.shape[1]), value=padding if key == "input_ids" else 0)
            batch[key][slots] = value
    return batch


def _pinned(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def _check_partitions(partitions: int, rows_per_step: int) -> None:
    if partitions < 1 or rows_per_step % partitions:
        divisors = [number for number in range(1, rows_per_step + 1) if rows_per_step % number == 0]
        raise UsageError(
            f"--data_partitions is {partitions}: each step of {rows_per_step} rows takes equally many from each, so "
            f"give a divisor of that: {', '.join(map(str, divisors))}"
        )


def _check_shares(layout: Layout, processes: int) -> None:
    if layout.partitions % processes:
        shared = [number for number in range(1, layout.partitions + 1) if layout.partitions % number == 0]
        raise UsageError(
            f"{processes} processes can't share {layout.partitions} partitions of the data equally: start "
            f"{', '.join(map(str, shared))} processes, or a new run with another --data_partitions"
        )


def _check_numbers(*, rank: int, world_size: int, num_workers: int, **at_least_one: int) -> None:
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} of world_size {world_size}: it must be 0 to world_size - 1")
    if num_workers < 0:
        raise ValueError(f"num_workers is {num_workers}: it must be 0 or more")
