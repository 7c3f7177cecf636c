"""Exact search of a gallery's table, the reference for every index: all vectors, kept in memory or read in batches.

Of equal scores the lower position comes first, and equal vectors have equal scores: what is multiplied together is
always a multiple of 64 rows, since the last bits of a product depend on where in a remainder its row stands.

What a query takes is the time to read all vectors from memory. So those of a larger table are kept as bytes (codes),
which are a quarter of them and which processors of today multiply whole. Scores by codes are near the true ones, by no
more than a bound that is known. Of the rows that are best by codes the true scores are computed, from the table; the
search is done when no other row can reach the k-th of them, and otherwise takes more rows. So the results are those of
the vectors themselves.

A table changes by adding pieces (Lance's fragments) and by crossing out rows of others: a new version costs the reading
of its new pieces.

Legend: Q queries, E width, n rows of a chunk, k results of a query, m rows that are best by codes.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from aliblip.retrieval.plan import available_memory
from aliblip.retrieval.tables import VECTOR, is_address
from retrieval_aliblip import GALLERY_CHUNK, QUERY_BLOCK, order_by_score, running_top_k

__all__ = ["FEW_CHOSEN", "MEMORY_SHARE", "SMALL_BYTES", "VectorCache", "rows_left", "search_exactly"]

# Vectors of a table that is not larger are kept as they are, and compared in less time than reading a row takes.
SMALL_BYTES = 2**25
# Vectors of a table that is not larger are read in a second or two.
QUICKLY_READ_BYTES = 2**31
# Of the free memory, for the vectors or codes of one gallery.
MEMORY_SHARE = 0.25
_MULTIPLE = 64
# A piece with fewer of its rows left is copied without the others.
_FEWEST_KEPT = 0.75
# A smaller share of all rows is copied in less time than the others are compared.
FEW_CHOSEN = 0.25
_CODES_CHUNK = 65536
# So many filters are remembered with what they leave: the next query, or the next page of results, has the same.
_FILTERS = 16
_LARGEST_CODE = 127
# Rows whose true scores are computed at first, as a multiple of k, and how many times as many at the next try.
_CANDIDATES, _FEWEST_CANDIDATES, _MORE = 4, 64, 8
_ROWS_AT_ONCE = 1000

Found = list[tuple[np.ndarray, np.ndarray]]


# --- what is kept -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """The vectors of one piece of a table, or their codes, or both.

    Attributes:
        files: that the piece is made of: other files, other vectors.
        positions: (n,) int64.
        kept: (n,) bool, the rows that a newer version has not crossed out; None: all.
        vectors: (n, E) fp32.
        codes, scales: (n, E) int8 and (n,) fp32, of which the product is near the vectors.
        error: the largest distance of a vector from that product.
        norm: the largest length of a vector.
    """

    files: tuple[str, ...]
    positions: np.ndarray
    vectors: Tensor | None
    codes: Tensor | None
    scales: Tensor | None
    error: float = 0.0
    norm: float = 0.0
    kept: np.ndarray | None = None

    def without_others(self, positions: np.ndarray) -> Piece | None:
        """The piece without rows that are not among these positions; None: it has not all of them."""
        kept = np.isin(self.positions, positions)
        if kept.sum() < len(positions):
            return None
        if kept.all():
            return replace(self, kept=None)
        if self.codes is not None and kept.mean() > _FEWEST_KEPT:
            return replace(self, kept=kept)
        return self.only(kept)

    def only(self, rows: np.ndarray) -> Piece:
        """A copy of some rows, which are (n,) bool."""
        numbers = torch.from_numpy(np.flatnonzero(rows))
        parts = {name: getattr(self, name) for name in ("vectors", "codes", "scales")}
        some = {name: None if part is None else part.index_select(0, numbers) for name, part in parts.items()}
        return replace(self, positions=self.positions[rows], kept=None, **some)

    def chosen(self, allowed: np.ndarray) -> np.ndarray:
        """(n,) bool, the kept rows at allowed positions."""
        if self._is_range:  # as a table is written; no row has to be looked at then
            found, places = np.zeros(len(self.positions), bool), allowed - self.positions[0]
            found[places[(places >= 0) & (places < len(found))]] = True
        else:
            found = np.isin(self.positions, allowed)
        return found if self.kept is None else found & self.kept

    @cached_property
    def _is_range(self) -> bool:
        """Whether the positions are some number, the next one, and so on."""
        return len(self.positions) > 0 and bool((np.diff(self.positions) == 1).all())

    @property
    def size(self) -> int:
        """Bytes of its vectors and codes."""
        return sum(part.nbytes for part in (self.vectors, self.codes) if part is not None)


@dataclass(frozen=True)
class Left:
    """What a filter leaves of a table.

    Attributes:
        rows: how many.
        pieces: where they are searched among; None: not yet known.
        chosen: (n,) bool of each piece, its rows that are left; None: all of it.
    """

    rows: int
    pieces: tuple[Piece, ...] | None = None
    chosen: tuple[np.ndarray | None, ...] = ()

    @property
    def size(self) -> int:
        """Bytes that are kept for it alone."""
        return sum(
            piece.size if some is None else some.nbytes
            for piece, some in zip(self.pieces or (), self.chosen, strict=True)
        )


class VectorCache:
    """The vectors of the newest version of a table that were asked for, in a form that fits the memory. Safe from many
    threads."""

    def __init__(self):
        self._lock = threading.Lock()
        self._version, self._pieces = -1, ()
        self._left: dict[tuple[int, str], Left] = {}  # by version and filter, the last asked for at the end

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def of(self, dataset, rows: int, width: int) -> Sequence[Piece] | None:
        """A version's pieces; None: they are too large for the memory."""
        with self._lock:
            if self._version == dataset.version:
                return self._pieces
            form = self._form(dataset, rows, width)
            if form is None:
                self._version, self._pieces = -1, ()
                return None
            known = {piece.files: piece for piece in self._pieces if _form_of(piece) == form}
            pieces = tuple(_read(dataset, fragment, width, known, *form) for fragment in dataset.get_fragments())
            if self._version < dataset.version:  # not that of an older snapshot
                self._version, self._pieces = dataset.version, pieces
            return pieces

    def ready(self, dataset) -> Sequence[Piece]:
        """A version's pieces, if they are kept."""
        with self._lock:
            return self._pieces if self._version == dataset.version else ()

    def left(self, dataset, where: str) -> Left | None:
        """What is known of a filter that was asked for lately."""
        with self._lock:
            left = self._left.pop((dataset.version, where), None)
            if left is not None:
                self._left[dataset.version, where] = left  # at the end
            return left

    def keep_left(self, dataset, where: str, left: Left) -> None:
        """Remember what a filter leaves, in place of what others left, in a part of the memory of all rows."""
        with self._lock:
            whole = sum(piece.size for piece in self._pieces)
            self._left.pop((dataset.version, where), None)
            self._left[dataset.version, where] = left
            while len(self._left) > _FILTERS or sum(one.size for one in self._left.values()) > FEW_CHOSEN * whole:
                del self._left[next(iter(self._left))]

    def is_quick(self, dataset, rows: int, width: int) -> bool:
        """Whether `of` takes little time: what it has to read is not kept of another version, but small and near."""
        if self._version == dataset.version:
            return True
        known = {piece.files for piece in self._pieces}
        new = sum(part.count_rows() for part in dataset.get_fragments() if _files_of(part) not in known)
        is_small = new * width * 4 <= QUICKLY_READ_BYTES and not (new and is_address(dataset.uri))
        return is_small and self._form(dataset, rows, width) is not None

    def _form(self, dataset, rows: int, width: int) -> tuple[bool, bool] | None:
        """Whether to keep vectors, and whether to keep codes; None: neither fits."""
        used = sum(piece.size for piece in self._pieces)
        room, codes, vectors = MEMORY_SHARE * (available_memory() + used), rows * width, rows * width * 4
        if vectors <= SMALL_BYTES or not codes_pay():
            return (True, False) if vectors <= room else None
        if is_address(dataset.uri) and codes + vectors <= room:  # where reading a row takes a request
            return True, True
        return (False, True) if codes <= room else None


