"""Thresholds that let a share of the rows exit."""

import math
from collections.abc import Callable

import numpy as np

from ..extras import named_extras
from ..models.policies import NEVER


with named_extras():
    import scipy.special


def threshold_between(scores: np.ndarray, num_exiting: int) -> float:
    """The threshold at which the `num_exiting` highest of `scores` exit, midway to the next score.

    Equal scores exit together. A group of equal scores that `num_exiting` would divide continues as a whole: where all
    scores are equal, as a count at the first exit is, either all examples exit or none.
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
    # In the scores' own precision, so that the midpoint never lets the next score pass.
    middle = np.float32((np.float64(exiting[-1]) + np.float64(next_score)) / 2)
    return float(middle if middle > next_score else exiting[-1])


def geometric_thresholds(scores: np.ndarray, ratio: float) -> np.ndarray:
    """Thresholds (num_exits,) at which exit k takes a share of all rows proportional to ratio^k.

    The split of MSDNet (Huang et al., ICLR 2018, section 5). Where fewer rows remain than the share of an exit,
    all of them exit.

    Args:
        scores: (num_rows, num_exits).
        ratio: q.
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
    """`thresholds` without the exits that do not pay.

    As long as `rank` rises, the exit whose removal raises it most gets the threshold `NEVER`, which no score reaches.

    Args:
        thresholds: (num_exits,).
        rank: key of thresholds; higher is better.

    Returns:
        thresholds (num_exits,), `NEVER` at the exits that are left out.
    """
    while True:
        used = np.flatnonzero(thresholds[:-1] < NEVER)
        without = [np.where(np.arange(len(thresholds)) == index, NEVER, thresholds) for index in used]
        best = max([thresholds, *without], key=rank)
        if best is thresholds:
            return thresholds
        thresholds = best
