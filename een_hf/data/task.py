"""What a data set is to the rest of the package, text or images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from .._moved import moved_names
from ..models import MODEL_CLASSES, ExitConfigurationError


class DataError(ExitConfigurationError):
    """Data that are missing or do not fit what was asked for."""


@dataclass
class TaskData:
    """A labelled data set before tokenizer or image processor.

    Args:
        splits: `train`, `validation`, `test`, for MNLI also `validation_mismatched` and `test_mismatched`.
        problem_type: as in transformers.
        label_names: one per class, or `None` for regression.
        input_columns: what the model reads: one or two text columns, or one image column.
        label_column: where the labels are.
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
        return len(self.label_names) if self.label_names else 1

    def row_ids(self, split: str) -> np.ndarray:
        """The data set's own `idx` of each row where it has one, else the position."""
        rows = self.splits[split]
        return np.asarray(rows["idx"] if "idx" in rows.column_names else range(len(rows)))


@dataclass(frozen=True)
class Modality:
    """What differs between text and images.

    Args:
        main_input_name: what models of this kind of data read, `input_ids` or `pixel_values`.
        data_arguments: dataclass of the script's data flags.
        load_data: `(data_args, *, splits_needed, seed, cache_dir, token, like) -> TaskData`; `like` is the run's data,
            or the labels of its checkpoint.
        load_processor: `(name or path or None, data_args, config, **hub) -> tokenizer or image processor`.
        encode_data: `(data, processor, data_args, config) -> dict of split name to encoded rows`.
        make_collator: `(processor, data_args, config) -> data collator`.
        fit_model: `(model, data_args)`: change a loaded model as the data flags ask.
        write_submission: `(folder, data, split, predictions)`: write predictions (label names, or numbers) of a test
            split in a benchmark's own format, where there is one.
        augment: `(rows, processor, data_args, config, seed) -> rows`, of the training split alone.
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


__getattr__ = moved_names(
    __name__, {"check_splits": "een_hf.data.sources", "cut_validation_split": "een_hf.data.splits"}
)
