"""Every GLUE task with its own metrics, and parts of a data set."""

import json
import re

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.special import log_softmax
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from text_runs import tiny, write_task
from transformers import (
    AutoTokenizer,
)

from een_hf.commands import main as command_main
from een_hf.commands.train import main
from een_hf.data.glue import GLUE_TASKS
from een_hf.data.text import TEXT


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
    named = re.search(r"is as accurate as exits? ([\d, and]+), or more", caplog.text)[1]
    assert idle and [int(number) for number in re.findall(r"\d+", named)] == idle


@pytest.mark.parametrize("task", sorted(GLUE_TASKS))
def test_every_task_runs_with_its_own_metrics(task, minilm_path, tmp_path):
    """Metrics at every exit equal scikit-learn's or SciPy's on the written logits; the submission has GLUE's form."""
    flags = [f"--dataset_name={write_task(tmp_path / 'glue', task)}", f"--task_name={task}", "--do_train", "--do_eval"]
    flags += ["--do_predict", "--max_steps=2", "--learning_rate=0.01", f"--output_dir={tmp_path / 'run'}"]
    main(TEXT, tiny(minilm_path, *flags))
    results = json.loads((tmp_path / "run" / "exit_results.json").read_text())
    saved = np.load(tmp_path / "run" / "exit_logits.npz")
    # Of all rows, and of those that chose nothing.
    for table, rows in (("anytime", np.full(40, True)), ("anytime_report", saved["part"] == "report")):
        labels = saved["labels"][rows]
        for k, row in enumerate(results[table]):
            logits = saved["logits"][rows, k]
            if task == "stsb":
                scores = logits[:, 0]
                wanted = {"pearson": pearsonr(scores, labels)[0], "spearmanr": spearmanr(scores, labels)[0]}
            elif task == "cola":
                wanted = {"matthews_correlation": matthews_corrcoef(labels, logits.argmax(-1))}
            else:
                wanted = {"accuracy": accuracy_score(labels, logits.argmax(-1))}
                if task in ("mrpc", "qqp"):
                    wanted["f1"] = f1_score(labels, logits.argmax(-1))
            for name, value in wanted.items():
                assert row["metrics"][name] == pytest.approx(value, abs=1e-6), (table, name, k)
            chances = log_softmax(logits.astype(np.float64), -1)
            losses = (logits[:, 0] - labels) ** 2 if task == "stsb" else -chances[np.arange(len(labels)), labels]
            assert row["loss"] == pytest.approx(losses.mean(), rel=1e-5), (table, k)
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
