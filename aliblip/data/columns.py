"""What of a table is read: what the user asked for, and the columns that were found for it."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aliblip.runtime.mistakes import UsageError

__all__ = [
    "ALL",
    "CAPTION_NAMES",
    "IMAGE_NAMES",
    "SHARE_OF_IDS",
    "Asked",
    "Columns",
    "Reading",
    "Request",
    "Roles",
    "choose_columns",
    "further_photos",
    "listed",
    "similar_name",
]

# Of `other_columns`: every column that there is, but the photos.
ALL = "all"
# Names of a message.
MOST_LISTED = 50
# What people call the columns of tables, in small letters and without signs; an earlier one is preferred.
IMAGE_NAMES = (
    *("image", "filename", "imagepath", "imagefile", "imagefilename", "imagename", "filepath", "path", "file"),
    *("photo", "picture", "img", "imgpath", "imagelink", "imageurl", "imagesrc", "mainimageid", "images"),
    *("mainimageurl", "mainimage", "baseimage", "image1", "imageurl1", "photo1", "picurl", "pictureurl", "photourl"),
    *("imgurl", "url", "imagebytes", "jpg", "png", "webp", "product"),
)
CAPTION_NAMES = (
    *("caption", "text", "title", "captions", "titles", "sentences", "sentence", "raw", "comment", "producttitle"),
    *("productname", "productdisplayname", "itemname", "prodname", "name", "description"),
)
# What further columns of photos are called.
_FURTHER_PHOTOS = re.compile(
    "(other|additional|further|extra|more|small|large|thumbnail|swatch|variant|back|front|side)?"
    "(image|img|photo|picture|pic)s?(url|link|src|path|file)?s?(highres|hires)?[0-9]*"
)
# Columns of ids, which may be the names of photos without their endings, where no column is called as one of photos is.
ID_NAMES = ("id", "imageid", "photoid", "itemid", "productid", "articleid", "sku", "itemsku", "asin", "key")
# Of the ids that are looked at, those that must name photos.
SHARE_OF_IDS = 0.9


@dataclass(frozen=True)
class Asked:
    """What the user asked for.

    Attributes:
        image, caption, product_id: names of columns; None leaves it to the defaults.
        others: further columns, or `ALL`.
        sides: what a row must have: "both", or only "images" or "titles".
        by_flags: whether the names came as flags of a command, or as arguments in Python; for messages.
        fetch: whether photos are fetched from addresses that rows name.
    """

    image: str | None = None
    caption: str | None = None
    product_id: str | None = None
    others: Sequence[str] | str = ()
    sides: str = "both"
    by_flags: bool = True
    fetch: bool = False

    def name_of(self, argument: str) -> str:
        """How the user writes an argument."""
        return f"--{argument}" if self.by_flags else argument


@dataclass(frozen=True)
class Reading:
    """How the user says that tables are written; None leaves it to what the files show.

    Attributes:
        delimiter: one character between the fields of CSV files.
        quotes: of CSV files: "doubled", "backslash" or "none", as for `aliblip.data.delimited.Form`.
        names: of the columns of CSV files without a header.
        encoding: of text files, as Python calls it.
        bad_lines: lines of CSV files that are not rows: "refuse" the file, or "skip" them, as unusable rows.
    """

    delimiter: str | None = None
    quotes: str | None = None
    names: Sequence[str] | None = None
    encoding: str | None = None
    bad_lines: str = "refuse"


@dataclass(frozen=True)
class Request:
    """One split of a data set whose files are found: what an opener makes a source of.

    Attributes:
        name: for messages.
        split: its name.
        asked_split: the name that was asked for, which is another where the files are of but one split.
        files: paths or addresses, in order.
        asked: columns and sides.
        folder: the local folder that was opened, if one was.
        image_dir: the folder that file names of photos are relative to, if one was given.
        cache_dir: cache of `datasets`.
        index_dir: folder of the kept indexes of tars, or None.
        reading: how tables are written.
        survey: what lies in the folder, if it was looked through (`aliblip.data.folders.Survey`).
        below: the folder, relative to the survey's root, that the photos of the split lie in.
        told: what is said at the start, a line each; openers add to it.
    """

    name: str
    split: str
    files: list[str]
    asked: Asked
    folder: str | None = None
    image_dir: str | None = None
    cache_dir: str | None = None
    index_dir: str | None = None
    reading: Reading = Reading()
    survey: Any = None
    below: str = ""
    told: list[str] = field(default_factory=list)
    asked_split: str = ""


@dataclass(frozen=True)
class Columns:
    """The columns that are read.

    Attributes:
        image, caption, product_id: names; None is not read.
        others: the further ones.
        takes_all: whether a row gives what it has beyond `others` too, except `photos`.
        photos: columns of photos.
    """

    image: str | None
    caption: str | None
    product_id: str | None
    others: tuple[str, ...] = ()
    takes_all: bool = False
    photos: frozenset[str] = frozenset()

    def names(self) -> list[str]:
        """All of them, each once."""
        return [key for key in dict.fromkeys((self.image, self.caption, self.product_id, *self.others)) if key]


def choose_columns(
    request: Request,
    columns: Sequence[str],
    image_defaults: Sequence[str],
    caption_defaults: Sequence[str] = ("caption", "text"),
    photos: Collection[str] = (),
    by_likeness: bool = False,
) -> Columns:
    """The columns as the user named them, or by default.

    Args:
        request: with the names that the user gave.
        columns: all that there are.
        image_defaults, caption_defaults: the first that is there is taken.
        photos: columns that `ALL` does not mean, beside the photo's own.
        by_likeness: whether a name like those of `IMAGE_NAMES` and `CAPTION_NAMES` will do where no default is there.

    Raises:
        UsageError: one that was named, or has no default, is not there; the message lists what is.
    """
    asked = request.asked
    roles = {"image": image_defaults, "caption": caption_defaults, "product_id": ("product_id",)}
    not_needed = {"images": "caption", "titles": "image"}.get(asked.sides)
    found = {}
    for role, defaults in roles.items():
        given = getattr(asked, role)
        if role == "product_id" and given not in columns and given in {"image", *photos}:
            given = found["image"]  # the photo, by another name
        flag = asked.name_of(f"{role}_column")
        if given is not None and given not in columns and role != not_needed:
            raise UsageError(f"{request.name} has no column '{given}' ({flag}): there are {listed(columns)}")
        found[role] = given or next((column for column in defaults if column in columns), None)
        if found[role] is None and by_likeness and role != "product_id":
            found[role] = similar_name(columns, IMAGE_NAMES if role == "image" else CAPTION_NAMES)
        if found[role] is None and role not in ("product_id", not_needed):
            expected = " or ".join(f"'{column}'" for column in defaults)
            raise UsageError(
                f"{request.name} has no column {expected}: there are {listed(columns)}; name one with {flag}"
            )
    photo_columns = frozenset(photos) | ({found["image"]} if found["image"] else set())
    if asked.others == ALL:
        others = tuple(column for column in dict.fromkeys(columns) if column not in photo_columns)
    else:
        others = tuple(asked.others)
        if missing := [column for column in others if column not in columns]:
            raise UsageError(f"{request.name} has no column '{missing[0]}': there are {listed(columns)}")
    read = {role: None if role == not_needed else column for role, column in found.items()}
    return Columns(**read, others=others, takes_all=asked.others == ALL, photos=photo_columns)


def similar_name(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The column whose name, but for signs and capitals, is the first of `names` that is there."""
    plain: dict[str, str] = {}
    for column in columns:
        plain.setdefault(_plain(column), column)
    return next((plain[name] for name in names if name in plain), None)


