"""Loaders: the order, the position, equal steps for every rank, and holes that shift nothing."""

import gc
import json
import multiprocessing
import os
import random
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch
from data_stub import (
    MemorySource,
    StubProcessor,
    records,
    write_image_folder,
    write_json_list,
    write_parquet,
    write_tars,
)
from PIL import Image
from real_products import PRODUCTS, needs_products
from transformers import BlipImageProcessorPil

from aliblip.data.augment import TrainAugmentation
from aliblip.data.collate import Collator, Normalisation, NoUsableRow, as_bytes, sample_rng
from aliblip.data.loader import EvalLoader, TrainLoader
from aliblip.data.manifest import DataFile
from aliblip.data.order import EpochOrder, Layout, default_window, most_partitions
from aliblip.data.rows import Row, decode
from aliblip.data.sources import open_source
from aliblip.runtime.mistakes import UsageError

UNEVEN = [3, 17, 1, 40, 0, 8, 25, 6]  # 100 rows


def loader_of(
    source, *, rank=0, world=1, batch=4, workers=0, window=16, seed=5, augment=None, accumulation=1, partitions=None
):
    collator = Collator(StubProcessor(), augment, seed=seed)
    return TrainLoader(
        source,
        collator,
        batch_size=batch,
        seed=seed,
        rank=rank,
        world_size=world,
        num_workers=workers,
        window=window,
        accumulation=accumulation,
        partitions=partitions,
    )


def rows_of(batches):
    return [batch["row"].tolist() for batch in batches]


# ----------------------------------------------------------------------------------------------------------- the order


