"""Certified risk against closed forms and simulated draws with a known risk."""

import json
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from calibration.samples import MULTI, even_costs, label_outcome_of, make_multi_label_rows, make_rows, outcome_of

from een_hf.calibration import (
    calibrate,
    fit_temperatures,
    risk_p_value,
)
from een_hf.evaluation import ExitCosts
from een_hf.models import ExitConfigurationError
from een_hf.models.policies import NEVER


@pytest.mark.parametrize("risk", ["accuracy_gap", "consistency", "hamming"])
def test_risks_of_several_labels_can_be_recomputed(risk):
    """An answer differs where any label does; the share of labels is no coin toss and needs the bound for any loss."""
    logits, labels = make_multi_label_rows(1000)
    limit = 0.05 if risk == "hamming" else 0.1
    report = calibrate(logits, labels, even_costs(4), max_risk=limit, risk=risk, seed=5, **MULTI)
    certifying = np.random.default_rng(5).permutation(1000)[200:]
    rows, truth = logits[certifying], labels[certifying]
    last = rows[:, -1] > 0
    cost, shares = label_outcome_of(report.policy, rows, even_costs(4), last)
    if risk == "hamming":
        losses = shares
        mean = losses.sum() / 800
        divergence = mean * math.log(mean / limit) + (1 - mean) * math.log((1 - mean) / (1 - limit))
        bentkus = math.e * scipy.stats.binom.cdf(math.ceil(losses.sum()), 800, limit)
        p_value = min(math.exp(-800 * divergence), bentkus)
    else:
        losses = shares > 0
        if risk == "accuracy_gap":
            wrong = label_outcome_of(report.policy, rows, even_costs(4), truth)[1] > 0
            losses = (last == truth).all(1) & wrong
        p_value = scipy.stats.binom.cdf(losses.sum(), 800, limit)
    guarantee = report.policy.guarantee
    assert guarantee["risk"] == risk
    assert guarantee["errors"] == pytest.approx(losses.sum())
    assert guarantee["p_value"] == pytest.approx(p_value)
    assert 0 < guarantee["p_value"] <= 0.1
    assert report.relative_cost == pytest.approx(cost) and cost < 1


def test_a_reference_stands_in_for_the_last_exit():
    """Answers are compared with those of another model, such as the one that a quantized copy was made of."""
    logits, _ = make_rows(1000)
    reference = logits[:, -1] + np.random.default_rng(1).normal(scale=0.8, size=(1000, 3)).astype(np.float32)
    report = calibrate(logits, None, even_costs(4), max_risk=0.2, seed=5, reference=reference)
    certifying = np.random.default_rng(5).permutation(1000)[200:]
    cost, agreement = outcome_of(report.policy, logits[certifying], reference[certifying].argmax(-1), even_costs(4))
    guarantee = report.policy.guarantee
    assert guarantee["risk"] == "consistency" and guarantee["errors"] == round(800 * (1 - agreement)) > 0
    assert guarantee["p_value"] == pytest.approx(scipy.stats.binom.cdf(guarantee["errors"], 800, 0.2))
    assert report.relative_cost == pytest.approx(cost) and cost < 1 and report.score == pytest.approx(agreement)
    # The answers of the reference are what temperatures are fitted to, as labels are.
    search = np.setdiff1d(np.arange(1000), certifying)
    assert report.policy.temperatures == pytest.approx(
        fit_temperatures(logits[search], reference[search].argmax(-1)), rel=1e-3
    )
    assert (
        "agreement with the reference"
        in calibrate(logits, None, even_costs(4), target_cost=0.5, reference=reference).message
    )
    with pytest.raises(ExitConfigurationError, match=r"reference must hold logits \(1000, 3\)"):
        calibrate(logits, None, even_costs(4), target_cost=0.5, reference=reference[:, :2])
    # Where even all layers disagree too often, nothing is certified.
    other = np.roll(reference, 1, axis=1)
    assert calibrate(logits, None, even_costs(4), max_risk=0.2, reference=other).policy is None


