"""run_glue_een.py as a user runs it: recipes, files, results and predictions; bad input before any work."""

import csv
import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from factory import tiny_stock_config, tiny_stock_model
from safetensors.torch import load_file, save_file
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForTokenClassification,
    GPT2Config,
)

from een_hf.commands import main as command_main
from een_hf.commands.train import main
from een_hf.data.glue import GLUE_TASKS
from een_hf.data.images import IMAGES
from een_hf.data.text import TEXT, load_text_data
from een_hf.evaluation import ExitCosts
from een_hf.models import ExitPolicy
from een_hf.runs import parse_arguments
from een_hf.runs.experiment import prepare
from een_hf.runs.model import load_model


ROOT = Path(__file__).parents[1]
SHAPE = "hidden_size=16,num_hidden_layers=3,num_attention_heads=2,intermediate_size=32"
ADJECTIVES = {"good": 1, "great": 1, "bad": 0, "poor": 0}


def tiny(tokenizer, *flags):
    return [
        "--model_type=bert",
        f"--config_overrides={SHAPE}",
        f"--tokenizer_name={tokenizer}",
        "--max_seq_length=16",
        "--use_cpu",
        "--disable_tqdm=True",
        *map(str, flags),
    ]


def sentences(count, seed):
    rng = np.random.default_rng(seed)
    words = rng.choice(list(ADJECTIVES), count)
    filler = rng.choice(["plot", "cast", "music"], count)
    return [f"the {noun} is {word}" for noun, word in zip(filler, words, strict=True)], [ADJECTIVES[w] for w in words]


def write_csv(path, count, seed, labels=True):
    texts, classes = sentences(count, seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"] if labels else ["text"])
        writer.writerows(zip(texts, (["bad", "good"][c] for c in classes), strict=True) if labels else zip(texts))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    return {
        "train": write_csv(folder / "train.csv", 160, 1),
        "validation": write_csv(folder / "dev.csv", 60, 2),
        "test": write_csv(folder / "new.csv", 20, 3, labels=False),
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory, files, minilm_path):
    folder = tmp_path_factory.mktemp("whole") / "run"
    flags = [f"--{split}_file={path}" for split, path in files.items()]
    flags += ["--do_train", "--do_eval", "--do_predict", "--target_cost=0.8", "--learning_rate=0.01"]
    flags += ["--num_train_epochs=3", "--eval_strategy=epoch", f"--output_dir={folder}"]
    main(TEXT, tiny(minilm_path, *flags))
    return folder


def test_results_follow_the_schema(finished):
    results = json.loads((finished / "exit_results.json").read_text())
    keys = "schema_version method model_type dataset task_name metric exit_layers num_eval_samples "
    keys += "num_calibration_samples anytime anytime_report budgeted policy"
    assert set(keys.split()) <= set(results)
    assert (results["method"], results["model_type"], results["metric"]) == ("joint", "bert", "accuracy")
    assert results["exit_layers"] == [1, 2, 3]
    assert set(results["anytime"][0]) == {"exit", "layer", "relative_cost", "loss", "metrics", "ece"}
    assert {"target_cost", "relative_cost", "metrics", "thresholds", "exit_fractions"} <= set(results["budgeted"][0])
    assert results["policy"]["calibrated_for"]["target_cost"] == 0.8
    for name in ("exit_logits.npz", "exit_curves.png", "training_curves.png", "config.json", "tokenizer.json"):
        assert (finished / name).exists()


def test_metrics_at_every_exit_are_scikit_learns(finished):
    results = json.loads((finished / "exit_results.json").read_text())
    saved = np.load(finished / "exit_logits.npz")
    for k, row in enumerate(results["anytime"]):
        assert row["metrics"]["accuracy"] == accuracy_score(saved["labels"], saved["logits"][:, k].argmax(-1))
        loss = torch.nn.functional.cross_entropy(
            torch.tensor(saved["logits"][:, k]).double(), torch.tensor(saved["labels"])
        )
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)
    evaluated = json.loads((finished / "all_results.json").read_text())
    assert evaluated["eval_exit1_accuracy"] == results["anytime"][0]["metrics"]["accuracy"]
    assert evaluated["eval_accuracy"] == results["anytime"][-1]["metrics"]["accuracy"]


