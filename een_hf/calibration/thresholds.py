"""Thresholds that let a share of the rows exit."""

import math
from collections.abc import Callable

import numpy as np

from ..extras import named_extras
from ..models.policies import NEVER


with named_extras():
    import scipy.special


def threshold_between(scores: np.ndarray, num_leaving: int) -> float:
    """The threshold at which the `num_leaving` surest of `scores` leave, midway to the next score.

    Ties leave together: a group of ties that `num_leaving` would cut in two stays. So one score shared by all, as a
    count at the first exit is, sends away nobody or everybody, never everybody because somebody was to go.
    """
    ordered = np.sort(scores[~np.isnan(scores)])[::-1]
    if num_leaving <= 0 or len(ordered) == 0:
        return NEVER
    if num_leaving >= len(ordered):
        return -NEVER
    highest_staying = ordered[num_leaving]
    leaving = ordered[ordered > highest_staying]
    if len(leaving) == 0:
        return NEVER
    # In the scores' own precision, so that the midpoint never lets the next score pass.
    middle = np.float32((np.float64(leaving[-1]) + np.float64(highest_staying)) / 2)
    return float(middle if middle > highest_staying else leaving[-1])


def geometric_thresholds(scores: np.ndarray, ratio: float) -> np.ndarray:
    """Thresholds (num_exits,) at which exit k takes a share of all rows proportional to ratio^k.

    The split of MSDNet (Huang et al., ICLR 2018, section 5); where fewer rows remain than a share asks for, all leave.

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
    """`thresholds` less the exits that do not pay.

    As long as `rank` rises, the exit without which it is highest gets a threshold that nobody reaches.
    """
    while True:
        used = np.flatnonzero(thresholds[:-1] < NEVER)
        without = [np.where(np.arange(len(thresholds)) == index, NEVER, thresholds) for index in used]
        best = max([thresholds, *without], key=rank)
        if best is thresholds:
            return thresholds
        thresholds = best
