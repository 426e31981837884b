#!/usr/bin/env python
"""Time and memory of a training step of each scheme, against plain fine-tuning of the stock model by `Trainer`.

Rounds of ten optimizer steps (one look-ahead of `l2w, interval 10`) take turns, so that what slows the machine slows
all of them; the first round is left out. Memory is the largest resident size of a process that trains one scheme only,
or on a GPU the allocator's peak.

    python benchmarks/training_step.py --model minilm --threads 2
    python benchmarks/training_step.py --model vit-small --threads 2
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from common import add_results_argument, ratio, summarize, write_results
from transformers import AutoConfig, BertForSequenceClassification, Trainer, TrainerCallback, ViTForImageClassification

from een_hf.data import sample_model_path
from een_hf.models import MODEL_CLASSES
from een_hf.training import EarlyExitTrainingArguments, get_scheme


STEPS = 10
VIT_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "image_size": 112}
SCHEMES = {
    "plain fine-tuning": None,
    "joint": {},
    "boosted": {},
    "l2w, interval 1": {"meta_interval": 1},
    "l2w, interval 10": {"meta_interval": 10},
    "l2w, interval 1, exact": {"meta_interval": 1, "meta_gradient": "exact"},
}


class Clock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self):
        self.seconds = []

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(self.now() - self.start)


def make_trainer(args, scheme: str, batch_size: int) -> tuple[Trainer, Clock]:
    """A trainer on random rows, ready for `STEPS` steps at each call of `train`."""
    torch.manual_seed(0)
    text = args.model == "minilm"
    model_class = MODEL_CLASSES["bert" if text else "vit"]
    shape = AutoConfig.from_pretrained(sample_model_path("minilm")).to_dict() if text else VIT_SMALL
    shape = {name: value for name, value in shape.items() if name != "model_type"}
    config = model_class.config_class(**{**shape, "num_labels": 10})
    size = STEPS * batch_size
    labels = torch.randint(0, 10, (size,))
    features = {"pixel_values": torch.randn(size, 3, 112, 112)}
    if text:
        features = {"input_ids": torch.randint(1000, 20000, (size, args.length))}
        features["attention_mask"] = torch.ones_like(features["input_ids"])
    rows = [{**{name: column[row] for name, column in features.items()}, "labels": labels[row]} for row in range(size)]

    settings = EarlyExitTrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=batch_size,
        max_steps=STEPS,
        lr_scheduler_type="constant",
        train_sampling_strategy="random",
        learning_rate=1e-5,
        head_learning_rate=1e-5,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=args.bf16,
    )
    clock = Clock()
    common = {"args": settings, "train_dataset": rows, "callbacks": [clock]}
    if SCHEMES[scheme] is None:
        stock_class = BertForSequenceClassification if text else ViTForImageClassification
        return Trainer(model=stock_class(stock_class.config_class.from_dict(config.to_dict())), **common), clock
    trainer_class = get_scheme(scheme.split(",")[0])
    scheme_args = trainer_class.arguments_class and trainer_class.arguments_class(**SCHEMES[scheme])
    return trainer_class(model=model_class(config), scheme_args=scheme_args, **common), clock


def peak_memory(args, scheme: str, batch_size: int) -> float:
    """MiB that one process needs at most for this scheme alone."""
    words = [sys.executable, __file__, "--model", args.model, "--batch_size", str(batch_size)]
    words += ["--length", str(args.length), "--threads", str(args.threads), "--only", scheme]
    words += ["--bf16"] if args.bf16 else []
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def print_peak(args) -> None:
    trainer, _ = make_trainer(args, args.only, args.batch_size[0])
    trainer.train()
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated() / 2**20)
    else:
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def compare(args, batch_size: int, memory: dict[str, float]) -> list[dict]:
    contenders = {scheme: make_trainer(args, scheme, batch_size) for scheme in SCHEMES}
    seconds = {scheme: [] for scheme in SCHEMES}
    for turn in range(args.rounds + 1):
        for scheme, (trainer, clock) in contenders.items():
            clock.seconds.clear()
            trainer.train()
            if turn:
                seconds[scheme].append(np.mean(clock.seconds))
    rows = []
    for scheme in SCHEMES:
        row = {"scheme": scheme, "batch_size": batch_size, "peak_memory_mib": memory.get(scheme)}
        for other in ("plain fine-tuning", "joint"):
            row[f"time / {other}"] = ratio(seconds, scheme, other)
            if memory:
                row[f"memory / {other}"] = memory[scheme] / memory[other]
        rows.append({**row, "step": summarize(seconds[scheme])})
        print({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["minilm", "vit-small"], default="minilm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[16, 32], help="one run each")
    parser.add_argument("--length", type=int, default=64, help="of texts")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", choices=SCHEMES, help="train this scheme and print its peak memory in MiB")
    parser.add_argument("--no_memory", action="store_true", help="measure time alone")
    parser.add_argument("--name", help="of the results file; default: the model")
    add_results_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        return print_peak(args)

    # First of all: a child starts with the resident size of its parent.
    schemes = [] if args.no_memory else SCHEMES
    memory = {size: {scheme: peak_memory(args, scheme, size) for scheme in schemes} for size in args.batch_size}
    rows = []
    for size in args.batch_size:
        rows += compare(args, size, memory[size])
    write_results(args.results, args.name or f"training_step_{args.model}", rows)


if __name__ == "__main__":
    main()
