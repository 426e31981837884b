#!/usr/bin/env python
"""Early exits on one GPU: right first, then fast, against the stock model in its strongest forms.

Random weights in the shapes of four encoders, exits after every third layer (every second of MiniLM) and after every
layer; nothing is downloaded. One GPU needs under four minutes; without one the same script runs small shapes in
about a minute.

- correctness: the runner against the anytime logits at the exit that each example takes: precisions, criteria, batch
  sizes that grow and shrink, policies and weights that change between calls; `predict`, the engine and the server's
  worker over examples of many lengths;
- single: one example that exits at exit k, against the stock model cut to that many layers; where torch has
  conditional nodes, also the whole chain of exits as one graph (`one graph`): the device itself skips layers;
- batches: half of the layers on average, against the whole stock model and what is ideal; memory of the graphs; the
  projection of patches as a product against the convolution;
- texts: a data set of texts of real lengths, tokenizing included, by `predict` and by an engine that keeps the deeper
  stages full (`in flight`), against the stock pipeline;
- serving: examples of real lengths through the server's worker, always so many waiting, by captured programs and
  eagerly, against the stock model on batches of those that wait;
- training: steps of each scheme, by `training_step.py`: heads together and one by one, look-aheads with and without
  graphs.

Each part runs in a process and within a time of its own and writes `gpu_<part>.json` after each model, so that none
takes the others down. The end is a table of the targets.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only batches --models vit-base --batch_sizes 32 128
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from common import STEP_TARGETS, add_results_argument, exit_in_shares, make_inputs, ratio, summarize, write_results
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from een_hf.evaluation import measure_seconds, stock_model, text_functions
from een_hf.inference import ExitEngine, ExitRunner, pad_rows, predict
from een_hf.inference.onnx import DynamicExits
from een_hf.inference.predict import fastest_batches
from een_hf.inference.rows import model_inputs, tokenized_rows
from een_hf.inference.runner import MAX_ROWS, runner_of
from een_hf.models import MODEL_CLASSES, ExitPolicy
from een_hf.models.policies import NEVER
from een_hf.serving.stages import EngineObserver, Request, Row, StageWorker


STARTED = time.perf_counter()

# Kind, layers between exits, and where the shape is not the default of transformers.
MODELS = {
    "bert-base": ("bert", 3, {}),
    "vit-base": ("vit", 3, {}),
    "vit-small": ("vit", 3, {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}),
    "minilm": ("bert", 2, {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}),
}
SMALL = {
    "bert": {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "vocab_size": 2000},
    "vit": {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 96, "image_size": 64},
}
CRITERIA = ("confidence", "entropy", "margin", "patience", "vote")
# How far an answer may lie from the anytime logits, as a share of their spread, and the share of the examples that
# rounding may take to another exit.
TOLERANCES = {"float32": (0.01, 0.01), "float16": (0.08, 0.03), "bfloat16": (0.5, 0.1)}

# Seconds of each part on a GPU.
LIMITS = {"correctness": 45, "single": 25, "batches": 40, "texts": 25, "serving": 20, "training": 75}

# Time over that of the stock model: eager, and under its own CUDA graph (small models, base models).
SINGLE_TARGETS = (0.5, 1.10, 1.10)
BATCH_TARGETS = {32: (0.5, 1.05, 0.85), 128: (0.65, 0.75, 0.70), 512: (0.62, 0.65, 0.65)}
TEXTS_TARGET = 5.0
MEMORY_TARGET = 1.5


# What all parts share


class Part:
    """The rows of one part: what fails, or comes too late, is a row as well and takes no other along."""

    def __init__(self, name: str, args):
        self.name, self.args, self.rows = name, args, []

    def measure(self, function, **labels) -> None:
        """Add the rows of `function(args, **labels)`."""
        if time.perf_counter() - STARTED > self.args.limit:
            rows = [{"skipped": f"over the {self.args.limit:.0f} s of this part"}]
        else:
            try:
                with torch.no_grad():
                    rows = function(self.args, **labels)
            except Exception as error:
                traceback.print_exc()
                rows = [{"failed": f"{type(error).__name__}: {error}".splitlines()[0]}]
        for row in rows:
            self.rows.append({**labels, **row})
            values = (f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in flat(self.rows[-1]).items())
            print(f"{self.name}:", ", ".join(values), flush=True)

    def write(self) -> None:
        write_results(self.args.results, f"gpu_{self.name}", self.rows)


def flat(row: dict) -> dict:
    return {key: value for key, value in row.items() if not isinstance(value, (dict, list))}


def make_network(args, model: str, step: int, dtype: str, seed: int = 0, **settings):
    """Random weights, wide enough that exits tell examples apart; an exit after every `step` layers."""
    torch.manual_seed(seed)
    kind, _, shape = MODELS[model]
    shape = shape | (SMALL[kind] if args.small else {})
    layers = list(range(step, shape.get("num_hidden_layers", 12) + 1, step))
    if kind == "bert":
        settings["exit_pooling"] = "mean"
    model_class = MODEL_CLASSES[kind]
    config = model_class.config_class(**shape, exit_layers=layers, num_labels=4, initializer_range=0.06, **settings)
    with torch.device(args.device):
        network = model_class(config)
    return network.to(getattr(torch, dtype)).eval()


def random_inputs(args, network, batch_size: int, seed: int = 0, padded: bool = False) -> dict[str, torch.Tensor]:
    """Pixels in the network's precision, or texts of `args.length` tokens, on request of fewer and padded."""
    images = network.main_input_name == "pixel_values"
    inputs = make_inputs(network, batch_size, None if images else args.length, seed)
    if images:
        inputs["pixel_values"] = inputs["pixel_values"].to(network.dtype)
    elif padded:
        ends = torch.randint(2, args.length + 1, (batch_size, 1), generator=torch.Generator().manual_seed(seed))
        inputs["attention_mask"] = (torch.arange(args.length) < ends).long().to(network.device)
    return inputs


