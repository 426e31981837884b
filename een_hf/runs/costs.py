"""The relative costs of the exits in a run: operations, or time on this machine (`--cost latency`)."""

from typing import Any

from ..evaluation import ExitCosts
from ..models.criteria import fitting_criteria, get_criterion
from ..training.arguments import CalibrationArguments
from ..training.trainer import EarlyExitTrainer


def fitting_criterion(name: str, problem_type: str, required: bool) -> str | None:
    """The criterion, if it fits the problem; else an error if it is required, else one that fits, or `None`."""
    criterion, fitting = get_criterion(name), fitting_criteria(problem_type)
    if required or name in fitting:
        criterion.check(problem_type)
        return name
    return fitting[0] if fitting else None


class RunCosts:
    """The relative cost of every exit; latencies are measured once and used for all rows.

    Args:
        trainer: the trainer of the run; latencies are measured on its device and in its precision.
        wanted: unit of cost, criterion and batch size.
        problem_type: problem type of the data.

    Attributes:
        latency: device, batch size and time of the measurement; `None` for operations.
    """

    def __init__(self, trainer: EarlyExitTrainer, wanted: CalibrationArguments, problem_type: str):
        self.trainer, self.wanted, self.problem_type = trainer, wanted, problem_type
        self.latency: dict | None = None
        self._measured: ExitCosts | None = None

    def of(self, rows: Any) -> ExitCosts:
        """The costs at the mean length (text) or size (images) of these encoded rows."""
        if self._measured is not None:
            return self._measured
        wanted, criterion = self.wanted, fitting_criterion(self.wanted.exit_criterion, self.problem_type, False)
        decides = {"criterion": criterion} if criterion else {}
        costs, self.latency = self.trainer.costs_of(rows, wanted.cost, wanted.latency_batch_size, **decides)
        self._measured = costs if self.latency else None
        return costs
