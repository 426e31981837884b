"""csv files as people have them: read to the letter, or refused in a sentence that says what to do."""

import csv
import json

import datasets
import pandas as pd
import pytest
from PIL import Image

from een_hf.commands import main as commands_main
from een_hf.data import DataError, TextDataArguments, load_partition, load_text_data
from een_hf.data.image_arguments import ImageDataArguments
from een_hf.data.images import load_image_data
from een_hf.data.sources import load_files


@pytest.fixture
def load(tmp_path):
    def load(*splits, **flags):
        args = TextDataArguments(**{name: str(v) if hasattr(v, "suffix") else v for name, v in flags.items()})
        return load_text_data(args, splits_needed=splits or ["train"], seed=0, cache_dir=str(tmp_path / "cache"))

    return load


def write(path, content, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode(encoding))
    return path


def texts_of(data, split="train"):
    return data.splits[split]["text"][:]


HEADERS = [",text,label", ",Unnamed: 0,text,label", ",Unnamed: 0.1,Unnamed: 0,text,label", ",text,label,"]


@pytest.mark.parametrize("header", HEADERS)
def test_columns_without_a_name_are_read_as_by_pandas_and_are_no_text(load, tmp_path, header):
    """Breaks if a file that pandas wrote once or several times is refused, or its index is half of a pair of texts."""
    row = "".join({"text": "a", "label": "no"}.get(name, f"id-{name}") + "," for name in header.split(","))[:-1]
    path = write(tmp_path / "rows.csv", f"{header}\n{row}\n{row.replace('no', 'yes')}\n")
    found = load_files({"train": [str(path)]}, "rows", str(tmp_path / "cache"))["train"]
    assert found.column_names == list(pd.read_csv(path).columns)
    assert load(train_file=path).input_columns == ["text"]


