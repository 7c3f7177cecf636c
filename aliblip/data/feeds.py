"""The feed of Google Merchant as XML, RSS or Atom, item by item.

    for item in feed_items(stream, "feed.xml"): ...        # {"id": "1", "title": "Mug", "image_link": "https://..."}

Names have no namespace: <g:title> is "title", and comes before a <title> without one. What is there more than once is
a list, and <g:shipping><g:country> is "shipping_country". A document type, by which a small file can name others or
become a huge text, is refused; so are items that no shop writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from xml.parsers import expat

from aliblip.runtime.mistakes import UsageError, one_line

__all__ = ["FEED_NAMESPACE", "feed_items", "is_xml"]

# Of the names with "g:".
FEED_NAMESPACE = "http://base.google.com/ns/"
READ_BYTES = 2**20
# Of one item.
MOST_CHARACTERS, MOST_DEPTH = 2**22, 32
_ITEMS = ("item", "entry")
_XML = re.compile(rb"(?:\xef\xbb\xbf)?\s*<(?:\?xml|rss|feed)[\s>]")


def is_xml(head: bytes) -> bool:
    """Whether a file that begins like this is XML, as feeds are."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        head = head.decode("utf-16", "replace").encode()
    return _XML.match(head) is not None


def feed_items(stream: Any, name: str, encoding: str | None = None) -> Iterator[dict[str, Any]]:
    """The items of a feed, read piece by piece.

    Args:
        stream: binary.
        name: of the file, for messages.
        encoding: if the file says a wrong one.

    Raises:
        UsageError: it is no whole XML, has a document type, or an item that is too large.
    """
    reader = _Reader(name, encoding)
    try:
        while data := stream.read(READ_BYTES):
            reader.parser.Parse(data, False)
            yield from reader.taken()
        reader.parser.Parse(b"", True)
    except (expat.ExpatError, ValueError, LookupError) as error:  # the last two of an encoding
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{name} is no whole XML ({one_line(error)}): get the file again") from None
    yield from reader.taken()


class _Reader:
    """Handlers of the parser, and the items that are complete."""

    def __init__(self, name: str, encoding: str | None):
        self.parser = expat.ParserCreate(encoding, namespace_separator=" ")
        self.parser.StartDoctypeDeclHandler = self._refuse
        self.parser.StartElementHandler = self._begin
        self.parser.EndElementHandler = self._end
        self.parser.CharacterDataHandler = self._add
        self._name, self._items = name, []
        self._path: list[str] = []  # of elements within an item, the item's own first
        self._fields: dict[str, list[tuple[bool, str]]] = {}  # of the item: whether it has the namespace, and the text
        self._text: list[str] = []
        self._size = self._depth = 0

    def taken(self) -> list[dict[str, Any]]:
        items, self._items = self._items, []
        return items

    def _refuse(self, *declared: Any) -> None:
        raise UsageError(
            f"{self._name} has a document type (<!DOCTYPE ...>), which a feed does not need and which is not read: "
            "take it out"
        )

    def _begin(self, name: str, attributes: dict[str, str]) -> None:
        self._depth += 1
        local = name.rpartition(" ")[2]
        if self._depth > MOST_DEPTH:
            raise UsageError(f"{self._name}: elements lie more than {MOST_DEPTH} deep: it is no feed of products")
        if not self._path:
            if local in _ITEMS:
                self._path, self._fields, self._size = [local], {}, 0
            return
        self._path.append(local)
        self._text = [attributes["href"]] if "href" in attributes else []

    def _add(self, text: str) -> None:
        if self._path:
            self._size += len(text)
            if self._size > MOST_CHARACTERS:
                line = self.parser.CurrentLineNumber
                raise UsageError(f"{self._name}, line {line:,}: an item has more than {MOST_CHARACTERS:,} characters")
            self._text.append(text)

    def _end(self, name: str) -> None:
        self._depth -= 1
        if not self._path:
            return
        if len(self._path) == 1:
            self._items.append({key: _value(found) for key, found in self._fields.items()})
        elif text := "".join(self._text).strip():
            self._fields.setdefault("_".join(self._path[1:]), []).append((name.startswith(FEED_NAMESPACE), text))
        self._path.pop()
        self._text = []


def _value(found: list[tuple[bool, str]]) -> Any:
    texts = [text for is_own, text in found if is_own] or [text for _, text in found]
    return texts[0] if len(texts) == 1 else texts
