#!/usr/bin/env python
"""Write benchmarks/README.md and its plots from the JSON files in benchmarks/results/; nothing is measured here.

python benchmarks/page.py            write the page
python benchmarks/page.py --check    fail if the page is not what the files give
"""

import argparse
import json
import sys
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from common import STEP_TARGETS, unpack_bits
from matplotlib.figure import Figure

from een_hf.evaluation import curve_area, metric_at_cost


HERE = Path(__file__).parent
SCHEMES = ("joint", "two_stage", "boosted", "l2w", "two_stage-joint")
SUMMARIZED = {"joint": ".:", "two_stage": "o-", "two_stage-joint": "o--"}  # with their lines in the plot
SHARES = (0.25, 0.5, 0.75)
LIMITS = ("0.01", "0.02", "0.05")  # of the certified risk

HEAD = """# Benchmarks

Written by `python benchmarks/page.py` from `benchmarks/results/*.json`. ± is the standard deviation over seeds.
Relative cost: multiply-accumulates divided by those of the plain model. A budget is set before the rows are seen that
measure it: half of the evaluation rows calibrate, the other half is reported, at a cost that may miss the budget a
little (plots show it). Differences are paired: both runs of a pair share seed and evaluation rows. [low, high] is the
95 % interval of a difference when seeds and evaluation rows are drawn again (bootstrap); each half of the rows is then
reported under the policy that the other half calibrates. `-warm`: a scheme after a warm start, the last exit trained
alone for half of the epochs (`--warm_start_epochs`); `two_stage-joint`: with `--joint_first_stage`. `distilled`: first
layers that learn the probabilities of the fine-tuned whole model instead of labels, in as many steps.
"""

PAPERS = """## What the papers report

Deltas against one's own full model are comparable; absolute numbers across papers are not.

| claim | source |
| --- | --- |
| L2W-DEN on CIFAR-100: about +1.1 points, and 1.6 x cheaper at equal accuracy, over its base (MSDNet) | ECCV 2022 |
| BoostNet on CIFAR-100 (MSDNet, anytime, read off its figure): +2.9 points at a third of the cost, +0.3 at the last \
exit | AAAI 2023 |
| BERT-base at about 2 x on GLUE test, SST-2 and MNLI: COSEE 93.0 of 93.5 and 83.4 of 84.6; 6-layer BERT 91.0 and \
80.8; DeeBERT 90.2 and 74.4; PABEE 89.3 and 79.8 | COSEE, AAAI 2025, table 2 |
| Criteria that wait for convergence give models distilled layer by layer no speed-up on the clock; a MiniLM \
pretrained for them 1.61 x at batch 1 (NVIDIA L4). MiniLM-L6, of the tables above, is a distilled model too, whose \
exits decide by confidence here: certified costs above, times in README.md | LEAP, 2026 |
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A table without the columns that nothing ran."""
    ran = [place for place, *cells in zip(range(len(header)), *rows, strict=True) if {*cells, ""} != {"not run", ""}]
    header, *rows = ([line[place] for place in ran] for line in (header, *rows))
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: list[float | None], signed: bool = False) -> str:
    """Mean ± standard deviation; one value alone has no deviation. `None`: ran, but has no such figure."""
    known = [value for value in values if value is not None]
    if not known:
        return "none" if values else "not run"
    mean = f"{np.mean(known):+.3f}" if signed else f"{np.mean(known):.3f}"
    return mean if len(known) == 1 else f"{mean} ± {np.std(known, ddof=1):.3f}"


def paired(first: dict[int, float | None], second: dict[int, float | None]) -> list[float | None]:
    """Differences first - second over the seeds that both ran."""
    pairs = [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]
    return [None if None in pair else pair[0] - pair[1] for pair in pairs]


