"""How good exits are: schemes beside plain fine-tuning of the stock model and of stock models cut to fewer layers.

python benchmarks/quality.py recipes/bbc_news_minilm_joint.yaml --seeds 3
python benchmarks/quality.py recipes/sst2_minilm_joint.yaml --methods joint stock cut-3 --dataset_name folder/of/glue
python benchmarks/quality.py recipes/cifar100_vit_small.yaml --images --jobs 8 --time_limit 3000

One cell is one run of the recipe by one method under one seed; `stock` is the recipe's model with its last exit only,
also evaluated with its linear layers in int8, `cut-3` the same with the first three layers, `student-3` those layers
when they learn the probabilities of `stock` instead of labels, `joint-warm` the scheme after a warm start of the last
exit for half of the recipe's epochs, `two_stage-joint` the scheme with `--joint_first_stage`. Flags that this script
does not know go to every run. Each cell is a process of its own, `--jobs` of them side by side, with a log beside its
folder. Finished cells are kept in benchmarks/results/quality_<recipe>.json and not run again, but for a `stock` whose
model a student lacks; what is stopped, by `--time_limit` or by hand, goes on from its last checkpoint when the same
command is given again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import add_results_argument, command_line, machine, pack_bits, ratio
from transformers import AutoModel, EvalPrediction

from een_hf.calibration import calibrate, policy_row
from een_hf.data.samples import model_source
from een_hf.data.text import TEXT
from een_hf.evaluation import cost_inputs, measure_seconds, relative_costs
from een_hf.models import MODEL_CLASSES
from een_hf.runs import Run, parse_arguments, run_experiment


METHODS = ["joint", "two_stage", "two_stage-joint", "boosted", "stock", "cut-2", "cut-3", "cut-4", "student-3", "l2w"]
BASELINES = ("stock", "cut", "student")
RISKS = (0.01, 0.02, 0.05)
SHARES = (0.25, 0.5, 0.75)


def cut_model(source: str, num_layers: int, folder: Path) -> None:
    """Save the stock model's first layers, with its tokenizer or image processor, unless it is there."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=folder.parent))
    AutoModel.from_pretrained(source, num_hidden_layers=num_layers).save_pretrained(made)
    for name in ("tokenizer", "vocab", "special_tokens", "preprocessor"):
        for file in Path(source).glob(f"{name}*"):
            (made / file.name).write_bytes(file.read_bytes())
    try:
        made.rename(folder)
    except OSError:  # another cell was faster
        shutil.rmtree(made)


def run_cell(modality, recipe: str, method: str, seed: int, flags: list[str], runs: Path) -> dict:
    """Run one cell in a folder below `runs`; return its row."""
    kind, _, number = method.partition("-")
    runs = runs / Path(recipe).stem
    words = [recipe, "--seed", str(seed), "--output_dir", str(runs / f"{method}-{seed}"), *flags]
    words += ["--measure_speed", "false"]
    given = parse_arguments(modality, words)
    baseline = kind in BASELINES
    if baseline:
        source = model_source(given.model.model_name_or_path)
        stock = AutoModel.from_pretrained(source).config
        num_layers = stock.num_hidden_layers
        if number:
            num_layers = int(number)
            cut_model(source, num_layers, runs / f"cut-{num_layers}-model")
            words += ["--model_name_or_path", str(runs / f"cut-{num_layers}-model")]
        words += ["--exit_layers", str(num_layers)]
        if kind == "student":
            words += ["--method", "student:StudentTrainer", "--teacher", str(runs / f"stock-{seed}")]
        if given.calibration.target_cost is not None:
            words += ["--target_cost", "1"]
    else:
        variants = {
            "-warm": ["--warm_start_epochs", str(given.training.num_train_epochs / 2)],
            "-joint": ["--joint_first_stage"],
        }
        variant = next((end for end in variants if method.endswith(end)), "")
        words += ["--method", method.removesuffix(variant), *variants.get(variant, [])]
    run = run_experiment(modality, parse_arguments(modality, words))
    for checkpoint in run.args.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    results = json.loads((run.args.folder / "exit_results.json").read_text())
    script = "run_glue_een.py" if modality is TEXT else "run_cifar_een.py"
    row = {"method": method, "seed": seed, "command": command_line(script, words), "machine": machine()}
    row |= {name: results[name] for name in ("dataset", "task_name", "metric", "num_eval_samples")}
    if baseline:
        # The cost of the first layers and one head, out of the whole network's.
        model_class = MODEL_CLASSES[stock.model_type]
        config = model_class.config_class.from_dict(
            {**stock.to_dict(), "model_type": model_class.config_class.model_type}, exit_layers=[num_layers]
        )
        full = model_class(config)
        row["relative_cost"] = relative_costs(full, **cost_inputs(run.rows.splits["validation"]))[0]
        row["metrics"] = results["anytime"][-1]["metrics"]
        row["metrics_report"] = results["anytime_report"][-1]["metrics"]
        row["right"] = right_answers(run, results, budgets=False)
        if method == "stock":
            row["int8"] = in_int8(run)
        return row
    for name in ("anytime", "anytime_report"):
        row[name] = results[name]
    row["budgeted"] = [
        {name: point[name] for name in ("target_cost", "relative_cost", "metrics", "exit_fractions")}
        for point in results["budgeted"]
    ]
    row["risks"] = {f"{limit:g}": certified(run, results, limit) for limit in RISKS}
    row["right"] = right_answers(run, results)
    return row


