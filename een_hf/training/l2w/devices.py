"""What the look-ahead may know of a tensor without waiting for its device."""

import torch


def on_host(tensor: torch.Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == "cpu"
