#!/usr/bin/env python
"""Write benchmarks/README.md and its plots from the JSON files in benchmarks/results/; nothing is measured here.

python benchmarks/page.py            write the page
python benchmarks/page.py --check    fail if the page is not what the files give
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from een_hf.evaluation import curve_area, metric_at_cost


HERE = Path(__file__).parent
SCHEMES = ("joint", "boosted", "l2w")
BASELINES = ("stock", "cut-4", "cut-3", "cut-2")
SHARES = (0.25, 0.5, 0.75)
NOT_RUN = "not run"

HEAD = """# Benchmarks

Written by `python benchmarks/page.py` from the JSON files in `benchmarks/results/`; each names its recipe, seeds,
versions, machine and command. ± is the standard deviation over seeds. Relative cost: multiply-accumulates divided by
those of the plain model. A budget is set before the rows are seen that measure it: half of the evaluation rows
calibrate, the other half is reported. Differences are paired: both runs of a pair share seed and evaluation rows.
"""

# (claim, source)
PAPERS = [
    (
        "L2W-DEN on CIFAR-100: about +1.1 points, and 1.6 x cheaper at equal accuracy, over its base (MSDNet)",
        "ECCV 2022",
    ),
    (
        "BoostNet on CIFAR-100 (MSDNet, anytime, read off a figure): +2.9 points at a third of the cost, +0.3 at the "
        "last exit",
        "AAAI 2023",
    ),
    (
        "BERT-base at about 2 x on GLUE test, SST-2 and MNLI: COSEE 93.0 of 93.5 and 83.4 of 84.6; 6-layer BERT 91.0 "
        "and 80.8; DeeBERT 90.2 and 74.4; PABEE 89.3 and 79.8",
        "COSEE, AAAI 2025, table 2",
    ),
]


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: list[float | None], signed: bool = False) -> str:
    """Mean ± standard deviation; one value alone has no deviation."""
    known = [value for value in values if value is not None]
    if not known:
        return NOT_RUN
    mean = f"{np.mean(known):+.3f}" if signed else f"{np.mean(known):.3f}"
    return mean if len(known) == 1 else f"{mean} ± {np.std(known, ddof=1):.3f}"


def paired(first: dict[int, float | None], second: dict[int, float | None]) -> list[float]:
    """Differences first - second over the seeds that both have."""
    seeds = sorted(seed for seed in first.keys() & second.keys() if None not in (first[seed], second[seed]))
    return [first[seed] - second[seed] for seed in seeds]


# Quality


def quality(data: dict, name: str) -> str:
    runs = defaultdict(dict)
    for row in data["rows"]:
        runs[row["method"]][row["seed"]] = row
    first = data["rows"][0]
    metric, task = first["metric"], first["task_name"] or first["dataset"]
    schemes = [scheme for scheme in SCHEMES if scheme in runs]
    starts = [
        min(p["target_cost"] for p in row["budgeted"]) for s in schemes for row in runs[s].values() if row["budgeted"]
    ]
    start = max(starts, default=None)

    def scores(method: str, cost: float | None = None) -> dict[int, float | None]:
        """By seed, on the rows that calibrated nothing: at a budget, or all of the network."""
        if method in BASELINES:
            return {seed: row["metrics_report"].get(metric) for seed, row in runs[method].items()}
        if cost is None:
            return {seed: row["anytime_report"][-1]["metrics"].get(metric) for seed, row in runs[method].items()}
        return {seed: metric_at_cost(row["budgeted"], cost, metric) for seed, row in runs[method].items()}

    layers = [entry["layer"] for entry in first["anytime"]]
    costs = [entry["relative_cost"] for entry in first["anytime"]]
    anytime = []
    for scheme in SCHEMES:
        cells = [
            spread([row["anytime"][index]["metrics"].get(metric) for row in runs[scheme].values()])
            for index in range(len(layers))
        ]
        anytime.append([scheme, *cells])
    anytime_head = ["scheme", *(f"exit {k}, {cost:.2f}" for k, cost in enumerate(costs, 1))]

    budgets = []
    for scheme in SCHEMES:
        areas = [
            curve_area(row["budgeted"], metric, start) if row["budgeted"] else None for row in runs[scheme].values()
        ]
        certified = [row["risk"] for row in runs[scheme].values() if row.get("risk") and "metrics" in row["risk"]]
        found = f"{len(certified)} of {len(runs[scheme])}" if runs[scheme] else NOT_RUN
        if certified:
            cost = spread([risk["relative_cost"] for risk in certified])
            found += f": cost {cost}, {metric} {spread([risk['metrics'].get(metric) for risk in certified])}"
        budgets.append(
            [
                scheme,
                *(spread(list(scores(scheme, share).values())) for share in SHARES),
                spread(areas),
                spread(list(scores(scheme).values())),
                spread(paired(scores(scheme), scores("stock")), signed=True),
                found,
            ]
        )
    head = ["scheme", *(f"budget {share:.0%}" for share in SHARES)]
    head += [
        "area",
        "last exit",
        "last exit - fine-tuned",
        "policies certified to differ from the last exit on ≤ 5 %",
    ]

    baselines, sentences = [], []
    for method in BASELINES:
        cost = [row["relative_cost"] for row in runs[method].values()]
        cells = [spread(list(scores(method).values()))]
        for scheme in SCHEMES:
            difference = paired(scores(scheme, cost[0]), scores(method)) if cost else []
            cells.append(spread(difference, signed=True))
        label = "fine-tuned, whole" if method == "stock" else f"fine-tuned, first {method[4:]} layers"
        baselines.append([label, f"{cost[0]:.2f}" if cost else NOT_RUN, *cells])
        if method != "stock" and cost:
            sentences += [
                verdict(f"{scheme} under the budget {cost[0]:.2f}", f"the model of {method[4:]} layers", difference)
                for scheme in SCHEMES
                if (difference := paired(scores(scheme, cost[0]), scores(method)))
            ]
    between = []
    for scheme in SCHEMES[1:]:
        cells = [spread(paired(scores(scheme, share), scores("joint", share)), signed=True) for share in SHARES]
        last = paired(scores(scheme), scores("joint"))
        between.append([f"{scheme} - joint", *cells, spread(last, signed=True)])
        sentences += [
            verdict(f"{scheme} under the budget {share:.0%}", "joint", difference)
            for share in SHARES
            if (difference := paired(scores(scheme, share), scores("joint", share)))
        ]
        sentences += [verdict(f"{scheme} at the last exit", "joint", last)] if last else []
    for scheme in schemes:
        difference = paired(scores(scheme), scores("stock"))
        if difference:
            sentences.append(verdict(f"{scheme} at the last exit", "plain fine-tuning", difference))

    plot_quality(data, runs, metric, name)
    count = first["num_eval_samples"]
    parts = [
        f"## Quality: {task}\n",
        about(data["rows"], data["recipe"]),
        f"{count} evaluation rows; {metric} at every exit (all rows), relative cost in the head:\n",
        table(anytime_head, anytime),
        f"{metric} under a budget, on the {count - count // 2} reported rows:\n",
        table(head, budgets),
        "Plain fine-tuning, of the whole model and of its first layers; then each scheme under a budget of the same "
        "cost, less the baseline:\n",
        table(["baseline", "cost", metric, *(f"{scheme} - baseline" for scheme in SCHEMES)], baselines),
        "Schemes against joint:\n",
        table(["", *(f"budget {share:.0%}" for share in SHARES), "last exit"], between),
        f"![{metric} against cost](plots/{name}.png)\n",
        "In words (a difference is called one if all seeds agree on its sign):\n",
        "\n".join(f"- {sentence}" for sentence in sentences) + "\n",
    ]
    return "\n".join(parts)


def verdict(what: str, other: str, differences: list[float]) -> str:
    """Better, worse or undecided, by the sign of every paired difference."""
    mean = f"{np.mean(differences):+.3f} over {len(differences)} seeds"
    if len(differences) > 1 and min(differences) > 0:
        return f"{what} beats {other} ({mean})."
    if len(differences) > 1 and max(differences) < 0:
        return f"{what} loses to {other} ({mean})."
    return f"{what} does not differ clearly from {other} ({mean})."


def about(rows: list[dict], recipe: str) -> str:
    machines = {json.dumps(row["machine"], sort_keys=True): row["machine"] for row in rows}
    seeds = sorted({row["seed"] for row in rows})
    command = f"python benchmarks/quality.py {recipe} --seeds {max(seeds)}"
    return f"Recipe `{recipe}`, seeds {', '.join(map(str, seeds))}, `{command}`; {machines_text(machines.values())}.\n"


def machines_text(machines) -> str:
    return "; ".join(
        f"{m['device']}, {m['cores']} cores, {m['threads']} thread{'s' if m['threads'] > 1 else ''}, "
        f"torch {m['torch']}, transformers {m['transformers']}"
        for m in machines
    )


def plot_quality(data: dict, runs: dict, metric: str, name: str) -> None:
    figure = Figure(figsize=(7, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for color, scheme in enumerate(SCHEMES):
        rows = [row for row in runs[scheme].values() if row["budgeted"]]
        if not rows:
            continue
        points = zip(*(row["budgeted"] for row in rows), strict=False)
        curve = [
            (np.mean([p["relative_cost"] for p in several]), [p["metrics"].get(metric) for p in several])
            for several in points
        ]
        curve = [(cost, values) for cost, values in curve if None not in values]
        means = [np.mean(values) for _, values in curve]
        errors = [np.std(values, ddof=1) if len(values) > 1 else 0 for _, values in curve]
        costs = [cost for cost, _ in curve]
        axes.errorbar(costs, means, errors, fmt="o-", ms=3, lw=1, elinewidth=0.6, color=f"C{color}", label=scheme)
    for method in BASELINES:
        rows = list(runs[method].values())
        if rows:
            values = [row["metrics_report"].get(metric) for row in rows]
            deviation = np.std(values, ddof=1) if len(values) > 1 else 0
            label = "fine-tuned, fewer layers" if method == "cut-3" else None
            label = "fine-tuned" if method == "stock" else label
            marker = "*" if method == "stock" else "s"
            axes.errorbar(rows[0]["relative_cost"], np.mean(values), deviation, fmt=marker, color="0.35", label=label)
    axes.set(xlabel="relative cost (plain model = 1)", ylabel=metric.replace("_", " "), xlim=(0, None))
    axes.set_title(data["rows"][0]["task_name"] or data["rows"][0]["dataset"])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save(figure, name)


def save(figure: Figure, name: str) -> None:
    folder = HERE / "plots"
    folder.mkdir(exist_ok=True)
    figure.savefig(folder / f"{name}.png", metadata={"Software": None})


# Speed


def within(value: float, limit: float, at_least: bool = False) -> str:
    met = value >= limit if at_least else value <= limit
    return f"{'≥' if at_least else '≤'} {limit:g}: {'met' if met else 'missed'}"


def source(data: dict) -> str:
    return f"`{data['command']}`; {machines_text([data['machine']])}.\n"


def inference(data: dict, name: str) -> str:
    rows = data["rows"]
    parts = [f"## Inference: {name.removeprefix('inference_')}\n", source(data)]
    single = [row for row in rows if row["what"] == "batch 1"]
    if single:
        lines = []
        for row in single:
            value = row["dynamic / cut stock model"]
            limit = 1.03 if row["length"] in (None, 128) else 1.06
            what = "images" if row["length"] is None else f"{row['length']} tokens"
            lines.append([what, str(row["exit"]), str(row["layer"]), f"{value:.3f}", within(value, limit)])
        parts += ["Batch 1: time to leave at an exit, against the stock model cut to that many layers:\n"]
        parts += [table(["input", "exit", "layer", "dynamic / cut model", "target (CPU)"], lines)]
    batches = [row for row in rows if row["what"] == "batch"]
    if batches:
        lines = []
        for row in batches:
            value = row["ideal / dynamic"]
            cells = [f"{row[key]:.3f}" for key in ("mean share still there", "dynamic / stock", "all exits / stock")]
            lines.append([str(row["batch_size"]), f"{value:.3f}", within(value, 0.97, at_least=True), *cells])
        parts += [
            "Batches, equal shares leaving at every exit; ideal: each layer's time at the full batch by survivors:\n"
        ]
        head = [
            "batch",
            "ideal / dynamic",
            "target (CPU)",
            "mean share still there",
            "dynamic / stock",
            "all exits / stock",
        ]
        parts += [table(head, lines)]
        plot_time(batches, name)
        parts += [f"![time against cost](plots/{name}.png)\n"]
    for row in (row for row in rows if row["what"] == "data set"):
        off, on = row["stock pipeline / exits off"], row["stock pipeline / exits on"]
        parts += [
            f"Whole data set, {row['rows']} texts of real lengths, batch {row['batch_size']}, tokenizing included: "
            f"{off:.2f} x faster than the stock pipeline with exits off ({within(off, 1.3, at_least=True)}), "
            f"{on:.2f} x with exits on, where a layer sees {row['mean share still there']:.3f} of the rows.\n"
        ]
    other = [row for row in rows if row["what"] not in ("batch 1", "batch", "data set")]
    parts += [plain_table(other)] if other else []
    return "\n".join(parts)


def plot_time(rows: list[dict], name: str) -> None:
    figure = Figure(figsize=(5.5, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], ":", color="0.6", label="time = cost")
    for row in rows:
        x, y = row["mean share still there"], row["dynamic / stock"]
        axes.plot(x, y, "o", label=f"batch {row['batch_size']}")
    axes.set(xlabel="share of layers run (stock = 1)", ylabel="time (stock = 1)", xlim=(0, 1.05), ylim=(0, 1.1))
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    save(figure, name)


def training_step(data: dict, name: str) -> str:
    targets = {
        "joint": ("plain fine-tuning", 1.05, None),
        "boosted": ("plain fine-tuning", 1.05, None),
        "l2w, interval 1": ("joint", 4.0, 1.6),
        "l2w, interval 10": ("joint", 1.35, None),
    }
    lines = []
    for row in data["rows"]:
        other, time_limit, memory_limit = targets.get(row["scheme"], ("joint", None, None))
        time, memory = row[f"time / {other}"], row[f"memory / {other}"]
        lines.append(
            [
                row["scheme"],
                f"{row['time / plain fine-tuning']:.3f}",
                f"{row['time / joint']:.3f}",
                f"{row['memory / joint']:.3f}",
                f"time / {other} {within(time, time_limit)}" if time_limit else "",
                within(memory, memory_limit) if memory_limit else "",
            ]
        )
    head = ["scheme", "time / plain fine-tuning", "time / joint", "memory / joint", "target", "memory target"]
    title = f"## Training step: {name.removeprefix('training_step_')}\n"
    return "\n".join([title, source(data), table(head, lines)])


def plain_table(rows: list[dict]) -> str:
    """Numbers and words of rows, as they are; nested measurements are left to the JSON file."""
    keys = list(
        dict.fromkeys(key for row in rows for key, value in row.items() if not isinstance(value, (dict, list)))
    )
    cells = [[f"{row[k]:.3f}" if isinstance(row.get(k), float) else str(row.get(k, "")) for k in keys] for row in rows]
    return table(keys, cells)


def planted(data: dict, name: str) -> str:
    lines = []
    for plant in dict.fromkeys(row["plant"] for row in data["rows"]):
        rows = [row for row in data["rows"] if row["plant"] == plant]
        for measure in ("final", "learned"):
            values = np.array([row[measure]["easy_minus_hard"] for row in rows])
            lines.append([f"{plant}, {measure}", *(spread(list(column), signed=True) for column in values.T)])
    exits = len(lines[0]) - 1
    text = (
        "Weight of easy less weight of hard training rows at each exit, after `--method l2w` on BBC News; hard rows "
        "are planted: flipped labels, or texts cut short. `final`: the weight network as it ended; `learned`: "
        "less what it gave before training. The paper expects easy rows to gain at early exits (+) and hard ones at "
        "late exits (-).\n"
    )
    learned = [
        np.array([row["learned"]["easy_minus_hard"] for row in data["rows"] if row["plant"] == plant])
        for plant in dict.fromkeys(row["plant"] for row in data["rows"])
    ]
    agree = all((part[:, 0] > 0).all() and (part[:, -1] < 0).all() for part in learned)
    word = (
        "All seeds show this pattern."
        if agree
        else "The mean leans that way where it does, but not all seeds agree: not established here."
    )
    head = ["planted", *(f"exit {k}" for k in range(1, exits + 1))]
    return "\n".join(
        ["## What the weight network of l2w learns\n", source(data), text, table(head, lines), word + "\n"]
    )


def generic(data: dict, name: str) -> str:
    return "\n".join([f"## {name.replace('_', ' ').capitalize()}\n", source(data), plain_table(data["rows"])])


SECTIONS = {"quality_": quality, "planted_": planted, "inference_": inference, "training_step_": training_step}


def write_page(results: Path) -> str:
    """The page's text; its plots are drawn on the way."""
    files = sorted(results.glob("*.json"))
    order = [*SECTIONS, ""]
    place = {path: next(i for i, prefix in enumerate(order) if path.stem.startswith(prefix)) for path in files}
    parts = [HEAD]
    for path in sorted(files, key=lambda path: (place[path], path.stem)):
        section = SECTIONS.get(order[place[path]], generic)
        parts.append(section(json.loads(path.read_text()), path.stem))
    papers = "Deltas against one's own full model are comparable; absolute numbers across papers are not.\n"
    parts += ["## What the papers report\n", papers, table(["claim", "source"], [list(row) for row in PAPERS])]
    return "\n".join(parts)


def main() -> None:
    global HERE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--folder", type=Path, default=HERE, help="with results/; README.md and plots/ go there")
    args = parser.parse_args()
    HERE = args.folder
    text, page = write_page(HERE / "results"), HERE / "README.md"
    if not args.check:
        page.write_text(text)
    elif not page.exists() or page.read_text() != text:
        sys.exit(f"{page} is not up to date: run python benchmarks/page.py")


if __name__ == "__main__":
    main()
