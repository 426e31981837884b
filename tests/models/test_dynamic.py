"""Dynamic inference against the pass that evaluates every exit: same answers, only the layers that are needed."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from operations import Operations

from een_hf.models import ExitConfigurationError, ExitPolicy, staged_forward
from een_hf.models.policies import NEVER


NUM_EXITS = 3
EXIT_LAYERS = [1, 3]  # of 4 layers, so a block of one layer, one of two, and the last exit
CRITERIA = ["confidence", "entropy", "margin", "patience", "vote"]
TEMPERATURES = [0.8, 1.7, 1.2, 0.6]


# The criteria once more, on plain numbers


def _softmax(logits, temperature):
    exponentials = [math.exp((value - max(logits)) / temperature) for value in logits]
    return [value / sum(exponentials) for value in exponentials]


def _prediction(logits):
    return max(range(len(logits)), key=logits.__getitem__)


def _scores(criterion, exits, temperatures=None, tolerance=None):
    """How sure each exit is of one row: `exits` is a list of the exits' logits, as lists."""
    scores, predictions = [], []
    for index, logits in enumerate(exits):
        chances = sorted(_softmax(logits, temperatures[index] if temperatures else 1.0), reverse=True)
        predictions.append(_prediction(logits) if tolerance is None else logits[0])
        if criterion == "confidence":
            scores.append(chances[0])
        elif criterion == "entropy":
            scores.append(sum(chance * math.log(chance) for chance in chances if chance) / math.log(len(chances)))
        elif criterion == "margin":
            scores.append(chances[0] - chances[1])
        elif criterion == "vote":
            scores.append(max(predictions.count(label) for label in predictions))
        else:
            agreements = 0
            while agreements < index:
                now, before = predictions[index - agreements], predictions[index - agreements - 1]
                if (now != before) if tolerance is None else not abs(now - before) < tolerance:
                    break
                agreements += 1
            scores.append(agreements)
    return scores


def _expected_exits(scores, thresholds):
    """Per row, the first exit that is sure enough, and whether 1e-5 could change that."""
    exits, clear = [], []
    for row in scores:
        sure = [score >= threshold for score, threshold in zip(row[:-1], thresholds[:-1], strict=True)]
        exits.append(sure.index(True) if True in sure else len(row) - 1)
        near = [abs(score - limit) <= 1e-5 for score, limit in zip(row[:-1], thresholds[:-1], strict=True)]
        clear.append(isinstance(row[0], int) or not any(near[: exits[-1] + 1]))
    return exits, clear


def _policy(criterion, thresholds, **more):
    return {"criterion": criterion, "thresholds": list(thresholds), **more}


COUNTS = {
    "patience": [[0, 1, 1], [1, 1, 1], [1, 2, 2], [2, 1, 1], [1, 0.5, 2], [2, 2, 1], [1, 2, 3]],
    "vote": [[1, 2, 2], [2, 2, 2], [2, 3, 2], [3, 2, 3], [2, 1.5, 3], [2, 3, 4]],
}


def _exit_layers(criterion):
    """Counts need the most exits to differ; for the others, blocks of one, two and one layers."""
    return [1, 2, 3] if criterion in COUNTS else EXIT_LAYERS


def _grid(criterion, scores):
    """Lists of thresholds: at several quantiles of the scores, or several counts."""
    if criterion in COUNTS:
        return [[*counts, 0.0] for counts in COUNTS[criterion]]
    columns = [sorted(column) for column in zip(*scores, strict=True)]

    def threshold(index, share):
        column = columns[index]
        return column[min(len(column) - 1, int(share * len(column)))] - 1e-4

    shares = [(0.2, 0.2), (0.5, 0.5), (0.8, 0.8), (0.9, 0.2), (0.0, 0.5)]
    return [[threshold(0, first), threshold(1, second), 0.0] for first, second in shares]


def _run(model, policy, inputs, **kwargs):
    model.set_exit_policy(policy)
    with torch.no_grad():
        return model(**inputs, **kwargs)


