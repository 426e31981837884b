#!/usr/bin/env python
"""Ways of training exits that the library does not offer, tried in a plain loop before anything is built.

python benchmarks/screen.py clinc --dataset path/to/clinc --options joint distill-1-2 last-6 --seeds 1 2 3
python benchmarks/screen.py sst2 --dataset path/to/glue/sst2

MiniLM-L6, or another BERT, with six exits, one epoch, AdamW, linear decay, embeddings frozen, bfloat16 autocast: a
cell of MiniLM takes half a minute of one core. What the page shows is paired by seed and evaluation row. Options:

- `joint`: all exits, weights of 1; `stock`: the last exit alone; `retrofit`: then `een-hf retrofit` on the same rows,
  which teaches exits on the frozen encoder what the last one answers; `refit`: the same after joint training.
- `cut-K`: the model's layers up to exit K alone; `student-K`: the same, which learns the probabilities of `stock`.
- `distill-A-T`: exits before the last learn its detached probabilities too: l[k] + A T^2 KL(p_K^(1/T) || p_k^(1/T)).
- `last-W`: joint, the last exit's loss times W, as `--exit_loss_weights 1 1 1 1 1 W`.
- `alternate`: every other step trains the last exit alone (BERxiT, Xin et al., EACL 2021, section 3.2).
- `detach`: a layer is trained by the next exit only (SWEET, Jazbec et al. 2023).
- `cosee-B`: w[i,k] proportional to exp(-b |k - e_i(tau)|), e_i the first exit whose confidence reaches tau, averaged
  over ten thresholds, b growing from 0 to B; without the paper's calibration term (He et al., AAAI 2025).
- `recycle`: the heads of exits 2 to 5 also read LayerNorm of the detached logits of the exit before (ZTW, NeurIPS
  2021).
"""

import argparse
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from common import add_results_argument, command_line, machine, pack_bits
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from een_hf.calibration import calibrate
from een_hf.data import load_bbc_news
from een_hf.data.samples import model_source
from een_hf.models import EarlyExitBertForSequenceClassification
from een_hf.training.frozen_heads import read_features, train_heads
from een_hf.training.head_init import standardize_heads


SHARES = (0.25, 0.5, 0.75)
OPTIONS = [
    "joint",
    "stock",
    "retrofit",
    "refit",
    "cut-3",
    "student-3",
    "distill-1-2",
    "last-6",
    "alternate",
    "detach",
    "cosee-1",
    "recycle",
]
# Training rows, batch size, learning rate of the heads, longest text.
SETTINGS = {"sst2": (2000, 16, 5e-3, 64), "clinc": (6000, 32, 5e-3, 64), "bbc_news": (1500, 32, 1e-3, 64)}


def load(name: str, folder: Path | None) -> tuple[list[str], np.ndarray, list[str], np.ndarray]:
    """Texts and labels: training rows, then evaluation rows."""
    if name == "bbc_news":
        splits = load_bbc_news()
        parts = ((list(splits[split]["text"]), np.array(splits[split]["label"])) for split in ("train", "validation"))
        return tuple(value for part in parts for value in part)
    train, evaluation = (pd.read_parquet(next(folder.glob(f"{split}-*.parquet"))) for split in ("train", "validation"))
    column = "sentence" if name == "sst2" else "text"
    rows = np.random.default_rng(0).permutation(len(train))
    if name == "sst2":  # more evaluation rows, as long as whole sentences, out of those that nothing trains on
        spare = train.iloc[rows[10_000:]]
        spare = spare[spare[column].str.split().str.len() >= 12].iloc[:1200]
        evaluation = pd.concat([evaluation, spare])
    train = train.iloc[rows[: SETTINGS[name][0]]]
    return train[column].tolist(), train["label"].values, evaluation[column].tolist(), evaluation["label"].values


