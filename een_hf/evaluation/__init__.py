"""Evaluation: metrics, costs, the results of a run and their picture."""

from .calibration import (
    CalibrationReport,
    budgeted_curve,
    calibrate,
    check_risk,
    check_target_cost,
    policy_row,
)
from .cost import cost_inputs, count_operations, mean_length, relative_costs
from .metrics import (
    F1,
    METRICS,
    Accuracy,
    MatthewsCorrelation,
    MeanSquaredError,
    Pearson,
    Spearman,
    expected_calibration_error,
    load_metrics,
    make_compute_metrics,
    predict_labels,
)
from .plots import plot_comparison, plot_exit_curves
from .results import (
    anytime_table,
    curve_area,
    format_exit_table,
    load_exit_logits,
    metric_at_cost,
    read_exit_results,
    save_exit_logits,
    write_exit_results,
)
from .speed import measure_seconds, relative_latencies, stock_model, text_functions


__all__ = [
    "F1",
    "METRICS",
    "Accuracy",
    "CalibrationReport",
    "MatthewsCorrelation",
    "MeanSquaredError",
    "Pearson",
    "Spearman",
    "anytime_table",
    "budgeted_curve",
    "calibrate",
    "check_risk",
    "check_target_cost",
    "cost_inputs",
    "count_operations",
    "curve_area",
    "expected_calibration_error",
    "format_exit_table",
    "load_exit_logits",
    "load_metrics",
    "make_compute_metrics",
    "mean_length",
    "measure_seconds",
    "metric_at_cost",
    "plot_comparison",
    "plot_exit_curves",
    "policy_row",
    "predict_labels",
    "read_exit_results",
    "relative_costs",
    "relative_latencies",
    "save_exit_logits",
    "stock_model",
    "text_functions",
    "write_exit_results",
]
