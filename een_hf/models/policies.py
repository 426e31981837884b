"""Exit criteria, and the policy by which examples exit.

A criterion scores the confidence of an exit. An example exits at the first exit whose score is at least that exit's
threshold; the last exit answers all that remain. An example never exits by a score of NaN.
"""

import json
import math
import numbers
import reprlib
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
import torch

from .registries import ExitConfigurationError, Registry


# A threshold that no score reaches, and that JSON can carry.
NEVER = 1e30
# Beyond these a float32 softmax is one-hot, NaN or uniform whatever the logits are.
TEMPERATURE_RANGE = (1e-4, 1e4)

_CRITERIA: dict[str, type["ExitCriterion"]] = Registry("exit criterion (--exit_criterion)")


def is_number(value: object) -> bool:
    """Whether a value read from a file is a number: no bool, no NaN, no integer beyond 64 bits."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else not math.isnan(value)


def register_criterion(name: str):
    """Class decorator: make a criterion known to `--exit_criterion` under `name`."""

    def register(criterion: type["ExitCriterion"]) -> type["ExitCriterion"]:
        _CRITERIA.check_class(criterion, ExitCriterion)
        criterion.name = name
        _CRITERIA[name] = criterion
        return criterion

    return register


def find_criterion(name: str) -> str:
    """The name of a criterion, registered or `package.module:Class`, which is imported: for what users type."""
    return _CRITERIA.find(name, register_criterion)


def get_criterion(name: str, params: dict | None = None) -> "ExitCriterion":
    """The criterion of that name; an unknown one is answered with the known.

    Raises:
        ExitConfigurationError: unknown name or parameter.
    """
    criterion, params = _CRITERIA[name], params or {}
    if not isinstance(params, dict):
        raise ExitConfigurationError(f"Criterion {name!r}: params must be a dict of parameters, not {params!r}.")
    unknown = sorted(params.keys() - criterion.defaults.keys(), key=str)
    if unknown:
        known = ", ".join(sorted(criterion.defaults)) or "none"
        raise ExitConfigurationError(f"Criterion {name!r} has no parameter {unknown[0]!r}; it has: {known}.")
    for param, value in params.items():
        if is_number(criterion.defaults[param]) and not (is_number(value) and 0 < value < math.inf):
            raise ExitConfigurationError(
                f"Criterion {name!r}: {param} must be a number above 0, not {reprlib.repr(value)}."
            )
    return criterion({**criterion.defaults, **params})


def resolve_problem_type(problem_type: str | None, num_labels: int) -> str:
    """A config's problem type; where it names none, one label is regression and several are classes.

    One label is regression whatever the config says, unless it is a multi-label problem.
    """
    if num_labels == 1 and problem_type != "multi_label_classification":
        return "regression"
    return problem_type or "single_label_classification"


def answer_confidence(logits: torch.Tensor, problem_type: str | None) -> torch.Tensor | None:
    """How probable it is that answers (rows, num_labels) are right, (rows,): what people read as confidence.

    Classes: the criterion `confidence`. Multi-label: `label_confidence`. Regression: `None`.
    """
    problem_type = resolve_problem_type(problem_type, logits.shape[-1])
    if problem_type == "regression":
        return None
    name = "label_confidence" if problem_type == "multi_label_classification" else "confidence"
    return get_criterion(name).score(logits, ())[0]


def fitting_criteria(problem_type: str) -> list[str]:
    """Names of the criteria that can score this kind of problem, sorted."""
    return [name for name, kind in sorted(_CRITERIA.items()) if problem_type in kind.problem_types]


class ExitCriterion:
    """Scores exits one after the other; what it remembers of a row is a tuple of tensors, row first.

    A subclass supplies `step`, and names in `defaults` its parameters, in `problem_types` what it can score, and in
    `scores_probabilities` whether it reads probabilities: only those are sharpened by a temperature.
    """

    name: str
    defaults: dict = {}
    problem_types = ("single_label_classification",)
    scores_probabilities = True
    remembers = False  # whether the score at an exit depends on the exits before
    highest = 1.0  # what no score exceeds, where exits do not add up

    def __init__(self, params: dict):
        self.params = params

    def step(self, logits: torch.Tensor, state: tuple) -> tuple[torch.Tensor, tuple]:
        """Scores (rows,) of one exit's logits (rows, num_labels), float32, and the state for the next exit.

        `state` is `()` at the first exit.
        """
        raise NotImplementedError

    def highest_score(self, exit_index: int) -> float:
        """What no score at this 0-based exit exceeds."""
        return self.highest

    def score(
        self, logits: torch.Tensor, state: tuple, temperature: float | None = None
    ) -> tuple[torch.Tensor, tuple]:
        """As `step`, of logits in any precision, divided by the exit's temperature where the criterion takes one."""
        logits = logits.float()
        if temperature is not None and self.scores_probabilities:
            logits = logits / temperature
        return self.step(logits, state)

    def scores(self, exit_logits: torch.Tensor, temperatures: list[float] | None = None) -> torch.Tensor:
        """Scores (num_rows, num_exits) of all exits' logits (num_rows, num_exits, num_labels)."""
        state, columns = (), []
        for index, logits in enumerate(exit_logits.unbind(1)):
            scores, state = self.score(logits, state, temperatures[index] if temperatures else None)
            columns.append(scores)
        return torch.stack(columns, 1)

    @classmethod
    def choices(cls, exit_logits: torch.Tensor) -> list[dict]:
        """Parameters that calibration tries on its rows (num_rows, num_exits, num_labels) where none are given."""
        return [{}]

    def check(self, problem_type: str) -> None:
        """Raise ExitConfigurationError where the criterion cannot score this kind of problem."""
        if problem_type not in self.problem_types:
            fitting = fitting_criteria(problem_type)
            raise ExitConfigurationError(
                f"--exit_criterion {self.name} does not fit {problem_type}: it scores "
                f"{' and '.join(self.problem_types)}. "
                + (f"Use: {', '.join(fitting)}." if fitting else "No criterion fits this problem.")
            )


