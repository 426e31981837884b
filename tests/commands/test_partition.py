"""`een-hf partition` from its flags to its files, and the recipe that calls it with 1,000 parts of CIFAR-100."""

import csv
import json
import runpy
import shutil
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

import een_hf
from een_hf.commands import main
from een_hf.data import load_digits, load_partition, partition_indices


REPOSITORY = Path(__file__).parents[2]


def partition(output_dir, **flags):
    """Run the command; a flag of None is left out, of True stands alone."""
    flags = {"dataset_name": "digits", "num_partitions": 8, "scheme": "dir", "output_dir": output_dir, **flags}
    words = ["partition"]
    for name, value in flags.items():
        words += [] if value is None else [f"--{name}"] if value is True else [f"--{name}", str(value)]
    main(words)


def pixels(rows, columns=("image", "label")):
    image, label = columns
    return [(row[image].tobytes(), row[label]) for row in rows]


@pytest.mark.parametrize("format", ["parquet", "npz"])
@pytest.mark.parametrize(
    "flags",
    [
        {"scheme": "dir", "alpha": 0.3, "balance": True},
        {"scheme": "dir", "min_size": 20},
        {"scheme": "pat", "classes_per_partition": 3},
        {"scheme": "iid", "balance": True},
    ],
    ids=lambda flags: "-".join(map(str, flags.values())),
)
def test_flags_reach_the_files(flags, format, tmp_path, capsys):
    """Breaks if a flag is not passed on, if test rows come in, or if a part's files are another part's."""
    partition(tmp_path / "out", **flags, format=format, valid_fraction=0.2, seed=9)
    train = load_digits()["train"]
    parts, shares = partition_indices(train["label"][:], 8, **{"min_size": 5, **flags}, seed=9)
    for number, part in enumerate(parts):
        loaded = load_partition(tmp_path / "out", number)
        num_valid = len(part) // 5
        assert pixels(loaded["validation"]) == pixels(train.select(part[:num_valid]))
        assert pixels(loaded["train"]) == pixels(train.select(part[num_valid:]))
    about = json.loads((tmp_path / "out" / "partition.json").read_text())
    assert about["seed"] == 9 and about["dataset_name"] == "digits"
    assert ("label_shares" in about) == (shares is not None)
    printed = capsys.readouterr().out
    assert f"rows per part: {min(map(len, parts))} to {max(map(len, parts))}" in printed
    assert f"--partition_dir {tmp_path / 'out'} --partition_id 0" in printed


def test_same_command_same_files(tmp_path):
    """Breaks if a second run, days later, is another partition."""
    for name in ("one", "two"):
        partition(tmp_path / name, scheme="pat", seed=1)
    files = [
        {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}
        for folder in (tmp_path / "one", tmp_path / "two")
    ]
    assert files[0] == files[1] and len(files[0]) == 16


def test_python_cuts_as_the_command_does(tmp_path):
    """Breaks if the function has other defaults than the command, or reads the rows themselves otherwise."""
    partition(tmp_path / "command", alpha=0.5)
    settings = {"num_partitions": 8, "scheme": "dir", "alpha": 0.5}
    named = een_hf.partition_dataset(dataset_name="digits", output_dir=tmp_path / "named", **settings)
    given = een_hf.partition_dataset(load_digits()["train"], output_dir=tmp_path / "given", **settings)
    about = (tmp_path / "command" / "partition.json").read_text()
    assert (tmp_path / "named" / "partition.json").read_text() == about
    assert named == json.loads(about)
    assert given["sha256"] == named["sha256"] and given["dataset_name"] is None


@pytest.fixture
def text_folder(tmp_path):
    """A folder with three splits, numbers and lists beside the label, and a config folder."""
    rows = {"text": list("abcdefghijkl"), "label": [0, 1] * 6, "score": [0.5] * 12, "tags": [[0, 1]] * 12}
    folder = tmp_path / "source" / "small"
    folder.mkdir(parents=True)
    for split in ("train", "validation", "test"):
        rows["text"] = [f"{split} {text}" for text in "abcdefghijkl"]
        datasets.Dataset.from_dict(rows).to_parquet(folder / f"{split}.parquet")
    return tmp_path / "source"


def test_only_the_train_split_is_cut(text_folder, tmp_path):
    """Breaks if validation or test rows of the source get into the parts."""
    flags = {"dataset_name": text_folder, "num_partitions": 3, "cache_dir": tmp_path / "cache"}
    for name, config in (("out", None), ("named", "small")):
        partition(tmp_path / name, **flags, dataset_config_name=config, scheme="iid")
        loaded = load_partition(tmp_path / name, "all")
        texts = [*loaded["train"]["text"], *loaded["validation"]["text"]]
        assert sorted(texts) == [f"train {text}" for text in "abcdefghijkl"]


