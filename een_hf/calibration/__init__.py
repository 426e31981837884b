"""Calibration: from saved logits to an exit policy.

- `calibrate`: the entry, for a cost (`budget`) or a certified risk (`risk`).
- `rows`: scored calibration rows, with `arrays` (logits, labels) and `temperatures` (one per exit).
- `budget`: the best policy at a cost, by `search` over the `thresholds` of each exit.
- `risk`: the cheapest policy whose risk is certified.
- `tables`: a policy, or a curve of budgets, measured on other rows.
"""

from ..extras import named_extras


with named_extras():
    from .budget import check_target_cost, geometric_policy
    from .calibrate import calibrate
    from .risk import check_risk, risk_p_value, rows_in_words, rows_needed
    from .rows import CalibrationReport
    from .tables import budgeted_curve, policy_row
    from .temperatures import fit_temperatures
    from .thresholds import geometric_thresholds, without_idle_exits

__all__ = [
    "CalibrationReport",
    "budgeted_curve",
    "calibrate",
    "check_risk",
    "check_target_cost",
    "fit_temperatures",
    "geometric_policy",
    "geometric_thresholds",
    "policy_row",
    "risk_p_value",
    "rows_in_words",
    "rows_needed",
    "without_idle_exits",
]
