"""Pixels: what a row is, what chance draws, how batches are mixed, which images are refused."""

import random

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessor

from een_hf.data import DataError
from een_hf.data.decoding import whole_images
from een_hf.data.image_arguments import ImageDataArguments
from een_hf.data.image_rows import ImageRows
from een_hf.data.transforms import EvaluationTransform, ImageCollator, TrainingTransform, seeded


MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


@pytest.fixture(scope="module")
def processor():
    return ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=MEAN, image_std=STD)


@pytest.fixture(scope="module")
def photos():
    """12 noisy images as a data set."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    features = datasets.Features({"img": datasets.Image()})
    return datasets.Dataset.from_dict({"img": [Image.fromarray(image) for image in pixels]}, features), pixels


def augmentation(**flags):
    settings = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erase": 0.5} | flags
    return ImageDataArguments(dataset_name="digits", **settings)


def make_rows(photos, processor, seed=3, **flags):
    rows = ImageRows(photos[0], "img", np.arange(12) % 3, EvaluationTransform(processor, 3))
    return rows.augmented(TrainingTransform(processor, 3, 8, augmentation(**flags)), seed)


def test_evaluation_pixels_are_the_processors(photos, processor):
    """A model evaluated on other pixels than its processor gives at serving time shows a wrong accuracy."""
    rows = ImageRows(photos[0], "img", None, EvaluationTransform(processor, 3))
    for row, image in zip(rows, photos[1], strict=True):
        wanted = (image / 255 - MEAN) / STD
        np.testing.assert_allclose(row["pixel_values"].permute(1, 2, 0), wanted, atol=1e-5)
        assert set(row) == {"pixel_values"}


def test_without_chance_training_pixels_are_the_evaluations(photos, processor):
    """Another scale in training than in evaluation would cost accuracy in silence."""
    rows = make_rows(photos, processor, auto_augment=None, random_erase=0.0, hflip=0.0, min_crop=1.0)
    plain = EvaluationTransform(processor, 3)
    for row, image in zip(rows, photos[1], strict=True):
        whole = Image.fromarray(image)
        crop = row["pixel_values"] - plain(whole)
        # A crop of the whole area may still have another ratio of height to width; its mean stays near.
        assert crop.mean().abs() < 0.3


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
def test_pixels_depend_on_seed_epoch_and_row_alone(photos, processor, workers, persistent):
    """Else a resumed run, or one with another number of workers, trains on other pixels."""
    rows = make_rows(photos, processor)
    loader = DataLoader(rows, 4, num_workers=workers, persistent_workers=persistent, collate_fn=lambda rows: rows)
    seen = []
    for epoch in (0, 1):
        rows.set_epoch(epoch)
        torch.rand(epoch + 1), random.random(), np.random.rand()
        seen.append([row["pixel_values"] for batch in loader for row in batch])
    alone = make_rows(photos, processor)
    for epoch in (1, 0):
        alone.set_epoch(epoch)
        for index in reversed(range(12)):
            torch.testing.assert_close(alone[index]["pixel_values"], seen[epoch][index], rtol=0, atol=0)
    assert all(not torch.equal(first, second) for first, second in zip(*seen, strict=True))
    other = make_rows(photos, processor, seed=4)
    assert not torch.equal(other[0]["pixel_values"], seen[0][0])


@pytest.mark.parametrize(
    "operations", ["rand-m9-mstd0.5-inc1", "rand-m10-inc1", "rand-m0", "augmix-m5-w4", "original"]
)
def test_augmentation_never_fails(photos, processor, operations):
    """What breaks: one in some hundred images stops the training, as timm asks Pillow for what it refuses."""
    rows = make_rows(photos, processor, auto_augment=operations)
    for epoch in range(40):
        rows.set_epoch(epoch)
        for row in rows:
            assert row["pixel_values"].isfinite().all()


def test_drawing_leaves_the_global_generators_alone(photos, processor):
    """Dropout of a step must not depend on whether its images were drawn in this process."""
    rows = make_rows(photos, processor)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    rows[0]
    ImageCollator(mixup=0.2, num_labels=3)([rows[0], rows[1]])
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])


def test_the_global_generators_are_put_back_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded((1, 2)):
        torch.rand(1)
        raise RuntimeError
    assert torch.equal(torch.get_rng_state(), before)


def test_select_keeps_images_and_labels_together(photos, processor):
    rows = ImageRows(photos[0], "img", np.arange(12), EvaluationTransform(processor, 3))
    chosen = rows.select([5, 2])
    assert [row["labels"] for row in chosen] == [5, 2] == chosen["labels"].tolist()
    assert torch.equal(chosen[0]["pixel_values"], rows[5]["pixel_values"])
    drawn = make_rows(photos, processor).select([5, 2])  # whose draws repeat too
    assert torch.equal(drawn[0]["pixel_values"], drawn[0]["pixel_values"]) and "draw" in drawn[0]


# Mixing


def batch_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {"pixel_values": torch.rand(3, 8, 8, generator=generator), "labels": row % 3, "draw": (1, 0, row)}
        for row in range(count)
    ]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_mixup_is_the_papers_formula(count):
    """x = l x_i + (1 - l) x_j and y likewise, with one l in a batch; an odd last row stays."""
    rows = batch_of(count)
    mixed = ImageCollator(mixup=0.4, num_labels=3)(rows)
    pixels, labels = mixed["pixel_values"], mixed["labels"]
    assert labels.shape == (count, 3)
    torch.testing.assert_close(labels.sum(1), torch.ones(count))
    even = count // 2 * 2
    if even < count:
        assert torch.equal(pixels[-1], rows[-1]["pixel_values"])
        assert labels[-1].tolist() == [float(label == rows[-1]["labels"]) for label in range(3)]
    for i in range(even):
        j = even - 1 - i
        one, other = rows[i], rows[j]
        # The share follows from the pixels alone; the labels must agree with it.
        difference = (one["pixel_values"] - other["pixel_values"]).flatten()
        share = (pixels[i] - other["pixel_values"]).flatten() @ difference / difference.square().sum()
        wanted = share * one["pixel_values"] + (1 - share) * other["pixel_values"]
        torch.testing.assert_close(pixels[i], wanted, atol=1e-5, rtol=0)
        target = torch.zeros(3)
        target[one["labels"]] += share
        target[other["labels"]] += 1 - share
        torch.testing.assert_close(labels[i], target, atol=1e-4, rtol=0)


def test_cutmix_labels_are_the_pasted_areas():
    rows = batch_of(6)
    mixed = ImageCollator(cutmix=1.0, num_labels=3)(rows)
    for i, (pixels, label) in enumerate(zip(mixed["pixel_values"], mixed["labels"], strict=True)):
        kept = (pixels == rows[i]["pixel_values"]).all(0)
        pasted = (pixels == rows[5 - i]["pixel_values"]).all(0)
        assert (kept | pasted).all()
        target = torch.zeros(3)
        target[rows[i]["labels"]] += kept.float().mean()
        target[rows[5 - i]["labels"]] += 1 - kept.float().mean()
        torch.testing.assert_close(label, target, atol=1e-5, rtol=0)


def test_a_mix_depends_on_its_rows_alone():
    """A resumed run must mix as the uninterrupted one, whatever was drawn before."""
    collator = ImageCollator(mixup=0.4, cutmix=1.0, num_labels=3)
    first = collator(batch_of(4))
    np.random.rand(3)
    again = collator(batch_of(4))
    assert torch.equal(first["pixel_values"], again["pixel_values"]) and torch.equal(first["labels"], again["labels"])


def test_evaluation_rows_are_never_mixed(photos, processor):
    rows = ImageRows(photos[0], "img", np.arange(12) % 3, EvaluationTransform(processor, 3))
    batch = ImageCollator(mixup=1.0, cutmix=1.0, num_labels=3)([rows[0], rows[1]])
    assert batch["labels"].tolist() == [0, 1]
    assert torch.equal(batch["pixel_values"][0], rows[0]["pixel_values"])


# Corrupt images


@pytest.fixture
def spoilt_folder(tmp_path):
    for number in range(5):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"image{number}.png")
    whole = (tmp_path / "image1.png").read_bytes()
    (tmp_path / "image1.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "image3.png").write_bytes(b"no image")
    paths = [str(tmp_path / f"image{number}.png") for number in range(5)]
    return datasets.Dataset.from_dict({"image": paths}, datasets.Features({"image": datasets.Image()}))


def test_a_corrupt_image_is_named(spoilt_folder):
    with pytest.raises(DataError, match=r"2 of 5 images are corrupt, the first is .*image1\.png.*--skip_corrupt"):
        whole_images(spoilt_folder, "image", False, "here")


def test_corrupt_images_are_skipped_and_counted(spoilt_folder, caplog):
    rows = whole_images(spoilt_folder, "image", True, "here")
    assert [np.asarray(image)[0, 0, 0] for image in rows["image"]] == [0, 2, 4]
    assert "2 of 5 images are corrupt" in caplog.text
