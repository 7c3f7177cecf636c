"""Models and checkpoints: what is in them, and how a run comes back from one.

Two kinds of folders. A *model* (`best/`, `last/`) is what `from_pretrained` loads: fp32 weights, configuration,
processor, the Hub files. A *checkpoint* (`checkpoint-120/`) is a model too, and what a run resumes from:

    model.safetensors      fp32 weights; configuration and processor beside them, in JSON
    optimizer.safetensors  AdamW's state by parameter name
    momentum.safetensors   momentum encoders and queues
    ranks.safetensors      random states of Python, NumPy and torch (CPU and CUDA) of every rank; in fp16 the loss scale
    state.json             counters, arguments, data manifest, what each rank has counted, sizes and checksums of the
                           other files and of itself

The tensors are whole, whatever sharded them, and written by the main process alone. Nothing in a checkpoint is pickled,
and a model's code is not in it, so one from untrusted hands can be wrong, but it can't run code; DeepSpeed's own files,
which can, are not used.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aliblip.data.order import facts_of
from aliblip.retrieval.model_folder import CHECKPOINT_STATE as STATE
from aliblip.runtime.distributed import all_gather_objects, barrier, broadcast_object, is_main, rank, world_size
from aliblip.runtime.files import NewFolder, checksum_of, read_json, write_json, write_tensors
from aliblip.runtime.mistakes import UsageError, usage_errors
from aliblip.runtime.sameness import Change, changes, told
from aliblip.training.step import (
    fp32_state_dict,
    load_fp32_state_dict,
    load_loss_scale_state,
    load_optimizer_state,
    optimizer_state,
)

RESULTS = "results.json"
FORMAT = 1


# --- models -----------------------------------------------------------------------------------------------------------


def save_model(model, processor, folder: Path, results: dict | None = None) -> str | None:
    """Save a model that `from_pretrained` loads, its weights in fp32; of one with adapters these alone. A collective.

    Args:
        model: the unwrapped model; under ZeRO its full-precision weights are collected from all ranks.
        processor: saved beside it.
        folder: replaced where it exists.
        results: an evaluation of these weights, saved as `results.json`.

    Returns:
        None; or, on all ranks, why it could not be written. An older model in the folder is then still there.
    """
    state = fp32_state_dict(model, keep=is_main())

    def write() -> None:
        with NewFolder(folder, size=_bytes(state)) as beside:
            model.save_pretrained(beside, state_dict=state)  # with the code
            _complete(model, processor, beside)
            if results is not None:
                write_json(beside / RESULTS, results)

    return _on_main(write)


def _complete(model, processor, folder: Path) -> None:
    """Make a model of fp32 weights and a configuration in a folder; an adapter has no configuration of the model."""
    processor.save_pretrained(folder)
    if not (folder / "config.json").exists():
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # An engine in bf16 holds bf16 working copies; what is written here are the fp32 weights.
    config |= {"architectures": [type(model).__name__], "dtype": "float32"}
    write_json(folder / "config.json", config)


def save_results(results: dict, folder: Path) -> str | None:
    """Put an evaluation of its weights into a saved model. A collective; returns as `save_model`."""
    return _on_main(lambda: write_json(folder / RESULTS, results))


def _on_main(write) -> str | None:
    """Let the main process write; every rank gets the reason if it could not."""
    problem = None
    if is_main():
        try:
            write()
        except OSError as error:
            problem = error.strerror or str(error)
        except Exception as error:  # of a full disk safetensors makes its own error, and tokenizers a bare Exception
            problem = f"{type(error).__name__}: {error}"
    return broadcast_object(problem)


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in tensors.values())


# --- random states ----------------------------------------------------------------------------------------------------


def random_states(device: torch.device) -> dict[str, Tensor]:
    """The states of all generators that this process draws from, as tensors."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*keys.tolist(), position, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    """The way back of `random_states`."""
    version, *words = states["python"].tolist()
    gauss = states["python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *keys, position, has_gauss = states["numpy"].tolist()
    cached = states["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """The counters of a run, as they stand in a checkpoint."""

    step: int = 0  # optimizer steps whose rows are used up: the position in the data
    left_out: int = 0  # of these, steps that changed nothing; schedules count the others
    left_out_in_a_row: int = 0
    average_is_due: bool = True  # the momentum encoders have not followed the last step yet
    best_mean_recall: float = -1.0
    evaluations_without_gain: int = 0  # in a row; not in checkpoints of version 0.1

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Progress:
        return cls(**{field.name: state[field.name] for field in fields(cls) if field.name in state})


# What stands in every state.json beside its format.
ENTRIES = (
    *("files", "ranks", "momentum", "order", "manifest", "arguments"),
    *("step", "left_out", "left_out_in_a_row", "average_is_due", "best_mean_recall"),
)
_KINDS = {"files": dict, "checksums": dict, "ranks": list, "momentum": dict, "order": dict, "manifest": dict}
_KINDS |= {"arguments": dict} | {field.name: (int, float) for field in fields(Progress)}


@dataclass
class Training:
    """The parts of a run whose state a checkpoint holds. `model` is the plain one, the optimizer the prepared one."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    momentum: torch.nn.Module
    device: torch.device
    scaler: torch.amp.GradScaler | None = None  # of a run in fp16


