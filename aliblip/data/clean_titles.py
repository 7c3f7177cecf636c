"""Titles without what came into them on the way: markup, entities, broken characters, characters that nobody sees.

clean_markup("Caf\\u00c3\\u00a9 &amp; <b>mug</b>")          # "Café & mug"
title_key("  Red MUG! ") == title_key("red mug!")
"""

from __future__ import annotations

import hashlib
import html
import re
import unicodedata

import ftfy

__all__ = ["clean_markup", "title_key", "words_key"]

# Of HTML, as shops write it; other words between "<" and ">" are text.
_TAGS = "a abbr b big blockquote body br button center code dd del div dl dt em font form h1 h2 h3 h4 h5 h6 head header"
_TAGS += " hr html i iframe img input ins label li link meta nav ol option p pre s script section select small span"
_TAGS += " strike strong style sub sup svg table tbody td tfoot th thead title tr tt u ul"
_TAG = re.compile(
    rf"</?(?:{'|'.join(_TAGS.split())})(?:\s[^<>]*)?/?>|<!--.*?-->|<!doctype[^<>]*>", re.IGNORECASE | re.DOTALL
)
_SCRIPT = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
# Zero width, soft hyphen, marks of direction.
_UNSEEN = re.compile("[\u00ad\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff]")
# Joiners belong to emoji, Persian and the scripts of India: between other characters they are dirt.
_JOINERS = re.compile("(?<![\u0600-\u0fff\u2190-\u2bff\ufe0f\U0001f000-\U0001faff])[\u200c\u200d]+|[\u200c\u200d]+$")
_FIXES = ftfy.TextFixerConfig(
    # What the words are made of stays: quotes, ligatures, wide letters of Chinese and Japanese titles.
    unescape_html=False,
    uncurl_quotes=False,
    fix_latin_ligatures=False,
    fix_character_width=False,
    normalization="NFC",
)


def clean_markup(title: str) -> str:
    """The title as a person would read it: tags and entities resolved, mojibake repaired, unseen characters and
    repeated blanks gone. Empty if nothing else was in it."""
    text = title
    for _ in range(3):  # entities of entities
        unescaped = html.unescape(text)
        if unescaped == text:
            break
        text = unescaped
    text = _TAG.sub(" ", _SCRIPT.sub(" ", text))
    text = ftfy.fix_text(text, _FIXES)
    text = _JOINERS.sub("", _UNSEEN.sub("", text))
    return " ".join(text.split())


def title_key(title: str) -> int:
    """Equal for titles that differ in case, blanks and forms of the same characters only; 64 bits."""
    text = unicodedata.normalize("NFKC", title).casefold()
    return _hash64(" ".join(text.split()))


def words_key(title: str) -> int:
    """Equal for titles of the same words in any order, whatever stands between them and on the letters; 64 bits."""
    text = unicodedata.normalize("NFKD", title).casefold()
    text = "".join(character for character in text if not unicodedata.combining(character))
    return _hash64(" ".join(sorted(set(re.findall(r"\w+", text)))) or title)


def _hash64(text: str) -> int:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
