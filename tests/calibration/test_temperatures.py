"""Temperatures against a grid search."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from calibration.samples import make_multi_label_rows, make_rows

from een_hf.calibration import (
    fit_temperatures,
)


def test_temperatures_minimise_the_likelihood():
    """Scores of different exits are only comparable if each exit's temperature is its own optimum."""
    logits, labels = make_rows(400)
    logits *= np.array([0.3, 1.0, 2.0, 5.0], dtype=np.float32)[:, None]
    for index, temperature in enumerate(fit_temperatures(logits, labels)):
        one = logits[:, index].astype(np.float64)

        def loss(value, one=one):
            return -scipy.special.log_softmax(one / value, -1)[np.arange(len(labels)), labels].mean()

        grid = np.geomspace(0.05, 20, 4001)
        best = grid[np.argmin([loss(value) for value in grid])]
        assert temperature == pytest.approx(best, rel=5e-3)


def test_temperatures_take_soft_labels_and_the_last_exit():
    """Mixup gives soft labels and unlabelled rows none: neither may change what hard labels give."""
    logits, labels = make_rows(300)
    hard = fit_temperatures(torch.tensor(logits), torch.tensor(labels))
    assert fit_temperatures(logits, np.eye(3)[labels]) == pytest.approx(hard)
    assert fit_temperatures(logits, None) == pytest.approx(fit_temperatures(logits, logits[:, -1].argmax(-1)))
    smooth = 0.9 * np.eye(3)[labels] + 0.1 / 3
    assert all(soft > sharp for soft, sharp in zip(fit_temperatures(logits, smooth), hard, strict=True))


def test_temperatures_of_several_labels_minimise_the_binary_likelihood():
    """A softmax over labels that do not exclude each other has another optimum."""
    logits, labels = make_multi_label_rows(400)
    logits *= np.array([0.3, 1.0, 2.0, 5.0], dtype=np.float32)[:, None]
    grid = np.geomspace(0.05, 20, 4001)
    for index, temperature in enumerate(fit_temperatures(logits, labels, "multi_label_classification")):
        signed = np.where(labels == 1, 1.0, -1.0) * logits[:, index]
        best = grid[np.argmin([np.logaddexp(0, -signed / value).mean() for value in grid])]
        assert temperature == pytest.approx(best, rel=5e-3)
    perfect = 5.0 * (2 * labels[:, None].repeat(2, 1) - 1)
    assert fit_temperatures(perfect, labels, "multi_label_classification") == [1.0, 1.0]
    assert fit_temperatures(perfect, None, "multi_label_classification") == [1.0, 1.0]


def test_temperature_without_an_optimum_is_one():
    """An exit that is always right has its optimum at 0, where every score is 1 and no threshold can part rows."""
    logits, labels = make_rows(200)
    logits[np.arange(200), 1, labels] += 50
    temperatures = fit_temperatures(logits, labels)
    assert temperatures[1] == 1.0
    assert temperatures[0] != 1.0
    # Soft labels have one, also where every answer is right.
    soft = scipy.special.softmax(logits[:, 0].astype(np.float64), -1)
    scaled = logits[:, :1] * np.array([1.0, 2.0, 3.0])[:, None]
    assert fit_temperatures(scaled, soft) == pytest.approx([1.0, 2.0, 3.0], rel=1e-3)
    assert fit_temperatures(np.full((3, 2, 2), np.nan), np.zeros(3, int)) == [1.0, 1.0]
