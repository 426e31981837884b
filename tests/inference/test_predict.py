"""The engine answers as the model does row by row, in input order, with full batches and few rows waiting."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, count, islice, repeat

import datasets
import numpy as np
import pytest
import torch
from factory import tiny_model
from transformers import BatchEncoding

from een_hf import ExitConfigurationError, ExitPolicy, predict
from een_hf.inference import ExitEngine, pad_rows
from een_hf.inference.predict import _ahead


CRITERIA = ["confidence", "entropy", "margin", "patience", "vote"]
TEXT = {"vocab_size": 99, "max_position_embeddings": 20}


def make_model(kind, **settings):
    settings = {"num_hidden_layers": 4, **(TEXT if kind == "bert" else {}), **settings}
    return tiny_model(kind, noise=0.3, **settings).eval()


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
    assert len(taken) >= 3, "rows exit at too few exits to test anything"


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
            found = predict(model, sized, 2, data_collator=collator)
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


def test_deep_stages_see_full_batches_and_few_rows_wait():
    """With every second row leaving at each exit, a loop batch by batch would halve its batches at every exit."""
    model, rows = make_model("vit"), make_rows("vit", 256)
    logits = all_exits(model, rows)
    confidence = logits.softmax(-1).amax(-1)
    here, thresholds = torch.ones(256, dtype=torch.bool), []
    for k in range(3):
        thresholds.append(confidence[here, k].median().item() + 1e-6)
        here &= confidence[:, k] < thresholds[-1]
    model.set_exit_policy({"criterion": "confidence", "thresholds": [*thresholds, 0.0]})
    engine, sizes, most = ExitEngine(model, 16), [[] for _ in range(4)], 0

    def starts(k, size):
        nonlocal most
        waiting = [engine.num_waiting(stage) + size * (stage == k) for stage in range(4)]
        full = [stage for stage in range(4) if waiting[stage] >= 16]
        assert not full or k == max(full), "a deeper full stage had to run first"
        most = max(most, sum(waiting))
        sizes[k].append(size)

    for k, layer in enumerate(model.backbone_layers):
        layer.register_forward_pre_hook(lambda module, inputs, k=k: starts(k, len(inputs[0])))
    pixels = torch.stack([row["pixel_values"] for row in rows])
    batches = zip(torch.arange(256).split(16), pixels.split(16), strict=True)
    exits = torch.full((256,), -1)
    with torch.no_grad():
        for ids, _, exit_index in engine.run((ids, {"pixel_values": images}) for ids, images in batches):
            exits[ids] = exit_index
    assert exits.min() == 0
    reached = [int((exits >= k).sum()) for k in range(4)]
    assert [sum(size) for size in sizes] == reached
    assert [len(size) for size in sizes] == [math.ceil(count / 16) for count in reached]
    assert reached[3] < 64, "too few rows exit early"
    assert most <= 4 * 16


def test_a_row_with_nan_never_exits_early():
    model, rows = make_model("vit"), make_rows("vit", 6)
    rows[2]["pixel_values"][0, 0, 0] = float("nan")
    model.set_exit_policy({"criterion": "confidence", "thresholds": [0.0, 0.0, 0.0, 0.0]})
    assert predict(model, rows, 4).exit_index.tolist() == [0, 0, 3, 0, 0, 0]


def test_regression_exits_by_patience():
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
    with pytest.raises(ExitConfigurationError, match="Row 1 .*no input_ids.*pixels.*input_ids, attention_mask"):
        predict(model, [{"input_ids": [1]}, {"pixels": [1]}])
    assert model.training is training


def test_a_model_in_training_predicts_without_dropout_and_trains_on_with_it():
    """What breaks: one of two predictions puts dropout back while the other runs, or takes it from a training step."""
    model, rows = make_model("bert"), make_rows("bert")
    model.set_exit_policy({"criterion": "confidence", "thresholds": [0.7, 0.7, 0.7, 0.0]})
    wanted = predict(model, rows, 4)
    model.train()
    model.bert.encoder.layer[1].eval()  # as a frozen part is
    modes = {name: module.training for name, module in model.named_modules()}
    watched = []

    def stream():
        for number, row in enumerate(rows):
            if number % 7 == 0:  # another prediction begins and ends within this one
                watched.append(predict(model, rows[:5], 2))
            watched.append({name: module.training for name, module in model.named_modules()})
            yield row

    found = predict(model, stream(), 4, window=4)
    for answers, same in ((found, wanted), *((each, wanted) for each in watched if not isinstance(each, dict))):
        count = len(answers.logits)
        assert answers.exit_index.tolist() == same.exit_index[:count].tolist()
        torch.testing.assert_close(answers.logits, same.logits[:count], rtol=0, atol=1e-5)
    assert all(seen == modes for seen in watched if isinstance(seen, dict))
    # A step of training on the same parameters changes what is predicted.
    with torch.no_grad():
        model.classifier.weight.mul_(-1)
    torch.testing.assert_close(predict(model, rows).logits, predict(model.eval(), rows).logits)


def test_threads_predict_alike():
    model, rows = make_model("bert").train(), make_rows("bert", 12)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda size: predict(model, rows[:size], 2), [4, 12] * 10))
    wanted = predict(model.eval(), rows, 2).logits
    for found in answers:
        torch.testing.assert_close(found.logits, wanted[: len(found.logits)], rtol=0, atol=1e-5)


def test_a_wrapped_forward_in_training_mode_is_refused():
    """It runs the module that it was made from, with dropout."""
    model = make_model("bert").train()
    layer = model.bert.encoder.layer[0]
    layer.forward = layer.forward
    with pytest.raises(ExitConfigurationError, match=r"BertLayer.*model.eval\(\)"):
        predict(model, make_rows("bert", 2))
    predict(model.eval(), make_rows("bert", 2))


def test_answers_can_be_trained_on():
    """Of inference tensors torch says "cannot be saved for backward"; also of rows that a data set keeps."""
    model, kept = make_model("vit", num_labels=3), []

    def stream():
        for row in make_rows("vit", 4):
            kept.append(row["pixel_values"] * 2)
            yield {"pixel_values": kept[-1]}

    found = predict(model, stream(), 2)
    for tensor in (found.logits, found.confidence, *kept):
        weight = torch.ones(tensor.shape, requires_grad=True)
        (weight * tensor).sum().backward()
        assert torch.equal(weight.grad, tensor)


@pytest.mark.parametrize("temperatures", [None, [0.9, 0.8, 0.6, 0.7]])
@pytest.mark.parametrize("labels", [3, 1])
def test_confidence_is_the_probability_at_the_exits_temperature(temperatures, labels):
    """Raw probabilities of early exits are too low: the easiest rows would look the least certain."""
    model, rows = make_model("bert", num_labels=labels), make_rows("bert")
    if labels == 1:
        assert predict(model, rows).confidence is None
        return
    scores = (all_exits(model, rows) / torch.tensor(temperatures or [1.0] * 4)[:, None]).softmax(-1).amax(-1)
    thresholds = scores.quantile(0.6, dim=0)
    policy = {"criterion": "confidence", "thresholds": thresholds.tolist(), "temperatures": temperatures}
    model.set_exit_policy(policy)
    found = predict(model, rows, 8)
    for logits, exit_index, confidence in zip(found.logits, found.exit_index, found.confidence, strict=True):
        powers = [math.exp(value / (temperatures or [1.0] * 4)[exit_index]) for value in logits.tolist()]
        assert confidence == pytest.approx(max(powers) / sum(powers), abs=1e-5)
    assert found.exit_index.unique().numel() >= 3
    early = found.exit_index < 3
    assert (found.confidence >= thresholds[found.exit_index] - 1e-6)[early].all()  # what the policy decided by


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_several_labels_exit_and_are_read_by_the_least_certain(kind):
    model, rows = make_model(kind, problem_type="multi_label_classification"), make_rows(kind)
    logits = all_exits(model, rows).double()
    scores = torch.stack([logits.sigmoid(), 1 - logits.sigmoid()]).amax(0).amin(-1)
    thresholds = scores.quantile(0.7, 0).tolist()
    model.set_exit_policy({"criterion": "label_confidence", "thresholds": thresholds})
    found = predict(model, rows, 8)
    wanted = [next((k for k in range(3) if row[k] >= thresholds[k]), 3) for row in scores.tolist()]
    assert found.exit_index.tolist() == wanted and len(set(wanted)) >= 3
    assert [int(output.exit_index) for output in one_by_one(model, rows)] == wanted
    for logits, confidence in zip(found.logits.double().tolist(), found.confidence, strict=True):
        probabilities = [1 / (1 + math.exp(-value)) for value in logits]
        assert confidence == pytest.approx(min(max(p, 1 - p) for p in probabilities), abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_columns_that_are_no_input_are_left_out(kind):
    """Text, names and row numbers stay in data sets beside the model's inputs."""
    model, rows = make_model(kind), make_rows(kind, 6)
    found = predict(model, [{"idx": i, "text": "a b", "label_text": "no", **row} for i, row in enumerate(rows)], 4)
    torch.testing.assert_close(found.logits, predict(model, rows, 4).logits)