def save_checkpoint(
    training: Training,
    processor,
    output_dir: Path,
    progress: dict[str, Any],
    *,
    of_rank: dict[str, Any],
    random: dict[str, Tensor],
    limit: int | None = None,
) -> str | None:
    """Save everything that a run needs to go on as `checkpoint-{step}`, and remove the oldest ones. A collective.

    Args:
        training: whose state is saved.
        processor: saved beside the weights: a checkpoint is a model too.
        output_dir: the folder of the run.
        progress: the run's own counters, with "step", "order" (see `read_state`) and "manifest"; JSON values only.
        of_rank: JSON values that differ from rank to rank.
        random: `random_states` of this rank, and in fp16 the loss scale.
        limit: checkpoints to keep, this one included; None: all.

    Returns:
        None; or, on all ranks, why it could not be written. The older checkpoints are then still there, all of them.
    """
    model = fp32_state_dict(training.model, keep=is_main())
    optimizer = optimizer_state(training.model, training.optimizer, keep=is_main())
    ranks = all_gather_objects((of_rank, {name: value.cpu().numpy() for name, value in random.items()}))
    folder = output_dir / f"checkpoint-{progress['step']}"

    def write() -> None:
        momentum = training.momentum.state_dict()
        files = {
            "model": model,
            "optimizer": optimizer,
            "momentum": {name: value.cpu() for name, value in momentum.items() if torch.is_tensor(value)},
            "ranks": {
                f"{r}.{name}": torch.from_numpy(v) for r, (_, own) in enumerate(ranks) for name, v in own.items()
            },
        }
        with NewFolder(folder, size=sum(map(_bytes, files.values()))) as beside:
            training.model.config.save_pretrained(beside)
            _complete(training.model, processor, beside)
            for code in beside.glob("*.py"):  # a checkpoint is data alone
                code.unlink()
            for name, tensors in files.items():
                write_tensors(beside / f"{name}.safetensors", tensors)
            state = {
                "format": FORMAT,
                **progress,
                "momentum": {name: value for name, value in momentum.items() if not torch.is_tensor(value)},
                "ranks": [own for own, _ in ranks],
                "files": {file.name: file.stat().st_size for file in sorted(beside.iterdir())},
                "checksums": {file.name: checksum_of(file) for file in sorted(beside.iterdir())},
            }
            state["checksum"] = _checksum(state)
            write_json(beside / STATE, state)
        others = [path for path in checkpoints(output_dir) if path != folder]
        for old in others[: max(len(others) + 1 - limit, 0)] if limit else []:
            shutil.rmtree(old, ignore_errors=True)

    return _on_main(write)


