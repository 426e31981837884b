"""Properties of tensors that are known without waiting for their device."""

import torch


def on_host(tensor: torch.Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == "cpu"
