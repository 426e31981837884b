"""Every argument of transformers' `Trainer`: honoured for each exit, refused by name, or none of our concern."""

import dataclasses
import functools
import inspect
from pathlib import Path

import datasets
import factory
import numpy as np
import pytest
import torch
from factory import NO_DROPOUT, QUIET, tiny_model, tiny_rows, tiny_stock_model
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoTokenizer, EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from een_hf.evaluation import make_compute_metrics
from een_hf.models import EarlyExitBertForSequenceClassification, ExitConfigurationError
from een_hf.training import EarlyExitTrainingArguments
from een_hf.training.losses import class_weights


make_trainer = functools.partial(factory.make_trainer, max_steps=2)
ACCURACY = make_compute_metrics(["accuracy"], "single_label_classification")

# Refused: the value that is.
REFUSED = {
    "batch_eval_metrics": True,
    "eval_do_concat_batches": False,
    "prediction_loss_only": True,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_liger_kernel": True,
    "label_names": ["target"],
}
# Honoured: the test that shows it, here or in the named file.
HONOURED = {
    "model": "test_trainer: test_the_loss_is_the_weighted_sum_over_exits",
    "args": "test_trainer: test_the_loss_is_the_weighted_sum_over_exits",
    "data_collator": "test_resume: test_one_process",
    "train_dataset": "test_sampling: test_rows_that_end_by_their_length_alone",
    "eval_dataset": "test_trainer: test_metrics_of_every_exit",
    "processing_class": "test_a_tokenizer_pads_batches_and_is_saved",
    "model_init": "test_a_model_for_each_training",
    "compute_loss_func": "test_a_loss_function_is_called_for_each_exit",
    "compute_metrics": "test_trainer: test_metrics_of_every_exit",
    "callbacks": "test_early_stopping_at_one_exit",
    "optimizers": "test_an_optimizer_of_ones_own",
    "optimizer_cls_and_kwargs": "test_new_heads_follow_the_rate_of_an_optimizer_class",
    "preprocess_logits_for_metrics": "test_metrics_get_what_they_ask_for",
    "include_for_metrics": "test_metrics_get_what_they_ask_for",
    "label_smoothing_factor": "test_trainer: test_the_loss_is_the_weighted_sum_over_exits",
    "average_tokens_across_devices": "test_a_loss_function_is_called_for_each_exit",
    "logging_nan_inf_filter": "test_losses: test_a_loss_that_is_not_finite_stops_the_run",
    "metric_for_best_model": "test_the_best_model_by_one_exit",
    "greater_is_better": "test_the_best_model_by_one_exit",
    "load_best_model_at_end": "test_the_best_model_by_one_exit",
    "train_sampling_strategy": "test_sampling: test_a_trainer_groups_texts_where_asked",
    "length_column_name": "test_sampling: test_a_trainer_groups_texts_where_asked",
    "neftune_noise_alpha": "test_noise_on_embeddings_reaches_every_exit",
    "resume_from_checkpoint": "test_interruption: test_naming_a_half_written_checkpoint_is_an_error",
    "save_only_model": "test_interruption: test_weights_alone_are_nothing_to_go_on_from",
    "dataloader_drop_last": "test_evaluation_drops_no_row",
    "optim_args": "test_arguments_that_an_optimizer_leaves_unread_are_refused",
    "bf16": "test_trainer: test_predictions_are_made_in_the_precision_of_the_evaluation",
}
# Not concerned: what `Trainer` does alone, before, after or around our code; a value under which training, evaluation
# and prediction are tried, or None where that takes a device, an account or a package that is not here.
NOT_CONCERNED = {
    "output_dir": None,
    "per_device_train_batch_size": 5,
    "num_train_epochs": 1.5,
    "max_steps": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {},
    "warmup_steps": 0.5,
    "optim": "adafactor",
    "weight_decay": 0.1,
    "adam_beta1": 0.8,
    "adam_beta2": 0.99,
    "adam_epsilon": 1e-6,
    "optim_target_modules": None,
    "gradient_accumulation_steps": 2,
    "max_grad_norm": 0.5,
    "fp16": None,
    "tf32": None,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"use_reentrant": False},
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "torch_compile": None,
    "torch_compile_backend": None,
    "torch_compile_mode": None,
    "liger_kernel_config": None,
    "use_cache": True,
    "torch_empty_cache_steps": 1,
    "auto_find_batch_size": True,
    "logging_strategy": "no",
    "logging_steps": 1,
    "logging_first_step": True,
    "log_on_each_node": False,
    "include_num_input_tokens_seen": "all",
    "log_level": "error",
    "log_level_replica": "error",
    "disable_tqdm": None,
    "report_to": None,
    "run_name": "run",
    "project": "project",
    "trackio_space_id": None,
    "trackio_bucket_id": None,
    "trackio_static_space_id": None,
    "eval_strategy": "epoch",
    "eval_steps": 1,
    "eval_delay": 1,
    "per_device_eval_batch_size": 5,
    "eval_on_start": True,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 1,
    "save_strategy": "epoch",
    "save_steps": 1,
    "save_on_each_node": True,
    "save_total_limit": 1,
    "enable_jit_checkpoint": None,
    "push_to_hub": None,
    "hub_token": None,
    "hub_private_repo": None,
    "hub_model_id": None,
    "hub_strategy": None,
    "hub_always_push": None,
    "hub_revision": None,
    "ignore_data_skip": True,
    "restore_callback_states_from_checkpoint": True,
    "full_determinism": None,
    "seed": 1,
    "data_seed": 1,
    "use_cpu": None,
    "accelerator_config": {"use_seedable_sampler": False},
    "parallelism_config": None,
    "dataloader_num_workers": None,
    "dataloader_pin_memory": False,
    "dataloader_persistent_workers": None,
    "dataloader_prefetch_factor": None,
    "dataloader_multiprocessing_context": None,
    "dataloader_in_order": False,
    "remove_unused_columns": False,
    "ddp_find_unused_parameters": None,
    "ddp_bucket_cap_mb": None,
    "ddp_broadcast_buffers": None,
    "ddp_static_graph": None,
    "ddp_backend": None,
    "ddp_timeout": None,
    "fsdp": None,
    "fsdp_config": None,
    "deepspeed": None,
    "debug": "underflow_overflow",
    "skip_memory_metrics": None,
    "do_train": True,
    "do_eval": True,
    "do_predict": True,
    "local_rank": None,
}


