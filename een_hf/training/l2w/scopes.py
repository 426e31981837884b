"""Context managers that restore parameters, buffers, random states and float32 precision at their end."""

from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def stand_ins(parameters: list[nn.Parameter]):
    """Replace the parameters' values by new tensors; the values are restored at the end, also after an error.

    Yields the values, and the new tensors, which are not initialized.
    """
    values = [parameter.data for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = torch.empty_like(parameter)
        yield values, [parameter.data for parameter in parameters]
    finally:
        for parameter, value in zip(parameters, values, strict=True):
            parameter.data = value


@contextmanager
def replaced(network: nn.Module, tensors: dict[int, torch.Tensor]):
    """Let modules use other tensors instead of their parameters, by the parameters' id; no parameter changes."""
    places = []
    for module in network.modules():
        for name, parameter in module._parameters.items():
            stand_in = tensors.get(id(parameter), parameter)
            if stand_in is not parameter:
                places.append((module._parameters, name, parameter, stand_in))
    try:
        for parameters, name, _, stand_in in places:
            parameters[name] = stand_in
        yield
    finally:
        for parameters, name, parameter, _ in places:
            parameters[name] = parameter


@contextmanager
def restored(tensors: list[torch.Tensor]):
    """Yield copies of `tensors`, and restore the tensors at the end, also after an error."""
    saved = [tensor.detach().clone() for tensor in tensors]
    try:
        yield saved
    finally:
        with torch.no_grad():
            for tensor, copy in zip(tensors, saved, strict=True):
                tensor.copy_(copy)


def _random_generators(device: torch.device) -> list:
    return [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]


def random_state(device: torch.device) -> list[torch.Tensor]:
    return [generator.get_rng_state() for generator in _random_generators(device)]


@contextmanager
def random_fork(device: torch.device, start: list[torch.Tensor] | None = None):
    """Run with the random state `start` (default: the current one), and restore the current one at the end."""
    present = random_state(device)
    try:
        for generator, state in zip(_random_generators(device), start or present, strict=True):
            generator.set_rng_state(state)
        yield
    finally:
        for generator, state in zip(_random_generators(device), present, strict=True):
            generator.set_rng_state(state)


@contextmanager
def float32_precision(matmul: str | None):
    """Compute float32 convolutions in full float32, and matrix products in `matmul`: `ieee`, `tf32`, or as before.

    For cuDNN's convolutions TF32 is torch's default. Operations read the setting of their own kind; the older
    `allow_tf32` changes the same setting.
    """
    backends = torch.backends
    wanted = {backends.cudnn.conv: "ieee", backends.mkldnn.conv: "ieee"}
    if matmul is not None:
        wanted |= {backends.cuda.matmul: matmul, backends.mkldnn.matmul: matmul}
    before = {setting: setting.fp32_precision for setting in wanted}
    try:
        for setting, value in wanted.items():
            setting.fp32_precision = value
        yield
    finally:
        for setting, value in before.items():
            setting.fp32_precision = value
