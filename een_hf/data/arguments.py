"""The data flags that text and images share."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import refuse_nan
from .label_values import PROBLEM_TYPES
from .partition import partition_labels
from .sources import check_paths
from .task import DataError


# The flag that shortens each split.
LIMITS = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}


@dataclass
class DataArguments:
    """Where rows come from and how many of them are taken; a subclass says what becomes of them."""

    # What the flags that name a split's own source end in: `file` or `dir`.
    path_kind = "file"

    dataset_name: str | None = field(default=None, metadata={"help": "Hub name or local folder."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of --dataset_name."})
    train_val_split: float | None = field(
        default=None,
        metadata={"help": "Share of the training rows that become the validation split where there is none."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Take only the first N training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Take only the first N evaluation rows."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Take only the first N rows to predict."})
    partition_dir: str | None = field(
        default=None,
        metadata={
            "help": "Train on a part of a data set that `een-hf partition` cut; with --dataset_name its evaluation "
            "splits are taken, else the part's own."
        },
    )
    partition_id: str | None = field(default=None, metadata={"help": "Number of the part, or `all` for their union."})
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": f"What the labels mean, where their type does not say it: {', '.join(PROBLEM_TYPES)}. Default: "
            "strings and whole numbers are classes, floating point numbers are regression targets, lists are several "
            "classes."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read training rows as they are needed, for data that do not fit; with --max_steps."},
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
            raise DataError("--streaming reads a data set from its start: it has no parts (--partition_dir).")
        check_paths(paths, self.path_kind)
        if self.problem_type not in (None, *PROBLEM_TYPES):
            raise DataError(f"--problem_type {self.problem_type!r} is not one of: {', '.join(PROBLEM_TYPES)}.")
        self.check_positive(*LIMITS.values())
        if self.train_val_split is not None and not 0 < self.train_val_split < 1:
            raise DataError(
                f"--train_val_split is a share of the training rows, between 0 and 1, not {self.train_val_split}."
            )

    def check_positive(self, *names: str) -> None:
        """Raise DataError for a flag that is given and below 1."""
        for name in names:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise DataError(f"--{name} must be at least 1, not {getattr(self, name)}.")

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
        """All label names of the partition whose part is trained on; `None` without one, or for another column."""
        return None if self.partition_dir is None else partition_labels(self.partition_dir, column)

    def name_for_tables(self, default: str = "") -> str:
        """What the data set is called in files and tables."""
        path = self.dataset_name or self.partition_dir or next(iter(self.paths().values()), default)
        if os.path.isdir(path):
            return Path(path).resolve().name
        return Path(path).stem if path in self.paths().values() else path
