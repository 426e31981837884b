"""Search for the best thresholds at a cost, one exit at a time."""

import math
from collections.abc import Callable

import numpy as np

from ..models.policies import NEVER
from .rows import ScoredRows
from .thresholds import threshold_between, without_idle_exits


_PRICE_STEPS, _MAX_LEVELS = 14, 50


def rank(scored: ScoredRows, thresholds: np.ndarray, target_cost: float) -> tuple[bool, float, float]:
    """Key to compare thresholds: first whether the cost is within the target, then gain, then lower cost."""
    cost, gain = scored.cost_and_gain(thresholds)
    return cost <= target_cost, gain, -cost


def improve(scored: ScoredRows, start: np.ndarray, target_cost: float) -> np.ndarray:
    """Thresholds that are at least as good as `start` by `rank`.

    First maximises the Lagrangian gain - price * cost, one exit at a time; bisection finds the price at which the cost
    meets the target. Then it uses the rest of the budget, again one exit at a time.
    """
    search = LineSearch(scored)
    # In the unit of the gain, which may be a squared error.
    low, high = np.array([1e-4, 1e2]) * (np.ptp(scored.gains) or 1.0)
    best = start
    for _ in range(_PRICE_STEPS):
        price = math.sqrt(low * high)
        thresholds = search.run(start, lambda cost, gain, price=price: (gain - price * cost).argmax())
        best = max(best, thresholds, key=lambda candidate: rank(scored, candidate, target_cost))
        low, high = (price, high) if scored.cost_and_gain(thresholds)[0] > target_cost else (low, price)

    # Sums along a line are rounded: try a limit just above and one just below the budget; the exact cost decides.
    spent = [
        search.run(origin, lambda cost, gain, limit=limit: np.where(cost <= limit, gain, -np.inf).argmax())
        for origin in (best, start)
        for limit in (target_cost + 1e-12, target_cost - 1e-12)
    ]
    best = max(best, *spent, key=lambda candidate: rank(scored, candidate, target_cost))
    return without_idle_exits(best, lambda candidate: rank(scored, candidate, target_cost))


class LineSearch:
    """Cost and gain of every threshold of one exit, with the other thresholds fixed, in one pass over the rows.

    Candidates are at most `_MAX_LEVELS` quantiles of an exit's scores, and at least 20 rows apart if there are enough
    rows: closer candidates would fit the noise of the calibration rows.
    """

    def __init__(self, scored: ScoredRows):
        self.scored = scored
        self.num_levels = int(np.clip(scored.num_rows // 20, 4, _MAX_LEVELS))
        self.columns = [self._column(scores) for scores in scored.scores.T[:-1]]

    def _column(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows by falling score (NaN last), and for each candidate threshold how many of them exit; the candidates."""
        order = np.argsort(-scores, kind="stable")
        ordered = scores[order[: np.count_nonzero(~np.isnan(scores))]]
        ends = np.flatnonzero(np.diff(ordered)) + 1
        if len(ends) > self.num_levels:
            ends = ends[np.searchsorted(ends, np.linspace(ends[0], ends[-1], self.num_levels))]
        counts = np.unique([0, *ends, len(ordered)]).astype(int)
        return order, counts, np.array([threshold_between(ordered, count) for count in counts])

    def run(self, start: np.ndarray, choose: Callable, max_sweeps: int = 4) -> np.ndarray:
        """Set each exit in turn to the candidate whose index `choose(costs, gains)` returns, until nothing changes."""
        scored, thresholds = self.scored, start.copy()
        reached = scored.exits_where(thresholds)
        for _ in range(max_sweeps):
            before = thresholds.copy()
            for index, (_, _, candidates) in enumerate(self.columns):
                thresholds[index] = candidates[choose(*self._along(thresholds, reached, index))]
                reached[:, index] = scored.scores[:, index] >= thresholds[index]
            if (thresholds == before).all():
                break
        return thresholds

    def _along(self, thresholds: np.ndarray, reached: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Average cost and gain, (num_candidates,), along the candidates of an exit."""
        scored, (order, counts, candidates) = self.scored, self.columns[index]
        rows = np.arange(scored.num_rows)
        here = ~reached[:, :index].any(1)
        others = reached.copy()
        others[:, index] = False
        otherwise = others.argmax(1)

        def along(values: np.ndarray) -> np.ndarray:
            # What changes if a row that reaches this exit exits here, summed in the order of falling scores.
            stay = values[rows, otherwise]
            change = np.where(here, values[rows, index] - stay, 0.0)[order]
            return (stay.sum() + np.concatenate([[0.0], change.cumsum()])[counts]) / scored.num_rows

        def costs_with(candidate: float) -> np.ndarray:
            return scored.costs_under(np.where(np.arange(scored.num_exits) == index, candidate, thresholds))

        cost = along(np.broadcast_to(costs_with(-NEVER), scored.gains.shape))
        # An exit at which no example exits is not evaluated at all.
        return np.where(candidates < NEVER, cost, costs_with(NEVER)[otherwise].mean()), along(scored.gains)
