"""Scored calibration rows: the criterion's scores, the gain of each exit, and the effect of thresholds."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..evaluation.cost import ExitCosts
from ..evaluation.metrics import check_labels, predict_labels
from ..models import ExitConfigurationError
from ..models.criteria import get_criterion, resolve_problem_type
from ..models.policies import NEVER, ExitPolicy
from .arrays import as_tensor, probability_of, right_answers
from .temperatures import fit_temperatures
from .thresholds import geometric_thresholds


_SHARE_RATIOS = np.geomspace(1 / 30, 30, 61)  # q of the geometric split; below 1 most examples exit early


@dataclass
class CalibrationReport:
    """The policy that calibration has chosen, and its results on the calibration rows.

    Args:
        policy: the policy, for `model.set_exit_policy`; `None`: no early exit.
        relative_cost: average over rows, as a share of the plain model's cost.
        score: share of rows with the right answer (multi-label: of labels; regression: minus the mean squared error);
            without labels, the answers of the last exit count as right.
        exit_fractions: share of rows that exit at each exit, (num_exits,).
        message: the result in one sentence.
    """

    policy: ExitPolicy | None
    relative_cost: float
    score: float
    exit_fractions: list[float]
    message: str


class ScoredRows:
    """Calibration rows with their temperatures, scores (num_rows, num_exits) and gains (num_rows, num_exits).

    `tempered` says whether the scores are of logits divided by the temperatures. `reference` are the answers,
    (num_rows,) or (num_rows, num_labels), that stand in for the last exit's.
    """

    def __init__(
        self, logits, labels, costs, criterion, params, problem_type, reference=None, temperatures=None, tempered=True
    ):
        self.logits, self.labels, self.costs = logits, labels, costs
        self.criterion, self.params, self.problem_type = criterion, params, problem_type
        self.regression = problem_type == "regression"
        if temperatures is None and not self.regression:
            temperatures = fit_temperatures(logits, reference if labels is None else labels, problem_type)
        self.temperatures, self.tempered = temperatures, tempered and temperatures is not None
        self.scores = get_criterion(criterion, params).scores(logits, temperatures if tempered else None).numpy()
        self.num_rows, self.num_exits = self.scores.shape
        # (num_rows, num_exits, answers): one answer for each label of a multi-label problem, else one.
        self.predictions = predict_labels(logits.numpy(), problem_type).reshape(self.num_rows, self.num_exits, -1)
        self.given_reference = reference
        self.reference = self.predictions[:, -1] if reference is None else reference.reshape(self.num_rows, -1)
        self.targets = targets = right_answers(self.reference, labels, problem_type)
        # The gain of a row at each exit: the share of its answers that are right, or minus the squared error.
        if not self.regression:
            self.right = (self.predictions == targets[:, None]).mean(-1)
            # Of policies with equally many right answers, prefer the one with the higher probability of the targets.
            scaled = logits.numpy() / np.array(temperatures).reshape(1, -1, 1)
            probability = probability_of(targets, scaled, problem_type)
            self.gains = self.right + probability / (2 * self.num_rows * targets.shape[1])
        else:
            # Answers that are not finite count as the worst finite one: otherwise all gains would be NaN.
            with np.errstate(invalid="ignore"):
                self.gains = -np.square(self.predictions.astype(np.float64)[..., 0] - targets)
            finite = np.isfinite(self.gains)
            self.gains[~finite] = self.gains[finite].min(initial=0.0)
            self.right = self.gains

    def select(self, rows: np.ndarray | slice, temperatures=None, params=None, tempered=True) -> "ScoredRows":
        labels, reference = (None if of is None else of[rows] for of in (self.labels, self.given_reference))
        settings = (self.criterion, self.params if params is None else params, self.problem_type)
        return ScoredRows(self.logits[rows], labels, self.costs, *settings, reference, temperatures, tempered)

    def choices(self) -> list["ScoredRows"]:
        """The same rows, scored with each setting of the criterion to try; only `self` if settings are given."""
        tried = [{}] if self.params else get_criterion(self.criterion).choices(self.logits)
        return [self if params == {} else self.select(slice(None), self.temperatures, params) for params in tried]

    @cached_property
    def plain(self) -> "ScoredRows":
        """The same rows, scored without temperatures."""
        if not get_criterion(self.criterion).scores_probabilities:
            return self
        return self.select(slice(None), self.temperatures, tempered=False)

    @cached_property
    def geometric_splits(self) -> list[np.ndarray]:
        """Thresholds (num_exits,) of the geometric splits that are tried; the first lets all rows exit at exit 1."""
        always = np.full(self.num_exits, -NEVER)
        return [always, *(geometric_thresholds(self.scores, ratio) for ratio in _SHARE_RATIOS)]

    def exits(self, thresholds: np.ndarray) -> np.ndarray:
        """The 0-based exit, (num_rows,), that each row takes."""
        return self.exits_where(thresholds).argmax(1)

    def exits_where(self, thresholds: np.ndarray) -> np.ndarray:
        """Whether each score reaches its threshold, (num_rows, num_exits); at the last exit all do."""
        reached = self.scores >= thresholds
        reached[:, -1] = True
        return reached

    def costs_under(self, thresholds: np.ndarray) -> np.ndarray:
        """The cost of exiting at each exit, (num_exits,), if only exits with reachable thresholds are evaluated."""
        return self.costs.of_policy(ExitPolicy(self.criterion, thresholds, params=self.params))

    def cost_and_gain(self, thresholds: np.ndarray) -> tuple[float, float]:
        exits = self.exits(thresholds)
        cost = self.shares(exits) @ self.costs_under(thresholds)
        return float(cost), float(self.gains[np.arange(self.num_rows), exits].mean())

    def shares(self, exits: np.ndarray) -> np.ndarray:
        """The share of rows at each exit, (num_exits,); without early exits it is exactly 1 at the last exit."""
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


def score_rows(exit_logits, labels, costs, criterion, params, problem_type, reference=None) -> ScoredRows:
    logits, params = as_tensor(exit_logits), params or {}
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
    if reference is not None:
        if np.shape(reference) != (num_rows, num_labels):
            raise ExitConfigurationError(
                f"reference must hold logits {(num_rows, num_labels)}, as exit_logits, not {np.shape(reference)}."
            )
        reference = predict_labels(as_tensor(reference).numpy(), problem_type)
    return ScoredRows(logits, labels, ExitCosts.of(costs), criterion, params, problem_type, reference)
