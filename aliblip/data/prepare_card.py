"""What a prepared catalogue is, in tables: the data card as Markdown, which also tells `datasets` where the splits are.

card = describe(work, count_tokens)
write_text(folder / "README.md", markdown(card))
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from PIL import Image

from aliblip.data.duplicates import Pairs
from aliblip.data.prepare_parts import facts_file, read_facts, read_photos
from aliblip.data.prepare_plan import between_products
from aliblip.data.prepare_run import Preparation
from aliblip.data.prepare_shards import PARTS, SHARDS
from reading_aliblip import read_photo

__all__ = ["Card", "Section", "captions", "describe", "doubtful", "markdown", "photo_of"]

# Titles whose scripts, and whose languages, are looked at, from all over the catalogue.
SCRIPTS_OF, LANGUAGES_OF = 50_000, 2_000
QUANTILES = (("smallest", 0.0), ("5 %", 0.05), ("median", 0.5), ("95 %", 0.95), ("largest", 1.0))
MOST_REASONS, SHOWN_TITLES = 20, 10
_AT_ONCE = 1024


@dataclass
class Section:
    """A table of the card: text as it is, numbers as numbers."""

    heading: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""


@dataclass
class Card:
    """What is told of a catalogue.

    Attributes:
        name: of its folder.
        sections: tables, in order.
        cleaned: (before, after) of some titles.
        splits: its splits.
    """

    name: str
    sections: list[Section]
    splits: list[str]
    cleaned: list[tuple[str, str]] = field(default_factory=list)


def describe(work: Preparation, count_tokens: Callable[[list[str]], list[list[int]]] | None = None) -> Card:
    """Look at all titles once, and at the numbers of everything else.

    Args:
        work: with shards.
        count_tokens: gives the token ids of titles, uncut and with their special tokens; None counts words.
    """
    kept = work.decided.sides.side >= 0
    titles = _Titles(work.args.max_length, count_tokens, int(kept.sum()))
    for texts, given in captions(work, kept):
        titles.add(texts, given)
    sections = [_splits(work), _photos(work, kept), titles.lengths(), titles.scripts(), *titles.languages()]
    sections += [_duplicates(work), *_rejected(work)]
    return Card(work.output_dir.resolve().name, sections, list(work.decided.rows), titles.cleaned)


def captions(work: Preparation, chosen: np.ndarray) -> Iterator[tuple[list[str], list[str | None]]]:
    """The titles of some rows in order, and what they were before they were cleaned; (k,) bool says which."""
    start = 0
    for table in read_facts(work.work / PARTS, len(work.tasks), ["reason", "caption", "caption_given"]):
        table = table.filter(pc.is_null(table["reason"]))
        places = pa.array(np.flatnonzero(chosen[start : start + len(table)]))
        start += len(table)
        yield table["caption"].take(places).to_pylist(), table["caption_given"].take(places).to_pylist()


def photo_of(work: Preparation, place: int) -> tuple[Image.Image, str]:
    """The photo of a place in the facts, as PIL RGB, and its title."""
    row = int(work.facts.row[place])
    task = int(np.searchsorted([task.first_row for task in work.tasks], row, side="right")) - 1
    _, data = next(iter(read_photos(work.work / PARTS, task, [row])))
    facts = pq.read_table(facts_file(work.work / PARTS, task), columns=["caption"])
    return read_photo(data), facts["caption"][row - work.tasks[task].first_row].as_py()


def doubtful(work: Preparation, kind: str, most: int) -> list[tuple[int, int, float]]:
    """(place, place, similarity) of some duplicates for people to look at: the least certain of the near ones first; of
    equal ones those of two products before the others."""
    pairs: Pairs = getattr(work.found, kind)
    order = np.lexsort((pairs.first, pairs.similarity, ~between_products(work.facts, pairs)))[:most]
    columns = (pairs.first[order].tolist(), pairs.second[order].tolist(), pairs.similarity[order].tolist())
    return list(zip(*columns, strict=True))


# --- tables -----------------------------------------------------------------------------------------------------------


def _quantiles(name: str, values: np.ndarray) -> list[Any]:
    found = np.quantile(values, [share for _, share in QUANTILES]) if len(values) else [0] * len(QUANTILES)
    return [name, *(int(value) if float(value).is_integer() else float(round(value, 2)) for value in found)]


def _splits(work: Preparation) -> Section:
    rows, products = work.decided.rows, work.decided.products
    shards = Counter(shard.split for shard in work.decided.plan.shards)
    sizes = {
        name: int(work.facts.kept[work.decided.sides.side == number].sum()) / 1e6
        for number, name in enumerate(work.decided.sides.names)
    }
    lines = [[name, rows[name], products[name], shards[name], round(sizes[name], 1)] for name in rows]
    told = "; ".join(work.decided.sides.told)
    return Section("Splits", ["split", "rows", "products", "shards", "MB of photos"], lines, told)


def _photos(work: Preparation, kept: np.ndarray) -> Section:
    facts = work.facts
    width, height = facts.width[kept].astype(float), facts.height[kept].astype(float)
    lines = [
        _quantiles("width in pixels", width),
        _quantiles("height in pixels", height),
        _quantiles("width by height", width / height),
        _quantiles("kilobytes", np.round(facts.kept[kept] / 1000, 1)),
    ]
    before, after = int(facts.given.sum()), int(facts.kept.sum())
    note = f"{before / 1e6:,.1f} MB before, {after / 1e6:,.1f} MB as they are kept"
    return Section("Photos", ["", *(name for name, _ in QUANTILES)], lines, note)


def _duplicates(work: Preparation) -> Section:
    names = {
        "exact": "photos of equal files",
        "near": "photos that are nearly the same",
        "titles": "equal titles",
        "words": "titles of the same words",
    }
    lines = []
    for kind, name in names.items():
        pairs = getattr(work.found, kind)
        lines.append([name, len(pairs), int(between_products(work.facts, pairs).sum())])
    note = "each row with the first one that is equal; near duplicates in pairs. duplicates.parquet lists them"
    if work.args.merged:
        note += f"; merged by {' and '.join(work.args.merged)}: {work.decided.merged:,} products went up in others"
    return Section("Duplicates", ["", "pairs", "of two products"], lines, note)


def _rejected(work: Preparation) -> Iterator[Section]:
    reasons: Counter = Counter(work.decided.sides.reasons.values()) + work.facts.rejected
    kinds: Counter = Counter()
    for reason, count in reasons.items():
        kinds[re.sub(r"\d+", "0", re.split(r"[:(]", reason)[0]).strip()] += count
    if kinds:
        lines = [[reason, count] for reason, count in kinds.most_common(MOST_REASONS)]
        note = f"{sum(kinds.values()):,} of {work.facts.total:,} rows; rejected.parquet lists each with its reason"
        yield Section("Rejected", ["reason", "rows"], lines, note)


class _Titles:
    """What is said of titles, gathered while they pass by."""

    def __init__(self, max_length: int, count_tokens: Callable[[list[str]], list[list[int]]] | None, total: int):
        self.max_length, self.count_tokens = max_length, count_tokens
        self.cleaned: list[tuple[str, str]] = []
        self.num_cleaned, self.total, self.seen = 0, total, 0
        self._characters: list[np.ndarray] = []
        self._words: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        self._whole: list[np.ndarray] = []
        self._cut: list[np.ndarray] = []
        self._scripts: Counter = Counter()
        self._num_scripts = 0
        self._sample: list[str] = []

    def add(self, texts: list[str], given: list[str | None]) -> None:
        """Titles, and what they were before they were cleaned."""
        self._characters.append(np.array([len(text) for text in texts]))
        self._words.append(np.array([len(text.split()) for text in texts]))
        changed = [(before, text) for before, text in zip(given, texts, strict=True) if before is not None]
        self.num_cleaned += len(changed)
        self.cleaned += changed[: SHOWN_TITLES - len(self.cleaned)]
        for number, text in enumerate(texts, start=self.seen):
            if number % max(self.total // SCRIPTS_OF, 1) == 0:
                self._scripts[_scripts_of(text)] += 1
                self._num_scripts += 1
            if number % max(self.total // LANGUAGES_OF, 1) == 0:
                self._sample.append(text)
        self.seen += len(texts)
        if self.count_tokens is not None:
            waiting = iter(texts)
            while piece := list(islice(waiting, _AT_ONCE)):
                self._add_tokens(self.count_tokens(piece))

    def _add_tokens(self, ids: list[list[int]]) -> None:
        self._tokens.append(np.array([len(title) for title in ids]))
        whole = [hash(tuple(title)) for title in ids]
        cut = [hash(tuple(title[: self.max_length - 1])) for title in ids]  # the last place is [SEP]'s
        self._whole.append(np.array(whole, np.int64))
        self._cut.append(np.array(cut, np.int64))

    def lengths(self) -> Section:
        lines = [
            _quantiles("characters", np.concatenate(self._characters)),
            _quantiles("words", np.concatenate(self._words)),
        ]
        notes = []
        if self._tokens:
            tokens = np.concatenate(self._tokens)
            lines.append(_quantiles("tokens", tokens))
            notes.append(
                f"{(tokens > self.max_length).mean():.1%} of the titles are cut off at {self.max_length} tokens"
            )
            notes.append(f"{self.alike():.1%} differ from another title only in what is cut off")
        if self.num_cleaned:
            notes.append(f"{self.num_cleaned:,} titles were cleaned; what they were is in `caption_given`")
        return Section("Titles", ["", *(name for name, _ in QUANTILES)], lines, "; ".join(notes))

    def alike(self) -> float:
        """The share of titles that another, different one is equal to after the cut."""
        whole, cut = np.concatenate(self._whole), np.concatenate(self._cut)
        pairs = np.unique(np.stack([cut, whole], 1), axis=0)
        starts, counts = np.unique(pairs[:, 0], return_counts=True)
        return float(np.isin(cut, starts[counts > 1]).mean())

    def scripts(self) -> Section:
        lines = [[name, count / self._num_scripts * 100] for name, count in self._scripts.most_common(12)]
        return Section("Scripts", ["of the titles", "percent"], lines, f"of {self._num_scripts:,} titles")

    def languages(self) -> Iterator[Section]:
        try:
            from lingua import LanguageDetectorBuilder
        except ImportError:
            return
        detector = LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build()
        counts: Counter = Counter()
        for language in detector.detect_languages_in_parallel_of(self._sample):
            counts["not known" if language is None else language.name.capitalize()] += 1
        lines = [[name, count / len(self._sample) * 100] for name, count in counts.most_common(12)]
        note = f"a guess, of {len(self._sample):,} titles: brands and model numbers have no language"
        yield Section("Languages", ["of the titles", "percent"], lines, note)


def _scripts_of(text: str) -> str:
    """The scripts of a title's letters, such as "Latin" or "Cjk and Latin"."""
    found = {unicodedata.name(letter, "?").split()[0] for letter in set(text) if letter.isalpha()}
    names = {"FULLWIDTH": "LATIN", "HALFWIDTH": "KATAKANA", "FEMININE": "LATIN", "MASCULINE": "LATIN"}
    named = sorted({names.get(name, name).capitalize().replace("Cjk", "Chinese") for name in found})
    return " and ".join(named[:3]) or "no letters"


# --- Markdown ---------------------------------------------------------------------------------------------------------


def markdown(card: Card) -> str:
    """The card as the README.md of a data set: where its splits lie, and the tables."""
    files = [{"split": split, "path": f"{SHARDS}/{split}-*.parquet"} for split in card.splits]
    front = yaml.safe_dump({"configs": [{"config_name": "default", "data_files": files}]}, sort_keys=False)
    parts = [f"---\n{front}---\n", f"# {_cell(card.name)}\n"]
    parts.append("Photos and titles of products; rows of equal `product_id` are right answers to each other.\n")
    for section in card.sections:
        parts.append(f"## {section.heading}\n")
        parts.append(_grid(section.columns, section.rows))
        parts += [f"{section.note}\n"] if section.note else []
    if card.cleaned:
        parts.append("## Titles before and after\n")
        parts.append(_grid(["before", "after"], card.cleaned))
    return "\n".join(parts)


def _grid(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(value: Any) -> str:
    """A value in a table of Markdown, as text and nothing else."""
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.2f}".rstrip("0").rstrip(".")
    text = " ".join(str(value).split())[:200]
    return re.sub(r"([\\`*_{}\[\]<>|#&])", r"\\\1", text) if text != "---" else text
