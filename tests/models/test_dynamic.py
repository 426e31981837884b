"""Dynamic inference against the pass that evaluates every exit: the same answers, whatever the batch."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models.comparing import watch_layers
from models.criteria_by_hand import (
    CRITERIA,
    EXIT_LAYERS,
    NUM_EXITS,
    TEMPERATURES,
    _softmax,
    anytime_logits,
    exit_layers_for,
    expected_exits,
    policy_of,
    rows_at,
    run_dynamic,
    scores_by_hand,
    threshold_grid,
    with_nan,
)

from een_hf.inference import ExitRunner
from een_hf.models import ExitConfigurationError, ExitPolicy, staged_forward


@pytest.mark.parametrize("aggregation", ["none", "boosted"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("batch_size", [1, 32])
def test_answers_are_the_all_exits_answers(architecture, load_exits, criterion, aggregation, batch_size):
    """The promise of early exit: a row's answer depends on its own exit and on nothing else in the batch."""
    pooling = architecture.poolings[-1]
    layers = exit_layers_for(criterion)
    model = load_exits(architecture, exit_layers=layers, exit_pooling=pooling, exit_aggregation=aggregation)
    num_exits, taken, most_mixed = len(layers) + 1, set(), 0
    for padding in architecture.paddings:
        inputs = architecture.inputs(32, padding=padding, seed=5)
        exit_logits = anytime_logits(model, inputs)
        for temperatures in (None, TEMPERATURES):
            scores = [scores_by_hand(criterion, row, temperatures) for row in exit_logits.double().tolist()]
            for thresholds in threshold_grid(criterion, scores):
                exits, clear = expected_exits(scores, thresholds)
                most_mixed = max(most_mixed, len(set(exits)))
                policy = policy_of(criterion, thresholds, temperatures=temperatures and TEMPERATURES[:num_exits])
                # At batch 1 a few rows are enough: short, long and of one token.
                for start in range(0, 32 if batch_size == 32 else 12, batch_size):
                    here = slice(start, start + batch_size)
                    output = run_dynamic(model, policy, rows_at(inputs, here))
                    assert output.exit_logits is None
                    assert output.loss is None
                    assert output.exit_index.dtype == torch.int64
                    assert output.logits.shape == (batch_size, 3)
                    for offset, index in enumerate(output.exit_index.tolist()):
                        row = start + offset
                        difference = (output.logits[offset] - exit_logits[row, index]).abs().max().item()
                        assert difference <= 1e-5, (padding, thresholds, row)
                        if clear[row]:
                            assert index == exits[row], (padding, thresholds, row, scores[row])
                        taken.add(index)
    # A grid that sends every row to the same exit would test nothing.
    assert taken == set(range(num_exits))
    assert most_mixed >= 3


