"""Which rows a retrofit reads: named columns, empty texts, corrupt and grey images."""

import io
import json
import shutil
import zlib
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from factory import tiny_stock_model
from PIL import Image
from retrofitting.running import NUM_ROWS, weights, words_of
from transformers import (
    ViTForImageClassification,
    ViTImageProcessor,
)

import een_hf
from een_hf.commands import main
from een_hf.data import DataError
from een_hf.evaluation import load_exit_logits


@pytest.mark.parametrize("columns", ["Text,Category", "Text,Category,label"])
def test_two_columns_of_text_must_be_named(columns, sources, tmp_path, capsys):
    """Breaks if the labels of a file are read as second sentences, and agreement with that is certified."""
    folder, flag, path = sources["bert"]
    texts, extra = Path(path).read_text().splitlines()[1:], "".join(",0" for _ in columns.split(",")[2:])
    table = tmp_path / "own.csv"
    table.write_text(f"{columns}\n" + "".join(f"{text},a{extra}\n" for text in texts))
    message = "two columns of text, Text and Category, .*--text_column_names"
    if "label" not in columns:
        message = "2 columns of text.*--text_column_names"
    with pytest.raises(SystemExit, match=message):
        main(words_of((folder, flag, str(table)), tmp_path / "out"))
    assert not list(tmp_path.glob("out/*"))
    main(words_of((folder, flag, str(table)), tmp_path / "out", text_column_names="Text"))
    assert "Columns read: Text\n" in capsys.readouterr().out
    main(words_of(sources["bert"], tmp_path / "same"))
    assert "Columns read: text\n" in capsys.readouterr().out
    first, second = (load_exit_logits(tmp_path / name)["logits"] for name in ("out", "same"))
    np.testing.assert_array_equal(first, second)


def test_empty_texts_are_left_out(sources, tmp_path):
    folder, flag, path = sources["bert"]
    texts = Path(path).read_text().splitlines()[1:]
    table = tmp_path / "gaps.jsonl"
    table.write_text("".join(json.dumps({"text": text}) + "\n" for text in ["", *texts, " "]))
    with pytest.raises(SystemExit, match="2 such rows of 202.*--skip_empty"):
        main(words_of((folder, flag, str(table)), tmp_path / "out"))
    main(words_of((folder, flag, str(table)), tmp_path / "out", skip_empty=None))
    main(words_of(sources["bert"], tmp_path / "same"))
    first, second = (load_exit_logits(tmp_path / name)["logits"] for name in ("out", "same"))
    np.testing.assert_array_equal(first, second)


NO_ROWS = {
    "no rows": ([], "has no rows"),
    "numbers": ([1, 2], r"row 0 \(counted from 0\) is 1"),
    "NaN": (["a", float("nan")], "row 1 .* is nan"),
    "rows of a table": ([{"text": "a", "label": 0}], "row 0 .* is {'label': 0"),
    "sets": ([{"a", "b"}], "row 0"),
    "three texts": ([("a", "b"), ("a", "b", "c")], r"row 1 .* is \('a', 'b', 'c'\)"),
    "two letters among pairs": ([("a", "b"), "cd"], "row 1 .* is 'cd'"),
    "a pair among texts": (["a", ("a", "b")], "row 0 .* is 'a'"),
    "half a character": (["a", "b\ud800"], r"'b\\ud800' is not valid Unicode"),
    "a missing text": ([None, "a"], "no text in column 'text' of row 0"),
    "one text": ("some text", "it is a str"),
    "columns": ({"text": ["a"]}, "it is a dict"),
    "splits": (datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}), "it is a DatasetDict"),
    "a stream": (datasets.Dataset.from_dict({"text": ["a"]}).to_iterable_dataset(), "it is a IterableDataset"),
}


@pytest.mark.parametrize("rows, named", NO_ROWS.values(), ids=NO_ROWS)
def test_rows_that_are_no_texts_are_named(rows, named, sources, tmp_path):
    """What breaks: letters of a text, or names of columns, are read as pairs of texts; or a traceback of a library."""
    with pytest.raises(DataError, match=named):
        een_hf.retrofit(sources["bert"][0], rows, output_dir=tmp_path)


@pytest.mark.parametrize("make", [np.array, tuple, lambda texts: pd.Series(texts, index=range(5, 5 + len(texts)))])
def test_rows_may_be_an_array_or_a_column_of_a_table(make, sources, tmp_path):
    """What breaks: rows are asked for by the index of a table, which need not begin with 0."""
    with pytest.raises(DataError, match="3 rows are too few: .*at least 72 rows that certify, and at least 32"):
        een_hf.retrofit(sources["bert"][0], make(["a b", "c", "d"]), output_dir=tmp_path, max_risk=0.1)


