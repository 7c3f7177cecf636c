"""How well a tokenizer fits titles: tokens a title, tokens it does not know, titles that are cut.

print(title_report(processor.tokenizer, titles, processor.max_length))
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from aliblip.data.rows import Source
from reading_aliblip import UnusableItem, clean_title

__all__ = ["TitleReport", "title_report", "titles_of"]

AT_ONCE = 1000


@dataclass(frozen=True)
class TitleReport:
    """Titles as a tokenizer writes them.

    Attributes:
        lengths: (titles,) int64, tokens of each with [CLS] and [SEP], before it is cut.
        max_length: tokens after which a title is cut.
        tokens: of all titles, without special ones.
        unknown: of these, [UNK].
        examples: words that became [UNK], a few.
    """

    lengths: np.ndarray
    max_length: int
    tokens: int
    unknown: int
    examples: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Tokens of a title, as the model sees it."""
        return float(np.minimum(self.lengths, self.max_length).mean()) if len(self.lengths) else float(self.max_length)

    @property
    def longest(self) -> int:
        return int(min(self.lengths.max(), self.max_length)) if len(self.lengths) else self.max_length

    @property
    def cut(self) -> float:
        """Share of the titles that are cut."""
        return float((self.lengths > self.max_length).mean()) if len(self.lengths) else 0.0

    @property
    def unknown_share(self) -> float:
        """Share of the tokens that are [UNK]."""
        return self.unknown / self.tokens if self.tokens else 0.0

    def quantile(self, share: float) -> int:
        return int(np.quantile(np.minimum(self.lengths, self.max_length), share)) if len(self.lengths) else 0

    def __str__(self) -> str:
        return (
            f"{self.mean:.1f} tokens a title (longest {self.longest}), {self.unknown_share:.2%} of the tokens unknown, "
            f"{self.cut:.1%} of the titles cut at {self.max_length} tokens"
        )


def title_report(tokenizer: Any, titles: Iterable[str], max_length: int) -> TitleReport:
    """Look at titles through a fast tokenizer of transformers.

    Args:
        tokenizer: with [CLS] and [SEP] in its template.
        titles: clean ones.
        max_length: of the processor.
    """
    unknown_id, lengths, unknown, tokens, examples = tokenizer.unk_token_id, [], 0, 0, {}
    for chunk in _chunks(titles):
        encoded = tokenizer(
            chunk, return_attention_mask=False, return_token_type_ids=False, return_offsets_mapping=True
        )
        for title, ids, places in zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            lengths.append(len(ids))
            tokens += sum(1 for begin, end in places if end > begin)
            for token, (begin, end) in zip(ids, places, strict=True):
                if token == unknown_id and end > begin:
                    unknown += 1
                    if len(examples) < 5:
                        examples[title[begin:end]] = None
    return TitleReport(np.array(lengths, dtype=np.int64), max_length, tokens, unknown, tuple(examples))


def titles_of(source: Source, most: int | None = None) -> Iterator[str]:
    """The usable titles of a source in its order; at most so many.

    Args:
        source: opened with its titles alone, it reads no photo.

    Raises:
        OSError: it can't be read.
    """
    count = 0
    for row in source.read_range(0, source.num_rows):
        if most is not None and count >= most:
            return
        try:
            title = clean_title(row.text)
        except UnusableItem:
            continue
        count += 1
        yield title


def _chunks(titles: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for title in titles:
        chunk.append(title)
        if len(chunk) == AT_ONCE:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
