"""Weights per exit, which every scheme multiplies into its own."""

import torch

from ..models.configuration_een import ExitConfigurationError


def exit_loss_weights(weights: list[str] | str, num_exits: int) -> torch.Tensor:
    """The weight of each exit's loss, float32 of shape (num_exits,).

    Args:
        weights: `uniform` (all 1), `linear` (k/K for exit k of K), or K numbers, as `--exit_loss_weights` takes them.

    Raises:
        ExitConfigurationError: another word, not K numbers, a negative number, or nothing but zeros.
    """
    words = [weights] if isinstance(weights, str) else list(weights)
    if words == ["uniform"]:
        return torch.ones(num_exits)
    if words == ["linear"]:
        return torch.arange(1, num_exits + 1) / num_exits
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        raise ExitConfigurationError(
            f"--exit_loss_weights takes `uniform`, `linear` or {num_exits} numbers, not {' '.join(words)!r}."
        ) from None
    if len(numbers) != num_exits:
        raise ExitConfigurationError(
            f"--exit_loss_weights has {len(numbers)} numbers, but the model has {num_exits} exits; give one per exit."
        )
    if not all(0 <= number < float("inf") for number in numbers) or not any(numbers):
        raise ExitConfigurationError("--exit_loss_weights must be finite, not negative, and not all zero.")
    return torch.tensor(numbers)