@pytest.mark.parametrize("exit_pooling", ["cls", "mean"])
def test_no_mask_equals_a_mask_of_ones(bert, load_exits, exit_pooling):
    """Rows exit the same way without a mask as with one that hides nothing."""
    model = load_exits(bert, exit_layers=EXIT_LAYERS, exit_pooling=exit_pooling)
    inputs = bert.inputs(32)
    scores = [scores_by_hand("confidence", row) for row in anytime_logits(model, inputs).double().tolist()]
    for thresholds in threshold_grid("confidence", scores):
        policy = policy_of("confidence", thresholds)
        none = run_dynamic(model, policy, inputs, attention_mask=None)
        ones = run_dynamic(model, policy, inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
        torch.testing.assert_close(none.logits, ones.logits, rtol=0, atol=1e-5)
        assert none.exit_index.tolist() == ones.exit_index.tolist()


@pytest.mark.parametrize("exit_pooling", ["cls", "mean"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_masks_with_holes(bert, load_exits, attention, exit_pooling):
    """A mask need not be a block: trimming by counting tokens would cut a used column."""
    model = load_exits(bert, exit_layers=EXIT_LAYERS, exit_pooling=exit_pooling, attn_implementation=attention)
    inputs = bert.inputs(32)
    mask = (torch.rand(32, 12, generator=torch.Generator().manual_seed(2)) < 0.4).long()
    mask[:, 3] = 1
    mask[:, 9:] *= (torch.arange(32) % 3 == 0).long()[:, None]
    inputs["attention_mask"] = mask
    exit_logits = anytime_logits(model, inputs)
    scores = [scores_by_hand("confidence", row) for row in exit_logits.double().tolist()]
    for dtype in (torch.int64, torch.bool, torch.float32):
        for thresholds in threshold_grid("confidence", scores):
            output = run_dynamic(
                model, policy_of("confidence", thresholds), {**inputs, "attention_mask": mask.to(dtype)}
            )
            expected = exit_logits[torch.arange(32), output.exit_index]
            torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 32])
def test_all_examples_exit_at_the_first_exit(architecture, load_exits, batch_size):
    """The loop must stop, not go on with an empty batch."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    seen = watch_layers(architecture, model)
    for padding in architecture.paddings:
        inputs = architecture.inputs(batch_size, padding=padding)
        expected = anytime_logits(model, inputs)[:, 0]
        seen.clear()
        output = run_dynamic(model, policy_of("confidence", [0.0, 0.0, 0.0]), inputs)
        assert output.exit_index.tolist() == [0] * batch_size
        torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
        assert [layer for layer, _, _ in seen] == [0]


@pytest.mark.parametrize("batch_size", [1, 32])
def test_no_example_exits_early(architecture, load_exits, batch_size):
    """Exit K answers all that remain, whatever its own threshold says."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    seen = watch_layers(architecture, model)
    for last_threshold in (0.0, 5.0):
        inputs = architecture.inputs(batch_size, padding=architecture.paddings[0])
        expected = anytime_logits(model, inputs)[:, -1]
        seen.clear()
        output = run_dynamic(model, policy_of("confidence", [1.5, 1.5, last_threshold]), inputs)
        assert output.exit_index.tolist() == [NUM_EXITS - 1] * batch_size
        torch.testing.assert_close(output.logits, expected, rtol=0, atol=0)
        assert [layer for layer, _, _ in seen] == [0, 1, 2, 3]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_examples_with_nan_never_exit_early(architecture, load_exits, criterion):
    """A row with NaN that exits early looks like a confident one; and it must not keep or spoil the others."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    lowest = -1.5 if criterion == "entropy" else 0.0
    for padding in architecture.paddings:
        inputs = architecture.inputs(8, padding=padding, seed=1)
        clean = anytime_logits(model, inputs)
        for rows in ([2, 5], list(range(8))):
            broken = with_nan(architecture, inputs, rows, model)
            output = run_dynamic(model, policy_of(criterion, [lowest, lowest, 0.0]), broken)
            for row in range(8):
                if row in rows:
                    assert output.exit_index[row] == NUM_EXITS - 1
                    assert output.logits[row].isnan().all()
                else:
                    assert output.exit_index[row] == 0
                    torch.testing.assert_close(output.logits[row], clean[row, 0], rtol=0, atol=1e-5)


def test_nan_at_one_exit_holds_an_example_there_only(architecture, load_exits):
    """A broken exit must hold nobody for longer than itself."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    inputs = architecture.inputs()
    expected = anytime_logits(model, inputs)[:, 1]
    with torch.no_grad():
        model.exit_heads["1"].classifier.bias.fill_(math.nan)
    output = run_dynamic(model, policy_of("confidence", [0.0, 0.0, 0.0]), inputs)
    assert output.exit_index.tolist() == [1] * 6
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)


