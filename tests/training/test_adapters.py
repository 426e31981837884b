"""PEFT models in the trainers: every scheme trains, evaluates, calibrates, resumes and saves them."""

import copy

import pytest
import torch
from factory import NO_DROPOUT, assert_same_weights, make_trainer, tiny_model, tiny_rows, tiny_stock_model
from transformers import AutoConfig, Trainer, TrainingArguments

from een_hf import AutoEarlyExitModel
from een_hf.evaluation import relative_costs
from een_hf.models import ExitConfigurationError
from een_hf.training.adapters import CONFIG_FOLDER


peft = pytest.importorskip("peft", reason="needs the extra peft")
SCHEMES = [("bert", "joint"), ("bert", "boosted"), ("bert", "l2w"), ("bert", "two_stage"), ("vit", "joint")]
RUN = {"num_train_epochs": 2, "learning_rate": 2e-3, "logging_steps": 1, "save_strategy": "epoch"}


def adapted(folder, kind="bert", **settings):
    """LoRA, and all heads, on a backbone of `folder` without exits."""
    if not folder.is_dir():
        tiny_stock_model(kind, **NO_DROPOUT).save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoEarlyExitModel.from_pretrained(folder)
    targets = ["query", "value"] if kind == "bert" else ["q_proj", "v_proj"]
    settings = {"r": 2, "target_modules": targets, "modules_to_save": model.head_module_names(), **settings}
    return peft.get_peft_model(model, peft.LoraConfig(**settings))


@torch.no_grad()
def exits_of(model, rows, **kwargs):
    name = model.main_input_name
    return model.eval()(**{name: torch.stack([row[name] for row in rows])}, **kwargs)


@pytest.mark.parametrize(("kind", "scheme"), SCHEMES)
def test_a_scheme_trains_a_peft_model(kind, scheme, tmp_path):
    """What breaks: exits are evaluated without the adapter; what is saved lacks a head, the boosting or the policy."""
    tuned = adapted(tmp_path / "stock", kind)
    before = {name: parameter.clone() for name, parameter in tuned.named_parameters()}
    best = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "eval_exit2_loss"}
    trainer = make_trainer(tmp_path / "run", tuned, scheme, **RUN, **best)
    rows = trainer.eval_dataset
    assert trainer.new_heads() == [0, 1]
    trainer.train()
    for name, parameter in tuned.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name

    wanted = exits_of(tuned, rows, early_exit=False).exit_logits
    found = trainer.predict_exits(rows)
    torch.testing.assert_close(torch.from_numpy(found.predictions), wanted, rtol=0, atol=1e-5)
    labels = torch.stack([row["labels"] for row in rows])
    for k in range(3):
        loss = torch.nn.functional.cross_entropy(wanted[:, k], labels).item()
        assert found.metrics[f"test_exit{k + 1}_loss"] == pytest.approx(loss, abs=1e-5)

    assert len(trainer.calibrate(rows, target_cost=0.8).policy.thresholds) == 3
    scores = wanted.softmax(-1).amax(-1).quantile(0.6, dim=0, interpolation="midpoint")
    trainer.network.set_exit_policy({"criterion": "confidence", "thresholds": scores.tolist()})
    answers = trainer.predict(rows)
    alone = exits_of(tuned, rows)
    torch.testing.assert_close(torch.from_numpy(answers.predictions), alone.logits, rtol=0, atol=1e-5)
    assert max(answers.metrics["test_exit_fractions"]) < 1
    trainer.save_model()
    trainer.create_model_card()

    assert not (tmp_path / "run" / "config.json").exists()
    config = AutoConfig.from_pretrained(tmp_path / "run" / CONFIG_FOLDER)
    assert config.training_scheme == scheme
    base = AutoEarlyExitModel.from_pretrained(tmp_path / "stock", config=config)
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "run").merge_and_unload()
    again = exits_of(merged, rows)
    torch.testing.assert_close(again.logits, alone.logits, rtol=0, atol=1e-5)
    assert again.exit_index.equal(alone.exit_index)
    merged.save_pretrained(tmp_path / "merged")
    again = exits_of(AutoEarlyExitModel.from_pretrained(tmp_path / "merged"), rows)
    torch.testing.assert_close(again.logits, alone.logits, rtol=0, atol=1e-5)
    # LoRA of rank 2 on two of six products of 16 x 16 and more: a few percent.
    size = {"sequence_length": 8} if kind == "bert" else {"image_size": 8}
    merged_costs = relative_costs(merged, **size)
    assert relative_costs(trainer.network, **size) == pytest.approx(merged_costs, rel=0.05)


