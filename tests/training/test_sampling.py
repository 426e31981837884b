"""Which rows make a batch, in what order they are read, and how often."""

import datasets
import factory
import numpy as np
import pytest
import torch
from factory import tiny_model
from transformers import Trainer, TrainingArguments

from een_hf.inference import predict
from een_hf.models import ExitConfigurationError
from een_hf.training import EarlyExitTrainingArguments
from een_hf.training.sampling import EpochLengthGroupedSampler


LENGTHS = np.random.default_rng(0).integers(2, 60, 500).tolist()


def padded(order, batch_size=8):
    """Tokens and padding that the model reads in this order."""
    batches = [
        [LENGTHS[row] for row in order[start : start + batch_size]] for start in range(0, len(order), batch_size)
    ]
    return sum(max(batch) * len(batch) for batch in batches)


def test_every_row_once_in_an_order_that_pads_less():
    """What breaks: rows left out, or batches padded as in a random order."""
    order = list(EpochLengthGroupedSampler(8, LENGTHS, seed=1))
    assert sorted(order) == list(range(500))
    shuffled = np.random.default_rng(1).permutation(500).tolist()
    assert padded(order) - sum(LENGTHS) < 0.5 * (padded(shuffled) - sum(LENGTHS))


def test_the_order_depends_on_seed_and_epoch_alone():
    """What breaks: a resumed run draws another order than the uninterrupted one."""
    sampler = EpochLengthGroupedSampler(8, LENGTHS, seed=1)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    torch.rand(3)
    again = EpochLengthGroupedSampler(8, LENGTHS, seed=1)
    again.set_epoch(1)
    assert list(again) == orders[1] != orders[0]
    assert list(EpochLengthGroupedSampler(8, LENGTHS, seed=2)) != orders[0]


class MapStyle(torch.utils.data.Dataset):
    """Rows that end by their length alone: `__getitem__` takes any index, as many in the wild do."""

    def __init__(self, rows):
        self.rows, self.reads = rows, 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.reads += 1
        assert self.reads < 100 * len(self.rows), "read without end"
        return self.rows[index % len(self.rows)]


def pad(rows):
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def make_trainer(folder, kind, **settings):
    rows = [{"input_ids": [1] * length, "labels": row % 2} for row, length in enumerate(LENGTHS[:64])]
    if kind == "length column":
        rows = [{**row, "size": len(row["input_ids"])} for row in rows]
        settings["length_column_name"] = "size"
    rows = {"list": list, "map-style": MapStyle}.get(kind, datasets.Dataset.from_list)(rows)
    settings = {"per_device_train_batch_size": 4, "data_collator": pad, **settings}
    return factory.make_trainer(folder, tiny_model(max_position_embeddings=64), train_dataset=rows, **settings)


def widths(trainer):
    return [batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()]


@pytest.mark.parametrize("kind", ["dataset", "list", "length column"])
def test_a_trainer_groups_texts_where_asked(kind, tmp_path):
    """What breaks: every batch of 4 is as wide as the longest of the data set."""
    trainer = make_trainer(tmp_path, kind, train_sampling_strategy="group_by_length")
    chance = np.random.default_rng(0).permutation(LENGTHS[:64]).reshape(-1, 4).max(1).sum()
    assert sum(widths(trainer)) < 0.8 * chance


def test_by_default_rows_come_as_in_transformers(tmp_path):
    """What breaks: rows grouped by length, which costs accuracy in short runs."""
    assert EarlyExitTrainingArguments.train_sampling_strategy == TrainingArguments.train_sampling_strategy == "random"
    trainer = make_trainer(tmp_path, "list")
    stock = Trainer(
        model=trainer.model,
        args=trainer.args,
        train_dataset=trainer.train_dataset,
        data_collator=trainer.data_collator,
    )
    assert widths(trainer) == widths(stock)


def test_rows_that_end_by_their_length_alone(tmp_path):
    """What breaks: `for row in rows` reads on for ever: in training, evaluation, calibration and prediction."""
    trainer = make_trainer(tmp_path, "map-style", max_steps=2)
    rows = trainer.train_dataset
    trainer.train()
    assert rows.reads <= 3 * 4  # two batches, and one that is fetched ahead
    assert len(trainer.predict_exits(rows).predictions) == 64
    trainer.model.set_exit_policy(trainer.calibrate(rows, target_cost=0.8).policy)
    found = trainer.predict(rows)
    assert found.label_ids.tolist() == [row["labels"] for row in rows.rows]
    answers = predict(trainer.model, rows, batch_size=8, collator=trainer.data_collator)
    assert np.array_equal(answers.logits, found.predictions)


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_lengths_cost_no_pass_over_a_lazy_data_set(strategy, tmp_path):
    trainer = make_trainer(tmp_path, "map-style", train_sampling_strategy=strategy)
    with pytest.raises(ExitConfigurationError, match="--train_sampling_strategy.*`input_ids` or `length`"):
        trainer.train()
    assert trainer.train_dataset.reads == 0


def test_prediction_on_a_stream(tmp_path):
    """What breaks: a stream has no length; its labels go by with its rows."""
    trainer = make_trainer(tmp_path, "list", per_device_eval_batch_size=5)
    held = trainer.predict(trainer.train_dataset)
    stream = datasets.Dataset.from_list(trainer.train_dataset).to_iterable_dataset()
    for rows in (stream, iter(trainer.train_dataset)):
        found = trainer.predict(rows)
        np.testing.assert_allclose(found.predictions, held.predictions, atol=1e-6)
        assert found.label_ids.tolist() == held.label_ids.tolist() == [row % 2 for row in range(64)]


def test_evaluation_keeps_the_order(tmp_path):
    """What breaks: predictions are written beside other rows' ids."""
    trainer = make_trainer(tmp_path, "list")
    labels = trainer.predict_exits(trainer.train_dataset).label_ids
    assert labels.tolist() == [row["labels"] for row in trainer.train_dataset]
