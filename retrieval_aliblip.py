"""The two-stage retrieval engine of AliBLIP: exact search by embeddings (ITC), then re-ranking of the best pairs (ITM).

    scores, ids = search(text_embeds, image_embeds, k=128)                    # stage 1, both directions
    pairs = candidate_pairs(ids, ids_of_titles, num_images, num_texts)        # deduplicated, grouped by image
    logits = rerank(model, tokens, groups, input_ids, attention_mask)         # stage 2, image by image
    scores, ids = order_by_score(fuse(scores, logits_of_the_candidates), ids)
    print(memory_plan(model.config, num_images, num_texts, k=128))            # before all that: memory and work

Single process, pure functions; the model is a value that has `get_image_features`, `get_text_features`,
`project_image_kv` and `match`. What is computed together depends on the arguments alone, never on who calls: equal
arguments give equal bits.

Most of the work of a pair is to project the image tokens to keys and values of every cross-attention layer. So all
pairs of both directions are grouped by image: an image is projected once, scored with all its candidate titles, and
dropped.

Two-stage retrieval: ALBEF, https://arxiv.org/abs/2107.07651, section 4; BLIP, https://arxiv.org/abs/2201.12086.

Legend: Q queries, N gallery items, n items of one chunk, k candidates of a query, E embedding, P image tokens, D width,
F width of a layer's MLP, T titles, L text tokens, M pairs.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

QUERY_BLOCK = 1024
GALLERY_CHUNK = 16384
RERANK_BATCH_TOKENS = 8192

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


def rerank(
    model,
    image_tokens: Tensor,
    text_ids: Sequence[Tensor],
    input_ids: Tensor,
    attention_mask: Tensor,
    rerank_batch_tokens: int = RERANK_BATCH_TOKENS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Match logits of some images with their candidate titles. Each image is projected once and dropped before the
    next.

    Args:
        image_tokens: (N, P, D) of N images, on any device; moved to the model's one image at a time.
        text_ids: N tensors (m_i,) int64, the candidate titles of each image; may be empty.
        input_ids, attention_mask: (T, L) int64, all titles, padded on the right, on the CPU.
        rerank_batch_tokens: bound on titles x longest title of one call of the model; a single title may exceed it.
        dtype: type of the autocast, or None.

    Returns:
        (sum of m_i,) fp32 on the CPU: column 1 of the match logits, image by image, each in the order of its
        `text_ids`.

    Raises:
        ValueError: if a title's attention mask is not ones followed by zeros, or the numbers of images differ.
    """
    if len(image_tokens) != len(text_ids):
        raise ValueError(
            f"{len(image_tokens)} images and {len(text_ids)} lists of titles given: one list per image is needed"
        )
    lengths = attention_mask.sum(dim=1)
    if not torch.equal(attention_mask != 0, torch.arange(attention_mask.shape[1]) < lengths[:, None]):
        raise ValueError("re-ranking takes titles padded on the right: set the tokenizer's padding_side to 'right'")
    device = _device(model)
    image_logits = []
    with autocast(device, dtype):
        for tokens, ids in zip(image_tokens, text_ids, strict=True):
            if not len(ids):
                continue
            order, bounds = _buckets(lengths[ids], rerank_batch_tokens)
            image_kv = model.project_image_kv(tokens[None].to(device))
            logits = torch.empty(len(ids), device=device)
            for start, stop in bounds:
                chosen = order[start:stop]
                titles = ids[chosen]
                longest, shortest = int(lengths[titles[0]]), int(lengths[titles[-1]])
                mask = attention_mask[titles, :longest].to(device) if shortest < longest else None
                index = torch.zeros(len(titles), dtype=torch.int64, device=device)
                matched = model.match(input_ids[titles, :longest].to(device), mask, image_kv, index)  # (m, 2)
                logits[chosen.to(device)] = matched[:, 1].float()
            image_logits.append(logits)
    return torch.cat(image_logits).cpu() if image_logits else torch.empty(0)


