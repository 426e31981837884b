"""A whole run on texts: what lies in its folder, what the folder answers, what a second run is told."""

import csv
import dataclasses
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score
from text_runs import ROOT, tiny
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from een_hf.commands.train import main
from een_hf.data.text import TEXT


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
    with pytest.raises(SystemExit, match="contains a finished run"):
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
    """From the saved folder alone: same metrics, and the policy in the config is kept."""
    evaluate(finished, tmp_path, validation=files["validation"])
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
    assert "error: a file could not be written" in done.stderr and "free space" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_sst2_with_minilm(tmp_path, shared_dir, minilm_path):
    """2,000 rows, one epoch, mean pooling: every exit above 0.70."""
    folder = shared_dir / "data" / "glue"
    recipe = str(ROOT / "recipes" / "sst2_minilm_joint.yaml")
    main(TEXT, [recipe, f"--dataset_name={folder}", f"--output_dir={tmp_path}"])
    results = json.loads((tmp_path / "exit_results.json").read_text())
    assert min(row["metrics"]["accuracy"] for row in results["anytime"]) > 0.70
