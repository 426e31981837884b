"""Training with learned weights: what it equals, when it looks ahead, how it is resumed."""

import copy
import os
import resource

import pytest
import torch
from l2w_trainers import NUM_LABELS, bert, make_trainer, tensors_of, text_batch, warmed_up
from transformers import TrainerCallback

from een_hf.models import ExitConfigurationError
from een_hf.training.l2w import (
    MetaWeightedExitTrainer,
)


class Record(TrainerCallback):
    """The parameters after every step."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append([parameter.detach().clone() for parameter in model.parameters()])


@pytest.mark.parametrize("constraint", ["exit", "sample", "batch"])
@pytest.mark.parametrize("kwargs", [{}, {"gradient_accumulation_steps": 3, "exit_loss_weights": "linear"}])
@pytest.mark.parametrize("meta_batch_size", [None, 12])
def test_epsilon_0_is_joint_to_the_last_bit(tmp_path, constraint, kwargs, meta_batch_size):
    # Any trace of the look-ahead would show: a random number drawn, a parameter or buffer not put back, a gradient.
    records, logs = [], []
    settings = {"meta_epsilon": 0.0, "meta_constraint": constraint, "meta_input": "both"}
    for scheme, scheme_args in (("joint", None), ("l2w", {**settings, "meta_batch_size": meta_batch_size})):
        trainer = make_trainer(bert(), tmp_path, scheme, scheme_args, size=33, logging_steps=1, max_steps=7, **kwargs)
        records.append(Record())
        trainer.add_callback(records[-1])
        trainer.train()
        logs.append([(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry])
    assert len(records[0].steps) == 7
    for joint, weighted in zip(records[0].steps, records[1].steps, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(joint, weighted, strict=True))
    assert logs[0] == logs[1]


def test_weights_change_the_training_and_w_learns(tmp_path):
    joint, weighted = make_trainer(bert(), tmp_path, "joint"), make_trainer(bert(), tmp_path)
    before = copy.deepcopy(weighted.weight_network.state_dict())
    joint.train()
    weighted.train()
    assert any(
        not torch.equal(a, b) for a, b in zip(joint.model.parameters(), weighted.model.parameters(), strict=True)
    )
    assert all(not torch.equal(before[name], value) for name, value in weighted.weight_network.state_dict().items())


# At the checkpoint one of three meta batches of the second pass has been used, or two of three of the first one.
@pytest.mark.parametrize(
    "scheme_args",
    [{"meta_interval": 2}, {"meta_batch_size": 12}, {"meta_interval": 2, "meta_batch_size": 12}],
    ids=["halves", "second pass", "first pass"],
)
def test_resumed_is_uninterrupted(tmp_path, scheme_args):
    settings = {"save_strategy": "steps", "save_steps": 4, "max_steps": 9, "gradient_accumulation_steps": 2}
    settings["scheme_args"] = scheme_args
    whole = make_trainer(bert(), tmp_path / "whole", **settings)
    torch.rand(3, generator=whole.meta_generator)  # no longer where its seed puts it
    whole.train()
    resumed = make_trainer(bert(seed=9), tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert resumed.state.global_step == 9
    for part in ("model", "weight_network", "meta_optimizer"):
        pairs = zip(
            tensors_of(getattr(whole, part).state_dict()), tensors_of(getattr(resumed, part).state_dict()), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs), part
    assert whole.meta_scheduler.state_dict() == resumed.meta_scheduler.state_dict()
    assert torch.equal(whole.meta_generator.get_state(), resumed.meta_generator.get_state())


def test_a_checkpoint_without_weight_network_is_refused(tmp_path):
    make_trainer(bert(), tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    os.remove(tmp_path / "checkpoint-2" / "weight_network.pt")
    trainer = make_trainer(bert(), tmp_path, max_steps=4)
    with pytest.raises(ExitConfigurationError, match="--resume_from_checkpoint.*weight_network.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_looks_ahead_once_per_interval_on_the_first_micro_batch(tmp_path):
    trainer = make_trainer(
        bert(), tmp_path, scheme_args={"meta_interval": 3}, size=64, gradient_accumulation_steps=2, max_steps=7
    )
    seen, batches = [], []
    meta_step, training_step = trainer.meta_step, MetaWeightedExitTrainer.training_step

    def record(inputs):
        seen.append((trainer.state.global_step, len(batches)))
        meta_step(inputs)

    def count(model, inputs, num_items_in_batch=None):
        loss = training_step(trainer, model, inputs, num_items_in_batch)
        batches.append(1)
        return loss

    trainer.meta_step, trainer.training_step = record, count
    trainer.train()
    assert seen == [(0, 0), (3, 6), (6, 12)]
    assert trainer.meta_optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)  # cosine, all three used up


def test_a_batch_of_one_sample_trains_the_model_alone(tmp_path):
    # 7 samples, then 3, 2 or 1: one sample has no halves, so the network is trained and W rests.
    for size, expected in ((10, [0, 0, 1, 1]), (9, [0, 0, 1, 1]), (8, [0, 0])):
        trainer = make_trainer(bert(), tmp_path, size=size, per_device_train_batch_size=7, num_train_epochs=1)
        updates = []
        trainer.meta_optimizer.register_step_post_hook(
            lambda *_, trainer=trainer, updates=updates: updates.append(trainer.state.global_step)
        )
        trainer.train()
        assert trainer.state.global_step == 2
        assert updates == expected
    weights, gradient, _ = trainer.meta_gradient(text_batch(1, 0), text_batch(2, 1))
    assert weights.shape == gradient.shape == (1, 3) and gradient.isfinite().all()


def test_w_learns_from_soft_and_smoothed_labels(tmp_path):
    for kwargs, labels in (
        ({"label_smoothing_factor": 0.1}, torch.randint(0, NUM_LABELS, (8,))),
        ({}, torch.rand(8, NUM_LABELS).softmax(-1)),
    ):
        model = bert(problem_type="single_label_classification")
        trainer = warmed_up(model, tmp_path, [text_batch(8, 1)], **kwargs)
        before = copy.deepcopy(trainer.weight_network.state_dict())
        trainer.meta_step({**text_batch(8, 2), "labels": labels})
        assert any(not torch.equal(before[name], p) for name, p in trainer.weight_network.state_dict().items())


@pytest.mark.parametrize("method", ["directional", "forward", "exact"])
@pytest.mark.parametrize("batch_size", [3, 8])
def test_a_frozen_backbone_stays_under_l2w(tmp_path, batch_size, method):
    # One sample may be charged at the last exit, which is frozen: then the meta loss has no gradient.
    model = bert()
    model.newly_initialized = frozenset(name for name, _ in model.named_parameters() if name.startswith("exit_heads"))
    before = copy.deepcopy(model.state_dict())
    settings = {"freeze_backbone": True, "max_steps": 3, "per_device_train_batch_size": batch_size}
    make_trainer(model, tmp_path, scheme_args={"meta_gradient": method}, **settings).train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("exit_heads"), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["directional", "forward"])
def test_memory_is_flat_over_500_steps(tmp_path, method):
    """What breaks: a graph, a copy or a log entry is kept at every step.."""
    peaks = {}

    class Peaks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step in (100, 600):
                peaks[state.global_step] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    settings = {"max_steps": 600, "logging_strategy": "no", "per_device_train_batch_size": 4}
    trainer = make_trainer(bert(), tmp_path, scheme_args={"meta_gradient": method}, **settings)
    trainer.add_callback(Peaks())
    trainer.train()
    assert peaks[600] - peaks[100] < 5
