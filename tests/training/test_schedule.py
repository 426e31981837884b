"""`--lr_milestones`: drops to a tenth, for every parameter group."""

import pytest
import torch
from factory import make_trainer
from torch.optim.lr_scheduler import MultiStepLR

from een_hf.models import ExitConfigurationError
from een_hf.training import EarlyExitTrainingArguments


def test_drops_are_those_of_multi_step(tmp_path):
    """What breaks: the paper's CIFAR schedule drops at other steps, or for one parameter group alone."""
    trainer = make_trainer(tmp_path, lr_milestones=[0.5, 0.75], learning_rate=0.1, optim="sgd")
    trainer.create_optimizer_and_scheduler(num_training_steps=20)
    twin = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    wanted = MultiStepLR(twin, [10, 15], gamma=0.1)
    for _ in range(20):
        assert trainer.lr_scheduler.get_last_lr() == pytest.approx(
            wanted.get_last_lr() * len(trainer.optimizer.param_groups)
        )
        for optimizer, scheduler in ((trainer.optimizer, trainer.lr_scheduler), (twin, wanted)):
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize("flags", [{"lr_milestones": [0.5, 1.5]}, {"lr_milestones": [0.5], "warmup_steps": 5}])
def test_bad_values(tmp_path, flags):
    with pytest.raises(ExitConfigurationError, match="--lr_milestones"):
        EarlyExitTrainingArguments(str(tmp_path), **flags)
