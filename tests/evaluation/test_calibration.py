"""Calibration against brute force, closed forms and simulated draws with a known risk."""

import itertools
import json
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from een_hf.evaluation import ExitCosts, budgeted_curve, calibrate, policy_row
from een_hf.evaluation.calibration import (
    fit_temperatures,
    geometric_policy,
    geometric_thresholds,
    risk_p_value,
    without_idle_exits,
)
from een_hf.models import ExitConfigurationError, ExitPolicy
from een_hf.models.policies import NEVER


def _rows(num_rows, num_exits=4, num_labels=3, seed=0):
    """Logits (num_rows, num_exits, num_labels) of exits that get better, on rows of uneven difficulty; labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_labels, num_rows)
    logits = rng.normal(size=(num_rows, num_exits, num_labels))
    ease = rng.normal(size=(num_rows, 1))
    logits[np.arange(num_rows), :, labels] += np.maximum(0, np.linspace(0.8, 3, num_exits) + ease)
    return logits.astype(np.float32), labels


def _multi_label_rows(num_rows, num_exits=4, num_labels=3, seed=0):
    """As `_rows`, each label a matter of its own; labels are 0/1, (num_rows, num_labels)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (num_rows, num_labels))
    logits = rng.normal(size=(num_rows, num_exits, num_labels))
    ease = rng.normal(size=(num_rows, 1)) + np.linspace(0.8, 3, num_exits)
    logits += np.maximum(0, ease)[..., None] * (2 * labels - 1)[:, None]
    return logits.astype(np.float32), labels


def _costs(num_exits):
    return np.arange(1, num_exits + 1) / num_exits


def _outcome(policy, logits, labels, costs):
    """Average cost and accuracy of a policy, a row and an exit at a time."""
    scores = policy.scores(torch.tensor(logits)).tolist()
    spent = right = 0
    for row, row_scores in enumerate(scores):
        index = 0
        while index < len(costs) - 1 and not row_scores[index] >= policy.thresholds[index]:
            index += 1
        spent += costs[index]
        right += int(logits[row, index].argmax() == labels[row])
    return spent / len(scores), right / len(scores)


# Temperatures


def test_temperatures_minimise_the_likelihood():
    """Scores of different exits are only comparable if each exit's temperature is its own optimum."""
    logits, labels = _rows(400)
    logits *= np.array([0.3, 1.0, 2.0, 5.0], dtype=np.float32)[:, None]
    for index, temperature in enumerate(fit_temperatures(logits, labels)):
        one = logits[:, index].astype(np.float64)

        def loss(value, one=one):
            return -scipy.special.log_softmax(one / value, -1)[np.arange(len(labels)), labels].mean()

        grid = np.geomspace(0.05, 20, 4001)
        best = grid[np.argmin([loss(value) for value in grid])]
        assert temperature == pytest.approx(best, rel=5e-3)


def test_temperatures_take_soft_labels_and_the_last_exit():
    """Mixup gives soft labels and unlabelled rows none: neither may change what hard labels give."""
    logits, labels = _rows(300)
    hard = fit_temperatures(torch.tensor(logits), torch.tensor(labels))
    assert fit_temperatures(logits, np.eye(3)[labels]) == pytest.approx(hard)
    assert fit_temperatures(logits, None) == pytest.approx(fit_temperatures(logits, logits[:, -1].argmax(-1)))
    smooth = 0.9 * np.eye(3)[labels] + 0.1 / 3
    assert all(soft > sharp for soft, sharp in zip(fit_temperatures(logits, smooth), hard, strict=True))


def test_temperatures_of_several_labels_minimise_the_binary_likelihood():
    """A softmax over labels that do not exclude each other has another optimum."""
    logits, labels = _multi_label_rows(400)
    logits *= np.array([0.3, 1.0, 2.0, 5.0], dtype=np.float32)[:, None]
    grid = np.geomspace(0.05, 20, 4001)
    for index, temperature in enumerate(fit_temperatures(logits, labels, "multi_label_classification")):
        signed = np.where(labels == 1, 1.0, -1.0) * logits[:, index]
        best = grid[np.argmin([np.logaddexp(0, -signed / value).mean() for value in grid])]
        assert temperature == pytest.approx(best, rel=5e-3)
    perfect = 5.0 * (2 * labels[:, None].repeat(2, 1) - 1)
    assert fit_temperatures(perfect, labels, "multi_label_classification") == [1.0, 1.0]
    assert fit_temperatures(perfect, None, "multi_label_classification") == [1.0, 1.0]


def test_temperature_without_an_optimum_is_one():
    """An exit that is always right has its optimum at 0, where every score is 1 and no threshold can part rows."""
    logits, labels = _rows(200)
    logits[np.arange(200), 1, labels] += 50
    temperatures = fit_temperatures(logits, labels)
    assert temperatures[1] == 1.0
    assert temperatures[0] != 1.0
    assert fit_temperatures(np.full((3, 2, 2), np.nan), np.zeros(3, int)) == [1.0, 1.0]


