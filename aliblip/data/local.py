"""Which files of this machine are read, of a folder or of paths and patterns that are given, and as what.

    found = find_in_folder("catalogue", split="train", sides="both", any_split=False)
    found = find_files(["shard-{000..012}.tar"], split="train", sides="both")

Nothing is left out without a word: what is not read stands in `Survey.left`, and data of several kinds is refused.
"""

from __future__ import annotations

import filecmp
import glob
import os
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

import pyarrow as pa
import pyarrow.parquet as pq

from aliblip.data.columns import SHARE_OF_IDS, Asked, Reading, Roles, listed
from aliblip.data.folders import REASONS, Survey, count_of
from aliblip.data.kinds import PACKED_TARS, kind_by_content, kind_by_name
from aliblip.data.splits import Splits, splits_of
from aliblip.data.tables import base_name, ids_in, is_table_of_text, may_hold_rows, plain_extension
from aliblip.runtime.mistakes import UsageError

__all__ = ["Found", "expanded", "find_files", "find_in_folder", "kind_of_files"]

# Of kinds of files the kinds of sources.
SOURCES = {"parquet": "parquet", "tar": "webdataset", "table": "records", "text": "text", "sided": "sided"}
LFS_POINTER = b"version https://git-lfs"
# Of both ends of files of the same size, before all of them is compared.
END_BYTES = 2**16
_PARTITION = re.compile(r"\w+=.*")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass
class Found:
    """What is read.

    Attributes:
        kind: of source: "parquet", "webdataset", "metadata" (tables in a folder of photos), "records", "text",
            "sided" (photos with a text beside each) or "photos".
        files: paths, in order.
        split: the name of the split that was found.
        survey: of the folder, if one was looked through.
        below: the folder, relative to the survey's root, that the photos of this split lie in.
        told: for the report.
        lacks_split: why these files are not the split that was asked for, unless they tell splits themselves.
    """

    kind: str
    files: list[str]
    split: str
    survey: Survey | None = None
    below: str = ""
    told: list[str] = field(default_factory=list)
    lacks_split: str | None = None


# -------------------------------------------------------------------------------------------------------------- folders


def find_in_folder(folder: str, name: str, split: str, asked: Asked, reading: Reading, any_split: bool) -> Found:
    """The files of one split of a folder.

    Raises:
        UsageError: no data, data of several kinds, or no such split; the message names files and the way out.
    """
    folder = os.path.realpath(folder)  # so that a run is the same by whatever name its folder is called
    survey = Survey.of(folder)
    _leave_side_files(survey)
    _settle_texts(survey, asked, reading)
    _prefer_metadata(survey)
    needs_no_table = asked.sides == "images" and survey.num_photos > 0
    # Beside what holds rows of its own there are tables of settings, prices, statistics.
    if needs_no_table or survey.data["parquet"] or survey.data["tar"]:
        others = [file for file in survey.data["table"] if not _holds_rows(survey, file, reading, asked)]
        survey.leave_data("table", REASONS["unrelated"], others)
    if needs_no_table and not any(survey.data[kind] for kind in ("parquet", "tar", "table")):
        survey.leave_data("text", "text files")
        return Found("photos", [], "all photos", survey)
    units = {kind: list(files) for kind, files in survey.data.items()}
    if not any(units.values()):
        units["sided"] = sorted({(posixpath.dirname(photo) or ".") + "/" for photo, _ in survey.sided_photos()})
    every = [file for files in units.values() for file in files]
    if not every:
        raise UsageError(_nothing(survey, name, split))
    splits = splits_of(every, split, name, loose=units["table"] + units["text"])
    lacks_split = None
    if not any_split and splits.find(split) is None and all(map(_may_tell_splits, every)):
        lacks_split, any_split = _no_split(splits, split, name), True
    split, files = _of_split(splits, split, name, any_split)
    chosen = {kind: [file for file in members if file in files] for kind, members in units.items()}
    kinds = [kind for kind, members in chosen.items() if members]
    packed = survey.left.get(REASONS["packed tar"])
    if kinds == ["tar"] and packed is not None:
        raise UsageError(_packed_tar(os.path.join(folder, packed.examples[0])))
    if len(kinds) > 1:
        raise UsageError(_mixed(chosen, name))
    (kind,) = kinds
    for file in splits.left:
        survey.leave("files of no split", file)
    for other, members in splits.files.items():
        if not files & set(members):
            survey.leave(f"files of the split '{other}'", posixpath.normpath(members[0]), len(members))
    paths = [os.path.join(folder, file) for file in sorted(chosen[kind])]
    if kind != "sided":
        _check_heads(paths)
    if kind not in ("table", "sided"):  # whose rows are compared when it is read: equal names may mean other photos
        _check_copies(paths)
    below = posixpath.commonpath([posixpath.dirname(file) for file in files]) if len(splits.files) > 1 else ""
    told = [*([splits.told] if splits.told else []), *_told_partitions(chosen[kind])]
    found = Found(SOURCES[kind], paths, split, survey, below, told, lacks_split)
    if kind == "table" and all(map(is_metadata, paths)):
        found.kind = "metadata"
    return found