def _all_exits(model, inputs):
    with torch.no_grad():
        return model(**inputs, early_exit=False).exit_logits


def _rows(inputs, index):
    return {name: tensor[index] for name, tensor in inputs.items()}


@pytest.mark.parametrize("aggregation", ["none", "boosted"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("batch_size", [1, 32])
def test_answers_are_the_all_exits_answers(architecture, load_exits, criterion, aggregation, batch_size):
    """The promise of early exit: a row's answer depends on its own exit and on nothing else in the batch."""
    pooling = architecture.poolings[-1]
    layers = _exit_layers(criterion)
    model = load_exits(architecture, exit_layers=layers, exit_pooling=pooling, exit_aggregation=aggregation)
    num_exits, taken, most_mixed = len(layers) + 1, set(), 0
    for padding in architecture.paddings:
        inputs = architecture.inputs(32, padding=padding, seed=5)
        exit_logits = _all_exits(model, inputs)
        for temperatures in (None, TEMPERATURES):
            scores = [_scores(criterion, row, temperatures) for row in exit_logits.double().tolist()]
            for thresholds in _grid(criterion, scores):
                exits, clear = _expected_exits(scores, thresholds)
                most_mixed = max(most_mixed, len(set(exits)))
                policy = _policy(criterion, thresholds, temperatures=temperatures and TEMPERATURES[:num_exits])
                # At batch 1 a few rows are enough: short, long and of one token.
                for start in range(0, 32 if batch_size == 32 else 12, batch_size):
                    here = slice(start, start + batch_size)
                    output = _run(model, policy, _rows(inputs, here))
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
    """Rows leave the same way without a mask as with one that hides nothing."""
    model = load_exits(bert, exit_layers=EXIT_LAYERS, exit_pooling=exit_pooling)
    inputs = bert.inputs(32)
    scores = [_scores("confidence", row) for row in _all_exits(model, inputs).double().tolist()]
    for thresholds in _grid("confidence", scores):
        policy = _policy("confidence", thresholds)
        none = _run(model, policy, inputs, attention_mask=None)
        ones = _run(model, policy, inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
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
    exit_logits = _all_exits(model, inputs)
    scores = [_scores("confidence", row) for row in exit_logits.double().tolist()]
    for dtype in (torch.int64, torch.bool, torch.float32):
        for thresholds in _grid("confidence", scores):
            output = _run(model, _policy("confidence", thresholds), {**inputs, "attention_mask": mask.to(dtype)})
            expected = exit_logits[torch.arange(32), output.exit_index]
            torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 32])
def test_everybody_leaves_at_the_first_exit(architecture, load_exits, batch_size):
    """The loop must stop, not go on with an empty batch."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    seen = _watch_layers(architecture, model)
    for padding in architecture.paddings:
        inputs = architecture.inputs(batch_size, padding=padding)
        expected = _all_exits(model, inputs)[:, 0]
        seen.clear()
        output = _run(model, _policy("confidence", [0.0, 0.0, 0.0]), inputs)
        assert output.exit_index.tolist() == [0] * batch_size
        torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)
        assert [layer for layer, _, _ in seen] == [0]


@pytest.mark.parametrize("batch_size", [1, 32])
def test_nobody_leaves(architecture, load_exits, batch_size):
    """Exit K takes whoever is left, whatever its own threshold says."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    seen = _watch_layers(architecture, model)
    for last_threshold in (0.0, 5.0):
        inputs = architecture.inputs(batch_size, padding=architecture.paddings[0])
        expected = _all_exits(model, inputs)[:, -1]
        seen.clear()
        output = _run(model, _policy("confidence", [1.5, 1.5, last_threshold]), inputs)
        assert output.exit_index.tolist() == [NUM_EXITS - 1] * batch_size
        torch.testing.assert_close(output.logits, expected, rtol=0, atol=0)
        assert [layer for layer, _, _ in seen] == [0, 1, 2, 3]


def _watch_layers(architecture, model):
    """A list that fills with (layer, rows, columns) as layers are called."""
    seen = []
    for index, layer in enumerate(architecture.layers(model)):
        layer.register_forward_hook(lambda module, args, output, index=index: seen.append((index, *args[0].shape[:2])))
    return seen


@pytest.mark.parametrize("aggregation", ["none", "boosted"])
def test_only_the_needed_rows_and_columns_run(architecture, load_exits, aggregation):
    """Early exit that computes for rows that have left, or for padding that nobody has, saves nothing."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS, exit_aggregation=aggregation)
    seen = _watch_layers(architecture, model)
    last_layers, first_layers = [*EXIT_LAYERS, 4], [0, *EXIT_LAYERS]
    for padding in architecture.paddings:
        inputs = architecture.inputs(32, padding=padding, seed=7)
        full = 12 if architecture.name == "bert" else 17
        used = inputs["attention_mask"].sum(1).tolist() if padding == "right" else [full] * 32
        scores = [_scores("confidence", row) for row in _all_exits(model, inputs).double().tolist()]
        for thresholds in _grid("confidence", scores):
            seen.clear()
            exits = _run(model, _policy("confidence", thresholds), inputs).exit_index.tolist()
            expected = []
            for block in range(NUM_EXITS):
                survivors = [row for row in range(32) if exits[row] >= block]
                if not survivors:
                    break
                # Nothing is copied, and so nothing trimmed, as long as nobody has left.
                width = full if len(survivors) == 32 else max(used[row] for row in survivors)
                expected += [
                    (layer, len(survivors), width) for layer in range(first_layers[block], last_layers[block])
                ]
            assert seen == expected


def test_a_decision_costs_few_operations(architecture, load_exits):
    """On a GPU each of them takes longer to launch than to run: beyond those of anytime, so many for each decision."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    for padding in architecture.paddings:
        inputs = architecture.inputs(32, padding=padding, seed=7)
        scores = [_scores("confidence", row) for row in _all_exits(model, inputs).double().tolist()]
        policies = [_policy("confidence", thresholds) for thresholds in _grid("confidence", scores)]
        taken = (_run(model, policy, inputs).exit_index for policy in policies)
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
    """The long rows leave: what goes on must be as wide as the longest that stays, and as right."""
    model = load_exits(bert, exit_layers=EXIT_LAYERS, exit_pooling=exit_pooling)
    seen = _watch_layers(bert, model)
    inputs = bert.inputs(padding="right", lengths=[12, 4, 12, 6, 11, 5, 12, 1] * 8, seed=3)
    lengths = inputs["attention_mask"].sum(1).tolist()
    exit_logits = _all_exits(model, inputs)
    scores = [_scores("confidence", row)[0] for row in exit_logits.double().tolist()]
    threshold = sorted(scores)[32] - 1e-4
    # Of the long rows those that leave, of the short ones those that stay, and the surest short ones to leave as well.
    rows = [row for row in range(64) if (lengths[row] > 6) == (scores[row] > threshold) or scores[row] > 0.95]
    stay = [scores[row] < threshold for row in rows]
    num_staying = sum(stay)
    assert 0 < num_staying < len(rows)
    seen.clear()
    output = _run(model, _policy("confidence", [threshold, 1.5, 0.0]), _rows(inputs, rows))
    assert output.exit_index.tolist() == [2 if staying else 0 for staying in stay]
    width = max(lengths[row] for row, staying in zip(rows, stay, strict=True) if staying)
    assert width == 6
    assert seen == [(0, len(rows), 12), *((layer, num_staying, width) for layer in (1, 2, 3))]
    expected = exit_logits[torch.tensor(rows), output.exit_index]
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)


