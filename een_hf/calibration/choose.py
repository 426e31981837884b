"""Choosing an exit policy from saved logits."""

from collections.abc import Callable, Sequence

import numpy as np

from ..errors import check_seed
from ..models import ExitConfigurationError
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
    reference: np.ndarray | None = None,
) -> CalibrationReport:
    """Choose an exit policy from the logits of calibration rows.

    Args:
        exit_logits: (num_rows, num_exits, num_labels), without temperatures.
        labels: class indices or numbers (num_rows,); soft labels, or 0/1 for multi-label problems,
            (num_rows, num_labels); `None`: the predictions of the last exit.
        costs: relative cost of exiting at each exit (num_exits,). Those of `relative_costs` and `relative_latencies`
            take into account that exits which a policy never uses are not evaluated; plain numbers are used as they
            are for every policy.
        criterion: a registered exit criterion.
        params: its parameters. Those that are not given may be chosen as well (the tolerance of `patience` in
            regression).
        target_cost: choose the best policy whose average cost is at most this share of the plain model's cost.
        max_risk: choose the cheapest policy with P(risk <= max_risk) >= risk_confidence (give one of the two).
        risk: `accuracy_gap` (default with labels): the last exit is right (multi-label: in all labels) and the policy
            is not; `consistency`: the policy differs from the last exit (in any label); `hamming`, multi-label: the
            share of labels in which it differs; or a function of (exit_logits, exit_index, labels) that returns a loss
            in [0, 1] for each row.
        risk_confidence: probability, over the draw of the calibration rows, with which the risk is at most `max_risk`.
        problem_type: as in transformers.
        seed: seed of the permutation that divides the rows into those that search for a policy and those that certify
            it.
        chosen_by: what else was chosen on these rows, for example a checkpoint. Then no guarantee is written, and the
            policy says why.
        reference: logits (num_rows, num_labels) of the answers that stand in for the last exit's, in `risk` and where
            there are no labels: the full-precision model's, where `exit_logits` are of a quantized one.

    Returns:
        the policy and its results on these rows; set it with `model.set_exit_policy(report.policy)`.

    Raises:
        ExitConfigurationError: a criterion that does not fit the problem, a target below the first exit's cost,
            labels that are missing or that the model does not have, or settings that contradict each other.

    Example:
        >>> saved = een_hf.evaluation.load_exit_logits("runs/mine")
        >>> report = een_hf.calibrate(saved["logits"], saved["labels"], [0.4, 0.7, 1.02], target_cost=0.8)
        >>> report.policy.thresholds
        [...]

    References:
        Multi-Scale Dense Networks for Resource Efficient Image Classification (Huang et al., ICLR 2018), section 5, on
        costs. Learn then Test: Calibrating Predictive Algorithms to Achieve Risk Control (Angelopoulos et al., 2021)
        on certified risk.
    """
    if (target_cost is None) == (max_risk is None):
        raise ExitConfigurationError("Give either target_cost (--target_cost) or max_risk (--max_risk).")
    check_seed(seed, bits=64)
    scored = score_rows(exit_logits, labels, costs, criterion, params, problem_type, reference)
    if target_cost is not None:
        return calibrate_cost(scored.choices(), target_cost)
    return calibrate_risk(scored, max_risk, risk, risk_confidence, seed, chosen_by)