class Exits(nn.Module):
    """The library's model, run layer by layer."""

    def __init__(self, source: str, num_labels: int, option: str, numbers: list[float]):
        super().__init__()
        num_layers = AutoConfig.from_pretrained(source).num_hidden_layers
        self.model = EarlyExitBertForSequenceClassification.from_pretrained(
            source,
            num_labels=num_labels,
            exit_layers=list(range(num_layers // 6, num_layers + 1, num_layers // 6)),
            exit_pooling="mean",
            problem_type="single_label_classification",
        )
        self.model.base_model.embeddings.requires_grad_(False)
        self.option, self.numbers = option, numbers
        if option == "recycle":
            width = self.model.config.hidden_size
            exits = range(self.model.num_exits - 1)
            self.recycled = nn.ModuleList(nn.Linear(num_labels, width, bias=False) for _ in exits)
            generator = torch.Generator().manual_seed(5)
            for module in self.recycled:
                module.weight.data = 0.02 * torch.randn(module.weight.shape, generator=generator)

    def forward(self, **inputs) -> torch.Tensor:
        """(batch, num_exits, num_labels)"""
        examples, logits = self.model.embed(**inputs), []
        context, hidden = self.model.make_context(examples), examples.hidden
        last = self.model.num_exits - 1
        num_exits = int(self.numbers[0]) if self.option == "cut" else last + 1
        for layer in range(self.model.config.exit_layers[num_exits - 1]):
            hidden = self.model.run_layer(layer, hidden, context)
            if layer + 1 not in self.model.config.exit_layers:
                continue
            index = self.model.config.exit_layers.index(layer + 1)
            if self.option == "recycle" and 0 < index < last:
                head = self.model.exit_head_modules(index)[0]
                previous = logits[-1].detach()
                features = head.dense(head.pool(hidden, examples.attention_mask))
                features = features + self.recycled[index](F.layer_norm(previous, previous.shape[-1:]))
                logits.append(head.classifier(head.dropout(torch.tanh(features))))
            else:
                logits.append(self.model.compute_exit(index, hidden, examples.attention_mask))
            if self.option == "detach" and index < last:
                hidden = hidden.detach()
        return torch.stack(logits, 1)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, step: int, num_steps: int) -> torch.Tensor:
        if self.option == "alternate" and step % 2 == 0:
            return F.cross_entropy(logits[:, -1], labels)
        batch, num_exits, num_labels = logits.shape
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat_interleave(num_exits, 0), reduction="none")
        losses, weights = losses.view(batch, num_exits), torch.ones(num_exits)
        if self.option in ("stock", "retrofit", "cut"):
            weights[:-1] = 0
        elif self.option == "last":
            weights[-1] = self.numbers[0]
        elif self.option == "distill":
            share, temperature = self.numbers
            target = (logits[:, -1:].detach() / temperature).softmax(-1).expand(-1, num_exits - 1, -1)
            own = (logits[:, :-1] / temperature).log_softmax(-1)
            divergence = F.kl_div(own, target, reduction="none").sum(-1)
            losses = losses + F.pad(share * temperature**2 * divergence, (0, 1))
        elif self.option == "cosee":
            weights = cosee_weights(logits.detach(), self.numbers[0] * step / num_steps)
        return (weights * losses).mean(0).sum()


def cosee_weights(logits: torch.Tensor, beta: float) -> torch.Tensor:
    """(batch, num_exits), averages of 1 over the exits."""
    num_exits, num_labels = logits.shape[1:]
    confidence, exits, weights = logits.softmax(-1).amax(-1), torch.arange(num_exits), 0.0
    for share in torch.linspace(0.05, 0.95, 10):
        reached = confidence >= 1 / num_labels + share * (1 - 1 / num_labels)
        reached[:, -1] = True
        own = torch.exp(-beta * (exits - reached.float().argmax(1, keepdim=True)).abs())
        weights = weights + own / own.sum(1, keepdim=True) * num_exits / 10
    return weights


def train(
    source: str, name: str, option: str, seed: int, data: tuple, learning_rate: float, standardize: bool
) -> np.ndarray:
    """Logits (rows, num_exits, num_labels) of the evaluation rows after training."""
    texts, labels, evaluation, answers = data
    count, batch_size, head_rate, max_length = SETTINGS[name]
    tokenizer = AutoTokenizer.from_pretrained(source)
    train_rows, evaluation_rows = (tokenizer(of, truncation=True, max_length=max_length) for of in (texts, evaluation))
    num_labels = int(max(labels.max(), answers.max())) + 1
    kind, *numbers = option.split("-")
    order, steps = np.random.default_rng(seed).permutation(count), count // batch_size

    def batch_of(encoded, rows) -> dict[str, torch.Tensor]:
        return tokenizer.pad({key: [encoded[key][row] for row in rows] for key in encoded}, return_tensors="pt")

    def logits_of(network: Exits, encoded, rows) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return network(**batch_of(encoded, rows)).float()

    def trained(kind: str, targets: torch.Tensor) -> Exits:
        torch.manual_seed(seed)
        network = Exits(source, num_labels, kind, list(map(float, numbers)))
        encoder = {id(parameter) for parameter in network.model.base_model.encoder.parameters()}
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        groups = [{"params": [p for p in parameters if id(p) in encoder], "lr": learning_rate}]
        groups.append({"params": [p for p in parameters if id(p) not in encoder], "lr": head_rate})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        heads = [network.model.exit_head_modules(index) for index in range(network.model.num_exits)]
        if standardize:
            standardize_heads(heads, lambda: network.eval() and logits_of(network, train_rows, order[:batch_size]))
        network.train()
        for step in range(steps):
            rows = order[step * batch_size : (step + 1) * batch_size]
            loss = network.loss(logits_of(network, train_rows, rows), targets[rows], step, steps)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], 1.0)
            optimizer.step()
            schedule.step()
        return network.eval()

    def by_length(encoded, function) -> list[np.ndarray]:
        order, found = np.argsort([len(tokens) for tokens in encoded["input_ids"]], kind="stable"), []
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            for start in range(0, len(order), 64):
                found.append(function(batch_of(encoded, order[start : start + 64])))
        return [torch.cat(parts).float().numpy()[np.argsort(order)] for parts in zip(*found, strict=True)]

    def exit_logits(network: Exits, encoded) -> np.ndarray:
        return by_length(encoded, lambda inputs: (network(**inputs),))[0]

    labels = torch.from_numpy(labels.copy())
    if kind == "student":
        teacher_logits = torch.from_numpy(exit_logits(trained("stock", labels), train_rows)[:, -1])
        kind, labels = "cut", teacher_logits.softmax(-1)
    network = trained(kind, labels)
    if kind in ("retrofit", "refit"):
        train_heads(network.model, *by_length(train_rows, partial(read_features, network.model)), seed=seed)
    return exit_logits(network, evaluation_rows)


