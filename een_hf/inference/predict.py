"""Prediction of whole data sets and streams, by the model's policy."""

import copy
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import chain, groupby, islice

import numpy as np
import torch
from tqdm.auto import tqdm

from ..models import EarlyExitMixin, ExitConfigurationError
from ..models.criteria import answer_confidence
from .engine import ExitEngine
from .runner import MAX_ROWS, ExitRunner, input_names, runner_of, runs_graphs


@dataclass
class ExitPredictions:
    """Answers in input order.

    Args:
        logits: (num_rows, num_labels), float32, each row's own exit's, raw.
        exit_index: (num_rows,), int64, 0-based exit that each row took; the last exit's without a policy.
        confidence: (num_rows,), float32: how probable it is that the answer is right, from the logits divided by the
            temperature of their exit (of a policy without temperatures: from the logits). The probability of the
            predicted class; multi-label: of the label nearest to its threshold. `None` in regression.
    """

    logits: torch.Tensor
    exit_index: torch.Tensor
    confidence: torch.Tensor | None = None


@torch.no_grad()  # not inference_mode: answers, and what a data set keeps of its rows, may be trained on later
def predict(
    model: EarlyExitMixin,
    dataset: Iterable[dict | str | tuple[str, str]],
    batch_size: int = 32,
    *,
    tokenizer: Callable[..., Mapping] | None = None,
    collator: Callable[[list[dict]], dict] | None = None,
    window: int | None = None,
    progress: bool | None = None,
    total: int | None = None,
    cuda_graphs: bool | None = None,
) -> ExitPredictions:
    """Predict a data set or stream with early exits, in input order.

    The model predicts as in eval mode and stays in the mode that it is in, in this thread and in others.

    Args:
        model: an early-exit model.
        dataset: rows of model inputs, each a dict without a batch dimension, with or without labels; anything
            iterable, a `datasets.Dataset` or a generator, or a map-style data set of known length.
        batch_size: rows per step; by CUDA graphs at least so many, and as many more as a probe of the device shows to
            be worth it.
        tokenizer: makes model inputs out of a list of texts, or of two lists where the rows of `dataset` are pairs:
            `partial(tokenizer, truncation=True)`. By CUDA graphs it works on the next texts while the device is at
            the ones before.
        collator: makes model inputs out of a list of rows. Default: text is padded on the right, images are stacked,
            and columns that the model does not take are left out.
        window: texts that are read and sorted by length at a time. Default: the whole data set, or 64 batches of a
            stream, or, for the tokenizer, 512. Images are read by batches.
        progress: show a progress bar. Default: from 1,000 rows on, or for a stream.
        total: number of rows, where `dataset` does not know it.
        cuda_graphs: run by `ExitRunner` (default: on CUDA where `model.cuda_graphs` is true; elsewhere its programs
            run eagerly), else by `ExitEngine`.

    Raises:
        ExitConfigurationError: something else than rows of model inputs, or than texts where there is a tokenizer, or
            a text longer than the model takes, or padded on the left where its answer depends on that (DeBERTa).
    """
    rows, order = _rows_of(dataset), None
    total = len(dataset) if hasattr(dataset, "__len__") else total
    if tokenizer is not None:
        window = window or max(batch_size, MAX_ROWS)
        if hasattr(dataset, "__len__"):
            rows = list(rows)
            order = sorted(range(len(rows)), key=lambda index: _characters(rows[index]), reverse=True)
        rows = _tokenized(rows, order, tokenizer, window)
    if collator is None:
        rows, collator = _inputs_of(rows, model), lambda rows: pad_rows(rows, model.config)
    text = model.main_input_name == "input_ids"
    window = (window or (64 * batch_size if total is None else max(total, 1))) if text else batch_size
    progress = (total is None or total >= 1000) if progress is None else progress
    graphs, given, model = runs_graphs(model, cuda_graphs), model, in_eval_mode(model)
    policy, none = model.get_exit_policy(), torch.empty(0, dtype=torch.int64)
    answers = [(none, torch.empty(0, model.config.num_labels), none)]
    if graphs:
        runner = runner_of(model) if model is given else ExitRunner(model)
        found = _run_by_graphs(runner, rows, batch_size, window if text else None, collator, order)
    else:
        found = ExitEngine(model, batch_size).run(_batches(rows, batch_size, window, collator, model, order))
    with tqdm(total=total, unit="row", disable=not progress) as bar:
        for ids, logits, exit_index in found:
            if not graphs:
                exit_index = torch.full_like(ids, exit_index)
            answers.append((ids, logits, exit_index))
            bar.update(len(ids))
    # Answers stay on the device until they are fetched here, all at once.
    ids, logits, exit_index = (torch.cat(parts).cpu() for parts in zip(*answers[1:] or answers, strict=True))
    logits = logits.float()
    order = ids.argsort()
    logits, exit_index = logits[order], exit_index[order]
    tempered = logits if policy is None else policy.temper(logits, exit_index)
    return ExitPredictions(logits, exit_index, answer_confidence(tempered, model.config.problem_type))