def _told_partitions(files: Iterable[str]) -> Iterator[str]:
    """That names of folders hold values, "color=red", as Spark and Hive write them, which are no columns here."""
    folders = {part for file in files for part in posixpath.dirname(file).split("/") if _PARTITION.fullmatch(part)}
    values = Counter(folder.partition("=")[0] for folder in folders)
    for name in sorted(set(values) - {"split"}):
        example = min(folder for folder in folders if folder.startswith(f"{name}="))
        yield (
            f"'{name}' in the names of folders ({example}, {count_of(values[name], 'value')}) is not read as a column: "
            "write it into the files to use it"
        )


def _check_heads(files: Iterable[str]) -> None:
    """Refuse files that are empty, or that only stand for a file elsewhere."""
    for file in files:
        with open(file, "rb") as stream:
            head = stream.read(64)
        if not head:
            raise UsageError(f"{file} is empty (0 bytes): remove it, or write it again")
        if head.startswith(LFS_POINTER):
            raise UsageError(f"{file} is a pointer of Git LFS, not the file itself: fetch it with git lfs pull")


def _check_copies(files: Sequence[str]) -> None:
    """Refuse files of the same content: each of their rows would be read twice."""
    by_size: dict[int, list[str]] = {}
    for file in files:
        by_size.setdefault(os.path.getsize(file), []).append(file)
    for same in by_size.values():
        ends: dict[bytes, str] = {}
        for file in same if len(same) > 1 else ():
            other = ends.setdefault(_ends(file), file)
            if other != file and filecmp.cmp(other, file, shallow=False):
                raise UsageError(f"{file} is a copy of {other}: remove one of them, or name the files that are meant")


def _ends(file: str) -> bytes:
    with open(file, "rb") as stream:
        first = stream.read(END_BYTES)
        stream.seek(max(stream.seek(0, os.SEEK_END) - END_BYTES, 0))
        return first + stream.read()


def _packed_tar(tar: str) -> str:
    return f"{tar} is a tar packed by zstd, which is not read: unpack it (zstd -d)"


def is_metadata(file: str) -> bool:
    """Whether a file is called as the table of a folder of photos is."""
    return base_name(file).split(".", 1)[0].lower() == "metadata"


def _holds_rows(survey: Survey, file: str, reading: Reading, asked: Asked) -> bool:
    """Whether a table in a folder of photos or beside other data is about photos and titles itself."""
    path, roles = os.path.join(survey.root, file), Roles(asked)
    if is_metadata(file) or may_hold_rows(path, reading, roles):
        return True
    return survey.num_photos > 0 and any(_are_photos(survey, ids) for ids in ids_in(path, reading, roles))


def _are_photos(survey: Survey, ids: set[str]) -> bool:
    """Whether photos of nearly all of these names, but for their endings, lie in one folder, and in no other."""
    counts: Counter[str] = Counter()
    for photo in survey.photo_names():
        folder, name = posixpath.split(photo)
        counts[folder] += posixpath.splitext(name)[0] in ids
    (first, *others) = [count for _, count in counts.most_common(2)]
    return first >= SHARE_OF_IDS * len(ids) and first not in others


def _of_split(splits: Splits, split: str, name: str, any_split: bool) -> tuple[str, set[str]]:
    """The name of the split, and its files."""
    found = splits.find(split)
    if found is not None:
        return split, set(splits.files[found])
    if any_split and len(splits.files) == 1:
        ((split, members),) = splits.files.items()
        return split, set(members)
    raise UsageError(_no_split(splits, split, name))


