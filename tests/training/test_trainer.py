"""What all schemes share: the loss, the heads' learning rate, a frozen backbone, metrics; and a plain Trainer."""

import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from factory import QUIET, assert_same_weights, make_trainer, tiny_model, tiny_rows, tiny_stock_model
from sklearn.metrics import accuracy_score
from transformers import BertForSequenceClassification, Trainer, TrainingArguments

from een_hf.errors import NonFiniteLossError
from een_hf.evaluation import make_compute_metrics
from een_hf.models import EarlyExitBertForSequenceClassification, ExitConfigurationError
from een_hf.training import EarlyExitTrainer, JointExitTrainer, get_scheme


@pytest.fixture
def fine_tuned(tmp_path):
    """Folder of a stock classifier."""
    tiny_stock_model().save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


# Loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", ["uniform", "linear", "0.5,0,2"])
def test_the_loss_is_the_weighted_sum_over_exits(tmp_path, weights, smoothing):
    """In double precision, sample by sample: mean over samples, sum over exits."""
    trainer = make_trainer(tmp_path, tiny_model().eval(), exit_loss_weights=weights, label_smoothing_factor=smoothing)
    batch = {name: torch.stack([row[name] for row in tiny_rows()]) for name in ("input_ids", "labels")}
    with torch.no_grad():
        found, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    wanted_weights = {"uniform": [1, 1, 1], "linear": [1 / 3, 2 / 3, 1], "0.5,0,2": [0.5, 0, 2]}[weights]
    wanted = 0.0
    for logits, label in zip(outputs.exit_logits.double(), batch["labels"], strict=True):
        for weight, exit_ in zip(wanted_weights, logits, strict=True):
            loss = torch.nn.functional.cross_entropy(exit_[None], label[None], label_smoothing=smoothing)
            wanted += weight * loss.item() / len(batch["labels"])
    assert found.item() == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("weights", [["1", "2"], ["often"], ["0", "0", "0"], ["-1", "1", "1"]])
def test_weights_that_make_no_sense(tmp_path, weights):
    with pytest.raises(ExitConfigurationError, match="--exit_loss_weights"):
        make_trainer(tmp_path, exit_loss_weights=weights)


def test_the_loss_is_looked_at_after_the_backward_pass(tmp_path):
    """Before it, the device would wait for the host and the host for the device at every step."""
    rows = tiny_rows("vit")
    rows[0]["pixel_values"][:] = torch.nan
    trainer = make_trainer(tmp_path, tiny_model("vit"))
    trainer.train_dataset = rows
    with pytest.raises(NonFiniteLossError, match="not finite"):
        trainer.train()
    assert trainer.model.classifier.weight.grad is not None


def test_parameters_are_counted_once(tmp_path, monkeypatch):
    """At every step that takes milliseconds; what the run reports in the end is `Trainer`'s number."""
    trainer, calls = make_trainer(tmp_path, num_train_epochs=1), []
    count = trainer.model.num_parameters
    monkeypatch.setattr(trainer.model, "num_parameters", lambda **kwargs: calls.append(1) or count(**kwargs))
    batch = trainer.data_collator(tiny_rows())
    found = [trainer.floating_point_ops({"input_ids": batch["input_ids"][:, :length]}) for length in (8, 3)]
    assert len(calls) == 1
    assert found == [6 * 24 * length * count(exclude_embeddings=True) for length in (8, 3)]


# Learning rates


def rates(trainer):
    """Learning rate and weight decay of every parameter, by name."""
    optimizer = trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({}, 20e-4),
        ({"optim": "sgd"}, 1e-4),
        ({"head_learning_rate": 0.3}, 0.3),
        ({"optim": "adamw_torch_fused"}, 20e-4),
    ],
)
def test_new_heads_learn_faster_on_a_pretrained_backbone(fine_tuned, tmp_path, settings, rate):
    """New heads of a fine-tuned model are the early exits' alone; every parameter is in one group, decay as stock."""
    model = EarlyExitBertForSequenceClassification.from_pretrained(fine_tuned)
    trainer = make_trainer(tmp_path, model, learning_rate=1e-4, weight_decay=0.1, **settings)
    found = rates(trainer)
    assert set(found) == {name for name, _ in model.named_parameters()}
    stock = Trainer(
        model=BertForSequenceClassification.from_pretrained(fine_tuned),
        args=TrainingArguments(str(tmp_path), learning_rate=1e-4, weight_decay=0.1, **QUIET),
    )
    for name, wanted in rates(stock).items():
        assert found[name] == wanted
    for name in found.keys() - rates(stock).keys():
        assert name.startswith("exit_heads.")
        assert found[name] == (pytest.approx(rate), 0.0 if "bias" in name else 0.1)


