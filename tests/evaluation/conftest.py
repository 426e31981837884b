"""A results dict to write, print and draw."""

import pytest


def _entry(exit, accuracy):
    return {
        "exit": exit,
        "layer": 2 * exit,
        "relative_cost": exit / 3 + 0.01 * exit,
        "loss": 1 - accuracy,
        "metrics": {"accuracy": accuracy, "f1": accuracy / 2},
        "ece": accuracy / 10,
    }


@pytest.fixture
def results():
    """A complete results dict of three exits, two budgets, a policy and two baselines."""
    return {
        "method": "joint",
        "model_type": "bert",
        "dataset": "glue",
        "task_name": "sst2",
        "metric": "accuracy",
        "exit_layers": [2, 4, 6],
        "num_eval_samples": 100,
        "num_calibration_samples": 60,
        "num_report_samples": 40,
        "anytime": [_entry(1, 0.7), _entry(2, 0.8), _entry(3, 0.9)],
        "anytime_report": [_entry(1, 0.71), _entry(2, 0.82), _entry(3, 0.91)],
        "budgeted": [
            {
                "target_cost": cost,
                "relative_cost": cost - 0.02,
                "metrics": {"accuracy": accuracy, "f1": 0.5},
                "thresholds": [0.8, 0.9, 0.0],
                "exit_fractions": [0.5, 0.25, 0.25],
            }
            for cost, accuracy in ((0.8, 0.9), (0.5, 0.85))
        ],
        "policy": {
            "criterion": "confidence",
            "thresholds": [0.8, 0.9, 0.0],
            "calibrated_for": {"target_cost": 0.6},
            "guarantee": None,
            "relative_cost": 0.58,
            "metrics": {"accuracy": 0.88, "f1": 0.44},
            "exit_fractions": [0.6, 0.3, 0.1],
        },
        "baselines": [
            {"name": "stock model", "relative_cost": 1.0, "metrics": {"accuracy": 0.905, "f1": 0.5}},
            {"name": "cut to 4 layers", "relative_cost": 0.667, "metrics": {"accuracy": 0.84, "f1": 0.4}},
        ],
    }
