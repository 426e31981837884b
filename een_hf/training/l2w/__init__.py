"""The scheme `l2w`, which learns the weights of samples at exits.

- `arguments`: its flags.
- `network`: the weight prediction network W.
- `look_ahead`: the meta gradient, with `step` (the optimizer's step), `charging` (the exit at which each sample is
  charged), `forward_mode`, `programs` (CUDA graphs), `token_table`, `scopes` and `devices`.
- `meta_batches`: the rows of `--meta_batch_size`.
- `trainer`: the scheme.
- `report`: the learned weights, in the log and as a heat map.
"""

from .arguments import MetaWeightedArguments
from .charging import charged_shares
from .look_ahead import LookAhead
from .network import WeightPredictionNetwork
from .report import WEIGHT_MAP, save_weight_map
from .step import linear_step
from .trainer import STATE_FILE, MetaWeightedExitTrainer


__all__ = [
    "STATE_FILE",
    "WEIGHT_MAP",
    "LookAhead",
    "MetaWeightedArguments",
    "MetaWeightedExitTrainer",
    "WeightPredictionNetwork",
    "charged_shares",
    "linear_step",
    "save_weight_map",
]