@dataclass
class Difference:
    """A method less another, at one place.

    Args:
        by_seed: differences of the metric, as `paired` gives them.
        bits: over the seeds that both ran, which rows each answers rightly, both (num_seeds, num_rows); `None`: the
            files do not say.
    """

    by_seed: list[float | None]
    bits: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self):
        self.known = [value for value in self.by_seed if value is not None]
        self.mean, self.interval = np.mean(self.known) if self.known else None, None
        if self.bits is not None:
            differences = self.bits[0].astype(float) - self.bits[1]
            self.mean, self.interval = differences.mean(), bootstrap_interval(differences)

    def __str__(self) -> str:
        if self.interval is None:
            return spread(self.by_seed, signed=True)
        low, high = self.interval
        return f"{self.mean:+.3f} [{low:+.3f}, {high:+.3f}]"

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes 0, or, without one, where all of several seeds agree; else 0."""
        ends = self.interval or ((min(self.known), max(self.known)) if len(self.known) > 1 else (0, 0))
        return int(ends[0] > 0) - int(ends[1] < 0)


@cache
def _draws(num_seeds: int, num_rows: int, count: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    """How often each draw takes each row, and which seeds it takes."""
    random = np.random.default_rng(0)
    rows = random.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=count) / num_rows
    return rows, random.integers(num_seeds, size=(count, num_seeds))


def bootstrap_interval(differences: np.ndarray) -> tuple[float, float]:
    """95 % of the means when seeds and evaluation rows are drawn again, each with replacement.

    Args:
        differences: (num_seeds, num_rows), paired by seed and row.
    """
    rows, seeds = _draws(*differences.shape)
    means = np.take_along_axis(rows @ differences.T, seeds, 1).mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def sentence(scheme: str, other: str, places: dict[str, Difference]) -> list[str]:
    """Where a scheme beats the other, loses to it or neither."""
    found = defaultdict(list)
    for place, difference in places.items():
        if difference.known:
            word = ("does not clearly differ from", "beats", "loses to")[difference.sign]
            found[word].append(f"{place} ({difference.mean:+.3f}, seeds: {len(difference.known)})")
    return [f"- {scheme} {word} {other}: {', '.join(where)}.\n" for word, where in found.items()]


def machine_text(machine: dict) -> str:
    versions = [f"{name} {value}" for name, value in machine.items() if name not in ("device", "cores", "threads")]
    return f"{machine['device']}, {machine['cores']} cores, threads: {machine['threads']}; {', '.join(versions)}"


@contextmanager
def plot(plots: Path | None, name: str, **labels):
    """Axes to draw on; saved as `<plots>/<name>.png` in the end, if a folder is given."""
    figure = Figure(figsize=(7, 4.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    yield axes
    axes.set(**labels)
    axes.legend(frameon=False)
    if plots:
        plots.mkdir(exist_ok=True)
        figure.savefig(plots / f"{name}.png", metadata={"Software": None})


class Quality:
    """The rows of one results file: methods and seeds of one data set."""

    def __init__(self, data: dict):
        self.recipe, rows = data["recipe"], data["rows"]
        self.runs = defaultdict(dict)
        for row in rows:
            self.runs[row["method"]][row["seed"]] = row
        self.first, self.count, self.metric = rows[0], rows[0]["num_eval_samples"], rows[0]["metric"]
        self.task = rows[0]["task_name"] or rows[0]["dataset"]
        self.seeds = sorted({row["seed"] for row in rows})
        self.machines = dict.fromkeys(machine_text(row["machine"]) for row in rows)
        smaller = [method for method in self.runs if method.startswith(("cut-", "student-"))]
        self.layers = {method: int(method.rpartition("-")[2]) for method in smaller}
        self.cuts = sorted(smaller, key=self.layers.get, reverse=True)
        names = {"stock": "whole"}
        for method in self.cuts:
            taught = ", distilled" * method.startswith("student-")
            names[method] = f"first {self.layers[method]} layers{taught}"
        self.labels = {method: name for method, name in names.items() if method in self.runs}
        schemes = [*SCHEMES, *(method for method in self.runs if method not in names)]
        self.schemes = [method for method in dict.fromkeys(schemes) if method in self.runs]
        self.exits = next((row["anytime"] for row in rows if "anytime" in row), [])

    def cost(self, method: str) -> float:
        """The relative cost of a stock model."""
        return next(iter(self.runs[method].values()))["relative_cost"]

    def scores(self, method: str, cost: float | None = None) -> dict[int, float | None]:
        """By seed, on the rows that calibrated nothing: under a budget, or all of the network."""
        metric, runs = self.metric, self.runs[method].items()
        if method in self.labels:
            return {seed: row["metrics_report"].get(metric) for seed, row in runs}
        if cost is None:
            return {seed: row["anytime_report"][-1]["metrics"].get(metric) for seed, row in runs}
        return {seed: metric_at_cost(row["budgeted"], cost, metric) for seed, row in runs}

    def mean(self, methods: dict[str, float | None], seeds: set[int]) -> str:
        """Over some seeds, of methods under a budget each."""
        scores = (self.scores(method, cost) for method, cost in methods.items())
        return ", ".join(spread([of[seed] for seed in of if seed in seeds]) for of in scores)

    def difference(self, first: str, cost: float | None, second: str, second_cost: float | None = None) -> Difference:
        """A method less another, each under a budget or with all of its network."""
        seeds = sorted(self.runs[first].keys() & self.runs[second].keys())
        bits = tuple(self._bits(*of, seeds) for of in ((first, cost), (second, second_cost)))
        by_seed = paired(self.scores(first, cost), self.scores(second, second_cost))
        return Difference(by_seed, None if any(of is None for of in bits) else bits)

    def _bits(self, method: str, cost: float | None, seeds: list[int]) -> np.ndarray | None:
        """Which rows a method answers rightly, (num_seeds, num_rows), if that is the metric and the files say it."""
        exits = {exit["relative_cost"]: f"exit {exit['exit']}" for exit in self.exits}
        place = "last" if cost is None or method in self.labels else exits.get(cost, f"{cost:g}")
        found = [(self.runs[method][seed].get("right") or {}).get(place) for seed in seeds]
        if self.metric != "accuracy" or not found or None in found:
            return None
        return np.array([unpack_bits(text, self.count) for text in found])


def quality(data: dict, name: str, plots: Path | None) -> str:
    found = Quality(data)
    runs, schemes, exits, scores, difference = found.runs, found.schemes, found.exits, found.scores, found.difference
    labels, metric, count = found.labels, found.metric, found.count
    budgeted = [row["budgeted"] for scheme in schemes for row in runs[scheme].values() if row["budgeted"]]
    start = max((min(point["target_cost"] for point in points) for points in budgeted), default=None)

    anytime, budgets, words = [], [], []
    for scheme in schemes:
        rows = runs[scheme].values()
        each = ([row["anytime"][index]["metrics"].get(metric) for row in rows] for index in range(len(exits)))
        anytime.append([scheme, *(spread(values) for values in each)])
        against_stock = difference(scheme, None, "stock")
        budgets.append([scheme, *(spread([*scores(scheme, share).values()]) for share in SHARES)])
        budgets[-1].append(spread([curve_area(row["budgeted"], metric, start) for row in rows]))
        budgets[-1] += [spread([*scores(scheme).values()]), str(against_stock)]
        budgets[-1] += [certified(rows, limit, metric) for limit in LIMITS]
        words += sentence(scheme, "plain fine-tuning of the whole model", {"last exit": against_stock})

    baselines, against_cut = [], defaultdict(dict)
    for method, label in labels.items():
        cost = found.cost(method)
        baselines.append([f"fine-tuned, {label}", f"{cost:.2f}", spread([*scores(method).values()])])
        # The cost of that layer's exit: more than the smaller model by the heads before it, under 0.1 % here.
        budget = next((e["relative_cost"] for e in exits if found.layers.get(method) == e["layer"]), cost)
        for scheme in schemes:
            against = difference(scheme, budget, method)
            baselines[-1].append(str(against))
            if method != "stock":
                against_cut[scheme][f"{label}, cost {cost:.2f}"] = against
    quantized = [row["int8"] | {"float32": row["metrics"]} for row in runs["stock"].values() if "int8" in row]
    if quantized:
        of = [spread([row[key].get(metric) for row in quantized]) for key in ("metrics", "float32")]
        times = spread([row["time / float32"] for row in quantized])
        words.append(
            f"- Plain fine-tuning with linear layers in int8 (dynamic quantization of PyTorch, on the CPU), all rows: "
            f"{of[0]}, against {of[1]} in float32, at {times} of the time at batch 1. Exits save beside it: an "
            "early-exit model can be quantized too.\n"
        )
    for scheme in schemes:
        words += sentence(scheme, "the smaller fine-tuned model of the same cost", against_cut[scheme])

    between = []
    pairs = [(scheme, "joint") for scheme in schemes[1:]] if schemes[:1] == ["joint"] else []
    if {"two_stage", "two_stage-joint"} <= {*schemes}:
        pairs.append(("two_stage-joint", "two_stage"))
    for scheme, other in pairs:
        places = {f"budget {share:.0%}": difference(scheme, share, other, share) for share in SHARES}
        places["last exit"] = difference(scheme, None, other)
        between.append([f"{scheme} - {other}", *map(str, places.values())])
        words += sentence(scheme, other, places)
    plain = [value for value in scores("stock").values() if value is not None]
    if metric == "matthews_correlation" and plain and np.mean(plain) < 0.1:
        words.append(
            f"- Plain fine-tuning of the whole model hardly beats a constant answer here ({np.mean(plain):.3f}; a "
            "constant has 0): this model and recipe do not learn the task, and comparisons on it say little.\n"
        )

    plot_quality(found, name, plots)
    shares = [f"budget {share:.0%}" for share in SHARES]
    tables = [
        (
            f"{metric} at every exit, all {count} evaluation rows; relative cost in the head:\n",
            ["scheme", *(f"exit {e['exit']}, {e['relative_cost']:.2f}" for e in exits)],
            anytime,
        ),
        (
            f"{metric} under a budget, on the {count - count // 2} reported rows (certified: from the last exit):\n",
            ["scheme", *shares, "area", "last exit", "last exit - fine-tuned", *CERTIFIED],
            budgets,
        ),
        (
            "Stock models, whole or their first layers; schemes at the cost of an exit after them, less the "
            "baseline:\n",
            ["baseline", "cost", metric, *(f"{scheme} - baseline" for scheme in schemes)],
            baselines,
        ),
        ("Schemes against each other:\n", ["", *shares, "last exit"], between),
    ]
    parts = [
        f"## Quality: {found.task}\n",
        f"Recipe `{found.recipe}`, seeds {', '.join(map(str, found.seeds))}, by `benchmarks/quality.py`; "
        f"{' / '.join(found.machines)}. The first of its runs:\n\n```\n{found.first['command']}\n```\n",
        *notes(data),
    ]
    for text, head, lines in tables:
        if lines:
            parts += [text, table(head, lines)]
    parts += [
        f"![{metric} against cost](plots/{name}.png)\n",
        "Conclusions. Two methods differ if the interval of their difference excludes 0; where there is none, if "
        f"several seeds all agree on its sign, as {2.0 ** (1 - max(2, len(found.seeds))):.0%} of equal methods would "
        "by chance.\n",
        "".join(words),
    ]
    return "\n".join(parts)


def one_seed(data: dict, name: str, plots: Path | None) -> str:
    """A results file of one seed: what each run gave, and no differences."""
    found, lines = Quality(data), []
    for method, (row, *_) in ((method, [*of.values()]) for method, of in found.runs.items()):
        scores = [exit["metrics"][found.metric] for exit in row.get("anytime", [])]
        cells = [f"{row['relative_cost']:.2f}" if "relative_cost" in row else "1.00"]
        cells += [f"{score:.3f}" for score in scores] or [
            "",
            *[""] * (len(found.exits) - 2),
            f"{row['metrics'][found.metric]:.3f}",
        ]
        cells += [spread([*found.scores(method, share).values()]) if scores else "" for share in SHARES]
        lines.append([method, *cells, *(certified([row], limit, found.metric) if scores else "" for limit in LIMITS)])
    exits = [f"exit {e['exit']}, {e['relative_cost']:.2f}" for e in found.exits]
    head = ["", "cost", *exits, *(f"budget {share:.0%}" for share in SHARES), *CERTIFIED]
    return "\n".join(
        [
            f"## Whole data set, one seed: {found.task}\n",
            f"{' / '.join(found.machines)}. One seed: differences of a point may be chance. Exits on all "
            f"{found.count} evaluation rows, budgets on half of them. The first of its runs:\n\n```\n"
            f"{found.first['command']}\n```\n",
            *notes(data),
            table(head, lines),
        ]
    )


def summary(files: list[tuple[str, dict]], plots: Path | None) -> str:
    """What a reader wants to know first: `joint`, the default scheme, and `two_stage`, on each data set."""
    lines, curves, kept = [], {}, defaultdict(list)
    current = {data.get("recipe") for _, data in files if "note" not in data}
    for name, data in files:
        if "note" in data and data.get("recipe") in current and not name.startswith("gpu_"):
            continue  # superseded
        found = Quality(data)
        plain = [value for value in found.scores("stock").values() if value is not None]
        if "joint" not in found.schemes or not plain or np.mean(plain) < 0.1:
            continue
        task = f"{found.task}, {name.split('_')[-1]}" + (", all rows" if name.startswith("gpu_") else "")
        task += (", one seed" if len(found.seeds) == 1 else "") + ("*" if "note" in data else "")
        small = {method: found.difference(method, None, "stock") for method in found.cuts}
        best = max((m for m in small if found.cost(m) <= 0.51), key=lambda method: small[method].mean, default=None)
        rival = "not run" if best is None else f"{small[best]}, {found.labels[best]}"
        for scheme in SUMMARIZED:
            if scheme not in found.schemes:
                continue
            half, quarter = (found.difference(scheme, share, "stock") for share in (0.5, 0.25))
            if half.known:
                kept[scheme].append(half.mean >= -0.003)
            rows = [*found.runs[scheme].values()]
            policies, certificate = certificates(rows, "0.05")
            if policies:
                certificate = f"{np.mean([policy['relative_cost'] for policy in policies]):.2f}"
                certificate += f" ({len(policies)} of {len(rows)})" if len(policies) < len(rows) else ""
            plain_cell = f"{found.metric} {spread(plain)}"
            lines.append([task, scheme, plain_cell, str(half), str(quarter), certificate, rival])
            points = zip(*(row["budgeted"] for row in rows), strict=False)
            curves[task, scheme] = [
                [
                    np.mean([p["relative_cost"] for p in ps]),
                    np.mean([p["metrics"][found.metric] for p in ps]) - np.mean(plain),
                ]
                for ps in points
                if not any(p["metrics"].get(found.metric) is None for p in ps)
            ]
    if not lines:
        return ""
    labels = {"xlabel": "relative cost (plain model = 1)", "ylabel": "metric, less plain fine-tuning"}
    labels["title"] = "joint (dotted), two_stage (solid), two_stage-joint (dashed)"
    with plot(plots, "summary", **labels, xlim=(0, None)) as axes:
        axes.axhline(0, color="0.6", lw=1)
        colors = {task: f"C{place}" for place, task in enumerate(dict.fromkeys(task for task, _ in curves))}
        for (task, scheme), points in curves.items():
            label = task if scheme == "two_stage" or (task, "two_stage") not in curves else None
            axes.plot(*zip(*points, strict=True), SUMMARIZED[scheme], color=colors[task], ms=3, lw=1, label=label)
    head = ["data", "scheme", "plain fine-tuning", "half of the cost", "a quarter", "certified", "fewer layers"]
    counts = ", ".join(f"{sum(each)} of {len(each)} with `{scheme}`" for scheme, each in kept.items())
    parts = [
        "## In one minute\n",
        "The metric at half and at a quarter of the cost, less plain fine-tuning of the same model. Certified: the "
        "cost at which answers differ from the last exit's on at most 5 % of inputs, with 90 % confidence. Fewer "
        "layers: the best stock model of at most half of the layers, fine-tuned alike or distilled from the whole "
        "one, less plain fine-tuning.\n",
        table(head, lines),
        f"Data sets on which half of the cost gives plain fine-tuning, less at most 0.003: {counts}. \\*: measured "
        "before a default changed, as the section says.\n",
        "![metric less plain fine-tuning, against cost](plots/summary.png)\n",
    ]
    return "\n".join(parts)


def notes(data: dict) -> list[str]:
    """What else a reader must know of a file's figures."""
    return [f"{data['note']}\n"] if "note" in data else []


