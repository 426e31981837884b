"""Text data: the nine GLUE tasks, Hub data sets, local folders and files, and the installed BBC News sample."""

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from ..errors import in_one_line
from .arguments import LIMITS, DataArguments
from .labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, model_label_ids, resolve_labels
from .partition import load_partition
from .samples import load_bbc_news
from .sources import FILE_FORMATS, ROW_ID, check_columns, limit_rows, load_files, load_hub, parquet_files
from .streaming import hold_all_but_train
from .task import DataError, Modality, TaskData, check_splits, cut_validation_split


logger = logging.getLogger(__name__)

_HUB_GLUE = "nyu-mll/glue"
_BBC_NEWS = "bbc_news"
# MNLI's matched halves are the splits that every task has.
_SPLIT_NAMES = {"validation_matched": "validation", "test_matched": "test"}


@dataclass(frozen=True)
class GlueTask:
    """What a GLUE task is made of.

    Args:
        text_columns: one column, or two for sentence pairs.
        label_names: by label id; empty for regression.
        metrics: the task's own.
        submission: name of the file that the benchmark's server takes, without ending.
        submits_names: whether that file holds label names instead of their ids.
    """

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    submission: str = ""
    submits_names: bool = False


_PAIR = ("sentence1", "sentence2")

GLUE_TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",), "CoLA"),
    "mnli": GlueTask(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), submission="MNLI-m", submits_names=True
    ),
    "mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), "MRPC"),
    "qnli": GlueTask(
        ("question", "sentence"), ("entailment", "not_entailment"), submission="QNLI", submits_names=True
    ),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), "QQP"),
    "rte": GlueTask(_PAIR, ("entailment", "not_entailment"), submission="RTE", submits_names=True),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), submission="SST-2"),
    "stsb": GlueTask(_PAIR, (), ("pearson", "spearmanr"), "STS-B"),
    "wnli": GlueTask(_PAIR, ("not_entailment", "entailment"), submission="WNLI"),
}

_DEFAULT_METRICS = {SINGLE_LABEL: ["accuracy"], MULTI_LABEL: ["f1"], REGRESSION: ["mse"]}