@register_criterion("confidence")
class Confidence(ExitCriterion):
    """The largest softmax probability (MSDNet, Huang et al., ICLR 2018, section 4)."""

    def step(self, logits, state):
        return logits.softmax(-1).amax(-1), state


@register_criterion("entropy")
class Entropy(ExitCriterion):
    """Negative entropy of the softmax over log C, in [-1, 0] (BranchyNet, Teerapittayanon et al., ICPR 2016)."""

    highest = 1e-6  # rounding may lift it above 0

    def step(self, logits, state):
        log_probabilities = logits.log_softmax(-1)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        return -entropy / math.log(max(logits.shape[-1], 2)), state


@register_criterion("margin")
class Margin(ExitCriterion):
    """The largest softmax probability minus the second largest."""

    def step(self, logits, state):
        top = logits.softmax(-1).topk(min(2, logits.shape[-1]), dim=-1).values
        return top[..., 0] - (top[..., 1] if top.shape[-1] > 1 else 0), state


@register_criterion("label_confidence")
class LabelConfidence(ExitCriterion):
    """Of several labels, each with a probability p of its own, the least certain: min over labels of max(p, 1 - p).

    It reaches a threshold where every label is that far from being answered otherwise.
    """

    problem_types = ("multi_label_classification",)

    def step(self, logits, state):
        return logits.abs().amin(-1).sigmoid(), state


@register_criterion("patience")
class Patience(ExitCriterion):
    """Exits in a row, before and with this one, that agree with the exit before (PABEE, Zhou et al., NeurIPS 2020).

    Two exits agree if they predict the same class; in regression, if the prediction moves by less than `tolerance`, in
    units of the labels: calibration tries the deciles of how far predictions move. The first exit scores 0.
    """

    defaults = {"tolerance": 0.5}
    problem_types = ("single_label_classification", "regression")
    scores_probabilities = False
    remembers = True

    def highest_score(self, exit_index):
        return exit_index

    @classmethod
    def choices(cls, exit_logits):
        moves = exit_logits[..., 0].double().diff(dim=1).abs()
        moves = moves[moves.isfinite()]
        if exit_logits.shape[-1] > 1 or len(moves) == 0:
            return [{}]
        deciles = np.quantile(moves.numpy(), np.arange(1, 10) / 10)
        return [{"tolerance": float(tolerance)} for tolerance in np.unique(deciles[deciles > 0])] or [{}]

    def step(self, logits, state):
        regression = logits.shape[-1] == 1
        broken = logits.isnan().any(-1)
        # A broken exit predicts nothing that a later one could agree with.
        prediction = logits[:, 0] if regression else logits.argmax(-1).masked_fill(broken, -1)
        if not state:
            streak = torch.zeros_like(logits[:, 0])
        else:
            before, streak = state
            agrees = (prediction - before).abs() < self.params["tolerance"] if regression else prediction == before
            streak = torch.where(agrees, streak + 1, 0.0)
        return streak.masked_fill(broken, float("nan")), (prediction, streak)


@register_criterion("vote")
class Vote(ExitCriterion):
    """Votes of the exits so far for the class that leads (each exit votes for the class it predicts)."""

    scores_probabilities = False
    remembers = True

    def highest_score(self, exit_index):
        return exit_index + 1

    def step(self, logits, state):
        broken = logits.isnan().any(-1)
        classes = torch.arange(logits.shape[-1], device=logits.device)
        vote = (logits.argmax(-1, keepdim=True) == classes).to(logits.dtype)  # `one_hot` would look at its numbers
        vote = vote.masked_fill(broken.unsqueeze(-1), 0.0)
        votes = vote + state[0] if state else vote
        return votes.amax(-1).masked_fill(broken, float("nan")), (votes,)


