"""The relative cost of every exit, in operations."""

import copy
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..models import ExitConfigurationError, ExitPolicy
from ..sharding import is_sharded, whole_shapes


class ExitCosts(list):
    """The cost of exiting at each exit, a list. Its items assume that every exit is evaluated; see `of_policy`.

    Exiting at exit k costs `alone[k]`, plus `heads[j]` for every evaluated exit j before it, plus `shared[j]` for
    every evaluated exit j after it.

    Args:
        alone: (num_exits,), the cost of exiting at each exit if no other exit is evaluated.
        heads: (num_exits,), the cost of evaluating an exit for an example that continues; default 0.
        shared: (num_exits,), the cost of evaluating an exit for an example of the same batch that exited before;
            default 0. Only costs in time have it.
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
        """Convert plain numbers to costs.

        Args:
            costs: costs, which are returned as they are, or one number per exit, which is used for every policy.

        Returns:
            the costs.
        """
        return costs if isinstance(costs, cls) else cls(costs)

    def _cost(self, index: int, evaluated: Iterable[int]) -> float:
        return self.alone[index] + sum(
            self.heads[other] if other < index else self.shared[other] for other in evaluated if other != index
        )

    def of_policy(self, policy: ExitPolicy | None) -> np.ndarray:
        """The costs under a policy, which evaluates only some exits (`ExitPolicy.evaluated_early_exits`).

        Args:
            policy: an exit policy; `None`: no early exit.

        Returns:
            (num_exits,), float64.
        """
        evaluated = [] if policy is None else policy.evaluated_early_exits()
        return np.array([self._cost(index, evaluated) for index in range(len(self))], dtype=np.float64)

    def over(self, unit: float) -> "ExitCosts":
        """The same costs in another unit.

        Args:
            unit: the number by which all costs are divided.

        Returns:
            the costs in this unit.
        """
        return ExitCosts(*([value / unit for value in values] for values in self.to_dict().values()))

    def to_dict(self) -> dict[str, list[float]]:
        """Convert to a plain dict.

        Returns:
            the arguments of the constructor, ready for JSON.
        """
        return {"alone": self.alone, "heads": self.heads, "shared": self.shared}


def relative_costs(
    model: nn.Module, *, sequence_length: int | None = None, image_size: int | tuple[int, int] | None = None
) -> ExitCosts:
    """Count the multiply-accumulates up to and including each exit, as a share of those of the model without exits.

    Exit k costs the embedding, the layers up to its own and the heads of exits 1 to k; the plain model costs the
    embedding, all layers and the last head. They are counted at batch 1 in one forward pass of a copy on the `meta`
    device, which needs no memory and does not change the model.

    Args:
        model: an early-exit model.
        sequence_length: number of tokens, for a text model.
        image_size: height and width in pixels, or one number for both, for an image model; default: the model's own.

    Returns:
        one number per exit, in increasing order; the last exceeds 1 by the cost of the earlier heads. Its method
        `of_policy` omits the heads that a policy does not evaluate.

    Raises:
        ExitConfigurationError: a text model without a `sequence_length`, or with one that the model does not take.

    Example:
        >>> een_hf.relative_costs(model, sequence_length=16)
        [0.3..., 0.6..., 1.0...]
    """
    spent, plain = count_operations(model, sequence_length=sequence_length, image_size=image_size)
    return spent.over(plain)


def count_operations(
    model: nn.Module, *, sequence_length: int | None = None, image_size: int | tuple[int, int] | None = None
) -> tuple[ExitCosts, int]:
    """Count the operations up to and including each exit, and those of the model without exits, for one input.

    Args:
        model, sequence_length, image_size: as in `relative_costs`.

    Returns:
        operations of each exit and of the plain model, as torch's `FlopCounterMode` counts them: two for each
        multiply-accumulate.

    Raises:
        ExitConfigurationError: as in `relative_costs`.
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
    """The mean number of unmasked tokens, which is the length for which the costs of a data set are counted.

    Args:
        attention_masks: one sequence of 0 and 1 for each row.

    Returns:
        the mean, rounded, at least 1.
    """
    lengths = [int(sum(mask)) for mask in attention_masks]
    return max(1, round(sum(lengths) / len(lengths)))


def cost_inputs(rows) -> dict[str, int | tuple[int, int]]:
    """The arguments of `relative_costs` that fit a data set.

    Args:
        rows: rows of model inputs.

    Returns:
        `sequence_length`, the mean length of the texts without padding, or `image_size`, that of the first image.
    """
    first = rows[0]
    if "pixel_values" in first:
        return {"image_size": tuple(torch.as_tensor(first["pixel_values"]).shape[-2:])}
    name = "attention_mask" if "attention_mask" in first else "input_ids"
    values = rows[name] if hasattr(rows, "set_format") else (rows[row][name] for row in range(len(rows)))
    return {"sequence_length": mean_length(values if name == "attention_mask" else ([1] * len(ids) for ids in values))}


def _meta_copy(model: nn.Module) -> nn.Module:
    """A copy whose tensors have shape and dtype but no storage."""
    if is_sharded(model):
        shadow = whole_shapes(model)
    else:
        tensors = {id(part): nn.Parameter(part.to("meta"), requires_grad=False) for part in model.parameters()}
        tensors |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
        shadow = copy.deepcopy(model, tensors)
    # The eager kernel runs on any device and calls every product; all kernels need the same number of operations.
    shadow.set_attn_implementation("eager")
    return shadow


def dummy_inputs(
    model: nn.Module,
    batch_size: int = 1,
    *,
    sequence_length: int | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> dict[str, torch.Tensor]:
    """A batch of zeros on the model's device, texts without padding; arguments and errors as in `relative_costs`."""
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
        raise ExitConfigurationError(
            "The cost of a text model depends on the length of its input: give sequence_length."
        )
    longest = config.max_input_length
    if sequence_length < 1 or longest is not None and sequence_length > longest:
        raise ExitConfigurationError(
            f"sequence_length is {sequence_length}; this model takes 1 to {longest or 'any'} tokens."
        )
    return {"input_ids": torch.zeros(batch_size, sequence_length, dtype=torch.int64, device=device)}
