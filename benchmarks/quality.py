"""How good exits are: schemes beside plain fine-tuning of the stock model and of stock models cut to fewer layers.

python benchmarks/quality.py recipes/bbc_news_minilm_joint.yaml --seeds 3
python benchmarks/quality.py recipes/sst2_minilm_joint.yaml --methods joint stock cut-3 --dataset_name folder/of/glue

One cell is one run of the recipe by one method under one seed; `stock` is the recipe's model with its last exit only,
`cut-3` the same with the first three layers, `joint-warm` the scheme after a warm start of the last exit for half of
the recipe's epochs. Flags that this script does not know go to every run. Finished cells are
kept in benchmarks/results/quality_<recipe>.json and not run again; an interrupted one resumes from its checkpoint.
"""

import argparse
import json
import shutil
from itertools import product
from pathlib import Path

import numpy as np
from common import add_results_argument, command_line, machine
from transformers import AutoModel

from een_hf.data.glue import TEXT
from een_hf.data.samples import model_source
from een_hf.evaluation import calibrate, cost_inputs, policy_row, relative_costs
from een_hf.models import MODEL_CLASSES
from een_hf.training.experiment import Experiment, parse_arguments


METHODS = ["joint", "boosted", "stock", "cut-2", "cut-3", "cut-4", "l2w"]
RISK = {"max_risk": 0.05, "risk": "consistency"}


def cut_model(source: str, num_layers: int, folder: Path) -> None:
    """Save the stock model's first layers, with its tokenizer or image processor, unless it is there."""
    if not folder.exists():
        AutoModel.from_pretrained(source, num_hidden_layers=num_layers).save_pretrained(folder)
        for name in ("tokenizer", "vocab", "special_tokens", "preprocessor"):
            for file in Path(source).glob(f"{name}*"):
                (folder / file.name).write_bytes(file.read_bytes())


def run_cell(modality, recipe: str, method: str, seed: int, flags: list[str], runs: Path) -> dict:
    """Run one cell in a folder below `runs`; return its row."""
    runs = runs / Path(recipe).stem
    words = [recipe, "--seed", str(seed), "--output_dir", str(runs / f"{method}-{seed}"), *flags]
    words += ["--measure_speed", "false"]
    given = parse_arguments(modality, words)
    baseline = method == "stock" or method.startswith("cut-")
    if baseline:
        source = model_source(given.model.model_name_or_path)
        stock = AutoModel.from_pretrained(source).config
        num_layers = stock.num_hidden_layers
        if method != "stock":
            num_layers = int(method.removeprefix("cut-"))
            cut_model(source, num_layers, runs / f"cut-{num_layers}-model")
            words += ["--model_name_or_path", str(runs / f"cut-{num_layers}-model")]
        words += ["--exit_layers", str(num_layers)]
        if given.calibration.target_cost is not None:
            words += ["--target_cost", "1"]
    else:
        words += ["--method", method.removesuffix("-warm")]
        if method.endswith("-warm"):
            words += ["--warm_start_epochs", str(given.training.num_train_epochs / 2)]
    experiment = Experiment(modality, parse_arguments(modality, words))
    experiment.run()
    for checkpoint in experiment.folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    results = json.loads((experiment.folder / "exit_results.json").read_text())
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
        row["relative_cost"] = relative_costs(full, **cost_inputs(experiment.splits["validation"]))[0]
        row["metrics"] = results["anytime"][-1]["metrics"]
        row["metrics_report"] = results["anytime_report"][-1]["metrics"]
        return row
    for name in ("anytime", "anytime_report"):
        row[name] = results[name]
    row["budgeted"] = [
        {name: point[name] for name in ("target_cost", "relative_cost", "metrics", "exit_fractions")}
        for point in results["budgeted"]
    ]
    row["risk"] = certified(experiment, results)
    return row


def certified(experiment: Experiment, results: dict) -> dict | None:
    """The policy that answers as the last exit does on all but 5 % of inputs, 90 % sure; `None` without classes."""
    if experiment.data.problem_type != "single_label_classification":
        return None
    saved = np.load(experiment.folder / "exit_logits.npz")
    costs = [row["relative_cost"] for row in results["anytime"]]
    chooses = saved["part"] == "calibration"
    rows = saved["logits"][chooses], saved["labels"][chooses]
    report = calibrate(*rows, costs, seed=experiment.training.seed, **RISK)
    if report.policy is None:
        return {"message": report.message}
    kept = saved["logits"][~chooses], saved["labels"][~chooses]
    row = policy_row(report.policy, *kept, costs, experiment.trainer.task_metrics)
    return {"message": report.message, **{name: row[name] for name in ("relative_cost", "metrics", "guarantee")}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 1")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--images", action="store_true", help="the recipe is one of run_cifar_een.py")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"), help="folder of the runs")
    add_results_argument(parser)
    args, flags = parser.parse_known_args()
    modality = TEXT
    if args.images:
        from een_hf.data.cifar import IMAGES as modality

    name = Path(args.recipe).stem.removesuffix("_joint")
    path = args.results / f"quality_{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    done = {(row["method"], row["seed"]) for row in rows}
    for method, seed in product(args.methods, range(1, args.seeds + 1)):
        if (method, seed) not in done:
            print(f"--- {method}, seed {seed}", flush=True)
            rows.append(run_cell(modality, args.recipe, method, seed, flags, args.runs))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"recipe": args.recipe, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