def right_answers(
    logits: np.ndarray, labels: np.ndarray, budgets: Iterable[float], costs: list[float]
) -> dict[str, np.ndarray]:
    """Which rows are answered rightly at the last exit and under budgets, each half by the policy of the other."""
    num_rows = len(logits)
    right = logits.argmax(-1) == labels[:, None]
    order = np.random.default_rng(100).permutation(num_rows)
    found = {"last": right[:, -1]}
    for share in budgets:
        found[f"{share:g}"] = answers = np.zeros(num_rows, dtype=bool)
        for half in (order[: num_rows // 2], order[num_rows // 2 :]):
            others = np.setdiff1d(order, half)
            policy = calibrate(logits[others], labels[others], costs, target_cost=share).policy
            answers[half] = right[half, policy.exits_of(torch.from_numpy(logits[half])).numpy() if policy else -1]
    return found


def row_of(name: str, option: str, seed: int, logits: np.ndarray, labels: np.ndarray) -> dict:
    """What the results file keeps of one cell."""
    single = option == "stock" or option.startswith(("cut-", "student-"))
    if single:
        logits = logits[:, -1:]
    num_exits = logits.shape[1]
    costs = [exit_number / num_exits for exit_number in range(1, num_exits + 1)]
    right = right_answers(logits, labels, () if single else SHARES, costs)
    return {
        "data": name,
        "option": option,
        "seed": seed,
        "num_rows": len(labels),
        "exits": (logits.argmax(-1) == labels[:, None]).mean(0).tolist(),
        "right": {place: pack_bits(bits) for place, bits in right.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=SETTINGS)
    parser.add_argument("--dataset", type=Path, help="folder of parquet files in the Hub's schema; not for bbc_news")
    parser.add_argument("--options", nargs="+", default=OPTIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--model_name_or_path", default="minilm", help="a BERT whose number of layers 6 divides")
    parser.add_argument("--learning_rate", type=float, default=5e-5, help="of the encoder")
    parser.add_argument("--plain_heads", action="store_true", help="as --standardize_heads false")
    parser.add_argument("--threads", type=int, default=1)
    add_results_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = args.results / "screen.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    words = [args.data, *(["--dataset", str(args.dataset)] if args.dataset else []), "--options", *args.options]
    words += ["--plain_heads"] if args.plain_heads else []
    source, model = model_source(args.model_name_or_path), Path(args.model_name_or_path).name
    words += ["--model_name_or_path", f"path/to/{model}"] if model != "minilm" else []
    words += ["--learning_rate", f"{args.learning_rate:g}"] if args.learning_rate != 5e-5 else []
    about = {"command": command_line("benchmarks/screen.py", words), "machine": machine()}
    data, name = load(args.data, args.dataset), args.data + (", plain heads" if args.plain_heads else "")
    name += f", {model}" if model != "minilm" else ""
    done = {(row["data"], row["option"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for option in args.options:
            if (name, option, seed) not in done:
                logits = train(source, args.data, option, seed, data, args.learning_rate, not args.plain_heads)
                rows.append({**row_of(name, option, seed, logits, data[3]), **about})
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
                print(f"{name}, {option}, seed {seed}: {np.round(rows[-1]['exits'], 4)}", flush=True)


if __name__ == "__main__":
    main()
