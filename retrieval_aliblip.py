"""The two-stage retrieval engine of AliBLIP: exact search by embeddings (ITC), then re-ranking of the best pairs (ITM).

    vectors, tokens = embed_images(model, pixel_values)                       # one pass for both stages
    scores, ids = search(text_embeds, image_embeds, k=128)                    # stage 1
    logits = rerank(model, tokens, text_ids, input_ids, attention_mask)       # stage 2, image by image
    scores, ids = order_by_score(fuse(scores, logits_of_the_candidates), ids)

Single process, pure functions; the model is a value that has `get_image_features`, `get_text_features`,
`project_image_kv` and `match`. What is computed together depends on the arguments alone, never on who calls: equal
arguments give equal bits.

Most of the work of a pair is to project the image tokens to keys and values of every cross-attention layer. So pairs
are grouped by image: an image is projected once, scored with all its candidate titles, and dropped.

Two-stage retrieval: ALBEF, https://arxiv.org/abs/2107.07651, section 4; BLIP, https://arxiv.org/abs/2201.12086.

Legend: Q queries, N gallery items or images, n items of one chunk, k candidates of a query, E embedding, P image
tokens, D width, T titles, L text tokens, M pairs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

QUERY_BLOCK = 1024
GALLERY_CHUNK = 16384
RERANK_BATCH_TOKENS = 8192
# Where a pass has several images, keys and values of one layer are copied for each pair: so many at a time.
PAIRS_PER_PASS = 32

# A further bucket of titles costs about as much as this many padded text tokens: few large buckets, not many small
# ones.
_BUCKET_TOKENS = 128


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
        output = model.get_image_features(pixel_values.to(device))
    tokens = output.last_hidden_state
    # Under autocast the last normalisation gives fp32, which the projection to keys and values would round anyway.
    return output.pooler_output.float(), tokens if dtype is None else tokens.to(dtype)


def embed_texts(model, input_ids: Tensor, attention_mask: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Titles (N, L) to unit features (N, E) fp32 on the model's device."""
    device = _device(model)
    with autocast(device, dtype):
        output = model.get_text_features(input_ids.to(device), attention_mask.to(device))
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
        # By the extremes, through which NaN comes too: isfinite of the whole gallery would make copies of it.
        if values.numel() and not torch.stack(values.aminmax()).isfinite().all():
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


def rerank(
    model,
    image_tokens: Tensor | Callable[[list[int]], Tensor],
    text_ids: Sequence[Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    rerank_batch_tokens: int = RERANK_BATCH_TOKENS,
    dtype: torch.dtype | None = None,
    images_per_pass: int = 1,
) -> Tensor:
    """Match logits of some images with their candidate titles. Each image is projected once, and its keys and values
    are dropped before the next ones are made.

    Args:
        image_tokens: (N, P, D) of N images, on any device, or a function from the numbers of some images to theirs,
            which is called once for those of each pass; moved to the model's device pass by pass.
        text_ids: N tensors (m_i,) int64, the candidate titles of each image; may be empty.
        input_ids, attention_mask: (T, L) int64, all titles, padded on the right, on the CPU.
        rerank_batch_tokens: bound on titles x longest title of one call of the model; a single title may exceed it.
        dtype: type of the autocast, or None.
        images_per_pass: images whose keys and values are in memory together, 45 MB each with a ViT-B/16 at 384 pixels
            in fp32. One is best for many titles an image, which then share one attention without a copy; several are
            for few titles an image, and no more than `PAIRS_PER_PASS` pairs are in a call then.

    Returns:
        (M, 2) fp32 on the CPU, M the sum of m_i: the match logits, column 1 = match, image by image, each in the order
        of its `text_ids`.

    Raises:
        ValueError: if a title's attention mask is not ones followed by zeros, or the numbers of images differ.
    """
    if isinstance(image_tokens, Tensor) and len(image_tokens) != len(text_ids):
        raise ValueError(
            f"{len(image_tokens)} images and {len(text_ids)} lists of titles given: one list per image is needed"
        )
    lengths = attention_mask.sum(dim=1)
    if not torch.equal(attention_mask != 0, torch.arange(attention_mask.shape[1]) < lengths[:, None]):
        raise ValueError("re-ranking takes titles padded on the right: set the tokenizer's padding_side to 'right'")
    device = _device(model)
    wanted = [image for image, ids in enumerate(text_ids) if len(ids)]
    logits = []
    with autocast(device, dtype):
        for first in range(0, len(wanted), images_per_pass):
            images = wanted[first : first + images_per_pass]
            tokens = image_tokens(images) if callable(image_tokens) else torch.stack([image_tokens[i] for i in images])
            image_kv = model.project_image_kv(tokens.to(device))
            ids = torch.cat([text_ids[image] for image in images])  # of all pairs of the pass, image by image
            image_of = torch.arange(len(images)).repeat_interleave(torch.tensor([len(text_ids[i]) for i in images]))
            order, bounds = _buckets(lengths[ids], rerank_batch_tokens, PAIRS_PER_PASS if len(images) > 1 else None)
            of_pass = torch.empty(len(ids), 2, device=device)
            for start, stop in bounds:
                chosen = order[start:stop]
                titles, index = ids[chosen], image_of[chosen].to(device)
                longest, shortest = int(lengths[titles[0]]), int(lengths[titles[-1]])
                mask = attention_mask[titles, :longest].to(device) if shortest < longest else None
                matched = model.match(input_ids[titles, :longest].to(device), mask, image_kv, index)  # (m, 2)
                of_pass[chosen.to(device)] = matched.float()
            logits.append(of_pass)
            del image_kv  # or it would live until the next ones have been made too
    return torch.cat(logits).cpu() if logits else torch.empty(0, 2)


def _buckets(lengths: Tensor, batch_tokens: int, most_pairs: int | None = None) -> tuple[Tensor, list[tuple[int, int]]]:
    """Cut titles of these lengths (m,) into groups of similar length.

    Returns:
        The order of the titles (falling length, stable) and the groups as (start, stop) in that order. A group is
        closed where its padding would cost more than one group more, and where it would exceed `batch_tokens`, or have
        more than `most_pairs` titles.
    """
    sorted_lengths, order = lengths.sort(descending=True, stable=True)
    values = sorted_lengths.tolist()
    bounds, start = [], 0
    for position in range(1, len(values) + 1):
        if position < len(values):
            shorter = values[start] - values[position]
            # As if all titles that follow had this length: they would be padded by `shorter` tokens each.
            padding = shorter * (len(values) - position)
            full = (position + 1 - start) * values[start] > batch_tokens or position - start == most_pairs
            if not full and (padding < _BUCKET_TOKENS or values[position] == values[position - 1]):
                continue
        bounds.append((start, position))
        start = position
    return order, bounds


def fuse(itc_scores: Tensor, itm_logits: Tensor, weight: float = 1.0) -> Tensor:
    """Final score of re-ranked candidates: match logit + `weight` x ITC similarity, fp32, of the shape of both."""
    return itm_logits.float() + weight * itc_scores.float()


def _device(model) -> torch.device:
    return next(model.parameters()).device