# Target cost


ADVERSARIES = {
    "random": lambda: _rows(500),
    "one row": lambda: _rows(1),
    "two rows": lambda: _rows(2),
    "constant": lambda: (np.zeros((60, 4, 3), np.float32), np.zeros(60, int)),
    "two values": lambda: (np.round(_rows(120)[0]).clip(0, 1), _rows(120)[1]),
    "always right": lambda: (50 * np.eye(3, dtype=np.float32)[_rows(80)[1]][:, None].repeat(4, 1), _rows(80)[1]),
    "worse with depth": lambda: (_rows(200)[0][:, ::-1].copy(), _rows(200)[1]),
}


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "margin", "patience", "vote"])
@pytest.mark.parametrize("rows", ADVERSARIES)
def test_cost_never_exceeds_the_target(rows, criterion):
    """A budget is a promise on the calibration rows, ties and tiny samples included, and the report is true."""
    logits, labels = ADVERSARIES[rows]()
    costs = _costs(4)
    for target in (0.25, 0.3, 0.5, 0.61, 0.75, 0.9999):
        report = calibrate(logits, labels, costs, criterion=criterion, target_cost=target)
        cost, accuracy = _outcome(report.policy, logits, labels, costs)
        assert cost <= target + 1e-12
        assert report.relative_cost <= target
        assert report.relative_cost == pytest.approx(cost)
        assert report.score == pytest.approx(accuracy)
        assert sum(report.exit_fractions) == pytest.approx(1)
        assert np.dot(report.exit_fractions, costs) == pytest.approx(cost)
        assert report.policy.calibrated_for == {"target_cost": target}
        report.policy.validate(4, None, 3)


@pytest.mark.parametrize("criterion", ["confidence", "patience", "vote"])
@pytest.mark.parametrize("num_rows", [20, 150, pytest.param(2000, marks=pytest.mark.slow)])
def test_never_below_the_geometric_split(num_rows, criterion):
    """The search would be worse than doing without it."""
    for seed in range(4):
        logits, labels = _rows(num_rows, num_exits=6, seed=seed)
        costs = _costs(6)
        for target in (0.2, 0.35, 0.5, 0.8):
            plain = geometric_policy(logits, labels, costs, target, criterion=criterion)
            report = calibrate(logits, labels, costs, criterion=criterion, target_cost=target)
            plain_cost, plain_accuracy = _outcome(plain, logits, labels, costs)
            assert plain_cost <= target + 1e-12
            assert report.score >= plain_accuracy - 1e-12


