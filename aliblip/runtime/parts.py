"""Finished parts of long work, kept in a folder, so that a second start goes on where the first one ended.

    parts = Parts(output_dir / "parts", {"model": ..., "data": ...})
    parts.check()                                   # another model's or data set's parts are refused
    with parts.stage("embed") as stage:             # collective
        for unit in own_units:
            if unit in stage: ... stage.load(unit)
            else: ... stage.add(unit, tensors, info)
    parts.remove()

A unit is done whole by one process, so the parts of a start with other processes serve as well. Finished units are
written together every `SECONDS` seconds, each file whole or not at all; a crash loses what came after the last one. A
file has its checksum in its name, which is compared before it is used: one that was damaged on the disk is made again.
"""

import contextlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from aliblip.runtime.distributed import is_main, rank, together
from aliblip.runtime.files import checksum_of, read_bytes, read_json, write_bytes, write_json
from aliblip.runtime.mistakes import UsageError
from aliblip.runtime.sameness import changes, told

logger = logging.getLogger(__name__)

SECONDS = 20.0
BYTES = 2**28

FINGERPRINT = "made_from.json"


class Parts:
    """A folder of parts.

    Args:
        folder: made by the first stage.
        made_from: what all parts depend on, as JSON can hold it. The values are shown to the user where they differ.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any]):
        self.folder, self.made_from = folder, json.loads(json.dumps(made_from))

    def check(self, way_out: str = "give another --output_dir, or --overwrite_output_dir to drop it") -> None:
        """Refuse to go on with parts of other work.

        Args:
            way_out: what else the user can do, in the words of the tool that was called.

        Raises:
            UsageError: the parts that lie in the folder were made from something else, or can't be read; the message
                says from what and what to do.
        """
        file = self.folder / FINGERPRINT
        if not file.is_file():
            return
        try:
            before = read_json(file)
        except (OSError, ValueError) as error:
            raise UsageError(f"{file} can't be read: remove the folder {self.folder} to start anew") from error
        if changed := changes(before, self.made_from, names=self.made_from):
            raise UsageError(
                f"{self.folder} holds unfinished work on something else ({told(changed)}): go on with that, {way_out}"
            )

    def begin(self) -> None:
        """Make the folder and write down what its parts are made from. Main process only.

        Raises:
            OSError: it can't be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / FINGERPRINT).exists():
            write_json(self.folder / FINGERPRINT, self.made_from)

    def drop_others(self) -> None:
        """Remove the folder if `check` refuses it. Main process only."""
        try:
            self.check()
        except UsageError:
            self.remove()

    def stage(self, name: str, before_write: Callable[[], None] | None = None, needed: bool = False) -> "Stage":
        """The finished units of one stage; a collective, as its parts are listed by the main process.

        Args:
            name: units of one name are interchangeable, whoever made them.
            before_write: called before finished units are written down.
            needed: whether failing to write is an error; otherwise it is told once, and the work goes on.
        """
        files = together(is_main(), lambda: self._open(name, needed), "open the folder of parts")  # collective
        return Stage(self.folder, name, files, before_write, needed)

    def _open(self, name: str, needed: bool) -> dict[int, str] | None:
        """Unit -> file of a stage; None if the folder can't be used, and need not be."""
        files: dict[int, str] = {}
        try:
            self.begin()
        except OSError as error:
            if needed:
                raise
            logger.warning(
                "finished parts can't be kept in %s (%s): a second start would repeat them", self.folder, error
            )
            return None
        for file in sorted(self.folder.glob(f"{name}.*.safetensors")):
            try:
                is_whole = file.name.split(".")[-2] == checksum_of(file)
                with safe_open(file, "pt") as opened:
                    units = json.loads(opened.metadata()["units"])
            except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
                logger.warning("%s can't be read and is made again", file)
                continue
            if not is_whole:
                logger.warning("%s is damaged (its checksum is another) and is made again", file)
                continue
            files |= {int(unit): file.name for unit in units}
        return files

    def settle(self, name: str, value: int) -> int:
        """A number that an earlier start chose, or else this one, which is kept for the next (collective)."""

        def choose() -> int:
            file = self.folder / f"{name}.json"
            try:
                return int(json.loads(read_bytes(file)))
            except FileNotFoundError:
                pass
            except (OSError, ValueError, TypeError, RecursionError) as error:
                logger.warning("%s can't be read (%s): what an earlier start chose is chosen anew", file, error)
            with contextlib.suppress(OSError):  # told by the first stage
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(file, value)
            return value

        return together(is_main(), choose, "read the folder of parts")  # collective

    def forget(self, name: str, keep: str) -> None:
        """Remove the finished units of all stages whose names begin with `name`, but for the one called `keep`. Main
        process only, before one is opened."""
        for file in self.folder.glob(f"{name}*.safetensors"):
            if not file.name.startswith(f"{keep}."):
                file.unlink()

    def remove(self) -> None:
        """The work is done: remove the folder. Main process only."""
        shutil.rmtree(self.folder, ignore_errors=True)