def _form_of(piece: Piece) -> tuple[bool, bool]:
    return piece.vectors is not None, piece.codes is not None


def _files_of(fragment) -> tuple[str, ...]:
    about = fragment.metadata
    return str(about.id), *(file.path for file in about.files), str(getattr(about, "overlays", ""))


def _read(dataset, fragment, width: int, known: dict[tuple[str, ...], Piece], vectors: bool, codes: bool) -> Piece:
    """A piece of a table: what is known of it without the rows that are gone, or all of it."""
    files = _files_of(fragment)
    if files in known:
        piece = known[files].without_others(_positions(dataset, None, [fragment]))
        if piece is not None:  # not an older version, with rows that what is known has lost
            return piece
    rows, start, error, norm = fragment.count_rows(), 0, 0.0, 0.0
    positions = np.empty(rows, np.int64)
    all_vectors = torch.empty(rows, width) if vectors else None
    all_codes = torch.empty(rows, width, dtype=torch.int8) if codes else None
    scales = torch.empty(rows) if codes else None
    for some, values in _chunks(dataset, None, width, [fragment]):
        chunk = slice(start, start + len(some))
        start = chunk.stop
        positions[chunk] = some
        if vectors:
            all_vectors[chunk] = values
        if codes:
            all_codes[chunk], scales[chunk] = encoded(values)
            error = max(float((values - all_codes[chunk] * scales[chunk, None]).norm(dim=1).max()), error)
            norm = max(float(values.norm(dim=1).max()), norm)
    return Piece(files, positions, all_vectors, all_codes, scales, error, norm)


