"""Relative cost of every exit, counted on the model's own modules."""

import copy
from collections.abc import Iterable, Sequence
from itertools import accumulate

import datasets
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def relative_costs(
    model: nn.Module, *, sequence_length: int | None = None, image_size: int | tuple[int, int] | None = None
) -> list[float]:
    """Multiply-accumulates up to and with each exit, divided by those of the plain model without exits.

    Exit k costs the embedding, the layers up to its own and the heads of exits 1 to k; the plain model costs the
    embedding, all layers and the last head. Counted at batch 1 in one forward pass of a copy that has shapes but no
    numbers (the `meta` device), so that neither the model, its device nor its memory matters or changes.

    Args:
        model: an early-exit model.
        sequence_length: number of tokens, for a text model.
        image_size: height and width, or one number for both, for an image model; the model's own by default.

    Returns:
        one number per exit, rising; the last exceeds 1 by the earlier exits' heads.

    Raises:
        ValueError: a text model without a `sequence_length`, or with one that its positions do not reach.
    """
    spent, plain = count_operations(model, sequence_length=sequence_length, image_size=image_size)
    return [operations / plain for operations in spent]


def count_operations(
    model: nn.Module, *, sequence_length: int | None = None, image_size: int | tuple[int, int] | None = None
) -> tuple[list[int], int]:
    """Operations up to and with each exit, and those of the plain model, for one input; arguments as above.

    They are counted as torch's `FlopCounterMode` does: two for a multiply-accumulate.
    """
    twin = _meta_copy(model).eval()
    inputs = _dummy_inputs(twin, sequence_length, image_size)
    layers = list(twin.backbone_layers)
    heads = [twin.exit_head_modules(exit_index) for exit_index in range(len(twin.config.exit_layers))]
    counter = FlopCounterMode(display=False)
    spent = {module: 0 for module in (*layers, *(part for head in heads for part in head))}

    def start(module, _):
        spent[module] -= counter.get_total_flops()

    def stop(module, *_):
        spent[module] += counter.get_total_flops()

    for module in spent:
        module.register_forward_pre_hook(start)
        module.register_forward_hook(stop)
    with torch.no_grad(), counter:
        twin(**inputs, early_exit=False)

    embedding = counter.get_total_flops() - sum(spent.values())
    up_to_layer = list(accumulate((spent[layer] for layer in layers), initial=embedding))
    head_costs = [sum(spent[part] for part in head) for head in heads]
    plain = up_to_layer[-1] + head_costs[-1]
    up_to_exit = [
        up_to_layer[layer] + heads_so_far
        for layer, heads_so_far in zip(twin.config.exit_layers, accumulate(head_costs), strict=True)
    ]
    return up_to_exit, plain


def mean_length(attention_masks: Iterable[Sequence[int]]) -> int:
    """Mean number of unmasked tokens over rows of 0/1, rounded, at least 1: the length at which cost is counted."""
    lengths = [int(sum(mask)) for mask in attention_masks]
    return max(1, round(sum(lengths) / len(lengths)))


def cost_inputs(rows) -> dict[str, int | tuple[int, int]]:
    """What `relative_costs` needs to know of a data set: texts' mean unpadded length, or the size of its images."""
    first = rows[0]
    if "pixel_values" in first:
        return {"image_size": tuple(torch.as_tensor(first["pixel_values"]).shape[-2:])}
    name = "attention_mask" if "attention_mask" in first else "input_ids"
    values = rows[name] if isinstance(rows, datasets.Dataset) else (rows[row][name] for row in range(len(rows)))
    return {"sequence_length": mean_length(values if name == "attention_mask" else ([1] * len(ids) for ids in values))}


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shape and dtype but no storage."""
    memo = {id(parameter): nn.Parameter(parameter.to("meta"), requires_grad=False) for parameter in model.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    twin = copy.deepcopy(model, memo)
    # The eager kernel runs on any device and spells out the products; which kernel runs does not change their number.
    twin.set_attn_implementation("eager")
    return twin


def _dummy_inputs(model: nn.Module, sequence_length, image_size) -> dict[str, torch.Tensor]:
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size if image_size is None else image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs = {"pixel_values": torch.empty(1, config.num_channels, height, width, dtype=model.dtype, device="meta")}
        return inputs if image_size is None else {**inputs, "interpolate_pos_encoding": True}
    if sequence_length is None:
        raise ValueError("The cost of a text model depends on the length of its input: give sequence_length.")
    longest = config.max_input_length
    if sequence_length < 1 or longest is not None and sequence_length > longest:
        raise ValueError(f"sequence_length is {sequence_length}; this model takes 1 to {longest or 'any'} tokens.")
    return {"input_ids": torch.empty(1, sequence_length, dtype=torch.int64, device="meta")}
