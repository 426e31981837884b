"""The exits before the last: trained on kept features, and what they answer."""

import math

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import set_seed

from ..models import EarlyExitMixin


def train_heads(
    model: EarlyExitMixin,
    features: np.ndarray,
    teacher_logits: np.ndarray,
    *,
    num_train_epochs: int = 20,
    train_batch_size: int = 32,
    head_learning_rate: float = 1e-3,
    seed: int = 42,
) -> None:
    """Teach exits 1..K-1 the model's own probabilities: cross-entropy with them as soft labels, AdamW, cosine to zero.

    Args:
        model: an early-exit model; nothing but its exit heads changes.
        features: (num_rows, num_exits - 1, width), what the heads read.
        teacher_logits: (num_rows, num_labels).
        num_train_epochs: passes over the rows.
        train_batch_size: rows per step.
        head_learning_rate: at the start.
        seed: of the order of the rows.
    """
    set_seed(seed)
    heads, dtype = model.exit_heads, model.dtype
    heads.float().train()
    targets = torch.from_numpy(teacher_logits).softmax(-1)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=head_learning_rate)
    steps = math.ceil(len(features) / train_batch_size) * num_train_epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    with tqdm(total=steps, unit="step", desc="Training exits") as bar:
        for _ in range(num_train_epochs):
            for rows in torch.randperm(len(features)).split(train_batch_size):
                inputs = torch.from_numpy(features[rows.numpy()]).to(model.device).float()
                logits = _head_logits(model, inputs)
                batch_targets = targets[rows].to(logits).unsqueeze(1)
                loss = -(batch_targets * logits.log_softmax(-1)).sum(-1).mean(0).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    heads.to(dtype).eval()


@torch.inference_mode()
def logits_of_features(model: EarlyExitMixin, features: np.ndarray, teacher_logits: np.ndarray) -> np.ndarray:
    """Every exit's logits (num_rows, num_exits, num_labels), float32, from features and the last exit's logits."""
    parts = [
        _head_logits(model, torch.from_numpy(part).to(model.device, model.dtype)).float().cpu()
        for part in np.array_split(features, max(1, len(features) // 1024))
    ]
    return np.concatenate([torch.cat(parts).numpy(), teacher_logits[:, None]], 1)


def _head_logits(model: EarlyExitMixin, features: torch.Tensor) -> torch.Tensor:
    """Logits (rows, num_exits - 1, num_labels) of the early exits, of features (rows, num_exits - 1, width)."""
    heads = (model.exit_head_modules(index)[0] for index in range(model.num_exits - 1))
    return torch.stack([head.classify(read) for head, read in zip(heads, features.unbind(1), strict=True)], 1)
