"""Decoding of image files to images in standard form, for data sets, partitions, requests and predictions alike."""

import io
import logging

import datasets
import numpy as np
from PIL import ExifTags, Image, ImageOps

from .task import DataError


logger = logging.getLogger(__name__)

_ORIENTATION = ExifTags.Base.Orientation

# The mode to which images are converted, by their own mode: for these Pillow's conversion to 8 bits is right.
_EIGHT_BIT_MODES = {
    **dict.fromkeys(("1", "L", "LA"), "L"),
    **dict.fromkeys(("P", "PA", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"), "RGB"),
    "RGBA": "RGBA",
}


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
    named = image_name(raw[row][column], f"row {row} (counted from 0)")
    count = f"{len(broken)} of {len(rows)}"
    if not skip:
        raise DataError(
            f"{where}: {count} images are corrupt, the first is {named} ({problem}). Repair or "
            "remove them, or give --skip_corrupt to skip them."
        )
    warn_of_skipped(where, len(broken), len(rows), named)
    return rows.select([row for row in range(len(rows)) if row not in broken])


def warn_of_skipped(where: str, num_broken: int, num_rows: int, first: str) -> None:
    text = "%s: %d of %d images are corrupt and left out, the first is %s."
    logger.warning(text, where, num_broken, num_rows, first)


def image_name(image: dict | None, place: str) -> str:
    """The path of an undecoded image of a data set, or its place if it has none, for messages."""
    return (image or {}).get("path") or place


def decode_image(image: dict | None) -> tuple[Image.Image | None, str]:
    """An undecoded image of a data set (`bytes`, `path`) as `standard_image` gives it, or what is wrong with it.

    The one way from a file to pixels: rows that are held or streamed, parts, `een-hf retrofit` and predictions all
    take it.
    """
    if image is None:
        return None, "there is no image"
    try:
        opened = Image.open(image["path"] if image["bytes"] is None else io.BytesIO(image["bytes"]))
        opened.load()
        return standard_image(opened), ""
    except Exception as error:  # Pillow's readers raise nearly anything on a broken file
        return None, str(error) or type(error).__name__


def standard_image(image: Image.Image) -> Image.Image:
    """Convert an image to standard form: upright by its EXIF orientation, in 8 bits, of mode `L`, `RGB` or `RGBA`.

    Of 16-bit grey images the high byte is taken, as Pillow does for 16-bit colour. An image in standard form is
    returned unchanged.

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


def color_mode(num_channels: int) -> str:
    """Pillow's mode for images with this number of channels."""
    return "L" if num_channels == 1 else "RGB"


def _find_problem(row: dict, column: str) -> dict[str, str]:
    return {"problem": decode_image(row[column])[1]}
