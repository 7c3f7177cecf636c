"""Titles that are longer than the model reads: how many, and which of them then look the same.

    for line in cut_titles(source, processor.tokenizer, 35).lines(): print(line)

Nothing of a title is lost in silence: what lies behind the last token that the model takes is not learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

from aliblip.data.remote import is_remote
from aliblip.data.rows import Row, Source
from aliblip.runtime.distributed import launched_rank
from reading_aliblip import UnusableItem, clean_title

__all__ = ["CutTitles", "cut_titles", "tell_cut_titles"]

# Titles that are looked at: of so many places of the data, since catalogues are sorted by brand or kind.
LOOKED_AT = 2048
PLACES = 16
# Of data on another machine the first ones, which the run reads anyway at its start.
LOOKED_AT_REMOTE = 256


@dataclass(frozen=True)
class CutTitles:
    """What of some titles the model does not read.

    Attributes:
        source: what they come from, for messages.
        rows: of the source.
        looked_at: titles that were counted.
        max_length: tokens that the model reads of a title, `[CLS]` and `[SEP]` included.
        cut: titles that are longer.
        alike: of these, titles that up to there read like another one.
    """

    source: str
    rows: int
    looked_at: int
    max_length: int
    cut: int
    alike: int

    def lines(self) -> Iterator[str]:
        """For people; nothing if no title is cut."""
        if not self.cut:
            return
        of = "" if self.looked_at == self.rows else " looked at"
        yield (
            f"  {self.cut:,} of {self.looked_at:,} titles{of} ({self.cut / self.looked_at:.0%}) are longer than "
            f"{self.max_length} tokens and are cut there (max_length)"
        )
        if self.alike:
            yield (
                f"warning: {self.source}: {self.alike:,} titles that are cut read like another one up to there, so "
                "that the model can't tell them apart: raise max_length, or write first what tells products apart"
            )


def cut_titles(source: Source, tokenizer: Any, max_length: int) -> CutTitles:
    """Count the titles that are longer than `max_length` tokens: of little data all, else of some parts of it.

    Raises:
        OSError: they can't be read.
    """
    texts = []
    for row in _some_rows(source):
        try:
            texts.append(clean_title(row.text))
        except UnusableItem:  # counted where rows are read
            continue
    longer, full = 0, {}
    for text, ids in zip(texts, _tokens(tokenizer, texts, max_length), strict=True):
        longer += ids[1]
        full.setdefault(ids[0], []).append((text.casefold(), ids[1]))
    alike = 0
    for same in full.values():
        if len({text for text, _ in same}) > 1:
            alike += sum(is_cut for _, is_cut in same)
    return CutTitles(f"{source.name} ({source.split})", source.num_rows, len(texts), max_length, longer, alike)


def tell_cut_titles(*sources: Source | None, tokenizer: Any, max_length: int) -> None:
    """Tell, by the first process of a launch, how many titles of each source are cut. No failure ends a run."""
    if launched_rank() != 0:
        return
    for source in dict.fromkeys(source for source in sources if source is not None):
        try:
            found = cut_titles(source, tokenizer, max_length)
        except OSError as error:
            reason = " ".join(str(error).split())[:300]
            print(f"warning: {source.name} ({source.split}): the length of titles was not looked at ({reason})")
            continue
        for line in found.lines():
            print(line)


def _tokens(tokenizer: Any, texts: list[str], max_length: int) -> list[tuple[tuple[int, ...], bool]]:
    """(the tokens that are read, whether there are more) of each title."""
    if not texts:
        return []
    # One more than is read: longer titles need not be tokenized to their ends.
    encoded = tokenizer(texts, truncation=True, max_length=max_length + 1, return_attention_mask=False)["input_ids"]
    read = tokenizer(texts, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    return [(tuple(ids), len(more) > max_length) for ids, more in zip(read, encoded, strict=True)]


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
