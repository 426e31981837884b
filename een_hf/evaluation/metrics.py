"""Metrics without downloads, predictions from logits, checks of labels, and the calibration error."""

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import EvalPrediction

from ..extras import named_extras
from ..models import ExitConfigurationError


with named_extras():
    import datasets
    import evaluate
    import scipy.special
    import scipy.stats
    import sklearn.metrics


_MULTI_LABEL = "multilabel"
_MULTI_CLASS = "multiclass"


class _InMemoryMetric(evaluate.Metric):
    """A metric of (predictions, references) that uses no files, and so works in any number of processes.

    A subclass defines the dtype of its inputs and `score`. With the config name `multilabel` each row is a list.
    """

    dtype = "int64"
    description = ""

    def __init__(self, config_name: str | None = None, **kwargs):
        super().__init__(config_name, **{"keep_in_memory": True, **kwargs})

    def _info(self):
        value = datasets.Value(self.dtype)
        many = self.config_name == _MULTI_LABEL
        feature = datasets.Sequence(value) if many else value
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description="",
            features=datasets.Features({"predictions": feature, "references": feature}),
            format=None if many else "numpy",
        )

    def _build_data_dir(self):
        return self._data_dir_root if self.keep_in_memory else super()._build_data_dir()

    def _compute(self, predictions, references):
        return {self.key: float(self.score(np.asarray(predictions), np.asarray(references)))}

    def score(self, predictions: np.ndarray, references: np.ndarray) -> float:
        """Compute the metric.

        Args:
            predictions: (num_rows,), or (num_rows, num_labels) for `multilabel`.
            references: of the same shape.

        Returns:
            the metric.
        """
        raise NotImplementedError


class Accuracy(_InMemoryMetric):
    """Share of rows with the right prediction; with `multilabel`, of rows with the right predictions of all labels."""

    key = "accuracy"
    description = "Share of rows with the right prediction."

    def score(self, predictions, references):
        return sklearn.metrics.accuracy_score(references, predictions)


class F1(_InMemoryMetric):
    """F1 of class 1 (two classes), macro average (`multiclass`) or micro average (`multilabel`); 0 if undefined."""

    key = "f1"
    description = "Harmonic mean of precision and recall."

    def score(self, predictions, references):
        average = {_MULTI_LABEL: "micro", _MULTI_CLASS: "macro"}.get(self.config_name, "binary")
        return sklearn.metrics.f1_score(references, predictions, average=average, zero_division=0)


class MatthewsCorrelation(_InMemoryMetric):
    """Matthews correlation of classes; 0 if predictions or references are constant."""

    key = "matthews_correlation"
    description = "Matthews correlation coefficient."

    def score(self, predictions, references):
        if _is_constant(predictions) or _is_constant(references):
            return 0.0
        return sklearn.metrics.matthews_corrcoef(references, predictions)


class Pearson(_InMemoryMetric):
    """Pearson correlation; 0 if predictions or references are constant."""

    key = "pearson"
    dtype = "float64"
    description = "Pearson correlation coefficient."

    def score(self, predictions, references):
        return _correlation(scipy.stats.pearsonr, predictions, references)


class Spearman(_InMemoryMetric):
    """Spearman rank correlation; 0 if predictions or references are constant."""

    key = "spearmanr"
    dtype = "float64"
    description = "Spearman rank correlation coefficient."

    def score(self, predictions, references):
        return _correlation(scipy.stats.spearmanr, predictions, references)


class MeanSquaredError(_InMemoryMetric):
    """Mean squared error; NaN if a prediction is NaN."""

    key = "mse"
    dtype = "float64"
    description = "Mean squared error."

    def score(self, predictions, references):
        return np.mean((predictions - references) ** 2)


METRICS = {metric.key: metric for metric in (Accuracy, F1, MatthewsCorrelation, Pearson, Spearman, MeanSquaredError)}


def _is_constant(values: np.ndarray) -> bool:
    return bool((values == values[0]).all())


