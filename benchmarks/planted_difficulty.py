"""Which samples the weight network of `--method l2w` favours at which exit, where it is known which ones are hard.

python benchmarks/planted_difficulty.py --seeds 3 --max_seq_length 32 --per_device_train_batch_size 16 \\
    --meta_learning_rate 1e-3
python benchmarks/planted_difficulty.py --seeds 1 --plant labels --max_train_samples 600

The first gave the results kept. At the default --meta_learning_rate one epoch leaves W near where it began.

A share of the training rows of BBC News is made hard: `labels` gives them a wrong class, `length` cuts them to six
tokens. The weights are those of the rows in the second half of training, those of the final W at the final model, and
those of the untrained W on the same losses. A random W tells easy from hard too; what was learned is the final weight
less the untrained one. Over the exits of a row weights average 1. Unknown flags go to every run.
"""

import argparse
import copy
import tempfile
from dataclasses import replace

import numpy as np
import torch
from common import RESULTS, write_results

from een_hf.data.text import TEXT
from een_hf.runs import parse_arguments, run_experiment
from een_hf.training import register_scheme
from een_hf.training.l2w import MetaWeightedExitTrainer


RECIPE = "recipes/bbc_news_minilm_joint.yaml"
SHORT = 6


@register_scheme("l2w_recorded")
class RecordingTrainer(MetaWeightedExitTrainer):
    """l2w that knows which row each weight was for, by the column `row`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.untrained_network = copy.deepcopy(self.weight_network)
        self.rows_by_batch, self.weights_by_batch = [], []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.rows_by_batch.append(inputs.pop("row").numpy(force=True))
        return super().training_step(model, inputs, num_items_in_batch)

    def sample_weights(self, losses, exit_logits):
        weights = super().sample_weights(losses, exit_logits)
        self.weights_by_batch.append(weights.numpy(force=True))
        return weights


def plant(rows, kind: str, hard: np.ndarray, num_labels: int, rng: np.random.Generator):
    """The rows, those of the mask `hard` (num_rows,) with a wrong label or cut short, and their positions as `row`."""
    shifts = rng.integers(1, num_labels, len(rows))

    def change(row: dict, position: int) -> dict:
        if hard[position] and kind == "labels":
            row["labels"] = int((row["labels"] + shifts[position]) % num_labels)
        elif hard[position]:
            for name in ("input_ids", "token_type_ids", "attention_mask"):
                row[name] = row[name][: SHORT - 1] + row[name][-1:]  # keeps [CLS] and [SEP]
        return {**row, "row": position}

    return rows.map(change, with_indices=True, load_from_cache_file=False)


def compare(weights: np.ndarray, hard: np.ndarray) -> dict:
    """Mean weights at each exit of easy and hard rows, and the difference with its standard error over rows."""
    parts = weights[~hard], weights[hard]
    error = np.sqrt(sum(part.var(0, ddof=1) / len(part) for part in parts))
    easy, difficult = (part.mean(0) for part in parts)
    named = {"easy": easy, "hard": difficult, "easy_minus_hard": easy - difficult, "standard_error": error}
    return {name: values.tolist() for name, values in named.items()} | {"num_rows": [len(part) for part in parts]}


def run(kind: str, share: float, seed: int, flags: list[str]) -> dict:
    """Train on rows of which a share is hard; return what W made of them."""
    rng, hard = np.random.default_rng(seed), None

    def encode(data, *args):
        nonlocal hard
        splits = TEXT.encode_data(data, *args)
        hard = rng.permutation(len(splits["train"])) < round(share * len(splits["train"]))
        return splits | {"train": plant(splits["train"], kind, hard, data.num_labels, rng)}

    modality = replace(TEXT, encode_data=encode)
    with tempfile.TemporaryDirectory() as folder:
        words = [RECIPE, "--method", RecordingTrainer.scheme, "--seed", str(seed), "--output_dir", folder]
        words += ["--measure_speed", "false", "--save_strategy", "no", "--remove_unused_columns", "false"]
        run = run_experiment(modality, parse_arguments(modality, [*words, *flags]))
    metrics, trainer, num_exits = run.metrics, run.trainer, run.loaded.model.num_exits
    late = len(trainer.rows_by_batch) // 2
    seen = np.concatenate(trainer.rows_by_batch[late:])
    found = trainer.predict_exits(run.rows.splits["train"].remove_columns("row"))
    logits, labels = torch.from_numpy(found.predictions), torch.from_numpy(found.label_ids)
    losses = trainer.losses_of(logits, labels)
    with torch.no_grad():
        final, untrained = (net.cpu()(losses, logits) for net in (trainer.weight_network, trainer.untrained_network))
    return {
        "plant": kind,
        "share": share,
        "seed": seed,
        "flags": flags,
        "steps": trainer.state.global_step,
        "accuracy": [metrics[f"eval_exit{k}_accuracy"] for k in range(1, num_exits + 1)],
        "loss": compare(losses.numpy(), hard),
        "in_training": compare(np.concatenate(trainer.weights_by_batch[late:]), hard[seen]),
        "final": compare(final.numpy(), hard),
        "untrained": compare(untrained.numpy(), hard),
        "learned": compare((final - untrained).numpy(), hard),
    }


def verdict(differences: np.ndarray) -> dict:
    """Whether easy rows gain at the earlier half of the exits and hard ones at the later, from (seeds, K)."""
    early = differences[:, : differences.shape[1] // 2].mean(1)
    row = {"easy_minus_hard": differences.mean(0).tolist(), "early_half": early.mean()}
    if len(differences) > 1:
        row["standard_error"] = (differences.std(0, ddof=1) / len(differences) ** 0.5).tolist()
        row["early_half_standard_error"] = early.std(ddof=1) / len(early) ** 0.5
    # With weights that average 1 over the exits of a row, the late half loses what the early one gains.
    return row | {"easy_early_hard_late_in_seeds": f"{(early > 0).sum()} of {len(early)}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 1")
    parser.add_argument("--plant", nargs="+", choices=("labels", "length"), default=("labels", "length"))
    parser.add_argument("--share", type=float, default=0.2, help="share of the rows that are made hard")
    parser.add_argument("--name", default="planted_difficulty", help="of the file of results")
    args, flags = parser.parse_known_args()
    rows, summaries = [], []
    for kind in args.plant:
        of_kind = []
        for seed in range(1, args.seeds + 1):
            of_kind.append(run(kind, args.share, seed, flags))
            row = {"plant": kind, "seeds": len(of_kind)}
            for name in ("in_training", "final", "untrained", "learned"):
                row[name] = verdict(np.array([found[name]["easy_minus_hard"] for found in of_kind]))
            write_results(RESULTS, args.name, [*rows, *of_kind, *summaries, row])
        rows += of_kind
        summaries.append(row)


if __name__ == "__main__":
    main()
