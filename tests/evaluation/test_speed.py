"""From measured times to costs and policies, against a plain simulation of batches."""

import itertools

import numpy as np
import pytest
import torch
from factory import tiny_model

from een_hf.calibration import calibrate
from een_hf.evaluation import BatchSeconds, ExitCosts, latency_costs, relative_latencies
from een_hf.models import ExitPolicy
from een_hf.models.policies import NEVER


# Seconds of the layers up to each of four exits, and of a decision, for a batch of any size: a constant and a rate.
LAYERS = ((0.2, 0.3), (0.1, 0.4), (0.3, 0.1), (0.2, 0.2))
DECISION = (0.05, 0.03)


def _run(exits, evaluated, decision=DECISION):
    """Seconds of a batch whose examples exit at `exits`, part by part."""
    seconds, present = 0.0, list(exits)
    for index, (constant, rate) in enumerate(LAYERS):
        if not present:
            break
        seconds += constant + rate * len(present)
        if index in evaluated:
            seconds += decision[0] + decision[1] * len(present)
            present = [exit_index for exit_index in present if exit_index != index]
    return seconds


def _measured(size, decision=DECISION):
    alone = [_run([index] * size, {index} - {3}, decision) for index in range(4)]
    return BatchSeconds(size, alone, _run([3] * size, {0, 1, 2}, decision))


@pytest.mark.parametrize("size", [1, 2, 3, 32])
@pytest.mark.parametrize("evaluated", [(), (0,), (1,), (0, 2), (0, 1, 2)])
def test_costs_are_the_time_of_the_batch(size, evaluated):
    """Fails if decisions, or what a batch takes for examples that have exited, are left out or counted twice."""
    costs = latency_costs(_measured(size), _measured(size // 2) if size > 1 else None)
    assert costs.alone[-1] == 1.0
    policy = ExitPolicy("confidence", [0.5 if index in evaluated else NEVER for index in range(4)])
    under_policy = costs.of_policy(policy)
    rng = np.random.default_rng(size)
    for _ in range(5):
        exits = rng.choice([*evaluated, 3], size)
        if size > 1:
            exits[0] = 3  # else the batch ends before the last exit
        expected = _run(exits, set(evaluated)) / _run([3] * size, set())
        assert under_policy[exits].mean() == pytest.approx(expected, rel=1e-9)


def test_noise_makes_no_negative_time():
    """Fails if a later exit that was measured faster, or a decision that was measured to take nothing, turns costs."""
    costs = latency_costs(BatchSeconds(1, [0.5, 0.4, 1.1, 1.0], 0.9))
    assert min(np.diff(costs)) > -1e-9 and min(costs.heads) >= 0 and costs.alone == [0.5, 0.5, 1.0, 1.0]
    costs = latency_costs(BatchSeconds(4, [0.5, 0.4, 1.1, 1.0], 1.3), BatchSeconds(2, [0.6, 0.7, 0.8, 0.9], 0.8))
    assert min(np.diff(costs)) >= -1e-12 and min(costs.shared) >= 0 and costs.alone[-1] == 1.0


@pytest.mark.parametrize("decision", [(0.0, 0.001), (0.0, 0.1), (0.0, 0.4), (0.0, 2.0)])
def test_exits_that_take_more_time_than_they_save_are_left_out(decision):
    """Fails if a certified policy decides where that takes longer than it saves, every choice of exits being timed."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 2000)
    logits = rng.normal(size=(2000, 4, 3)).astype(np.float32)
    logits[np.arange(2000), :, labels] += np.array([0.5, 0.6, 3.0, 5.0])
    costs = latency_costs(_measured(1, decision))
    report = calibrate(logits, labels, costs, max_risk=0.05)
    search = logits[np.random.default_rng(0).permutation(2000)[:400]]
    thresholds = report.policy.thresholds

    def seconds(kept):
        policy = ExitPolicy("confidence", [*kept, NEVER], temperatures=report.policy.temperatures)
        evaluated = {index for index in range(3) if kept[index] < NEVER}
        return sum(_run([index], evaluated, decision) for index in policy.exits_of(torch.tensor(search)).tolist())

    choices = itertools.product(*({threshold, NEVER} for threshold in thresholds[:3]))
    assert seconds(thresholds[:3]) == pytest.approx(min(map(seconds, choices)), rel=1e-9)
    assert report.relative_cost < 1 if decision[1] <= 0.1 else report.relative_cost <= 1
    assert decision[1] < 2 or min(thresholds[:3]) == NEVER


@pytest.mark.parametrize(("batch_size", "cuda_graphs"), [(1, None), (3, None), (1, True), (3, True)])
@pytest.mark.parametrize(
    ("criterion", "fields"),
    [
        ("confidence", {}),
        ("patience", {"exit_aggregation": "boosted"}),
        ("patience", {"num_labels": 1, "problem_type": "regression"}),
    ],
)
def test_any_model_can_be_measured(criterion, fields, batch_size, cuda_graphs):
    """Fails if the policies that are timed do not fit a problem or a criterion, or one of them stays set."""
    model = tiny_model(**fields)
    params = {"tolerance": 0.1} if model.config.problem_type == "regression" else None
    settings = {"batch_size": batch_size, "criterion": criterion, "params": params, "repeats": 1}
    costs, about = relative_latencies(model, **settings, sequence_length=8, cuda_graphs=cuda_graphs)
    assert isinstance(costs, ExitCosts) and len(costs) == 3 and costs.alone[-1] == 1.0 and min(costs) > 0
    assert about["batch_size"] == batch_size and about["device"] and about["milliseconds"] > 0
    assert model.config.exit_policy is None
