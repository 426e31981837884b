"""A streamed training split gives the rows that a held one gives."""

import json
import logging
import re
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score
from transformers import AutoTokenizer

from een_hf.commands.train import main
from een_hf.data import DataError
from een_hf.data.image_arguments import ImageDataArguments
from een_hf.data.image_rows import ImageStream
from een_hf.data.images import IMAGES, load_image_data
from een_hf.data.samples import load_digits
from een_hf.data.text import TEXT, encode_text_data, load_text_data
from een_hf.data.text_arguments import TextDataArguments


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """`datasets` waits 5 seconds for its threads at the end of each shuffled pass."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)


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


@pytest.mark.parametrize("labels", [["bad", "good"], [0.5, 1.5]])
def test_the_same_model_inputs_as_held_ones(tmp_path, minilm_path, labels):
    """What breaks: a stream that has lost its columns on the way to the tokenizer."""
    files = {f"{split}_file": write_text(tmp_path / f"{split}.json", labels) for split in ("train", "validation")}
    tokenizer, found = AutoTokenizer.from_pretrained(minilm_path), []
    for streaming in (False, True):
        args = TextDataArguments(streaming=streaming, **files)
        rows = encode_text_data(load(streaming, **files), tokenizer, args)["train"]
        found.append(sorted((row["input_ids"], row["labels"]) for row in rows))
        assert set(next(iter(rows))) == {*tokenizer.model_input_names, "labels"}
    assert found[0] == found[1]


def test_a_text_that_is_missing(tmp_path, minilm_path):
    """What breaks: a row without text ends a run of days in the tokenizer's own traceback."""
    files = {f"{split}_file": write_text(tmp_path / f"{split}.json", ["a", "b"]) for split in ("train", "validation")}
    path = tmp_path / "train.json"
    path.write_text(path.read_text() + '\n{"sentence": null, "label": "a"}')
    args = TextDataArguments(streaming=True, **files)
    data = load_text_data(args, splits_needed=("train", "validation"), seed=1)
    rows = encode_text_data(data, AutoTokenizer.from_pretrained(minilm_path), args)["train"]
    with pytest.raises(DataError, match="a row without text in column 'sentence'"):
        list(rows)


def test_a_number_that_is_missing(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text("sentence,label\nfirst,0.5\nsecond,\n")
    with pytest.raises(DataError, match="row without a label in column 'label'"):
        list(load(True, ["train"], train_file=str(file)).splits["train"])


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


def write_named(folder, **names):
    """Two rows per split, of its first and its last label name."""
    for split, of_split in names.items():
        features = datasets.Features(
            {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=of_split)}
        )
        rows = {"sentence": ["one", "two"], "label": [0, len(of_split) - 1]}
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
    return {"dataset_name": str(folder)}


@pytest.mark.parametrize(("validation", "ids"), [(["good", "bad"], [1, 0]), (["bad", "ugly", "good"], [0, 1])])
def test_the_streams_own_label_names_number_all_splits(tmp_path, validation, ids):
    """What breaks: validation rows whose names are declared in another order are compared with the wrong classes."""
    data = load(True, **write_named(tmp_path, train=["bad", "good"], validation=validation))
    assert data.label_names == ["bad", "good"]
    assert [row["label"] for row in sorted(data.splits["train"], key=lambda row: row["sentence"])] == [0, 1]
    assert data.splits["validation"]["label"][:] == ids


def test_splits_that_do_not_pose_the_streams_problem(tmp_path):
    with pytest.raises(DataError, match="the label 'ugly'; the labels are: bad, good"):
        load(True, **write_named(tmp_path, train=["bad", "good"], validation=["bad", "ugly"]))
    files = {f"{split}_file": write_text(tmp_path / f"{split}.json", labels)
             for split, labels in (("train", [0.5, 1.5]), ("validation", [0, 1]))}  # fmt: skip
    with pytest.raises(DataError, match="means regression in split 'train', but single_label"):
        load(True, **files)
    with pytest.raises(DataError, match="one class only, 'bad'"):
        load(True, ["train"], **write_named(tmp_path, train=["bad"]))


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