def test_the_promise_on_labels_holds_over_many_draws():
    """As below, for losses that are shares: the risk exceeds its limit as rarely as was promised."""
    num_draws, confidence, limit = 150, 0.8, 0.05
    logits, labels = make_multi_label_rows(12000, num_exits=3, seed=1)
    population, answers = torch.tensor(logits), logits > 0
    rng, exceeded, left_early = np.random.default_rng(2), 0, 0
    for draw in range(num_draws):
        rows = rng.integers(0, len(labels), 300)
        settings = {"max_risk": limit, "risk": "hamming", "risk_confidence": confidence, "seed": draw}
        report = calibrate(logits[rows], None, even_costs(3), **settings, **MULTI)
        if report.policy is None:
            continue
        left_early += 1
        exits = report.policy.exits_of(population).numpy()
        exceeded += (answers[np.arange(12000), exits] != answers[:, -1]).mean() > limit
    allowed = 1 - confidence
    assert exceeded / num_draws <= allowed + 3 * math.sqrt(allowed * (1 - allowed) / num_draws)
    assert left_early / num_draws > 0.7


def test_labels_are_counted_in_multi_label_problems_only():
    logits, labels = make_rows(300)
    with pytest.raises(ExitConfigurationError, match="--risk hamming.*multi-label.*consistency"):
        calibrate(logits, labels, even_costs(4), max_risk=0.1, risk="hamming")


def test_p_values_equal_the_binomial_sum():
    """The guarantee is this number: too small, and more policies pass than may."""
    for num_rows, errors, limit in [(50, 0, 0.1), (50, 3, 0.1), (200, 7, 0.05), (30, 30, 0.2)]:
        losses = np.array([1.0] * errors + [0.0] * (num_rows - errors))
        terms = [math.comb(num_rows, i) * limit**i * (1 - limit) ** (num_rows - i) for i in range(errors + 1)]
        assert risk_p_value(losses, limit) == pytest.approx(math.fsum(terms))


def test_p_values_of_fractional_losses_are_hoeffding_bentkus():
    """Losses between 0 and 1 are not binomial: their test must be the bound, and hold."""
    losses = np.array([0.25] * 8 + [0.0] * 92)
    mean, limit = 0.02, 0.08
    divergence = mean * math.log(mean / limit) + (1 - mean) * math.log((1 - mean) / (1 - limit))
    bentkus = math.e * scipy.stats.binom.cdf(2, 100, limit)
    expected = min(math.exp(-100 * divergence), bentkus)
    assert risk_p_value(losses, limit, binary=False) == pytest.approx(expected)
    assert risk_p_value(losses + 0.5, limit, binary=False) == 1
    # Under the worst true risk that is still too high, P(p <= delta) <= delta.
    rng = np.random.default_rng(0)
    draws = rng.choice([0.0, 0.3, 1.0], p=[0.85, 0.1, 0.05], size=(2000, 100))
    p_values = np.array([risk_p_value(draw, 0.08, binary=False) for draw in draws])
    for delta in (0.05, 0.1, 0.3):
        assert (p_values <= delta).mean() <= delta + 3 * math.sqrt(delta * (1 - delta) / 2000)


@pytest.mark.parametrize("num_draws", [200, pytest.param(600, marks=pytest.mark.slow)])
@pytest.mark.parametrize("risk", ["accuracy_gap", "consistency"])
def test_the_promise_holds_over_many_draws(risk, num_draws):
    """The point of a certificate: over draws of the rows, the risk exceeds its limit as rarely as was promised."""
    num_rows, confidence = 300, 0.8
    limit = {"accuracy_gap": 0.06, "consistency": 0.12}[risk]
    # The whole population is known, and so is the risk of any policy.
    logits, labels = make_rows(12000, num_exits=3, seed=1)
    predictions = logits.argmax(-1)
    population, everyone = torch.tensor(logits), np.arange(len(labels))
    rng = np.random.default_rng(2)
    exceeded = left_early = 0
    for draw in range(num_draws):
        rows = rng.integers(0, len(labels), num_rows)
        given = labels[rows] if risk == "accuracy_gap" else None
        report = calibrate(
            logits[rows], given, even_costs(3), max_risk=limit, risk=risk, risk_confidence=confidence, seed=draw
        )
        if report.policy is None:
            continue
        left_early += 1
        answers = predictions[everyone, report.policy.exits_of(population).numpy()]
        if risk == "accuracy_gap":
            losses = (predictions[:, -1] == labels) & (answers != labels)
        else:
            losses = answers != predictions[:, -1]
        exceeded += losses.mean() > limit
    allowed = 1 - confidence
    sampling_error = math.sqrt(allowed * (1 - allowed) / num_draws)
    assert exceeded / num_draws <= allowed + 3 * sampling_error
    # Not by never leaving, nor by staying far from the limit.
    assert left_early / num_draws > 0.7
    assert exceeded > 0


