"""The data flags of images."""

import math
import re
from dataclasses import dataclass, field

from .arguments import DataArguments
from .labels import LABEL_COLUMNS
from .task import DataError
from .transforms import timm_transform


@dataclass
class ImageDataArguments(DataArguments):
    """The data flags of images: sources, columns and augmentation."""

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
    test_dir: str | None = field(default=None, metadata={"help": "Images to predict; folders are not required."})
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column of the images. Default: the only column of images."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": f"Column of the labels. Default: the first of {', '.join(LABEL_COLUMNS)}."}
    )
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, if it is not the model's own: Hub name or folder."}
    )
    image_size: int | None = field(
        default=None,
        metadata={
            "help": "Height and width in pixels; position embeddings are resized once and saved. Default: the model's."
        },
    )
    skip_corrupt: bool = field(default=False, metadata={"help": "Skip images that cannot be decoded."})
    min_crop: float = field(
        default=0.5, metadata={"help": "Smallest share of the image that a random crop keeps; 1: no cropping."}
    )
    hflip: float = field(default=0.5, metadata={"help": "Probability of a horizontal flip."})
    auto_augment: str | None = field(
        default=None, metadata={"help": "timm's augmentation string, for example `rand-m9-mstd0.5-inc1`."}
    )
    mixup: float = field(default=0.0, metadata={"help": "Alpha of Mixup, which makes soft labels; 0: no Mixup."})
    cutmix: float = field(default=0.0, metadata={"help": "Alpha of CutMix, which makes soft labels; 0: no CutMix."})
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
