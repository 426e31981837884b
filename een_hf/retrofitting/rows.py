"""Unlabelled rows, of texts or images, as model inputs."""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, PreTrainedConfig

from ..data.decoding import whole_images
from ..data.image_rows import ImageRows
from ..data.label_values import SINGLE_LABEL
from ..data.samples import model_source
from ..data.sources import limit_rows, load_files
from ..data.task import DataError, TaskData
from ..data.text import TEXT, encode_text_data
from ..data.text_arguments import TextDataArguments
from ..data.text_rows import prepare_rows, text_columns
from ..data.transforms import EvaluationTransform
from ..errors import loading
from ..evaluation import cost_inputs, stock_model, text_functions
from ..inference import pad_rows, predict
from ..inference.programs import on_device
from ..models import EarlyExitMixin
from ..training.history import trained_on
from .arguments import RowArguments


class RetrofitRows(ABC):
    """Unlabelled rows as model inputs.

    Attributes:
        encoded: the model inputs of each row, without a batch dimension.
        processor: tokenizer or image processor, which is saved with the model.
        columns: columns of text that are read; none for images.
    """

    encoded: Any
    processor: Any
    columns: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict:
        return self.encoded[index]

    def batch(self, model: EarlyExitMixin, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """The rows with these numbers as one padded batch on the model's device."""
        return to_batch(model, [self[row] for row in indices])

    def by_length(self, indices: range) -> list[int]:
        """The numbers of these rows in an order that needs little padding."""
        return list(indices)

    @abstractmethod
    def fingerprint(self) -> list[bytes]:
        """Bytes that change whenever stored features become invalid."""

    @abstractmethod
    def cost_inputs(self, indices: np.ndarray) -> dict:
        """The arguments of `relative_costs` for the rows with these numbers."""

    @abstractmethod
    def speed_functions(self, model: EarlyExitMixin, indices: np.ndarray, batch_size: int) -> dict[str, Callable]:
        """Functions for `measure_seconds` that classify these rows: the stock model first, and `exits on`."""


class TextRows(RetrofitRows):
    """Texts, or pairs of texts.

    Args:
        args: source, columns and lengths.
        config: of the model.
        dataset: rows with columns of text; by default those of `args.train_file`.
        processor: the tokenizer; by default the model's own.
    """

    def __init__(
        self,
        args: RowArguments,
        config: PreTrainedConfig,
        dataset: datasets.Dataset | None = None,
        processor: Any | None = None,
    ):
        settings = TextDataArguments(
            train_file=args.train_file,
            dataset_name=None if args.train_file else "train_dataset",
            text_column_names=args.text_column_names,
            tokenizer_name=args.tokenizer_name,
            max_seq_length=args.max_seq_length,
            max_train_samples=args.max_train_samples,
        )
        source, found = "train_dataset", dataset
        if dataset is None:
            source, texts = f"{args.file_flag} {args.train_file}", settings.text_column_names or ()
            found = load_files({"train": [args.train_file]}, source, None, text_columns=texts)["train"]
        self.columns = text_columns(settings, None, {"train": found}, "label", source)
        if len(self.columns) > 1 and settings.text_column_names is None:
            raise DataError(
                f"{source} has two columns of text, {' and '.join(self.columns)}, of which one may be labels: name "
                "the column of texts, or both for pairs, by --text_column_names."
            )
        rows = limit_rows(found.select_columns(self.columns), args.max_train_samples)
        rows = prepare_rows(rows, self.columns, source, skip_empty=args.skip_empty)
        self.processor = processor or TEXT.load_processor(model_source(args.model), settings, config)
        data = TaskData({"train": rows}, SINGLE_LABEL, None, self.columns, "", "", None, [])
        self.encoded = encode_text_data(data, self.processor, settings, max_length=config.max_input_length)["train"]
        self.texts = [rows[column] for column in self.columns]
        self.max_length = settings.max_seq_length
        self.lengths = [len(tokens) for tokens in self.encoded["input_ids"]]

    def by_length(self, indices):
        return sorted(indices, key=lambda row: -self.lengths[row])

    def fingerprint(self):
        return [np.asarray(tokens, dtype=np.int32).tobytes() for tokens in self.encoded["input_ids"]]

    def cost_inputs(self, indices):
        return cost_inputs(self.encoded.select(indices))

    def speed_functions(self, model, indices, batch_size):
        texts = [[column[int(row)] for row in indices] for column in self.texts]
        return text_functions(model, self.processor, texts, max_length=self.max_length, batch_size=batch_size)


class UnlabelledImages(RetrofitRows):
    """Images.

    Args:
        args: source.
        config: of the model.
        dataset: rows with one column of images; by default the files below `args.train_dir`.
        processor: the image processor; by default the model's own.
    """

    def __init__(
        self,
        args: RowArguments,
        config: PreTrainedConfig,
        dataset: datasets.Dataset | None = None,
        processor: Any | None = None,
    ):
        source, found = "train_dataset", dataset
        if dataset is None:
            source, found = f"{args.dir_flag} {args.train_dir}", _image_files(args)
        column = next(name for name, feature in found.features.items() if isinstance(feature, datasets.Image))
        rows = limit_rows(found.select_columns([column]), args.max_train_samples)
        rows = rows.cast_column(column, datasets.Image(decode=False))
        self.processor = processor or _load_image_processor(args.model)
        self.images = whole_images(rows, column, args.skip_corrupt, source)
        self.encoded = ImageRows(self.images, column, None, EvaluationTransform(self.processor, config.num_channels))

    def fingerprint(self):
        return [
            self.processor.to_json_string().encode(),
            *map(_image_fingerprint, self.images[self.encoded.image_column]),
        ]

    def cost_inputs(self, indices):
        return cost_inputs([self[int(indices[0])]])

    def speed_functions(self, model, indices, batch_size):
        rows = [self[int(row)] for row in indices]
        stock = stock_model(model)

        @torch.inference_mode()
        def run_stock():
            for start in range(0, len(rows), batch_size):
                stock(**to_batch(model, rows[start : start + batch_size]))

        return {"stock model": run_stock, "exits on": lambda: predict(model, rows, batch_size, progress=False)}


def to_batch(model: EarlyExitMixin, rows: list[dict]) -> dict[str, torch.Tensor]:
    """Rows as one padded batch on the model's device."""
    return on_device(pad_rows(rows, model.config), model.device)


def _image_files(args: RowArguments) -> datasets.Dataset:
    folder, flag = args.train_dir, args.dir_flag
    if not os.path.isdir(folder):
        raise DataError(f"{flag} {folder} is not a folder.")
    known = Image.registered_extensions()
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in known)
    if not paths:
        raise DataError(f"{flag} {folder} holds no image files.")
    rows = {"image": [str(path) for path in paths[: args.max_train_samples]]}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))


def refuse_training_rows(args: RowArguments, history: list[dict | None]) -> None:
    """Refuse rows that certify nothing, because the model was trained on them.

    Args:
        args: which rows.
        history: flags of the runs that trained the model (`history_of`).

    Raises:
        DataError: a run read its training rows from there.
    """
    flag, path = (args.file_flag, args.train_file) if args.train_file else (args.dir_flag, args.train_dir)
    if path is not None and trained_on(path, history):
        raise DataError(
            f"{flag} {path}: MODEL was trained on these rows and is more confident on them than on new rows, so that "
            "they certify nothing: give other rows."
        )


def _load_image_processor(model: str) -> Any:
    with loading(f"The image processor of MODEL {model}"):
        return AutoImageProcessor.from_pretrained(model_source(model), trust_remote_code=False)


def _image_fingerprint(image: dict) -> bytes:
    """The bytes of an undecoded image, or path, size and time of its file."""
    if image["bytes"] is not None:
        return image["bytes"]
    path = Path(image["path"])
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()