def _correlation(function: Callable, predictions: np.ndarray, references: np.ndarray) -> float:
    if _is_constant(predictions) or _is_constant(references):
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.NearConstantInputWarning)
        return function(predictions, references).statistic


def load_metrics(names: Sequence[str], config_name: str | None = None) -> evaluate.CombinedEvaluations:
    """Metrics by name, as one object with `compute(predictions=, references=) -> dict[str, float]`.

    Args:
        names: keys of `METRICS`.
        config_name: `multilabel` for rows of 0/1, `multiclass` for more than two classes (a macro F1), else `None`.

    Returns:
        the metrics, with one method `compute`.

    Raises:
        ExitConfigurationError: a name that is not in `METRICS`, or a metric of numbers for multi-label rows.
    """
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ExitConfigurationError(f"Unknown metric {unknown[0]!r}; known metrics: {', '.join(sorted(METRICS))}.")
    if config_name == _MULTI_LABEL:
        unfit = [name for name in names if name not in ("accuracy", "f1")]
        if unfit:
            raise ExitConfigurationError(f"Metric {unfit[0]!r} does not fit multi-label rows; use accuracy or f1.")
    return evaluate.combine([METRICS[name](config_name) for name in names])


def predict_labels(logits: np.ndarray, problem_type: str) -> np.ndarray:
    """The predictions of logits.

    Args:
        logits: (..., num_labels).
        problem_type: as in transformers.

    Returns:
        `single_label_classification`: class indices (...), int64. `multi_label_classification`: 0/1 (..., num_labels),
        int64, 1 where the logit is above 0. `regression`: the numbers, (...) for one label, else (..., num_labels).

    Raises:
        ExitConfigurationError: another problem type.
    """
    logits = np.asarray(logits)
    if problem_type == "single_label_classification":
        return logits.argmax(-1)
    if problem_type == "multi_label_classification":
        return (logits > 0).astype(np.int64)
    if problem_type == "regression":
        return logits[..., 0] if logits.shape[-1] == 1 else logits
    raise ExitConfigurationError(
        f"problem_type is {problem_type!r}; it must be one of: multi_label_classification, regression, "
        "single_label_classification."
    )


def check_labels(labels, num_rows: int, num_labels: int, problem_type: str) -> np.ndarray:
    """Check that each row has a label, since a missing one would count as an error of every exit.

    Args:
        labels: an array, a tensor or a list. `single_label_classification`: class indices (num_rows,), or soft labels
            (num_rows, num_labels) that sum to 1. `multi_label_classification`: 0/1, (num_rows, num_labels).
            `regression`: numbers, (num_rows,) or (num_rows, num_labels).
        num_rows: number of rows.
        num_labels: number of labels of the model.
        problem_type: as in transformers.

    Returns:
        the labels as an array.

    Raises:
        ExitConfigurationError: labels of another number, shape or kind, or some that are missing (-1, -100, NaN) or
            that the model does not have; the message counts them and names the first.
    """
    if torch.is_tensor(labels):
        labels = labels.detach().cpu()
        labels = (labels.float() if labels.is_floating_point() else labels).numpy()
    labels = np.asarray(labels)
    if labels.dtype == bool:
        labels = labels.astype(np.int64)
    if labels.ndim == 0 or len(labels) != num_rows:
        raise ExitConfigurationError(
            f"{num_rows} rows need as many labels, not {len(labels) if labels.ndim else labels}."
        )
    vectors = labels.ndim == 2 and labels.shape[1] == num_labels
    numbers = labels.dtype.kind in "iuf"
    if problem_type == "single_label_classification":
        wanted = f"class indices from 0 to {num_labels - 1}"
        if numbers and vectors and num_labels > 1:
            wanted = f"soft labels, {num_labels} numbers from 0 that sum to 1"
            valid = (labels >= 0).all(1) & (np.abs(labels.sum(1, dtype=np.float64) - 1) < 1e-2)
        elif labels.dtype.kind in "iu" and labels.ndim == 1:
            valid = (labels >= 0) & (labels < num_labels)
        else:
            valid = None
    elif problem_type == "multi_label_classification":
        wanted = f"{num_labels} numbers for each row, 0 or 1"
        valid = np.isin(labels, (0, 1)).all(1) if numbers and vectors else None
    else:
        wanted = "one finite number for each row" if num_labels == 1 else f"{num_labels} finite numbers for each row"
        fits = numbers and labels.size == num_rows * num_labels
        valid = np.isfinite(labels).reshape(num_rows, num_labels).all(1) if fits else None
    if valid is None:
        raise ExitConfigurationError(f"Labels of {problem_type} are {wanted}, not {labels.dtype} {labels.shape}.")
    if not valid.all():
        first = int(np.argmin(valid))
        raise ExitConfigurationError(
            f"{np.count_nonzero(~valid)} of {num_rows} rows have no label that the model knows; the first is row "
            f"{first} (counted from 0) with {labels[first]}. Labels are {wanted}: leave these rows out, or give no "
            "labels at all, which is enough to calibrate for agreement with the last exit (--risk consistency)."
        )
    return labels


