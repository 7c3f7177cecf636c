"""The two-stage retrieval engine of AliBLIP: exact search by embeddings (ITC), then re-ranking of the best pairs (ITM).

    vectors, tokens = embed_images(model, pixel_values)                       # one pass for both stages
    scores, ids = search(text_embeds, image_embeds, k=128)                    # stage 1
    logits = rerank(model, tokens, text_ids, input_ids, attention_mask)       # stage 2, pairs grouped by image
    scores, ids = order_by_score(fuse(scores, logits_of_the_candidates), ids)

Single process; the model is a value that has `get_image_features`, `get_text_features`, `project_image_kv` and
`match_packed`. What is computed together depends on the arguments alone, never on who calls: equal arguments give
equal bits.

Most of the work of a pair is to project the image tokens to keys and values of every cross-attention layer. So pairs
are grouped by image: an image is projected once, scored with all its candidate titles, and dropped. A GPU takes dozens
of images and their thousands of titles in one pass, or it would wait for the host that starts its operations.

Two-stage retrieval: ALBEF, https://arxiv.org/abs/2107.07651, section 4; BLIP, https://arxiv.org/abs/2201.12086.

Legend: Q queries, N gallery items or images, n items of one chunk, k candidates of a query, E embedding, P image
tokens, D width, T titles, L text tokens, M pairs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from .modeling_aliblip import PackedPairs, RowsByImage, is_finite
except ImportError:
    if __package__:  # inside a package (the Hub cache) a failure is real
        raise
    from modeling_aliblip import PackedPairs, RowsByImage, is_finite

QUERY_BLOCK = 1024
GALLERY_CHUNK = 16384
RERANK_BATCH_TOKENS = 8192
RERANK_BATCH_TOKENS_OF_A_GPU = 65536
# Keys and values of an image take about as much memory as so many text tokens of a pass.
TOKENS_PER_IMAGE = 1024
# Attention kernels of GPUs take no more than 65,535 titles in a batch.
_MOST_PAIRS = 2**15
# Beyond which it is no gain on a CPU that several images share a pass.
_SHARED_TOKENS_OF_A_CPU = 1024


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager:
    """Mixed precision of the model's passes; None leaves them in the type of the weights."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def embed_images(model, pixel_values: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """One pass of the image tower for both stages.

    Args:
        pixel_values: (N, 3, H, W), moved to the model's device here.
        dtype: type of the autocast, or None.

    Returns:
        Unit features (N, E) fp32 and image tokens (N, P, D) in `dtype` or, without one, in the type of the pass, on the
        model's device.
    """
    device = _device(model)
    with autocast(device, dtype):
        output = model.get_image_features(pixel_values.to(device), return_dict=True)
    tokens = output.last_hidden_state
    # Under autocast the last normalisation gives fp32, which the projection to keys and values would round anyway.
    return output.pooler_output.float(), tokens if dtype is None else tokens.to(dtype)


def embed_texts(model, input_ids: Tensor, attention_mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Titles (N, L) to unit features (N, E) fp32 on the model's device."""
    device = _device(model)
    with autocast(device, dtype):
        output = model.get_text_features(input_ids.to(device), attention_mask.to(device), return_dict=True)
    return output.pooler_output.float()


# --- stage 1: ITC -----------------------------------------------------------------------------------------------------


def score_chunks(queries: Tensor, gallery: Tensor, chunk_size: int = GALLERY_CHUNK) -> Iterator[tuple[int, Tensor]]:
    """Dot products of all queries (Q, E) with the gallery (N, E), `chunk_size` items at a time: `(start, (Q, n)
    fp32)`."""
    queries = queries.float()
    for start in range(0, len(gallery), chunk_size):
        yield start, queries @ gallery[start : start + chunk_size].float().t()


def search(queries: Tensor, gallery: Tensor, k: int, chunk_size: int = GALLERY_CHUNK) -> tuple[Tensor, Tensor]:
    """The `k` gallery items of highest dot product, exactly, best first; of equal scores the lower id comes first.

    Memory grows with Q x k and with `QUERY_BLOCK` x `chunk_size`, never with Q x N.

    Args:
        queries: (Q, E), any float type; the products are fp32.
        gallery: (N, E).
        k: 1 to N.
        chunk_size: gallery items scored at a time. Another size may change the last bits of a score.

    Returns:
        Scores (Q, k) fp32 and ids (Q, k) int64.

    Raises:
        ValueError: a `k` or `chunk_size` out of range, widths that differ, or values that are not finite (they have no
            order).
    """
    if queries.dim() != 2 or gallery.dim() != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(f"search takes (Q, E) and (N, E), got {tuple(queries.shape)} and {tuple(gallery.shape)}")
    if not 1 <= k <= len(gallery):
        raise ValueError(f"k is {k}, but the gallery has {len(gallery)} items: give a k from 1 to {len(gallery)}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}: give at least 1")
    for name, values in (("queries", queries), ("gallery", gallery)):
        if not is_finite(values):
            raise ValueError(
                f"the {name} hold values that are not finite: the model's weights or its precision are broken"
            )
    blocks = [running_top_k(score_chunks(block, gallery, chunk_size), k) for block in queries.split(QUERY_BLOCK)]
    return torch.cat([scores for scores, _ in blocks]), torch.cat([ids for _, ids in blocks])