@pytest.mark.parametrize("format", ["parquet", "npz"])
def test_a_csv_file(format, tmp_path):
    """Breaks if a row of a file is lost, doubled or relabelled."""
    rows = [(f"text, number {number}", "good" if number % 3 else "bad") for number in range(24)]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    flags = {"dataset_name": None, "train_file": tmp_path / "rows.csv", "cache_dir": tmp_path / "cache"}
    partition(tmp_path / "out", **flags, num_partitions=3, scheme="iid", balance=True, format=format)
    found = []
    for number in range(3):
        loaded = load_partition(tmp_path / "out", number)
        assert {split: len(part) for split, part in loaded.items()} == {"train": 6, "validation": 2}
        for part in loaded.values():
            found += zip(part["text"], part["label"], strict=True)
    assert sorted(found) == sorted(rows)
    assert json.loads((tmp_path / "out" / "partition.json").read_text())["train_file"] == str(tmp_path / "rows.csv")


@pytest.mark.parametrize("format", ["parquet", "npz"])
@pytest.mark.parametrize("flag", ["train_dir", "dataset_name"])
def test_a_folder_of_images(flag, format, tmp_path):
    """Breaks if an image gets into another class, or if parts still need the folder that they were cut from."""
    rng, wanted = np.random.default_rng(0), []
    for number in range(24):
        kind, image = ("cat", "dog")[number % 2], rng.integers(0, 256, (5, 4, 3), dtype=np.uint8)
        path = tmp_path / "images" / kind / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        wanted.append((image.tobytes(), kind))
    flags = {"dataset_name": None, flag: tmp_path / "images", "cache_dir": tmp_path / "cache"}
    settings = {"scheme": "pat", "classes_per_partition": 1, "balance": True, "format": format}
    partition(tmp_path / "out", **flags, **settings, num_partitions=2)
    shutil.rmtree(tmp_path / "images")
    found = []
    for number in range(2):
        loaded = load_partition(tmp_path / "out", number)
        names = loaded["train"].features["label"].names
        part = [(image, names[label]) for rows in loaded.values() for image, label in pixels(rows)]
        assert len({kind for _, kind in part}) == 1
        found += part
    assert sorted(found) == sorted(wanted)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"scheme": "iid", "alpha": 0.5}, "--alpha belongs to --scheme dir, not iid"),
        ({"classes_per_partition": 3}, "--classes_per_partition belongs to --scheme pat, not dir"),
        ({"valid_fraction": 1}, "--valid_fraction must be at least 0 and below 1"),
        ({"valid_fraction": -0.1}, "--valid_fraction must be at least 0 and below 1"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"min_size": 500}, "--min_size 500 cannot be reached: 1297 rows in 8 parts"),
        ({"num_partitions": 400}, "--min_size 4 cannot be reached: 1297 rows in 400 parts"),
        ({"label_column_name": "digit"}, "no column 'digit'.*image, label.*--label_column_name"),
        ({"label_column_name": "image"}, "column 'image'.*holds no labels"),
        ({"dataset_name": "./nowhere"}, r"--dataset_name \./nowhere: there is no such folder"),
        ({"dataset_name": "cifar10"}, "--dataset_name cifar10 cannot be loaded from the Hub"),
        ({"dataset_name": None}, "one of --dataset_name, --train_file and --train_dir, not by none"),
        ({"train_dir": "images"}, "not by --dataset_name and --train_dir"),
        ({"dataset_name": None, "train_dir": "images"}, "--train_dir images does not exist"),
        (
            {"dataset_name": None, "train_file": "rows.csv", "dataset_config_name": "plain"},
            "--dataset_config_name belongs to --dataset_name",
        ),
        ({"dataset_name": None, "train_file": "rows.csv"}, "--train_file rows.csv does not exist"),
        ({"dataset_name": None, "train_file": __file__}, "must end in one of: .csv, .json"),
        ({"format": "npz", "input_column_names": "pixels"}, "no column 'pixels'.*--input_column_names"),
    ],
)
def test_bad_flags_are_named_in_one_line(flags, named, tmp_path):
    """Breaks if a wrong flag ends in a traceback, or leaves files behind."""
    with pytest.raises(SystemExit, match=f"^error: .*{named}"):
        partition(tmp_path / "out", **flags)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("column", "named"), [("score", "column 'score'.*regression"), ("tags", "column 'tags'.*--label_column_name")]
)
def test_labels_that_are_no_classes(column, named, text_folder, tmp_path):
    """Breaks if numbers or lists are taken as classes."""
    flags = {"dataset_name": text_folder, "label_column_name": column, "cache_dir": tmp_path / "cache"}
    with pytest.raises(SystemExit, match=f"^error: .*{named}"):
        partition(tmp_path / "out", **flags)


