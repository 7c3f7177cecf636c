"""How a text file is packed and encoded: found from its bytes, and never guessed where two guesses read well.

    with unpacked("feed.csv.gz", stream) as data: ...
    encoding = unicode_of(head)                    # by its mark, or None
    guess = guess_encoding(lines)                  # of lines that are not UTF-8

UTF-8, UTF-16 and UTF-32 tell themselves. What is left are the encodings of one country each, in which nearly any bytes
are some text. One of them is taken only if it alone reads like text; otherwise the user is asked, and shown how each of
them reads.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from aliblip.runtime.mistakes import UsageError

__all__ = ["Guess", "check_encoding", "guess_encoding", "is_packed", "unicode_of", "unpacked"]

# What is read of a compressed file, in bytes and in times its size, at most one of them.
MOST_UNPACKED, MOST_TIMES = 2**26, 200
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark is its beginning
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# The encodings that spreadsheets and old exports write, by how often they are met.
COUNTRIES = (
    *("cp1252", "gb18030", "big5", "cp932", "cp949", "euc_jp", "cp1251", "cp1250", "cp1254", "cp1253", "cp1255"),
    *("cp1256", "cp1257", "cp1258", "cp874", "koi8_r", "mac_roman", "cp850", "cp866", "cp852"),
)
# One that reads worse than this is no text.
LEAST_LIKELY = 0.8
# By how much the best has to lead, if the next reads otherwise.
LEAD = 0.25
FEWEST_CHARACTERS = 8
# Lines that are looked at, and characters of them that are shown.
SAMPLE_LINES = 500
READINGS = 5
SHOWN_CHARACTERS = 40
_SIGNS = frozenset(
    "\u00a0€£¥©®°™•·…–—‘’‚“”„‹›«»§½¼¾²³×º¡¿№′″、。，．！？：；（）「」『』【】《》〈〉・ー～￥％＆＋－／　"
)
_DOUBLE_BYTE_LEADS = {  # of the characters that are in daily use
    "gb18030": ("gb2312", 0xB0, 0xD7),
    "big5": ("big5", 0xA4, 0xC6),
    "cp932": ("euc_jp", 0xB0, 0xCF),
    "euc_jp": ("euc_jp", 0xB0, 0xCF),
}


@dataclass(frozen=True)
class Guess:
    """What an unknown encoding may be.

    Attributes:
        encoding: the one that reads like text, or None if several or none do.
        readings: [(encoding, a piece of the text as it reads then)], the likeliest first.
    """

    encoding: str | None
    readings: list[tuple[str, str]]

    def told(self) -> str:
        """For a message: `--encoding cp1252 reads it as "café", cp1250 as ...`."""
        if not self.readings:
            return "give its encoding as --encoding, or save it as UTF-8"
        (first, text), *others = self.readings
        more = "".join(f", {encoding} as '{reading}'" for encoding, reading in others)
        return f"--encoding {first} reads it as '{text}'{more}: give the right one, or save it as UTF-8"


def check_encoding(encoding: str) -> str:
    """The name that Python has for an encoding.

    Raises:
        UsageError: there is no such one.
    """
    try:
        info = codecs.lookup(encoding)
        "a".encode(info.name)
    except (LookupError, TypeError, ValueError):
        raise UsageError(
            f"--encoding {encoding} is unknown: give utf-8, utf-16, cp1252, gb18030, big5, shift_jis or another that "
            "Python knows"
        ) from None
    if not getattr(info, "_is_text_encoding", True):
        raise UsageError(f"--encoding {encoding} is no encoding of text: give utf-8, cp1252, gb18030 or another")
    return info.name


def is_packed(head: bytes) -> str | None:
    """How a file is compressed, by its first bytes."""
    return next((name for magic, name in PACKED.items() if head.startswith(magic)), None)


def unpacked(packing: str | None, stream: Any, name: str | None = None) -> Any:
    """A binary stream of what a compressed stream holds, or the stream itself; `name` is for messages.

    Reading it raises `UsageError` where it unpacks to more than anybody's data does, see `check_unpacked`.
    """
    if packing is None:
        return stream
    if packing == "zstd":
        packed = io.BytesIO(stream.read())
        content: Any = _Readable(pa.CompressedInputStream(pa.PythonFile(packed, "r"), "zstd"))
    else:
        packed, content = stream, {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}[packing](stream)
    return io.BufferedReader(_Bounded(content, packed, name), 2**17)


def check_unpacked(unpacked: int, packed: int, what: str) -> None:
    """Refuse what unpacks to many times its size: tables and titles shrink to a tenth or a fiftieth, photos hardly at
    all. A file of a few megabytes that was made for it takes all memory.

    Raises:
        UsageError: what it is, and what to do.
    """
    if unpacked > MOST_UNPACKED and unpacked > MOST_TIMES * packed:
        raise UsageError(
            f"{what} unpacks to more than {unpacked / max(packed, 1):,.0f} times its size ({packed / 1e6:,.1f} MB to "
            f"{unpacked / 1e6:,.0f} MB and more), as no data does and files that are to fill the memory do: if it is "
            "data, unpack it yourself"
        )


class _Bounded(io.RawIOBase):
    """What a compressed stream holds, as long as it is not absurdly more than the stream itself."""

    def __init__(self, content: Any, packed: Any, name: str | None):
        self._content, self._packed, self._name = content, packed, name or getattr(packed, "name", None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._content.seekable()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._content.seek(offset, whence)

    def tell(self) -> int:
        return self._content.tell()

    def readinto(self, buffer: Any) -> int:
        count = self._content.readinto(buffer)
        check_unpacked(self._content.tell(), self._packed.tell(), str(self._name or "a compressed file"))
        return count

    def close(self) -> None:
        if not self.closed:
            self._content.close()
        super().close()


class _Readable(io.RawIOBase):
    """An Arrow stream as Python's readers take one."""

    def __init__(self, stream: pa.NativeFile):
        self._stream, self._given = stream, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer))
        buffer[: len(data)] = data
        self._given += len(data)
        return len(data)

    def tell(self) -> int:
        return self._given


