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
from pathlib import Path

import numpy as np
from common import STEP_TARGETS
from matplotlib.figure import Figure

from een_hf.evaluation import curve_area, metric_at_cost


HERE = Path(__file__).parent
SCHEMES = ("joint", "boosted", "l2w")
CUTS = ("cut-4", "cut-3", "cut-2")
SHARES = (0.25, 0.5, 0.75)

HEAD = """# Benchmarks

Written by `python benchmarks/page.py` from `benchmarks/results/*.json`. ± is the standard deviation over seeds.
Relative cost: multiply-accumulates divided by those of the plain model. A budget is set before the rows are seen that
measure it: half of the evaluation rows calibrate, the other half is reported, at a cost that may miss the budget a
little (plots show it). Differences are paired: both runs of a pair share seed and evaluation rows. `-warm`: a scheme
after a warm start, the last exit trained alone for half of the epochs (`--warm_start_epochs`).
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
"""


def table(header: list[str], rows: list[list[str]]) -> str:
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


def sentence(scheme: str, other: str, places: dict[str, list[float | None]]) -> list[str]:
    """Where a scheme beats the other, loses to it or neither: a win is one in all seeds, of several."""
    found = defaultdict(list)
    for place, differences in places.items():
        known = [value for value in differences if value is not None]
        if known:
            wins, loses = (len(known) > 1 and min(sign * v for v in known) > 0 for sign in (1, -1))
            word = "beats" if wins else "loses to" if loses else "does not clearly differ from"
            found[word].append(f"{place} ({np.mean(known):+.3f}, seeds: {len(known)})")
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


def quality(data: dict, name: str, plots: Path | None) -> str:
    runs = defaultdict(dict)
    for row in data["rows"]:
        runs[row["method"]][row["seed"]] = row
    first, count = data["rows"][0], data["rows"][0]["num_eval_samples"]
    schemes = [*SCHEMES, *(method for method in runs if method.endswith("-warm"))]
    cuts = sorted({*CUTS, *(method for method in runs if method.startswith("cut-"))}, reverse=True)
    labels = {"stock": "whole", **{method: f"first {method.removeprefix('cut-')} layers" for method in cuts}}
    metric, task = first["metric"], first["task_name"] or first["dataset"]
    exits = next((row["anytime"] for row in data["rows"] if "anytime" in row), [])
    budgeted = [row["budgeted"] for scheme in schemes for row in runs[scheme].values() if row["budgeted"]]
    start = max((min(point["target_cost"] for point in points) for points in budgeted), default=None)

    def scores(method: str, cost: float | None = None) -> dict[int, float | None]:
        """By seed, on the rows that calibrated nothing: under a budget, or all of the network."""
        if method in labels:
            return {seed: row["metrics_report"].get(metric) for seed, row in runs[method].items()}
        if cost is None:
            return {seed: row["anytime_report"][-1]["metrics"].get(metric) for seed, row in runs[method].items()}
        return {seed: metric_at_cost(row["budgeted"], cost, metric) for seed, row in runs[method].items()}

    anytime, budgets, words = [], [], []
    for scheme in schemes:
        rows = runs[scheme].values()
        each = ([row["anytime"][index]["metrics"].get(metric) for row in rows] for index in range(len(exits)))
        anytime.append([scheme, *(spread(values) for values in each)])
        against_stock = paired(scores(scheme), scores("stock"))
        budgets.append([scheme, *(spread([*scores(scheme, share).values()]) for share in SHARES)])
        budgets[-1].append(spread([curve_area(row["budgeted"], metric, start) for row in rows]))
        budgets[-1] += [spread([*scores(scheme).values()]), spread(against_stock, signed=True)]
        budgets[-1].append(certified([row["risk"] for row in rows], metric))
        words += sentence(scheme, "plain fine-tuning of the whole model", {"last exit": against_stock})

    baselines, against_cut = [], defaultdict(dict)
    for method, label in labels.items():
        cost = next((row["relative_cost"] for row in runs[method].values()), None)
        baselines.append([f"fine-tuned, {label}", "not run" if cost is None else f"{cost:.2f}"])
        baselines[-1].append(spread([*scores(method).values()]))
        # What leaving at that layer costs: more than the smaller model by the heads before it, under 0.1 % here.
        budget = next((e["relative_cost"] for e in exits if method == f"cut-{e['layer']}"), cost)
        for scheme in schemes:
            differences = paired(scores(scheme, budget), scores(method))
            baselines[-1].append(spread(differences, signed=True))
            if method != "stock" and cost is not None:
                against_cut[scheme][f"{label}, cost {cost:.2f}"] = differences
    for scheme in schemes:
        words += sentence(scheme, "the smaller fine-tuned model of the same cost", against_cut[scheme])

    between = []
    for scheme in schemes[1:]:
        places = {f"budget {share:.0%}": paired(scores(scheme, share), scores("joint", share)) for share in SHARES}
        places["last exit"] = paired(scores(scheme), scores("joint"))
        between.append([f"{scheme} - joint", *(spread(values, signed=True) for values in places.values())])
        words += sentence(scheme, "joint", places)
    if any(" loses to " in word for word in words):
        warm = [scheme for scheme in schemes if scheme.endswith("-warm")]
        tried = f"a warm start ({', '.join(warm)}), which is among the rows above" if warm else "nothing"
        words.append(f"- Tried against the losses, beyond the three schemes: {tried}.\n")
    plain = [value for value in scores("stock").values() if value is not None]
    if metric == "matthews_correlation" and plain and np.mean(plain) < 0.1:
        words.append(
            f"- Plain fine-tuning of the whole model hardly beats a constant answer here ({np.mean(plain):.3f}; a "
            "constant has 0): this model and recipe do not learn the task, and comparisons on it say little.\n"
        )

    plot_quality(runs, schemes, cuts, metric, task, name, plots)
    seeds = sorted({row["seed"] for row in data["rows"]})
    machines = dict.fromkeys(machine_text(row["machine"]) for row in data["rows"])
    shares = [f"budget {share:.0%}" for share in SHARES]
    budget_head = ["scheme", *shares, "area", "last exit", "last exit - fine-tuned", "certified to differ on ≤ 5 %"]
    parts = [
        f"## Quality: {task}\n",
        f"Recipe `{data['recipe']}`, seeds {', '.join(map(str, seeds))}, by `benchmarks/quality.py`; "
        f"{' / '.join(machines)}. The first of its runs:\n\n```\n{first['command']}\n```\n",
        f"{metric} at every exit, all {count} evaluation rows; relative cost in the head:\n",
        table(["scheme", *(f"exit {e['exit']}, {e['relative_cost']:.2f}" for e in exits)], anytime),
        f"{metric} under a budget, on the {count - count // 2} reported rows (certified: from the last exit):\n",
        table(budget_head, budgets),
        "Plain fine-tuning of the whole model or first layers; schemes at the cost of leaving after them, "
        "less the baseline:\n",
        table(["baseline", "cost", metric, *(f"{scheme} - baseline" for scheme in schemes)], baselines),
        "Schemes against joint:\n",
        table(["", *shares, "last exit"], between),
        f"![{metric} against cost](plots/{name}.png)\n",
        "In words. A difference is called one if several seeds all agree on its sign; equal methods would look "
        f"different by chance in {2.0 ** (1 - max(2, len(seeds))):.0%} of these comparisons.\n",
        "".join(words),
    ]
    return "\n".join(parts)


