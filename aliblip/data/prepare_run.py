"""Preparing a catalogue from beginning to end; the same call goes on after a kill.

    work = Preparation(inputs, args)
    work.check()
    work.run()                       # False: tasks run elsewhere, and the same call goes on when they have ended
    work.facts, work.found, work.decided

1. *read*: tasks of rows become parts, see `aliblip.data.prepare_steps`.
2. *compare*: blocks of photos are compared with all, for near duplicates.
3. Duplicates, products, splits and shards are decided.
4. *write*: shards out of the parts.
5. Everything is put in place at once, and the work is removed.

Each task's output depends on the data and the flags alone, is written beside its place and put there whole, and is
noted by datatrove when it is done.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.executor import LocalPipelineExecutor
from loguru import logger
from tqdm.auto import tqdm

from aliblip.data.duplicates import Index, Pairs, joined_groups
from aliblip.data.fetching import PoliteFetch
from aliblip.data.prepare_arguments import PrepareArguments
from aliblip.data.prepare_executors import remote_executor
from aliblip.data.prepare_parts import facts_file, written_to
from aliblip.data.prepare_plan import (
    Decided,
    Facts,
    decide,
    find_exact,
    write_duplicates,
    write_rejected,
    write_thumbs,
)
from aliblip.data.prepare_shards import PARTS, SHARDS
from aliblip.data.prepare_steps import (
    BLOCK,
    ComparePhotos,
    DecodePhotos,
    FetchPhotos,
    ReadRows,
    WriteParts,
    WriteShards,
    pairs_file,
)
from aliblip.data.prepare_tasks import Inputs
from aliblip.data.remote import is_remote
from aliblip.runtime.files import PARTIAL, mapped_array, read_json, write_json
from aliblip.runtime.interrupts import hear_of_the_parents_end
from aliblip.runtime.mistakes import UsageError, first_line, shortened, usage_errors
from aliblip.runtime.owners import OWNER, Owner
from aliblip.runtime.parts import FINGERPRINT, Parts
from aliblip.runtime.sameness import changes, told

__all__ = ["PREPARED", "Preparation"]

WORK, PREPARED = "work", "prepared.json"
# In the folder of the work: what will be put in place, the index of near duplicates, the names that are put in place.
OUT, INDEX, PLACING = "out", "index", "placing.json"
# What the work is called while it is removed.
REMOVED = ".work.removed"
# Flags that decide what comes out.
_FLAGS = (
    *("max_side", "quality", "clean_titles", "near_duplicates", "duplicate_similarity", "merge_duplicates"),
    *("split_by", "split_column", "split_shares", "leaks", "seed", "for_ranks", "for_workers", "shard_mb"),
    *("fetch_mb", "fetch_private", "rows_per_task", "tokenizer_name", "max_length"),
    *("train_tokenizer", "tokenizer_vocab_size", "tokenizer_titles"),
)
_in_a_pipeline = False


def _end_with_the_parent() -> None:
    """In a fork: let the system end it when the command is killed, since nobody would wait for it any more, and the
    command that goes on would meet it."""
    if _in_a_pipeline:
        hear_of_the_parents_end(signal.SIGKILL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_with_the_parent)


class Preparation:
    """One catalogue that is prepared.

    Args:
        inputs: the data.
        args: the flags, checked.
        add: writes what stands beside the shards, such as the data card, into a folder when these are done.

    Attributes:
        output_dir: where it comes.
        tasks: of the reading.
        facts, found, decided: what is known, as far as the work has come.
    """

    def __init__(self, inputs: Inputs, args: PrepareArguments, add: Callable[[Preparation, Path], None] | None = None):
        self.inputs, self.args, self.add = inputs, args, add
        self.output_dir = Path(args.output_dir)
        self.work = self.output_dir / WORK
        self.out = self.work / OUT
        self.tasks = inputs.tasks(args.rows_per_task)
        self.made_from = {
            "data": [source.described() for source in inputs.sources()],
            **{name: inputs.given(name) for name in ("image_dir", "fetch_photos")},
            "reading": dataclasses.asdict(inputs.given("reading")),
            **{flag: getattr(args, flag) for flag in _FLAGS},
        }
        self.parts = Parts(self.work, self.made_from)
        self.facts: Facts | None = None
        self.found: Any = None
        self.decided: Decided | None = None
        self.num_rejected = 0

    # --- before the work ----------------------------------------------------------------------------------------------

    def is_done(self) -> bool:
        """Whether the catalogue is there already, made from the same data by the same flags.

        Raises:
            UsageError: there is another one, or files that are not ours.
        """
        marker = self.output_dir / PREPARED
        if not marker.is_file() and not (self.work / FINGERPRINT).is_file() and self._holds_files():
            raise UsageError(f"{self.output_dir} holds other files: give a new folder as --output_dir")
        if self.args.overwrite_output_dir:
            return False
        if not marker.is_file():
            self.parts.check()
            return False
        try:
            before = read_json(marker)["made_from"]
            if not isinstance(before, dict):
                raise ValueError("'made_from' is no object")
        except (OSError, ValueError, KeyError) as error:
            raise UsageError(f"{marker} can't be read ({first_line(error)}): give another --output_dir") from error
        if changed := changes(before, self.made_from, names=self.made_from):
            raise UsageError(
                f"{self.output_dir} holds another prepared catalogue ({told(changed)}): give another --output_dir, or "
                "--overwrite_output_dir to replace it"
            )
        shutil.rmtree(self.output_dir / REMOVED, ignore_errors=True)
        return not self.work.is_dir()

    def _holds_files(self) -> bool:
        """Whether there is anything but a folder of work in which nothing has begun."""
        if not self.output_dir.is_dir():
            return False
        if any(path != self.work or not path.is_dir() for path in self.output_dir.iterdir()):
            return True
        return self.work.is_dir() and any(
            not path.name.startswith(OWNER) and not path.name.endswith(PARTIAL) for path in self.work.iterdir()
        )

    def check(self) -> None:
        """Look at what can go wrong before the work.

        Raises:
            UsageError: the folder lies in the data, or the data in the folder, where it would be replaced.
        """
        output_dir = self.output_dir.resolve()
        places = [file.file for source in self.inputs.sources() for file in source.files]
        places += [
            place for source in self.inputs.sources() for place in (source.folder, self.inputs.given("image_dir"))
        ]
        for place in places:
            if place is not None and not is_remote(place) and Path(place).resolve().is_relative_to(output_dir):
                raise UsageError(
                    f"the data, {place}, lies in --output_dir {self.output_dir}, whose files are written by this "
                    "command: give a folder outside of it"
                )
        for source in self.inputs.sources():
            if source.folder is not None and self.output_dir.resolve().is_relative_to(Path(source.folder).resolve()):
                raise UsageError(
                    f"--output_dir {self.output_dir} lies in the data, {source.folder}, and would be read as a part of "
                    "it: give a folder outside of it"
                )

    # --- the work -----------------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Do it, or what is left of it. False if tasks were handed to another machine.

        Raises:
            UsageError: the disk does not take it, the data can't be read, or another process is at it.
        """
        with written_to(self.output_dir):
            if self.args.overwrite_output_dir:
                self.parts.drop_others()
            self.parts.begin()
        with Owner.of(self.work, "python -m aliblip.prepare"):
            if not (self.work / PLACING).is_file():
                if not self._prepare():
                    return False
                self._finish()
            self._put_in_place()
        return True

    def _prepare(self) -> bool:
        """Everything up to the shards."""
        self._tidy()
        if not self._read():
            return False
        self.facts = Facts.load(self.work, len(self.tasks))
        compared = self._compare()
        if compared is None:
            return False
        self.found = find_exact(self.facts, compared)
        selected = [source.selected for source in self.inputs.sources()]
        self.decided = decide(self.work, self.tasks, self.facts, self.found, selected, self.args)
        return self._write()

    def _tidy(self) -> None:
        """Remove what a killed process left half written, and notes of tasks whose output is gone."""
        for unfinished in self.work.rglob(f".*{PARTIAL}"):
            unfinished.unlink()
        self._forget("read", [[facts_file(self.work / PARTS, n)] for n in range(len(self.tasks))])

    def _forget(self, phase: str, outputs: Sequence[Sequence[Path]]) -> None:
        """Forget notes of tasks whose output is nowhere, as a disk leaves it that has lost power.

        Args:
            outputs: of each task, where its output may be.
        """
        notes = self.work / "logs" / phase / "completions"
        for note in notes.iterdir() if notes.is_dir() else ():
            if not any(place.is_file() for place in outputs[int(note.name)]):
                note.unlink()

    def _read(self) -> bool:
        args = self.args
        (self.work / PARTS).mkdir(exist_ok=True)
        rate = args.fetch_rate / self._workers(len(self.tasks))
        fetch = PoliteFetch(rate, args.fetch_seconds, int(args.fetch_mb * 2**20), args.fetch_private)
        steps = [
            ReadRows(self.inputs, args.rows_per_task),
            FetchPhotos(fetch),
            DecodePhotos(args.max_side, args.quality, args.clean_titles),
            WriteParts(self.work / PARTS, self.inputs, args.rows_per_task),
        ]
        sizes = [task.rows for task in self.tasks]
        return self._run("read", steps, sizes, "row")

    def _compare(self) -> Pairs | None:
        """Near duplicates, as places in the facts; None if the tasks run elsewhere."""
        empty = np.zeros(0, np.int64)
        if not self.args.near_duplicates:
            return Pairs.of(empty, empty, empty.astype(np.float32))
        _, places = np.unique(self.facts.digest, return_index=True)  # of equal files one
        places = np.sort(places)
        folder = self.work / INDEX
        thumbs = folder / "thumbs.npy"
        if not (folder / "index.json").is_file():
            with written_to(folder):
                folder.mkdir(exist_ok=True)
                write_thumbs(self.work, len(self.tasks), self.facts.row[places], thumbs)
                Index.of(np.load(thumbs, mmap_mode="r"), partial(mapped_array, folder)).save(folder)
                write_json(folder / "index.json", {"photos": len(places)})
        sizes = [min(BLOCK, len(places) - start) for start in range(0, len(places), BLOCK)]
        self._forget("compare", [[pairs_file(folder, number)] for number in range(len(sizes))])
        if not self._run("compare", [ComparePhotos(folder, self.args.duplicate_similarity)], sizes, "photo"):
            return None
        pairs = [np.load(pairs_file(folder, number)) for number in range(len(sizes))]
        first, second, similarity = (np.concatenate([pair[name] for pair in pairs]) for name in pairs[0].dtype.names)
        found = joined_groups(
            np.load(thumbs, mmap_mode="r"), Pairs.of(first, second, similarity), self.args.duplicate_similarity
        )
        return Pairs.of(places[found.first], places[found.second], found.similarity)

    def _write(self) -> bool:
        plan = self.decided.plan
        plan.save(self.work)
        places = (self.work / SHARDS, self.out / SHARDS)
        self._forget("write", [[place / shard.file for place in places] for shard in plan.shards])
        sizes = [shard.end - shard.begin for shard in plan.shards]
        return self._run("write", [WriteShards(self.work)], sizes, "row")

    def _finish(self) -> None:
        """Write the reports, and put everything in place."""
        with written_to(self.output_dir):
            self.out.mkdir(exist_ok=True)
            rejected = self.out / "rejected.parquet"
            self.num_rejected = write_rejected(rejected, self.work, len(self.tasks), self.facts, self.decided.sides)
            write_duplicates(self.out / "duplicates.parquet", self.facts, self.found)
        if self.add is not None:
            self.add(self, self.out)
        with written_to(self.output_dir):
            if (self.work / SHARDS).is_dir():
                (self.work / SHARDS).rename(self.out / SHARDS)
            write_json(self.out / PREPARED, {"made_from": self.made_from, "counts": self.counts()})
            new = sorted(path.name for path in self.out.iterdir())
            before = self.output_dir / PREPARED
            old = _names_in(before, "files") if before.is_file() else []
            self._refuse_to_replace({*new} - {*old, PREPARED})
            write_json(self.out / PREPARED, {"made_from": self.made_from, "files": new, "counts": self.counts()})
            write_json(self.work / PLACING, {"old": old, "new": new})

    def _refuse_to_replace(self, names: set[str]) -> None:
        foreign = sorted(name for name in names if (self.output_dir / name).exists())
        if foreign:
            raise UsageError(
                f"{self.output_dir} holds {', '.join(foreign)}, which this command did not write and would replace: "
                "move that away, and the same command goes on"
            )

    def _put_in_place(self) -> None:
        """Exchange an earlier catalogue for the new one; a second start goes on with it."""
        names = {which: _names_in(self.work / PLACING, which) for which in ("old", "new")}
        with written_to(self.output_dir):
            for name in {*names["old"]} - {*names["new"]}:
                _remove(self.output_dir / name)
            # The last one says that all are there.
            for name in sorted(names["new"], key=lambda name: name == PREPARED):
                if (self.out / name).exists():  # else an earlier start has put it there
                    _remove(self.output_dir / name)
                    (self.out / name).rename(self.output_dir / name)
            self.work.rename(self.output_dir / REMOVED)
            shutil.rmtree(self.output_dir / REMOVED)

    def counts(self) -> dict[str, Any]:
        """What came of it, in numbers."""
        return {
            "rows": self.decided.rows,
            "products": self.decided.products,
            "rejected": self.num_rejected,
            "exact_duplicates": len(self.found.exact),
            "near_duplicates": len(self.found.near),
            "bytes_before": int(self.facts.given.sum()),
            "bytes_after": int(self.facts.kept.sum()),
        }

    # --- pipelines ----------------------------------------------------------------------------------------------------

    def _workers(self, tasks: int) -> int:
        """Tasks that run at once; elsewhere all, if nobody says how many."""
        wanted = self.args.workers or (_cores() if self.args.executor == "local" else tasks)
        return max(min(wanted, tasks), 1)

    def _run(self, phase: str, steps: Sequence[Any], sizes: Sequence[int], unit: str) -> bool:
        """Run the tasks of a phase that are not done. False if they were handed to another machine."""
        logs = self.work / "logs" / phase
        options = {"tasks": len(sizes), "logging_dir": str(logs)}
        if self.args.executor != "local":
            executor = remote_executor(self.args, list(steps), phase, **options)
            if not executor.get_incomplete_ranks():
                return True
            executor.run()
            return not executor.get_incomplete_ranks()
        workers = self._workers(len(sizes))
        method = "fork" if sys.platform.startswith("linux") else "spawn"
        executor = LocalPipelineExecutor(list(steps), workers=workers, start_method=method, **options)
        logger.disable("datatrove")  # it tells of every task; what goes wrong is raised
        with _ending_together(), _sharing(), _bar(phase, logs, sizes, unit):
            executor.run()
        return True


