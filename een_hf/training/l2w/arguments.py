"""Flags of `--method l2w`."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from ...models import ExitConfigurationError


def _setting(default, text: str):
    return field(default=default, metadata={"help": f"{text}."})


@dataclass
class MetaWeightedArguments:
    """Settings of `--method l2w`; the defaults are the paper's for CIFAR."""

    wpn_hidden_size: int = _setting(500, "Width of the weight network")
    wpn_num_layers: int = _setting(1, "Number of hidden layers of the weight network")
    meta_learning_rate: float = _setting(1e-4, "Learning rate of the weight network (Adam)")
    meta_weight_decay: float = _setting(1e-4, "Weight decay of the weight network")
    meta_lr_scheduler_type: Literal["cosine", "linear", "constant"] = _setting(
        "cosine", "Schedule of --meta_learning_rate: `cosine` (to zero), `linear` or `constant`"
    )
    meta_interval: int = _setting(1, "Optimizer steps from one look-ahead to the next")
    meta_batch_size: int | None = _setting(
        None,
        "Rows of each meta batch (of each process), drawn from the training rows in another order. By default the "
        "batch is divided into halves, as in the paper, whose halves have 512 rows",
    )
    meta_epsilon: float = _setting(0.8, "Epsilon in w = 1 + epsilon * (g - mean(g)), from 0 to 1")
    meta_target_p: float = _setting(
        0.75, "q: in a look-ahead, the share of examples that is assigned to exit k is proportional to q^k"
    )
    meta_input: Literal["loss", "confidence", "both"] = _setting("loss", "Inputs of the weight network, for each exit")
    meta_constraint: Literal["exit", "sample", "batch"] = _setting(
        "exit", "Whether weights have mean 1 over the exits of an example, the examples at an exit, or the whole batch"
    )
    meta_gradient: Literal["auto", "forward", "directional", "exact"] = _setting(
        "auto",
        "How a look-ahead differentiates: `forward` (forward-mode differentiation, in the training's precision), "
        "`directional` (central differences, in float32), `exact` (double backward in float32, the slow reference) or "
        "`auto`: `forward` on accelerators, `directional` on the CPU",
    )
    meta_cuda_graphs: bool = _setting(
        False,
        "Run `forward` look-aheads as CUDA graphs if the shapes of batches repeat; the graphs need separate memory, "
        "and --optim adamw_torch_fused",
    )

    def __post_init__(self):
        def check(name: str, holds: bool, wanted: str):
            if not holds:
                raise ExitConfigurationError(f"--{name} must be {wanted}, not {getattr(self, name)!r}.")

        for name in ("meta_lr_scheduler_type", "meta_input", "meta_constraint", "meta_gradient"):
            known = get_args(type(self).__annotations__[name])
            check(name, getattr(self, name) in known, f"one of {', '.join(known)}")
        for name in ("wpn_hidden_size", "wpn_num_layers", "meta_interval", "meta_batch_size"):
            value = getattr(self, name)
            if name != "meta_batch_size" or value is not None:
                check(name, isinstance(value, int) and value >= 1, "a whole number from 1")
        for name in ("meta_learning_rate", "meta_target_p"):
            check(name, 0 < getattr(self, name) < math.inf, "above 0")
        check("meta_weight_decay", 0 <= self.meta_weight_decay < math.inf, "0 or above")
        check("meta_epsilon", 0 <= self.meta_epsilon <= 1, "between 0 and 1")
