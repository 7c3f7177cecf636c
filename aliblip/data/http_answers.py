"""Answers of HTTP servers, bounded while they are read: for the sessions of aiohttp that fsspec makes.

A timeout of aiohttp is one for each piece, which a byte a second keeps for ever, or one for the whole answer, which a
large file on a slow line does not keep. So the bytes are counted: every `SECONDS` of waiting bring `LEAST_BYTES` or the
end, and the headers all come within `SECONDS`. A server that was asked for a part of a file gives no more than that.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from typing import Any

import aiohttp

from aliblip.runtime.retries import GaveUp

__all__ = ["BoundedResponse"]

SECONDS = 60
LEAST_BYTES = 2**16


class _BoundedStream:
    """The body of an answer; `most_bytes` None: of any length."""

    def __init__(self, stream: aiohttp.StreamReader, most_bytes: int | None):
        self._stream, self._left = stream, most_bytes
        self._seconds, self._missing = SECONDS, LEAST_BYTES

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def read(self, most: int = -1) -> bytes:
        """The next bytes, `most` or fewer, or all of them; none at the end.

        Raises:
            TimeoutError: they come too slowly.
            GaveUp: there are more of them than were asked for.
        """
        if most >= 0:
            return await self._piece(self._stream.read(most))
        pieces = []
        while piece := await self._piece(self._stream.readany()):
            pieces.append(piece)
        return b"".join(pieces)

    async def _piece(self, coming: Coroutine[Any, Any, bytes]) -> bytes:
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            piece = await asyncio.wait_for(coming, max(self._seconds, 0.001))
        except asyncio.TimeoutError:  # before Python 3.11 it is another class than TimeoutError
            raise TimeoutError(f"fewer than {LEAST_BYTES:,} bytes came in {SECONDS} seconds") from None
        self._seconds -= clock() - began
        self._missing -= len(piece)
        if self._missing <= 0:
            self._seconds, self._missing = SECONDS, LEAST_BYTES
        if self._left is not None:
            self._left -= len(piece)
            if self._left < 0:
                raise GaveUp("the server gives more bytes than it was asked for")
        return piece


class BoundedResponse(aiohttp.ClientResponse):
    """An answer whose headers and body come within bounds."""

    async def start(self, connection: Any) -> BoundedResponse:
        try:
            await asyncio.wait_for(super().start(connection), SECONDS)
        except asyncio.TimeoutError:
            raise TimeoutError(f"its headers did not come within {SECONDS} seconds") from None
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
        is_part = asked is not None and self.status == 206  # a whole file is read as far as it is needed
        self.content = _BoundedStream(self.content, int(asked[2]) - int(asked[1]) + 1 if is_part else None)
        return self