@contextmanager
def _ending_together() -> Iterator[None]:
    global _in_a_pipeline
    _in_a_pipeline = True
    try:
        yield
    finally:
        _in_a_pipeline = False


@contextmanager
def _sharing() -> Iterator[None]:
    """Keep what is there out of the garbage collector: a full collection writes to every object, and with forks each
    process then gets a copy of its own of all that they share, 0.1 GB of modules alone."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _bar(phase: str, logs: Path, sizes: Sequence[int], unit: str) -> Iterator[None]:
    """A bar with the time that is left, on a terminal; datatrove has none that counts rows."""
    if not sys.stderr.isatty():
        yield
        return
    ended = threading.Event()
    notes = logs / "completions"

    def done() -> int:
        with os.scandir(notes) if notes.is_dir() else _nothing() as entries:
            return sum(sizes[int(entry.name)] for entry in entries if entry.name.isdigit())

    def watch() -> None:
        with tqdm(total=sum(sizes), desc=phase, unit=unit, initial=done(), leave=False) as bar:
            while not ended.wait(0.5):
                bar.update(done() - bar.n)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextmanager
def _nothing() -> Iterator[list[Any]]:
    yield []


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _names_in(file: Path, key: str) -> list[str]:
    """Names of files beside a file that lists them. They are removed, so that one from somebody else may name no other
    place.

    Raises:
        UsageError: the file is damaged, or names something else.
    """
    told = f"{file} is not what prepare writes ({{}}): move it away, or give another --output_dir"
    with usage_errors(OSError, ValueError, KeyError, told=told):
        names = read_json(file)[key]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key!r} is no list of names")
        if wrong := [name for name in names if name in ("", ".", "..") or "/" in name or os.sep in name]:
            raise ValueError(f"{key!r} names {shortened(wrong[0], 80)!r}")
    return names


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
