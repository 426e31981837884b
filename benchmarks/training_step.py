#!/usr/bin/env python
"""Time and memory of a training step of each scheme, against plain fine-tuning of the stock model by `Trainer`.

Rounds of ten optimizer steps (one look-ahead of `l2w, interval 10`) take turns, so that what slows the machine slows
all of them; the first round is left out. Every step takes the same random batch, which lies on the device. Memory is
the largest resident size of a process that trains one scheme only, or on a GPU what the allocator held for it at most.
`--check` adds how close the meta gradient of l2w is to the exact one in float32, and on a GPU how often a look-ahead
waits for it and where its time goes.

    python benchmarks/training_step.py --model minilm --threads 2
    python benchmarks/training_step.py --model vit-small --threads 2
    python benchmarks/training_step.py --model vit-small --image_size 224 --batch_size 256 --dtype bfloat16 --check
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from contextlib import ExitStack

import numpy as np
import torch
from common import add_results_argument, ratio, summarize, write_results
from transformers import (
    BertForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    ViTForImageClassification,
)

from een_hf.models import MODEL_CLASSES
from een_hf.training import EarlyExitTrainingArguments, get_scheme
from een_hf.training.l2w import charging, look_ahead


STEPS = 10
NUM_LABELS = 10
SHAPES = {
    "vit-small": ("vit", {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}),
    "minilm": ("bert", {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}),
    "bert-base": ("bert", {}),
}
STOCK = {"bert": BertForSequenceClassification, "vit": ViTForImageClassification}
SCHEMES = {
    "plain fine-tuning": None,
    "joint": {},
    "joint, heads one by one": {},
    "boosted": {},
    "l2w, interval 1": {"meta_interval": 1},
    "l2w, interval 10": {"meta_interval": 10},
    "l2w, interval 1, meta batch 128": {"meta_interval": 1, "meta_batch_size": 128},
    "l2w, interval 1, graphs": {"meta_interval": 1, "meta_cuda_graphs": True},
    "l2w, interval 1, exact": {"meta_interval": 1, "meta_gradient": "exact"},
}


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Clock(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self, device: str):
        self.device, self.seconds = device, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = now(self.device)

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(now(self.device) - self.start)


def make_batch(args, batch_size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, NUM_LABELS, (batch_size,), generator=generator)
    if SHAPES[args.model][0] == "vit":
        features = {"pixel_values": torch.randn(batch_size, 3, args.image_size, args.image_size, generator=generator)}
    else:
        features = {"input_ids": torch.randint(1000, 20000, (batch_size, args.length), generator=generator)}
        features["attention_mask"] = torch.ones_like(features["input_ids"])
    return {name: tensor.to(args.device) for name, tensor in {**features, "labels": labels}.items()}


def make_config(args, **kwargs):
    kind, shape = SHAPES[args.model]
    shape = {"image_size": args.image_size, **shape} if kind == "vit" else shape
    return MODEL_CLASSES[kind].config_class(**shape, num_labels=NUM_LABELS, **kwargs)


def make_trainer(args, scheme: str, batch: dict, scheme_args: dict | None = None, dtype=None, **model_kwargs):
    """A trainer on a batch that repeats, ready for `STEPS` steps at each call of `train`, and its clock."""
    torch.manual_seed(0)
    size, dtype = len(batch["labels"]), dtype or args.dtype
    config, kind = make_config(args, **model_kwargs), SHAPES[args.model][0]
    settings = EarlyExitTrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=size,
        max_steps=STEPS,
        lr_scheduler_type="constant",
        learning_rate=1e-5,
        head_learning_rate=1e-5,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_cpu=args.device == "cpu",
    )
    clock = Clock(args.device)
    common = {
        "args": settings,
        "train_dataset": list(range(max(STEPS * size, 128))),
        "data_collator": lambda rows: {name: tensor[torch.arange(len(rows)) % size] for name, tensor in batch.items()},
        "callbacks": [clock],
    }
    if scheme == "plain fine-tuning":
        trainer = Trainer(model=STOCK[kind](STOCK[kind].config_class.from_dict(config.to_dict())), **common)
    else:
        trainer_class = get_scheme(scheme.split(",")[0])
        own = trainer_class.arguments_class and trainer_class.arguments_class(**(scheme_args or SCHEMES[scheme]))
        trainer = trainer_class(model=MODEL_CLASSES[kind](config), scheme_args=own, **common)
        if scheme == "joint, heads one by one":
            trainer.model.stack_heads = False
    trainer.remove_callback(PrinterCallback)
    return trainer, clock


# Memory


def peak_memory(args, scheme: str, batch_size: int) -> float:
    """MiB that one process needs at most for this scheme alone."""
    words = [sys.executable, __file__, "--model", args.model, "--batch_size", str(batch_size), "--only", scheme]
    for name in ("length", "image_size", "threads", "dtype", "device"):
        words += [f"--{name}", str(getattr(args, name))]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def print_peak(args) -> None:
    trainer, _ = make_trainer(args, args.only, make_batch(args, args.batch_size[0]))
    trainer.train()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


# Time


def compare(args, batch_size: int, memory: dict[str, float]) -> list[dict]:
    batch, contenders = make_batch(args, batch_size), {}
    for scheme in args.schemes:
        before = 0
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        contenders[scheme] = make_trainer(args, scheme, batch)
        # Every number of samples that an exit is charged with has a graph of its own, made where it first comes.
        for _ in range(4 if "graphs" in scheme and args.device == "cuda" else 1):
            contenders[scheme][0].train()
        if args.device == "cuda":
            memory[scheme] = (torch.cuda.max_memory_allocated() - before) / 2**20
    seconds = {scheme: [] for scheme in args.schemes}
    for _ in range(args.rounds):
        for scheme, (trainer, clock) in contenders.items():
            clock.seconds.clear()
            trainer.train()
            seconds[scheme].append(np.mean(clock.seconds))
    rows = []
    for scheme in args.schemes:
        row = {"scheme": scheme, "batch_size": batch_size, "peak_memory_mib": memory.get(scheme)}
        for other in ("plain fine-tuning", "joint"):
            if other in args.schemes:
                row[f"time / {other}"] = ratio(seconds, scheme, other)
                if memory:
                    row[f"memory / {other}"] = memory[scheme] / memory[other]
        row["step"] = summarize(seconds[scheme])
        rows.append(row)
        print({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items()}, flush=True)
    return rows


# The meta gradient of l2w


class Orders:
    """Orders by confidence, kept; where `place` is a number, those kept before, from there on."""

    def __init__(self):
        self.kept, self.place, self.own = [], None, charging.most_confident_first

    def __call__(self, logits):
        if self.place is None:
            self.kept.append(self.own(logits))
            return self.kept[-1]
        self.place += 1
        return self.kept[self.place - 1]


def check(args, batch_size: int) -> dict:
    """Compare meta gradients with the exact one in float32, without dropout, after three steps of training."""
    batch, result = make_batch(args, batch_size), {"batch_size": batch_size}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

    def trainer_in(dtype: str):
        trainer, _ = make_trainer(args, "l2w", batch, {"meta_gradient": "exact"}, dtype=dtype, **dropout)
        trainer.create_optimizer_and_scheduler(100)
        trainer.model.train()
        for _ in range(3):
            trainer.model(**batch, early_exit=False).loss.backward()
            trainer.optimizer.step()
            trainer.model.zero_grad()
        return trainer

    charging.most_confident_first = orders = Orders()
    train, meta = look_ahead.halve(batch)
    exact = trainer_in("float32").meta_gradient(train, meta)[1]
    kept = orders.kept
    for dtype in dict.fromkeys(("float32", args.dtype)):
        trainer = trainer_in(dtype)
        for method in ("forward", "directional"):
            for charges in ("same", "own"):
                # Of nearly equal confidences half precision may take another as the larger.
                orders.kept, orders.place = (kept, 0) if charges == "same" else ([], None)
                trainer.scheme_args.meta_gradient = method
                found = trainer.meta_gradient(train, meta)[1]
                cosine = torch.cosine_similarity(found.flatten().double(), exact.flatten().double(), dim=0).item()
                error = ((found - exact).norm() / exact.norm()).item()
                result[f"{method}, {dtype}, {charges} charges"] = {"cosine": cosine, "relative_error": error}
                print(f"{method}, {dtype}, {charges} charges: cosine {cosine:.7f}, relative error {error:.1e}")
    charging.most_confident_first = orders.own
    trainer.scheme_args.meta_gradient = "auto"
    if args.device == "cuda":
        result["waits"] = count_waits(lambda: trainer.meta_step(batch))
    result["parts_ms"] = time_parts(args, trainer, batch)
    return result


def count_waits(look_ahead) -> int:
    """How often the host waits for the device in one look-ahead; prints where."""
    look_ahead()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        look_ahead()
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchroniz" in str(warning.message)]
    for place in sorted({f"{warning.filename}:{warning.lineno}" for warning in waits}):
        print(f"waits for the device: {place}")
    print(f"a look-ahead waits {len(waits)} times for the device")
    return len(waits)


def time_parts(args, trainer, batch: dict) -> dict[str, float]:
    """Median milliseconds of a look-ahead, and of its parts on both halves; on a GPU a part is timed to its end."""
    owners = {"linear_step": look_ahead}
    parts = ("train_pass", "meta_loss", "forward_derivative", "central_differences")
    owners |= dict.fromkeys(parts, trainer.look_ahead)
    seconds = defaultdict(list)

    def timed(name, function):
        def run(*args_, **kwargs):
            start = now(args.device)
            result = function(*args_, **kwargs)
            seconds[name][-1] += now(args.device) - start
            return result

        return run

    for measured in (("look-ahead",), owners):
        with ExitStack() as stack:
            for name in owners if measured is owners else ():
                own = getattr(owners[name], name)
                setattr(owners[name], name, timed(name, own))
                stack.callback(setattr, owners[name], name, own)
            for _ in range(6):
                for name in measured:
                    seconds[name].append(0.0)
                timed("look-ahead", trainer.meta_step)(batch)
    result = {name: 1000 * float(np.median(times[1:6])) for name, times in seconds.items()}
    print({name: round(value, 2) for name, value in result.items()}, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="minilm")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[16, 32], help="one run each")
    parser.add_argument("--length", type=int, default=64, help="of texts")
    parser.add_argument("--image_size", type=int, default=112)
    on_request = ("joint, heads one by one", "l2w, interval 1, graphs", "l2w, interval 1, meta batch 128")
    usual = [scheme for scheme in SCHEMES if scheme not in on_request]
    parser.add_argument("--schemes", choices=SCHEMES, nargs="+", default=usual, help="to compare")
    parser.add_argument("--check", action="store_true", help="compare the meta gradient with the exact one first")
    parser.add_argument("--only", choices=SCHEMES, help="train this scheme and print its peak memory in MiB")
    parser.add_argument("--no_memory", action="store_true", help="on a CPU measure time alone")
    parser.add_argument("--name", help="of the results file; default: the model")
    add_results_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        return print_peak(args)

    # First of all: a child starts with the resident size of its parent.
    memory, rows, checks = {}, [], []
    if args.device == "cpu" and not args.no_memory:
        memory = {
            size: {scheme: peak_memory(args, scheme, size) for scheme in args.schemes} for size in args.batch_size
        }
    for size in args.batch_size:
        if args.check:
            checks.append(check(args, size))
        rows += compare(args, size, memory.get(size, {}))
    write_results(
        args.results, args.name or f"training_step_{args.model}", rows, **({"checks": checks} if args.check else {})
    )


if __name__ == "__main__":
    main()
