"""Thresholds at which a share of the rows exits."""

import math
from collections.abc import Callable

import numpy as np

from ..extras import named_extras
from ..models.policies import NEVER


with named_extras():
    import scipy.special


def threshold_between(scores: np.ndarray, num_exiting: int) -> float:
    """The threshold at which the `num_exiting` highest of `scores` exit: the midpoint to the next lower score.

    Equal scores exit together. A group of equal scores that `num_exiting` would divide continues as a whole. So if all
    scores are equal, as those of `patience` at the first exit, either all examples exit or none.
    """
    ordered = np.sort(scores[~np.isnan(scores)])[::-1]
    if num_exiting <= 0 or len(ordered) == 0:
        return NEVER
    if num_exiting >= len(ordered):
        return -NEVER
    next_score = ordered[num_exiting]
    exiting = ordered[ordered > next_score]
    if len(exiting) == 0:
        return NEVER
    # In the precision of the scores, so that the midpoint is never rounded down to the next score.
    middle = np.float32((np.float64(exiting[-1]) + np.float64(next_score)) / 2)
    return float(middle if middle > next_score else exiting[-1])


def geometric_thresholds(scores: np.ndarray, ratio: float) -> np.ndarray:
    """Thresholds at which a share of all rows proportional to ratio^k exits at exit k.

    If fewer rows remain than the share of an exit, all of them exit there.

    Args:
        scores: (num_rows, num_exits).
        ratio: q of the paper.

    Returns:
        thresholds (num_exits,).

    References:
        Multi-Scale Dense Networks for Resource Efficient Image Classification (Huang et al., ICLR 2018), section 5.
    """
    num_rows, num_exits = scores.shape
    powers = np.arange(num_exits) * math.log(ratio)
    shares = np.exp(powers - scipy.special.logsumexp(powers))
    thresholds = np.full(num_exits, -NEVER)
    remaining = np.ones(num_rows, dtype=bool)
    asked = np.round(np.cumsum(shares) * num_rows).astype(int)
    for index in range(num_exits - 1):
        wanted = asked[index] - (asked[index - 1] if index else 0)
        thresholds[index] = threshold_between(scores[remaining, index], min(wanted, int(remaining.sum())))
        remaining &= ~(scores[:, index] >= thresholds[index])
    return thresholds


def without_idle_exits(thresholds: np.ndarray, rank: Callable) -> np.ndarray:
    """Remove the exits that cost more than they gain.

    As long as `rank` rises, the exit whose removal raises it most gets the threshold `NEVER`, which no score reaches.

    Args:
        thresholds: (num_exits,).
        rank: key of thresholds; higher is better.

    Returns:
        thresholds (num_exits,), `NEVER` at the exits that were removed.
    """
    while True:
        used = np.flatnonzero(thresholds[:-1] < NEVER)
        without = [np.where(np.arange(len(thresholds)) == index, NEVER, thresholds) for index in used]
        best = max([thresholds, *without], key=rank)
        if best is thresholds:
            return thresholds
        thresholds = best
