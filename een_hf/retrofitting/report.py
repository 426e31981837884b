"""The result of a retrofit, and its files."""

import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from transformers.utils import SAFE_WEIGHTS_NAME

from ..calibration import CalibrationReport
from ..evaluation import ExitCosts, save_exit_logits
from ..evaluation.saved_logits import LOGITS_NAME
from ..files import replacing, room_for
from ..hub import public_settings
from ..models import EarlyExitMixin, ExitPolicy
from ..training.history import RUN_FILE, write_run
from .arguments import RECORD_FILE, RetrofitArguments
from .features import ROOM
from .rows import RetrofitRows


@dataclass(repr=False)
class RetrofitReport:
    """The result of a retrofit; its model, with the policy, is also in `args.output_dir`.

    Args:
        args: the arguments of the retrofit.
        model: the model with trained exits, in eval mode, with the policy set.
        certified: the certified policy and its results on the rows that certify it.
        costs: relative costs of the exits, in the unit `args.cost`.
        latency: device, batch size and time of the measurement; `None` for operations.
        num_training_rows: number of rows that trained the exits.
        calibration_rows: (n,), 0-based numbers of the rows that certified the policy.
        columns: columns of text that were read; none for images.
        seconds: time of the timed rows, by name; the stock model first, `exits on` last.
    """

    args: RetrofitArguments
    model: EarlyExitMixin
    certified: CalibrationReport
    costs: ExitCosts
    latency: dict[str, Any] | None
    num_training_rows: int
    calibration_rows: np.ndarray
    columns: list[str]
    seconds: dict[str, float]

    @property
    def policy(self) -> ExitPolicy | None:
        """The certified policy with its guarantee; `None` if no policy that saves cost could be certified."""
        return self.certified.policy

    @property
    def relative_cost(self) -> float:
        """Average cost of an example under the policy, as a share of the plain model's cost."""
        return self.certified.relative_cost

    @property
    def message(self) -> str:
        """The result of calibration in one sentence, or why there is no policy."""
        return self.certified.message

    @property
    def summary(self) -> str:
        """The result in one line."""
        if self.policy is None:
            return f"No saving, the answers are those of your model: {self.message}"
        guarantee = self.policy.guarantee
        line = f"Agrees with your model on at least {100 * (1 - guarantee['limit']):.4g} % "
        line += f"(confidence {100 * guarantee['confidence']:.4g} %); {1 / self.relative_cost:.2f} x less "
        line += "time, measured" if self.latency else "compute"
        if self.seconds:
            saving = next(iter(self.seconds.values())) / self.seconds["exits on"]
            time = f"{saving:.2f} x less time" if saving >= 1 else f"but {1 / saving:.2f} x the time"
            line += f", {time} on this machine"
        return line

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.summary})"

    def to_record(self) -> dict[str, Any]:
        """Convert to a plain dict.

        Returns:
            the content of retrofit.json.
        """
        return {
            "arguments": public_settings(asdict(self.args)),
            "num_training_rows": self.num_training_rows,
            "num_calibration_rows": len(self.calibration_rows),
            "exit_layers": self.model.config.exit_layers,
            "relative_costs": self.costs,
            "exit_costs": self.costs.to_dict(),
            "cost_unit": self.args.cost,
            "latency": self.latency,
            "relative_cost": self.relative_cost,
            "exit_fractions": self.certified.exit_fractions,
            "policy": self.policy and self.policy.to_dict(),
            "message": self.message,
            "seconds": self.seconds,
        }


def save_model(args: RetrofitArguments, model: EarlyExitMixin, rows: RetrofitRows, policy: ExitPolicy | None) -> None:
    """Write the model and its tokenizer or image processor, and last its policy, which the model then has.

    So a run that is killed leaves no policy beside the weights of an earlier run.
    """
    with room_for(args.folder / SAFE_WEIGHTS_NAME, ROOM):
        model.save_pretrained(args.folder)
        rows.processor.save_pretrained(args.folder)
        model.set_exit_policy(policy)
        model.config.save_pretrained(args.folder)


def save_report(report: RetrofitReport, exit_logits: np.ndarray, history: list[dict | None]) -> None:
    """Write the certifying rows' logits, the record of the run and retrofit.json.

    Args:
        report: the result.
        exit_logits: (num_rows, num_exits, num_labels), of the certifying rows.
        history: flags of the runs that trained the model (`history_of`).
    """
    folder = report.args.folder
    with room_for(folder / LOGITS_NAME, ROOM):
        answers = exit_logits[:, -1].argmax(-1)
        save_exit_logits(folder, exit_logits, answers, report.calibration_rows, "calibration")
    with room_for(folder / RUN_FILE, ROOM):
        write_run(folder, asdict(report.args), trained=True, finished=True, history=history)
    with room_for(folder / RECORD_FILE, ROOM), replacing(folder / RECORD_FILE) as temporary:
        temporary.write_text(json.dumps(report.to_record(), indent=2))