def test_folders_without_a_train_split(text_folder, tmp_path):
    """Breaks if the user is not told which of several data sets, configuration or split is missing."""
    flags = {"dataset_name": text_folder, "cache_dir": tmp_path / "cache"}
    with pytest.raises(SystemExit, match="holds no parquet file.*large"):
        partition(tmp_path / "out", **flags, dataset_config_name="large")
    (text_folder / "small" / "train.parquet").unlink()
    with pytest.raises(SystemExit, match=r"no train split \(it has: test, validation\)"):
        partition(tmp_path / "out", **flags)
    (text_folder / "other").mkdir()
    (text_folder / "small" / "test.parquet").rename(text_folder / "other" / "test.parquet")
    with pytest.raises(SystemExit, match="several data sets.*other.*small.*give one"):
        partition(tmp_path / "out", **flags)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="empty holds no parquet file"):
        partition(tmp_path / "out", dataset_name=tmp_path / "empty")


def test_a_used_folder_is_refused_before_any_work(tmp_path):
    """Breaks if an old partition is overwritten, or if minutes pass before the error."""
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="^error: --output_dir .*not an empty folder"):
        partition(tmp_path, dataset_name="./nowhere")


@pytest.fixture
def run_recipe(tmp_path, monkeypatch):
    """The recipe, called in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["generate_cifar100.py", *map(str, words)])
        runpy.run_path(REPOSITORY / "recipes" / "generate_cifar100.py", run_name="__main__")

    return run


@pytest.mark.parametrize(
    ("words", "scheme", "balance", "folder"),
    [("noniid balance dir", "dir", True, "noniid"), ("noniid - pat", "pat", False, "noniid"),
     ("iid balance -", "iid", True, "iid")],
)  # fmt: skip
def test_the_original_call(words, scheme, balance, folder, run_recipe, tmp_path):
    """Breaks if the three words of the original experiments mean another partition, or if more flags are lost."""
    run_recipe(*words.split(), *"--dataset_name digits --num_partitions 9 --format npz".split())
    about = json.loads((tmp_path / "dataset" / f"cifar100_{folder}1000" / "partition.json").read_text())
    assert (about["scheme"], about["balance"], about["num_partitions"], about["format"]) == (scheme, balance, 9, "npz")


def test_the_original_call_with_other_words(run_recipe):
    """Breaks if words that mean nothing are taken for something."""
    for words in (
        ["noniid", "balance", "-"],
        ["iid", "balance", "dir"],
        ["dir"],
        ["all", "-", "-"],
        ["noniid", "equal", "dir"],
        ["noniid", "-", "x"],
    ):
        with pytest.raises(SystemExit, match=r"usage: generate_cifar100.py iid\|noniid balance\|- dir\|pat\|-"):
            run_recipe(*words)


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["noniid", "balance", "dir", "--help"]])
def test_the_original_call_tells_its_options(words, run_recipe, capsys):
    """Breaks if --help, alone or after the three words, is answered by an error instead of the options."""
    with pytest.raises(SystemExit) as end:
        run_recipe(*words)
    printed = capsys.readouterr().out
    assert end.value.code == 0
    for part in ("iid|noniid balance|- dir|pat|-", "1,000 parts", "--valid_fraction", "--dataset_name"):
        assert part in printed


@pytest.mark.slow
@pytest.mark.parametrize("format", ["parquet", "npz"])
def test_a_thousand_parts_of_cifar100(format, shared_dir, run_recipe, tmp_path):
    """Breaks if an image of CIFAR-100 is lost, doubled or relabelled, or a part is not of 50 images."""
    folder = tmp_path / "dataset" / "cifar100_noniid1000"
    flags = ["--dataset_name", shared_dir / "data" / "cifar100", "--format", format, "--cache_dir", tmp_path / "cache"]
    run_recipe("noniid", "balance", "dir", *flags)

    files = sorted(str(path) for path in (shared_dir / "data" / "cifar100" / "data").glob("train-*.parquet"))
    train = datasets.load_dataset("parquet", data_files=files, cache_dir=str(tmp_path / "cache"))["train"]
    assert len(train) == 50000
    parts, shares = partition_indices(train["fine_label"][:], 1000, "dir", alpha=0.1, balance=True, min_size=4)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(50000))
    about = json.loads((folder / "partition.json").read_text())
    assert {valid + train for valid, train in zip(*about["sizes"].values(), strict=True)} == {50}
    np.testing.assert_allclose(about["label_shares"], shares)
    assert about["label_names"] == train.features["fine_label"].names

    columns = ("img", "fine_label")
    loaded = load_partition(folder, "all")
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 38000, "validation": 12000}
    ours = Counter(pixels(loaded["train"], columns)) + Counter(pixels(loaded["validation"], columns))
    assert ours == Counter(pixels(train.select_columns(columns), columns))
    for number in (0, 517, 999):
        loaded = load_partition(folder, number)
        assert pixels(loaded["validation"], columns) == pixels(train.select(parts[number][:12]), columns)
        assert pixels(loaded["train"], columns) == pixels(train.select(parts[number][12:]), columns)
