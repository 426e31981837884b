"""Conversion of logits and labels for calibration."""

import numpy as np
import torch

from ..extras import named_extras


with named_extras():
    import scipy.special


def as_tensor(values) -> torch.Tensor:
    """Convert an array or a tensor, on any device and in any precision, to float32 on the CPU."""
    return torch.as_tensor(values).detach().cpu().float()


def right_answers(last_answers: np.ndarray, labels: np.ndarray | None, problem_type: str) -> np.ndarray:
    """The right answers (num_rows, num_answers): the labels; without labels, the answers of the last exit."""
    if labels is None:
        return last_answers
    soft = problem_type == "single_label_classification" and labels.ndim == 2
    return (labels.argmax(-1) if soft else labels).reshape(last_answers.shape)


def probability_of(targets: np.ndarray, logits: np.ndarray, problem_type: str) -> np.ndarray:
    """The probability (num_rows, num_exits) of the right class; for multi-label problems the mean over the labels.

    It is 0 where it is not defined, because a logit is NaN or too large.
    """
    if problem_type == "multi_label_classification":
        found = scipy.special.expit(np.where(targets[:, None] == 1, logits, -logits)).mean(-1)
    else:
        with np.errstate(invalid="ignore"):
            found = np.take_along_axis(scipy.special.softmax(logits, -1), targets[:, None], -1)[..., 0]
    return np.nan_to_num(found)
