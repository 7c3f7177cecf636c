"""The members of a tar by its headers: all of them, or the archive is refused by name and cause.

    for member in read_members("train-0.tar", size, None, Wanted()):
        ...

`tarfile` ends without a word at a damaged header, at a cut on a record border, and at the end of the first of several
archives that were put together. Here an archive ends where its end is marked, and what follows is another archive or a
reason to refuse. Nothing is extracted; names of members are only names.
"""

from __future__ import annotations

import gzip
import json
import lzma
import posixpath
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from aliblip.data.columns import CAPTION_NAMES, similar_name
from aliblip.data.encodings import unicode_of, unpacked
from aliblip.data.kinds import kind_of_head
from aliblip.data.products import shown
from aliblip.data.remote import open_file, resumed
from aliblip.data.values import titles_of
from aliblip.runtime.mistakes import UsageError, one_line

__all__ = [
    "CAPTION_FIELDS",
    "IMAGE_FIELDS",
    "JSON_FIELDS",
    "OTHER",
    "PHOTO",
    "TEXT",
    "TEXT_FIELDS",
    "Member",
    "Wanted",
    "compression_of",
    "open_tar",
    "read_members",
    "value_of",
]

# Of a sample with several the first is taken. Some no library here reads: then the row says so.
IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jp2", "jfif", "jpe", "jif", "pjpeg")
IMAGE_FIELDS += ("pjp", "apng", "j2k", "jpx", "jpf", "heic", "heif", "jxl", "dib", "ico", "ppm", "pgm", "pbm", "pnm")
TEXT_FIELDS = ("txt", "text", "transcript", "caption", "title")
JSON_FIELDS = ("json", "jsn")
# Where a title may stand, if none is named: as a member of this ending, or under this key of a JSON member. If there is
# none of these, a key of `CAPTION_NAMES` will do.
CAPTION_FIELDS = ("caption", "text", "txt", "title", "transcript", "captions", "titles", "sentences")
# What a member is; flags, so that those of a sample can be put together.
OTHER, PHOTO, TEXT = 0, 1, 2
# Folders and files that systems leave behind.
_SYSTEM_FOLDERS, _SYSTEM_FILES = ("__MACOSX", "@eaDir"), ("thumbs.db", "desktop.ini")
# The longest header and the longest JSON that are read into memory.
MOST_HEADER_BYTES, MOST_JSON_BYTES = 2**22, 2**24
BLOCK = tarfile.BLOCKSIZE
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
_UNREADABLE = {b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"7z\xbc\xaf": "7z", b"Rar!": "rar"}
# What reading a damaged stream raises, and what `tarfile` raises of headers: of numbers that are none, and absurd ones.
_DAMAGES = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError)
_HEADER_DAMAGES = (*_DAMAGES, tarfile.TarError, ValueError, RecursionError, MemoryError, OverflowError)

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """What makes samples of members.

    Attributes:
        captions: endings of members and keys of JSON members that may hold the title, the first before the others.
        product_id: the ending or key of the product ids.
        by_likeness: whether other keys of JSON members will do, by their names.
    """

    captions: tuple[str, ...] = CAPTION_FIELDS
    product_id: str = "product_id"
    by_likeness: bool = True


class Member(NamedTuple):
    """One member that is a file.

    Attributes:
        name: its path, without "./" and the like.
        ending: of the name, in lower case; "" without one.
        kind: OTHER, PHOTO, TEXT; None for what no sample can hold (hidden files, what systems leave, devices).
        offset, length: where its bytes lie.
        link: the member that it is a link to; then `offset` and `length` are 0.
        keys: of a JSON member.
        titles: (place in `Wanted.captions`, how many) of the titles that it holds, if it holds some.
        id: (value,) of the product id that it holds, if it holds one.
    """

    name: str
    ending: str
    kind: int | None
    offset: int = 0
    length: int = 0
    link: str | None = None
    keys: tuple[str, ...] = ()
    titles: tuple[int, int] | None = None
    id: tuple[Any] | None = None


def value_of(ending: str, data: bytes, encoding: str | None = None) -> Any:
    """What a member holds: JSON, a text, for endings of labels a number or text, otherwise its bytes.

    Args:
        encoding: of texts that do not begin with a mark of theirs; default UTF-8.

    Raises:
        ValueError: it can't be read as what its ending says.
        RecursionError: JSON of lists in lists in lists.
    """
    if ending in JSON_FIELDS:
        return json.loads(data)
    if ending in TEXT_FIELDS:
        return data.decode(unicode_of(data) or encoding or "utf-8")
    if ending in ("cls", "cls2", "id", "index", "product_id"):
        text = data.decode("utf-8-sig").strip()
        return int(text) if re.fullmatch(r"-?[1-9][0-9]{0,399}|0", text) else (text or None)
    return data