@dataclass
class TextDataArguments(DataArguments):
    """Which text is trained on and evaluated, and how it becomes tokens."""

    task_name: str | None = field(
        default=None,
        metadata={"help": f"GLUE task, names text columns, labels and metrics: {', '.join(sorted(GLUE_TASKS))}."},
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Where the data are: Hub name, local folder of parquet files, or the installed sample `bbc_news`. "
            f"Default: the Hub's {_HUB_GLUE} with --task_name, else the files."
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
            "help": "One text column, or two for pairs, apart by blanks or commas. Default: the task's, else the only "
            "one, or the only two beside the label column."
        },
    )
    label_column_name: str | None = field(default=None, metadata={"help": "Column of the labels. Default: `label`."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, where it is not the model's own: Hub name or folder."}
    )
    skip_empty: bool = field(
        default=False,
        metadata={
            "help": "Leave out rows without text instead of stopping; rows to predict are kept, with an empty text."
        },
    )
    max_seq_length: int = field(default=128, metadata={"help": "Rows are cut to this many tokens."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad all rows to --max_seq_length instead of to the longest of their batch."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that turn text into tokens. Default: this one."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Make tokens anew instead of from the cache."})

    def __post_init__(self):
        if self.task_name is not None:
            self.task_name = self.task_name.lower()
            if self.task_name not in GLUE_TASKS:
                raise DataError(f"--task_name {self.task_name!r} is not one of: {', '.join(sorted(GLUE_TASKS))}.")
        for split, path in self.paths().items():
            if Path(path).suffix not in FILE_FORMATS:
                raise DataError(f"--{split}_file {path} must end in one of: {', '.join(sorted(FILE_FORMATS))}.")
        if self.task_name is not None and self.problem_type is not None:
            raise DataError("--task_name says what its labels mean: leave --problem_type out.")
        super().__post_init__()
        if not (self.dataset_name or self.task_name or self.paths() or self.partition_dir):
            raise DataError("No data: give --task_name, --dataset_name, or --train_file and --validation_file.")
        if self.text_column_names is not None:
            given = [self.text_column_names] if isinstance(self.text_column_names, str) else self.text_column_names
            self.text_column_names = [name for names in given for name in names.split(",") if name]
            if not 1 <= len(self.text_column_names) <= 2:
                raise DataError(f"--text_column_names takes one column or two, not {len(self.text_column_names)}.")
        self.check_positive("max_seq_length", "preprocessing_num_workers")


def load_text_data(
    args: TextDataArguments,
    *,
    splits_needed: Iterable[str],
    seed: int,
    cache_dir: str | None = None,
    token: str | None = None,
    like: TaskData | None = None,
) -> TaskData:
    """Load the splits of a run, with labels as class ids, numbers, or lists of class ids.

    The label column of a split without labels (GLUE's test splits carry -1) is left out.

    Args:
        args: where the data are and what their columns are.
        splits_needed: of `train`, `validation`, `test`; for MNLI their `_mismatched` halves come along.
        seed: of the split that `--train_val_split` cuts.
        cache_dir: where downloads are kept.
        token: for private Hub repositories.
        like: data whose problem these pose, where no task names it; then labels may be missing.

    Raises:
        DataError: a source, split, column or label that is missing or does not fit.
    """
    task = GLUE_TASKS.get(args.task_name)
    source, splits = _load_splits(args, cache_dir, token)
    needed = list(splits_needed)
    cut = args.train_val_split is not None and "train" in splits and "validation" not in splits
    if args.train_val_split is not None and not cut:
        logger.warning("--train_val_split is not used: %s has the splits %s.", source, ", ".join(splits))
    not_cut = [split for split in needed if not (cut and split == "validation")]
    check_splits(splits, not_cut, _missing_split_hints(args), source)
    splits = {split: rows for split, rows in splits.items() if split.removesuffix("_mismatched") in LIMITS}
    if args.streaming:
        limits = {split: getattr(args, name) for split, name in LIMITS.items()}
        splits = hold_all_but_train(
            {split: splits[split] for split in splits if split.split("_")[0] in needed}, limits
        )

    label_column = args.label_column_name or "label"
    for split, rows in splits.items():
        if not split.startswith("test"):
            check_columns(rows, [label_column], "label_column_name", f"{source}, split {split!r}")
    input_columns = text_columns(args, task, splits, label_column, source)
    known = task.label_names if task else args.part_labels(label_column)
    splits, problem_type, label_names = resolve_labels(
        splits, label_column, known, source, seed, like=like, problem_type=args.problem_type
    )
    settings = {"skip_empty": args.skip_empty, "blank_is_empty": task is None or bool(args.paths())}
    splits = {
        split: _prepare_stream(rows, input_columns, source, **settings)
        if args.streaming and split == "train"
        else prepare_rows(rows, input_columns, f"{source}, split {split!r}", **settings, keep=split.startswith("test"))
        for split, rows in splits.items()
    }
    if cut:
        splits = cut_validation_split(splits, args.train_val_split, label_column, seed)
    wanted = {split: rows for split, rows in splits.items() if split.removesuffix("_mismatched") in needed}
    return TaskData(
        splits={
            split: rows if args.streaming else limit_rows(rows, getattr(args, LIMITS[split.split("_")[0]]))
            for split, rows in wanted.items()
        },
        problem_type=problem_type,
        label_names=label_names,
        input_columns=input_columns,
        label_column=label_column,
        dataset=args.name_for_tables(_HUB_GLUE),
        task_name=args.task_name,
        metrics=list(task.metrics) if task else _DEFAULT_METRICS[problem_type],
    )


def encode_text_data(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    args: TextDataArguments,
    *,
    label2id: dict[str, int] | None = None,
    max_length: int | None = None,
    keep_columns: Sequence[str] = (),
) -> dict[str, datasets.Dataset]:
    """Turn text into tokens and labels into the model's ids, in the column `labels`.

    Rows are cut, and padded only with `--pad_to_max_length`; else the collator pads each batch.

    Args:
        data: what `load_text_data` returned.
        tokenizer: the model's tokenizer.
        args: lengths, workers and cache.
        label2id: the model's label names; names that are the data's in another order are followed. `None` takes the
            data's order.
        max_length: the most tokens that the model takes; `None`: what the tokenizer says is the only limit.
        keep_columns: columns of the data that stay beside the model's inputs.

    Raises:
        DataError: a label that the model does not know, or no room for a token beside the special ones.
    """
    length = min(args.max_seq_length, tokenizer.model_max_length, max_length or args.max_seq_length)
    if length < args.max_seq_length:
        logger.warning(
            "--max_seq_length %d is more than the model takes; rows are cut to %d.", args.max_seq_length, length
        )
    least = tokenizer.num_special_tokens_to_add(len(data.input_columns) > 1) + len(data.input_columns)
    if length < least:
        raise DataError(
            f"--max_seq_length {length} leaves no token of a text: with this tokenizer's special tokens it must be at "
            f"least {least}."
        )
    ids = None if data.label_names is None else model_label_ids(data, label2id)
    num_labels = max(data.num_labels, len(label2id or ()))
    encoded = {}
    for split, rows in data.splits.items():
        held = {
            "num_proc": args.preprocessing_num_workers,
            "load_from_cache_file": not args.overwrite_cache,
            "desc": f"Tokenizing {split}",
        }
        encoded[split] = rows.map(
            _encode_rows,
            batched=True,
            **(held if isinstance(rows, datasets.Dataset) else {}),
            remove_columns=[name for name in rows.column_names if name not in keep_columns],
            fn_kwargs={
                "tokenizer": tokenizer,
                "columns": data.input_columns,
                "length": length,
                "padding": "max_length" if args.pad_to_max_length else False,
                "label_column": data.label_column if data.label_column in rows.column_names else None,
                "label_ids": ids,
                "num_labels": num_labels if data.problem_type == MULTI_LABEL else None,
            },
        )
    return encoded


def _encode_rows(
    rows: dict[str, list],
    *,
    tokenizer: PreTrainedTokenizerBase,
    columns: list[str],
    length: int,
    padding: str | bool,
    label_column: str | None,
    label_ids: list[int] | None,
    num_labels: int | None,
) -> dict[str, list]:
    """A batch of rows as model inputs; `num_labels` is given for multi-label rows, which become rows of 0 and 1."""
    encoded = dict(
        tokenizer(*(rows[column] for column in columns), truncation=True, max_length=length, padding=padding)
    )
    if label_column is None:
        return encoded
    labels = rows[label_column]
    if num_labels is not None:
        chosen = [{label_ids[label] for label in several} for several in labels]
        labels = [[float(label in present) for label in range(num_labels)] for present in chosen]
    elif label_ids is not None:
        labels = [label_ids[label] for label in labels]
    return {**encoded, "labels": labels}


# Sources


def _load_splits(args: TextDataArguments, cache_dir: str | None, token: str | None) -> tuple[str, dict]:
    """What the source is called in messages, and all its splits under the names of `TaskData`."""
    files, task = args.paths(), GLUE_TASKS.get(args.task_name)
    texts = args.text_column_names or (task.text_columns if task else ())
    if args.partition_dir is not None and args.dataset_name is None:
        source = f"--partition_dir {args.partition_dir}"
        return source, dict(load_partition(args.partition_dir, args.partition_id))
    if files:
        source = " ".join(f"--{split}_file {path}" for split, path in files.items())
        splits = {
            split: load_files({split: [path]}, f"--{split}_file {path}", cache_dir, args.streaming, texts)[split]
            for split, path in files.items()
        }
    elif args.dataset_name is None:
        source = f"--task_name {args.task_name} ({_HUB_GLUE})"
        config = args.dataset_config_name or args.task_name
        splits = load_hub(_HUB_GLUE, config, source, cache_dir, token, args.streaming)
    elif os.path.isdir(args.dataset_name):
        source = f"--dataset_name {args.dataset_name}"
        found = parquet_files(Path(args.dataset_name), args.dataset_config_name or args.task_name, source)
        splits = load_files(found, source, cache_dir, args.streaming)
    elif args.dataset_name == _BBC_NEWS:
        # One fixed split: a checkpoint evaluated under another --seed must not meet its training rows.
        source, splits = f"--dataset_name {_BBC_NEWS}", load_bbc_news()
    else:
        source = f"--dataset_name {args.dataset_name}"
        config = args.dataset_config_name or args.task_name
        splits = load_hub(args.dataset_name, config, source, cache_dir, token, args.streaming)
    splits = {_SPLIT_NAMES.get(split, split): rows for split, rows in splits.items()}
    if args.partition_dir is not None:
        splits["train"] = load_partition(args.partition_dir, args.partition_id)["train"]
    return source, splits


def _missing_split_hints(args: TextDataArguments) -> dict[str, str]:
    cut = "--train_val_split 0.1, which cuts one from the training rows"
    if args.paths():
        return {
            "train": "--do_train needs --train_file",
            "validation": f"--do_eval needs --validation_file, or {cut}",
            "test": "--do_predict needs --test_file",
        }
    other = "another --dataset_name, or files (--train_file, --validation_file, --test_file)"
    return {
        "train": f"--do_train needs {other}",
        "validation": f"--do_eval needs {cut}, or {other}",
        "test": f"--do_predict needs {other}",
    }


# Columns


def text_columns(
    args: TextDataArguments, task: GlueTask | None, splits: dict, label_column: str, source: str
) -> list[str]:
    """The columns that are named, by the flag or by the task, else the only column of text.

    Two columns of text are a pair where the label column stands beside them: without it, one of them may be the label.
    """
    columns = args.text_column_names or (list(task.text_columns) if task else None)
    if columns is None:
        rows = next(iter(splits.values()))
        most = 2 if label_column in rows.column_names else 1
        columns = [
            name
            for name, feature in rows.features.items()
            if getattr(feature, "dtype", None) in ("string", "large_string") and name not in (label_column, ROW_ID)
        ]
        if not 1 <= len(columns) <= most:
            raise DataError(
                f"{source} has {len(columns)} columns of text; name one, or two for pairs, by --text_column_names. "
                f"Its columns are: {', '.join(rows.column_names)}."
            )
    for split, rows in splits.items():
        check_columns(rows, columns, "text_column_names", f"{source}, split {split!r}")
    return columns


def prepare_rows(
    rows: datasets.Dataset,
    columns: list[str],
    where: str,
    *,
    skip_empty: bool = False,
    blank_is_empty: bool = True,
    keep: bool = False,
) -> datasets.Dataset:
    """Text columns as strings without gaps, and a row id that outlives cutting and selecting.

    Args:
        rows: with the columns.
        columns: of text.
        where: what the rows are called in messages.
        skip_empty: leave out rows of which a text is missing, instead of raising DataError.
        blank_is_empty: whether a text of nothing but blanks is missing, too.
        keep: give such rows an empty text instead of leaving them out.
    """
    for column in columns:
        if rows.features[column] != datasets.Value("string"):
            rows = rows.cast_column(column, datasets.Value("string"))
    if ROW_ID not in rows.column_names:
        rows = rows.add_column(ROW_ID, list(range(len(rows))))
    texts = {column: rows[column][:] for column in columns}
    empty = {
        column: [row for row, text in enumerate(of_column) if _is_empty(text, blank_is_empty)]
        for column, of_column in texts.items()
    }
    broken = set().union(*empty.values())
    if not broken:
        return rows
    column, first = next((column, numbers[0]) for column, numbers in empty.items() if numbers)
    if not skip_empty:
        raise DataError(
            f"{where} has no text in column {column!r} of row {first} (counted from 0; {len(broken)} such rows of "
            f"{len(rows)}): fill it, or give --skip_empty to leave such rows out."
        )
    done = "kept with an empty text" if keep else "left out"
    logger.warning("%s: %d of %d rows have no text and are %s.", where, len(broken), len(rows), done)
    if not keep:
        return rows.select([row for row in range(len(rows)) if row not in broken])
    for column in columns:
        rows = rows.remove_columns(column).add_column(column, [text or "" for text in texts[column]])
    return rows


def _prepare_stream(
    rows: datasets.IterableDataset, columns: list[str], source: str, *, skip_empty: bool, blank_is_empty: bool
) -> datasets.IterableDataset:
    """`prepare_rows` for a stream, which is looked through while it is read."""
    settings = {"columns": columns, "source": source, "skip_empty": skip_empty, "blank_is_empty": blank_is_empty}
    return rows.filter(_has_text, fn_kwargs=settings)


def _has_text(row: dict, columns: list[str], source: str, skip_empty: bool, blank_is_empty: bool) -> bool:
    column = next((column for column in columns if _is_empty(row[column], blank_is_empty)), None)
    if column is not None and not skip_empty:
        raise DataError(
            f"{source} has a row without text in column {column!r}: fill it, or give --skip_empty to leave such rows "
            "out."
        )
    return column is None


def _is_empty(text: str | None, blank_is_empty: bool) -> bool:
    return text is None or (blank_is_empty and not str(text).strip())


# What the script needs


def _load_tokenizer(name: str | None, args: TextDataArguments, config: Any, **hub) -> PreTrainedTokenizerBase:
    """The tokenizer of `--tokenizer_name`, else the model's own."""
    name = args.tokenizer_name or name
    if name is None:
        raise DataError("A model from scratch (--model_type) has no tokenizer: give --tokenizer_name.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)
    except Exception as error:  # there is none, it is code of its own, or damaged
        raise DataError(
            f"{name}: the tokenizer cannot be read ({in_one_line(error)}): give --tokenizer_name."
        ) from error
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # made from nothing: every text would be the same
        raise DataError(f"{name} holds no tokenizer: give --tokenizer_name.")
    if len(tokenizer) > config.vocab_size:
        raise DataError(
            f"The tokenizer {name} has {len(tokenizer)} words, the model {config.vocab_size}: give --config_overrides "
            f"vocab_size={len(tokenizer)}, or the model's own tokenizer."
        )
    return tokenizer


def _encode_for_model(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, args: TextDataArguments, config: Any
) -> dict:
    return encode_text_data(data, tokenizer, args, label2id=config.label2id, max_length=config.max_input_length)


def _make_collator(tokenizer: PreTrainedTokenizerBase, args: TextDataArguments, config: Any) -> Callable:
    return default_data_collator if args.pad_to_max_length else DataCollatorWithPadding(tokenizer)


def _write_submission(folder: Path, data: TaskData, split: str, predictions: list) -> None:
    """`glue_submission/<task>.tsv` as the GLUE server takes it: row ids, and label ids, label names or scores."""
    task = GLUE_TASKS.get(data.task_name)
    if task is None:
        return
    name = "MNLI-mm" if split.endswith("_mismatched") else task.submission
    if not task.label_names:
        answers = [f"{min(max(score, 0.0), 5.0):.3f}" for score in predictions]
    else:
        # A checkpoint may have its own spelling, or only numbers (LABEL_0, 0, ...), which are the data's ids.
        known = {name.lower(): index for index, name in enumerate(task.label_names)}
        for index in range(len(task.label_names)):
            known |= {f"label_{index}": index, str(index): index}
        ids = [known[prediction.lower()] for prediction in predictions]
        answers = [task.label_names[index] if task.submits_names else index for index in ids]
    place = folder / "glue_submission"
    place.mkdir(exist_ok=True)
    lines = [f"{row_id}\t{answer}\n" for row_id, answer in zip(data.row_ids(split), answers, strict=True)]
    (place / f"{name}.tsv").write_text("index\tprediction\n" + "".join(lines))


TEXT = Modality(
    main_input_name="input_ids",
    data_arguments=TextDataArguments,
    load_data=load_text_data,
    load_processor=_load_tokenizer,
    encode_data=_encode_for_model,
    make_collator=_make_collator,
    write_submission=_write_submission,
)
