"""What a run leaves behind: the table of exits, `exit_results.json` and `exit_logits.npz`."""

import json
import math
import os
import reprlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import EvalPrediction

from ..errors import in_one_line
from ..files import replacing
from ..models.configuration_een import ExitConfigurationError
from ..models.exit_losses import loss_matrix
from ..models.policies import is_number
from .metrics import check_labels, expected_calibration_error


RESULTS_NAME = "exit_results.json"
LOGITS_NAME = "exit_logits.npz"
SCHEMA_VERSION = 1


def _is_text(value) -> bool:
    return isinstance(value, str)


def _is_count(value) -> bool:
    return isinstance(value, int) and is_number(value) and value >= 0


def _is_score(value) -> bool:
    return value is None or is_number(value)


def _are_scores(value) -> bool:
    return isinstance(value, dict) and all(map(_is_score, value.values()))


def _are_numbers(value) -> bool:
    return isinstance(value, list) and all(map(is_number, value))


def _is_goal(value) -> bool:
    numbers = ("target_cost", "max_risk", "risk_confidence")
    return value is None or isinstance(value, dict) and all(is_number(value.get(name, 0)) for name in numbers)


def _is_guarantee(value) -> bool:
    if value is None:
        return True
    numbers = ("limit", "confidence", "errors", "num_rows")
    return (
        isinstance(value, dict) and _is_text(value.get("risk")) and all(is_number(value.get(name)) for name in numbers)
    )


def _are_exit_costs(value) -> bool:
    names = ("alone", "heads", "shared")
    return value is None or isinstance(value, dict) and {*value} == {*names} and all(map(_are_numbers, value.values()))


def _is_latency(value) -> bool:
    return value is None or (
        isinstance(value, dict)
        and _is_text(value.get("device"))
        and _is_count(value.get("batch_size"))
        and is_number(value.get("milliseconds"))
    )


# What each part of the file must have, and how a value of its kind is known.
_ANYTIME = {
    "exit": _is_count,
    "layer": _is_count,
    "relative_cost": is_number,
    "loss": _is_score,
    "metrics": _are_scores,
    "ece": _is_score,
}
_CURVE = {
    "relative_cost": is_number,
    "metrics": _are_scores,
    "thresholds": _are_numbers,
    "exit_fractions": _are_numbers,
}
_ENTRIES = {
    "anytime": _ANYTIME,
    "anytime_report": _ANYTIME,
    "budgeted": {"target_cost": is_number, **_CURVE},
    "baselines": {"name": _is_text, "relative_cost": is_number, "metrics": _are_scores},
}
_POLICY = {"criterion": _is_text, "calibrated_for": _is_goal, "guarantee": _is_guarantee, **_CURVE}
_REQUIRED = {
    "method": _is_text,
    "model_type": _is_text,
    "dataset": _is_text,
    "task_name": lambda value: value is None or _is_text(value),
    "metric": _is_text,
    "exit_layers": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "num_eval_samples": _is_count,
    "num_calibration_samples": _is_count,
    "anytime": lambda value: isinstance(value, list) and len(value) > 0,
    "anytime_report": lambda value: isinstance(value, list),
    "budgeted": lambda value: isinstance(value, list),
    "policy": lambda value: value is None or isinstance(value, dict),
}
_OPTIONAL = {
    "num_report_samples": lambda value: value is None or _is_count(value),
    "baselines": lambda value: value is None or isinstance(value, list),
    "calibration_rows_chose": lambda value: value is None or _is_text(value),
    "cost_unit": lambda value: value is None or _is_text(value),
    "plain_operations": _is_score,
    "exit_costs": _are_exit_costs,
    "latency": _is_latency,
}


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
    _check_schema(results)
    path = Path(output_dir) / RESULTS_NAME
    text = json.dumps(_strict({"schema_version": SCHEMA_VERSION, **results}), indent=2, allow_nan=False)
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
        _check_schema(results)
        _check_types(results)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ExitConfigurationError(f"{path} is no complete {RESULTS_NAME}: {error}") from error
    return results


def metric_at_cost(budgeted: Sequence[dict[str, Any]], cost: float, metric: str) -> float | None:
    """The metric under the largest budget that is at most `cost`.

    The budget (`target_cost`) is set before the rows are seen that measure it: taking the best of several budgets on
    these rows would flatter a curve.

    Args:
        budgeted: points with `target_cost` and `metrics`, in any order; a metric that is null is left out.
        cost: share of the plain model's cost.
        metric: key of the points' `metrics`.

    Returns:
        `None` where no budget is so small.
    """
    affordable = [point for point in _curve(budgeted, metric) if point[0] <= cost]
    return max(affordable)[1] if affordable else None


def curve_area(budgeted: Sequence[dict[str, Any]], metric: str, start: float | None = None) -> float | None:
    """The mean of `metric_at_cost` over the costs from `start` to 1, the plain model's.

    The area under the step function divided by the width of the range, in the metric's own unit; a constant metric
    gives itself.

    Args:
        budgeted: as `metric_at_cost` takes it.
        metric: key of the points' `metrics`.
        start: lower end of the range; by default the smallest budget. Curves are compared over one range: give the
            largest of their smallest budgets.

    Returns:
        `None` where the range is empty or no budget is so small as its start.
    """
    curve = sorted(_curve(budgeted, metric))
    start = curve[0][0] if start is None and curve else start
    if not curve or not curve[0][0] <= start < 1:
        return None
    edges = [start, *(cost for cost, _ in curve if start < cost < 1), 1.0]
    steps = [metric_at_cost(budgeted, edge, metric) for edge in edges[:-1]]
    return float(np.average(steps, weights=np.diff(edges)))