CERTIFIED = [f"certified to differ on ≤ {float(limit):.0%}" for limit in LIMITS]


def certificates(rows: list[dict], limit: str) -> tuple[list[dict], str]:
    """The certified policies of a scheme's runs; if there are none, the reason."""
    if not any(row["risks"] for row in rows):
        return [], "needs classes"
    risks = [row["risks"].get(limit) for row in rows if row["risks"]]
    return [risk for risk in risks if risk and "metrics" in risk], "none" if any(risks) else "not run"


def certified(rows: list[dict], limit: str, metric: str) -> str:
    """How many seeds got a policy, its cost and metric."""
    policies, reason = certificates(rows, limit)
    if not policies:
        return f"0 of {len(rows)}" if reason == "none" else "not run"
    cost = spread([policy["relative_cost"] for policy in policies])
    score = spread([policy["metrics"].get(metric) for policy in policies])
    return f"{len(policies)} of {len(rows)}: cost {cost}, {metric} {score}"


# A smaller model, the larger one, and how many times as many layers of the same shape that has.
LARGER = {"quality_clinc_minilm": ("quality_clinc_e5", 2), "quality_sst2_minilm-10000": ("quality_sst2_e5", 2)}


def models_of_one_cost(files: dict[str, dict]) -> str:
    """A larger model with exits beside a smaller one that costs as much."""
    lines = []
    for small, (large, factor) in LARGER.items():
        if not {small, large} <= files.keys():
            continue
        rows, pair = [], [(name, unit, Quality(files[name])) for name, unit in ((large, factor), (small, 1))]
        seeds = set.intersection(*(set(found.seeds) for *_, found in pair))
        for name, unit, found in pair:
            for share in (1.0, 0.5, 0.25):
                stock = [method for method in found.labels if not method.startswith("student-")]
                methods = {method: None for method in stock if abs(found.cost(method) - share) < 0.02}
                cells = [found.mean(methods, seeds)]
                for scheme in SUMMARIZED:
                    methods = {scheme: None if share == 1 else share} if scheme in found.schemes else {}
                    cells.append(found.mean(methods, seeds))
                model = name.rpartition("_")[2].partition("-")[0]
                rows.append((-share * unit, [found.task, f"{share * unit:.2f}", model, *cells]))
        lines += [cells for _, cells in sorted(rows)]
    if not lines:
        return ""
    text = (
        "Cost in units of MiniLM-L6. e5 is a BERT of twelve layers of the same shape, so half of it costs as much as "
        "all of MiniLM-L6. `fine-tuned`: the whole model, or its first layers at that cost. Schemes: the last exit, "
        "or under a budget. Means over the seeds that both models ran.\n"
    )
    head = ["data", "cost", "model", "fine-tuned", *SUMMARIZED]
    return "\n".join(["## A larger model with exits, or a smaller model\n", text, table(head, lines)])