def load_checkpoint(folder: Path, training: Training) -> list[dict[str, Any]]:
    """Bring a run to where a checkpoint was written, this rank's random states included. A collective under ZeRO.

    Where the run had another number of processes, what they would have drawn is nobody's any more: the random states of
    all are set anew, from the seed and the step.

    Args:
        folder: found by `find_checkpoint` and accepted by `read_state`.
        training: built as for a new run.

    Returns:
        What the ranks gave to `save_checkpoint` as `of_rank`.

    Raises:
        UsageError: weights or queues of another model, or a file that is not what its name says.
    """
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    try:
        load_fp32_state_dict(training.model, _tensors(folder, "model"))
        load_optimizer_state(training.model, training.optimizer, _tensors(folder, "optimizer"))
        _load_momentum(training.momentum, {**_tensors(folder, "momentum"), **state["momentum"]})
        states = _tensors(folder, "ranks")
    except UsageError as error:
        raise UsageError(f"{folder} does not fit: {error}") from error
    forged = (LookupError, TypeError, ValueError, RuntimeError)
    with usage_errors(*forged, told=f"{folder} does not fit: its random states are no such ({{}})"):
        if len(state["ranks"]) == world_size():
            set_random_states(_of_rank(states, rank()), training.device)
        else:
            drawn_from = f"{state['order']['seed']} {state['step']} {rank()} {world_size()}"
            set_seed(int.from_bytes(hashlib.blake2b(drawn_from.encode(), digest_size=4).digest(), "big") >> 1)
        load_loss_scale_state(training.scaler, _of_rank(states, 0))  # the same on all
    barrier()
    return state["ranks"]


