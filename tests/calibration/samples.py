"""Calibration rows, and the cost and accuracy of a policy by plain loops."""

import numpy as np
import torch


def make_rows(num_rows, num_exits=4, num_labels=3, seed=0):
    """Logits (num_rows, num_exits, num_labels) of exits that get better, on rows of uneven difficulty; labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_labels, num_rows)
    logits = rng.normal(size=(num_rows, num_exits, num_labels))
    ease = rng.normal(size=(num_rows, 1))
    logits[np.arange(num_rows), :, labels] += np.maximum(0, np.linspace(0.8, 3, num_exits) + ease)
    return logits.astype(np.float32), labels


def make_multi_label_rows(num_rows, num_exits=4, num_labels=3, seed=0):
    """As `make_rows`, each label a matter of its own; labels are 0/1, (num_rows, num_labels)."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, (num_rows, num_labels))
    logits = rng.normal(size=(num_rows, num_exits, num_labels))
    ease = rng.normal(size=(num_rows, 1)) + np.linspace(0.8, 3, num_exits)
    logits += np.maximum(0, ease)[..., None] * (2 * labels - 1)[:, None]
    return logits.astype(np.float32), labels


def even_costs(num_exits):
    return np.arange(1, num_exits + 1) / num_exits


def outcome_of(policy, logits, labels, costs):
    """Average cost and accuracy of a policy, a row and an exit at a time."""
    scores = policy.scores(torch.tensor(logits)).tolist()
    spent = right = 0
    for row, row_scores in enumerate(scores):
        index = 0
        while index < len(costs) - 1 and not row_scores[index] >= policy.thresholds[index]:
            index += 1
        spent += costs[index]
        right += int(logits[row, index].argmax() == labels[row])
    return spent / len(scores), right / len(scores)


MULTI = {"problem_type": "multi_label_classification", "criterion": "label_confidence"}


def label_outcome_of(policy, logits, costs, target):
    """Average cost and losses against 0/1 targets (num_rows, num_labels), a row, an exit and a label at a time."""
    spent, shares = 0.0, []
    for row, exits in enumerate(logits.astype(np.float64)):
        for index, one in enumerate(exits):
            p = 1 / (1 + np.exp(-one / (policy.temperatures or [1.0] * len(costs))[index]))
            if index == len(costs) - 1 or min(max(value, 1 - value) for value in p) >= policy.thresholds[index]:
                break
        spent += costs[index]
        shares.append(np.mean([(value > 0) != truth for value, truth in zip(one, target[row], strict=True)]))
    return spent / len(logits), np.array(shares)