def make_compute_metrics(names: Sequence[str], problem_type: str) -> Callable[[EvalPrediction], dict[str, float]]:
    """Make a `compute_metrics` for a `Trainer` whose predictions are logits (num_rows, num_labels).

    If there are several metrics, their mean is added as `combined_score`, as in run_glue.

    Args:
        names: keys of `METRICS`.
        problem_type: as in transformers.

    Returns:
        the function; its attribute `metric_names` lists the metrics that it returns.

    Raises:
        ExitConfigurationError: an unknown metric or problem type, or a metric that does not fit the problem.
    """
    multi_label = problem_type == "multi_label_classification"
    load_metrics(names, _MULTI_LABEL if multi_label else None)
    predict_labels(np.zeros((1, 1)), problem_type)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = np.asarray(prediction.predictions)
        many = problem_type == "single_label_classification" and logits.shape[-1] > 2
        metrics = load_metrics(names, _MULTI_LABEL if multi_label else _MULTI_CLASS if many else None)
        references = np.asarray(prediction.label_ids)
        if problem_type == "regression":
            references = references.reshape(len(logits))
        elif problem_type == "single_label_classification" and references.ndim == 2:  # soft labels
            references = references.argmax(-1)
        values = metrics.compute(predictions=predict_labels(logits, problem_type), references=references)
        if len(values) > 1:
            values["combined_score"] = math.fsum(values.values()) / len(values)
        return values

    compute_metrics.metric_names = [*names, *(["combined_score"] if len(names) > 1 else [])]
    return compute_metrics


def expected_calibration_error(logits: np.ndarray, labels: np.ndarray, num_bins: int = 15) -> float:
    """Expected calibration error of a single-label classifier.

    ECE = sum_m |B_m|/n |acc(B_m) - conf(B_m)|, B_m the rows with confidence in ((m-1)/M, m/M].

    Args:
        logits: (num_rows, num_labels).
        labels: class indices (num_rows,), or soft labels (num_rows, num_labels).
        num_bins: M.

    Returns:
        the error, between 0 and 1.

    Raises:
        ExitConfigurationError: missing or impossible labels.

    References:
        On Calibration of Modern Neural Networks (Guo et al., ICML 2017), equation 3.
    """
    logits = np.asarray(logits, dtype=np.float64)
    labels = check_labels(labels, *logits.shape, "single_label_classification")
    probabilities = scipy.special.softmax(logits, axis=-1)
    confidence = probabilities.max(-1)
    right = logits.argmax(-1) == (labels if labels.ndim == 1 else labels.argmax(-1))
    edges = np.linspace(0, 1, num_bins + 1)
    bins = np.searchsorted(edges[1:-1], confidence, side="left")
    # |B_m| (acc - conf) is the sum of (right - confidence) over the bin.
    gaps = np.bincount(bins, weights=right - confidence, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence))
