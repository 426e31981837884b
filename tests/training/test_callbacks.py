"""What trackers and the run's folder show is what was measured; wandb and TensorBoard run for real, offline."""

import itertools
import json
import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import factory
import numpy as np
import pytest
from factory import RESULTS, tiny_model, tiny_rows
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.integrations import WandbCallback

from een_hf.evaluation import make_compute_metrics, plot_exit_curves
from een_hf.training.callbacks import (
    EarlyExitWandbCallback,
    EpochCallback,
    ExitHistoryCallback,
    ExitTableCallback,
    exit_curves,
    plot_history,
)


class Recorder(TrainerCallback):
    """The metrics of each evaluation, as any callback receives them."""

    def __init__(self):
        self.found = []

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.found.append((state.global_step, dict(metrics)))


def make_trainer(folder, scheme="joint", **settings):
    rows = tiny_rows(count=32, learnable=True)
    settings = {"max_steps": 4, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, **settings}
    metrics = make_compute_metrics(["accuracy"], "single_label_classification")
    settings |= {"train_dataset": rows, "eval_dataset": rows[:16], "compute_metrics": metrics}
    return factory.make_trainer(folder, tiny_model(num_hidden_layers=2), scheme, **settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    recorder = Recorder()
    trainer = make_trainer(tmp_path_factory.mktemp("run"), callbacks=[recorder], report_to="none")
    trainer.train()
    return trainer, recorder.found


def test_curves_are_what_was_evaluated(trained):
    """Steps or exits in the wrong order would show an early exit as the best one."""
    trainer, evaluations = trained
    curves = json.loads(Path(trainer.args.output_dir, "training_curves.json").read_text())
    assert set(curves) == {"train_loss", "eval_loss", "eval_accuracy"}
    assert curves["eval_loss"]["step"] == [step for step, _ in evaluations] == [2, 4]
    for name in ("loss", "accuracy"):
        for k in (1, 2):
            wanted = [metrics[f"eval_exit{k}_{name}"] for _, metrics in evaluations]
            assert curves[f"eval_{name}"][f"exit {k}"] == wanted
    assert curves["train_loss"]["step"] == [1, 2, 3, 4]
    assert imread(f"{trainer.args.output_dir}/training_curves.png").shape[2] == 4


@pytest.mark.parametrize("steps", [[2, 4], [1], list(range(1, 60))])
def test_steps_are_whole_and_exits_told_apart(tmp_path, steps):
    """Half a step on the axis is nonsense, and twelve shades of one blue are one line."""
    curve = {"step": steps} | {f"exit {k}": [k + step for step in steps] for k in range(1, 13)}
    (axes,) = plot_history({"eval_loss": curve}, tmp_path / "curves.png").axes
    assert all(tick == round(tick) for tick in axes.get_xticks()) and len(axes.get_xticks()) > 0
    looks = [(line.get_marker(), to_rgb(line.get_color())) for line in axes.lines]
    for one, other in itertools.combinations(looks, 2):
        assert one[0] != other[0] and np.abs(np.subtract(one[1], other[1])).max() > 0.1


def test_training_losses_by_exit_add_up(trained):
    """With weights of 1 the joint loss is the sum of the exits' losses, step by step."""
    trainer, _ = trained
    steps = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert len(steps) == 4
    for logs in steps:
        assert logs["exit1_loss"] + logs["exit2_loss"] == pytest.approx(logs["loss"], abs=2e-4)


def test_another_training_logs_its_own_losses(tmp_path):
    """What breaks: steps after the last log of one training count in the first log of the next."""
    trainer = make_trainer(tmp_path, max_steps=3, logging_steps=2, learning_rate=0.0, logging_first_step=False)
    for _ in range(2):
        trainer.train()
        (logs,) = [logs for logs in trainer.state.log_history if "exit1_loss" in logs]
        assert logs["exit1_loss"] + logs["exit2_loss"] == pytest.approx(logs["loss"], abs=2e-4)
        trainer.model.classifier.weight.data.mul_(50)


@pytest.mark.parametrize("epoch", [1, 1.4, 1.6])
def test_rows_of_a_run_that_resumes_within_an_epoch_are_of_that_epoch(epoch):
    """What breaks: late in an epoch, images are augmented as in the next one."""

    class Rows(list):
        def set_epoch(self, epoch):
            self.epoch = epoch

    rows = Rows(range(3))
    EpochCallback().on_epoch_begin(None, TrainerState(epoch=epoch), None, train_dataloader=DataLoader(rows))
    assert rows.epoch == 1


def test_an_empty_log_has_no_curves():
    assert exit_curves([{"loss": 1.0, "step": 1}]) == {}


def test_the_terminal_shows_a_line_per_exit(tmp_path, capsys):
    recorder = Recorder()
    trainer = make_trainer(tmp_path, callbacks=[recorder], report_to="none")
    trainer.evaluate()
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines() if line.startswith(("step", "exit"))]
    assert lines[0] == ["step 0", "loss", "accuracy"]
    metrics = recorder.found[0][1]
    for k, line in enumerate(lines[1:], 1):
        assert line == [
            f"exit {k}",
            f"{metrics[f'eval_exit{k}_loss']:.4f}",
            f"{metrics[f'eval_exit{k}_accuracy']:.4f}",
        ]