def test_rows_may_lack_a_mask_that_others_have():
    """The first row's columns are not those of all: a mask that is missing there must not hide the others'."""
    model, rows = make_model("bert"), make_rows("bert", 8)
    padded = [
        {"input_ids": row["input_ids"] + [7], "attention_mask": [1] * len(row["input_ids"]) + [0]} for row in rows
    ]
    typed = [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in rows]
    found = predict(model, [rows[0], *padded[1:4], *typed[4:]], 8)
    torch.testing.assert_close(found.logits, predict(model, rows, 8).logits, rtol=0, atol=1e-5)
    with pytest.raises(ExitConfigurationError, match="Some rows have position_ids, but one has only"):
        predict(model, [rows[0], {"input_ids": [1, 2], "position_ids": [0, 1]}])


class Endless(torch.utils.data.Dataset):
    """A map-style data set that answers any index."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index % len(self.rows)]


def test_a_text_whose_tokens_are_all_masked_is_refused():
    """What breaks: its answer depends on the padding of its batch; a text with one token is a text."""
    model = tiny_model().eval()
    rows = [{"input_ids": [5, 6, 7], "attention_mask": mask} for mask in ([1, 0, 0], [0, 0, 0])]
    assert len(predict(model, rows[:1], progress=False).logits) == 1
    with pytest.raises(ExitConfigurationError, match="attention_mask is 0 everywhere"):
        predict(model, rows, progress=False)


def test_a_data_set_without_index_errors_ends():
    model, rows = make_model("bert"), make_rows("bert", 5)
    torch.testing.assert_close(predict(model, Endless(rows), 2).logits, predict(model, rows, 2).logits)


@pytest.mark.parametrize(
    "given, words",
    [
        ("a text", ["not str", "tokenizer=partial(tokenizer, truncation=True)"]),
        (["a text", "b"], ["Row 0", "str", "tokenizer=partial(tokenizer, truncation=True)"]),
        (BatchEncoding({"input_ids": [[1, 2], [3]]}), ["BatchEncoding of input_ids", "Dataset.from_dict"]),
        ({"input_ids": [[1, 2], [3]], "labels": [0, 1]}, ["dict of input_ids, labels", "Dataset.from_dict"]),
        (datasets.DatasetDict(test=datasets.Dataset.from_dict({"input_ids": [[1]]})), ["its splits (test)"]),
        ([{"input_ids": []}], ["Row 0", "no tokens"]),
        ([{"input_ids": [1.0, 2.0]}], ["Row 0", "float", "whole numbers"]),
        ([{"input_ids": torch.ones(1, 4, dtype=torch.int64)}], ["Row 0", "(1, 4)", "1 dimension"]),
        ([{"input_ids": [1]}, {"input_ids": [1] * 21}], ["row 1", "21 tokens", "at most 20", "max_length=20"]),
        ([{"input_ids": [1] * 21}, {"input_ids": [1]}], ["row 0", "21 tokens", "at most 20", "max_length=20"]),
        (7, ["iterable of rows", "int"]),
    ],
)
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_what_are_no_rows_gets_a_sentence(given, words, cuda_graphs):
    with pytest.raises(ExitConfigurationError) as error:
        predict(make_model("bert"), given, 1, cuda_graphs=cuda_graphs)
    for word in words:
        assert word in str(error.value)


def test_a_collator_reads_whatever_rows_it_likes():
    """One that tokenizes takes strings; the model's inputs are taken out of what it makes."""
    model, rows = make_model("bert"), make_rows("bert", 5)
    texts = [" ".join(map(str, row["input_ids"])) for row in rows]

    def collate(batch):
        return {**pad_rows([{"input_ids": [*map(int, text.split())]} for text in batch], model.config), "texts": batch}

    wanted = predict(model, rows, 2).logits
    for cuda_graphs in (False, True):
        found = predict(model, texts, 2, data_collator=collate, cuda_graphs=cuda_graphs)
        torch.testing.assert_close(found.logits, wanted, rtol=0, atol=1e-5)