@pytest.mark.parametrize("value, kind", [(["a"], "List"), ({"a": "b"}, "'a'")])
def test_columns_of_lists_are_no_texts(value, kind, sources, tmp_path):
    rows = datasets.Dataset.from_dict({"text": [value] * 9})
    with pytest.raises(DataError, match=f"column 'text' of type .*{kind}.* holds no texts"):
        een_hf.retrofit(sources["bert"][0], rows, output_dir=tmp_path, text_column_names=["text"])


def test_nothing_is_left_when_all_texts_are_empty(sources, tmp_path):
    with pytest.raises(DataError, match="no row with text in 'text'"):
        een_hf.retrofit(sources["bert"][0], ["", " "], output_dir=tmp_path, skip_empty=True)


def test_missing_images_are_named_or_skipped(sources, tmp_path, caplog):
    """What breaks: a row of a data set without an image ends in a TypeError."""
    images = [Image.fromarray(np.full((16, 16, 3), shade, np.uint8)) for shade in range(60)]
    rows = datasets.Dataset.from_dict({"image": [*images, None]}).cast_column("image", datasets.Image())
    with pytest.raises(DataError, match=r"row 60 \(counted from 0\) \(there is no image\)"):
        een_hf.retrofit(sources["vit"][0], rows, output_dir=tmp_path)
    with pytest.raises(DataError, match="60 rows are too few"):
        een_hf.retrofit(sources["vit"][0], rows, output_dir=tmp_path, skip_corrupt=True)


@pytest.fixture
def spoilt_images(sources, tmp_path):
    """The images, four of them spoilt: no image, cut short, with rubbish between two chunks of pixels, and empty."""
    folder, flag, path = sources["vit"]
    images = shutil.copytree(path, tmp_path / "images")
    whole = (images / "071.png").read_bytes()
    start = whole.index(b"IDAT") - 4
    half = int.from_bytes(whole[start : start + 4], "big") // 2
    chunk = b"IDAT" + whole[start + 8 : start + 8 + half]
    first = half.to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    rubbish = whole[:start] + first + bytes(16) + whole[start + 8 + half :]
    with pytest.raises(SyntaxError), Image.open(io.BytesIO(rubbish)) as image:
        image.load()
    for name, content in {"070": b"no image", "071": whole[: len(whole) // 2], "072": rubbish, "073": b""}.items():
        (images / f"{name}.png").write_bytes(content)
    return folder, flag, str(images)


def test_corrupt_images_are_named_before_any_work(spoilt_images, tmp_path):
    """Fails if one broken image of many ends an hour's work, or in a traceback."""
    with pytest.raises(SystemExit, match="4 of 200 images are corrupt, the first is .*070.png.*--skip_corrupt"):
        main(words_of(spoilt_images, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_corrupt_images_are_left_out_and_counted(spoilt_images, tmp_path, caplog):
    """Fails if a run without four images is not the run on a folder that never held them."""
    main(words_of(spoilt_images, tmp_path / "skipped", skip_corrupt=None))
    assert "4 of 200 images are corrupt and left out, the first is" in caplog.text
    for number in range(70, 74):
        (tmp_path / "images" / f"{number:03d}.png").unlink()
    main(words_of(spoilt_images, tmp_path / "whole"))
    assert weights(tmp_path / "skipped") == weights(tmp_path / "whole")
    record = json.loads((tmp_path / "skipped" / "retrofit.json").read_text())
    assert record["num_training_rows"] + record["num_calibration_rows"] == NUM_ROWS - 4


def test_a_model_of_grey_images_reads_grey(sources, tmp_path):
    """Fails if a model with one channel is given three."""
    tiny_stock_model("vit", image_size=16, patch_size=8, num_channels=1).save_pretrained(tmp_path / "grey")
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size=size, image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path / "grey")
    _, flag, path = sources["vit"]
    main(words_of((str(tmp_path / "grey"), flag, path), tmp_path / "out"))
    stock, saved = (
        ViTForImageClassification.from_pretrained(tmp_path / "grey").eval(),
        load_exit_logits(tmp_path / "out"),
    )
    for row, logits in zip(saved["row_ids"][:10], saved["logits"], strict=False):
        grey = np.asarray(Image.open(f"{path}/{row:03d}.png").convert("L"), dtype=np.float32)
        with torch.no_grad():
            wanted = stock(torch.from_numpy(grey / 127.5 - 1)[None, None]).logits[0]
        np.testing.assert_allclose(logits[-1], wanted, atol=1e-5)