def equal_shares(network) -> list[float]:
    return [1 / network.num_exits] * network.num_exits


def half_cost_shares(network) -> list[float]:
    """Shares proportional to q^k, where examples run half of the layers on average."""
    layers, index = np.array(network.config.exit_layers), np.arange(network.num_exits)
    low, high = 1e-6, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        shares = middle**index / (middle**index).sum()
        low, high = (low, middle) if shares @ layers > layers[-1] / 2 else (middle, high)
    return shares.tolist()


def captured(function, inputs: dict, device: str):
    """`function(**inputs)` as one CUDA graph that first copies its inputs in; without CUDA the call itself."""
    if device == "cpu":
        return partial(function, **inputs)
    static = {name: tensor.clone() for name, tensor in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function(**static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = function(**static)

    def replay(function=function):  # a graph reads the weights, which must stay
        for name, tensor in inputs.items():
            static[name].copy_(tensor)
        graph.replay()
        return outputs

    return replay


def stock_functions(args, network, inputs: dict, num_layers: int | None = None) -> dict:
    """The plain model, eager and as one graph; the graph reads no mask, because nothing is padded."""
    with torch.device(args.device):
        stock = stock_model(network, num_layers)
    unmasked = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}
    with without_mask(stock):
        graph = captured(stock, unmasked, args.device)
    return {"eager": partial(stock, **inputs), "graph": graph}


@contextmanager
def without_mask(stock):
    """Under capture transformers builds a mask even where none is needed, and attention takes three times as long."""
    module, name = sys.modules[type(stock).__module__], "create_bidirectional_mask"
    original = getattr(module, name, None)
    if original is not None:
        setattr(module, name, lambda *_, **__: None)
    try:
        yield
    finally:
        if original is not None:
            setattr(module, name, original)


# Correctness


def compare(answer, exit_logits: torch.Tensor, policy: ExitPolicy) -> dict:
    """How an answer differs from the anytime logits (batch, num_exits, num_labels) of the same inputs."""
    exit_logits = exit_logits.float().cpu()
    logits, taken = answer.logits.float().cpu(), answer.exit_index.cpu()
    spread = exit_logits.std().item()
    difference = (logits - exit_logits[torch.arange(len(taken)), taken]).abs().amax().item()
    elsewhere = taken != policy.exits_of(exit_logits)
    # Rounding explains another exit only where a score lies as near to its threshold, or where what counts is which
    # class leads, the best two logits as near to each other.
    rounding = max(4 * difference, 1e-3 * spread)
    near = ((policy.scores(exit_logits) - torch.tensor(policy.thresholds)).abs() < rounding)[:, :-1].any(1)
    if not policy.scorer.scores_probabilities:
        best = exit_logits.topk(2, -1).values
        near |= (best[..., 0] - best[..., 1] < rounding).any(1)
    return {
        "examples": len(taken),
        "at another exit": int(elsewhere.sum()),
        "unexplained": int((elsewhere & ~near).sum()),
        "largest difference": difference / spread if difference == difference else float("inf"),
    }


def verdict(parts: list[dict], dtype: str) -> dict:
    tolerance, share = TOLERANCES[dtype]
    total = {name: sum(part[name] for part in parts) for name in ("examples", "at another exit", "unexplained")}
    total["largest difference"] = max(part["largest difference"] for part in parts)
    few = total["at another exit"] <= max(1, share * total["examples"])
    return {**total, "ok": few and not total["unexplained"] and total["largest difference"] < tolerance}


def check_runner(
    args, model: str, step: int, dtype: str, aggregation: str, criteria: tuple[str, ...], weights: bool = False
) -> list[dict]:
    """One runner through criteria, and on request through other weights; its policy changes between all of these."""
    network = make_network(args, model, step, dtype, exit_aggregation=aggregation)
    kinds = {"eager": False} | ({"graphs": True} if args.cuda_graphs else {})
    runners = {kind: ExitRunner(network, cuda_graphs=graphs) for kind, graphs in kinds.items()}
    rows, seed = [], 0

    def check(what: str, criterion: str) -> None:
        nonlocal seed
        seed += 1
        exit_in_shares(network, random_inputs(args, network, 64, seed, True), equal_shares(network), criterion)
        policy, found = network.get_exit_policy(), {kind: [] for kind in kinds}
        for batch_size in args.check_sizes:
            seed += 1
            inputs = random_inputs(args, network, batch_size, seed, padded=batch_size % 2 == 1)
            exit_logits = network(**inputs, early_exit=False).exit_logits
            for kind, runner in runners.items():
                found[kind].append(compare(runner(**inputs), exit_logits, policy))
        for kind in kinds:
            rows.append({"what": what, "criterion": criterion, "runner": kind, **verdict(found[kind], dtype)})

    for criterion in criteria:
        check("criterion", criterion)
    if not weights:
        return rows
    for parameter in network.parameters():
        parameter.mul_(1.1)
    check("weights changed in place", "margin")
    other = make_network(args, model, step, dtype, seed=1, exit_aggregation=aggregation)
    network.load_state_dict(other.state_dict(), assign=True)
    check("weights replaced", "confidence")
    return rows


def check_rows(args, model: str, step: int, dtype: str) -> list[dict]:
    """`predict` over examples of many lengths, more of them the second time; in the first, engine and server too."""
    network, parts = make_network(args, model, step, dtype), {"predict": [], "engine": [], "server": []}
    for seed, count in ((1, 40), (2, 150)):
        rows = random_rows(args, network, count, seed)
        inputs = {name: tensor.to(network.device) for name, tensor in pad_rows(rows, network.config).items()}
        exit_in_shares(network, inputs, equal_shares(network))
        policy, exit_logits = network.get_exit_policy(), network(**inputs, early_exit=False).exit_logits
        answers = predict(network, rows, 16, cuda_graphs=args.cuda_graphs, progress=False)
        parts["predict"].append(compare(answers, exit_logits, policy))
        if parts["engine"] or dtype != args.dtype:  # each shape that runs is captured, which takes its time
            continue
        engine = ExitEngine(network, 16, cuda_graphs=args.static)
        batches = [torch.arange(start, min(start + 16, count)) for start in range(0, count, 16)]
        found = engine.run((ids, pad_rows([rows[index] for index in ids], network.config)) for ids in batches)
        parts["engine"].append(compare(gather(found), exit_logits, policy))
        requests = serve_rows(make_worker(network, args.static, 16), rows, 64)
        found = [(torch.tensor([n]), row.logits[None], row.exit_index) for n, row in enumerate(requests)]
        parts["server"].append(compare(gather(found), exit_logits, policy))
    return [{"what": what, "criterion": "confidence", **verdict(part, dtype)} for what, part in parts.items() if part]


def random_rows(args, network, count: int, seed: int, lengths: list[int] | None = None) -> list[dict]:
    """Examples by themselves, texts of as many tokens as said, by default of any number."""
    inputs = {name: tensor.cpu() for name, tensor in random_inputs(args, network, count, seed, True).items()}
    if "input_ids" not in inputs:
        return [{name: tensor[index] for name, tensor in inputs.items()} for index in range(count)]
    lengths = inputs["attention_mask"].sum(1).tolist() if lengths is None else lengths
    return [{"input_ids": ids[:length]} for ids, length in zip(inputs["input_ids"], lengths, strict=True)]


def gather(found) -> SimpleNamespace:
    """What an engine yields, in the order of the ids."""
    ids, logits, exits = zip(
        *((ids, logits.float().cpu(), [exit] * len(ids)) for ids, logits, exit in found), strict=True
    )
    order = torch.cat(ids).argsort()
    return SimpleNamespace(logits=torch.cat(logits)[order], exit_index=torch.tensor(sum(exits, []))[order])


def correctness(args, part: Part) -> None:
    for model in args.models:
        step = MODELS[model][1]
        for dtype in args.check_dtypes:
            every = dtype == args.dtype
            check = partial(check_runner, criteria=CRITERIA if every else CRITERIA[2:4], weights=every)
            part.measure(check, model=model, step=step, dtype=dtype, aggregation="none")
            part.measure(check_rows, model=model, step=step, dtype=dtype)
        check = partial(check_runner, criteria=CRITERIA[3:])
        part.measure(check, model=model, step=1, dtype=args.dtype, aggregation="boosted")
        part.write()


# One example


def on_network(function):
    """Call with a network made for the labels, in inference mode; its weights are no inference tensors."""

    def call(args, model: str, step: int) -> list[dict]:
        network = make_network(args, model, step, args.dtype)
        with torch.inference_mode():
            return function(args, network, model, step)

    return call


@on_network
def one_example(args, network, model: str, step: int) -> list[dict]:
    """Exit at exit k, the only one that the policy uses, against the stock model cut to that many layers.

    Beside it `each exit`: the same with a decision, and a wait for it, at every exit before.
    """
    rows, inputs, sparse = [], random_inputs(args, network, 1), MODELS[model][1]
    confidence = network(**inputs, early_exit=False).exit_logits[0].float().softmax(-1).amax(-1)
    for index, layer in enumerate(network.config.exit_layers):
        if layer % sparse:
            continue
        functions = {}
        for name, others in (("runner", [NEVER] * network.num_exits), ("each exit", ((1 + confidence) / 2).tolist())):
            others[index] = -NEVER
            runner = ExitRunner(network, ExitPolicy("confidence", others), cuda_graphs=args.cuda_graphs)
            if (taken := int(runner(**inputs).exit_index)) != index:
                raise RuntimeError(f"the example exits at exit {taken + 1}, not {index + 1}")
            functions[name] = partial(runner, **inputs)
        network.set_exit_policy(runner.policy)
        conditional = add_chain(args, network, runner.policy, inputs, index, functions)
        functions["dynamic"] = lambda: network(**inputs)
        functions |= stock_functions(args, network, inputs, layer)
        seconds = measure_seconds(functions, args.rounds, warmup=3)
        row = {"exit": index + 1, "layer": layer, "conditional nodes": conditional}
        ours = [name for name in ("runner", "each exit", "one graph", "dynamic") if name in functions]
        row |= {f"{name} / {other}": ratio(seconds, name, other) for name in ours for other in STOCK}
        rows.append({**row, **{name: summarize(values) for name, values in seconds.items()}})
    return rows


STOCK = ("eager", "graph")


class _OneExample(DynamicExits):
    """The chain of the ONNX export, which need not look which rows of a batch of one continue."""

    def continuing(self, exits):
        return torch.zeros_like(exits, dtype=torch.int64)


def chain_of_exits(args, network, policy: ExitPolicy, inputs: dict):
    """The chain of the ONNX export on one example: on CUDA one graph with conditional nodes, elsewhere with plain ifs.

    Raises:
        ImportError: this torch has no conditional nodes.
    """
    chain, cuda = _OneExample(network, policy), args.device == "cuda"
    thresholds = torch.tensor(policy.thresholds, device=args.device)
    unmasked = {name: tensor for name, tensor in inputs.items() if name != "attention_mask"}

    def call(condition, **inputs):
        with mock.patch.object(torch, "cond", condition):
            return chain(inputs, thresholds)

    if not cuda:
        return partial(call, lambda done, skip, run, operands: (skip if done else run)(*operands), **unmasked)
    from torch._higher_order_ops.cudagraph_conditional_nodes import if_else_node

    # Libraries make their workspaces outside of the capture: first both branches of every condition run.
    for chosen in (1, 2):
        call(lambda done, *branches, chosen=chosen: branches[chosen - 1](*branches[2]), **unmasked)
    static = {name: tensor.clone() for name, tensor in unmasked.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call(if_else_node, **static)

    def replay():
        for name, tensor in unmasked.items():
            static[name].copy_(tensor)
        graph.replay()
        return outputs

    return replay


def add_chain(args, network, policy: ExitPolicy, inputs: dict, index: int, functions: dict) -> str:
    """Add the chain to `functions`, if it can be made and answers right; what became of it."""
    try:
        chain = chain_of_exits(args, network, policy, inputs)
        logits, taken = chain()
        wanted = network(**inputs, early_exit=False).exit_logits[:, index].float()
        near = (logits.float() - wanted).abs().max() < TOLERANCES[args.dtype][0] * wanted.std()
        if int(taken) != index or not near:
            return f"wrong: exit {int(taken) + 1} instead of {index + 1}" if int(taken) != index else "wrong logits"
    except Exception as error:
        return f"not available: {type(error).__name__}: {error}".splitlines()[0]
    functions["one graph"] = chain
    return "right"


def single(args, part: Part) -> None:
    for model in args.models:
        for step in dict.fromkeys((MODELS[model][1], 1)):
            part.measure(one_example, model=model, step=step)
        part.write()


# Batches


@on_network
def batches_of(args, network, model: str, step: int) -> list[dict]:
    """Examples that run half of the layers on average, against the whole stock model; then what the graphs hold."""
    rows, runner, whole = [], ExitRunner(network, cuda_graphs=args.cuda_graphs), len(network.backbone_layers)
    for batch_size in args.batch_sizes:
        inputs = random_inputs(args, network, batch_size)
        shares = exit_in_shares(network, inputs, half_cost_shares(network))
        functions = {"runner": lambda inputs=inputs: runner(**inputs), "dynamic": partial(network, **inputs)}
        functions |= stock_functions(args, network, inputs)
        functions["half graph"] = stock_functions(args, network, inputs, whole // 2)["graph"]
        if args.compile and model == args.models[0] and batch_size == args.batch_sizes[0]:
            functions["compiled"] = partial(torch.compile(functions["eager"].func), **inputs)
        seconds = measure_seconds(functions, args.rounds, warmup=3)
        # A layer takes what it takes a full batch; embeddings and head the rest.
        layer = (np.median(seconds["graph"]) - np.median(seconds["half graph"])) / (whole - whole // 2)
        seconds["ideal"] = np.array(seconds["graph"]) - layer * (whole - shares.sum())
        exits = -np.diff([*shares, 0])[np.array(network.config.exit_layers) - 1]
        row = {"batch_size": batch_size, "mean share of layers": float(shares.mean()), "exit shares": exits.tolist()}
        for name in ("runner", "dynamic", "ideal"):
            row |= {f"{name} / {other}": ratio(seconds, name, other) for other in STOCK}
        rows.append({**row, **{name: summarize(values) for name, values in seconds.items()}})
        del functions
    if args.device == "cuda":
        rows.append(memory(network, runner, inputs, batch_size))
    if network.main_input_name == "pixel_values":
        rows.append(projection(args, network, inputs, batch_size))
    return rows


def projection(args, network, inputs: dict, batch_size: int) -> dict:
    """Seconds of the patches' projection as a product, over those of the convolution that it is."""
    module, images = network.base_model.embeddings.patch_embeddings.projection, inputs["pixel_values"]
    functions = {"product": partial(module.multiply, images)}
    functions["convolution"] = partial(torch.nn.Conv2d.forward, module, images)
    seconds = measure_seconds(functions, args.rounds, warmup=3)
    row = {"batch_size": batch_size, "projection, product / convolution": ratio(seconds, *functions)}
    return {**row, **{name: summarize(values) for name, values in seconds.items()}}


def memory(network, runner, inputs: dict, batch_size: int) -> dict:
    """Bytes of all graphs so far, against what one eager pass over the largest batch takes at its peak."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    network(**inputs, early_exit=False)
    eager, graphs = torch.cuda.max_memory_allocated() - before, runner.memory()
    row = {"batch_size": batch_size, "graphs (MiB)": graphs / 2**20, "eager pass (MiB)": eager / 2**20}
    return {**row, "graphs / eager pass": graphs / eager}


def batches(args, part: Part) -> None:
    for every in (False, True):
        for model in args.models:
            part.measure(batches_of, model=model, step=1 if every else MODELS[model][1])
            part.write()


# Texts


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Word pieces over words of random letters, with the special tokens of BERT."""
    generator, special = np.random.default_rng(0), ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters)])
    while len(pieces) < vocab_size:
        pieces["".join(generator.choice(letters, generator.integers(2, 10)))] = None
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{name.strip('[]').lower()}_token": name for name in special}
    )


