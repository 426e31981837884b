"""Heads that are evaluated together, against the loop over exits that evaluates one after the other."""

import pytest
import torch
from factory import NO_DROPOUT
from operations import Operations
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.initialization import no_init_weights

from een_hf.models import exits, stacked_heads
from een_hf.models.exits import BertExitHead, register_pooling


BOOSTED = {"exit_aggregation": "boosted", "boost_temperature": 0.3, "gradient_rescale": True}
STACKED, SINGLE = torch.ops.aten.baddbmm.default, torch.ops.aten.addmm.default


def answers(model, inputs, stack):
    """Logits, loss and the gradient of every parameter that is trained."""
    model.stack_heads = stack
    model.zero_grad()
    output = model(**inputs, labels=torch.arange(6) % 3, early_exit=False)
    output.loss.backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, grad in trained.items() if grad is None]
    assert not missing  # DDP waits for every gradient
    return output.exit_logits.detach(), output.logits.detach(), output.loss.detach(), trained


def same(model, inputs, **tolerances):
    tolerances = tolerances or {"rtol": 1e-10, "atol": 1e-12}
    with Operations() as operations:
        found = answers(model, inputs, stack=True)
    torch.testing.assert_close(found, answers(model, inputs, stack=False), **tolerances)
    return STACKED in operations.ran


@pytest.mark.parametrize("settings", [{}, BOOSTED], ids=["joint", "boosted"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean"])
def test_stacked_heads_answer_and_learn_like_single_ones(architecture, load_exits, pooling, settings):
    """Fails if exits are exchanged, a sum or a gradient scale is another, or padding takes part in the mean."""
    model = load_exits(architecture, exit_pooling=pooling, **NO_DROPOUT, **settings).double().train()
    for padding in architecture.paddings:
        inputs = architecture.inputs(padding=padding)
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        assert same(model, inputs)


def test_stacked_heads_on_a_frozen_backbone(architecture, load_exits):
    model = load_exits(architecture, **NO_DROPOUT)
    model.freeze_backbone()
    assert same(model.train(), architecture.inputs(padding=architecture.paddings[0]), rtol=1e-4, atol=1e-6)


def test_stacked_heads_in_half_precision(architecture, load_exits):
    """Logits and gradients differ by the rounding of half precision; pooling stays in float32."""
    model = load_exits(architecture, **NO_DROPOUT, **BOOSTED).train()
    inputs = architecture.inputs()
    exact = answers(model, inputs, stack=False)[0]
    with torch.autocast("cpu", torch.bfloat16):
        single, stacked = (answers(model, inputs, stack)[0].float() for stack in (False, True))
    assert (stacked - exact).abs().max() <= 2 * (single - exact).abs().max()


@pytest.mark.parametrize("head", ["pooler", "norm", "norm_pooler", "attention"])
def test_every_registered_head_can_be_stacked(architecture, load_exits, head):
    """A head that is left out is as slow as before, whatever the others gain."""
    assert {"pooler", "norm", "norm_pooler", "attention"} == {name for name in exits.EXIT_HEADS if ":" not in name}
    if head == "attention" and architecture.text:
        pytest.skip("for images")
    model = load_exits(architecture, exit_head=head, **NO_DROPOUT).double().train()
    inputs = architecture.inputs(padding=architecture.paddings[-1])
    assert same(model, {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()})


def test_a_pooling_that_is_not_linear_is_taken_as_it_is(bert, load_exits):
    @register_pooling("largest")
    def largest(hidden, attention_mask, num_prefix_tokens):
        return hidden.amax(1)

    try:
        assert same(load_exits(bert, exit_pooling="largest", **NO_DROPOUT).double().train(), bert.inputs())
    finally:
        del exits.POOLINGS["largest"]


class Doubled(BertExitHead):
    def classify(self, pooled):
        return 2 * super().classify(pooled)


class Shifted(nn.Linear):
    """As adapters put it in the place of a linear layer: its weight is not all that it computes with."""

    def forward(self, inputs):
        return super().forward(inputs) + 1


def _another_class(heads):
    for head in heads:
        head.__class__ = Doubled


def _another_layer(heads):
    for head in heads:
        head.classifier.__class__ = Shifted


def _another_forward(heads):
    heads[1].forward = lambda hidden, attention_mask, forward=heads[1].forward: forward(hidden, attention_mask) + 1


def _one_in_eval_mode(heads):
    for head in heads:
        head.dropout.p = 1.0
    heads[1].eval()


def _one_drops_more(heads):
    heads[1].dropout.p = 1.0


def _a_hook(heads):
    heads[1].classifier.register_forward_hook(lambda module, args, output: output + 1)


@pytest.mark.parametrize(
    "change", [_another_class, _another_layer, _another_forward, _one_in_eval_mode, _one_drops_more, _a_hook]
)
def test_heads_that_are_not_alike_or_do_more_run_one_by_one(bert, load_exits, change):
    model = load_exits(bert, **NO_DROPOUT).double().train()
    change(list(model.exit_heads.values()))
    assert not same(model, bert.inputs())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_heads_are_stacked_in_training_on_accelerators(architecture, device, training):
    """Else hooks on heads would see nothing in evaluation, and the CPU would pay for stacks that save it nothing."""
    config = architecture.config_class(**architecture.stock_config.to_diff_dict())
    inputs = architecture.inputs()
    with FakeTensorMode(), torch.device(device), no_init_weights():
        model = architecture.model_class(config).train(training)
        inputs = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in inputs.items()}
        with Operations() as operations:
            assert model(**inputs).exit_logits.shape == (6, 4, 3)
    assert (STACKED in operations.ran) == (device == "cuda" and training)


def test_derivatives_go_through_stacked_heads(architecture, load_exits):
    """Forward-mode derivatives, as the look-ahead of l2w takes them on accelerators."""
    model = load_exits(architecture, **NO_DROPOUT).double().train()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in architecture.inputs().items()}
    torch.manual_seed(0)
    directions = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    tangents = []
    for model.stack_heads in (True, False):
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            pairs = {name: forward_ad.make_dual(p.detach(), directions[name]) for name, p in model.named_parameters()}
            tangents.append(forward_ad.unpack_dual(functional_call(model, pairs, (), inputs).exit_logits).tangent)
    torch.testing.assert_close(*tangents, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, BOOSTED], ids=["joint", "boosted"])