def _buckets(lengths: Tensor, batch_tokens: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Cut titles of these lengths (m,) into groups of similar length.

    Returns:
        The order of the titles (falling length, stable) and the groups as (start, stop) in that order. A group is
        closed where its padding would cost more than one group more, and where it would exceed `batch_tokens`.
    """
    sorted_lengths, order = lengths.sort(descending=True, stable=True)
    values = sorted_lengths.tolist()
    bounds, start = [], 0
    for position in range(1, len(values) + 1):
        if position < len(values):
            shorter = values[start] - values[position]
            # As if all titles that follow had this length: they would be padded by `shorter` tokens each.
            padding = shorter * (len(values) - position)
            full = (position + 1 - start) * values[start] > batch_tokens
            if not full and (padding < _BUCKET_TOKENS or values[position] == values[position - 1]):
                continue
        bounds.append((start, position))
        start = position
    return order, bounds


def fuse(itc_scores: Tensor, itm_logits: Tensor, weight: float = 1.0) -> Tensor:
    """Final score of re-ranked candidates: match logit + `weight` x ITC similarity, fp32, of the shape of both."""
    return itm_logits.float() + weight * itc_scores.float()


# --- memory and work, before they are spent ---------------------------------------------------------------------------


def image_flops(config) -> int:
    """Floating-point operations of the matrix products of one photo's pass through the image tower, projection
    included."""
    vision = config.vision_config
    P, D, F = tokens_per_image(config), vision.hidden_size, vision.intermediate_size
    patches = 2 * (P - 1) * 3 * vision.patch_size**2 * D
    layer = 2 * P * D * (4 * D + 2 * F) + 4 * P**2 * D  # query, key, value, output, MLP; attention
    return patches + vision.num_hidden_layers * layer + 2 * D * config.image_text_hidden_size


def text_flops(config, length: int) -> int:
    """The same for a title of `length` tokens, which sees no image."""
    text = config.text_config
    L, D, F = length, text.hidden_size, text.intermediate_size
    layer = 2 * L * D * (4 * D + 2 * F) + 4 * L**2 * D
    return text.num_hidden_layers * layer + 2 * D * config.image_text_hidden_size


def image_kv_flops(config) -> int:
    """The same for `project_image_kv` of one image."""
    text = config.text_config
    return text.num_hidden_layers * 2 * tokens_per_image(config) * text.encoder_hidden_size * 2 * text.hidden_size


def match_flops(config, length: int) -> int:
    """The same for `match` of one title of `length` tokens with an image whose keys and values are there."""
    text = config.text_config
    P, L, D, F = tokens_per_image(config), length, text.hidden_size, text.intermediate_size
    layer = 2 * L * D * (6 * D + 2 * F) + 4 * L**2 * D + 4 * L * P * D
    # Of the last layer only the first token is computed, from keys and values of all.
    last = 2 * L * D * 2 * D + 2 * D * (4 * D + 2 * F) + 4 * L * D + 4 * P * D
    return (text.num_hidden_layers - 1) * layer + last + 2 * D * 2


@dataclass(frozen=True)
class MemoryPlan:
    """What a two-stage retrieval needs of memory (bytes) and of work (FLOPs, in matrix products); `str` makes it
    readable.

    `image_tokens`: of all images; `images_kept`: how many images' tokens stay in host memory; `embeddings`: of both
    galleries, fp32; `candidates`: scores and ids of both directions; `search_block`: the scores of one block of queries
    with one chunk of the gallery; `image_kv`: keys and values of one image; `rerank_pass`: one call of `match`, beside
    them; `pairs_per_pass`: in such a call, at the longest title; `max_pairs`: re-ranked if no pair is a candidate of
    both directions.
    """

    num_images: int
    num_texts: int
    k: int
    token_dtype: torch.dtype
    image_tokens: int
    images_kept: int
    embeddings: int
    candidates: int
    search_block: int
    image_kv: int
    rerank_batch_tokens: int
    rerank_pass: int
    pairs_per_pass: int
    max_pairs: int
    embed_flops: int
    search_flops: int
    rerank_flops: int

    def __str__(self) -> str:
        one_image = self.image_tokens // self.num_images
        dtype = str(self.token_dtype).removeprefix("torch.")
        kept = (
            "all are kept in host memory"
            if self.images_kept == self.num_images
            else f"{self.images_kept:,} images' are kept in host memory, the others are encoded again to re-rank"
        )
        if self.max_pairs == self.num_images * self.num_texts:
            reranked = "every pair scored"
        else:
            reranked = f"the {self.k} best of each re-ranked" if self.k else "none re-ranked"
        lines = [
            f"{self.num_images:,} images x {self.num_texts:,} titles, {reranked}",
            f"  image tokens: {size_text(self.image_tokens)} in {dtype}, {size_text(one_image)} an image; {kept}",
            f"  embeddings: {size_text(self.embeddings)}; candidates: {size_text(self.candidates)}",
            f"  search: {size_text(self.search_block)} of scores at a time",
            f"  re-ranking: {size_text(self.image_kv)} of keys and values, an image at a time; "
            f"{size_text(self.rerank_pass)} for a pass of {self.rerank_batch_tokens:,} text tokens, "
            f"{self.pairs_per_pass:,} of the longest titles",
            f"  work: {self.embed_flops:.3g} FLOPs to embed, {self.search_flops:.3g} to search, at most "
            f"{self.rerank_flops:.3g} to re-rank {self.max_pairs:,} pairs",
        ]
        return "\n".join(lines)


def memory_plan(
    config,
    num_images: int,
    num_texts: int,
    k: int,
    *,
    both_directions: bool = True,
    title_tokens: float = 13,
    longest_title: int = 35,
    token_dtype: torch.dtype = torch.float32,
    host_memory: float = 4e9,
    device_memory: float = 2e9,
    rerank_batch_tokens: int | None = None,
    chunk_size: int = GALLERY_CHUNK,
) -> MemoryPlan:
    """Memory and work of a retrieval, known before any of it is done.

    Args:
        config: the model's, with `vision_config` and `text_config`.
        num_images, num_texts: sizes of the galleries.
        k: candidates of a query; 0: no second stage; as many as the gallery: all pairs.
        both_directions: photos for titles and titles for photos, or the first alone.
        title_tokens, longest_title: mean and largest length of the titles.
        token_dtype: type in which the image tokens are kept and the passes run.
        host_memory: bytes that image tokens may fill.
        device_memory: bytes that keys, values and one re-ranking pass may fill, beside the weights.
        rerank_batch_tokens: text tokens of a pass; None: as many as `device_memory` holds, up to
            `RERANK_BATCH_TOKENS`, beyond which a pass is not faster.
        chunk_size: of the search.

    Raises:
        ValueError: an empty gallery, a `k` below 0, or a `device_memory` too small for one image and one title.
    """
    if min(num_images, num_texts) < 1 or k < 0:
        raise ValueError(
            f"{num_images} images, {num_texts} titles and k = {k} given: at least 1 image and 1 title, k of at least 0"
        )
    vision, text = config.vision_config, config.text_config
    element, P, E = token_dtype.itemsize, tokens_per_image(config), config.image_text_hidden_size
    one_image = P * vision.hidden_size * element
    image_kv = text.num_hidden_layers * 2 * P * text.hidden_size * element
    # Alive at the widest point of a layer: both sides of the activation function, and in D-wide states up to eight
    # (measured in fp32 and under bf16 autocast), here one more. Fused attention keeps no scores.
    per_token = (2 * text.intermediate_size + 9 * text.hidden_size) * element
    fitting = int(device_memory - image_kv) // per_token
    if rerank_batch_tokens is None:
        if fitting < longest_title:
            needed = image_kv + longest_title * per_token
            raise ValueError(
                f"{size_text(device_memory)} of device memory given, re-ranking one title of {longest_title} tokens "
                f"takes {size_text(needed)}: give at least that"
            )
        rerank_batch_tokens = min(fitting, RERANK_BATCH_TOKENS)
    pairs_per_pass = max(1, rerank_batch_tokens // longest_title)
    text_k, image_k = min(k, num_images), min(k, num_texts)  # candidates of a title, of an image
    candidates = num_texts * text_k + (num_images * image_k if both_directions else 0)
    max_pairs = min(candidates, num_images * num_texts)
    length = math.ceil(title_tokens)
    return MemoryPlan(
        num_images=num_images,
        num_texts=num_texts,
        k=k,
        token_dtype=token_dtype,
        image_tokens=num_images * one_image,
        images_kept=min(num_images, int(host_memory // one_image)),
        embeddings=(num_images + num_texts) * E * 4,
        candidates=candidates * (4 + 8),
        search_block=min(QUERY_BLOCK, max(num_images, num_texts)) * min(chunk_size, max(num_images, num_texts)) * 4,
        image_kv=image_kv,
        rerank_batch_tokens=rerank_batch_tokens,
        rerank_pass=max(rerank_batch_tokens, longest_title) * per_token,
        pairs_per_pass=pairs_per_pass,
        max_pairs=max_pairs,
        embed_flops=num_images * image_flops(config) + num_texts * text_flops(config, length),
        search_flops=(2 if both_directions else 1) * 2 * num_images * num_texts * E,
        rerank_flops=min(num_images, max_pairs) * image_kv_flops(config) + max_pairs * match_flops(config, length),
    )


def tokens_per_image(config) -> int:
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2 + 1


def size_text(count: float) -> str:
    """12.3 GB, in three digits and powers of 1000."""
    power = min(max(int(math.log10(max(count, 1))) // 3, 0), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _device(model) -> torch.device:
    return next(model.parameters()).device
