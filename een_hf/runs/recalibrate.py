"""Another exit policy for a finished run, from its saved logits, without running the model."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, PreTrainedConfig

from ..calibration import CalibrationReport, calibrate, policy_row
from ..errors import in_one_line
from ..evaluation import (
    METRICS,
    ExitCosts,
    load_exit_logits,
    make_compute_metrics,
    plot_exit_curves,
    read_exit_results,
    write_exit_results,
)
from ..evaluation.metrics import check_labels
from ..hub import refresh_model_card
from ..models import ExitConfigurationError
from ..models.criteria import find_criterion, resolve_problem_type
from ..models.exit_config import is_early_exit_config
from ..training.arguments import CalibrationArguments
from ..training.history import read_run
from .costs import fitting_criterion
from .results import CALIBRATION_PARTS


@dataclass(frozen=True, repr=False)
class RunCalibration:
    """Another policy for a finished run.

    Args:
        report: the policy and its results on the calibration rows.
        results: content of `exit_results.json` with this policy; unchanged if there is none.
    """

    report: CalibrationReport
    results: dict[str, Any]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.report.message})"


def calibrate_run(
    run: str | os.PathLike,
    *,
    target_cost: float | None = None,
    max_risk: float | None = None,
    risk: str | None = None,
    risk_confidence: float = 0.9,
    exit_criterion: str | None = None,
    seed: int | None = None,
    save: bool = False,
) -> RunCalibration:
    """Choose an exit policy from the saved logits of a run, as the command `een-hf calibrate` does.

    The calibration rows of the run are used again, and the other rows measure the policy.

    Args:
        run: output folder of a training run with `--do_eval`.
        target_cost: choose the best policy whose average cost is at most this share of the plain model's cost.
        max_risk: choose the cheapest policy whose risk is certified to be at most this (give one of the two).
        risk: the risk that `max_risk` limits: `accuracy_gap`, `consistency` or `hamming`.
        risk_confidence: confidence of the certificate.
        exit_criterion: a registered criterion, or `package.module:Class`; default: the run's.
        seed: seed of the permutation that divides the calibration rows into those that search and those that certify;
            default: the run's.
        save: whether to write the policy into the folder: config, results, plot and model card.

    Returns:
        the policy, and the results of the run with it.

    Raises:
        ExitConfigurationError: a folder without results, logits or config, or a target that cannot be met.

    Example:
        >>> een_hf.calibrate_run("runs/mine", target_cost=0.8)
        RunCalibration(At ... of the full cost: accuracy ... on ... calibration rows.)
    """
    folder = Path(run)
    results, config = read_exit_results(folder), _load_config(folder)
    settings = (read_run(folder) or {}).get("settings", {})
    problem_type = resolve_problem_type(config.problem_type, config.num_labels)
    criterion = settings.get("exit_criterion", CalibrationArguments.exit_criterion)
    given = exit_criterion and find_criterion(exit_criterion)
    wanted = CalibrationArguments(
        exit_criterion=given or fitting_criterion(criterion, problem_type, required=False) or criterion,
        target_cost=target_cost,
        max_risk=max_risk,
        risk=risk,
        risk_confidence=risk_confidence,
    )
    parts = results.get("exit_costs")
    costs = ExitCosts(**parts) if parts else [entry["relative_cost"] for entry in results["anytime"]]
    calibration, reported = _load_rows(folder, config.num_labels, problem_type, len(costs))
    report = calibrate(
        *calibration,
        costs,
        **wanted.of_policy(),
        problem_type=problem_type,
        seed=settings.get("seed", 42) if seed is None else seed,
        chosen_by=results.get("calibration_rows_chose"),
    )
    if report.policy is None:
        return RunCalibration(report, results)
    report.policy.validate(len(config.exit_layers), problem_type, config.num_labels)
    metrics = [name for name in METRICS if name in results["anytime"][0]["metrics"]]
    row = policy_row(report.policy, *reported, costs, make_compute_metrics(metrics, problem_type))
    results |= {"policy": row, "num_report_samples": len(reported[1])}
    if save:
        write_exit_results(folder, results)  # first, as it changes nothing if the folder cannot be written
        config.exit_policy = report.policy.to_dict()
        config.save_pretrained(folder)
        plot_exit_curves(results, folder / "exit_curves.png")
        refresh_model_card(folder, results, config, settings)
    return RunCalibration(report, results)


def _load_config(folder: Path) -> PreTrainedConfig:
    if not (folder / "config.json").is_file():
        raise ExitConfigurationError(
            f"{folder} holds no config.json, because the run evaluated a model of another folder. Repeat the run with "
            "--target_cost, or with the folder of the model as --output_dir."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ExitConfigurationError(f"{folder}/config.json cannot be read: {in_one_line(error)}") from error
    if not is_early_exit_config(config):
        raise ExitConfigurationError(f"{folder}/config.json is of a {config.model_type} model, which has no exits.")
    return config


def _load_rows(
    folder: Path, num_labels: int, problem_type: str, num_exits: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Logits and labels of the calibration rows, and of the other rows."""
    saved = load_exit_logits(folder)
    num_rows, *found = saved["logits"].shape
    wanted = (("exits", num_exits, "exit_results.json"), ("labels", num_labels, "config.json"))
    for count, (what, number, file) in zip(found, wanted, strict=True):
        if count != number:
            raise ExitConfigurationError(
                f"{folder}: exit_logits.npz has {count} {what}, but {file} has {number}: they are of different runs."
            )
    calibrates = np.isin(saved["part"], CALIBRATION_PARTS)
    if not calibrates.any():
        raise ExitConfigurationError(
            f"{folder}/exit_logits.npz has no calibration rows: those of the run had no labels and were not saved. "
            "Repeat the run with --target_cost or --max_risk."
        )
    if calibrates.all():
        raise ExitConfigurationError(f"{folder}/exit_logits.npz has only calibration rows: none measures a policy.")
    try:
        check_labels(saved["labels"], num_rows, num_labels, problem_type)
    except ExitConfigurationError as error:
        raise ExitConfigurationError(f"{folder}/exit_logits.npz: {error}") from error
    return tuple((saved["logits"][rows], saved["labels"][rows]) for rows in (calibrates, ~calibrates))
