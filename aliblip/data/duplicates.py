"""Photos that are the same but for what happens to photos on the way: size, compression, crop, mirror, watermark.

    index = Index.of(thumbs)                            # thumbs (n, 48, 48, 3) uint8
    pairs = index.pairs(0, n, similarity=0.9)          # any run of photos against all

Three steps. *Candidates* are the nearest neighbours of a photo, of its parts, and of their mirror images, by a
descriptor that is little more than the blurred photo. Each is *aligned*: the part of the one that shows what the other
shows is moved until their brightness agrees best. Then they are *compared* place by place, in structure and colour (the
index of structural similarity, SSIM, of each colour, the worst of which counts), without the fifth of the places that
agrees least, so that a watermark hides no duplicate. What a catalogue is full of, products of one outline on white, has
like hashes and like descriptors, and differs place by place.

Legend: n photos, m queries, p pairs, d numbers of a descriptor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from aliblip.data.prepare_photos import THUMB_SIDE

__all__ = ["SIMILARITY", "Index", "Pairs", "exact_pairs", "groups_of", "joined_groups"]

# From which two photos are duplicates. 1 is the same picture; products of one outline have about 0.5.
SIMILARITY = 0.9
# Parts of a photo that are looked for beside the whole, as (top, left, side) in shares of it.
VIEWS = (
    (0.0, 0.0, 1.0),
    (0.03, 0.03, 0.94),
    *((0.07, 0.07, 0.86), (0.0, 0.0, 0.86), (0.0, 0.14, 0.86), (0.14, 0.0, 0.86), (0.14, 0.14, 0.86)),
    *((0.11, 0.11, 0.78), (0.0, 0.0, 0.78), (0.0, 0.22, 0.78), (0.22, 0.0, 0.78), (0.22, 0.22, 0.78)),
)
SMALLEST_PART = 0.7
# A photo whose brightness varies less than this is blank, and like every other blank one.
BLANK = 2.0
# Of the descriptor: side of the blurred photo, and how many of its principal components are kept.
_BLUR, _WIDTH = 10, 64
# Candidates of a photo, and how near they must be.
_NEIGHBOURS, _NEAR = 8, 0.7
# Photos of a list of the index, lists that are searched, photos from which on there are several lists.
_LIST, _PROBES, _SEVERAL = 1024, 6, 8192
_SAMPLE = 20_000
# Side at which brightness is aligned; the steps, in shares of the side, and what must agree by then.
_ALIGNED = 16
_STEPS = ((1 / 16, 0.75), (1 / 32, 0.82), (1 / 64, 0.86), (1 / 64, 0.88), (1 / 128, 0.9), (1 / 128, 0.9))
# (top, left, height, width) of a move.
_MOVES = (
    *((1, 0, 0, 0), (-1, 0, 0, 0), (0, 1, 0, 0), (0, -1, 0, 0), (-0.5, -0.5, 1, 1), (0.5, 0.5, -1, -1)),
    *((0, 0, 1, 0), (0, 0, -1, 0), (0, 0, 0, 1), (0, 0, 0, -1)),
)
# Of the comparison: side and step of its places in pixels of the thumb; what is left out.
_PLACE, _STRIDE, _LEFT_OUT = 8, 4, 0.2
# Below these a place holds no structure, or the compression's; a difference of colour that counts.
_FLAT, _COLOUR = 60.0, 25.0
# From which on a place has another hue, which no watermark gives it, and what the share of such places counts.
_HUE, _HUE_WEIGHT = 20.0, 3.0
_AT_ONCE = 512


# Makes an array of a shape and a type.
Empty = Callable[[tuple[int, ...], Any], np.ndarray]


@dataclass(frozen=True)
class Pairs:
    """Pairs of photos, each once.

    Attributes:
        first, second: (p,) int64, first < second.
        similarity: (p,) float32; 1 for equal files.
    """

    first: np.ndarray
    second: np.ndarray
    similarity: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    @classmethod
    def of(cls, first: np.ndarray, second: np.ndarray, similarity: np.ndarray) -> Pairs:
        """Of pairs that may come several times, and in both directions."""
        first, second = np.minimum(first, second), np.maximum(first, second)
        order = np.lexsort((-similarity, second, first))
        first, second, similarity = first[order], second[order], similarity[order]
        fresh = np.ones(len(first), bool)
        fresh[1:] = (first[1:] != first[:-1]) | (second[1:] != second[:-1])
        return cls(first[fresh].astype(np.int64), second[fresh].astype(np.int64), similarity[fresh].astype(np.float32))


def exact_pairs(keys: np.ndarray) -> Pairs:
    """Each item with the first one of equal key. `keys` (n,) of any type that sorts."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    second = np.arange(len(keys))
    first = first[inverse.reshape(-1)]
    chosen = first != second
    return Pairs(first[chosen], second[chosen], np.ones(int(chosen.sum()), np.float32))


