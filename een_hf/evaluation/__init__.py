"""Evaluation: metrics, costs, and the results of runs with their plots.

Each module is imported on first use: measuring speed, for example, needs no data sets.
"""

from .._deprecated import moved_names
from ..extras import imported_on_use


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
_moved = moved_names(__name__)
_present = imported_on_use(__name__, _NAMES)

__all__ = sorted(name for names in _NAMES.values() for name in names)


def __getattr__(name: str):
    return _present(name) if name in __all__ else _moved(name, stacklevel=3)
