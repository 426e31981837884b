"""Metrics, predicted labels and calibration error."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from transformers import EvalPrediction

from een_hf.evaluation import (
    METRICS,
    expected_calibration_error,
    load_metrics,
    make_compute_metrics,
    predict_labels,
)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_classification_metrics_equal_sklearn(rng):
    """Fails if predictions and references are swapped or a value is averaged in another way."""
    references, predictions = rng.integers(0, 2, 80), rng.integers(0, 2, 80)
    values = load_metrics(["accuracy", "f1", "matthews_correlation"]).compute(
        predictions=predictions, references=references
    )
    assert values == pytest.approx(
        {
            "accuracy": (references == predictions).mean(),
            "f1": sklearn.metrics.f1_score(references, predictions),
            "matthews_correlation": np.corrcoef(references, predictions)[0, 1],
        }
    )
    assert all(type(value) is float for value in values.values())


def test_regression_metrics_equal_scipy(rng):
    """Fails if numbers are cut to integers or a correlation is taken of the wrong columns."""
    references = rng.normal(size=60)
    predictions = references + rng.normal(size=60)
    values = load_metrics(["pearson", "spearmanr", "mse"]).compute(predictions=predictions, references=references)
    ranks = scipy.stats.rankdata(predictions), scipy.stats.rankdata(references)
    assert values["pearson"] == pytest.approx(np.corrcoef(predictions, references)[0, 1])
    assert values["spearmanr"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert values["mse"] == pytest.approx(sum((p - r) ** 2 for p, r in zip(predictions, references, strict=True)) / 60)


@pytest.mark.parametrize("name", ["pearson", "spearmanr", "matthews_correlation"])
@pytest.mark.parametrize("num_rows", [1, 5])
def test_constant_predictions_score_zero_without_a_warning(name, num_rows):
    """Fails if an exit that has learned nothing makes a metric NaN or floods the log."""
    metric = load_metrics([name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert metric.compute(predictions=[1] * num_rows, references=list(range(num_rows))) == {name: 0.0}


@pytest.mark.parametrize("name", ["pearson", "spearmanr", "mse"])
def test_nan_predictions_stay_nan(name):
    """Fails if a diverged exit looks like one that merely predicts a constant, or stops the evaluation."""
    assert math.isnan(load_metrics([name]).compute(predictions=[1.0, math.nan, 2.0], references=[0.0, 1.0, 2.0])[name])


def test_metrics_touch_no_file_and_no_random_state(tmp_path):
    """Fails if metrics create a cache folder or a lock (several processes would wait for each other)."""
    code = (
        "import numpy as np; np.random.seed(3); before = np.random.get_state()[1].tolist()\n"
        "from een_hf.evaluation import METRICS, load_metrics\n"
        "metrics = load_metrics(sorted(METRICS))\n"
        "for _ in range(2): metrics.compute(predictions=[0, 1, 1], references=[0, 1, 0])\n"
        "assert np.random.get_state()[1].tolist() == before"
    )
    environment = {"HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment | {"OMP_NUM_THREADS": "1"})
    assert not list(tmp_path.rglob("*metrics*")) and not list(tmp_path.rglob("*.lock"))


def test_an_unknown_metric_is_answered_with_the_known_ones():
    """Fails if a misspelt metric shows only after training, or without help."""
    with pytest.raises(ValueError, match="'acuracy'.*" + ".*".join(sorted(METRICS))):
        make_compute_metrics(["acuracy"], "single_label_classification")
    with pytest.raises(ValueError, match="'pearson'.*multi-label"):
        make_compute_metrics(["pearson"], "multi_label_classification")
    with pytest.raises(ValueError, match="'classification'.*regression"):
        make_compute_metrics(["accuracy"], "classification")


def test_predict_labels_of_all_exits_at_once(rng):
    """Fails if labels of (rows, exits, labels) differ from those of each row and exit by itself."""
    logits = rng.normal(size=(4, 3, 5))
    classes = predict_labels(logits, "single_label_classification")
    several = predict_labels(logits, "multi_label_classification")
    numbers = predict_labels(logits[..., :1], "regression")
    for row in range(4):
        for index in range(3):
            own = logits[row, index].tolist()
            assert classes[row, index] == own.index(max(own))
            assert several[row, index].tolist() == [int(logit > 0) for logit in own]
            assert numbers[row, index] == own[0]


def test_compute_metrics_of_one_label_regression(rng):
    """Fails if (rows, 1) logits are compared with (rows,) labels by broadcasting, or the GLUE mean is missing."""
    labels = rng.normal(size=30).astype(np.float32)
    logits = (labels + rng.normal(size=30).astype(np.float32))[:, None]
    values = make_compute_metrics(["pearson", "spearmanr"], "regression")(EvalPrediction(logits, labels))
    pearson = scipy.stats.pearsonr(logits[:, 0], labels).statistic
    spearman = scipy.stats.spearmanr(logits[:, 0], labels).statistic
    expected = {"pearson": pearson, "spearmanr": spearman, "combined_score": (pearson + spearman) / 2}
    assert values == pytest.approx(expected, rel=1e-5)


def test_compute_metrics_of_multi_label_rows(rng):
    """Fails if multi-label F1 is not the micro average over the decisions logit > 0."""
    logits, labels = rng.normal(size=(40, 3)), rng.integers(0, 2, (40, 3)).astype(np.float32)
    values = make_compute_metrics(["f1", "accuracy"], "multi_label_classification")(EvalPrediction(logits, labels))
    flat_f1 = sklearn.metrics.f1_score(labels.ravel(), (logits > 0).ravel())
    assert values["f1"] == pytest.approx(flat_f1)
    assert values["accuracy"] == pytest.approx(((logits > 0) == labels).all(1).mean())


def test_soft_labels_count_as_their_most_probable_class(rng):
    """What breaks: rows of shares, by which a policy may be calibrated, cannot measure it."""
    logits, shares = rng.normal(size=(40, 3)), rng.dirichlet(np.ones(3), size=40)
    compute = make_compute_metrics(["accuracy", "f1"], "single_label_classification")
    assert compute(EvalPrediction(logits, shares)) == compute(EvalPrediction(logits, shares.argmax(-1)))


def test_f1_of_more_than_two_classes_is_the_macro_average(rng):
    """Fails if F1 of three classes raises after training, or if rows that show only two change its meaning."""
    logits, labels = rng.normal(size=(40, 3)), rng.integers(0, 2, 40)
    values = make_compute_metrics(["f1"], "single_label_classification")(EvalPrediction(logits, labels))
    seen = sorted(set(labels) | set(logits.argmax(1)))
    own = [sklearn.metrics.f1_score(labels == label, logits.argmax(1) == label) for label in seen]
    assert values["f1"] == pytest.approx(np.mean(own))


def test_expected_calibration_error_equals_a_plain_loop(rng):
    """Fails if bins are shifted, left out or weighted wrongly (Guo et al. 2017, eq. 3)."""
    logits, labels = rng.normal(scale=2, size=(200, 4)), rng.integers(0, 4, 200)
    expected = 0.0
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for m in range(1, 11):
        rows = [row for row in range(200) if (m - 1) / 10 < probabilities[row].max() <= m / 10]
        if rows:
            accuracy = sum(probabilities[row].argmax() == labels[row] for row in rows) / len(rows)
            confidence = sum(probabilities[row].max() for row in rows) / len(rows)
            expected += len(rows) / 200 * abs(accuracy - confidence)
    assert expected_calibration_error(logits, labels, num_bins=10) == pytest.approx(expected)


def test_expected_calibration_error_of_known_cases():
    """Fails if full confidence falls out of the last bin."""
    sure = np.array([[1000.0, 0.0]] * 4)
    assert expected_calibration_error(sure, np.zeros(4, int)) == 0.0
    assert expected_calibration_error(sure, np.array([0, 1, 1, 1])) == pytest.approx(0.75)
    edge = np.array([[0.0, 0.0], [2.0, 0.0]])  # a confidence of exactly 1/2 belongs to the bin that ends there
    wanted = (0.5 + 1 - 1 / (1 + np.exp(-2))) / 2
    assert expected_calibration_error(edge, np.array([1, 0]), num_bins=2) == pytest.approx(wanted)
