"""The product that takes the place of the patch convolution, against the convolution."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from een_hf.models.patches import PatchProjection, project_by_product


@pytest.mark.parametrize("kernel, bias", [((4, 4), True), ((2, 3), False)])
def test_the_product_is_the_convolution(kernel, bias):
    """Fails if rows and columns of patches are exchanged, or the pixels of a patch come in another order."""
    torch.manual_seed(0)
    stock = nn.Conv2d(3, 5, kernel, stride=kernel, bias=bias).double()
    images = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    direction = torch.randn(2, 5, 8 // kernel[0], 12 // kernel[1], dtype=torch.float64)

    def results(function):
        leaf = images.clone().requires_grad_()
        projected = function(leaf)
        return projected, *torch.autograd.grad((projected * direction).sum(), [leaf, *stock.parameters()])

    wanted = results(stock)
    project_by_product(stock)
    assert type(stock) is PatchProjection
    for got, value in zip(results(stock.multiply), wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=0, atol=1e-12)
    assert torch.equal(stock(images), wanted[0])  # on the CPU the convolution itself


@pytest.mark.parametrize("device, width, operation", [("cpu", 12, "conv"), ("cuda", 12, "mm"), ("cuda", 13, "conv")])
def test_the_product_runs_on_accelerators_on_whole_patches(device, width, operation):
    """The convolution drops the pixels behind the last whole patch; the product could not split such an image."""
    with FakeTensorMode():  # tensors without numbers, of any device
        projection = nn.Conv2d(3, 5, 4, stride=4, device=device)
        project_by_product(projection)
        with FlopCounterMode(display=False) as counter:
            assert projection(torch.empty(1, 3, 8, width, device=device)).shape == (1, 5, 2, 3)
    (ran,) = counter.get_flop_counts()["Global"]
    assert operation in str(ran)


@pytest.mark.parametrize(
    "settings",
    [{"stride": 2}, {"padding": 1}, {"dilation": 2}, {"groups": 3}, {"padding": 4, "padding_mode": "circular"}],
)
def test_other_convolutions_stay(settings):
    network = nn.Sequential(nn.Conv2d(3, 6, 4, **{"stride": 4, **settings}))
    project_by_product(network)
    assert type(network[0]) is nn.Conv2d


def test_the_stock_projection_is_replaced_under_its_name(vit, load_exits, load_stock):
    model = load_exits(vit)
    name = "vit.embeddings.patch_embeddings.projection"
    assert type(model.get_submodule(name)) is PatchProjection
    assert type(load_stock(vit).get_submodule(name)) is nn.Conv2d
    assert f"{name}.weight" in model.state_dict()