def _run_by_graphs(runner, rows, batch_size, window, collator, order=None) -> Iterator[tuple[torch.Tensor, ...]]:
    """(ids, logits, exit index) by batches of a size that the device likes, collated and sent while it works."""
    model, rows = runner.model, iter(rows)
    if (first := next(rows, None)) is None:
        return
    _, example = next(_batches([first], 1, 1, collator, model, order))
    limit = MAX_ROWS if window is None else max(window, batch_size)
    size = min(limit, max(batch_size, runner.fastest_batch_size(example)))
    batches = _batches(chain([first], rows), size, window or size, collator, model, order, send=False)
    for ids, inputs in _ahead(batches, model.device):
        outputs = runner(**inputs)
        yield ids, outputs.logits, outputs.exit_index


def _ahead(batches: Iterator[tuple], device: torch.device, depth: int = 2) -> Iterator[tuple]:
    """The same batches on the device, made and sent by another thread, up to `depth` of them ahead.

    Masks stay in the host's memory: the runner looks whether they hold a zero, which there needs no wait.
    """
    ready, stop, cuda = queue.Queue(depth), threading.Event(), device.type == "cuda"
    stream = torch.cuda.Stream(device) if cuda else None
    if cuda:
        stream.wait_stream(torch.cuda.current_stream(device))  # rows may come from there

    def put(item) -> bool:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def send(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        if cuda and value.device.type == "cpu":
            value = value.pin_memory()
        return value if name == "attention_mask" else value.to(device, non_blocking=True)

    def work() -> None:
        try:
            with torch.no_grad(), torch.cuda.stream(stream) if cuda else nullcontext():
                for ids, inputs in batches:
                    sent = {name: send(name, value) for name, value in inputs.items()}
                    if not put((ids, sent, stream.record_event() if cuda else None)):
                        return
            put(None)
        except BaseException as error:  # raised again where the batches are used
            put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            ids, inputs, sent = item
            if cuda:
                here = torch.cuda.current_stream(device)
                here.wait_event(sent)
                for value in inputs.values():
                    if isinstance(value, torch.Tensor) and value.is_cuda:
                        value.record_stream(here)
            yield ids, inputs
    finally:
        stop.set()
        thread.join()


def in_eval_mode(model: EarlyExitMixin) -> EarlyExitMixin:
    """The model, or, of one in training mode, other modules in eval mode on the same tensors.

    Switching the model's own modules would switch off the dropout of whoever trains it meanwhile, and switching them
    back would switch it on for whoever else predicts.
    """
    if not any(module.training for module in model.modules()):
        return model
    copies = {id(module): copy.copy(module) for module in model.modules()}
    for module in copies.values():
        module.training = False
        module._modules = {name: copies.get(id(child)) for name, child in module._modules.items()}
        if "forward" in vars(module) and module is not copies[id(model)]:
            raise ExitConfigurationError(
                f"{type(module).__name__} has a wrapped forward, which runs in the mode of the model, training: call "
                "model.eval() before predict."
            )
    return copies[id(model)]


def _rows_of(dataset) -> Iterable:
    """The rows of a data set or stream, one after the other.

    Raises:
        ExitConfigurationError: no rows, but text, columns or splits.
    """
    kind = type(dataset).__name__
    if isinstance(dataset, str | bytes):
        raise ExitConfigurationError(f"predict takes rows of model inputs, not {kind}: {_HOW_TO_TOKENIZE}")
    if isinstance(dataset, Mapping):
        hint = "datasets.Dataset.from_dict(dict(encoded)), made from the columns as lists"
        if dataset and all(hasattr(value, "column_names") for value in dataset.values()):
            hint = f"one of its splits ({', '.join(map(str, dataset))})"
        raise ExitConfigurationError(
            "predict takes rows, one dict of model inputs for each example, not a "
            f"{kind} of {', '.join(map(str, dataset))}: give {hint}."
        )
    if hasattr(dataset, "__iter__"):
        return dataset
    if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__"):
        # Not by `iter`: that goes on until an IndexError, which a data set need not raise.
        return (dataset[index] for index in range(len(dataset)))
    raise ExitConfigurationError(f"predict takes an iterable of rows or a map-style data set, not {kind}.")


_HOW_TO_TOKENIZE = "give tokenizer=partial(tokenizer, truncation=True), or rows that are tokenized."


def _texts_of(row) -> tuple[str, ...]:
    """A text, or a pair of them.

    Raises:
        ExitConfigurationError: something else.
    """
    texts = (row,) if isinstance(row, str) else row
    if not isinstance(texts, tuple | list) or not all(isinstance(text, str) for text in texts):
        raise ExitConfigurationError(
            f"With a tokenizer, predict takes texts or pairs of texts, not {type(row).__name__}."
        )
    return tuple(texts)


def _characters(row) -> int:
    return sum(map(len, _texts_of(row)))


def _tokenized(rows: Iterable, order: list[int] | None, tokenizer, size: int) -> Iterator[dict]:
    """The model inputs of texts, in `order` where given, which are tokenized so many at a time."""
    rows = iter(rows if order is None else map(rows.__getitem__, order))
    while piece := [_texts_of(row) for row in islice(rows, size)]:
        if len(set(map(len, piece))) > 1:
            raise ExitConfigurationError("With a tokenizer, predict takes texts or pairs of texts, not some of each.")
        encoded = tokenizer(*map(list, zip(*piece, strict=True)))
        for values in zip(*encoded.values(), strict=True):
            yield dict(zip(encoded, values, strict=True))


def _as_array(value) -> np.ndarray | torch.Tensor:
    """A list of integers as an array, which takes a third of the time of a tensor; all else as a tensor."""
    if isinstance(value, list):
        array = np.asarray(value)
        if array.dtype == np.int64:
            return array
    return value if isinstance(value, np.ndarray) and value.dtype == np.int64 else torch.as_tensor(value)


def _inputs_of(rows: Iterable, model: EarlyExitMixin) -> Iterator[dict[str, np.ndarray | torch.Tensor]]:
    """Each row's model inputs; other columns are left out.

    Raises:
        ExitConfigurationError: a row without the model's input or without tokens, or with a batch dimension.
    """
    names, main = input_names(model), model.main_input_name
    dimensions = 3 if main == "pixel_values" else 1
    for number, row in enumerate(rows):
        where = f"Row {number} (counted from 0)"
        if not isinstance(row, Mapping):
            how = f": {_HOW_TO_TOKENIZE}" if isinstance(row, str) and main == "input_ids" else "."
            raise ExitConfigurationError(f"{where} is no dict of model inputs but {type(row).__name__}{how}")
        inputs = {name: _as_array(row[name]) for name in names if row.get(name) is not None}
        if main not in inputs and "inputs_embeds" not in inputs:
            raise ExitConfigurationError(
                f"{where} has no {main}; its columns are: {', '.join(row)}. The model takes: {', '.join(names)}."
            )
        if main in inputs and inputs[main].ndim != dimensions:
            raise ExitConfigurationError(
                f"{where} has {main} of shape {tuple(inputs[main].shape)}: a row is one example, with "
                f"{dimensions} dimension{'s' * (dimensions > 1)}."
            )
        if main == "input_ids" and main in inputs:
            if not len(inputs[main]):
                raise ExitConfigurationError(f"{where} has no tokens: its {main} are empty.")
            if torch.as_tensor(inputs[main][:1]).is_floating_point():
                raise ExitConfigurationError(f"{where} has {main} of {inputs[main].dtype}: tokens are whole numbers.")
        yield inputs


def _batches(rows, batch_size, window, collator, model, order=None, send=True) -> Iterator[tuple[torch.Tensor, dict]]:
    """(ids, inputs) by batches, each window of texts from long to short; sent to the model's device, or not yet.

    `order` says, where given, which row of the data set each is.
    """
    names, start, rows = input_names(model), 0, iter(rows)
    while chunk := list(islice(rows, window)):
        for chosen in _cut(chunk, batch_size):
            inputs = {name: value for name, value in collator([chunk[i] for i in chosen]).items() if name in names}
            ids = [start + i if order is None else order[start + i] for i in chosen]
            if "input_ids" in inputs:
                where = f"The batch of row {ids[0]} (counted from 0)"
                model.config.check_input_length(inputs["input_ids"].shape[1], where)
            if send:
                inputs = {
                    n: value.to(model.device) if torch.is_tensor(value) else value for n, value in inputs.items()
                }
            yield torch.tensor(ids), inputs
        start += len(chunk)


def _cut(rows: list, batch_size: int) -> Iterator[list[int]]:
    """The places of rows by batches: texts from long to short, images of one size."""
    columns = [row if isinstance(row, Mapping) else {} for row in rows]
    lengths = [len(row["input_ids"]) if "input_ids" in row else 0 for row in columns]
    sizes = [tuple(getattr(row.get("pixel_values"), "shape", ())) for row in columns]
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], sizes[i]), reverse=True)
    for _, group in groupby(order, key=sizes.__getitem__):
        while chosen := list(islice(group, batch_size)):
            yield chosen