def make_texts(tokenizer, count: int) -> list[str]:
    """Texts whose numbers of tokens spread as those of reviews and headlines do: median 30, a tenth beyond 85."""
    generator = np.random.default_rng(0)
    words = [word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 1]
    lengths = np.clip(np.exp(generator.normal(3.4, 0.8, count)).astype(int), 1, 400)
    return [" ".join(generator.choice(words, length)) for length in lengths]


def data_set(args, model: str, step: int, batch_size: int) -> list[dict]:
    network = make_network(args, model, step, args.dtype)
    tokenizer = make_tokenizer(network.config.vocab_size)
    texts = make_texts(tokenizer, args.texts)
    encoded = tokenizer(texts[:512], truncation=True, max_length=args.length, padding=True, return_tensors="pt")
    shares = exit_in_shares(network, encoded.to(network.device), half_cost_shares(network))
    functions = text_functions(network, tokenizer, [texts], max_length=args.length, batch_size=batch_size)
    tokenize = partial(tokenizer, truncation=True, max_length=args.length)
    functions["in flight"] = partial(in_flight, args, network, texts, tokenize, batch_size, {})
    seconds = measure_seconds(functions, max(3, args.rounds // 6), warmup=2)
    row = {"texts": len(texts), "mean tokens": float(encoded["attention_mask"].sum(1).float().mean())}
    row["mean share of layers"] = float(shares.mean())
    row |= {f"stock pipeline / {name}": ratio(seconds, "stock pipeline", name) for name in list(functions)[1:]}
    return [{**row, **{name: summarize(values) for name, values in seconds.items()}}]


def in_flight(args, network, texts: list[str], tokenize, batch_size: int, engines: dict) -> torch.Tensor:
    """Logits of texts by an engine, whose programs are kept in `engines`; batches are made as `predict` makes them."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]), reverse=True)
    rows = model_inputs(tokenized_rows(texts, order, tokenize, MAX_ROWS), network)
    collate = partial(pad_rows, config=network.config)
    size, batches = fastest_batches(runner_of(network), rows, batch_size, len(texts), collate, order)
    if size not in engines:
        engines[size] = ExitEngine(network, size, cuda_graphs=args.static)
    return gather(engines[size].run(batches)).logits


def texts(args, part: Part) -> None:
    for batch_size in args.text_batch_sizes:
        for model in args.models:
            kind, step, _ = MODELS[model]
            if kind == "bert":
                part.measure(data_set, model=model, step=step, batch_size=batch_size)
        part.write()


# Serving


def make_worker(network, static: bool, max_rows: int) -> StageWorker:
    return StageWorker(network, max_rows, 0.005, EngineObserver(), cuda_graphs=static)


def serve_rows(worker: StageWorker, rows: list[dict], waiting: int) -> list[Row]:
    """Answer each row as a request of its own, so many of them waiting at any time."""
    policy, step, served = worker.model.get_exit_policy(), 16, []
    for inputs in rows:
        request, text = Request(None, policy, Future(), True), "input_ids" in inputs
        length = len(inputs["input_ids"]) if text else 0
        size = -(-length // step) if text else tuple(inputs["pixel_values"].shape)
        request.rows = [Row(request, inputs, size, length)]
        served.append(request.rows[0])
    coming = iter(served)
    for row in islice(coming, waiting):
        worker.add([row])
    while worker.step():
        for error in filter(None, (error for _, error in worker.finished)):
            raise error
        for row in islice(coming, len(worker.finished)):
            worker.add([row])
        worker.finished = []
    return served


@on_network
def through_the_worker(args, network, model: str, step: int) -> list[dict]:
    """Examples that run half of the layers on average, through the server's worker, against the stock model."""
    count, waiting, limit = (24, 12, 8) if args.small else (1024, 256, 64)
    lengths = np.random.default_rng(0).lognormal(3.2, 0.5, count).astype(int).clip(2, args.length).tolist()
    rows = random_rows(args, network, count, 0, lengths)
    sample = {name: tensor.to(network.device) for name, tensor in pad_rows(rows[:256], network.config).items()}
    shares = exit_in_shares(network, sample, half_cost_shares(network))
    workers = {
        "captured": make_worker(network, args.static, limit),
        "eager": make_worker(network, False, limit),
    }
    functions = {name: partial(serve_rows, worker, rows, waiting) for name, worker in workers.items()}
    with torch.device(args.device):
        stock = stock_model(network)

    def in_batches() -> None:
        for start in range(0, count, limit):
            inputs = pad_rows(rows[start : start + limit], network.config)
            stock(**{name: tensor.to(network.device) for name, tensor in inputs.items()}).logits.cpu()

    functions["stock"] = in_batches
    seconds = measure_seconds(functions, max(3, args.rounds // 6), warmup=1 if args.small else 3)
    row = {"examples": count, "waiting": waiting, "max rows": limit, "mean share of layers": float(shares.mean())}
    row |= {f"stock / {name}": ratio(seconds, "stock", name) for name in workers}
    return [{**row, **{name: summarize(values) for name, values in seconds.items()}}]


def serving(args, part: Part) -> None:
    for model in args.models:
        if model in ("minilm", "vit-small"):
            part.measure(through_the_worker, model=model, step=MODELS[model][1])
        part.write()


# Training


# Of training steps: model, batch size, and its other settings.
STEPS = {
    "bert-base": ("bert-base", 64, ["--length", "128"]),
    "vit-small-224": ("vit-small", 256, ["--image_size", "224"]),
    "vit-small-112": ("vit-small", 256, ["--image_size", "112"]),
}


def training(args, part: Part) -> None:
    """`training_step.py`, whose rows are gathered."""
    script, rows = Path(__file__).with_name("training_step.py"), []
    for name, (model, batch_size, words) in STEPS.items():
        words = ["--model", model, "--batch_size", str(batch_size), *words, "--rounds", "1", "--dtype", "bfloat16"]
        schemes = ["plain fine-tuning", *STEP_TARGETS, "joint, heads one by one", "l2w, interval 1, graphs"]
        words += ["--schemes", *schemes, "--name", f"gpu_training_{name}"]
        seconds_left = args.limit + STARTED - time.perf_counter()
        try:
            command = [sys.executable, str(script), *words, "--results", str(args.results)]
            subprocess.run(command, check=True, timeout=seconds_left)
            written = args.results / f"gpu_training_{name}.json"
            rows += [{"model": name, **row} for row in json.loads(written.read_text())["rows"]]
            written.unlink()
        except (subprocess.SubprocessError, OSError) as error:
            rows.append({"model": name, "failed": type(error).__name__})
        write_results(args.results, "gpu_training", rows)


PARTS = {
    "correctness": correctness, "single": single, "batches": batches, "texts": texts, "serving": serving,
    "training": training,
}  # fmt: skip


# Command line and table


def figures(part: str, rows: list[dict], judged: bool) -> list[list[str]]:
    """Of one part, a line per figure that has a target, and per failure: where, what, value, target."""
    lines = []

    def add(row: dict, what: str, value: str, verdict: str = "") -> None:
        step = row.get("step")  # of a training step: its time
        words = [part, row.get("model"), row.get("dtype"), isinstance(step, int) and f"exits every {step}"]
        lines.append([" ".join(filter(None, words)), what, value, verdict])

    def judge(row: dict, what: str, value: float, target: float | None, more: str = "", at_least=False) -> None:
        met = target is not None and (value >= target if at_least else value <= target)
        verdict = f"{'>=' if at_least else '<='} {target:.2f} {'met' if met else 'missed'}" if target else ""
        add(row, what, f"{value:.3f}{more}", verdict if judged else "")

    for row in rows:
        for problem in row.keys() & {"failed", "skipped"}:
            add(row, problem, row[problem])
        if row.get("ok") is False:
            add(row, f"{row['what']}, {row['criterion']}, {row.get('runner', '')}", json.dumps(row), "WRONG")
        if "runner / eager" in row:
            small = row["model"] in ("vit-small", "minilm")
            targets = BATCH_TARGETS.get(row["batch_size"]) if "batch_size" in row else SINGLE_TARGETS
            if row["step"] == 1:  # the targets are for exits after every second or third layer
                targets = None
            eager, small_graph, base_graph = targets or (None, None, None)
            place = f"batch {row['batch_size']}" if "batch_size" in row else f"exit after {row['layer']}"
            for other, limit in (("eager", eager), ("graph", small_graph if small else base_graph)):
                also = {name: row.get(f"{name} / {other}") for name in ("each exit", "one graph", "dynamic", "ideal")}
                more = ", ".join(f"{name} {value:.2f}" for name, value in also.items() if value is not None)
                judge(row, f"{place}, runner / stock {other}", row[f"runner / {other}"], limit, f" ({more})")
        if row.get("conditional nodes", "right") != "right":
            add(row, "conditional nodes", row["conditional nodes"])
        if "projection, product / convolution" in row:
            what = "projection, product / convolution"
            judge(row, f"batch {row['batch_size']}, {what}", row[what], None)
        if "graphs / eager pass" in row:
            judge(row, "memory, graphs / eager pass", row["graphs / eager pass"], MEMORY_TARGET)
        if "stock pipeline / exits on" in row:
            also = {name: row.get(f"stock pipeline / {name}") for name in ("exits off", "in flight")}
            more = f" ({', '.join(f'{name} {value:.2f}' for name, value in also.items() if value is not None)})"
            what = f"batch {row['batch_size']}, stock pipeline / exits on"
            judge(row, what, row["stock pipeline / exits on"], TEXTS_TARGET, more, at_least=True)
        if "stock / captured" in row:
            what = f"{row['waiting']} waiting, stock / captured programs"
            judge(row, what, row["stock / captured"], None, f" (eager {row['stock / eager']:.2f})")
        if (scheme := str(row.get("scheme")).removesuffix(", graphs").split(", heads")[0]) in STEP_TARGETS:
            other, limit, _ = STEP_TARGETS[scheme]
            judge(row, f"{row['scheme']} / {other}", row[f"time / {other}"], limit)
    if checks := [row["ok"] for row in rows if "ok" in row]:
        add({}, "checks", f"{sum(checks)} of {len(checks)} right")
    return lines


def table(folder: Path, parts: list[str], judged: bool) -> list[list[str]]:
    """The figures of all parts; small shapes and other machines are not judged."""
    lines = []
    for part in parts:
        file = folder / f"gpu_{part}.json"
        rows = json.loads(file.read_text())["rows"] if file.exists() else [{"failed": "wrote nothing"}]
        lines += figures(part, rows, judged)
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="default: 8 32 128 512; without a GPU 1 8")
    parser.add_argument(
        "--dtype", choices=TOLERANCES, help="of what is timed; default: bfloat16; without a GPU float32"
    )
    parser.add_argument("--rounds", type=int, help="of interleaved repeats; default: 20; without a GPU 3")
    parser.add_argument("--small", action="store_true", help="small shapes; always without a GPU")
    parser.add_argument("--no_cuda_graphs", action="store_true", help="run the programs eagerly")
    parser.add_argument("--compile", action="store_true", help="also time the first model under torch.compile (slow)")
    parser.add_argument("--limit", type=float, help=f"seconds of each part; default: {LIMITS}; small shapes: 4 times")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # the one that this process is for
    add_results_argument(parser)
    args = parser.parse_args()
    if args.part:  # no word of the command as it is written down
        place = sys.argv.index("--part")
        del sys.argv[place : place + 2]
    gpu = torch.cuda.is_available()
    args.device = "cuda" if gpu else "cpu"
    args.small |= not gpu
    args.only = args.only or [name for name in PARTS if name != "training" or not args.small]
    args.cuda_graphs = gpu and not args.no_cuda_graphs
    args.static = args.cuda_graphs or not gpu  # without a GPU the programs run eagerly
    args.batch_sizes = args.batch_sizes or ([8, 32, 128, 512] if gpu else [1, 8])
    args.dtype = args.dtype or ("bfloat16" if gpu else "float32")
    args.rounds = args.rounds or (20 if gpu else 3)
    args.check_dtypes = list(TOLERANCES) if gpu else ["float32", "bfloat16"]
    args.check_sizes = (33, 1, 6) if gpu else (9, 1, 4)
    args.length = 16 if args.small else 128
    args.texts, args.text_batch_sizes = (64, [8]) if args.small else (1400, [32, 128])
    return args


def limit_of(args, name: str) -> float:
    return args.limit or LIMITS[name] * (4 if args.small else 1)


def run(args, name: str) -> None:
    """One part, in this process."""
    args.limit = limit_of(args, name)
    part = Part(name, args)
    PARTS[name](args, part)
    if any("failed" in row or row.get("ok") is False for row in part.rows):
        sys.exit(1)


def main() -> None:
    args = parse()
    if args.part:
        return run(args, args.part)
    failed = []
    for name in args.only:
        words, start = [*sys.argv[1:], "--part", name], time.perf_counter()
        try:
            # Beyond its own limit a part may finish what it has begun.
            code = subprocess.run([sys.executable, __file__, *words], timeout=1.3 * limit_of(args, name)).returncode
        except subprocess.TimeoutExpired:
            code = "stopped"
        print(f"{name}: {time.perf_counter() - start:.0f} s, exit status {code}", flush=True)
        failed += [name] if code else []
    lines = table(args.results, args.only, judged=not args.small)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
