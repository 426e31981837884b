"""`--method two_stage`: plain fine-tuning, then early exits on the frozen model."""

import factory
import psutil
import pytest
import torch
from factory import NO_DROPOUT, assert_same_weights, tiny_model, tiny_rows, tiny_stock_model
from torch import nn
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

from een_hf.models import ExitConfigurationError
from een_hf.training import get_scheme, two_stage
from een_hf.training.frozen_heads import new_features
from een_hf.training.two_stage import TwoStageArguments


NUM_ROWS = 24


def make_trainer(folder, model=None, rows=None, second_stage=None, **settings):
    model = model or tiny_model(problem_type="single_label_classification", **NO_DROPOUT)
    settings = {"max_steps": 5, "learning_rate": 1e-2, **settings}
    settings["scheme_args"] = TwoStageArguments(**(second_stage or {}))
    rows = tiny_rows(count=NUM_ROWS, learnable=True) if rows is None else rows
    return factory.make_trainer(folder, model, "two_stage", train_dataset=rows, **settings)


def features_and_answers(model, rows):
    """What the heads before the last read, by hooks of the stock forward pass, and the last exit's logits."""
    read, hooks = [[] for _ in model.exit_heads], []
    for place, head in enumerate(model.exit_heads.values()):
        hooks.append(head.dense.register_forward_hook(lambda _, given, __, place=place: read[place].append(given[0])))
    answers = []
    with torch.no_grad():
        for row in rows:  # one at a time: nothing is padded
            inputs = {name: torch.as_tensor(row[name])[None] for name in row if name != "labels"}
            answers.append(model.eval()(**inputs, early_exit=False).exit_logits[0, -1])
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(values) for values in read], 1), torch.stack(answers)