def _plain_geometric_split(logits, labels, costs, target):
    """The accuracy of MSDNet's split of the softmax scores as they are, its best q that the target affords."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    scores = (shifted / shifted.sum(-1, keepdims=True)).max(-1)
    best = 0.0
    for ratio in np.geomspace(1 / 30, 30, 61):
        shares = ratio ** np.arange(len(costs))
        left, exits = list(range(len(labels))), np.full(len(labels), len(costs) - 1)
        wanted = np.round(np.cumsum(shares / shares.sum()) * len(labels)).astype(int)
        for index, count in enumerate(np.diff(wanted, prepend=0)[:-1]):
            left.sort(key=lambda row, index=index: -scores[row, index])
            exits[left[:count]] = index
            left = left[count:]
        if costs[exits].mean() <= target:
            best = max(best, (logits[np.arange(len(labels)), exits].argmax(-1) == labels).mean())
    return best


def test_never_below_the_geometric_split_of_the_plain_scores():
    """One temperature per exit, fitted to the likelihood, may order rows worse than none."""
    costs, worse_with_temperatures = _costs(4), 0
    for seed in range(20):
        logits, labels = _rows(60, seed=seed)
        logits *= np.array([4.0, 0.3, 1.0, 1.0], dtype=np.float32)[:, None]
        for target in (0.4, 0.6):
            report = calibrate(logits, labels, costs, target_cost=target)
            plain = _plain_geometric_split(logits, labels, costs, target)
            assert report.score >= plain - 1e-12
            worse_with_temperatures += report.policy.temperatures is None
            # People read calibrated numbers whichever scores decide.
            read = report.policy.confidence_temperatures or report.policy.temperatures
            assert read == pytest.approx(fit_temperatures(logits, labels))
            assert (report.policy.confidence_temperatures is None) != (report.policy.temperatures is None)
    assert worse_with_temperatures >= 3


@pytest.mark.parametrize("criterion", ["patience", "vote"])
def test_counts_are_near_the_best_of_all_policies(criterion):
    """At the first exit all counts are equal: a split that asks for some rows there must not send all away."""
    for seed in range(4):
        logits, labels = _rows(300, seed=seed)
        costs = _costs(4)
        scores = ExitPolicy(criterion, [0.0] * 4).scores(torch.tensor(logits)).numpy()
        right = logits.argmax(-1) == labels[:, None]
        for target in (0.4, 0.55, 0.7):
            best = 0
            for thresholds in itertools.product(*[[*np.unique(column), 99] for column in scores[:, :3].T]):
                sure = np.concatenate([scores[:, :3] >= thresholds, np.ones((300, 1), bool)], 1)
                exits = sure.argmax(1)
                if costs[exits].mean() <= target:
                    best = max(best, right[np.arange(300), exits].mean())
            report = calibrate(logits, labels, costs, criterion=criterion, target_cost=target)
            assert report.score >= best - 0.01


def test_improvement_carries_over_to_new_rows():
    """A search that fits the noise of its rows is better on them and worse where it counts."""
    costs, gains = _costs(6), []
    for seed in range(12):
        logits, labels = _rows(4300, num_exits=6, seed=seed)
        # An exit that is no good, as happens: the geometric split uses it all the same.
        logits[:, 2] = 0.3 * logits[:, 2] + np.random.default_rng(seed).normal(size=logits[:, 2].shape)
        for target in (0.3, 0.5, 0.7):
            plain = geometric_policy(logits[:300], labels[:300], costs, target)
            found = calibrate(logits[:300], labels[:300], costs, target_cost=target).policy
            gains.append(_fast(found, logits[300:], labels[300:]) - _fast(plain, logits[300:], labels[300:]))
    assert np.mean(gains) > 0.005


def _fast(policy, logits, labels):
    exits = policy.exits_of(torch.tensor(logits)).numpy()
    return (logits[np.arange(len(exits)), exits].argmax(-1) == labels).mean()


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "margin"])
def test_the_budget_holds_on_new_rows_within_sampling_error(criterion):
    """A budget that is kept only on the rows that calibrated it would be overdrawn in production."""
    costs, overdrawn = _costs(4), []
    for seed in range(30):
        logits, labels = _rows(400, seed=seed)
        policy = calibrate(logits, labels, costs, criterion=criterion, target_cost=0.55).policy
        new, _ = _rows(4000, seed=1000 + seed)
        spent = costs[policy.exits_of(torch.tensor(new)).numpy()]
        error = spent.std() * math.sqrt(1 / 400 + 1 / 4000)
        overdrawn.append(
            (spent.mean() - policy_row(policy, logits, labels, costs, lambda _: {})["relative_cost"]) / error
        )
    # Differences in units of their standard error: no bias beyond a part of one, none far out.
    assert abs(np.mean(overdrawn)) < 0.6 and np.abs(overdrawn).max() < 4


def test_thresholds_lie_midway():
    """A threshold on a score itself is at the mercy of rounding on another device."""
    logits, labels = _rows(300)
    policy = calibrate(logits, labels, _costs(4), target_cost=0.6).policy
    scores = policy.scores(torch.tensor(logits)).numpy()
    midway = 0
    for threshold, column in zip(policy.thresholds[:-1], scores.T, strict=False):
        above, below = column[column >= threshold], column[column < threshold]
        if len(above) and len(below):
            assert threshold == pytest.approx((above.min() + below.max()) / 2, abs=1e-7)
            midway += 1
    assert midway >= 2


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_geometric_split_takes_the_shares_of_the_paper(ratio):
    """The baseline must be MSDNet's: exit k takes the surest of those left, a share proportional to ratio^k."""
    num_rows, num_exits = 1000, 4
    rng = np.random.default_rng(0)
    scores = np.stack([rng.permutation(num_rows).astype(np.float32) for _ in range(num_exits)], 1)
    thresholds = geometric_thresholds(scores, ratio)
    shares = ratio ** np.arange(num_exits) / (ratio ** np.arange(num_exits)).sum()
    left = np.arange(num_rows)
    for index in range(num_exits - 1):
        leaves = scores[left, index] >= thresholds[index]
        assert leaves.sum() == pytest.approx(shares[index] * num_rows, abs=1)
        surest = left[np.argsort(-scores[left, index])[: leaves.sum()]]
        assert set(left[leaves]) == set(surest)
        left = left[~leaves]


def test_target_at_or_above_the_whole_network_never_leaves():
    """Paying for every layer must give the network's own predictions."""
    logits, labels = _rows(50)
    costs = [0.3, 0.6, 0.8, 1.02]
    for target in (1.02, 1.5):
        report = calibrate(logits, labels, costs, target_cost=target)
        assert report.relative_cost == 1.02
        assert report.policy.exits_of(torch.tensor(logits)).eq(3).all()
    # Below it, some row has to leave.
    assert calibrate(logits, labels, costs, target_cost=1.0).relative_cost <= 1.0


def test_target_below_the_first_exit_is_refused():
    """No policy is that cheap: setting the cheapest instead would break the promise silently."""
    logits, labels = _rows(50)
    with pytest.raises(ExitConfigurationError, match="--target_cost 0.2.*0.25"):
        calibrate(logits, labels, _costs(4), target_cost=0.2)
    assert calibrate(logits, labels, _costs(4), target_cost=0.25).exit_fractions == [1, 0, 0, 0]


