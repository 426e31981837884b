"""The weights that W has learned: entries of the log, and a heat map of weight against loss."""

import json
import math
import os
from collections import deque

import torch


WEIGHT_MAP = "l2w_weights"


class WeightRecord:
    """Weights and losses of the last batches, and the meta losses since the last log."""

    def __init__(self):
        self.recent, self.unlogged = deque(maxlen=1000), 0  # (2, batch, K) of each batch; how many are new
        self.summed_meta_losses, self.num_meta_losses = 0.0, 0

    def add(self, weights: torch.Tensor, losses: torch.Tensor) -> None:
        """Keep w and l, (batch, K) each, of a batch."""
        self.recent.append(torch.stack([weights, losses]))
        self.unlogged += 1

    def add_meta_loss(self, meta_loss: torch.Tensor) -> None:
        self.summed_meta_losses = self.summed_meta_losses + meta_loss
        self.num_meta_losses += 1

    def logs(self) -> dict[str, float]:
        """Entries for the log about W's weights and the meta loss since the last call."""
        if not self.unlogged:
            return {}
        weights, losses = torch.cat(list(self.recent)[-self.unlogged :], 1).double().cpu()
        by_exit = [values - values.mean(0) for values in (weights, losses)]
        # 0 if the weights of an exit do not vary.
        spread = by_exit[0].norm(dim=0) * by_exit[1].norm(dim=0)
        correlations = (by_exit[0] * by_exit[1]).sum(0) / spread.clamp(min=1e-12)
        logs = {"l2w_weight_std": weights.std(correction=0).item()}
        for k, (mean, correlation) in enumerate(zip(weights.mean(0), correlations, strict=True), 1):
            logs[f"l2w_weight_exit{k}"] = mean.item()
            logs[f"l2w_correlation_exit{k}"] = correlation.item()
        if self.num_meta_losses:
            logs["l2w_meta_loss"] = (self.summed_meta_losses / self.num_meta_losses).item()
        self.unlogged, self.summed_meta_losses, self.num_meta_losses = 0, 0.0, 0
        return logs

    def write(self, folder: str) -> None:
        """Write the heat map of the last batches, if there are any."""
        if self.recent:
            weights, losses = torch.cat(list(self.recent), 1).double().cpu()
            save_weight_map(weights, losses, folder)


def save_weight_map(weights: torch.Tensor, losses: torch.Tensor, folder: str) -> None:
    """Write the mean weight at each exit and loss as `l2w_weights.json` and, a heat map, `l2w_weights.png`.

    Args:
        weights: (samples, K).
        losses: (samples, K); losses outside the range are counted in the first or last bin.
        folder: folder of the files.
    """
    from matplotlib.figure import Figure

    edges = torch.logspace(-3, 1, 33, dtype=torch.float64)
    bins = torch.bucketize(losses, edges[1:-1].contiguous(), right=True).T
    counts = torch.zeros(len(bins), len(edges) - 1, dtype=torch.float64)
    sums = counts.scatter_add(1, bins, weights.T)
    counts.scatter_add_(1, bins, torch.ones_like(weights.T))
    means = sums / counts
    table = {
        "num_samples": len(losses),
        "loss_edges": edges.tolist(),
        "counts": counts.long().tolist(),
        "mean_weight": [[None if math.isnan(mean) else mean for mean in row] for row in means.tolist()],
    }
    with open(os.path.join(folder, f"{WEIGHT_MAP}.json"), "w") as file:
        json.dump(table, file, indent=2)

    figure = Figure(figsize=(7, 1.5 + 0.3 * len(means)), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="loss", ylabel="exit", yticks=range(1, len(means) + 1))
    axes.set_facecolor("lightgrey")  # no samples
    reach = max((means - 1).abs().nan_to_num().max().item(), 0.01)
    rows = [k + 0.5 for k in range(len(means) + 1)]
    colours = {"cmap": "RdBu_r", "vmin": 1 - reach, "vmax": 1 + reach}
    figure.colorbar(axes.pcolormesh(edges.numpy(), rows, means.numpy(), **colours), label="mean weight")
    axes.invert_yaxis()
    figure.savefig(os.path.join(folder, f"{WEIGHT_MAP}.png"), dpi=120)
