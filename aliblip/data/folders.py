"""What lies in a local folder: every file is of a kind that is read, or it is counted with the reason why not.

    survey = Survey.of("catalogue")
    survey.data["table"], survey.photo_names(), survey.left

Links are followed, each folder once. Thumbnails of a NAS, hidden folders and the like hold no products.
"""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from aliblip.data.kinds import kind_by_content, kind_by_name, skipped_folder
from aliblip.runtime.installation import install_hint
from reading_aliblip import reads_heic

__all__ = ["DATA_KINDS", "Left", "Survey", "count_of"]

DATA_KINDS = ("parquet", "tar", "table", "text")
# Ends of the names of files that tell about the photo of the same name.
SIDE_ENDINGS = (".txt", ".json", ".caption")
FEWEST_SIDES = 10
EXAMPLES = 3
# Texts in a folder of their own that are looked at.
PROBED_TEXTS = 20
# Folders that may be that, of one folder of photos.
MOST_ALIKE = 16
# Files of a folder that is passed over are counted up to this number.
MOST_COUNTED = 10_000
NAMES = {"parquet": "Parquet file", "tar": "tar", "table": "table", "text": "text file", "photo": "photo"}
REASONS = {
    "hidden": "hidden files",
    "system": "files of the system, and thumbnails",
    "description": "descriptions of a data set",
    "document": "documents",
    "archive": "archives (unpack them to use what they hold)",
    "packed tar": "tars packed by zstd (unpack them: zstd -d)",
    "sheet": "spreadsheets (save them as CSV in UTF-8 to use them)",
    "arrow": "Arrow files (write a data set that was saved with datasets.load_from_disk(FOLDER).to_parquet(FILE))",
    "data": "files of other kinds of data (save tables as CSV in UTF-8, or as Parquet, to use them)",
    "drawing": "drawings and raw photos (save them as JPEG or PNG to use them)",
    "video": "videos and sound",
    "unfinished": "unfinished downloads",
    "empty": "empty files",
    "unrelated": "tables without photos and titles (name one by flags to read it)",
    "unreadable": "files that can't be opened",
    "special": "devices and pipes",
    "other": "files of no known kind",
}


@dataclass
class Left:
    """Files that are not read, for one reason."""

    count: int = 0
    names: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str, count: int = 1) -> None:
        """Count a file, or a folder of so many."""
        self.count += count
        self.names += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(name)

    def told(self) -> str:
        """For people: "12 (a.txt, b.txt, c.txt, ...)"."""
        more = ", ..." if self.names > len(self.examples) else ""
        return f"{self.count:,} ({', '.join(self.examples)}{more})"


def count_of(count: int, kind: str) -> str:
    """For people: "3 tars"."""
    name = NAMES.get(kind, kind)
    return f"{count:,} {name}" + ("" if count == 1 else "s")


