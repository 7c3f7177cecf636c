"""Is this the same run, data or model as before? Named facts of then and now, and what differs between them.

    if changed := changes(before, now):
        raise UsageError(f"{folder} is of other work ({told(changed)}): go on with {way_back(changed, flags)}")

Whoever keeps something to go on with keeps the facts that it depends on beside it, and decides what a change means: a
refusal, a remark, or nothing. What is compared and how it is told is the same everywhere.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from aliblip.runtime.mistakes import usage_errors

MOST_TOLD = 10


@dataclass(frozen=True)
class Change:
    """A fact that differs; None stands for one that is not there."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {_shown(self.before)}, is {_shown(self.now)}"


def changes(before: Mapping[str, Any], now: Mapping[str, Any], names: Iterable[str] | None = None) -> list[Change]:
    """The facts that differ, in the order of `names`.

    Values are compared as JSON holds them, so that a tuple or a path of now equals what a file made of it. A fact that
    one side lacks counts as None.

    Args:
        before: facts of then, as a rule read from a file.
        now: facts of now.
        names: which facts count; None: all of both sides, those of `now` first.
    """
    names = dict.fromkeys([*now, *before]) if names is None else names
    return [
        Change(name, _plain(before.get(name)), _plain(now.get(name)))
        for name in names
        if _plain(before.get(name)) != _plain(now.get(name))
    ]


def told(changed: Sequence[Change | str], most: int = MOST_TOLD) -> str:
    """Changes as the part of a sentence: at most `most` of them, and a count of the rest."""
    rest = [f"and {len(changed) - most:,} more"] if len(changed) > most else []
    return "; ".join([*map(str, changed[:most]), *rest])


def way_back(changed: Sequence[Change], flags: Mapping[str, str]) -> str:
    """The flags that bring the facts of then back: `--seed 42 --shuffle_window 4096`.

    Args:
        changed: of `changes`.
        flags: by the name of a fact, what sets it, such as `--seed`. Facts that nothing sets are left out.

    Returns:
        The flags with their values; an empty text if no flag helps.
    """
    return " ".join(
        f"{flags[change.name]} {_shown(change.before)}"
        for change in changed
        if change.name in flags and change.before is not None
    )


def weights_of(folder: Path) -> str | None:
    """What tells the weights in a model's folder from others: changes with any bit, name or shape, and not with how
    they are divided among files. None: there are none. Takes a second for four gigabytes.

    Raises:
        UsageError: a file can't be read.
    """
    sums = {}
    for path in folder.glob("model*.safetensors"):
        told = f"{path} can't be read ({{}}): save the model again"
        with usage_errors(OSError, SafetensorError, told=told), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (not a dict)
                tensor = file.get_tensor(name)
                values = tensor.reshape(-1).view(torch.uint8).numpy()
                sums[name] = f"{name} {tensor.dtype} {tuple(tensor.shape)} {zlib.crc32(values)}"
    text = "\n".join(sums[name] for name in sorted(sums))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest() if sums else None


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _shown(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


__all__ = ["Change", "changes", "told", "way_back", "weights_of"]
