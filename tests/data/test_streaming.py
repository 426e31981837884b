"""A streamed training split gives the rows that a held one gives."""

import json

import datasets
import numpy as np
import pytest
import torch

from een_hf.data import DataError
from een_hf.data.cifar import IMAGES, ImageDataArguments, load_image_data
from een_hf.data.glue import TextDataArguments, load_text_data
from een_hf.data.samples import load_digits
from een_hf.training.experiment import main


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """`datasets` waits 5 seconds for its threads at the end of each shuffled pass."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


WORDS = [f"word{number}" for number in range(40)]


def write_text(path, labels, rows=40):
    lines = [{"sentence": WORDS[row], "label": labels[row % len(labels)]} for row in range(rows)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def load(streaming, needed=("train", "validation"), **flags):
    args = TextDataArguments(streaming=streaming, **flags)
    return load_text_data(args, splits_needed=needed, seed=1)


@pytest.mark.parametrize("labels", [["bad", "good"], [0, 1, 2], [0.5, 1.5]])
def test_the_same_rows_and_labels_as_held_ones(tmp_path, labels):
    """What breaks: a stream that numbers labels in the order in which they come."""
    files = {f"{split}_file": write_text(tmp_path / f"{split}.json", labels) for split in ("train", "validation")}
    held, streamed = load(False, **files), load(True, **files)
    assert (streamed.problem_type, streamed.label_names) == (held.problem_type, held.label_names)
    found = [(row["sentence"], row["label"]) for row in streamed.splits["train"]]
    wanted = [(row["sentence"], row["label"]) for row in held.splits["train"]]
    assert found != wanted, "not shuffled"
    assert sorted(found) == sorted(wanted)
    assert streamed.splits["validation"]["label"][:] == held.splits["validation"]["label"][:]


def test_each_epoch_has_its_own_order_and_a_limit_holds(tmp_path):
    file = write_text(tmp_path / "train.json", [0, 1])
    stream = load(True, ["train"], train_file=file, task_name="sst2", max_train_samples=10).splits["train"]
    orders = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        orders.append([row["sentence"] for row in stream])
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(WORDS[:10])


def test_labels_that_nothing_names(tmp_path):
    file = write_text(tmp_path / "train.json", ["bad", "good"])
    with pytest.raises(DataError, match="--streaming cannot know all labels.*--task_name"):
        load(True, ["train"], train_file=file)


def test_a_label_that_was_not_announced(tmp_path):
    train = write_text(tmp_path / "train.json", ["bad", "good", "ugly"])
    validation = write_text(tmp_path / "validation.json", ["bad", "good"])
    stream = load(True, train_file=train, validation_file=validation).splits["train"]
    with pytest.raises(DataError, match="'ugly'; the labels are: bad, good"):
        list(stream)


# Images


def write_digits(folder, count=30):
    rows = load_digits()["train"].select(range(count))
    for split in ("train", "validation"):
        rows.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def image_rows(folder, streaming, **flags):
    args = ImageDataArguments(dataset_name=folder, streaming=streaming, **flags)
    data = load_image_data(args, splits_needed=["train", "validation"], seed=1)
    config = IMAGES_CONFIG
    return IMAGES.encode_data(data, IMAGES.load_processor(None, args, config), args, config)


class IMAGES_CONFIG:
    image_size, num_channels = 8, 3
    label2id = {str(digit): digit for digit in range(10)}


def test_streamed_images_are_the_held_ones(tmp_path):
    folder = write_digits(tmp_path)
    held, streamed = image_rows(folder, False)["train"], image_rows(folder, True)["train"]

    def content(rows):
        return sorted((row["labels"], row["pixel_values"].numpy().tobytes()) for row in rows)

    assert content(streamed) == content(held)


def test_a_corrupt_image_in_a_stream(tmp_path):
    whole = load_digits()["train"].select(range(5)).cast_column("image", datasets.Image(decode=False))
    rows = [
        {**row, "image": {"bytes": row["image"]["bytes"][: 40 if k == 3 else None], "path": f"{k}.png"}}
        for k, row in enumerate(whole)
    ]
    for split in ("train", "validation"):
        part = rows if split == "train" else rows[:3]
        datasets.Dataset.from_list(part, features=whole.features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match=r"3\.png is corrupt.*--skip_corrupt"):
        list(image_rows(str(tmp_path), True)["train"])
    assert len(list(image_rows(str(tmp_path), True, skip_corrupt=True)["train"])) == 4


def test_random_transforms_of_a_stream_repeat(tmp_path):
    """What breaks: a resumed run sees other pixels."""
    folder = write_digits(tmp_path)
    args = ImageDataArguments(dataset_name=folder, auto_augment="rand-m9")
    rows = image_rows(folder, True)["train"]
    rows = IMAGES.augment(rows, IMAGES.load_processor(None, args, IMAGES_CONFIG), args, IMAGES_CONFIG, 3)
    seen = []
    for epoch in (0, 1, 0):
        rows.set_epoch(epoch)
        np.random.rand(3)
        seen.append(torch.stack([row["pixel_values"] for row in rows]))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])


# Through the script

TINY = [
    "--model_type=vit",
    "--config_overrides=hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32,patch_size=4",
    "--image_size=8",
    "--do_train",
    "--do_eval",
    "--use_cpu",
    "--streaming",
]


def test_a_run_on_a_stream_resumes_to_the_same_weights(tmp_path):
    """Nine steps of 8 rows out of 30: the stream starts over twice, before and after the interruption."""
    folder = write_digits(tmp_path)
    flags = [*TINY, f"--dataset_name={folder}", "--max_steps=9", "--save_strategy=steps", "--save_steps=5"]
    flags += ["--auto_augment=rand-m9", "--mixup=0.2"]
    main(IMAGES, [*flags, f"--output_dir={tmp_path / 'whole'}"])
    main(IMAGES, [*flags, f"--output_dir={tmp_path / 'cut'}"])
    (tmp_path / "cut" / "_run_arguments.json").write_text(
        (tmp_path / "cut" / "_run_arguments.json").read_text().replace('"finished": true', '"finished": false')
    )
    (tmp_path / "cut" / "checkpoint-9" / "trainer_state.json").unlink()
    main(IMAGES, [*flags, f"--output_dir={tmp_path / 'cut'}"])
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--streaming needs --max_steps"),
        (["--max_steps=1", "--train_val_split=0.1"], "--train_val_split cuts the training rows"),
        (["--max_steps=1", "--calibration_samples=5"], "--calibration_samples cuts the training rows"),
    ],
)
def test_what_a_stream_cannot_do(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        main(IMAGES, [*TINY, "--dataset_name=digits", *flags, f"--output_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