# What stands for a column that a row lacks, in each of its tokens.
_WHERE_MISSING = {"attention_mask": 1, "token_type_ids": 0}


def pad_rows(rows: list[dict], config) -> dict[str, torch.Tensor]:
    """Stack rows, their labels left out; texts of different length are padded on the right and masked.

    A row without a mask is unmasked, one without token types has type 0.

    Raises:
        ExitConfigurationError: a column that only some rows have, and that nothing can stand for.
    """
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if not name.startswith("label")]
    text = "input_ids" in names
    if text and "attention_mask" not in names:
        names.append("attention_mask")

    def value_of(row: dict, name: str) -> np.ndarray | torch.Tensor:
        if name in row:
            return _as_array(row[name]) if text else torch.as_tensor(row[name])
        if not (text and name in _WHERE_MISSING):
            raise ExitConfigurationError(f"Some rows have {name} and others have not; one has: {', '.join(row)}.")
        ids, value = row["input_ids"], _WHERE_MISSING[name]
        return torch.full_like(ids, value) if isinstance(ids, torch.Tensor) else np.full(len(ids), value)

    columns = {name: [value_of(row, name) for row in rows] for name in names}
    padding = {"input_ids": getattr(config, "pad_token_id", 0) or 0}
    return {
        name: _pad(values, padding.get(name, 0)) if text else torch.stack(values) for name, values in columns.items()
    }


def _pad(values: list[np.ndarray | torch.Tensor], padding: int) -> torch.Tensor:
    if not all(isinstance(value, np.ndarray) and value.ndim == 1 for value in values):
        return torch.nn.utils.rnn.pad_sequence(list(map(torch.as_tensor, values)), True, padding)
    padded = np.full((len(values), max(map(len, values))), padding)
    for row, value in zip(padded, values, strict=True):
        row[: len(value)] = value
    return torch.from_numpy(padded)
