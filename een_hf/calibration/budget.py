"""The best policy up to an average cost."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from ..evaluation.cost import ExitCosts
from ..models import ExitConfigurationError
from ..models.policies import NEVER, ExitPolicy
from .rows import CalibrationReport, ScoredRows, score_rows
from .search import improve, rank


def geometric_policy(
    exit_logits: np.ndarray,
    labels: np.ndarray | None,
    costs: Sequence[float],
    target_cost: float,
    *,
    criterion: str = "confidence",
    params: dict | None = None,
    problem_type: str = "single_label_classification",
) -> ExitPolicy:
    """The geometric split of MSDNet with the best ratio whose cost is at most `target_cost`.

    This is the baseline that `calibrate` improves on. It is computed from the scores with and without temperatures,
    and the better of the two is returned.

    Args:
        exit_logits, labels, costs, target_cost, criterion, params, problem_type: as in `calibrate`.

    Returns:
        the policy; its cost on these rows is at most `target_cost`, if any split is that cheap.

    References:
        Multi-Scale Dense Networks for Resource Efficient Image Classification (Huang et al., ICLR 2018), section 5.
    """
    tempered = score_rows(exit_logits, labels, costs, criterion, params, problem_type).choices()
    choices = [*tempered, *(choice.plain for choice in tempered)]
    scored, thresholds = best_choice(choices, geometric_start, target_cost)
    return scored.policy(thresholds, calibrated_for={"target_cost": float(target_cost)})


def geometric_start(scored: ScoredRows, target_cost: float) -> np.ndarray:
    """Thresholds (num_exits,) of the best geometric split within the budget; if none is, all rows exit at exit 1."""
    return max(scored.geometric_splits, key=lambda candidate: rank(scored, candidate, target_cost))


def check_target_cost(target_cost: float, costs: Sequence[float]) -> None:
    """Check that a budget is at least the cost of the cheapest exit, which is usually the first.

    Args:
        target_cost: share of the plain model's cost.
        costs: relative cost of exiting at each exit, (num_exits,).

    Raises:
        ExitConfigurationError: no policy is that cheap; the message names the smallest possible budget.
    """
    alone = ExitCosts.of(costs).alone
    cheapest = min(alone)  # costs in time: the decision of an early exit may take longer than the layers after it
    if not target_cost < math.inf:
        raise ExitConfigurationError(f"--target_cost is a share of the full cost, not {target_cost:g}.")
    if target_cost < cheapest:
        which = "first" if cheapest == alone[0] else "cheapest"
        raise ExitConfigurationError(
            f"--target_cost {target_cost:g} is below the cost of the {which} exit, {cheapest:.4g}: no policy is so "
            f"cheap. Give at least {math.ceil(cheapest * 1000) / 1000:g}, or an earlier first exit (--exit_layers)."
        )


def calibrate_cost(choices: list[ScoredRows], target_cost: float) -> CalibrationReport:
    """The best policy whose average relative cost on the calibration rows is at most `target_cost`.

    Args:
        choices: the rows, scored with each setting of the criterion that is tried.
        target_cost: share of the plain model's cost.

    Returns:
        the policy and its results on the calibration rows.

    Raises:
        ExitConfigurationError: the budget is below the cost of every exit, or cannot be met because rows with NaN
            scores never exit early.
    """
    scored = choices[0]
    check_target_cost(target_cost, scored.costs)
    about = {"calibrated_for": {"target_cost": float(target_cost)}}
    thresholds = np.full(scored.num_exits, NEVER)
    if target_cost >= scored.cost_and_gain(thresholds)[0]:
        message = f"A cost of {target_cost:g} pays for every layer: no example needs to exit early."
        return scored.report(scored.policy(thresholds, **about), thresholds, message)

    def find(scored: ScoredRows, target_cost: float) -> np.ndarray:
        return improve(scored, geometric_start(scored, target_cost), target_cost)

    scored, best = best_choice(choices, find, target_cost)
    # Temperatures change where examples exit, which may also lower the score: compare with no temperatures.
    plain = scored.plain
    split = geometric_start(plain, target_cost)
    if plain.cost_and_gain(split)[0] <= target_cost and plain.score(split) > scored.score(best):
        scored, best = plain, find(plain, target_cost)
    cost, _ = scored.cost_and_gain(best)
    if cost > target_cost:
        raise ExitConfigurationError(
            f"--target_cost {target_cost:g} cannot be met: rows with NaN scores never exit early (cost {cost:.4g})."
        )
    name = f"agreement with the {'last exit' if scored.given_reference is None else 'reference'}"
    if scored.labels is not None:
        name = {"regression": "score", "multi_label_classification": "accuracy over labels"}.get(
            scored.problem_type, "accuracy"
        )
    score = scored.score(best)
    message = f"At {cost:.3f} of the full cost: {name} {score:.4f} on {scored.num_rows} calibration rows."
    return scored.report(scored.policy(best, **about), best, message)


def best_choice(choices: list[ScoredRows], find: Callable, target_cost: float) -> tuple[ScoredRows, np.ndarray]:
    """The setting of the criterion for which `find` returns the best thresholds, and these thresholds."""
    found = [(scored, find(scored, target_cost)) for scored in choices]
    return max(found, key=lambda one: rank(*one, target_cost))