# The table


def test_the_table_is_complete():
    """What breaks: an argument of the installed transformers that is taken and ignored without a word."""
    arguments = {field.name for field in dataclasses.fields(TrainingArguments)}
    known = set(inspect.signature(Trainer.__init__).parameters) - {"self"} | arguments
    parts = (REFUSED, HONOURED, NOT_CONCERNED)
    assert sorted(known - {name for part in parts for name in part}) == []
    assert sum(map(len, parts)) == len({name for part in parts for name in part}), "an argument is listed twice"
    for test in HONOURED.values():
        file, _, name = test.rpartition(": ")
        source = Path(__file__).with_name(f"{file}.py") if file else Path(__file__)
        assert f"def {name}(" in source.read_text(), test


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, name):
    with pytest.raises(ExitConfigurationError, match=f"--{name}"):
        make_trainer(tmp_path, **{name: REFUSED[name]})


TRIED = [name for name, value in NOT_CONCERNED.items() if value is not None]
# What would change what another of them does; the others are tried together.
ALONE = [
    "optim",
    "logging_strategy",
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "save_strategy",
    "auto_find_batch_size",
    "debug",
    "activation_checkpointing",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
]
# What they need beside them.
BESIDE = {
    "eval_steps": {"eval_strategy": "steps"},
    "eval_delay": {"eval_strategy": "epoch"},
    "save_steps": {"save_strategy": "steps"},
    "activation_checkpointing_kwargs": {"activation_checkpointing": True},
    "gradient_checkpointing_kwargs": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("names", [[name] for name in ALONE] + [[name for name in TRIED if name not in ALONE]])
def test_the_others_leave_exits_as_they_are(tmp_path, names):
    """Training, evaluation and prediction run through, with the metrics of every exit."""
    settings = {}
    for name in names:
        if name in TrainingArguments.__dataclass_fields__:
            settings |= {**BESIDE.get(name, {}), name: NOT_CONCERNED[name]}
    trainer = make_trainer(tmp_path, compute_metrics=ACCURACY, **settings)
    trainer.train()
    found = trainer.evaluate()
    assert all(f"eval_exit{k}_accuracy" in found for k in (1, 2, 3))
    answers, exits = trainer.predict(trainer.eval_dataset), trainer.predict_exits(trainer.eval_dataset)
    assert answers.metrics["test_accuracy"] == found["eval_exit3_accuracy"]
    np.testing.assert_allclose(answers.predictions, exits.predictions[:, -1], atol=1e-5)


# The honoured ones


def mean_loss(outputs, labels, num_items_in_batch=None):
    """As people write it for `Trainer`: the examples of all micro-batches divide."""
    summed = torch.nn.functional.cross_entropy(outputs.logits, labels, reduction="sum")
    return 3 * summed / num_items_in_batch


@pytest.mark.skipif(is_torch_bf16_gpu_available(), reason="this machine has an accelerator with bfloat16")
def test_bf16_without_an_accelerator_names_the_flags(tmp_path):
    """What breaks: on a machine without a GPU, a recipe for one ends in words that are no flags."""
    with pytest.raises(ExitConfigurationError, match="--bf16 false, or --use_cpu"):
        EarlyExitTrainingArguments(tmp_path, bf16=True)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_loss_function_is_called_for_each_exit(tmp_path, accumulation):
    """With one exit the weights equal those of a stock model under `Trainer`; with three the losses add up."""
    settings = {**QUIET, "max_steps": 3}
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
    settings |= {"learning_rate": 0.1, "logging_steps": 1}
    stock = tiny_stock_model(**NO_DROPOUT)
    stock.save_pretrained(tmp_path / "stock")
    model = EarlyExitBertForSequenceClassification.from_pretrained(tmp_path / "stock", exit_layers=[3])
    trainers = [
        Trainer(
            model=stock,
            args=TrainingArguments(str(tmp_path), **settings),
            train_dataset=tiny_rows(),
            compute_loss_func=mean_loss,
        ),
        make_trainer(tmp_path, model, compute_loss_func=mean_loss, **settings),
    ]
    for trainer in trainers:
        trainer.train()
    trained = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, trained[name], atol=1e-6, rtol=1e-5, msg=name)
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in trainers]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)

    three = make_trainer(tmp_path, tiny_model(**NO_DROPOUT), compute_loss_func=mean_loss, **settings)
    three.train()
    log = next(log for log in three.state.log_history if "loss" in log)
    assert log["loss"] == pytest.approx(sum(log[f"exit{k}_loss"] for k in (1, 2, 3)), rel=1e-4)
    found = three.evaluate()
    assert found["eval_loss"] == pytest.approx(sum(found[f"eval_exit{k}_loss"] for k in (1, 2, 3)), rel=1e-4)


