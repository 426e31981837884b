"""From images to model inputs: resized, augmented, stacked and mixed; every random draw is seeded."""

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from ..extras import named_extras
from .decoding import color_mode, standard_image


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


def _interpolation(resample: int) -> str:
    with named_extras():
        from timm.data.transforms import interp_mode_to_str
        from torchvision.transforms import InterpolationMode

    names = {Image.BILINEAR: InterpolationMode.BILINEAR, Image.BICUBIC: InterpolationMode.BICUBIC}
    return interp_mode_to_str(names.get(resample, InterpolationMode.BICUBIC))


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