def running_top_k(chunks: Iterable[tuple[int, Tensor]], k: int) -> tuple[Tensor, Tensor]:
    """The `k` highest of scores that come in chunks, best first; of equal scores the lower id comes first.

    Args:
        chunks: `(start, scores (Q, n))` for the items `start .. start + n - 1`, in rising order.
        k: at most the number of all items.

    Returns:
        Scores (Q, k) fp32 and ids (Q, k) int64.
    """
    best_scores = best_ids = None
    for start, scores in chunks:
        chunk_scores, chunk_ids = _top_k(scores, min(k, scores.shape[1]))
        del scores  # or it would live until the next chunk has been scored too
        chunk_ids = chunk_ids + start
        if best_scores is not None:
            # Everything found so far has lower ids than this chunk: first in the row, a stable sort keeps it first
            # among equals.
            chunk_scores = torch.cat([best_scores, chunk_scores], dim=1)
            chunk_ids = torch.cat([best_ids, chunk_ids], dim=1)
            chunk_scores, order = chunk_scores.sort(dim=1, descending=True, stable=True)
            chunk_ids = chunk_ids.gather(1, order)
        best_scores, best_ids = chunk_scores[:, :k], chunk_ids[:, :k]
    return best_scores, best_ids


def _top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """topk of (Q, n) with ties to the lower id, which torch.topk leaves open."""
    count = min(k + 1, scores.shape[1])
    values, ids = scores.topk(count, dim=1)
    if count > k:
        # Which of several items equal to the last one get in is open too: such rows are chosen again.
        tied = (values[:, k - 1] == values[:, k]).nonzero().flatten()
        ids = ids[:, :k].contiguous()
        if len(tied):
            row_scores, limit = scores[tied], values[tied, k - 1 : k]
            above, equal = row_scores > limit, row_scores == limit
            room = k - above.sum(dim=1, keepdim=True)
            chosen = above | (equal & (equal.cumsum(dim=1) <= room))  # exactly k of each row
            ids[tied] = chosen.nonzero()[:, 1].view(len(tied), k)
    return order_by_score(scores.gather(1, ids), ids)