def test_regression_calibrates_by_squared_error():
    """With one label a class comparison calls every answer right, and every row leaves at exit 1."""
    rng = np.random.default_rng(0)
    labels = rng.normal(size=400)
    noise = rng.normal(size=(400, 5)) * np.linspace(1, 0.2, 5) * rng.exponential(size=(400, 1))
    logits = (labels[:, None] + noise)[..., None].astype(np.float32)
    costs = _costs(5)
    settings = {"criterion": "patience", "params": {"tolerance": 0.5}}
    # One label is regression, whatever it is called.
    for problem_type in ("regression", "single_label_classification"):
        report = calibrate(logits, labels, costs, target_cost=0.6, problem_type=problem_type, **settings)
        exits = report.policy.exits_of(torch.tensor(logits)).numpy()
        errors = (logits[np.arange(400), exits, 0] - labels) ** 2
        assert report.score == pytest.approx(-errors.mean())
        assert report.relative_cost <= 0.6
        # Better than stopping everybody at the deepest exit that the budget pays for.
        assert errors.mean() <= ((logits[:, 2, 0] - labels) ** 2).mean()
    with pytest.raises(ExitConfigurationError, match="--exit_criterion confidence.*patience"):
        calibrate(logits, labels, costs, target_cost=0.6)


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_regression_does_not_depend_on_the_unit_or_on_broken_rows(unit):
    """Prices in kilometres or metres must leave alike, and one NaN must not make all policies look the same."""
    rng = np.random.default_rng(0)
    labels = rng.normal(size=300)
    noise = rng.normal(size=(300, 5)) * np.linspace(1, 0.2, 5) * rng.exponential(size=(300, 1))
    logits = (labels[:, None] + noise)[..., None]
    logits[0] = np.nan
    settings = {"criterion": "patience", "target_cost": 0.6}
    expected = calibrate(logits, labels, _costs(5), **settings, params={"tolerance": 0.5})
    report = calibrate(unit * logits, unit * labels, _costs(5), **settings, params={"tolerance": unit * 0.5})
    assert report.exit_fractions == expected.exit_fractions
    assert 0.4 < report.relative_cost <= 0.6
    assert math.isfinite(report.score)
    # Left open, the tolerance follows the unit, is written into the policy and costs nothing in score.
    open_ = calibrate(unit * logits, unit * labels, _costs(5), **settings)
    assert 0.01 < open_.policy.params["tolerance"] / unit < 10
    assert open_.relative_cost <= 0.6 and open_.score >= 1.05 * report.score
    deciles = np.quantile(np.abs(np.diff(logits[1:, :, 0], axis=1)), np.arange(1, 10) / 10)
    assert np.isclose(open_.policy.params["tolerance"] / unit, deciles, rtol=1e-3).any()


