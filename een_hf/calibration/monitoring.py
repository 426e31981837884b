"""Monitoring of a certified risk in service, by a test that may be evaluated after every audited example."""

import math
from collections.abc import Iterable

import numpy as np

from ..models import ExitConfigurationError


# The alternative means of the test, each as the ratio of its odds to the odds of the limit.
_ODDS_RATIOS = np.array([1.25, 1.5, 2.0, 3.0, 5.0, 9.0])
_MOST = 1e300  # capital is capped, so that it stays finite
AUDITED_RISKS = ("consistency", "hamming")


class RiskMonitor:
    """Raises an alarm when the mean of a stream of values in [0, 1] exceeds a limit.

    The probability that there is ever a false alarm is at most `1 - confidence`, however often the monitor is asked
    and however long it runs. An alarm is false if the expectation of each value, given those before it, is at most the
    limit; this holds for exchangeable examples of a policy whose risk is within its limit.

    The test is a bet against the limit. A bet starts at some value s with a capital of 1, for an alternative mean
    p > limit. After value t its capital is the product over i = s..t of 1 + lambda * (x_i - limit), with
    lambda = (p - limit) / (limit * (1 - limit)). It grows if the values average more than the limit; otherwise its
    expectation never rises. The total capital is spread over six alternatives and over all starts (so that values
    before a change do not hide it). By Ville's inequality it reaches `1 / (1 - confidence)` with a probability of at
    most `1 - confidence`.

    Args:
        limit: limit of the risk, between 0 and 1.
        confidence: probability that there is no false alarm.

    Raises:
        ExitConfigurationError: numbers out of range.

    Example:
        >>> monitor = een_hf.calibration.RiskMonitor(limit=0.02)
        >>> monitor.update([0, 0, 1, 0])  # whether the policy differed from the last exit
        False

    References:
        Waudby-Smith and Ramdas, Estimating means of bounded random variables by betting, JRSS B 86(1), 2024, section 4
        (the capital process). Podkopaev and Ramdas, Tracking the risk of a deployed model and detecting harmful
        distribution shifts, ICLR 2022 (its use in service). Shin, Ramdas and Rinaldo, E-detectors, NEJSDS 2(2), 2024
        (the sum over starts).
    """

    def __init__(self, limit: float, confidence: float = 0.95):
        for name, value in (("limit", limit), ("confidence", confidence)):
            if not 0 < value < 1:
                raise ExitConfigurationError(f"RiskMonitor: {name} must be between 0 and 1, not {value}.")
        self.limit, self.confidence = float(limit), float(confidence)
        self.num_values, self.total = 0, 0.0
        self.alarm_at: int | None = None
        self._bets = bets_against(self.limit)
        self._capital = np.zeros(len(self._bets))

    @classmethod
    def of_guarantee(cls, guarantee: dict, confidence: float = 0.95) -> "RiskMonitor":
        """The monitor of a certified policy, for values that need no labels.

        Args:
            guarantee: `ExitPolicy.guarantee`.
            confidence: probability that there is no false alarm.

        Returns:
            a monitor with the limit of the guarantee.

        Raises:
            ExitConfigurationError: the guarantee is about a risk that needs labels (`accuracy_gap`): create a
                `RiskMonitor` with a limit for a risk that you can observe.
        """
        if guarantee["risk"] not in AUDITED_RISKS:
            raise ExitConfigurationError(
                f"The guarantee is about {guarantee['risk']}, which needs labels, but audits measure how often the "
                f"policy differs from the last exit. Give a limit for that, or certify --risk {AUDITED_RISKS[0]}."
            )
        return cls(guarantee["limit"], confidence)

    def update(self, values: float | Iterable[float]) -> bool:
        """Add the next values.

        Args:
            values: one or several values in [0, 1], in the order in which their examples arrived.

        Returns:
            `alarm`.

        Raises:
            ExitConfigurationError: a value outside [0, 1].
        """
        values = np.atleast_1d(np.asarray(values, dtype=np.float64))
        if not ((values >= 0) & (values <= 1)).all():
            raise ExitConfigurationError("RiskMonitor takes values in [0, 1].")
        for value in values:
            self.num_values += 1
            self.total += value
            self._capital = bet(self._capital, self._bets, value - self.limit, self.num_values)
            if self.alarm_at is None and self.evidence >= 1 / (1 - self.confidence):
                self.alarm_at = self.num_values
        return self.alarm

    @property
    def alarm(self) -> bool:
        """Whether there has been an alarm. `alarm_at` is the number of values at which it was raised."""
        return self.alarm_at is not None

    @property
    def evidence(self) -> float:
        """The capital: its mean is at most 1 while the limit holds; at `1 / (1 - confidence)` there is an alarm."""
        return float(evidence_of(self._capital, self.num_values))

    @property
    def mean(self) -> float:
        """The mean of the values so far; NaN before the first."""
        return self.total / self.num_values if self.num_values else math.nan

    def expected_delay(self, risk: float, after: int = 0) -> int:
        """Estimate how many values it takes until an alarm, once the risk has risen.

        Args:
            risk: the new mean of the values, above the limit.
            after: number of values within the limit before the change.

        Returns:
            number of values after the change.

        Raises:
            ExitConfigurationError: a risk that does not exceed the limit.
        """
        if not self.limit < risk <= 1:
            raise ExitConfigurationError(f"expected_delay: risk must be above the limit {self.limit}, not {risk}.")
        growth = risk * np.log1p(self._bets * (1 - self.limit)) + (1 - risk) * np.log1p(-self._bets * self.limit)
        needed = -math.log(1 - self.confidence) + math.log(len(self._bets)) - math.log(_start_weight(after + 1))
        return math.ceil(needed / growth.max())


