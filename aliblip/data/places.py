"""Where the photos lie that a table names: which folder its names are relative to.

place, told = find_place(names, Place("catalogue"), others=["catalogue/photos"])
image, name, problem = place.find("00.jpg")
"""

from __future__ import annotations

import ipaddress
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote, urlsplit

from aliblip.data.missing import ENDINGS, same_name
from aliblip.data.rows import path_inside
from aliblip.data.values import PHOTO_KEYS, embedded_photo, is_address, local_path, photo_in

__all__ = ["Place", "find_place", "folders_below", "folders_beside", "share_found", "with_ending"]

# Sub-folders in which photos are looked for, if they are not where the table says.
MOST_FOLDERS = 64
PROBED = 100
# Keys of an object that are named in a message.
MOST_KEYS = 8
NOT_FETCHED = "the image is an address, and addresses are fetched only with --fetch_photos"
# What a folder of photos is called. A neighbour of another name may be another catalogue with the same file names.
_OF_PHOTOS = re.compile(r"(?i)(^|.*[^a-z])(images?|imgs?|photos?|pictures?|pics?|jpe?gs?|pngs?|media)($|[^a-z].*)")
_NUMBERED = re.compile(r"(.+\.\w{3,4})#\d+")


@dataclass(frozen=True)
class Place:
    """How the photos that a table names are found.

    Attributes:
        folder: that names are relative to; None refuses them.
        roots: folders in which names of whole paths may lie.
        ending: what is added to names.
        unicode: the form of Unicode, "NFC" or "NFD", that names of files have and those of the table have not: archives
            of a Mac hold "ö" as two characters.
        is_numbered: whether a name ends in the number of its title, "a.jpg#0", as those of Flickr8k do.
        is_quoted: whether names are written as in addresses, "a%20b.jpg" and "a b.jpg?v=1" for the file "a b.jpg".
        is_padded: whether blanks around names are none of the files'.
        is_rooted: whether names begin with a slash and are relative all the same, as shops write them.
        capitals: "upper" or "lower" where the endings of the files are so, and those of the table are not: cameras
            write .JPG, and tables that come from Windows need not.
        is_own: whether the table is the user's, on this machine. Another's table names no places of a private network,
            and none in buckets, for which this machine may have keys.
        host: the server that the table comes from, which it may always name.
        fetch: whether addresses are fetched: only if the user asked for it.
    """

    folder: str | None
    roots: tuple[str, ...] = ()
    ending: str = ""
    is_numbered: bool = False
    unicode: str = ""
    is_quoted: bool = False
    is_rooted: bool = False
    is_padded: bool = False
    capitals: str = ""
    is_own: bool = True
    host: str = ""
    fetch: bool = False

    @property
    def names_otherwise(self) -> bool:
        """Whether names of files can't be turned into those of the table."""
        return self.is_numbered or self.is_quoted or self.is_rooted or self.is_padded

    def find(self, value: Any) -> tuple[Any, str | None, str | None]:
        """(bytes, path or address; the name for reports; why there is none) of what a cell says."""
        name = None
        if isinstance(value, dict):
            path = value.get("path")
            name = path if isinstance(path, str) else None
            value, keys = photo_in(value), value
            if value is None and keys and not set(keys) & set(PHOTO_KEYS):
                told = ", ".join(map(repr, list(keys)[:MOST_KEYS]))
                return None, name, f"the image is an object, and none of its keys ({told}) names a photo"
        if value is None or isinstance(value, (bytes, bytearray, memoryview)):
            return value, name, None
        if isinstance(value, str):
            return self._find_text(value, name)
        if self.ending and isinstance(value, int):
            return self._find_text(str(value), name)
        return None, None, "the image file name is not text"

    def _find_text(self, text: str, name: str | None) -> tuple[Any, str | None, str | None]:
        if is_address(text):
            text = text.strip()
            if not self.fetch:
                return None, text, NOT_FETCHED
            if not self.is_own and _is_private(text) and urlsplit(text).netloc != self.host:
                return None, text, "the image is an address of a private network, named by another's table"
            return text, text, None
        try:
            if (data := embedded_photo(text)) is not None:
                return data, name, None
        except ValueError:
            return None, name, "the image is a data URI that can't be decoded"
        if self.is_own and re.match(r"(?:s3|gs|gcs|az|abfs|hf)://", text):
            return (text, text, None) if self.fetch else (None, text, NOT_FETCHED)
        name = text
        text = local_path(text)
        if self.is_padded:
            text = text.strip()
        if self.is_quoted and text == name:
            text = unquote(text.partition("?")[0], errors="surrogateescape")
        if self.folder is None:
            return None, text, "the image is a path, and no image folder was given (--image_dir)"
        if os.path.isabs(text) and "\0" not in text and "://" not in self.folder:
            path = os.path.normpath(text)
            if any(path.startswith(f"{root.rstrip('/')}/") for root in self.roots):
                return path, name, None
            if self.is_rooted:
                path, problem = self._find_inside(text.lstrip("/"))
                return path, name, problem
            told = f"the image file name leads outside the image folder ({self.folder}): give --image_dir the folder"
            return None, text, f"{told} that holds {text[:200]}"
        path, problem = self._find_inside(text)
        return path, name, problem

    def _find_inside(self, text: str) -> tuple[Any, str | None]:
        if self.is_numbered and (match := _NUMBERED.fullmatch(text)) is not None:
            text = match.group(1)
        if self.unicode:
            text = unicodedata.normalize(self.unicode, text)
        if self.capitals:
            text = with_ending(text, self.capitals)
        return path_inside(self.folder, text + self.ending if text.strip() else text)


