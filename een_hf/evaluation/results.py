"""The table of exits, and `exit_results.json`, which holds it."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from .._moved import moved_names
from ..files import replacing
from ..models import ExitConfigurationError
from ..models.exit_losses import loss_matrix
from .metrics import check_labels, expected_calibration_error
from .schema import check_schema, check_types, strict


RESULTS_NAME = "exit_results.json"
SCHEMA_VERSION = 1
_PLACES = dict.fromkeys(("curve_area", "metric_at_cost"), "een_hf.evaluation.curves")
_PLACES |= dict.fromkeys(("LOGITS_NAME", "load_exit_logits", "save_exit_logits"), "een_hf.evaluation.saved_logits")
__getattr__ = moved_names(__name__, _PLACES)


def anytime_table(
    exit_logits: np.ndarray,
    labels: np.ndarray,
    *,
    relative_costs: Sequence[float],
    exit_layers: Sequence[int],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
    problem_type: str,
) -> list[dict[str, Any]]:
    """Every exit's scores on every row.

    Args:
        exit_logits: (num_rows, num_exits, num_labels).
        labels: (num_rows,), or (num_rows, num_labels) for a multi-label problem.
        relative_costs: one per exit.
        exit_layers: one per exit, 1-based.
        compute_metrics: called with the logits (num_rows, num_labels) of one exit at a time.
        problem_type: as in transformers.

    Returns:
        one dict per exit: `exit` (from 1), `layer`, `relative_cost`, `loss` (mean over rows), `metrics`, `ece` (`None`
        where rows have no single class).

    Raises:
        ExitConfigurationError: missing or impossible labels.
    """
    exit_logits = np.asarray(exit_logits)
    labels = check_labels(labels, len(exit_logits), exit_logits.shape[-1], problem_type)
    with torch.no_grad():
        losses = loss_matrix(torch.tensor(exit_logits), torch.tensor(labels), problem_type).double().mean(0).tolist()
    table = []
    for index, (layer, cost, loss) in enumerate(zip(exit_layers, relative_costs, losses, strict=True)):
        logits = exit_logits[:, index]
        classes = problem_type == "single_label_classification"
        table.append(
            {
                "exit": index + 1,
                "layer": layer,
                "relative_cost": cost,
                "loss": loss,
                "metrics": compute_metrics(EvalPrediction(predictions=logits, label_ids=labels)),
                "ece": expected_calibration_error(logits, labels) if classes else None,
            }
        )
    return table


def write_exit_results(output_dir: str | os.PathLike, results: dict[str, Any]) -> Path:
    """Write `exit_results.json`, whole or not at all, and return its path.

    The file is strict JSON: NaN is written as null, an infinity as the largest number of its sign, so that a threshold
    no score reaches stays one. `schema_version` is added.

    Raises:
        ValueError: a key that the schema requires is missing; it is named.
    """
    check_schema(results)
    path = Path(output_dir) / RESULTS_NAME
    text = json.dumps(strict({"schema_version": SCHEMA_VERSION, **results}), indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def read_exit_results(run: str | os.PathLike) -> dict[str, Any]:
    """The results of a run, from its folder or from the file itself.

    Raises:
        ExitConfigurationError: there is no such file, or it is no complete results file; it is named.
    """
    path = Path(run)
    path = path / RESULTS_NAME if path.is_dir() else path
    if not path.is_file():
        raise ExitConfigurationError(f"{path} is not there: give the output folder of a run with --do_eval.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        check_schema(results)
        check_types(results)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ExitConfigurationError(f"{path} is no complete {RESULTS_NAME}: {error}") from error
    return results


def format_exit_table(results: dict[str, Any]) -> str:
    """The exits of a results dict as an aligned table for a terminal, the policy, and which rows measured what."""
    anytime, policy = results["anytime"], results.get("policy")
    metrics = list(anytime[0]["metrics"])
    header = ["exit", "layer", "relative cost", *metrics, "loss", "ece"]
    rows = [
        [
            str(entry["exit"]),
            str(entry["layer"]),
            *(
                _number(value)
                for value in (
                    entry["relative_cost"],
                    *(entry["metrics"].get(name) for name in metrics),
                    entry["loss"],
                    entry["ece"],
                )
            ),
        ]
        for entry in anytime
    ]
    if policy:
        header.append("exiting")
        rows = [[*row, f"{share:.1%}"] for row, share in zip(rows, policy["exit_fractions"], strict=True)]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    if policy:
        goal = ", ".join(f"{name} {_short(value)}" for name, value in (policy["calibrated_for"] or {}).items())
        scores = ", ".join(f"{name} {_number(value)}" for name, value in policy["metrics"].items())
        lines.append(
            f"policy: {policy['criterion']}{f' for {goal}' if goal else ''}: "
            f"relative cost {_number(policy['relative_cost'])}, {scores}"
        )
    measured = f"measured on: all {results['num_eval_samples']} evaluation rows"
    if policy:
        calibrated_nothing = results.get("num_report_samples")
        if calibrated_nothing == results["num_eval_samples"]:
            measured += ", which calibrated nothing"
        else:
            count = "" if calibrated_nothing is None else f"{calibrated_nothing} "
            measured += f"; exiting and policy: the {count}evaluation rows that calibrated nothing"
    return "\n".join([*lines, measured])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