def _of_rank(states: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    own = f"{number}."
    return {name.removeprefix(own): value for name, value in states.items() if name.startswith(own)}


def _load_momentum(momentum: torch.nn.Module, state: dict[str, Any]) -> None:
    try:
        momentum.load_state_dict(state)
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:  # on many lines, or made up
        reason = " ".join(str(error).split())
        raise UsageError(f"the momentum encoders or queues are of another model or size: {reason}") from error


def _tensors(folder: Path, name: str) -> dict[str, Tensor]:
    with usage_errors(SafetensorError, told=f"{name}.safetensors is no safetensors file ({{}})"):
        return load_file(folder / f"{name}.safetensors")


def checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    found = [path for path in output_dir.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def remove_later_checkpoints(output_dir: Path, step: int) -> list[str]:
    """Remove what a run wrote after a step to which it went back: `last` and the limit mean the newest of one history.
    Main process only. Their names."""
    later = [path for path in checkpoints(output_dir) if int(path.name.rpartition("-")[2]) > step]
    for path in later:
        shutil.rmtree(path, ignore_errors=True)
    return [path.name for path in later]


def find_checkpoint(output_dir: Path, wanted: str) -> Path:
    """The checkpoint that `--resume_from_checkpoint` names: a folder, or `last`: the newest in the output folder, where
    there is one.

    Raises:
        UsageError: it is none, or it is damaged.
    """
    folder = Path(wanted)
    if wanted == "last":
        found = checkpoints(output_dir)
        if not found:  # a run that has none at all starts anew
            raise UsageError(
                f"{output_dir} has no checkpoint but one that a killed run was about to replace, and the first process "
                "of a run puts back: start again"
            )
        folder = found[-1]
    if not (folder / STATE).is_file():
        raise UsageError(f"{folder} is no checkpoint (it has no {STATE}): give a checkpoint-N folder, or last")
    return folder


def order_of(folder: Path) -> dict[str, Any] | None:
    """What the order of the rows of a checkpoint depends on; None where it can't be read, which `read_state` tells."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        order = read_json(folder / STATE)["order"]
        facts_of(order)
        return order
    return None


def read_state(
    folder: Path,
    order: dict[str, Any],
    flags_back: Callable[[list[Change]], str],
    manifest_changes: Callable[[dict[str, Any]], list[str]],
) -> dict[str, Any]:
    """The `state.json` of a checkpoint, once it is clear that a run may go on from it.

    Args:
        folder: the checkpoint.
        order: what the order of the rows depends on now, as `facts_of`; the checkpoint's own stands in its "order".
        flags_back: the flags that undo changes of it, for the message; an empty text if none do.
        manifest_changes: what is different now from the data of a manifest, in sentences.

    Raises:
        UsageError: the checkpoint is damaged, of another version of its format, or its rows are in another order, so
            that some would be lost or seen twice.
    """
    state = _whole_state(folder)
    made_up = (LookupError, TypeError, AttributeError)
    with usage_errors(*made_up, told=f"{folder} is damaged (the manifest of {STATE}: {{}}): {_another(folder)}"):
        data = manifest_changes(state["manifest"])
    if data:
        raise UsageError(
            f"the data is not what {folder} was trained on: {told(data)}. Bring the old data back, or start a new run "
            f"from the model in {folder.parent / 'last'}"
        )
    if changed := changes(facts_of(state["order"]), order, order):
        values = flags_back(changed)
        raise UsageError(
            f"{folder} reads its rows in another order ({told(changed)}), and rows would be lost or seen twice: "
            + (f"resume with {values}" if values else "bring the old data back")
        )
    return state


def _whole_state(folder: Path) -> dict[str, Any]:
    """The `state.json` of a checkpoint of which everything is there."""
    try:
        state = read_json(folder / STATE)
        of_format = state["format"]
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"{folder} is damaged ({STATE} can't be read): {_another(folder)}") from error
    if of_format != FORMAT:
        raise UsageError(
            f"{folder} is of format {of_format}, this version reads {FORMAT}: use the version that wrote it"
        )
    damaged = [f"{STATE} has no {name!r}" for name in ENTRIES if name not in state]
    damaged += [
        f"{name!r} of {STATE} is a {type(state[name]).__name__}"
        for name, kind in _KINDS.items()
        if name in state and not isinstance(state[name], kind)
    ]
    if damaged:
        raise UsageError(f"{folder} is damaged ({'; '.join(damaged)}): {_another(folder)}")
    if state.get("checksum", _checksum(state)) != _checksum(state):
        damaged = [f"the checksum of {STATE} is another"]
    damaged += _damage(folder, state)
    if damaged:
        raise UsageError(f"{folder} is damaged ({'; '.join(damaged)}): {_another(folder)}")
    return state


def _damage(folder: Path, state: dict[str, Any]) -> list[str]:
    """What is wrong with the other files of a checkpoint. Those of version 0.1 have no checksums."""
    sizes = {name: _size(folder / name) for name in state.get("files", {})}
    damaged = [
        f"{name} has {sizes[name]:,} bytes instead of {size:,}"
        for name, size in state.get("files", {}).items()
        if sizes[name] != size
    ]
    if damaged:
        return damaged
    return [
        f"the checksum of {name} is another"
        for name, expected in state.get("checksums", {}).items()
        if checksum_of(folder / name) != expected
    ]


def _checksum(state: dict[str, Any]) -> str:
    content = json.dumps({name: value for name, value in state.items() if name != "checksum"}, sort_keys=True)
    return f"{zlib.crc32(content.encode()):08x}"


def _another(folder: Path) -> str:
    """Where to go on instead: the newest checkpoint before a damaged one."""
    number = folder.name.rpartition("-")[2]
    older = [path for path in checkpoints(folder.parent) if number.isdecimal() and int(path.name[11:]) < int(number)]
    if older:
        return f"go on from the one before it, --resume_from_checkpoint {older[-1]}"
    return "resume from another checkpoint"


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0


__all__ = [
    "Progress",
    "Training",
    "checkpoints",
    "find_checkpoint",
    "load_checkpoint",
    "order_of",
    "random_states",
    "read_state",
    "remove_later_checkpoints",
    "save_checkpoint",
    "save_model",
    "save_results",
    "set_random_states",
]
