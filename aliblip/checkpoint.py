"""Writing models and checkpoints: beside the old ones first, then swapped in, so that a crash leaves the old ones
usable.

Two kinds of folders. A *model* (`best/`, `last/`) is what `from_pretrained` loads: fp32 weights, configuration,
processor,
the Hub files. A *checkpoint* (`checkpoint-120/`) is what a run resumes from: weights, optimizer, momentum encoders,
queues and random states as accelerate saves them, and `progress.json`.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from aliblip.accelerator import fp32_state_dict
from aliblip.arguments import UsageError
from aliblip.distributed import barrier, is_main
from aliblip.files import write_json

_PROGRESS = "progress.json"


def _swap_in(beside: Path, folder: Path) -> None:
    """Put a finished folder in the place of an older one."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    beside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def save_model(model, processor, folder: Path, results: dict | None = None) -> None:
    """Save a model that `from_pretrained` loads, its weights in fp32. A collective.

    Args:
        model: the unwrapped model; under ZeRO its full-precision weights are collected from all ranks.
        processor: saved beside it.
        folder: replaced where it exists.
        results: an evaluation of these weights, saved as `results.json`.
    """
    state = fp32_state_dict(model)
    if is_main():
        beside = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(beside, ignore_errors=True)
        model.save_pretrained(beside, state_dict=state)
        # An engine in bf16 holds bf16 working copies; what is written here are the fp32 weights.
        config = json.loads((beside / "config.json").read_text(encoding="utf-8"))
        write_json(beside / "config.json", {**config, "dtype": "float32"})
        processor.save_pretrained(beside)
        if results is not None:
            write_json(beside / "results.json", results)
        _swap_in(beside, folder)
    barrier()


def save_checkpoint(accelerator, output_dir: Path, progress: dict[str, Any]) -> Path:
    """Save everything that a run needs to go on as `checkpoint-{step}`. A collective.

    Args:
        accelerator: with the prepared objective and optimizer and the registered momentum state.
        progress: the run's own counters, with "step" and "order" (see `read_progress`); JSON values only.
    """
    folder = output_dir / f"checkpoint-{progress['step']}"
    beside = folder.with_name(f".{folder.name}.tmp")
    if is_main():
        shutil.rmtree(beside, ignore_errors=True)
    barrier()
    accelerator.save_state(str(beside))
    barrier()
    if is_main():
        write_json(beside / _PROGRESS, progress)
        _swap_in(beside, folder)
    barrier()
    return folder


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The checkpoint that `--resume_from_checkpoint` names: a folder, or `last`: the newest in the output folder.

    Raises:
        UsageError: there is none.
    """
    if wanted == "last":
        found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
        if not found:
            raise UsageError(f"no checkpoint in {output_dir}: start without --resume_from_checkpoint")
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]))
    folder = Path(wanted)
    if not (folder / _PROGRESS).is_file():
        raise UsageError(f"{folder} is no checkpoint (it has no {_PROGRESS}): give a checkpoint-N folder, or last")
    return folder


def read_progress(folder: Path, order: dict[str, Any]) -> dict[str, Any]:
    """The counters of a checkpoint.

    Args:
        folder: the checkpoint.
        order: what the order of the rows depends on, by name; the checkpoint's own stands in its "order".

    Raises:
        UsageError: the order would be another one, so that rows would be lost or seen twice.
    """
    progress = json.loads((folder / _PROGRESS).read_text(encoding="utf-8"))
    changed = [
        f"{name} {progress['order'].get(name)} there, {value} here"
        for name, value in order.items()
        if progress["order"].get(name) != value
    ]
    if changed:
        raise UsageError(f"{folder} was written by a run that reads its rows in another order ({'; '.join(changed)})")
    return progress


__all__ = ["find_checkpoint", "read_progress", "save_checkpoint", "save_model"]
