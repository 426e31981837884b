"""Data-dependent initialization of new heads."""

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


@torch.no_grad()
def standardize_heads(
    heads: list[list[nn.Module]],
    run: Callable[[], None],
    reduce: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums,
) -> None:
    """Scale and shift the first layer of new heads, so that on some examples its outputs have mean 0 and variance 1.

    Mean-pooled hidden states of a pretrained encoder are nearly the same vector for all examples, which differ only by
    a few percent of it. A head that starts from small random weights spends hundreds of steps on this common part; the
    last head needs the most if the encoder was trained by comparing texts. Shapes and formulas of the heads do not
    change.

    A layer is new if its bias is zero. Heads with fewer than two linear layers are not changed.

    Args:
        heads: the modules of each head, as `exit_head_modules` returns them.
        run: runs the heads on the examples.
        reduce: sums a tensor over the processes.

    References:
        Kraehenbuehl et al., Data-dependent Initializations of Convolutional Neural Networks (ICLR 2016); Salimans and
        Kingma, Weight Normalization (NeurIPS 2016), section 3.
    """
    layers = [[part for module in head for part in module.modules() if isinstance(part, nn.Linear)] for head in heads]
    outputs: dict[nn.Linear, list[torch.Tensor]] = {}  # in the order of calls

    def record(layer: nn.Linear, _, output: torch.Tensor) -> None:
        outputs.setdefault(layer, []).append(output.flatten(0, -2).float())

    hooks = [layer.register_forward_hook(record) for of_head in layers for layer in of_head]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    for of_head in layers:
        called = [layer for layer in outputs if layer in of_head]
        if len(called) < 2 or called[0].bias is None or called[0].bias.any():
            continue
        first = called[0]
        found = torch.cat(outputs[first])
        sums = reduce(torch.cat([found.sum(0), found.square().sum().view(1), found.new_tensor([len(found)])]))
        mean = sums[:-2] / sums[-1]
        variance = sums[-2] / sums[-1] / len(mean) - mean.square().mean()
        if variance > 0:
            scale = variance.rsqrt()
            first.weight.mul_(scale)
            first.bias.copy_(_as_parameter(-mean * scale, first.bias))


def _as_parameter(values: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Values that all processes have, divided among them as the parameter is."""
    if not isinstance(parameter, DTensor):
        return values
    return distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