def groups_of(count: int, *pairs: Pairs) -> np.ndarray:
    """(count,) int64: the lowest number among those that an item hangs together with."""
    parent: dict[int, int] = {}  # of those that have one

    def root(item: int) -> int:
        while (above := parent.get(item)) is not None:
            if (higher := parent.get(above)) is not None:
                parent[item] = higher
            item = above
        return item

    for found in pairs:
        for first, second in zip(found.first.tolist(), found.second.tolist(), strict=True):
            a, b = root(first), root(second)
            if a != b:
                parent[max(a, b)] = min(a, b)
    groups = np.arange(count, dtype=np.int64)
    for item in parent:
        groups[item] = root(item)
    return groups


def joined_groups(thumbs: np.ndarray, pairs: Pairs, similarity: float) -> Pairs:
    """The pairs, and those between groups that are one: a photo is compared with the few that are nearest to it, which
    in a large group are some of its own. So one photo of each such group is compared again, until nothing new comes.

    Args:
        thumbs: (n, side, side, 3) uint8 of all photos.
        similarity: from which two photos are a pair.
    """
    rounds = [pairs]
    while True:
        both = np.concatenate([np.concatenate([one.first, one.second]) for one in rounds])
        crowded = np.bincount(both, minlength=len(thumbs)) >= _NEIGHBOURS
        photos = np.unique(groups_of(len(thumbs), *rounds)[crowded])
        if len(photos) < 2:
            break
        more = Index.of(np.asarray(thumbs[photos])).pairs(0, len(photos), similarity)
        if not len(more):
            break
        rounds.append(Pairs.of(photos[more.first], photos[more.second], more.similarity))
    first, second, values = (
        np.concatenate([getattr(one, name) for one in rounds]) for name in ("first", "second", "similarity")
    )
    return Pairs.of(first, second, values)


# --- candidates -------------------------------------------------------------------------------------------------------


