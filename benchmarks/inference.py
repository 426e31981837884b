#!/usr/bin/env python
"""Time of dynamic inference, as ratios within one run against named alternatives.

- batch 1: exiting at exit k against the stock model cut to that many layers;
- batches: ideal time / dynamic time, ideal = sum over layers of (share of rows that remain x that layer's time at the
  full batch), against the stock model and against computing every exit;
- whole data set: the engine with exits off and on against the stock pipeline, real texts, tokenizing included.

The heads are untrained and the thresholds are quantiles, so that equal shares exit at every exit: time does not
depend on what the heads have learned.

    python benchmarks/inference.py --model minilm --threads 2
    python benchmarks/inference.py --model vit-small --threads 2
"""

import argparse
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from common import add_results_argument, exit_in_shares, make_inputs, ratio, summarize, write_results
from transformers import AutoTokenizer

from een_hf import EarlyExitBertForSequenceClassification, EarlyExitViTConfig, EarlyExitViTForImageClassification
from een_hf.data import load_bbc_news, sample_model_path
from een_hf.evaluation import measure_seconds, stock_model, text_functions
from een_hf.models.policies import NEVER


VIT_SMALL = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 100}


def load(name: str):
    """Model and tokenizer (`None` for images)."""
    torch.manual_seed(0)
    if name == "vit-small":
        return EarlyExitViTForImageClassification(EarlyExitViTConfig(**VIT_SMALL)).eval(), None
    path = sample_model_path(name)
    model = EarlyExitBertForSequenceClassification.from_pretrained(path, exit_pooling="mean", num_labels=5).eval()
    return model, AutoTokenizer.from_pretrained(path)


def exit_at(model, exit_index: int) -> None:
    thresholds = [NEVER] * model.num_exits
    thresholds[exit_index] = -NEVER
    model.set_exit_policy({"criterion": "confidence", "thresholds": thresholds})


def run_undecided(model, inputs: dict, num_exits: int) -> None:
    """The layers and heads up to an exit, as the model runs them, without a decision."""
    examples = model.embed(**inputs).unpadded()
    context, logits = model.make_context(examples), None
    for index in range(num_exits):
        hidden, logits = model.run_stage(index, examples, context, logits)
        examples = replace(examples, hidden=hidden)


def batch_one(model, length: int | None, repeats: int) -> list[dict]:
    inputs, rows = make_inputs(model, 1, length), []
    for index, layer in enumerate(model.config.exit_layers[:-1]):
        exit_at(model, index)
        functions = {
            "dynamic": lambda: model(**inputs),
            "undecided": partial(run_undecided, model, inputs, index + 1),
            "cut": partial(stock_model(model, layer), **inputs),
        }
        seconds = measure_seconds(functions, repeats)
        row = {"what": "batch 1", "length": length, "exit": index + 1, "layer": layer}
        row["dynamic / cut stock model"] = ratio(seconds, "dynamic", "cut")
        row["undecided / cut stock model"] = ratio(seconds, "undecided", "cut")
        rows.append({**row, **{name: summarize(values) for name, values in seconds.items()}})
    return rows


def batches(model, batch_size: int, length: int | None, repeats: int) -> list[dict]:
    inputs = make_inputs(model, batch_size, length)
    shares = exit_in_shares(model, inputs, [1 / model.num_exits] * model.num_exits)
    stock = stock_model(model)
    examples = model.embed(**inputs).unpadded()
    context = model.make_context(examples)
    functions = {
        "dynamic": lambda: model(**inputs),
        "all exits": lambda: model(**inputs, early_exit=False),
        "stock": lambda: stock(**inputs),
        "embed": lambda: model.embed(**inputs),
    }
    for depth in range(len(model.backbone_layers)):
        functions[f"layer {depth + 1}"] = partial(model.run_layer, depth, examples.hidden, context)
    seconds = measure_seconds(functions, repeats)
    layers = [seconds[f"layer {index + 1}"] for index in range(len(shares))]
    seconds["ideal"] = shares @ np.array(layers) + seconds["embed"]
    row = {"what": "batch", "batch_size": batch_size, "length": length, "mean share of rows": float(shares.mean())}
    row["ideal / dynamic"] = ratio(seconds, "ideal", "dynamic")
    row["dynamic / stock"] = ratio(seconds, "dynamic", "stock")
    row["all exits / stock"] = ratio(seconds, "all exits", "stock")
    return [{**row, **{name: summarize(seconds[name]) for name in ("dynamic", "all exits", "stock")}}]


def data_set(model, tokenizer, batch_size: int, num_rows: int, max_length: int, repeats: int) -> list[dict]:
    """BBC News titles and articles: half of the rows cut to their first line, so that lengths spread."""
    texts = load_bbc_news()["train"]["text"][:num_rows]
    texts = [text.split("\n", 1)[0] if index % 2 else text for index, text in enumerate(texts)]
    sample = tokenizer(texts[:256], truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    shares = exit_in_shares(model, sample.to(model.device), [1 / model.num_exits] * model.num_exits)
    seconds = measure_seconds(
        text_functions(model, tokenizer, [texts], max_length=max_length, batch_size=batch_size), repeats
    )
    row = {"what": "data set", "batch_size": batch_size, "rows": len(texts), "max_length": max_length}
    row["mean share of rows"] = float(shares.mean())
    row["stock pipeline / exits off"] = ratio(seconds, "stock pipeline", "exits off")
    row["stock pipeline / exits on"] = ratio(seconds, "stock pipeline", "exits on")
    return [{**row, **{name: summarize(values) for name, values in seconds.items()}}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["minilm", "vit-small"], default="minilm")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 128], help="of texts, batch 1")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--rows", type=int, default=512, help="of the data set")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers, of the stock models as well")
    parser.add_argument("--name", help="of the results file; default: model, dtype and whether compiled")
    add_results_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model, tokenizer = load(args.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype))
    if args.compile:  # the class of the layers, which all models share
        layer_class = type(model.backbone_layers[0])
        layer_class.forward = torch.compile(layer_class.forward, dynamic=True)
    lengths = args.lengths if tokenizer else [None]
    rows = []
    with torch.inference_mode():
        for length in lengths:
            rows += batch_one(model, length, args.repeats)
        for batch_size in args.batch_sizes:
            rows += batches(model, batch_size, lengths[-1], max(5, args.repeats // 2))
        if tokenizer:
            rows += data_set(model, tokenizer, 32, args.rows, 128, max(3, args.repeats // 8))
    for row in rows:
        print({name: round(v, 3) if isinstance(v, float) else v for name, v in row.items() if not isinstance(v, dict)})
    variant = ("" if args.dtype == "float32" else f"_{args.dtype}") + ("_compiled" if args.compile else "")
    write_results(args.results, args.name or f"inference_{args.model}{variant}", rows)


if __name__ == "__main__":
    main()
