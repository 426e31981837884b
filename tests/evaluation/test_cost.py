"""Relative costs against closed forms."""

import copy
import pickle

import pytest
import torch
from factory import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from een_hf.evaluation import ExitCosts, cost_inputs, count_operations, mean_length, relative_costs
from een_hf.models import (
    ExitPolicy,
)
from een_hf.models.policies import NEVER


WIDTH, INNER, LABELS = 16, 40, 3
SIZES = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_labels": LABELS}


def make_bert(**fields):
    return tiny_model("bert", **SIZES, num_hidden_layers=4, max_position_embeddings=64, **fields)


def make_vit(**fields):
    return tiny_model("vit", **SIZES, num_hidden_layers=3, image_size=32, patch_size=8, **fields)


def expected_costs(exit_layers, tokens, num_layers, embedding, head):
    """Multiply-accumulates of a transformer encoder, by hand."""
    projections = 4 * tokens * WIDTH * WIDTH
    attention = 2 * tokens * tokens * WIDTH
    mlp = 2 * tokens * WIDTH * INNER
    layer = projections + attention + mlp
    plain = embedding + num_layers * layer + head
    return [(embedding + depth * layer + count * head) / plain for count, depth in enumerate(exit_layers, 1)]


def test_operations_of_a_smaller_network():
    """Fails if baselines of another size are placed at a wrong cost: two per multiply-accumulate, by hand."""
    found, plain = count_operations(make_bert(exit_layers=[2, 4]), sequence_length=20)
    layer = 4 * 20 * WIDTH * WIDTH + 2 * 20 * 20 * WIDTH + 2 * 20 * WIDTH * INNER
    head = WIDTH * WIDTH + WIDTH * LABELS
    assert plain == 2 * (4 * layer + head) and found == [2 * (2 * layer + head), 2 * (4 * layer + 2 * head)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("tokens", [1, 20, 64])
def test_costs_of_bert_equal_the_closed_form(tokens, pooling, attention):
    """Fails if attention products or earlier heads are left out, or a kernel changes the count."""
    model = make_bert(exit_layers=[1, 3], exit_pooling=pooling, attn_implementation=attention)
    head = WIDTH * WIDTH + WIDTH * LABELS
    expected = expected_costs([1, 3, 4], tokens, 4, embedding=0, head=head)
    assert relative_costs(model, sequence_length=tokens) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("image_size", [None, 32, 48, (48, 32)])
def test_costs_of_vit_equal_the_closed_form(image_size):
    """Fails if the patch projection or the class token is left out, or another image size is ignored."""
    height, width = image_size if isinstance(image_size, tuple) else (image_size or 32,) * 2
    patches = height * width // 64
    expected = expected_costs([2, 3], patches + 1, 3, embedding=patches * 3 * 64 * WIDTH, head=WIDTH * LABELS)
    assert relative_costs(make_vit(exit_layers=[2], exit_pooling="cls"), image_size=image_size) == pytest.approx(
        expected, rel=1e-12
    )


def test_without_earlier_exits_the_model_costs_one():
    """Fails if the plain model, the denominator, is not the one that is run."""
    assert relative_costs(make_bert(exit_layers=[4]), sequence_length=9) == [1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make, size", [(make_bert, {"sequence_length": 20}), (make_vit, {"image_size": 48})])
def test_counting_leaves_the_model_alone(make, size, dtype):
    """Fails if counting changes weights, mode, hooks, settings or random numbers, or needs full precision."""
    torch.manual_seed(0)
    model = make().to(dtype).train()
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    attention = model.config._attn_implementation
    random_state = torch.get_rng_state()
    costs = relative_costs(model, **size)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert costs == pytest.approx(relative_costs(make(), **size))
    assert model.training and model.config.to_dict() == config and model.config._attn_implementation == attention
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.backbone_layers)


def test_a_set_policy_does_not_change_the_count():
    """Fails if the model exits early while it is counted."""
    model = make_bert()
    expected = relative_costs(model, sequence_length=20)
    model.config.exit_policy = {"criterion": "confidence", "thresholds": [0.0, 0.0, 0.0, 0.0]}
    assert relative_costs(model, sequence_length=20) == expected


@pytest.mark.parametrize("size", [{}, {"sequence_length": 0}, {"sequence_length": 65}])
def test_a_length_that_does_not_fit_is_named(size):
    """Fails if a text model is counted at some arbitrary length, or a wrong one ends in a shape error."""
    with pytest.raises(ValueError, match="sequence_length"):
        relative_costs(make_bert(), **size)


def test_mean_length_counts_unmasked_tokens():
    """Fails if padding counts."""
    assert mean_length([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]) == round((3 + 1 + 4) / 3)
    assert mean_length([[0, 0]]) == 1


HEAD = WIDTH * WIDTH + WIDTH * LABELS
LAYER = 4 * 20 * WIDTH * WIDTH + 2 * 20 * 20 * WIDTH + 2 * 20 * WIDTH * INNER


@pytest.mark.parametrize("used", [(), (0,), (1,), (0, 2), (0, 1, 2)])
def test_a_policy_costs_the_heads_that_it_evaluates(used):
    """Fails if heads of exits that nobody can take are counted, or heads before the exit taken are not."""
    policy = ExitPolicy("confidence", [0.5 if index in used else NEVER for index in range(4)])
    expected = [
        (depth * LAYER + (1 + sum(other < depth - 1 for other in used)) * HEAD) / (4 * LAYER + HEAD)
        for depth in (1, 2, 3, 4)
    ]
    costs = relative_costs(make_bert(), sequence_length=20)
    assert costs.of_policy(policy).tolist() == pytest.approx(expected, rel=1e-12)
    assert costs.of_policy(None)[-1] == 1.0


@pytest.mark.parametrize("fields", [{}, {"exit_aggregation": "boosted"}])
@pytest.mark.parametrize("criterion", ["confidence", "patience"])
def test_a_policy_costs_what_the_dynamic_forward_computes(criterion, fields):
    """Fails if the cost of an exit is not what torch counts in a dynamic pass of the model itself."""
    torch.manual_seed(0)
    model = make_bert(attn_implementation="eager", **fields).eval()
    size = {"sequence_length": 20}
    costs, (_, plain) = relative_costs(model, **size), count_operations(model, **size)
    for taken in range(4):
        # Exit 2 is evaluated only if examples are to exit there.
        thresholds = [NEVER if index == 1 else 2.0 if criterion == "patience" else 1.0 for index in range(4)]
        thresholds[taken] = -NEVER
        policy = ExitPolicy(criterion, thresholds)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            found = model(input_ids=torch.randint(1, 50, (1, 20)), early_exit=policy).exit_index.item()
        assert costs.of_policy(policy)[found] == pytest.approx(counter.get_total_flops() / plain, rel=1e-12)
        assert criterion == "patience" or found == taken


def test_costs_survive_a_file_and_another_process():
    """Fails if a saved run counts otherwise than the run itself, or processes disagree."""
    costs = ExitCosts([0.25, 0.5, 1.0], [0.1, 0.2, 0.3], [0.05, 0.0, 0.0])
    policy = ExitPolicy("confidence", [0.5, NEVER, NEVER])
    for copied in (ExitCosts(**costs.to_dict()), pickle.loads(pickle.dumps(costs))):
        assert list(copied) == list(costs) == pytest.approx([0.25, 0.6, 1.3])
        assert copied.of_policy(policy).tolist() == costs.of_policy(policy).tolist() == [0.25, 0.6, 1.1]
    assert ExitCosts([0.3, 0.8, 1.2]).of_policy(policy).tolist() == [0.3, 0.8, 1.2]


def test_images_count_at_their_own_height_and_width():
    """What breaks: channels are taken for the height, and costs are those of another image."""
    assert cost_inputs([{"pixel_values": torch.zeros(3, 8, 16)}]) == {"image_size": (8, 16)}