@pytest.mark.parametrize("given", [False, True])
def test_never_two_callbacks_of_a_kind(tmp_path, given):
    """Two wandb callbacks would log every figure twice."""
    trainer = make_trainer(tmp_path, callbacks=[EarlyExitWandbCallback()] if given else [], report_to="wandb")
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(EarlyExitWandbCallback) == 1
    assert WandbCallback not in kinds
    assert kinds.count(ExitTableCallback) == kinds.count(ExitHistoryCallback) == 1


WANDB_RUN = """
import json, sys
from pathlib import Path
from een_hf.evaluation import plot_exit_curves
from factory import RESULTS
from test_callbacks import make_trainer
folder, scheme = sys.argv[1:3]
trainer = make_trainer(Path(folder) / "out", scheme, report_to="wandb", project="words")
trainer.train()
plot_exit_curves(RESULTS, Path(folder) / "out" / "exit_curves.png")
trainer.report_results(RESULTS)
Path(folder, "log.json").write_text(json.dumps(trainer.state.log_history))
"""


def wandb_records(path):
    """The records of a .wandb file: a 7-byte head, then LevelDB log records that may be cut at blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):  # still being written
            return
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def read_offline_run(folder):
    """(history rows, project, name, tables, panels) of the only offline run below `folder`, from wandb's own files."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    rows, run, panels = [], None, {}
    deadline = time.monotonic() + 60
    while not any(record.WhichOneof("record_type") == "exit" for record in wandb_records(path)):
        assert time.monotonic() < deadline, "wandb's own process has not closed the file"
        time.sleep(0.2)
    for record in wandb_records(path):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
        elif kind == "run":
            run = record.run
        elif kind == "config":
            updates = {"/".join(item.nested_key): item.value_json for item in record.config.update}
            panels |= {
                name.removeprefix("_wandb/visualize/"): json.loads(value)
                for name, value in updates.items()
                if name.startswith("_wandb/visualize/")
            }
    tables = {}
    for table in path.parent.glob("files/media/table/results/*.table.json"):
        tables[table.name.split("_")[0]] = json.loads(table.read_text())
    return rows, run.project, run.display_name, tables, panels


