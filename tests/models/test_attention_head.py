"""The head that attends to all tokens of an image."""

import math

import pytest
import torch
import torch.nn.functional as F
from factory import tiny_model, tiny_rows

from een_hf.evaluation import relative_costs
from een_hf.inference import predict
from een_hf.models import ExitConfigurationError


def images(model, count=12):
    rows = tiny_rows("vit", count)
    return torch.stack([row["pixel_values"] for row in rows]).to(model.dtype)


@pytest.mark.parametrize("pooling", ["cls", "mean", "cls_mean"])
def test_the_head_is_the_formula_of_its_docstring(pooling):
    """Fails if queries attend along another axis, or the pooled hidden states are not those of `exit_pooling`."""
    model = tiny_model("vit", exit_head="attention", exit_pooling=pooling, noise=0.3).double().eval()
    head = model.exit_heads["2"]
    with torch.no_grad():
        output = model(pixel_values=images(model), early_exit=False, output_hidden_states=True)
    model.requires_grad_(False)
    for hidden, logits in zip(output.hidden_states[2], output.exit_logits[:, 1], strict=True):
        normed = F.layer_norm(hidden, (16,), head.norm.weight, head.norm.bias, head.norm.eps)
        read = []
        for query in range(8):
            scores = [float(head.queries.weight[query] @ token + head.queries.bias[query]) for token in normed]
            weights = [math.exp(score) / sum(map(math.exp, scores)) for score in scores]
            read.append(sum(weight * token for weight, token in zip(weights, normed, strict=True)))
        read += {"cls": [hidden[0]], "mean": [hidden[1:].mean(0)]}.get(pooling, [hidden[0], hidden[1:].mean(0)])
        read = torch.cat(read)
        features = head.layernorm.weight * (read - read.mean()) / (read.var(correction=0) + head.layernorm.eps).sqrt()
        features = head.dense.weight @ (features + head.layernorm.bias) + head.dense.bias
        features = features * (1 + torch.erf(features / math.sqrt(2))) / 2
        torch.testing.assert_close(logits, head.classifier.weight @ features + head.classifier.bias)


def test_it_sees_where_patches_are():
    """What breaks: two images whose patches are exchanged have the same mean, and an exit cannot tell them apart."""
    model = tiny_model("vit", exit_head="attention", exit_pooling="mean", noise=0.3).eval()
    hidden = torch.randn(1, 5, 16)
    positions = torch.randn(5, 16)
    swapped = hidden[:, [0, 2, 1, 3, 4]]
    head = model.exit_heads["1"]
    means = [model.exit_heads["1"].classify((each + positions).flatten(1)) for each in (hidden, swapped)]
    assert (means[0] - means[1]).abs().max() > 1e-3
    torch.testing.assert_close(head(hidden + positions), means[0])


@pytest.mark.parametrize("kind", ["vit", "deit", "dinov2_with_registers", "beit"])
def test_batches_whose_examples_exit_answer_as_without_exits(kind):
    model = tiny_model(kind, exit_head="attention", noise=0.3, num_hidden_layers=4).eval()
    pixels = images(model)
    every = model(pixel_values=pixels, early_exit=False).exit_logits
    thresholds = [*every.softmax(-1).amax(-1).quantile(0.6, 0)[:-1].tolist(), 0.0]
    model.set_exit_policy({"criterion": "confidence", "thresholds": thresholds})
    output = model(pixel_values=pixels)
    assert len(set(output.exit_index.tolist())) > 1
    wanted = every[torch.arange(len(pixels)), output.exit_index]
    torch.testing.assert_close(output.logits, wanted, rtol=1e-4, atol=1e-5)
    rows = [{"pixel_values": image} for image in pixels]
    found = predict(model, rows, batch_size=5, progress=False)
    torch.testing.assert_close(torch.as_tensor(found.logits), wanted, rtol=1e-4, atol=1e-5)


def test_its_cost_is_counted():
    """Scores and sums of 8 queries over 5 tokens of 16 numbers, then 16 (8 + 2) to 16 to 3."""
    with_head, without = (
        tiny_model("vit", exit_head=head, exit_layers=[1], num_hidden_layers=2) for head in ("attention", "norm")
    )
    plain = relative_costs(without)
    attention = relative_costs(with_head)
    operations = 2 * 5 * 16 * 8 + 16 * 10 * 16 + 16 * 3 - 32 * 3
    scale = operations / (attention[0] - plain[0])
    layer = 2 * 5 * 5 * 16 + 5 * (4 * 16 * 16 + 2 * 16 * 24)
    total = 4 * 3 * 16 * 16 + 2 * layer + 16 * 3
    assert scale == pytest.approx(total, rel=1e-6)


def test_texts_are_refused():
    with pytest.raises(ExitConfigurationError, match="--exit_head.*'attention' is for images"):
        tiny_model("bert", exit_head="attention")