class Survey:
    """The files of a folder.

    Attributes:
        root: the folder.
        data: kind -> paths of such files, relative to the root and sorted.
        left: reason -> the files that are left for it.
        found: for people, what was found.
        is_compared: whether rows name photos by file, and these were compared with the folder's.
    """

    def __init__(self, root: str):
        self.root = root
        self.data: dict[str, list[str]] = {kind: [] for kind in DATA_KINDS}
        self.left: dict[str, Left] = {}
        self.is_compared = False
        self.found = ""
        # By folder; names are joined, since millions of Python strings would take gigabytes.
        self._photos: dict[str, str] = {}
        self._photo_counts: dict[str, int] = {}
        self._sides: dict[str, str] = {}
        # Of a folder of photos the one that its side files lie in, where that is another; and files that may be such.
        self.side_folders: dict[str, str] = {}
        self._loose: dict[str, list[str]] = {}
        self._seen: set[tuple[int, int]] = set()
        self._links: list[str] = []

    @classmethod
    def of(cls, root: str) -> Survey:
        """Look through a folder.

        Raises:
            OSError: the folder can't be read.
        """
        survey = cls(root)
        survey._walk("")
        while survey._links:  # after the folders themselves, so that these count under their own names
            survey._walk(survey._links.pop(0))
        survey._pair_folders()
        for files in survey.data.values():
            files.sort()
        survey.found = survey._counted()
        return survey

    @property
    def num_photos(self) -> int:
        """Photos that can be read."""
        return sum(self._photo_counts.values())

    @property
    def num_sided(self) -> int:
        """Photos with a text or JSON file of the same name beside them."""
        return sum(len(self._sided(folder)) for folder in self._sides)

    def photo_folders(self) -> list[str]:
        """Folders that hold photos, relative to the root."""
        return list(self._photos)

    def photo_names(self, below: str = "") -> Iterator[str]:
        """Paths of all photos relative to the root, in no order; only those below a folder, if one is given."""
        for folder, names in self._photos.items():
            if below and folder != below and not folder.startswith(f"{below}/"):
                continue
            for name in names.split("\0"):
                yield f"{folder}/{name}" if folder else name

    def sided_photos(self) -> Iterator[tuple[str, list[str]]]:
        """(path of a photo, paths of its side files) where there are some, relative to the root, in no order."""
        for folder in self._sides:
            prefix = _prefix(folder)
            beside = _prefix(self.side_folders.get(folder, folder))
            for photo, sides in self._sided(folder).items():
                yield prefix + photo, [beside + side for side in sides]

    def _sided(self, folder: str) -> dict[str, list[str]]:
        exact: dict[str, list[str]] = {}
        alike: dict[str, list[str]] = {}
        for side in self._sides[folder].split("\0"):
            stem = os.path.splitext(side)[0]
            exact.setdefault(stem, []).append(side)
            if not stem.isascii():
                alike.setdefault(_composed(stem), []).append(side)
        found = {}
        for name in self._photos[folder].split("\0"):
            stem = os.path.splitext(name)[0]
            if sides := exact.get(stem) or alike.get(_composed(stem)):
                found[name] = sorted(sides)
        return found

    def leave(self, reason: str, name: str, count: int = 1) -> None:
        """Count a file that is not read."""
        self.left.setdefault(reason, Left()).add(name, count)

    def leave_data(self, kind: str, reason: str, files: list[str] | None = None) -> None:
        """Count files of a kind of data that are not read, all of them or some."""
        gone = set(self.data[kind] if files is None else files)
        for file in self.data[kind]:
            if file in gone:
                self.leave(reason, file)
        self.data[kind] = [file for file in self.data[kind] if file not in gone]

    # ------------------------------------------------------------------------------------------------------- walking

    def _walk(self, start: str) -> None:
        pending = [start]
        while pending:
            folder = pending.pop()
            path = os.path.join(self.root, folder)
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in self._seen:
                self.leave("links to folders that are read already", folder)
                continue
            self._seen.add((status.st_dev, status.st_ino))
            pending += reversed(self._enter(folder, path))

    def _enter(self, folder: str, path: str) -> list[str]:
        """Take the files of one folder; its sub-folders that are to be entered."""
        folders, photos, sides = [], [], []
        prefix = f"{folder}/" if folder else ""
        try:
            with os.scandir(path) as entries:
                entries = sorted(entries, key=lambda entry: entry.name)
        except PermissionError:
            self.leave("folders that can't be opened", folder or self.root)
            return []
        for entry in entries:
            name = prefix + entry.name
            if _leads_to(entry.is_dir):
                if (reason := skipped_folder(entry.name)) is not None:
                    self.leave(reason, name, _count_files(entry.path))
                elif entry.is_symlink():
                    self._links.append(name)
                else:
                    folders.append(name)
            elif not _leads_to(entry.is_file):
                self.leave("broken links" if entry.is_symlink() else REASONS["special"], name)
            else:
                self._take(entry, name, photos, sides)
        self._settle_sides(folder, prefix, photos, sides)
        return folders

    def _take(self, entry: os.DirEntry, name: str, photos: list[str], sides: list[str]) -> None:
        kind = kind_by_name(entry.name)
        if kind is None:
            kind = kind_by_content(entry.path)
        if kind == "photo" or (kind == "heic" and reads_heic()):
            photos.append(entry.name)
        elif kind in DATA_KINDS or (kind == "other" and entry.name.lower().endswith(SIDE_ENDINGS)):
            if entry.name.lower().endswith(SIDE_ENDINGS):
                sides.append(entry.name)
            else:
                self.data[kind].append(name)
        elif kind == "heic":
            self.leave(f"HEIC photos ({install_hint('heic')} makes them readable)", name)
        else:
            self.leave(REASONS[kind], name)

    def _settle_sides(self, folder: str, prefix: str, photos: list[str], sides: list[str]) -> None:
        """Tell the files that belong to a photo from tables and texts of their own."""
        stems = {_composed(os.path.splitext(photo)[0]) for photo in photos}
        own = [side for side in sides if _composed(os.path.splitext(side)[0]) in stems]
        if len(own) < min(FEWEST_SIDES, len(photos) / 2):
            own = []
        taken = set(own)
        for side in sides:
            if side not in taken:
                kind = kind_by_name(side)
                if kind in DATA_KINDS:
                    self.data[kind].append(prefix + side)
                else:
                    self.leave(REASONS["other"], prefix + side)
        if sides and not photos:
            self._loose[folder] = sides
        if photos:
            self._photos[folder], self._photo_counts[folder] = "\0".join(photos), len(photos)
        if own:
            self._sides[folder] = "\0".join(own)

    def _pair_folders(self) -> None:
        """Find side files that lie in a folder of their own, "labels/train/7.txt" of "images/train/7.jpg": where most
        of the photos have one there, and most of the files a photo; and nowhere else."""
        alike: dict[tuple[str, ...], list[str]] = {}
        for folder in self._loose:
            for frame in _frames(folder):
                alike.setdefault(frame, []).append(folder)
        pairs: dict[str, list[str]] = {}
        for photos in self._photos if alike else ():
            near = {folder for frame in _frames(photos) for folder in alike.get(frame, ())}
            if photos in self._sides or len(near) > MOST_ALIKE:
                continue
            stems = self._stems(photos)
            found = [folder for folder in sorted(near) if self._belongs(folder, stems)]
            if len(found) == 1:
                pairs.setdefault(found[0], []).append(photos)
        # Whose files of several folders of photos are would be a guess, and one file alone may be a table.
        pairs = {folder: photos for folder, photos in pairs.items() if len(photos) == 1}
        if sum(len(self._loose[folder]) for folder in pairs) < 2:
            pairs = {}
        gone: set[str] = set()
        for folder, (photos,) in pairs.items():
            sides = self._loose[folder]
            gone |= {_prefix(folder) + side for side in sides}
            stems = self._stems(photos)
            for side in sides:
                if _composed(os.path.splitext(side)[0]) not in stems:
                    self.leave(f"files without a photo of their name in {photos}", _prefix(folder) + side)
            self._sides[photos], self.side_folders[photos] = "\0".join(sides), folder
        if gone:
            for kind in DATA_KINDS:
                self.data[kind] = [file for file in self.data[kind] if file not in gone]
        self._loose = {}

    def _stems(self, folder: str) -> set[str]:
        return {_composed(os.path.splitext(name)[0]) for name in self._photos[folder].split("\0")}

    def _belongs(self, folder: str, stems: set[str]) -> bool:
        """Whether a folder's files are titles of photos of these names."""
        own = {_composed(os.path.splitext(side)[0]) for side in self._loose[folder]}
        return len(own & stems) * 2 > max(len(own), len(stems)) and self._say_something(folder, self._loose[folder])

    def _say_something(self, folder: str, sides: list[str]) -> bool:
        """Whether files are no mere numbers, as boxes around things are written."""
        texts = [side for side in sides if not side.lower().endswith(".json")]
        probed = texts[:: max(len(texts) // PROBED_TEXTS, 1)]
        spoken = 0
        for side in probed:
            with suppress(OSError), open(os.path.join(self.root, folder, side), "rb") as stream:
                spoken += any(map(str.isalpha, stream.read(1000).decode("utf-8", "replace")))
        return spoken * 2 >= len(probed)

    # ------------------------------------------------------------------------------------------------------ reporting

    def _counted(self) -> str:
        """What was found, before anything of it is left for what else there is."""
        kinds = {**{kind: len(files) for kind, files in self.data.items()}, "photo": self.num_photos}
        parts = [count_of(count, kind) for kind, count in kinds.items() if count]
        sides = sum(names.count("\0") + 1 for names in self._sides.values())
        parts += [f"{sides:,} files beside photos"] if sides else []
        left = sum(entry.count for entry in self.left.values())
        parts += [f"{left:,} other{'' if left == 1 else 's'}"] if left else []
        return ", ".join(parts) or "nothing"


def _prefix(folder: str) -> str:
    return f"{folder}/" if folder else ""


def _frames(folder: str) -> Iterator[tuple[str, ...]]:
    """The path of a folder with one of its names left out, each in turn."""
    parts = folder.split("/")
    for place in range(len(parts)):
        yield (*parts[:place], "", *parts[place + 1 :])


def _leads_to(is_kind: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind; a link to itself is of none."""
    try:
        return is_kind()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _composed(name: str) -> str:
    """Equal for names that only store letters with marks otherwise, as archives of a Mac do."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _count_files(folder: str) -> int:
    count = 0
    for _, _, files in os.walk(folder):
        count += len(files)
        if count >= MOST_COUNTED:
            break
    return count
