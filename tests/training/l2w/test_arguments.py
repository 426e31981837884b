"""Settings of l2w, and what it cannot train."""

import pytest
import torch
from l2w_trainers import NUM_LABELS, bert, make_trainer

from een_hf.models import ExitConfigurationError
from een_hf.training import EarlyExitTrainingArguments, get_scheme
from een_hf.training.l2w import (
    MetaWeightedArguments,
    MetaWeightedExitTrainer,
)


@pytest.mark.parametrize(
    "name,value",
    [
        ("wpn_hidden_size", 0),
        ("wpn_num_layers", 0),
        ("meta_learning_rate", 0.0),
        ("meta_weight_decay", -1.0),
        ("meta_lr_scheduler_type", "step"),
        ("meta_interval", 0),
        ("meta_batch_size", 0),
        ("meta_epsilon", 1.5),
        ("meta_target_p", 0.0),
        ("meta_input", "labels"),
        ("meta_constraint", "row"),
        ("meta_gradient", "backward"),
    ],
)
def test_bad_settings_name_their_flag(name, value):
    with pytest.raises(ExitConfigurationError, match=f"--{name} "):
        MetaWeightedArguments(**{name: value})


def test_what_cannot_be_trained_is_refused_before_training(tmp_path):
    assert get_scheme("l2w") is MetaWeightedExitTrainer
    with pytest.raises(ExitConfigurationError, match="--optim .*adafactor"):
        make_trainer(bert(), tmp_path, optim="adafactor")
    for model in (bert(problem_type="multi_label_classification"), bert(problem_type="regression")):
        with pytest.raises(ExitConfigurationError, match="--method l2w"):
            make_trainer(model, tmp_path)
    with pytest.raises(ExitConfigurationError, match="--method l2w.*float32"):
        make_trainer(bert().bfloat16(), tmp_path)
    with pytest.raises(ExitConfigurationError, match="--meta_gradient exact.*--gradient_checkpointing"):
        make_trainer(bert(), tmp_path, scheme_args={"meta_gradient": "exact"}, gradient_checkpointing=True)
    model = bert()
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if name in EarlyExitTrainingArguments.__dataclass_fields__:
            with pytest.raises(ExitConfigurationError, match=r"use_reentrant.*checkpointing_kwargs"):
                make_trainer(model, tmp_path, **{name: {"use_reentrant": True}})
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ExitConfigurationError, match="flash_attention_2.*--attn_implementation sdpa"):
        make_trainer(model, tmp_path)
    model = bert()
    for optimizer in (
        torch.optim.Adam(model.parameters()),
        torch.optim.AdamW(model.parameters(), amsgrad=True),
        torch.optim.SGD(model.parameters(), maximize=True),
    ):
        with pytest.raises(ExitConfigurationError, match="--optim"):
            make_trainer(model, tmp_path, optimizers=(optimizer, None))
    trainer = make_trainer(bert(), tmp_path)
    trainer.train_dataset.columns["labels"] = torch.rand(40, NUM_LABELS)  # inferred as multi-label
    with pytest.raises(ExitConfigurationError, match="--method l2w"):
        trainer.train()
