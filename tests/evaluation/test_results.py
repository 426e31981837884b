"""The table of exits and the files of a run."""

import json
import sys

import numpy as np
import pytest
import torch
from damage import damaged, wrong_json
from factory import tiny_config
from transformers import EvalPrediction

from een_hf.evaluation import (
    anytime_table,
    expected_calibration_error,
    format_exit_table,
    load_exit_logits,
    make_compute_metrics,
    read_exit_results,
    save_exit_logits,
    write_exit_results,
)
from een_hf.evaluation.comparison import compare_results
from een_hf.hub import write_model_card
from een_hf.models import ExitConfigurationError, ExitPolicy


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def read_strict(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def table_of(logits, labels, metrics, problem_type):
    return anytime_table(
        logits,
        labels,
        relative_costs=[0.3, 0.7, 1.1],
        exit_layers=[2, 4, 6],
        compute_metrics=make_compute_metrics(metrics, problem_type),
        problem_type=problem_type,
    )


def test_anytime_table_of_classes(rng):
    """Fails if an exit's row carries another exit's loss, metrics or calibration error."""
    logits, labels = rng.normal(size=(50, 3, 4)).astype(np.float32), rng.integers(0, 4, 50)
    table = table_of(logits, labels, ["accuracy"], "single_label_classification")
    assert [(entry["exit"], entry["layer"], entry["relative_cost"]) for entry in table] == [
        (1, 2, 0.3),
        (2, 4, 0.7),
        (3, 6, 1.1),
    ]
    for index, entry in enumerate(table):
        own = logits[:, index].astype(np.float64)
        log_probabilities = own - np.log(np.exp(own).sum(1, keepdims=True))
        assert entry["loss"] == pytest.approx(-log_probabilities[range(50), labels].mean())
        assert entry["metrics"] == {"accuracy": pytest.approx((own.argmax(1) == labels).mean())}
        assert entry["ece"] == pytest.approx(expected_calibration_error(own, labels))


@pytest.mark.parametrize("label", [-100, -1, 4])
def test_anytime_table_refuses_missing_labels(rng, label):
    """Fails if rows without a label count as errors, or with a loss of 0, which -100 gives."""
    labels = rng.integers(0, 4, 50)
    labels[3] = label
    with pytest.raises(ExitConfigurationError, match=f"1 of 50 rows.*row 3 .*with {label}"):
        table_of(rng.normal(size=(50, 3, 4)), labels, ["accuracy"], "single_label_classification")
    with pytest.raises(ExitConfigurationError, match="1 of 50 rows"):
        expected_calibration_error(rng.normal(size=(50, 4)), labels)


def test_anytime_table_of_numbers(rng):
    """Fails if regression is scored as classification or gets a calibration error."""
    logits, labels = rng.normal(size=(20, 3, 1)).astype(np.float32), rng.normal(size=20).astype(np.float32)
    for index, entry in enumerate(table_of(logits, labels, ["pearson"], "regression")):
        assert entry["loss"] == pytest.approx(((logits[:, index, 0] - labels) ** 2).mean(), rel=1e-5)
        assert entry["metrics"]["pearson"] == pytest.approx(np.corrcoef(logits[:, index, 0], labels)[0, 1], rel=1e-5)
        assert entry["ece"] is None


def test_anytime_table_of_several_labels(rng):
    """Fails if the loss of a multi-label problem is not the mean binary cross-entropy."""
    logits, labels = rng.normal(size=(20, 3, 4)), rng.integers(0, 2, (20, 4)).astype(np.float32)
    for index, entry in enumerate(table_of(logits, labels, ["f1"], "multi_label_classification")):
        right = 1 / (1 + np.exp(-np.where(labels == 1, 1, -1) * logits[:, index]))
        assert entry["loss"] == pytest.approx(-np.log(right).mean())
        assert entry["ece"] is None


def test_anytime_table_refuses_the_wrong_number_of_exits(rng):
    """Fails if costs of another model silently shorten the table."""
    logits, labels = rng.normal(size=(5, 2, 4)), rng.integers(0, 4, 5)
    with pytest.raises(ValueError):
        table_of(logits, labels, ["accuracy"], "single_label_classification")


def test_results_are_strict_json_and_equal_after_reading(results, tmp_path):
    """Fails if a value changes on its way through the file."""
    path = write_exit_results(tmp_path, results)
    assert path == tmp_path / "exit_results.json"
    assert read_strict(path) == {"schema_version": 1, **results}


def test_numbers_that_json_lacks(results, tmp_path):
    """Fails if NaN or Infinity, which other readers refuse, is written, or a threshold no score reaches is lost."""
    results["anytime"][0]["metrics"]["accuracy"] = float("nan")
    results["anytime"][0]["loss"] = np.float32("nan")
    results["anytime"][1]["loss"] = torch.tensor(0.25)
    results["budgeted"][0]["thresholds"] = np.array([np.inf, -np.inf, np.nan])
    results["exit_layers"] = np.array([2, 4, 6])
    written = read_strict(write_exit_results(tmp_path, results))
    assert written["anytime"][0]["metrics"]["accuracy"] is None
    assert written["anytime"][0]["loss"] is None and written["anytime"][1]["loss"] == 0.25
    assert written["budgeted"][0]["thresholds"] == [sys.float_info.max, -sys.float_info.max, None]
    assert written["exit_layers"] == [2, 4, 6]
    assert not torch.tensor([1e38]).ge(written["budgeted"][0]["thresholds"][0]).any()


@pytest.mark.parametrize(
    "drop, named",
    [
        (lambda results: results.pop("anytime_report"), "results lacks anytime_report"),
        (lambda results: results["anytime"][1].pop("ece"), r"results\['anytime'\]\[1\] lacks ece"),
        (lambda results: results["budgeted"][0].pop("thresholds"), r"results\['budgeted'\]\[0\] lacks thresholds"),
        (lambda results: results["policy"].pop("guarantee"), r"results\['policy'\] lacks guarantee"),
        (lambda results: results["baselines"][0].pop("name"), r"results\['baselines'\]\[0\] lacks name"),
    ],
)
def test_a_missing_key_is_named_and_nothing_is_written(results, tmp_path, drop, named):
    """Fails if an incomplete file reaches its readers."""
    drop(results)
    with pytest.raises(ValueError, match=named):
        write_exit_results(tmp_path, results)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda results: results.update(exit_layers=5), "exit_layers is 5"),
        (lambda results: results.update(method=["joint"]), "method is"),
        (lambda results: results.update(anytime=[]), "anytime is"),
        (lambda results: results["anytime"].pop(), "not all of 3 exits"),
        (lambda results: results["policy"]["thresholds"].pop(), "not all of 3 exits"),
        (lambda results: results["anytime"][1].update(relative_cost=10**400), r"\[1\]: relative_cost"),
        (lambda results: results["anytime"][1]["metrics"].update(accuracy="high"), r"\[1\]: metrics"),
        (lambda results: results["anytime"][1]["metrics"].pop("f1"), "anytime has other metrics"),
        (lambda results: results["policy"].update(guarantee={"risk": "consistency"}), "guarantee"),
        (lambda results: results["policy"].update(calibrated_for={"max_risk": "x"}), "calibrated_for"),
        (lambda results: results["budgeted"].append("x"), r"budgeted'\]\[2\] is 'x'"),
        (lambda results: results.update(baselines=3), "baselines is 3"),
        (lambda results: results.update(calibration_rows_chose=3), "calibration_rows_chose"),
        (lambda results: results.update(exit_costs={"alone": [0.5, 0.7, 1.0]}), "exit_costs is"),
        (lambda results: results.update(exit_costs=dict.fromkeys(("alone", "heads", "shared"), [1.0])), "of 3 exits"),
        (lambda results: results.update(latency={"device": "cpu", "batch_size": 1}), "latency is"),
    ],
)
def test_a_value_of_another_kind_is_named(results, tmp_path, change, named):
    path = tmp_path / "exit_results.json"
    path.write_text(json.dumps(results))
    assert read_exit_results(tmp_path) == results
    change(results)
    path.write_text(json.dumps(results))
    with pytest.raises(ExitConfigurationError, match=f"exit_results.json.*{named}"):
        read_exit_results(tmp_path)


