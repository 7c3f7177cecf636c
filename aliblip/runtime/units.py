"""Work cut into units that whole processes take: unit u belongs to rank u % world size.

    results = [(unit, work(unit)) for unit in own_units(count)]
    everything = gather_units("embedding", results, count)        # collective

What is computed together never depends on the number of processes, and so the results do not either.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

from aliblip.runtime.distributed import all_gather_objects, is_main, rank, world_size


def own_units(count: int) -> range:
    """The units of this rank, of `count` in all."""
    return range(rank(), count, world_size())


def gather_units(name: str, results: list[tuple[int, Any]], count: int) -> list:
    """Results of all units in the order of the units, on all ranks (collective).

    Args:
        name: of the work, for the message.
        results: (unit, result) of this rank.
        count: units of all ranks.

    Raises:
        RuntimeError: if a unit is missing or came twice.
    """
    gathered = sorted((pair for own in all_gather_objects(results) for pair in own), key=lambda pair: pair[0])
    if [unit for unit, _ in gathered] != list(range(count)):
        raise RuntimeError(f"{name}: {len(gathered)} results gathered for {count} units, some are missing or double")
    return [result for _, result in gathered]


def unit_bar(units: Iterable, total: int, name: str, shown: bool) -> Iterable:
    """The same units, with a progress bar on the terminal of the main process if it is to be `shown`."""
    shown = shown and is_main() and sys.stderr.isatty()
    return tqdm(units, total=total, desc=name, unit="unit", leave=False, disable=not shown)


__all__ = ["gather_units", "own_units", "unit_bar"]
