"""Measurements of time on this machine, as medians of interleaved repeats."""

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification, pipeline

from ..inference import ExitRunner, predict
from ..inference.runner import runs_graphs
from ..models.policies import NEVER, ExitPolicy
from .cost import ExitCosts, dummy_inputs


def measure_seconds(
    functions: dict[str, Callable[[], object]], repeats: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """Measure the time of functions, which are called in turn.

    Args:
        functions: functions by name.
        repeats: number of measured calls of each.
        warmup: number of calls before them that are not measured.

    Returns:
        seconds of every measured call, by name.
    """
    seconds = {name: [] for name in functions}
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for repeat in range(-warmup, repeats):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def stock_model(model, num_layers: int | None = None) -> torch.nn.Module:
    """Copy the plain transformers model inside an early-exit model, without exits and with the stock pooling.

    Args:
        model: an early-exit model.
        num_layers: keep only so many layers; `None`: all.

    Returns:
        the stock model in eval mode, on the same device.
    """
    config = model.config
    settings = config.to_dict() if num_layers is None else config.cut_to_layers(config.to_dict(), num_layers)
    settings.pop("model_type")
    settings["architectures"] = config.stock_architecture and [config.stock_architecture]
    stock_config = AutoConfig.for_model(config.stock_model_type, **settings)
    images = model.main_input_name == "pixel_values"
    auto_class = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    stock = auto_class.from_config(stock_config, attn_implementation=config._attn_implementation, dtype=model.dtype)
    names = stock.state_dict().keys()
    stock.load_state_dict({name: value for name, value in model.state_dict().items() if name in names})
    return stock.to(model.device).eval()


def text_functions(
    model, tokenizer, texts: list[list[str]], *, max_length: int, batch_size: int
) -> dict[str, Callable[[], object]]:
    """Three ways to classify texts, including tokenization, for `measure_seconds`.

    They are the stock pipeline with the plain model, and `een_hf.inference.predict` without early exits and with the
    model's policy.

    Args:
        model: an early-exit model with a policy.
        tokenizer: its tokenizer.
        texts: one column, or two for pairs.
        max_length: tokens to which longer texts are truncated, at most what the model takes.
        batch_size: batch size of all three.

    Returns:
        the functions `stock pipeline`, `exits off` and `exits on`.
    """
    max_length = model.config.input_limit(max_length)
    rows = list(texts[0]) if len(texts) == 1 else list(zip(*texts, strict=True))
    tokenize = partial(tokenizer, truncation=True, max_length=max_length)

    def run(config_policy):
        def call():
            policy, model.config.exit_policy = model.config.exit_policy, config_policy
            try:
                return predict(model, rows, batch_size, tokenizer=tokenize, progress=False)
            finally:
                model.config.exit_policy = policy

        return call

    stock = pipeline("text-classification", model=stock_model(model), tokenizer=tokenizer, device=model.device)
    inputs = [dict(zip(("text", "text_pair"), pair, strict=False)) for pair in zip(*texts, strict=True)]
    settings = {"batch_size": batch_size, "truncation": True, "max_length": max_length}
    return {
        "stock pipeline": lambda: stock(inputs, **settings),
        "exits off": run(None),
        "exits on": run(model.config.exit_policy),
    }


def relative_latencies(
    model,
    *,
    batch_size: int = 1,
    criterion: str = "confidence",
    params: dict | None = None,
    sequence_length: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    repeats: int = 9,
    cuda_graphs: bool | None = None,
) -> tuple[ExitCosts, dict]:
    """Measure the time up to and including each exit, as a share of that of the same model without early exits.

    The same quantity as `relative_costs`, in time on the model's device instead of operations. Measured are captured
    programs on CUDA (`ExitRunner`), else the model's dynamic forward. The time of an exit includes its head, its
    decision and the compaction after it. Medians of interleaved passes of one batch.

    Args:
        model: an early-exit model; it is put in eval mode.
        batch_size: examples that run together.
        criterion: the criterion of the decisions.
        params: its parameters.
        sequence_length: as in `relative_costs`.
        image_size: as in `relative_costs`.
        repeats: number of measured passes of each kind.
        cuda_graphs: whether `ExitRunner` is measured; default: on CUDA, unless `model.cuda_graphs` is false.

    Returns:
        the costs, and `{"device": , "batch_size": , "milliseconds": }`, the time of a batch without early exits.
    """
    model.eval()
    size = {"sequence_length": sequence_length, "image_size": image_size}
    batches = {rows: dummy_inputs(model, rows, **size) for rows in {batch_size, max(1, batch_size // 2)}}
    graphs, functions = runs_graphs(model, cuda_graphs), {}
    runner = ExitRunner(model, cuda_graphs=cuda_graphs) if graphs else None

    def answering(policy: ExitPolicy, inputs: dict) -> Callable[[], object]:
        if graphs:
            return partial(runner.under(policy), **inputs)
        return torch.inference_mode()(partial(model, **inputs, early_exit=policy))

    for rows, inputs in batches.items():
        for exit_index in range(model.num_exits):
            thresholds = [NEVER] * model.num_exits
            if exit_index < model.num_exits - 1:
                thresholds[exit_index] = -NEVER
            policy = ExitPolicy(criterion, thresholds, params=params or {})
            functions[rows, exit_index] = answering(policy, inputs)
        functions[rows, "through"] = answering(
            _NobodyExits(criterion, [NEVER] * model.num_exits, params=params or {}), inputs
        )
        functions[rows, "compaction"] = _compacting(model, inputs, graphs)
    medians = {name: float(np.median(values)) for name, values in measure_seconds(functions, repeats, 2).items()}

    def timed(rows: int) -> BatchSeconds:
        alone = [medians[rows, exit_index] for exit_index in range(model.num_exits)]
        return BatchSeconds(rows, alone, medians[rows, "through"], medians[rows, "compaction"])

    whole = timed(batch_size)
    costs = latency_costs(whole, timed(batch_size // 2) if batch_size > 1 else None)
    cuda = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if cuda else platform.processor() or platform.machine()
    return costs, {"device": device, "batch_size": batch_size, "milliseconds": 1000 * whole.alone[-1]}


@dataclass
class BatchSeconds:
    """Measured times of a batch, in seconds.

    Args:
        size: number of examples.
        alone: (num_exits,), times if the whole batch exits at an exit, and no other exit is evaluated.
        through: time if every exit decides, and no example exits before the last.
        compaction: time of one compaction, if `through` does not include it.
    """

    size: int
    alone: Sequence[float]
    through: float
    compaction: float = 0.0

    def parts(self) -> tuple[np.ndarray, float]:
        """Divide the time of the batch into its parts.

        Returns:
            seconds of the layers before each exit, since the exit before, (num_exits,), and seconds of one exit's head
            and decision.
        """
        *early, plain = self.alone
        decision = max(0.0, self.through - plain) / max(1, len(early))
        # Single measurements need not increase from exit to exit.
        reached = np.clip(np.maximum.accumulate([0.0, *(seconds - decision for seconds in early)]), 0, plain)
        return np.diff([*reached, plain]), decision + self.compaction


def latency_costs(batch: BatchSeconds, half: BatchSeconds | None = None) -> ExitCosts:
    """Compute relative costs per example from the times of a batch.

    If an example exits early and others of its batch continue, it saves the time by which the remaining layers are
    faster with one example less. The time of a part is taken as linear in the number of examples, through its times at
    two batch sizes.

    Args:
        batch: times at the batch size.
        half: times at a smaller batch size; `None` at batch size 1, where an example that exits saves all that
            follows.

    Returns:
        the costs.
    """
    plain = batch.alone[-1]
    (layers, decision), waits, shared = batch.parts(), np.zeros(len(batch.alone)), 0.0
    if half is not None:
        half_layers, half_decision = half.parts()
        ratio = batch.size / (batch.size - half.size)
        # The time of a part for a batch of no examples.
        waits = np.clip(layers - ratio * (layers - half_layers), 0, layers)
        shared = float(np.clip(decision - ratio * (decision - half_decision), 0, decision))
    decisions = np.full(len(layers), decision)
    decisions[-1] = 0
    # The layers up to an exit, its decision, and the constant time of the layers after it.
    alone = layers.cumsum() + decisions + waits.sum() - waits.cumsum()
    alone[-1] = plain  # without rounding errors
    others = np.full(len(layers), shared)
    others[-1] = 0
    return ExitCosts(alone.tolist(), decisions.tolist(), others.tolist()).over(plain)


class _NobodyExits(ExitPolicy):
    """Every exit decides, and no example exits."""

    def lets_exit(self, exit_index: int) -> bool:
        return True


def _compacting(model, inputs: dict, graphs: bool) -> Callable[[], object]:
    """The compaction of the dynamic forward if half of a batch exits; programs always include it."""
    with torch.inference_mode():
        examples = model.embed(**inputs)
    exits = torch.arange(len(examples), device=model.device) % 2 == 0

    @torch.inference_mode()
    def compact() -> None:
        if len(examples) > 1 and not graphs:
            model.make_context(examples.continuing(exits))

    return compact
