"""Weights of exits and of classes, which multiply the weights of every scheme."""

import numpy as np
import torch

from ..models import ExitConfigurationError
from .sampling import read_column


COLLATED_LABELS = ("labels", "label", "label_ids")  # the collators of transformers rename these to `labels`


def exit_loss_weights(weights: list[str] | str, num_exits: int) -> torch.Tensor:
    """The weight of each exit's loss, float32 of shape (num_exits,).

    Args:
        weights: `uniform` (all 1), `linear` (k/K for exit k of K), or K numbers, as `--exit_loss_weights` takes them.

    Raises:
        ExitConfigurationError: another name, not K numbers, a negative number, or nothing but zeros.
    """
    given = [weights] if isinstance(weights, str) else list(weights)
    if given == ["uniform"]:
        return torch.ones(num_exits)
    if given == ["linear"]:
        return torch.arange(1, num_exits + 1) / num_exits
    return _given_weights("exit_loss_weights", given, "`uniform`, `linear`", "exit", num_exits)


def class_weights(weights: list[str] | str, num_labels: int, rows) -> torch.Tensor:
    """The weight of each class in the training loss, float32 of shape (num_labels,).

    Args:
        weights: `balanced`: a class with n_c of the N rows has the weight N / (C n_c), with C the number of classes
            that occur, so that all classes have the same influence and the mean over rows is 1; or num_labels numbers.
        num_labels: number of classes.
        rows: training rows, whose labels `balanced` counts.

    Raises:
        ExitConfigurationError: another name, not num_labels numbers, a number below 0 or not finite, nothing but
            zeros, or `balanced` for rows whose labels cannot be read without reading all of the rows.
    """
    given = [weights] if isinstance(weights, str) else list(weights)
    if given == ["balanced"]:
        counts = torch.bincount(_labels_of(rows), minlength=num_labels)
        present = counts > 0
        return torch.where(present, counts.sum() / (present.sum() * counts.clamp(min=1)), 1.0)
    return _given_weights("class_weights", given, "`balanced`", "label", num_labels)


def _given_weights(flag: str, given: list[str], names: str, of: str, count: int) -> torch.Tensor:
    """One number per exit or label, in float32, in which they must be weights too: 1e39 is infinite, 1e-50 is zero."""
    try:
        numbers = [float(number) for number in given]
    except ValueError:
        raise ExitConfigurationError(f"--{flag} takes {names} or {count} numbers, not {' '.join(given)!r}.") from None
    if len(numbers) != count:
        raise ExitConfigurationError(
            f"--{flag} has {len(numbers)} numbers, but the model has {count} {of}s; give one per {of}."
        )
    weights = torch.tensor(numbers, dtype=torch.float32)
    if not ((weights >= 0) & weights.isfinite()).all() or not weights.any():
        raise ExitConfigurationError(f"--{flag} must be finite, not negative, and not all zero (in float32).")
    return weights


def _labels_of(rows) -> torch.Tensor:
    """The class ids of training rows, int64 of shape (num_rows,)."""
    found = read_column(rows, COLLATED_LABELS)
    if found is None:
        raise ExitConfigurationError(
            "--class_weights balanced needs the labels of all rows before training, as a column of a datasets.Dataset "
            "or in a list; a stream has no such column: give one number per label."
        )
    labels = torch.as_tensor(np.asarray(found[1]))
    if labels.is_floating_point() or labels.dim() != 1:
        raise ExitConfigurationError("--class_weights balanced counts class ids; these labels are not class ids.")
    return labels.long()
