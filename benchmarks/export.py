#!/usr/bin/env python
"""Time of an exported graph in ONNX Runtime, as a ratio to its own full depth.

MiniLM with an untrained exit after every layer; thresholds force the exit, or let equal shares of a batch exit at each
exit. A graph in which a batch exits as a whole would take the full depth then. The graph of all exits
(`--no_dynamic`), the int8 graph and PyTorch's dynamic mode are timed in the same rounds.

    python benchmarks/export.py --threads 2
"""

import argparse
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from common import add_results_argument, exit_in_shares, ratio, summarize, write_results

from een_hf import EarlyExitBertForSequenceClassification
from een_hf.data import sample_model_path
from een_hf.evaluation import measure_seconds
from een_hf.inference.onnx import export_onnx
from een_hf.models.policies import NEVER


def start(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def random_texts(batch_size: int, length: int) -> dict[str, torch.Tensor]:
    """Random words of full length."""
    words = torch.randint(1000, 20000, (batch_size, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": words, "attention_mask": torch.ones_like(words), "token_type_ids": torch.zeros_like(words)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=100, help="rounds at batch size 1; fewer at larger ones")
    add_results_argument(parser)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    path = sample_model_path("minilm")
    model = EarlyExitBertForSequenceClassification.from_pretrained(path, exit_pooling="mean", num_labels=5).eval()
    forced = [
        [-NEVER if k == exit_index else NEVER for k in range(model.num_exits)] for exit_index in range(model.num_exits)
    ]
    # Every exit is in the graph, also those that a policy would leave out.
    model.set_exit_policy({"criterion": "confidence", "thresholds": [0.5] * model.num_exits})

    sessions, graphs = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("dynamic", "int8", "all exits"):
            file = Path(folder) / "model.onnx"
            begin = time.perf_counter()
            export_onnx(model, file, dynamic=name != "all exits", quantize="int8" if name == "int8" else None)
            graphs[name] = {"export_s": time.perf_counter() - begin, "size_mib": file.stat().st_size / 2**20}
            sessions[name] = start(file, args.threads)
    print(graphs)

    def timed(name: str, thresholds: list[float], feed: dict, inputs: dict) -> dict:
        def by_pytorch():
            model.set_exit_policy({"criterion": "confidence", "thresholds": thresholds})
            return model(**inputs)

        given = {**feed, "thresholds": np.float32(thresholds)}
        return {
            name: lambda: sessions["dynamic"].run(None, given),
            f"int8, {name}": lambda: sessions["int8"].run(None, given),
            f"PyTorch, {name}": by_pytorch,
        }

    versions = {package: version(package) for package in ("onnx", "onnxruntime", "onnxscript")}
    depths = [layer / model.config.num_hidden_layers for layer in model.config.exit_layers]
    rows = []
    for batch_size in args.batch_sizes:
        inputs = random_texts(batch_size, args.length)
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        functions = {"all exits": lambda feed=feed: sessions["all exits"].run(None, feed)}
        cases = {str(index + 1): (forced[index], depth) for index, depth in enumerate(depths)}
        if batch_size > 1:
            continuing = exit_in_shares(model, inputs, [1 / model.num_exits] * model.num_exits)
            cases["equal shares"] = (model.config.exit_policy["thresholds"], float(continuing.mean()))
        for name, (thresholds, _) in cases.items():
            functions |= timed(name, thresholds, feed, inputs)
        seconds = measure_seconds(functions, max(5, args.repeats // batch_size))
        for name, (_, depth) in cases.items():
            row = {"batch_size": batch_size, "length": args.length, "exit": name, "layers / all layers": depth}
            row["time / full depth"] = ratio(seconds, name, str(model.num_exits))
            row["time / graph of all exits"] = ratio(seconds, name, "all exits")
            row["time / PyTorch"] = ratio(seconds, name, f"PyTorch, {name}")
            row["int8 / float32"] = ratio(seconds, f"int8, {name}", name)
            measured = {"onnxruntime": summarize(seconds[name]), "int8": summarize(seconds[f"int8, {name}"])}
            measured["pytorch"] = summarize(seconds[f"PyTorch, {name}"])
            rows.append({**row, **measured, "graphs": graphs, "versions": versions})
            print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    write_results(args.results, "export", rows)


if __name__ == "__main__":
    main()
