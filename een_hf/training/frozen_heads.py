"""Training of the exits before the last on a frozen model, from stored inputs of their heads (features)."""

import math

import numpy as np
import psutil
import torch
from tqdm.auto import tqdm
from transformers import set_seed

from ..errors import NonFiniteLossError
from ..models import EarlyExitMixin, ExitConfigurationError
from ..models.exit_losses import loss_matrix, reduce_losses
from ..models.stacked_heads import can_stack


@torch.inference_mode()
def read_features(model: EarlyExitMixin, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the inputs of the heads before the last, and the logits of the last exit.

    Args:
        model: an early-exit model in eval mode, whose exits predict by themselves.
        inputs: model inputs on its device, without labels.

    Returns:
        features (batch, num_exits - 1, width) and the last exit's logits (batch, num_labels), both in float32.
    """
    examples, last = model.embed(**inputs).unpadded(), model.num_exits - 1
    context, hidden, mask = model.make_context(examples), examples.hidden, examples.attention_mask
    features = []
    for index in range(last):
        hidden = model.run_layers(index - 1, index, hidden, context)
        features.append(model.exit_head_modules(index)[0].pool(hidden, mask))
    logits = model.compute_exit(last, model.run_layers(last - 1, last, hidden, context), mask)
    return torch.stack(features, 1).float(), logits.float()


def new_features(shape: tuple[int, ...], dtype: str, remedy: str) -> np.ndarray:
    """An array for features, whose values are not set.

    Args:
        shape: (num_rows, num_exits - 1, width).
        dtype: their precision.
        remedy: the end of the message of the error.

    Returns:
        the array.

    Raises:
        ExitConfigurationError: it would be larger than the free memory.
    """
    needed, free = math.prod(shape) * np.dtype(dtype).itemsize, psutil.virtual_memory().available
    if needed > free:
        raise ExitConfigurationError(
            f"The inputs of the exits' heads take {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free: "
            f"{remedy}."
        )
    return np.empty(shape, dtype)


def train_heads(
    model: EarlyExitMixin,
    features: np.ndarray,
    teacher_logits: np.ndarray,
    *,
    num_train_epochs: int = 20,
    train_batch_size: int = 32,
    head_learning_rate: float = 1e-3,
    seed: int = 42,
    disable_tqdm: bool = False,
) -> float:
    """Train exits 1..K-1 to predict what the last exit predicts, by AdamW with a cosine schedule to zero.

    The loss is the cross-entropy with the last exit's probabilities as soft labels; for multi-label problems binary
    cross-entropy, for regression the squared difference.

    Args:
        model: an early-exit model; only its exit heads change.
        features: (num_rows, num_exits - 1, width), the inputs of the heads.
        teacher_logits: (num_rows, num_labels), of the last exit.
        num_train_epochs: number of epochs.
        train_batch_size: rows per step.
        head_learning_rate: learning rate at the start.
        seed: seed of the order of the rows.
        disable_tqdm: whether to hide the progress bar.

    Returns:
        the mean loss per row and exit in the last epoch.

    Raises:
        NonFiniteLossError: the loss is not finite.
    """
    set_seed(seed)
    heads, dtype = model.exit_heads, model.dtype
    heads.float().train()
    problem_type, targets = model.config.problem_type, torch.from_numpy(teacher_logits)
    if problem_type == "multi_label_classification":
        targets = targets.sigmoid()
    elif problem_type != "regression":
        problem_type, targets = "single_label_classification", targets.softmax(-1)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=head_learning_rate)
    stack = model.device.type != "cpu" if model.stack_heads is None else model.stack_heads
    steps = math.ceil(len(features) / train_batch_size) * num_train_epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with tqdm(total=steps, unit="step", desc="Training exits", disable=disable_tqdm) as bar:
        for _ in range(num_train_epochs):
            total = 0.0
            for rows in torch.randperm(len(features)).split(train_batch_size):
                inputs = torch.from_numpy(features[rows.numpy()]).to(model.device).float()
                logits = _head_logits(model, inputs, stack)
                loss = reduce_losses(loss_matrix(logits, targets[rows].to(logits), problem_type))
                total += loss.detach() * len(rows)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            if not math.isfinite(total):
                raise NonFiniteLossError(
                    "The loss of the early exits is not finite: give a lower learning rate (--head_learning_rate; "
                    "two_stage: --second_stage_learning_rate)."
                )
    heads.to(dtype).eval()
    return float(total) / len(features) / (model.num_exits - 1)


@torch.inference_mode()
def logits_of_features(model: EarlyExitMixin, features: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
    """The logits of all exits (num_rows, num_exits, num_labels), float32, from features and the last exit's logits."""
    parts = [
        _head_logits(model, torch.from_numpy(part).to(model.device, model.dtype)).float().cpu()
        for part in np.array_split(features, math.ceil(features.nbytes / 2**26) or 1)
    ]
    return np.concatenate([torch.cat(parts).numpy(), teacher_logits[:, None]], 1)


def _head_logits(model: EarlyExitMixin, features: torch.Tensor, stack: bool = False) -> torch.Tensor:
    """Logits (rows, num_exits - 1, num_labels) of the early exits, of features (rows, num_exits - 1, width)."""
    heads = [model.exit_head_modules(index)[0] for index in range(model.num_exits - 1)]
    if stack and can_stack(heads):
        return type(heads[0]).classify_stacked(heads, features.transpose(0, 1)).transpose(0, 1)
    return torch.stack([head.classify(read) for head, read in zip(heads, features.unbind(1), strict=True)], 1)