def encoded(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n, E) int8 and scales (n,) of vectors, whose product is as near to them as codes can be."""
    scales = vectors.abs().amax(dim=1) / _LARGEST_CODE
    return (vectors / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8), scales


@functools.cache
def codes_pay() -> bool:
    """Whether this machine multiplies bytes right, and faster than numbers of 32 bits."""
    rows, width = 16384, 256
    codes = torch.full((rows, width), _LARGEST_CODE, dtype=torch.int8)
    codes[1::2] = -_LARGEST_CODE
    vectors = codes.float()
    query = torch.full((width, 1), _LARGEST_CODE, dtype=torch.int8)
    query[::3] = -_LARGEST_CODE
    try:
        # Processors without instructions for it add up pairs in 16 bits, which the largest codes do not fit.
        right = all(
            torch.equal(torch._int_mm(codes, one).float(), vectors @ one.float())
            for one in (query, -query, query.abs(), -query.abs())
        )
        by_codes, by_vectors = _shortest(lambda: torch._int_mm(codes, query), lambda: vectors @ query.float())
        return right and by_codes < 0.7 * by_vectors
    except (AttributeError, RuntimeError):  # a torch, or a processor, that has it not
        return False


def _shortest(*works: Callable[[], object]) -> list[float]:
    """Seconds of each, the least of many in turn: other work on the machine makes some of them ten times as long."""
    taken = np.empty((30, len(works)))
    for times in taken:
        for number, work in enumerate(works):
            start = time.perf_counter()
            work()
            times[number] = time.perf_counter() - start
    return taken.min(axis=0).tolist()


# --- search -----------------------------------------------------------------------------------------------------------


def search_exactly(
    dataset, queries: Tensor, k: int, *, rows: int, where: str | None = None, cache: VectorCache | None = None
) -> Found:
    """As `aliblip.retrieval.indexing.nearest`, by comparing all rows that the filter leaves."""
    pieces = None if cache is None else cache.of(dataset, rows, queries.shape[1])
    if not pieces:
        return _by_vectors(queries, k, lambda: _chunks(dataset, where, queries.shape[1]))
    if where is None:
        chosen = [piece.kept for piece in pieces]
    else:
        left = rows_left(dataset, where, cache, rows, pieces)
        pieces, chosen = left.pieces, left.chosen
    if pieces[0].codes is None:
        return _by_vectors(queries, k, lambda: _kept_chunks(pieces, chosen))
    found: Found = []
    for block in queries.split(QUERY_BLOCK):
        found += _ByCodes(dataset, pieces, chosen).best(block, k, where)
    return found


def rows_left(dataset, where: str, cache: VectorCache, rows: int, pieces: Sequence[Piece] = ()) -> Left:
    """What a filter leaves, as it was found before, or looked up.

    Args:
        rows: of the table.
        pieces: of the table, if all that is left will be compared. Without them the number of rows is asked for; where
            they are comes with it if they are few and the table's pieces are kept: a look-up costs as much as a count.
    """
    left = cache.left(dataset, where)
    if left is not None and (left.pieces is not None or not pieces):
        return left
    few = int(FEW_CHOSEN * rows)
    allowed = None
    if pieces:
        allowed = _positions(dataset, where)
    elif pieces := cache.ready(dataset):
        allowed = _positions(dataset, where, limit=few + 1)
        allowed = allowed if len(allowed) <= few else None
    left = Left(dataset.count_rows(where)) if allowed is None else _left_at(allowed, pieces, few)
    cache.keep_left(dataset, where, left)
    return left


def _left_at(allowed: np.ndarray, pieces: Sequence[Piece], few: int) -> Left:
    """The rows at some positions: up to `few` are copied."""
    chosen = tuple(piece.chosen(allowed) for piece in pieces)
    if len(allowed) > few:
        return Left(len(allowed), tuple(pieces), chosen)
    some = tuple(piece.only(rows) for piece, rows in zip(pieces, chosen, strict=True))
    return Left(len(allowed), some, (None,) * len(some))


def _by_vectors(queries: Tensor, k: int, chunks: Callable[[], Iterable[tuple[np.ndarray, Tensor]]]) -> Found:
    found: Found = []
    for block in queries.split(QUERY_BLOCK):
        best = None
        for positions, vectors in chunks():
            scores, ids = _best_of_chunk(block, positions, vectors, k)
            if best is not None:
                scores, ids = torch.cat([best[0], scores], dim=1), torch.cat([best[1], ids], dim=1)
                scores, ids = order_by_score(scores, ids)
            best = scores[:, :k], ids[:, :k]
        if best is None:
            best = torch.empty(len(block), 0), torch.empty(len(block), 0, dtype=torch.int64)
        found += [(ids.numpy(), scores.numpy()) for scores, ids in zip(*best, strict=True)]
    return found


def _best_of_chunk(queries: Tensor, positions: np.ndarray, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    whole = len(vectors) - len(vectors) % _MULTIPLE
    parts = [queries @ vectors[:whole].t()] if whole else []
    if whole < len(vectors):
        rest = F.pad(vectors[whole:], (0, 0, 0, whole + _MULTIPLE - len(vectors)))
        parts.append((queries @ rest.t())[:, : len(vectors) - whole])
    scores = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]
    scores, columns = running_top_k([(0, scores)], min(k, len(vectors)))
    return scores, torch.from_numpy(positions)[columns]


class _ByCodes:
    """Search of pieces by their codes, and of the best by their vectors.

    Args:
        chosen: (n,) bool of each piece, the rows to search among; None: all of it.
    """

    def __init__(self, dataset, pieces: Sequence[Piece], chosen: list[np.ndarray | None]):
        self._dataset, self._pieces, self._chosen = dataset, pieces, chosen
        self._positions = np.concatenate([piece.positions for piece in pieces])
        self._rows = sum(
            len(piece.positions) if some is None else int(some.sum())
            for piece, some in zip(pieces, chosen, strict=True)
        )

    def best(self, queries: Tensor, k: int, where: str | None) -> Found:
        """The k best of each query; `where` is the filter that chose the rows."""
        k = min(k, self._rows)
        found: list = [None] * len(queries)
        if not k:
            return [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(queries)
        left, candidates = list(range(len(queries))), max(_CANDIDATES * k, _FEWEST_CANDIDATES)
        while left and candidates < max(self._rows, _FEWEST_CANDIDATES * _MORE):
            asked, left = left, []
            for query, result in zip(asked, self._tried(queries[asked], k, min(candidates, self._rows)), strict=True):
                found[query] = result
                if result is None:
                    left.append(query)
            candidates *= _MORE
        if left:
            width = queries.shape[1]
            again = _by_vectors(queries[left], k, lambda: _chunks(self._dataset, where, width))
            for query, result in zip(left, again, strict=True):
                found[query] = result
        return found

    def _tried(self, queries: Tensor, k: int, candidates: int) -> list[tuple[np.ndarray, np.ndarray] | None]:
        """The k best of each query among its candidates; None: another row may be better."""
        near, columns = running_top_k(self._scores(queries), candidates)
        bound = self._bound(queries)
        found = []
        at_once = max(1, _ROWS_AT_ONCE * 64 // candidates)
        for start in range(0, len(queries), at_once):
            some = slice(start, start + at_once)
            numbers, place = columns[some].unique(return_inverse=True)
            positions, vectors = self._positions[numbers.numpy()], self._vectors(numbers.numpy())
            for query, rows, last, most in zip(queries[some], place, near[some, -1], bound[some], strict=True):
                mine = rows.numpy()
                scores, ids = _best_of_chunk(query[None], positions[mine], vectors[rows], candidates)
                scores, ids = (part[0, :k] for part in order_by_score(scores, ids))
                is_sure = candidates == self._rows or scores[-1] > last + most
                found.append((ids.numpy(), scores.numpy()) if is_sure else None)
        return found

    def _scores(self, queries: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Scores (Q, n) by codes, chunk by chunk."""
        codes, scales = encoded(queries)
        codes, first = codes.t().contiguous(), 0
        for number, piece in enumerate(self._pieces):
            for start in range(0, len(piece.positions), _CODES_CHUNK):
                chunk = slice(start, start + _CODES_CHUNK)
                products = torch._int_mm(piece.codes[chunk], codes).t()  # (Q, n)
                scores = products * piece.scales[chunk] * scales[:, None]
                if self._chosen[number] is not None:
                    scores.masked_fill_(~torch.from_numpy(self._chosen[number][chunk]), -torch.inf)
                yield first + start, scores
            first += len(piece.positions)

    def _bound(self, queries: Tensor) -> Tensor:
        """How far a score by codes may be from the true one, (Q,).

        With the query's own error f and a row's e: q.v = (q - f).(v - e) + (q - f).e + f.v, and a product is at most
        that of the lengths. The rest is the rounding of sums.
        """
        codes, scales = encoded(queries)
        error, norm = max(piece.error for piece in self._pieces), max(piece.norm for piece in self._pieces)
        length, own = queries.norm(dim=1), (queries - codes * scales[:, None]).norm(dim=1)
        rounding = (queries.shape[1] + 8) * torch.finfo(torch.float32).eps
        return (length + own) * error + own * norm + rounding * (length + own) * (norm + error)

    def _vectors(self, columns: np.ndarray) -> Tensor:
        """(n, E) of some rows, by their numbers among all, rising."""
        if self._pieces[0].vectors is not None:
            firsts = np.cumsum([0] + [len(piece.positions) for piece in self._pieces])
            cuts = np.searchsorted(columns, firsts)
            parts = zip(self._pieces, firsts, cuts[:-1], cuts[1:], strict=False)
            return torch.cat([one.vectors[torch.from_numpy(columns[a:b] - first)] for one, first, a, b in parts])
        wanted = self._positions[columns]
        positions, vectors = [], []
        for start in range(0, len(wanted), _ROWS_AT_ONCE):
            where = f"_rowid IN ({', '.join(map(str, wanted[start : start + _ROWS_AT_ONCE].tolist()))})"
            for some, values in _chunks(self._dataset, where, self._pieces[0].codes.shape[1]):
                positions.append(some)
                vectors.append(values)
        order = np.argsort(np.concatenate(positions))
        place = order[np.searchsorted(np.concatenate(positions), wanted, sorter=order)]
        return torch.cat(vectors)[torch.from_numpy(place)]


