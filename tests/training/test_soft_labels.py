"""Batches of Mixup and CutMix: what each scheme minimizes, against plain loops over numbers in double precision."""

import copy
import math

import pytest
import torch
from factory import NO_DROPOUT, make_trainer, tiny_model
from torch.utils.data import DataLoader

from een_hf.data.transforms import ImageCollator
from een_hf.training.boosted import BoostedArguments
from een_hf.training.l2w import MetaWeightedArguments


NUM_LABELS, NUM_EXITS = 4, 3
SETTINGS = {
    "joint": {},
    "boosted": {"scheme_args": BoostedArguments(boost_temperature=0.7)},
    "l2w": {"scheme_args": MetaWeightedArguments(wpn_hidden_size=5)},
}
MIXES = {"mixup": {"mixup": 0.8}, "cutmix": {"cutmix": 1.0}, "both": {"mixup": 0.8, "cutmix": 1.0}}


def mixed_batches(**mix):
    """Seven rows in batches of four and three."""
    pixels = torch.randn(7, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    rows = [{"pixel_values": image, "labels": k % NUM_LABELS, "draw": (5, 0, k)} for k, image in enumerate(pixels)]
    return list(DataLoader(rows, 4, collate_fn=ImageCollator(**mix, num_labels=NUM_LABELS)))


def cross_entropy(logits, target):
    log_sum = math.log(sum(math.exp(value) for value in logits))
    return sum(share * (log_sum - value) for share, value in zip(target, logits, strict=True))


def weights_by_hand(network, losses):
    """w = 1 + 0.8 * (g - mean g) over a row's exits, g an MLP with ReLU and tanh."""
    first, last = ((network.layers[place].weight.tolist(), network.layers[place].bias.tolist()) for place in (0, 2))

    def linear(values, weight, bias):
        return [sum(a * b for a, b in zip(row, values, strict=True)) + c for row, c in zip(weight, bias, strict=True)]

    weights = []
    for row in losses:
        g = [math.tanh(value) for value in linear([max(0.0, value) for value in linear(row, *first)], *last)]
        weights.append([1 + 0.8 * (value - sum(g) / len(g)) for value in g])
    return weights


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("scheme", SETTINGS)
def test_the_loss_of_mixed_batches(scheme, mix, tmp_path):
    """What breaks: labels taken as classes or as several labels, rows and exits mixed up, an odd last batch."""
    changes = {"num_labels": NUM_LABELS, "problem_type": "single_label_classification", "initializer_range": 0.3}
    model = tiny_model("vit", **NO_DROPOUT, **changes).double()
    plain = copy.deepcopy(model).train()
    trainer = make_trainer(tmp_path, model, scheme, exit_loss_weights=["0.25", "0.5", "1"], **SETTINGS[scheme])
    batches = mixed_batches(**MIXES[mix])
    assert [len(batch["labels"]) for batch in batches] == [4, 3]
    assert sorted(batches[1]["labels"][-1].tolist()) == [0, 0, 0, 1]
    for batch in batches:
        assert ((batch["labels"] > 0).sum(1) == 2).any(), "nothing is mixed"
        with torch.no_grad():
            logits = plain(pixel_values=batch["pixel_values"], early_exit=False).exit_logits.tolist()
        if scheme == "boosted":
            for row in logits:
                for k in range(1, NUM_EXITS):
                    row[k] = [own + 0.7 * before for own, before in zip(row[k], row[k - 1], strict=True)]
        targets = batch["labels"].tolist()
        losses = [
            [cross_entropy(values, target) for values in row] for row, target in zip(logits, targets, strict=True)
        ]
        weights, tolerance = [[1.0] * NUM_EXITS] * len(losses), 1e-12
        if scheme == "l2w":
            weights, tolerance = weights_by_hand(trainer.weight_network, losses), 1e-6  # the network is float32
            assert max(map(max, weights)) > 1.05
        wanted = sum(
            (0.25, 0.5, 1)[k] * weight * loss / len(losses)
            for row_weights, row in zip(weights, losses, strict=True)
            for k, (weight, loss) in enumerate(zip(row_weights, row, strict=True))
        )
        found = trainer.compute_loss(model.train(), batch)
        assert found.dtype == torch.float64
        assert found.item() == pytest.approx(wanted, rel=tolerance)