def test_each_mode_evaluates_the_exits_that_it_needs(architecture, load_exits):
    """Training on the rows that continue, or evaluating exits that some rows skipped, would both go unnoticed."""
    model, inputs = load_exits(architecture, exit_layers=EXIT_LAYERS), architecture.inputs()
    with torch.no_grad():
        plain = model(**inputs)
    assert plain.exit_index is None
    model.set_exit_policy(policy_of("confidence", [0.0, 0.0, 0.0]))
    with torch.no_grad():
        dynamic, anytime = model(**inputs), model(**inputs, early_exit=False)
        training = model.train()(**inputs)
        model.eval()
        model.set_exit_policy(None)
        unset = model(**inputs)
    assert dynamic.exit_index.tolist() == [0] * 6
    for output in (anytime, unset):
        assert output.exit_index is None
        torch.testing.assert_close(output.exit_logits, plain.exit_logits, rtol=0, atol=0)
        torch.testing.assert_close(output.logits, plain.logits, rtol=0, atol=0)
    assert training.exit_index is None
    assert training.exit_logits.shape == (6, NUM_EXITS, 3)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_asking_for_hidden_states_runs_every_layer(architecture, load_exits, monkeypatch, criterion, asked):
    """Rows that have exited have no later hidden states: all layers must run, with equal answers, and say so."""
    warnings = []
    monkeypatch.setattr(staged_forward.logger, "warning_once", warnings.append)
    model = load_exits(architecture, exit_layers=exit_layers_for(criterion), attn_implementation="eager")
    inputs = architecture.inputs(32, padding=architecture.paddings[0])
    labels = torch.arange(32) % 3
    temperatures = TEMPERATURES[: model.num_exits]
    scores = [scores_by_hand(criterion, row, TEMPERATURES) for row in anytime_logits(model, inputs).double().tolist()]
    for thresholds in threshold_grid(criterion, scores):
        policy = policy_of(criterion, thresholds, temperatures=temperatures)
        expected = run_dynamic(model, policy, inputs, labels=labels)
        assert not warnings
        output = run_dynamic(model, policy, inputs, labels=labels, **{asked: True})
        assert len(warnings) == 1
        assert asked in warnings.pop()
        recorded = output.hidden_states if asked == "output_hidden_states" else output.attentions
        assert len(recorded) == (5 if asked == "output_hidden_states" else 4)
        assert all(len(tensor) == 32 for tensor in recorded)
        assert output.exit_index.dtype == torch.int64
        assert output.exit_index.tolist() == expected.exit_index.tolist()
        assert output.exit_logits is None
        torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(output.loss, expected.loss, rtol=0, atol=1e-5)


def test_loss_is_the_mean_over_rows_at_their_own_exits(architecture, load_exits):
    """Summed over exits, the loss of a dynamic evaluation could not be compared with anything."""
    model, inputs = load_exits(architecture, exit_layers=EXIT_LAYERS), architecture.inputs(32)
    labels = torch.arange(32) % 3
    scores = [scores_by_hand("confidence", row) for row in anytime_logits(model, inputs).double().tolist()]
    for thresholds in threshold_grid("confidence", scores):
        output = run_dynamic(model, policy_of("confidence", thresholds), inputs, labels=labels)
        rows = zip(output.logits.double().tolist(), labels.tolist(), strict=True)
        expected = sum(-math.log(_softmax(logits, 1.0)[label]) for logits, label in rows) / 32
        assert output.loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("aggregation", ["none", "boosted"])
