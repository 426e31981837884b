"""Policies at a cost against brute force and plain loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from calibration.samples import MULTI, even_costs, label_outcome_of, make_multi_label_rows, make_rows, outcome_of

from een_hf.calibration import (
    budgeted_curve,
    calibrate,
    fit_temperatures,
    geometric_policy,
    geometric_thresholds,
    policy_row,
    without_idle_exits,
)
from een_hf.calibration.rows import score_rows
from een_hf.calibration.search import LineSearch
from een_hf.calibration.thresholds import threshold_between
from een_hf.evaluation import ExitCosts
from een_hf.models import ExitConfigurationError, ExitPolicy
from een_hf.models.policies import NEVER


ADVERSARIES = {
    "random": lambda: make_rows(500),
    "one row": lambda: make_rows(1),
    "two rows": lambda: make_rows(2),
    "constant": lambda: (np.zeros((60, 4, 3), np.float32), np.zeros(60, int)),
    "two values": lambda: (np.round(make_rows(120)[0]).clip(0, 1), make_rows(120)[1]),
    "always right": lambda: (
        50 * np.eye(3, dtype=np.float32)[make_rows(80)[1]][:, None].repeat(4, 1),
        make_rows(80)[1],
    ),
    "worse with depth": lambda: (make_rows(200)[0][:, ::-1].copy(), make_rows(200)[1]),
}


@pytest.mark.parametrize("criterion", ["confidence", "entropy", "margin", "patience", "vote"])
@pytest.mark.parametrize("rows", ADVERSARIES)
def test_cost_never_exceeds_the_target(rows, criterion):
    """A budget is a promise on the calibration rows, ties and tiny samples included, and the report is true."""
    logits, labels = ADVERSARIES[rows]()
    costs = even_costs(4)
    for target in (0.25, 0.3, 0.5, 0.61, 0.75, 0.9999):
        report = calibrate(logits, labels, costs, criterion=criterion, target_cost=target)
        cost, accuracy = outcome_of(report.policy, logits, labels, costs)
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
        logits, labels = make_rows(num_rows, num_exits=6, seed=seed)
        costs = even_costs(6)
        for target in (0.2, 0.35, 0.5, 0.8):
            plain = geometric_policy(logits, labels, costs, target, criterion=criterion)
            report = calibrate(logits, labels, costs, criterion=criterion, target_cost=target)
            plain_cost, plain_accuracy = outcome_of(plain, logits, labels, costs)
            assert plain_cost <= target + 1e-12
            assert report.score >= plain_accuracy - 1e-12


def _plain_geometric_split(logits, labels, costs, target):
    """The accuracy of MSDNet's split of the softmax scores as they are, its best q that the target affords."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    scores = (shifted / shifted.sum(-1, keepdims=True)).max(-1)
    best = 0.0
    for ratio in np.geomspace(1 / 30, 30, 61):
        shares = ratio ** np.arange(len(costs))
        remaining, exits = list(range(len(labels))), np.full(len(labels), len(costs) - 1)
        wanted = np.round(np.cumsum(shares / shares.sum()) * len(labels)).astype(int)
        for index, count in enumerate(np.diff(wanted, prepend=0)[:-1]):
            remaining.sort(key=lambda row, index=index: -scores[row, index])
            exits[remaining[:count]] = index
            remaining = remaining[count:]
        if costs[exits].mean() <= target:
            best = max(best, (logits[np.arange(len(labels)), exits].argmax(-1) == labels).mean())
    return best


def test_never_below_the_geometric_split_of_the_plain_scores():
    """One temperature per exit, fitted to the likelihood, may order rows worse than none."""
    costs, worse_with_temperatures = even_costs(4), 0
    for seed in range(20):
        logits, labels = make_rows(60, seed=seed)
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
        logits, labels = make_rows(300, seed=seed)
        costs = even_costs(4)
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
    costs, gains = even_costs(6), []
    for seed in range(12):
        logits, labels = make_rows(4300, num_exits=6, seed=seed)
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
    costs, overdrawn = even_costs(4), []
    for seed in range(30):
        logits, labels = make_rows(400, seed=seed)
        policy = calibrate(logits, labels, costs, criterion=criterion, target_cost=0.55).policy
        new, _ = make_rows(4000, seed=1000 + seed)
        spent = costs[policy.exits_of(torch.tensor(new)).numpy()]
        error = spent.std() * math.sqrt(1 / 400 + 1 / 4000)
        overdrawn.append(
            (spent.mean() - policy_row(policy, logits, labels, costs, lambda _: {})["relative_cost"]) / error
        )
    # Differences in units of their standard error: no bias beyond a part of one, none far out.
    assert abs(np.mean(overdrawn)) < 0.6 and np.abs(overdrawn).max() < 4