def saved_logits(run: Run, results: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[float]]:
    """Logits, labels and parts of the rows of a run, and what each exit costs."""
    saved = np.load(run.args.folder / "exit_logits.npz")
    costs = [row["relative_cost"] for row in results["anytime"]]
    return saved["logits"], saved["labels"], saved["part"], costs


def certified(run: Run, results: dict, limit: float) -> dict | None:
    """The policy that is 90 % sure to answer as the last exit on all but `limit` of inputs; `None` without classes."""
    if run.rows.data.problem_type != "single_label_classification":
        return None
    logits, labels, part, costs = saved_logits(run, results)
    chooses = part == "calibration"
    report = calibrate(
        logits[chooses], labels[chooses], costs, max_risk=limit, risk="consistency", seed=run.args.training.seed
    )
    if report.policy is None:
        return {"message": report.message}
    row = policy_row(report.policy, logits[~chooses], labels[~chooses], costs, run.trainer.task_metrics)
    return {"message": report.message, **{name: row[name] for name in ("relative_cost", "metrics", "guarantee")}}


def right_answers(run: Run, results: dict, budgets: bool = True) -> dict[str, str] | None:
    """Which evaluation rows are answered rightly, packed bits by place: a budget, that of an exit, or the last exit.

    Under a budget each half of the rows is answered by the policy that the other half calibrates. `None` without
    classes.
    """
    if run.rows.data.problem_type != "single_label_classification":
        return None
    logits, labels, part, costs = saved_logits(run, results)
    right = logits.argmax(-1) == labels[:, None]
    found = {"last": right[:, -1]}
    places = {f"{share:g}": share for share in SHARES} | {f"exit {k}": cost for k, cost in enumerate(costs, 1)}
    for place, budget in places.items() if budgets else ():
        if costs[0] <= budget:
            found[place] = answers = np.zeros(len(labels), dtype=bool)
            for name in ("calibration", "report"):
                half = part == name
                policy = calibrate(logits[~half], labels[~half], costs, target_cost=budget).policy
                exits = len(costs) - 1 if policy is None else policy.exits_of(torch.from_numpy(logits[half])).numpy()
                answers[half] = right[np.flatnonzero(half), exits]
    return {place: pack_bits(bits) for place, bits in found.items()}


def in_int8(run: Run) -> dict:
    """The run's model with int8 linear layers, quantized dynamically: its metrics, and its time at batch 1."""
    trainer, network = run.trainer, run.trainer.accelerator.unwrap_model(run.trainer.model)
    network = network.cpu().float().eval()
    with warnings.catch_warnings(action="ignore"):
        quantized = torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, dtype=torch.qint8)
    rows, logits, labels = run.rows.splits["validation"], [], []
    loader = torch.utils.data.DataLoader(
        trainer._remove_unused_columns(rows, "test") if hasattr(rows, "set_format") else rows,
        batch_size=run.args.training.per_device_eval_batch_size,
        collate_fn=trainer.data_collator,
    )
    with torch.inference_mode():
        for batch in loader:
            labels.append(batch.pop("labels"))
            logits.append(quantized(**batch).logits)
        one = {name: tensor[:1] for name, tensor in batch.items()}
        seconds = measure_seconds({"int8": lambda: quantized(**one), "float32": lambda: network(**one)}, 15)
    logits, labels = torch.cat(logits).numpy(), torch.cat(labels).numpy()
    return {
        "metrics": trainer.task_metrics(EvalPrediction(predictions=logits, label_ids=labels)),
        "time / float32": ratio(seconds, "int8", "float32"),
    }


