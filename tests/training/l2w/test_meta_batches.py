"""Meta batches of a size of their own: which rows they have, and that a run can be resumed anywhere in them."""

import copy
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from factory import make_trainer as make_any_trainer
from factory import tiny_processor
from l2w_trainers import NUM_LABELS, Rows, bert, make_trainer, text_batch, vit, warmed_up
from transformers import DataCollatorWithPadding

from een_hf.data.image_rows import ImageRows
from een_hf.data.transforms import ImageCollator
from een_hf.models import ExitConfigurationError
from een_hf.training.l2w import MetaWeightedArguments
from een_hf.training.l2w.meta_batches import meta_batches


class Numbered(Rows):
    """Texts that also carry their row number, as their second token."""

    def __init__(self, size):
        super().__init__(size)
        self.columns["input_ids"][:, 1] = 4 + torch.arange(size)


def row_numbers(batch):
    return (batch["input_ids"][:, 1] - 4).tolist()


def test_every_pass_reads_other_rows_than_the_training_batches(tmp_path):
    """What breaks: halves of the batch, the training's own order (a sampler of the same seed), one order for all."""
    trainer = make_trainer(
        bert(), tmp_path, scheme_args={"meta_batch_size": 12}, train_dataset=Numbered(40), max_steps=12
    )
    seen, gradient = [], trainer.look_ahead.gradient

    def record(train, meta):
        seen.append((row_numbers(train), row_numbers(meta)))
        return gradient(train, meta)

    trainer.look_ahead.gradient = record
    trainer.train()
    assert len(seen) == 12  # one update of W for each step
    assert all(len(train) == 8 and len(set(meta)) == 12 for train, meta in seen)
    passes = [sum((meta for _, meta in seen[start : start + 3]), []) for start in (0, 3, 6, 9)]
    assert all(len(set(rows)) == 36 for rows in passes) and len(set(map(tuple, passes))) == 4
    epochs = [sum((train for train, _ in seen[start : start + 5]), []) for start in (0, 5)]
    assert all(len(set(rows)) == 40 for rows in epochs)
    assert all(order[:36] != rows for order in epochs for rows in passes)


def test_a_step_of_w_is_adams_on_the_whole_batch_and_the_drawn_rows(tmp_path):
    rows, size = Numbered(40), 12
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    settings = {"scheme_args": {"meta_batch_size": size, "meta_gradient": "exact"}, "train_dataset": rows}
    trainer = warmed_up(model, tmp_path, [text_batch(8, 1)], **settings)
    plain = copy.deepcopy(trainer.weight_network)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-4, weight_decay=1e-4)
    offsets = copy.deepcopy(trainer.meta_generator)
    for step in range(4):
        batch = text_batch(5, 20 + step, length=7)
        trainer.meta_step(batch)
        passed, place = divmod(step, 3)
        drawn = np.random.default_rng((trainer.args.seed, passed)).permutation(40)[place * size : (place + 1) * size]
        meta = {name: column[drawn] for name, column in rows.columns.items()}
        ours, trainer.weight_network = trainer.weight_network, plain
        trainer.look_ahead.share_offset = torch.rand((), generator=offsets, dtype=torch.float64).item()
        weights, gradient, _ = trainer.meta_gradient(batch, meta)
        trainer.weight_network = ours
        assert weights.shape == gradient.shape == (5, 3)
        adam.param_groups[0]["lr"] = 1e-4 * (1 + np.cos(np.pi * step / 100)) / 2
        adam.zero_grad()
        weights.backward(gradient)
        adam.step()
        for parameter, wanted in zip(trainer.weight_network.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(parameter, wanted, rtol=1e-6, atol=1e-8)


def image_rows(count=11):
    pixels = np.random.default_rng(0).integers(0, 255, (count, 16, 16, 3), dtype=np.uint8)
    rows = datasets.Dataset.from_dict({"image": list(pixels)}, datasets.Features({"image": datasets.Image()}))

    def transform(image):
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        return pixels + torch.rand(())

    return ImageRows(rows, "image", np.arange(count) % NUM_LABELS, transform, seed=3)


@pytest.mark.parametrize("workers", [0, 2])
def test_meta_batches_from_anywhere_are_those_of_the_whole_run(tmp_path, workers):
    """What breaks: images of a resumed run are augmented as in another pass, or those of the training rows change."""
    rows = image_rows()
    rows.set_epoch(5)
    model = vit()
    model.config.problem_type = "single_label_classification"
    settings = {"train_dataset": rows, "remove_unused_columns": False, "dataloader_num_workers": workers}
    collator = ImageCollator(mixup=0.8, num_labels=NUM_LABELS)
    trainer = make_trainer(
        model, tmp_path, scheme_args={"meta_batch_size": 4}, data_collator=collator, seed=4, **settings
    )
    whole = list(islice(meta_batches(trainer, 0), 7))
    assert not any(torch.equal(whole[0]["pixel_values"], batch["pixel_values"]) for batch in whole[1:])
    for start in (1, 2, 5):
        for wanted, found in zip(whole[start:], meta_batches(trainer, start), strict=False):
            assert found["pixel_values"].shape == (4, 3, 16, 16) and found["labels"].shape == (4, NUM_LABELS)
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert rows.epoch == 5


def test_meta_batches_pass_through_the_collator_without_unused_columns(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (24,), generator=generator).tolist()
    rows = {
        "input_ids": [torch.randint(5, 15, (length,), generator=generator).tolist() for length in lengths],
        "labels": [length % 2 for length in lengths],
        "text": ["kept for people"] * 24,
    }
    trainer = make_any_trainer(
        tmp_path,
        bert(),
        "l2w",
        train_dataset=datasets.Dataset.from_dict(rows),
        scheme_args=MetaWeightedArguments(meta_batch_size=7),
        data_collator=DataCollatorWithPadding(tiny_processor()),
        per_device_train_batch_size=4,
        max_steps=3,
    )
    shapes, gradient = [], trainer.look_ahead.gradient

    def record(train, meta):
        shapes.append((train["input_ids"].shape, meta["input_ids"].shape))
        assert sorted(meta) == sorted(train) and "text" not in meta
        return gradient(train, meta)

    trainer.look_ahead.gradient = record
    trainer.train()
    assert len(shapes) == 3 and len({length for pair in shapes for _, length in pair}) > 1
    assert all(train[0] == 4 and meta[0] == 7 for train, meta in shapes)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from Rows(40)


def test_rows_without_another_order_are_refused_before_training(tmp_path):
    for rows in (Stream(), datasets.Dataset.from_dict({"labels": [0, 1]}).to_iterable_dataset()):
        with pytest.raises(ExitConfigurationError, match="--meta_batch_size.*stream"):
            make_trainer(bert(), tmp_path, scheme_args={"meta_batch_size": 4}, train_dataset=rows, max_steps=2)
    with pytest.raises(ExitConfigurationError, match="--meta_batch_size 41 .* 40 training rows.*at most 40"):
        make_trainer(bert(), tmp_path, scheme_args={"meta_batch_size": 41})
    make_trainer(bert(), tmp_path, scheme_args={"meta_batch_size": 41}, train_dataset=None)  # only evaluates