def order_slowly(sizes, seed, epoch, partitions, rows, window, staggered):
    """All partitions' windows as lists of global rows, with lists instead of offsets; and the rows left over."""
    rng = np.random.default_rng([0, seed, epoch])
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    sequence = [firsts[s] + r for s in rng.permutation(len(sizes)) for r in range(sizes[s])]
    offset = int(rng.integers(len(sequence)))
    sequence = sequence[offset:] + sequence[:offset]
    turns = len(sequence) // (partitions * rows)
    found = []
    for partition in range(partitions):
        start = partition * turns * rows
        mine = sequence[start : start + turns * rows]
        first = (partition * (window // rows) // partitions + 1) * rows if staggered else window
        begins = [0, *range(first, len(mine), window)]
        windows = []
        for begin, end in zip(begins, [*begins[1:], len(mine)], strict=True):
            order = np.random.default_rng([1, seed, epoch, start + begin]).permutation(end - begin)
            windows.append([mine[begin:end][i] for i in order])
        found.append(windows)
    return found, sequence[partitions * turns * rows :]


@pytest.mark.parametrize("partitions", [1, 2, 3, 7])
@pytest.mark.parametrize("rows", [1, 4, 13])
@pytest.mark.parametrize("window", [1, 4, 25])
def test_the_order_equals_its_slow_version(partitions, rows, window):
    for sizes in (UNEVEN, [100], [1] * 100):
        for epoch, staggered in ((0, False), (1, True)):
            layout = Layout(partitions, rows, window * rows, staggered=staggered)
            order = EpochOrder(sizes, layout, seed=9, epoch=epoch)
            expected, leftover = order_slowly(sizes, 9, epoch, partitions, rows, window * rows, staggered)
            for partition, windows in enumerate(expected):
                assert order.num_windows(partition) == len(windows)
                places = [order.place(partition, turn) for turn in range(order.turns)]
                assert places == [(w, i) for w, found in enumerate(windows) for i in range(len(found) // rows)]
                for window_number, window_rows in enumerate(windows):
                    read = order.rows_of(order.window_segments(partition, window_number))
                    assert [read[i] for i in order.window_order(partition, window_number)] == window_rows
                    assert order.window_turns(partition, window_number) * rows == len(window_rows)
            assert order.leftover() == leftover and order.leftover_rows == len(leftover) < partitions * rows
            every = [row for windows in expected for found in windows for row in found] + leftover
            assert sorted(every) == list(range(100))


def test_the_rows_left_over_rotate():
    seen = set()
    for epoch in range(60):
        order = EpochOrder(UNEVEN, Layout.of(32, 8, 64, 100), seed=1, epoch=epoch)
        assert len(order.leftover()) == 4
        seen.update(order.leftover())
    assert len(seen) > 60


def test_an_order_of_millions_of_rows():
    """4,000,000 rows in 1,024 shards for 64 ranks: what one rank holds, and what all of them read."""
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(4_000_000, rng.dirichlet(np.full(1024, 5.0)))
    assert sizes.max() > 2 * sizes.min()
    source = MemorySource(sizes.tolist())
    source.files = [DataFile(f"{index}.tar", int(rows), 50_000 * int(rows), "") for index, rows in enumerate(sizes)]
    tracemalloc.start()
    loader = loader_of(source, rank=63, world=64, batch=16, workers=8, window=64 * 4096)
    order = loader.order(2)
    (own,) = loader.partitions
    segments = [order.window_segments(own, index) for index in range(order.num_windows(own))]
    places = [order.place(own, turn) for turn in range(order.turns)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # bytes; an array of the numbers of all rows would take 32 million
    assert len(places) == loader.steps_per_epoch == order.turns == 3906 and segments and loader.num_workers == 1

    taken = np.zeros(4_000_000, dtype=np.uint8)
    for partition in range(64):
        read = 0
        for index in range(order.num_windows(partition)):
            for shard, start, stop in order.window_segments(partition, index):
                first = source.shards[shard].first_row
                assert 0 <= start < stop <= sizes[shard]
                taken[first + start : first + stop] += 1
                read += stop - start
        assert read == order.turns * 16  # equally many steps on each rank
        for index in (0, order.num_windows(partition) - 1):
            rows = order.window_turns(partition, index) * 16
            assert np.array_equal(np.sort(order.window_order(partition, index)), np.arange(rows))
    left = 4_000_000 - int(taken.sum())
    assert taken.max() == 1 and left == order.leftover_rows == 256
    line = loader.describe()
    assert "256 rows left over (0.006%, different ones each epoch)" in line
    assert "at most 4,096 rows undecoded in the memory of a process, about 204.8 MB" in line


# ---------------------------------------------------------------------------------------------------------- train order


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize(
    ("world", "batch", "accumulation"), [(1, 12, 1), (2, 6, 1), (3, 4, 1), (6, 1, 2), (1, 3, 4), (2, 2, 3)]
)
def test_a_step_has_the_same_rows_for_any_number_of_processes_and_readers(world, batch, accumulation, workers):
    bad = {4, 5, 30, 31, 32, 33, 77}
    layout = Layout(6, 2, 16, staggered=True)
    windows, leftover = order_slowly(UNEVEN, 5, 1, 6, 2, 16, True)
    pieces = [[row for found in of_partition for row in found] for of_partition in windows]
    expected = [sorted(row for rows in pieces for row in rows[2 * step : 2 * step + 2]) for step in range(8)]
    filled, asked = [[] for _ in range(8)], [[] for _ in range(8)]  # by step, of all ranks
    for rank in range(world):
        batches = list(loader_of_layout(layout, bad, rank, world, batch, accumulation, workers).epoch(1))
        assert len(batches) == 8 * accumulation
        for number, found in enumerate(batches):
            rows = found["row"].tolist()
            assert len(rows) == batch and found["pixel_values"].shape == (batch, 3, 8, 8)
            filled[number // accumulation] += rows
            asked[number // accumulation] += [entry["row"] for entry in found["skipped"]]
    for step in range(8):
        assert set(expected[step]) - bad <= set(filled[step]) and len(filled[step]) == 12
        assert sorted(asked[step]) == [row for row in expected[step] if row in bad]
    assert sorted(row for rows in expected for row in rows) == sorted(set(range(100)) - set(leftover))
    # What fills the holes is the same, too.
    alone = loader_of_layout(layout, bad, 0, 1, 12, 1, 0).epoch(1)
    assert [sorted(rows) for rows in filled] == [sorted(found["row"].tolist()) for found in alone]


def loader_of_layout(layout, bad, rank, world, batch, accumulation, workers):
    collator = Collator(StubProcessor(), TrainAugmentation(8), seed=5)
    options = {"batch_size": batch, "accumulation": accumulation, "seed": 5, "layout": layout}
    source = MemorySource(UNEVEN, bad)
    return TrainLoader(source, collator, **options, rank=rank, world_size=world, num_workers=workers)


@pytest.mark.parametrize("readers_now", [0, 1, 3])
@pytest.mark.parametrize("readers_before", [0, 2, 3])
@pytest.mark.parametrize(("world", "batch", "window"), [(1, 4, 16), (2, 4, 16), (4, 5, 1000), (2, 25, 10)])
def test_a_run_of_version_0_1_0_goes_on_in_its_order(world, batch, window, readers_before, readers_now):
    order = {"processes": world, "per_device_train_batch_size": batch, "dataloader_num_workers": readers_before}
    layout = Layout.of_version_0_1_0(order | {"shuffle_window": window, "gradient_accumulation_steps": 1}, 100)
    steps = 100 // (world * batch)
    lanes = max(readers_before, 1)
    window = max(min(window, -(-steps // lanes) * batch) // batch, 1) * batch
    for rank in range(world):
        windows = order_slowly(UNEVEN, 5, 1, world, batch, window, False)[0][rank]
        cut = [[w[i : i + batch] for i in range(0, len(w), batch)] for w in windows]
        queues = [[b for w in cut[k::lanes] for b in w] for k in range(lanes)]
        expected = []  # its readers took turns
        while any(queues):
            expected += [queue.pop(0) for queue in queues if queue]
        loader = loader_of_layout(layout, (), rank, world, batch, 1, readers_now)
        assert rows_of(loader.epoch(1)) == expected
        assert rows_of(loader.epoch(1, start_step=1)) == expected[1:]


def test_the_numbers_of_a_layout():
    for global_batch, processes, partitions in (
        *((16, 1, 16), (128, 8, 64), (512, 4, 64), (2880, 12, 60), (66, 6, 6), (96, 48, 48), (200, 100, 100)),
        *((7, 1, 7), (134, 2, 2)),
    ):
        assert most_partitions(global_batch, processes) == partitions
    assert default_window(16) == 4096 and default_window(512) == 8192
    assert Layout.of(512, 64, 8192, 10**6) == Layout(64, 8, 128)
    assert not Layout.of(512, 64, 8192, 8192).staggered


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_every_start_step_is_the_tail_of_the_epoch(workers):
    source = MemorySource(UNEVEN)
    loader = loader_of(source, rank=1, world=2, workers=workers, window=12, augment=TrainAugmentation(8))
    whole = list(loader.epoch(2))
    starts = range(len(whole) + 1) if not workers else (0, 1, 2, 5, 6, 7, 11, 12)
    for start in starts:
        tail = list(loader.epoch(2, start_step=start))
        assert len(tail) == len(whole) - start
        for a, b in zip(tail, whole[start:], strict=True):
            assert a.keys() == b.keys() and a["skipped"] == b["skipped"]
            assert all(torch.equal(a[key], b[key]) for key in a if key != "skipped")
    with pytest.raises(ValueError, match="steps 0 to 12"):
        loader.epoch(2, start_step=13)


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_batches_are_those_of_the_epochs_one_after_the_other(workers, accumulation):
    options = {"augment": TrainAugmentation(8), "window": 12, "accumulation": accumulation}
    bad = {4, 5, 30, 77}
    alone = loader_of(MemorySource(UNEVEN, bad), rank=1, world=2, **options)
    loader = loader_of(MemorySource(UNEVEN, bad), rank=1, world=2, workers=workers, **options)
    steps = loader.steps_per_epoch
    expected = [batch for epoch in range(3) for batch in alone.epoch(epoch)]
    assert len(expected) == 3 * steps
    for start, stop in ((0, 3 * steps), (steps - 1, 2 * steps + 1), (steps, 2 * steps), (5, 5)):
        found = list(loader.batches(start, stop))
        assert len(found) == stop - start
        for one, other in zip(found, expected[start:stop], strict=True):
            assert one.keys() == other.keys() and one["skipped"] == other["skipped"]
            assert all(torch.equal(one[key], other[key]) for key in one if key != "skipped")


class Watched(MemorySource):
    """Leaves a file for every read, with the process that does it."""

    def __init__(self, folder, sizes):
        super().__init__(sizes)
        self.folder = folder

    def _read(self, shard, start, stop):
        self.folder.joinpath(f"{os.getpid()}-{time.monotonic_ns()}").touch()
        return super()._read(shard, start, stop)

    def readers(self):
        """Of each process the number of its reads."""
        return Counter(file.name.split("-")[0] for file in self.folder.iterdir())


def test_readers_go_on_to_the_next_epoch_before_it_is_asked_for(tmp_path):
    loader = loader_of(Watched(tmp_path, [100]), workers=2, window=1000, partitions=2)
    steps = loader.steps_per_epoch
    reads = [
        sum(len(loader.order(epoch).window_segments(partition, 0)) for partition in range(2)) for epoch in range(3)
    ]
    batches = loader.batches(0, 3 * steps)
    for epoch in range(2):
        for _ in range(steps):
            next(batches)
        # All rows of an epoch are one window. Nobody asks for a batch now, and the next one is read.
        end = time.monotonic() + 60
        while loader.source.readers().total() < sum(reads[: epoch + 2]) and time.monotonic() < end:
            time.sleep(0.01)
        assert loader.source.readers().total() == sum(reads[: epoch + 2]), "the next epoch, and no other"
        assert len(multiprocessing.active_children()) == 2
    assert len(list(batches)) == steps
    assert len(loader.source.readers()) == 2, "the same processes in all epochs"
    assert not multiprocessing.active_children()


def test_nothing_is_held_of_an_epoch_that_is_through():
    loader = loader_of(MemorySource(UNEVEN), window=1000)
    last = loader.steps_per_epoch - 1
    held = {}
    for number, _ in enumerate(loader.batches(0, last + 2)):
        if number in (0, last, last + 1):
            held[number] = sum(type(one) is Row for one in gc.get_objects())
    assert held == {0: 100, last: 0, last + 1: 0}  # the window; none behind the last batch, and behind the run's


def test_order_changes_with_epoch_and_seed_only():
    first = rows_of(loader_of(MemorySource(UNEVEN)).epoch(0))
    torch.manual_seed(7)
    random.seed(7)
    state = torch.get_rng_state()
    assert rows_of(loader_of(MemorySource(UNEVEN)).epoch(0)) == first
    assert torch.equal(torch.get_rng_state(), state)  # reading data must not move dropout
    loader = loader_of(MemorySource(UNEVEN))
    assert rows_of(loader.epoch(1)) != first and rows_of(loader.epoch(0)) == first
    assert rows_of(loader_of(MemorySource(UNEVEN), seed=6).epoch(0)) != first


def test_a_rank_reads_only_its_part_and_skips_what_was_consumed():
    read = []
    for rank in range(3):
        source = MemorySource(UNEVEN)
        loader = loader_of(source, rank=rank, world=3, window=36, partitions=3)
        delivered = {row for rows in rows_of(loader.epoch(0)) for row in rows}
        firsts = [shard.first_row for shard in source.shards]
        mine = [firsts[s] + r for s, start, stop in source.reads for r in range(start, stop)]
        assert sorted(mine) == sorted(delivered)  # every row once, and none of another rank
        read += mine
        source.reads.clear()
        list(loader.epoch(0, start_step=7))  # batches of 4 in windows of 12, of which the first is shorter
        assert sum(stop - start for _, start, stop in source.reads) == len(mine) - (28, 20, 24)[rank]
        source.reads.clear()
        next(loader.epoch(0))
        assert sum(stop - start for _, start, stop in source.reads) == (4, 8, 12)[rank]  # one window, not the epoch
    assert len(set(read)) == len(read)


def test_augmentation_depends_on_the_row_alone():
    views = {}
    for world, batch, workers in ((1, 4, 0), (2, 5, 2), (1, 10, 0)):
        for rank in range(world):
            loader = loader_of(
                MemorySource(UNEVEN), rank=rank, world=world, batch=batch, workers=workers, augment=TrainAugmentation(8)
            )
            for item in loader.epoch(3):
                for row, view in zip(item["row"].tolist(), item["pixel_values"], strict=True):
                    assert torch.equal(views.setdefault(row, view), view)
    assert len(views) > 95
    draws = {sample_rng(seed, epoch, row).random() for seed in range(5) for epoch in range(5) for row in range(50)}
    assert len(draws) == 5 * 5 * 50


# ---------------------------------------------------------------------------------------------------------------- holes


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_rows_are_holes_that_shift_nothing(workers):
    bad = {4, 5, 30, 31, 32, 33, 77}
    clean = list(loader_of(MemorySource(UNEVEN), workers=workers, augment=TrainAugmentation(8)).epoch(0))
    holes = list(loader_of(MemorySource(UNEVEN, bad), workers=workers, augment=TrainAugmentation(8)).epoch(0))
    skipped = []
    for a, b in zip(clean, holes, strict=True):
        assert a["pixel_values"].shape == b["pixel_values"].shape
        skipped += b["skipped"]
        for slot, row in enumerate(a["row"].tolist()):
            if row in bad:
                assert b["row"][slot].item() not in bad
            else:
                assert b["row"][slot].item() == row
                assert torch.equal(a["pixel_values"][slot], b["pixel_values"][slot])
            filled = b["row"][slot].item()
            assert b["product_id"][slot].item() == filled
            title = [ord(c) % 1000 + 1 for c in f"title {filled}"]
            assert b["input_ids"][slot][: len(title)].tolist() == title
    assert sorted(entry["row"] for entry in skipped) == sorted(bad)
    entry = next(entry for entry in skipped if entry["row"] == 30)
    assert entry == {"row": 30, "name": "name 30", "reason": "the file is not an image of a known format"}


def test_a_batch_without_any_usable_row_borrows_from_its_window():
    bad = set(range(100)) - {50, 99}
    for start in (0, 13):  # the same after a resume
        loader = loader_of(MemorySource(UNEVEN, bad), batch=2, window=100, partitions=1)
        batches = list(loader.epoch(0, start_step=start))
        assert len(batches) == 50 - start
        assert {row for rows in rows_of(batches) for row in rows} == {50, 99}
        if not start:
            assert sorted(entry["row"] for batch in batches for entry in batch["skipped"]) == sorted(bad)
            whole = rows_of(batches)
        else:
            assert rows_of(batches) == whole[start:]


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_usable_is_an_error_with_reasons(workers):
    loader = loader_of(MemorySource(UNEVEN, range(100)), workers=workers)
    with pytest.raises(NoUsableRow, match="not an image of a known format") as caught:
        list(loader.epoch(0))
    assert "\n" not in str(caught.value)  # the message of torch's workers holds a traceback


def test_an_error_in_a_worker_surfaces_with_its_message():
    class Broken(MemorySource):
        def _read(self, shard, start, stop):
            raise RuntimeError("the disk is on fire")

    with pytest.raises(RuntimeError, match="the disk is on fire"):
        list(loader_of(Broken(UNEVEN), workers=2).epoch(0))

    class Shrunk(MemorySource):
        def _read(self, shard, start, stop):
            yield from list(super()._read(shard, start, stop))[1:]

    with pytest.raises(RuntimeError, match="did it change"):
        list(loader_of(Shrunk(UNEVEN)).epoch(0))


def test_an_epoch_left_early_leaves_no_worker_behind():
    batches = loader_of(MemorySource(UNEVEN), workers=2).epoch(0)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert not multiprocessing.active_children()
    with pytest.raises(NoUsableRow) as kept:  # the traceback lives on in `kept`
        list(loader_of(MemorySource(UNEVEN, range(100)), workers=2).epoch(0))
    assert not multiprocessing.active_children() and kept.value.args


def test_requests_that_make_no_sense():
    with pytest.raises(UsageError, match="--per_device_train_batch_size 50 or less"):
        loader_of(MemorySource(UNEVEN), world=2, batch=51)
    for options, why in (
        ({"batch": 0}, "batch_size"),
        ({"window": 0}, "window"),
        ({"rank": 2, "world": 2}, "rank 2"),
        ({"workers": -1}, "num_workers"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=why) as caught:
            loader_of(MemorySource(UNEVEN), **options)
        assert not isinstance(caught.value, UsageError)  # whoever calls it in code sees where
    with pytest.raises(UsageError, match="no rows"):
        MemorySource([])
    line = loader_of(MemorySource(UNEVEN), world=2, batch=16).describe()
    assert "\n" not in line
    for part in (
        "100 rows",
        "8 shards",
        "3 steps of 16 x 2",
        "4 rows left over (4.000%",
        "32 partitions with windows of 1 row ",
        "32.0%",
    ):
        assert part in line
    assert line.endswith("at most 16 rows undecoded in the memory of a process")  # no bytes where they are not known


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_units_are_the_same_for_every_number_of_processes(world, workers):
    bad = {8, 9, 10, 11, 50}
    found = {}
    for rank in range(world):
        collator = Collator(StubProcessor())
        loader = EvalLoader(
            MemorySource(UNEVEN, bad), collator, unit_size=4, rank=rank, world_size=world, num_workers=workers
        )
        assert loader.num_units == 25
        units = [unit for unit, batch in loader if not found.update({unit: batch})]
        assert units == list(range(rank, 25, world)) and len(loader) == len(units)
    for unit in range(25):
        rows = [row for row in range(4 * unit, 4 * unit + 4) if row not in bad]
        assert found[unit]["row"].tolist() == rows
        assert [entry["row"] for entry in found[unit]["skipped"]] == [
            r for r in range(4 * unit, 4 * unit + 4) if r in bad
        ]
        again = loader.read_unit(unit)
        assert all(torch.equal(again[key], found[unit][key]) for key in again if key != "skipped")
    assert found[2]["pixel_values"].shape == (0, 3, 8, 8) and found[2]["input_ids"].shape[0] == 0


def test_a_last_short_unit():
    loader = EvalLoader(MemorySource([5, 6]), Collator(StubProcessor()), unit_size=4, rank=0, world_size=1)
    assert [batch["row"].tolist() for _, batch in loader] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    with pytest.raises(IndexError):
        loader.read_unit(3)


# ------------------------------------------------------------------------------------------------------- collator


def test_batch_contract_and_slow_version():
    source = MemorySource([6])
    rows = list(source.read(0))
    batch = Collator(StubProcessor(), seed=4, max_length=7)(rows)
    assert batch["pixel_values"].dtype == torch.float32 and batch["pixel_values"].shape == (6, 3, 8, 8)
    for key in ("input_ids", "attention_mask", "product_id", "row"):
        assert batch[key].dtype == torch.int64 and len(batch[key]) == 6
    assert batch["input_ids"].shape == (6, 7)  # "title 0"
    augment = TrainAugmentation(8)
    views = Collator(StubProcessor(), augment, seed=4)(rows, epoch=2)["pixel_values"]
    for row, view in zip(rows, views, strict=True):
        slow = augment(decode(row).image, sample_rng(4, 2, row.row))
        assert torch.equal(view, torch.from_numpy(np.array(slow)).permute(2, 0, 1))


@pytest.mark.parametrize(
    "changes",
    [{}, {"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 0.0123}, {"image_mean": [0.1, 0.5, 0.9]}],
)
def test_normalisation_gives_the_pixels_of_the_processor(changes):
    processor = BlipImageProcessorPil(size={"height": 40, "width": 40}, **changes)
    generator = np.random.default_rng(0)
    photos = [Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)) for _ in range(3)]
    expected = processor(images=photos, return_tensors="pt")["pixel_values"].to(torch.float32)
    normalise = Normalisation(processor)
    assert torch.equal(normalise(as_bytes(photos)), expected)
    assert torch.equal(normalise(expected), expected)  # what is normalised already


@pytest.mark.parametrize("pattern", range(1, 32))
def test_a_hole_is_filled_by_the_next_usable_row(pattern):
    bad = {slot for slot in range(5) if not pattern >> slot & 1}
    rows = list(MemorySource([5], bad).read(0))
    batch = Collator(StubProcessor())(rows)
    expected = []
    for slot in range(5):
        while slot % 5 in bad:
            slot += 1
        expected.append(slot % 5)
    assert batch["row"].tolist() == expected
    assert [entry["row"] for entry in batch["skipped"]] == sorted(bad)


# --------------------------------------------------------------------------------------------------- real layouts


@pytest.mark.parametrize("workers", [0, 2])
def test_every_layout_streams_with_a_corrupt_image_as_a_hole(tmp_path, workers):
    rows = records(23)
    rows[11]["bytes"] = rows[11]["bytes"][:60]
    write_parquet(tmp_path / "parquet", rows, [9, 2, 12], row_group_size=5)
    write_tars(tmp_path / "tars", rows, [9, 2, 12])
    write_image_folder(tmp_path / "folder", rows)
    file, images = write_json_list(tmp_path / "list", rows)
    for arguments in (
        {"data_dir": str(tmp_path / "parquet")},
        {"data_dir": str(tmp_path / "tars")},
        {"data_dir": str(tmp_path / "folder")},
        {"data_files": str(file), "image_dir": str(images)},
    ):
        source = open_source(split="train", **arguments)
        seen, skipped = [], []
        for rank in range(2):
            loader = loader_of(source, rank=rank, world=2, batch=2, window=6, workers=workers)
            batches = list(loader.epoch(0))
            assert len(batches) == 5
            seen += [row for rows_ in rows_of(batches) for row in rows_]
            skipped += [(entry["row"], entry["name"].split(".")[0]) for batch in batches for entry in batch["skipped"]]
        left = set(loader.order(0).leftover())
        assert set(seen) == set(range(23)) - left - {11}
        assert skipped == ([] if 11 in left else [(11, "p011")])


@needs_products
def test_the_product_photos_train():
    source = open_source(data_dir=str(PRODUCTS), split="train")
    lines = (PRODUCTS / "train" / "metadata.jsonl").read_text("utf-8").splitlines()
    captions = [json.loads(line)["caption"] for line in lines]
    assert [row.text for row in source.read_range(0, source.num_rows)] == captions
    loader = loader_of(source, batch=32, workers=2, window=4096, augment=TrainAugmentation(8))
    assert loader.steps_per_epoch == 120
    batches = [batch for batch, _ in zip(loader.epoch(0), range(6), strict=False)]
    assert all(batch["pixel_values"].shape == (32, 3, 8, 8) and not batch["skipped"] for batch in batches)
    assert len({row for rows in rows_of(batches) for row in rows}) == 6 * 32
