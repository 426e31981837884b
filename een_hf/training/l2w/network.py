"""W, the network that predicts the weights of samples at exits."""

import torch
from torch import nn
from torch.nn.utils import skip_init

from .arguments import MetaWeightedArguments


class WeightPredictionNetwork(nn.Module):
    """W: from the losses or confidences of a sample at K exits to its K weights, w = 1 + eps * (g - mean(g)).

    g is an MLP with ReLU, and tanh at its end. `generator` draws its parameters (within the bounds of `nn.Linear`);
    the global random state does not advance.

    Args:
        num_exits: K.
        args: the flags of `l2w`.
        generator: random generator of the initial parameters.
    """

    def __init__(self, num_exits: int, args: MetaWeightedArguments, generator: torch.Generator):
        super().__init__()
        self.input = args.meta_input
        self.epsilon = args.meta_epsilon
        self.mean_over = {"exit": (1,), "sample": (0,), "batch": (0, 1)}[args.meta_constraint]
        num_inputs = num_exits * (2 if self.input == "both" else 1)
        sizes = [num_inputs, *[args.wpn_hidden_size] * args.wpn_num_layers, num_exits]
        layers = []
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:], strict=True):
            linear = skip_init(nn.Linear, fan_in, fan_out)
            for parameter in linear.parameters():
                nn.init.uniform_(parameter, -(fan_in**-0.5), fan_in**-0.5, generator=generator)
            layers += [linear, nn.ReLU()]
        self.layers = nn.Sequential(*layers[:-1], nn.Tanh())

    def forward(self, losses: torch.Tensor, exit_logits: torch.Tensor) -> torch.Tensor:
        """w, (batch, K), from the losses (batch, K) and the logits (batch, K, num_labels)."""
        inputs = [] if self.input == "confidence" else [losses]
        if self.input != "loss":
            inputs.append(confidences(exit_logits))
        predicted = self.layers(torch.cat(inputs, 1).float()).to(losses.dtype)
        return 1 + self.epsilon * (predicted - predicted.mean(self.mean_over, keepdim=True))


def confidences(exit_logits: torch.Tensor) -> torch.Tensor:
    """The largest probability, of logits (..., num_labels)."""
    low = exit_logits.dtype in (torch.float16, torch.bfloat16)
    return exit_logits.softmax(-1, dtype=torch.float32 if low else None).amax(-1)
