"""Auditing: a random share of the rows continues to the last exit after its answer, to monitor the certified risk."""

import logging
import random
from collections import deque

from ..calibration.monitoring import AUDITED_RISKS, RiskMonitor, disagreement
from ..models import EarlyExitMixin, ExitConfigurationError
from ..models.criteria import resolve_problem_type
from .stages import Row


logger = logging.getLogger(__name__)


class Auditor:
    """Chooses rows at random, compares their answers with those of the last exit, and passes the result to a monitor.

    Args:
        model: an early-exit model; its own policy is audited.
        rate: share of the rows that is audited, above 0, at most 1.
        limit: the largest allowed share of answers that differ from the last exit's; `None`: the limit that the
            policy's guarantee certifies.
        confidence: probability that there is no false alarm.
        on_alarm: `log`: write one line to the log; `full`: also stop early exits from then on.
        seed: seed of the random choice; `None`: a different choice in each process.

    Raises:
        ExitConfigurationError: there is no limit, the model has no policy, or the problem cannot be audited.
    """

    def __init__(
        self,
        model: EarlyExitMixin,
        rate: float,
        limit: float | None = None,
        confidence: float = 0.95,
        on_alarm: str = "log",
        seed: int | None = None,
    ):
        policy = model.get_exit_policy()
        self.problem_type = resolve_problem_type(model.config.problem_type, model.config.num_labels)
        if not 0 < rate <= 1:
            raise ExitConfigurationError(f"audit_rate must be between 0 and 1, not {rate}.")
        if on_alarm not in ("log", "full"):
            raise ExitConfigurationError(f"on_alarm is log or full, not {on_alarm!r}.")
        if policy is None:
            raise ExitConfigurationError("audit_rate: the model has no exit policy that could be audited.")
        if self.problem_type == "regression":
            raise ExitConfigurationError("audit_rate counts other answers and does not fit regression.")
        guarantee = policy.guarantee or {}
        self.risk = guarantee.get("risk") if guarantee.get("risk") in AUDITED_RISKS else AUDITED_RISKS[0]
        if limit is None and not guarantee:
            raise ExitConfigurationError(
                "audit_rate: the policy certifies nothing. Give audit_limit, the share of answers that may differ "
                "from the last exit's, or certify a policy: --max_risk with --risk consistency."
            )
        self.rate, self.on_alarm = rate, on_alarm
        self.monitor = RiskMonitor.of_guarantee(guarantee, confidence) if limit is None else None
        self.monitor = self.monitor or RiskMonitor(limit, confidence)
        self._random, self._open = random.Random(seed), deque()

    @property
    def stops_exits(self) -> bool:
        """Whether there has been an alarm after which no example exits early."""
        return self.monitor.alarm and self.on_alarm == "full"

    def summary(self) -> dict:
        """The state of the audit.

        Returns:
            risk, limit, rate, number of audited rows, their disagreement, alarm and whether examples exit early; ready
            for JSON.
        """
        monitor = self.monitor
        return {
            "risk": self.risk,
            "limit": monitor.limit,
            "rate": self.rate,
            "audited": monitor.num_values,
            "disagreement": monitor.mean if monitor.num_values else None,
            "alarm": monitor.alarm,
            "early_exit": not self.stops_exits,
        }

    def choose(self, rows: list[Row]) -> None:
        """Choose among new rows those that are audited, and mark them.

        Args:
            rows: the rows of one request.
        """
        for row in rows:
            if row.request.own_policy and self._random.random() < self.rate:
                row.audited = True
                self._open.append(row)

    def settle(self) -> list[float]:
        """Compare the audited rows that have reached the last exit, in the order of their requests.

        A row waits for those before it, even if it was finished first: otherwise rows that take less time would be
        counted first, and whether a row takes long is not independent of whether the exits agree on it.

        Returns:
            for each row the disagreement of its answer with the last exit, between 0 and 1.
        """
        settled = []
        while self._open and (not self._open[0].audited or self._open[0].last_logits is not None):
            row = self._open.popleft()
            if row.audited:
                pair = (row.logits[None].numpy(), row.last_logits[None].numpy())
                settled.append(float(disagreement(*pair, self.problem_type, self.risk)[0]))
                self._tell(settled[-1])
        return settled

    def _tell(self, value: float) -> None:
        before = self.monitor.alarm
        if self.monitor.update(value) and not before:
            logger.warning(
                "The exit policy differs from the last exit more often than its limit of %g: %.4f of %d audited rows. "
                "Calibrate again on data as they are now.",
                self.monitor.limit, self.monitor.mean, self.monitor.num_values,
            )  # fmt: skip