def test_predictions_are_those_of_the_saved_model(finished, files):
    """Files, config and weights in the folder belong together: the model alone repeats the predictions."""
    model = AutoModelForSequenceClassification.from_pretrained(finished).eval()
    tokenizer = AutoTokenizer.from_pretrained(finished)
    with files["test"].open() as file:
        texts = [row["text"] for row in csv.DictReader(file)]
    answers = [line.split("\t") for line in (finished / "predict_results_train.txt").read_text().splitlines()]
    exits = [json.loads(line) for line in (finished / "predict_exits_train.jsonl").read_text().splitlines()]
    assert answers[0] == ["index", "prediction"] and len(answers) == 21
    costs = [row["relative_cost"] for row in json.loads((finished / "exit_results.json").read_text())["anytime"]]
    for text, (_, answer), line in zip(texts, answers[1:], exits, strict=True):
        with torch.inference_mode():
            inputs = tokenizer(text, return_tensors="pt")
            output, every = model(**inputs), model(**inputs, early_exit=False).exit_logits[0]
        names = [model.config.id2label[label] for label in every.argmax(-1).tolist()]
        assert line["predictions"] == names
        assert line["exit"] == int(output.exit_index) + 1
        assert line["relative_cost"] == pytest.approx(costs[line["exit"] - 1], rel=0.05)
        assert answer == names[line["exit"] - 1]
        policy = model.config.exit_policy
        temperature = (policy["temperatures"] or policy["confidence_temperatures"])[line["exit"] - 1]
        probability = (output.logits[0].double() / temperature).softmax(-1).max()
        assert line["confidence"] == pytest.approx(float(probability), abs=1e-4)


def evaluate(model, out, **files):
    flags = [f"--{split}_file={path}" for split, path in files.items()]
    flags += ["--do_eval"] if "validation" in files else ["--do_predict"]
    main(TEXT, [f"--model_name_or_path={model}", *flags, "--max_seq_length=16", "--use_cpu", f"--output_dir={out}"])


def test_a_checkpoint_predicts_rows_without_labels(finished, files, tmp_path):
    """What breaks: the labels of one's own model are not known to it, and a file of texts alone is refused."""
    evaluate(finished, tmp_path / "out", test=files["test"])
    lines = [
        (tmp_path / "out" / "predict_exits_new.jsonl").read_text(),
        (finished / "predict_exits_train.jsonl").read_text(),
    ]
    found, wanted = ([json.loads(line)["predictions"] for line in text.splitlines()] for text in lines)
    assert found == wanted and {name for row in found for name in row} <= {"bad", "good"}


@pytest.mark.parametrize(("name", "label"), [("good", "good"), ("number", 1), ("case", "GOOD")])
def test_a_file_of_one_of_the_checkpoints_classes_is_evaluated(name, label, finished, files, tmp_path):
    """What breaks: rows of some classes are refused, with the advice to give up the head, or graded as class 0."""
    with files["validation"].open() as file:
        texts = [row["text"] for row in csv.DictReader(file) if row["label"] == "good"]
    path = tmp_path / f"{name}.jsonl"
    path.write_text("".join(json.dumps({"text": text, "label": label}) + "\n" for text in texts))
    evaluate(finished, tmp_path / "out", validation=path)
    saved = np.load(tmp_path / "out" / "exit_logits.npz")
    assert saved["labels"].tolist() == [1] * len(texts)
    row = json.loads((tmp_path / "out" / "exit_results.json").read_text())["anytime"][-1]
    assert row["metrics"]["accuracy"] == (saved["logits"][:, -1].argmax(-1) == 1).mean()


def test_examples_of_the_card_show_calibrated_confidence(finished):
    saved = np.load(finished / "exit_logits.npz")
    policy = json.loads((finished / "config.json").read_text())["exit_policy"]
    temperature = (policy["temperatures"] or policy["confidence_temperatures"])[0]
    examples = json.loads((finished / "_examples" / "examples.json").read_text())
    shown = [example for kind in examples.values() for example in kind]
    assert shown
    for example in shown:
        powers = np.exp(saved["logits"][example["row"], 0].astype(np.float64) / temperature)
        assert example["confidence"] == pytest.approx(powers.max() / powers.sum(), abs=1e-5)