def _with_nan(architecture, inputs, rows, model):
    """The same inputs, embedded where they are tokens, with NaN in these rows."""
    if architecture.name == "vit":
        pixels = inputs["pixel_values"].clone()
        pixels[rows, 0, 0, 0] = math.nan
        return {"pixel_values": pixels}
    inputs = dict(inputs)
    with torch.no_grad():
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    inputs["inputs_embeds"][rows, 0] = math.nan
    return inputs


@pytest.mark.parametrize("criterion", CRITERIA)
def test_nan_rows_never_leave(architecture, load_exits, criterion):
    """A broken row that leaves early looks like a sure one; and it must not keep or spoil the others."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    lowest = -1.5 if criterion == "entropy" else 0.0
    for padding in architecture.paddings:
        inputs = architecture.inputs(8, padding=padding, seed=1)
        clean = _all_exits(model, inputs)
        for rows in ([2, 5], list(range(8))):
            broken = _with_nan(architecture, inputs, rows, model)
            output = _run(model, _policy(criterion, [lowest, lowest, 0.0]), broken)
            for row in range(8):
                if row in rows:
                    assert output.exit_index[row] == NUM_EXITS - 1
                    assert output.logits[row].isnan().all()
                else:
                    assert output.exit_index[row] == 0
                    torch.testing.assert_close(output.logits[row], clean[row, 0], rtol=0, atol=1e-5)


def test_nan_at_one_exit_only(architecture, load_exits):
    """A broken exit must hold nobody for longer than itself."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    inputs = architecture.inputs()
    expected = _all_exits(model, inputs)[:, 1]
    with torch.no_grad():
        model.exit_heads["1"].classifier.bias.fill_(math.nan)
    output = _run(model, _policy("confidence", [0.0, 0.0, 0.0]), inputs)
    assert output.exit_index.tolist() == [1] * 6
    torch.testing.assert_close(output.logits, expected, rtol=0, atol=1e-5)


