"""Batches of texts hold rows of similar length; evaluation keeps the rows' order."""

import datasets
import numpy as np
import pytest
import torch

from een_hf.models import EarlyExitBertConfig, EarlyExitBertForSequenceClassification
from een_hf.training import EarlyExitTrainingArguments, JointExitTrainer
from een_hf.training.trainer import EpochLengthGroupedSampler


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


def make_trainer(folder, kind):
    config = EarlyExitBertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
    )
    rows = [{"input_ids": [1] * length, "labels": row % 2} for row, length in enumerate(LENGTHS[:64])]
    args = EarlyExitTrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to="none", disable_tqdm=True, use_cpu=True
    )
    return JointExitTrainer(
        model=EarlyExitBertForSequenceClassification(config),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows) if kind == "dataset" else rows,
        data_collator=lambda rows: {
            "input_ids": torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], True),
            "labels": torch.tensor([row["labels"] for row in rows]),
        },
    )


@pytest.mark.parametrize("kind", ["dataset", "list"])
def test_a_trainer_groups_texts_by_default(kind, tmp_path):
    """What breaks: every batch of 4 is as wide as the longest of the data set."""
    trainer = make_trainer(tmp_path, kind)
    widths = [batch["input_ids"].shape[1] for batch in trainer.get_train_dataloader()]
    chance = np.random.default_rng(0).permutation(LENGTHS[:64]).reshape(-1, 4).max(1).sum()
    assert sum(widths) < 0.8 * chance


def test_evaluation_keeps_the_order(tmp_path):
    """What breaks: predictions are written beside other rows' ids."""
    trainer = make_trainer(tmp_path, "list")
    labels = trainer.predict_exits(trainer.train_dataset).label_ids
    assert labels.tolist() == [row["labels"] for row in trainer.train_dataset]
