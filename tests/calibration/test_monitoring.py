"""The monitor of a certified risk: few false alarms however long it runs, and soon a right one."""

import numpy as np
import pytest
import torch

from een_hf import ExitConfigurationError
from een_hf.calibration.monitoring import RiskMonitor, bet, bets_against, disagreement, evidence_of


def first_alarms(draw, length, limit, confidence, runs=500, seed=0):
    """The number of the value at which each run raises its alarm, 0 where it never does; all runs side by side."""
    rng, bets = np.random.default_rng(seed), bets_against(limit)
    capital, alarms = np.zeros((runs, len(bets))), np.zeros(runs, dtype=int)
    for number in range(1, length + 1):
        capital = bet(capital, bets, draw(rng, number, runs) - limit, number)
        hit = (evidence_of(capital, number) >= 1 / (1 - confidence)) & (alarms == 0)
        alarms[hit] = number
    return alarms


def bernoulli(risk):
    return lambda rng, number, runs: (rng.random(runs) < risk).astype(float)


def test_evidence_is_that_of_the_formula():
    """A plain double sum over alternatives and starts, which shares nothing with the recursion."""
    rng, limit = np.random.default_rng(1), 0.1
    values = rng.random(60) * (rng.random(60) < 0.3)
    monitor = RiskMonitor(limit)
    for count in range(1, 61):
        monitor.update(values[count - 1])
        total = 1 / np.log2(count + 2)  # starts that are still to come
        for ratio in (1.25, 1.5, 2, 3, 5, 9):
            mean = ratio * limit / (1 - limit + ratio * limit)
            for start in range(1, count + 1):
                growth = 1 + (mean - limit) / (limit * (1 - limit)) * (values[start - 1 : count] - limit)
                total += (1 / np.log2(start + 1) - 1 / np.log2(start + 2)) * growth.prod() / 6
        assert monitor.evidence == pytest.approx(total, rel=1e-9)
    assert monitor.mean == pytest.approx(values.mean())


@pytest.mark.parametrize("length", [3000, pytest.param(40_000, marks=pytest.mark.slow)])
def test_no_alarm_while_the_limit_holds(length):
    """What breaks: a test that is looked at after each value sooner or later rejects anything."""
    for limit, confidence in ((0.02, 0.9), (0.1, 0.9), (0.02, 0.95)):
        alarms = first_alarms(bernoulli(limit), length, limit, confidence)  # the worst case: exactly at the limit
        assert (alarms > 0).mean() <= 1 - confidence
    # Exchangeable and not independent: each run has a risk of its own within the limit, and values between 0 and 1.
    risks = np.random.default_rng(2).uniform(0, 0.04, 500)

    def draw(rng, number, runs):
        return (rng.random(runs) < risks) * rng.choice([0.25, 0.75], runs)

    assert (first_alarms(draw, length, 0.02, 0.9) > 0).mean() <= 0.1


@pytest.mark.parametrize("limit,after", [(0.02, 0), (0.1, 2000), pytest.param(0.02, 10_000, marks=pytest.mark.slow)])
def test_an_alarm_soon_after_the_risk_has_doubled(limit, after):
    """95 % of the runs within twice the delay that `expected_delay` states, however long all was well before."""
    delay = RiskMonitor(limit).expected_delay(2 * limit, after)

    def draw(rng, number, runs):
        return (rng.random(runs) < (limit if number <= after else 2 * limit)).astype(float)

    alarms = first_alarms(draw, after + 2 * delay, limit, 0.95)
    assert ((alarms > 0) & (alarms <= after)).mean() <= 0.05
    assert (alarms > 0).mean() >= 0.95
    assert np.median(alarms[alarms > after]) - after <= delay


def test_one_by_one_or_all_at_once():
    values = (np.random.default_rng(3).random(4000) < 0.05).astype(float)
    at_once, single = RiskMonitor(0.02), RiskMonitor(0.02)
    assert at_once.update(values) and [single.update(value) for value in values][-1]
    assert at_once.alarm_at == single.alarm_at < 1000 and at_once.evidence == single.evidence
    assert at_once.num_values == 4000
    # Evidence beyond what a float holds.
    assert RiskMonitor(0.5).update(np.ones(20_000))


def test_disagreement_of_answers():
    answers, last = np.array([[2.0, 1], [0, 1], [5, 1]]), np.array([[1.0, 2], [0, 9], [1, 0]])
    assert disagreement(answers, last, "single_label_classification").tolist() == [1, 0, 0]
    tensors = torch.tensor(answers), torch.tensor(last)  # as models and `predict` give them
    assert disagreement(*tensors, "single_label_classification").tolist() == [1, 0, 0]
    answers, last = np.array([[2.0, -1], [1, 1]]), np.array([[1.0, 2], [3, 9]])
    assert disagreement(answers, last, "multi_label_classification").tolist() == [1, 0]
    assert disagreement(answers, last, "multi_label_classification", "hamming").tolist() == [0.5, 0]


def test_what_a_guarantee_says_and_bad_settings():
    monitor = RiskMonitor.of_guarantee({"risk": "consistency", "limit": 0.03})
    assert monitor.limit == 0.03 and not monitor.alarm and np.isnan(monitor.mean)
    with pytest.raises(ExitConfigurationError, match="accuracy_gap, which needs labels"):
        RiskMonitor.of_guarantee({"risk": "accuracy_gap", "limit": 0.03})
    for limit in (0, 1, float("nan")):
        with pytest.raises(ExitConfigurationError, match="limit must be"):
            RiskMonitor(limit)
    for values in (2, [0.1, float("nan")], -1):
        with pytest.raises(ExitConfigurationError, match=r"in \[0, 1\]"):
            monitor.update(values)
    with pytest.raises(ExitConfigurationError, match="above the limit"):
        monitor.expected_delay(0.03)