# ------------------------------------------------------------------------------------------------------------- opening


def compression_of(file: str) -> str | None:
    """How a tar is compressed; None if it isn't.

    Raises:
        UsageError: it is empty, or an archive of another kind.
        OSError: it can't be read.
    """
    with open_file(file) as stream:
        head = stream.read(BLOCK)
    if not head:
        raise UsageError(f"{file} is empty (0 bytes), not even a tar without members: get it again, or remove it")
    if _is_header(head) or not head.strip(b"\0"):
        return None
    for magic, kind in _UNREADABLE.items():
        if head.startswith(magic):
            raise UsageError(f"{file} is a {kind} file, not a tar: unpack it, and write a tar of its files")
    return next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)


@contextmanager
def open_tar(file: str, compression: str | None) -> Iterator[Any]:
    """The bytes of a tar, unpacked on the way. Going back in a compressed one starts again at its beginning. One that
    unpacks to absurdly more than it has is refused while it is read."""
    with open_file(file) as stream:
        if compression is None:
            yield stream
        else:
            with unpacked(compression, stream, file) as content:
                yield content


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


# ------------------------------------------------------------------------------------------------------------- reading


def read_members(file: str, size: int, compression: str | None, wanted: Wanted) -> Iterator[Member]:
    """All members of a tar but folders.

    Args:
        file: path or address.
        size: its bytes.
        compression: from `compression_of`.
        wanted: of small members, which are looked into.

    Raises:
        UsageError: the archive is no tar, cut off, damaged, or holds a sparse file.
        OSError: it can't be read.
    """
    walk = _Walk(file, size, compression, wanted)
    yield from resumed(lambda done: walk.members(), file)


class _Headers:
    """What `tarfile` reads headers from: a declared size of terabytes is damage, and must not be allocated."""

    def __init__(self, stream: Any):
        self.seek, self.tell, self._stream = stream.seek, stream.tell, stream

    def read(self, size: int) -> bytes:
        if size > MOST_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._stream.read(size)


