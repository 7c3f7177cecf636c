"""What a cell of a table may hold for a photo or a title: one, or several, in the forms that people write.

titles_of(["a red mug", "a mug"])                      # a list: each is a row
titles_of('["a red mug", "a mug"]', as_lists=True)     # text of a list, where a whole column is that
photos_of("https://host/a.jpg, https://host/b.jpg")    # each is a row, too
embedded_photo("data:image/jpeg;base64,/9j/...")       # bytes
"""

from __future__ import annotations

import ast
import base64
import binascii
import contextlib
import json
import posixpath
import re
from array import array
from collections import Counter
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = [
    "PHOTO_KEYS",
    "Facts",
    "embedded_photo",
    "is_address",
    "listed_text",
    "local_path",
    "looks_like_photo_name",
    "photo_in",
    "photos_of",
    "plain_name",
    "titles_of",
]

# Keys of objects that hold a title, as COCO, Karpathy's files and Amazon's listings have them.
TITLE_KEYS = ("caption", "text", "raw", "value", "sentence", "title")
PHOTO_KEYS = ("bytes", "path", "url", "src", "file_name", "filename", "hi_res", "large", "thumb")
# Longer text of a list is no cell that somebody wrote.
MOST_LIST_CHARACTERS = 1_000_000
# What is longer is no name of a file.
LONGEST_NAME = 4096
# Addresses for each name of a file, below which they are mistakes.
FEWEST_ADDRESSES = 0.1
# Names that are kept, to find out where the photos lie.
SAMPLE = 100
# The beginnings of JPEG, PNG, GIF, WebP, BMP, TIFF (both kinds), JPEG 2000, AVIF and HEIC in base64.
_BASE64 = re.compile(r"(/9j/|iVBORw0|R0lGOD|UklGR|Qk[0-9A-Za-z]|SUkqA|TU0AK|AAAA(?:DGpQ|[A-Za-z0-9+/]{2}Z0e))")
_BASE64_TEXT = re.compile(r"[A-Za-z0-9+/\s]{100,}={0,2}\s*")
_DATA_URI = re.compile(r"data:[^,]{0,200},", re.IGNORECASE)
_ADDRESS = re.compile(r"https?://[^/\s]", re.IGNORECASE)
# With this machine's name or none; and two slashes before a path that is no whole one, as people write it.
_FILE_URL = re.compile(r"file:(?://localhost(?=/)|//|(?=/))", re.IGNORECASE)
_NEXT_ADDRESS = re.compile(r"\s*[,;|\s]\s*(?=https?://)", re.IGNORECASE)
_PHOTO_NAME = re.compile(r"\S.*\.(?:jpe?g|jfif|png|webp|gif|bmp|tiff?|avif|jp2|hei[cf])(?:#\d+)?", re.IGNORECASE)
# Between two names of photos in one text: after the ending of one of them.
_BETWEEN_NAMES = re.compile(
    r"(?<=\.jpg|\.png|\.gif|webp|jpeg)\s*[,;|]\s*(?=[^,;|]+\.(?:jpe?g|png|gif|webp)\s*(?:[,;|]|$))", re.IGNORECASE
)
_ODD_PATH = re.compile(r"\\|//|(?:^|/)\.\.?(?:/|$)")


def is_address(value: Any) -> bool:
    """Whether a value is the http(s) address of one thing."""
    return isinstance(value, str) and _ADDRESS.match(value.strip()) is not None


def local_path(text: str) -> str:
    """The path that a file: URL means, "/a b.jpg" for "file:///a%20b.jpg"; any other text as it is."""
    if (match := _FILE_URL.match(text)) is None:
        return text
    path = unquote(text[match.end() :], errors="surrogateescape")  # names of files need not be in UTF-8
    return path[1:] if re.match(r"/[A-Za-z]:[\\/]", path) else path


def looks_like_photo_name(text: str) -> bool:
    """Whether it ends as the file name of a photo does."""
    return _PHOTO_NAME.fullmatch(text.strip(" '\"")) is not None


def _holds_photo(text: str) -> bool:
    """Whether a text is a photo rather than the name of one; a broken data URI is no name either."""
    if len(text) < 100 and text[:5].lower() != "data:":
        return False
    try:
        return embedded_photo(text) is not None
    except ValueError:
        return True


def embedded_photo(text: str) -> bytes | None:
    """The bytes of a photo that a text holds as a data URI or as base64; None if it is another text.

    Raises:
        ValueError: a data URI whose base64 is damaged.
    """
    if (prefix := _DATA_URI.match(text)) is not None:
        if not prefix.group().lower().rstrip(",").endswith(";base64"):
            raise ValueError("a data URI without base64")
        return _decoded(text[prefix.end() :])
    if _BASE64.match(text) is None or _BASE64_TEXT.fullmatch(text) is None:
        return None
    with contextlib.suppress(ValueError):  # a path of those letters
        return _decoded(text)
    return None


