"""What the loss over exits does in a run: it stops one that goes wrong, and its log costs no memory."""

from collections import deque

import datasets
import factory
import pytest
import torch
from factory import tiny_model, tiny_rows
from transformers import TrainerCallback

from een_hf.errors import NonFiniteLossError


BAD_ROW = 13
CHANGES = {"soft label": {"problem_type": "single_label_classification"}, "number": {"num_labels": 1}}


def make_trainer(folder, kind="pixel", scheme="joint", rows=list, **settings):
    """On 24 rows, of which one may hold NaN in its input or its label."""
    model = tiny_model("vit" if kind == "pixel" else "bert", num_hidden_layers=2, **CHANGES.get(kind, {}))
    made = tiny_rows("vit" if kind == "pixel" else "bert")
    for place, row in enumerate(made):
        label = torch.tensor(place % 3)
        row["labels"] = {"soft label": torch.eye(3)[label], "number": label.float()}.get(kind, label)
    if kind == "pixel":
        made[BAD_ROW]["pixel_values"][0, 0, 0] = torch.nan
    elif kind != "text":
        made[BAD_ROW]["labels"].view(-1)[0] = torch.nan if kind == "soft label" else torch.inf
    settings = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, **settings}
    return factory.make_trainer(folder, model, scheme, train_dataset=rows(made), **settings)


class Weights(TrainerCallback):
    """The weights after each step."""

    def __init__(self):
        self.after = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.after.append([parameter.detach().clone() for parameter in model.parameters()])

    on_step_end = on_train_begin


@pytest.mark.parametrize(
    ("kind", "scheme"), [("pixel", "joint"), ("pixel", "l2w"), ("soft label", "boosted"), ("number", "joint")]
)
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, kind, scheme):
    """What breaks: one pixel or label ruins all weights while the log says loss 0.0."""
    trainer = make_trainer(tmp_path, kind, scheme, logging_steps=1, num_train_epochs=1)
    assert trainer.args.logging_nan_inf_filter is False
    callback = Weights()
    trainer.add_callback(callback)
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    assert f"training step {len(callback.after)} is not finite for rows {BAD_ROW} (counted" in str(error.value)
    for parameter, after in zip(trainer.model.parameters(), callback.after[-1], strict=True):
        assert torch.equal(parameter, after) and parameter.isfinite().all()


class SpoiledLater(list):
    """Rows whose NaN shows from the second epoch on."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        return super().__getitem__(index if index != BAD_ROW or self.epoch >= 1 else 0)


@pytest.mark.parametrize("strategy", ["sequential", "random", "group_by_length"])
def test_the_row_is_named_in_a_later_epoch_and_after_resuming(tmp_path, strategy):
    """What breaks: the row of another epoch's order is blamed."""
    settings = {"train_sampling_strategy": strategy, "save_strategy": "steps", "save_steps": 1}
    for checkpoint in (None, True):
        trainer = make_trainer(tmp_path, "soft label", rows=SpoiledLater, **settings)
        with pytest.raises(NonFiniteLossError, match=f"not finite for rows {BAD_ROW} "):
            trainer.train(resume_from_checkpoint=checkpoint)
        assert 1 <= trainer.state.epoch < 2


def test_a_stream_names_the_place_in_the_batch(tmp_path):
    rows = lambda made: datasets.Dataset.from_list(made).with_format("torch").to_iterable_dataset()  # noqa: E731
    trainer = make_trainer(tmp_path, "number", rows=rows, max_steps=5)
    with pytest.raises(NonFiniteLossError, match=f"step 3 .* rows {BAD_ROW % 3} .* of the batch"):
        trainer.train()


def test_a_run_that_diverges_says_so(tmp_path):
    trainer = make_trainer(tmp_path, "text", learning_rate=1e30, max_grad_norm=0, optim="sgd", num_train_epochs=3)
    with pytest.raises(NonFiniteLossError, match="not finite for all examples of a batch.*--learning_rate"):
        trainer.train()


def test_an_evaluation_loss_is_shown_as_it_is(tmp_path):
    """What breaks: NaN rows are left out of eval_loss."""
    trainer = make_trainer(tmp_path, per_device_eval_batch_size=4)
    found = trainer.evaluate(trainer.train_dataset)
    assert found["eval_loss"] != found["eval_loss"] and found["eval_exit1_loss"] != found["eval_exit1_loss"]


def test_the_log_of_exits_is_the_mean_since_the_last(tmp_path):
    """Whatever the interval; and without a log nothing is kept for one."""
    logs, counts = {}, []

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            counts.append(sum(len(part) for part in vars(trainer).values() if isinstance(part, (list, deque))))

    for steps in (1, 4):
        trainer = make_trainer(tmp_path, "text", max_steps=8, logging_steps=steps)
        trainer.train()
        logs[steps] = [log for log in trainer.state.log_history if "exit1_loss" in log]
    assert len(logs[1]) == 8 and len(logs[4]) == 2
    for n, log in enumerate(logs[4]):
        for name in ("exit1_loss", "exit2_loss"):
            assert log[name] == pytest.approx(sum(one[name] for one in logs[1][4 * n : 4 * n + 4]) / 4, rel=1e-5)
    trainer = make_trainer(tmp_path, "text", max_steps=16, logging_strategy="no")
    trainer.add_callback(Count())
    trainer.train()
    assert counts == counts[:1] * 16