@pytest.mark.parametrize(
    ("scheme", "settings", "named"),
    [
        ("l2w", {}, "compute_loss_func.*--method l2w"),
        ("joint", {"class_weights": "balanced"}, "--class_weights"),
        ("joint", {"label_smoothing_factor": 0.1}, "--label_smoothing_factor"),
    ],
)
def test_what_a_loss_function_does_not_go_with(tmp_path, scheme, settings, named):
    with pytest.raises(ExitConfigurationError, match=named):
        make_trainer(tmp_path, scheme=scheme, compute_loss_func=mean_loss, **settings)


@pytest.mark.parametrize("policy", [None, {"criterion": "confidence", "thresholds": [0.0, 0.0, 0.0]}])
def test_metrics_get_what_they_ask_for(tmp_path, policy):
    """The inputs, each example's own loss at that exit, and logits of that exit as `preprocess` made them."""
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"share": float((prediction.predictions == prediction.label_ids).mean())}

    shapes = []

    def preprocess(logits, labels):
        shapes.append((tuple(logits.shape), tuple(labels.shape)))
        return logits.argmax(-1)

    trainer = make_trainer(
        tmp_path,
        compute_metrics=metrics,
        preprocess_logits_for_metrics=preprocess,
        include_for_metrics=["inputs", "loss"],
    )
    rows = tiny_rows()
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    with torch.no_grad():
        exit_logits = trainer.model.eval()(ids, early_exit=False).exit_logits
    trainer.model.set_exit_policy(policy)
    found = trainer.evaluate()
    assert shapes == 3 * [((24, 3), (24,))]
    answers = trainer.predict(rows)
    chosen = exit_logits[:, -1 if policy is None else 0]
    for prediction, logits in zip(seen, [*exit_logits.unbind(1), chosen], strict=True):
        assert np.array_equal(prediction.predictions, logits.argmax(-1)) and np.array_equal(prediction.inputs, ids)
        losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
        np.testing.assert_allclose(prediction.losses, losses, atol=1e-5)
    for k in range(3):
        assert found[f"eval_exit{k + 1}_share"] == (exit_logits[:, k].argmax(-1) == labels).double().mean()
    assert answers.metrics["test_share"] == (chosen.argmax(-1) == labels).double().mean()
    report = trainer.calibrate(rows, target_cost=0.8)
    assert report.policy is not None  # calibrated on logits, not on what metrics are given
    timed = trainer.calibrate(rows, cost="latency", latency_batch_size=2, target_cost=100.0)
    assert timed.relative_cost == 1.0 and len(timed.policy.thresholds) == 3


