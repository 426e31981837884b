"""The loss of a model: that of every problem, over rows and exits, by its formula."""

import math

import pytest
import torch
from models.comparing import LABELS, assert_close


def _softmax_loss(logits, target):
    total = sum(math.exp(value) for value in logits)
    return -sum(share * math.log(math.exp(value) / total) for share, value in zip(target, logits, strict=True))


def _squared_loss(logits, target):
    return sum((value - wanted) ** 2 for value, wanted in zip(logits, target, strict=True)) / len(logits)


def _binary_loss(logits, target):
    chances = [1 / (1 + math.exp(-value)) for value in logits]
    parts = [math.log(c) if wanted else math.log(1 - c) for c, wanted in zip(chances, target, strict=True)]
    return -sum(parts) / len(parts)


def _soft_labels():
    shares = torch.rand(6, 3, generator=torch.Generator().manual_seed(3))
    return shares / shares.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("problem", "num_labels", "problem_type", "labels", "formula"),
    [
        ("single_label_classification", 3, None, LABELS, _softmax_loss),
        ("single_label_classification", 3, "single_label_classification", _soft_labels(), _softmax_loss),
        ("regression", 1, None, torch.linspace(0, 5, 6), _squared_loss),
        ("regression", 3, "regression", torch.randn(6, 3), _squared_loss),
        ("multi_label_classification", 3, None, torch.eye(3).repeat(2, 1), _binary_loss),
    ],
    ids=["classes", "soft_labels", "regression", "regression_3", "multi_label"],
)
def test_loss_is_the_joint_loss(architecture, stock_folders, problem, num_labels, problem_type, labels, formula):
    """A plain Trainer trains by `loss`: the mean over rows, summed over exits, of the problem's own loss."""
    model = architecture.model_class.from_pretrained(
        stock_folders[architecture.name, "head"],
        num_labels=num_labels,
        problem_type=problem_type,
        ignore_mismatched_sizes=True,
    ).eval()
    with torch.no_grad():
        output = model(**architecture.inputs(), labels=labels)
    assert model.config.problem_type == problem
    if problem == "single_label_classification" and not labels.is_floating_point():
        targets = [[float(label == index) for index in range(3)] for label in labels.tolist()]
    else:
        targets = labels.view(6, -1).tolist()
    total = 0.0
    for row, target in zip(output.exit_logits.double().tolist(), targets, strict=True):
        total += sum(formula(logits, target) for logits in row) / 6
    assert output.loss.item() == pytest.approx(total, abs=1e-5)


def test_last_exits_loss_is_stocks(architecture, load_stock, load_exits):
    """With one exit, fine-tuning here must be fine-tuning there."""
    model, stock, inputs = load_exits(architecture, exit_layers=[4]), load_stock(architecture), architecture.inputs()
    with torch.no_grad():
        assert_close(model(**inputs, labels=LABELS).loss, stock(**inputs, labels=LABELS).loss)


def test_trainer_scales_the_loss(architecture):
    """A forward with keywords makes the Trainer believe otherwise: gradients 4 x too large at 4 accumulation steps."""
    assert architecture.model_class.accepts_loss_kwargs is False
