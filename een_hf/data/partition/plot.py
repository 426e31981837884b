"""The plot of a partition."""

import os
from collections.abc import Sequence

import numpy as np


def plot_partition(label_counts: np.ndarray, label_names: Sequence[str], path: str | os.PathLike):
    """Plot the labels of each part, one column per part, with the sizes above them.

    Args:
        label_counts: (parts, classes).
        label_names: one per class.
        path: the PNG file.

    Returns:
        the figure.
    """
    from matplotlib.figure import Figure

    from ...evaluation.plots import literal

    sizes = label_counts.sum(axis=1)
    num_parts, num_classes = label_counts.shape
    # At least two pixels per part and class at 150 dpi, within the size of a page or a wide screen.
    width, height = np.clip([num_parts / 75 + 2, num_classes / 75 + 3], (8, 5), (24, 18))
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    above, axes = figure.subplots(2, 1, sharex=True, height_ratios=(1, 4))
    above.stairs(sizes, np.arange(num_parts + 1) - 0.5, fill=True, color="#2f5d9b")
    above.set_ylabel("rows")
    above.spines[["top", "right"]].set_visible(False)
    above.set_title(
        f"{sizes.sum()} rows of {num_classes} classes in {num_parts} parts of {sizes.min()} to {sizes.max()}"
    )
    shares = label_counts.T / sizes
    shown = axes.imshow(shares, aspect="auto", interpolation="nearest", cmap="magma_r", vmin=0)
    axes.set_xlabel("part")
    axes.set_ylabel("class")
    if num_classes <= 30:
        axes.set_yticks(range(num_classes), [literal(str(name)[:24]) for name in label_names])
    figure.colorbar(shown, ax=axes, label="share of the part's rows", pad=0.01)
    figure.savefig(path, format="png")
    return figure