def share_found(names: Sequence[Any], place: Place) -> float:
    """Of some names the share by which files lie at a place."""
    return _found(place, names) / max(len(names), 1)


def find_place(names: Sequence[Any], place: Place, *others: Iterable[str]) -> tuple[Place, str | None]:
    """The place where some names are found, and what to say of it if it is not the one where they should be.

    Another folder is taken only if it holds at least half of them, and if no other folder holds as many: names such as
    "1.jpg" are in many folders, and those of another shop would be worse than none.

    Args:
        names: values of the photo's column, some from all over the table.
        place: of the folder in which they should be.
        others: further folders, if none is found there: first the nearest, then others, and so on.
    """
    names = [name for name in names[:PROBED] if isinstance(name, (str, int)) and not is_address(name)]
    if place.folder is None or "://" in place.folder or not names:
        return place, None
    here = [place, replace(place, is_numbered=True), *(replace(place, ending=ending) for ending in ENDINGS)]
    if not all(name.isascii() for name in names if isinstance(name, str)):
        here += [replace(place, unicode=form) for form in ("NFD", "NFC")]
    if any(name != name.strip() for name in names if isinstance(name, str)):
        here.append(replace(place, is_padded=True))
    if any("%" in name or "?" in name for name in names if isinstance(name, str)):
        here.append(replace(place, is_quoted=True))
    if any(name.startswith("/") for name in names if isinstance(name, str)):
        here.append(replace(place, is_rooted=True))
    here += [replace(place, capitals=capitals) for capitals in ("upper", "lower")]
    counts = [_found(candidate, names) for candidate in here]
    if max(counts):
        best = here[counts.index(max(counts))]
        return best, _told(place, best)
    if _are_there_otherwise(place, names):  # what is missing then is told with the name that is there
        return place, None
    found = next(filter(None, (_found_in(folders, here, names) for folders in others)), {})
    if not found:
        return place, None
    if len(found) > 1:
        folders = " and ".join(each.folder for each in list(found.values())[:2])
        return place, f"photos of these names lie in several folders ({folders}): give one as --image_dir"
    (best,) = found.values()
    return best, _told(place, best)


def _found_in(folders: Iterable[str], here: Sequence[Place], names: Sequence[Any]) -> dict[tuple[int, int], Place]:
    """The folders that hold most of the names, by the folder itself: a link to it is no other one."""
    found: dict[tuple[int, int], Place] = {}
    best_count = 0
    for folder in folders:
        if not os.path.isdir(folder):
            continue
        for candidate in (replace(each, folder=folder) for each in here):
            count = _found(candidate, names)
            if count and count >= best_count and count * 2 >= len(names):
                found = {} if count > best_count else found
                best_count = count
                status = os.stat(folder)
                found.setdefault((status.st_dev, status.st_ino), candidate)
    return found


def _found(place: Place, names: Sequence[Any]) -> int:
    return sum(os.path.isfile(path) for path, _, _ in map(place.find, names) if isinstance(path, str))


def _are_there_otherwise(place: Place, names: Sequence[Any]) -> bool:
    """Whether most of the names are those of files of the folder, but for how they are written: then photos of the very
    same names elsewhere are others."""
    paths = [path for path, _, _ in map(place.find, names) if isinstance(path, str)]
    return sum(same_name(path) is not None for path in paths) * 2 >= max(len(names), 1)


def with_ending(name: str, capitals: str) -> str:
    """A file's name with its ending in capitals, "upper", or in small letters, "lower"."""
    stem, ending = os.path.splitext(name)
    return stem + getattr(ending, capitals)()


def _told(place: Place, best: Place) -> str | None:
    if best == place:
        return None
    parts = [f"photos are taken from {best.folder}"] if best.folder != place.folder else []
    parts += [f"'{best.ending}' is added to their names"] if best.ending else []
    parts += ["letters with marks are stored otherwise in their names"] if best.unicode else []
    parts += [f"their endings are in {best.capitals} case, other than in the table"] if best.capitals else []
    parts += ["the number behind their names is left out"] if best.is_numbered else []
    parts += ["their names are taken without the blanks around them"] if best.is_padded else []
    parts += ["their names are taken without the '/' at the beginning"] if best.is_rooted else []
    parts += ["their names are written as in addresses (%20, ?v=1)"] if best.is_quoted else []
    return ", ".join(parts)


def _is_private(address: str) -> bool:
    """Whether an address names this machine or one of its network; names are not looked up."""
    try:
        host = (urlsplit(address).hostname or "").rstrip(".")
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".localhost", ".lan"))


def folders_below(folder: str) -> list[str]:
    """Some sub-folders of a folder, by name: those in which photos may lie."""
    folder = os.path.normpath(folder)
    try:
        with os.scandir(folder) as entries:
            found = sorted(entry.path for entry in entries if not entry.name.startswith(".") and entry.is_dir())
    except OSError:
        return []
    return found[:MOST_FOLDERS]


def folders_beside(folder: str) -> list[str]:
    """The neighbours of a folder that are called as folders of photos are."""
    beside = folders_below(os.path.join(folder, ".."))
    return [path for path in beside if _OF_PHOTOS.fullmatch(os.path.basename(path))]