@pytest.mark.parametrize("scheme", ["joint", "l2w"])
def test_a_model_for_each_training(tmp_path, scheme):
    """`model_init` takes the place of `model`, and each training starts from a new one."""
    made = []

    def model_init():
        made.append(tiny_model(**NO_DROPOUT))
        return made[-1]

    settings = {"learning_rate": 1e-2, "train_sampling_strategy": "sequential", "no_cuda_graphs": True}
    trainer = make_trainer(tmp_path, scheme=scheme, model_init=model_init, **settings)
    given = make_trainer(tmp_path, tiny_model(**NO_DROPOUT), scheme, **settings)
    for attempt in (trainer, trainer, given):
        attempt.train()
    assert len(made) == 3 and not any(model.cuda_graphs for model in made)
    for one, other, wanted in zip(*(model.parameters() for model in (*made[1:], given.model)), strict=True):
        assert torch.equal(one, other) and torch.equal(one, wanted)
    with pytest.raises(ExitConfigurationError, match="needs an early-exit model, not BertForSequenceClassification"):
        make_trainer(tmp_path, model_init=lambda: tiny_stock_model())


@pytest.mark.parametrize("scheme", ["joint", "l2w"])
def test_hyperparameter_search(tmp_path, scheme):
    """Each trial has its own arguments, and its own number of exits."""
    pytest.importorskip("optuna")
    counts = []

    def model_init(trial):
        layers = [3] if trial is None else [1, 3] if trial.number else [1, 2, 3]
        model = tiny_model(exit_layers=layers)
        model.register_forward_hook(lambda module, _, __: counts.append(module.num_exits))
        return model

    trainer = make_trainer(
        tmp_path, scheme=scheme, model_init=model_init, compute_metrics=ACCURACY, eval_strategy="epoch", max_steps=2
    )

    def space(trial):
        return {
            "learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3),
            "exit_loss_weights": ["linear"] if trial.number else [1, 2, 3],
        }

    best = trainer.hyperparameter_search(space, lambda metrics: metrics["eval_exit1_accuracy"], n_trials=2)
    assert best.run_id in ("0", "1") and set(counts) == {2, 3}
    assert trainer.exit_loss_weights.tolist() == [0.5, 1.0]


