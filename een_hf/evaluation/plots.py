"""Plots of runs: the metric against the cost of each exit, and where examples exit."""

import os
import textwrap
from itertools import cycle
from typing import Any

import numpy as np

from ..extras import named_extras


with named_extras():
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter


_BLUE, _ORANGE, _RED, _GREY = "#2f5d9b", "#e08a1e", "#c0392b", "#707070"
_BASELINE_MARKERS = "sD^vPXph"


def literal(text: str) -> str:
    """Escape dollar signs, between which matplotlib would set a formula."""
    return text.replace("$", r"\$")


def plot_exit_curves(results: dict[str, Any], path: str | os.PathLike) -> Figure:
    """Plot the results of a run into a PNG file.

    The upper plot shows the metric against the relative cost: of every exit on every example, of the budgets, of the
    calibrated policy and of the baselines, if there are any. The lower plot shows the share of examples that exit at
    each exit under the policy, or, without one, under the budget nearest to half of the cost. Then the exits are
    measured on the same rows (`anytime_report`), otherwise on the whole evaluation split (`anytime`).

    Args:
        results: as in `write_exit_results`.
        path: the PNG file.

    Returns:
        the figure; its first axes are the upper plot, its second, if any, the lower.
    """
    budgeted = sorted(results["budgeted"], key=lambda entry: entry["relative_cost"])
    policy = results["policy"]
    chosen = policy or min(budgeted, key=lambda entry: abs(entry["relative_cost"] - 0.5), default=None)
    exits = (results["anytime_report"] if chosen else None) or results["anytime"]
    metric = results["metric"]

    figure = Figure(figsize=(7.5, 6.5 if chosen else 5.0), dpi=150, layout="constrained")
    if chosen:
        axes, shares = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        _draw_shares(shares, exits, chosen, "policy" if policy else f"budget {chosen['target_cost']:.2f}")
        bottom = shares
    else:
        axes = bottom = figure.subplots()
    axes.set_title(literal(f"{_data_of(results)}: {results['model_type']}, {results['method']}"))
    axes.set_ylabel(literal(metric.replace("_", " ")))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    bottom.set_xlabel("relative cost (plain model = 1)")

    _draw_exits(axes, exits, metric)
    if budgeted:
        axes.plot(*_points(budgeted, metric), "o-", color=_ORANGE, markersize=4, zorder=3, label="budgets")
    for index, baseline in enumerate(results.get("baselines") or ()):
        marker = _BASELINE_MARKERS[index % len(_BASELINE_MARKERS)]
        name = literal(textwrap.fill(baseline["name"], 40))
        axes.plot(*_points([baseline], metric), marker, color=_GREY, markersize=8, zorder=5, label=name)
    if policy:
        (cost,), (score,) = _points([policy], metric)
        label = f"policy ({literal(policy['criterion'])}): {score:.3f} at cost {cost:.2f}"
        axes.plot([cost], [score], "*", color=_RED, markeredgecolor="white", markersize=20, zorder=6, label=label)
    axes.margins(y=0.12)
    axes.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, markerscale=0.8, fontsize="small")
    figure.savefig(path, format="png")
    return figure


def plot_comparison(runs: dict[str, dict[str, Any]], path: str | os.PathLike) -> Figure:
    """Plot the budgets of several runs and their baselines into one PNG file.

    Points are joined by steps, since nothing is known between two measured costs. A run with one exit is a baseline,
    and so a single point.

    Args:
        runs: the results of each run (as in `write_exit_results`), by name; all of one data set and metric.
        path: the PNG file.

    Returns:
        the figure.
    """
    first = next(iter(runs.values()))
    metric = first["metric"]
    figure = Figure(figsize=(7.5, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.set_title(literal(_data_of(first)))
    axes.set_xlabel("relative cost (plain model = 1)")
    axes.set_ylabel(literal(metric.replace("_", " ")))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    baselines = {}
    for index, (name, results) in enumerate(runs.items()):
        if len(results["exit_layers"]) == 1:
            (cost,), (score,) = _points((results["anytime_report"] or results["anytime"])[-1:], metric)
            baselines[name, cost, score] = None
            continue
        costs, scores = _points(sorted(results["budgeted"], key=lambda entry: entry["relative_cost"]), metric)
        style = {"color": f"C{index % 10}", "linestyle": ("-", "--", ":")[index // 10 % 3], "markersize": 4}
        axes.plot(costs, scores, "o", drawstyle="steps-post", label=literal(f"{name} ({results['method']})"), **style)
        for baseline in results.get("baselines") or ():
            (cost,), (score,) = _points([baseline], metric)
            baselines[baseline["name"], cost, score] = None
    markers = dict(zip(dict.fromkeys(name for name, *_ in baselines), cycle(_BASELINE_MARKERS), strict=False))
    for name, marker in markers.items():
        own = [(cost, score) for label, cost, score in baselines if label == name]
        label = literal(textwrap.fill(name, 40))
        axes.plot(*zip(*own, strict=True), marker, color=_GREY, markersize=8, zorder=5, label=label)
    axes.margins(y=0.12)
    axes.set_xlim(left=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.savefig(path, format="png")
    return figure


def _draw_exits(axes, exits: list[dict], metric: str) -> None:
    costs, scores = _points(exits, metric)
    last = f"exit {exits[-1]['exit']} for every sample"
    axes.axhline(scores[-1], color=_BLUE, linewidth=1, linestyle=":", zorder=1, label=last)
    axes.plot(costs, scores, "o-", color=_BLUE, markersize=14, zorder=4, label="one exit for every sample, by number")
    for entry, cost, score in zip(exits, costs, scores, strict=True):
        style = {"color": "white", "fontsize": 8, "ha": "center", "va": "center_baseline", "zorder": 5.5}
        # In front of the baselines, so that the number is readable if the stock model lies on the last exit.
        axes.text(cost, score, str(entry["exit"]), **style)


def _draw_shares(axes, exits: list[dict], chosen: dict, name: str) -> None:
    costs = [entry["relative_cost"] for entry in exits]
    bars = axes.bar(costs, chosen["exit_fractions"], width=0.6 * min(np.diff([0, *costs])), color=_BLUE, alpha=0.75)
    axes.bar_label(bars, [f"{share:.0%}" for share in chosen["exit_fractions"]], fontsize=8, padding=1)
    axes.set_ylabel(f"exiting\n({name})")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.margins(y=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _points(entries: list[dict], metric: str) -> tuple[list[float], list[float]]:
    """Costs and scores; a score that is null becomes NaN, which is not drawn."""
    scores = [entry["metrics"].get(metric) for entry in entries]
    return [entry["relative_cost"] for entry in entries], [np.nan if score is None else score for score in scores]


def _data_of(results: dict) -> str:
    return " / ".join(dict.fromkeys(name for name in (results["dataset"], results["task_name"]) if name))
