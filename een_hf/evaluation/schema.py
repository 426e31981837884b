"""The schema of `exit_results.json`: the required parts, and a check for the values of each."""

import math
import reprlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..models.criteria import is_number


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


# The required keys of each part of the file, each with the check of its values.
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


def check_schema(results: dict[str, Any]) -> None:
    for place, mapping, kinds in _places(results):
        missing = [key for key in kinds if key not in mapping]
        if missing:
            raise ValueError(f"{place} lacks {', '.join(missing)}.")


def check_types(results: dict[str, Any]) -> None:
    """Raise TypeError for values of another kind, and for tables whose exits or metrics do not agree."""
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


def _places(results: dict[str, Any]) -> Iterator[tuple[str, dict, dict]]:
    """The name of every part of the results, the part, and its required keys."""
    places = [("results", results, _REQUIRED)]
    for place, mapping, kinds in places:  # the list grows in the loop
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


def strict(value: Any) -> Any:
    """Convert `value` to types and numbers that strict JSON can store."""
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else math.copysign(sys.float_info.max, value)
    return value
