"""The table of exits, and the file `exit_results.json`."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from .._deprecated import moved_names
from ..files import replacing
from ..models import ExitConfigurationError
from ..models.exit_losses import loss_matrix
from .metrics import check_labels, expected_calibration_error
from .schema import check_schema, check_types, strict


RESULTS_NAME = "exit_results.json"
SCHEMA_VERSION = 1
__getattr__ = moved_names(__name__)


def anytime_table(
    exit_logits: np.ndarray,
    labels: np.ndarray,
    *,
    relative_costs: Sequence[float],
    exit_layers: Sequence[int],
    compute_metrics: Callable[[EvalPrediction], dict[str, float]],
    problem_type: str,
) -> list[dict[str, Any]]:
    """Evaluate every exit on every row.

    Args:
        exit_logits: (num_rows, num_exits, num_labels).
        labels: (num_rows,), or (num_rows, num_labels) for a multi-label problem.
        relative_costs: one per exit.
        exit_layers: one per exit, 1-based.
        compute_metrics: called with the logits (num_rows, num_labels) of one exit at a time.
        problem_type: as in transformers.

    Returns:
        one dict per exit: `exit` (from 1), `layer`, `relative_cost`, `loss` (mean over rows), `metrics`, `ece` (`None`
        unless each row has one class).

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
    """Write `exit_results.json`, completely or not at all.

    The file is strict JSON: NaN is written as null, an infinity as the largest number of its sign, so that a threshold
    that no score reaches remains one. `schema_version` is added.

    Args:
        output_dir: an existing folder.
        results: the content of the file, without `schema_version`.

    Returns:
        path of the file.

    Raises:
        ValueError: a key that the schema requires is missing; the message names it.
    """
    check_schema(results)
    path = Path(output_dir) / RESULTS_NAME
    text = json.dumps(strict({"schema_version": SCHEMA_VERSION, **results}), indent=2, allow_nan=False)
    with replacing(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return path


def read_exit_results(run: str | os.PathLike) -> dict[str, Any]:
    """Read the results of a run.

    Args:
        run: the output folder of a run, or its `exit_results.json`.

    Returns:
        the content of the file.

    Raises:
        ExitConfigurationError: the file does not exist, or is no complete results file.
    """
    path = Path(run)
    path = path / RESULTS_NAME if path.is_dir() else path
    if not path.is_file():
        raise ExitConfigurationError(f"{path} does not exist: give the output folder of a run with --do_eval.")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        check_schema(results)
        check_types(results)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ExitConfigurationError(f"{path} is no complete {RESULTS_NAME}: {error}") from error
    return results


def format_exit_table(results: dict[str, Any]) -> str:
    """Format results for a terminal: a table of the exits, the policy, and the rows on which they were measured.

    Args:
        results: as in `write_exit_results`.

    Returns:
        several lines of text.
    """
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
