"""What a run says of its weights."""

import json

import pytest
import torch
from l2w_trainers import bert, make_trainer

from een_hf.training.l2w import (
    save_weight_map,
)


def test_logs_what_w_has_learned(tmp_path):
    trainer = make_trainer(bert(), tmp_path, size=16, max_steps=2)
    seen = []
    sample_weights = trainer.sample_weights

    def record(losses, exit_logits):
        weights = sample_weights(losses, exit_logits)
        seen.append((weights, losses))
        return weights

    trainer.sample_weights = record
    trainer.train()
    weights, losses = (torch.cat(part) for part in zip(*seen, strict=True))
    entry = next(entry for entry in trainer.state.log_history if "l2w_weight_std" in entry)
    assert entry["step"] == 2
    assert entry["l2w_weight_std"] == pytest.approx(weights.std(unbiased=False).item(), rel=1e-4)
    for k in range(3):
        assert entry[f"l2w_weight_exit{k + 1}"] == pytest.approx(weights[:, k].mean().item(), rel=1e-5)
        correlation = torch.corrcoef(torch.stack([weights[:, k], losses[:, k]]))[0, 1].item()
        assert entry[f"l2w_correlation_exit{k + 1}"] == pytest.approx(correlation, rel=1e-3, abs=1e-4)
    assert entry["l2w_meta_loss"] > 0
    assert (tmp_path / "l2w_weights.png").read_bytes()[:4] == b"\x89PNG"
    table = json.loads((tmp_path / "l2w_weights.json").read_text())
    assert sum(map(sum, table["counts"])) == 16 * 3


def test_each_log_has_the_meta_loss_since_the_last(tmp_path):
    """What breaks: the logged meta loss is the mean over the whole run, and says late what changes."""
    trainer = make_trainer(bert(), tmp_path, size=16, max_steps=2, logging_steps=1)
    meta_gradient, found = trainer.meta_gradient, []
    trainer.meta_gradient = lambda *parts: found.append(meta_gradient(*parts)) or found[-1]
    trainer.train()
    logged = [entry["l2w_meta_loss"] for entry in trainer.state.log_history if "l2w_meta_loss" in entry]
    losses = [meta_loss.item() for _, _, meta_loss in found]  # two for each step, one of each half
    assert logged == pytest.approx([sum(losses[:2]) / 2, sum(losses[2:]) / 2]) and len(set(losses)) == 4


def test_the_weight_map_is_the_mean_weight_by_loss(tmp_path):
    losses = torch.tensor([[1e-5, 0.5], [100.0, 0.5], [0.5, 0.02]], dtype=torch.float64)
    weights = torch.tensor([[0.5, 1.0], [1.5, 2.0], [0.7, 0.1]], dtype=torch.float64)
    save_weight_map(weights, losses, str(tmp_path))
    table = json.loads((tmp_path / "l2w_weights.json").read_text())
    cells = {
        (k, index): mean
        for k, row in enumerate(table["mean_weight"])
        for index, mean in enumerate(row)
        if mean is not None
    }
    edges = table["loss_edges"]
    of_half = next(index for index in range(len(edges) - 1) if edges[index] <= 0.5 < edges[index + 1])
    of_small = next(index for index in range(len(edges) - 1) if edges[index] <= 0.02 < edges[index + 1])
    expected = {(0, 0): 0.5, (0, len(edges) - 2): 1.5, (0, of_half): 0.7, (1, of_half): 1.5, (1, of_small): 0.1}
    assert cells == pytest.approx(expected)