def disagreement(answers: np.ndarray, last: np.ndarray, problem_type: str, risk: str = "consistency") -> np.ndarray:
    """How much answers differ from those of the last exit.

    Args:
        answers: logits of the answers (num_rows, num_labels): an array, or a tensor on the CPU.
        last: logits of the last exit (num_rows, num_labels).
        problem_type: `single_label_classification` or `multi_label_classification`.
        risk: `consistency`: 1 if any label differs; `hamming`: the share of labels that differ.

    Returns:
        (num_rows,), each in [0, 1].
    """
    answers, last = np.asarray(answers), np.asarray(last)
    if problem_type == "single_label_classification":
        return (answers.argmax(-1) != last.argmax(-1)).astype(np.float64)
    differs = (answers > 0) != (last > 0)
    return differs.mean(-1) if risk == "hamming" else differs.any(-1).astype(np.float64)


def bets_against(limit: float) -> np.ndarray:
    """The lambda (num_bets,) of each alternative to the limit."""
    odds = _ODDS_RATIOS * limit / (1 - limit)
    alternatives = odds / (1 + odds)
    return (alternatives - limit) / (limit * (1 - limit))


def _start_weight(number: int) -> float:
    """The capital of the bet that starts at this value, counted from 1; all later bets share 1 / log2(number + 2)."""
    return 1 / math.log2(number + 1) - 1 / math.log2(number + 2)


def bet(capital: np.ndarray, bets: np.ndarray, surplus: float | np.ndarray, number: int) -> np.ndarray:
    """The capital (..., num_bets) after a value, counted from 1, that exceeds the limit by `surplus` (...)."""
    growth = 1 + bets * np.asarray(surplus)[..., None]
    return np.minimum((capital + _start_weight(number)) * growth, _MOST)


def evidence_of(capital: np.ndarray, number: int) -> np.ndarray:
    """The total of the capital (..., num_bets) after so many values, including that of bets which start later."""
    return capital.mean(-1) + 1 / math.log2(number + 2)
