"""The engine answers as the model does row by row, in input order, with full batches and few rows waiting."""

import math

import datasets
import pytest
import torch

from een_hf import ExitPolicy, predict
from een_hf.inference import ExitEngine, pad_rows
from een_hf.models import (
    EarlyExitBertConfig,
    EarlyExitBertForSequenceClassification,
    EarlyExitViTConfig,
    EarlyExitViTForImageClassification,
)


CRITERIA = ["confidence", "entropy", "margin", "patience", "vote"]
SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24}


def make_model(kind, **settings):
    torch.manual_seed(0)
    settings = {"num_labels": 3, **settings}
    if kind == "vit":
        model = EarlyExitViTForImageClassification(EarlyExitViTConfig(**SHAPE, image_size=8, patch_size=4, **settings))
    else:
        config = EarlyExitBertConfig(**SHAPE, vocab_size=99, max_position_embeddings=20, **settings)
        model = EarlyExitBertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return model.eval()


def make_rows(kind, count=50):
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return [{"pixel_values": 3 * torch.randn(3, 8, 8, generator=generator)} for _ in range(count)]
    lengths = torch.randint(1, 18, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(1, 99, (length,), generator=generator).tolist()} for length in lengths]


def one_by_one(model, rows, **kwargs):
    with torch.no_grad():
        return [model(**pad_rows([row], model.config), **kwargs) for row in rows]


def all_exits(model, rows):
    """(num_rows, num_exits, num_labels), every row alone."""
    return torch.cat([output.exit_logits for output in one_by_one(model, rows, early_exit=False)])


def scores_of(model, exit_logits, criterion):
    """(num_rows, num_exits) float64, by the criteria's definitions, row by row."""
    scores = torch.zeros(exit_logits.shape[:2], dtype=torch.float64)
    for row, logits in enumerate(exit_logits.double()):
        guesses, agreeing = logits.argmax(-1).tolist(), 0
        for k, exit_ in enumerate(logits):
            shares = exit_.softmax(-1).sort(descending=True).values
            agreeing = agreeing + 1 if k and guesses[k] == guesses[k - 1] else (0 if criterion == "patience" else 1)
            scores[row, k] = {
                "confidence": shares[0],
                "entropy": (shares * shares.log()).sum() / math.log(len(shares)),
                "margin": shares[0] - shares[1],
                "patience": agreeing,
                "vote": max(guesses[: k + 1].count(guess) for guess in guesses[: k + 1]),
            }[criterion]
    return scores


COUNTS = {
    "patience": [[0, 1, 1, 0], [1, 1, 1, 0], [2, 2, 1, 0], [1, 2, 2, 0]],
    "vote": [[1, 2, 2, 0], [2, 2, 2, 0], [2, 3, 2, 0], [2, 3, 3, 0]],
}


def grid(criterion, scores):
    """Lists of thresholds."""
    shares = (0.3, 0.6, 0.9)
    return COUNTS.get(criterion) or [[*scores[:, :-1].quantile(q, dim=0).tolist(), 0.0] for q in shares]


@pytest.mark.parametrize("aggregation", ["none", "boosted"])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_every_row_is_answered_as_alone(kind, criterion, aggregation):
    """What breaks: padding of a neighbour, a wrong row id or a forgotten state changes an answer."""
    model, rows = make_model(kind, exit_aggregation=aggregation), make_rows(kind)
    logits = all_exits(model, rows)
    scores = scores_of(model, logits, criterion)
    taken = set()
    for thresholds in grid(criterion, scores):
        model.set_exit_policy({"criterion": criterion, "thresholds": thresholds})
        alone = [int(output.exit_index) for output in one_by_one(model, rows)]
        for batch_size in (1, 7, 32):
            found = predict(model, rows, batch_size)
            wanted = logits[torch.arange(len(rows)), found.exit_index]
            torch.testing.assert_close(found.logits, wanted, rtol=0, atol=1e-5)
            for row, index in enumerate(found.exit_index.tolist()):
                gaps = (scores[row, :3] - torch.tensor(thresholds[:3])).abs()
                exact = criterion in ("patience", "vote")
                if exact or gaps.min() > 1e-5:
                    assert index == alone[row]
                taken.add(index)
    assert len(taken) >= 3, "rows leave at too few exits to test anything"


def test_masked_and_unmasked_batches_of_different_length_wait_together():
    """Without a mask there is no padding: survivors that are padded beside longer ones must not attend to it."""
    model = make_model("bert", exit_layers=[1, 2, 3], exit_pooling="mean")
    rows = make_rows("bert", 12)

    def equal_lengths(batch):
        inputs = pad_rows(batch, model.config)
        return inputs if inputs["attention_mask"].eq(0).any() else {"input_ids": inputs["input_ids"]}

    scores = scores_of(model, all_exits(model, rows), "confidence")
    model.set_exit_policy({"criterion": "confidence", "thresholds": scores.quantile(0.5, 0).tolist()})
    wanted = one_by_one(model, rows)
    for collator in (equal_lengths, lambda batch: pad_rows(batch, model.config)):
        for sized in ([*rows], sorted(rows, key=lambda row: len(row["input_ids"]))):
            found = predict(model, sized, 2, collator=collator)
            for row, logits, exit_index in zip(sized, found.logits, found.exit_index, strict=True):
                alone = wanted[rows.index(row)]
                torch.testing.assert_close(logits, alone.logits[0], rtol=0, atol=1e-5)
                assert exit_index == alone.exit_index[0]


