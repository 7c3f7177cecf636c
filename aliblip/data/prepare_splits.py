"""Which split a row belongs to, so that no group, a product with all of its duplicates, stands on two sides.

    sides = by_product(keys, {"validation": 0.05, "test": 0.05}, seed=0)     # keys (n,) int64, equal within a group
    sides.names, sides.side                                                  # side (n,): the place of a row's split

A side of -1 is a row that is left out, for `sides.reasons[row]`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timezone
from typing import Any

import numpy as np

from aliblip.data.columns import listed
from aliblip.data.splits import TRAIN, WORDS
from aliblip.runtime.mistakes import UsageError

__all__ = ["Sides", "as_named", "by_product", "by_time", "split_of_value", "time_of_value"]

# From the most to the least protected: what of a group stands in an earlier one is kept out of the later.
_PROTECTED = ("test", "validation")
_NAME = re.compile(r"\w+(\.\w+)*")


@dataclass
class Sides:
    """The split of each row.

    Attributes:
        names: of the splits, train first.
        side: (n,) int16, -1 for a row that is left out.
        reasons: by row, why.
        told: what was done, for people.
    """

    names: list[str]
    side: np.ndarray
    reasons: dict[int, str] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)


def by_product(keys: np.ndarray, shares: Mapping[str, float], seed: int) -> Sides:
    """Draw splits by group. What a group draws depends on its key and the seed alone: where the catalogue grows, it
    stays on its side.

    Args:
        keys: (n,) int64.
        shares: of the splits that are held out; the rest is train. Large groups make them inexact.
        seed: of the draw.

    Raises:
        UsageError: a split stays empty.
    """
    unique, inverse = np.unique(keys, return_inverse=True)
    draws = np.fromiter((_draw(int(key), seed) for key in unique), np.float64, len(unique))
    names, edges = [TRAIN, *shares], np.cumsum(list(shares.values()))
    side = np.searchsorted(edges, draws, side="right")  # those beyond the last edge are train
    side = np.where(side == len(shares), 0, side + 1)[inverse.reshape(-1)].astype(np.int16)
    _refuse_empty(names, side, len(unique))
    return Sides(names, side, told=["splits are drawn by product and duplicates"])


def _draw(key: int, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed} {key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def by_time(keys: np.ndarray, times: np.ndarray, shares: Mapping[str, float]) -> Sides:
    """The newest groups are held out: the last split of `shares` has the newest of all.

    A group is as old as its oldest row, so that nothing of a held out product was known before.

    Args:
        keys: (n,) int64.
        times: (n,) float64; NaN where there is none, which leaves the row out, and with it nothing else.
        shares: of the rows.

    Raises:
        UsageError: no row has a time, or a split stays empty.
    """
    names, there = [TRAIN, *shares], ~np.isnan(times)
    if not there.any():
        raise UsageError("--split_by time: no row has a time that can be read: give another --split_column")
    unique, inverse, counts = np.unique(keys[there], return_inverse=True, return_counts=True)
    oldest = np.full(len(unique), np.inf)
    np.minimum.at(oldest, inverse.reshape(-1), times[there])
    order = np.lexsort((unique, oldest))
    # Of a group the share of the rows that are older, to its middle.
    place = np.empty(len(unique))
    place[order] = (np.cumsum(counts[order]) - counts[order] / 2) / counts.sum()
    edges = 1 - np.cumsum(list(shares.values())[::-1])[::-1]
    group_side = np.searchsorted(edges, place, side="right")
    side = np.full(len(keys), -1, np.int16)
    side[there] = group_side[inverse.reshape(-1)]
    _refuse_empty(names, side, len(unique))
    reasons = dict.fromkeys(np.flatnonzero(~there).tolist(), "the row has no time that can be read")
    first = [np.min(oldest[group_side == number]) for number in range(1, len(names))]
    begins = ", ".join(f"{name} from {_day(value)}" for name, value in zip(names[1:], first, strict=True))
    return Sides(names, side, reasons, [f"splits by time: {begins}, a product by its oldest row"])


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).date().isoformat()


def as_named(keys: np.ndarray, named: Sequence[str | None], leaks: str) -> Sides:
    """Splits as the data names them.

    Args:
        keys: (n,) int64.
        named: (n,) of each row; None leaves it out.
        leaks: what happens to a group that is named for several: "reject" its rows of all but the most protected of
            these (test, then validation, then others by name, then train), or "train", all of them go there.
    """
    names = [TRAIN, *sorted({name for name in named if name is not None} - {TRAIN})]
    place = {name: number for number, name in enumerate(names)}
    side = np.array([-1 if name is None else place[name] for name in named], np.int16)
    reasons = dict.fromkeys(np.flatnonzero(side < 0).tolist(), "the row names no split")
    protected = [*(name for name in _PROTECTED if name in place), *(n for n in names[1:] if n not in _PROTECTED), TRAIN]
    rank = np.array([protected.index(name) for name in names])
    there = np.flatnonzero(side >= 0)
    unique, inverse = np.unique(keys[there], return_inverse=True)
    inverse = inverse.reshape(-1)
    best, worst = np.full(len(unique), len(names)), np.full(len(unique), -1)
    np.minimum.at(best, inverse, rank[side[there]])
    np.maximum.at(worst, inverse, rank[side[there]])
    divided = int((best != worst).sum())
    told = []
    leaking = there[rank[side[there]] != best[inverse]]
    if divided and leaks == "train":
        moved = there[(best != worst)[inverse] & (side[there] != 0)]
        side[moved] = 0
        told.append(f"{divided:,} groups stood in several splits: {len(moved):,} rows are moved to train")
    elif divided:
        places = np.flatnonzero(rank[side[there]] != best[inverse])
        for row, group in zip(leaking.tolist(), inverse[places].tolist(), strict=True):
            reasons[row] = f"the product, or a duplicate of the photo, is in the split '{protected[best[group]]}'"
        side[leaking] = -1
        told.append(f"{divided:,} groups stood in several splits: {len(leaking):,} rows that would leak are rejected")
    return Sides(names, side, reasons, told)


def split_of_value(value: Any) -> str | None:
    """The split that a cell names; None if it names none.

    Raises:
        UsageError: it can't be the name of a split.
    """
    text = "" if value is None else str(value).strip()
    if not text:
        return None
    known = next((split for split, words in WORDS.items() if text.lower() in words), text)
    if not _NAME.fullmatch(known) or len(known) > 40:
        raise UsageError(f"--split_column names '{text[:60]}', which can't be a split: expected are {listed(WORDS)}")
    return known


def time_of_value(value: Any) -> float:
    """Seconds since 1970 of a date, a time, a number of seconds or milliseconds, or such a text; NaN if it is none."""
    if isinstance(value, str):
        text = value.strip()
        try:
            value = float(text)
        except ValueError:
            try:
                value = datetime.fromisoformat(text.replace("Z", "+00:00"))
            except ValueError:
                return float("nan")
        else:
            if re.fullmatch(r"(19|20)\d{6}", text):  # a day such as 20240131
                return time_of_value(f"{text[:4]}-{text[4:6]}-{text[6:]}")
            if re.fullmatch(r"(19|20)\d\d", text):
                return time_of_value(f"{text}-01-01")
    if isinstance(value, bool) or value is None:
        return float("nan")
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
    if isinstance(value, date):
        return datetime(value.year, value.month, value.day, tzinfo=timezone.utc).timestamp()
    if isinstance(value, (int, float)):
        return value / 1000 if abs(value) > 1e11 else float(value)
    return float("nan")


def _refuse_empty(names: Sequence[str], side: np.ndarray, groups: int) -> None:
    empty = [name for number, name in enumerate(names) if not (side == number).any()]
    if empty:
        raise UsageError(
            f"the split '{empty[0]}' stays empty: {groups:,} groups of products and duplicates can't be split by these "
            "--split_shares; give a larger share"
        )