def test_early_stopping_at_one_exit(tmp_path):
    """Exit 1 learns nothing at rate 0, so that the run ends after the first epoch without improvement."""
    stop = EarlyStoppingCallback(early_stopping_patience=1)
    settings = {"eval_strategy": "epoch", "metric_for_best_model": "eval_exit1_loss", "learning_rate": 0.0}
    trainer = make_trainer(tmp_path, callbacks=[stop], max_steps=-1, num_train_epochs=5, **settings)
    trainer.train()
    assert trainer.state.epoch == 2


@pytest.mark.parametrize(
    ("metric", "metrics", "named"),
    [
        ("eval_exit3_accuracy", None, "compute_metrics"),
        ("accuracy", None, "eval_exit1_loss to eval_exit3_loss"),
        ("exit4_loss", None, "exits 1 to 3"),
        ("exit4_accuracy", ACCURACY, "exits 1 to 3"),
    ],
)
def test_a_metric_that_no_evaluation_gives(tmp_path, metric, metrics, named):
    """What breaks: the run fails after its first epoch, or early stopping is switched off by a warning."""
    with pytest.raises(ExitConfigurationError, match=f"--metric_for_best_model {metric}.*{named}"):
        make_trainer(tmp_path, metric_for_best_model=metric, compute_metrics=metrics, eval_strategy="epoch")