# What turns early exit off


def test_modes(architecture, load_exits):
    """Training on the rows that stay, or evaluating exits that some rows skipped, would both go unnoticed."""
    model, inputs = load_exits(architecture, exit_layers=EXIT_LAYERS), architecture.inputs()
    with torch.no_grad():
        plain = model(**inputs)
    assert plain.exit_index is None
    model.set_exit_policy(_policy("confidence", [0.0, 0.0, 0.0]))
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


@pytest.mark.parametrize("training", [False, True])
def test_a_policy_for_one_call(architecture, load_exits, training):
    """What breaks: one service with several budgets; in training, a row's gradient at the exit where it leaves."""
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, inputs = load_exits(architecture, exit_layers=EXIT_LAYERS, **no_dropout), architecture.inputs(32)
    model.set_exit_policy(_policy("confidence", [0.0, 0.0, 0.0]))
    exit_logits = _all_exits(model, inputs)
    scores = [_scores("confidence", row) for row in exit_logits.double().tolist()]
    thresholds = _grid("confidence", scores)[1]
    exits, clear = _expected_exits(scores, thresholds)
    assert all(clear) and len(set(exits)) == NUM_EXITS
    policy = ExitPolicy.from_dict(_policy("confidence", thresholds))
    labels = torch.arange(32) % 3
    model.train(training)
    assert model(**inputs, early_exit=policy.to_dict()).exit_index.tolist() == exits
    output = model(**inputs, early_exit=policy, labels=labels)
    assert output.exit_index.tolist() == exits
    assert model.config.exit_policy["thresholds"] == [0.0, 0.0, 0.0]
    with pytest.raises(ExitConfigurationError, match="2 thresholds.*3 exits"):
        model(**inputs, early_exit=ExitPolicy("confidence", [0.5, 0.5]))

    own = model.train()(**inputs).exit_logits[torch.arange(32), exits]
    torch.testing.assert_close(output.logits, own, rtol=0, atol=1e-5)
    wanted = F.cross_entropy(own, labels)
    torch.testing.assert_close(output.loss, wanted)
    parameters = list(model.parameters())
    found, plain = (torch.autograd.grad(of, parameters, materialize_grads=True) for of in (output.loss, wanted))
    norm = torch.cat([part.flatten() for part in plain]).norm()
    for ours, expected in zip(found, plain, strict=True):
        assert (ours - expected).norm() <= 1e-4 * norm


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("asked", ["output_hidden_states", "output_attentions"])
def test_asking_for_hidden_states_runs_every_layer(architecture, load_exits, monkeypatch, criterion, asked):
    """Rows that have left have no later hidden states: all layers must run, with the answers unchanged, and say so."""
    warnings = []
    monkeypatch.setattr(staged_forward.logger, "warning_once", warnings.append)
    model = load_exits(architecture, exit_layers=_exit_layers(criterion), attn_implementation="eager")
    inputs = architecture.inputs(32, padding=architecture.paddings[0])
    labels = torch.arange(32) % 3
    temperatures = TEMPERATURES[: model.num_exits]
    scores = [_scores(criterion, row, TEMPERATURES) for row in _all_exits(model, inputs).double().tolist()]
    for thresholds in _grid(criterion, scores):
        policy = _policy(criterion, thresholds, temperatures=temperatures)
        expected = _run(model, policy, inputs, labels=labels)
        assert not warnings
        output = _run(model, policy, inputs, labels=labels, **{asked: True})
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