def plot_quality(found: Quality, name: str, plots: Path | None) -> None:
    runs, metric = found.runs, found.metric
    labels = {"xlabel": "relative cost (plain model = 1)", "ylabel": metric.replace("_", " "), "title": found.task}
    with plot(plots, name, **labels, xlim=(0, None)) as axes:

        def bars(costs, several, **style):
            deviations = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in several]
            axes.errorbar(costs, [np.mean(values) for values in several], deviations, elinewidth=0.6, **style)

        for color, scheme in enumerate(dict.fromkeys([*SCHEMES, *found.schemes])):  # one color on all plots
            points = zip(*(row["budgeted"] for row in runs[scheme].values()), strict=False)
            curve = [([p["relative_cost"] for p in ps], [p["metrics"].get(metric) for p in ps]) for ps in points]
            curve = [(np.mean(costs), values) for costs, values in curve if None not in values]
            if curve:
                bars(*zip(*curve, strict=True), fmt="o-", ms=3, lw=1, color=f"C{color}", label=scheme)
        kinds = {kind: [method for method in found.cuts if method.startswith(kind)] for kind in ("cut-", "student-")}
        baselines = [(["stock"], "*", "fine-tuned"), (kinds["cut-"], "s", "fine-tuned, fewer layers")]
        for methods, marker, label in (*baselines, (kinds["student-"], "D", "the same, distilled")):
            rows = [[*runs[method].values()] for method in methods if method in found.labels]
            if rows:
                values = [[row["metrics_report"].get(metric) for row in of] for of in rows]
                bars([of[0]["relative_cost"] for of in rows], values, fmt=marker, color="0.35", label=label)


