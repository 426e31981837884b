"""Thresholds from saved logits: the best policy at a cost, or the cheapest whose risk is certified."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from transformers import EvalPrediction

from ..models.configuration_een import ExitConfigurationError
from ..models.policies import NEVER, ExitPolicy, get_criterion, resolve_problem_type
from .cost import ExitCosts
from .metrics import check_labels, predict_labels


RISKS = ("accuracy_gap", "consistency", "hamming")
_BINARY_RISKS = ("accuracy_gap", "consistency")
_SHARE_RATIOS = np.geomspace(1 / 30, 30, 61)  # q of the geometric split; below 1 most rows leave early
_MIN_SEARCH_ROWS, _MAX_SEARCH_ROWS = 50, 500
_PATH_LEVELS = 100
_PRICE_STEPS, _MAX_LEVELS = 14, 50


@dataclass
class CalibrationReport:
    """What calibration found, measured on the calibration rows.

    Args:
        policy: to be set with `model.set_exit_policy`; `None` means no early exit.
        relative_cost: average over rows.
        score: share of rows answered right (multi-label: of labels; regression: minus the mean squared error); without
            labels, right means as the last exit.
        exit_fractions: share of rows that leave at each exit.
        message: one sentence for a person.
    """

    policy: ExitPolicy | None
    relative_cost: float
    score: float
    exit_fractions: list[float]
    message: str


def calibrate(
    exit_logits: np.ndarray,
    labels: np.ndarray | None,
    costs: Sequence[float],
    *,
    criterion: str = "confidence",
    params: dict | None = None,
    target_cost: float | None = None,
    max_risk: float | None = None,
    risk: str | Callable | None = None,
    risk_confidence: float = 0.9,
    problem_type: str = "single_label_classification",
    seed: int = 0,
    chosen_by: str | None = None,
) -> CalibrationReport:
    """Choose an exit policy from the logits of calibration rows.

    Args:
        exit_logits: (num_rows, num_exits, num_labels), raw.
        labels: class indices or numbers, (num_rows,), soft labels or, multi-label, 0/1, (num_rows, num_labels);
            `None`: the last exit's own predictions.
        costs: relative cost of exiting at each exit, with its parts where exits that a policy never uses are not
            evaluated (`relative_costs`, `relative_latencies`); plain numbers hold whatever the policy.
        criterion: a registered exit criterion.
        params: its parameters; those left open may be chosen too (the tolerance of `patience` in regression).
        target_cost: set the best policy whose average cost is at most this.
        max_risk: set the cheapest policy with P(risk <= max_risk) >= risk_confidence (give one of the two).
        risk: `accuracy_gap` (default with labels): the last exit is right (multi-label: in all labels) and the policy
            is not; `consistency`: the policy differs from the last exit (in any label); `hamming`, multi-label: the
            share of labels in which it differs; or a function of (exit_logits, exit_index, labels) that returns a loss
            in [0, 1] for each row.
        problem_type: as in transformers.
        seed: of the permutation that parts searching from certifying rows.
        chosen_by: what these rows already chose (a checkpoint, say); then no guarantee is written, and this is why.

    Raises:
        ExitConfigurationError: a criterion that does not fit the problem, a target below the first exit's cost,
            labels that are missing or that the model does not have, or settings that contradict each other.
    """
    if (target_cost is None) == (max_risk is None):
        raise ExitConfigurationError("Give one of target_cost (--target_cost) and max_risk (--max_risk).")
    scored = _scored(exit_logits, labels, costs, criterion, params, problem_type)
    if target_cost is not None:
        return _calibrate_cost(scored.choices(), target_cost)
    return _calibrate_risk(scored, max_risk, risk, risk_confidence, seed, chosen_by)


# Rows, scores and what thresholds do to them


class _Scored:
    """Calibration rows with their temperatures, scores (num_rows, num_exits) and gains (num_rows, num_exits).

    `tempered` says whether the scores are of logits divided by the temperatures.
    """

    def __init__(self, logits, labels, costs, criterion, params, problem_type, temperatures=None, tempered=True):
        self.logits, self.labels, self.costs = logits, labels, costs
        self.criterion, self.params, self.problem_type = criterion, params, problem_type
        self.regression = problem_type == "regression"
        if temperatures is None and not self.regression:
            temperatures = fit_temperatures(logits, labels, problem_type)
        self.temperatures, self.tempered = temperatures, tempered and temperatures is not None
        self.scores = get_criterion(criterion, params).scores(logits, temperatures if tempered else None).numpy()
        self.num_rows, self.num_exits = self.scores.shape
        # (num_rows, num_exits, answers): one answer for each label of a multi-label problem, else one.
        self.predictions = predict_labels(logits.numpy(), problem_type).reshape(self.num_rows, self.num_exits, -1)
        targets = _targets(self.predictions[:, -1], labels, problem_type)
        # What a row is worth at each exit: the share of its answers that are right, or minus the squared error.
        if not self.regression:
            self.right = (self.predictions == targets[:, None]).mean(-1)
            # Of policies that are right equally often, the one that gives the targets more probability.
            scaled = logits.numpy() / np.array(temperatures).reshape(1, -1, 1)
            sureness = np.nan_to_num(_probability_of(targets, scaled, problem_type))
            self.gains = self.right + sureness / (2 * self.num_rows * targets.shape[1])
        else:
            # A broken answer is as bad as the worst whole one: a NaN would make all policies equal.
            self.gains = -np.square(self.predictions.astype(np.float64)[..., 0] - targets)
            whole = np.isfinite(self.gains)
            self.gains[~whole] = self.gains[whole].min(initial=0.0)
            self.right = self.gains

    def select(self, rows: np.ndarray | slice, temperatures=None, params=None, tempered=True) -> "_Scored":
        labels = None if self.labels is None else self.labels[rows]
        settings = (self.criterion, self.params if params is None else params, self.problem_type)
        return _Scored(self.logits[rows], labels, self.costs, *settings, temperatures, tempered)

    def choices(self) -> list["_Scored"]:
        """The same rows under each setting of the criterion that is worth trying, where none is given."""
        tried = [{}] if self.params else get_criterion(self.criterion).choices(self.logits)
        return [self if params == {} else self.select(slice(None), self.temperatures, params) for params in tried]

    @cached_property
    def plain(self) -> "_Scored":
        """The same rows, scored without temperatures."""
        if not get_criterion(self.criterion).scores_probabilities:
            return self
        return self.select(slice(None), self.temperatures, tempered=False)

    def exits(self, thresholds: np.ndarray) -> np.ndarray:
        """The 0-based exit, (num_rows,), that each row takes."""
        return self.leaves(thresholds).argmax(1)

    def leaves(self, thresholds: np.ndarray) -> np.ndarray:
        """Whether each row is sure enough at each exit, (num_rows, num_exits); everybody is at the last."""
        leaves = self.scores >= thresholds
        leaves[:, -1] = True
        return leaves

    def costs_under(self, thresholds: np.ndarray) -> np.ndarray:
        """What exiting at each exit costs, (num_exits,), where only the exits that rows can reach are evaluated."""
        return self.costs.of_policy(ExitPolicy(self.criterion, thresholds, params=self.params))

    def cost_and_gain(self, thresholds: np.ndarray) -> tuple[float, float]:
        exits = self.exits(thresholds)
        cost = self.shares(exits) @ self.costs_under(thresholds)
        return float(cost), float(self.gains[np.arange(self.num_rows), exits].mean())

    def shares(self, exits: np.ndarray) -> np.ndarray:
        """The share of rows at each exit: by these, nobody exiting early costs exactly what the last exit does."""
        return np.bincount(exits, minlength=self.num_exits) / self.num_rows

    def policy(self, thresholds: np.ndarray, **about) -> ExitPolicy:
        name = "temperatures" if self.tempered else "confidence_temperatures"
        about = {**about, "params": self.params, name: self.temperatures}
        policy = ExitPolicy(self.criterion, [*map(float, thresholds)], **about)
        return ExitPolicy.from_dict(policy.to_dict())

    def report(self, policy: ExitPolicy | None, thresholds: np.ndarray, message: str) -> CalibrationReport:
        fractions = self.shares(self.exits(thresholds))
        cost = float(fractions @ self.costs.of_policy(policy))
        return CalibrationReport(policy, cost, self.score(thresholds), fractions.tolist(), message)

    def score(self, thresholds: np.ndarray) -> float:
        """Share of rows answered right, or minus the mean squared error."""
        return float(self.right[np.arange(self.num_rows), self.exits(thresholds)].mean())


def _targets(last_answers: np.ndarray, labels: np.ndarray | None, problem_type: str) -> np.ndarray:
    """The right answers, (num_rows, answers): the labels, or what the last exit answers."""
    if labels is None:
        return last_answers
    soft = problem_type == "single_label_classification" and labels.ndim == 2
    return (labels.argmax(-1) if soft else labels).reshape(last_answers.shape)


def _probability_of(targets: np.ndarray, logits: np.ndarray, problem_type: str) -> np.ndarray:
    """The probability (num_rows, num_exits) of the right class, or, multi-label, the mean over the labels."""
    if problem_type == "multi_label_classification":
        return scipy.special.expit(np.where(targets[:, None] == 1, logits, -logits)).mean(-1)
    return np.take_along_axis(scipy.special.softmax(logits, -1), targets[:, None], -1)[..., 0]


def _tensor(values) -> torch.Tensor:
    """An array or a tensor of any device and precision, as float32 on the CPU."""
    return torch.as_tensor(values).detach().cpu().float()


def _scored(exit_logits, labels, costs, criterion, params, problem_type) -> _Scored:
    logits, params = _tensor(exit_logits), params or {}
    if logits.dim() != 3 or logits.shape[1] != len(costs) or len(logits) == 0:
        raise ExitConfigurationError(
            f"Calibration takes logits (rows, exits, labels) and one cost per exit, not {tuple(logits.shape)} and "
            f"{len(costs)} costs."
        )
    num_rows, num_exits, num_labels = logits.shape
    problem_type = resolve_problem_type(problem_type, num_labels)
    ExitPolicy(criterion, [NEVER] * num_exits, params=params).validate(num_exits, problem_type, num_labels)
    if labels is not None:
        labels = check_labels(labels, num_rows, num_labels, problem_type)
    return _Scored(logits, labels, ExitCosts.of(costs), criterion, params, problem_type)


def fit_temperatures(
    exit_logits: np.ndarray, labels: np.ndarray | None, problem_type: str = "single_label_classification"
) -> list[float]:
    """One temperature per exit that minimises its negative log-likelihood (Guo et al., ICML 2017, section 4.2).

    Multi-label: the mean over the labels of the binary one. Searched between 1/20 and 20. An exit that answers every
    row right has no minimum (the likelihood rises all the way to temperature 0) and keeps 1.

    Args:
        exit_logits: (num_rows, num_exits, num_labels).
        labels: as `check_labels` takes them; `None`: the last exit's own predictions.
        problem_type: `single_label_classification` or `multi_label_classification`.

    Raises:
        ExitConfigurationError: labels that are missing or impossible.
    """
    logits = _tensor(exit_logits).double().numpy()
    num_rows, num_exits, num_labels = logits.shape
    if labels is None:
        labels = predict_labels(logits[:, -1], problem_type)
    targets = check_labels(labels, num_rows, num_labels, problem_type)
    if targets.ndim == 1:
        targets = np.eye(num_labels)[targets.astype(np.int64)]
    finite = np.isfinite(logits).all((1, 2))
    logits, targets = logits[finite], targets[finite]
    if len(logits) == 0:
        return [1.0] * num_exits
    if problem_type == "multi_label_classification":
        # Each label is a choice between two classes of logits 0 and z.
        logits = np.stack([np.zeros_like(logits), logits], -1).swapaxes(1, 2).reshape(-1, num_exits, 2)
        targets = np.stack([1 - targets, targets], -1).reshape(-1, 2)
    classes = targets.argmax(-1)
    hard = (targets.max(-1) == 1).all()

    def fit(one: np.ndarray) -> float:
        # Relative to the largest, so that a softmax overflows nowhere.
        one = one - one.max(-1, keepdims=True)
        if hard and (one.argmax(-1) == classes).all():
            return 1.0

        def loss(log_temperature: float) -> float:
            scaled = one / math.exp(log_temperature)
            return float((np.log(np.exp(scaled).sum(-1)) - (scaled * targets).sum(-1)).mean())

        bounds = (math.log(0.05), math.log(20))
        return math.exp(scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x)

    return [fit(logits[:, index]) for index in range(num_exits)]


def _threshold_between(scores: np.ndarray, num_leaving: int) -> float:
    """The threshold at which the `num_leaving` surest of `scores` leave, midway to the next score.

    Ties leave together: a group of ties that `num_leaving` would cut in two stays. So one score shared by all, as a
    count at the first exit is, sends away nobody or everybody, never everybody because somebody was to go.
    """
    ordered = np.sort(scores[~np.isnan(scores)])[::-1]
    if num_leaving <= 0 or len(ordered) == 0:
        return NEVER
    if num_leaving >= len(ordered):
        return -NEVER
    highest_staying = ordered[num_leaving]
    leaving = ordered[ordered > highest_staying]
    if len(leaving) == 0:
        return NEVER
    # In the scores' own precision, so that the midpoint never lets the next score pass.
    middle = np.float32((np.float64(leaving[-1]) + np.float64(highest_staying)) / 2)
    return float(middle if middle > highest_staying else leaving[-1])


# Target cost


def geometric_thresholds(scores: np.ndarray, ratio: float) -> np.ndarray:
    """Thresholds (num_exits,) at which exit k takes a share of all rows proportional to ratio^k.

    The split of MSDNet (Huang et al., ICLR 2018, section 5); where fewer rows remain than a share asks for, all leave.

    Args:
        scores: (num_rows, num_exits).
        ratio: q.
    """
    num_rows, num_exits = scores.shape
    powers = np.arange(num_exits) * math.log(ratio)
    shares = np.exp(powers - scipy.special.logsumexp(powers))
    thresholds = np.full(num_exits, -NEVER)
    remaining = np.ones(num_rows, dtype=bool)
    asked = np.round(np.cumsum(shares) * num_rows).astype(int)
    for index in range(num_exits - 1):
        wanted = asked[index] - (asked[index - 1] if index else 0)
        thresholds[index] = _threshold_between(scores[remaining, index], min(wanted, int(remaining.sum())))
        remaining &= ~(scores[:, index] >= thresholds[index])
    return thresholds


def geometric_policy(
    exit_logits: np.ndarray,
    labels: np.ndarray | None,
    costs: Sequence[float],
    target_cost: float,
    *,
    criterion: str = "confidence",
    params: dict | None = None,
    problem_type: str = "single_label_classification",
) -> ExitPolicy:
    """The plain geometric split (MSDNet, Huang et al., ICLR 2018) of the best ratio that `target_cost` affords.

    Of the scores with and without temperatures, whichever is better. The baseline that `calibrate` improves on;
    arguments as there.
    """
    tempered = _scored(exit_logits, labels, costs, criterion, params, problem_type).choices()
    choices = [*tempered, *(choice.plain for choice in tempered)]
    scored, thresholds = _best_choice(choices, _geometric_start, target_cost)
    return scored.policy(thresholds, calibrated_for={"target_cost": float(target_cost)})


def _geometric_start(scored: _Scored, target_cost: float) -> np.ndarray:
    """Thresholds (num_exits,) of the best affordable geometric split, or those at which everybody leaves at once."""
    always = np.full(scored.num_exits, -NEVER)
    splits = [always] + [geometric_thresholds(scored.scores, ratio) for ratio in _SHARE_RATIOS]
    return max(splits, key=lambda candidate: _rank(scored, candidate, target_cost))


def check_target_cost(target_cost: float, costs: Sequence[float]) -> None:
    """Raise ExitConfigurationError for a budget that not even the cheapest exit keeps, usually the first."""
    alone = ExitCosts.of(costs).alone
    cheapest = min(alone)  # by time, a decision may take more than it saves
    if not target_cost >= cheapest:
        which = "first" if cheapest == alone[0] else "cheapest"
        raise ExitConfigurationError(
            f"--target_cost {target_cost:g} is below the cost of the {which} exit, {cheapest:.4g}: no policy is so "
            f"cheap. Give at least {math.ceil(cheapest * 1000) / 1000:g}, or an earlier first exit (--exit_layers)."
        )


def _calibrate_cost(choices: list[_Scored], target_cost: float) -> CalibrationReport:
    scored = choices[0]
    check_target_cost(target_cost, scored.costs)
    about = {"calibrated_for": {"target_cost": float(target_cost)}}
    thresholds = np.full(scored.num_exits, NEVER)
    if target_cost >= scored.cost_and_gain(thresholds)[0]:
        message = f"A cost of {target_cost:g} pays for every layer: no row needs to leave early."
        return scored.report(scored.policy(thresholds, **about), thresholds, message)

    def find(scored: _Scored, target_cost: float) -> np.ndarray:
        return _improve(scored, _geometric_start(scored, target_cost), target_cost)

    scored, best = _best_choice(choices, find, target_cost)
    # Temperatures shift which exits rows leave at, and not always for the better: never worse than doing without.
    plain = scored.plain
    split = _geometric_start(plain, target_cost)
    if plain.cost_and_gain(split)[0] <= target_cost and plain.score(split) > scored.score(best):
        scored, best = plain, find(plain, target_cost)
    cost, _ = scored.cost_and_gain(best)
    if cost > target_cost:
        raise ExitConfigurationError(
            f"--target_cost {target_cost:g} cannot be met: rows with NaN scores never leave early (cost {cost:.4g})."
        )
    name = "agreement with the last exit"
    if scored.labels is not None:
        name = {"regression": "score", "multi_label_classification": "accuracy over labels"}.get(
            scored.problem_type, "accuracy"
        )
    score = scored.score(best)
    message = f"At {cost:.3f} of the full cost: {name} {score:.4f} on {scored.num_rows} calibration rows."
    return scored.report(scored.policy(best, **about), best, message)


def _best_choice(choices: list[_Scored], find: Callable, target_cost: float) -> tuple[_Scored, np.ndarray]:
    """The best of what `find` makes of the rows under each setting of the criterion, with its thresholds."""
    found = [(scored, find(scored, target_cost)) for scored in choices]
    return max(found, key=lambda one: _rank(*one, target_cost))


def _rank(scored: _Scored, thresholds: np.ndarray, target_cost: float) -> tuple[bool, float, float]:
    """Affordable first, then the better, then the cheaper."""
    cost, gain = scored.cost_and_gain(thresholds)
    return cost <= target_cost, gain, -cost


def _improve(scored: _Scored, start: np.ndarray, target_cost: float) -> np.ndarray:
    """Thresholds at least as good as `start` and as affordable.

    Maximises gain - price * cost one exit at a time, bisecting the price of cost towards the target (its Lagrangian:
    this trades one exit against another), then spends what is left of the budget on one exit at a time.
    """
    search = _LineSearch(scored)
    # In the units of the gain, a squared error's too.
    low, high = np.array([1e-4, 1e2]) * (np.ptp(scored.gains) or 1.0)
    best = start
    for _ in range(_PRICE_STEPS):
        price = math.sqrt(low * high)
        thresholds = search.run(start, lambda cost, gain, price=price: (gain - price * cost).argmax())
        best = max(best, thresholds, key=lambda candidate: _rank(scored, candidate, target_cost))
        low, high = (price, high) if scored.cost_and_gain(thresholds)[0] > target_cost else (low, price)

    # Sums along a line are rounded: once up to the budget and once clearly below it, and the exact cost decides.
    spent = [
        search.run(origin, lambda cost, gain, limit=limit: np.where(cost <= limit, gain, -np.inf).argmax())
        for origin in (best, start)
        for limit in (target_cost + 1e-12, target_cost - 1e-12)
    ]
    best = max(best, *spent, key=lambda candidate: _rank(scored, candidate, target_cost))
    return without_idle_exits(best, lambda candidate: _rank(scored, candidate, target_cost))


def without_idle_exits(thresholds: np.ndarray, rank: Callable) -> np.ndarray:
    """`thresholds` less the exits that do not pay.

    As long as `rank` rises, the exit without which it is highest gets a threshold that nobody reaches.
    """
    while True:
        used = np.flatnonzero(thresholds[:-1] < NEVER)
        without = [np.where(np.arange(len(thresholds)) == index, NEVER, thresholds) for index in used]
        best = max([thresholds, *without], key=rank)
        if best is thresholds:
            return thresholds
        thresholds = best


class _LineSearch:
    """Cost and gain of every threshold of one exit, the other exits' thresholds held, in one pass over the rows.

    Thresholds are taken at no more than `_MAX_LEVELS` quantiles of an exit's scores, and at least 20 rows apart where
    there are enough: finer ones follow the noise of the calibration rows.
    """

    def __init__(self, scored: _Scored):
        self.scored = scored
        self.num_levels = int(np.clip(scored.num_rows // 20, 4, _MAX_LEVELS))
        self.columns = [self._column(scores) for scores in scored.scores.T[:-1]]

    def _column(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows from sure to unsure (NaN last), how many of them leave at each candidate, and its threshold."""
        order = np.argsort(-scores, kind="stable")
        ordered = scores[order[: np.count_nonzero(~np.isnan(scores))]]
        ends = np.flatnonzero(np.diff(ordered)) + 1
        if len(ends) > self.num_levels:
            ends = ends[np.searchsorted(ends, np.linspace(ends[0], ends[-1], self.num_levels))]
        counts = np.unique([0, *ends, len(ordered)]).astype(int)
        return order, counts, np.array([_threshold_between(ordered, count) for count in counts])

    def run(self, start: np.ndarray, choose: Callable, max_sweeps: int = 4) -> np.ndarray:
        """Sweep over the exits, each taking the candidate that `choose(costs, gains)` names, while anything moves."""
        scored, thresholds = self.scored, start.copy()
        leaves = scored.leaves(thresholds)
        for _ in range(max_sweeps):
            before = thresholds.copy()
            for index, (_, _, candidates) in enumerate(self.columns):
                thresholds[index] = candidates[choose(*self._along(thresholds, leaves, index))]
                leaves[:, index] = scored.scores[:, index] >= thresholds[index]
            if (thresholds == before).all():
                break
        return thresholds

    def _along(self, thresholds: np.ndarray, leaves: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Average cost and gain, (num_candidates,), along the candidates of an exit."""
        scored, (order, counts, candidates) = self.scored, self.columns[index]
        rows = np.arange(scored.num_rows)
        here = ~leaves[:, :index].any(1)
        others = leaves.copy()
        others[:, index] = False
        otherwise = others.argmax(1)

        def along(values: np.ndarray) -> np.ndarray:
            # What changes if a row that gets here leaves, summed from the surest row on.
            stay = values[rows, otherwise]
            change = np.where(here, values[rows, index] - stay, 0.0)[order]
            return (stay.sum() + np.concatenate([[0.0], change.cumsum()])[counts]) / scored.num_rows

        def costs_with(candidate: float) -> np.ndarray:
            return scored.costs_under(np.where(np.arange(scored.num_exits) == index, candidate, thresholds))

        cost = along(np.broadcast_to(costs_with(-NEVER), scored.gains.shape))
        # Where nobody exits the exit is not evaluated at all.
        return np.where(candidates < NEVER, cost, costs_with(NEVER)[otherwise].mean()), along(scored.gains)


# Certified risk


def risk_p_value(losses: np.ndarray, limit: float, binary: bool = True) -> float:
    """P-value of "the risk exceeds `limit`" from independent losses of rows.

    Exact binomial, P(Bin(n, limit) <= sum of losses), for losses that can be only 0 or 1; else Hoeffding-Bentkus for
    losses in [0, 1] (Learn then Test, Angelopoulos et al., 2021, proposition 1).

    Args:
        losses: (num_rows,).
        limit: the risk to be disproved.
        binary: what losses can be, not what these happen to be: a test that the data choose is no test.
    """
    num_rows, total = len(losses), float(np.sum(losses))
    if binary:
        return float(scipy.stats.binom.cdf(round(total), num_rows, limit))
    mean = min(total / num_rows, limit)
    divergence = scipy.special.rel_entr(mean, limit) + scipy.special.rel_entr(1 - mean, 1 - limit)
    bentkus = math.e * scipy.stats.binom.cdf(math.ceil(total), num_rows, limit)
    return float(min(1, math.exp(-num_rows * divergence), bentkus))


def _calibrate_risk(scored, max_risk, risk, confidence, seed, chosen_by) -> CalibrationReport:
    if not (0 < max_risk < 1 and 0 < confidence < 1):
        raise ExitConfigurationError("--max_risk and --risk_confidence must lie between 0 and 1.")
    risk = check_risk(risk, scored.problem_type, labelled=scored.labels is not None)
    name = getattr(risk, "__name__", risk)
    never = np.full(scored.num_exits, NEVER)
    num_search = _num_search_rows(scored.num_rows)
    num_certify = scored.num_rows - num_search
    if (1 - max_risk) ** num_certify > 1 - confidence:
        needed, total = rows_needed(max_risk, confidence)
        message = (
            f"No early exit: {rows_in_words(scored.num_rows)}. That cannot show a risk of at most {max_risk:g} with "
            f"confidence {confidence:g}, whatever the policy: it takes at least {needed} rows that certify, so "
            f"{total} calibration rows or more. Give more of them (--calibration_file, --calibration_samples), or a "
            "larger --max_risk, or a lower --risk_confidence."
        )
        return scored.report(None, never, message)

    order = np.random.default_rng(seed).permutation(scored.num_rows)
    search = scored.select(order[:num_search])
    if scored.regression:
        choices = search.choices()
        search = choices[len(choices) // 2]
    certify = scored.select(order[num_search:], search.temperatures, search.params)
    certified, cheapest = None, math.inf
    for level in range(1, _PATH_LEVELS + 1):
        leaving = round(level * num_search / _PATH_LEVELS)
        thresholds = np.array([_threshold_between(search.scores[:, k], leaving) for k in range(scored.num_exits)])
        # Before the rows that certify are seen.
        thresholds = without_idle_exits(thresholds, lambda candidate: -search.cost_and_gain(candidate)[0])
        losses = _risk_losses(risk, certify, certify.exits(thresholds))
        p_value = risk_p_value(losses, max_risk, binary=risk in _BINARY_RISKS)
        if p_value > 1 - confidence:
            break
        cost, _ = search.cost_and_gain(thresholds)
        if cost <= cheapest:  # with exits left out, a later policy may be the dearer one
            certified, cheapest = (thresholds, float(losses.sum()), p_value), cost
    if certified is None:
        message = (
            f"No early exit: the least eager policy already shows {float(losses.sum()):g} errors in {num_certify} "
            f"certifying rows, too many to certify a risk ({name}) of at most {max_risk:g}."
        )
        return scored.report(None, never, message)
    thresholds, errors, p_value = certified
    guarantee = {
        "risk": name,
        "limit": float(max_risk),
        "confidence": float(confidence),
        "num_rows": num_certify,
        "errors": errors,
        "p_value": p_value,
        "seed": seed,
    }
    about = {"max_risk": float(max_risk), "risk": name, "risk_confidence": float(confidence)}
    if chosen_by is not None:
        about["no_guarantee"] = f"The calibration rows also chose {chosen_by}."
    policy = search.policy(thresholds, calibrated_for=about, guarantee=None if chosen_by else guarantee)
    cost, _ = certify.cost_and_gain(thresholds)
    message = (
        f"At {cost:.3f} of the full cost, risk ({name}) at most {max_risk:g} with confidence {confidence:g}: "
        f"{errors:g} errors in {num_certify} certifying rows, p = {p_value:.3g}."
        if chosen_by is None
        else f"At {cost:.3f} of the full cost; no guarantee, because the calibration rows also chose {chosen_by}."
    )
    return certify.report(policy, thresholds, message)


def check_risk(risk: str | Callable | None, problem_type: str, labelled: bool) -> str | Callable:
    """The risk, or its default.

    Raises:
        ExitConfigurationError: an unknown risk, or one that does not fit the problem or needs labels.
    """
    if risk is None:
        risk = "accuracy_gap" if labelled else "consistency"
    if callable(risk):
        return risk
    if risk not in RISKS:
        raise ExitConfigurationError(f"--risk {risk!r} is not one of: {', '.join(RISKS)}.")
    if problem_type == "regression":
        raise ExitConfigurationError(
            f"--max_risk with --risk {risk} counts classes and does not fit regression: use --target_cost."
        )
    if risk == "hamming" and problem_type != "multi_label_classification":
        raise ExitConfigurationError("--risk hamming counts the labels of a multi-label problem: use consistency.")
    if risk == "accuracy_gap" and not labelled:
        raise ExitConfigurationError("--risk accuracy_gap needs labels; without them use --risk consistency.")
    return risk


def rows_needed(max_risk: float, confidence: float) -> tuple[int, int]:
    """The fewest certifying rows, and the fewest calibration rows, that can certify any policy (without an error)."""
    needed = math.ceil(math.log(1 - confidence) / math.log(1 - max_risk))
    total = next(n for n in range(needed, needed + _MAX_SEARCH_ROWS + 1) if n - _num_search_rows(n) >= needed)
    return needed, total


def rows_in_words(num_rows: int) -> str:
    """What calibration rows are used for: a sentence without its full stop."""
    num_search = _num_search_rows(num_rows)
    if num_search == num_rows:
        return f"there are {num_rows} calibration rows, all of them search for a policy and none certifies it"
    return (
        f"there are {num_rows} calibration rows, {num_search} of them search for a policy and {num_rows - num_search} "
        "certify it"
    )


def _num_search_rows(num_rows: int) -> int:
    return min(num_rows, int(np.clip(num_rows // 5, _MIN_SEARCH_ROWS, _MAX_SEARCH_ROWS)))


def _risk_losses(risk: str | Callable, scored: _Scored, exits: np.ndarray) -> np.ndarray:
    """The loss in [0, 1] of each row, (num_rows,)."""
    if callable(risk):
        losses = np.asarray(risk(scored.logits.numpy(), exits, scored.labels), dtype=np.float64)
        if losses.shape != exits.shape or not ((losses >= 0) & (losses <= 1)).all():
            raise ExitConfigurationError("A risk function must give each row a loss in [0, 1], and no NaN.")
        return losses
    rows = np.arange(scored.num_rows)
    if risk == "accuracy_gap":
        right = scored.right == 1
        return (right[:, -1] & ~right[rows, exits]).astype(np.float64)
    differs = scored.predictions[rows, exits] != scored.predictions[:, -1]
    return differs.mean(1) if risk == "hamming" else differs.any(1).astype(np.float64)


# Tables


def policy_row(
    policy: ExitPolicy,
    exit_logits: np.ndarray,
    labels: np.ndarray,
    costs: Sequence[float],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
) -> dict:
    """What a policy gives on rows: `relative_cost`, `metrics`, `exit_fractions`, and the policy's own keys."""
    logits = _tensor(exit_logits)
    exits = policy.exits_of(logits).numpy()
    answers = logits.numpy()[np.arange(len(exits)), exits]
    fractions = np.bincount(exits, minlength=len(costs)) / len(exits)
    return {
        "relative_cost": float(fractions @ ExitCosts.of(costs).of_policy(policy)),
        "metrics": compute_metrics(EvalPrediction(predictions=answers, label_ids=labels)),
        "exit_fractions": fractions.tolist(),
        **policy.to_dict(),
    }


def budgeted_curve(
    calibration: tuple[np.ndarray, np.ndarray],
    report: tuple[np.ndarray, np.ndarray],
    costs: Sequence[float],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
    *,
    criterion: str = "confidence",
    params: dict | None = None,
    problem_type: str = "single_label_classification",
    num_budgets: int = 9,
) -> list[dict]:
    """The best policy at each of a sweep of budgets: chosen on `calibration`, measured on `report`.

    What each exit alone costs is a budget, and so are 25, 50 and 75 %: models of fewer layers are compared at equal
    cost.

    Args:
        calibration: logits (num_rows, num_exits, num_labels) and labels (num_rows,).
        report: the same of other rows.
        costs: as in `calibrate`.
        compute_metrics: called with the logits (num_rows, num_labels) that the policy answers with.
        criterion: a registered exit criterion, with its `params`.
        problem_type: as in transformers.
        num_budgets: further budgets, evenly from the cheapest possible (the first exit's cost, unless NaN scores
            keep rows from leaving) to the cost of no early exit.
    """
    scored = _scored(*calibration, costs, criterion, params, problem_type)
    choices = scored.choices()
    cheapest, _ = scored.cost_and_gain(np.full(scored.num_exits, -NEVER))
    full, _ = scored.cost_and_gain(np.full(scored.num_exits, NEVER))
    named = [cost for cost in (0.25, 0.5, 0.75, *scored.costs.alone) if cheapest <= cost <= full]
    rows = []
    for target in np.unique([*named, *np.linspace(cheapest, full, num_budgets)]).tolist():
        policy = _calibrate_cost(choices, target).policy
        rows.append({"target_cost": target, **policy_row(policy, *report, costs, compute_metrics)})
    return rows
