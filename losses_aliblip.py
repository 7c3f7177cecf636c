"""The losses of BLIP retrieval as pure functions of tensors: no model, no collectives, no state.

Legend: B rows of a batch, K keys of a contrastive row (own batch and queue), E embedding width.

ITC, image-text contrastive with soft targets from momentum encoders: ALBEF, https://arxiv.org/abs/2107.07651, section
3.2. ITM, image-text matching with hard negatives: the same, and BLIP, https://arxiv.org/abs/2201.12086, section 3.2.
"""

from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def positives(product_id: Tensor, key_id: Tensor, key_valid: Tensor | None = None) -> Tensor:
    """Which keys show the same product as which row.

    Args:
        product_id: (B,) int64, the products of the rows; or (B, I), several ids of each, its product and its photo for
            instance: sharing one of them, in its column, is enough.
        key_id: (K,) or (K, I) int64, those of the keys; columns that only one side has don't count.
        key_valid: (K,) bool, False for keys that stand for no product (queue slots not yet filled).

    Returns:
        (B, K) bool.
    """
    columns = zip(product_id.reshape(len(product_id), -1).t(), key_id.reshape(len(key_id), -1).t(), strict=False)
    same = reduce(or_, (own[:, None] == keys[None, :] for own, keys in columns))  # (B, K)
    return same if key_valid is None else same & key_valid[None, :]


def soft_targets(positive: Tensor, momentum_logits: Tensor | None = None, alpha: float = 0.0) -> Tensor:
    """ITC targets: equal shares for all positives of a row, mixed with the momentum encoders' own opinion.

    Args:
        positive: (B, K) bool with at least one True in every row.
        momentum_logits: (B, K) similarities of the momentum features over the temperature; may be None when alpha is 0.
        alpha: share of the momentum opinion, 0 to 1.

    Returns:
        (B, K) fp32, every row sums to 1.
    """
    hard = positive.float() / positive.sum(dim=1, keepdim=True)
    if momentum_logits is None or alpha == 0.0:
        return hard
    return alpha * F.softmax(momentum_logits.float(), dim=1) + (1.0 - alpha) * hard


def itc_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of (B, K) logits against (B, K) soft targets, in nats, mean over the rows; fp32 scalar."""
    return -(F.log_softmax(logits.float(), dim=1) * targets).sum(dim=1).mean()


def hard_negatives(
    similarity: Tensor, excluded: Tensor, count: int = 1, *, hardest: bool = False, generator: Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Some negatives for each row, all different, drawn one after the other with probability softmax(similarity) over
    the candidates that are left.

    Args:
        similarity: (B, K) similarities over the temperature.
        excluded: (B, K) bool, the candidates that must never be drawn (same product).
        count: how many, n; of fewer candidates than that all are taken.
        hardest: take the most similar candidates instead of drawing (ties: the lowest index).
        generator: source of randomness for the draw.

    Returns:
        index: (B, n) int64, the candidates taken (0 where there is none), n at most K.
        exists: (B, n) bool, False where a row has no further candidate.
    """
    count = min(count, similarity.shape[1])
    exists = ~excluded.all(dim=1, keepdim=True)
    # The softmax runs over the allowed candidates only. Masking after a softmax over all of them draws from the same
    # distribution, but underflows to all zeros where the positive stands far above the rest.
    allowed = similarity.detach().float().masked_fill(excluded, float("-inf"))
    allowed = torch.where(exists, allowed, torch.zeros_like(allowed))
    if hardest:
        order = allowed
    else:
        # Features that are not finite must reach the loss and its guard, and not end the draw (on a GPU: the process).
        probability = F.softmax(allowed, dim=1).nan_to_num(nan=1.0)
        if count > 1:  # candidates so far below the best that theirs is 0 in fp32 come after it, but they come
            probability = probability.clamp(min=torch.finfo(torch.float32).tiny)
        # As torch.multinomial does without replacement, but without its checks, which would wait for a GPU.
        order = probability / torch.empty_like(probability).exponential_(1.0, generator=generator)
    if count == 1:
        index = order.argmax(dim=1, keepdim=True)
    else:
        order = order.masked_fill(excluded, float("-inf"))
        index = order.sort(dim=1, descending=True, stable=True).indices[:, :count]
        exists = ~excluded.gather(1, index)
    return torch.where(exists, index, torch.zeros_like(index)), exists


