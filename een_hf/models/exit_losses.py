"""The loss of each sample at each exit, and its reduction, which all schemes share."""

import torch
import torch.nn.functional as F


def infer_problem_type(problem_type: str | None, num_labels: int, labels: torch.Tensor) -> str:
    """The problem type as transformers infers it, from the number of labels and the dtype of `labels`."""
    if problem_type is not None:
        return problem_type
    if num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def loss_matrix(
    exit_logits: torch.Tensor,
    labels: torch.Tensor,
    problem_type: str,
    label_smoothing: float = 0.0,
    class_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss of every sample at every exit.

    Args:
        exit_logits: (batch, num_exits, num_labels).
        labels: class indices (batch,), or soft labels (batch, num_labels) that sum to 1, for
            `single_label_classification`; numbers (batch,) or (batch, num_labels) for `regression`; 0/1 of shape
            (batch, num_labels) for `multi_label_classification`.
        problem_type: one of these three.
        label_smoothing: share of the label mass spread over all classes (single-label classification).
        class_weights: (num_labels,), factors of each class' part of the loss (single-label classification).

    Returns:
        (batch, num_exits), float32 or better: cross-entropy, squared error or binary cross-entropy, the last two
        averaged over the labels.
    """
    if exit_logits.dtype in (torch.float16, torch.bfloat16):
        exit_logits = exit_logits.float()
    num_exits, num_labels = exit_logits.shape[1:]
    if problem_type == "single_label_classification":
        soft = labels.is_floating_point()
        targets = labels.to(exit_logits.dtype) if soft else labels
        targets = targets.unsqueeze(1).expand(-1, num_exits, *targets.shape[1:])
        losses = F.cross_entropy(
            exit_logits.flatten(0, 1),
            targets.flatten(0, 1),
            weight=None if class_weights is None else class_weights.to(exit_logits),
            reduction="none",
            label_smoothing=label_smoothing,
        )
        return losses.view(-1, num_exits)
    targets = labels.to(exit_logits.dtype).view(-1, 1, num_labels).expand_as(exit_logits)
    elementwise = F.mse_loss if problem_type == "regression" else F.binary_cross_entropy_with_logits
    return elementwise(exit_logits, targets, reduction="none").mean(-1)


def reduce_losses(losses: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """The mean over samples of the sum over exits of w * l.

    Args:
        losses: l, (batch, num_exits).
        weights: w, of a shape that broadcasts to l; `None`: 1.

    Returns:
        a scalar.
    """
    return (losses if weights is None else weights * losses).mean(0).sum()
