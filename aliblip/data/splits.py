"""Which files of a folder are which split: by one rule, which is told, and never by a word that happens to be in it.

1. Folders. All files lie in folders that are called as splits are (`train/`, `validation/`, `test/`).
2. Names. All files are named alike but for the split and numbers: `train-00000.parquet` and `validation-00000.parquet`,
   `captions_train2014.json` and `captions_val2014.json`.
3. A split of another name that is asked for: a folder of just that name, or files such as `season1.csv`.
4. Otherwise the folder has no splits: all of it is "train". Where names of several splits, or of one to test on, occur
   beside others, that would be a guess, and is refused; only tables may lie beside files of several splits, and are
   named as left.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from aliblip.data.columns import listed
from aliblip.runtime.mistakes import UsageError

__all__ = ["Splits", "split_word", "splits_of"]

TRAIN = "train"
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {word: split for split, words in WORDS.items() for word in words}
_SHARDED = re.compile(r"(.+)-\d{5}-of-\d{5}")


def split_word(name: str) -> str | None:
    """The split that a word says, "validation" for "val"; None if it says none."""
    return _SPLIT_OF.get(name.lower())


@dataclass(frozen=True)
class Splits:
    """The files of each split.

    Attributes:
        files: split -> its files.
        told: how they were told apart; "" if there is but one split.
        left: files of no split.
        words: by which words of their names splits may be asked for, beside their own.
    """

    files: dict[str, list[str]]
    told: str = ""
    left: tuple[str, ...] = ()
    words: frozenset[str] = frozenset()

    def find(self, asked: str) -> str | None:
        """The split that is asked for, also by the word that its files have for it ("val")."""
        if asked in self.files:
            return asked
        plain = _SPLIT_OF.get(asked.lower())
        return plain if plain in self.files and asked.lower() in self.words else None


def splits_of(files: Sequence[str], asked: str, name: str, loose: Collection[str] = ()) -> Splits:
    """Split the files of a folder.

    Args:
        files: paths relative to the folder, with slashes.
        asked: the split that is asked for.
        name: of the folder, for messages.
        loose: files that may lie beside those of several splits.

    Raises:
        UsageError: some files are named like splits, and others are not.
    """
    if asked.lower() not in _SPLIT_OF and (own := [file for file in files if _is_of(file, asked)]):
        left = tuple(file for file in files if file not in set(own))
        return Splits({asked: own}, f"only files that are called '{asked}' are read" if left else "", left)
    marks, are_alike = [_folder_mark(file) for file in files], True
    how = "by folder"
    if not any(marks):
        named = [_name_mark(file) for file in files]
        marks, how = [mark and mark[0] for mark in named], "by file name"
        are_alike = _are_alike([mark for mark in named if mark])
    marked = [(mark, file) for mark, file in zip(marks, files, strict=True) if mark]
    others = [file for mark, file in zip(marks, files, strict=True) if not mark]
    splits = {mark for mark, _ in marked}
    if are_alike and marked and (not others or (len(splits) > 1 and set(others) <= set(loose))):
        return _by(marked, how, tuple(others))
    if splits <= {TRAIN}:
        told = ""
        if marked and others:
            told = f"no splits: '{marked[0][1]}' is called as one, the others are not, and all are read"
        return Splits({TRAIN: list(files)}, told)
    if not others and len(splits) == 1:
        return _by(marked, how, ())
    what = f"and not {listed(others[:3])}" if others else "but they are not named alike"
    raise UsageError(
        f"{name}: some files are called as splits are ({listed([file for _, file in marked[:3]])}), {what}, so that it "
        "is a guess what to read: put the files into folders train/, validation/ and test/, rename them, or name the "
        "files of each split by flags"
    )


def _by(marked: Sequence[tuple[str, str]], how: str, left: tuple[str, ...]) -> Splits:
    found: dict[str, list[str]] = {}
    for mark, file in marked:
        found.setdefault(mark, []).append(file)
    words = {word for _, file in marked for word in re.split(r"[^a-z]+", file.lower()) if word in _SPLIT_OF}
    counts = ", ".join(f"{split} ({len(members)})" for split, members in found.items())
    told = f"splits {how}: {counts}" if len(found) > 1 else ""
    return Splits(found, told, left, frozenset(words))


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
    return len(splits) < 2 or all(len(found) > 1 for found in splits.values())


def _is_of(file: str, split: str) -> bool:
    first, _, rest = file.partition("/")
    stem = file.rsplit("/", 1)[-1].split(".", 1)[0]
    sharded = _SHARDED.fullmatch(stem)
    return (bool(rest) and first == split) or stem == split or (sharded is not None and sharded.group(1) == split)
