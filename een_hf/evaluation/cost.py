"""Relative cost of every exit, counted on the model's own modules."""

import copy
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.policies import ExitPolicy


class ExitCosts(list):
    """What exiting at each exit costs if every exit is evaluated; `of_policy` leaves out the exits that are not.

    Exiting at exit k costs `alone[k]`, `heads[j]` for every evaluated exit j before it, and `shared[j]` for every
    evaluated exit j behind it.

    Args:
        alone: (num_exits,), with no other exit evaluated.
        heads: (num_exits,), what evaluating an exit adds for an example that continues; default 0: every head is
            counted in `alone`, for every policy.
        shared: (num_exits,), what evaluating it adds for an example that exited before, where examples of one batch
            take their time together; default 0.
    """

    def __init__(
        self, alone: Sequence[float], heads: Sequence[float] | None = None, shared: Sequence[float] | None = None
    ):
        none = [0] * len(alone)
        self.alone, self.heads, self.shared = [*alone], [*(heads or none)], [*(shared or none)]
        every = range(len(alone) - 1)
        super().__init__(self._cost(index, every) for index in range(len(alone)))

    @classmethod
    def of(cls, costs: Sequence[float]) -> "ExitCosts":
        """Costs as they are, or made of plain numbers, which hold for every policy."""
        return costs if isinstance(costs, cls) else cls(costs)

    def _cost(self, index: int, evaluated: Iterable[int]) -> float:
        return self.alone[index] + sum(
            self.heads[other] if other < index else self.shared[other] for other in evaluated if other != index
        )

    def of_policy(self, policy: ExitPolicy | None) -> np.ndarray:
        """The costs (num_exits,) under a policy, which need not use every exit; `None` exits nowhere early.

        A criterion that remembers earlier exits reads all of them, as in `EarlyExitMixin.evaluated_exits`.
        """
        if policy is not None and policy.remembers:
            return np.array(self, dtype=np.float64)
        evaluated = [index for index in range(len(self) - 1) if policy is not None and policy.lets_exit(index)]
        return np.array([self._cost(index, evaluated) for index in range(len(self))], dtype=np.float64)

    def over(self, unit: float) -> "ExitCosts":
        """The same costs in another unit."""
        return ExitCosts(*([value / unit for value in values] for values in self.to_dict().values()))

    def to_dict(self) -> dict[str, list[float]]:
        """The arguments, ready for JSON."""
        return {"alone": self.alone, "heads": self.heads, "shared": self.shared}


def relative_costs(
    model: nn.Module, *, sequence_length: int | None = None, image_size: int | tuple[int, int] | None = None
) -> ExitCosts:
    """Multiply-accumulates up to and with each exit, divided by those of the plain model without exits.

    Exit k costs the embedding, the layers up to its own and the heads of exits 1 to k; the plain model costs the
    embedding, all layers and the last head. Counted at batch 1 in one forward pass of a copy that has shapes but no
    numbers (the `meta` device), so that neither the model, its device nor its memory matters or changes.

    Args:
        model: an early-exit model.
        sequence_length: number of tokens, for a text model.
        image_size: height and width, or one number for both, for an image model; the model's own by default.

    Returns:
        one number per exit, rising; the last exceeds 1 by the earlier exits' heads. `of_policy` of it leaves out the
        heads that a policy does not evaluate.

    Raises:
        ValueError: a text model without a `sequence_length`, or with one that its positions do not reach.
    """
    spent, plain = count_operations(model, sequence_length=sequence_length, image_size=image_size)
    return spent.over(plain)


def count_operations(
    model: nn.Module, *, sequence_length: int | None = None, image_size: int | tuple[int, int] | None = None
) -> tuple[ExitCosts, int]:
    """Operations up to and with each exit, and those of the plain model, for one input; arguments as above.

    They are counted as torch's `FlopCounterMode` does: two for a multiply-accumulate.
    """
    shadow = _meta_copy(model).eval()
    inputs = dummy_inputs(shadow, sequence_length=sequence_length, image_size=image_size)
    layers = list(shadow.backbone_layers)
    heads = [shadow.exit_head_modules(exit_index) for exit_index in range(len(shadow.config.exit_layers))]
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
        shadow(**inputs, early_exit=False)

    embedding = counter.get_total_flops() - sum(spent.values())
    up_to_layer = list(accumulate((spent[layer] for layer in layers), initial=embedding))
    head_costs = [sum(spent[part] for part in head) for head in heads]
    plain = up_to_layer[-1] + head_costs[-1]
    alone = [up_to_layer[layer] + head for layer, head in zip(shadow.config.exit_layers, head_costs, strict=True)]
    costs = ExitCosts(alone, head_costs)
    return (ExitCosts(costs) if shadow.config.exit_aggregation == "boosted" else costs), plain


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
    values = rows[name] if hasattr(rows, "set_format") else (rows[row][name] for row in range(len(rows)))
    return {"sequence_length": mean_length(values if name == "attention_mask" else ([1] * len(ids) for ids in values))}


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shape and dtype but no storage."""
    memo = {id(parameter): nn.Parameter(parameter.to("meta"), requires_grad=False) for parameter in model.parameters()}
    memo |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    shadow = copy.deepcopy(model, memo)
    # The eager kernel runs on any device and spells out the products; which kernel runs does not change their number.
    shadow.set_attn_implementation("eager")
    return shadow


def dummy_inputs(
    model: nn.Module,
    batch_size: int = 1,
    *,
    sequence_length: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> dict[str, torch.Tensor]:
    """A batch of zeros on the model's device, texts without padding; arguments and errors as `relative_costs`."""
    config, device = model.config, model.device
    if model.main_input_name == "pixel_values":
        size = config.image_size if image_size is None else image_size
        height, width = (size, size) if isinstance(size, int) else size
        inputs = {
            "pixel_values": torch.zeros(
                batch_size, config.num_channels, height, width, dtype=model.dtype, device=device
            )
        }
        return inputs if image_size is None else {**inputs, "interpolate_pos_encoding": True}
    if sequence_length is None:
        raise ValueError("The cost of a text model depends on the length of its input: give sequence_length.")
    longest = config.max_input_length
    if sequence_length < 1 or longest is not None and sequence_length > longest:
        raise ValueError(f"sequence_length is {sequence_length}; this model takes 1 to {longest or 'any'} tokens.")
    return {"input_ids": torch.zeros(batch_size, sequence_length, dtype=torch.int64, device=device)}