def _no_split(splits: Splits, split: str, name: str) -> str:
    remedy = "; name the files of each split by flags, or put them in folders of its name"
    remedy = remedy if len(splits.files) == 1 else ""
    return f"{name} has no split '{split}': there are {listed(splits.files)}{remedy}"


def _may_tell_splits(file: str) -> bool:
    """Whether a file may hold several splits itself, as Karpathy's do."""
    return plain_extension(file) == ".json"


def _leave_side_files(survey: Survey) -> None:
    """Leave what img2dataset writes beside its tars, and beside its folders of photos."""
    packed = [tar for tar in survey.data["tar"] if not tar.lower().endswith(".tar")]
    plain = {tar for tar in survey.data["tar"] if tar not in packed}
    survey.leave_data("tar", "tars that lie unpacked beside them", [tar for tar in packed if _unpacked(tar) in plain])
    tars = {os.path.splitext(tar)[0] for tar in survey.data["tar"]}
    folders = {posixpath.dirname(photo) for photo, _ in survey.sided_photos()}
    stems = tars | {folder for folder in folders if base_name(folder).isdecimal()}
    sides = [file for file in survey.data["parquet"] if os.path.splitext(file)[0] in stems and _has_keys(survey, file)]
    parquets = {os.path.splitext(file)[0] for file in survey.data["parquet"]}
    statistics = [
        file
        for file in survey.data["table"]
        if file.endswith("_stats.json") and file.removesuffix("_stats.json") in stems | parquets
    ]
    survey.leave_data("parquet", "side files of img2dataset", sides)
    survey.leave_data("table", "side files of img2dataset", statistics)


def _unpacked(tar: str) -> str:
    stem, extension = os.path.splitext(tar)
    return f"{stem}.tar" if extension.lower() in PACKED_TARS else stem


def _has_keys(survey: Survey, file: str) -> bool:
    try:
        return "key" in pq.read_schema(os.path.join(survey.root, file)).names
    except (pa.ArrowException, OSError):  # which is told when it is opened
        return False


def _settle_texts(survey: Survey, asked: Asked, reading: Reading) -> None:
    """Text files are tables, or titles where titles are asked for."""
    tables = [
        file for file in survey.data["text"] if is_table_of_text(os.path.join(survey.root, file), reading, Roles(asked))
    ]
    survey.data["table"] = sorted(survey.data["table"] + tables)
    others = [file for file in survey.data["text"] if file not in set(tables)]
    survey.data["text"] = others
    if asked.sides != "titles" or any(survey.data[kind] for kind in ("parquet", "tar", "table")):
        survey.leave_data("text", "text files without columns (a title lies beside its photo, under the same name)")


def _prefer_metadata(survey: Survey) -> None:
    """Where a folder of photos has its own table, other tables and texts are about something else."""
    tables = [(kind, file) for kind in ("table", "parquet") for file in survey.data[kind]]
    own = [file for kind, file in tables if is_metadata(file) and (kind == "table" or survey.num_photos)]
    if not own:
        return
    for kind in ("table", "parquet", "text"):
        others = [file for file in survey.data[kind] if file not in set(own)]
        survey.leave_data(kind, f"files beside {base_name(own[0])} (name one by flags to read it instead)", others)


def _mixed(chosen: dict[str, list[str]], name: str) -> str:
    parts = [
        f"{count_of(len(files), kind)} ({', '.join(files[:2])}{', ...' if len(files) > 2 else ''})"
        for kind, files in chosen.items()
        if files
    ]
    return (
        f"{name} holds data of several kinds: {' and '.join(parts)}: one run reads one kind, so move the others out, "
        "or name the files that are meant by flags"
    )


def _nothing(survey: Survey, name: str, split: str) -> str:
    if survey.num_photos:
        told = f"; {left}" if (left := _left(survey)) else ""
        return (
            f"{name} has photos but no metadata.jsonl or metadata.csv in split '{split}': add one with the columns "
            f"file_name and caption, or name a table by flags, with --image_dir{told}"
        )
    packed = survey.left.get(REASONS["packed tar"])
    if packed is not None:
        return _packed_tar(os.path.join(survey.root, packed.examples[0]))
    return (
        f"{name} can't be opened: it holds no Parquet files, tars, tables or photos that can be read"
        f" ({_left(survey) or 'it is empty'})"
    )


