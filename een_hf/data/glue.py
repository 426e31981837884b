"""The nine GLUE tasks: columns, labels, metrics, and the files for the benchmark's server."""

from dataclasses import dataclass
from pathlib import Path

from .._deprecated import moved_names
from .task import TaskData


HUB_GLUE = "nyu-mll/glue"
# MNLI's matched halves are the splits that every task has.
SPLIT_NAMES = {"validation_matched": "validation", "test_matched": "test"}


@dataclass(frozen=True)
class GlueTask:
    """The definition of a GLUE task.

    Args:
        text_columns: one column, or two for sentence pairs.
        label_names: by label id; empty for regression.
        metrics: metrics of the task.
        submission: name of the file for the benchmark's server, without ending.
        submits_names: whether this file contains label names instead of ids.
    """

    text_columns: tuple[str, ...]
    label_names: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    submission: str = ""
    submits_names: bool = False


_PAIR = ("sentence1", "sentence2")

GLUE_TASKS = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",), "CoLA"),
    "mnli": GlueTask(
        ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), submission="MNLI-m", submits_names=True
    ),
    "mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent"), ("accuracy", "f1"), "MRPC"),
    "qnli": GlueTask(
        ("question", "sentence"), ("entailment", "not_entailment"), submission="QNLI", submits_names=True
    ),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1"), "QQP"),
    "rte": GlueTask(_PAIR, ("entailment", "not_entailment"), submission="RTE", submits_names=True),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), submission="SST-2"),
    "stsb": GlueTask(_PAIR, (), ("pearson", "spearmanr"), "STS-B"),
    "wnli": GlueTask(_PAIR, ("not_entailment", "entailment"), submission="WNLI"),
}


def write_submission(folder: Path, data: TaskData, split: str, predictions: list) -> None:
    """`glue_submission/<task>.tsv` as the GLUE server takes it: row ids, and label ids, label names or scores."""
    task = GLUE_TASKS.get(data.task_name)
    if task is None:
        return
    name = "MNLI-mm" if split.endswith("_mismatched") else task.submission
    if not task.label_names:
        answers = [f"{min(max(score, 0.0), 5.0):.3f}" for score in predictions]
    else:
        # A checkpoint may spell labels differently, or have only numbers (LABEL_0, 0, ...), which are the data's ids.
        known = {name.lower(): index for index, name in enumerate(task.label_names)}
        for index in range(len(task.label_names)):
            known |= {f"label_{index}": index, str(index): index}
        ids = [known[prediction.lower()] for prediction in predictions]
        answers = [task.label_names[index] if task.submits_names else index for index in ids]
    place = folder / "glue_submission"
    place.mkdir(exist_ok=True)
    lines = [f"{row_id}\t{answer}\n" for row_id, answer in zip(data.row_ids(split), answers, strict=True)]
    (place / f"{name}.tsv").write_text("index\tprediction\n" + "".join(lines))


__getattr__ = moved_names(__name__)