class Tokenizer:
    """Numbers as tokens, the second text of a pair under another type; keeps what it was called with."""

    def __init__(self):
        self.calls = []

    def __call__(self, *columns):
        self.calls.append(columns)
        tokens = [[[int(word) for word in text.split()] for text in column] for column in columns]
        rows = list(zip(*tokens, strict=True))
        return BatchEncoding(
            {
                "input_ids": [list(chain(*row)) for row in rows],
                "token_type_ids": [[n for n, part in enumerate(row) for _ in part] for row in rows],
            }
        )


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("source", ["texts", "pairs", "stream"])
def test_texts_are_tokenized_by_windows_and_answered_in_order(source, cuda_graphs):
    """Answers in the order of lengths, a text that is tokenized twice, or all of them before the first batch."""
    model, rows, tokenizer = make_model("bert"), make_rows("bert", 23), Tokenizer()
    texts = [" ".join(map(str, row["input_ids"])) for row in rows]
    if source == "pairs":
        texts = [(text, "7 8") for text in texts]
        rows = [
            {"input_ids": row["input_ids"] + [7, 8], "token_type_ids": [0] * len(row["input_ids"]) + [1, 1]}
            for row in rows
        ]
    given = iter(texts) if source == "stream" else texts
    found = predict(model, given, 4, tokenizer=tokenizer, window=10, cuda_graphs=cuda_graphs)
    torch.testing.assert_close(found.logits, predict(model, rows, 4).logits, rtol=0, atol=1e-5)
    assert [len(columns[0]) for columns in tokenizer.calls] == [10, 10, 3]
    seen = [text for columns in tokenizer.calls for text in columns[0]]
    if source == "stream":
        assert seen == texts
    else:
        lengths = list(map(len, seen))
        assert lengths == sorted(lengths, reverse=True) and len(seen) == 23


