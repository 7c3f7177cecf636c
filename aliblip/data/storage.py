"""Where the records of a table stay while rows are read in any order: as places in its file, or packed in memory.

Four million records of 100 bytes are 64 MB of places, or about as much packed text: never a list of Python objects.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from aliblip.data.remote import open_file

__all__ = ["Blocks", "Spans"]

BLOCK_RECORDS = 64
# Records that lie together are read at once, up to so many bytes.
READ_BYTES = 2**22


class Spans:
    """Records by their places in a file that is read again.

    Args:
        file: a path or an address.
        spans: (records, 2) int64, byte offsets.
    """

    def __init__(self, file: str, spans: np.ndarray):
        self._file, self._spans = file, spans

    @classmethod
    def of(cls, file: str, begins: array, ends: array) -> Spans:
        """Of two arrays of "q"."""
        spans = np.stack(
            [np.frombuffer(a, dtype=np.int64) if len(a) else np.zeros(0, np.int64) for a in (begins, ends)]
        )
        return cls(file, np.ascontiguousarray(spans.T))

    def __len__(self) -> int:
        return len(self._spans)

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Records [start, stop)."""
        with open_file(self._file) as stream:
            while start < stop:
                first = int(self._spans[start, 0])
                ends = self._spans[start:stop, 1]
                count = max(int(np.searchsorted(ends, first + READ_BYTES, side="right")), 1)
                stream.seek(first)
                data = stream.read(int(ends[count - 1]) - first)
                for begin, end in (self._spans[start : start + count] - first).tolist():
                    yield data[begin:end]
                start += count


class Blocks:
    """Records packed in memory, `BLOCK_RECORDS` to a piece, for files that can't be read at any place."""

    def __init__(self, records: Iterable[bytes]):
        self._pieces: list[bytes] = []
        self._count = 0
        block: list[bytes] = []
        for record in records:
            block.append(record)
            self._count += 1
            if len(block) == BLOCK_RECORDS:
                self._pack(block)
                block = []
        if block:
            self._pack(block)
        self._open: tuple[int, list[bytes]] = (-1, [])

    @classmethod
    def of_values(cls, values: Iterable[Any]) -> Blocks:
        """Of values that have a JSON form."""
        return cls(json.dumps(value, default=str).encode() for value in values)

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """Records [start, stop)."""
        for position in range(start, stop):
            index, place = divmod(position, BLOCK_RECORDS)
            if self._open[0] != index:
                self._open = (index, self._unpack(self._pieces[index]))
            yield self._open[1][place]

    def _pack(self, block: list[bytes]) -> None:
        sizes = np.array([len(record) for record in block], dtype=np.uint32).tobytes()
        self._pieces.append(zlib.compress(bytes([len(block)]) + sizes + b"".join(block), 1))

    @staticmethod
    def _unpack(piece: bytes) -> list[bytes]:
        data = zlib.decompress(piece)
        count = data[0]
        ends = np.cumsum(np.frombuffer(data[1 : 1 + 4 * count], dtype=np.uint32), dtype=np.int64) + 1 + 4 * count
        begins = [1 + 4 * count, *ends[:-1].tolist()]
        return [data[begin:end] for begin, end in zip(begins, ends.tolist(), strict=True)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": (-1, [])}