def test_no_policy_is_the_last_exit():
    model, rows = make_model("bert"), make_rows("bert")
    found = predict(model, rows, 8)
    assert found.exit_index.tolist() == [3] * len(rows)
    torch.testing.assert_close(found.logits, all_exits(model, rows)[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", ["generator", "small window", "dataset", "labelled", "padded"])
def test_sources_give_the_same_answers(source):
    """What breaks: a stream answered in another order, or a column that is no input given to the model."""
    model, rows = make_model("bert"), make_rows("bert")
    model.set_exit_policy({"criterion": "confidence", "thresholds": [0.7, 0.7, 0.7, 0.0]})
    wanted = predict(model, rows, 8)
    if source == "padded":
        width = max(len(row["input_ids"]) for row in rows)
        given = [
            {
                "input_ids": row["input_ids"] + [0] * (width - len(row["input_ids"])),
                "attention_mask": [1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])),
            }
            for row in rows
        ]
    elif source == "labelled":
        given = [{**row, "labels": 1} for row in rows]
    else:
        given = datasets.Dataset.from_list(rows) if source == "dataset" else iter(rows)
    found = predict(model, given, 8, window=11 if source == "small window" else None, progress=False)
    assert found.exit_index.tolist() == wanted.exit_index.tolist()
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-5)


def test_nothing_in_nothing_out():
    found = predict(make_model("bert"), [])
    assert found.logits.shape == (0, 3) and found.exit_index.shape == (0,)


def test_deep_stages_see_full_batches_and_few_rows_wait(monkeypatch):
    """With every second row leaving at each exit, a loop batch by batch would halve its batches at every exit."""
    model, rows = make_model("vit"), make_rows("vit", 256)
    logits = all_exits(model, rows)
    confidence = logits.softmax(-1).amax(-1)
    here, thresholds = torch.ones(256, dtype=torch.bool), []
    for k in range(3):
        thresholds.append(confidence[here, k].median().item() + 1e-6)
        here &= confidence[:, k] < thresholds[-1]
    model.set_exit_policy({"criterion": "confidence", "thresholds": [*thresholds, 0.0]})
    sizes, most = [[] for _ in range(4)], 0
    for k, layer in enumerate(model.backbone_layers):
        layer.register_forward_hook(lambda module, inputs, output, k=k: sizes[k].append(len(output)))
    step = ExitEngine._step

    def watched(engine, stage):
        nonlocal most
        waiting = [engine.num_waiting(k) for k in range(4)]
        full = [k for k in range(4) if waiting[k] >= engine.batch_size]
        if full:
            assert stage == max(full), "a deeper full stage had to run first"
        most = max(most, sum(waiting))
        return step(engine, stage)

    monkeypatch.setattr(ExitEngine, "_step", watched)
    found = predict(model, rows, 16)
    reached = [int((found.exit_index >= k).sum()) for k in range(4)]
    assert [sum(size) for size in sizes] == reached
    assert [len(size) for size in sizes] == [math.ceil(count / 16) for count in reached]
    assert reached[3] < 64, "too few rows leave"
    assert most <= 4 * 16


def test_a_row_with_nan_never_leaves_early():
    model, rows = make_model("vit"), make_rows("vit", 6)
    rows[2]["pixel_values"][0, 0, 0] = float("nan")
    model.set_exit_policy({"criterion": "confidence", "thresholds": [0.0, 0.0, 0.0, 0.0]})
    assert predict(model, rows, 4).exit_index.tolist() == [0, 0, 3, 0, 0, 0]


def test_regression_leaves_by_patience():
    model, rows = make_model("bert", num_labels=1, problem_type="regression"), make_rows("bert")
    answers = all_exits(model, rows)[:, :, 0]
    tolerance = (answers[:, 1] - answers[:, 0]).abs().quantile(0.5).item()  # between two rows
    policy = {"criterion": "patience", "thresholds": [9, 1, 1, 0], "params": {"tolerance": tolerance}}
    model.set_exit_policy(policy)
    found = predict(model, rows, 8)
    wanted = []
    for row in answers.tolist():
        close = [abs(row[k] - row[k - 1]) < tolerance for k in (1, 2)]
        wanted.append(1 if close[0] else 2 if close[1] else 3)
    assert found.exit_index.tolist() == wanted
    assert len(set(wanted)) >= 2
    assert ExitPolicy.from_dict(policy).criterion == "patience"


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_its_mode(training):
    """What breaks: training goes on without dropout after a prediction, or after one that failed."""
    model = make_model("bert").train(training)
    predict(model, make_rows("bert", 3))
    assert model.training is training
    with pytest.raises(KeyError):
        predict(model, [{"input_ids": [1]}, {"pixels": [1]}])
    assert model.training is training


def test_a_batch_size_of_nothing():
    with pytest.raises(ValueError, match="batch_size"):
        predict(make_model("bert"), make_rows("bert", 3), 0)
