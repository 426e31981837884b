"""The weight network: its random state, and weights that average 1."""

import pytest
import torch
from l2w_trainers import NUM_LABELS

from een_hf.training.l2w import (
    MetaWeightedArguments,
    WeightPredictionNetwork,
)


def test_w_never_touches_the_global_random_state(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    networks = [
        WeightPredictionNetwork(3, MetaWeightedArguments(), torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    first, same, other = (network.layers[0].weight for network in networks)
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("inputs,width", [("loss", 3), ("confidence", 3), ("both", 6)])
@pytest.mark.parametrize("constraint,over", [("exit", 1), ("sample", 0), ("batch", (0, 1))])
def test_weights_average_1_over_their_constraint(inputs, width, constraint, over):
    args = MetaWeightedArguments(meta_input=inputs, meta_constraint=constraint, wpn_num_layers=2, wpn_hidden_size=7)
    network = WeightPredictionNetwork(3, args, torch.Generator().manual_seed(0))
    assert [tuple(p.shape) for p in network.parameters()][::2] == [(7, width), (7, 7), (3, 7)]
    losses, logits = torch.rand(5, 3) * 4, torch.randn(5, 3, NUM_LABELS) * 4
    weights = network(losses, logits)
    confidences = torch.stack([logits[:, k].softmax(-1).max(-1).values for k in range(3)], 1)
    read = {"loss": losses, "confidence": confidences, "both": torch.cat([losses, confidences], 1)}[inputs]
    a, b, c = network.layers[0], network.layers[2], network.layers[4]
    g = torch.tanh(c(torch.relu(b(torch.relu(a(read))))))
    torch.testing.assert_close(weights, 1 + 0.8 * (g - g.mean(over, keepdim=True)))
    torch.testing.assert_close(weights.mean(over), torch.ones_like(weights.mean(over)))
