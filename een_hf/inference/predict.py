"""`predict`: answers whole data sets and streams by the model's policy."""

import copy
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import chain

import torch
from tqdm.auto import tqdm

from .._deprecated import renamed_argument
from ..models import EarlyExitMixin, ExitConfigurationError
from ..models.criteria import answer_confidence
from .engine import ExitEngine
from .rows import batches_of, model_inputs, num_characters, pad_rows, rows_of, tokenized_rows
from .runner import MAX_ROWS, ExitRunner, runner_of, runs_graphs


@dataclass
class ExitPredictions:
    """Answers in input order.

    Args:
        logits: (num_rows, num_labels), float32, each row's at its own exit, not divided by temperatures.
        exit_index: (num_rows,), int64, the 0-based exit of each row; without a policy the last exit.
        confidence: (num_rows,), float32: the estimated probability that the answer is right, from the logits divided
            by the temperature of their exit, if the policy has temperatures. It is the probability of the predicted
            class; multi-label: of the least confident label. `None` in regression.
    """

    logits: torch.Tensor
    exit_index: torch.Tensor
    confidence: torch.Tensor | None = None


@renamed_argument("collator", "data_collator")
@torch.no_grad()  # not inference_mode: the tensors of answers and rows may be used in training later
def predict(
    model: EarlyExitMixin,
    dataset: Iterable[dict | str | tuple[str, str]],
    batch_size: int = 32,
    *,
    tokenizer: Callable[..., Mapping] | None = None,
    data_collator: Callable[[list[dict]], dict] | None = None,
    window: int | None = None,
    progress: bool | None = None,
    total: int | None = None,
    cuda_graphs: bool | None = None,
) -> ExitPredictions:
    """Predict a data set or stream with early exits, in input order.

    The model predicts as in eval mode. Its own mode is not changed, so that another thread may train it meanwhile.

    Args:
        model: an early-exit model.
        dataset: rows of model inputs, each a dict without a batch dimension, with or without labels; or, with a
            `tokenizer`, texts or pairs of texts. Any iterable, such as a `datasets.Dataset` or a generator, or a
            map-style data set of known length.
        batch_size: rows per step; with CUDA graphs the smallest number, which is raised if the device then needs less
            time per row.
        tokenizer: called with a list of texts, or with two lists if the rows are pairs, returns model inputs; for
            example `partial(tokenizer, truncation=True)`. With CUDA graphs it runs while the device works on earlier
            texts.
        data_collator: called with a list of rows, returns model inputs. Default: texts are padded on the right, images
            are stacked, and columns that the model does not take are ignored.
        window: number of texts that are read and sorted by length at a time. Default: the whole data set; 64 batches
            of a stream; 512 with a tokenizer. Images are read by batches.
        progress: whether to show a progress bar. Default: from 1,000 rows on, or for a stream.
        total: number of rows, for the progress bar, if `dataset` has no length.
        cuda_graphs: `True`: run by `ExitRunner`, whose programs run eagerly if there is no CUDA; `False`: by
            `ExitEngine`. Default: `ExitRunner` on CUDA, unless `model.cuda_graphs` is false.

    Returns:
        logits, exit and confidence of each row, in input order.

    Raises:
        ExitConfigurationError: `dataset` has other rows, or a text is longer than the model takes, or is padded on the
            left although the model's answers depend on that (DeBERTa).

    Example:
        >>> found = een_hf.predict(model, ["A fine film.", "A dull one."], tokenizer=tokenizer)
        >>> found.logits.shape, found.exit_index
        (torch.Size([2, 2]), tensor([...]))
    """
    rows, order = rows_of(dataset), None
    total = len(dataset) if hasattr(dataset, "__len__") else total
    if tokenizer is not None:
        window = window or max(batch_size, MAX_ROWS)
        if hasattr(dataset, "__len__"):
            rows = list(rows)
            order = sorted(range(len(rows)), key=lambda index: num_characters(rows[index]), reverse=True)
        rows = tokenized_rows(rows, order, tokenizer, window)
    if data_collator is None:
        rows, data_collator = model_inputs(rows, model), lambda rows: pad_rows(rows, model.config)
    text = model.main_input_name == "input_ids"
    window = (window or (64 * batch_size if total is None else max(total, 1))) if text else batch_size
    progress = (total is None or total >= 1000) if progress is None else progress
    graphs, given, model = runs_graphs(model, cuda_graphs), model, in_eval_mode(model)
    policy, none = model.get_exit_policy(), torch.empty(0, dtype=torch.int64)
    answers = [(none, torch.empty(0, model.config.num_labels), none)]
    if graphs:
        runner = runner_of(model) if model is given else ExitRunner(model)
        found = _run_by_graphs(runner, rows, batch_size, window if text else None, data_collator, order)
    else:
        found = ExitEngine(model, batch_size).run(batches_of(rows, batch_size, window, data_collator, model, order))
    with tqdm(total=total, unit="row", disable=not progress) as bar:
        for ids, logits, exit_index in found:
            if not graphs:
                exit_index = torch.full_like(ids, exit_index)
            answers.append((ids, logits, exit_index))
            bar.update(len(ids))
    # Answers stay on the device until here, where they are copied together.
    ids, logits, exit_index = (torch.cat(parts).cpu() for parts in zip(*answers[1:] or answers, strict=True))
    logits = logits.float()
    order = ids.argsort()
    logits, exit_index = logits[order], exit_index[order]
    tempered = logits if policy is None else policy.temper(logits, exit_index)
    return ExitPredictions(logits, exit_index, answer_confidence(tempered, model.config.problem_type))


def _run_by_graphs(runner, *settings) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield (ids, logits, exit index) in the batches of `fastest_batches`."""
    for ids, inputs in fastest_batches(runner, *settings)[1]:
        outputs = runner(**inputs)
        yield ids, outputs.logits, outputs.exit_index


def fastest_batches(runner, rows, batch_size, window, data_collator, order=None) -> tuple[int, Iterator[tuple]]:
    """The device's fastest size, at least `batch_size`, and batches of it, collated and sent while it computes."""
    model, rows = runner.model, iter(rows)
    if (first := next(rows, None)) is None:
        return batch_size, iter(())
    _, example = next(batches_of([first], 1, 1, data_collator, model, order))
    limit = MAX_ROWS if window is None else max(window, batch_size)
    size = min(limit, max(batch_size, runner.fastest_batch_size(example)))
    batches = batches_of(chain([first], rows), size, window or size, data_collator, model, order, send=False)
    return size, _ahead(batches, model.device)


def _ahead(batches: Iterator[tuple], device: torch.device) -> Iterator[tuple]:
    """The same batches on the device, created and sent by another thread, up to two of them ahead.

    Masks stay in the memory of the host, where the runner can check without waiting whether they contain a zero.
    """
    ready, stop, cuda = queue.Queue(2), threading.Event(), device.type == "cuda"
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
    """The model if it is in eval mode; else copies of its modules in eval mode, on the same tensors.

    If the mode of the model itself were changed, another thread that trains it would lose its dropout, and changing it
    back would turn dropout on for other threads that predict.
    """
    present = [model]
    for module in present:  # the list grows; `modules()` also names them, which takes longer
        present.extend(filter(None, module._modules.values()))
    if not any(module.training for module in present):
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
