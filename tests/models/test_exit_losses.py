"""Losses per sample and exit, against loops of plain Python numbers."""

import math

import pytest
import torch
from transformers.trainer_pt_utils import LabelSmoother

from een_hf.models.exit_losses import infer_problem_type, loss_matrix, reduce_losses


BATCH, EXITS, LABELS = 5, 3, 4


@pytest.fixture
def exit_logits():
    return torch.randn(BATCH, EXITS, LABELS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3


def _cross_entropy(logits, target):
    """-sum_c target_c log softmax(logits)_c on lists of numbers."""
    peak = max(logits)
    log_sum = peak + math.log(sum(math.exp(value - peak) for value in logits))
    return -sum(share * (value - log_sum) for share, value in zip(target, logits, strict=True))


def _loop(exit_logits, targets, loss):
    rows = zip(exit_logits.tolist(), targets, strict=True)
    return torch.tensor([[loss(logits, target) for logits in row] for row, target in rows], dtype=torch.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_single_label(exit_logits, smoothing):
    """Rows and exits mixed up by a wrong reshape would train each exit on another row's label."""
    labels = torch.tensor([0, 3, 1, 1, 2])
    targets = [
        [(1 - smoothing) * (label == index) + smoothing / LABELS for index in range(LABELS)]
        for label in labels.tolist()
    ]
    result = loss_matrix(exit_logits, labels, "single_label_classification", label_smoothing=smoothing)
    torch.testing.assert_close(result, _loop(exit_logits, targets, _cross_entropy), rtol=0, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_label_smoothing_is_the_trainers(exit_logits, smoothing):
    """--label_smoothing_factor would mean something else here than in the plain Trainer."""
    labels = torch.tensor([0, 3, 1, 1, 2])
    result = loss_matrix(exit_logits, labels, "single_label_classification", label_smoothing=smoothing).mean(0)
    for index in range(EXITS):
        expected = LabelSmoother(epsilon=smoothing)({"logits": exit_logits[:, index]}, labels)
        # LabelSmoother sums in float32.
        assert result[index].item() == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_labels(exit_logits, smoothing):
    """Mixup's labels would be rounded to a class, or treated as multi-label."""
    labels = torch.rand(BATCH, LABELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = labels / labels.sum(1, keepdim=True)
    targets = [[(1 - smoothing) * share + smoothing / LABELS for share in row] for row in labels.tolist()]
    result = loss_matrix(exit_logits, labels, "single_label_classification", label_smoothing=smoothing)
    torch.testing.assert_close(result, _loop(exit_logits, targets, _cross_entropy), rtol=0, atol=1e-12)


def test_one_hot_soft_labels_are_hard_labels(exit_logits):
    """The same labels in their two forms would give two losses."""
    labels = torch.tensor([0, 3, 1, 1, 2])
    hard = loss_matrix(exit_logits, labels, "single_label_classification", label_smoothing=0.1)
    one_hot = torch.nn.functional.one_hot(labels, LABELS).double()
    soft = loss_matrix(exit_logits, one_hot, "single_label_classification", label_smoothing=0.1)
    torch.testing.assert_close(hard, soft, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(BATCH,), (BATCH, 1)])
def test_regression_on_one_label(exit_logits, shape):
    """Labels (batch,) against outputs (batch, 1) broadcast to (batch, batch) where shapes are not aligned."""
    labels = torch.arange(BATCH, dtype=torch.float64).reshape(shape)
    result = loss_matrix(exit_logits[..., :1], labels, "regression")
    expected = _loop(exit_logits[..., 0], labels.flatten().tolist(), lambda value, target: (value - target) ** 2)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_regression_on_several_labels(exit_logits):
    """The mean over labels keeps the scale that transformers gives."""
    labels = torch.randn(BATCH, LABELS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    result = loss_matrix(exit_logits, labels, "regression")
    expected = _loop(
        exit_logits,
        labels.tolist(),
        lambda values, targets: sum((v - t) ** 2 for v, t in zip(values, targets, strict=True)) / LABELS,
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


def test_integer_regression_labels(exit_logits):
    """Scores 0 to 5 read from a file arrive as integers."""
    labels = torch.tensor([0, 5, 2, 3, 1])
    result = loss_matrix(exit_logits[..., :1], labels, "regression")
    expected = _loop(exit_logits[..., 0], labels.tolist(), lambda value, target: (value - target) ** 2)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_multi_label(exit_logits, dtype):
    """Binary cross-entropy, averaged over the labels as in transformers."""
    labels = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0]], dtype=dtype)

    def binary(values, targets):
        parts = [
            math.log1p(math.exp(-v)) if t else math.log1p(math.exp(v)) for v, t in zip(values, targets, strict=True)
        ]
        return sum(parts) / LABELS

    result = loss_matrix(exit_logits, labels, "multi_label_classification")
    torch.testing.assert_close(result, _loop(exit_logits, labels.tolist(), binary), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(exit_logits, dtype):
    """In bf16 the losses would carry three digits, too few for a learning curve or for weights made from them."""
    labels = torch.tensor([0, 3, 1, 1, 2])
    rounded = exit_logits.to(dtype)
    result = loss_matrix(rounded, labels, "single_label_classification")
    assert result.dtype == torch.float32
    expected = _loop(rounded.double(), torch.nn.functional.one_hot(labels, LABELS).tolist(), _cross_entropy)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-5)


def test_reduction():
    """Mean over samples and sum over exits: any other order or mean scales the learning rate by K or by the batch."""
    losses, weights = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    per_exit = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    plain = sum(sum(row) for row in losses.tolist()) / 5
    weighted = sum(losses[i, k].item() * weights[i, k].item() for i in range(5) for k in range(3)) / 5
    by_exit = sum(losses[i, k].item() * per_exit[k].item() for i in range(5) for k in range(3)) / 5
    assert reduce_losses(losses).item() == pytest.approx(plain, abs=1e-12)
    assert reduce_losses(losses, weights).item() == pytest.approx(weighted, abs=1e-12)
    assert reduce_losses(losses, per_exit).item() == pytest.approx(by_exit, abs=1e-12)


@pytest.mark.parametrize(
    ("given", "num_labels", "labels", "expected"),
    [
        (None, 1, torch.tensor([0.5]), "regression"),
        (None, 1, torch.tensor([2]), "regression"),
        (None, 3, torch.tensor([2]), "single_label_classification"),
        (None, 3, torch.tensor([2], dtype=torch.int32), "single_label_classification"),
        (None, 3, torch.tensor([[0.0, 1.0, 1.0]]), "multi_label_classification"),
        ("single_label_classification", 3, torch.tensor([[0.0, 0.5, 0.5]]), "single_label_classification"),
        ("regression", 3, torch.tensor([[0.0, 0.5, 0.5]]), "regression"),
    ],
)
def test_problem_type_is_inferred_as_in_transformers(given, num_labels, labels, expected):
    """A script that relies on transformers' inference would silently train another problem."""
    assert infer_problem_type(given, num_labels, labels) == expected
