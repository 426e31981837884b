"""Exit criteria: each scores how confident the exits are.

A higher score is more confident. A score of NaN reaches no threshold. With one label per example, a score is NaN where
the probabilities are not defined: if a logit is NaN or plus infinity, or if all are minus infinity. If only some are
minus infinity, these classes have probability 0.
"""

import math
import numbers
import reprlib

import numpy as np
import torch

from .registries import ExitConfigurationError, Registry


CRITERIA: dict[str, type["ExitCriterion"]] = Registry("exit criterion (--exit_criterion)")


def is_number(value: object) -> bool:
    """Whether a value read from a file is a number: no bool, no NaN, no integer of more than 64 bits."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else not math.isnan(value)


def register_criterion(name: str):
    """Class decorator that registers a criterion.

    Args:
        name: the name for `--exit_criterion` and `ExitPolicy`.

    Returns:
        the decorator, for a subclass of `ExitCriterion`.

    Raises:
        ExitConfigurationError: what is decorated is no subclass of `ExitCriterion`.

    Example:
        >>> @een_hf.register_criterion("squared")
        ... class SquaredConfidence(een_hf.models.ExitCriterion):
        ...     def step(self, logits, state):
        ...         return logits.softmax(-1).square().sum(-1), state
        >>> policy = een_hf.ExitPolicy("squared", thresholds=[0.9, 0.0])
    """

    def register(criterion: type["ExitCriterion"]) -> type["ExitCriterion"]:
        CRITERIA.check_class(criterion, ExitCriterion)
        criterion.name = name
        CRITERIA[name] = criterion
        return criterion

    return register


def find_criterion(name: str) -> str:
    """The name of a criterion as users type it: a registered name, or `package.module:Class`, which is imported."""
    return CRITERIA.find(name, register_criterion)


def get_criterion(name: str, params: dict | None = None) -> "ExitCriterion":
    """Build a criterion.

    Args:
        name: a registered name.
        params: values of its parameters; missing ones have their defaults.

    Returns:
        the criterion.

    Raises:
        ExitConfigurationError: an unknown name or parameter, or a parameter that is not above 0.
    """
    criterion, params = CRITERIA[name], params or {}
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
    """The problem type of a config.

    Args:
        problem_type: as in the config, or `None`.
        num_labels: number of labels.

    Returns:
        `multi_label_classification` if the config says so; else `regression` for one label; else what the config
        says, by default `single_label_classification`.
    """
    if num_labels == 1 and problem_type != "multi_label_classification":
        return "regression"
    return problem_type or "single_label_classification"


def answer_confidence(logits: torch.Tensor, problem_type: str | None) -> torch.Tensor | None:
    """The confidence of answers: the estimated probability that each is right.

    Args:
        logits: logits of the answers (num_rows, num_labels), divided by the temperatures of their exits.
        problem_type: as in the config.

    Returns:
        (num_rows,), the score of the criterion `confidence`, or `label_confidence` for multi-label problems; `None`
        for regression.
    """
    problem_type = resolve_problem_type(problem_type, logits.shape[-1])
    if problem_type == "regression":
        return None
    name = "label_confidence" if problem_type == "multi_label_classification" else "confidence"
    return get_criterion(name).score(logits, ())[0]


def fitting_criteria(problem_type: str) -> list[str]:
    """Names of the criteria that can score this kind of problem, sorted."""
    return [name for name, kind in sorted(CRITERIA.items()) if problem_type in kind.problem_types]


class ExitCriterion:
    """Base class of criteria: scores the exits one after the other, in order.

    A subclass defines `step`. `defaults` are its parameters with their default values, `problem_types` the problems
    that it can score, and `scores_probabilities` whether it reads probabilities: only then are logits divided by
    temperatures. What it remembers of the examples is a tuple of tensors with the examples in the first dimension.

    Args:
        params: the values of all its parameters.
    """

    name: str
    defaults: dict = {}
    problem_types = ("single_label_classification",)
    scores_probabilities = True
    remembers = False  # whether the score at an exit depends on the exits before
    highest = 1.0  # the highest possible score at any exit

    def __init__(self, params: dict):
        self.params = params

    def step(self, logits: torch.Tensor, state: tuple) -> tuple[torch.Tensor, tuple]:
        """Score one exit.

        Args:
            logits: (num_rows, num_labels), float32.
            state: what the last call returned for these rows; `()` at the first exit.

        Returns:
            scores (num_rows,), higher if more confident, and the state for the next exit.
        """
        raise NotImplementedError

    def highest_score(self, exit_index: int) -> float:
        """The highest possible score at an exit.

        Args:
            exit_index: 0-based.

        Returns:
            a number that no score exceeds.
        """
        return self.highest

    def score(
        self, logits: torch.Tensor, state: tuple, temperature: float | None = None
    ) -> tuple[torch.Tensor, tuple]:
        """As `step`, for logits in any precision, divided by a temperature if the criterion reads probabilities.

        Args:
            logits: (num_rows, num_labels).
            state: as for `step`.
            temperature: the exit's temperature; `None`: 1.

        Returns:
            scores (num_rows,), float32, and the state for the next exit.
        """
        logits = logits.float()
        if temperature is not None and self.scores_probabilities:
            logits = logits / temperature
        return self.step(logits, state)

    def scores(self, exit_logits: torch.Tensor, temperatures: list[float] | None = None) -> torch.Tensor:
        """Score all exits.

        Args:
            exit_logits: (num_rows, num_exits, num_labels).
            temperatures: one per exit; `None`: 1.

        Returns:
            scores (num_rows, num_exits), float32.
        """
        state, columns = (), []
        for index, logits in enumerate(exit_logits.unbind(1)):
            scores, state = self.score(logits, state, temperatures[index] if temperatures else None)
            columns.append(scores)
        return torch.stack(columns, 1)

    @classmethod
    def choices(cls, exit_logits: torch.Tensor) -> list[dict]:
        """The values of its parameters that calibration tries if the user gives none.

        Args:
            exit_logits: logits of the calibration rows (num_rows, num_exits, num_labels).

        Returns:
            a list of dicts of parameters.
        """
        return [{}]

    def check(self, problem_type: str) -> None:
        """Check that the criterion can score a kind of problem.

        Args:
            problem_type: as in the config.

        Raises:
            ExitConfigurationError: it cannot; the message names criteria that can.
        """
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

    highest = 1e-6  # it can be rounded to a number above 0

    def step(self, logits, state):
        # 0 log 0 is 0.
        log_probabilities = logits.log_softmax(-1).clamp(min=torch.finfo(logits.dtype).min)
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
    """The least confident of several labels, each with its own probability p: min over labels of max(p, 1 - p)."""

    problem_types = ("multi_label_classification",)

    def step(self, logits, state):
        return logits.abs().amin(-1).sigmoid(), state


@register_criterion("patience")
class Patience(ExitCriterion):
    """How many exits in a row, up to this one, agree with the exit before (PABEE, Zhou et al., NeurIPS 2020).

    Two exits agree if they predict the same class; in regression, if their predictions differ by less than
    `tolerance`, in units of the labels. Calibration tries the deciles of these differences. The first exit scores 0.
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
        broken = _is_undefined(logits)
        # Such an exit predicts nothing that a later exit could agree with.
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
    """The number of exits up to this one that predict the class which most of them predict."""

    scores_probabilities = False
    remembers = True

    def highest_score(self, exit_index):
        return exit_index + 1

    def step(self, logits, state):
        broken = _is_undefined(logits)
        classes = torch.arange(logits.shape[-1], device=logits.device)
        vote = (logits.argmax(-1, keepdim=True) == classes).to(logits.dtype)  # `one_hot` would read from the device
        vote = vote.masked_fill(broken.unsqueeze(-1), 0.0)
        votes = vote + state[0] if state else vote
        return votes.amax(-1).masked_fill(broken, float("nan")), (votes,)


def _is_undefined(logits: torch.Tensor) -> torch.Tensor:
    """The rows (num_rows,) of logits (num_rows, num_labels) that are no prediction."""
    return logits.isnan().any(-1) | logits.amax(-1).isinf()


def decide(
    criterion: ExitCriterion,
    logits: torch.Tensor,
    state: tuple,
    threshold: float | torch.Tensor,
    temperature: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple]:
    """Decide which examples exit.

    Args:
        criterion: the criterion.
        logits: (batch, num_labels).
        state: the criterion's state of these examples; `()` at the first exit.
        threshold: of the exit: a number, or one per example (batch,).
        temperature: of the exit: a number, or one per example (batch, 1); `None`: 1.

    Returns:
        (batch,) bool, true for those that exit, and the state for the next exit.
    """
    scores, state = criterion.score(logits, state, temperature)
    return scores >= threshold, state
