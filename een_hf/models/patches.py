"""Patches of images to hidden states, as one matrix product."""

import torch
import torch.nn.functional as F
from torch import nn


class PatchProjection(nn.Conv2d):
    """A convolution whose kernel equals its stride: every pixel is read once, so it is a linear map of the patches.

    On accelerators it is computed as such, which takes a fraction of the convolution's time there; on the CPU, and for
    images that do not divide into whole patches, it is the convolution.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        on_accelerator = images.device.type not in ("cpu", "meta")
        whole = all(size % patch == 0 for size, patch in zip(images.shape[-2:], self.kernel_size, strict=True))
        return self.multiply(images) if on_accelerator and whole else super().forward(images)

    def multiply(self, images: torch.Tensor) -> torch.Tensor:
        """The convolution of images (batch, channels, height, width) that divide into whole patches, by a product."""
        rows, columns = (size // patch for size, patch in zip(images.shape[-2:], self.kernel_size, strict=True))
        split = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # channels, rows, height, columns, width
        patches = split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        projected = F.linear(patches, self.weight.flatten(1), self.bias)
        return projected.transpose(1, 2).unflatten(2, (rows, columns))


def project_by_product(network: nn.Module) -> None:
    """Make every convolution of `network` that reads each pixel once a `PatchProjection`; names and weights stay."""
    for module in network.modules():
        if type(module) is not nn.Conv2d or module.groups != 1 or module.padding_mode != "zeros":
            continue
        if module.kernel_size == module.stride and module.padding == (0, 0) and module.dilation == (1, 1):
            module.__class__ = PatchProjection
