"""How far a match probability can be believed, and how it is made to be believed: over re-ranked candidates.

    def blocks():
        return candidates_with_truth(direction.candidates, depth, queries, gallery)

    measured = reliability(blocks(), slope, offset)    # expected calibration error, Brier score, log loss, bins
    slope, offset = fit(blocks)                        # what makes it true, on another split

A model gives a pair two logits, match and no match. Their difference is the margin, and the probability of a match is
sigmoid(slope x margin + offset): as it was trained with slope 1 and offset 0. The candidates are those that ITC lists
for a query, all of them count, and of K candidates few are right: where training shows one match in three pairs, a
head is too sure here.

All sums run over blocks of queries in fp64, in NumPy, whose sums depend on nothing but the values: not on the number of
processes or threads.

Legend: Q queries, K re-ranked candidates of a query, M candidates of a block.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from aliblip.retrieval.metrics import positives_in
from aliblip.retrieval.rankings import Candidates, Retrieval, Side

# Of equal width, each with its upper edge, as in Guo et al. 2017, https://arxiv.org/abs/1706.04599.
BINS = 10
_EDGES = np.arange(BINS + 1) / BINS
_QUERY_BLOCK = 1024
_MOST_STEPS = 100
_MOST_HALVINGS = 50
_DIGITS = 6  # of what is stored

# Margins (M,) fp64, and whether each candidate is a right one, (M,) bool.
Block = tuple[np.ndarray, np.ndarray]


def candidates_with_truth(candidates: Candidates, depth: int, queries: Side, gallery: Side) -> Iterator[Block]:
    """The first `depth` candidates of all queries in blocks, also those of queries without any right answer."""
    for start in range(0, len(queries), _QUERY_BLOCK):
        own = slice(start, start + _QUERY_BLOCK)
        right = positives_in(candidates.ids[own, :depth], queries.products[own], gallery.products)
        yield candidates.margins[own, :depth].double().numpy().ravel(), right.numpy().ravel()


def candidates_of_all(retrieval: Retrieval) -> Iterator[Block]:
    """The re-ranked candidates of all directions, see `candidates_with_truth`."""
    for _, direction, queries, gallery in retrieval.directions():
        yield from candidates_with_truth(direction.candidates, retrieval.depths[-1], queries, gallery)


def reliability(blocks: Iterable[Block], slope: float = 1.0, offset: float = 0.0) -> dict[str, Any]:
    """How often what is called probable is right.

    Args:
        blocks: the candidates, at least one.
        slope, offset: of the probability.

    Returns:
        A dict that JSON can hold: `candidates`, how many; `share_right`; `expected_calibration_error`, the mean over
        the candidates of how far the share of right ones in a bin is from its mean probability; `brier_score`, the
        mean squared error; `log_loss` in nats; and `bins`, BINS of {"above", "up_to", "candidates",
        "mean_probability", "share_right"}, the last two None in an empty bin. Probability 0 belongs to the first bin.
    """
    count, right, probability = (np.zeros(BINS) for _ in range(3))
    squares = losses = 0.0
    for margins, is_right in blocks:
        logits = slope * margins + offset
        probabilities = _sigmoid(logits)
        place = np.maximum(np.searchsorted(_EDGES, probabilities, side="left") - 1, 0)
        count += np.bincount(place, minlength=BINS)
        right += np.bincount(place, weights=is_right, minlength=BINS)
        probability += np.bincount(place, weights=probabilities, minlength=BINS)
        squares += float(np.square(probabilities - is_right).sum())
        losses += float(_log_losses(logits, is_right).sum())
    total = count.sum()
    return {
        "candidates": int(total),
        "share_right": float(right.sum() / total),
        "expected_calibration_error": float(np.abs(probability - right).sum() / total),
        "brier_score": squares / float(total),
        "log_loss": losses / float(total),
        "bins": [
            {
                "above": float(low),
                "up_to": float(high),
                "candidates": int(count[number]),
                "mean_probability": float(probability[number] / count[number]) if count[number] else None,
                "share_right": float(right[number] / count[number]) if count[number] else None,
            }
            for number, (low, high) in enumerate(pairwise(_EDGES))
        ],
    }


def fit(blocks: Callable[[], Iterable[Block]]) -> tuple[float, float]:
    """Slope and offset of least log loss, by Newton's method: Platt scaling.

    The truth is taken for a little less than sure, as Platt does, (R + 1) / (R + 2) and 1 / (W + 2) of R right and W
    wrong candidates: so the least loss lies at finite numbers, also where margins tell all right from all wrong ones,
    or there is no right one. A slope below 0 would call a better match less probable; 0 is taken then, and the
    probability is the share of right ones.

    Platt 1999; as a convex problem with Newton's method: Lin, Lin and Weng 2007,
    https://doi.org/10.1007/s10994-007-5018-6.

    Args:
        blocks: called once for every step; gives the same candidates each time, at least one.

    Returns:
        Slope, at least 0, and offset, of six digits.
    """
    right = wrong = 0
    for _, is_right in blocks():
        right += int(is_right.sum())
        wrong += int((~is_right).sum())
    sure, unsure = (right + 1) / (right + 2), 1 / (wrong + 2)
    share = (right * sure + wrong * unsure) / (right + wrong)

    def sums(at: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        return _loss_and_derivatives(blocks(), at, sure, unsure)

    constant = np.array([0.0, np.log(share / (1 - share))])
    at, (loss, gradient, curvature) = constant, sums(constant)
    for _ in range(_MOST_STEPS):
        # Least squares: where all margins are equal, slope and offset say the same.
        step = np.linalg.lstsq(curvature, gradient, rcond=None)[0]
        gain = float(gradient @ step) / (right + wrong)
        if gain < 1e-15:
            break
        for halvings in range(_MOST_HALVINGS):
            nearer = at - step / 2**halvings
            after = sums(nearer)
            if after[0] <= loss:
                break
        else:
            break  # rounding is all that is left
        at, (loss, gradient, curvature) = nearer, after
    slope, offset = at if at[0] >= 0 else constant
    return tuple(float(f"{value:.{_DIGITS}g}") for value in (slope, offset))


def forget_fit(config: PreTrainedConfig) -> None:
    """Take the probability as it is trained: what was fitted belongs to other weights."""
    config.itm_slope, config.itm_offset = 1.0, 0.0


def _loss_and_derivatives(
    blocks: Iterable[Block], at: np.ndarray, sure: float, unsure: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Log loss at slope and offset, summed over all candidates, its gradient (2,) and its second derivatives (2, 2)."""
    loss, gradient, curvature = 0.0, np.zeros(2), np.zeros((2, 2))
    for margins, is_right in blocks:
        logits = at[0] * margins + at[1]
        target = np.where(is_right, sure, unsure)
        loss += float(_log_losses(logits, target).sum())
        probabilities = _sigmoid(logits)
        error, weight = probabilities - target, probabilities * (1 - probabilities)
        gradient += [(error * margins).sum(), error.sum()]
        mixed = (weight * margins).sum()
        curvature += [[(weight * margins**2).sum(), mixed], [mixed, weight.sum()]]
    return loss, gradient, curvature


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -logits))  # without overflow


def _log_losses(logits: np.ndarray, target: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, logits) - target * logits


__all__ = ["BINS", "candidates_of_all", "candidates_with_truth", "fit", "forget_fit", "reliability"]
