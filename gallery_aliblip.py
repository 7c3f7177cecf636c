"""A gallery in memory: a list of photos or titles, embedded and searched in this process.

    gallery = MemoryGallery.build(Encoder(model, processor), ["mug.jpg", "lamp.jpg"])
    hits = gallery.search(query_vectors, k=10)[0]     # [{"id": "lamp.jpg", "itc": 0.31, "position": 1, ...}, ...]

It is what the pipeline makes of `gallery=[...]`, and has the few methods that the pipeline asks of any gallery: `kind`,
`check_model`, `snapshot`, `search` and `image_tokens`. Large galleries, kept in files, with columns and filters, are
those of the `aliblip` package.

Legend: N items, Q queries, k results, E embedding, n items of a batch, P image tokens, D width.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import logging

try:
    from .encoder_aliblip import Encoder, is_finite
    from .reading_aliblip import UnusableItem, clean_title
    from .retrieval_aliblip import GALLERY_CHUNK, QUERY_BLOCK, running_top_k
except ImportError:
    if __package__:  # inside a package (the Hub cache) a failure is real
        raise
    from encoder_aliblip import Encoder, is_finite
    from reading_aliblip import UnusableItem, clean_title
    from retrieval_aliblip import GALLERY_CHUNK, QUERY_BLOCK, running_top_k

KINDS = ("image", "text")
# The last bits of a product depend on where in a remainder its row stands: equal vectors must have equal scores.
_MULTIPLE = 64

logger = logging.get_logger(__name__)


class MemoryGallery:
    """Photos or titles in memory; made by `build`.

    Args:
        vectors: (N, E) unit vectors.
        items: N times {"id"}, with "path" (of a photo that can be read again), "text" (a title), and other columns.
        kind: "image" or "text".
        model: fingerprint of model and processor.
        tokens: N times the image tokens (P, D), or None.
        skipped: items that could not be used, as {"id", "reason"}.
    """

    def __init__(
        self,
        vectors: Tensor,
        items: Sequence[Mapping[str, Any]],
        *,
        kind: str = "image",
        model: str | None = None,
        tokens: Sequence[Tensor] | None = None,
        skipped: Sequence[Mapping[str, Any]] = (),
    ):
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}: choose one of {', '.join(KINDS)}")
        if vectors.dim() != 2 or len(vectors) != len(items):
            raise ValueError(f"vectors of shape {tuple(vectors.shape)} and {len(items)} items given: (N, E) and N")
        if not is_finite(vectors):
            raise ValueError("the vectors are not all finite, and have no order: embed the items again")
        self.vectors = F.pad(vectors.detach().cpu().float(), (0, 0, 0, -len(items) % _MULTIPLE))
        self.items, self.kind, self.model, self.tokens = list(items), kind, model, tokens
        self.skipped = list(skipped)

    @classmethod
    def build(
        cls,
        encoder: Encoder,
        items: Iterable,
        *,
        kind: str = "image",
        image_column: str = "image",
        text_column: str = "caption",
        store_tokens: bool = False,
        batch_size: int = 32,
    ) -> "MemoryGallery":
        """Embed items. Those that can't be used are left out and listed in `skipped`, as those whose id came before.

        Args:
            encoder: model and processor.
            items: photos (paths, addresses, PIL images, bytes) or titles; rows with columns, as a list of dictionaries;
                a data set of `datasets` or a column of one.
            kind: "image" for photos, "text" for titles.
            image_column, text_column: the column of the photo and of the title, in rows. The column "id", where there
                is one, has the ids; otherwise they are the paths of photos, or the places in `items`.
            store_tokens: keep image tokens, so that re-ranking reads no photo again.
            batch_size: items of one pass.

        Raises:
            ValueError: no usable item, or a column that is not there.
        """
        column = image_column if kind == "image" else text_column
        kept, vectors, tokens, skipped, seen = [], [], [], [], set()
        prepared = _prepared(encoder, _rows(items, column), kind, column, skipped, seen)
        while batch := list(islice(prepared, batch_size)):
            kept += [item for item, _ in batch]
            contents = [content for _, content in batch]
            if kind == "text":
                vectors.append(encoder.embed_titles(contents))
                continue
            embedded, its_tokens = encoder.embed_pixels(torch.stack(contents))
            vectors.append(embedded)
            tokens.extend(its_tokens if store_tokens else ())
        if skipped:
            first = f"the first {skipped[0]['id']!r}: {skipped[0]['reason']}"
            if not kept:
                raise ValueError(f"none of {len(skipped)} items can be used, {first}")
            logger.warning(f"{len(skipped)} of {len(skipped) + len(kept)} items can't be used, {first}")
        if not kept:
            raise ValueError("no items given: a gallery has at least one")
        options = {"kind": kind, "model": encoder.fingerprint, "tokens": tokens or None, "skipped": skipped}
        return cls(torch.cat(vectors), kept, **options)

    def __len__(self) -> int:
        return len(self.items)

    def __repr__(self) -> str:
        what = "photos" if self.kind == "image" else "titles"
        return f"MemoryGallery of {len(self):,} {what}, {self.vectors.shape[1]} wide"

    def snapshot(self) -> "MemoryGallery":
        """Itself, since it never changes."""
        return self

    def check_model(self, model: str) -> None:
        """Refuse the queries of another model.

        Raises:
            ValueError: `model`, a fingerprint, is not that of the gallery.
        """
        if self.model not in (None, model):
            raise ValueError(
                f"the gallery was built with another model or processor ({self.model[:8]}, not {model[:8]}), whose "
                "vectors can't be compared: load that one, or build the gallery again with this one"
            )

    def search(
        self, queries: Tensor, k: int, *, where: Any = None, values: Any = None, approximate: bool | None = None
    ) -> list[list[dict[str, Any]]]:
        """The `k` items of highest dot product for each query, exactly, best first; of equal scores the one that comes
        first.

        Args:
            queries: (Q, E) unit vectors.
            k: at least 1; there are no more results than items.

        Returns:
            For each query a list of {"id", "itc", "position", and what else the item has}.

        Raises:
            ValueError: another width, values that are not finite, or a filter or an index, which only stored galleries
                have.
        """
        if where is not None or values is not None or approximate:
            raise ValueError("a list has no filters and no index: give a stored Gallery of the aliblip package")
        width = self.vectors.shape[1]
        if queries.dim() != 2 or queries.shape[1] != width or k < 1:
            raise ValueError(f"queries of shape {tuple(queries.shape)} and k {k} given: (Q, {width}) and at least 1")
        if not is_finite(queries):
            raise ValueError("the queries are not all finite: the model's weights or its precision are broken")
        found = []
        for block in queries.detach().cpu().float().split(QUERY_BLOCK):
            scores, positions = running_top_k(self._score_chunks(block), min(k, len(self)))
            found += [
                [
                    {"id": self.items[place]["id"], "itc": score, "position": place, **self.items[place]}
                    for place, score in zip(places, of_query, strict=True)
                ]
                for places, of_query in zip(positions.tolist(), scores.tolist(), strict=True)
            ]
        return found

    def _score_chunks(self, queries: Tensor) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, len(self), GALLERY_CHUNK):
            scores = queries @ self.vectors[start : start + GALLERY_CHUNK].t()
            yield start, scores[:, : len(self) - start]

    def image_tokens(self, hits: Sequence[Mapping[str, Any]], encoder: Encoder) -> Tensor:
        """Image tokens (n, P, D) bf16 of some hits: those that were kept, or those of the photos, which are read again.

        Raises:
            ValueError: a photo has no path or can't be read any more.
        """
        if self.tokens is not None:
            return torch.stack([self.tokens[hit["position"]] for hit in hits])
        pixels = []
        for hit in hits:
            if hit.get("path") is None:
                raise ValueError(f"re-ranking needs the photo of item {hit['id']!r}: keep tokens, or use rerank=0")
            try:
                pixels.append(encoder.pixels(hit["path"]))
            except UnusableItem as error:
                raise ValueError(f"re-ranking needs the photo of item {hit['id']!r}: {error}") from error
        return encoder.embed_pixels(torch.stack(pixels))[1]


def _rows(items: Any, column: str) -> Iterable:
    """The items, photos of `datasets` as they are stored, since one that is damaged would end the iteration."""
    if isinstance(items, (str, bytes, Mapping)):
        raise ValueError(f"one {type(items).__name__} given: items are a list or a data set")
    features = getattr(items, "features", None)
    if features is None:
        return items
    if isinstance(features, dict):  # a data set
        if column not in features:
            raise ValueError(f"the data set has no column {column!r}, but {', '.join(map(repr, features))}")
        if getattr(features[column], "decode", False):
            items = items.cast_column(column, replace(features[column], decode=False))
        return items.select_columns([column, *(["id"] if "id" in features and column != "id" else [])])
    source, name = items.source, items.column_name  # a column of one
    if getattr(source.features[name], "decode", False):
        return source.cast_column(name, replace(source.features[name], decode=False))[name]
    return items


def _prepared(
    encoder: Encoder, rows: Iterable, kind: str, column: str, skipped: list, seen: set
) -> Iterator[tuple[dict[str, Any], Any]]:
    """The usable items, and what is embedded of each: a title, or pixels."""
    for position, row in enumerate(rows):
        content, others = row, {}
        if isinstance(row, Mapping) and not set(row) <= {"bytes", "path"}:
            if column not in row:
                raise ValueError(f"a row has no column {column!r}, but {', '.join(map(repr, row))}")
            content, others = row[column], {name: value for name, value in row.items() if name != column}
        path = _path_of(content) if kind == "image" else None
        item = {"id": others.pop("id", position if others or path is None else path), **others}
        try:
            if item["id"] is None:
                raise UnusableItem("the id is null")
            if kind == "text":
                prepared = item["text"] = clean_title(content)
            else:
                prepared = encoder.pixels(content)
                item |= {} if path is None else {"path": path}
            if item["id"] in seen:
                raise UnusableItem("the id comes twice")
        except UnusableItem as error:
            skipped.append({"id": item["id"], "reason": str(error)})
            continue
        seen.add(item["id"])
        yield item, prepared


def _path_of(content: Any) -> str | None:
    """Where a photo can be read again, if it can."""
    if isinstance(content, Mapping):
        content = None if content.get("bytes") else content.get("path")
    return os.fspath(content) if isinstance(content, (str, os.PathLike)) else None


__all__ = ["MemoryGallery"]
