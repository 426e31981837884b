"""Gradients of boosted exits: what they do not reach, and how they are rescaled."""

import pytest
import torch
import torch.nn.functional as F
from factory import NO_DROPOUT
from models.comparing import LABELS, assert_close, assert_equal, gradients


def test_boosted_stop_gradient_is_exact(architecture, load_exits):
    """A gradient through F_{k-1} would train early exits for the errors of late ones."""
    for exit_index in range(3):
        model = load_exits(architecture, exit_layers=[1, 3], exit_aggregation="boosted")
        model(**architecture.inputs()).exit_logits[:, exit_index].square().sum().backward()
        for other in range(3):
            for module in model.exit_head_modules(other):
                for parameter in module.parameters():
                    if other == exit_index:
                        assert parameter.grad.abs().sum() > 0
                    else:
                        assert parameter.grad is None or not parameter.grad.any()


def _block_gradients(architecture, model, inputs, labels, rescale):
    """Gradients of the joint boosted loss, block by block: g_k = (g_head + (K-k) g_next) / (K-k+1), or their sum."""
    config, layers = model.config, architecture.layers(model)
    kwargs = {key: value for key, value in inputs.items() if key != "attention_mask"}
    embeddings = architecture.backbone(model).embeddings
    context = model.make_context(model.embed(**inputs))
    starts = [0, *config.exit_layers[:-1]]

    def run(block, hidden):
        for layer in layers[starts[block] : config.exit_layers[block]]:
            hidden = layer(hidden, context)
        return hidden

    count = len(config.exit_layers)
    block_inputs, head_gradients, result, previous = [], [], {}, 0.0
    hidden = embeddings(**kwargs).detach()
    for block in range(count):
        block_inputs.append(hidden)
        hidden = run(block, hidden).detach().requires_grad_()
        modules = model.exit_head_modules(block)
        last = block == count - 1
        parameters = [
            (n, p) for n, p in model.named_parameters() if any(p is q for m in modules for q in m.parameters())
        ]
        own = model.last_head(hidden, None) if last else model.exit_heads[str(config.exit_layers[block])](hidden)
        boosted = own + config.boost_temperature * previous
        previous = boosted.detach()
        loss = F.cross_entropy(boosted, labels)
        values = torch.autograd.grad(loss, [hidden, *(p for _, p in parameters)])
        head_gradients.append(values[0])
        result.update(zip([n for n, _ in parameters], values[1:], strict=True))
        hidden = hidden.detach()
    arriving = torch.zeros_like(head_gradients[-1])
    for block in reversed(range(count)):
        left = count - 1 - block
        if rescale:
            received = (head_gradients[block] + left * arriving) / (left + 1)
        else:
            received = head_gradients[block] + arriving
        start = block_inputs[block].clone().requires_grad_()
        prefixes = [f"{layer}." for layer in range(starts[block], config.exit_layers[block])]
        where = "bert.encoder.layer." if architecture.name == "bert" else "vit.layers."
        parameters = [
            (n, p) for n, p in model.named_parameters() if any(n.startswith(where + prefix) for prefix in prefixes)
        ]
        values = torch.autograd.grad(run(block, start), [start, *(p for _, p in parameters)], received)
        arriving = values[0]
        result.update(zip([n for n, _ in parameters], values[1:], strict=True))
    names = [(n, p) for n, p in model.named_parameters() if n.startswith(f"{architecture.name}.embeddings")]
    values = torch.autograd.grad(embeddings(**kwargs), [p for _, p in names], arriving)
    result.update(zip([n for n, _ in names], values, strict=True))
    return result


@pytest.mark.parametrize("rescale", [True, False])
def test_gradient_rescaling_follows_its_recursion(architecture, load_exits, rescale):
    """Scaled at the wrong place, early blocks drown in the gradients of K exits or starve."""
    model = load_exits(
        architecture,
        exit_layers=[1, 3],
        exit_pooling="cls",
        exit_aggregation="boosted",
        gradient_rescale=rescale,
        **NO_DROPOUT,
    )
    model = model.double().train()
    inputs = architecture.inputs(padding=architecture.paddings[0])
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    expected = _block_gradients(architecture, model, inputs, LABELS, rescale)
    model(**inputs, labels=LABELS).loss.backward()
    actual = gradients(model)
    assert set(actual) == set(expected) == {name for name, _ in model.named_parameters()}
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, 1e-10)


def test_gradient_rescaling_leaves_outputs_and_eval_alone(architecture, load_exits):
    """A scale of gradients that changes a forward pass, or the gradients of an attribution in eval mode."""
    inputs = architecture.inputs()
    models = [load_exits(architecture, gradient_rescale=rescale) for rescale in (False, True)]
    outputs = [model(**inputs, labels=LABELS) for model in models]
    assert_equal(outputs[1].exit_logits, outputs[0].exit_logits)
    for output in outputs:
        output.loss.backward()
    for name, gradient in gradients(models[0]).items():
        assert_equal(gradients(models[1])[name], gradient)