def target(value: float, limit: float, at_least: bool = False) -> str:
    met = value >= limit if at_least else value <= limit
    return f"{'≥' if at_least else '≤'} {limit:.2f}: {'met' if met else 'missed'}"


def quartiles(measured: dict) -> str:
    return f"{measured['quartile_1_ms']:.1f} to {measured['quartile_3_ms']:.1f}"


def source(data: dict) -> str:
    return f"`{data['command']}`; {machine_text(data['machine'])}.\n"


def inference(data: dict, name: str, plots: Path | None) -> str:
    gpu, of_kind = "NVIDIA" in data["machine"]["device"], defaultdict(list)
    parts = [f"## Inference: {name.removeprefix('inference_')}\n", source(data)]
    for row in data["rows"]:
        of_kind[row["what"]].append(row)
    lines = []
    for row in of_kind.pop("batch 1", []):
        value = row["dynamic / cut stock model"]
        limit = 1.10 if gpu else 1.03 if row["length"] in (None, 128) else 1.06
        line = ["images" if row["length"] is None else f"{row['length']} tokens", str(row["exit"]), str(row["layer"])]
        line += [f"{value:.3f}", f"{row['undecided / cut stock model']:.3f}", target(value, limit)]
        lines.append([*line, quartiles(row["dynamic"]), quartiles(row["cut"])])
    if lines:
        head = ["input", "exit", "layer", "dynamic / cut", "undecided / cut", "target", "quartiles, dynamic (ms)"]
        text = (
            "Batch 1: time up to an exit, against the stock model cut to that many layers, which has one head; "
            "undecided: the layers and all heads up to that exit, without decisions and without the forward around "
            "them. Where it grows with the exit, the heads cost it: one row reads all of a head's weights, in BERT a "
            "twelfth of a layer's. The rest of `dynamic` is the forward around them and, per exit, a decision: a few "
            "small operations and one read.\n"
        )
        parts += [text, table([*head, "cut (ms)"], lines)]
    batches, lines = of_kind.pop("batch", []), []
    for row in batches:
        value = row["ideal / dynamic"]
        cells = [f"{row[key]:.3f}" for key in ("mean share of rows", "dynamic / stock", "all exits / stock")]
        line = [str(row["batch_size"]), f"{value:.3f}", target(value, 0.85 if gpu else 0.97, at_least=True)]
        lines.append([*line, *cells, quartiles(row["dynamic"])])
    if lines:
        head = ["batch", "ideal / dynamic", "target", "mean share of rows", "dynamic / stock", "all exits / stock"]
        text = (
            "Batches, equal shares exit at every exit; ideal: each layer's full-batch time x its share of the rows, "
            "of which the mean is shown:\n"
        )
        parts += [text, table([*head, "quartiles (ms)"], lines), f"![time against cost](plots/{name}.png)\n"]
        labels = {"xlabel": "share of layers run (stock = 1)", "ylabel": "time (stock = 1)"}
        with plot(plots, name, **labels, xlim=(0, 1.05), ylim=(0, None)) as axes:
            axes.plot([0, 1], [0, 1], ":", color="0.6", label="time = cost")
            for row in batches:
                axes.plot(row["mean share of rows"], row["dynamic / stock"], "o", label=f"batch {row['batch_size']}")
    for row in of_kind.pop("data set", []):
        off, on = row["stock pipeline / exits off"], row["stock pipeline / exits on"]
        parts += [
            f"Whole data set, {row['rows']} texts of real lengths, batch {row['batch_size']}, tokenizing included: "
            f"{off:.2f} x faster than the stock pipeline with exits off ({target(off, 1.3, at_least=True)}), "
            f"{on:.2f} x with exits on, where a layer sees {row['mean share of rows']:.3f} of the rows.\n"
        ]
    return "\n".join([*parts, *(plain_table(rows) for rows in of_kind.values())])


