"""The data flags of texts."""

from dataclasses import dataclass, field

from .arguments import DataArguments
from .glue import GLUE_TASKS, HUB_GLUE
from .labels import LABEL_COLUMNS
from .task import DataError


@dataclass
class TextDataArguments(DataArguments):
    """The data flags of texts: sources, columns and tokenization."""

    task_name: str | None = field(
        default=None,
        metadata={"help": f"GLUE task, names text columns, labels and metrics: {', '.join(sorted(GLUE_TASKS))}."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Where the data are: Hub name, local folder of parquet files, or the installed sample `bbc_news`. "
            f"Default: the Hub's {HUB_GLUE} with --task_name, else the files."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of --dataset_name. Default: --task_name, where one is given."}
    )
    train_file: str | None = field(default=None, metadata={"help": "Training rows: csv, json, jsonl or parquet."})
    validation_file: str | None = field(
        default=None, metadata={"help": "Evaluation rows: csv, json, jsonl or parquet."}
    )
    test_file: str | None = field(default=None, metadata={"help": "Rows to predict: csv, json, jsonl or parquet."})
    text_column_names: list[str] | None = field(
        default=None,
        metadata={
            "help": "One text column, or two for pairs, separated by spaces or commas. Default: the task's, else the "
            "only one, or the only two beside the label column."
        },
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": f"Column of the labels. Default: the first of {', '.join(LABEL_COLUMNS)}."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, if it is not the model's own: Hub name or folder."}
    )
    skip_empty: bool = field(
        default=False,
        metadata={"help": "Skip rows without text, which are otherwise an error; rows to predict are kept."},
    )
    max_seq_length: int = field(default=128, metadata={"help": "Number of tokens to which texts are truncated."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad all rows to --max_seq_length instead of to the longest of their batch."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Number of processes that tokenize. Default: no further process."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again instead of reading the cache."})

    def __post_init__(self):
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in GLUE_TASKS:
                raise DataError(f"--task_name {self.task_name!r} is not one of: {', '.join(sorted(GLUE_TASKS))}.")
        if self.task_name is not None and self.problem_type is not None:
            raise DataError("--task_name defines the problem type: leave --problem_type out.")
        super().__post_init__()
        if not (self.dataset_name or self.task_name or self.paths() or self.partition_dir):
            raise DataError("No data: give --task_name, --dataset_name, or --train_file and --validation_file.")
        if self.text_column_names is not None:
            given = [self.text_column_names] if isinstance(self.text_column_names, str) else self.text_column_names
            self.text_column_names = [name for names in given for name in names.split(",") if name]
            if not 1 <= len(self.text_column_names) <= 2:
                raise DataError(f"--text_column_names takes one column or two, not {len(self.text_column_names)}.")
            if len(set(self.text_column_names)) < len(self.text_column_names):
                raise DataError(f"--text_column_names names {self.text_column_names[0]!r} twice: name two columns.")
        self.check_positive("max_seq_length", "preprocessing_num_workers")

    def hub_name(self) -> tuple[str | None, str | None]:
        """As in `DataArguments`; the default of a GLUE task is its data set on the Hub."""
        name = self.dataset_name
        if name is None and self.task_name is not None and not self.paths() and self.partition_dir is None:
            name = HUB_GLUE
        return name, self.dataset_config_name or self.task_name
