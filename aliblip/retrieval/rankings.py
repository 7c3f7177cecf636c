"""What a two-stage retrieval found, as values: candidates with both raw scores, and the orders made from them.

    rankings = final_order(candidates, k=32, score="fused", weight=1.0)
    ranks = ranks_of(rankings, depth, itc_ranks, queries, gallery)

Legend: Q queries, N gallery items, K candidates of a query, k re-ranked ones of these, E embedding, L text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

import retrieval_aliblip as engine
from aliblip.retrieval.metrics import Products, positives_in, ranks_after_reranking, summarize_ranks
from aliblip.runtime.files import write_bytes
from aliblip.runtime.mistakes import UsageError

# Of the ITC similarity, whose differences are small beside those of a logit: steps of the root of two.
FUSION_WEIGHTS = (0.0, *(2.0 ** (step / 2) for step in range(-4, 19)))


# The file of the match logits of all pairs.
MATRIX = "itm_logits.npy"


@dataclass
class Side:
    """The photos or the titles (N of them): what all processes know of them after the first stage.

    `rows` (N,) source rows, of a photo that several rows name the first; `product_id` (N,); `embeds` (N, E) fp32;
    `first` unit -> its first id, one entry more than units; `skipped` the unusable rows as {"row", "name", "reason"};
    `names`, `texts` and `others` as in the batches of a collator that describes, else empty. Titles alone: `input_ids`
    and `attention_mask` (N, L). Photos alone: `photo_id` (N,), and `further` (X, 2), products beside the first of a
    photo that rows of several products name.
    """

    rows: Tensor
    product_id: Tensor
    embeds: Tensor
    first: list[int]
    skipped: list[dict] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    others: list[dict[str, Any]] = field(default_factory=list)
    input_ids: Tensor | None = None
    attention_mask: Tensor | None = None
    photo_id: Tensor | None = None
    further: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def products(self) -> Products:
        return Products.of(self.product_id) if self.further is None else Products(self.product_id, self.further)


@dataclass
class Candidates:
    """The K best of the first stage for every query, in its order: `ids`, `itc` similarities and, where they were
    re-ranked, `itm_logits` (of a match) and `margins` (those less the logits of no match), nan beyond the candidates
    that were; all (Q, K), on the CPU. Where all pairs were scored there are no margins."""

    ids: Tensor
    itc: Tensor
    itm_logits: Tensor | None = None
    margins: Tensor | None = None


@dataclass
class Rankings:
    """One direction in its final order, (Q, K) on the CPU: `ids`, the `scores` that ordered them, and both raw scores.

    `ranks`, `itc_ranks`: (Q,) rank of the best positive in the whole gallery after both stages and after the first, 0
    without a positive; None where the truth is not known.
    """

    ids: Tensor
    scores: Tensor
    itc: Tensor
    itm_logits: Tensor | None
    ranks: Tensor | None = None
    itc_ranks: Tensor | None = None


@dataclass
class Direction:
    """What was found in one direction: the `candidates`, and the `rankings` made of them at the largest depth."""

    candidates: Candidates
    rankings: Rankings


@dataclass
class Retrieval:
    """A finished retrieval.

    `depths`: how many candidates of a query were re-ranked, rising, or all where a gallery is smaller; the last one
    gives `rankings`. `matrix`: where all
    pairs were scored, the .npy file of their match logits, (images, titles) fp32, rows and columns in the order of the
    usable rows. `seconds` by stage, and `resumed_units` that an earlier start had finished. `slope` and `offset` make
    the probability of a match, see `aliblip.retrieval.calibration`.
    """

    images: Side
    titles: Side
    text_to_image: Direction
    image_to_text: Direction | None
    depths: list[int]
    score: str
    fusion_weight: float
    seconds: dict[str, float] = field(default_factory=dict)
    resumed_units: int = 0
    matrix: Path | None = None
    slope: float = 1.0
    offset: float = 0.0

    def directions(self) -> list[tuple[str, Direction, Side, Side]]:
        """(name, direction, queries, gallery) of those that were asked for."""
        found = [("text_to_image", self.text_to_image, self.titles, self.images)]
        if self.image_to_text is not None:
            found.append(("image_to_text", self.image_to_text, self.images, self.titles))
        return found

    @property
    def skipped(self) -> list[dict]:
        """Unusable rows of both sides, each once."""
        same = self.titles.skipped is self.images.skipped
        return self.images.skipped if same else self.images.skipped + self.titles.skipped

    def is_right(self, title: int, photo: int) -> bool:
        """Whether a photo shows the product of a title."""
        query = self.titles.products[title : title + 1]
        return bool(positives_in(torch.tensor([[photo]]), query, self.images.products))

    @property
    def has_truth(self) -> bool:
        return self.text_to_image.rankings.ranks is not None


@dataclass(frozen=True)
class CandidatePairs:
    """Distinct (image, title) pairs, sorted by image, then by title. `image_id`, `text_id` (M,) int64; `first` (images
    + 1,):
    the pairs of image i are `first[i] .. first[i + 1] - 1`."""

    image_id: Tensor
    text_id: Tensor
    first: Tensor
    num_texts: int

    def __len__(self) -> int:
        return len(self.image_id)

    def texts_of(self, image_id: int) -> Tensor:
        """Ids of the candidate titles of an image, rising, (m,) int64."""
        return self.text_id[self.first[image_id] : self.first[image_id + 1]]

    def locate(self, image_id: Tensor, text_id: Tensor) -> Tensor:
        """Positions of pairs that are in the table; `image_id` and `text_id` are of one shape, or broadcast to one.

        Raises:
            KeyError: if a pair is not in the table.
        """
        keys = self.image_id * self.num_texts + self.text_id
        wanted = image_id * self.num_texts + text_id
        position = torch.searchsorted(keys, wanted).clamp(max=max(len(keys) - 1, 0))
        if not len(keys) or not torch.equal(keys[position], wanted):
            raise KeyError("some of the pairs asked for are not among the candidate pairs")
        return position


def candidate_pairs(image_ids: Tensor, text_ids: Tensor, num_images: int, num_texts: int) -> CandidatePairs:
    """Collect the pairs of both directions, each once, grouped by image.

    Args:
        image_ids: (T, k) int64, row t: candidate images of title t. May have no rows.
        text_ids: (N, k) int64, row i: candidate titles of image i. May have no rows.
        num_images, num_texts: sizes of the two galleries.

    Returns:
        The pairs, on the CPU.

    Raises:
        ValueError: ids outside the galleries.
    """
    image_ids, text_ids = image_ids.cpu(), text_ids.cpu()
    for name, ids, size in (("image", image_ids, num_images), ("text", text_ids, num_texts)):
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(
                f"{name} ids from {int(ids.min())} to {int(ids.max())} given, the gallery has 0 to {size - 1}"
            )
    from_texts = image_ids * num_texts + torch.arange(len(image_ids))[:, None]
    from_images = torch.arange(len(text_ids))[:, None] * num_texts + text_ids
    keys = torch.cat([from_texts.flatten(), from_images.flatten()]).unique()  # sorted
    image_id = keys // num_texts
    first = torch.searchsorted(image_id, torch.arange(num_images + 1))
    return CandidatePairs(image_id=image_id, text_id=keys % num_texts, first=first, num_texts=num_texts)


def score_of(itc: Tensor, itm_logits: Tensor | None, score: str, weight: float) -> Tensor:
    """The score that orders re-ranked candidates: "fused" (match logit + weight x ITC similarity), "itm" or "itc"."""
    if score == "itc" or itm_logits is None:
        return itc
    return itm_logits if score == "itm" else engine.fuse(itc, itm_logits, weight)


def final_order(candidates: Candidates, depth: int, score: str, weight: float) -> Rankings:
    """Put the first `depth` candidates of every query into a new order; the others follow in that of the first stage.

    Of equal scores the lower id comes first. The scores of those that follow are not comparable with the ones before.
    """
    depth = min(depth, candidates.ids.shape[1])
    scores = score_of(candidates.itc, candidates.itm_logits, score, weight)
    head = scores[:, :depth]
    # by id first, then a stable sort by score: ties go to the lower id
    by_id = candidates.ids[:, :depth].argsort(dim=1)
    by_score = head.gather(1, by_id).argsort(dim=1, descending=True, stable=True)
    rest = torch.arange(depth, candidates.ids.shape[1]).expand(len(head), -1)
    order = torch.cat([by_id.gather(1, by_score), rest], dim=1)
    logits = candidates.itm_logits
    return Rankings(
        ids=candidates.ids.gather(1, order),
        scores=scores.gather(1, order),
        itc=candidates.itc.gather(1, order),
        itm_logits=None if logits is None else logits.gather(1, order),
    )


def ranks_of(rankings: Rankings, depth: int, itc_ranks: Tensor, queries: Side, gallery: Side) -> Tensor:
    """Ranks (Q,) of the best positives in the whole gallery, when the first `depth` were put into a new order."""
    return ranks_after_reranking(rankings.ids[:, :depth], itc_ranks, queries.products, gallery.products)


def tune_fusion(retrieval: Retrieval) -> tuple[float, dict[float, float]]:
    """The weight of ITC in the fused score with the highest mean recall over all directions, among steps of half an
    octave and the one that was used.

    Returns:
        The weight (of several equally good ones the middle one) and the mean recall of every weight tried.

    Raises:
        ValueError: the truth is not known, or nothing was re-ranked.
    """
    if not retrieval.has_truth or retrieval.text_to_image.candidates.itm_logits is None:
        raise ValueError("the fusion weight can be tuned only where the truth is known and ITM has re-ranked")
    depth = retrieval.depths[-1]
    recalls = {}
    for weight in sorted({*FUSION_WEIGHTS, retrieval.fusion_weight}):
        each = []
        for _, direction, queries, gallery in retrieval.directions():
            order = final_order(direction.candidates, depth, "fused", weight)
            itc_ranks = direction.rankings.itc_ranks
            ranks = ranks_of(order, depth, itc_ranks, queries, gallery)
            each.append(summarize_ranks(ranks.numpy())["mean_recall"])
        recalls[weight] = float(np.mean(each))
    best = [weight for weight, recall in recalls.items() if recall == max(recalls.values())]
    return best[len(best) // 2], recalls


def write_rankings(path: Path, direction: Direction, queries: Side, gallery: Side) -> None:
    """One direction as Parquet, a row a query, its K items in their final order.

    A photo that several rows name goes by the first of them. Columns: `query` (source row), `query_name`, `query_text`
    (of a title), `product_id`, `rank` and `rank_itc` (null without truth, 0 without a positive), and the lists `ids`
    (source rows), `names`, `itc`, `itm_logit`, `score` (null for items that are listed and were not re-ranked).
    """
    rankings = direction.rankings
    shape = rankings.ids.shape
    columns: dict[str, Any] = {"query": queries.rows.numpy()}
    if queries.names:
        columns["query_name"] = pa.array(queries.names, pa.string())
    if queries.texts and queries.input_ids is not None:
        columns["query_text"] = pa.array(queries.texts, pa.string())
    columns["product_id"] = queries.product_id.numpy()
    if rankings.ranks is not None:
        columns |= {"rank": rankings.ranks.numpy(), "rank_itc": rankings.itc_ranks.numpy()}
    columns["ids"] = _lists(gallery.rows[rankings.ids].numpy(), shape)
    if gallery.names:
        names = pa.DictionaryArray.from_arrays(rankings.ids.flatten().numpy(), pa.array(gallery.names, pa.string()))
        columns["names"] = _lists(names, shape)
    columns["itc"] = _lists(rankings.itc.numpy(), shape)
    if rankings.itm_logits is not None:
        columns["itm_logit"] = _lists(rankings.itm_logits.numpy(), shape)
    columns["score"] = _lists(rankings.scores.numpy(), shape)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    write_bytes(path, sink.getvalue())


def read_ranks(path: Path) -> dict[str, Sequence]:
    """`query`, `product_id`, `rank`, `rank_itc` and, if there is one, `query_text` of a file of `write_rankings`.

    Raises:
        UsageError: the file is missing, is not such a file, or was written without truth.
    """
    wanted = ["query", "product_id", "rank", "rank_itc"]
    try:
        names = pq.read_schema(path).names
        if set(wanted) <= set(names):
            table = pq.read_table(path, columns=[*wanted, *({"query_text"} & set(names))])
            return {name: column.to_pylist() for name, column in zip(table.column_names, table.columns, strict=True)}
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{path} can't be read: {' '.join(str(error).split())}") from error
    raise UsageError(f"{path} holds no ranks: rankings without truth can't be compared")


def _lists(values, shape) -> pa.LargeListArray:
    # nan: listed, but not re-ranked
    flat = pa.array(values.reshape(-1), from_pandas=True) if isinstance(values, np.ndarray) else values
    return pa.LargeListArray.from_arrays(np.arange(shape[0] + 1, dtype=np.int64) * shape[1], flat)


__all__ = [
    "MATRIX",
    "CandidatePairs",
    "Candidates",
    "Direction",
    "Rankings",
    "Retrieval",
    "Side",
    "candidate_pairs",
    "final_order",
    "ranks_of",
    "read_ranks",
    "score_of",
    "tune_fusion",
    "write_rankings",
]