class Index:
    """The descriptors of photos, in lists of such that are alike, and what is needed to search them.

    Attributes:
        thumbs: (n, `THUMB_SIDE`, `THUMB_SIDE`, 3) uint8; may lie in a mapped file.
        mean, axes: (300,) and (300, d) float32, from a blurred photo to its descriptor.
        centres: (lists, d) float32.
        order: (k,) int64, the photos by list, without blank ones.
        edges: (lists + 1,) int64, where each list begins in `order`.
        descriptors: (k, d) float32, in that order.
    """

    _ARRAYS = ("thumbs", "mean", "axes", "centres", "order", "edges", "descriptors")

    def __init__(self, **arrays: np.ndarray):
        for name in self._ARRAYS:
            setattr(self, name, arrays[name])

    def __len__(self) -> int:
        return len(self.thumbs)

    @classmethod
    @threadpool_limits.wrap(limits=1)  # so that nothing depends on the number of cores
    def of(cls, thumbs: np.ndarray, empty: Empty = np.empty) -> Index:
        """Look at all photos once.

        Args:
            empty: makes the arrays that have a descriptor of each photo, 256 bytes; such as in mapped files.
        """
        count = len(thumbs)
        chosen = np.linspace(0, max(count - 1, 0), min(count, _SAMPLE)).astype(np.int64)
        sample = np.concatenate([_blurred(thumbs[piece]) for piece in _pieces(chosen)] or [_blurred(thumbs)])
        mean = sample.mean(0) if len(sample) else np.zeros(_BLUR * _BLUR * 3, np.float32)
        axes = np.linalg.eigh((sample - mean).T @ (sample - mean))[1][:, ::-1][:, :_WIDTH].astype(np.float32)
        descriptors, is_blank = empty((count, _WIDTH), np.float32), np.empty(count, bool)
        for start in range(0, count, 4096):
            piece = thumbs[start : start + 4096]
            descriptors[start : start + 4096] = _unit((_blurred(piece) - mean) @ axes)
            is_blank[start : start + 4096] = _grey(piece).std(axis=(1, 2)) < BLANK
        order = np.flatnonzero(~is_blank)
        centres = _centres(descriptors, order, 1 if len(order) < _SEVERAL else len(order) // _LIST)
        lists = np.empty(len(order), np.int64)
        for start in range(0, len(order), 4096):
            lists[start : start + 4096] = (descriptors[order[start : start + 4096]] @ centres.T).argmax(1)
        by_list = np.argsort(lists, kind="stable")
        edges = np.searchsorted(lists[by_list], np.arange(len(centres) + 1))
        order = order[by_list]
        sorted_ = empty((len(order), _WIDTH), np.float32)
        for start in range(0, len(order), 4096):
            sorted_[start : start + 4096] = descriptors[order[start : start + 4096]]
        arrays = {"thumbs": thumbs, "mean": mean, "axes": axes, "centres": centres, "order": order, "edges": edges}
        return cls(**arrays, descriptors=sorted_)

    def save(self, folder: Path) -> None:
        """Write all arrays but the thumbs, whose file is `thumbs.npy` there."""
        for name in self._ARRAYS[1:]:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @classmethod
    def load(cls, folder: Path) -> Index:
        """What `save` wrote; the arrays stay on the disk."""
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in cls._ARRAYS})

    @threadpool_limits.wrap(limits=1)  # the workers are as many as there are cores
    def pairs(self, start: int, stop: int, similarity: float = SIMILARITY) -> Pairs:
        """The duplicates of the photos [start, stop) among all."""
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for begin in range(start, stop, _AT_ONCE):
            photos, others, part, mirrored = self._candidates(np.arange(begin, min(begin + _AT_ONCE, stop)))
            for piece in range(0, len(photos), _AT_ONCE):
                chosen = slice(piece, piece + _AT_ONCE)
                found.append(_compared(self.thumbs, photos[chosen], others[chosen], part[chosen], mirrored[chosen]))
        if not found:
            return Pairs.of(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
        first, second, value = (np.concatenate(column) for column in zip(*found, strict=True))
        good = value >= similarity
        return Pairs.of(first[good], second[good], value[good])

    def _candidates(self, photos: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """(photos, others, (p, 4) the part of the photo that the other may show, whether mirrored), the nearest few of
        each photo."""
        thumbs = self.thumbs[photos]
        photos = photos[_grey(thumbs).std(axis=(1, 2)) >= BLANK]
        thumbs = self.thumbs[photos]
        if not len(photos):
            return photos, photos, np.zeros((0, 4)), np.zeros(0, bool)
        images = _Integral(thumbs)
        numbers = np.arange(len(photos))
        parts, flips, queries = [], [], []
        for top, left, side in VIEWS:
            for mirrored in (False, True):
                part = np.tile([top, left, side, side], (len(photos), 1)) * THUMB_SIDE
                is_mirrored = np.full(len(photos), mirrored)
                blurred = _normal(images.parts(numbers, part, is_mirrored, _BLUR))
                queries.append(_unit((blurred - self.mean) @ self.axes))
                parts.append(part)
                flips.append(is_mirrored)
        others, near = self._nearest(np.concatenate(queries))
        owner = np.tile(photos, len(queries))[:, None]
        near = np.where(others == owner, -1.0, near)
        # Of a photo, each other once, in the view that is nearest; and of these the nearest.
        flat = np.flatnonzero(near.reshape(-1) >= _NEAR)
        query, photo, other = flat // others.shape[1], np.broadcast_to(owner, others.shape).reshape(-1)[flat], None
        other, value = others.reshape(-1)[flat], near.reshape(-1)[flat]
        order = np.lexsort((-value, other, photo))
        fresh = np.ones(len(order), bool)
        fresh[1:] = (np.diff(photo[order]) != 0) | (np.diff(other[order]) != 0)
        order = order[fresh]
        order = order[np.lexsort((-value[order], photo[order]))]
        ranks = np.arange(len(order)) - np.searchsorted(photo[order], photo[order])
        order = order[ranks < _NEIGHBOURS]
        part, mirrored = np.concatenate(parts)[query[order]], np.concatenate(flips)[query[order]]
        return photo[order], other[order], part, mirrored

    def _nearest(self, queries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(m, k) photos and their nearness, of the lists that a query is nearest to; -1 where there are fewer."""
        probes = min(_PROBES, len(self.centres))
        # In small pieces, since there are as many lists as thousands of photos; copied, so that the rest is let go.
        lists = np.concatenate(
            [
                np.argsort(-(piece @ self.centres.T), axis=1, kind="stable")[:, :probes].copy()
                for piece in _pieces(queries, 1024)
            ]
        )
        kept = _NEIGHBOURS + 1
        photos = np.full((len(queries), probes, kept), -1, np.int64)
        near = np.full((len(queries), probes, kept), -1.0, np.float32)
        for number in np.unique(lists):
            begin, end = int(self.edges[number]), int(self.edges[number + 1])
            if begin == end:
                continue
            members = np.asarray(self.descriptors[begin:end])
            query, probe = np.nonzero(lists == number)
            for start in range(0, len(query), 1024):
                one, at = query[start : start + 1024], probe[start : start + 1024]
                values = queries[one] @ members.T
                count = min(kept, end - begin)
                best = np.argpartition(-values, count - 1, axis=1)[:, :count]
                photos[one, at, :count] = self.order[begin + best]
                near[one, at, :count] = np.take_along_axis(values, best, 1)
        photos, near = photos.reshape(len(queries), -1), near.reshape(len(queries), -1)
        best = np.argsort(-near, axis=1, kind="stable")[:, :kept]
        return np.take_along_axis(photos, best, 1), np.take_along_axis(near, best, 1)


def _centres(descriptors: np.ndarray, photos: np.ndarray, count: int) -> np.ndarray:
    """(count, d): the centres of lists, by k-means over some of the photos."""
    if count == 1 or not len(photos):
        return np.zeros((1, _WIDTH), np.float32)
    chosen = np.linspace(0, len(photos) - 1, min(len(photos), 48 * count)).astype(np.int64)
    sample = descriptors[photos[chosen]]
    centres = sample[np.linspace(0, len(sample) - 1, count).astype(np.int64)].copy()
    for _ in range(8):
        lists = np.concatenate([(piece @ centres.T).argmax(1) for piece in _pieces(sample)])
        sums = np.zeros_like(centres)
        np.add.at(sums, lists, sample)
        filled = np.bincount(lists, minlength=count) > 0
        centres[filled] = _unit(sums[filled])
    return centres


def _pieces(rows: np.ndarray, size: int = 4096) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def _grey(thumbs: np.ndarray) -> np.ndarray:
    return thumbs.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def _blurred(thumbs: np.ndarray) -> np.ndarray:
    """(n, 300) float32: whole photos, blurred and free of brightness and contrast."""
    numbers = np.arange(len(thumbs))
    pieces = []
    for start in range(0, len(thumbs), 1024):
        piece = np.asarray(thumbs[start : start + 1024])
        whole = np.tile([0.0, 0.0, THUMB_SIDE, THUMB_SIDE], (len(piece), 1))
        pieces.append(_normal(_Integral(piece).parts(numbers[: len(piece)], whole, np.zeros(len(piece), bool), _BLUR)))
    return np.concatenate(pieces) if pieces else np.zeros((0, _BLUR * _BLUR * 3), np.float32)


def _normal(values: np.ndarray) -> np.ndarray:
    """(p, x) float32: rows without their mean, of length one."""
    values = values.reshape(len(values), math.prod(values.shape[1:]))
    return _unit(values - values.mean(1, keepdims=True))


def _unit(values: np.ndarray) -> np.ndarray:
    return (values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)).astype(np.float32)


# --- alignment and comparison -----------------------------------------------------------------------------------------


class _Integral:
    """Photos whose parts of any size and place can be had at any resolution, by areas.

    Args:
        photos: (k, side, side, channels).
    """

    def __init__(self, photos: np.ndarray):
        count, self.side, _, channels = photos.shape
        self._sums = np.zeros((count, self.side + 1, self.side + 1, channels))
        self._sums[:, 1:, 1:] = photos.astype(np.float64).cumsum(1).cumsum(2)

    def parts(self, numbers: np.ndarray, part: np.ndarray, mirrored: np.ndarray, side: int) -> np.ndarray:
        """(p, side, side, channels) float32.

        Args:
            numbers: (p,) of the photos.
            part: (p, 4), top, left, height and width in pixels, which need not be whole.
            mirrored: (p,) bool, left and right exchanged.
        """
        steps = np.linspace(0, 1, side + 1)
        rows, columns = part[:, :1] + part[:, 2:3] * steps, part[:, 1:2] + part[:, 3:] * steps
        columns = np.where(mirrored[:, None], columns[:, ::-1], columns)
        top, left = (np.clip(np.floor(edges), 0, self.side - 1).astype(np.int64) for edges in (rows, columns))
        down, across = (rows - top)[:, :, None, None], (columns - left)[:, None, :, None]
        sums, number, top, left = self._sums, numbers[:, None, None], top[:, :, None], left[:, None, :]
        upper = sums[number, top, left] * (1 - across) + sums[number, top, left + 1] * across
        lower = sums[number, top + 1, left] * (1 - across) + sums[number, top + 1, left + 1] * across
        corners = upper * (1 - down) + lower * down
        cells = corners[:, 1:, 1:] - corners[:, :-1, 1:] - corners[:, 1:, :-1] + corners[:, :-1, :-1]
        area = part[:, 2] * part[:, 3] / side**2 * np.where(mirrored, -1, 1)
        return (cells / area[:, None, None, None]).astype(np.float32)


def _compared(
    thumbs: np.ndarray, photos: np.ndarray, others: np.ndarray, part: np.ndarray, mirrored: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(photos, others, similarity) of the candidates that can be aligned."""
    unique, number = np.unique(photos, return_inverse=True)
    number, pictures = number.reshape(-1), np.asarray(thumbs[unique])
    wanted = np.asarray(thumbs[others])
    live, part = _aligned(_grey(pictures)[..., None], number, _grey(wanted)[..., None], part, mirrored)
    shown = _Integral(pictures).parts(number[live], part[live], mirrored[live], THUMB_SIDE)
    return photos[live], others[live], _similarity(shown, wanted[live].astype(np.float32))


def _aligned(
    pictures: np.ndarray, number: np.ndarray, wanted: np.ndarray, part: np.ndarray, mirrored: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Move the parts until they agree best with what is wanted. Returns the pairs that agree, and all parts."""
    images, part = _Integral(pictures), part.copy()
    whole = np.tile([0.0, 0.0, THUMB_SIDE, THUMB_SIDE], (len(wanted), 1))
    goal = _normal(_Integral(wanted).parts(np.arange(len(wanted)), whole, np.zeros(len(wanted), bool), _ALIGNED))

    def agreement(pairs: np.ndarray, parts: np.ndarray) -> np.ndarray:
        seen = _normal(images.parts(number[pairs], parts, mirrored[pairs], _ALIGNED))
        return (seen * goal[pairs]).sum(1)

    live = np.arange(len(wanted))
    best = agreement(live, part)
    for step, enough in _STEPS:
        live = live[best[live] >= enough]
        for move in _MOVES:
            moved = part[live] + np.array(move) * (step * THUMB_SIDE)
            moved[:, 2:] = np.clip(moved[:, 2:], SMALLEST_PART * THUMB_SIDE, THUMB_SIDE)
            moved[:, :2] = np.minimum(np.clip(moved[:, :2], 0, None), THUMB_SIDE - moved[:, 2:])
            value = agreement(live, moved)
            better = value > best[live]
            best[live[better]], part[live[better]] = value[better], moved[better]
    return live[best[live] >= _STEPS[-1][1]], part


def _similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(p,) float32: how alike photos of (p, `THUMB_SIDE`, `THUMB_SIDE`, 3) are place by place."""
    result = np.zeros(len(first), np.float32)
    for start in range(0, len(first), 256):
        a, b = _places(first[start : start + 256]), _places(second[start : start + 256])
        mean_a, mean_b = a.mean(-1), b.mean(-1)
        spread_a, spread_b = a.var(-1), b.var(-1)
        common = (a * b).mean(-1) - mean_a * mean_b
        structure = (2 * common + _FLAT) / (spread_a + spread_b + _FLAT)
        colour = np.exp(-(((mean_a - mean_b) / _COLOUR) ** 2))
        value = (structure * colour).min(-1)  # (p, places)
        # White beside white says nothing.
        counts = ((spread_a + spread_b).sum(-1) > _FLAT) | (np.abs(mean_a - mean_b).max(-1) > 10)
        hue_a, hue_b = (mean - mean.mean(-1, keepdims=True) for mean in (mean_a, mean_b))
        other_hue = (np.abs(hue_a - hue_b).max(-1) > _HUE).mean(1)
        for pair in range(len(value)):
            told = np.sort(value[pair][counts[pair]])
            if len(told):
                result[start + pair] = told[int(len(told) * _LEFT_OUT) :].mean() - _HUE_WEIGHT * other_hue[pair]
    return result


def _places(photos: np.ndarray) -> np.ndarray:
    """(p, places, 3, pixels): overlapping squares of the photos."""
    squares = np.lib.stride_tricks.sliding_window_view(photos, (_PLACE, _PLACE), axis=(1, 2))
    squares = squares[:, ::_STRIDE, ::_STRIDE]  # (p, rows, columns, 3, y, x)
    return squares.reshape(len(photos), -1, 3, _PLACE * _PLACE)