# Loss, gradients, dtypes


def test_loss_is_the_mean_over_rows_at_their_own_exits(architecture, load_exits):
    """Summed over exits, the loss of a dynamic evaluation could not be compared with anything."""
    model, inputs = load_exits(architecture, exit_layers=EXIT_LAYERS), architecture.inputs(32)
    labels = torch.arange(32) % 3
    scores = [_scores("confidence", row) for row in _all_exits(model, inputs).double().tolist()]
    for thresholds in _grid("confidence", scores):
        output = _run(model, _policy("confidence", thresholds), inputs, labels=labels)
        rows = zip(output.logits.double().tolist(), labels.tolist(), strict=True)
        expected = sum(-math.log(_softmax(logits, 1.0)[label]) for logits, label in rows) / 32
        assert output.loss.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("aggregation", ["none", "boosted"])
def test_gradients_in_eval_mode(architecture, load_exits, aggregation):
    """Attributions differentiate a served model: the rows' bookkeeping must not break or change the graph."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS, exit_aggregation=aggregation)
    inputs = architecture.inputs(32, padding=architecture.paddings[0])
    labels = torch.arange(32) % 3
    scores = [_scores("confidence", row) for row in _all_exits(model, inputs).double().tolist()]
    model.set_exit_policy(_policy("confidence", _grid("confidence", scores)[1]))
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
    model = load_exits(architecture, exit_layers=_exit_layers(criterion), exit_aggregation="boosted")
    inputs = architecture.inputs(32, padding=architecture.paddings[0])
    scores = [_scores(criterion, row) for row in _all_exits(model, inputs).double().tolist()]
    policy = _policy(criterion, _grid(criterion, scores)[1])
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = _run(model, policy, inputs), _all_exits(model, inputs)
    for output, exit_logits in (mixed, (_run(half, policy, inputs), _all_exits(half, inputs))):
        expected = exit_logits[torch.arange(32), output.exit_index]
        assert output.exit_index.dtype == torch.int64
        error = (output.logits.float() - expected.float()).abs().max()
        assert error / exit_logits.float().abs().max() < 0.05


def test_inference_mode(architecture, load_exits):
    """Engines run under inference_mode, where some in-place writes are refused."""
    model, inputs = load_exits(architecture, exit_layers=EXIT_LAYERS), architecture.inputs(32)
    scores = [_scores("confidence", row) for row in _all_exits(model, inputs).double().tolist()]
    policy = _policy("confidence", _grid("confidence", scores)[1])
    expected = _run(model, policy, inputs)
    with torch.inference_mode():
        output = model(**inputs)
    assert set(output.exit_index.tolist()) == {0, 1, 2}
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=1e-6)
    assert output.exit_index.tolist() == expected.exit_index.tolist()


def test_calls_do_not_remember(architecture, load_exits):
    """Votes or streaks carried over from the last batch would make answers depend on the order of batches."""
    model, inputs = load_exits(architecture), architecture.inputs(32)
    for criterion in CRITERIA:
        policy = _policy(criterion, [0.6, 0.6, 0.6, 0.0] if criterion not in ("patience", "vote") else [1, 2, 2, 0])
        first = _run(model, policy, inputs)
        _run(model, policy, architecture.inputs(7, seed=9))
        again = _run(model, policy, inputs)
        torch.testing.assert_close(again.logits, first.logits, rtol=0, atol=0)
        assert again.exit_index.tolist() == first.exit_index.tolist()


def test_regression_leaves_by_patience(architecture, stock_folders):
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
        exit_logits = _all_exits(model, inputs)
        targets = torch.linspace(-1, 1, 32)
        changes = exit_logits.squeeze(-1).diff(dim=1).abs().flatten().sort().values
        for share in (0.3, 0.6):
            # Midway between two changes, so that rounding cannot decide.
            tolerance = changes[int(share * len(changes)) :][:2].mean().item()
            scores = [_scores("patience", row, tolerance=tolerance) for row in exit_logits.double().tolist()]
            thresholds = [1, 1, 1, 0]
            exits, _ = _expected_exits(scores, thresholds)
            policy = _policy("patience", thresholds, params={"tolerance": tolerance})
            output = _run(model, policy, inputs, labels=targets)
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


# Setting a policy


def test_policy_survives_saving(architecture, load_exits, tmp_path):
    """A calibrated model must leave early after reload, without any further call."""
    model, inputs = load_exits(architecture, exit_layers=EXIT_LAYERS), architecture.inputs(32)
    scores = [_scores("margin", row, TEMPERATURES[:NUM_EXITS]) for row in _all_exits(model, inputs).double().tolist()]
    policy = _policy("margin", _grid("margin", scores)[1], temperatures=TEMPERATURES[:NUM_EXITS])
    expected = _run(model, policy, inputs)
    model.save_pretrained(tmp_path)
    reloaded = architecture.auto_class.from_pretrained(tmp_path)
    assert reloaded.config.exit_policy == model.config.exit_policy
    with torch.no_grad():
        output = reloaded(**inputs)
    assert output.exit_index.tolist() == expected.exit_index.tolist()
    torch.testing.assert_close(output.logits, expected.logits, rtol=0, atol=0)


def test_policy_object_or_dictionary(architecture, load_exits):
    """Both forms of the contract set the same plain dictionary."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    given = _policy("confidence", [0.9, 0.8, 0.0])
    model.set_exit_policy(given)
    stored = copy.deepcopy(model.config.exit_policy)
    assert type(stored) is dict
    assert given == _policy("confidence", [0.9, 0.8, 0.0])
    model.set_exit_policy(None)
    assert model.config.exit_policy is None
    model.set_exit_policy(ExitPolicy.from_dict(given))
    assert model.config.exit_policy == stored