@pytest.mark.parametrize(
    "given, words",
    [
        ([{"input_ids": [1]}], ["texts or pairs of texts, not dict"]),
        (["1 2", 7], ["not int"]),
        (["1 2", ("3", "4")], ["not some of each"]),
        (["1", "2 3", "4 " * 21], ["row 2", "21 tokens", "at most 20"]),
    ],
)
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_what_are_no_texts_gets_a_sentence(given, words, cuda_graphs):
    with pytest.raises(ExitConfigurationError) as error:
        predict(make_model("bert"), given, 1, tokenizer=Tokenizer(), cuda_graphs=cuda_graphs)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, 2, 3], "attention_mask": [1, 1]}, r"attention_mask of shape \(2,\).* 3 tokens"),
        ({"input_ids": [1, 2, 3], "token_type_ids": [1] * 5}, r"token_type_ids of shape \(5,\).* 3 tokens"),
        ({"input_ids": [1, 2, 3], "attention_mask": [[1, 1, 1]]}, r"attention_mask of shape \(1, 3\).* 3 tokens"),
        ({"input_ids": [1, 99]}, "The batch of row .* has input_ids that the model does not have: it has 0 to 98"),
        ({"input_ids": [-1, 2]}, "The batch of row .* has input_ids that the model does not have"),
        (
            {"input_ids": [1, 2], "token_type_ids": [0, 2]},
            "The batch of row .* has token_type_ids that the model does not have",
        ),
        ({"inputs_embeds": torch.zeros(21, 16)}, "The batch of row .* has 21 tokens, the model takes at most 20"),
    ],
)
def test_a_row_that_does_not_fit_is_refused(row, message, cuda_graphs):
    """What breaks: a mask that is too short hides the last tokens without a word, where a longer row is beside it."""
    others = [] if "inputs_embeds" in row else make_rows("bert", 7)
    with pytest.raises(ExitConfigurationError, match=message):
        predict(make_model("bert"), [*others, row], 8, cuda_graphs=cuda_graphs)


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_rows_of_embeddings(cuda_graphs):
    """What breaks: rows of different lengths cannot be stacked."""
    model, rows = make_model("bert"), make_rows("bert")
    model.set_exit_policy({"criterion": "confidence", "thresholds": [0.45] * 4})
    table = model.get_input_embeddings().weight.detach()
    embedded = [{"inputs_embeds": table[torch.tensor(row["input_ids"])]} for row in rows]
    wanted, found = predict(model, rows), predict(model, embedded, 8, cuda_graphs=cuda_graphs)
    assert torch.equal(found.exit_index, wanted.exit_index) and len(set(wanted.exit_index.tolist())) > 1
    torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [list, np.array, torch.tensor, lambda values: np.array(values, np.int32)])
