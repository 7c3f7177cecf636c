"""Titles as a tokenizer writes them: tokens a title, tokens it does not know, and titles that are longer than is read.

    report = look_at_titles(source, processor.tokenizer, 35)
    print(report)
    for line in report.cut_lines(): print(line)

Nothing of a title is lost in silence: what lies behind the last token that the model takes is not learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np

from aliblip.data.remote import is_remote
from aliblip.data.rows import Row, Source
from aliblip.runtime.distributed import launched_rank
from aliblip.runtime.mistakes import one_line
from reading_aliblip import UnusableItem, clean_title

__all__ = ["TitleReport", "look_at_titles", "tell_cut_titles", "title_report", "titles_of"]

# Titles that are looked at: of so many places of the data, since catalogues are sorted by brand or kind.
LOOKED_AT = 2048
PLACES = 16
# Of data on another machine the first ones, which the run reads anyway at its start.
LOOKED_AT_REMOTE = 256
FARTHEST = 512  # tokens of a title that are looked at: as many as a BERT has positions
EXAMPLES = 5
AT_ONCE = 256  # titles, whose tokens are held


@dataclass(frozen=True)
class TitleReport:
    """Titles as a tokenizer writes them.

    Attributes:
        lengths: (titles,) int64, tokens of each with [CLS] and [SEP], before it is cut; of a very long one `FARTHEST`.
        max_length: tokens that the model reads of a title, [CLS] and [SEP] included.
        tokens: of all titles, without special ones.
        unknown: of these, [UNK].
        alike: titles that are cut, and up to there read like another one.
        examples: words that became [UNK], a few.
        source: what the titles come from, for messages.
        rows: of the source.
    """

    lengths: np.ndarray
    max_length: int
    tokens: int
    unknown: int
    alike: int
    examples: tuple[str, ...] = ()
    source: str = "titles"
    rows: int = 0

    @property
    def titles(self) -> int:
        """How many were looked at."""
        return len(self.lengths)

    @property
    def mean(self) -> float:
        """Tokens of a title, as the model sees it."""
        return float(np.minimum(self.lengths, self.max_length).mean()) if self.titles else float(self.max_length)

    @property
    def longest(self) -> int:
        return int(min(self.lengths.max(), self.max_length)) if self.titles else self.max_length

    @property
    def cut(self) -> int:
        """Titles that are longer than the model reads."""
        return int((self.lengths > self.max_length).sum())

    @property
    def cut_share(self) -> float:
        return self.cut / self.titles if self.titles else 0.0

    @property
    def unknown_share(self) -> float:
        """Share of the tokens that are [UNK]."""
        return self.unknown / self.tokens if self.tokens else 0.0

    def quantile(self, share: float) -> int:
        return int(np.quantile(np.minimum(self.lengths, self.max_length), share)) if self.titles else 0

    def fit(self) -> str:
        """How well the tokenizer fits the titles."""
        return (
            f"{self.mean:.1f} tokens a title (longest {self.longest}), {self.unknown_share:.2%} of the tokens unknown"
        )

    def __str__(self) -> str:
        return f"{self.fit()}, {self.cut_share:.1%} of the titles cut at {self.max_length} tokens"

    def cut_lines(self) -> Iterator[str]:
        """For people, under the lines of the source: how many titles are cut, and a warning of those that then are
        alike; nothing if no title is cut."""
        if not self.cut:
            return
        of = "" if self.titles == self.rows else " looked at"
        yield (
            f"  {self.cut:,} of {self.titles:,} titles{of} ({self.cut_share:.0%}) are longer than {self.max_length} "
            "tokens and are cut there (max_length)"
        )
        if self.alike:
            yield f"warning: {self.alike_line()}"

    def alike_line(self) -> str:
        return (
            f"{self.source}: {self.alike:,} titles that are cut read like another one up to there, so that the model "
            "can't tell them apart: raise max_length, or write first what tells products apart"
        )


def title_report(
    tokenizer: Any, titles: Iterable[str], max_length: int, source: str = "titles", rows: int = 0
) -> TitleReport:
    """Look at titles through a fast tokenizer of transformers.

    Args:
        tokenizer: with [CLS] and [SEP] in its template.
        titles: clean ones.
        max_length: of the processor.
        source, rows: what they come from, for messages, and its rows.
    """
    lengths, tokens, unknown = [], 0, 0
    examples: dict[str, None] = {}
    read: dict[tuple[int, ...], list[tuple[str, bool]]] = {}  # titles by the tokens that are read, and which are cut
    for title, ids, places in _encoded(tokenizer, titles, max(FARTHEST, max_length + 1)):
        lengths.append(len(ids))
        is_cut = len(ids) > max_length
        read.setdefault(_read(ids, max_length), []).append((title.casefold(), is_cut))
        for token, (begin, end) in zip(ids, places, strict=True):
            if end == begin:  # a special token
                continue
            tokens += 1
            if token == tokenizer.unk_token_id:
                unknown += 1
                if len(examples) < EXAMPLES:
                    examples[title[begin:end]] = None
    same = [found for found in read.values() if len({text for text, _ in found}) > 1]
    alike = sum(is_cut for found in same for _, is_cut in found)
    length = np.array(lengths, dtype=np.int64)
    return TitleReport(length, max_length, tokens, unknown, alike, tuple(examples), source, rows)


def look_at_titles(source: Source, tokenizer: Any, max_length: int) -> TitleReport:
    """The report on the titles of a source: of little data all, else of some parts of it. No photo is decoded.

    Raises:
        OSError: they can't be read.
    """
    titles = _usable(_some_rows(source))
    return title_report(tokenizer, titles, max_length, f"{source.name} ({source.split})", source.num_rows)


def tell_cut_titles(source: Source, look: Callable[[], TitleReport], tell: Callable[[str], object] = print) -> None:
    """Tell, by the first process of a launch, how many titles of a source are cut. What can't be read ends no run.

    Args:
        source: of the titles.
        look: gives the report on them.
        tell: takes a line.
    """
    if launched_rank() != 0:
        return
    try:
        found = look()
    except OSError as error:
        tell(f"warning: {source.name} ({source.split}): the length of titles was not looked at ({one_line(error)})")
        return
    for line in found.cut_lines():
        tell(line)


def titles_of(source: Source, most: int | None = None) -> Iterator[str]:
    """The usable titles of a source in its order; at most so many.

    Args:
        source: read with its titles alone, see `Source.titles_only`.

    Raises:
        OSError: it can't be read.
    """
    return islice(_usable(source.read_range(0, source.num_rows)), most)


def _usable(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        try:
            yield clean_title(row.text)
        except UnusableItem:  # counted where rows are read
            continue


def _read(ids: list[int], max_length: int) -> tuple[int, ...]:
    """The tokens that the model reads of a title: where it is cut, [SEP] comes last all the same."""
    return tuple(ids) if len(ids) <= max_length else (*ids[: max_length - 1], ids[-1])


def _encoded(tokenizer: Any, titles: Iterable[str], farthest: int) -> Iterator[tuple[str, list[int], list[tuple]]]:
    """(title, its tokens, where each lies in it) of each title."""
    titles = iter(titles)
    while chunk := list(islice(titles, AT_ONCE)):
        encoded = tokenizer(
            chunk,
            truncation=True,
            max_length=farthest,
            return_attention_mask=False,
            return_token_type_ids=False,
            return_offsets_mapping=True,
        )
        yield from zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True)


def _some_rows(source: Source) -> Iterator[Row]:
    if any(is_remote(file.file) for file in source.files):
        return source.read_range(0, min(LOOKED_AT_REMOTE, source.num_rows))
    if source.num_rows <= LOOKED_AT:
        return source.read_range(0, source.num_rows)
    if source.random_access:
        starts = [source.num_rows * place // PLACES for place in range(PLACES)]
        return chain.from_iterable(source.read_range(start, start + LOOKED_AT // PLACES) for start in starts)
    # The beginnings of shards, where nothing before has to be read or unpacked.
    places = min(PLACES, len(source.shards))
    shards = [source.shards[len(source.shards) * place // places] for place in range(places)]
    return chain.from_iterable(
        source.read_range(shard.first_row, shard.first_row + min(shard.num_rows, LOOKED_AT // places))
        for shard in shards
    )