def order_by_score(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of (Q, k) by falling score, of equal scores the lower id first."""
    ids, order = ids.sort(dim=1)
    scores, by_score = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores, ids.gather(1, by_score)


# --- stage 2: ITM -----------------------------------------------------------------------------------------------------


class Reranker:
    """Match logits of images with their candidate titles, of any number of calls on the same titles, which stay on the
    model's device.

    A pass of the model takes as many images together as `rerank_batch_tokens` holds with all their titles, by falling
    number of text tokens, so that they are alike. It has no padding, and on an accelerator nothing waits for it: the
    device is behind while the host prepares the next one.

    Args:
        model: has `project_image_kv` and `match_packed`.
        input_ids, attention_mask: (T, L) int64, all titles, padded on the right.
        rerank_batch_tokens: bound on the text tokens of one pass; a single title may exceed it. None: what suits the
            device, see `default_batch_tokens`.
        dtype: type of the autocast, or None.
        images_per_pass: bound on the images whose keys and values are in memory together, 45 MB each with a ViT-B/16 at
            384 pixels in fp32. None: one for every 1,024 of `rerank_batch_tokens`, which take as much memory.

    Raises:
        ValueError: a title's attention mask is not ones followed by zeros.
    """

    def __init__(
        self,
        model,
        input_ids: Tensor,
        attention_mask: Tensor,
        rerank_batch_tokens: int | None = None,
        dtype: torch.dtype | None = None,
        images_per_pass: int | None = None,
    ):
        attention_mask = attention_mask.cpu()
        lengths = attention_mask.sum(dim=1)
        if not torch.equal(attention_mask != 0, torch.arange(attention_mask.shape[1]) < lengths[:, None]):
            raise ValueError("re-ranking takes titles padded on the right: set the tokenizer's padding_side to 'right'")
        if not lengths.all():
            raise ValueError("re-ranking takes titles of at least one token: their attention mask is all zeros")
        self.model, self.dtype, self.device = model, dtype, _device(model)
        self.batch_tokens = rerank_batch_tokens or default_batch_tokens(self.device)
        self.images_per_pass = images_per_pass or most_images(self.batch_tokens)
        most = _SHARED_TOKENS_OF_A_CPU if self.device.type == "cpu" else self.batch_tokens
        self.shared_tokens = min(self.batch_tokens, most)
        self._lengths, self._longest = lengths, input_ids.shape[1]
        self._ids = input_ids.to(self.device).flatten()

    @torch.no_grad()  # a graph would keep every pass
    def __call__(self, image_tokens: Tensor | Callable[[list[int]], Tensor], text_ids: Sequence[Tensor]) -> Tensor:
        """Score some images, each projected to keys and values once.

        Args:
            image_tokens: (N, P, D) of N images, on any device, or a function from the numbers of some images to theirs,
                which is called once for those of each pass; moved to the model's device pass by pass.
            text_ids: N tensors (m_i,) int64 on the CPU, the candidate titles of each image; may be empty.

        Returns:
            (M, 2) fp32 on the model's device, M the sum of m_i: the match logits, column 1 = match, image by image,
            each in the order of its `text_ids`.

        Raises:
            ValueError: the numbers of images differ.
        """
        if isinstance(image_tokens, Tensor) and len(image_tokens) != len(text_ids):
            raise ValueError(
                f"{len(image_tokens)} images and {len(text_ids)} lists of titles given: one list per image is needed"
            )
        if not sum(map(len, text_ids)):
            return torch.empty(0, 2, device=self.device)
        titles = torch.cat(list(text_ids))
        counts = torch.tensor([len(ids) for ids in text_ids])
        pairs_of = torch.arange(len(titles)).split(counts.tolist())  # of each image
        ends = F.pad(self._lengths[titles].cumsum(0), (1, 0))[F.pad(counts.cumsum(0), (1, 0))]
        logits = torch.empty(len(titles), 2, dtype=torch.float32, device=self.device)
        with autocast(self.device, self.dtype):
            for images in self._groups(ends.diff().tolist()):
                image_kv = self.model.project_image_kv(self._tokens_of(images, image_tokens))
                pairs = torch.cat([pairs_of[image] for image in images])
                image_of = torch.arange(len(images)).repeat_interleave(counts[images])
                passes = [(pairs, image_of)] if len(images) > 1 else self._cut(pairs, titles)
                for pairs, image_of in passes:
                    ids_at, places, packed = self._pack(titles[pairs], image_of, len(images), pairs)
                    matched = self.model.match_packed(self._ids[ids_at], packed, image_kv)
                    logits.index_copy_(0, places, matched.float())
                del image_kv  # or it would live until the next ones have been made too
        return logits

    def _groups(self, tokens: list[int]) -> list[list[int]]:
        """Images that share a pass, by falling number of text tokens; those without any are left out."""
        groups, largest = [], 0
        for image in sorted((image for image, count in enumerate(tokens) if count), key=lambda image: -tokens[image]):
            # Attention has places for as many tokens of each image as the first one has.
            if groups and len(groups[-1]) < min(self.images_per_pass, self.shared_tokens // largest):
                groups[-1].append(image)
            else:
                groups.append([image])
                largest = tokens[image]
        return groups

    def _tokens_of(self, images: list[int], image_tokens: Tensor | Callable[[list[int]], Tensor]) -> Tensor:
        if not isinstance(image_tokens, Tensor):
            return _to_device(image_tokens(images), self.device)
        if len(images) == 1:
            return _to_device(image_tokens[images[0], None], self.device)
        chosen, source = torch.tensor(images), image_tokens.device
        if source.type == "cpu" and self.device.type == "cuda":  # gathered where a copy to the device begins
            pinned = torch.empty(len(images), *image_tokens.shape[1:], dtype=image_tokens.dtype, pin_memory=True)
            return _to_device(torch.index_select(image_tokens.detach(), 0, chosen, out=pinned), self.device)
        return _to_device(image_tokens[_to_device(chosen, source)], self.device)

    def _cut(self, pairs: Tensor, titles: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The pairs of one image in passes that hold no more text tokens than they may, by falling length."""
        lengths, order = self._lengths[titles[pairs]].sort(descending=True, stable=True)
        start, count = 0, 0
        for stop, length in enumerate([*lengths.tolist(), self.batch_tokens + 1]):
            if count + length > self.batch_tokens and stop > start:
                yield pairs[order[start:stop]], torch.zeros(stop - start, dtype=torch.int64)
                start, count = stop, 0
            count += length

    def _pack(self, titles: Tensor, image_of: Tensor, images: int, pairs: Tensor) -> tuple[Tensor, Tensor, PackedPairs]:
        """Lay out some pairs for `match_packed`: their titles and the numbers of their images, which rise.

        Returns:
            The places of their tokens' ids in those of all titles, `pairs` in the new order, and the layout, all of it
            on the model's device by one copy.
        """
        lengths = self._lengths[titles]
        order = lengths.argsort(descending=True, stable=True)
        sorted_lengths = lengths[order]
        first = sorted_lengths.cumsum(0) - sorted_lengths
        every = torch.arange(int(sorted_lengths.sum()))
        positions = every - first.repeat_interleave(sorted_lengths)
        ids_at = (titles[order] * self._longest).repeat_interleave(sorted_lengths) + positions
        parts = [ids_at, pairs[order], positions, first]
        if images > 1:
            start, line = _lines_of_images(image_of, lengths, images)
            of_tokens = start[order].repeat_interleave(sorted_lengths) + positions
            start, short_line = _lines_of_images(image_of, torch.ones_like(lengths), images)
            of_pairs = start[order]
            parts += [_rows_of_places(of_tokens, images * line), of_tokens]
            parts += [_rows_of_places(of_pairs, images * short_line), of_pairs]
        on_device = _to_device(torch.cat(parts), self.device).split([len(part) for part in parts])
        ids_at, places, positions, first, *lines = on_device
        by_image = [RowsByImage(rows.view(images, -1), at) for rows, at in zip(lines[::2], lines[1::2], strict=True)]
        of_length, counts = sorted_lengths.unique_consecutive(return_counts=True)
        sizes = [
            (min(_MOST_PAIRS, count - start), length)
            for count, length in zip(counts.tolist(), of_length.tolist(), strict=True)
            for start in range(0, count, _MOST_PAIRS)
        ]
        return ids_at, places, PackedPairs(sizes, positions, first, *(by_image or (None, None)))


def rerank(
    model,
    image_tokens: Tensor | Callable[[list[int]], Tensor],
    text_ids: Sequence[Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    rerank_batch_tokens: int | None = None,
    dtype: torch.dtype | None = None,
    images_per_pass: int | None = None,
) -> Tensor:
    """Match logits (M, 2) fp32 on the CPU of some images with their candidate titles: a `Reranker` for one call, where
    arguments and errors are described."""
    reranker = Reranker(model, input_ids, attention_mask, rerank_batch_tokens, dtype, images_per_pass)
    return reranker(image_tokens, text_ids).cpu()


def default_batch_tokens(device: torch.device) -> int:
    """Text tokens of a re-ranking pass, beyond which it is not faster."""
    return RERANK_BATCH_TOKENS if device.type == "cpu" else RERANK_BATCH_TOKENS_OF_A_GPU


def most_images(rerank_batch_tokens: int) -> int:
    """Images that a re-ranking pass of so many text tokens may have."""
    return max(1, rerank_batch_tokens // TOKENS_PER_IMAGE)


def _lines_of_images(image_of: Tensor, lengths: Tensor, images: int) -> tuple[Tensor, int]:
    """Where each pair begins if the rows of every image, `lengths` of each of its pairs, stand on a line of their own,
    and how long a line is: as the image of most rows needs it."""
    total = torch.zeros(images, dtype=torch.int64).index_add_(0, image_of, lengths)
    longest = int(total.max())
    behind = torch.arange(images) * longest - (total.cumsum(0) - total)  # of a line, for the shorter ones before it
    return lengths.cumsum(0) - lengths + behind[image_of], longest


def _rows_of_places(places: Tensor, size: int) -> Tensor:
    """The row in each of `size` places, 0 where there is none."""
    rows = torch.zeros(size, dtype=torch.int64)
    rows[places] = torch.arange(len(places))
    return rows


def _to_device(values: Tensor, device: torch.device) -> Tensor:
    """The values on the device, without waiting for what it is doing."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def fuse(itc_scores: Tensor, itm_logits: Tensor, weight: float = 1.0) -> Tensor:
    """Final score of re-ranked candidates: match logit + `weight` x ITC similarity, fp32, of the shape of both."""
    return itm_logits.float() + weight * itc_scores.float()


def _device(model) -> torch.device:
    return next(model.parameters()).device
