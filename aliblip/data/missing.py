"""What to say of a photo whose file is not there: where it was looked for, and what is there instead.

why_missing("photos/00.jpg")          # "the image file is missing: ...; there is '00.JPG', with other capitals: ..."
"""

from __future__ import annotations

import functools
import os
import unicodedata
from urllib.parse import quote, unquote

__all__ = ["ENDINGS", "MISSING", "same_name", "why_missing"]

MISSING = "the image file is missing"
ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG")
ARCHIVES = (".zip", ".tgz", ".tar.gz", ".tar", ".7z", ".rar")
MOST_LISTED = 20_000


def why_missing(path: str) -> str:
    """That the file of a photo is missing, where it was looked for, and what is there instead."""
    folder, name = os.path.split(path)
    told = f"{MISSING}: {path}"
    if os.path.islink(path):
        return f"{told} is a link to {os.readlink(path)}, which is not there"
    if not os.path.isdir(folder or os.curdir):
        there = folder
        while there and not os.path.isdir(there):
            missing, there = there, os.path.dirname(there)
        return f"{told}; there is no folder {missing}{_archives(there or '.')}"
    stem, ending = os.path.splitext(name)
    folder = folder or os.curdir
    names = _names_in(folder, os.stat(folder).st_mtime_ns)
    if (same := names.get(_key(name))) is not None:
        how = "whose letters are stored otherwise" if same.lower() != name.lower() else "with other capitals"
        return f"{told}; there is '{same}', {how}: write the name as the file has it"
    if (same := names.get(_key(name.strip()))) is not None:
        return f"{told}; there is '{same}', without the blanks around its name"
    if (same := names.get(_key(unquote(name)))) is not None:
        return f"{told}; there is '{same}': write names as the files have them, and not as in addresses"
    if (same := names.get(_key(quote(name)))) is not None:
        return f"{told}; there is '{same}': in a file: address write its % as %25, or write its name alone"
    for other in ENDINGS:
        for candidate in (_key(f"{stem}{other}"), _key(f"{name}{other}")):
            if (same := names.get(candidate)) is not None:
                return f"{told}; there is '{same}', with another ending"
    return told + _archives(folder)


def same_name(path: str) -> str | None:
    """The name of a file that is called as a path is, but for capitals and how Unicode stores its letters; or None."""
    folder, name = os.path.split(path)
    folder = folder or os.curdir
    if not os.path.isdir(folder):
        return None
    return _names_in(folder, os.stat(folder).st_mtime_ns).get(_key(name))


def _key(name: str) -> str:
    """Equal for names that differ in capitals, or in how Unicode stores a letter, alone."""
    return unicodedata.normalize("NFC", name).lower()


@functools.lru_cache(maxsize=8)
def _names_in(folder: str, changed: int) -> dict[str, str]:
    """Names of the files of a folder by their keys; of a very large folder none."""
    names: dict[str, str] = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if len(names) >= MOST_LISTED:
                return {}
            names.setdefault(_key(entry.name), entry.name)
    return names


def _archives(folder: str) -> str:
    """What to do with an archive in a folder or the one above, if there is one."""
    for place in (folder, os.path.dirname(os.path.abspath(folder))):
        try:
            names = sorted(
                name for name in os.listdir(place) if name.lower().endswith((".zip", ".tgz", ".tar.gz", ".7z"))
            )
        except OSError:
            continue
        if names:
            return f"; {names[0]} lies in {place}: unpack it there"
    return ""
