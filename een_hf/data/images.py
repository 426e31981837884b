"""Image data: CIFAR-10 and CIFAR-100, the installed digits, Hub data sets and local folders."""

from collections.abc import Callable, Iterable
from typing import Any

import datasets
from transformers import AutoImageProcessor

from .._deprecated import moved_names
from ..errors import in_one_line
from .decoding import whole_images
from .image_arguments import ImageDataArguments
from .image_rows import ImageRows, ImageStream
from .label_ids import model_label_ids
from .labels import MULTI_LABEL, SINGLE_LABEL, find_label_column, resolve_labels
from .sources import check_columns, check_splits, limit_rows
from .splits import cut_validation_split, load_splits
from .streaming import hold_all_but_train
from .task import DataError, Modality, TaskData
from .transforms import EvaluationTransform, ImageCollator, TrainingTransform


_HINTS = {
    "train": "--do_train needs another --dataset_name, or --train_dir",
    "validation": "--do_eval needs --validation_dir, or --train_val_split 0.1, which cuts one from the training rows",
    "test": "--do_predict needs another --dataset_name, or --test_dir",
}


def load_image_data(
    args: ImageDataArguments,
    *,
    splits_needed: Iterable[str],
    seed: int,
    cache_dir: str | None = None,
    token: str | None = None,
    like: TaskData | None = None,
) -> TaskData:
    """Load the splits of a run. If there is no validation split, as in CIFAR, the test split is evaluated.

    Args:
        args: sources and columns of the images.
        splits_needed: some of `train`, `validation`, `test`.
        seed: seed of the split that `--train_val_split` takes from the training rows.
        cache_dir: folder for downloads.
        token: token for private Hub repositories.
        like: data with the same labels; then labels may be missing.

    Returns:
        the splits, their labels and columns.

    Raises:
        DataError: a source, split, column or label that is missing or does not fit, or an image that is corrupt.
    """
    source, splits = load_splits(args, cache_dir, token)
    needed, stream = list(splits_needed), "train" if args.streaming else None
    image_column = _image_column(args, next(iter(splits.values())), source)
    label_column = find_label_column(splits, args.label_column_name)
    cut = args.train_val_split is not None and "train" in splits and "validation" not in splits
    if not cut and "validation" in needed and "validation" not in splits and "test" in splits:
        splits["validation"] = splits["test"]
    check_splits(splits, [name for name in needed if not (cut and name == "validation")], _HINTS, source)
    for name in (image_column, label_column):
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
        splits = hold_all_but_train(splits, args.limits())
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
    held = {split: limit_rows(splits[split], args.limits()[split]) for split in needed if split != stream}
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


def _load_processor(name: str | None, args: ImageDataArguments, config: Any, **hub) -> Any:
    """The image processor of `--image_processor_name`, else the model's own, else a plain one, at the model's size."""
    size = config.image_size
    if args.image_processor_name not in (None, name):
        name, hub = args.image_processor_name, {**hub, "revision": None}  # which is the model's
    if name is None:
        from transformers import ViTImageProcessor  # without torchvision this import warns, in text runs too

        return ViTImageProcessor(size={"height": size, "width": size})
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **hub)
    except Exception as error:  # there is none, it is code of its own, or damaged
        raise DataError(
            f"{name} has no image processor ({in_one_line(error)}): give --image_processor_name."
        ) from error
    if getattr(processor, "do_center_crop", False):
        ratio = size / processor.crop_size["height"]
        processor.size = {side: round(ratio * pixels) for side, pixels in dict(processor.size).items() if pixels}
        processor.crop_size = {"height": size, "width": size}
    else:
        processor.size = {"height": size, "width": size}
    return processor


def _fit_model(model: Any, args: ImageDataArguments) -> None:
    """Change the model to the size of `--image_size`."""
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

__getattr__ = moved_names(__name__)
