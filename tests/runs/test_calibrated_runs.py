"""Calibration within a run: which rows calibrate, what they certify, what is refused before training."""

import json
import re
import shutil
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from factory import make_trainer, tiny_config, tiny_processor, tiny_rows, tiny_stock_model
from text_runs import sentences, tiny, write_csv
from transformers import (
    AutoModelForSequenceClassification,
)

from een_hf.commands import main as command_main
from een_hf.commands.train import main
from een_hf.data import DataError
from een_hf.data.text import TEXT
from een_hf.data.text_arguments import TextDataArguments
from een_hf.evaluation import ExitCosts, relative_costs
from een_hf.models import ExitPolicy
from een_hf.runs import parse_arguments
from een_hf.runs.costs import RunCosts
from een_hf.runs.experiment import prepare
from een_hf.runs.results import split_for_calibration
from een_hf.runs.rows import _rows_of_file
from een_hf.training.arguments import CalibrationArguments


LEAKS = {
    "rows of the validation split": ({}, [], None),
    "best checkpoint": ({"load_best_model_at_end": True}, [], "the checkpoint"),
    "best checkpoint, other rows": ({"load_best_model_at_end": True}, ["--calibration_file=new"], None),
    "best checkpoint by the calibration file": (
        {"load_best_model_at_end": True},
        ["--calibration_file=validation"],
        "the checkpoint",
    ),
    "a file that was trained on": ({}, ["--calibration_file=train"], "the weights"),
    "rows that were trained on": ({}, ["--calibration_samples=60"], "the weights, for all that is known"),
    "rows that were held out": ({"calibration_samples": 60}, ["--calibration_samples=60"], None),
    "a checkpoint without a record": (None, ["--calibration_samples=60"], "the weights, for all that is known"),
}


@pytest.mark.parametrize("case", LEAKS)
def test_rows_that_chose_the_model_certify_nothing(case, finished, files, tmp_path, caplog):
    """A certificate from rows that the model was fitted to, here or in the run before, promises too much."""
    before, flags, reason = LEAKS[case]
    model, places = shutil.copytree(finished, tmp_path / "model"), {**files, "new": tmp_path / "new.csv"}
    write_csv(places["new"], 60, 7)
    flags = [f"{flag.split('=')[0]}={places.get(flag.split('=')[1], flag.split('=')[1])}" for flag in flags]
    record = json.loads((model / "_run_arguments.json").read_text())
    if before is None:
        (model / "_run_arguments.json").unlink()
    else:
        record["settings"] |= {**before, "test_file": None}
        (model / "_run_arguments.json").write_text(json.dumps(record))
    (model / "checkpoint-1").mkdir()
    for file in model.iterdir():
        if file.is_file() and file.name != "_run_arguments.json":
            file.rename(model / "checkpoint-1" / file.name)
    flags += [f"--train_file={files['train']}", f"--validation_file={files['validation']}", "--do_eval"]
    flags += [f"--model_name_or_path={model / 'checkpoint-1'}", "--max_risk=0.3", "--max_seq_length=16", "--use_cpu"]
    with caplog.at_level("WARNING"):
        main(TEXT, [*flags, f"--output_dir={tmp_path / 'out'}"])
    results = json.loads((tmp_path / "out" / "exit_results.json").read_text())
    assert results["calibration_rows_chose"] == reason
    assert ("There will be no guarantee for --max_risk" in caplog.text) == (reason is not None)
    if results["policy"] is not None and reason is not None:
        assert results["policy"]["guarantee"] is None
        assert reason in results["policy"]["calibrated_for"]["no_guarantee"]


@pytest.mark.parametrize(
    "case", ["best checkpoint", "a checkpoint without a record", "trained on the evaluation rows"]
)
def test_a_model_that_was_saved_on_the_way_is_no_cleaner(case, finished, files, tmp_path):
    """A run that only calibrates saves the model again: what its weights have seen must not be forgotten there."""
    model, flags = shutil.copytree(finished, tmp_path / "model"), [f"--train_file={files['train']}"]
    record = json.loads((model / "_run_arguments.json").read_text())
    validation, reason = files["validation"], "the checkpoint"
    if case == "best checkpoint":
        record["settings"]["load_best_model_at_end"] = True
        (model / "_run_arguments.json").write_text(json.dumps(record))
    elif case == "a checkpoint without a record":
        (model / "_run_arguments.json").unlink()
        flags, reason = [*flags, "--calibration_samples=60"], "the weights, for all that is known"
    else:
        validation, reason = files["train"], "the weights"
    flags += [f"--validation_file={validation}", "--do_eval", "--max_seq_length=16", "--use_cpu"]
    first, second = tmp_path / "first", tmp_path / "second"
    main(TEXT, [*flags, f"--model_name_or_path={model}", "--target_cost=0.8", f"--output_dir={first}"])
    main(TEXT, [*flags, f"--model_name_or_path={first}", "--max_risk=0.3", f"--output_dir={second}"])
    results = json.loads((second / "exit_results.json").read_text())
    assert results["calibration_rows_chose"] == reason
    assert results["policy"] is None or results["policy"]["guarantee"] is None