def screened(data: dict, name: str, plots: Path | None) -> str:
    """Options that the library does not offer, against joint exits in the same plain loop."""
    runs, lines = defaultdict(dict), []
    for row in data["rows"]:
        runs[row["data"], row["option"]][row["seed"]] = row
    for (task, option), of in runs.items():
        base = runs.get((task, "joint"), {})
        seeds, exits = sorted(of.keys() & base.keys()), np.mean([row["exits"] for row in of.values()], 0)
        cells = [task, option, str(len(of)), " ".join(f"{score:.3f}" for score in exits)]
        for place in (*(f"{share:g}" for share in SHARES), "last"):
            if option == "joint" or not all(place in of[seed]["right"] for seed in seeds) or not seeds:
                cells.append("")
                continue
            bits = [[unpack_bits(r[seed]["right"][place], r[seed]["num_rows"]) for seed in seeds] for r in (of, base)]
            cells.append(str(Difference([], tuple(map(np.array, bits)))))
        lines.append(cells)
    commands = "\n".join(dict.fromkeys(row["command"] for row in data["rows"]))
    machines = " / ".join(dict.fromkeys(machine_text(row["machine"]) for row in data["rows"]))
    text = (
        "MiniLM-L6 in a plain loop, one epoch; differences to `joint` of the same loop, paired by seed and row. "
        "`benchmarks/screen.py` says what each option is. `plain heads`: as with `--standardize_heads false`. What is "
        "not above joint on two data sets is not built; `retrofit` is, as `--method two_stage`. "
        f"{machines}.\n\n```\n{commands}\n```\n"
    )
    head = ["data", "option", "seeds", "exits", *(f"budget {share:.0%}" for share in SHARES), "last exit"]
    return "\n".join(["## Ways of training that were tried\n", text, table(head, lines)])


