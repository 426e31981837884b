"""Only the layers, rows, columns and heads that are needed run."""

import pytest
import torch
from factory import tiny_model, tiny_rows
from models.comparing import watch_layers
from models.criteria_by_hand import (
    EXIT_LAYERS,
    NUM_EXITS,
    anytime_logits,
    policy_of,
    rows_at,
    run_dynamic,
    scores_by_hand,
    threshold_grid,
)
from operations import Operations

from een_hf.models import ExitPolicy
from een_hf.models.policies import NEVER


@pytest.mark.parametrize("aggregation", ["none", "boosted"])
def test_only_the_needed_rows_and_columns_run(architecture, load_exits, aggregation):
    """Early exit that computes for rows that have exited, or for padding that no row has, saves nothing."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS, exit_aggregation=aggregation)
    seen = watch_layers(architecture, model)
    last_layers, first_layers = [*EXIT_LAYERS, 4], [0, *EXIT_LAYERS]
    for padding in architecture.paddings:
        inputs = architecture.inputs(32, padding=padding, seed=7)
        full = 12 if architecture.name == "bert" else 17
        used = inputs["attention_mask"].sum(1).tolist() if padding == "right" else [full] * 32
        scores = [scores_by_hand("confidence", row) for row in anytime_logits(model, inputs).double().tolist()]
        for thresholds in threshold_grid("confidence", scores):
            seen.clear()
            exits = run_dynamic(model, policy_of("confidence", thresholds), inputs).exit_index.tolist()
            expected = []
            for block in range(NUM_EXITS):
                survivors = [row for row in range(32) if exits[row] >= block]
                if not survivors:
                    break
                # Nothing is copied, and so nothing trimmed, as long as no row has exited.
                width = full if len(survivors) == 32 else max(used[row] for row in survivors)
                expected += [
                    (layer, len(survivors), width) for layer in range(first_layers[block], last_layers[block])
                ]
            assert seen == expected


def test_what_a_head_returned_is_not_written_to():
    """What breaks: hooks, or code that stores the logits of a head, read logits of later exits among them."""
    model, kept = tiny_model(noise=0.3).eval(), []
    inputs = {"input_ids": torch.stack([row["input_ids"] for row in tiny_rows()])}
    with torch.no_grad():
        scores = model(**inputs).exit_logits.softmax(-1).amax(-1)
        for head in model.exit_heads.values():
            head.register_forward_hook(lambda _, __, logits: kept.append((logits, logits.clone())))
        outputs = model(**inputs, early_exit=policy_of("confidence", scores.median(0).values.tolist()))
    assert len(outputs.exit_index.unique()) == 3 and len(kept) == 2
    assert all(now.equal(then) for now, then in kept)


def test_a_decision_costs_few_operations(architecture, load_exits):
    """On a GPU each of them takes longer to launch than to run: beyond those of anytime, so many for each decision."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    for padding in architecture.paddings:
        inputs = architecture.inputs(32, padding=padding, seed=7)
        scores = [scores_by_hand("confidence", row) for row in anytime_logits(model, inputs).double().tolist()]
        policies = [policy_of("confidence", thresholds) for thresholds in threshold_grid("confidence", scores)]
        taken = (run_dynamic(model, policy, inputs).exit_index for policy in policies)
        assert any(len(exits.unique()) == NUM_EXITS for exits in taken)  # the model keeps the policy that does so
        counts = []
        for early_exit in (True, False):
            with torch.inference_mode(), Operations() as operations:
                taken = model(**inputs, early_exit=early_exit).exit_index
            counts.append(len(operations.ran))
        # Two decisions: the score, who continues, their rows, the answers; of a mask also what it covers.
        assert counts[0] - counts[1] <= (22 if padding == "none" else 51)


@pytest.mark.parametrize("exit_pooling", ["cls", "mean"])
def test_trailing_columns_are_trimmed(bert, load_exits, exit_pooling):
    """The long rows exit: the others must be as wide as the longest of them, and as right."""
    model = load_exits(bert, exit_layers=EXIT_LAYERS, exit_pooling=exit_pooling)
    seen = watch_layers(bert, model)
    inputs = bert.inputs(padding="right", lengths=[12, 4, 12, 6, 11, 5, 12, 1] * 8, seed=3)
    lengths = inputs["attention_mask"].sum(1).tolist()
    exit_logits = anytime_logits(model, inputs)
    scores = [scores_by_hand("confidence", row)[0] for row in exit_logits.double().tolist()]
    threshold = sorted(scores)[32] - 1e-4
    # Of the long rows those that exit, of the short ones those that continue, and the most confident short ones exit.
    rows = [row for row in range(64) if (lengths[row] > 6) == (scores[row] > threshold) or scores[row] > 0.95]
    stay = [scores[row] < threshold for row in rows]
    num_staying = sum(stay)
    assert 0 < num_staying < len(rows)
    seen.clear()
    output = run_dynamic(model, policy_of("confidence", [threshold, 1.5, 0.0]), rows_at(inputs, rows))
    assert output.exit_index.tolist() == [2 if staying else 0 for staying in stay]
    width = max(lengths[row] for row, staying in zip(rows, stay, strict=True) if staying)
    assert width == 6
    assert seen == [(0, len(rows), 12), *((layer, num_staying, width) for layer in (1, 2, 3))]
    expected = exit_logits[torch.tensor(rows), output.exit_index]
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)


def test_exits_that_the_policy_never_uses_are_not_evaluated(architecture, load_exits):
    """A head that nobody can exit at costs as much as a twelfth of a layer, for nothing."""
    model, inputs = load_exits(architecture, exit_layers=[1, 2, 3]), architecture.inputs()
    evaluated = []
    for index in range(4):
        model.exit_head_modules(index)[-1].register_forward_hook(lambda *_, index=index: evaluated.append(index))
    with torch.no_grad():
        every = model(**inputs).exit_logits
        threshold = float(every[:, 1].softmax(-1).amax(-1).median())
        for thresholds, wanted in (
            ([NEVER, threshold, 1.5, 0.0], [1, 3]),
            ([NEVER, NEVER, NEVER, 0.0], [3]),
            ([-NEVER, NEVER, NEVER, 0.0], [0]),
        ):
            evaluated.clear()
            output = run_dynamic(model, ExitPolicy("confidence", thresholds), inputs)
            assert evaluated == wanted
            rows = torch.arange(len(output.exit_index))
            assert (output.logits - every[rows, output.exit_index]).abs().max() <= 1e-5
        evaluated.clear()
        # Votes of exits where nobody exits count.
        run_dynamic(model, ExitPolicy("vote", [NEVER, NEVER, 3, 0.0]), inputs)
        assert evaluated[:3] == [0, 1, 2]
