"""Text data: the GLUE tasks, Hub data sets, local folders and files, and the installed BBC News sample."""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import datasets
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from ..errors import in_one_line
from ..inference.loading import has_vocabulary
from .arguments import LIMITS
from .glue import GLUE_TASKS, HUB_GLUE, SPLIT_NAMES, write_submission
from .label_ids import model_label_ids
from .labels import MULTI_LABEL, REGRESSION, SINGLE_LABEL, find_label_column, resolve_labels
from .sources import check_columns, check_splits, limit_rows
from .splits import cut_validation_split, load_splits
from .streaming import hold_all_but_train
from .task import DataError, Modality, TaskData
from .text_arguments import TextDataArguments
from .text_rows import prepare_rows, prepare_stream, text_columns


logger = logging.getLogger(__name__)

_DEFAULT_METRICS = {SINGLE_LABEL: ["accuracy"], MULTI_LABEL: ["f1"], REGRESSION: ["mse"]}


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

    The label column of a split without labels (GLUE's test splits have -1) is removed.

    Args:
        args: sources and columns of the data.
        splits_needed: some of `train`, `validation`, `test`; for MNLI their `_mismatched` halves are included.
        seed: seed of the split that `--train_val_split` takes from the training rows.
        cache_dir: folder for downloads.
        token: token for private Hub repositories.
        like: data with the same labels, for data whose labels no task defines; then labels may be missing.

    Returns:
        the splits, their labels and columns.

    Raises:
        DataError: a source, split, column or label that is missing or does not fit.
    """
    task = GLUE_TASKS.get(args.task_name)
    texts = args.text_column_names or (task.text_columns if task else ())
    source, splits = load_splits(args, cache_dir, token, text_columns=texts)
    splits = {SPLIT_NAMES.get(split, split): rows for split, rows in splits.items()}
    needed = list(splits_needed)
    cut = args.train_val_split is not None and "train" in splits and "validation" not in splits
    if args.train_val_split is not None and not cut:
        logger.warning("--train_val_split is not used: %s has the splits %s.", source, ", ".join(splits))
    not_cut = [split for split in needed if not (cut and split == "validation")]
    check_splits(splits, not_cut, _missing_split_hints(args), source)
    splits = {split: rows for split, rows in splits.items() if split.removesuffix("_mismatched") in LIMITS}
    if args.streaming:
        chosen = {split: rows for split, rows in splits.items() if split.split("_")[0] in needed}
        splits = hold_all_but_train(chosen, args.limits())

    label_column = find_label_column(splits, args.label_column_name)
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
        split: prepare_stream(rows, input_columns, source, **settings)
        if args.streaming and split == "train"
        else prepare_rows(rows, input_columns, f"{source}, split {split!r}", **settings, keep=split.startswith("test"))
        for split, rows in splits.items()
    }
    if cut:
        splits = cut_validation_split(splits, args.train_val_split, label_column, seed)
    wanted = {split: rows for split, rows in splits.items() if split.removesuffix("_mismatched") in needed}
    return TaskData(
        splits={
            split: rows if args.streaming else limit_rows(rows, args.limits()[split.split("_")[0]])
            for split, rows in wanted.items()
        },
        problem_type=problem_type,
        label_names=label_names,
        input_columns=input_columns,
        label_column=label_column,
        dataset=args.name_for_tables(HUB_GLUE),
        task_name=args.task_name,
        metrics=list(task.metrics) if task else _DEFAULT_METRICS[problem_type],
    )


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


def encode_text_data(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    args: TextDataArguments,
    *,
    label2id: dict[str, int] | None = None,
    max_length: int | None = None,
    keep_columns: Sequence[str] = (),
) -> dict[str, datasets.Dataset]:
    """Convert texts to tokens, and labels to the model's ids in the column `labels`.

    Texts are truncated. They are padded only with `--pad_to_max_length`; otherwise the collator pads each batch.

    Args:
        data: what `load_text_data` returned.
        tokenizer: the model's tokenizer.
        args: lengths, workers and cache.
        label2id: the ids of the model's labels, by name, if its labels have the names of the data, perhaps in another
            order; `None`: the order of the data.
        max_length: the largest number of tokens that the model takes; `None`: only the tokenizer has a limit.
        keep_columns: columns of the data that are kept in addition to the model's inputs.

    Returns:
        the encoded rows of each split.

    Raises:
        DataError: no rows, a label that the model does not know, or a length that leaves no room for tokens of the
            text.
    """
    length = min(args.max_seq_length, tokenizer.model_max_length, max_length or args.max_seq_length)
    if length < args.max_seq_length:
        logger.warning(
            "--max_seq_length %d is more than the model takes; texts are truncated to %d tokens.",
            args.max_seq_length,
            length,
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
        if isinstance(rows, datasets.Dataset) and not len(rows):
            raise DataError(f"The split {split!r} has no rows: give a source with rows.")
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


def _load_tokenizer(name: str | None, args: TextDataArguments, config: Any, **hub) -> PreTrainedTokenizerBase:
    """The tokenizer of `--tokenizer_name`, else the model's own."""
    if args.tokenizer_name not in (None, name):
        name, hub = args.tokenizer_name, {**hub, "revision": None}  # which is the model's
    if name is None:
        raise DataError("A model from scratch (--model_type) has no tokenizer: give --tokenizer_name.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **hub)
    except Exception as error:  # there is none, it is code of its own, or damaged
        raise DataError(
            f"{name}: the tokenizer cannot be read ({in_one_line(error)}): give --tokenizer_name."
        ) from error
    if not has_vocabulary(tokenizer):
        raise DataError(f"{name} holds no tokenizer: give --tokenizer_name.")
    if tokenizer.pad_token is None:
        raise DataError(
            f"The tokenizer {name} has no padding token: its tokenizer_config.json must name the pad_token."
        )
    if len(tokenizer) > config.vocab_size:
        raise DataError(
            f"The tokenizer {name} has {len(tokenizer)} tokens, the model {config.vocab_size}: give "
            f"--config_overrides vocab_size={len(tokenizer)}, or the model's own tokenizer."
        )
    return tokenizer


def _encode_for_model(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, args: TextDataArguments, config: Any
) -> dict:
    return encode_text_data(data, tokenizer, args, label2id=config.label2id, max_length=config.max_input_length)


def _make_collator(tokenizer: PreTrainedTokenizerBase, args: TextDataArguments, config: Any) -> Callable:
    return default_data_collator if args.pad_to_max_length else DataCollatorWithPadding(tokenizer)


TEXT = Modality(
    main_input_name="input_ids",
    data_arguments=TextDataArguments,
    load_data=load_text_data,
    load_processor=_load_tokenizer,
    encode_data=_encode_for_model,
    make_collator=_make_collator,
    write_submission=write_submission,
)