def itm_loss(logits: Tensor, is_match: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of (M, 2) match logits, column 1 = match, against (M,) bool, in nats, mean over the pairs, weighted
    by (M,) `weight` where given; fp32 scalar.

    A head that always answers the prior of one match in three pairs scores 0.6365.
    """
    if weight is None:
        return F.cross_entropy(logits.float(), is_match.long())
    return (F.cross_entropy(logits.float(), is_match.long(), reduction="none") * weight).sum() / weight.sum()


class MatchPairs(NamedTuple):
    """The M pairs of an ITM step: every row with itself, with its n negative images, and with its m negative texts.

    `image_index`, `text_index` (M,) int64; `is_match` (M,) bool; `weight` (M,) fp32 of the pair loss: 1 for the own
    pairs, and 1 for all negatives of a row and side together: a match is one pair in three, however many there are.
    Where a row has no negative it is 0 (to leave the pair out, its number would have to be read from the device).
    `sizes`: (B, B n, B m), how many of each kind, in this order, row by row.
    """

    image_index: Tensor
    text_index: Tensor
    is_match: Tensor
    weight: Tensor
    sizes: tuple[int, int, int]


def itm_pairs(negative_image: Tensor, image_exists: Tensor, negative_text: Tensor, text_exists: Tensor) -> MatchPairs:
    """The pairs of an ITM step as indices, B (1 + n + m) of them; the B own pairs come first.

    Args:
        negative_image: (B, n) int64, index into the images of the negative images of each text.
        image_exists: (B, n) bool, False where a text has fewer.
        negative_text: (B, m) int64, index into the texts of the negative texts of each image.
        text_exists: (B, m) bool, False where an image has fewer.
    """
    (rows, images), texts = negative_image.shape, negative_text.shape[1]
    own = torch.arange(rows, device=negative_image.device)
    image_index = torch.cat([own, negative_image.flatten(), own[:, None].expand(-1, texts).flatten()])
    text_index = torch.cat([own, own[:, None].expand(-1, images).flatten(), negative_text.flatten()])
    weight = torch.cat([torch.ones_like(own), _shares(image_exists), _shares(text_exists)]).float()
    is_match = torch.arange(image_index.shape[0], device=own.device) < rows
    return MatchPairs(image_index, text_index, is_match, weight, (rows, rows * images, rows * texts))


def _shares(exists: Tensor) -> Tensor:
    """(B, n) -> (B n,): one, shared equally by those of a row that are there."""
    if exists.shape[1] > 1:
        exists = exists / exists.sum(dim=1, keepdim=True).clamp(min=1)
    return exists.flatten()


def listwise_loss(scores: Tensor, pairs: MatchPairs) -> Tensor:
    """Which of them is it? For each text its own image among the negative ones, for each image its own text among the
    negative ones: cross-entropy over the scores of each list, in nats, mean over the lists; fp32 scalar.

    This is what re-ranking asks of the scores: to be in order within a query, not to be on the right side of a line.
    ListNet with one relevant item, https://doi.org/10.1145/1273496.1273513; in one list per text and one per image.

    Args:
        scores: (M,) of the pairs, the match logit (column 1), alone or with ITC's opinion added.
        pairs: of `itm_pairs`; those of weight 0 are in no list, and a list without negatives counts for nothing.
    """
    own, *negatives = scores.float().split(pairs.sizes)
    weights = pairs.weight.split(pairs.sizes)[1:]
    rows = own.shape[0]
    total = counted = own.new_zeros(())
    for side, weight in zip(negatives, weights, strict=True):
        absent = weight.view(rows, -1) == 0
        negative = side.view(rows, -1).masked_fill(absent, float("-inf"))
        lists = torch.cat([own[:, None], negative], dim=1)  # (B, 1 + n)
        total = total - F.log_softmax(lists, dim=1)[:, 0].sum()  # of a list without negatives: 0, without gradient
        counted = counted + (~absent.all(dim=1)).sum()
    return total / counted.clamp(min=1)


__all__ = ["hard_negatives", "itc_loss", "itm_loss", "itm_pairs", "listwise_loss", "positives", "soft_targets"]