@pytest.mark.parametrize(("kind", "scheme"), SCHEMES[:4])
def test_a_peft_model_resumes_to_the_bit(kind, scheme, tmp_path):
    """What breaks: a checkpoint of an adapter lacks the heads, or the division into new and old ones."""
    uninterrupted = make_trainer(tmp_path / "run", adapted(tmp_path / "stock", kind), scheme, **RUN)
    uninterrupted.train()
    resumed = make_trainer(tmp_path / "run", adapted(tmp_path / "stock", kind), scheme, **RUN)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    assert_same_weights(uninterrupted.model, resumed.model)


def test_joint_training_is_that_of_a_plain_trainer(tmp_path):
    """The model's own loss is the joint loss. What breaks: another set of parameters, or another rate."""
    tuned, rows = adapted(tmp_path / "stock"), tiny_rows()
    plain, settings = copy.deepcopy(tuned), {"optim": "sgd", "learning_rate": 0.1, "max_steps": 4}
    make_trainer(tmp_path / "own", tuned, standardize_heads=False, **settings).train()
    args = TrainingArguments(str(tmp_path / "plain"), report_to="none", use_cpu=True, save_strategy="no", **settings)
    Trainer(plain, args, train_dataset=rows).train()
    for (name, found), wanted in zip(tuned.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6, msg=name)


def test_new_heads_have_their_own_rate_and_start(tmp_path):
    """What breaks: the names of heads under an adapter are not those of the checkpoint, and none counts as new."""
    trainer = make_trainer(tmp_path, adapted(tmp_path / "stock"), learning_rate=1e-4, max_steps=1)
    rates = {id(p): group["lr"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(2e-3 if "exit_heads" in name else 1e-4), name
    trainer.train()
    heads = [trainer.network.exit_heads[layer].dense.modules_to_save["default"] for layer in "12"]
    assert all(head.weight.std() > 0.1 for head in heads)  # 0.02 before they were standardized


def test_a_head_inside_an_adapter_counts_as_new_no_longer_than_it_is(tmp_path):
    tiny_model(noise=0.1).save_pretrained(tmp_path / "stock")
    assert make_trainer(tmp_path, adapted(tmp_path / "stock")).new_heads() == []


PROMPTS = {"num_virtual_tokens": 2, "task_type": "SEQ_CLS"}


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (
            lambda folder: adapted(folder, modules_to_save=None),
            {},
            "Exit 1 is new, .* does not train its exit_heads.1",
        ),
        # PEFT itself saves `classifier`, of every exit, and nothing before it.
        (lambda folder: adapted(folder, modules_to_save=None, task_type="SEQ_CLS"), {}, "exit_heads.1.dense"),
        (adapted, {"freeze_backbone": True}, "--freeze_backbone keeps the backbone"),
        (
            adapted,
            {"fsdp": True, "fsdp_config": {"version": 2}},
            "--fsdp cannot evaluate the exits inside a PEFT model",
        ),
    ],
)
def test_what_would_leave_an_exit_random_or_unread_is_refused(make, settings, message, tmp_path):
    with pytest.raises(ExitConfigurationError, match=message):
        make_trainer(tmp_path, make(tmp_path / "stock"), **settings)


def test_tokens_before_the_input_are_refused(tmp_path):
    """What breaks: training sees the prompt, early exit in inference does not."""
    tuned = peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(**PROMPTS))
    with pytest.raises(ExitConfigurationError, match="PROMPT_TUNING puts tokens before the input"):
        make_trainer(tmp_path, tuned)


def test_an_adapter_that_was_loaded_for_inference(tmp_path):
    adapted(tmp_path / "stock").save_pretrained(tmp_path / "adapter")
    base = AutoEarlyExitModel.from_pretrained(tmp_path / "stock")
    tuned = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    with pytest.raises(ExitConfigurationError, match="is_trainable=True"):
        make_trainer(tmp_path, tuned)
    rows = tiny_rows()
    found = make_trainer(tmp_path, tuned, train_dataset=None).predict_exits(rows).predictions
    wanted = exits_of(tuned, rows, early_exit=False).exit_logits
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-5)


def test_what_is_pushed_names_no_local_folder(tmp_path):
    """PEFT writes the path of the base model into the adapter's settings and into its card."""
    trainer = make_trainer(tmp_path, adapted(tmp_path / "stock"))
    trainer.save_model(tmp_path / "kept")
    assert str(tmp_path) in (tmp_path / "kept" / "adapter_config.json").read_text()
    trainer.args.push_to_hub = True  # without what the constructor would then ask of the Hub
    trainer.save_model(tmp_path / "pushed", _internal_call=True)
    files = [path for path in (tmp_path / "pushed").rglob("*") if path.is_file()]
    assert {"README.md", "adapter_config.json", "config.json"} <= {path.name for path in files}
    assert not [path for path in files if str(tmp_path).encode() in path.read_bytes()]
    assert '"base_model_name_or_path": "stock"' in (tmp_path / "pushed" / "adapter_config.json").read_text()