def test_the_best_model_by_one_exit(tmp_path):
    """The weights that are left are those of the step at which exit 2 was best, not the last ones."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 6}
    trainer = make_trainer(
        tmp_path,
        load_best_model_at_end=True,
        metric_for_best_model="exit2_loss",
        learning_rate=0.05,
        lr_scheduler_type="constant",
        **settings,
    )

    class Worsen(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups if state.global_step == 4 else ():
                group["lr"] = 1.0

    trainer.add_callback(Worsen())
    assert trainer.args.greater_is_better is False
    trainer.train()
    losses = [log["eval_exit2_loss"] for log in trainer.state.log_history if "eval_exit2_loss" in log]
    assert trainer.state.best_metric == min(losses) != losses[-1]
    assert trainer.evaluate()["eval_exit2_loss"] == pytest.approx(min(losses), abs=1e-6)


def test_an_optimizer_of_ones_own(tmp_path):
    """It is used as it is; what cannot reach it is refused."""
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    trainer = make_trainer(tmp_path, model, optimizers=(optimizer, schedule))
    trainer.train()
    assert trainer.optimizer.optimizer is optimizer and optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(ExitConfigurationError, match="--head_learning_rate"):
        make_trainer(tmp_path, model, optimizers=(optimizer, None), head_learning_rate=0.1)
    with pytest.raises(ExitConfigurationError, match="--lr_milestones"):
        make_trainer(tmp_path, model, optimizers=(optimizer, schedule), lr_milestones=[0.5])


@pytest.mark.parametrize(("kind", "factor"), [(torch.optim.AdamW, 20), (torch.optim.SGD, 1)])
def test_new_heads_follow_the_rate_of_an_optimizer_class(tmp_path, kind, factor):
    """What breaks: heads take their rate from --learning_rate and --optim, which such a run does not use."""
    tiny_stock_model().save_pretrained(tmp_path / "stock")
    model = EarlyExitBertForSequenceClassification.from_pretrained(tmp_path / "stock")
    trainer = make_trainer(tmp_path, model, optimizer_cls_and_kwargs=(kind, {"lr": 0.01}))
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups}
    assert sorted(rates) == pytest.approx(sorted({0.01, 0.01 * factor}))


@pytest.mark.parametrize(
    ("optim", "given", "wrong"),
    [
        ("sgd", "momentum=0.5, dampening=0.25", None),
        ("sgd", "momentum=0.5, foo=1", "foo"),
        ("adamw_torch", "amsgrad=True", "amsgrad"),
        ("adafactor", "beta3=0.1", "beta3"),
    ],
)
def test_arguments_that_an_optimizer_leaves_unread_are_refused(optim, given, wrong, tmp_path):
    """What breaks: a run with a misspelt `--optim_args` trains by the defaults and says nothing."""
    trainer = make_trainer(tmp_path, optim=optim, optim_args=given)
    if wrong is None:
        assert all((g["momentum"], g["dampening"]) == (0.5, 0.25) for g in trainer.create_optimizer().param_groups)
        return
    with pytest.raises(
        ExitConfigurationError, match=f"--optim_args {given}: --optim {optim} has no use for '{wrong}'"
    ):
        trainer.train()


def test_noise_on_embeddings_reaches_every_exit(tmp_path):
    losses = []
    for alpha in (None, 50.0):
        model = tiny_model(**NO_DROPOUT, initializer_range=0.5)
        trainer = make_trainer(tmp_path, model, neftune_noise_alpha=alpha, logging_steps=1)
        trainer.train()
        log = trainer.state.log_history[0]
        losses.append([log[f"exit{k}_loss"] for k in (1, 2, 3)])
    assert all(abs(one - other) > 1e-2 for one, other in zip(*losses, strict=True))


def test_evaluation_drops_no_row(tmp_path):
    """What breaks: the last rows of the evaluation split count in no metric, and predictions lack them."""
    settings = {"dataloader_drop_last": True, "per_device_eval_batch_size": 5, "per_device_train_batch_size": 5}
    trainer = make_trainer(tmp_path, compute_metrics=ACCURACY, max_steps=-1, num_train_epochs=1, **settings)
    trainer.train()
    assert trainer.state.global_step == 4  # the last 4 of 24 rows make no batch of 5
    exits = trainer.predict_exits(trainer.eval_dataset)
    assert exits.label_ids.tolist() == [int(row["labels"]) for row in trainer.eval_dataset]
    right = (exits.predictions[:, -1].argmax(-1) == exits.label_ids).mean()
    assert trainer.evaluate()["eval_accuracy"] == exits.metrics["test_accuracy"] == right
    assert len(trainer.get_train_dataloader()) == 4


def test_a_tokenizer_pads_batches_and_is_saved(tmp_path, minilm_path):
    rows = [{"input_ids": [1] * length, "labels": length % 3} for length in range(3, 11)]
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    trainer = make_trainer(tmp_path, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert len(trainer.predict(rows).predictions) == len(trainer.predict_exits(rows).predictions) == 8
    trainer.save_model(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").get_vocab() == tokenizer.get_vocab()


@pytest.mark.parametrize("metric", ["eval_long_exit1_loss", "long_exit3_loss"])
def test_the_best_model_by_one_exit_on_one_of_several_sets(tmp_path, metric):
    rows = tiny_rows()
    sets = {"short": rows[:8], "long": rows}
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": metric, "greater_is_better": False}
    trainer = make_trainer(tmp_path, train_dataset=rows, eval_dataset=sets, **settings)
    trainer.train()
    assert trainer.state.best_metric is not None


class Predicted(TrainerCallback):
    def on_predict(self, args, state, control, metrics, **kwargs):
        self.metrics = metrics


def test_prediction_is_told_to_callbacks(tmp_path):
    callback = Predicted()
    trainer = make_trainer(tmp_path, compute_metrics=ACCURACY, callbacks=[callback])
    assert trainer.predict(trainer.eval_dataset).metrics == callback.metrics


# Class weights


@pytest.mark.parametrize("kind", [list, datasets.Dataset.from_list])
@pytest.mark.parametrize("scheme", ["joint", "boosted", "l2w"])
def test_class_weights_in_every_scheme(tmp_path, scheme, kind):
    """Each example's loss is the weight of its class times its cross-entropy, in training alone."""
    labels = [0] * 20 + [1] * 3 + [2]
    rows = [{"input_ids": row["input_ids"].tolist(), "labels": y} for row, y in zip(tiny_rows(), labels, strict=True)]
    model = tiny_model(**NO_DROPOUT)
    trainer = make_trainer(tmp_path, model, scheme, class_weights="balanced", train_dataset=kind(rows))
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(trainer.class_weights, wanted, rtol=1e-6)
    logits, targets = torch.randn(24, 3, 3), torch.tensor(labels)
    plain = torch.stack([torch.nn.functional.cross_entropy(e, targets, reduction="none") for e in logits.unbind(1)], 1)
    trainer.model.train()
    weighted = torch.tensor(wanted[labels], dtype=torch.float32)[:, None] * plain
    torch.testing.assert_close(trainer.losses_of(logits, targets), weighted)
    soft = torch.nn.functional.one_hot(targets, 3).float()
    torch.testing.assert_close(trainer.losses_of(logits, soft), weighted)
    trainer.model.eval()
    torch.testing.assert_close(trainer.losses_of(logits, targets), plain)
    trainer.train()


