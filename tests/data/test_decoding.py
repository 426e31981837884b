"""Every way from an image file to pixels gives the same pixels: those of a plain conversion, upright, in 8 bits."""

import base64
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from factory import tiny_model
from PIL import Image
from transformers import ViTImageProcessor

from een_hf.data import DataError, load_partition
from een_hf.data.decoding import standard_image
from een_hf.data.image_arguments import ImageDataArguments
from een_hf.data.images import IMAGES, load_image_data
from een_hf.data.partition import LabelledRows, write_partition
from een_hf.data.transforms import EvaluationTransform
from een_hf.hub import write_examples
from een_hf.inference.pipelines import EarlyExitImageClassificationPipeline
from een_hf.retrofitting import RetrofitArguments
from een_hf.retrofitting.rows import UnlabelledImages


RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
GREY = RNG.integers(0, 65536, (8, 8), dtype=np.uint16)
ALPHA = RNG.integers(0, 256, (8, 8, 1), dtype=np.uint8)
# Pillow's number of each orientation, and the picture that a viewer shows for the stored array.
UPRIGHT = {
    2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a),
}  # fmt: skip


def stack(grey):
    return np.repeat(grey[..., None], 3, axis=2)


def write_files(folder) -> dict[str, np.ndarray]:
    """One folder per file, so that its label names it; returns the RGB pixels that each must give."""
    wanted = {}

    def save(name, image, pixels, suffix="png", **options):
        (folder / name).mkdir(parents=True)
        image.save(folder / name / f"image.{suffix}", **options)
        wanted[name] = pixels

    for orientation, turn in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        save(f"exif{orientation}", Image.fromarray(COLOUR), turn(COLOUR), exif=exif)
    save("grey16", Image.fromarray(GREY), stack((GREY // 256).astype(np.uint8)))
    save("grey16_tiff", Image.fromarray(GREY), stack((GREY // 256).astype(np.uint8)), "tif")
    save("grey16_pgm", Image.fromarray(GREY), stack((GREY // 256).astype(np.uint8)), "pgm")
    save("grey", Image.fromarray(COLOUR[..., 0]), stack(COLOUR[..., 0]))
    save("bits", Image.fromarray(COLOUR[..., 0] > 127), stack((COLOUR[..., 0] > 127) * np.uint8(255)))
    save("rgba", Image.fromarray(np.concatenate([COLOUR, ALPHA], 2)), COLOUR)
    save("la", Image.fromarray(np.concatenate([COLOUR[..., :1], ALPHA], 2)), stack(COLOUR[..., 0]))
    palette = Image.fromarray(COLOUR[..., 0] // 64)
    palette.putpalette(COLOUR.reshape(-1)[:12].tolist())
    colours = COLOUR.reshape(-1)[:12].reshape(4, 3)[COLOUR[..., 0] // 64]
    save("palette", palette, colours)
    save("palette_clear", palette, colours, transparency=1)
    ink = np.concatenate([255 - COLOUR, np.zeros((8, 8, 1), np.uint8)], 2)
    save("cmyk", Image.frombytes("CMYK", (8, 8), ink.tobytes()), COLOUR, "tif")
    return wanted


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    return folder, write_files(folder)


@pytest.fixture(scope="module")
def model():
    return tiny_model("vit", num_hidden_layers=1, num_labels=len(UPRIGHT) + 10).eval()


def processor():
    return ViTImageProcessor(size={"height": 8, "width": 8})


def rows_of(folder, names):
    """Images as their own classes, and one class without any."""
    labels, names = list(range(len(names))), [*names, "none"]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    paths = [str(next((folder / name).iterdir())) for name in names[:-1]]
    rows = datasets.Dataset.from_dict({"image": paths, "label": labels}, features)
    return LabelledRows(rows, "label", np.array(labels), names)


def held_or_streamed(streaming, split="train"):
    def read(folder, names, model, tmp_path):
        args = ImageDataArguments(train_dir=str(folder), validation_dir=str(folder), streaming=streaming)
        data = load_image_data(args, splits_needed=["train", "validation"], seed=1, cache_dir=str(tmp_path))
        config = SimpleNamespace(label2id=None, num_channels=3)
        rows = IMAGES.encode_data(data, processor(), args, config)[split]
        return {data.label_names[row["labels"]]: row["pixel_values"] for row in rows}

    return read


def retrofit(folder, names, model, tmp_path):
    processor().save_pretrained(tmp_path / "model")
    args = RetrofitArguments(tmp_path / "model", train_dir=str(folder), output_dir=tmp_path / "cheaper")
    rows = UnlabelledImages(args, model.config)
    paths = [Path(image["path"]) for image in rows.images["image"]]
    return {path.parent.name: rows[number]["pixel_values"] for number, path in enumerate(paths)}


def parts(format):
    def read(folder, names, model, tmp_path):
        transform, found = EvaluationTransform(processor(), 3), {}
        grey = {name for name in names if name.startswith(("grey", "bits", "la"))}
        groups = [names] if format == "parquet" else [[*grey], ["rgba"], [*{*names} - grey - {"rgba"}]]
        for number, group in enumerate(groups):
            place, data = tmp_path / str(number), rows_of(folder, group)
            write_partition(data, [np.arange(len(group))], place, format=format, valid_fraction=0)
            args = ImageDataArguments(partition_dir=str(place), partition_id="0")
            data = load_image_data(args, splits_needed=["train"], seed=1)
            rows = IMAGES.encode_data(data, processor(), args, SimpleNamespace(label2id=None, num_channels=3))["train"]
            found |= {group[row["labels"]]: row["pixel_values"] for row in rows}
            for row in load_partition(place, 0)["train"]:
                assert torch.equal(transform(row["image"]), found[group[row["label"]]])
        return found

    return read


def pipeline(folder, names, model, tmp_path):
    classify = EarlyExitImageClassificationPipeline(
        model=model, image_processor=processor(), task="early-exit-image-classification"
    )
    paths = {name: next((folder / name).iterdir()) for name in names}
    found = {name: classify.preprocess(str(path))["pixel_values"][0] for name, path in paths.items()}
    for name, path in paths.items():
        encoded = base64.b64encode(path.read_bytes()).decode()
        for given in (Image.open(path), encoded, f"data:image/png;base64,{encoded}"):
            assert torch.equal(classify.preprocess(given)["pixel_values"][0], found[name])
    return found


PATHS = {
    "held": held_or_streamed(False), "streamed": held_or_streamed(True),
    "held beside a stream": held_or_streamed(True, "validation"), "retrofit": retrofit,
    "parquet parts": parts("parquet"), "npz parts": parts("npz"), "pipeline": pipeline,
}  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_every_path_gives_the_same_pixels(path, files, model, tmp_path, monkeypatch):
    """What breaks: training on pictures that lie on their side or are all white, and certifying other pixels than
    those that are served."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    folder, wanted = files
    found = PATHS[path](folder, list(wanted), model, tmp_path)
    assert found.keys() == wanted.keys()
    for name, pixels in wanted.items():
        expected = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1) / 127.5 - 1
        torch.testing.assert_close(found[name], expected, atol=1e-5, rtol=0, msg=f"{path}: {name}")


def test_examples_of_a_card_are_the_pixels_that_were_read(files, tmp_path):
    folder, wanted = files
    example = {"row": 0, "label": "one", "predictions": ["one"], "confidence": 1.0}
    for name in ("grey16", "exif6"):
        rows = rows_of(folder, [name]).rows
        place = write_examples(tmp_path, {"deep": [example]}, rows, ["image"], shared=True)
        assert (np.asarray(Image.open(place / "deep-1.png")) == wanted[name]).all()


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_pixels_of_an_unknown_kind_are_an_error(mode, tmp_path, model):
    """What breaks: measured values of any range are cut off at 255 and trained on."""
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new(mode, (8, 8)).save(tmp_path / name / "0.tif")
    args = ImageDataArguments(train_dir=str(tmp_path))
    message = f"2 of 2 images are corrupt, the first is .*0.tif .pixels of mode {mode}; 8-bit"
    with pytest.raises(DataError, match=message):
        load_image_data(args, splits_needed=["train"], seed=1, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=message):
        retrofit(tmp_path, None, model, tmp_path)
    with pytest.raises(DataError, match=f"row 0 .*mode {mode}"):
        write_partition(rows_of(tmp_path, ["a"]), [np.arange(1)], tmp_path / "out", format="npz")
    with pytest.raises(ValueError, match=f"mode {mode}"):
        pipeline(tmp_path, ["a"], model, tmp_path)


def test_standard_images_stay_as_they_are(files):
    """What breaks: a picture is turned twice, or a grey one scaled twice, where two paths meet."""
    for path in sorted(files[0].rglob("image.*")):
        once = standard_image(Image.open(path))
        again = standard_image(once)
        assert once.mode == again.mode and (np.asarray(once) == np.asarray(again)).all()