def test_a_policy_changed_in_place_is_obeyed_at_once(architecture, load_exits):
    """The parsed policy is kept between calls: thresholds edited in the config must not be passed over."""
    model, inputs = load_exits(architecture, exit_layers=EXIT_LAYERS).eval(), architecture.inputs(3)
    model.set_exit_policy(_policy("confidence", [2.0, 2.0, 0.0]))
    assert model(**inputs).exit_index.tolist() == [2, 2, 2]
    model.config.exit_policy["thresholds"][1] = 0.0
    assert model(**inputs).exit_index.tolist() == [1, 1, 1]
    model.config.exit_policy["thresholds"].pop()
    with pytest.raises(ExitConfigurationError, match="3"):
        model(**inputs)
    model.config.exit_policy = None
    assert model(**inputs).exit_index is None


@pytest.mark.parametrize(
    ("policy", "word"),
    [
        (_policy("confidence", [0.9, 0.8]), "3"),
        (_policy("confidence", [0.9, 0.8, 0.7, 0.6]), "3"),
        (_policy("certainty", [0.9, 0.8, 0.7]), "confidence"),
        (_policy("confidence", [0.9, 0.8, 0.7], temperatures=[1.0]), "temperatures"),
    ],
)
def test_policy_that_does_not_fit_is_refused(architecture, load_exits, policy, word):
    """Too few thresholds would silently keep late exits from being used; and a refused policy must not stay."""
    model = load_exits(architecture, exit_layers=EXIT_LAYERS)
    model.set_exit_policy(_policy("confidence", [0.5, 0.5, 0.0]))
    before = copy.deepcopy(model.config.exit_policy)
    with pytest.raises(ExitConfigurationError, match=word):
        model.set_exit_policy(policy)
    assert model.config.exit_policy == before
    # Written into the config by hand, it must not pass either.
    model.config.exit_policy = policy
    with pytest.raises(ExitConfigurationError, match=word):
        model(**architecture.inputs())