@pytest.fixture
def spoilt_folder(tmp_path):
    """Two training files of five images each; the fourth is cut short in both. The validation images are whole."""
    whole = load_digits()["train"].select(range(10)).cast_column("image", datasets.Image(decode=False))
    rows = [
        {**row, "image": {"bytes": row["image"]["bytes"][: 40 if k % 5 == 3 else None], "path": f"{k}.png"}}
        for k, row in enumerate(whole)
    ]
    parts = {"train-0": rows[:5], "train-1": rows[5:], "validation": rows[:3]}
    for name, part in parts.items():
        datasets.Dataset.from_list(part, features=whole.features).to_parquet(tmp_path / f"{name}.parquet")
    return str(tmp_path)


def test_a_corrupt_image_in_a_stream(spoilt_folder):
    with pytest.raises(DataError, match=r"[38]\.png is corrupt.*--skip_corrupt"):
        list(image_rows(spoilt_folder, True)["train"])


@pytest.mark.parametrize("skip", [False, True])
def test_a_row_without_an_image_in_a_stream(skip):
    images = [load_digits()["train"][0]["image"], None]
    held = datasets.Dataset.from_dict(
        {"image": images, "label": [0, 1]},
        datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")}),
    )
    stream = held.cast_column("image", datasets.Image(decode=False)).to_iterable_dataset()
    rows = ImageStream(stream, "image", "label", None, lambda image: torch.zeros(1), skip, "here")
    if skip:
        assert len(list(rows)) == 1
    else:
        with pytest.raises(DataError, match="row 1 of the stream is corrupt .there is no image"):
            list(rows)


def test_a_corrupt_image_beside_a_stream(tmp_path):
    """What breaks: a file that is no image ends in an error of Pillow, with --skip_corrupt too."""
    for name in "ab":
        (tmp_path / name).mkdir()
        load_digits()["train"][0]["image"].save(tmp_path / name / "0.png")
    (tmp_path / "a" / "1.png").write_bytes(b"none")
    args = ImageDataArguments(train_dir=str(tmp_path), validation_dir=str(tmp_path), streaming=True)
    with pytest.raises(DataError, match=r"1 of 3 images are corrupt, the first is .*1\.png.*--skip_corrupt"):
        load_image_data(args, splits_needed=["validation"], seed=1)
    args.skip_corrupt = True
    assert len(load_image_data(args, splits_needed=["validation"], seed=1).splits["validation"]) == 2


def test_corrupt_images_of_a_stream_are_skipped_and_counted(spoilt_folder, caplog):
    """What breaks: half of a data set goes missing and nobody hears of it."""
    rows = image_rows(spoilt_folder, True, skip_corrupt=True)["train"]
    for _ in range(2):
        caplog.clear()
        assert len(list(rows)) == 8
        (record,) = caplog.records
        counted = r"split 'train': 2 of 10 images are corrupt and left out, the first is .*[38]\.png\.$"
        assert re.search(counted, record.getMessage())


def test_a_run_that_stops_within_a_pass_counts_too(spoilt_folder, caplog):
    rows = iter(image_rows(spoilt_folder, True, skip_corrupt=True)["train"])
    for _ in range(7):
        next(rows)
    rows.close()
    assert re.search(r"[12] of [89] images are corrupt", caplog.text)


def test_each_worker_counts_its_own(spoilt_folder, tmp_path):
    """What breaks: what a worker leaves out stays in its process, unsaid."""
    handler, logger = logging.FileHandler(tmp_path / "log"), logging.getLogger("een_hf.data.decoding")
    logger.addHandler(handler)
    try:
        rows = image_rows(spoilt_folder, True, skip_corrupt=True)["train"]
        assert len(list(torch.utils.data.DataLoader(rows, batch_size=None, num_workers=2))) == 8
    finally:
        logger.removeHandler(handler)
    lines = sorted((tmp_path / "log").read_text().splitlines())
    assert len(lines) == 2
    for number, line in enumerate(lines, 1):
        assert f"worker {number} of 2: 1 of 5 images are corrupt" in line


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