def test_an_exit_more_costs_few_operations(architecture, settings):
    """Fails if something runs once per exit beside the pooling and its gradient, joined with the one from behind."""
    counts = []
    for exit_layers in ([1, 2, 10], list(range(1, 11))):
        stock = {**architecture.stock_config.to_diff_dict(), "num_hidden_layers": 10}
        model = architecture.model_class(architecture.config_class(**stock, exit_layers=exit_layers, **settings))
        model.train().stack_heads = True
        with Operations() as forward:
            loss = model(**architecture.inputs(), labels=torch.arange(6) % 3).loss
        with Operations() as backward:
            loss.backward()
        counts.append((len(forward.ran), len(backward.ran)))
    (few_forward, few_backward), (many_forward, many_backward) = counts
    assert many_forward - few_forward == 7  # a product
    assert many_backward - few_backward == 7  # a product that adds and scales


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.25, 0.75)])
def test_gradients_of_weighted_sums(scales):
    """Both derivatives of first order, and the gradient's own gradient, which the exact look-ahead takes."""
    hidden, weights = torch.randn(3, 5, 4, dtype=torch.float64), torch.rand(3, 2, 5, dtype=torch.float64)
    factors = [torch.randn_like(hidden), torch.randn(3, 2, 4, dtype=torch.float64)]

    def total(hidden, sums_scale, hidden_scale):
        after, sums = stacked_heads._WeightedSums.apply(hidden.sin(), weights, sums_scale, hidden_scale)
        return (after * factors[0]).sum() + (sums.square() * factors[1]).sum()

    def plain(hidden, sums_scale, hidden_scale):
        sines = hidden.sin()
        sums = weights @ exits.scale_gradient(sines, sums_scale)
        return (exits.scale_gradient(sines, hidden_scale) * factors[0]).sum() + (sums.square() * factors[1]).sum()

    hidden.requires_grad_()
    slopes = [torch.autograd.grad(f(hidden, *scales), hidden, create_graph=True)[0] for f in (total, plain)]
    torch.testing.assert_close(*slopes)
    torch.testing.assert_close(*(torch.autograd.grad(slope.square().sum(), hidden)[0] for slope in slopes))
    torch.testing.assert_close(torch.func.grad(total)(hidden.detach(), *scales), slopes[1])
    assert torch.autograd.gradcheck(lambda h: total(h, 1.0, 1.0), hidden, check_forward_ad=True)
