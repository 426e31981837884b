"""The relative costs of the exits in a run: operations, or time on this machine (`--cost latency`)."""

from typing import Any

from accelerate.utils import broadcast_object_list

from ..evaluation import ExitCosts, cost_inputs, relative_costs, relative_latencies
from ..models.criteria import fitting_criteria, get_criterion
from ..training.arguments import CalibrationArguments, CostUnit
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
        inputs = cost_inputs(rows)
        if self.wanted.cost == CostUnit.OPERATIONS:
            return relative_costs(self.trainer.network, **inputs)
        if self._measured is None:
            criterion = fitting_criterion(self.wanted.exit_criterion, self.problem_type, required=False)
            settings = {"batch_size": self.wanted.latency_batch_size} | ({"criterion": criterion} if criterion else {})
            model = self.trainer.network_for_inference()
            with self.trainer.accelerator.autocast():
                measured = [relative_latencies(model, **settings, **inputs)]
            self._measured, self.latency = broadcast_object_list(measured)[0]  # the first process measures for all
        return self._measured
