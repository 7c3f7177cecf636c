"""What visitors of the search page send and may fetch: uploads without names, and no file but those in their folder.

    photo.preprocess = lambda upload: uploaded(upload and upload.path, folder)
    app_kwargs={"middleware": [Middleware(NamelessUploads), Middleware(OwnFilesOnly, folder=folder)]}

Gradio checks a path only where its sender marks it as a file, fetches addresses for its visitors and says which files
exist. None of that is left to it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable

_SUFFIXES = ("avif", "bmp", "gif", "jp2", "jpeg", "jpg", "png", "tif", "tiff", "webp")
_NOT_FOUND = b"not found"
# Routes of Gradio that give files, and those that fetch, keep or run something for a visitor and that no part of the
# page uses.
_FILE_ROUTE = re.compile(r"/file(?:=|/)(.*)", re.DOTALL)
_CLOSED_ROUTE = re.compile(
    r"/(proxy=|component_server|custom_component/|process_recording|deep_link|run-history|runs/?$|dev/|stream/|vibe-"
    r"|undo-vibe-|monitoring)"
)


def uploaded(path: str | None, folder: str | os.PathLike) -> str | None:
    """The real path of an uploaded file; None without one.

    Args:
        path: as a visitor's request names it.
        folder: of the uploads, the only one that is read.

    Raises:
        ValueError: the path is no file in the folder, links followed; the message does not tell what is there instead.
    """
    if not path:
        return None
    try:
        real = os.path.realpath(path)
        inside = os.path.commonpath([real, os.path.realpath(folder)]) == os.path.realpath(folder)
        if inside and stat.S_ISREG(os.stat(real).st_mode):
            return real
    except (OSError, TypeError, ValueError):  # a null byte, a path of another drive, a file that has just gone
        pass
    raise ValueError("Send the photo itself: no upload has this path")


class OwnFilesOnly:
    """ASGI middleware: of files only uploads are given out; for everything else the answer is the same 404, whether it
    exists or not."""

    def __init__(self, app: Callable, folder: str | os.PathLike):
        self._app, self._folder = app, folder

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "http" and not (self._is_open(scope["path"]) and b"deep_link" not in scope["query_string"]):
            headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(_NOT_FOUND)).encode())]
            await send({"type": "http.response.start", "status": 404, "headers": headers})
            await send({"type": "http.response.body", "body": _NOT_FOUND})
            return
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        if (asked := _FILE_ROUTE.search(path)) is not None:
            try:
                return uploaded(asked[1], self._folder) is not None
            except ValueError:
                return False
        return _CLOSED_ROUTE.search(path) is None


class NamelessUploads:
    """ASGI middleware: an upload is called photo.jpg (or as it ends), whatever its sender calls it, before Gradio gives
    its temporary file that name. Every file of a request, and without holding any of them in memory."""

    def __init__(self, app: Callable):
        self._app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/upload"):
            kind = dict(scope["headers"]).get(b"content-type", b"")
            if (boundary := re.search(rb'(?i)boundary="?([^";]+)', kind)) is not None:
                receive = self._renamed(receive, b"--" + boundary[1].strip())
        await self._app(scope, receive, send)

    @staticmethod
    def _renamed(receive: Callable, boundary: bytes) -> Callable:
        held, is_head = b"", False  # what can't be judged yet, and whether it belongs to the headers of a part

        async def wrapped() -> dict:
            nonlocal held, is_head
            message = await receive()
            if message["type"] != "http.request":
                return message
            held, ready = held + message.get("body", b""), []
            while True:
                mark = b"\r\n\r\n" if is_head else boundary
                end = held.find(mark)
                size = end + len(mark) if end >= 0 else len(held)
                if end < 0 and message.get("more_body"):
                    # Nothing of a head passes before its end, and of a file not what may be a boundary's beginning.
                    size = 0 if is_head else max(0, len(held) - len(mark) + 1)
                piece, held = held[:size], held[size:]
                ready.append(_FILE_NAME.sub(_nameless, piece) if is_head else piece)
                if end < 0:
                    break
                is_head = not is_head
            if len(held) > MAX_HEAD_BYTES:
                held = b""  # no head of a browser or client: what is left of it is refused by the parser
            return {**message, "body": b"".join(ready)}

        return wrapped


# More than the headers of any file of a form.
MAX_HEAD_BYTES = 2**16
_FILE_NAME = re.compile(rb'filename\*?=("(?:[^"\\]|\\.)*"?|[^;\r\n]*)')


def _nameless(match: re.Match) -> bytes:
    suffix = match[1].rstrip(b'"').rpartition(b".")[2].lower().decode("latin-1")
    return f'filename="photo{"." + suffix if suffix in _SUFFIXES else ""}"'.encode()


__all__ = ["NamelessUploads", "OwnFilesOnly", "uploaded"]
