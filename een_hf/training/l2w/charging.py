"""The exit at which each sample of the meta part is charged, and the forward pass in which samples stop there."""

import inspect
import math
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import nn

from . import devices
from .network import confidences


def charged_shares(num_samples: int, num_exits: int, target_p: float, offset: float) -> list[int]:
    """The numbers n_1 to n_K of the n samples of the meta part that are charged at each exit.

    n_k is n p_k with p_k proportional to q^k (Han et al., section 3.3), rounded systematically: n_1 + ... + n_k =
    floor(n (p_1 + ... + p_k) + u), so that with u uniform in [0, 1) the mean of n_k is n p_k. Rounded down, the middle
    exits of a small batch would never be charged.

    Args:
        num_samples: n.
        num_exits: K.
        target_p: q.
        offset: u.

    Returns:
        n_1 to n_K.
    """
    powers = list(accumulate(target_p**k for k in range(1, num_exits + 1)))
    bounds = [math.floor(num_samples * power / powers[-1] + offset) for power in powers[:-1]]
    return [after - before for before, after in pairwise([0, *bounds, num_samples])]


def most_confident_first(logits: torch.Tensor) -> torch.Tensor:
    """The order of the samples by confidence; of equally confident ones the earlier come first."""
    return confidences(logits.detach()).argsort(descending=True, stable=True)


class ExitForward(nn.Module):
    """The network without accelerate's wrappers; its parameters have their own names after `network.`."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, inputs: dict, shares: list[int] | None = None):
        """Run the network.

        Args:
            inputs: model inputs; labels are ignored.
            shares: n_1 to n_K; `None`: every exit is evaluated on every sample.

        Returns:
            without `shares` the logits of all exits (n, K, num_labels). With them, the n_k most confident of the
            remaining samples stop at exit k: their logits (n, num_labels), exit by exit, and their places (n,).
        """
        names = inspect.signature(self.network.embed).parameters
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        kwargs = {name: inputs.pop(name) for name in inputs.keys() - names.keys()}
        examples = self.network.embed(**inputs)
        mask, on_host = examples.attention_mask, devices.on_host(examples.hidden)
        self.network.check_mask(mask, dynamic=False)
        of_tokens = mask is not None and mask.dim() == 2
        if of_tokens and on_host:
            examples = examples.unpadded()
        elif of_tokens:
            examples.padded = True  # checking would wait for the device
        if shares is None:
            return torch.stack(self.network.run_all(examples, **kwargs), 1)

        examples.ids = torch.arange(len(examples), device=examples.hidden.device)
        context, after, answers, ids = self.network.make_context(examples), -1, [], []
        for index, share in enumerate(shares):
            if share == 0:
                continue
            hidden, logits = self.network.run_stage(index, examples, context, None, after, **kwargs)
            if share == len(examples):
                break
            examples, order = replace(examples, hidden=hidden), most_confident_first(logits)
            charged, left = order[:share], order[share:]
            answers.append(logits.index_select(0, charged))
            ids.append(examples.ids.index_select(0, charged))
            if of_tokens and on_host:
                exits = torch.zeros_like(order, dtype=torch.bool).index_fill_(0, charged, True)
                examples = examples.trim(*examples.measure(exits)[1:])
            examples = examples.select(left)
            context, after = self.network.make_context(examples), index
        return torch.cat([*answers, logits]), torch.cat([*ids, examples.ids])