def side_by_side(
    commands: dict[str, list[str]], jobs: int, time_limit: float, logs: Path, finished: Callable[[str], None]
) -> dict[str, str]:
    """Run commands as processes, in order, `jobs` at a time.

    Args:
        commands: by name; what a command prints goes to `<logs>/<name>.log`.
        jobs: how many run at once.
        time_limit: in seconds; then those that run are ended, and no others are started.
        logs: a folder.
        finished: called with the name of each that succeeded, at once.

    Returns:
        by name, why the others have not succeeded.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}
    waiting, running, failed, end = list(commands), {}, {}, time.monotonic() + time_limit
    try:
        while waiting or running:
            if time.monotonic() >= end:
                return failed | dict.fromkeys([*running, *waiting], "the time is over")
            while waiting and len(running) < jobs:
                name = waiting.pop(0)
                with open(logs / f"{name}.log", "a") as log:
                    running[name] = subprocess.Popen(commands[name], stdout=log, stderr=log, env=environment)
            for name, process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    failed[name] = f"exit status {process.returncode}, see {logs / name}.log"
                else:
                    finished(name)
            time.sleep(0.05)
        return failed
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 1")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--images", action="store_true", help="the recipe is one of run_cifar_een.py")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=1, help="cells side by side")
    parser.add_argument("--time_limit", type=float, default=float("inf"), help="seconds for all cells together")
    parser.add_argument("--name", help="of the results file, and of a folder below --runs; by default the recipe's")
    parser.add_argument("--cell", nargs=3, metavar=("METHOD", "SEED", "FILE"), help="run one cell, write its row")
    add_results_argument(parser)
    args, flags = parser.parse_known_args()
    modality = TEXT
    if args.images:
        from een_hf.data.images import IMAGES as modality
    if args.cell:
        method, seed, file = args.cell
        Path(file).write_text(json.dumps(run_cell(modality, args.recipe, method, int(seed), flags, args.runs)))
        return

    stem = Path(args.recipe).stem
    path = args.results / f"quality_{args.name or stem.removesuffix('_joint')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(path.read_text()) if path.exists() else {"recipe": args.recipe, "rows": []}
    rows = content["rows"]
    done = {(row["method"], row["seed"]) for row in rows}
    cells = [cell for cell in product(args.methods, range(1, args.seeds + 1)) if cell not in done]
    runs = args.runs / (args.name or "")  # another model's runs, or its first layers, are not those of the recipe
    logs = runs / stem
    own = [*flags, *(["--images"] if args.images else []), "--runs", str(runs)]
    students = [cell for cell in cells if cell[0].startswith("student-")]
    teachers = [("stock", seed) for _, seed in students if not (logs / f"stock-{seed}" / "exit_results.json").exists()]
    first = dict.fromkeys([*(cell for cell in cells if cell not in students), *teachers])

    def commands(cells) -> dict[str, list[str]]:
        return {
            f"{method}-{seed}": [sys.executable, __file__, args.recipe, *own]
            + ["--cell", method, str(seed), str(logs / f"{method}-{seed}.json")]
            for method, seed in cells
        }

    def finished(name: str) -> None:
        row = json.loads((logs / f"{name}.json").read_text())
        rows[:] = [other for other in rows if (other["method"], other["seed"]) != (row["method"], row["seed"])]
        rows.append(row)
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"done: {name}", flush=True)

    failed, start = {}, time.monotonic()
    for part in (first, students):  # students read the others' models
        time_limit = args.time_limit + start - time.monotonic()
        failed |= side_by_side(commands(part), args.jobs, time_limit, logs, finished)
    for name, why in failed.items():
        print(f"not done: {name}: {why}")
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
