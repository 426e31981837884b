"""The projection of image patches to hidden states as a matrix product."""

import torch
import torch.nn.functional as F
from torch import nn


class PatchProjection(nn.Conv2d):
    """A convolution whose kernel size equals its stride, so that it is a linear map of each patch.

    On accelerators it is computed as one matrix product, which takes a fraction of the convolution's time. On the CPU,
    and for images that do not divide into whole patches, it is computed as a convolution.
    """

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        on_accelerator = images.device.type not in ("cpu", "meta")
        whole = all(size % patch == 0 for size, patch in zip(images.shape[-2:], self.kernel_size, strict=True))
        return self.multiply(images) if on_accelerator and whole else super().forward(images)

    def multiply(self, images: torch.Tensor) -> torch.Tensor:
        """The same as the convolution, as a matrix product.

        Args:
            images: (batch, channels, height, width), which divide into whole patches.

        Returns:
            (batch, hidden_size, rows, columns).
        """
        rows, columns = (size // patch for size, patch in zip(images.shape[-2:], self.kernel_size, strict=True))
        split = images.unflatten(3, (columns, -1)).unflatten(2, (rows, -1))  # channels, rows, height, columns, width
        patches = split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        projected = F.linear(patches, self.weight.flatten(1), self.bias)
        return projected.transpose(1, 2).unflatten(2, (rows, columns))


def project_by_product(network: nn.Module) -> None:
    """Change the class of every patch projection in `network` to `PatchProjection`; names and weights stay."""
    for module in network.modules():
        if type(module) is not nn.Conv2d or module.groups != 1 or module.padding_mode != "zeros":
            continue
        if module.kernel_size == module.stride and module.padding == (0, 0) and module.dilation == (1, 1):
            module.__class__ = PatchProjection
