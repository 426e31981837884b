"""Results of policies on rows."""

from collections.abc import Callable, Sequence

import numpy as np
from transformers import EvalPrediction

from ..evaluation.cost import ExitCosts
from ..models.policies import NEVER, ExitPolicy
from .arrays import as_tensor
from .budget import calibrate_cost
from .rows import score_rows


def policy_row(
    policy: ExitPolicy,
    exit_logits: np.ndarray,
    labels: np.ndarray,
    costs: Sequence[float],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
) -> dict:
    """Measure a policy on rows.

    Args:
        policy: an exit policy.
        exit_logits: (num_rows, num_exits, num_labels).
        labels: (num_rows,) or (num_rows, num_labels).
        costs: as in `calibrate`.
        compute_metrics: called with the logits of the policy's answers (num_rows, num_labels).

    Returns:
        `relative_cost`, `metrics`, `exit_fractions`, and the keys of `policy.to_dict()`.
    """
    logits = as_tensor(exit_logits)
    exits = policy.exits_of(logits).numpy()
    answers = logits.numpy()[np.arange(len(exits)), exits]
    fractions = np.bincount(exits, minlength=len(costs)) / len(exits)
    return {
        "relative_cost": float(fractions @ ExitCosts.of(costs).of_policy(policy)),
        "metrics": compute_metrics(EvalPrediction(predictions=answers, label_ids=labels)),
        "exit_fractions": fractions.tolist(),
        **policy.to_dict(),
    }


def budgeted_curve(
    calibration: tuple[np.ndarray, np.ndarray],
    report: tuple[np.ndarray, np.ndarray],
    costs: Sequence[float],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
    *,
    criterion: str = "confidence",
    params: dict | None = None,
    problem_type: str = "single_label_classification",
    num_budgets: int = 9,
) -> list[dict]:
    """The best policy for each of several budgets, chosen on `calibration` and measured on `report`.

    The budgets include the cost of each exit alone, for comparison with models of fewer layers, and 25, 50 and 75 %.

    Args:
        calibration: logits (num_rows, num_exits, num_labels) and labels (num_rows,).
        report: the same for other rows.
        costs: as in `calibrate`.
        compute_metrics: called with the logits of the policy's answers (num_rows, num_labels).
        criterion: a registered exit criterion.
        params: its parameters.
        problem_type: as in transformers.
        num_budgets: number of further budgets, evenly spaced from the cheapest possible (the first exit's cost, unless
            NaN scores keep examples from exiting) to the cost without early exits.

    Returns:
        for each budget `target_cost` and the keys of `policy_row`, from the cheapest to the most expensive.
    """
    scored = score_rows(*calibration, costs, criterion, params, problem_type)
    choices = scored.choices()
    cheapest, _ = scored.cost_and_gain(np.full(scored.num_exits, -NEVER))
    full, _ = scored.cost_and_gain(np.full(scored.num_exits, NEVER))
    named = [cost for cost in (0.25, 0.5, 0.75, *scored.costs.alone) if cheapest <= cost <= full]
    rows = []
    for target in np.unique([*named, *np.linspace(cheapest, full, num_budgets)]).tolist():
        policy = calibrate_cost(choices, target).policy
        rows.append({"target_cost": target, **policy_row(policy, *report, costs, compute_metrics)})
    return rows
