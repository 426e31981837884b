"""Calibration: from saved logits to an exit policy.

- `calibrate` (in `choose`): the entry, for a cost (`budget`) or a certified risk (`risk`).
- `rows`: scored calibration rows, with `arrays` (logits, labels) and `temperatures` (one per exit).
- `budget`: the best policy at a cost, by `search` over the `thresholds` of each exit.
- `risk`: the cheapest policy whose risk is certified.
- `monitoring`: whether a certified risk still holds in service.
- `tables`: a policy, or a curve of budgets, measured on other rows.

Each module is imported on first use.
"""

import importlib

from ..extras import named_extras


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
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name in _MODULE_OF:
        with named_extras():
            return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