def test_a_finished_run_and_another_runs_folder_are_refused(finished, files, minilm_path):
    flags = [f"--{split}_file={path}" for split, path in files.items()]
    flags += ["--do_train", "--do_eval", "--do_predict", "--target_cost=0.8", "--learning_rate=0.01"]
    flags += ["--num_train_epochs=3", "--eval_strategy=epoch", f"--output_dir={finished}"]
    with pytest.raises(SystemExit, match="holds a finished run"):
        main(TEXT, tiny(minilm_path, *flags))
    with pytest.raises(SystemExit, match="--seed was 42, is 7"):
        main(TEXT, tiny(minilm_path, *flags, "--seed=7"))


def test_a_second_run_into_a_folder_is_told_of_the_first(files, minilm_path, tmp_path):
    """Two runs at a time would each resume from, and delete, the other's checkpoints."""
    flags = tiny(minilm_path, f"--train_file={files['train']}", "--do_train", "--max_steps=1", "--report_to=none")
    flags.append(f"--output_dir={tmp_path / 'out'}")
    told = []

    def encode_while_another_starts(*args):
        with pytest.raises(SystemExit) as error:
            main(TEXT, flags)
        told.append(str(error.value))
        return TEXT.encode_data(*args)

    main(dataclasses.replace(TEXT, encode_data=encode_while_another_starts), flags)
    assert len(told) == 1 and "another run is writing there" in told[0] and str(tmp_path / "out") in told[0]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_evaluating_a_finished_model_again_gives_its_figures(finished, files, tmp_path):
    """A new process on the saved folder: same metrics, and the policy in the config is kept."""
    command = [sys.executable, str(ROOT / "run_glue_een.py"), f"--model_name_or_path={finished}", "--do_eval"]
    command += [f"--validation_file={files['validation']}", "--max_seq_length=16", "--use_cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, f"--output_dir={tmp_path}"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    before, after = (json.loads((folder / "exit_results.json").read_text()) for folder in (finished, tmp_path))
    assert [row["metrics"] for row in after["anytime"]] == [row["metrics"] for row in before["anytime"]]
    assert json.loads((finished / "config.json").read_text())["exit_policy"] is not None


@pytest.mark.parametrize("blocks", [100, pytest.param(2, marks=pytest.mark.slow)], ids=["weights", "results"])
def test_a_full_disk_is_told_in_one_line(blocks, finished, files, minilm_path, tmp_path):
    """After training, outside checkpoints: a traceback of safetensors or NumPy would not say what to do."""
    flags = [f"--validation_file={files['validation']}", "--do_eval", f"--output_dir={tmp_path / 'run'}"]
    if blocks == 100:
        flags += [f"--train_file={files['train']}", "--do_train", "--max_steps=1", "--save_strategy=no"]
        words = tiny(minilm_path, *flags)
    else:
        words = [f"--model_name_or_path={finished}", *flags, "--use_cpu", "--max_seq_length=16"]
    command = shlex.join([sys.executable, str(ROOT / "run_glue_een.py"), *words, "--report_to=none"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    limited = ["bash", "-c", f"ulimit -f {blocks}; exec {command}"]
    done = subprocess.run(limited, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "error: a file could not be written" in done.stderr and "make room" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_boosted_model_is_evaluated_as_one(files, minilm_path, tmp_path):
    """Without --method an evaluation must not take the boosting away: its exits would answer something else."""
    trained, again = tmp_path / "trained", tmp_path / "again"
    flags = [f"--validation_file={files['validation']}", "--do_eval", "--target_cost=0.8"]
    main(
        TEXT,
        tiny(
            minilm_path,
            *flags,
            f"--train_file={files['train']}",
            "--do_train",
            "--method=boosted",
            "--boost_temperature=1.0",
            "--learning_rate=0.01",
            f"--output_dir={trained}",
        ),
    )
    evaluate = [f"--model_name_or_path={trained}", *flags, "--max_seq_length=16", "--use_cpu", f"--output_dir={again}"]
    main(TEXT, evaluate)
    before, after = (json.loads((folder / "exit_results.json").read_text()) for folder in (trained, again))
    assert [row["loss"] for row in after["anytime"]] == pytest.approx([row["loss"] for row in before["anytime"]])
    config = json.loads((again / "config.json").read_text())
    assert (config["exit_aggregation"], config["boost_temperature"]) == ("boosted", 1.0)


def test_the_scheme_of_a_checkpoint_is_told_from_the_checkpoint(finished, files, tmp_path):
    """An evaluation that names no --method, or another, must not write that it trained the exits."""
    copy = shutil.copytree(finished, tmp_path / "model")
    config = json.loads((copy / "config.json").read_text())
    assert config["training_scheme"] == "joint"
    (copy / "config.json").write_text(json.dumps({**config, "training_scheme": "l2w"}))
    flags = [f"--model_name_or_path={copy}", f"--validation_file={files['validation']}", "--do_eval", "--use_cpu"]
    main(TEXT, [*flags, "--max_seq_length=16", f"--output_dir={tmp_path / 'again'}"])
    assert json.loads((tmp_path / "again" / "exit_results.json").read_text())["method"] == "l2w"
    assert "Learning to Weight Samples" in (tmp_path / "again" / "README.md").read_text()


# Rows that have chosen something certify nothing

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
    assert ("No guarantee will go with --max_risk" in caplog.text) == (reason is not None)
    if results["policy"] is not None and reason is not None:
        assert results["policy"]["guarantee"] is None
        assert reason in results["policy"]["calibrated_for"]["no_guarantee"]


@pytest.mark.parametrize(
    "case", ["best checkpoint", "a checkpoint without a record", "trained on the evaluation rows"]
)
def test_a_model_that_was_saved_on_the_way_is_no_cleaner(case, finished, files, tmp_path):
    """A run that only calibrates saves the model anew: what its weights have seen must not be forgotten there."""
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
    with pytest.raises(SystemExit, match="^error: --model_name_or_path .*torn cannot be loaded: SafetensorError"):
        main(TEXT, [*train, validation, f"--model_name_or_path={torn}", f"--output_dir={tmp_path / 'run'}"])
    with caplog.at_level("WARNING"):
        main(TEXT, tiny(minilm_path, *train, validation, "--max_risk=0.001", f"--output_dir={tmp_path / 'few'}"))
    assert re.search("No early exit will be certified: .* at least [0-9]+ calibration rows", caplog.text)


# Cost in seconds


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


# Mixed precision


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


# What a run without a policy is told


def test_a_run_of_several_labels_calibrates(minilm_path, tmp_path, capsys):
    """Such a model could never leave early; budgets, a policy and a certified share of labels come as for others."""
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


def test_idle_exits_are_named_whatever_the_metric(minilm_path, tmp_path, caplog):
    """CoLA reports no accuracy; an exit that answers one class for all rows is still worth a word."""
    flags = [f"--dataset_name={write_task(tmp_path / 'glue', 'cola')}", "--task_name=cola", "--do_train", "--do_eval"]
    with caplog.at_level("WARNING"):
        main(
            TEXT,
            tiny(minilm_path, *flags, "--max_steps=1", "--learning_rate=1e-9", f"--output_dir={tmp_path / 'run'}"),
        )
    saved = np.load(tmp_path / "run" / "exit_logits.npz")
    majority = np.bincount(saved["labels"]).max() / len(saved["labels"])
    right = (saved["logits"].argmax(-1) == saved["labels"][:, None]).mean(0)
    idle = [k + 1 for k in range(3) if right[k] <= majority]
    assert idle and f"Exits {', '.join(map(str, idle))} are no better than always answering" in caplog.text


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


# GLUE

EXTRA = {"cola": "matthews_correlation", "stsb": "pearson", "mrpc": "f1"}


def write_task(folder, task, count=40):
    """Small files in the Hub's schema, with hidden labels in the test split."""
    known = GLUE_TASKS[task]
    splits = ["train", "validation", "test"]
    if task == "mnli":
        splits = ["train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"]
    kind = datasets.ClassLabel(names=list(known.label_names)) if known.label_names else datasets.Value("float32")
    features = {name: datasets.Value("string") for name in known.text_columns}
    features |= {"label": kind, "idx": datasets.Value("int32")}
    for seed, split in enumerate(splits):
        columns = {name: sentences(count, 10 * seed + k)[0] for k, name in enumerate(known.text_columns)}
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, len(known.label_names), count) if known.label_names else rng.uniform(0, 5, count)
        labels = [-1] * count if split.startswith("test") else labels.tolist()
        rows = {**columns, "label": labels, "idx": list(range(100, 100 + count))}
        path = folder / task / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(path)
    return folder


@pytest.mark.parametrize("task", sorted(GLUE_TASKS))
def test_every_task_runs_with_its_own_metrics(task, minilm_path, tmp_path):
    """Metrics at every exit equal scikit-learn's or SciPy's on the written logits; the submission has GLUE's form."""
    flags = [f"--dataset_name={write_task(tmp_path / 'glue', task)}", f"--task_name={task}", "--do_train", "--do_eval"]
    flags += ["--do_predict", "--max_steps=2", "--learning_rate=0.01", f"--output_dir={tmp_path / 'run'}"]
    main(TEXT, tiny(minilm_path, *flags))
    results = json.loads((tmp_path / "run" / "exit_results.json").read_text())
    saved = np.load(tmp_path / "run" / "exit_logits.npz")
    labels = saved["labels"]
    for k, row in enumerate(results["anytime"]):
        logits = saved["logits"][:, k]
        if task == "stsb":
            wanted = {"pearson": pearsonr(logits[:, 0], labels)[0], "spearmanr": spearmanr(logits[:, 0], labels)[0]}
        elif task == "cola":
            wanted = {"matthews_correlation": matthews_corrcoef(labels, logits.argmax(-1))}
        else:
            wanted = {"accuracy": accuracy_score(labels, logits.argmax(-1))}
            if task in ("mrpc", "qqp"):
                wanted["f1"] = f1_score(labels, logits.argmax(-1))
        for name, value in wanted.items():
            assert row["metrics"][name] == pytest.approx(value, abs=1e-6), (name, k)
    assert saved["row_ids"].tolist() == list(range(100, 140))
    names = {"mnli": ["MNLI-m", "MNLI-mm"], "sst2": ["SST-2"], "stsb": ["STS-B"], "cola": ["CoLA"]}
    names = names.get(task, [task.upper()])
    if task == "mnli":
        assert "eval_mismatched_exit1_accuracy" in json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert sorted(path.stem for path in (tmp_path / "run" / "glue_submission").iterdir()) == names
    for name in names:
        lines = (tmp_path / "run" / "glue_submission" / f"{name}.tsv").read_text().splitlines()
        head, *rows = [line.split("\t") for line in lines]
        assert head == ["index", "prediction"] and [int(row[0]) for row in rows] == list(range(100, 140))
        if task == "stsb":
            assert all(0 <= float(row[1]) <= 5 for row in rows)
        elif task in ("mnli", "qnli", "rte"):
            assert {row[1] for row in rows} <= set(GLUE_TASKS[task].label_names)
        else:
            assert {row[1] for row in rows} <= {"0", "1"}


# Parts


def column_of(path, column):
    return pq.read_table(path, columns=[column])[column].to_pylist()


@pytest.mark.parametrize("part", ["1", "all"])
@pytest.mark.parametrize("source", ["file", "task"])
def test_a_part_is_trained_on(source, part, minilm_path, tmp_path, tokens_read):
    """What breaks: rows of another part are trained on, or a part is evaluated on rows that it was trained on.

    48 rows in 3 parts, a quarter of each for validation: two steps are one epoch. With --dataset_name the data set's
    own validation split is evaluated, else the part's.
    """
    parts, folder, numbers = tmp_path / "parts", tmp_path / "glue", [part] if part != "all" else ["0", "1", "2"]
    column, rows = "text", [{"text": f"text number {row}", "label": ("bad", "good")[row % 2]} for row in range(48)]
    flags = [f"--partition_dir={parts}", f"--partition_id={part}", "--do_train", "--do_eval", "--max_steps=2"]
    if source == "file":
        datasets.Dataset.from_list(rows).to_csv(tmp_path / "rows.csv")
        words = ["--train_file", tmp_path / "rows.csv"]
    else:
        column = "sentence"
        rows = [{"sentence": row["text"], "label": row["label"] == "good", "idx": k} for k, row in enumerate(rows)]
        train = datasets.Dataset.from_list(rows).cast_column(
            "label", datasets.ClassLabel(names=["negative", "positive"])
        )
        train.to_parquet(write_task(folder, "sst2") / "sst2" / "train-00000-of-00001.parquet")
        words = ["--dataset_name", folder, "--dataset_config_name", "sst2"]
        flags += [f"--dataset_name={folder}", "--task_name=sst2"]
    settings = ["--num_partitions=3", "--scheme=iid", "--balance", f"--output_dir={parts}"]
    command_main(["partition", *map(str, words), *settings])
    flags += [f"--per_device_train_batch_size={6 * len(numbers)}", f"--output_dir={tmp_path / 'run'}"]
    main(TEXT, tiny(minilm_path, *flags))

    wanted = [text for number in numbers for text in column_of(parts / "train" / f"{number}.parquet", column)]
    read = AutoTokenizer.from_pretrained(minilm_path).batch_decode(tokens_read, skip_special_tokens=True)
    assert sorted(read) == sorted(wanted) and len(set(read)) == 12 * len(numbers)
    results = json.loads((tmp_path / "run" / "exit_results.json").read_text())
    labels = np.load(tmp_path / "run" / "exit_logits.npz")["labels"].tolist()
    own = [name for number in numbers for name in column_of(parts / "valid" / f"{number}.parquet", "label")]
    if source == "file":
        assert labels == [("bad", "good").index(name) for name in own]
    else:
        assert labels == column_of(folder / "sst2" / "validation-00000-of-00001.parquet", "label")
    assert results["num_eval_samples"] == len(labels) == (4 * len(numbers) if source == "file" else 40)


# Recipes and bad input


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_understood(path, tmp_path):
    """What breaks: a recipe with a flag that no longer exists."""
    recipe = yaml.safe_load(path.read_text())
    images = recipe.get("model_type") == "vit" or "image_size" in recipe
    args = parse_arguments(IMAGES if images else TEXT, [str(path), f"--output_dir={tmp_path}", "--bf16=false"])
    for name, value in recipe.items():
        owner = next(
            part
            for part in (args.model, args.data, args.training, args.calibration, args.scheme)
            if hasattr(part, name)
        )
        if isinstance(value, (int, float)) and name != "bf16":
            assert getattr(owner, name) == value


def test_flags_override_a_recipe(tmp_path):
    recipe = tmp_path / "mine.json"
    recipe.write_text(
        json.dumps({"model_name_or_path": "minilm", "dataset_name": "bbc_news", "seed": 3, "do_train": True})
    )
    args = parse_arguments(TEXT, [str(recipe), "--seed", "5", f"--output_dir={tmp_path}"])
    assert args.training.seed == 5 and args.training.do_train and args.data.dataset_name == "bbc_news"


BAD = {
    "nothing to do": ([], "Nothing to do"),
    "steps": (["--do_train", "--max_steps=-7"], "--max_steps must be at least -1, not -7"),
    "logging steps": (["--do_train", "--logging_steps=-1"], "--logging_steps must be at least 0, not -1"),
    "layer outside": (["--do_train", "--exit_layers", "2", "7"], "exit_layers"),
    "layer twice": (["--do_train", "--exit_layers", "2", "2"], "exit_layers"),
    "weights": (["--do_train", "--exit_loss_weights", "1", "2"], "--exit_loss_weights has 2 numbers.*3 exits"),
    "cost": (["--do_train", "--do_eval", "--target_cost=0.05"], "--target_cost 0.05 is below the cost of the first"),
    "cost in seconds": (["--do_train", "--do_eval", "--target_cost=0.001", "--cost=latency"], "below the cost of the"),
    "risk of numbers": (
        ["--do_train", "--do_eval", "--task_name=stsb", "--exit_criterion=patience", "--max_risk=0.1"],
        "--max_risk .* does not fit regression",
    ),
    "risk without labels": (
        ["--do_train", "--do_eval", "--max_risk=0.1", "--risk=accuracy_gap", "--calibration_file=UNLABELLED"],
        "accuracy_gap needs labels",
    ),
    "long warm start": (
        ["--do_train", "--warm_start_epochs=2", "--num_train_epochs=2"],
        "--warm_start_epochs 2 leaves the early exits no step",
    ),
    "warm start in steps": (
        ["--do_train", "--warm_start_epochs=2", "--max_steps=10", "--per_device_train_batch_size=16"],
        "--warm_start_epochs 2 leaves the early exits no step: this run trains 1 epochs",
    ),
    "warm start of short epochs": (
        ["--do_train", "--warm_start_epochs=3", "--max_steps=3", "--per_device_train_batch_size=500"],
        "--warm_start_epochs 3 leaves the early exits no step: this run trains 3 epochs",
    ),
    "warm start of a stream": (
        ["--do_train", "--warm_start_epochs=1", "--max_steps=10", "--streaming", "--do_eval"],
        "--warm_start_epochs 1 leaves the early exits no step",
    ),
    "re-entrant checkpoints": (
        [
            "--do_train",
            "--method=l2w",
            "--gradient_checkpointing",
            '--gradient_checkpointing_kwargs={"use_reentrant": true}',
        ],
        "use_reentrant",
    ),
    "no evaluation": (["--do_train", "--target_cost=0.5"], "add --do_eval"),
    "criterion": (["--do_eval", "--exit_criterion=sure"], "sure.*confidence"),
    "scheme": (["--do_train", "--method=best"], "--method is 'best'; it must be one of: base, boosted, joint, l2w"),
    "outside scheme": (
        ["--do_train", "--method=no_package:Trainer"],
        "--method is 'no_package:Trainer', which cannot be imported",
    ),
    "unknown flag": (["--do_train", "--exit_layer", "2"], "Unknown flag --exit_layer; did you mean --exit_layers"),
    "optimizer": (["--do_train", "--method=l2w", "--optim=adafactor"], "--optim"),
    "frozen": (["--do_train", "--freeze_backbone"], "freeze_backbone"),
    "two targets": (["--do_eval", "--target_cost=0.5", "--max_risk=0.1"], "--target_cost and --max_risk"),
    "calibration rows": (
        ["--do_train", "--calibration_samples=160"],
        "--calibration_samples 160 leaves no training row",
    ),
    "missing split": (["--do_predict"], "--test_file"),
    "config field": (["--do_train", "--config_overrides=sise=3"], "sise"),
    "config value": (
        ["--do_train", "--config_overrides=hidden_size=abc"],
        "^error: --config_overrides hidden_size=abc gives no EarlyExitBert[^\n]*$",
    ),
    "config values": (
        ["--do_train", "--config_overrides=hidden_size=16,num_attention_heads=3"],
        "^error: --config_overrides hidden_size=16,num_attention_heads=3 gives no EarlyExitBert[^\n]*3[^\n]*$",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_any_work(case, files, minilm_path, tmp_path):
    flags, message = BAD[case]
    flags = [flag.replace("UNLABELLED", str(files["test"])) for flag in flags]
    rows = [f"--{split}_file={files[split]}" for split in ("train", "validation")]
    if "--task_name=stsb" in flags:
        rows = [f"--dataset_name={write_task(tmp_path / 'glue', 'stsb')}"]
    with pytest.raises(SystemExit, match=message):
        main(TEXT, [*tiny(minilm_path, *rows), *flags, f"--output_dir={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


@pytest.mark.parametrize("do", ["--do_eval", "--do_predict"])
def test_a_checkpoint_without_a_layer_is_not_evaluated(do, finished, files, tmp_path):
    """What breaks: the figures, and the card, of a layer that was drawn at random."""
    shutil.copytree(finished, tmp_path / "part")
    weights = load_file(tmp_path / "part" / "model.safetensors")
    whole = {name: value for name, value in weights.items() if not name.startswith("bert.encoder.layer.1.")}
    assert len(whole) < len(weights)
    save_file(whole, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    flags = [f"--model_name_or_path={tmp_path / 'part'}", "--use_cpu", f"--output_dir={tmp_path / 'out'}", do]
    rows = [f"--{split}_file={files[split]}" for split in ("validation", "test")]
    with pytest.raises(SystemExit, match="--model_name_or_path .*part lacks weights, for example bert.encoder"):
        main(TEXT, [*flags, *rows])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("exit_layer: [2]\n", "recipe .*: key 'exit_layer'; did you mean --exit_layers"),
        ("- just a list\n", "must be a mapping"),
        ("exit_layers: [2, 3", "^error: Recipe .*bad.yaml cannot be read: [^\n]*$"),
        ("a: \x00", "^error: Recipe .*bad.yaml cannot be read: [^\n]*$"),
        (None, "does not exist"),
    ],
)
def test_bad_recipes(content, message, tmp_path):
    recipe = tmp_path / "bad.yaml"
    if content:
        recipe.write_text(content)
    with pytest.raises(SystemExit, match=message):
        main(TEXT, [str(recipe), "--model_type=bert", f"--output_dir={tmp_path}"])


def test_an_unsupported_architecture_is_named(files, minilm_path, tmp_path):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    flags = [f"--model_name_or_path={tmp_path / 'gpt2'}", f"--tokenizer_name={minilm_path}", "--do_train"]
    with pytest.raises(SystemExit, match="'gpt2'.*bert, .*mpnet.*Add an architecture"):
        main(TEXT, [*flags, f"--train_file={files['train']}", f"--output_dir={tmp_path / 'out'}"])


def test_labels_of_a_fine_tuned_checkpoint(finished, files, tmp_path):
    """Another number of labels, or an unknown one, is an error that names the way out."""
    three = tmp_path / "three.csv"
    three.write_text("text,label\n" + "".join(f"the plot is {w},{w}\n" for w in ("bad", "good", "odd") * 4))
    flags = [
        f"--model_name_or_path={finished}",
        "--do_train",
        f"--train_file={three}",
        f"--output_dir={tmp_path / 'out'}",
    ]
    with pytest.raises(SystemExit, match="a head for 2 labels, the data have 3.*--ignore_mismatched_sizes"):
        main(TEXT, flags)
    other = tmp_path / "other.csv"
    other.write_text(three.read_text().replace("odd", "bad").replace("good", "fine"))
    with pytest.raises(SystemExit, match="label 'fine', which the model does not know"):
        main(TEXT, [*flags[:2], f"--train_file={other}", flags[3]])


def test_a_head_for_tokens_is_made_new(files, minilm_path, tmp_path):
    """Its labels are those of tokens: refusing it for their number, or keeping it as fine-tuned, is wrong."""
    config = tiny_stock_config(vocab_size=30522, num_labels=9)
    BertForTokenClassification(config).save_pretrained(tmp_path / "tokens")
    flags = tiny(minilm_path, "--do_train", f"--train_file={files['train']}", f"--output_dir={tmp_path / 'out'}")[2:]
    args = parse_arguments(TEXT, [f"--model_name_or_path={tmp_path / 'tokens'}", *flags])
    model = load_model(TEXT, args.model, load_text_data(args.data, splits_needed=["train"], seed=0))
    assert model.config.num_labels == 2
    assert model.is_new_head(model.num_exits - 1)


def test_a_checkpoint_of_another_scheme_is_not_resumed(files, minilm_path, tmp_path):
    flags = [f"--train_file={files['train']}", "--do_train", "--max_steps=2", "--save_steps=1"]
    main(TEXT, tiny(minilm_path, *flags, f"--output_dir={tmp_path / 'joint'}"))
    checkpoint = tmp_path / "joint" / "checkpoint-1"
    more = ["--method=boosted", f"--output_dir={tmp_path / 'boosted'}"]
    with pytest.raises(SystemExit, match="was trained with --method joint, not boosted.*--model_name_or_path"):
        main(TEXT, tiny(minilm_path, *flags, *more, f"--resume_from_checkpoint={checkpoint}"))
    shutil.rmtree(tmp_path / "boosted", ignore_errors=True)
    words = [
        word for word in tiny(minilm_path, *flags, *more) if not word.startswith(("--model_type", "--config_over"))
    ]
    main(TEXT, [*words, f"--model_name_or_path={checkpoint}"])
    assert json.loads((tmp_path / "boosted" / "config.json").read_text())["exit_aggregation"] == "boosted"


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


@pytest.mark.slow
def test_sst2_with_minilm(tmp_path, shared_dir, minilm_path):
    """2,000 rows, one epoch, mean pooling: every exit above 0.70."""
    folder = shared_dir / "data" / "glue"
    recipe = str(ROOT / "recipes" / "sst2_minilm_joint.yaml")
    main(TEXT, [recipe, f"--dataset_name={folder}", f"--output_dir={tmp_path}"])
    results = json.loads((tmp_path / "exit_results.json").read_text())
    assert min(row["metrics"]["accuracy"] for row in results["anytime"]) > 0.70