class _Walk:
    """A reading of a tar that goes on at `offset`, where the next header is, when the connection broke."""

    def __init__(self, file: str, size: int, compression: str | None, wanted: Wanted):
        self.file, self.size, self.compression, self.wanted = file, size, compression, wanted
        self.offset, self.count, self.ended = 0, 0, False

    def members(self) -> Iterator[Member]:
        with open_tar(self.file, self.compression) as stream:
            while not self.ended:
                yield from self._archive(stream)
                self._guarded(lambda: self._go_beyond_the_end(stream))

    def _archive(self, stream: Any) -> Iterator[Member]:
        self._guarded(lambda: stream.seek(self.offset))
        tar = self._guarded(lambda: tarfile.TarFile(fileobj=_Headers(stream)), _HEADER_DAMAGES)
        while (info := self._guarded(tar.next, _HEADER_DAMAGES)) is not None:
            tar.members.clear()  # it keeps a kilobyte of each
            after = tar.offset
            self._check(info, after)
            member = self._guarded(lambda info=info: self._member(stream, info))
            self.offset, self.count = after, self.count + 1
            if member is not None:
                yield member
        self.offset = tar.offset

    def _check(self, info: tarfile.TarInfo, after: int) -> None:
        if info.size < 0 or after <= self.offset:
            raise self._refusal(f"is damaged at byte {self.offset:,}: {shown(info.name)} has {info.size:,} bytes")
        if info.issparse():
            raise UsageError(
                f"{self.file}: {shown(info.name)} is stored as a sparse file, which can't be read in place: write the "
                "tar without --sparse"
            )
        if info.isreg() and self.compression is None and info.offset_data + info.size > self.size:
            there = max(self.size - info.offset_data, 0)
            raise self._refusal(
                f"is cut off within {shown(info.name)}, which has {info.size:,} bytes by its header, and {there:,} are "
                "there"
            )

    def _refusal(self, what: str, more: str = "") -> UsageError:
        whole = f"{self.count:,} member{'' if self.count == 1 else 's'} before that"
        return UsageError(f"{self.file} {what} ({whole}): get it again, or write it again{more}")

    def _guarded(self, call: Callable[[], T], damages: tuple[type[Exception], ...] = _DAMAGES) -> T:
        """What the library says of a damaged archive, as one sentence."""
        try:
            return call()
        except UsageError:
            raise
        except damages as error:
            reason = one_line(error, 200)
            if isinstance(error, EOFError):
                raise self._refusal(f"is cut off: the {self.compression} stream has no end") from None
            if not self.offset:
                raise UsageError(f"{self.file} is not a readable tar ({reason}): repair or remove it") from None
            raise self._refusal(f"is cut off or damaged at byte {self.offset:,}: {reason}") from None
        except OSError as error:
            if self.compression == "bzip2" and str(error) == "Invalid data stream":  # the only one without a class
                raise self._refusal(f"is damaged at byte {self.offset:,}: {error}") from None
            raise

    def _go_beyond_the_end(self, stream: Any) -> None:
        """Make sure that the archive ends here, and find the next one in the file, if there is one."""
        stream.seek(self.offset)
        block = stream.read(BLOCK)
        if len(block) < BLOCK:
            more = ""
            if not block and self.compression is None and "://" not in self.file:
                more = f"; if nothing is missing, close it: head -c 1024 /dev/zero >> '{self.file}'"
            raise self._refusal(f"is cut off at byte {self.offset:,}: the end of the archive is missing", more)
        if block.strip(b"\0"):
            raise self._refusal(f"is damaged at byte {self.offset:,}, where the header of a member should be")
        end = position = self.offset + BLOCK
        while data := stream.read(2**20):
            if rest := data.lstrip(b"\0"):
                position += (len(data) - len(rest)) // BLOCK * BLOCK
                stream.seek(position)
                if _is_header(stream.read(BLOCK)):
                    self.offset = position  # of archives that were put together
                    return
                raise self._refusal(
                    f"goes on after the end of the archive at byte {end:,}, with bytes that are no tar",
                    f"; if nothing is missing, cut them off: truncate -s {end} '{self.file}'",
                )
            position += len(data)
        self.ended = True

    def _member(self, stream: Any, info: tarfile.TarInfo) -> Member | None:
        if info.isdir():
            return None
        name = info.name
        if name.startswith("./") or "/." in name or "//" in name:
            name = posixpath.normpath(name)
        base = posixpath.basename(name)
        stem, dot, ending = base.rpartition(".")
        ending = ending.lower() if stem and dot else ""
        if info.islnk() or info.issym():
            folder = posixpath.dirname(name) if info.issym() else ""
            return Member(name, ending, None, link=posixpath.normpath(posixpath.join(folder, info.linkname)))
        if not info.isreg() or _is_of_a_system(name):
            return Member(name, ending, None)
        member = Member(name, ending, OTHER, info.offset_data, info.size)
        return self._looked_into(stream, member)

    def _looked_into(self, stream: Any, member: Member) -> Member:
        ending, wanted = member.ending, self.wanted
        if ending in IMAGE_FIELDS:
            return member._replace(kind=PHOTO)
        if ending in JSON_FIELDS:
            value = _json_of(self._read(stream, member)) if member.length <= MOST_JSON_BYTES else None
            if not isinstance(value, dict):
                return member
            titles = _titles_in(value, wanted)
            found = (value[wanted.product_id],) if wanted.product_id in value else None
            kind = OTHER if titles is None else TEXT
            return member._replace(kind=kind, keys=tuple(map(str, value)), titles=titles, id=found)
        if ending == wanted.product_id and member.length <= MOST_JSON_BYTES:
            member = member._replace(id=(_value_or_bytes(ending, self._read(stream, member)),))
        if ending in TEXT_FIELDS or ending in wanted.captions:
            place = wanted.captions.index(ending) if ending in wanted.captions else len(wanted.captions)
            return member._replace(kind=TEXT, titles=(place, 1) if member.length else None)
        if kind_of_head(self._read(stream, member, 32)) in ("photo", "heic"):
            return member._replace(kind=PHOTO)
        return member

    def _read(self, stream: Any, member: Member, most: int | None = None) -> bytes:
        stream.seek(member.offset)
        return stream.read(member.length if most is None else min(member.length, most))


def _is_of_a_system(name: str) -> bool:
    *folders, base = name.split("/")
    if base.startswith(".") or base.lower() in _SYSTEM_FILES:
        return True
    return any(folder in _SYSTEM_FOLDERS or (folder.startswith(".") and folder.strip(".")) for folder in folders)


def _titles_in(value: dict[str, Any], wanted: Wanted) -> tuple[int, int] | None:
    for place, key in enumerate(wanted.captions):
        if value.get(key):
            return place, len(titles_of(value[key]))
    other = similar_name(value, CAPTION_NAMES) if wanted.by_likeness else None
    return (len(wanted.captions), len(titles_of(value[other]))) if other is not None and value[other] else None


def _json_of(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):  # a row that can't be used, not the end of the archive
        return None


def _value_or_bytes(ending: str, data: bytes) -> Any:
    try:
        return value_of(ending, data)
    except ValueError:
        return data
