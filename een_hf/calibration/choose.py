"""Choosing an exit policy from saved logits."""

from collections.abc import Callable, Sequence

import numpy as np

from ..models.configuration_een import ExitConfigurationError
from .budget import calibrate_cost
from .risk import calibrate_risk
from .rows import CalibrationReport, score_rows


def calibrate(
    exit_logits: np.ndarray,
    labels: np.ndarray | None,
    costs: Sequence[float],
    *,
    criterion: str = "confidence",
    params: dict | None = None,
    target_cost: float | None = None,
    max_risk: float | None = None,
    risk: str | Callable | None = None,
    risk_confidence: float = 0.9,
    problem_type: str = "single_label_classification",
    seed: int = 0,
    chosen_by: str | None = None,
) -> CalibrationReport:
    """Choose an exit policy from the logits of calibration rows.

    Args:
        exit_logits: (num_rows, num_exits, num_labels), raw.
        labels: class indices or numbers, (num_rows,), soft labels or, multi-label, 0/1, (num_rows, num_labels);
            `None`: the last exit's own predictions.
        costs: relative cost of exiting at each exit, with its parts where exits that a policy never uses are not
            evaluated (`relative_costs`, `relative_latencies`); plain numbers hold whatever the policy.
        criterion: a registered exit criterion.
        params: its parameters; those left open may be chosen too (the tolerance of `patience` in regression).
        target_cost: set the best policy whose average cost is at most this.
        max_risk: set the cheapest policy with P(risk <= max_risk) >= risk_confidence (give one of the two).
        risk: `accuracy_gap` (default with labels): the last exit is right (multi-label: in all labels) and the policy
            is not; `consistency`: the policy differs from the last exit (in any label); `hamming`, multi-label: the
            share of labels in which it differs; or a function of (exit_logits, exit_index, labels) that returns a loss
            in [0, 1] for each row.
        problem_type: as in transformers.
        seed: of the permutation that parts searching from certifying rows.
        chosen_by: what these rows already chose (a checkpoint, say); then no guarantee is written, and this is why.

    Raises:
        ExitConfigurationError: a criterion that does not fit the problem, a target below the first exit's cost,
            labels that are missing or that the model does not have, or settings that contradict each other.
    """
    if (target_cost is None) == (max_risk is None):
        raise ExitConfigurationError("Give one of target_cost (--target_cost) and max_risk (--max_risk).")
    scored = score_rows(exit_logits, labels, costs, criterion, params, problem_type)
    if target_cost is not None:
        return calibrate_cost(scored.choices(), target_cost)
    return calibrate_risk(scored, max_risk, risk, risk_confidence, seed, chosen_by)
