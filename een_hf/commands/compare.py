"""Set runs side by side: one table and, with --output, one plot.

een-hf compare runs/joint runs/boosted runs/l2w --output compare.png

All numbers are measured on the rows that calibrated nothing. "at 50 %": under the largest budget that is at most half
of the plain model's cost. "area": the mean of that over the budgets from where every run can answer up to 1.

A run with one exit is a baseline: plain fine-tuning (--exit_layers names the last layer), or that of a smaller model.
It has one cost, its operations over those of the plain model of the first run with several exits; from there on it
answers in the table, and in the plot it is a point.
"""

import os
from pathlib import Path

from ..evaluation import curve_area, metric_at_cost, plot_comparison, read_exit_results
from ..models import ExitConfigurationError


SHARES = (0.25, 0.5, 0.75)


def add_arguments(parser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="output folders of runs, or their exit_results.json")
    parser.add_argument("--output", metavar="PNG", help="draw the curves into this file")


def run(args) -> None:
    if args.output is not None and (not args.output.endswith(".png") or not Path(args.output).parent.is_dir()):
        raise ExitConfigurationError(f"--output {args.output} must name a .png file in a folder that is there.")
    runs = dict(zip(_names(args.runs), map(read_exit_results, args.runs), strict=True))
    _check_comparable(args.runs, list(runs.values()))
    _place_baselines(args.runs, runs)
    print(comparison_table(runs))
    if args.output is not None:
        plot_comparison(runs, args.output)
        print(f"Plot: {args.output}")


def comparison_table(runs: dict[str, dict]) -> str:
    """The table of results dicts, by name."""
    metric = next(iter(runs.values()))["metric"]
    cheapest = [min((entry["target_cost"] for entry in results["budgeted"]), default=1) for results in runs.values()]
    start = max((cost for cost in cheapest if cost < 1), default=None)
    header = ["run", "method", "cost", *(f"at {share:.0%}" for share in SHARES), "area", "last exit"]
    rows = []
    for name, results in runs.items():
        last = (results["anytime_report"] or results["anytime"])[-1]
        curve = [last | {"target_cost": last["relative_cost"]}] if is_baseline(results) else results["budgeted"]
        scores = [metric_at_cost(curve, share, metric) for share in SHARES]
        scores.append(None if start is None else curve_area(curve, metric, start))
        scores.append(last["metrics"].get(metric))
        method = "plain" if is_baseline(results) else results["method"]
        cells = ["-" if score is None else f"{score:.4f}" for score in scores]
        rows.append([name, method, f"{last['relative_cost']:.3f}", *cells])
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    aligned = [str.ljust] * 2 + [str.rjust] * (len(header) - 2)
    lines = [
        "  ".join(align(word, width) for align, word, width in zip(aligned, words, widths, strict=True))
        for words in (header, *rows)
    ]
    area = "no run leaves early" if start is None else f"area over relative costs {start:.3f} to 1"
    return "\n".join([f"{metric} at a share of the plain model's cost; {area}", *lines])


def is_baseline(results: dict) -> bool:
    """Whether a run has no early exit."""
    return len(results["exit_layers"]) == 1


def _place_baselines(paths: list[str], runs: dict[str, dict]) -> None:
    """Change a baseline's relative cost from that of its own network to that of the network it is compared with."""
    whole = next((results for results in runs.values() if not is_baseline(results)), None)
    baselines = [results for results in runs.values() if is_baseline(results)]
    if whole is None or not baselines:
        return
    if whole.get("cost_unit", "operations") != "operations":
        raise ExitConfigurationError("Runs of one exit are placed by operations: evaluate the others so (--cost).")
    for path, results in zip(paths, runs.values(), strict=True):
        if not results.get("plain_operations") and (results is whole or is_baseline(results)):
            raise ExitConfigurationError(f"{path} does not say what its network costs: evaluate it again (--do_eval).")
    for results in baselines:
        for row in (*results["anytime"], *results["anytime_report"]):
            row["relative_cost"] = results["plain_operations"] / whole["plain_operations"]


def _names(paths: list[str]) -> list[str]:
    """Short names: the folders' own, or as much of the paths as tells them apart."""
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
        values = [" / ".join(str(results[key]) for key in keys if results.get(key)) for results in runs]
        other = next((index for index, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ExitConfigurationError(
                f"Runs of one {what} can be compared: {paths[0]} is of {values[0]}, {paths[other]} of {values[other]}."
            )
    sizes = [results["num_eval_samples"] for results in runs]
    other = next((index for index, size in enumerate(sizes) if size != sizes[0]), None)
    if other is not None:
        raise ExitConfigurationError(
            f"Runs of the same evaluation rows can be compared: {paths[0]} has {sizes[0]}, {paths[other]} "
            f"{sizes[other]}."
        )
