"""`--warm_start_epochs`: plain fine-tuning of the last exit first, then the scheme."""

import pytest
import torch
from factory import NO_DROPOUT, QUIET, make_trainer, tiny_rows, tiny_stock_model
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from een_hf.models import EarlyExitBertForSequenceClassification, ExitConfigurationError
from een_hf.training import EarlyExitTrainingArguments
from een_hf.training.callbacks import exit_curves


COMMON = {
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-2,
    "num_train_epochs": 2,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "max_grad_norm": 0,
}


class Snapshots(TrainerCallback):
    def __init__(self):
        self.epochs = []

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.epochs.append({name: tensor.clone() for name, tensor in model.state_dict().items()})


@pytest.fixture
def plain_folder(tmp_path):
    tiny_stock_model(**NO_DROPOUT).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("scheme", ["joint", "l2w"])
def test_the_first_epoch_is_plain_fine_tuning_and_the_second_is_not(plain_folder, tmp_path, scheme):
    """What breaks: exits pull at the backbone from the first step, or never join."""
    rows, stock, warm = tiny_rows(count=32, learnable=True), Snapshots(), Snapshots()
    Trainer(
        model=BertForSequenceClassification.from_pretrained(plain_folder),
        args=TrainingArguments(str(tmp_path / "stock"), **QUIET, **COMMON),
        train_dataset=rows,
        callbacks=[stock],
    ).train()
    model = EarlyExitBertForSequenceClassification.from_pretrained(plain_folder)
    settings = {"train_dataset": rows, "callbacks": [warm], "warm_start_epochs": 1, **COMMON}
    make_trainer(tmp_path / scheme, model, scheme, **settings).train()
    for name, wanted in stock.epochs[0].items():
        torch.testing.assert_close(warm.epochs[0][name], wanted, rtol=0, atol=1e-5, msg=name)
    moved = [name for name, tensor in stock.epochs[1].items() if (warm.epochs[1][name] - tensor).abs().max() > 1e-3]
    assert any("encoder.layer.0" in name for name in moved)
    heads = [name for name in warm.epochs[0] if name.startswith("exit_heads")]
    assert any((warm.epochs[1][name] - warm.epochs[0][name]).abs().max() > 1e-3 for name in heads)


def test_losses_of_exits_are_logged_once_they_are_trained(tmp_path):
    """What breaks: losses that do not fall, of heads that are not trained yet, look like a training that fails."""
    settings = {"train_dataset": tiny_rows(count=32), "warm_start_epochs": 1, "logging_strategy": "epoch", **COMMON}
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    warm, after = (logs for logs in trainer.state.log_history if "loss" in logs)
    assert [name for name in warm if name.startswith("exit")] == ["exit3_loss"]
    assert warm["exit3_loss"] == pytest.approx(warm["loss"], abs=2e-4)
    curve = exit_curves(trainer.state.log_history)["train_loss"]
    assert curve == {
        "step": [4, 8],
        "exit 1": [None, after["exit1_loss"]],
        "exit 2": [None, after["exit2_loss"]],
        "exit 3": [warm["exit3_loss"], after["exit3_loss"]],
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"warm_start_epochs": -1.0}, "--warm_start_epochs"),
        ({"warm_start_epochs": 1.0, "freeze_backbone": True}, "keeps"),
    ],
)
def test_bad_values(tmp_path, flags, message):
    with pytest.raises(ExitConfigurationError, match=message):
        EarlyExitTrainingArguments(str(tmp_path), **flags)
