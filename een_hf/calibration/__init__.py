"""Calibration: from saved logits to an exit policy.

- `calibrate` (in `choose`): chooses a policy for a cost (`budget`) or for a certified risk (`risk`).
- `rows`: calibration rows and their scores, with `arrays` (logits, labels) and `temperatures` (one per exit).
- `budget`: the best policy at a cost, by `search` over the `thresholds` of each exit.
- `risk`: the cheapest policy whose risk is certified.
- `monitoring`: tests in service whether a certified risk still holds.
- `tables`: measures a policy, or a curve of budgets, on other rows.

Each module is imported on first use.
"""

from ..extras import imported_on_use


_NAMES = {
    "budget": ("check_target_cost", "geometric_policy"),
    "choose": ("calibrate",),
    "monitoring": ("RiskMonitor", "disagreement"),
    "risk": ("check_risk", "risk_p_value", "rows_in_words", "rows_needed"),
    "rows": ("CalibrationReport",),
    "tables": ("budgeted_curve", "policy_row"),
    "temperatures": ("fit_temperatures",),
    "thresholds": ("geometric_thresholds", "without_idle_exits"),
}

__all__ = sorted(name for names in _NAMES.values() for name in names)
__getattr__ = imported_on_use(__name__, _NAMES)
