"""Seconds on the machine at hand, as medians of interleaved repeats."""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification, pipeline

from ..inference import predict


def measure_seconds(
    functions: dict[str, Callable[[], object]], repeats: int = 5, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call, `repeats` for each function, after `warmup` calls; the functions take turns."""
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
    """The plain transformers model inside an early-exit model, weights copied: no exits, first-token pooling.

    Args:
        model: an early-exit model.
        num_layers: cut to this many layers.
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
    """Three ways to classify texts, tokenizing included, for `measure_seconds`.

    The stock pipeline runs the plain model inside; the other two are `een_hf.inference.predict` with exits off and
    with the model's policy.

    Args:
        model: an early-exit model with a policy.
        tokenizer: its tokenizer.
        texts: one column, or two for pairs.
        max_length: longer texts are cut, to no more than the model takes.
        batch_size: of all three.
    """

    max_length = min(max_length, model.config.max_input_length or max_length)

    def run(config_policy):
        def call():
            encoded = tokenizer(*map(list, texts), truncation=True, max_length=max_length)
            rows = [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]
            policy, model.config.exit_policy = model.config.exit_policy, config_policy
            try:
                return predict(model, rows, batch_size, progress=False)
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


@torch.inference_mode()
def relative_latencies(model, inputs: dict[str, torch.Tensor], repeats: int = 15) -> list[float]:
    """Time up to and with each exit over that of the plain model, measured on `inputs` (usually batch 1).

    The same quantity as `relative_costs`, in seconds instead of operations: medians of interleaved repeats of every
    stage and every head.
    """
    model.eval()
    examples = model.embed(**inputs)
    functions = {"embed": lambda: model.embed(**inputs)}
    context, previous = model.make_context(examples), None
    for index in range(model.num_exits):
        stage = (index, examples, context, previous)
        functions[f"stage{index}"] = lambda stage=stage: model.run_stage(*stage)
        hidden, previous = model.run_stage(*stage)
        examples = replace(examples, hidden=hidden)
        exit_inputs = (index, hidden, examples.attention_mask)
        functions[f"head{index}"] = lambda exit_inputs=exit_inputs: model.compute_exit(*exit_inputs)
    medians = {name: float(np.median(values)) for name, values in measure_seconds(functions, repeats).items()}
    stages = np.array([medians[f"stage{index}"] for index in range(model.num_exits)])
    earlier_heads = sum(medians[f"head{index}"] for index in range(model.num_exits - 1))
    up_to = medians["embed"] + np.cumsum(stages)
    return (up_to / (up_to[-1] - earlier_heads)).tolist()
