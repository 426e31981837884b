"""Comparing the curves of metric against cost."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def metric_at_cost(budgeted: Sequence[dict[str, Any]], cost: float, metric: str) -> float | None:
    """The metric under the largest budget that is at most `cost`.

    Budgets (`target_cost`) are fixed before the rows that measure them are seen: the best of several budgets, chosen
    on these rows, would be biased upwards.

    Args:
        budgeted: points with `target_cost` and `metrics`, in any order; points whose metric is null are ignored.
        cost: share of the plain model's cost.
        metric: key of the points' `metrics`.

    Returns:
        the metric; `None` if no budget is so small.
    """
    affordable = [point for point in _curve(budgeted, metric) if point[0] <= cost]
    return max(affordable)[1] if affordable else None


def curve_area(budgeted: Sequence[dict[str, Any]], metric: str, start: float | None = None) -> float | None:
    """The mean of `metric_at_cost` over the costs from `start` to 1, the plain model's.

    This is the area under the step function divided by the width of the range, in the unit of the metric.

    Args:
        budgeted: as in `metric_at_cost`.
        metric: key of the points' `metrics`.
        start: lower end of the range; default: the smallest budget. To compare curves over the same range, give the
            largest of their smallest budgets.

    Returns:
        the mean; `None` if the range is empty or no budget is as small as `start`.
    """
    curve = sorted(_curve(budgeted, metric))
    start = curve[0][0] if start is None and curve else start
    if not curve or not curve[0][0] <= start < 1:
        return None
    edges = [start, *(cost for cost, _ in curve if start < cost < 1), 1.0]
    steps = [metric_at_cost(budgeted, edge, metric) for edge in edges[:-1]]
    return float(np.average(steps, weights=np.diff(edges)))


def _curve(budgeted: Sequence[dict[str, Any]], metric: str) -> list[tuple[float, float]]:
    """(budget, score) of the points that have a score."""
    points = [(entry["target_cost"], entry["metrics"].get(metric)) for entry in budgeted]
    return [(cost, score) for cost, score in points if score is not None and not math.isnan(score)]
