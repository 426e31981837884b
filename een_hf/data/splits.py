"""The splits that the data flags name, and a validation split that is taken from the training rows."""

from collections.abc import Sequence

import datasets
import numpy as np

from .arguments import DataArguments
from .partition import load_partition
from .sources import load_named, load_paths


def load_splits(
    args: DataArguments, cache_dir: str | None, token: str | None, text_columns: Sequence[str] = ()
) -> tuple[str, dict]:
    """Load all splits of the source that the flags name.

    Args:
        args: the flags; they name a partition, files or folders, or a data set.
        cache_dir: folder for downloads.
        token: token for private Hub repositories.
        text_columns: columns of csv files that are always text.

    Returns:
        name of the source in messages, and the splits by name.
    """
    name, config = args.hub_name()
    if name is None and args.partition_dir is not None:
        return f"--partition_dir {args.partition_dir}", dict(load_partition(args.partition_dir, args.partition_id))
    settings = {"cache_dir": cache_dir, "streaming": args.streaming}
    paths, kind = args.paths(), args.path_kind
    if paths:
        source = " ".join(f"--{split}_{kind} {path}" for split, path in paths.items())
        splits = load_paths(paths, kind, text_columns=text_columns, **settings)
    else:
        source = f"--dataset_name {name}" if args.dataset_name else f"--task_name {config} ({name})"
        splits = load_named(name, config, source, token=token, images=kind == "dir", **settings)
    if args.partition_dir is not None:
        splits = {**splits, "train": load_partition(args.partition_dir, args.partition_id)["train"]}
    return source, splits


def cut_validation_split(splits: dict, share: float, label_column: str, seed: int) -> dict:
    """Take a random `validation` split from `train`, stratified if the labels are classes with enough rows."""
    rows = splits["train"]
    by_class = None
    if isinstance(rows.features[label_column], datasets.ClassLabel):
        counts = np.unique(rows[label_column], return_counts=True)[1]
        # Both parts must be large enough for all classes.
        if counts.min() >= 2 and len(counts) <= len(rows) * min(share, 1 - share):
            by_class = label_column
    parts = rows.train_test_split(share, seed=seed, stratify_by_column=by_class)
    return {**splits, "train": parts["train"], "validation": parts["test"]}
