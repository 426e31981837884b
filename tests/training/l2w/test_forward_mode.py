"""Forward-mode derivatives by hand against torch's own."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from l2w_trainers import image_batch, vit, warmed_up
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from een_hf.training.l2w.forward_mode import FewKernels


def derivatives(function, inputs, varied, by_hand, dtype=None):
    """Value and derivative of `function` where the inputs in `varied` have one."""
    torch.manual_seed(1)
    directions = [torch.randn_like(tensor) for tensor in inputs]
    torch.manual_seed(2)  # dropout
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        duals = [
            forward_ad.make_dual(tensor, direction) if n in varied else tensor
            for n, (tensor, direction) in enumerate(zip(inputs, directions, strict=True))
        ]
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            if by_hand:
                with FewKernels():
                    return forward_ad.unpack_dual(function(*duals))
            return forward_ad.unpack_dual(function(*duals))


def attention(**kwargs):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **kwargs)


def columns(length, used, dtype=torch.bool):
    return (torch.arange(length) < torch.tensor(used)[:, None])[:, None, None].to(dtype)


HEADS = [(2, 3, 5, 4)] * 3
CASES = {
    "linear": (F.linear, [(2, 5, 4), (3, 4), (3,)]),
    "linear, no bias": (F.linear, [(2, 4), (3, 4)]),
    "layer norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b, 1e-6), [(2, 5, 4), (4,), (4,)]),
    "layer norm, plain": (lambda x: F.layer_norm(x, (5, 4)), [(2, 5, 4)]),
    "attention": (attention(), HEADS),
    "attention, scale": (attention(scale=0.3), HEADS),
    "attention, padding": (attention(attn_mask=columns(5, [3, 5])), HEADS),
    "attention, bias": (attention(attn_mask=-3.0 * columns(5, [3, 5], torch.float64)), HEADS),
    "attention, dropout": (attention(dropout_p=0.4), HEADS),
    "attention, causal": (attention(is_causal=True), HEADS),
    "attention, other length": (attention(), [(2, 3, 2, 4), (2, 3, 5, 4), (2, 3, 5, 4)]),
    "no rule": (lambda x: F.gelu(x) * 2, [(2, 5, 4)]),
}


@pytest.mark.parametrize("case", CASES)
def test_rules_are_those_of_torch(case):
    """What breaks: a product, mask or dropout mask that is left out, wherever an input may have no derivative."""
    function, shapes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for chosen in product([False, True], repeat=len(inputs)):
        varied = [n for n, has in enumerate(chosen) if has]
        found, wanted = (derivatives(function, inputs, varied, by_hand) for by_hand in (True, False))
        torch.testing.assert_close(found.primal, wanted.primal)
        assert (found.tangent is None) == (not varied)
        if varied:
            torch.testing.assert_close(found.tangent, wanted.tangent)


@pytest.mark.parametrize("case", [case for case in CASES if "bias" not in case])
def test_rules_obey_autocast(case):
    function, shapes = CASES[case]
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    varied = list(range(len(inputs)))
    found, wanted = (derivatives(function, inputs, varied, by_hand, torch.bfloat16) for by_hand in (True, False))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)


class Casts(TorchDispatchMode):
    """Shapes of what is cast, one tensor at a time."""

    def __enter__(self):
        self.shapes = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.shapes.append(args[0].shape)
        return function(*args, **(kwargs or {}))


def test_weights_of_linear_layers_are_cast_together(tmp_path):
    """On a GPU a cast of a small weight takes longer to launch than to run: one launch casts all of a pass."""
    trainer = warmed_up(vit(), tmp_path, [image_batch(8, 1)], bf16=True, scheme_args={"meta_gradient": "forward"})
    linear = {
        module.weight.shape for module in trainer.model.backbone_layers.modules() if type(module) is torch.nn.Linear
    }
    with Casts() as casts:
        trainer.look_ahead.gradient(image_batch(7, 2), image_batch(7, 3))
    assert casts.shapes and not linear & set(casts.shapes)
    assert all(isinstance(parameter, torch.nn.Parameter) for parameter in trainer.model.parameters())


def test_a_weight_that_another_module_reads_too_is_left_as_it_is(tmp_path):
    model = vit()
    model.exit_heads["1"].classifier.weight = model.exit_heads["2"].classifier.weight
    trainer = warmed_up(model, tmp_path, [image_batch(8, 1)], bf16=True, scheme_args={"meta_gradient": "forward"})
    seen = {"1": set(), "3": set()}
    for exit_layer, dtypes in seen.items():
        head = model.exit_heads[exit_layer].classifier if exit_layer in model.exit_heads else model.classifier
        head.register_forward_pre_hook(lambda head, _, dtypes=dtypes: dtypes.add((head.weight.dtype, head.bias.dtype)))
    trainer.look_ahead.gradient(image_batch(7, 2), image_batch(7, 3))
    assert seen == {"1": {(torch.float32, torch.bfloat16)}, "3": {(torch.bfloat16, torch.bfloat16)}}
    assert model.exit_heads["1"].classifier.bias.dtype == torch.float32
