"""The AliProducts competition's answer file: for every title the names of its five and of its ten best photos.

    rows = submission_rows(titles, photo_names, ids)
    write_submission("submission.json", rows)
    problems = verify_submission("submission.json", titles, photo_names)  # [] where all is right

The file is a JSON list, one object a title, in the order of the titles:

    [{"caption": "red cap", "top5": ["7.jpg", ...], "top10": ["7.jpg", ...]}, ...]

both lists best first, so that top5 is the start of top10; a gallery of fewer photos is listed whole. The files of the
published solution hold each list as text, the `str` of a Python list: `stringified`. Both forms are read.
"""

from __future__ import annotations

import ast
import difflib
import heapq
import json
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from aliblip.runtime.files import read_bytes, write_text
from aliblip.runtime.mistakes import UsageError, usage_errors

__all__ = ["LONGEST_LIST", "read_submission", "submission_rows", "verify_submission", "write_submission"]

LISTS = {"top5": 5, "top10": 10}
KEYS = ("caption", *LISTS)
LONGEST_LIST = max(LISTS.values())
# Twenty thousand titles of usual length make 15 MB.
MAX_FILE_BYTES = 512 * 2**20
# Ten of the longest file names, with every character escaped, are about half of it. Python's parser takes much memory
# for long text.
MAX_LIST_CHARACTERS = 2**16
SHOWN_CHARACTERS = 60
_NONE = object()