WORDS = ["null", "NA", "None", "nan", "N/A", "NULL", "#N/A", "true", "-", "  padded  ", 'a "quoted" one', "two\nlines"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_words_for_nothing_are_text(load, tmp_path, monkeypatch, streaming, encoding):
    """Breaks if a text or a label that reads null or NA is taken for a gap, or a BOM for a part of a column's name."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    rows = [(word, ("NA", "US", "null")[row % 3]) for row, word in enumerate(WORDS)]
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    data = load("train", "validation", train_file=path, validation_file=path, streaming=streaming)
    assert data.label_names == ["NA", "US", "null"]
    found = [(row["text"], data.label_names[row["label"]]) for row in data.splits["train"]]
    assert sorted(found) == sorted(rows)


def test_csv_and_json_lines_are_the_same_rows(load, tmp_path):
    """Breaks if a format changes what a text is: numbers lose their zeros, long texts are cut, blank lines count."""
    texts = ["007", "1e5", "1.10", "null", "x" * 200_000, "é", "12"] * 3
    labels = [5, 1, 5, 1, 5, 1, 1] * 3
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *zip(texts, labels, strict=True)])
    path.write_text(path.read_text() + "\n\n")
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(texts, labels, strict=True)]
    others = load(train_file=write(tmp_path / "rows.jsonl", "\n".join(lines)))
    data = load(train_file=path)
    assert texts_of(data) == texts_of(others) == texts
    assert (data.label_names, data.splits["train"]["label"][:]) == (
        others.label_names,
        others.splits["train"]["label"][:],
    )
    numbers = write(tmp_path / "numbers.csv", "text,label\n12,a\n1.10,b\n0,a\n")
    assert texts_of(load(train_file=numbers, text_column_names="text")) == ["12", "1.10", "0"]


def test_a_column_is_of_one_type_to_its_end(load, tmp_path):
    """Breaks if ten thousand numbers make a column numeric, and the first word after them ends the run."""
    rows = [f"text {row},{row % 2}\n" for row in range(12_000)] + ["last,other\n"]
    data = load(train_file=write(tmp_path / "rows.csv", "text,label\n" + "".join(rows)))
    assert data.label_names == ["0", "1", "other"] and len(data.splits["train"]) == 12_001


@pytest.mark.parametrize(
    ("column", "names"),
    [
        (["1", "0", "1"], ["0", "1"]),
        (["true", "false", "true"], ["False", "True"]),
        (["01", "1", "02"], ["01", "02", "1"]),
        (["1.5", "2", "3e1"], None),
        (["99999999999999999999", "1", "1"], ["1", "99999999999999999999"]),
    ],
)
def test_types_of_labels(load, tmp_path, column, names):
    path = write(tmp_path / "rows.csv", "text,label\n" + "".join(f"a,{label}\n" for label in column))
    data = load(train_file=path)
    assert data.label_names == names
    wanted = [names.index(label.title()) for label in column] if names else [1.5, 2.0, 30.0]
    assert data.splits["train"]["label"][:] == wanted


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        ("text;label\na, b;1\n", "utf-8", "separated by semicolons.*'text;label'.*with commas.*sep=';'"),
        ("text\tlabel\na, b\t1\n", "utf-8", "separated by tabs.*with commas"),
        ("text|label\na|1\n", "utf-8", "separated by vertical bars"),
        ("text,label\nplain,1\ncafé,0\n", "latin-1", "line 3, is not UTF-8 .byte 0xe9.*iconv -f LATIN1"),
        ("text,label\na,1\n", "utf-16", "UTF-16.*iconv -f UTF-16"),
        ("text,label\n", "utf-8", r"a header \(text, label\) but no rows"),
        ("text,label", "utf-8", "but no rows"),
        ("", "utf-8", "is empty"),
        ("\0" * 4000, "utf-8", "is no text file"),
        ("text,label\na,1\n", "utf-16-le", "is no text file"),
        ("text,label\na,1\nb, c,0\n", "utf-8", "line 3, has 3 fields, but the header has 2.*double quotes"),
        ("text,label\na,1,\nb,0,\n", "utf-8", "line 2, has 3 fields, but the header has 2"),
        ("text,label\na,1\nb\n", "utf-8", "line 3, has 1 fields, but the header has 2"),
        ("text,text,label\na,b,1\n", "utf-8", "names the column 'text' twice"),
        ('text,label\n"a,1\nb,0\n', "utf-8", "line 3, has 1 fields"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_no_such_file_is_said_with_its_remedy(load, tmp_path, content, encoding, message, streaming):
    """Breaks if a file ends in a library's traceback, or is read with its columns moved by one."""
    path = write(tmp_path / "rows.csv", content, encoding)
    flags = {"validation_file": path, "train_file": path} if streaming else {"train_file": path}
    with pytest.raises(DataError, match=f"--(train|validation)_file .*rows.csv.*{message}"):
        load("train", **flags, streaming=streaming)


@pytest.mark.parametrize(
    ("content", "encoding", "message"),
    [
        ('{"text": "a", "label": 1}\n{"text": "é", "label": 0}\n', "latin-1", "line 2, is not UTF-8.*iconv -f LATIN1"),
        ('{"text": "a", "label": 1}\n', "utf-16", "UTF-16.*iconv"),
        ("", "utf-8", "is empty"),
        (" \n\n", "utf-8", "is empty"),
        ("\0" * 4000, "utf-8", "is no text file"),
        ("[]", "utf-8", "has no rows"),
        ('{"text": "a", "label": 1}\n{"text": "b", "label": "x"}\n', "utf-8", "mixes strings, numbers or lists"),
    ],
)
def test_json_is_said_the_same(load, tmp_path, content, encoding, message):
    with pytest.raises(DataError, match=f"--train_file .*rows.json.*{message}"):
        load(train_file=write(tmp_path / "rows.json", content, encoding))


def test_a_damaged_parquet_file_is_named_in_one_line(load, tmp_path):
    """What breaks: the reader's own message has several lines."""
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}).to_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + b"\x0f" * 32 + whole[-8:])
    with pytest.raises(DataError, match="--train_file .*rows.parquet cannot be read as parquet") as refused:
        load(train_file=path)
    assert "\n" not in str(refused.value)


def test_a_gap_is_no_label(load, tmp_path):
    with pytest.raises(DataError, match="no label in column 'label' of row 0"):
        load(train_file=write(tmp_path / "rows.csv", "text,label\na,\nb,0\n"))


# Empty texts


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_empty_texts_are_named_or_left_out(load, tmp_path, suffix, caplog):
    """Breaks if a row without text is trained on in one format and refused in the other."""
    rows = [("a", 1), ("", 0), ("b", 1), ("  ", 1), ("c", 0)]
    if suffix == "csv":
        content = "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)
    else:
        content = "".join(json.dumps({"text": text, "label": label}) + "\n" for text, label in rows)
    path = write(tmp_path / f"rows.{suffix}", content)
    with pytest.raises(DataError, match=r"no text in column 'text' of row 1 \(.*2 such rows of 5.*--skip_empty"):
        load(train_file=path)
    data = load("train", "test", train_file=path, test_file=path, skip_empty=True)
    assert texts_of(data) == ["a", "b", "c"] and data.splits["train"]["label"][:] == [1, 1, 0]
    assert data.row_ids("train").tolist() == [0, 2, 4]
    assert "2 of 5 rows have no text and are left out" in caplog.text
    # Every row that is to be predicted gets its answer.
    assert [text.strip() for text in texts_of(data, "test")] == ["a", "", "b", "", "c"]


