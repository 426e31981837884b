"""Images as model inputs: decoded, resized, augmented; every random draw is seeded by epoch and row."""

import contextlib
import io
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps

from ..extras import named_extras
from .task import DataError


logger = logging.getLogger(__name__)


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs) -> Image.Image:
    """timm's operation; at its full strength it asks to keep no bit at all, which Pillow refuses."""
    from timm.data import auto_augment

    return auto_augment.posterize(image, max(1, bits_to_keep), **kwargs)


def timm_transform(size: int, **settings) -> Callable[[Image.Image], torch.Tensor]:
    """timm's `create_transform` for training, with its operations as far as Pillow takes them."""
    with named_extras():
        from timm.data import auto_augment, create_transform

    auto_augment.NAME_TO_OP |= dict.fromkeys(("Posterize", "PosterizeIncreasing", "PosterizeOriginal"), _posterize)
    return create_transform(size, is_training=True, **settings)


_ORIENTATION = ExifTags.Base.Orientation
# What an image becomes before its pixels are read, by its mode: Pillow's own conversion to 8 bits is right for these.
_EIGHT_BIT_MODES = {
    **dict.fromkeys(("1", "L", "LA"), "L"),
    **dict.fromkeys(("P", "PA", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"), "RGB"),
    "RGBA": "RGBA",
}


class ImageRows(torch.utils.data.Dataset):
    """Labelled images as rows of `pixel_values` (channels, height, width) and `labels`.

    Args:
        rows: with images in `image_column`.
        image_column: decoded on access by `decode_image`.
        labels: class ids or numbers, (num_rows,); `None` without labels.
        transform: PIL image to tensor.
        seed: of a random `transform`; its draws depend on seed, epoch and row alone, so that neither workers nor a
            resumed run change a pixel. `None` for a transform without chance.
    """

    def __init__(self, rows, image_column: str, labels, transform: Callable, seed: int | None = None):
        self.rows = rows.cast_column(image_column, datasets.Image(decode=False))
        self.image_column, self.transform, self.seed = image_column, transform, seed
        self.labels = None if labels is None else np.asarray(labels)
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay alive see it change

    @property
    def column_names(self) -> list[str]:
        return ["pixel_values"] + ([] if self.labels is None else ["labels"])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | str) -> dict[str, Any] | np.ndarray:
        if index == "labels":
            return self.labels
        encoded = self.rows[int(index)][self.image_column]
        image, problem = decode_image(encoded)
        if problem:
            raise DataError(f"The image {encoded['path'] or f'of row {index}'} is corrupt ({problem}).")
        row = {} if self.labels is None else {"labels": self.labels[index].item()}
        if self.seed is None:
            return row | {"pixel_values": self.transform(image)}
        draw = (self.seed, int(self.epoch), int(index))
        with seeded(draw):
            return row | {"pixel_values": self.transform(image), "draw": draw}

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def select(self, indices: Sequence[int]) -> "ImageRows":
        """These rows only."""
        labels = None if self.labels is None else self.labels[indices]
        return ImageRows(self.rows.select(indices), self.image_column, labels, self.transform, self.seed)

    def augmented(self, transform: Callable, seed: int) -> "ImageRows":
        """The same rows under a random transform."""
        return ImageRows(self.rows, self.image_column, self.labels, transform, seed)


@contextlib.contextmanager
def seeded(entropy: Sequence[int]) -> Iterator[None]:
    """Run with Python's, NumPy's and torch's global generators seeded, and put them back as they were."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class EvaluationTransform:
    """An image as the checkpoint's own processor gives it, (channels, height, width)."""

    def __init__(self, processor, num_channels: int):
        self.processor, self.mode = processor, color_mode(num_channels)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.processor(standard_image(image).convert(self.mode), return_tensors="pt")["pixel_values"][0]


class TrainingTransform:
    """timm's training transforms at the processor's size, mean and deviation: crop, flip, augmentation, erasing."""

    def __init__(self, processor, num_channels: int, image_size: int, args):
        self.mode = color_mode(num_channels)
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
        self.transform = timm_transform(
            image_size,
            scale=(args.min_crop, 1.0),
            hflip=args.hflip,
            color_jitter=None,
            auto_augment=args.auto_augment,
            re_prob=args.random_erase,
            interpolation=_interpolation(processor.resample),
            mean=tuple(mean),
            std=tuple(std),
        )

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.transform(standard_image(image).convert(self.mode))


def color_mode(num_channels: int) -> str:
    """PIL's name for images of so many channels."""
    return "L" if num_channels == 1 else "RGB"


def _interpolation(resample: int) -> str:
    with named_extras():
        from timm.data.transforms import interp_mode_to_str
        from torchvision.transforms import InterpolationMode

    names = {Image.BILINEAR: InterpolationMode.BILINEAR, Image.BICUBIC: InterpolationMode.BICUBIC}
    return interp_mode_to_str(names.get(resample, InterpolationMode.BICUBIC))


class ImageCollator:
    """Stack rows; mix those that training draws by Mixup or CutMix, into soft labels (batch, num_labels).

    A mix is seeded by the batch's first row. An odd last row is left as it is.

    Args:
        mixup: alpha of Mixup, 0 for none.
        cutmix: alpha of CutMix, 0 for none; with both, each batch takes one of them.
        num_labels: number of classes.
    """

    def __init__(self, mixup: float = 0.0, cutmix: float = 0.0, num_labels: int = 0):
        self.num_labels = num_labels
        self.mix = None
        if mixup or cutmix:
            with named_extras():
                from timm.data import Mixup

            self.mix = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=num_labels)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        batch = {"pixel_values": torch.stack([row["pixel_values"] for row in rows])}
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        if self.mix is None or "draw" not in rows[0]:
            return batch
        pixels, labels = batch["pixel_values"], batch["labels"]
        soft = torch.nn.functional.one_hot(labels, self.num_labels).to(pixels.dtype)
        even = len(rows) // 2 * 2
        if even:
            with seeded((*rows[0]["draw"], 1)):
                # timm mixes the images in place.
                _, mixed = self.mix(pixels[:even], labels[:even])
            soft = torch.cat([mixed.to(soft), soft[even:]])
        return {"pixel_values": pixels, "labels": soft}