@pytest.mark.parametrize("count", [40, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_results_are_refused_or_of_use(results, tmp_path, count):
    """Fails if a part of the file that is cut or of another kind ends in a traceback, in its reader or behind it."""
    results["policy"]["guarantee"] = {
        "risk": "consistency",
        "limit": 0.1,
        "confidence": 0.9,
        "errors": 1,
        "num_rows": 9,
    }
    results["budgeted"][0] |= {"criterion": "margin", "temperatures": [1.0, 2.0, 1.0], "params": {}}
    path, refused = tmp_path / "exit_results.json", 0
    for text in wrong_json(results, np.random.default_rng(count), count):
        path.write_text(text)
        for use in (use_results, ExitPolicy.from_results, lambda path: ExitPolicy.from_results(path, 0.9)):
            try:
                use(path)
            except ExitConfigurationError as error:
                assert "\n" not in str(error) and len(str(error)) < 600
                refused += 1
    assert count < refused < 3 * count


def use_results(path):
    found = read_exit_results(path)
    format_exit_table(found)
    assert compare_results({"one": found}).table
    write_model_card(path.parent, found, tiny_config())


@pytest.mark.parametrize("count", [100, pytest.param(3000, marks=pytest.mark.slow)])
def test_damaged_logits_are_refused(tmp_path, rng, count):
    """Fails if a cut or overwritten archive ends in a traceback of zip, zlib or numpy."""
    save_exit_logits(tmp_path, rng.normal(size=(30, 3, 2)).astype(np.float32), np.arange(30) % 2, range(30), "report")
    path = tmp_path / "exit_logits.npz"
    whole, refused = path.read_bytes(), 0
    for data in damaged(whole, np.random.default_rng(count), count):
        path.write_bytes(data)
        try:
            assert {name: len(array) for name, array in load_exit_logits(tmp_path).items()} == dict.fromkeys(
                ("logits", "labels", "row_ids", "part"), 30
            )
        except ExitConfigurationError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > count / 2


@pytest.mark.parametrize(
    ("arrays", "named"),
    [
        ({"labels": None}, "it has no array 'labels'"),
        ({"logits": np.zeros((4, 3))}, "logits have shape"),
        ({"logits": np.zeros((4, 3, 2), int)}, "logits are of type"),
        ({"labels": np.array(["a"] * 4)}, "labels are of type"),
        ({"part": np.zeros(4)}, "part are of type"),
        ({"part": np.array(["report"] * 3)}, "part have shape"),
        ({"row_ids": np.array([[1]] * 4)}, "row_ids have shape"),
    ],
)
def test_logits_of_another_kind_are_named(tmp_path, arrays, named):
    whole = {"logits": np.zeros((4, 3, 2)), "labels": np.zeros(4, int), "row_ids": np.arange(4)}
    whole |= {"part": np.array(["report"] * 4), **arrays}
    np.savez(tmp_path / "exit_logits.npz", **{name: array for name, array in whole.items() if array is not None})
    with pytest.raises(ExitConfigurationError, match=f"exit_logits.npz cannot be read: {named}"):
        load_exit_logits(tmp_path)


def test_logits_that_are_not_there(tmp_path):
    with pytest.raises(ExitConfigurationError, match="exit_logits.npz cannot be read: FileNotFoundError"):
        load_exit_logits(tmp_path)


def test_an_interrupted_write_keeps_the_old_file(results, tmp_path, monkeypatch):
    """Fails if a crash while writing leaves half a file or a stray one."""
    path = write_exit_results(tmp_path, results)
    before = path.read_bytes()

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="disk full"):
        write_exit_results(tmp_path, {**results, "method": "boosted"})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("row_ids", [[7, 3, 5, 1], ["a", "bb", "c", "d"], np.array(["a", 2, "c", "d"], dtype=object)])
@pytest.mark.parametrize("part", ["report", ["calibration", "report", "report", "calibration"]])
def test_exit_logits_come_back(tmp_path, rng, row_ids, part):
    """Fails if rows lose their number, part or precision, or the file needs pickle to be read."""
    logits, labels = rng.normal(size=(4, 3, 2)).astype(np.float32), np.array([0, 1, 1, 0])
    save_exit_logits(tmp_path, logits, labels, row_ids, part)
    assert [path.name for path in tmp_path.iterdir()] == ["exit_logits.npz"]
    loaded = load_exit_logits(tmp_path)
    assert loaded["logits"].dtype == np.float32 and (loaded["logits"] == logits).all()
    assert (loaded["labels"] == labels).all()
    assert list(map(str, loaded["row_ids"])) == list(map(str, row_ids))
    assert loaded["part"].tolist() == ([part] * 4 if isinstance(part, str) else part)


def test_exit_logits_of_differing_length_are_refused(tmp_path):
    """Fails if logits can be filed under the wrong rows."""
    with pytest.raises(ValueError, match="row_ids has 3 rows, but logits have 4"):
        save_exit_logits(tmp_path, np.zeros((4, 3, 2)), np.zeros(4), [1, 2, 3], "report")


def test_the_printed_table(results):
    """Fails if a column shifts or a number appears under the wrong heading."""
    results["anytime"][1]["ece"] = None
    *table, policy, measured = format_exit_table(results).splitlines()
    assert len({len(line) for line in table}) == 1
    header, *rows = (line.split() for line in table)
    assert " ".join(header) == "exit layer relative cost accuracy f1 loss ece exiting"
    assert rows == [
        ["1", "2", "0.3433", "0.7000", "0.3500", "0.3000", "0.0700", "60.0%"],
        ["2", "4", "0.6867", "0.8000", "0.4000", "0.2000", "-", "30.0%"],
        ["3", "6", "1.0300", "0.9000", "0.4500", "0.1000", "0.0900", "10.0%"],
    ]
    assert policy == "policy: confidence for target_cost 0.6: relative cost 0.5800, accuracy 0.8800, f1 0.4400"
    parts = "all 100 evaluation rows; exiting and policy: the 40 evaluation rows that calibrated nothing"
    assert measured == f"measured on: {parts}"
    # Of an older run's file, and with rows beside the evaluation split that calibrate.
    others = format_exit_table({**results, "num_report_samples": None}).splitlines()[-1]
    assert others == f"measured on: {parts.replace('40 ', '')}"
    all_rows = format_exit_table({**results, "num_report_samples": 100}).splitlines()[-1]
    assert all_rows == "measured on: all 100 evaluation rows, which calibrated nothing"


def test_the_printed_table_without_a_policy(results):
    """Fails if a run without a policy cannot be printed."""
    results["policy"] = None
    lines = format_exit_table(results).splitlines()
    assert len(lines) == 5 and "exiting" not in lines[0]
    assert lines[-1] == "measured on: all 100 evaluation rows"


def test_metrics_get_one_exit_at_a_time(rng):
    """Fails if compute_metrics sees other shapes than in a plain Trainer."""
    seen = []

    def compute_metrics(prediction: EvalPrediction):
        seen.append((prediction.predictions, prediction.label_ids))
        return {}

    logits, labels = rng.normal(size=(6, 2, 3)), rng.integers(0, 3, 6)
    anytime_table(
        logits,
        labels,
        relative_costs=[0.5, 1.0],
        exit_layers=[1, 2],
        compute_metrics=compute_metrics,
        problem_type="single_label_classification",
    )
    assert all((own == logits[:, index]).all() and (ids == labels).all() for index, (own, ids) in enumerate(seen))
    assert len(seen) == 2