def _left(survey: Survey) -> str:
    return "; ".join(f"{reason}: {entry.told()}" for reason, entry in survey.left.items())


# ---------------------------------------------------------------------------------------------- paths that are given


def find_files(
    given: Sequence[str], name: str, split: str, asked: Asked, reading: Reading, base: str | None = None
) -> Found:
    """The files that paths and patterns name, and what they are.

    Args:
        base: the folder that they are relative to.

    Raises:
        UsageError: nothing matches, or files are of several kinds.
    """
    files: list[str] = []
    for pattern in given:
        path = os.path.join(base, pattern) if base else pattern
        if os.path.isdir(path):
            if len(given) > 1:
                raise UsageError(f"{path} is a folder: give it alone, or name files")
            return find_in_folder(path, path, split, asked, reading, any_split=True)
        matches = list(_matches(path))
        if not matches:
            raise UsageError(f"{name} matches no files for split '{split}': check the path or the glob ({path})")
        files += map(os.path.abspath, matches)
    _check_heads(files)
    told = []
    if len(set(files)) < len(files):
        told.append(f"{len(files) - len(set(files)):,} files are named more than once, and are read once")
        files = list(dict.fromkeys(files))
    kind = kind_of_files(files, name, asked, reading)
    if kind != "records":
        _check_copies(files)
    return Found(kind, files, split, told=told)


def _matches(path: str) -> Iterator[str]:
    """Files that a path names: itself, or as a pattern with braces, stars and brackets, sorted."""
    if os.path.isfile(path):
        yield path
        return
    for one in expanded(path):
        if os.path.isfile(one):
            yield one
        elif glob.has_magic(one):
            yield from (match for match in sorted(glob.glob(one, recursive=True)) if os.path.isfile(match))
        elif one != path:
            raise UsageError(f"{path} names {one}, which does not exist")


def expanded(path: str) -> list[str]:
    """The paths that one with braces means: `{000..012}` counts, `{a,b}` lists."""
    parts = re.split(r"\{([^{}]*)\}", path)
    choices = [[part] if index % 2 == 0 else _choices(part) for index, part in enumerate(parts)]
    return ["".join(choice) for choice in product(*choices)]


def _choices(text: str) -> list[str]:
    if (match := _RANGE.fullmatch(text)) is not None:
        first, last = match.groups()
        step = 1 if int(first) <= int(last) else -1
        return [str(number).zfill(len(first)) for number in range(int(first), int(last) + step, step)]
    return text.split(",") if "," in text else [f"{{{text}}}"]


def kind_of_files(files: Sequence[str], name: str, asked: Asked, reading: Reading) -> str:
    """The kind of source that files are.

    Raises:
        UsageError: they are of no kind that is read, or of several.
    """
    kinds: dict[str, str] = {}
    for file in files:
        kind = kind_by_name(base_name(file))
        if kind in (None, "description", "document", "hidden"):
            kind = _by_content(file)
        if kind == "text" and "://" not in file and is_table_of_text(file, reading, Roles(asked)):
            kind = "table"
        kinds.setdefault(kind, file)
    if len(kinds) == 1 and (kind := next(iter(kinds))) in SOURCES:
        return SOURCES[kind]
    if "packed tar" in kinds:
        raise UsageError(_packed_tar(kinds["packed tar"]))
    if "sheet" in kinds:
        raise UsageError(f"{kinds['sheet']} is a spreadsheet, of no known kind for us: save it as CSV in UTF-8")
    if "archive" in kinds:
        raise UsageError(f"{kinds['archive']} is an archive, of no known kind for us: unpack it")
    raise UsageError(
        f"{name} is of no known kind: accepted are Parquet files, tars, or tables (CSV, JSON, JSON lines, feeds in "
        "XML), all of one kind, and for titles alone .txt"
    )


def _by_content(file: str) -> str:
    if "://" in file:
        return "table" if plain_extension(file) == ".xml" else "other"
    kind = kind_by_content(file)
    if kind != "other":
        return kind
    with open(file, "rb") as stream:
        head = stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    return "table" if head[:1] in (b"{", b"[") else "other"