def test_balanced_weights_where_a_class_does_not_occur():
    """What breaks: the others weigh less than 1 on average, so that the loss and its learning rate shrink."""
    labels = [0] * 6 + [1] * 2 + [3] * 4
    wanted = compute_class_weight("balanced", classes=np.unique(labels), y=labels)
    found = class_weights("balanced", 5, [{"labels": label} for label in labels])
    np.testing.assert_allclose(found[[0, 1, 3]], wanted, rtol=1e-6)


def test_class_weights_do_not_weigh_predictions(tmp_path):
    """What breaks: after training, prediction gives metrics weighted losses, evaluation plain ones."""
    seen = []

    def metrics(prediction):
        seen.append(prediction.losses)
        return {"loss_of_all": float(prediction.losses.mean())}

    settings = {"class_weights": ["5", "1", "2"], "include_for_metrics": ["loss"], "max_steps": 1}
    trainer = make_trainer(tmp_path, tiny_model(**NO_DROPOUT), compute_metrics=metrics, **settings)
    trainer.train()
    predicted = trainer.predict(trainer.eval_dataset).metrics["test_loss_of_all"]
    assert predicted == pytest.approx(trainer.evaluate()["eval_loss_of_all"], abs=1e-5)


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        (["1", "2"], "2 numbers"),
        (["rare"], "balanced"),
        (["1", "nan", "1"], "finite"),
        (["1", "1e39", "1"], "finite"),
        (["1e-50", "0", "0"], "not all zero"),
        (["0", "0", "0"], "not all zero"),
        (["-1", "1", "1"], "not negative"),
    ],
)
def test_class_weights_that_make_no_sense(tmp_path, weights, named):
    with pytest.raises(ExitConfigurationError, match=f"--class_weights.*{named}"):
        make_trainer(tmp_path, class_weights=weights)


def test_class_weights_where_there_are_no_classes(tmp_path):
    trainer = make_trainer(tmp_path, tiny_model(num_labels=1), class_weights=["2"])
    with pytest.raises(ExitConfigurationError, match="--class_weights is for single-label"):
        trainer.train()


def test_balanced_needs_labels_that_can_be_counted(tmp_path):
    stream = datasets.Dataset.from_list(tiny_rows()).to_iterable_dataset()
    with pytest.raises(ExitConfigurationError, match="--class_weights balanced.*one number per label"):
        make_trainer(tmp_path, class_weights="balanced", train_dataset=stream)