@pytest.mark.parametrize("scheme", [pytest.param("joint", marks=pytest.mark.slow), "l2w"])
def test_an_offline_wandb_run_reads_back(tmp_path, scheme):
    """Curves for each exit and tables with the right values, under the same names in every scheme."""
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "PYTHONPATH": ":".join([os.path.dirname(__file__), *sys.path]),
    }
    environment.pop("WANDB_PROJECT", None)
    done = subprocess.run(
        [sys.executable, "-c", WANDB_RUN, str(tmp_path), scheme], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows, project, name, tables, panels = read_offline_run(tmp_path)
    assert (project, name) == ("words", f"{scheme}-seed42")
    log = json.loads((tmp_path / "log.json").read_text())
    for k in (1, 2):
        for logged, shown in ((f"eval_exit{k}_loss", f"eval/exit{k}_loss"), (f"exit{k}_loss", f"train/exit{k}_loss")):
            wanted = [(logs["step"], logs[logged]) for logs in log if logged in logs]
            assert [(row["train/global_step"], row[shown]) for row in rows if shown in row] == wanted
            assert wanted
    columns = tables["exits"]["columns"]
    for entry, row in zip(RESULTS["anytime"], tables["exits"]["data"], strict=True):
        found = dict(zip(columns, row, strict=True))
        assert found["accuracy"] == entry["metrics"]["accuracy"] and found["relative_cost"] == entry["relative_cost"]
        assert found["share_exiting"] == RESULTS["policy"]["exit_fractions"][entry["exit"] - 1]
        assert found["threshold"] == RESULTS["policy"]["thresholds"][entry["exit"] - 1]
    budgets = tables["budgets"]
    found = [dict(zip(budgets["columns"], row, strict=True))["accuracy"] for row in budgets["data"]]
    assert found == [point["metrics"]["accuracy"] for point in RESULTS["budgeted"]]
    # The pictures are those of the run's folder, the budgeted curve draws the table of budgets.
    names = ["exit_curves", "l2w_weights"] if scheme == "l2w" else ["exit_curves"]
    media = sorted((tmp_path / "wandb").glob("offline-run-*/files/media/images/results/*.png"))
    assert [path.name.rsplit("_", 2)[0] for path in media] == names
    for path, name in zip(media, names, strict=True):
        assert path.read_bytes() == (tmp_path / "out" / f"{name}.png").read_bytes()
    assert panels["results/budgeted_curve"]["panel_config"]["fieldSettings"] | {"stroke": None} == {
        "x": "relative_cost",
        "y": "accuracy",
        "stroke": None,
    }
    (drawn,) = [row for row in rows if "results/budgeted_curve_table/sha256" in row]
    assert drawn["results/budgeted_curve_table/sha256"] == drawn["results/budgets/sha256"]
    last = [row for row in rows if "policy/accuracy" in row]
    assert [(row["policy/accuracy"], row["policy/relative_cost"]) for row in last] == [(0.88, 0.68)]


def test_the_callback_works_alone_with_a_plain_trainer(tmp_path, monkeypatch):
    """In `callbacks=[...]` of a stock Trainer it logs as the stock callback does."""
    import wandb

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    trainer = make_trainer(tmp_path / "out", report_to="none")
    plain = Trainer(
        model=trainer.model,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        eval_dataset=trainer.eval_dataset,
        callbacks=[EarlyExitWandbCallback()],
    )
    plain.train()
    wandb.finish()
    rows, project, *_ = read_offline_run(tmp_path)
    assert project == trainer.args.project
    losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert losses == [logs["eval_loss"] for logs in plain.state.log_history if "eval_loss" in logs]


def test_tensorboard_has_curves_tables_and_the_picture(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path / "out", "l2w", report_to="tensorboard")
    trainer.train()
    plot_exit_curves(RESULTS, tmp_path / "out" / "exit_curves.png")
    trainer.report_results(RESULTS)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    tags = events.Tags()
    for k in (1, 2):
        found = [event.value for event in events.Scalars(f"eval/exit{k}_loss")]
        wanted = [logs[f"eval_exit{k}_loss"] for logs in trainer.state.log_history if f"eval_exit{k}_loss" in logs]
        np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert [event.value for event in events.Scalars("policy/accuracy")] == pytest.approx([0.88])
    for name in ("exit_curves", "l2w_weights"):
        (shown,) = events.Images(f"results/{name}")
        assert (shown.height, shown.width) == imread(tmp_path / "out" / f"{name}.png").shape[:2]
    assert {"results/exits/text_summary", "results/budgets/text_summary"} <= set(tags["tensors"])
