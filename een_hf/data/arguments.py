"""The data flags that texts and images share."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import refuse_nan
from .label_values import PROBLEM_TYPES
from .partition import partition_labels
from .sources import check_paths
from .task import DataError


# The flag that limits the rows of each split.
LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}


@dataclass
class DataArguments:
    """The data flags that texts and images share: sources, and numbers of rows."""

    # The ending of the flags that name the source of a split: `file` or `dir`.
    path_kind = "file"

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of --dataset_name."})
    train_val_split: float | None = field(
        default=None,
        metadata={"help": "Share of the training rows that become the validation split, if there is none."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Take only the first N training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Take only the first N evaluation rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Take only the first N rows to predict."})
    partition_dir: str | None = field(
        default=None,
        metadata={
            "help": "Train on a part of a data set that `een-hf partition` wrote. Evaluation splits are those of "
            "--dataset_name, if given, else the part's own."
        },
    )
    partition_id: str | None = field(default=None, metadata={"help": "Number of the part, or `all` for their union."})
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": f"Kind of problem, if it does not follow from the type of the labels: {', '.join(PROBLEM_TYPES)}. "
            "Default: strings and whole numbers are classes, floating point numbers are regression targets, lists are "
            "several classes."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read training rows when they are needed, for data larger than memory; needs --max_steps."},
    )

    def __post_init__(self):
        refuse_nan(vars(self))
        paths = self.paths()
        if self.dataset_name is not None and paths:
            flag = f"{next(iter(paths))}_{self.path_kind}"
            raise DataError(f"--dataset_name and --{flag} are two sources of data: give one.")
        if (self.partition_dir is None) != (self.partition_id is None):
            raise DataError("--partition_dir and --partition_id (a number, or `all`) belong together.")
        if self.partition_dir is not None and paths:
            raise DataError("--partition_dir and files or folders of rows are two sources of data: give one.")
        if self.partition_dir is not None and self.streaming:
            raise DataError("--streaming cannot read a part of a data set: leave --partition_dir out.")
        check_paths(paths, self.path_kind)
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise DataError(f"--problem_type {self.problem_type!r} is not one of: {', '.join(PROBLEM_TYPES)}.")
        self.check_positive(*LIMITS.values())
        if self.train_val_split is not None and not 0 < self.train_val_split < 1:
            raise DataError(
                f"--train_val_split is a share of the training rows, between 0 and 1, not {self.train_val_split}."
            )

    def check_positive(self, *names: str) -> None:
        """Raise DataError if one of these flags is given and below 1."""
        for name in names:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise DataError(f"--{name} must be at least 1, not {getattr(self, name)}.")

    def limits(self) -> dict[str, int | None]:
        """The largest number of rows of each split; `None`: all."""
        return {split: getattr(self, name) for split, name in LIMITS.items()}

    def paths(self) -> dict[str, str]:
        """The files or folders given for single splits."""
        paths = {split: getattr(self, f"{split}_{self.path_kind}") for split in LIMITS}
        return {split: path for split, path in paths.items() if path is not None}

    def hub_name(self) -> tuple[str | None, str | None]:
        """Name and configuration of the data set on the Hub or in a folder.

        Returns:
            both; `None` if files, folders or a partition are given instead.
        """
        return self.dataset_name, self.dataset_config_name

    def part_labels(self, column: str) -> tuple[str, ...] | None:
        """All label names of the partition, not only of the part; `None` without one, or for another column."""
        return None if self.partition_dir is None else partition_labels(self.partition_dir, column)

    def name_for_tables(self, default: str = "") -> str:
        """The name of the data set in files and tables."""
        path = self.dataset_name or self.partition_dir or next(iter(self.paths().values()), default)
        if os.path.isdir(path):
            return Path(path).resolve().name
        return Path(path).stem if path in self.paths().values() else path
