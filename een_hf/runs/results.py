"""The content of `exit_results.json`: every exit evaluated, budgets, and the policy that calibration chose."""

from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import train_test_split

from ..calibration import CalibrationReport, budgeted_curve, calibrate, policy_row
from ..evaluation import anytime_table, cost_inputs, count_operations
from ..training.trainer import EarlyExitTrainer
from .arguments import RunArguments
from .costs import RunCosts, fitting_criterion
from .rows import RunRows


# Values of `part` in exit_logits.npz for calibration rows, of the evaluation split or others; the rest is "report".
CALIBRATION_PARTS = ("calibration", "held_out")


@dataclass
class ExitOutputs:
    """The logits of every exit on the rows of a run.

    Args:
        logits: (num_rows, num_exits, num_labels), of the evaluation split.
        labels: (num_rows,), or (num_rows, num_labels) for multi-label problems.
        calibrates: (num_rows,) bool, the rows of the evaluation split that are used for calibration.
        held_out: logits and labels of other calibration rows; labels are `None` if there are none. `None`: part of the
            evaluation split is used for calibration.
    """

    logits: np.ndarray
    labels: np.ndarray
    calibrates: np.ndarray
    held_out: tuple[np.ndarray, np.ndarray | None] | None

    @property
    def calibration(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Logits and labels of the calibration rows."""
        return self.held_out or (self.logits[self.calibrates], self.labels[self.calibrates])

    @property
    def reported(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits and labels of the evaluation rows that are not used for calibration."""
        return self.logits[~self.calibrates], self.labels[~self.calibrates]

    def to_save(self, row_ids: np.ndarray) -> list[np.ndarray]:
        """Columns of exit_logits.npz: logits, labels, row ids and part.

        Args:
            row_ids: (num_rows,), of the evaluation split.
        """
        columns = [self.logits, self.labels, row_ids, np.where(self.calibrates, "calibration", "report")]
        if self.held_out is None or self.held_out[1] is None:
            return columns
        # Rows outside the evaluation split, numbered from 0; `een-hf calibrate` uses them.
        count = len(self.held_out[1])
        extra = [*self.held_out, np.arange(count), np.full(count, "held_out")]
        return [np.concatenate(pair) for pair in zip(columns, extra, strict=True)]


def split_for_calibration(labels: np.ndarray, problem_type: str, seed: int) -> np.ndarray:
    """A random half of the rows for calibration, stratified by class if there are classes: (num_rows,) bool."""
    rows = np.arange(len(labels))
    stratify = None
    if problem_type == "single_label_classification":
        counts = np.unique(labels, return_counts=True)[1]
        stratify = labels if counts.min() >= 2 and len(counts) <= len(rows) // 2 else None
    chosen, _ = train_test_split(rows, train_size=0.5, random_state=seed, stratify=stratify)
    return np.isin(rows, chosen)


def set_apart(
    trainer: EarlyExitTrainer, rows: RunRows, logits: np.ndarray, labels: np.ndarray, seed: int
) -> ExitOutputs:
    """Divide evaluated rows into those for calibration and those that are reported."""
    if rows.calibration is None:
        calibrates = split_for_calibration(labels, rows.data.problem_type, seed)
        return ExitOutputs(logits, labels, calibrates, None)
    found = trainer.predict_exits(rows.calibration, "calibration")
    return ExitOutputs(logits, labels, np.zeros(len(labels), dtype=bool), (found.predictions, found.label_ids))


def make_results(
    args: RunArguments,
    trainer: EarlyExitTrainer,
    rows: RunRows,
    outputs: ExitOutputs,
    run_costs: RunCosts,
    chosen_by: str | None,
) -> tuple[dict, CalibrationReport | None]:
    """Compute the content of `exit_results.json`, and calibrate if a policy is requested.

    Args:
        args: flags of the run.
        trainer: the trainer, with the model and its metrics.
        rows: rows of the run.
        outputs: logits of every exit.
        run_costs: relative costs of the exits.
        chosen_by: what else was chosen on the calibration rows; then there is no guarantee.

    Returns:
        the content of the file, and the result of calibration; `None` if no policy is requested.
    """
    wanted, config, problem_type = args.calibration, trainer.model.config, rows.data.problem_type
    compute_metrics, reported = trainer.task_metrics, outputs.reported
    costs = run_costs.of(rows.counted)
    criterion = fitting_criterion(wanted.exit_criterion, problem_type, required=args.asks_for_policy)
    settings = {"criterion": criterion, "problem_type": problem_type}
    budgeted, report, policy = [], None, None
    if criterion is not None:
        budgeted = budgeted_curve(outputs.calibration, reported, costs, compute_metrics, **settings)
    if args.asks_for_policy:
        choice = wanted.of_policy() | settings
        report = calibrate(*outputs.calibration, costs, seed=args.training.seed, chosen_by=chosen_by, **choice)
        if report.policy is not None:
            policy = policy_row(report.policy, *reported, costs, compute_metrics)
    table = {
        "relative_costs": costs,
        "exit_layers": config.exit_layers,
        "compute_metrics": compute_metrics,
        "problem_type": problem_type,
    }
    results = {
        "method": config.training_scheme or "unknown",
        "model_type": config.stock_model_type,
        "dataset": rows.data.dataset,
        "task_name": rows.data.task_name,
        "metric": rows.data.metrics[0],
        "exit_layers": config.exit_layers,
        "num_eval_samples": len(outputs.labels),
        "num_calibration_samples": len(outputs.calibration[0]),
        "num_report_samples": len(reported[1]),  # of the evaluation rows, those that calibrated nothing
        "calibration_rows_chose": chosen_by,
        "cost_unit": wanted.cost.value,
        "exit_costs": costs.to_dict(),
        "latency": run_costs.latency,
        "plain_operations": count_operations(trainer.model, **cost_inputs(rows.splits["validation"]))[1],
        "anytime": anytime_table(outputs.logits, outputs.labels, **table),
        "anytime_report": anytime_table(*reported, **table),
        "budgeted": budgeted,
        "policy": policy,
    }
    return results, report
