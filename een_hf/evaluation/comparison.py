"""Comparison of runs: their scores at shares of the plain model's cost."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models import ExitConfigurationError
from .curves import curve_area, metric_at_cost
from .plots import plot_comparison
from .results import read_exit_results


SHARES = (0.25, 0.5, 0.75)


@dataclass(frozen=True, repr=False)
class Comparison:
    """Results of several runs, measured on the rows that were not used for calibration. It is printed as its table.

    Args:
        runs: content of each run's `exit_results.json`, by a short name. The relative costs of a run with one exit are
            the costs of its network divided by those of the network of the first run with several exits.
        rows: for each run `run`, `method`, `cost` (of its last exit), the metric under the largest budget up to 25,
            50 and 75 % of the plain model's cost (`at 25%`, ...), its mean over budgets (`area`) and that of the last
            exit (`last exit`); `None` if the run has no such policy.
        start: the relative cost from which every run has a policy, where `area` begins; `None`: no run exits early.
    """

    runs: dict[str, dict[str, Any]]
    rows: list[dict[str, Any]]
    start: float | None

    def __repr__(self) -> str:
        return self.table

    @property
    def table(self) -> str:
        """The comparison as text, one line for each run."""
        metric = next(iter(self.runs.values()))["metric"]
        header = list(self.rows[0])
        lines = [header, *([_cell(name, value) for name, value in row.items()] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligned = [str.ljust] * 2 + [str.rjust] * (len(header) - 2)
        table = [
            "  ".join(align(cell, width) for align, cell, width in zip(aligned, line, widths, strict=True))
            for line in lines
        ]
        area = "no run exits early" if self.start is None else f"area over relative costs {self.start:.3f} to 1"
        return "\n".join([f"{metric} at a share of the plain model's cost; {area}", *table])


def compare(runs: Sequence[str | os.PathLike], output: str | os.PathLike | None = None) -> Comparison:
    """Compare runs, as the command `een-hf compare` does.

    Args:
        runs: output folders of runs, or their `exit_results.json`.
        output: a .png file for a plot of the curves; `None`: no plot.

    Returns:
        the results of the runs, printed as a table.

    Raises:
        ExitConfigurationError: the runs differ in their data, metric, unit of cost or evaluation rows, a run is named
            twice, or a folder is missing.

    Example:
        >>> een_hf.compare(["runs/mine", "runs/other"])
        accuracy at a share of the plain model's cost; area over relative costs ...
        run    method   cost  at 25%  at 50%  at 75%  area  last exit
        mine   joint   1...
        other  joint   1...
    """
    paths = [os.fspath(path) for path in runs]
    output = None if output is None else os.fspath(output)
    if output is not None and (not output.endswith(".png") or not Path(output).parent.is_dir()):
        raise ExitConfigurationError(f"--output {output} must name a .png file in a folder that exists.")
    found = dict(zip(_names(paths), map(read_exit_results, paths), strict=True))
    _check_comparable(paths, list(found.values()))
    _place_baselines(paths, found)
    if output is not None:
        plot_comparison(found, output)
    return compare_results(found)


def compare_results(runs: dict[str, dict[str, Any]]) -> Comparison:
    """As `compare`, for results that have been read, by name."""
    metric = next(iter(runs.values()))["metric"]
    cheapest = [min((entry["target_cost"] for entry in results["budgeted"]), default=1) for results in runs.values()]
    start = max((cost for cost in cheapest if cost < 1), default=None)
    rows = []
    for name, results in runs.items():
        last = (results["anytime_report"] or results["anytime"])[-1]
        curve = [last | {"target_cost": last["relative_cost"]}] if is_baseline(results) else results["budgeted"]
        rows.append(
            {
                "run": name,
                "method": "plain" if is_baseline(results) else results["method"],
                "cost": last["relative_cost"],
                **{f"at {share:.0%}": metric_at_cost(curve, share, metric) for share in SHARES},
                "area": None if start is None else curve_area(curve, metric, start),
                "last exit": last["metrics"].get(metric),
            }
        )
    return Comparison(runs, rows, start)


def is_baseline(results: dict) -> bool:
    """Whether a run has no early exit."""
    return len(results["exit_layers"]) == 1


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.3f}" if name == "cost" else f"{value:.4f}"


def _place_baselines(paths: list[str], runs: dict[str, dict]) -> None:
    """Divide a baseline's cost by that of the network it is compared with, instead of by that of its own network."""
    whole = next((results for results in runs.values() if not is_baseline(results)), None)
    baselines = [results for results in runs.values() if is_baseline(results)]
    if whole is None or not baselines:
        return
    if whole.get("cost_unit", "operations") != "operations":
        raise ExitConfigurationError(
            "A run with one exit is compared by operations, but another run has costs in time: evaluate it again with "
            "--cost operations."
        )
    for path, results in zip(paths, runs.values(), strict=True):
        if not results.get("plain_operations") and (results is whole or is_baseline(results)):
            raise ExitConfigurationError(f"{path} lacks the cost of its network: evaluate it again (--do_eval).")
    for results in baselines:
        for row in (*results["anytime"], *results["anytime_report"]):
            row["relative_cost"] = results["plain_operations"] / whole["plain_operations"]


def _names(paths: list[str]) -> list[str]:
    """Short names: those of the folders, or as many parts of their paths as are needed to distinguish them."""
    folders = [Path(path).resolve().parent if Path(path).is_file() else Path(path).resolve() for path in paths]
    if len(set(folders)) < len(folders):
        twice = next(path for path, folder in zip(paths, folders, strict=True) if folders.count(folder) > 1)
        raise ExitConfigurationError(f"{twice} is named twice: name each run once.")
    depth = 1
    while len({folder.parts[-depth:] for folder in folders}) < len(folders):
        depth += 1
    return [os.path.join(*folder.parts[-depth:]) for folder in folders]


def _check_comparable(paths: list[str], runs: list[dict]) -> None:
    for what, keys in (
        ("data set", ("dataset", "task_name")),
        ("metric", ("metric",)),
        ("unit of cost", ("cost_unit",)),
    ):
        complete = [{"cost_unit": "operations", **results} for results in runs]
        values = [" / ".join(str(results[key]) for key in keys if results.get(key)) for results in complete]
        other = next((index for index, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ExitConfigurationError(
                f"Only runs of the same {what} can be compared: {paths[0]} has {values[0]}, {paths[other]} has "
                f"{values[other]}."
            )
    sizes = [results["num_eval_samples"] for results in runs]
    other = next((index for index, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        raise ExitConfigurationError(
            f"Only runs with the same evaluation rows can be compared: {paths[0]} has {sizes[0]} rows, {paths[other]} "
            f"has {sizes[other]}."
        )