def test_what_cannot_be_calibrated_is_refused_before_training(files, minilm_path, tmp_path, caplog):
    train = [f"--train_file={files['train']}", "--do_train", "--do_eval", "--max_steps=1"]
    write_csv(tmp_path / "one.csv", 1, 3)
    (tmp_path / "gap.csv").write_text("text,label\na word,\nanother,good\n")
    validation = f"--validation_file={files['validation']}"
    cases = {
        "only one": [f"--validation_file={tmp_path / 'one.csv'}"],
        "--calibration_file .*gap.csv": [validation, f"--calibration_file={tmp_path / 'gap.csv'}"],
        "--measure_speed times a policy": [validation, "--measure_speed"],
    }
    for words, flags in cases.items():
        with pytest.raises(SystemExit, match=words):
            main(TEXT, tiny(minilm_path, *train, *flags, f"--output_dir={tmp_path / 'run'}"))
        assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="--model_name_or_path .*nowhere cannot be loaded"):
        nowhere = f"--model_name_or_path={tmp_path / 'nowhere'}"
        main(TEXT, [*train, validation, nowhere, f"--output_dir={tmp_path / 'run'}"])
    torn = tmp_path / "torn"
    tiny_stock_model().save_pretrained(torn)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(SystemExit, match="^error: --model_name_or_path .*torn cannot be loaded: .*cannot be read"):
        main(TEXT, [*train, validation, f"--model_name_or_path={torn}", f"--output_dir={tmp_path / 'run'}"])
    with caplog.at_level("WARNING"):
        main(TEXT, tiny(minilm_path, *train, validation, "--max_risk=0.001", f"--output_dir={tmp_path / 'few'}"))
    assert re.search("No early exit will be certified: .* at least [0-9]+ calibration rows", caplog.text)


def test_a_budget_may_be_time_on_this_machine(finished, files, tmp_path):
    """Measured once for the whole run: results, policy and predictions must tell of the same costs."""
    flags = [f"--model_name_or_path={finished}", "--do_eval", "--do_predict", "--cost=latency", "--max_seq_length=16"]
    flags += ["--latency_batch_size=2"]
    flags += [f"--validation_file={files['validation']}", f"--test_file={files['test']}", "--target_cost=100"]
    main(TEXT, [*flags, "--use_cpu", f"--output_dir={tmp_path}"])
    results = json.loads((tmp_path / "exit_results.json").read_text())
    costs = [row["relative_cost"] for row in results["anytime"]]
    counted = json.loads((finished / "exit_results.json").read_text())
    assert min(np.diff(costs)) > -1e-9 and costs != [row["relative_cost"] for row in counted["anytime"]]
    assert results["latency"]["batch_size"] == 2 and results["latency"]["milliseconds"] > 0
    policy = ExitPolicy.from_results(tmp_path / "exit_results.json")
    under_policy = ExitCosts(**results["exit_costs"]).of_policy(policy)
    assert results["policy"]["relative_cost"] == pytest.approx(results["policy"]["exit_fractions"] @ under_policy)
    lines = [json.loads(line) for line in (tmp_path / "predict_exits_dev.jsonl").read_text().splitlines()]
    assert all(line["relative_cost"] == under_policy[line["exit"] - 1] for line in lines)
    card = (tmp_path / "README.md").read_text()
    assert "Time up to and with the exit" in card and "at batch size 2, where the model" in card


def test_operations_are_counted_for_the_rows_they_are_spent_on(tmp_path):
    """What breaks: predictions of short texts state the costs of the long ones that were evaluated before."""
    trainer = make_trainer(tmp_path)
    costs = RunCosts(trainer, CalibrationArguments(), "single_label_classification")
    for length in (3, 12):
        wanted = relative_costs(trainer.model, sequence_length=length)
        assert costs.of(tiny_rows(count=2, length=length)) == wanted and costs.latency is None


def test_training_goes_on_without_the_policy_of_the_checkpoint(finished, files, tmp_path, caplog):
    """What breaks: a model that was trained further exits by thresholds that were chosen for other weights."""
    flags = [f"--model_name_or_path={finished}", f"--train_file={files['train']}", "--do_train", "--use_cpu"]
    flags += ["--max_seq_length=16", f"--output_dir={tmp_path / 'run'}"]
    with caplog.at_level("WARNING"):
        model = prepare(TEXT, parse_arguments(TEXT, flags)).loaded.model
    assert model.get_exit_policy() is None and "exit policy is reset" in caplog.text