def test_heads_that_were_new_stay_so_where_a_checkpoint_is_resumed(fine_tuned, tmp_path):
    """What breaks: the weights of a checkpoint are complete, so that its heads go on at the backbone's rate."""
    model = EarlyExitBertForSequenceClassification.from_pretrained(fine_tuned)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "lr_scheduler_type": "constant"}
    trainer = make_trainer(tmp_path / "run", model, **settings)
    trainer.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    resumed = make_trainer(
        tmp_path / "run", EarlyExitBertForSequenceClassification.from_pretrained(checkpoint), **settings
    )
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert rates(resumed) == rates(trainer) and len({rate for rate, _ in rates(resumed).values()}) == 2
    assert_same_weights(resumed.model, model)


def test_one_rate_for_a_model_from_tiny_model(tmp_path):
    assert {rate for rate, _ in rates(make_trainer(tmp_path, learning_rate=1e-3)).values()} == {1e-3}


# Frozen backbone


def test_a_frozen_backbone_stays_to_the_bit(fine_tuned, tmp_path):
    """Training changes exits 1..K-1 and nothing else, and dropout of the backbone is off."""
    model = EarlyExitBertForSequenceClassification.from_pretrained(fine_tuned)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stock = BertForSequenceClassification.from_pretrained(fine_tuned).eval()
    trainer = make_trainer(tmp_path, model, freeze_backbone=True, head_learning_rate=0.1, max_steps=3)
    seen = []
    model.bert.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda module, _: seen.append(module.training))
    trainer.train()
    assert seen and not any(seen)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != name.startswith("exit_heads."), name
    ids = torch.stack([row["input_ids"] for row in tiny_rows()])
    with torch.no_grad():
        difference = model.eval()(ids, early_exit=False).logits - stock(ids).logits
    assert difference.abs().max() <= 1e-6


@pytest.mark.parametrize("scheme", ["boosted", "joint"])
def test_freezing_what_cannot_be_frozen(fine_tuned, tmp_path, scheme):
    """Boosting changes what exit K predicts; without a fine-tuned head there is nothing to keep."""
    model = EarlyExitBertForSequenceClassification.from_pretrained(fine_tuned) if scheme == "boosted" else tiny_model()
    with pytest.raises(ExitConfigurationError):
        make_trainer(tmp_path, model, scheme, freeze_backbone=True)


def test_a_boosted_model_cannot_be_frozen_as_a_plain_one(fine_tuned, tmp_path):
    """`joint` drops the boosted sum and so changes what the last exit says, which the flag promises to keep."""
    make_trainer(tmp_path, scheme="boosted").save_model(str(tmp_path / "boosted"))
    model = EarlyExitBertForSequenceClassification.from_pretrained(tmp_path / "boosted")
    with pytest.raises(ExitConfigurationError, match="--freeze_backbone keeps"):
        make_trainer(tmp_path, model, "joint", freeze_backbone=True)


# Evaluation


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_metrics_of_every_exit(tmp_path, kind):
    """On the whole split, row by row, also when a policy is set: evaluation never exits early."""
    model = tiny_model(kind).eval()
    metrics = make_compute_metrics(["accuracy"], "single_label_classification")
    trainer = make_trainer(tmp_path, model, compute_metrics=metrics, per_device_eval_batch_size=5)
    model.set_exit_policy({"criterion": "confidence", "thresholds": [0.0, 0.0, 0.0]})
    found = trainer.evaluate()
    rows, guesses, losses = tiny_rows(kind), [], []
    for row in rows:
        features = {name: value[None] for name, value in row.items() if name != "labels"}
        with torch.no_grad():
            logits = model(**features, early_exit=False).exit_logits[0].double()
        guesses.append(logits.argmax(-1).tolist())
        losses.append([torch.nn.functional.cross_entropy(e[None], row["labels"][None]).item() for e in logits])
    labels = [int(row["labels"]) for row in rows]
    for k in range(3):
        assert found[f"eval_exit{k + 1}_accuracy"] == accuracy_score(labels, [guess[k] for guess in guesses])
        assert found[f"eval_exit{k + 1}_loss"] == pytest.approx(np.mean([loss[k] for loss in losses]), abs=1e-5)
    assert found["eval_accuracy"] == found["eval_exit3_accuracy"]
    assert found["eval_loss"] == pytest.approx(np.mean([sum(loss) for loss in losses]), abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_a_plain_trainer_with_ordinary_metrics(tmp_path, kind):
    """People's `compute_metrics` sees (rows, labels) logits of the last exit, and `loss` trains every exit."""
    model, rows, shapes = tiny_model(kind), tiny_rows(kind), []

    def compute_metrics(prediction):
        shapes.append(np.shape(prediction.predictions))
        return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}

    args = TrainingArguments(str(tmp_path), max_steps=30, learning_rate=1e-2, **QUIET)
    trainer = Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows, compute_metrics=compute_metrics)
    before = trainer.evaluate()
    heads = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith("exit_heads")}
    trainer.train()
    after = trainer.evaluate()
    assert shapes[0] == (24, 3)
    assert after["eval_loss"] < before["eval_loss"] and after["eval_accuracy"] > 0.8
    assert all(not torch.equal(model.state_dict()[name], tensor) for name, tensor in heads.items() if "weight" in name)


