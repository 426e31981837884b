"""`TaskData` and `Modality`: the data of a run, of texts or of images, as the rest of the package uses them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from .._deprecated import moved_names
from ..models import MODEL_CLASSES, ExitConfigurationError


ROW_ID = "idx"


class DataError(ExitConfigurationError):
    """Data that are missing or do not fit the settings."""


def is_text_column(feature: Any) -> bool:
    """Whether a column, by its feature, holds strings."""
    return getattr(feature, "dtype", None) in ("string", "large_string")


@dataclass
class TaskData:
    """A labelled data set before tokenization or image processing.

    Args:
        splits: `train`, `validation`, `test`, for MNLI also `validation_mismatched` and `test_mismatched`.
        problem_type: as in transformers.
        label_names: one per class, or `None` for regression.
        input_columns: the columns that the model reads: one or two text columns, or one image column.
        label_column: the column of the labels.
        dataset: name for files and tables.
        task_name: GLUE task, or `None`.
        metrics: names of `een_hf.evaluation.METRICS`, the main one first.
    """

    splits: dict[str, datasets.Dataset]
    problem_type: str
    label_names: list[str] | None
    input_columns: list[str]
    label_column: str
    dataset: str
    task_name: str | None
    metrics: list[str]

    @property
    def num_labels(self) -> int:
        """The number of labels; 1 for regression."""
        return len(self.label_names) if self.label_names else 1

    def row_ids(self, split: str) -> np.ndarray:
        """Identify the rows of a split.

        Args:
            split: its name.

        Returns:
            (num_rows,): the data set's column `idx`; without one, the positions.
        """
        rows = self.splits[split]
        return np.asarray(rows[ROW_ID] if ROW_ID in rows.column_names else range(len(rows)))


@dataclass(frozen=True)
class Modality:
    """The functions that differ between texts and images.

    Args:
        main_input_name: the main input of models of this kind of data, `input_ids` or `pixel_values`.
        data_arguments: dataclass of the script's data flags.
        load_data: `(data_args, *, splits_needed, seed, cache_dir, token, like) -> TaskData`; `like` is the run's data,
            or the labels of its checkpoint.
        load_processor: `(name or path or None, data_args, config, **hub) -> tokenizer or image processor`.
        encode_data: `(data, processor, data_args, config) -> dict of split name to encoded rows`.
        make_collator: `(processor, data_args, config) -> data collator`.
        fit_model: `(model, data_args)`: change a loaded model as the data flags request.
        write_submission: `(folder, data, split, predictions)`: write predictions (label names, or numbers) of a test
            split in the format of its benchmark, if it has one.
        augment: `(rows, processor, data_args, config, seed) -> rows`, for the training split only.
    """

    main_input_name: str
    data_arguments: type
    load_data: Callable[..., TaskData]
    load_processor: Callable[..., Any]
    encode_data: Callable[..., dict]
    make_collator: Callable[..., Any]
    fit_model: Callable[..., None] = lambda *_: None
    augment: Callable[..., Any] = lambda rows, *_: rows
    write_submission: Callable[..., None] = lambda *_: None

    @property
    def model_classes(self) -> dict[str, type]:
        """The early-exit classes of this kind of data, by the type of the stock model."""
        return {name: kind for name, kind in MODEL_CLASSES.items() if kind.main_input_name == self.main_input_name}


__getattr__ = moved_names(__name__)