def certified(risks: list[dict | None], metric: str) -> str:
    """How many seeds got a policy, its cost and metric."""
    if not any(risks):
        return "needs classes" if risks else "not run"
    found = [risk for risk in risks if risk and "metrics" in risk]
    text = f"{len(found)} of {len(risks)}"
    if found:
        text += f": cost {spread([risk['relative_cost'] for risk in found])}, "
        text += f"{metric} {spread([risk['metrics'].get(metric) for risk in found])}"
    return text


def plot_quality(
    runs: dict, schemes: list[str], cuts: list[str], metric: str, task: str, name: str, plots: Path | None
) -> None:
    labels = {"xlabel": "relative cost (plain model = 1)", "ylabel": metric.replace("_", " "), "title": task}
    with plot(plots, name, **labels, xlim=(0, None)) as axes:

        def bars(costs, several, **style):
            deviations = [np.std(values, ddof=1) if len(values) > 1 else 0 for values in several]
            axes.errorbar(costs, [np.mean(values) for values in several], deviations, elinewidth=0.6, **style)

        for color, scheme in enumerate(schemes):
            points = zip(*(row["budgeted"] for row in runs[scheme].values()), strict=False)
            curve = [([p["relative_cost"] for p in ps], [p["metrics"].get(metric) for p in ps]) for ps in points]
            curve = [(np.mean(costs), values) for costs, values in curve if None not in values]
            if curve:
                bars(*zip(*curve, strict=True), fmt="o-", ms=3, lw=1, color=f"C{color}", label=scheme)
        for methods, marker, label in ((["stock"], "*", "fine-tuned"), (cuts, "s", "fine-tuned, fewer layers")):
            rows = [[*runs[method].values()] for method in methods if runs[method]]
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
            "Batch 1: time to leave at an exit, against the stock model cut to that many layers, which has one head; "
            "undecided: the layers and all heads up to that exit, without decisions and without the forward around "
            "them. Where it grows with the exit, the heads cost it: one row reads all of a head's weights, in BERT a "
            "twelfth of a layer's. The rest of `dynamic` is the forward around them and, per exit, a decision: a few "
            "small operations and one read.\n"
        )
        parts += [text, table([*head, "cut (ms)"], lines)]
    batches, lines = of_kind.pop("batch", []), []
    for row in batches:
        value = row["ideal / dynamic"]
        cells = [f"{row[key]:.3f}" for key in ("mean share still there", "dynamic / stock", "all exits / stock")]
        line = [str(row["batch_size"]), f"{value:.3f}", target(value, 0.85 if gpu else 0.97, at_least=True)]
        lines.append([*line, *cells, quartiles(row["dynamic"])])
    if lines:
        head = ["batch", "ideal / dynamic", "target", "mean share still there", "dynamic / stock", "all exits / stock"]
        text = "Batches, equal shares leave at every exit; ideal: each layer's full-batch time x its survivors:\n"
        parts += [text, table([*head, "quartiles (ms)"], lines), f"![time against cost](plots/{name}.png)\n"]
        labels = {"xlabel": "share of layers run (stock = 1)", "ylabel": "time (stock = 1)"}
        with plot(plots, name, **labels, xlim=(0, 1.05), ylim=(0, None)) as axes:
            axes.plot([0, 1], [0, 1], ":", color="0.6", label="time = cost")
            for row in batches:
                axes.plot(
                    row["mean share still there"], row["dynamic / stock"], "o", label=f"batch {row['batch_size']}"
                )
    for row in of_kind.pop("data set", []):
        off, on = row["stock pipeline / exits off"], row["stock pipeline / exits on"]
        parts += [
            f"Whole data set, {row['rows']} texts of real lengths, batch {row['batch_size']}, tokenizing included: "
            f"{off:.2f} x faster than the stock pipeline with exits off ({target(off, 1.3, at_least=True)}), "
            f"{on:.2f} x with exits on, where a layer sees {row['mean share still there']:.3f} of the rows.\n"
        ]
    return "\n".join([*parts, *(plain_table(rows) for rows in of_kind.values())])


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


