"""Evaluation: metrics, costs, the results of a run and their picture.

Each module is imported on first use: measuring speed, for one, needs no data sets.
"""

import importlib

from .._moved import moved_names
from ..extras import named_extras


_NAMES = {
    "comparison": ("Comparison", "compare"),
    "cost": ("ExitCosts", "cost_inputs", "count_operations", "mean_length", "relative_costs"),
    "curves": ("curve_area", "metric_at_cost"),
    "metrics": (
        "Accuracy",
        "F1",
        "METRICS",
        "MatthewsCorrelation",
        "MeanSquaredError",
        "Pearson",
        "Spearman",
        "expected_calibration_error",
        "load_metrics",
        "make_compute_metrics",
        "predict_labels",
    ),
    "plots": ("plot_comparison", "plot_exit_curves"),
    "results": ("anytime_table", "format_exit_table", "read_exit_results", "write_exit_results"),
    "saved_logits": ("load_exit_logits", "save_exit_logits"),
    "speed": (
        "BatchSeconds",
        "latency_costs",
        "measure_seconds",
        "relative_latencies",
        "stock_model",
        "text_functions",
    ),
}
_CALIBRATION = "CalibrationReport budgeted_curve calibrate check_risk check_target_cost policy_row".split()
_moved = moved_names(__name__, dict.fromkeys(_CALIBRATION, "een_hf.calibration"))
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name in _MODULE_OF:
        with named_extras():
            return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    return _moved(name, stacklevel=3)