def test_gradients_in_eval_mode(architecture, load_exits, aggregation):
    """Attributions differentiate a served model: the rows' bookkeeping must not break or change the graph."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS, exit_aggregation=aggregation)
    inputs = architecture.inputs(32, padding=architecture.paddings[0])
    labels = torch.arange(32) % 3
    scores = [scores_by_hand("confidence", row) for row in anytime_logits(model, inputs).double().tolist()]
    model.set_exit_policy(policy_of("confidence", threshold_grid("confidence", scores)[1]))
    reference = copy.deepcopy(model)
    output = model(**inputs, labels=labels)
    assert set(output.exit_index.tolist()) == {0, 1, 2}
    output.loss.backward()
    exit_logits = reference(**inputs, early_exit=False).exit_logits
    F.cross_entropy(exit_logits[torch.arange(32), output.exit_index], labels).backward()
    for (name, actual), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_bfloat16_and_autocast(architecture, load_exits, criterion):
    """Scores, logits and indices must take whatever dtype the heads give."""
    model = load_exits(architecture, exit_layers=exit_layers_for(criterion), exit_aggregation="boosted")
    inputs = architecture.inputs(32, padding=architecture.paddings[0])
    scores = [scores_by_hand(criterion, row) for row in anytime_logits(model, inputs).double().tolist()]
    policy = policy_of(criterion, threshold_grid(criterion, scores)[1])
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = run_dynamic(model, policy, inputs), anytime_logits(model, inputs)
    for output, exit_logits in (mixed, (run_dynamic(half, policy, inputs), anytime_logits(half, inputs))):
        expected = exit_logits[torch.arange(32), output.exit_index]
        assert output.exit_index.dtype == torch.int64
        error = (output.logits.float() - expected.float()).abs().max()
        assert error / exit_logits.float().abs().max() < 0.05


def test_inference_mode_gives_the_same_answers(architecture, load_exits):
    """Engines run under inference_mode, where some in-place writes are refused."""
    model, inputs = load_exits(architecture, exit_layers=EXIT_LAYERS), architecture.inputs(32)
    scores = [scores_by_hand("confidence", row) for row in anytime_logits(model, inputs).double().tolist()]
    policy = policy_of("confidence", threshold_grid("confidence", scores)[1])
    expected = run_dynamic(model, policy, inputs)
    with torch.inference_mode():
        output = model(**inputs)
    assert set(output.exit_index.tolist()) == {0, 1, 2}
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-6)
    assert output.exit_index.tolist() == expected.exit_index.tolist()


def test_calls_do_not_remember(architecture, load_exits):
    """Votes or streaks carried over from the last batch would make answers depend on the order of batches."""
    model, inputs = load_exits(architecture), architecture.inputs(32)
    for criterion in CRITERIA:
        policy = policy_of(criterion, [0.6, 0.6, 0.6, 0.0] if criterion not in ("patience", "vote") else [1, 2, 2, 0])
        first = run_dynamic(model, policy, inputs)
        run_dynamic(model, policy, architecture.inputs(7, seed=9))
        again = run_dynamic(model, policy, inputs)
        torch.testing.assert_close(again.logits, first.logits, rtol=0, atol=0)
        assert again.exit_index.tolist() == first.exit_index.tolist()


def test_a_regression_exits_by_patience(architecture, stock_folders):
    """Without classes only the change from exit to exit tells how sure a model is."""
    torch.manual_seed(3)
    model = architecture.model_class.from_pretrained(
        stock_folders[architecture.name, "head"],
        num_labels=1,
        problem_type="regression",
        ignore_mismatched_sizes=True,
        initializer_range=0.3,
    ).eval()
    taken = set()
    for padding in architecture.paddings:
        inputs = architecture.inputs(32, padding=padding)
        exit_logits = anytime_logits(model, inputs)
        targets = torch.linspace(-1, 1, 32)
        changes = exit_logits.squeeze(-1).diff(dim=1).abs().flatten().sort().values
        for share in (0.3, 0.6):
            # Midway between two changes, so that rounding cannot decide.
            tolerance = changes[int(share * len(changes)) :][:2].mean().item()
            scores = [scores_by_hand("patience", row, tolerance=tolerance) for row in exit_logits.double().tolist()]
            thresholds = [1, 1, 1, 0]
            exits, _ = expected_exits(scores, thresholds)
            policy = policy_of("patience", thresholds, params={"tolerance": tolerance})
            output = run_dynamic(model, policy, inputs, labels=targets)
            assert output.logits.shape == (32, 1)
            assert output.exit_index.tolist() == exits
            expected = exit_logits[torch.arange(32), output.exit_index]
            torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
            loss = sum(
                (value - wanted) ** 2 for (value,), wanted in zip(expected.tolist(), targets.tolist(), strict=True)
            )
            assert output.loss.item() == pytest.approx(loss / 32, abs=1e-5)
            taken.update(exits)
    assert taken == {1, 2, 3}


@pytest.mark.parametrize("exit_pooling", ["cls", "mean"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_without_any_token_keeps_a_column(bert, load_exits, attention, exit_pooling):
    """A row that is all padding (filler at the end of a batch) uses no column: trimmed to none, it would crash."""
    model = load_exits(bert, exit_layers=EXIT_LAYERS, exit_pooling=exit_pooling, attn_implementation=attention)
    inputs = bert.inputs(64, padding="right")
    inputs["attention_mask"][2] = 0
    exit_logits = anytime_logits(model, inputs)
    scores = [scores_by_hand("confidence", row)[0] for row in exit_logits.double().tolist()]
    rows = [row for row in range(64) if row == 2 or scores[row] > scores[2] + 1e-3]
    assert len(rows) > 1
    # The empty row alone stays behind.
    output = run_dynamic(model, policy_of("confidence", [scores[2] + 5e-4, 1.5, 0.0]), rows_at(inputs, rows))
    assert output.exit_index.tolist() == [2 if row == 2 else 0 for row in rows]
    expected = exit_logits[torch.tensor(rows), output.exit_index]
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)


def test_a_batch_without_examples_is_refused(architecture, load_exits):
    """What breaks: the reshaping inside a layer of transformers ends in a message about tensors of 0 elements."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    model.set_exit_policy(policy_of("confidence", [0.5, 0.5, 0.0]))
    none = {name: tensor[:0] for name, tensor in architecture.inputs().items()}
    for answer in (model, partial(model, early_exit=False), ExitRunner(model)):
        with pytest.raises(ExitConfigurationError, match="The batch has no examples"):
            answer(**none)