class Stage:
    """Units of one stage: those that are `in` it are done. A context manager that writes the last ones at its end."""

    def __init__(self, folder: Path, name: str, files: dict[int, str] | None, before_write, needed: bool):
        self.folder, self.name, self.needed = folder, name, needed
        self._files, self._before_write = files or {}, before_write
        self._tensors: dict[str, torch.Tensor] = {}
        self._units: dict[int, Any] = {}
        self._written = time.monotonic()
        self._failed = files is None
        self._opened: tuple[str, Any] | None = None

    def __contains__(self, unit: int) -> bool:
        return unit in self._files

    def load(self, unit: int) -> tuple[dict[str, torch.Tensor], Any]:
        """Tensors and information of a unit that an earlier start finished."""
        name = self._files[unit]
        if self._opened is None or self._opened[0] != name:
            self._opened = (name, safe_open(self.folder / name, "pt"))  # memory-mapped: only what is asked for is read
        file = self._opened[1]
        prefix = f"{unit}/"
        tensors = {key[len(prefix) :]: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["units"])[str(unit)]

    def discard(self, unit: int) -> None:
        """Take a unit for one that is still to do."""
        self._files.pop(unit)

    def add(self, unit: int, tensors: dict[str, torch.Tensor], info: Any = None) -> None:
        """Keep a finished unit. `info` is anything that JSON can hold."""
        self._units[unit] = info
        self._tensors |= {f"{unit}/{key}": value.contiguous() for key, value in tensors.items()}
        size = sum(value.numel() * value.element_size() for value in self._tensors.values())
        if time.monotonic() - self._written > SECONDS or size > BYTES:
            self.write()

    def write(self) -> None:
        """Write down what was added since the last time.

        Raises:
            OSError: it failed, and the stage is needed.
        """
        if not self._units or self._failed:
            return
        data = save(self._tensors, metadata={"units": json.dumps(self._units)})
        made_by = f"{min(self._units):08d}.{rank()}.{os.getpid()}.{zlib.crc32(data):08x}"
        file = self.folder / f"{self.name}.{made_by}.safetensors"
        try:
            if self._before_write is not None:
                self._before_write()
            write_bytes(file, data)
        except OSError as error:
            if self.needed:
                raise
            self._failed = True
            logger.warning("finished parts can't be kept in %s (%s): a second start would repeat them", file, error)
        self._tensors, self._units, self._written = {}, {}, time.monotonic()

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.write()  # after an error too: what is finished is finished


class NoStage:
    """A stage that keeps nothing, with the few methods of `Stage`."""

    def __contains__(self, unit: int) -> bool:
        return False

    def add(self, unit: int, tensors: dict[str, torch.Tensor], info: Any = None) -> None:
        pass

    def __enter__(self) -> "NoStage":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        pass


def stage_of(parts: Parts | None, name: str) -> Stage | NoStage:
    """`parts.stage(name)` (collective), or a stage that keeps nothing if there are no parts."""
    return NoStage() if parts is None else parts.stage(name)


__all__ = ["Parts", "Stage", "stage_of"]