def architectures(data: dict, name: str, plots: Path | None) -> str:
    """Runs of several models, one seed each."""
    lines, commands = [], dict.fromkeys(row["command"] for row in data["rows"])
    for row in data["rows"]:
        exits = (f"{e['accuracy']:.3f} (layer {e['layer']}, {e['relative_cost']:.2f})" for e in row["exits"])
        lines.append([row["model"], row["data"], str(row["seed"]), str(row["evaluation_rows"]), ", ".join(exits)])
    return "\n".join(
        [
            "## Other architectures, one seed each\n",
            f"{machine_text(data['machine'])}.\n",
            "\n".join(["```", *commands, "```\n"]),
            table(["model", "data", "seed", "evaluation rows", "accuracy of exits (layer, relative cost)"], lines),
        ]
    )


STEP_COLUMNS = [f"{what} / {other}" for what in ("time", "memory") for other in ("plain fine-tuning", "joint")]


def training_step(data: dict, name: str, plots: Path | None) -> str:
    lines = []
    for row in data["rows"]:
        other, *limits = STEP_TARGETS.get(row["scheme"], ("joint", None, None))
        keys = [f"{what} / {other}" for what in ("time", "memory")]
        texts = [f"{key} {target(row[key], limit)}" for key, limit in zip(keys, limits, strict=True) if limit]
        cells = [f"{row[key]:.3f}" for key in STEP_COLUMNS]
        lines.append([row["scheme"], str(row["batch_size"]), *cells, "; ".join(texts), quartiles(row["step"])])
    parts = [f"## Training step: {name.removeprefix('training_step_')}\n", source(data)]
    return "\n".join([*parts, table(["scheme", "batch size", *STEP_COLUMNS, "target", "quartiles (ms)"], lines)])


def plain_table(rows: list[dict]) -> str:
    """Numbers and words of rows, as they are; nested measurements are left to the JSON file."""
    flat = [{key: value for key, value in row.items() if not isinstance(value, (dict, list))} for row in rows]
    keys = list(dict.fromkeys(key for row in flat for key in row))
    texts = [{key: f"{v:.3f}" if isinstance(v, float) else str(v) for key, v in row.items()} for row in flat]
    return table(keys, [[row.get(key, "") for key in keys] for row in texts])


def planted(data: dict, name: str, plots: Path | None) -> str:
    found = [row for row in data["rows"] if "seed" in row]  # the others are means over seeds
    lines, runs = [], np.array([row["learned"]["easy_minus_hard"] for row in found])
    for plant in dict.fromkeys(row["plant"] for row in found):
        for measure in ("final", "learned"):
            rows = [row[measure]["easy_minus_hard"] for row in found if row["plant"] == plant]
            lines.append([f"{plant}, {measure}", *(spread([*at], signed=True) for at in zip(*rows, strict=True))])
    text = (
        "Weight of easy less hard training rows at each exit, after `--method l2w` on BBC News; hard ones planted: "
        "flipped labels, or texts cut short. `final`: the weight network as it ended; `learned`: less what it gave "
        "before training. The paper expects easy rows to gain at early exits (+) and hard ones at late exits (-).\n"
    )
    holds = ((runs[:, 0] > 0) & (runs[:, -1] < 0)).sum()
    word = f"`learned` has these signs, + at the first exit and - at the last, in {holds} of {len(runs)} runs"
    word += ".\n" if holds == len(runs) else ": the pattern is not established here.\n"
    head = ["planted", *(f"exit {k}" for k in range(1, runs.shape[1] + 1))]
    return "\n".join(["## What the weight network of l2w learns\n", source(data), text, table(head, lines), word])


def partition(data: dict, name: str, plots: Path | None) -> str:
    lines = []
    for row in data["rows"]:
        seconds, low, high = (row["wall"][key] / 1000 for key in ("median_ms", "quartile_1_ms", "quartile_3_ms"))
        memory = row["peak memory (GiB)"]
        cells = [row["format"], str(row["parts"]), str(row["rows"]), f"{seconds:.1f}", target(seconds, 60)]
        cells += [f"{low:.1f} to {high:.1f}", f"{row['cpu']['median_ms'] / 1000:.1f}"]
        lines.append([*cells, f"{memory:.2f}", target(memory, 2)])
    text = (
        "CIFAR-100 in balanced non-IID parts (`recipes/generate_cifar100.py noniid balance dir`), from the first "
        "import to the last file, with an empty cache; the largest peak of resident memory in all repeats. CPU time "
        "under the wall's: the process waited, for a shared core or the disk.\n"
    )
    head = [
        "format",
        "parts",
        "rows",
        "median (s)",
        "target",
        "quartiles (s)",
        "CPU (s)",
        "peak memory (GiB)",
        "target",
    ]
    return "\n".join(["## Partition\n", source(data), text, table(head, lines)])


