"""Image data sets: CIFAR-10 and CIFAR-100, the installed digits, Hub data sets and local folders."""

import math
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
from transformers import AutoImageProcessor, ViTImageProcessor

from .arguments import LIMITS, DataArguments
from .images import EvaluationTransform, ImageCollator, ImageRows, TrainingTransform, timm_transform, whole_images
from .labels import MULTI_LABEL, SINGLE_LABEL, model_label_ids, resolve_labels
from .partition import load_partition
from .samples import load_digits
from .sources import check_columns, limit_rows, load_files, load_hub, load_image_folder, parquet_files
from .streaming import ImageStream, hold_all_but_train
from .task import DataError, Modality, TaskData, check_splits, cut_validation_split


HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
_DIGITS = "digits"
_LABEL_COLUMNS = ("label", "fine_label", "labels")


@dataclass
class ImageDataArguments(DataArguments):
    """Which images are trained on and evaluated, and how they become pixels."""

    path_kind = "dir"

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Where the images are: `cifar100`, `cifar10`, Hub name, local folder of parquet files or of one "
            "folder per class, or the installed sample `digits`."
        },
    )
    train_dir: str | None = field(default=None, metadata={"help": "Training images, one folder per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "Evaluation images, one folder per class."})
    test_dir: str | None = field(default=None, metadata={"help": "Images to predict, in folders or not."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: the only column of images."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": f"Column of the labels. Default: the first of {', '.join(_LABEL_COLUMNS)}."}
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, where it is not the model's own: Hub name or folder."}
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Height and width in pixels; position embeddings are resized once and saved. Default: the model's."
        },
    )
    skip_corrupt: bool = field(default=False, metadata={"help": "Leave out images that cannot be decoded."})
    min_crop: float = field(
        default=0.5, metadata={"help": "Least share of the image that a random crop keeps; 1 keeps all."}
    )
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    auto_augment: str | None = field(
        default=None, metadata={"help": "timm's augmentation string, for example `rand-m9-mstd0.5-inc1`."}
    )
    mixup: float = field(default=0.0, metadata={"help": "Alpha of Mixup, 0 for none; makes soft labels."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of CutMix, 0 for none; makes soft labels."})
    random_erase: float = field(default=0.0, metadata={"help": "Probability of erasing a random rectangle."})

    def __post_init__(self):
        super().__post_init__()
        if not (self.dataset_name or self.paths() or self.partition_dir):
            raise DataError("No data: give --dataset_name, or --train_dir and --validation_dir.")
        self.check_positive("image_size")
        for name in ("hflip", "random_erase"):
            if not 0 <= getattr(self, name) <= 1:
                raise DataError(f"--{name} is a probability, between 0 and 1, not {getattr(self, name)}.")
        if not 0 < self.min_crop <= 1:
            raise DataError(f"--min_crop is a share of the image, above 0 and at most 1, not {self.min_crop}.")
        for name in ("mixup", "cutmix"):
            if not 0 <= getattr(self, name) < math.inf:
                raise DataError(f"--{name} must be finite, 0 or more, not {getattr(self, name)}.")
        if self.auto_augment is not None:
            try:
                _check_auto_augment(self.auto_augment)
            except (AssertionError, KeyError, ValueError) as error:
                raise DataError(
                    f"--auto_augment {self.auto_augment!r} is none of timm's: rand-m9-mstd0.5-inc1 and its like "
                    "(m, n, p, mstd, mmax, inc with a number; tweights, t3a, t3aw), augmix-m5-w4-d2 (m, w, d, a, b, "
                    "mstd), original, originalr, v0, v0r, 3a (mstd)."
                ) from error


def _check_auto_augment(policy: str) -> None:
    """Raise AssertionError, KeyError or ValueError for a string that timm refuses, or of which it ignores a part."""
    name, *parts = policy.split("-")
    choices = ("tweights", "t3a", "t3aw") if name == "rand" else ()
    if ignored := [part for part in parts if part not in choices and not re.fullmatch(r"(?!t)[a-z]+\d[\d.]*", part)]:
        raise ValueError(ignored)
    if not name:
        raise ValueError(policy)
    timm_transform(32, auto_augment=policy)


def load_image_data(
    args: ImageDataArguments,
    *,
    splits_needed: Iterable[str],
    seed: int,
    cache_dir: str | None = None,
    token: str | None = None,
    like: TaskData | None = None,
) -> TaskData:
    """Load the splits of a run. Where there is no validation split, the test split is evaluated, as CIFAR has it.

    Args:
        args: where the images are and what their columns are.
        splits_needed: of `train`, `validation`, `test`.
        seed: of the split that `--train_val_split` cuts.
        cache_dir: where downloads are kept.
        token: for private Hub repositories.
        like: data whose problem these pose; then labels may be missing.

    Raises:
        DataError: a source, split, column or label that is missing or does not fit, or an image that is corrupt.
    """
    source, splits = _load_splits(args, cache_dir, token)
    needed, stream = list(splits_needed), "train" if args.streaming else None
    rows = next(iter(splits.values()))
    image_column = _image_column(args, rows, source)
    label_column = args.label_column_name or next((name for name in _LABEL_COLUMNS if name in rows.column_names), None)
    cut = args.train_val_split is not None and "train" in splits and "validation" not in splits
    if not cut and "validation" in needed and "validation" not in splits and "test" in splits:
        splits["validation"] = splits["test"]
    check_splits(splits, [name for name in needed if not (cut and name == "validation")], _HINTS, source)
    for name in (image_column, label_column or "label"):
        flag = "image_column_name" if name == image_column else "label_column_name"
        for split, rows in splits.items():
            if split != "test" or name == image_column:
                check_columns(rows, [name], flag, f"{source}, split {split!r}")
    splits = {
        split: rows.select_columns([name for name in (image_column, label_column) if name in rows.column_names])
        for split, rows in splits.items()
        if split in needed or (cut and split == "train")
    }
    if args.streaming:
        splits = hold_all_but_train(splits, {split: getattr(args, name) for split, name in LIMITS.items()})
    splits, problem_type, label_names = resolve_labels(
        splits,
        label_column,
        args.part_labels(label_column),
        source,
        seed,
        like=like,
        problem_type=args.problem_type,
    )
    if problem_type == MULTI_LABEL:
        raise DataError(f"{source}: column {label_column!r} holds lists of labels; one class per image is trained.")
    if problem_type != SINGLE_LABEL and (args.mixup or args.cutmix):
        raise DataError(f"--mixup and --cutmix mix classes; column {label_column!r} holds numbers.")
    if cut:
        splits = cut_validation_split(splits, args.train_val_split, label_column, seed)
    held = {split: limit_rows(splits[split], getattr(args, LIMITS[split])) for split in needed if split != stream}
    splits |= {
        split: whole_images(rows, image_column, args.skip_corrupt, f"{source}, split {split!r}")
        for split, rows in held.items()
    }
    return TaskData(
        splits={split: splits[split] for split in needed},
        problem_type=problem_type,
        label_names=label_names,
        input_columns=[image_column],
        label_column=label_column,
        dataset=args.name_for_tables(),
        task_name=None,
        metrics=["accuracy"] if problem_type == SINGLE_LABEL else ["mse"],
    )


# Sources


_HINTS = {
    "train": "--do_train needs another --dataset_name, or --train_dir",
    "validation": "--do_eval needs --validation_dir, or --train_val_split 0.1, which cuts one from the training rows",
    "test": "--do_predict needs another --dataset_name, or --test_dir",
}


def _load_splits(args: ImageDataArguments, cache_dir: str | None, token: str | None) -> tuple[str, dict]:
    """What the source is called in messages, and all its splits by name."""
    if args.partition_dir is None:
        return _load_source(args, cache_dir, token)
    part = load_partition(args.partition_dir, args.partition_id)
    if args.dataset_name is None:
        return f"--partition_dir {args.partition_dir}", dict(part)
    source, splits = _load_source(args, cache_dir, token)
    return source, {**splits, "train": part["train"]}


def _load_source(args: ImageDataArguments, cache_dir: str | None, token: str | None) -> tuple[str, dict]:
    folders = args.paths()
    if folders:
        source = " ".join(f"--{split}_dir {path}" for split, path in folders.items())
        splits = {
            split: load_image_folder(path, source, cache_dir, args.streaming, labelled=split != "test")
            for split, path in folders.items()
        }
        return source, {split: found["train"] for split, found in splits.items()}
    source = f"--dataset_name {args.dataset_name}"
    if os.path.isdir(args.dataset_name):
        if any(Path(args.dataset_name).glob("*.parquet")) or any(Path(args.dataset_name, "data").glob("*.parquet")):
            found = parquet_files(Path(args.dataset_name), args.dataset_config_name, source)
            return source, load_files(found, source, cache_dir, args.streaming)
        return source, load_image_folder(args.dataset_name, source, cache_dir, args.streaming)
    if args.dataset_name == _DIGITS:
        return source, dict(load_digits())
    name = HUB_NAMES.get(args.dataset_name, args.dataset_name)
    return source, load_hub(name, args.dataset_config_name, source, cache_dir, token, args.streaming)


def _image_column(args: ImageDataArguments, rows: datasets.Dataset, source: str) -> str:
    if args.image_column_name is not None:
        return args.image_column_name
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if len(columns) != 1:
        raise DataError(
            f"{source} has {len(columns)} columns of images; name one by --image_column_name. Its columns are: "
            f"{', '.join(rows.column_names)}."
        )
    return columns[0]


# What the script needs


def _load_processor(name: str | None, args: ImageDataArguments, config: Any, **hub) -> ViTImageProcessor:
    """The image processor of `--image_processor_name`, else the model's own, else a plain one, at the model's size."""
    size, name = config.image_size, args.image_processor_name or name
    if name is None:
        return ViTImageProcessor(size={"height": size, "width": size})
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **hub)
    except (OSError, ValueError) as error:
        raise DataError(f"{name} has no image processor ({error}): give --image_processor_name.") from error
    if getattr(processor, "do_center_crop", False):
        before = processor.size["shortest_edge"] / processor.crop_size["height"]
        processor.size, processor.crop_size = {"shortest_edge": round(size * before)}, {"height": size, "width": size}
    else:
        processor.size = {"height": size, "width": size}
    return processor


def _fit_model(model: Any, args: ImageDataArguments) -> None:
    """Give the model the size of `--image_size`."""
    size, patch = args.image_size, model.config.patch_size
    if size is None or size == model.config.image_size:
        return
    if size % patch:
        raise DataError(f"--image_size {size} must be a multiple of the model's patches of {patch} pixels.")
    model.set_image_size(size)


def _encode_rows(data: TaskData, processor: Any, args: ImageDataArguments, config: Any) -> dict[str, ImageRows]:
    ids = model_label_ids(data, config.label2id) if data.label_names else None
    transform, (image_column,) = EvaluationTransform(processor, config.num_channels), data.input_columns
    encoded = {}
    for split, rows in data.splits.items():
        if isinstance(rows, datasets.IterableDataset):
            where = f"{data.dataset}, split {split!r}"
            encoded[split] = ImageStream(
                rows, image_column, data.label_column, ids, transform, args.skip_corrupt, where
            )
            continue
        labels = rows[data.label_column][:] if data.label_column in rows.column_names else None
        if labels is not None and ids is not None:
            labels = [ids[label] for label in labels]
        encoded[split] = ImageRows(rows, image_column, labels, transform)
    return encoded


def _augment(rows: ImageRows, processor: Any, args: ImageDataArguments, config: Any, seed: int) -> ImageRows:
    return rows.augmented(TrainingTransform(processor, config.num_channels, config.image_size, args), seed)


def _make_collator(processor: Any, args: ImageDataArguments, config: Any) -> Callable:
    return ImageCollator(args.mixup, args.cutmix, config.num_labels)


IMAGES = Modality(
    main_input_name="pixel_values",
    data_arguments=ImageDataArguments,
    load_data=load_image_data,
    load_processor=_load_processor,
    encode_data=_encode_rows,
    make_collator=_make_collator,
    fit_model=_fit_model,
    augment=_augment,
)