def test_thresholds_lie_midway():
    """A threshold on a score itself is at the mercy of rounding on another device."""
    logits, labels = make_rows(300)
    policy = calibrate(logits, labels, even_costs(4), target_cost=0.6).policy
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
    """The baseline must be MSDNet's: exit k takes the most confident of those left, a share like ratio^k."""
    num_rows, num_exits = 1000, 4
    rng = np.random.default_rng(0)
    scores = np.stack([rng.permutation(num_rows).astype(np.float32) for _ in range(num_exits)], 1)
    thresholds = geometric_thresholds(scores, ratio)
    shares = ratio ** np.arange(num_exits) / (ratio ** np.arange(num_exits)).sum()
    remaining = np.arange(num_rows)
    for index in range(num_exits - 1):
        exiting = scores[remaining, index] >= thresholds[index]
        assert exiting.sum() == pytest.approx(shares[index] * num_rows, abs=1)
        most_confident = remaining[np.argsort(-scores[remaining, index])[: exiting.sum()]]
        assert set(remaining[exiting]) == set(most_confident)
        remaining = remaining[~exiting]


def test_no_early_exit_at_a_target_of_the_whole_network_or_above():
    """Paying for every layer must give the network's own predictions."""
    logits, labels = make_rows(50)
    costs = [0.3, 0.6, 0.8, 1.02]
    for target in (1.02, 1.5):
        report = calibrate(logits, labels, costs, target_cost=target)
        assert report.relative_cost == 1.02
        assert report.policy.exits_of(torch.tensor(logits)).eq(3).all()
    # Below it, some row has to exit early.
    assert calibrate(logits, labels, costs, target_cost=1.0).relative_cost <= 1.0


def test_target_below_the_first_exit_is_refused():
    """No policy is that cheap: setting the cheapest instead would break the promise silently."""
    logits, labels = make_rows(50)
    with pytest.raises(ExitConfigurationError, match="--target_cost 0.2.*0.25"):
        calibrate(logits, labels, even_costs(4), target_cost=0.2)
    assert calibrate(logits, labels, even_costs(4), target_cost=0.25).exit_fractions == [1, 0, 0, 0]
    with pytest.raises(ExitConfigurationError, match="--target_cost is a share of the full cost, not inf"):
        calibrate(logits, labels, even_costs(4), target_cost=np.inf)  # which a policy could not store