def test_bf16_predictions_agree_with_what_the_exits_say(finished, files, tmp_path):
    """Calibrated under bfloat16, answered in float32: the two files of predictions would contradict each other."""
    model = AutoModelForSequenceClassification.from_pretrained(finished)
    scores = torch.from_numpy(np.load(finished / "exit_logits.npz")["logits"][:, 0]).softmax(-1).amax(-1)
    middle = (scores.min() + scores.max()).item() / 2  # some examples exit at exit 1, and some do not
    model.set_exit_policy({"criterion": "confidence", "thresholds": [middle, 0.0, 0.0]})
    model.save_pretrained(shutil.copytree(finished, tmp_path / "model"))
    flags = [f"--model_name_or_path={tmp_path / 'model'}", "--do_predict", "--bf16", "--use_cpu"]
    main(TEXT, [*flags, "--max_seq_length=16", f"--test_file={files['train']}", f"--output_dir={tmp_path}"])
    answers = [line.split("\t")[1] for line in (tmp_path / "predict_results_train.txt").read_text().splitlines()[1:]]
    exits = [json.loads(line) for line in (tmp_path / "predict_exits_train.jsonl").read_text().splitlines()]
    assert answers == [line["predictions"][line["exit"] - 1] for line in exits]
    assert len({line["exit"] for line in exits}) > 1


def test_a_run_of_several_labels_calibrates(minilm_path, tmp_path, capsys):
    """Such a model could never exit early; budgets, a policy and a certified share of labels come as for others."""
    kind = datasets.List(datasets.ClassLabel(names=["a", "b"]))
    features = datasets.Features({"text": datasets.Value("string"), "label": kind})
    for split, count in (("train", 40), ("validation", 400)):
        rows = {"text": [f"{split} {text}" for text in sentences(count, 1)[0]], "label": [[0, 1], [1], [], [0]]}
        rows["label"] *= count // 4
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}.parquet")
    flags = [f"--{split}_file={tmp_path / split}.parquet" for split in ("train", "validation")]
    flags += ["--do_train", "--do_eval", "--max_steps=1", f"--output_dir={tmp_path / 'run'}"]
    main(TEXT, tiny(minilm_path, *flags))
    assert f"een-hf calibrate {tmp_path / 'run'}" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "exit_results.json").read_text())
    assert {row["criterion"] for row in results["budgeted"]} == {"label_confidence"}
    command_main(["calibrate", str(tmp_path / "run"), "--max_risk", "0.2", "--risk", "hamming", "--save"])
    assert "on at most 0.2 of labels of new rows" in capsys.readouterr().out
    policy = json.loads((tmp_path / "run" / "config.json").read_text())["exit_policy"]
    assert policy["criterion"] == "label_confidence" and policy["guarantee"]["risk"] == "hamming"
    assert len(policy["temperatures"]) == 3


def test_unlabelled_rows_calibrate(files, minilm_path, tmp_path):
    """`--calibration_file` with texts alone: consistency needs no labels."""
    calibration = write_csv(tmp_path / "calibration.csv", 300, 5, labels=False)
    flags = [f"--train_file={files['train']}", f"--validation_file={files['validation']}", "--do_train", "--do_eval"]
    flags += [f"--calibration_file={calibration}", "--max_risk=0.05", "--risk=consistency", "--learning_rate=0.01"]
    main(TEXT, tiny(minilm_path, *flags, "--num_train_epochs=3", f"--output_dir={tmp_path / 'run'}"))
    results = json.loads((tmp_path / "run" / "exit_results.json").read_text())
    assert results["num_calibration_samples"] == 300
    saved = np.load(tmp_path / "run" / "exit_logits.npz")
    assert set(saved["part"]) == {"report"}


def test_calibration_rows_are_not_trained_on(files, minilm_path, tmp_path):
    flags = [f"--train_file={files['train']}", f"--validation_file={files['validation']}", "--do_train", "--do_eval"]
    words = tiny(minilm_path, *flags, "--calibration_samples=40", f"--output_dir={tmp_path}")
    rows = prepare(TEXT, parse_arguments(TEXT, words)).rows
    held, trained = len(rows.calibration), len(rows.splits["train"])
    assert (held, trained) == (40, 120)
    whole = prepare(TEXT, parse_arguments(TEXT, [w for w in words if not w.startswith("--calibration")])).rows
    every = sorted(map(str, whole.splits["train"]["input_ids"]))
    parts = [*rows.calibration["input_ids"], *rows.splits["train"]["input_ids"]]
    assert sorted(map(str, parts)) == every