def generic(data: dict, name: str, plots: Path | None) -> str:
    return "\n".join([f"## {name.replace('_', ' ').capitalize()}\n", source(data), plain_table(data["rows"])])


def gpu(data: dict, name: str, plots: Path | None) -> str:
    from gpu import figures

    part = name.removeprefix("gpu_")
    notes = [data["note"] + "\n"] if "note" in data else []
    lines = table(["where", "what", "value", "target"], figures(part, data["rows"], judged=True))
    return "\n".join([f"## On a GPU: {part}\n", source(data), GPU_TEXTS[part], *notes, lines])


GPU_TEXTS = {
    "correctness": "The runner's answers against the anytime logits at the exit that each example takes.\n",
    "single": (
        "One example that exits at exit k, the only exit that the policy uses, against the stock model cut to that "
        "many layers, eager and as one CUDA graph without a mask. `each exit`: with a decision, and a wait for it, at "
        "every exit before; `dynamic`: the model's own forward, without graphs.\n"
    ),
    "batches": (
        "Half of the layers on average: the runner against the whole stock model, eager and as one CUDA graph without "
        "a mask; `ideal`: the graph's time if layers cost in proportion to the examples that are left.\n"
    ),
    "texts": "A data set of texts of many lengths, tokenizing included: times as fast as the stock pipeline.\n",
    "training": "A step of each scheme, bf16 autocast, an exit after every layer.\n",
}

SECTIONS = {
    "gpu_": gpu,
    "quality_": quality,
    "planted_": planted,
    "inference_": inference,
    "training_step_": training_step,
    "partition": partition,
}


def write_page(results: Path, plots: Path | None) -> str:
    """The page's text; its plots go to a folder, or nowhere."""
    order, parts = [*SECTIONS, ""], []
    for path in results.glob("*.json"):
        place = next(index for index, prefix in enumerate(order) if path.stem.startswith(prefix))
        section = SECTIONS.get(order[place], generic)
        parts.append((place, path.stem, section(json.loads(path.read_text()), path.stem, plots)))
    return "\n".join([HEAD, *(text for *_, text in sorted(parts)), PAPERS])


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