def test_each_worker_of_a_stream_draws_its_own(spoilt_folder):
    """What breaks: images at the same place of two files are augmented alike."""
    args = ImageDataArguments(dataset_name=spoilt_folder, auto_augment="rand-m9")
    rows = image_rows(spoilt_folder, True, skip_corrupt=True)["train"]
    rows = IMAGES.augment(rows, IMAGES.load_processor(None, args, IMAGES_CONFIG), args, IMAGES_CONFIG, 3)
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=2)
    assert len({tuple(row["draw"]) for row in loader}) == 8


# Through the script

SHAPE = "--config_overrides=hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32"
COMMON = ["--do_train", "--do_eval", "--use_cpu", "--streaming"]
TINY = ["--model_type=vit", f"{SHAPE},patch_size=4", "--image_size=8", *COMMON]


def write_table(path, rows):
    table = datasets.Dataset.from_list(rows)
    (table.to_csv if path.suffix == ".csv" else table.to_parquet)(path)


@pytest.mark.parametrize("source", ["csv", "parquet", "folder"])
@pytest.mark.parametrize("task", ["stsb", "sst2"])
def test_a_run_on_streamed_text(task, source, tmp_path, minilm_path, tokens_read):
    """What breaks: rows of a stream that are not trained on, or more than once in a pass, and labels that go astray.

    Ten steps of 8 rows are two passes over 40 rows.
    """
    numbers = np.random.default_rng(0).uniform(0, 5, 60).round(2).tolist()
    rows = [{"sentence": f"word {row}", "label": row % 2} for row in range(60)]
    if task == "stsb":
        rows = [{"sentence1": f"word {row}", "sentence2": "a", "label": numbers[row]} for row in range(60)]
    suffix = "csv" if source == "csv" else "parquet"
    flags = [f"--{split}_file={tmp_path / split}.{suffix}" for split in ("train", "validation")]
    write_table(tmp_path / f"train.{suffix}", rows[:40])
    write_table(tmp_path / f"validation.{suffix}", rows[40:])
    flags = [f"--dataset_name={tmp_path}"] if source == "folder" else flags
    flags += [f"--task_name={task}", "--model_type=bert", SHAPE, f"--tokenizer_name={minilm_path}", *COMMON]
    main(TEXT, [*flags, "--max_steps=10", f"--output_dir={tmp_path / 'run'}"])

    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    texts = [row.get("sentence") or f"{row['sentence1']} {row['sentence2']}" for row in rows]
    assert Counter(tokenizer.batch_decode(tokens_read, skip_special_tokens=True)) == Counter(2 * texts[:40])
    saved = np.load(tmp_path / "run" / "exit_logits.npz")
    results = json.loads((tmp_path / "run" / "exit_results.json").read_text())
    np.testing.assert_allclose(saved["labels"], [row["label"] for row in rows[40:]], rtol=1e-6)
    for k, row in enumerate(results["anytime"]):
        logits = saved["logits"][:, k]
        if task == "stsb":
            assert row["metrics"]["pearson"] == pytest.approx(pearsonr(logits[:, 0], saved["labels"])[0], abs=1e-6)
        else:
            assert row["metrics"]["accuracy"] == accuracy_score(saved["labels"], logits.argmax(-1))
    for name in ("model.safetensors", "exit_curves.png", "README.md"):
        assert (tmp_path / "run" / name).exists()


def test_a_run_on_a_stream_resumes_to_the_same_weights(tmp_path, caplog):
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
    caplog.clear()
    main(IMAGES, [*flags, f"--output_dir={tmp_path / 'cut'}"])
    assert f"Resuming from {tmp_path / 'cut' / 'checkpoint-5'}" in caplog.text
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--streaming needs --max_steps"),
        (["--max_steps=1", "--train_val_split=0.1"], "--train_val_split needs all training rows"),
        (["--max_steps=1", "--calibration_samples=5"], "--calibration_samples needs all training rows"),
    ],
)
def test_what_a_stream_cannot_do(tmp_path, flags, message):
    with pytest.raises(SystemExit, match=message):
        main(IMAGES, [*TINY, "--dataset_name=digits", *flags, f"--output_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
