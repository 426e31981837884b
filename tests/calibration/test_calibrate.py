"""Settings, logits and labels that cannot be calibrated with."""

import math

import numpy as np
import pytest
import torch
from calibration.samples import even_costs, make_rows

from een_hf.calibration import (
    calibrate,
)
from een_hf.models import ExitConfigurationError


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["--target_cost", "--max_risk"]),
        ({"target_cost": 0.5, "max_risk": 0.1}, ["--target_cost", "--max_risk"]),
        ({"target_cost": 0.5, "criterion": "certainty"}, ["--exit_criterion", "confidence"]),
        ({"target_cost": 0.5, "problem_type": "regression"}, ["--exit_criterion confidence", "patience"]),
        ({"target_cost": 0.5, "problem_type": "multi_label_classification"}, ["--exit_criterion confidence"]),
        ({"max_risk": 0.1, "risk": "accuracy"}, ["--risk", "accuracy_gap", "consistency"]),
        ({"max_risk": 0.0}, ["--max_risk"]),
        ({"max_risk": 0.1, "risk_confidence": 1.0}, ["--risk_confidence"]),
    ],
)
def test_settings_that_cannot_work_name_the_flag(settings, words):
    """After hours of training, an error must say which flag to change."""
    logits, labels = make_rows(100)
    with pytest.raises(ExitConfigurationError) as error:
        calibrate(logits, labels, even_costs(4), **settings)
    for word in words:
        assert word in str(error.value)


def test_arrays_that_do_not_fit_are_refused():
    """Labels of one row broadcast over all; costs of another model shift every budget."""
    logits, labels = make_rows(100)
    with pytest.raises(ExitConfigurationError, match="100 rows.*not 1"):
        calibrate(logits, labels[:1], even_costs(4), target_cost=0.5)
    with pytest.raises(ExitConfigurationError, match="5 costs"):
        calibrate(logits, labels, even_costs(5), target_cost=0.5)
    with pytest.raises(ExitConfigurationError, match="rows, exits, labels"):
        calibrate(logits[:0], labels[:0], even_costs(4), target_cost=0.5)
    with pytest.raises(ExitConfigurationError, match="--risk accuracy_gap needs labels"):
        calibrate(logits, None, even_costs(4), max_risk=0.1, risk="accuracy_gap")


def _spoilt(labels, value):
    """Labels whose row 7 has this value."""
    labels = labels.astype(np.float64 if isinstance(value, float) else labels.dtype)
    labels[7] = value
    return labels


NO_LABEL = "1 of 100 rows have no label that the model knows; the first is row 7 .*--risk consistency"


@pytest.mark.parametrize("settings", [{"target_cost": 0.5}, {"max_risk": 0.1, "risk": "consistency"}])
@pytest.mark.parametrize(
    ("problem_type", "spoil", "named"),
    [
        ("single_label_classification", lambda labels: _spoilt(labels, -1), NO_LABEL),
        ("single_label_classification", lambda labels: _spoilt(labels, -100), "with -100"),
        ("single_label_classification", lambda labels: _spoilt(labels, 3), "with 3.*from 0 to 2"),
        ("single_label_classification", lambda labels: torch.tensor(_spoilt(labels, -1)), NO_LABEL),
        ("single_label_classification", lambda labels: _spoilt(labels, 1.0), "from 0 to 2, not float64"),
        ("single_label_classification", lambda labels: _spoilt(labels, math.nan), "from 0 to 2, not float64"),
        ("single_label_classification", lambda labels: [None] * len(labels), "from 0 to 2, not object"),
        ("single_label_classification", lambda labels: _spoilt(np.eye(3)[labels], 0.0), NO_LABEL + "|sum to 1"),
        ("single_label_classification", lambda labels: _spoilt(np.eye(3)[labels], math.nan), NO_LABEL),
        ("multi_label_classification", lambda labels: _spoilt(np.eye(3)[labels], -1.0), NO_LABEL),
        ("multi_label_classification", lambda labels: _spoilt(np.eye(3)[labels], math.nan), NO_LABEL),
        ("multi_label_classification", lambda labels: labels, "3 numbers for each row, 0 or 1, not int64"),
        ("regression", lambda labels: _spoilt(labels, math.nan), NO_LABEL),
        ("regression", lambda labels: [None] * len(labels), "one finite number for each row, not object"),
    ],
)
def test_missing_and_impossible_labels_are_an_error(problem_type, spoil, named, settings):
    """A row without label counts as an error of every exit, the last too, and so hides what leaving early costs."""
    logits, labels = make_rows(100)
    criterion = {"multi_label_classification": "label_confidence", "regression": "patience"}.get(problem_type)
    logits = logits[..., :1] if problem_type == "regression" else logits
    given = spoil(labels)
    with pytest.raises(ExitConfigurationError, match=named):
        calibrate(
            logits, given, even_costs(4), criterion=criterion or "confidence", problem_type=problem_type, **settings
        )


def test_truth_values_are_classes():
    """Two classes are often kept as False and True; numpy takes these for a mask, not for indices."""
    logits, labels = make_rows(100, num_labels=2)
    reports = [calibrate(logits, given, even_costs(4), target_cost=0.5) for given in (labels, labels == 1)]
    assert reports[0] == reports[1]
