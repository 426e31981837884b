"""Choose an exit policy from the logits that a run saved; the model is not run.

een-hf calibrate runs/mine --target_cost 0.4          shows what a budget gives
een-hf calibrate runs/mine --target_cost 0.4 --save   writes it into the saved model

The same flags give the same policy as in the training run: the rows that calibrated there calibrate here, and the
others measure it. A certified risk (--max_risk) holds for one choice of flags made beforehand, not for the best of
several tries on the same rows.
"""

from pathlib import Path

import numpy as np
from transformers import AutoConfig

from ..calibration import calibrate, policy_row
from ..errors import in_one_line
from ..evaluation import (
    METRICS,
    ExitCosts,
    format_exit_table,
    load_exit_logits,
    make_compute_metrics,
    plot_exit_curves,
    read_exit_results,
    write_exit_results,
)
from ..hub import guarantee_in_words, refresh_model_card
from ..models import ExitConfigurationError
from ..models.configuration_een import is_early_exit_config
from ..models.policies import find_criterion
from ..runs.costs import fitting_criterion
from ..runs.results import CALIBRATION_PARTS
from ..training.arguments import CalibrationArguments, Risk
from ..training.history import read_run


def add_arguments(parser) -> None:
    parser.add_argument("run", metavar="RUN", help="output folder of a training run with --do_eval")
    parser.add_argument("--target_cost", type=float, help="the most accurate policy at this average relative cost")
    parser.add_argument("--max_risk", type=float, help="the cheapest policy whose risk is certified to stay below")
    parser.add_argument(
        "--risk",
        choices=[risk.value for risk in Risk],
        help="what --max_risk limits: last exit right and policy wrong (default), policy unlike the last exit, or, "
        "multi-label, share of labels in which it is",
    )
    parser.add_argument("--risk_confidence", type=float, default=0.9, help="of --max_risk; default: 0.9")
    parser.add_argument(
        "--exit_criterion",
        help="confidence, entropy, margin, patience, vote, multi-label: label_confidence, or package.module:Class; "
        "default: the run's",
    )
    parser.add_argument("--seed", type=int, help="parts searching from certifying rows; default: the run's")
    parser.add_argument(
        "--save", action="store_true", help="write the policy into RUN: config, results, plot and card"
    )


def run(args) -> None:
    folder = Path(args.run)
    results = read_exit_results(folder)
    config = _load_config(folder)
    settings = (read_run(folder) or {}).get("settings", {})
    problem_type = config.problem_type or "single_label_classification"
    criterion = settings.get("exit_criterion", CalibrationArguments.exit_criterion)
    given = args.exit_criterion and find_criterion(args.exit_criterion)
    wanted = CalibrationArguments(
        exit_criterion=given or fitting_criterion(criterion, problem_type, required=False) or criterion,
        target_cost=args.target_cost,
        max_risk=args.max_risk,
        risk=args.risk,
        risk_confidence=args.risk_confidence,
    )
    parts = results.get("exit_costs")
    costs = ExitCosts(**parts) if parts else [entry["relative_cost"] for entry in results["anytime"]]
    calibration, reported = _load_rows(folder, len(costs))
    report = calibrate(
        *calibration,
        costs,
        **wanted.of_policy(),
        problem_type=problem_type,
        seed=settings.get("seed", 42) if args.seed is None else args.seed,
        chosen_by=results.get("calibration_rows_chose"),
    )
    print(f"Calibration: {report.message}")
    if report.policy is None:
        print(f"Nothing to save: {folder} stays as it is.")
        return
    report.policy.validate(len(config.exit_layers), problem_type, config.num_labels)
    metrics = [name for name in METRICS if name in results["anytime"][0]["metrics"]]
    row = policy_row(report.policy, *reported, costs, make_compute_metrics(metrics, problem_type))
    results |= {"policy": row, "num_report_samples": len(reported[1])}
    print(format_exit_table(results))
    print(f"thresholds: {', '.join(f'{threshold:.4g}' for threshold in report.policy.thresholds[:-1])}")
    if report.policy.guarantee:
        print(guarantee_in_words(report.policy.guarantee))
    if not args.save:
        print(f"Not saved: --save writes this policy into {folder}.")
        return
    config.exit_policy = report.policy.to_dict()
    config.save_pretrained(folder)
    write_exit_results(folder, results)
    plot_exit_curves(results, folder / "exit_curves.png")
    refresh_model_card(folder, results, config, settings)
    print(
        f"Saved in {folder}: config.json, exit_results.json, exit_curves.png and README.md. The model leaves by it "
        "when loaded."
    )


def _load_config(folder: Path):
    if not (folder / "config.json").is_file():
        raise ExitConfigurationError(
            f"{folder} holds no config.json: it evaluated a model of another folder. Give --target_cost to that run, "
            "or --output_dir the model's own folder."
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ExitConfigurationError(f"{folder}/config.json cannot be read: {in_one_line(error)}") from error
    if not is_early_exit_config(config):
        raise ExitConfigurationError(f"{folder}/config.json is of a {config.model_type} model, which has no exits.")
    return config


def _load_rows(folder: Path, num_exits: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Logits and labels that calibrate, and those that are reported."""
    saved = load_exit_logits(folder)
    if saved["logits"].shape[1] != num_exits:
        raise ExitConfigurationError(
            f"{folder}: exit_logits.npz holds {saved['logits'].shape[1]} exits, exit_results.json {num_exits}; they "
            "are of different runs."
        )
    calibrates = np.isin(saved["part"], CALIBRATION_PARTS)
    if not calibrates.any():
        raise ExitConfigurationError(
            f"{folder}/exit_logits.npz holds no calibration rows: those of its run had no labels and were not saved. "
            "Give --target_cost or --max_risk to a run."
        )
    return tuple((saved["logits"][rows], saved["labels"][rows]) for rows in (calibrates, ~calibrates))
