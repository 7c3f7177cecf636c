"""The losses of BLIP retrieval as pure functions of tensors: no model, no collectives, no state.

Legend: B rows of a batch, K keys of a contrastive row (own batch and queue), E embedding width.

ITC, image-text contrastive with soft targets from momentum encoders: ALBEF, https://arxiv.org/abs/2107.07651, section
3.2. ITM, image-text matching with hard negatives: the same, and BLIP, https://arxiv.org/abs/2201.12086, section 3.2.
"""

from functools import reduce
from operator import or_

import torch
import torch.nn.functional as F
from torch import Tensor


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
    hard = positive.float()
    hard = hard / hard.sum(dim=1, keepdim=True)
    if momentum_logits is None or alpha == 0.0:
        return hard
    return alpha * F.softmax(momentum_logits.float(), dim=1) + (1.0 - alpha) * hard


def itc_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of (B, K) logits against (B, K) soft targets, in nats, mean over the rows; fp32 scalar."""
    return -(F.log_softmax(logits.float(), dim=1) * targets).sum(dim=1).mean()


def hard_negatives(
    similarity: Tensor, positive: Tensor, *, hardest: bool = False, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """One negative for each row, drawn with probability softmax(similarity) over the candidates of other products.

    Args:
        similarity: (B, K) similarities over the temperature.
        positive: (B, K) bool, the candidates that must never be drawn (same product).
        hardest: take the most similar candidate instead of drawing (ties: the lowest index).
        generator: source of randomness for the draw.

    Returns:
        index: (B,) int64, the candidate taken (0 where there is none).
        exists: (B,) bool, False for rows whose candidates all show the same product.
    """
    exists = ~positive.all(dim=1)
    # The softmax runs over the allowed candidates only. Masking after a softmax over all of them draws from the same
    # distribution, but underflows to all zeros where the positive stands far above the rest.
    allowed = similarity.detach().float().masked_fill(positive, float("-inf"))
    allowed = torch.where(exists[:, None], allowed, torch.zeros_like(allowed))
    if hardest:
        index = allowed.argmax(dim=1)
    else:
        # Features that are not finite must reach the loss and its guard, and not end the draw (on a GPU: the process).
        probability = F.softmax(allowed, dim=1).nan_to_num(nan=1.0)
        # What torch.multinomial does for one draw, without its checks: for these a GPU would have to be waited for.
        race = probability / torch.empty_like(probability).exponential_(1.0, generator=generator)
        index = race.argmax(dim=1)
    return torch.where(exists, index, torch.zeros_like(index)), exists


def itm_loss(logits: Tensor, is_match: Tensor, weight: Tensor | None = None) -> Tensor:
    """Cross-entropy of (M, 2) match logits, column 1 = match, against (M,) bool, in nats, mean over the pairs, weighted
    by (M,) `weight` where given; fp32 scalar.

    A head that always answers the prior of one match in three pairs scores 0.6365.
    """
    if weight is None:
        return F.cross_entropy(logits.float(), is_match.long())
    return (F.cross_entropy(logits.float(), is_match.long(), reduction="none") * weight).sum() / weight.sum()


def itm_pairs(negative_image: Tensor, image_exists: Tensor, negative_text: Tensor, text_exists: Tensor):
    """The pairs of an ITM step as indices: every row with itself, with its negative image, and with its negative text.

    Args:
        negative_image: (B,) int64, index into the images of the negative image of each text.
        image_exists: (B,) bool, texts that have a negative image.
        negative_text: (B,) int64, index into the texts of the negative text of each image.
        text_exists: (B,) bool, images that have a negative text.

    Returns:
        image_index, text_index: (3 B,) int64; is_match: (3 B,) bool; weight: (3 B,) fp32, 1, and 0 for the pairs that
        stand where a row has no possible negative. They are kept since their number would have to be read from the
        device. The B own pairs come first.
    """
    own = torch.arange(negative_image.shape[0], device=negative_image.device)
    image_index = torch.cat([own, negative_image, own])
    text_index = torch.cat([own, own, negative_text])
    weight = torch.cat([torch.ones_like(image_exists), image_exists, text_exists]).float()
    is_match = torch.arange(image_index.shape[0], device=own.device) < own.shape[0]
    return image_index, text_index, is_match, weight


__all__ = ["hard_negatives", "itc_loss", "itm_loss", "itm_pairs", "positives", "soft_targets"]
