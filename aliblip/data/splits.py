"""Which files of a folder are which split: by one rule, which is told, and never by a word that happens to be in it.

1. Folders. All files lie in folders that are called as splits are (`train/`, `validation/`, `test/`).
2. Names. All files are named alike but for the split and numbers: `train-00000.parquet` and `validation-00000.parquet`,
   `captions_train2014.json` and `captions_val2014.json`.
3. A split of another name that is asked for: a folder of just that name, or files such as `season1.csv`.
4. Otherwise the folder has no splits: all of it is "train". Where names of several splits, or of one to test on, occur
   beside others, that would be a guess, and is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from aliblip.data.columns import listed
from aliblip.runtime.mistakes import UsageError

__all__ = ["Splits", "plain_split", "splits_of"]

TRAIN = "train"
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
_SHARDED = re.compile(r"(.+)-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Splits:
    """The files of each split, and the sentence that says how they were told apart ("" if there is but one)."""

    files: dict[str, list[str]]
    told: str = ""


def plain_split(name: str) -> str:
    """The split that a name means: "validation" of "val"."""
    return _SPLIT_OF.get(name.lower(), name)


def splits_of(files: Sequence[str], asked: str, name: str) -> Splits:
    """Split the files of a folder.

    Args:
        files: paths relative to the folder, with slashes.
        asked: the split that is asked for.
        name: of the folder, for messages.

    Raises:
        UsageError: some files are named like splits, and others are not.
    """
    if asked.lower() not in _SPLIT_OF and (own := [file for file in files if _is_of(file, asked)]):
        return Splits({asked: own}, f"only files that are called '{asked}' are read" if len(own) < len(files) else "")
    marks = [_folder_mark(file) for file in files]
    if files and all(marks):
        return _by(marks, files, "by folder")
    if not any(marks):
        named = [_name_mark(file) for file in files]
        if files and all(named) and _are_alike(named):
            return _by([split for split, _ in named], files, "by file name")
        marks = [mark and mark[0] for mark in named]
    words = {mark for mark in marks if mark}
    if words <= {TRAIN}:
        odd = [file for file, mark in zip(files, marks, strict=True) if mark]
        told = f"no splits: '{odd[0]}' is called as one, the others are not, and all are read" if odd else ""
        return Splits({TRAIN: list(files)}, told if len(odd) < len(files) else "")
    marked = [file for file, mark in zip(files, marks, strict=True) if mark]
    others = [file for file, mark in zip(files, marks, strict=True) if not mark]
    if not others and len(words) == 1:
        return Splits({words.pop(): list(files)})
    what = f"and not {listed(others[:3])}" if others else "but they are not named alike"
    raise UsageError(
        f"{name}: some files are called as splits are ({listed(marked[:3])}), {what}, so that it is a guess what to "
        "read: put the files into folders train/, validation/ and test/, rename them, or name the files of each split "
        "by flags"
    )


def _by(marks: Sequence[str], files: Sequence[str], told: str) -> Splits:
    found: dict[str, list[str]] = {}
    for mark, file in zip(marks, files, strict=True):
        found.setdefault(mark, []).append(file)
    counts = ", ".join(f"{split} ({len(members)})" for split, members in found.items())
    return Splits(found, f"splits {told}: {counts}" if len(found) > 1 else "")


def _folder_mark(file: str) -> str | None:
    """The split that a folder of the path is called by."""
    return next((_SPLIT_OF[part] for part in file.lower().split("/")[:-1] if part in _SPLIT_OF), None)


def _name_mark(file: str) -> tuple[str, tuple[str, ...]] | None:
    """The split that a word of the file's name is, and the other words; None if none is, or several are."""
    stem = file.rsplit("/", 1)[-1].split(".", 1)[0].lower()
    words = [word for word in re.split(r"[-_ \d]+", stem) if word and word != "of"]
    found = [word for word in words if word in _SPLIT_OF]
    if len(found) != 1:
        return None
    return _SPLIT_OF[found[0]], tuple("*" if word in _SPLIT_OF else word for word in words)


def _are_alike(named: Sequence[tuple[str, tuple[str, ...]]]) -> bool:
    """Whether names differ in nothing but the split, or each of their kinds has several splits."""
    splits: dict[tuple[str, ...], set[str]] = {}
    for split, frame in named:
        splits.setdefault(frame, set()).add(split)
    return len(splits) == 1 or all(len(found) > 1 for found in splits.values())


def _is_of(file: str, split: str) -> bool:
    first, _, rest = file.partition("/")
    stem = file.rsplit("/", 1)[-1].split(".", 1)[0]
    sharded = _SHARDED.fullmatch(stem)
    return (bool(rest) and first == split) or stem == split or (sharded is not None and sharded.group(1) == split)