def whole_images(rows: datasets.Dataset, column: str, skip: bool, where: str) -> datasets.Dataset:
    """The rows whose image can be decoded.

    Raises:
        DataError: an image is corrupt, unless `skip`; the first is named.
    """
    raw = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    checked = raw.map(_find_problem, fn_kwargs={"column": column}, remove_columns=[column], desc="Checking images")
    broken = {row: problem for row, problem in enumerate(checked["problem"]) if problem}
    if not broken:
        return rows
    row, problem = next(iter(broken.items()))
    named = raw[row][column]["path"] or f"row {row} (counted from 0)"
    count = f"{len(broken)} of {len(rows)}"
    if not skip:
        raise DataError(
            f"{where}: {count} images are corrupt, the first is {named} ({problem}). Mend or "
            "remove them, or give --skip_corrupt to leave them out."
        )
    warn_of_skipped(where, len(broken), len(rows), named)
    return rows.select([row for row in range(len(rows)) if row not in broken])


def warn_of_skipped(where: str, num_broken: int, num_rows: int, first: str) -> None:
    text = "%s: %d of %d images are corrupt and left out, the first is %s."
    logger.warning(text, where, num_broken, num_rows, first)


def decode_image(image: dict) -> tuple[Image.Image | None, str]:
    """An undecoded image of a data set (`bytes`, `path`) as `standard_image` gives it, or what is wrong with it.

    The one way from a file to pixels: rows that are held or streamed, parts, `een-hf retrofit` and predictions all
    take it.
    """
    try:
        opened = Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))
        opened.load()
        return standard_image(opened), ""
    except Exception as error:  # Pillow's readers raise nearly anything on a broken file
        return None, str(error) or type(error).__name__


def standard_image(image: Image.Image) -> Image.Image:
    """The image upright, as its EXIF orientation says, in 8 bits: mode `L`, `RGB` or `RGBA`.

    Of 16-bit grey the high byte is taken, as Pillow does for 16-bit colour. An image in standard form comes back
    equal.

    Raises:
        ValueError: pixels of another kind, for example floating point.
    """
    image = ImageOps.exif_transpose(image) if image.getexif().get(_ORIENTATION, 1) != 1 else image
    # Pillow reads some 16-bit files into 32 bits.
    if image.mode.startswith("I;16") or image.mode == "I" and image.format in ("PNG", "PPM"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode not in _EIGHT_BIT_MODES:
        raise ValueError(f"pixels of mode {image.mode}; 8-bit grey or colour and 16-bit grey are understood")
    return image.convert(_EIGHT_BIT_MODES[image.mode])


def _find_problem(row: dict, column: str) -> dict[str, str]:
    return {"problem": decode_image(row[column])[1]}