def further_photos(columns: Iterable[str]) -> list[str]:
    """Those that are called as columns of photos are, "other_image_url2"."""
    return [column for column in columns if _FURTHER_PHOTOS.fullmatch(_plain(column))]


@functools.lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


class Roles:
    """Which columns may be the photo and which the title, before all columns are known."""

    def __init__(self, asked: Asked):
        self._asked = asked
        self._roles: dict[str, str | None] = {}

    def of(self, column: str) -> str | None:
        """ "image", "caption" or None."""
        if column not in self._roles:
            self._roles[column] = self._role(column)
        return self._roles[column]

    def is_id(self, column: str) -> bool:
        """Whether it may name photos by ids."""
        return self._asked.image is None and self._asked.sides != "titles" and _plain(column) in ID_NAMES

    def watched(self, column: str) -> str | None:
        """As `of`, but "image" also of ids: of these columns facts are gathered."""
        return self.of(column) or ("image" if self.is_id(column) else None)

    def _role(self, column: str) -> str | None:
        for role, given, names in (
            ("image", self._asked.image, IMAGE_NAMES),
            ("caption", self._asked.caption, CAPTION_NAMES),
        ):
            if column == given or (given is None and _plain(column) in names):
                return role
        return None


def listed(names: Iterable[str]) -> str:
    """Names for a message, at most `MOST_LISTED`."""
    names = list(names)
    more = f" and {len(names) - MOST_LISTED:,} more" if len(names) > MOST_LISTED else ""
    return (", ".join(f"'{name}'" for name in names[:MOST_LISTED]) or "none") + more