def test_stock_arguments_are_answered_with_a_sentence(tmp_path):
    with pytest.raises(ExitConfigurationError, match="needs EarlyExitTrainingArguments.*not TrainingArguments"):
        JointExitTrainer(model=tiny_model(), args=TrainingArguments(str(tmp_path), **QUIET), train_dataset=tiny_rows())


def test_a_model_without_exits_is_refused(tmp_path):
    with pytest.raises(ExitConfigurationError, match="needs an early-exit model, not BertForSequenceClassification"):
        JointExitTrainer(model=tiny_stock_model())


def test_a_batch_without_labels_is_named(tmp_path):
    trainer = make_trainer(tmp_path)
    with pytest.raises(ExitConfigurationError, match="needs `labels`.*input_ids"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.ones(2, 3, dtype=torch.int64)})


# Prediction


def test_predictions_are_made_in_the_precision_of_the_evaluation(tmp_path):
    """Thresholds are calibrated under --bf16; answers in float32 would exit at other exits than these promise."""
    model = tiny_model(initializer_range=0.5)
    with torch.no_grad():
        plain = model.eval()(torch.stack([row["input_ids"] for row in tiny_rows()])).logits.numpy()
    trainer = make_trainer(tmp_path, model, bf16=True, per_device_eval_batch_size=8)
    every = trainer.predict_exits(trainer.eval_dataset).predictions
    assert np.abs(every[:, -1] - plain).max() > 1e-4  # bfloat16 shows
    assert np.array_equal(trainer.predict(trainer.eval_dataset).predictions, every[:, -1])


@pytest.mark.parametrize("column", ["labels", "label"])
def test_prediction_finds_labels_under_the_names_that_collators_know(tmp_path, column):
    """`label` is what most data sets call it; predict would report no metric."""
    rows = {"input_ids": [row["input_ids"].tolist() for row in tiny_rows()]}
    labels = [int(row["labels"]) for row in tiny_rows()]
    metrics = make_compute_metrics(["accuracy"], "single_label_classification")
    trainer = make_trainer(tmp_path, compute_metrics=metrics)
    found = trainer.predict(datasets.Dataset.from_dict({**rows, column: labels}))
    assert found.label_ids.tolist() == labels
    assert found.metrics["test_accuracy"] == accuracy_score(labels, found.predictions.argmax(-1))


def test_a_run_resumes_from_the_checkpoint_that_the_model_came_from(fine_tuned, tmp_path):
    """Loaded from it, no head is new any more; the optimizer's groups must be those of the interrupted run."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = make_trainer(
        tmp_path / "run", EarlyExitBertForSequenceClassification.from_pretrained(fine_tuned), **settings
    )
    whole.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    model = EarlyExitBertForSequenceClassification.from_pretrained(checkpoint)
    again = make_trainer(tmp_path / "again", model, **settings)
    again.train(resume_from_checkpoint=checkpoint)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_base_is_joint():
    assert get_scheme("base") is get_scheme("joint") is JointExitTrainer


def test_a_scheme_needs_no_registration_in_python(tmp_path):
    """A subclass that only weighs losses must train as it is; one of a scheme must count as that scheme."""

    class OfItsOwn(EarlyExitTrainer):
        pass

    class OfJoint(JointExitTrainer):
        pass

    for trainer_class, method in ((OfItsOwn, f"{__name__}:{OfItsOwn.__qualname__}"), (OfJoint, "joint")):
        trainer = make_trainer(tmp_path, scheme=trainer_class, max_steps=1)
        trainer.train()
        assert trainer.model.config.training_scheme == method


def test_training_needs_no_packages_of_data_sets():
    """What breaks: schemes cannot be trained or measured where `datasets` and `evaluate` are not installed."""
    code = (
        "import importlib.machinery as machinery\n"
        "find = machinery.PathFinder.find_spec\n"
        "machinery.PathFinder.find_spec = staticmethod(\n"
        "    lambda name, *args: None if name.split('.')[0] in ('datasets', 'evaluate') else find(name, *args)\n"
        ")\n"
        "import een_hf.training"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