def test_rows_of_every_kind_are_padded_alike(make):
    """Masked floats, or another type of number, where rows are lists, arrays or tensors."""
    config = make_model("bert").config
    rows = [{"input_ids": make(ids)} for ids in ([5, 6, 7], [8], [9, 9])]
    rows[1]["attention_mask"] = make([0])
    padded = pad_rows(rows, config)
    assert padded["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0], [9, 9, 0]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 0]]
    assert padded["attention_mask"].dtype in (torch.int64, torch.int32)
    vectors = [{"inputs_embeds": make([[1, 2]] * length), "input_ids": [1] * length} for length in (1, 2)]
    assert pad_rows(vectors, config)["inputs_embeds"].shape == (2, 2, 2)


def test_a_batch_size_of_nothing():
    with pytest.raises(ValueError, match="batch_size"):
        predict(make_model("bert"), make_rows("bert", 3), 0)


def test_batches_are_made_ahead_and_no_further_than_wanted():
    """A prediction that is stopped would read the rest of its stream first: an endless one for ever."""
    drawn, running = [], threading.active_count()

    def stream():
        for number in count():
            drawn.append(number)
            yield torch.tensor([number]), {"input_ids": torch.full((1, 2), number), "constant": True}

    batches = _ahead(stream(), torch.device("cpu"))
    for number, (ids, inputs) in enumerate(islice(batches, 5)):
        assert (ids.tolist(), inputs["input_ids"].tolist(), inputs["constant"]) == ([number], [[number] * 2], True)
    batches.close()
    assert threading.active_count() == running and len(drawn) <= 9


def test_errors_of_a_stream_and_of_the_model_end_a_prediction():
    """An error in the thread that makes batches would leave the other waiting, or the other way round."""
    model, row = make_model("bert"), {"input_ids": [1, 2]}

    def broken():
        yield from repeat(row, 7)
        raise OSError("the line is dead")

    beyond = {**row, "position_ids": [0, 500]}
    for data, kind in ((broken(), OSError), (chain([row] * 8, repeat(beyond)), RuntimeError)):
        with pytest.raises(kind):
            predict(model, data, 2, window=2, cuda_graphs=True)


@pytest.mark.parametrize("training", [False, True])
def test_a_runner_stays_with_the_model_that_it_belongs_to(training):
    """One that is kept with the copies that predict while a model trains would keep graphs that nobody uses again."""
    model, rows = make_model("bert").train(training), make_rows("bert", 5)
    predict(model, rows, 2, cuda_graphs=True)
    runner = vars(model).get("_exit_runner")
    assert runner is None if training else runner.model is model
    predict(model, rows, 2, cuda_graphs=True)
    assert vars(model).get("_exit_runner") is runner


def test_images_too_run_by_as_many_as_the_device_likes():
    """Small batches leave most of a device idle."""
    model, sizes = make_model("vit"), []
    model.vit.embeddings.register_forward_hook(lambda module, inputs, output: sizes.append(len(output)))
    predict(model, make_rows("vit", 40), 4, cuda_graphs=True)
    assert max(sizes) >= 32


@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("order", ["by size", "mixed"])
def test_images_of_several_sizes_do_not_mix(order, cuda_graphs):
    """Filled up to the size of others, an image attends to nothing, and its mean counts it."""
    model = make_model("dinov2", mlp_ratio=2, image_size=16)
    sizes = [(16, 16)] * 6 + [(16, 24)] * 6 + [(24, 16)] * 6 + [(8, 8)] * 6
    sizes = sizes if order == "by size" else sizes[::2] + sizes[1::2]
    rows = [{"pixel_values": 3 * torch.randn(3, *size)} for size in sizes]
    logits = all_exits(model, rows)
    model.set_exit_policy(
        {"criterion": "confidence", "thresholds": logits.softmax(-1).amax(-1).quantile(0.6, 0).tolist()}
    )
    found = predict(model, rows, 4, cuda_graphs=cuda_graphs)
    assert len(found.exit_index.unique()) >= 3
    assert found.exit_index.tolist() == [int(output.exit_index) for output in one_by_one(model, rows)]
    wanted = logits[torch.arange(len(rows)), found.exit_index]
    torch.testing.assert_close(found.logits, wanted, rtol=0, atol=1e-5)