def test_the_model_is_the_one_that_plain_fine_tuning_gives(tmp_path):
    """What breaks: the last exit pays for the early exits, as in joint training."""
    model = tiny_model(problem_type="single_label_classification", last_exit_pooling="cls", **NO_DROPOUT)
    stock = BertForSequenceClassification(tiny_stock_model(**NO_DROPOUT).config)
    stock.load_state_dict(model.state_dict(), strict=False)
    settings = {"max_steps": 5, "learning_rate": 0.1, "optim": "sgd"}
    trainer = make_trainer(tmp_path, model, **settings)
    trainer.train()
    args = TrainingArguments(str(tmp_path), **settings, **factory.QUIET)
    Trainer(stock, args, train_dataset=trainer.train_dataset).train()
    trained = model.state_dict()
    for name, wanted in stock.state_dict().items():
        torch.testing.assert_close(trained[name], wanted, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("warm_start", [0.0, 1.0])
def test_the_first_stage_may_be_joint_training(warm_start, tmp_path):
    """What breaks: layers that learn nothing from early exits, or heads that the second stage does not train."""
    models = [tiny_model(problem_type="single_label_classification", **NO_DROPOUT) for _ in range(2)]
    settings = {"max_steps": 5, "warm_start_epochs": warm_start, "exit_loss_weights": ["1", "2", "3"]}
    trainer = make_trainer(tmp_path, models[0], second_stage={"joint_first_stage": True}, **settings)
    joint = factory.make_trainer(
        tmp_path, models[1], "joint", train_dataset=trainer.train_dataset, learning_rate=1e-2, **settings
    )
    trainer.train()
    joint.train()
    trained, wanted = (model.state_dict() for model in models)
    early = {name for name in wanted if name.startswith("exit_heads.")}
    for name in wanted.keys() - early:
        torch.testing.assert_close(trained[name], wanted[name], rtol=0, atol=0, msg=name)
    assert early and not any(torch.equal(trained[name], wanted[name]) for name in early)


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", "regression"])
def test_early_exits_learn_what_the_last_one_answers(problem_type, tmp_path):
    """The second stage is AdamW, here on all rows at once, on the distance of each exit to the last."""
    labels = 1 if problem_type == "regression" else 3
    model = tiny_model(problem_type=problem_type, num_labels=labels, noise=0.3, **NO_DROPOUT).double()
    rows = tiny_rows(count=NUM_ROWS)
    for row in rows:
        if problem_type == "multi_label_classification":
            row["labels"] = [float(row["labels"] == label) for label in range(3)]
        elif problem_type == "regression":
            row["labels"] = float(row["labels"])
    settings = {"second_stage_epochs": 3, "second_stage_learning_rate": 0.01, "second_stage_batch_size": NUM_ROWS}
    trainer = make_trainer(tmp_path, model, rows, settings, max_steps=1)
    super(type(trainer), trainer).train()
    features, answers = features_and_answers(model, rows)
    heads = list(model.exit_heads.values())
    parts = [part for head in heads for part in (head.dense, head.classifier)]
    found = [parameter for part in parts for parameter in part.parameters()]
    weights = [parameter.detach().float().clone().requires_grad_() for parameter in found]
    optimizer = torch.optim.AdamW(weights, lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    distances = {
        "single_label_classification": lambda a, b: -(b.softmax(-1) * a.log_softmax(-1)).sum(-1).mean(),
        "multi_label_classification": lambda a, b: nn.BCEWithLogitsLoss()(a, b.sigmoid()),
        "regression": lambda a, b: (a - b).square().mean(),
    }
    for _ in range(3):
        loss = 0.0
        for place in range(len(heads)):
            dense, bias, classifier, offset = weights[4 * place : 4 * place + 4]
            logits = (features[:, place].float() @ dense.T + bias).tanh() @ classifier.T + offset
            loss = loss + distances[problem_type](logits, answers.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    trainer.train_early_exits()
    for wanted, parameter in zip(weights, found, strict=True):
        torch.testing.assert_close(parameter.detach().float(), wanted.detach(), rtol=1e-3, atol=2e-5)


def test_early_exits_agree_with_the_last_one(tmp_path):
    """What breaks: early exits stay as they were made."""
    model = tiny_model(problem_type="single_label_classification", noise=0.3, **NO_DROPOUT)
    trainer = make_trainer(tmp_path, model, max_steps=30, second_stage={"second_stage_epochs": 100})
    trainer.train()
    answers = trainer.predict_exits(trainer.train_dataset).predictions.argmax(-1)
    assert len(set(answers[:, -1])) > 1
    assert (answers == answers[:, -1:]).mean() > 0.9


def test_they_learn_from_as_many_rows_as_are_asked_for(tmp_path):
    """What breaks: a large data set does not fit into memory, or some rows are read twice."""
    trainer = make_trainer(tmp_path, second_stage={"second_stage_samples": 10}, per_device_eval_batch_size=4)
    rows, read = [row["input_ids"].tolist() for row in trainer.train_dataset], []
    trainer.model.get_input_embeddings().register_forward_pre_hook(lambda _, given: read.extend(given[0].tolist()))
    trainer.train_early_exits()
    places = [rows.index(row) for row in read]
    assert len(set(places)) == len(places) == 10 and places == sorted(places)


class Brightened(torch.utils.data.Dataset):
    """Images that are brighter by 1 in each epoch."""

    def __init__(self, count):
        self.rows, self.epoch = tiny_rows("vit", count), 0

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[index]
        return {**row, "pixel_values": row["pixel_values"] + self.epoch}

    def set_epoch(self, epoch):
        self.epoch = epoch


def test_each_view_of_an_image_is_another(tmp_path, monkeypatch):
    """What breaks: the same view is stored again, or features and answers of different views are paired."""
    model, stored = tiny_model("vit", problem_type="single_label_classification", noise=0.3, **NO_DROPOUT), []
    settings = {"per_device_eval_batch_size": 4, "max_steps": 3, "num_train_epochs": 3}
    trainer = make_trainer(tmp_path, model, Brightened(6), {"second_stage_views": 3}, **settings)
    monkeypatch.setattr(two_stage, "train_heads", lambda _, *given, **settings: stored.extend(given) or 0.0)
    trainer.train()
    rows = Brightened(6)
    images = torch.cat([torch.stack([row["pixel_values"] for row in rows.rows]) + view for view in range(3)])
    with torch.no_grad():
        output = model.eval()(pixel_values=images, early_exit=False, output_hidden_states=True)
    wanted = [torch.cat([h[:, 0], h[:, 1:].mean(1)], -1) for h in output.hidden_states[1:3]]
    torch.testing.assert_close(torch.from_numpy(stored[0]), torch.stack(wanted, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(stored[1]), output.exit_logits[:, -1], rtol=1e-4, atol=1e-5)


def test_views_of_some_of_the_images(tmp_path, monkeypatch):
    """What breaks: a data set without `select` is read in one view several times."""
    model, stored = tiny_model("vit", problem_type="single_label_classification", noise=0.3, **NO_DROPOUT), []
    second_stage = {"second_stage_views": 2, "second_stage_samples": 4}
    trainer = make_trainer(tmp_path, model, Brightened(6), second_stage)
    monkeypatch.setattr(two_stage, "train_heads", lambda _, *given, **settings: stored.extend(given) or 0.0)
    trainer.train_early_exits()
    first, second = torch.from_numpy(stored[0]).chunk(2)
    assert (first - second).abs().amax((1, 2)).min() > 1e-3


def test_too_little_memory_is_an_error_before_the_first_stage(tmp_path):
    """What breaks: the process is killed after hours of training."""
    model = tiny_model("vit", problem_type="single_label_classification", exit_head="attention", **NO_DROPOUT)
    trainer = make_trainer(tmp_path, model, Brightened(6), {"second_stage_views": 10**12})
    with pytest.raises(ExitConfigurationError, match=r"GB of memory, .* are free: .*--second_stage_views"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_the_check_of_memory_draws_no_random_number(tmp_path):
    """What breaks: with the same seed, dropout differs from that of plain fine-tuning."""
    states = []

    class Record(TrainerCallback):
        def on_train_begin(self, *_, **__):
            states.append(torch.get_rng_state())

    for scheme in ("two_stage", "joint"):
        factory.make_trainer(tmp_path, tiny_model(), scheme, max_steps=1, callbacks=[Record()]).train()
    assert torch.equal(*states)


def test_memory_that_others_use_is_not_free():
    """What breaks: the machine's whole memory counts as free, and the process is killed."""
    memory = psutil.virtual_memory()
    with pytest.raises(ExitConfigurationError, match="are free: give less"):
        new_features(((memory.available + memory.total) // 8, 1, 1), "float32", "give less")  # 4 bytes each


def test_exits_that_read_all_patches_agree_with_the_last_one(tmp_path):
    """What breaks: tokens are stored in another order than the head reads them."""
    settings = {"problem_type": "single_label_classification", "exit_head": "attention", "noise": 0.3, **NO_DROPOUT}
    second_stage = {"second_stage_epochs": 100, "second_stage_learning_rate": 1e-2}
    trainer = make_trainer(tmp_path, tiny_model("vit", **settings), tiny_rows("vit"), second_stage)
    trainer.train()
    answers = trainer.predict_exits(trainer.train_dataset).predictions.argmax(-1)
    assert len(set(answers[:, -1])) > 1
    assert (answers == answers[:, -1:]).mean() > 0.9


def first_tokens(batches):
    return [row[0].item() for batch in batches for row in batch["input_ids"]]


@pytest.mark.parametrize("strategy", ["epoch", "no"])
def test_the_second_stage_reads_training_rows_and_evaluation_its_own(strategy, tmp_path, monkeypatch):
    """What breaks: loaders whose workers persist are kept, and exits learn from evaluation rows or are measured on
    training rows."""
    rows, evaluation = tiny_rows(count=8), tiny_rows(count=6, seed=9)
    for row in rows:
        row["input_ids"][0] = 50
    for row in evaluation:
        row["input_ids"][0] = 51
    settings = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "num_train_epochs": 1}
    settings |= {"eval_strategy": strategy, "max_steps": -1, "eval_dataset": evaluation}
    trainer, seen = make_trainer(tmp_path, rows=rows, **settings), []
    read = two_stage.read_features
    monkeypatch.setattr(two_stage, "read_features", lambda *given: seen.append(given[1]) or read(*given))
    trainer.train()
    assert first_tokens(seen[1:]) == [50] * 8  # the first batch is one row, on which memory is checked
    assert first_tokens(trainer.get_eval_dataloader()) == [51] * 6


@pytest.mark.parametrize("labels", [1, 3])
def test_a_run_resumed_after_its_last_step_trains_the_same_exits(labels, tmp_path):
    """What breaks: the problem is not known where no step was taken, and the exits learn nothing or something else."""
    rows = tiny_rows(count=8)
    for row in rows:
        row["labels"] = float(row["labels"]) if labels == 1 else [float(row["labels"] == k) for k in range(3)]
    trained = []
    for resumed in (False, True):
        model = tiny_model(num_labels=labels, problem_type=None, **NO_DROPOUT)
        trainer = make_trainer(tmp_path, model, rows, max_steps=2, save_strategy="steps", save_steps=2)
        trainer.train(resume_from_checkpoint=resumed or None)
        trained.append(model)
    assert_same_weights(*trained)


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"freeze_backbone": True}, "--freeze_backbone"),
        ({"warm_start_epochs": 0.5}, "--warm_start_epochs"),
        ({"rows": (row for row in ())}, "--streaming"),
        ({"model": tiny_model(exit_layers=[3])}, "--exit_layers"),
        ({"second_stage": {"second_stage_views": 2}}, "--second_stage_views"),
    ],
    ids=["frozen", "warm", "stream", "one exit", "views of texts"],
)
def test_what_leaves_no_two_stages_is_refused(settings, flag, tmp_path):
    """What breaks: a run trains for hours and then fails, or has one stage only."""
    with pytest.raises(ExitConfigurationError, match=flag):
        make_trainer(tmp_path, **settings)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["epochs", "learning_rate", "batch_size", "samples", "views"])
def test_numbers_out_of_range_are_refused(name, value):
    """What breaks: the first stage is trained before the mistake shows."""
    with pytest.raises(ExitConfigurationError, match=f"--second_stage_{name}"):
        get_scheme("two_stage").arguments_class(**{f"second_stage_{name}": value})