@pytest.mark.parametrize("risk", ["accuracy_gap", "consistency"])
def test_the_certificate_can_be_recomputed(risk):
    """What the guarantee states must follow from the rows and the seed that it names, and from them alone."""
    logits, labels = make_rows(1000)
    report = calibrate(logits, labels, even_costs(4), max_risk=0.1, risk=risk, seed=5)
    guarantee = report.policy.guarantee
    certifying = np.random.default_rng(5).permutation(1000)[200:]
    policy, logits, labels = report.policy, logits[certifying], labels[certifying]
    exits = policy.exits_of(torch.tensor(logits)).numpy()
    answers, last = logits[np.arange(800), exits].argmax(-1), logits[:, -1].argmax(-1)
    losses = (last == labels) & (answers != labels) if risk == "accuracy_gap" else answers != last
    assert guarantee == {
        "risk": risk,
        "limit": 0.1,
        "confidence": 0.9,
        "num_rows": 800,
        "errors": losses.sum(),
        "p_value": pytest.approx(scipy.stats.binom.cdf(losses.sum(), 800, 0.1)),
        "seed": 5,
    }
    assert guarantee["p_value"] <= 0.1
    assert report.relative_cost == pytest.approx(even_costs(4)[exits].mean())
    assert report.relative_cost < 1
    json.dumps(policy.to_dict(), allow_nan=False)


def test_certifying_rows_choose_nothing():
    """Temperatures or a path that saw the certifying rows would void the p-values."""
    logits, labels = make_rows(600)
    certifying = np.random.default_rng(0).permutation(600)[120:]
    changed = labels.copy()
    changed[certifying[:5]] = (changed[certifying[:5]] + 1) % 3
    first, second = (calibrate(logits, given, even_costs(4), max_risk=0.2).policy for given in (labels, changed))
    assert first.temperatures == second.temperatures


def test_default_risk_follows_the_labels():
    """Unlabelled rows must certify what they can, labelled ones the drop in accuracy."""
    logits, labels = make_rows(400)
    assert calibrate(logits, labels, even_costs(4), max_risk=0.2).policy.guarantee["risk"] == "accuracy_gap"
    assert calibrate(logits, None, even_costs(4), max_risk=0.2).policy.guarantee["risk"] == "consistency"


@pytest.mark.parametrize("criterion", ["entropy", "margin", "patience", "vote"])
def test_every_criterion_can_be_certified(criterion):
    """Counts tie: a first step that sends all rows away at exit 1 would refuse every policy."""
    logits, labels = make_rows(1500, num_exits=6)
    report = calibrate(logits, labels, even_costs(6), criterion=criterion, max_risk=0.1)
    assert report.policy.criterion == criterion
    assert report.relative_cost < 1


def test_too_few_rows_say_how_many_would_do():
    """A certificate from too few rows would be worthless; and the person must learn what to do."""
    logits, labels = make_rows(100)
    report = calibrate(logits, labels, even_costs(4), max_risk=0.02)
    assert report.policy is None
    assert report.relative_cost == 1
    flags = ("--calibration_file", "--calibration_samples", "--max_risk", "--risk_confidence")
    for word in (*flags, "100 calibration rows, 50 of them search for a policy and 50 certify it", "114", "164"):
        assert word in report.message
    few = calibrate(*make_rows(50), even_costs(4), max_risk=0.02)
    assert "there are 50 calibration rows, all of them search for a policy and none certifies it" in few.message
    # 0.98^114 <= 0.1 < 0.98^113; 114 certify, 50 search. The number is right to the row.
    assert 0.98**114 <= 0.1 < 0.98**113
    for num_rows, possible in ((163, False), (164, True)):
        message = calibrate(*make_rows(num_rows), even_costs(4), max_risk=0.02).message
        assert ("cannot show" not in message) is possible
    # Where more than 50 rows search, too: 0.999^2302 <= 0.1, and 500 search.
    assert "2802" in calibrate(logits, labels, even_costs(4), max_risk=0.001).message