def unicode_of(head: bytes) -> str | None:
    """The encoding that the first bytes of a file tell: by a mark, or by the zeros of UTF-16 without one."""
    for mark, encoding in MARKS:
        if head.startswith(mark):
            return encoding
    head = head[: len(head) // 2 * 2]
    if len(head) < 8:
        return None
    # Names of columns and digits are ASCII, so that every second byte of them is zero.
    even, odd = (head[side::2].count(0) / (len(head) / 2) for side in (0, 1))
    if odd > 0.4 and even < 0.05:
        return "utf-16-le"
    return "utf-16-be" if even > 0.4 and odd < 0.05 else None


def guess_encoding(lines: Sequence[bytes]) -> Guess:
    """What lines that are not UTF-8 may be encoded in."""
    sample = [line.rstrip(b"\r\n") for line in lines if not line.isascii()][:SAMPLE_LINES]
    scores: dict[str, tuple[float, str]] = {}  # by how the sample reads
    for encoding in COUNTRIES:
        try:
            texts = [line.decode(encoding) for line in sample]
        except UnicodeDecodeError:
            continue
        text = "\n".join(texts)
        if text not in scores:
            scores[text] = (_likeness(text, encoding), encoding)
    if not scores:
        return Guess(None, [])
    ranked = sorted(((score, encoding, text) for text, (score, encoding) in scores.items()), key=lambda item: -item[0])
    likely = [item for item in ranked if item[0] >= min(LEAST_LIKELY, ranked[0][0] - LEAD)]
    readings = _readings([(encoding, text.split("\n")) for _, encoding, text in likely[:READINGS]])
    if not likely or likely[0][0] < 1 - LEAD / 5:
        return Guess(None, readings)
    best, encoding, text = likely[0]
    alone = len(ranked) == 1 or best - ranked[1][0] >= LEAD
    enough = sum(not character.isascii() for character in text) >= FEWEST_CHARACTERS
    return Guess(encoding if alone and enough else None, readings)


def _readings(likely: Sequence[tuple[str, list[str]]]) -> list[tuple[str, str]]:
    """The same piece of the sample in each encoding: one in which they differ."""
    lines = list(zip(*(texts for _, texts in likely), strict=False))
    if not lines:
        return []
    telling = max(lines, key=lambda line: len(set(line)))
    first = next((place for place, column in enumerate(zip(*telling, strict=False)) if len(set(column)) > 1), None)
    if first is None:
        first = next((place for place, character in enumerate(telling[0]) if not character.isascii()), 0)
    begin = max(first - SHOWN_CHARACTERS // 4, 0)
    pieces = (line[begin : begin + SHOWN_CHARACTERS] for line in telling)
    shown = ("".join(c if c.isprintable() else "?" for c in piece).strip() for piece in pieces)
    return [(encoding, piece) for (encoding, _), piece in zip(likely, shown, strict=True)]


def _likeness(text: str, encoding: str) -> float:
    """Which share of the characters beyond ASCII stands where it would in written text."""
    likely = total = letters = capitals = kana = 0.0
    characters = [" ", *text, " "]
    for before, character, after in zip(characters, characters[1:], characters[2:], strict=False):
        if not character.isascii():
            total += 1
            likely += _fits(before, character, after, encoding)
            letters += character.isalpha()
            capitals += character.isupper()
            kana += "\u3040" <= character <= "\u30ff"
    if not total:
        return 0.0
    # Japanese without a syllable of its own is something else, and titles in capitals throughout are so rather.
    if encoding in ("cp932", "euc_jp") and kana < letters * 0.05:
        return likely / total * 0.7
    return likely / total * (0.95 if capitals > letters * 0.6 else 1.0)


def _fits(before: str, character: str, after: str, encoding: str) -> float:
    category = unicodedata.category(character)
    if character in _SIGNS:  # a sign has no letters on both of its sides
        return 0.0 if before.isalpha() and after.isalpha() and character not in "’·・ー" else 1.0
    if category[0] == "M":
        return 1.0 if before.isalpha() or unicodedata.category(before)[0] == "M" else 0.0
    if category[0] != "L":
        return 0.0
    script = _script(character)
    if script in ("CJK", "HANGUL"):
        return _daily(character, script, encoding)
    if script in ("HIRAGANA", "KATAKANA"):
        return 1.0 if encoding in ("cp932", "euc_jp") else 0.5
    if character.isupper() and before.islower():
        return 0.0
    if script == "LATIN" and all(other.isalpha() and not other.isascii() for other in (before, after)):
        return 0.0  # words of accented letters alone
    return float(all(_script(other) == script for other in (before, after) if other.isalpha()))


def _script(character: str) -> str:
    return "LATIN" if character.isascii() else unicodedata.name(character, "").split(" ")[0].split("-")[0]


def _daily(character: str, script: str, encoding: str) -> float:
    if script == "HANGUL":
        return 1.0 if encoding == "cp949" else 0.0
    if encoding not in _DOUBLE_BYTE_LEADS:
        return 0.2
    codec, first, last = _DOUBLE_BYTE_LEADS[encoding]
    try:
        lead = character.encode(codec)[0]
    except UnicodeEncodeError:
        return 0.0
    return 1.0 if first <= lead <= last else 0.2