def test_broken_rows_stay_and_are_charged():
    """NaN rows never leave early: their cost counts, and a budget that they burst is refused, not missed."""
    logits, labels = _rows(100)
    logits[:10] = np.nan
    report = calibrate(logits, labels, _costs(4), target_cost=0.5)
    exits = report.policy.exits_of(torch.tensor(logits)).numpy()
    assert (exits[:10] == 3).all()
    assert _costs(4)[exits].mean() <= 0.5
    with pytest.raises(ExitConfigurationError, match="--target_cost 0.3 cannot be met.*NaN"):
        calibrate(logits, labels, _costs(4), target_cost=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_and_half_precision_are_taken(dtype):
    """Logits come as the model made them: a tensor, often in half precision, with a graph."""
    logits, labels = _rows(200)
    tensor = torch.tensor(logits).to(dtype).requires_grad_()
    report = calibrate(tensor, torch.tensor(labels), _costs(4), target_cost=0.5)
    array = calibrate(tensor.detach().float().numpy(), labels, _costs(4), target_cost=0.5)
    assert report.policy == array.policy
    soft = calibrate(tensor, np.eye(3)[labels], _costs(4), target_cost=0.5)
    assert soft.policy.thresholds == pytest.approx(array.policy.thresholds)


def test_without_labels_the_last_exit_is_right():
    """Unlabelled rows calibrate towards agreement with the full network."""
    logits, _ = _rows(300)
    report = calibrate(logits, None, _costs(4), target_cost=0.6)
    _, agreement = _outcome(report.policy, logits, logits[:, -1].argmax(-1), _costs(4))
    assert report.score == pytest.approx(agreement)
    assert "agreement" in report.message


# Several labels


MULTI = {"problem_type": "multi_label_classification", "criterion": "label_confidence"}


def _label_outcome(policy, logits, costs, target):
    """Average cost and losses against 0/1 targets (num_rows, num_labels), a row, an exit and a label at a time."""
    spent, shares = 0.0, []
    for row, exits in enumerate(logits.astype(np.float64)):
        for index, one in enumerate(exits):
            p = 1 / (1 + np.exp(-one / (policy.temperatures or [1.0] * len(costs))[index]))
            if index == len(costs) - 1 or min(max(value, 1 - value) for value in p) >= policy.thresholds[index]:
                break
        spent += costs[index]
        shares.append(np.mean([(value > 0) != truth for value, truth in zip(one, target[row], strict=True)]))
    return spent / len(logits), np.array(shares)


@pytest.mark.parametrize("labelled", [True, False])
def test_several_labels_meet_a_cost(labelled):
    """A policy that stops where the likeliest label is sure ignores all others."""
    logits, labels = _multi_label_rows(400)
    costs = _costs(4)
    truth = labels if labelled else logits[:, -1] > 0
    for target in (0.3, 0.5, 0.8):
        report = calibrate(logits, labels if labelled else None, costs, target_cost=target, **MULTI)
        cost, losses = _label_outcome(report.policy, logits, costs, truth)
        assert cost <= target + 1e-12
        assert report.relative_cost == pytest.approx(cost)
        assert report.score == pytest.approx(1 - losses.mean())
        # Better than one exit for all that costs no more.
        deepest = int(target * 4 + 1e-9) - 1
        assert report.score > 1 - ((logits[:, deepest] > 0) != truth).mean()
    soft = calibrate(logits, labels.astype(np.float32), costs, target_cost=0.5, **MULTI)
    assert soft.policy == calibrate(logits, labels, costs, target_cost=0.5, **MULTI).policy


@pytest.mark.parametrize("risk", ["accuracy_gap", "consistency", "hamming"])
def test_risks_of_several_labels_can_be_recomputed(risk):
    """An answer differs where any label does; the share of labels is no coin toss and needs the bound for any loss."""
    logits, labels = _multi_label_rows(1000)
    limit = 0.05 if risk == "hamming" else 0.1
    report = calibrate(logits, labels, _costs(4), max_risk=limit, risk=risk, seed=5, **MULTI)
    certifying = np.random.default_rng(5).permutation(1000)[200:]
    rows, truth = logits[certifying], labels[certifying]
    last = rows[:, -1] > 0
    cost, shares = _label_outcome(report.policy, rows, _costs(4), last)
    if risk == "hamming":
        losses = shares
        mean = losses.sum() / 800
        divergence = mean * math.log(mean / limit) + (1 - mean) * math.log((1 - mean) / (1 - limit))
        bentkus = math.e * scipy.stats.binom.cdf(math.ceil(losses.sum()), 800, limit)
        p_value = min(math.exp(-800 * divergence), bentkus)
    else:
        losses = shares > 0
        if risk == "accuracy_gap":
            wrong = _label_outcome(report.policy, rows, _costs(4), truth)[1] > 0
            losses = (last == truth).all(1) & wrong
        p_value = scipy.stats.binom.cdf(losses.sum(), 800, limit)
    guarantee = report.policy.guarantee
    assert guarantee["risk"] == risk
    assert guarantee["errors"] == pytest.approx(losses.sum())
    assert guarantee["p_value"] == pytest.approx(p_value)
    assert 0 < guarantee["p_value"] <= 0.1
    assert report.relative_cost == pytest.approx(cost) and cost < 1


def test_the_promise_on_labels_holds_over_many_draws():
    """As below, for losses that are shares: the risk exceeds its limit as rarely as was promised."""
    num_draws, confidence, limit = 150, 0.8, 0.05
    logits, labels = _multi_label_rows(12000, num_exits=3, seed=1)
    population, answers = torch.tensor(logits), logits > 0
    rng, exceeded, left_early = np.random.default_rng(2), 0, 0
    for draw in range(num_draws):
        rows = rng.integers(0, len(labels), 300)
        settings = {"max_risk": limit, "risk": "hamming", "risk_confidence": confidence, "seed": draw}
        report = calibrate(logits[rows], None, _costs(3), **settings, **MULTI)
        if report.policy is None:
            continue
        left_early += 1
        exits = report.policy.exits_of(population).numpy()
        exceeded += (answers[np.arange(12000), exits] != answers[:, -1]).mean() > limit
    allowed = 1 - confidence
    assert exceeded / num_draws <= allowed + 3 * math.sqrt(allowed * (1 - allowed) / num_draws)
    assert left_early / num_draws > 0.7


def test_labels_are_counted_in_multi_label_problems_only():
    logits, labels = _rows(300)
    with pytest.raises(ExitConfigurationError, match="--risk hamming.*multi-label.*consistency"):
        calibrate(logits, labels, _costs(4), max_risk=0.1, risk="hamming")


# Certified risk


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
    logits, labels = _rows(12000, num_exits=3, seed=1)
    predictions = logits.argmax(-1)
    population, everyone = torch.tensor(logits), np.arange(len(labels))
    rng = np.random.default_rng(2)
    exceeded = left_early = 0
    for draw in range(num_draws):
        rows = rng.integers(0, len(labels), num_rows)
        given = labels[rows] if risk == "accuracy_gap" else None
        report = calibrate(
            logits[rows], given, _costs(3), max_risk=limit, risk=risk, risk_confidence=confidence, seed=draw
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
    logits, labels = _rows(1000)
    report = calibrate(logits, labels, _costs(4), max_risk=0.1, risk=risk, seed=5)
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
    assert report.relative_cost == pytest.approx(_costs(4)[exits].mean())
    assert report.relative_cost < 1
    json.dumps(policy.to_dict(), allow_nan=False)


def test_certifying_rows_choose_nothing():
    """Temperatures or a path that saw the certifying rows would void the p-values."""
    logits, labels = _rows(600)
    certifying = np.random.default_rng(0).permutation(600)[120:]
    changed = labels.copy()
    changed[certifying[:5]] = (changed[certifying[:5]] + 1) % 3
    first, second = (calibrate(logits, given, _costs(4), max_risk=0.2).policy for given in (labels, changed))
    assert first.temperatures == second.temperatures


def test_default_risk_follows_the_labels():
    """Unlabelled rows must certify what they can, labelled ones the drop in accuracy."""
    logits, labels = _rows(400)
    assert calibrate(logits, labels, _costs(4), max_risk=0.2).policy.guarantee["risk"] == "accuracy_gap"
    assert calibrate(logits, None, _costs(4), max_risk=0.2).policy.guarantee["risk"] == "consistency"


@pytest.mark.parametrize("criterion", ["entropy", "margin", "patience", "vote"])
def test_every_criterion_can_be_certified(criterion):
    """Counts tie: a first step that sends all rows away at exit 1 would refuse every policy."""
    logits, labels = _rows(1500, num_exits=6)
    report = calibrate(logits, labels, _costs(6), criterion=criterion, max_risk=0.1)
    assert report.policy.criterion == criterion
    assert report.relative_cost < 1


def test_too_few_rows_say_how_many_would_do():
    """A certificate from too few rows would be worthless; and the person must learn what to do."""
    logits, labels = _rows(100)
    report = calibrate(logits, labels, _costs(4), max_risk=0.02)
    assert report.policy is None
    assert report.relative_cost == 1
    flags = ("--calibration_file", "--calibration_samples", "--max_risk", "--risk_confidence")
    for word in (*flags, "100 calibration rows, 50 of them search for a policy and 50 certify it", "114", "164"):
        assert word in report.message
    few = calibrate(*_rows(50), _costs(4), max_risk=0.02)
    assert "there are 50 calibration rows, all of them search for a policy and none certifies it" in few.message
    # 0.98^114 <= 0.1 < 0.98^113; 114 certify, 50 search. The number is right to the row.
    assert 0.98**114 <= 0.1 < 0.98**113
    for num_rows, possible in ((163, False), (164, True)):
        message = calibrate(*_rows(num_rows), _costs(4), max_risk=0.02).message
        assert ("cannot show" not in message) is possible
    # Where more than 50 rows search, too: 0.999^2302 <= 0.1, and 500 search.
    assert "2802" in calibrate(logits, labels, _costs(4), max_risk=0.001).message


def test_nothing_certified_means_no_early_exit():
    """Exits that are worse than the limit whatever the threshold must not be used."""
    logits, labels = _rows(500)
    logits[:, :-1] = np.random.default_rng(0).normal(size=logits[:, :-1].shape)
    report = calibrate(logits, labels, _costs(4), max_risk=0.005, risk="consistency", risk_confidence=0.8)
    assert report.policy is None
    assert report.exit_fractions == [0, 0, 0, 1]
    assert "No early exit" in report.message


def test_rows_that_chose_the_model_certify_nothing():
    """A guarantee from rows that chose the checkpoint would be false; its absence must give the reason."""
    logits, labels = _rows(600)
    free = calibrate(logits, labels, _costs(4), max_risk=0.1)
    used = calibrate(logits, labels, _costs(4), max_risk=0.1, chosen_by="the checkpoint")
    assert used.policy.guarantee is None
    assert "the checkpoint" in used.policy.calibrated_for["no_guarantee"]
    assert "no guarantee" in used.message
    assert used.policy.thresholds == free.policy.thresholds


def test_custom_risk():
    """A loss in [0, 1] of one's own is certified by the bound that holds for any; one outside would break it."""
    logits, labels = _rows(800)

    def half(exit_logits, exits, labels):
        rows = np.arange(len(exits))
        return 0.5 * (exit_logits[rows, exits].argmax(-1) != exit_logits[:, -1].argmax(-1))

    guarantee = calibrate(logits, labels, _costs(4), max_risk=0.1, risk=half).policy.guarantee
    assert guarantee["risk"] == "half"
    mean = guarantee["errors"] / 640
    divergence = mean * math.log(mean / 0.1) + (1 - mean) * math.log((1 - mean) / 0.9)
    bentkus = math.e * scipy.stats.binom.cdf(math.ceil(guarantee["errors"]), 640, 0.1)
    assert guarantee["p_value"] == pytest.approx(min(math.exp(-640 * divergence), bentkus))
    for bad in (np.nan, -0.1, 1.5):
        with pytest.raises(ExitConfigurationError, match=r"\[0, 1\]"):
            calibrate(logits, labels, _costs(4), max_risk=0.1, risk=lambda *rows, bad=bad: np.full(len(rows[1]), bad))


# Bad input


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
    logits, labels = _rows(100)
    with pytest.raises(ExitConfigurationError) as error:
        calibrate(logits, labels, _costs(4), **settings)
    for word in words:
        assert word in str(error.value)


def test_arrays_that_do_not_fit_are_refused():
    """Labels of one row broadcast over all; costs of another model shift every budget."""
    logits, labels = _rows(100)
    with pytest.raises(ExitConfigurationError, match="100 rows.*not 1"):
        calibrate(logits, labels[:1], _costs(4), target_cost=0.5)
    with pytest.raises(ExitConfigurationError, match="5 costs"):
        calibrate(logits, labels, _costs(5), target_cost=0.5)
    with pytest.raises(ExitConfigurationError, match="rows, exits, labels"):
        calibrate(logits[:0], labels[:0], _costs(4), target_cost=0.5)
    with pytest.raises(ExitConfigurationError, match="--risk accuracy_gap needs labels"):
        calibrate(logits, None, _costs(4), max_risk=0.1, risk="accuracy_gap")


def _spoilt(labels, value):
    """Labels whose row 7 has this value."""
    labels = labels.astype(np.float64 if isinstance(value, float) else labels.dtype)
    labels[7] = value
    return labels


NO_LABEL = "1 of 100 rows have no label that the model knows, the first of them row 7 .*--risk consistency"


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
    logits, labels = _rows(100)
    criterion = {"multi_label_classification": "label_confidence", "regression": "patience"}.get(problem_type)
    logits = logits[..., :1] if problem_type == "regression" else logits
    given = spoil(labels)
    with pytest.raises(ExitConfigurationError, match=named):
        calibrate(logits, given, _costs(4), criterion=criterion or "confidence", problem_type=problem_type, **settings)


def test_risks_of_classes_refuse_regression():
    """Two real numbers are never equal: every row would count as changed."""
    logits, labels = _rows(300, num_labels=1)
    with pytest.raises(ExitConfigurationError, match="--risk.*regression.*--target_cost"):
        calibrate(logits, labels, _costs(4), criterion="patience", max_risk=0.1)


# Tables


def _accuracy(prediction):
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def test_budgeted_curve_chooses_on_some_rows_and_reports_on_others(tmp_path):
    """Numbers from the rows that chose the thresholds would be too good."""
    calibration, report = _rows(400, seed=1), _rows(500, seed=2)
    costs = _costs(4)
    curve = budgeted_curve(calibration, report, costs, _accuracy, criterion="margin", num_budgets=8)
    wanted = {0.25, 0.5, 0.75, 1.0, *np.linspace(0.25, 1, 8).tolist()}
    assert [row["target_cost"] for row in curve] == pytest.approx(sorted(wanted))
    for row in curve:
        policy = ExitPolicy("margin", row["thresholds"], row["temperatures"])
        cost, accuracy = _outcome(policy, *report, costs)
        assert row["relative_cost"] == pytest.approx(cost)
        assert row["metrics"]["accuracy"] == pytest.approx(accuracy)
        assert np.dot(row["exit_fractions"], costs) == pytest.approx(cost)
        assert _outcome(policy, *calibration, costs)[0] <= row["target_cost"] + 1e-12
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
    logits, labels = _rows(100)
    logits[:10] = np.nan
    curve = budgeted_curve((logits, labels), (logits, labels), _costs(4), _accuracy, num_budgets=5)
    assert curve[0]["target_cost"] == pytest.approx(0.9 * 0.25 + 0.1)
    assert curve[0]["exit_fractions"] == pytest.approx([0.9, 0, 0, 0.1])


def test_policy_row_of_unseen_rows():
    """The row in the results file must be the policy that the model gets, measured where it says."""
    logits, labels = _rows(200)
    policy = calibrate(logits, labels, _costs(4), target_cost=0.5).policy
    other = _rows(150, seed=3)
    row = policy_row(policy, torch.tensor(other[0]).bfloat16(), other[1], _costs(4), _accuracy)
    rounded = torch.tensor(other[0]).bfloat16().float().numpy()
    cost, accuracy = _outcome(policy, rounded, other[1], _costs(4))
    assert (row["relative_cost"], row["metrics"]["accuracy"]) == (pytest.approx(cost), pytest.approx(accuracy))
    assert ExitPolicy.from_dict({key: row[key] for key in policy.to_dict()}) == policy


# Exits that are not evaluated


LAYERS, HEADS = (0.25, 0.5, 0.75, 1.0), (0.05, 0.08, 0.02)
PARTS = ExitCosts(LAYERS, [*HEADS, 0.0])


def _cost_by_enumeration(thresholds, scores, heads=HEADS):
    """Average cost, a row and an exit at a time: layers, and the heads that somebody may exit at."""
    spent = 0.0
    for row in scores:
        for index, layers in enumerate(LAYERS):
            if index == 3 or row[index] >= thresholds[index]:
                spent += layers
                break
            if thresholds[index] < NEVER:
                spent += heads[index]
    return spent / len(scores)


@pytest.mark.parametrize("target_cost", [0.25, 0.3, 0.45, 0.6, 0.8, 0.99])
def test_a_budget_is_met_by_the_cost_as_counted(target_cost):
    """Fails if the search and the report count the heads of exits that the policy does not evaluate."""
    logits, labels = _rows(300)
    report = calibrate(logits, labels, PARTS, target_cost=target_cost)
    policy = report.policy
    counted = _cost_by_enumeration(policy.thresholds, policy.scores(torch.tensor(logits)).numpy())
    assert report.relative_cost == pytest.approx(counted, abs=1e-12) and counted <= target_cost
    row = policy_row(policy, logits, labels, PARTS, lambda prediction: {})
    assert row["relative_cost"] == pytest.approx(counted, abs=1e-12)
    # All heads counted, the same budget buys no more.
    assert report.score >= calibrate(logits, labels, [*PARTS], target_cost=max(target_cost, PARTS[0])).score - 0.01


def test_budgets_at_the_ends_count_the_evaluated_heads():
    """Fails if no early exit costs more than the plain model, or the first exit other than itself."""
    logits, labels = _rows(300)
    report = calibrate(logits, labels, PARTS, target_cost=1.0)
    assert report.relative_cost == 1.0 and min(report.policy.thresholds) == NEVER
    with pytest.raises(ExitConfigurationError, match="below the cost of the first exit, 0.25"):
        calibrate(logits, labels, PARTS, target_cost=0.249)
    rows = budgeted_curve((logits, labels), (logits, labels), PARTS, lambda prediction: {})
    targets = [row["target_cost"] for row in rows]
    assert {*LAYERS} <= {*targets} and (targets[0], targets[-1]) == (0.25, 1.0)
    assert all(row["relative_cost"] <= row["target_cost"] + 1e-12 for row in rows)
    assert rows[-1]["relative_cost"] == 1.0


@pytest.mark.parametrize(
    "heads", [(0.05, 0.08, 0.02), (0.2, 0.001, 0.001), (0.001, 0.3, 0.001), (0.001, 0.3, 0.3), (0.3, 0.3, 0.3)]
)
def test_exits_that_do_not_pay_are_left_out(heads):
    """Fails if an exit stays that costs more than it saves: every choice of exits is tried, none may be cheaper."""
    logits, _ = _rows(500)
    scores = ExitPolicy("confidence", [NEVER] * 4).scores(torch.tensor(logits)).numpy()
    everywhere = [*np.quantile(scores, 0.85, 0)[:3].tolist(), NEVER]

    def cost(thresholds):
        return _cost_by_enumeration(thresholds, scores, heads)

    choices = itertools.product((True, False), repeat=3)
    tried = {used: cost(np.where([*used, True], everywhere, NEVER)) for used in choices}
    kept = without_idle_exits(np.array(everywhere), lambda thresholds: -cost(thresholds))
    assert tuple(kept[:3] < NEVER) == min(tried, key=tried.get)


def test_a_certified_policy_leaves_out_exits_that_do_not_pay():
    """Fails if a certified policy decides where that costs more than it saves, or is changed after certifying."""
    logits, labels = _rows(2000)
    settings = {"max_risk": 0.1, "risk_confidence": 0.9}
    report = calibrate(logits, labels, ExitCosts(LAYERS, [0.001, 0.3, 0.001, 0]), **settings)
    thresholds = report.policy.thresholds
    assert thresholds[0] < NEVER and thresholds[1] == NEVER and thresholds[2] < NEVER
    assert max(calibrate(logits, labels, LAYERS, **settings).policy.thresholds[:3]) < NEVER
    certifying = np.random.default_rng(0).permutation(2000)[400:]
    answers, last = logits[certifying].argmax(-1), logits[certifying, -1].argmax(-1)
    exits = report.policy.exits_of(torch.tensor(logits[certifying])).numpy()
    wrong = (last == labels[certifying]) & (answers[np.arange(1600), exits] != labels[certifying])
    assert report.policy.guarantee["errors"] == wrong.sum()


def test_an_exit_that_costs_more_than_it_saves_is_not_forced_on_a_budget():
    """Fails if a budget that no early exit keeps is refused because the first exit, by time, is above it."""
    logits, labels = _rows(300)
    costs = ExitCosts([1.13, 0.8, 0.9, 1.0], [0.9, 0.2, 0.2, 0.0])
    report = calibrate(logits, labels, costs, target_cost=1.0)
    assert report.relative_cost == 1.0 and min(report.policy.thresholds) == NEVER
    report = calibrate(logits, labels, costs, target_cost=0.95)
    assert report.relative_cost <= 0.95 and report.policy.thresholds[0] == NEVER
    with pytest.raises(ExitConfigurationError, match="cost of the cheapest exit, 0.8"):
        calibrate(logits, labels, costs, target_cost=0.79)
