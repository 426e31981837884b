"""How tests of models compare."""

import torch


LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def assert_equal(actual, expected):
    """Equal to the last bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def each_input(architecture):
    """The inputs of every kind of padding that the architecture knows."""
    return [(padding, architecture.inputs(padding=padding)) for padding in architecture.paddings]


def watch_layers(architecture, model):
    """A list that fills with (layer, rows, columns) as layers are called."""
    seen = []
    for index, layer in enumerate(architecture.layers(model)):
        layer.register_forward_hook(lambda module, args, output, index=index: seen.append((index, *args[0].shape[:2])))
    return seen