def test_the_half_that_calibrates_has_half_of_every_class():
    """What breaks: by chance a rare class is calibrated without, or missing where results are reported."""
    labels = np.repeat([0, 1, 2], [40, 4, 2])
    for seed in range(5):
        calibrates = split_for_calibration(labels, "single_label_classification", seed)
        assert np.bincount(labels[calibrates]).tolist() == [20, 2, 1]
    assert split_for_calibration(labels / 2, "regression", 0).sum() == 23


def rows_of_file(folder, classes, name, content, **flags):
    """The calibration rows of a file, for a run that was trained on texts of these classes."""
    train, path = folder / "train.jsonl", folder / name
    train.write_text("".join(json.dumps({"text": "a", "label": label}) + "\n" for label in classes))
    if isinstance(content, str):
        path.write_text(content)
    else:
        pq.write_table(pa.table(content), path)
    args = TextDataArguments(train_file=str(train), **flags)
    data = TEXT.load_data(args, splits_needed=["train"], seed=0)
    names = data.label_names or ["LABEL_0"]
    config = tiny_config(id2label=dict(enumerate(names)), num_labels=len(names))
    loaded = SimpleNamespace(processor=tiny_processor(), model=SimpleNamespace(config=config))
    settings = SimpleNamespace(data=args, training=SimpleNamespace(seed=0))
    return _rows_of_file(str(path), TEXT, settings, data, loaded)


def test_whole_numbers_with_a_decimal_point_are_classes_where_the_run_has_classes(tmp_path):
    """What breaks: pandas writes a column with a gap as 0.0, which is then a number to learn; the run ends in an error
    after its training."""
    rows = rows_of_file(tmp_path, ["no", "yes"], "new.csv", "text,label\na,1.0\nb,0.0\n")
    assert rows["labels"] == [1, 0]
    rows = rows_of_file(tmp_path, [0.5, 1.5], "new.csv", "text,label\na,1\nb,0\n")
    assert rows["labels"] == [1.0, 0.0]


NOT_ROWS = {
    "fractions": ("new.csv", "text,label\na,0.5\n", "--calibration_file .*new.csv, .*label 0.5"),
    "another column": ("new.csv", "body,label\na,no\n", "has no column 'text'; its columns are: body, label"),
    "another ending": ("new.txt", "text,label\na,no\n", "^--calibration_file .*new.txt must end in"),
    "no rows": ("new.parquet", {"text": pa.array([], pa.string())}, "new.parquet has no rows"),
    "bytes": ("new.parquet", {"text": [b"\xff"], "label": ["no"]}, "column 'text' of type .*binary.* holds no texts"),
}


@pytest.mark.parametrize("name, content, named", NOT_ROWS.values(), ids=NOT_ROWS)
def test_files_that_do_not_fit_the_run_are_named(name, content, named, tmp_path):
    with pytest.raises(DataError, match=named):
        rows_of_file(tmp_path, ["no", "yes"], name, content)


def test_an_index_of_pandas_is_no_text(tmp_path):
    """What breaks: files that pandas writes by default are refused."""
    rows = rows_of_file(tmp_path, ["no", "yes"], "new.csv", ",text,label\n0,a,no\n1,b,yes\n")
    assert rows["labels"] == [0, 1]


def test_a_column_may_have_a_comma_in_its_name(tmp_path):
    """What breaks: the name is taken for two."""
    train = tmp_path / "train.csv"
    train.write_text('"a, b",label\na,no\nb,yes\n')
    args = TextDataArguments(train_file=str(train))
    data = TEXT.load_data(args, splits_needed=["train"], seed=0)
    loaded = SimpleNamespace(processor=tiny_processor(), model=SimpleNamespace(config=tiny_config(num_labels=2)))
    loaded.model.config.id2label, loaded.model.config.label2id = {0: "no", 1: "yes"}, {"no": 0, "yes": 1}
    settings = SimpleNamespace(data=args, training=SimpleNamespace(seed=0))
    assert len(_rows_of_file(str(train), TEXT, settings, data, loaded)) == 2


def test_columns_are_those_of_the_run(tmp_path, caplog):
    """What breaks: a model of single texts is calibrated on pairs, or labels of another column are passed over."""
    rows = rows_of_file(tmp_path, ["no", "yes"], "new.csv", "text,other,label\na,b b,no\n")
    assert len(rows[0]["input_ids"]) == 3 and "no label" not in caplog.text
    assert "labels" not in rows_of_file(tmp_path, ["no", "yes"], "new.csv", "text,category\na,no\n").column_names
    assert "new.csv: no label is read from the columns category" in caplog.text