def test_nothing_certified_means_no_early_exit():
    """Exits that are worse than the limit whatever the threshold must not be used."""
    logits, labels = make_rows(500)
    logits[:, :-1] = np.random.default_rng(0).normal(size=logits[:, :-1].shape)
    report = calibrate(logits, labels, even_costs(4), max_risk=0.005, risk="consistency", risk_confidence=0.8)
    assert report.policy is None
    assert report.exit_fractions == [0, 0, 0, 1]
    assert "No early exit" in report.message


def test_rows_that_chose_the_model_certify_nothing():
    """A guarantee from rows that chose the checkpoint would be false; its absence must give the reason."""
    logits, labels = make_rows(600)
    free = calibrate(logits, labels, even_costs(4), max_risk=0.1)
    used = calibrate(logits, labels, even_costs(4), max_risk=0.1, chosen_by="the checkpoint")
    assert used.policy.guarantee is None
    assert "the checkpoint" in used.policy.calibrated_for["no_guarantee"]
    assert "no guarantee" in used.message
    assert used.policy.thresholds == free.policy.thresholds


@pytest.mark.parametrize("size", [0.5, 1.0])
def test_custom_risk(size):
    """A loss in [0, 1] of one's own is certified by the bound that holds for any, also if these losses happen to be 0
    or 1: the losses must not choose the test. One outside would break it."""
    logits, labels = make_rows(800)

    def own(exit_logits, exits, labels):
        rows = np.arange(len(exits))
        return size * (exit_logits[rows, exits].argmax(-1) != exit_logits[:, -1].argmax(-1))

    guarantee = calibrate(logits, labels, even_costs(4), max_risk=0.1, risk=own).policy.guarantee
    assert guarantee["risk"] == "own"
    mean = guarantee["errors"] / 640
    divergence = mean * math.log(mean / 0.1) + (1 - mean) * math.log((1 - mean) / 0.9)
    bentkus = math.e * scipy.stats.binom.cdf(math.ceil(guarantee["errors"]), 640, 0.1)
    assert guarantee["p_value"] == pytest.approx(min(math.exp(-640 * divergence), bentkus))
    for bad in (np.nan, -0.1, 1.5):
        with pytest.raises(ExitConfigurationError, match=r"\[0, 1\]"):
            calibrate(
                logits, labels, even_costs(4), max_risk=0.1, risk=lambda *rows, bad=bad: np.full(len(rows[1]), bad)
            )


def test_risks_of_classes_refuse_regression():
    """Two real numbers are never equal: every row would count as changed."""
    logits, labels = make_rows(300, num_labels=1)
    with pytest.raises(ExitConfigurationError, match="--risk.*regression.*--target_cost"):
        calibrate(logits, labels, even_costs(4), criterion="patience", max_risk=0.1)


def test_a_certified_policy_leaves_out_exits_that_do_not_pay():
    """Fails if a certified policy decides where that costs more than it saves, or is changed after certifying."""
    logits, labels = make_rows(2000)
    layers, settings = (0.25, 0.5, 0.75, 1.0), {"max_risk": 0.1, "risk_confidence": 0.9}
    report = calibrate(logits, labels, ExitCosts(layers, [0.001, 0.3, 0.001, 0]), **settings)
    thresholds = report.policy.thresholds
    assert thresholds[0] < NEVER and thresholds[1] == NEVER and thresholds[2] < NEVER
    assert max(calibrate(logits, labels, layers, **settings).policy.thresholds[:3]) < NEVER
    certifying = np.random.default_rng(0).permutation(2000)[400:]
    answers, last = logits[certifying].argmax(-1), logits[certifying, -1].argmax(-1)
    exits = report.policy.exits_of(torch.tensor(logits[certifying])).numpy()
    wrong = (last == labels[certifying]) & (answers[np.arange(1600), exits] != labels[certifying])
    assert report.policy.guarantee["errors"] == wrong.sum()


def test_nothing_is_certified_behind_a_policy_that_fails():
    """What breaks: of a hundred policies some pass by chance; only those before the first that fails count."""

    def risk(exit_logits, exit_index, labels):
        early = (exit_index < exit_logits.shape[1] - 1).mean()
        return np.full(len(exit_index), float(0.3 < early < 0.6))

    logits, labels = make_rows(600)
    report = calibrate(logits, labels, even_costs(4), max_risk=0.1, risk=risk)
    assert 0 < 1 - report.exit_fractions[-1] <= 0.3