def decide(
    criterion: ExitCriterion,
    logits: torch.Tensor,
    state: tuple,
    threshold: float | torch.Tensor,
    temperature: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple]:
    """Which examples exit, (batch,) bool, where `criterion` scores logits (batch, num_labels), and its next state."""
    scores, state = criterion.score(logits, state, temperature)
    return scores >= threshold, state


def _plain_numbers(values, limit: float):
    """A list, array or tensor of numbers as a list of floats from -`limit` to `limit`; all else as it is."""
    if isinstance(values, np.ndarray | torch.Tensor):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        return values
    values = [value.item() if isinstance(value, np.generic | torch.Tensor) else value for value in values]
    return [max(-limit, min(limit, float(value))) if is_number(value) else value for value in values]


@dataclass(frozen=True)
class ExitPolicy:
    """Criterion and thresholds: who leaves at which exit.

    Args:
        criterion: a registered name.
        thresholds: one per exit; an example exits at the first exit whose score is at least its threshold. The last
            is ignored: the last exit answers all that remain. `NEVER` is a threshold that no score reaches.
        temperatures: one per exit, or `None`; logits are divided by them for scoring, and for what people read as
            confidence.
        params: the criterion's parameters.
        calibrated_for: what the thresholds were chosen for, for example `{"target_cost": 0.5}`.
        guarantee: what is certified of the policy, or `None`.
        confidence_temperatures: one per exit, for what people read as confidence, where `temperatures` is `None`
            because the plain scores were better to decide by.

    Raises:
        ExitConfigurationError: a criterion or parameter that is not known, or no thresholds.
    """

    criterion: str
    thresholds: list[float] | None = None
    temperatures: list[float] | None = None
    params: dict = field(default_factory=dict)
    calibrated_for: dict = field(default_factory=dict)
    guarantee: dict | None = None
    confidence_temperatures: list[float] | None = None

    def __post_init__(self):
        get_criterion(self.criterion, self.params)
        if self.thresholds is None:
            raise ExitConfigurationError(
                f"ExitPolicy({self.criterion!r}) needs thresholds, one per exit; `calibrate` finds them, and "
                "ExitPolicy.from_results(path, target_cost=0.5) reads those of a run."
            )

    @cached_property
    def scorer(self) -> ExitCriterion:
        """The criterion with its parameters, made once."""
        return get_criterion(self.criterion, self.params)

    def to_dict(self) -> dict:
        """A plain dict, ready for strict JSON; thresholds beyond `NEVER`, infinite ones too, become `NEVER`.

        What is no number stays as it is, for `validate` to name.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["thresholds"] = _plain_numbers(self.thresholds, NEVER)
        for name in ("temperatures", "confidence_temperatures"):
            values[name] = _plain_numbers(values[name], math.inf)
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "ExitPolicy":
        """The policy of a dict as `to_dict` makes it; optional keys may be missing.

        Raises:
            ExitConfigurationError: no dict, a key that is not known, or no criterion or thresholds.
        """
        if not isinstance(values, dict):
            raise ExitConfigurationError(
                f"exit_policy must be a dict as ExitPolicy.to_dict makes it, not {reprlib.repr(values)}."
            )
        names = {f.name for f in fields(cls)}
        given = {name for name, value in values.items() if value is not None}
        unknown, missing = sorted(values.keys() - names, key=str), sorted({"criterion", "thresholds"} - given)
        if unknown or missing:
            what = f"has an unknown key {unknown[0]!r}" if unknown else f"lacks {missing[0]!r}"
            raise ExitConfigurationError(f"exit_policy {what}; its keys are: {', '.join(sorted(names))}.")
        return cls(**{name: value for name, value in values.items() if value is not None})

    @classmethod
    def from_results(cls, path: str, target_cost: float | None = None) -> "ExitPolicy":
        """The policy in an `exit_results.json`: the calibrated one, or that of the largest budget <= `target_cost`.

        Raises:
            ExitConfigurationError: the file cannot be read, or holds no such policy; the budgets that it holds are
                named.
        """
        try:
            with open(path, encoding="utf-8") as file:
                results = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise ExitConfigurationError(f"{path} cannot be read as the results of a run: {error}") from error
        if not isinstance(results, dict):
            raise ExitConfigurationError(f"{path} does not hold the results of a run.")
        found = results.get("policy")
        if target_cost is not None:
            rows = results.get("budgeted") or []
            if not isinstance(rows, list) or not all(
                isinstance(row, dict) and is_number(row.get("target_cost")) for row in rows
            ):
                raise ExitConfigurationError(f"{path}: `budgeted` must be a list of budgets, each with a target_cost.")
            budgets = sorted(rows, key=lambda row: row["target_cost"])
            fitting = [row for row in budgets if row["target_cost"] <= target_cost + 1e-9]
            if not fitting:
                known = ", ".join(f"{row['target_cost']:.3g}" for row in budgets) or "none"
                raise ExitConfigurationError(f"{path} holds no budget up to {target_cost}; it holds: {known}.")
            found = {**fitting[-1], "calibrated_for": {"target_cost": fitting[-1]["target_cost"]}}
        if found is None:
            raise ExitConfigurationError(f"{path} holds no calibrated policy; name a budget: target_cost=0.5.")
        if not isinstance(found, dict):
            raise ExitConfigurationError(f"{path}: `policy` must be a dict, not {reprlib.repr(found)}.")
        if "criterion" in results:
            found = {"criterion": results["criterion"], **found}
        return cls.from_dict({f.name: found[f.name] for f in fields(cls) if f.name in found})

    def validate(self, num_exits: int, problem_type: str | None, num_labels: int) -> None:
        """Check that the policy fits a model.

        Raises:
            ExitConfigurationError: naming what does not fit and what would.
        """
        problem_type = resolve_problem_type(problem_type, num_labels)
        self.scorer.check(problem_type)
        if problem_type == "regression" and num_labels > 1:
            raise ExitConfigurationError(
                f"exit_policy: --exit_criterion {self.criterion} scores regression with 1 label, not {num_labels}."
            )
        for name in ("calibrated_for", "guarantee"):
            value = getattr(self, name)
            if not isinstance(value, dict | None):
                raise ExitConfigurationError(f"exit_policy: {name} must be a dict or None, not {reprlib.repr(value)}.")
        for name in ("thresholds", "temperatures", "confidence_temperatures"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple | None):
                raise ExitConfigurationError(
                    f"exit_policy: {name} must be a list of numbers, not {reprlib.repr(values)}."
                )
            if values is not None and len(values) != num_exits:
                raise ExitConfigurationError(
                    f"exit_policy has {len(values)} {name}, but the model has {num_exits} exits: give one per exit."
                )
            if not all(map(is_number, values or [])):
                raise ExitConfigurationError(f"exit_policy has {name} that are no numbers: {reprlib.repr(values)}.")
        temperatures = [*(self.temperatures or []), *(self.confidence_temperatures or [])]
        if temperatures and problem_type == "regression":
            raise ExitConfigurationError(
                "exit_policy has temperatures, which mean nothing in regression: leave them out."
            )
        low, high = TEMPERATURE_RANGE
        if any(not low <= temperature <= high for temperature in temperatures):
            raise ExitConfigurationError(
                f"exit_policy needs temperatures above 0, from {low:g} to {high:g}, not {temperatures}."
            )

    @property
    def remembers(self) -> bool:
        """Whether the score at an exit depends on the exits before."""
        return self.scorer.remembers

    def lets_exit(self, exit_index: int) -> bool:
        """Whether some score reaches the threshold of this 0-based exit."""
        return self.thresholds[exit_index] <= self.scorer.highest_score(exit_index)

    def decide(self, exit_index: int, logits: torch.Tensor, state: tuple) -> tuple[torch.Tensor, tuple]:
        """Who leaves at an exit before the last.

        Args:
            exit_index: 0-based.
            logits: (rows, num_labels).
            state: what the criterion remembers of these rows; `()` at the first exit.

        Returns:
            (rows,) bool, True leaves, and the state for the next exit.
        """
        temperature = self.temperatures[exit_index] if self.temperatures else None
        return decide(self.scorer, logits, state, self.thresholds[exit_index], temperature)

    def temper(self, logits: torch.Tensor, exit_index: torch.Tensor) -> torch.Tensor:
        """Logits (..., num_labels) of answers, divided by the temperature of the 0-based exit (...) of each."""
        temperatures = self.confidence_temperatures or self.temperatures
        if temperatures is None:
            return logits
        return logits / torch.tensor(temperatures, dtype=logits.dtype, device=logits.device)[exit_index].unsqueeze(-1)

    def scores(self, exit_logits: torch.Tensor) -> torch.Tensor:
        """Scores (num_rows, num_exits) of logits (num_rows, num_exits, num_labels)."""
        return self.scorer.scores(exit_logits, self.temperatures)

    def exits_of(self, exit_logits: torch.Tensor) -> torch.Tensor:
        """The 0-based exit, (num_rows,) int64, that each row of (num_rows, num_exits, num_labels) takes."""
        scores = self.scores(exit_logits)
        leaves = scores >= torch.tensor(self.thresholds, dtype=scores.dtype, device=scores.device)
        leaves[:, -1] = True
        return leaves.int().argmax(1)