def _curve(budgeted: Sequence[dict[str, Any]], metric: str) -> list[tuple[float, float]]:
    """(budget, score) of the points that have a score."""
    points = [(entry["target_cost"], entry["metrics"].get(metric)) for entry in budgeted]
    return [(cost, score) for cost, score in points if score is not None and not math.isnan(score)]


def save_exit_logits(
    output_dir: str | os.PathLike,
    logits: np.ndarray,
    labels: np.ndarray,
    row_ids: Sequence,
    part: str | Sequence[str],
) -> Path:
    """Write `exit_logits.npz`, whole or not at all, and return its path.

    Args:
        output_dir: an existing folder.
        logits: (num_rows, num_exits, num_labels).
        labels: (num_rows, ...).
        row_ids: (num_rows,), numbers or text.
        part: what each row is for, (num_rows,), or one word for all.

    Raises:
        ValueError: the numbers of rows differ.
    """
    logits = np.asarray(logits)
    arrays = {"logits": logits, "labels": np.asarray(labels), "row_ids": np.asarray(row_ids)}
    arrays["part"] = np.full(len(logits), part) if isinstance(part, str) else np.asarray(part)
    for name, array in arrays.items():
        if len(array) != len(logits):
            raise ValueError(f"{name} has {len(array)} rows, but logits have {len(logits)}.")
        if array.dtype == object:
            arrays[name] = array.astype(str)
    path = Path(output_dir) / LOGITS_NAME
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    return path


def load_exit_logits(output_dir: str | os.PathLike) -> dict[str, np.ndarray]:
    """Read `exit_logits.npz`: `logits`, `labels`, `row_ids`, `part`, as `save_exit_logits` takes them.

    Raises:
        ExitConfigurationError: the file is not there, is damaged, or holds something else; it is named.
    """
    path = Path(output_dir) / LOGITS_NAME
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        wrong = _wrong_array(arrays)
    except Exception as error:  # a damaged archive raises nearly anything: zlib.error, EOFError, MemoryError, ...
        wrong = in_one_line(error)
    if wrong:
        raise ExitConfigurationError(f"{path} cannot be read: {wrong}")
    return arrays


def _wrong_array(arrays: dict[str, np.ndarray]) -> str | None:
    """What is wrong with the content of `exit_logits.npz`."""
    kinds = {"logits": "f", "labels": "iufb", "row_ids": "iuU", "part": "U"}
    for name, kind in kinds.items():
        if name not in arrays:
            return f"it has no array {name!r}."
        if arrays[name].dtype.kind not in kind:
            return f"{name} are of type {arrays[name].dtype}."
    logits = arrays["logits"]
    if logits.ndim != 3 or 0 in logits.shape[1:]:
        return f"logits have shape {logits.shape}, not (rows, exits, labels)."
    for name, dimensions in (("labels", (1, 2)), ("row_ids", (1,)), ("part", (1,))):
        if arrays[name].ndim not in dimensions or len(arrays[name]) != len(logits):
            return f"{name} have shape {arrays[name].shape}, logits {logits.shape}."
    return None


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


def _places(results: dict[str, Any]) -> Iterator[tuple[str, dict, dict]]:
    """Every part of the results by its name, with what it must have."""
    places = [("results", results, _REQUIRED)]
    for place, mapping, kinds in places:  # grows
        if not isinstance(mapping, dict):
            raise TypeError(f"{place} is {reprlib.repr(mapping)}.")
        yield place, mapping, kinds
        if place == "results":
            for name, entry_kinds in _ENTRIES.items():
                entries = results.get(name) or []
                if not isinstance(entries, list):
                    raise TypeError(f"results: {name} is {reprlib.repr(entries)}.")
                places += [(f"results[{name!r}][{index}]", entry, entry_kinds) for index, entry in enumerate(entries)]
            if results.get("policy") is not None:
                places.append(("results['policy']", results["policy"], _POLICY))


def _check_schema(results: dict[str, Any]) -> None:
    for place, mapping, kinds in _places(results):
        missing = [key for key in kinds if key not in mapping]
        if missing:
            raise ValueError(f"{place} lacks {', '.join(missing)}.")


def _check_types(results: dict[str, Any]) -> None:
    """Refuse values of another kind, and tables of other exits or metrics than the first."""
    for place, mapping, kinds in _places(results):
        kinds = {**kinds, **_OPTIONAL} if place == "results" else kinds
        for key, fits in kinds.items():
            if key in mapping and not fits(mapping[key]):
                raise TypeError(f"{place}: {key} is {reprlib.repr(mapping[key])}.")
    num_exits = len(results["exit_layers"])
    rows = [*results["budgeted"], *([results["policy"]] if results["policy"] else [])]
    lengths = {
        len(results["anytime"]),
        *map(len, (results.get("exit_costs") or {}).values()),
        *(len(row[name]) for row in rows for name in ("thresholds", "exit_fractions")),
    }
    if len(results["anytime_report"]) not in (0, num_exits) or lengths != {num_exits}:
        raise TypeError(f"its tables are not all of {num_exits} exits.")
    for name in ("anytime", "anytime_report", "budgeted"):
        if len({tuple(row["metrics"]) for row in results[name]}) > 1:
            raise TypeError(f"{name} has other metrics in some rows.")


def _strict(value: Any) -> Any:
    """`value` in types and numbers that strict JSON has."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return _strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(sys.float_info.max, value)
    return value


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
