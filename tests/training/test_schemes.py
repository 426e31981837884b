"""Every registered scheme, on every architecture and problem, keeps what a user of `Trainer` counts on."""

import copy
import itertools

import factory
import numpy as np
import pytest
import torch
from factory import assert_same_weights, reads_text, tiny_model
from transformers import TrainerCallback

from een_hf.models import MODEL_CLASSES, ExitConfigurationError
from een_hf.training import EarlyExitTrainer, get_scheme
from een_hf.training.registry import scheme_names


NUM_LAYERS, NUM_ROWS = 3, 32
NUM_LABELS = {"single_label_classification": 3, "regression": 1, "multi_label_classification": 3}


class MostConfidentExitTrainer(EarlyExitTrainer):
    """A scheme from outside the package: each example has its largest weight at its most confident exit."""

    def check_model(self, model):
        super().check_model(model)
        if model.config.num_labels == 1:
            raise ExitConfigurationError("--method most_confident weights classification only.")

    def sample_weights(self, losses, exit_logits):
        confidences = exit_logits.softmax(-1).amax(-1)
        return confidences.size(1) * confidences / confidences.sum(1, keepdim=True)


DROPOUTS = (
    "hidden_dropout_prob attention_probs_dropout_prob dropout attention_dropout embedding_dropout mlp_dropout "
    "seq_classif_dropout drop_path_rate"
).split()
SCHEMES = [*scheme_names(), f"{__name__}:MostConfidentExitTrainer"]
# With the weight network at rest, micro-batches are weighted as the whole batch is. The second stage has no
# micro-batches, and its AdamW would make much of what rounding changes in the features of the first.
ACCUMULATION_SETTINGS = {"l2w": {"meta_learning_rate": 1e-30}, "two_stage": {"second_stage_learning_rate": 1e-30}}


def make_model(model_type, problem_type, dropout=0.1):
    rates = {name: dropout for name in DROPOUTS if hasattr(MODEL_CLASSES[model_type].config_class, name)}
    text = {"pad_token_id": 0} if reads_text(model_type) else {}
    labels = {"num_labels": NUM_LABELS[problem_type], "problem_type": problem_type}
    return tiny_model(model_type, num_hidden_layers=NUM_LAYERS, **rates, **text, **labels)


def make_rows(model_type, problem_type):
    generator = torch.Generator().manual_seed(7)
    if reads_text(model_type):
        features = {"input_ids": torch.randint(1, 60, (NUM_ROWS, 10), generator=generator)}
        features["attention_mask"] = torch.ones(NUM_ROWS, 10, dtype=torch.int64)
    else:
        features = {"pixel_values": torch.randn(NUM_ROWS, 3, 8, 8, generator=generator)}
    labels = {
        "single_label_classification": torch.randint(0, 3, (NUM_ROWS,), generator=generator),
        "regression": torch.randn(NUM_ROWS, generator=generator),
        "multi_label_classification": torch.randint(0, 2, (NUM_ROWS, 3), generator=generator).float(),
    }
    columns = {**features, "labels": labels[problem_type]}
    return [{name: column[row] for name, column in columns.items()} for row in range(NUM_ROWS)]


def make_trainer(scheme, model_type, problem_type, folder, dropout=0.1, scheme_settings=None, **settings):
    """A trainer of the scheme, or skip the test if the scheme refuses the problem before training."""
    arguments_class, rows = get_scheme(scheme).arguments_class, make_rows(model_type, problem_type)
    settings = {"per_device_train_batch_size": 8, "max_steps": 6, "learning_rate": 1e-2, **settings}
    settings |= {"scheme_args": arguments_class and arguments_class(**(scheme_settings or {})), "method": scheme}
    model = make_model(model_type, problem_type, dropout)
    try:
        return factory.make_trainer(folder, model, scheme, train_dataset=rows, eval_dataset=rows, **settings)
    except ExitConfigurationError as error:
        assert problem_type != "single_label_classification", f"{scheme} refuses classification: {error}"
        assert "--method" in str(error)
        pytest.skip(str(error))


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def _matrix():
    """All combinations; by default those that show each pair of scheme, problem, and text or images."""
    for place, scheme in enumerate(SCHEMES):
        text_and_images = ["bert", "vit"] if place % 2 else ["vit", "bert"]
        by_default = list(zip(text_and_images * 2, NUM_LABELS, strict=False))
        for model_type, problem_type in itertools.product(MODEL_CLASSES, NUM_LABELS):
            marks = () if (model_type, problem_type) in by_default else pytest.mark.slow
            yield pytest.param(scheme, model_type, problem_type, marks=marks)


pytestmark = pytest.mark.parametrize(("scheme", "model_type", "problem_type"), list(_matrix()))


def test_resumed_is_uninterrupted(scheme, model_type, problem_type, tmp_path):
    """With dropout, momentum and a schedule, a run that stops at step 3 and resumes ends at the same bits."""
    settings = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}
    whole = make_trainer(scheme, model_type, problem_type, tmp_path / "whole")
    whole.train()
    stopped = make_trainer(scheme, model_type, problem_type, tmp_path / "cut", **settings)
    stopped.add_callback(Stop(3))
    stopped.train()
    resumed = make_trainer(scheme, model_type, problem_type, tmp_path / "cut", **settings)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert_same_weights(resumed.model, whole.model)


def test_accumulation_changes_nothing(scheme, model_type, problem_type, tmp_path):
    """Without dropout, one step on 16 rows and one on 4 micro-batches of 4 rows move the parameters alike."""
    moved = []
    for size, accumulation in ((16, 1), (4, 4)):
        trainer = make_trainer(
            scheme,
            model_type,
            problem_type,
            tmp_path / str(size),
            dropout=0.0,
            scheme_settings=ACCUMULATION_SETTINGS.get(scheme),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            max_grad_norm=0,
        )
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        moved.append({name: tensor - before[name] for name, tensor in trainer.model.state_dict().items()})
    assert any(step.abs().max() > 1e-4 for step in moved[0].values())
    for name, step in moved[0].items():
        torch.testing.assert_close(moved[1][name], step, rtol=1e-4, atol=2e-7, msg=name)


def test_reloaded_predicts_the_same(scheme, model_type, problem_type, tmp_path):
    """The saved folder gives, in a new object, the predictions of every exit to the bit; training had an effect."""
    trainer = make_trainer(scheme, model_type, problem_type, tmp_path)
    # In two stages the labels teach the last exit alone.
    loss = f"eval_exit{NUM_LAYERS}_loss" if scheme == "two_stage" else "eval_loss"
    first = trainer.evaluate()[loss]
    trainer.train()
    trainer.save_model()
    assert trainer.evaluate()[loss] < first
    found = trainer.predict_exits(trainer.eval_dataset).predictions
    model = MODEL_CLASSES[model_type].from_pretrained(tmp_path).eval()
    columns = {name: torch.stack([row[name] for row in trainer.eval_dataset]) for name in trainer.eval_dataset[0]}
    with torch.no_grad():
        wanted = torch.cat([model(**batch).exit_logits for batch in _batches(columns)])
    assert found.shape == (NUM_ROWS, NUM_LAYERS, NUM_LABELS[problem_type])
    np.testing.assert_array_equal(found, wanted.numpy())


def _batches(columns, size=8):
    for start in range(0, NUM_ROWS, size):
        yield {name: column[start : start + size] for name, column in columns.items()}
