"""One temperature per exit."""

import math

import numpy as np

from ..evaluation.metrics import check_labels, predict_labels
from ..extras import named_extras
from .arrays import as_tensor


with named_extras():
    import scipy.optimize


def fit_temperatures(
    exit_logits: np.ndarray, labels: np.ndarray | None, problem_type: str = "single_label_classification"
) -> list[float]:
    """Fit one temperature per exit, which minimises the negative log-likelihood of this exit.

    For multi-label problems this is the mean of the binary log-likelihoods of the labels. Temperatures are searched
    between 1/20 and 20. If an exit is right on every row, there is no minimum (the likelihood rises towards
    temperature 0), and its temperature is 1.

    Args:
        exit_logits: (num_rows, num_exits, num_labels).
        labels: as in `calibrate`; `None`: the predictions of the last exit.
        problem_type: `single_label_classification` or `multi_label_classification`.

    Returns:
        one temperature per exit.

    Raises:
        ExitConfigurationError: labels that are missing or impossible.

    References:
        On Calibration of Modern Neural Networks (Guo et al., ICML 2017), section 4.2.
    """
    logits = as_tensor(exit_logits).double().numpy()
    num_rows, num_exits, num_labels = logits.shape
    if labels is None:
        labels = predict_labels(logits[:, -1], problem_type)
    targets = check_labels(labels, num_rows, num_labels, problem_type)
    if targets.ndim == 1:
        targets = np.eye(num_labels)[targets.astype(np.int64)]
    finite = np.isfinite(logits).all((1, 2))
    logits, targets = logits[finite], targets[finite]
    if len(logits) == 0:
        return [1.0] * num_exits
    if problem_type == "multi_label_classification":
        # Each label is a choice between two classes of logits 0 and z.
        logits = np.stack([np.zeros_like(logits), logits], -1).swapaxes(1, 2).reshape(-1, num_exits, 2)
        targets = np.stack([1 - targets, targets], -1).reshape(-1, 2)
    classes = targets.argmax(-1)
    hard = (targets.max(-1) == 1).all()

    def fit(one: np.ndarray) -> float:
        # Relative to the largest, so that the softmax does not overflow.
        one = one - one.max(-1, keepdims=True)
        if hard and (one.argmax(-1) == classes).all():
            return 1.0

        def loss(log_temperature: float) -> float:
            scaled = one / math.exp(log_temperature)
            return float((np.log(np.exp(scaled).sum(-1)) - (scaled * targets).sum(-1)).mean())

        bounds = (math.log(0.05), math.log(20))
        return math.exp(scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded").x)

    return [fit(logits[:, index]) for index in range(num_exits)]