# --- rows of a table --------------------------------------------------------------------------------------------------


def _positions(dataset, where: str | None, fragments: list | None = None, limit: int | None = None) -> np.ndarray:
    scanner = dataset.scanner(columns=[], with_row_id=True, filter=where, fragments=fragments, limit=limit)
    return scanner.to_table().column("_rowid").to_numpy().astype(np.int64)


def _kept_chunks(pieces: Sequence[Piece], chosen: list[np.ndarray | None]) -> Iterator[tuple[np.ndarray, Tensor]]:
    for piece, some_of_it in zip(pieces, chosen, strict=True):
        # Rising, as order among equals wants it; joining pieces leaves them in any order.
        rows = np.argsort(piece.positions, kind="stable")
        if some_of_it is not None:
            rows = rows[some_of_it[rows]]
        in_order = some_of_it is None and np.array_equal(rows, np.arange(len(rows)))
        for start in range(0, len(rows), GALLERY_CHUNK):
            some = slice(start, start + GALLERY_CHUNK)
            if in_order:
                yield piece.positions[some], piece.vectors[some]
            else:
                yield piece.positions[rows[some]], piece.vectors.index_select(0, torch.from_numpy(rows[some]))


def _chunks(
    dataset, where: str | None, width: int, fragments: list | None = None
) -> Iterator[tuple[np.ndarray, Tensor]]:
    """Positions and vectors (n, E) of a version in chunks, the positions of each rising."""
    scanner = dataset.scanner(
        columns=[VECTOR], with_row_id=True, filter=where, batch_size=GALLERY_CHUNK, fragments=fragments
    )
    for batch in scanner.to_batches():
        if not len(batch):
            continue
        positions = batch.column("_rowid").to_numpy().astype(np.int64)
        column = batch.column(VECTOR)
        values = column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
        if not (positions[1:] > positions[:-1]).all():
            order = np.argsort(positions)
            positions, values = positions[order], values[order]
        # A copy where Arrow's memory is read only, which torch does not like.
        yield positions, torch.from_numpy(values if values.flags.writeable else values.copy())