def serving(data: dict, name: str, plots: Path | None) -> str:
    lines, limits = [], data["targets"]
    for row in data["rows"]:
        if row["what"] == "saturation":
            what, ratio = f"saturation, answers a second (stock: up to {row['stock_max_rows']} rows)", row["ratio"]
            values = [f"{row[f'{kind}_per_second']:.1f}" for kind in ("stock", "exits")]
            judged = target(ratio, limits["throughput at saturation"], at_least=True)
        elif "p99_ratio" in row:
            what, ratio = f"{row['what']}, p50 and p99 in ms ({row['num_requests']} requests)", row["p99_ratio"]
            values = [f"{row[f'{kind}_p50_ms']:.0f}, {row[f'{kind}_p99_ms']:.0f}" for kind in ("stock", "exits")]
            judged = target(ratio, limits["p99 at 80 % load"]) if row["what"].startswith("open loop, 80%") else ""
        elif "ratio" in row:
            what, ratio = "a lone request, ms (model called directly, engine)", row["ratio"]
            values = [f"{row[f'{kind}_ms']:.2f}" for kind in ("model", "engine")]
            judged = target(ratio, limits[row["what"]])
        else:
            continue
        lines.append([what, *values, f"{ratio:.3f}", judged])
    text = "`een-hf serve` against the same server around the stock pipeline with dynamic batching.\n"
    head = ["what", "stock", "with exits", "ratio", "target"]
    return "\n".join(["## Serving\n", source(data), text, *filter(None, [data.get("note")]), table(head, lines)])


def generic(data: dict, name: str, plots: Path | None) -> str:
    return "\n".join([f"## {name.replace('_', ' ').capitalize()}\n", source(data), plain_table(data["rows"])])


def gpu(data: dict, name: str, plots: Path | None) -> str:
    from gpu import figures

    part = name.removeprefix("gpu_")
    lines = table(["where", "what", "value", "target"], figures(part, data["rows"], judged=True))
    return "\n".join([f"## On a GPU: {part}\n", source(data), GPU_TEXTS[part], *notes(data), lines])


GPU_TEXTS = {
    "correctness": (
        "Answers of the runner, of `predict`, of the engine and of the server's worker against the anytime logits at "
        "the exit that each example takes.\n"
    ),
    "single": (
        "One example that exits at exit k, the only exit that the policy uses, against the stock model cut to that "
        "many layers, eager and as one CUDA graph without a mask. `each exit`: with a decision, and a wait for it, at "
        "every exit before; `dynamic`: the model's own forward, without graphs.\n"
    ),
    "batches": (
        "Half of the layers on average: the runner against the whole stock model, eager and as one CUDA graph without "
        "a mask; `ideal`: the graph's time if layers cost in proportion to the examples that continue.\n"
    ),
    "texts": (
        "A data set of texts of many lengths, tokenizing included: times as fast as the stock pipeline. `in flight`: "
        "by an engine that keeps the deeper stages full.\n"
    ),
    "serving": (
        "Examples of many lengths, always so many waiting, through the server's worker without HTTP: times as fast as "
        "the stock model on batches of those that wait.\n"
    ),
    "training": "A step of each scheme, bf16 autocast, an exit after every layer.\n",
}

SECTIONS = {
    "gpu_quality_": one_seed,
    "gpu_": gpu,
    "quality_": quality,
    "screen": screened,
    "architectures": architectures,
    "planted_": planted,
    "inference_": inference,
    "training_step_": training_step,
    "partition": partition,
    "serving": serving,
}


def write_page(results: Path, plots: Path | None) -> str:
    """The page's text; its plots go to a folder, or nowhere."""
    order, parts, qualities = [*SECTIONS, ""], [], []
    for path in sorted(results.glob("*.json")):
        place = next(index for index, prefix in enumerate(order) if path.stem.startswith(prefix))
        section, data = SECTIONS.get(order[place], generic), json.loads(path.read_text())
        parts.append((place, path.stem, section(data, path.stem, plots)))
        if section in (quality, one_seed):
            qualities.append((path.stem, data))
    beside = models_of_one_cost(dict(qualities))
    return "\n".join([HEAD, summary(qualities, plots), beside, *(text for *_, text in sorted(parts)), PAPERS])


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--folder", type=Path, default=HERE, help="with results/; README.md and plots/ go there")
    args = parser.parse_args(words)
    page = args.folder / "README.md"
    text = write_page(args.folder / "results", None if args.check else args.folder / "plots")
    if not args.check:
        page.write_text(text)
    elif not page.exists() or page.read_text() != text:
        sys.exit(f"{page} is not up to date: run python benchmarks/page.py")


if __name__ == "__main__":
    main()
