"""The encoded rows of a run, for training, evaluation and calibration."""

import logging
import os
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

from ..data.streaming import EndlessStream
from ..data.task import ROW_ID, DataError, Modality, TaskData
from ..models import ExitConfigurationError
from .arguments import RunArguments
from .model import LoadedModel


logger = logging.getLogger(__name__)


@dataclass
class RunRows:
    """The rows for training, evaluation and calibration.

    Args:
        data: the splits before tokenization or image processing.
        splits: the encoded splits; `train` without the calibration rows.
        calibration: encoded rows that are used only for calibration; `None`: half of the evaluation split is used.
    """

    data: TaskData
    splits: dict[str, Any]
    calibration: Any | None

    @property
    def counted(self) -> Any:
        """The rows whose mean length (or size) is used for relative costs."""
        return self.calibration or self.splits["validation"]


def load_data(modality: Modality, args: RunArguments, like: TaskData | None) -> TaskData:
    """Load the splits that the flags request.

    Args:
        modality: texts or images.
        args: flags of the run.
        like: the labels of the checkpoint, which the data must fit (`labels_of_checkpoint`).

    Returns:
        the splits, their labels and columns.
    """
    training = args.training
    wanted = {
        "train": training.do_train or args.calibration.calibration_samples,
        "validation": training.do_eval or training.eval_strategy != "no",
        "test": training.do_predict,
    }
    needed = [split for split in wanted if wanted[split]]
    hub = {"cache_dir": args.model.cache_dir, "token": args.model.token}
    return modality.load_data(args.data, splits_needed=needed, seed=training.seed, like=like, **hub)


def encode_rows(modality: Modality, args: RunArguments, data: TaskData, loaded: LoadedModel) -> RunRows:
    """Encode the rows for the model, and separate the calibration rows.

    Args:
        modality: texts or images.
        args: flags of the run.
        data: the splits.
        loaded: the model and its processor.

    Returns:
        the encoded rows.

    Raises:
        ExitConfigurationError: too many `--calibration_samples`, or a `--calibration_file` that cannot be read.
    """
    splits = modality.encode_data(data, loaded.processor, args.data, loaded.model.config)
    path, count = args.calibration.calibration_file, args.calibration.calibration_samples
    if path is not None:
        return RunRows(data, splits, _rows_of_file(path, modality, args, data, loaded))
    if count is None:
        return RunRows(data, splits, None)
    train = splits["train"]
    if count >= len(train):
        raise ExitConfigurationError(
            f"--calibration_samples {count} leaves no training row: the training split has {len(train)}."
        )
    order = np.random.default_rng(args.training.seed).permutation(len(train))
    kept = splits | {"train": train.select(np.sort(order[count:]))}
    return RunRows(data, kept, train.select(order[:count]))


def training_rows(modality: Modality, args: RunArguments, rows: RunRows, loaded: LoadedModel) -> Any | None:
    """The rows for the trainer, augmented, or as an endless stream; `None` without training."""
    if not args.training.do_train:
        return None
    made_of = loaded.processor, args.data, loaded.model.config, args.training.seed
    augmented = modality.augment(rows.splits["train"], *made_of)
    return EndlessStream(augmented) if args.data.streaming else augmented


def _rows_of_file(path: str, modality: Modality, args: RunArguments, data: TaskData, loaded: LoadedModel) -> Any:
    """Encoded rows of a file (text) or a folder (images); labels are optional."""
    if not os.path.exists(path):
        raise ExitConfigurationError(f"--calibration_file {path} does not exist.")
    names = {field.name for field in fields(args.data)}
    other = "dataset_name dataset_config_name partition_dir partition_id train_val_split max_predict_samples".split()
    other += [f"{split}_{args.data.path_kind}" for split in ("train", "validation", "test")]
    flag = f"test_{args.data.path_kind}"
    # The columns and the kind of labels are those of the run.
    same = {"problem_type": data.problem_type} if getattr(args.data, "task_name", None) is None else {}
    try:
        data_args = replace(args.data, **(dict.fromkeys(names.intersection(other)) | same | {flag: path}))
        if "text_column_names" in names:
            data_args.text_column_names = data.input_columns
        found = modality.load_data(data_args, splits_needed=["test"], seed=args.training.seed, like=data)
        unread = [name for name in found.splits["test"].column_names if name not in (*found.input_columns, ROW_ID)]
        if unread and found.label_column not in unread:
            logger.warning("--calibration_file %s: no label is read from the columns %s.", path, ", ".join(unread))
        return modality.encode_data(found, loaded.processor, data_args, loaded.model.config)["test"]
    except DataError as error:
        message = str(error).replace(f"--{flag} ", "--calibration_file ").replace(", split 'test'", "")
        raise DataError(message) from error
