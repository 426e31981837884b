"""Moved to `een_hf.data.images` and `een_hf.data.image_arguments`."""

from .._moved import moved_names


__getattr__ = moved_names(
    __name__,
    {
        "HUB_NAMES": "een_hf.data.sources",
        "IMAGES": "een_hf.data.images",
        "ImageDataArguments": "een_hf.data.image_arguments",
        "load_image_data": "een_hf.data.images",
    },
)