def test_empty_texts_of_a_stream(load, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    path = write(tmp_path / "rows.csv", "sentence,label\na,1\n,0\nb,0\n")
    flags = {"train_file": path, "task_name": "sst2", "streaming": True}
    with pytest.raises(DataError, match="a row without text in column 'sentence'.*--skip_empty"):
        list(load(**flags).splits["train"])
    rows = load(**flags, skip_empty=True).splits["train"]
    assert sorted((row["sentence"], row["label"]) for row in rows) == [("a", 1), ("b", 0)]
    assert {"sentence", "label"} <= {*rows.column_names}


def test_a_file_of_one_column_has_an_empty_text_where_a_line_is_blank(load, tmp_path):
    """Breaks if a blank line is passed over, and all answers after it belong to another line."""
    path = write(tmp_path / "rows.csv", "sentence\na\n\nb\n")
    flags = {"test_file": path, "task_name": "sst2"}
    with pytest.raises(DataError, match="of row 1"):
        load("test", **flags)
    assert load("test", **flags, skip_empty=True).splits["test"]["sentence"][:] == ["a", "", "b"]


# Columns


def test_two_columns_of_text_are_no_pair_without_labels_beside_them(load, tmp_path):
    """Breaks if the label column of an unlabelled file is read as the second sentence."""
    path = write(tmp_path / "rows.csv", "Text,Category\na,x\nb,y\n")
    with pytest.raises(DataError, match="2 columns of text.*--text_column_names.*Text, Category"):
        load("test", test_file=path)
    pairs = write(tmp_path / "pairs.csv", "one,two,label\na,x,0\nb,y,1\n")
    assert load(train_file=pairs).input_columns == ["one", "two"]


# Paths


def test_a_path_is_a_path(load, tmp_path):
    """Breaks if a name with brackets or a star is a pattern, and the file beside it is read."""
    for name, other in (("train[1]", "train1"), ("a*", "ab"), ("q?", "qu"), ("[!x]", "y")):
        for suffix in ("csv", "jsonl"):
            for stem in (name, other):
                rows = [{"text": stem, "label": label} for label in ("one", "two")]
                lines = map(json.dumps, rows) if suffix == "jsonl" else ["text,label", f"{stem},one", f"{stem},two"]
                content = "\n".join(lines) + "\n"
                write(tmp_path / f"{stem}.{suffix}", content)
            path = tmp_path / f"{name}.{suffix}"
            assert texts_of(load(train_file=path)) == [name] * 2
            assert texts_of(load("train", "test", train_file=path, test_file=path), "test") == [name] * 2
        for stem in (name, other):
            folder = tmp_path / f"{stem} folder"
            folder.mkdir()
            rows = [{"text": stem, "label": label} for label in ("one", "two")]
            datasets.Dataset.from_list(rows).to_parquet(folder / "train-[0].parquet")
        assert texts_of(load(dataset_name=str(tmp_path / f"{name} folder"))) == [name] * 2
        words = [
            "partition",
            "--train_file",
            str(tmp_path / f"{name}.csv"),
            "--num_partitions",
            "1",
            "--scheme",
            "iid",
        ]
        out = tmp_path / f"{name} parts"
        commands_main([*words, "--output_dir", str(out), "--valid_fraction", "0", "--cache_dir", str(tmp_path / "c")])
        assert load_partition(out, 0)["train"]["text"][:] == [name] * 2
        assert texts_of(load(partition_dir=str(out), partition_id="0")) == [name] * 2


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_images_is_a_path(tmp_path, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    for grey, name in enumerate(("im[1]", "im1", "im*", "imx")):
        for kind in ("c[a]t", "dog"):
            path = tmp_path / name / kind / "0[1].png"
            path.parent.mkdir(parents=True)
            Image.new("L", (2, 2), grey).save(path)
    for grey, name in ((0, "im[1]"), (2, "im*")):
        folder = str(tmp_path / name)
        for flags in ({"train_dir": folder, "validation_dir": folder}, {"dataset_name": folder}):
            args = ImageDataArguments(**flags, streaming=streaming)
            needed = ["train", "validation"] if "train_dir" in flags else ["train"]
            if streaming and needed == ["train"]:
                continue
            data = load_image_data(args, splits_needed=needed, seed=0, cache_dir=str(tmp_path / "cache"))
            assert data.label_names == ["c[a]t", "dog"]
            rows = data.splits[needed[-1]]
            assert [image.getpixel((0, 0)) for image in rows["image"]] == [grey, grey]