def _decoded(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None


def listed_text(text: str) -> list[Any] | None:
    """The list that a text writes out, as JSON or as Python does; None if it is none of texts or objects."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")) or len(text) > MOST_LIST_CHARACTERS:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            return None
    if not isinstance(value, list) or not all(isinstance(item, (str, dict)) for item in value):
        return None
    return value


def titles_of(value: Any, as_lists: bool = False) -> list[Any]:
    """The titles of a cell, at least one: what is no list is itself.

    Args:
        as_lists: whether text that writes out a list is that list.
    """
    if as_lists and isinstance(value, str) and (items := listed_text(value)) is not None:
        value = items
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return [_title_in(item) for item in values] or [None]


def _title_in(value: Any) -> Any:
    if isinstance(value, dict):
        return next((value[key] for key in TITLE_KEYS if isinstance(value.get(key), str)), value)
    return value


def photos_of(value: Any, as_lists: bool = False) -> list[Any]:
    """The photos of a cell, at least one: a list, or several addresses or names of photos in one text, are several."""
    if isinstance(value, str):
        items = listed_text(value) if as_lists else None
        value = _several_in(value) if items is None else items
    return list(value) or [None] if isinstance(value, (list, tuple)) else [value]


def _several_in(text: str) -> str | list[str]:
    if "://" in text[:12]:
        parts = _NEXT_ADDRESS.split(text.strip()) if is_address(text) else []
    elif _BETWEEN_NAMES.search(text) is None or len(text) > LONGEST_NAME:
        return text
    else:
        parts = _BETWEEN_NAMES.split(text.strip())
    return parts if len(parts) > 1 else text


def photo_in(value: Any) -> Any:
    """Of an object that holds a photo its bytes, else its path or address; any other value as it is."""
    if not isinstance(value, dict):
        return value
    return next((value[key] for key in PHOTO_KEYS if value.get(key) is not None), None)


class Facts:
    """What the cells of one column are, told from all of them.

    Attributes:
        rows, empty: cells, and those of them without a value.
        addresses, hosts: photos that are addresses, and of which servers.
        names: of each photo that is a file name, the hash of that name.
        absolute: file names that are whole paths.
        sample: some of the file names.
    """

    def __init__(self, photos: bool):
        self._split = photos_of if photos else titles_of
        self._photos = photos
        self.rows = self.empty = self.addresses = self.absolute = 0
        self.sample: list[Any] = []
        self.hosts: Counter[str] = Counter()
        self.names = array("q")
        self._texts = self._list_texts = 0
        self._counts: array | None = None  # of lists
        self._text_counts: array | None = None  # of texts that write out lists

    def skip(self, cells: int) -> None:
        """Take so many cells without a value into account."""
        self.rows += cells
        self.empty += cells

    def add(self, value: Any) -> None:
        """Take the next cell into account."""
        row = self.rows
        self.rows += 1
        if value is None or value == "":
            self.empty += 1
            return
        if isinstance(value, str):
            self._texts += 1
            if value[:1] == "[" and (items := listed_text(value)) is not None:
                self._list_texts += 1
                self._text_counts = _entered(self._text_counts, row, max(len(items), 1))
                if self._photos:
                    self._add_photos(items)
                return
        parts = self._split(value)
        if len(parts) > 1:
            self._counts = _entered(self._counts, row, len(parts))
        if self._photos:
            self._add_photos(parts)

    def add_list(self, length: int) -> None:
        """Take the next cell into account, a list of so many photos or titles that are not looked at."""
        if length > 1:
            self._counts = _entered(self._counts, self.rows, length)
        self.rows += 1
        self.empty += not length

    def _add_photos(self, parts: list[Any]) -> None:
        for part in map(photo_in, parts):
            if not isinstance(part, str):
                if isinstance(part, int):
                    self.names.append(hash(str(part)))
                    self._keep(part)
                continue
            if "://" in part[:12] and is_address(part):
                self.addresses += 1
                if len(self.hosts) < 1000:
                    self.hosts[urlsplit(part.strip()).netloc] += 1
            elif len(part) < LONGEST_NAME and not _holds_photo(part):
                path = local_path(part)
                self.names.append(hash(plain_name(path)))
                self.absolute += path.startswith("/")
                self._keep(part)

    def _keep(self, name: Any) -> None:
        """In the sample: the first ones, and some from further on."""
        if len(self.sample) < SAMPLE and (len(self.sample) < SAMPLE // 2 or self.rows % 1009 == 0):
            self.sample.append(name)

    @property
    def has_addresses(self) -> bool:
        """Whether addresses are no single mistakes among names of files."""
        return self.addresses >= len(self.names) * FEWEST_ADDRESSES

    @property
    def as_lists(self) -> bool:
        """Whether all text of the column writes out lists."""
        return bool(self._list_texts) and self._list_texts == self._texts

    @property
    def doubtful(self) -> int:
        """Texts that write out lists in a column of other texts, which stay as they are."""
        return 0 if self.as_lists else self._list_texts

    def counts(self) -> array | None:
        """Photos or titles of each cell; None if all have one."""
        if self._counts is None and not self.as_lists:
            return None
        counts = _entered(self._counts, self.rows, 1)[: self.rows]
        if self.as_lists:
            for row, count in enumerate(_entered(self._text_counts, self.rows, 1)[: self.rows]):
                counts[row] = max(counts[row], count)
        return counts


def _entered(counts: array | None, row: int, count: int) -> array:
    """Counts with that of one more row; rows between them and it have one each."""
    if counts is None:
        counts = array("i")
    counts.extend([1] * (row - len(counts)))
    counts.append(count)
    return counts


def plain_name(name: str) -> str:
    """A relative file name in one spelling."""
    return posixpath.normpath(name.replace("\\", "/")) if _ODD_PATH.search(name) else name