@pytest.mark.parametrize("given", [0.5, "confidence", [0.5, 0.5, 0.0], True])
def test_what_is_no_policy_is_answered_with_a_sentence(bert, load_exits, given):
    """A cost in place of a policy is an easy mistake; an AttributeError says nothing of it."""
    model = load_exits(bert, exit_layers=EXIT_LAYERS)
    with pytest.raises(ExitConfigurationError, match="set_exit_policy takes an ExitPolicy.*not .*from_results"):
        model.set_exit_policy(given)


@pytest.mark.parametrize("given", ["no", 0.5, 1, [True]])
def test_early_exit_is_no_word(bert, load_exits, given):
    """`early_exit="no"` used to mean yes."""
    model = load_exits(bert, exit_layers=EXIT_LAYERS).eval()
    with pytest.raises(ExitConfigurationError, match="early_exit is True, False"):
        model(**bert.inputs(), early_exit=given)


# Corners


@pytest.mark.parametrize("exit_pooling", ["cls", "mean"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_row_without_any_token(bert, load_exits, attention, exit_pooling):
    """A row that is all padding (filler at the end of a batch) uses no column: trimmed to none, it would crash."""
    model = load_exits(bert, exit_layers=EXIT_LAYERS, exit_pooling=exit_pooling, attn_implementation=attention)
    inputs = bert.inputs(64, padding="right")
    inputs["attention_mask"][2] = 0
    exit_logits = _all_exits(model, inputs)
    scores = [_scores("confidence", row)[0] for row in exit_logits.double().tolist()]
    rows = [row for row in range(64) if row == 2 or scores[row] > scores[2] + 1e-3]
    assert len(rows) > 1
    # The empty row alone stays behind.
    output = _run(model, _policy("confidence", [scores[2] + 5e-4, 1.5, 0.0]), _rows(inputs, rows))
    assert output.exit_index.tolist() == [2 if row == 2 else 0 for row in rows]
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
            output = _run(model, ExitPolicy("confidence", thresholds), inputs)
            assert evaluated == wanted
            rows = torch.arange(len(output.exit_index))
            assert (output.logits - every[rows, output.exit_index]).abs().max() <= 1e-5
        evaluated.clear()
        # Votes of exits where nobody exits count.
        _run(model, ExitPolicy("vote", [NEVER, NEVER, 3, 0.0]), inputs)
        assert evaluated[:3] == [0, 1, 2]


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
        _run(reads_cls, ExitPolicy("confidence", [0.5] * 4), inputs)


@pytest.mark.parametrize("shape", [(6, 13), (6, 11), (1, 12), (12, 6)])
@pytest.mark.parametrize("early_exit", [False, True])
def test_the_mask_of_another_batch_is_refused(bert, load_exits, shape, early_exit):
    """A mask of ones was dropped without a look at its shape; others ended in an error about tensors."""
    model, inputs = load_exits(bert), bert.inputs()
    model.set_exit_policy({"criterion": "confidence", "thresholds": [0.5] * 4})
    inputs["attention_mask"] = torch.ones(shape, dtype=torch.int64)
    found = rf"shape \({shape[0]}, {shape[1]}\), but the inputs have \(6, 12\)"
    with pytest.raises(ExitConfigurationError, match=found):
        model(**inputs, early_exit=early_exit)
