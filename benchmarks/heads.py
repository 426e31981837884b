#!/usr/bin/env python
"""Heads of early exits on a frozen image model, compared before a full run: its tokens are read once for all heads.

python benchmarks/heads.py path/to/run --dataset_name cifar100
python benchmarks/heads.py path/to/run --dataset_name path/to/cifar100 --heads norm mean:norm attention --views 1

The run is one of `recipes/cifar100_vit_small.yaml` by plain fine-tuning (`--exit_layers 12`); flags that this script
does not know go to the recipe. Each head learns what the last exit answers, as in the second stage of `two_stage`;
`mean:norm` is a head that reads another pooling. A cell takes a minute of one core. Half of the evaluation rows are
answered under the policy that the other half calibrates.
"""

import argparse
import json
from collections.abc import Iterable

import numpy as np
import torch
from common import add_results_argument, command_line, machine
from screen import right_answers
from tqdm.auto import tqdm

from een_hf import AutoEarlyExitModel, relative_costs
from een_hf.data.images import IMAGES
from een_hf.models import EarlyExitMixin
from een_hf.runs import parse_arguments
from een_hf.runs.experiment import prepare
from een_hf.training.frozen_heads import logits_of_features, read_features, train_heads


RECIPE = "recipes/cifar100_vit_small.yaml"
BUDGETS = (0.5, 0.75)


def read_tokens(model: EarlyExitMixin, batches: Iterable[dict]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (rows, num_exits - 1, length, hidden_size) in float16, the last exit's logits, and labels."""
    tokens, answers, labels = [], [], []
    for batch in tqdm(batches, desc="Reading tokens"):
        labels.append(batch.pop("labels"))
        read, logits = read_features(model, batch)
        tokens.append(read.half().unflatten(2, (-1, model.config.hidden_size)))
        answers.append(logits)
    return tuple(torch.cat(parts).numpy() for parts in (tokens, answers, labels))


def pooled(model: EarlyExitMixin, tokens: np.ndarray) -> np.ndarray:
    """What the heads of a model read of tokens: (rows, num_exits - 1, width)."""
    heads = [model.exit_head_modules(index)[0] for index in range(model.num_exits - 1)]
    parts = [
        torch.stack([head.pool(part[:, index].float(), None) for index, head in enumerate(heads)], 1)
        for part in torch.from_numpy(tokens).split(1024)
    ]
    return torch.cat(parts).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a fine-tuned model")
    parser.add_argument("--dataset_name", default="cifar100", help="on the Hub, or a local folder of parquet files")
    parser.add_argument("--heads", nargs="+", default=["norm", "norm_pooler", "attention"])
    parser.add_argument("--views", nargs="+", type=int, default=[1, 4], help="how often the training images are read")
    parser.add_argument("--steps", type=int, default=4000, help="of 32 views each")
    parser.add_argument("--seed", type=int, default=1, help="seed of the run")
    parser.add_argument("--threads", type=int, default=1)
    add_results_argument(parser)
    args, others = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    flags = [RECIPE, "--model_name_or_path", args.run, "--dataset_name", args.dataset_name, "--seed", str(args.seed)]
    flags += ["--exit_head", "attention", "--output_dir", "runs/heads", "--report_to", "none", *others]
    trainer = prepare(IMAGES, parse_arguments(IMAGES, flags)).trainer
    model = trainer.model.eval()
    evaluation = read_tokens(model, trainer.get_test_dataloader(trainer.eval_dataset))
    loader = trainer.get_test_dataloader(trainer.train_dataset)  # each pass augments the images differently
    views = [read_tokens(model, loader)[:2] for _ in range(max(args.views))]

    path = args.results / "heads.json"
    words = ["path/to/run", "--dataset_name", "path/to/cifar100", "--heads", *args.heads, "--views"]
    words += [*map(str, args.views), "--steps", str(args.steps), "--seed", str(args.seed), *others]
    about = {"command": command_line("benchmarks/heads.py", words), "machine": machine()}
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    for name in args.heads:
        pooling, _, head = name.rpartition(":")
        settings = {"exit_layers": model.config.exit_layers, "exit_head": head, "exit_pooling": pooling or None}
        for count in args.views:
            torch.manual_seed(args.seed)
            fresh = AutoEarlyExitModel.from_pretrained(args.run, **settings)
            tokens, answers = (np.concatenate(parts) for parts in zip(*views[:count], strict=True))
            epochs = max(1, round(32 * args.steps / len(tokens)))
            train_heads(fresh, pooled(fresh, tokens), answers, num_train_epochs=epochs, seed=args.seed)
            logits = logits_of_features(fresh, pooled(fresh, evaluation[0]), evaluation[1])
            exits = (logits.argmax(-1) == evaluation[2][:, None]).mean(0)
            row = {"seed": args.seed, "head": head, "pooling": fresh.config.exit_pooling, "views": count}
            row |= {f"exit {number}": float(value) for number, value in enumerate(exits, 1)}
            right = right_answers(logits, evaluation[2], BUDGETS, list(relative_costs(fresh)))
            rows.append(row | {f"at {budget:g} of the cost": float(right[f"{budget:g}"].mean()) for budget in BUDGETS})
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
            print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