def test_regression_calibrates_by_squared_error():
    """With one label a class comparison calls every answer right, and every row exits at exit 1."""
    rng = np.random.default_rng(0)
    labels = rng.normal(size=400)
    noise = rng.normal(size=(400, 5)) * np.linspace(1, 0.2, 5) * rng.exponential(size=(400, 1))
    logits = (labels[:, None] + noise)[..., None].astype(np.float32)
    costs = even_costs(5)
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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("unit, broken", [(1e-3, np.nan), (1.0, np.inf), (1e3, -np.inf)])
def test_regression_does_not_depend_on_the_unit_or_on_broken_rows(unit, broken):
    """Prices in kilometres or metres must exit alike, and one NaN must not make all policies look the same."""
    rng = np.random.default_rng(0)
    labels = rng.normal(size=300)
    noise = rng.normal(size=(300, 5)) * np.linspace(1, 0.2, 5) * rng.exponential(size=(300, 1))
    logits = (labels[:, None] + noise)[..., None]
    logits[0] = broken
    settings = {"criterion": "patience", "target_cost": 0.6}
    expected = calibrate(logits, labels, even_costs(5), **settings, params={"tolerance": 0.5})
    report = calibrate(unit * logits, unit * labels, even_costs(5), **settings, params={"tolerance": unit * 0.5})
    assert report.exit_fractions == expected.exit_fractions
    assert 0.4 < report.relative_cost <= 0.6
    assert math.isfinite(report.score)
    # Left open, the tolerance follows the unit, is written into the policy and costs nothing in score.
    open_ = calibrate(unit * logits, unit * labels, even_costs(5), **settings)
    assert 0.01 < open_.policy.params["tolerance"] / unit < 10
    assert open_.relative_cost <= 0.6 and open_.score >= 1.05 * report.score
    deciles = np.quantile(np.abs(np.diff(logits[1:, :, 0], axis=1)), np.arange(1, 10) / 10)
    assert np.isclose(open_.policy.params["tolerance"] / unit, deciles, rtol=1e-3).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_never_exit_early_and_their_cost_counts(broken):
    """Such rows never exit early: their cost counts, and a budget that they exceed is refused, not missed."""
    logits, labels = make_rows(100)
    logits[:10] = broken
    report = calibrate(logits, labels, even_costs(4), target_cost=0.5)
    exits = report.policy.exits_of(torch.tensor(logits)).numpy()
    assert (exits[:10] == 3).all()
    assert even_costs(4)[exits].mean() <= 0.5
    with pytest.raises(ExitConfigurationError, match="--target_cost 0.3 cannot be met.*NaN"):
        calibrate(logits, labels, even_costs(4), target_cost=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_and_half_precision_are_taken(dtype):
    """Logits come as the model made them: a tensor, often in half precision, with a graph."""
    logits, labels = make_rows(200)
    tensor = torch.tensor(logits).to(dtype).requires_grad_()
    report = calibrate(tensor, torch.tensor(labels), even_costs(4), target_cost=0.5)
    array = calibrate(tensor.detach().float().numpy(), labels, even_costs(4), target_cost=0.5)
    assert report.policy == array.policy
    soft = calibrate(tensor, np.eye(3)[labels], even_costs(4), target_cost=0.5)
    assert soft.policy.thresholds == pytest.approx(array.policy.thresholds)


def test_without_labels_the_last_exit_is_right():
    """Unlabelled rows calibrate towards agreement with the full network."""
    logits, _ = make_rows(300)
    report = calibrate(logits, None, even_costs(4), target_cost=0.6)
    _, agreement = outcome_of(report.policy, logits, logits[:, -1].argmax(-1), even_costs(4))
    assert report.score == pytest.approx(agreement)
    assert "agreement" in report.message


@pytest.mark.parametrize("labelled", [True, False])
def test_several_labels_meet_a_cost(labelled):
    """A policy that stops where the likeliest label is sure ignores all others."""
    logits, labels = make_multi_label_rows(400)
    costs = even_costs(4)
    truth = labels if labelled else logits[:, -1] > 0
    for target in (0.3, 0.5, 0.8):
        report = calibrate(logits, labels if labelled else None, costs, target_cost=target, **MULTI)
        cost, losses = label_outcome_of(report.policy, logits, costs, truth)
        assert cost <= target + 1e-12
        assert report.relative_cost == pytest.approx(cost)
        assert report.score == pytest.approx(1 - losses.mean())
        # Better than one exit for all that costs no more.
        deepest = int(target * 4 + 1e-9) - 1
        assert report.score > 1 - ((logits[:, deepest] > 0) != truth).mean()
    soft = calibrate(logits, labels.astype(np.float32), costs, target_cost=0.5, **MULTI)
    assert soft.policy == calibrate(logits, labels, costs, target_cost=0.5, **MULTI).policy


def test_no_probability_outweighs_a_right_label():
    """Fails if the tie-breaker of all rows together can exceed one label of one row: a policy with more right answers
    would lose to one that is more confident."""
    logits, labels = make_multi_label_rows(40, num_labels=20)
    scored = score_rows(5 * logits, labels, even_costs(4), "label_confidence", None, "multi_label_classification")
    right = ((logits > 0) == labels[:, None]).mean(-1)
    ties = scored.gains - right
    assert (ties >= 0).all() and ties.sum(0).max() < 1 / 20


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
    logits, labels = make_rows(300)
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
    logits, labels = make_rows(300)
    report = calibrate(logits, labels, PARTS, target_cost=1.0)
    assert report.relative_cost == 1.0 and min(report.policy.thresholds) == NEVER
    with pytest.raises(ExitConfigurationError, match="below the cost of the first exit, 0.25"):
        calibrate(logits, labels, PARTS, target_cost=0.249)
    rows = budgeted_curve((logits, labels), (logits, labels), PARTS, lambda prediction: {})
    targets = [row["target_cost"] for row in rows]
    assert {*LAYERS} <= {*targets} and (targets[0], targets[-1]) == (0.25, 1.0)
    assert all(row["relative_cost"] <= row["target_cost"] + 1e-12 for row in rows)
    assert rows[-1]["relative_cost"] == 1.0


def test_the_search_sees_what_each_threshold_costs_and_gains():
    """Fails if the search, which tries all thresholds of an exit at once, counts the head of an exit that no row
    takes, or rows that have exited before: the budget would buy less."""
    logits, labels = make_rows(100)
    scored = score_rows(logits, labels, PARTS, "confidence", None, "single_label_classification")
    search, seen = LineSearch(scored), []
    start = np.array([*np.quantile(scored.scores, 0.7, 0)[:3], -NEVER])
    search.run(start, lambda *found: seen.append(found) or len(found[0]) // 2, max_sweeps=1)
    for index, (*_, candidates) in enumerate(search.columns):
        for candidate, cost, gain in zip(candidates, *seen[index], strict=True):
            start[index] = candidate
            exits = [next(k for k in range(4) if row[k] >= start[k]) for row in scored.scores]
            assert cost == pytest.approx(_cost_by_enumeration(start, scored.scores)), (index, candidate)
            assert gain == pytest.approx(np.mean([scored.gains[row, k] for row, k in enumerate(exits)]))
        start[index] = candidates[len(candidates) // 2]


@pytest.mark.parametrize(
    "heads", [(0.05, 0.08, 0.02), (0.2, 0.001, 0.001), (0.001, 0.3, 0.001), (0.001, 0.3, 0.3), (0.3, 0.3, 0.3)]
)
def test_exits_that_do_not_pay_are_left_out(heads):
    """Fails if an exit stays that costs more than it saves: every choice of exits is tried, none may be cheaper."""
    logits, _ = make_rows(500)
    scores = ExitPolicy("confidence", [NEVER] * 4).scores(torch.tensor(logits)).numpy()
    everywhere = [*np.quantile(scores, 0.85, 0)[:3].tolist(), NEVER]

    def cost(thresholds):
        return _cost_by_enumeration(thresholds, scores, heads)

    choices = itertools.product((True, False), repeat=3)
    tried = {used: cost(np.where([*used, True], everywhere, NEVER)) for used in choices}
    kept = without_idle_exits(np.array(everywhere), lambda thresholds: -cost(thresholds))
    assert tuple(kept[:3] < NEVER) == min(tried, key=tried.get)


def test_an_exit_that_costs_more_than_it_saves_is_not_forced_on_a_budget():
    """Fails if a budget that no early exit keeps is refused because the first exit, by time, is above it."""
    logits, labels = make_rows(300)
    costs = ExitCosts([1.13, 0.8, 0.9, 1.0], [0.9, 0.2, 0.2, 0.0])
    report = calibrate(logits, labels, costs, target_cost=1.0)
    assert report.relative_cost == 1.0 and min(report.policy.thresholds) == NEVER
    report = calibrate(logits, labels, costs, target_cost=0.95)
    assert report.relative_cost <= 0.95 and report.policy.thresholds[0] == NEVER
    with pytest.raises(ExitConfigurationError, match="cost of the cheapest exit, 0.8"):
        calibrate(logits, labels, costs, target_cost=0.79)


def test_a_threshold_between_neighbouring_numbers():
    """What breaks: the midpoint is rounded to the lower score, whose example then exits too."""
    for upper in np.float32([0.5, 0.75, 1e-3, 3.0]):
        for lower in (np.nextafter(upper, np.float32(0)), np.nextafter(upper, np.float32(9))):
            scores = np.array([lower, upper])
            assert (scores >= np.float32(threshold_between(scores, 1))).sum() == 1
