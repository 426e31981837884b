"""Thresholds from saved logits: the best policy at a cost, or the cheapest whose risk is certified."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
import torch
from transformers import EvalPrediction

from ..models.configuration_een import ExitConfigurationError
from ..models.policies import NEVER, ExitPolicy, get_criterion


RISKS = ("accuracy_gap", "consistency")
_SHARE_RATIOS = np.geomspace(1 / 30, 30, 61)  # q of the geometric split; below 1 most rows leave early
_MIN_SEARCH_ROWS, _MAX_SEARCH_ROWS = 50, 500
_PATH_LEVELS = 100


@dataclass
class CalibrationReport:
    """What calibration found, measured on the calibration rows.

    Args:
        policy: to be set with `model.set_exit_policy`; `None` means no early exit.
        relative_cost: average over rows.
        score: share of rows answered right (regression: minus the mean squared error); without labels, right means as
            the last exit.
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
        labels: class indices or numbers, (num_rows,); `None`: the last exit's own predictions.
        costs: relative cost of leaving at each exit.
        criterion: a registered exit criterion, with its `params`.
        target_cost: set the best policy whose average cost is at most this.
        max_risk: set the cheapest policy with P(risk <= max_risk) >= risk_confidence (give one of the two).
        risk: `accuracy_gap` (default with labels), `consistency`, or a function of (exit_logits, exit_index, labels)
            that returns a loss in [0, 1] for each row.
        problem_type: as in transformers.
        seed: of the permutation that parts searching from certifying rows.
        chosen_by: what these rows already chose (a checkpoint, say); then no guarantee is written, and this is why.

    Raises:
        ExitConfigurationError: a criterion that does not fit the problem, a target below the first exit's cost, or
            settings that contradict each other.
    """
    if (target_cost is None) == (max_risk is None):
        raise ExitConfigurationError("Give one of target_cost (--target_cost) and max_risk (--max_risk).")
    scored = _scored(exit_logits, labels, costs, criterion, params or {}, problem_type)
    if target_cost is not None:
        return _calibrate_cost(scored, target_cost)
    return _calibrate_risk(scored, max_risk, risk, risk_confidence, seed, chosen_by)


# Rows, scores and what thresholds do to them


class _Scored:
    """Calibration rows with their temperatures, scores (num_rows, num_exits) and gains (num_rows, num_exits)."""

    def __init__(self, logits, labels, costs, criterion, params, problem_type, temperatures=None):
        self.logits, self.labels, self.costs = logits, labels, costs
        self.criterion, self.params, self.problem_type = criterion, params, problem_type
        self.regression = problem_type == "regression"
        if temperatures is None and not self.regression:
            temperatures = fit_temperatures(logits, labels)
        self.temperatures = temperatures
        self.scores = get_criterion(criterion, params).scores(logits, temperatures).numpy()
        self.num_rows, self.num_exits = self.scores.shape
        predictions = predicted(logits, problem_type)
        targets = predictions[:, -1] if labels is None else labels
        # What a row is worth at each exit: 1 if right, or minus the squared error.
        gap = predictions - np.asarray(targets).reshape(-1, 1)
        self.gains = -np.square(gap) if self.regression else (gap == 0).astype(np.float64)

    def select(self, rows: np.ndarray, temperatures=None) -> "_Scored":
        labels = None if self.labels is None else self.labels[rows]
        return _Scored(
            self.logits[rows], labels, self.costs, self.criterion, self.params, self.problem_type, temperatures
        )

    def exits(self, thresholds: np.ndarray) -> np.ndarray:
        """The 0-based exit, (num_rows,), that each row takes."""
        leaves = self.scores >= thresholds
        leaves[:, -1] = True
        return leaves.argmax(1)

    def cost_and_gain(self, thresholds: np.ndarray) -> tuple[float, float]:
        exits = self.exits(thresholds)
        # Summed by exit, so that nobody leaving costs exactly what the last exit does.
        shares = np.bincount(exits, minlength=self.num_exits) / self.num_rows
        return float(shares @ self.costs), float(self.gains[np.arange(self.num_rows), exits].mean())

    def policy(self, thresholds: np.ndarray, **about) -> ExitPolicy:
        policy = ExitPolicy(self.criterion, [*map(float, thresholds)], self.temperatures, self.params, **about)
        return ExitPolicy.from_dict(policy.to_dict())

    def report(self, policy: ExitPolicy | None, thresholds: np.ndarray, message: str) -> CalibrationReport:
        cost, gain = self.cost_and_gain(thresholds)
        fractions = np.bincount(self.exits(thresholds), minlength=self.num_exits) / self.num_rows
        return CalibrationReport(policy, cost, gain, fractions.tolist(), message)


def _scored(exit_logits, labels, costs, criterion, params, problem_type) -> _Scored:
    get_criterion(criterion, params).check(problem_type)
    logits = torch.as_tensor(np.asarray(exit_logits)).float()
    labels = None if labels is None else np.asarray(labels)
    return _Scored(logits, labels, np.asarray(costs, dtype=np.float64), criterion, params, problem_type)


def predicted(logits: torch.Tensor, problem_type: str) -> np.ndarray:
    """Predictions (num_rows, num_exits): classes, or numbers in regression."""
    logits = np.asarray(logits)
    return logits[..., 0] if problem_type == "regression" else logits.argmax(-1)


def fit_temperatures(exit_logits: np.ndarray, labels: np.ndarray | None) -> list[float]:
    """One temperature per exit that minimises its negative log-likelihood (Guo et al., ICML 2017, section 4.2).

    Args:
        exit_logits: (num_rows, num_exits, num_labels).
        labels: class indices (num_rows,); `None`: the last exit's own predictions.
    """
    logits = np.asarray(exit_logits, dtype=np.float64)
    targets = logits[:, -1].argmax(-1) if labels is None else np.asarray(labels)
    finite = np.isfinite(logits).all((1, 2))
    logits, targets = logits[finite], targets[finite]
    if len(logits) == 0:
        return [1.0] * np.asarray(exit_logits).shape[1]
    rows = np.arange(len(logits))

    def fit(one: np.ndarray) -> float:
        def loss(log_temperature: float) -> float:
            scaled = one / math.exp(log_temperature)
            return float((scipy.special.logsumexp(scaled, axis=-1) - scaled[rows, targets]).mean())

        bounds = (math.log(0.05), math.log(20))
        return math.exp(scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x)

    return [fit(logits[:, index]) for index in range(logits.shape[1])]


def _threshold_between(scores: np.ndarray, num_leaving: int) -> float:
    """The threshold at which the `num_leaving` surest of `scores` leave: midway to the next score, ties together."""
    scores = scores[~np.isnan(scores)]
    if num_leaving <= 0 or len(scores) == 0:
        return NEVER
    ordered = np.sort(scores)[::-1]
    if num_leaving >= len(ordered):
        return -NEVER
    lowest_leaving = ordered[num_leaving - 1]
    staying = ordered[ordered < lowest_leaving]
    if len(staying) == 0:
        return -NEVER
    # In the scores' own precision, so that the midpoint never lets the next score pass.
    middle = np.float32((np.float64(lowest_leaving) + np.float64(staying[0])) / 2)
    return float(middle if middle > staying[0] else lowest_leaving)


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


def _calibrate_cost(scored: _Scored, target_cost: float) -> CalibrationReport:
    costs = scored.costs
    if target_cost < costs[0]:
        raise ExitConfigurationError(
            f"--target_cost {target_cost:g} is below the cost of the first exit, {costs[0]:.4g}: no policy is so "
            f"cheap. Give at least {math.ceil(costs[0] * 1000) / 1000:g}, or an earlier first exit."
        )
    about = {"calibrated_for": {"target_cost": float(target_cost)}}
    thresholds = np.full(scored.num_exits, NEVER)
    if target_cost >= costs[-1]:
        message = f"A cost of {target_cost:g} pays for every layer: no row needs to leave early."
        return scored.report(scored.policy(thresholds, **about), thresholds, message)

    always = np.full(scored.num_exits, -NEVER)
    starts = [always] + [geometric_thresholds(scored.scores, ratio) for ratio in _SHARE_RATIOS]
    best = max(starts, key=lambda candidate: _rank(scored, candidate, target_cost))
    best = _climb(scored, best, target_cost)
    cost, gain = scored.cost_and_gain(best)
    if cost > target_cost:
        raise ExitConfigurationError(
            f"--target_cost {target_cost:g} cannot be met: rows with NaN scores never leave early (cost {cost:.4g})."
        )
    name = (
        "score" if scored.regression else "accuracy" if scored.labels is not None else "agreement with the last exit"
    )
    message = f"At {cost:.3f} of the full cost: {name} {gain:.4f} on {scored.num_rows} calibration rows."
    return scored.report(scored.policy(best, **about), best, message)


def _rank(scored: _Scored, thresholds: np.ndarray, target_cost: float) -> tuple[bool, float, float]:
    """Affordable first, then the better, then the cheaper."""
    cost, gain = scored.cost_and_gain(thresholds)
    return cost <= target_cost, gain, -cost


def _climb(scored: _Scored, thresholds: np.ndarray, target_cost: float, max_steps: int = 12) -> np.ndarray:
    """Improve thresholds while one, or two of them against each other, can be moved to a better affordable policy."""
    ordered = np.sort(scored.scores, 0)[::-1]
    sizes = sorted({max(1, round(scored.num_rows * share)) for share in (0.01, 0.05)})
    best, rank = thresholds, _rank(scored, thresholds, target_cost)

    def moved(candidate: np.ndarray, index: int, step: int) -> np.ndarray:
        """`candidate` with `step` more of all rows sure at an exit."""
        sure = int((scored.scores[:, index] >= candidate[index]).sum())
        candidate = candidate.copy()
        candidate[index] = _threshold_between(ordered[:, index], sure + step)
        return candidate

    for _ in range(max_steps):
        singles = [
            (index, moved(best, index, sign * size))
            for index in range(scored.num_exits - 1)
            for size in sizes
            for sign in (1, -1)
        ]
        pairs = [
            moved(first, other, sign * size)
            for index, first in singles
            for other in range(scored.num_exits - 1)
            if other != index
            for size in sizes[-1:]
            for sign in (1, -1)
        ]
        candidates = [candidate for _, candidate in singles] + pairs
        if not candidates:
            break
        ranks = [_rank(scored, candidate, target_cost) for candidate in candidates]
        winner = max(range(len(ranks)), key=ranks.__getitem__)
        if ranks[winner] <= rank:
            break
        best, rank = candidates[winner], ranks[winner]
    return best


# Certified risk


def risk_p_value(losses: np.ndarray, limit: float) -> float:
    """P-value of "the risk exceeds `limit`" from independent losses in [0, 1].

    Exact binomial where all losses are 0 or 1, else Hoeffding-Bentkus (Learn then Test, Angelopoulos et al., 2021,
    proposition 1; Bates et al., 2021, theorem 2).
    """
    num_rows, mean = len(losses), float(np.mean(losses))
    if np.isin(losses, (0, 1)).all():
        return float(scipy.stats.binom.cdf(round(mean * num_rows), num_rows, limit))
    capped = min(mean, limit)
    divergence = scipy.special.rel_entr(capped, limit) + scipy.special.rel_entr(1 - capped, 1 - limit)
    bentkus = math.e * scipy.stats.binom.cdf(math.ceil(mean * num_rows), num_rows, limit)
    return float(min(1, math.exp(-num_rows * divergence), bentkus))


def _calibrate_risk(scored, max_risk, risk, confidence, seed, chosen_by) -> CalibrationReport:
    if not (0 < max_risk < 1 and 0 < confidence < 1):
        raise ExitConfigurationError("--max_risk and --risk_confidence must lie between 0 and 1.")
    if risk is None:
        risk = "consistency" if scored.labels is None else "accuracy_gap"
    if not callable(risk):
        if risk not in RISKS:
            raise ExitConfigurationError(f"--risk {risk!r} is not one of: {', '.join(RISKS)}.")
        if scored.regression:
            raise ExitConfigurationError(
                f"--risk {risk} counts classes and does not fit regression: use --target_cost."
            )
        if risk == "accuracy_gap" and scored.labels is None:
            raise ExitConfigurationError("--risk accuracy_gap needs labels; without them use --risk consistency.")
    name = getattr(risk, "__name__", risk)
    never = np.full(scored.num_exits, NEVER)
    num_search = int(np.clip(scored.num_rows // 5, _MIN_SEARCH_ROWS, _MAX_SEARCH_ROWS))
    num_certify = max(0, scored.num_rows - num_search)
    if (1 - max_risk) ** num_certify > 1 - confidence:
        needed = math.ceil(math.log(1 - confidence) / math.log(1 - max_risk))
        message = (
            f"No early exit: {num_certify} certifying rows cannot show a risk of at most {max_risk:g} with confidence "
            f"{confidence:g}, whatever the policy; that takes at least {needed}, so {needed + num_search} calibration "
            "rows or more. Give more of them (--calibration_file, --calibration_samples), or a larger --max_risk, or "
            "a lower --risk_confidence."
        )
        return scored.report(None, never, message)

    order = np.random.default_rng(seed).permutation(scored.num_rows)
    search = scored.select(order[:num_search])
    certify = scored.select(order[num_search:], search.temperatures)
    certified = None
    for level in range(1, _PATH_LEVELS + 1):
        leaving = round(level * num_search / _PATH_LEVELS)
        thresholds = np.array([_threshold_between(search.scores[:, k], leaving) for k in range(scored.num_exits)])
        losses = _risk_losses(risk, certify, certify.exits(thresholds))
        p_value = risk_p_value(losses, max_risk)
        if p_value > 1 - confidence:
            break
        certified = (thresholds, float(losses.sum()), p_value)
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
    cost, _ = scored.cost_and_gain(thresholds)
    message = (
        f"At {cost:.3f} of the full cost, risk ({name}) at most {max_risk:g} with confidence {confidence:g}: "
        f"{errors:g} errors in {num_certify} certifying rows, p = {p_value:.3g}."
        if chosen_by is None
        else f"At {cost:.3f} of the full cost; no guarantee, because the calibration rows also chose {chosen_by}."
    )
    return certify.report(policy, thresholds, message)


def _risk_losses(risk: str | Callable, scored: _Scored, exits: np.ndarray) -> np.ndarray:
    """The loss in [0, 1] of each row, (num_rows,)."""
    if callable(risk):
        return np.asarray(risk(scored.logits.numpy(), exits, scored.labels), dtype=np.float64)
    rows = np.arange(scored.num_rows)
    if risk == "accuracy_gap":
        return np.maximum(scored.gains[:, -1] - scored.gains[rows, exits], 0)
    predictions = predicted(scored.logits, scored.problem_type)
    return (predictions[rows, exits] != predictions[:, -1]).astype(np.float64)


# Tables


def policy_row(
    policy: ExitPolicy,
    exit_logits: np.ndarray,
    labels: np.ndarray,
    costs: Sequence[float],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
) -> dict:
    """What a policy gives on rows: `relative_cost`, `metrics`, `exit_fractions`, and the policy's own keys."""
    logits = torch.as_tensor(np.asarray(exit_logits)).float()
    exits = policy.exits_of(logits).numpy()
    answers = np.asarray(exit_logits)[np.arange(len(exits)), exits]
    fractions = np.bincount(exits, minlength=len(costs)) / len(exits)
    return {
        "relative_cost": float(fractions @ np.asarray(costs)),
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
    problem_type: str = "single_label_classification",
    num_budgets: int = 15,
) -> list[dict]:
    """The best policy at each of a sweep of budgets: chosen on `calibration`, measured on `report`.

    Args:
        calibration: logits (num_rows, num_exits, num_labels) and labels (num_rows,).
        report: the same of other rows.
        costs: relative cost of leaving at each exit.
        compute_metrics: called with the logits (num_rows, num_labels) that the policy answers with.
        num_budgets: budgets between the first exit's cost and the last's.
    """
    scored = _scored(*calibration, costs, criterion, {}, problem_type)
    rows = []
    for target in np.linspace(costs[0], costs[-1], num_budgets).tolist():
        policy = _calibrate_cost(scored, target).policy
        rows.append({"target_cost": target, **policy_row(policy, *report, costs, compute_metrics)})
    return rows
