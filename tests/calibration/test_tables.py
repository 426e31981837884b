"""Policies and budgets measured on rows that chose nothing."""

import json

import numpy as np
import pytest
import torch
from calibration.samples import even_costs, make_rows, outcome_of

from een_hf.calibration import (
    budgeted_curve,
    calibrate,
    policy_row,
)
from een_hf.evaluation import ExitCosts
from een_hf.models import ExitPolicy
from een_hf.models.policies import NEVER


def _accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_budgeted_curve_chooses_on_some_rows_and_reports_on_others(tmp_path):
    """Numbers from the rows that chose the thresholds would be too good."""
    calibration, report = make_rows(400, seed=1), make_rows(500, seed=2)
    costs = even_costs(4)
    curve = budgeted_curve(calibration, report, costs, _accuracy, criterion="margin", num_budgets=8)
    wanted = {0.25, 0.5, 0.75, 1.0, *np.linspace(0.25, 1, 8).tolist()}
    assert [row["target_cost"] for row in curve] == pytest.approx(sorted(wanted))
    for row in curve:
        policy = ExitPolicy("margin", row["thresholds"], row["temperatures"])
        cost, accuracy = outcome_of(policy, *report, costs)
        assert row["relative_cost"] == pytest.approx(cost)
        assert row["metrics"]["accuracy"] == pytest.approx(accuracy)
        assert np.dot(row["exit_fractions"], costs) == pytest.approx(cost)
        assert outcome_of(policy, *calibration, costs)[0] <= row["target_cost"] + 1e-12
    assert curve[-1]["exit_fractions"] == [0, 0, 0, 1]
    # The file's entries are policies.
    path = tmp_path / "exit_results.json"
    path.write_text(json.dumps({"budgeted": curve, "policy": None}, allow_nan=False))
    loaded = ExitPolicy.from_results(path, target_cost=0.6)
    at = max(index for index, row in enumerate(curve) if row["target_cost"] <= 0.6)
    assert loaded.thresholds == curve[at]["thresholds"]
    assert loaded.temperatures == curve[at]["temperatures"]


def test_budgeted_curve_survives_broken_rows():
    """A NaN row in the evaluation split must not cost a finished run its results file."""
    logits, labels = make_rows(100)
    logits[:10] = np.nan
    curve = budgeted_curve((logits, labels), (logits, labels), even_costs(4), _accuracy, num_budgets=5)
    assert curve[0]["target_cost"] == pytest.approx(0.9 * 0.25 + 0.1)
    assert curve[0]["exit_fractions"] == pytest.approx([0.9, 0, 0, 0.1])


def test_policy_row_of_unseen_rows():
    """The row in the results file must be the policy that the model gets, measured where it says."""
    logits, labels = make_rows(200)
    policy = calibrate(logits, labels, even_costs(4), target_cost=0.5).policy
    other = make_rows(150, seed=3)
    row = policy_row(policy, torch.tensor(other[0]).bfloat16(), other[1], even_costs(4), _accuracy)
    rounded = torch.tensor(other[0]).bfloat16().float().numpy()
    cost, accuracy = outcome_of(policy, rounded, other[1], even_costs(4))
    assert (row["relative_cost"], row["metrics"]["accuracy"]) == (pytest.approx(cost), pytest.approx(accuracy))
    assert ExitPolicy.from_dict({key: row[key] for key in policy.to_dict()}) == policy


def test_a_policy_pays_for_the_heads_that_it_evaluates():
    """The cost in the results file would be that of exits which the policy never uses."""
    policy = ExitPolicy("confidence", [NEVER, 0.6, NEVER, 0.0])
    costs = ExitCosts([0.25, 0.5, 0.75, 1.0], heads=[0.1, 0.1, 0.1, 0.0])
    row = policy_row(policy, *make_rows(150), costs, _accuracy)
    none, early, neither, last = row["exit_fractions"]
    assert none == neither == 0 and early > 0 and last > 0
    assert row["relative_cost"] == pytest.approx(0.5 * early + 1.1 * last)