def submission_rows(captions: Sequence[str], names: Sequence[str], ids: Tensor | np.ndarray) -> list[dict]:
    """The rows of the file.

    Args:
        captions: the Q titles.
        names: file names of the N photos of the gallery.
        ids: (Q, K) integers, for each title indices into `names`, best first; K at least 10, or N where that is less.

    Raises:
        UsageError: names that several photos have.
        ValueError: ids of another shape, out of range, or twice in one row.
    """
    if repeated := _repeated(names):
        raise UsageError(f"{_ambiguous(repeated)}; give every photo a name of its own")
    if not len(captions):
        return []
    ids = np.asarray(ids.cpu() if isinstance(ids, Tensor) else ids)
    needed = min(LONGEST_LIST, len(names))
    if ids.ndim != 2 or len(ids) != len(captions) or ids.shape[1] < needed:
        raise ValueError(
            f"ids have the shape {ids.shape}: {len(captions)} titles and {len(names)} photos need "
            f"({len(captions)}, {needed} or more)"
        )
    if not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"ids are of type {ids.dtype}: give integers")
    best = ids[:, :needed]
    if best.size and (best.min() < 0 or best.max() >= len(names)):
        raise ValueError(f"ids reach from {best.min()} to {best.max()}, but the gallery has {len(names)} photos")
    ordered = np.sort(best, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if twice.any():
        raise ValueError(f"row {twice.argmax()} of the ids has a photo twice")
    rows = []
    for caption, row in zip(captions, best.tolist(), strict=True):
        found = [names[index] for index in row]
        rows.append({"caption": caption, **{key: found[:length] for key, length in LISTS.items()}})
    return rows


def write_submission(path: str | os.PathLike, rows: Sequence[dict], stringified: bool = False) -> Path:
    """Write the file whole or not at all; its folder is created.

    Args:
        path: the place.
        rows: as from `submission_rows`.
        stringified: write each list as the published solution does, as the text of a Python list.
    """
    path = Path(path)
    lines = []
    for row in rows:
        if stringified:
            row = {**row, **{key: str(list(row[key])) for key in LISTS}}
        # ASCII with escapes, like the published files: titles and names that are not valid Unicode come back as well
        lines.append(json.dumps(row))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n")
    return path


def read_submission(path: str | os.PathLike) -> list[dict]:
    """The rows of a file of either form, with both lists as lists.

    Raises:
        UsageError: it is not such a file; the message names the row, counted from 0.
        OSError: it can't be read.
    """
    rows = []
    for number, row in enumerate(_load(path)):
        try:
            rows.append(_parse_row(row))
        except UsageError as error:
            raise UsageError(f"{path}, row {number}: {error}") from None
    return rows


def verify_submission(
    path: str | os.PathLike, captions: Sequence[str], names: Sequence[str], most: int = 20
) -> list[str]:
    """All that is wrong with a file, one sentence each; an empty list if nothing is.

    Args:
        path: the file, of either form.
        captions: the titles in the order of the data.
        names: file names of the photos of the gallery.
        most: sentences listed; one more says how many others there are. Rows are counted from 0.
    """
    problems, others = [], 0
    for problem, unknown in _problems(path, captions, names):
        if len(problems) == most:
            others += 1
            continue
        if unknown is not None and (closest := _closest(unknown, names)) is not None:
            problem += f"; the closest is {_show(closest, unknown)}"
        problems.append(problem)
    return [*problems, f"and {others} more"] if others else problems


def _problems(path, captions: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Problems, each with the unknown file name that it is about, if any: finding the closest one takes long, and only
    what is listed needs it."""
    if repeated := _repeated(names):
        yield _ambiguous(repeated), None
    try:
        rows = _load(path)
    except (OSError, UsageError) as error:
        reason = f"{path} can't be read: {error.strerror}" if isinstance(error, OSError) else str(error)
        yield reason, None
        return
    for problem in (*_wrong_captions(rows, captions), *_mixed_forms(rows)):
        yield problem, None
    gallery = set(names)
    for number, row in enumerate(rows):
        if missing_or_extra := _wrong_keys(row):
            yield f"row {number} {missing_or_extra}", None
        if not isinstance(row, dict):
            continue
        lists: dict[str, list[str]] = {}
        for key, length in LISTS.items():
            if key not in row:
                continue
            try:
                found = lists[key] = _parse_list(row[key])
            except UsageError as error:
                yield f"row {number}: {key} {error}", None
                continue
            expected = min(length, len(names))
            if len(found) != expected:
                whole = f", the whole gallery of {expected}" if expected < length else ""
                yield f"row {number}: {key} has {len(found)} names instead of {expected}{whole}", None
            for name in _repeated(found):
                yield f"row {number}: {key} has {name!r} {found.count(name)} times", None
        for name in dict.fromkeys(name for found in lists.values() for name in found):
            if name not in gallery:
                where = " and ".join(key for key, found in lists.items() if name in found)
                yield f"row {number}: {name!r} in {where} is no photo of the gallery", name
        if len(lists) == len(LISTS) and lists["top5"] != lists["top10"][: len(lists["top5"])]:
            place = next(
                (place for place, (a, b) in enumerate(zip(*lists.values(), strict=False)) if a != b),
                len(lists["top10"]),
            )
            yield f"row {number}: top5 is not the start of top10, they part at place {place + 1}", None


def _wrong_captions(rows: list, captions: Sequence[str]) -> list[str]:
    # a row without a title has a problem of its own
    given = [row["caption"] if isinstance(row, dict) and "caption" in row else _NONE for row in rows]
    differing = [
        place
        for place, (ours, theirs) in enumerate(zip(captions, given, strict=False))
        if theirs is not _NONE and ours != theirs
    ]

    def at(place: int) -> str:
        ours, theirs = captions[place], given[place]
        if not isinstance(theirs, str):
            return f"row {place}: the caption is not text but {type(theirs).__name__}"
        return f"row {place} has the title {_show(theirs, ours)}, the data has {_show(ours, theirs)}"

    if len(rows) != len(captions):
        first = f", and the first that differs: {at(differing[0])}" if differing else ""
        return [f"the file has {len(rows)} titles, the data has {len(captions)}{first}"]
    if len(differing) > 1 and all(isinstance(title, str) for title in given) and Counter(given) == Counter(captions):
        return [f"the titles are those of the data in another order, {len(differing)} differ: {at(differing[0])}"]
    return [at(place) for place in differing]


def _mixed_forms(rows: list) -> list[str]:
    forms = Counter(type(row[key]) for row in rows if isinstance(row, dict) for key in LISTS if key in row)
    if forms[str] and forms[list]:
        return [f"{forms[list]} lists stand as JSON lists and {forms[str]} as text: use one form for all"]
    return []


# --- reading ----------------------------------------------------------------------------------------------------------


def _load(path: str | os.PathLike) -> list:
    with usage_errors(ValueError, told=f"{path} is no submission ({{}}, and at most {MAX_FILE_BYTES:,} are read)"):
        data = read_bytes(path, MAX_FILE_BYTES)
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list):
        raise UsageError(f"{path} is not a list of objects but {type(rows).__name__}")
    return rows


def _parse_row(row: Any) -> dict:
    if missing_or_extra := _wrong_keys(row):
        raise UsageError(f"it {missing_or_extra}")
    if not isinstance(row["caption"], str):
        raise UsageError(f"the caption is not text but {type(row['caption']).__name__}")
    parsed = {"caption": row["caption"]}
    for key in LISTS:
        try:
            parsed[key] = _parse_list(row[key])
        except UsageError as error:
            raise UsageError(f"{key} {error}") from None
    return parsed


def _wrong_keys(row: Any) -> str | None:
    if not isinstance(row, dict):
        return f"is not an object but {type(row).__name__}"
    missing = [key for key in KEYS if key not in row]
    extra = [_shorten(key) for key in row if key not in KEYS]
    parts = [f"lacks {', '.join(missing)}"] if missing else []
    parts += [f"has other keys than {', '.join(KEYS)}: {', '.join(map(repr, extra[:5]))}"] if extra else []
    return " and ".join(parts) or None


def _parse_list(value: Any) -> list[str]:
    if isinstance(value, str):
        if len(value) > MAX_LIST_CHARACTERS:
            raise UsageError(f"is a text of {len(value):,} characters: at most {MAX_LIST_CHARACTERS:,} are read")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a backslash before a letter is a name's own affair
                parsed = ast.literal_eval(value)  # takes literals only, and runs nothing
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            raise UsageError(f"is text that is no Python list: {_shorten(value)!r}") from None
        if not isinstance(parsed, list):
            raise UsageError(f"is text that is no Python list: {_shorten(value)!r}")
        value = parsed
    if not isinstance(value, list):
        raise UsageError(f"is not a list but {type(value).__name__}")
    for name in value:
        if not isinstance(name, str):
            raise UsageError(f"holds {_shorten(repr(name))}, which is no file name")
    return value


# --- messages ---------------------------------------------------------------------------------------------------------


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _ambiguous(repeated: list[str]) -> str:
    more = f" and {len(repeated) - 3} more" if len(repeated) > 3 else ""
    return f"photos of the gallery share a file name: {', '.join(map(repr, repeated[:3]))}{more}"


def _closest(name: str, names: Sequence[str]) -> str | None:
    # What usually went wrong is found at once: a folder before the name, another ending, upper case, another form of
    # the same accents.
    for same in (os.path.basename, lambda text: os.path.splitext(os.path.basename(_plain(text)))[0].casefold()):
        if wanted := same(name):
            for candidate in names:
                if same(candidate) == wanted:
                    return candidate
    # Comparing the spelling with every one of fifty thousand names takes up to 20 s, and shared pairs of letters 0.2 s.
    pairs = {name[place : place + 2] for place in range(len(name))}
    likely = heapq.nlargest(50, names, key=lambda candidate: sum(pair in candidate for pair in pairs))
    return next(iter(difflib.get_close_matches(name, likely, n=1)), None)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _show(text: str, other: str) -> str:
    """A text for a message: the part where it begins to differ from another, with escapes where they would look
    alike."""
    same = len(os.path.commonprefix([text, other]))
    start = same - SHOWN_CHARACTERS // 2 if same > SHOWN_CHARACTERS // 2 else 0
    part = ("..." if start else "") + _shorten(text[start:])
    return ascii(part) if _plain(text) == _plain(other) else repr(part)


def _shorten(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
