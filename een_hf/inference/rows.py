"""From a data set or stream to batches of model inputs: reading, tokenizing, sorting by length and padding of rows."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby, islice

import numpy as np
import torch

from ..models import EarlyExitMixin, ExitConfigurationError
from .programs import main_input, on_device, padding_token
from .runner import input_names


def rows_of(dataset) -> Iterable:
    """Iterate over the rows of a data set or stream.

    Raises:
        ExitConfigurationError: `dataset` is a text, or a dict of columns or splits.
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
        # Not `iter(dataset)`: it stops at an IndexError, which a data set need not raise.
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


def num_characters(row) -> int:
    """The number of characters of a text or of a pair of texts."""
    return sum(map(len, _texts_of(row)))


def tokenized_rows(rows: Iterable, order: list[int] | None, tokenizer, size: int) -> Iterator[dict]:
    """The model inputs of texts, in the given order if there is one; `size` texts are tokenized at a time."""
    rows = iter(rows if order is None else map(rows.__getitem__, order))
    while piece := [_texts_of(row) for row in islice(rows, size)]:
        if len(set(map(len, piece))) > 1:
            raise ExitConfigurationError("With a tokenizer, predict takes texts or pairs of texts, not some of each.")
        encoded = tokenizer(*map(list, zip(*piece, strict=True)))
        for values in zip(*encoded.values(), strict=True):
            yield dict(zip(encoded, values, strict=True))


def _as_array(value) -> np.ndarray | torch.Tensor:
    """A list of integers as an array, which takes a third of the time of a tensor; other values as a tensor."""
    if isinstance(value, list):
        array = np.asarray(value)
        if array.dtype == np.int64:
            return array
    return value if isinstance(value, np.ndarray) and value.dtype == np.int64 else torch.as_tensor(value)


def model_inputs(rows: Iterable, model: EarlyExitMixin) -> Iterator[dict[str, np.ndarray | torch.Tensor]]:
    """The model inputs of each row; other columns are ignored.

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


def batches_of(
    rows, batch_size, window, data_collator, model, order=None, send=True
) -> Iterator[tuple[torch.Tensor, dict]]:
    """Yield batches as (ids, model inputs); texts are sorted by falling length within each window.

    Args:
        rows: rows of model inputs, or whatever `data_collator` takes.
        batch_size: rows per batch.
        window: rows that are read and sorted at a time.
        data_collator: from a list of rows to model inputs.
        model: an early-exit model.
        order: the index in the data set of each row; `None`: rows are in the order of the data set.
        send: whether to copy the inputs to the model's device.
    """
    names, start, rows = input_names(model), 0, iter(rows)
    while chunk := list(islice(rows, window)):
        for chosen in _cut(chunk, batch_size):
            collated = data_collator([chunk[i] for i in chosen])
            inputs = {name: value for name, value in collated.items() if name in names}
            ids = [start + i if order is None else order[start + i] for i in chosen]
            if model.main_input_name == "input_ids":
                where, text = f"The batch of row {ids[0]} (counted from 0)", main_input(inputs, "input_ids")
                model.config.check_input_length(text.shape[1], where)
                if not text.is_cuda:  # to look at it would wait for the device
                    model.config.check_tokens(inputs, where)
            yield torch.tensor(ids), on_device(inputs, model.device) if send else inputs
        start += len(chunk)


def _cut(rows: list, batch_size: int) -> Iterator[list[int]]:
    """Yield the places of the rows of each batch: texts by falling length, images of one size together."""
    columns = [row if isinstance(row, Mapping) else {} for row in rows]
    lengths = [len(row["input_ids"]) if "input_ids" in row else 0 for row in columns]
    sizes = [tuple(getattr(row.get("pixel_values"), "shape", ())) for row in columns]
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], sizes[i]), reverse=True)
    for _, group in groupby(order, key=sizes.__getitem__):
        while chosen := list(islice(group, batch_size)):
            yield chosen


# The value for each token of a row that lacks a column.
WHERE_MISSING = {"attention_mask": 1, "token_type_ids": 0}


def pad_rows(rows: list[dict], config) -> dict[str, torch.Tensor]:
    """Stack rows to a batch, without their labels; texts are padded on the right and masked.

    All tokens of a row without a mask are unmasked; a row without token types has type 0.

    Args:
        rows: rows of model inputs, without a batch dimension.
        config: config of the model, for its `pad_token_id`.

    Returns:
        model inputs (batch, ...).

    Raises:
        ExitConfigurationError: a column that only some rows have, and that has no default, or one that has not one
            value for each token.
    """
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if not name.startswith("label")]
    text = not {"input_ids", "inputs_embeds"}.isdisjoint(names)
    if text and "attention_mask" not in names:
        names.append("attention_mask")

    def value_of(row: dict, name: str) -> np.ndarray | torch.Tensor:
        if name in row:
            return _as_array(row[name]) if text else torch.as_tensor(row[name])
        if not (text and name in WHERE_MISSING):
            raise ExitConfigurationError(f"Some rows have {name}, but one has only: {', '.join(row)}.")
        return np.full(len(main_input(row, "input_ids")), WHERE_MISSING[name])

    columns = {name: [value_of(row, name) for row in rows] for name in names}
    if text:
        lengths = [len(main_input(row, "input_ids")) for row in rows]
        for name, values in columns.items():
            for length, value in zip(lengths, values, strict=True):
                if value.shape[:1] != (length,):
                    raise ExitConfigurationError(
                        f"{name} of shape {tuple(value.shape)} do not fit a text of {length} tokens: give "
                        "one value for each token."
                    )
    padding = {"input_ids": padding_token(config)}
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
