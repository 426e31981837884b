"""The exit policy: a criterion and thresholds.

An example exits at the first exit whose score is at least that exit's threshold; the last exit answers all examples
that remain. An example never exits early if its score is NaN.
"""

import json
import math
import reprlib
from dataclasses import dataclass, field, fields
from functools import cached_property

import numpy as np
import torch

from .criteria import ExitCriterion, decide, get_criterion, is_number, resolve_problem_type
from .registries import ExitConfigurationError


# A threshold that no score reaches, and that JSON can store.
NEVER = 1e30
# Beyond these a float32 softmax is one-hot, NaN or uniform whatever the logits are.
TEMPERATURE_RANGE = (1e-4, 1e4)


def _plain_numbers(values, limit: float):
    """A list, array or tensor of numbers as a list of floats from -`limit` to `limit`; other values unchanged."""
    if isinstance(values, np.ndarray | torch.Tensor):
        values = values.tolist()
    if not isinstance(values, list | tuple):
        return values
    values = [value.item() if isinstance(value, np.generic | torch.Tensor) else value for value in values]
    return [max(-limit, min(limit, float(value))) if is_number(value) else value for value in values]


@dataclass(frozen=True)
class ExitPolicy:
    """A criterion and thresholds: they decide at which exit each example exits.

    Args:
        criterion: a registered name, for example `confidence`.
        thresholds: one per exit; an example exits at the first exit whose score is at least its threshold. The last
            threshold is ignored: the last exit answers all examples that remain. `NEVER` is a threshold that no score
            reaches.
        temperatures: one per exit, or `None`; logits are divided by them before scoring, and before the confidence of
            answers is computed.
        params: the criterion's parameters.
        calibrated_for: the target that the thresholds were chosen for, for example `{"target_cost": 0.5}`.
        guarantee: what is certified about the policy, or `None`.
        confidence_temperatures: one per exit, for the confidence of answers only. Set if `temperatures` is `None`
            because calibration found better decisions without temperatures.

    Raises:
        ExitConfigurationError: a criterion or parameter that is not known, or no thresholds.

    Example:
        >>> policy = een_hf.ExitPolicy("confidence", thresholds=[0.9, 0.8, 0.0])
        >>> exit_logits = torch.tensor([[[4.0, 0.0], [5.0, 0.0], [6.0, 0.0]], [[0.0, 0.1], [0.0, 0.2], [0.0, 0.3]]])
        >>> policy.exits_of(exit_logits)  # 0-based
        tensor([0, 2])
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
                f"ExitPolicy({self.criterion!r}) needs thresholds, one per exit: `calibrate` chooses them, and "
                "ExitPolicy.from_results(path, target_cost=0.5) reads those of a run."
            )

    @cached_property
    def scorer(self) -> ExitCriterion:
        """The criterion with its parameters."""
        return get_criterion(self.criterion, self.params)

    def to_dict(self) -> dict:
        """Convert to a plain dict.

        Returns:
            the fields, ready for strict JSON: thresholds above `NEVER`, also infinite ones, become `NEVER`. Values
            that are no numbers are kept, so that `validate` can name them.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["thresholds"] = _plain_numbers(self.thresholds, NEVER)
        for name in ("temperatures", "confidence_temperatures"):
            values[name] = _plain_numbers(values[name], math.inf)
        return values

    @classmethod
    def from_dict(cls, values: dict) -> "ExitPolicy":
        """Convert from a dict.

        Args:
            values: a dict as `to_dict` returns it; optional keys may be missing.

        Returns:
            the policy.

        Raises:
            ExitConfigurationError: `values` is no dict, has an unknown key, or lacks criterion or thresholds.
        """
        if not isinstance(values, dict):
            raise ExitConfigurationError(
                f"exit_policy must be a dict as ExitPolicy.to_dict returns it, not {reprlib.repr(values)}."
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
        """Read a policy from the results of a run.

        Args:
            path: an `exit_results.json`.
            target_cost: read the policy of the largest budget up to this relative cost; `None`: the policy that was
                calibrated.

        Returns:
            the policy.

        Raises:
            ExitConfigurationError: the file cannot be read, or contains no such policy; the message lists the budgets
                that it contains.
        """
        try:
            with open(path, encoding="utf-8") as file:
                results = json.load(file)
        except (OSError, ValueError, RecursionError) as error:
            raise ExitConfigurationError(f"{path} cannot be read as the results of a run: {error}") from error
        if not isinstance(results, dict):
            raise ExitConfigurationError(f"{path} does not contain the results of a run.")
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
                raise ExitConfigurationError(f"{path} has no budget up to {target_cost}; its budgets are: {known}.")
            found = {**fitting[-1], "calibrated_for": {"target_cost": fitting[-1]["target_cost"]}}
        if found is None:
            raise ExitConfigurationError(f"{path} has no calibrated policy: name a budget, as in target_cost=0.5.")
        if not isinstance(found, dict):
            raise ExitConfigurationError(f"{path}: `policy` must be a dict, not {reprlib.repr(found)}.")
        if "criterion" in results:
            found = {"criterion": results["criterion"], **found}
        return cls.from_dict({f.name: found[f.name] for f in fields(cls) if f.name in found})

    def validate(self, num_exits: int, problem_type: str | None, num_labels: int) -> None:
        """Check that the policy fits a model.

        Args:
            num_exits: number of exits.
            problem_type: the problem type of the model's config; `None`: it follows from the number of labels.
            num_labels: number of labels.

        Raises:
            ExitConfigurationError: the policy does not fit; the message says what would.
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
                "exit_policy has temperatures, which have no meaning in regression: leave them out."
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
        """Whether examples can exit at an exit.

        Args:
            exit_index: 0-based.

        Returns:
            whether some score reaches the threshold.
        """
        return self.thresholds[exit_index] <= self.scorer.highest_score(exit_index)

    def evaluated_early_exits(self) -> list[int]:
        """The exits before the last that must be evaluated.

        Returns:
            0-based exits at which examples can exit; all if the criterion remembers earlier exits.
        """
        early = range(len(self.thresholds) - 1)
        return [*early] if self.remembers else [index for index in early if self.lets_exit(index)]

    def decide(self, exit_index: int, logits: torch.Tensor, state: tuple) -> tuple[torch.Tensor, tuple]:
        """Decide which examples exit at an exit before the last.

        Args:
            exit_index: 0-based.
            logits: (batch, num_labels).
            state: the criterion's state of these examples; `()` at the first exit.

        Returns:
            (batch,) bool, true for those that exit, and the state for the next exit.
        """
        temperature = self.temperatures[exit_index] if self.temperatures else None
        return decide(self.scorer, logits, state, self.thresholds[exit_index], temperature)

    def temper(self, logits: torch.Tensor, exit_index: torch.Tensor) -> torch.Tensor:
        """Divide the logits of answers by the temperature of their exits.

        Args:
            logits: (..., num_labels).
            exit_index: (...), int64, the 0-based exit of each answer.

        Returns:
            logits (..., num_labels); unchanged if the policy has no temperatures.
        """
        temperatures = self.confidence_temperatures or self.temperatures
        if temperatures is None:
            return logits
        return logits / torch.tensor(temperatures, dtype=logits.dtype, device=logits.device)[exit_index].unsqueeze(-1)

    def scores(self, exit_logits: torch.Tensor) -> torch.Tensor:
        """Score all exits.

        Args:
            exit_logits: (num_rows, num_exits, num_labels).

        Returns:
            scores (num_rows, num_exits).
        """
        return self.scorer.scores(exit_logits, self.temperatures)

    def exits_of(self, exit_logits: torch.Tensor) -> torch.Tensor:
        """The exit that each row takes.

        Args:
            exit_logits: (num_rows, num_exits, num_labels).

        Returns:
            (num_rows,), int64, 0-based.
        """
        scores = self.scores(exit_logits)
        exits = scores >= torch.tensor(self.thresholds, dtype=scores.dtype, device=scores.device)
        exits[:, -1] = True
        return exits.int().argmax(1)