@pytest.mark.parametrize("pooling", ["mean", "cls_mean"])
def test_a_mask_that_is_not_2d_is_refused_where_it_cannot_be_read(bert, load_exits, pooling):
    """A 4-D mask gave logits of shape (batch, exits, length, length, labels) without a word."""
    model, inputs = load_exits(bert, exit_pooling=pooling), bert.inputs()
    inputs["attention_mask"] = torch.ones(6, 1, 12, 12, dtype=torch.bool)
    with pytest.raises(ExitConfigurationError, match="4-D.*2-D"):
        model(**inputs, early_exit=False)
    reads_cls = load_exits(bert, exit_pooling="cls")
    assert reads_cls(**inputs, early_exit=False).exit_logits.shape == (6, 4, 3)
    with pytest.raises(ExitConfigurationError, match="4-D.*2-D"):
        run_dynamic(reads_cls, ExitPolicy("confidence", [0.5] * 4), inputs)


@pytest.mark.parametrize("shape", [(6, 13), (6, 11), (1, 12), (12, 6)])
@pytest.mark.parametrize("early_exit", [False, True])
def test_the_mask_of_another_batch_is_refused(bert, load_exits, shape, early_exit):
    """A mask of ones was dropped without a look at its shape; others ended in an error about tensors."""
    model, inputs = load_exits(bert), bert.inputs()
    model.set_exit_policy({"criterion": "confidence", "thresholds": [0.5] * 4})
    inputs["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    found = rf"shape \({shape[0]}, {shape[1]}\), but the inputs have \(6, 12\)"
    for answer in (partial(model, early_exit=early_exit), ExitRunner(model)):
        with pytest.raises(ExitConfigurationError, match=found):
            answer(**inputs)
