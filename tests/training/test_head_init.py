"""New heads start from layers that fit what they read."""

import copy

import pytest
import torch
from factory import make_trainer, tiny_stock_config, tiny_stock_model
from torch import nn
from transformers import AutoModel, BertModel

from een_hf.models import MODEL_CLASSES, AutoEarlyExitModel
from een_hf.models.exits import EXIT_HEADS, ExitHead, register_exit_head
from een_hf.training import EarlyExitTrainingArguments, JointExitTrainer
from een_hf.training.head_init import standardize_heads


# The first layer of the last head, where it has one that is new.
LAST = {"mpnet": "classifier.dense", "distilbert": "pre_classifier", "deberta": "pooler.dense"}


def backbone(folder, model_type):
    torch.manual_seed(0)
    AutoModel.from_config(tiny_stock_config(model_type)).save_pretrained(folder)
    return folder


def inputs(count=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(8) < torch.randint(2, 9, (count, 1), generator=generator)
    return {"input_ids": torch.randint(2, 60, (count, 8), generator=generator), "attention_mask": mask.long()}


def standardize(model, *batches):
    model.eval()
    standardize_heads([model.exit_head_modules(k) for k in range(3)], lambda: [model(**batch) for batch in batches])


def mean_of_tokens(hidden, mask):
    return torch.stack([row[keep.bool()].mean(0) for row, keep in zip(hidden.double(), mask, strict=True)])


@pytest.mark.parametrize("model_type", LAST)
def test_first_layers_have_mean_0_and_variance_1(model_type, tmp_path):
    """By hand, from the hidden states: each number has mean 0, all together have variance 1; in two batches or one."""
    model = AutoEarlyExitModel.from_pretrained(backbone(tmp_path, model_type), num_labels=3)
    before = copy.deepcopy(model)
    batch = inputs()
    standardize(model, *({name: part[rows] for name, part in batch.items()} for rows in (slice(5), slice(5, 12))))
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    for k, name in enumerate(["exit_heads.1.dense", "exit_heads.2.dense", LAST[model_type]]):
        layer, old = model.get_submodule(name), before.get_submodule(name)
        numbers = (
            mean_of_tokens(states[k + 1], batch["attention_mask"]) @ layer.weight.double().T + layer.bias.double()
        )
        assert numbers.mean(0).abs().max() < 1e-5 and abs(numbers.square().mean() - 1) < 1e-5
        ratio = layer.weight / old.weight
        assert ratio.std() < 1e-5 * ratio.mean()  # the directions stay
    changed = {name for name, old in before.state_dict().items() if not torch.equal(old, model.state_dict()[name])}
    assert len(changed) == 6


def test_what_a_checkpoint_brings_stays(tmp_path):
    """The pretrained pooler and fine-tuned heads, and heads of one layer, whose numbers are logits."""
    stock = tiny_stock_model()
    nn.init.normal_(stock.bert.pooler.dense.bias)
    stock.save_pretrained(tmp_path / "stock")
    model = AutoEarlyExitModel.from_pretrained(tmp_path / "stock")
    standardize(model, inputs())
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert model.exit_heads["1"].dense.bias.any()
    images = AutoEarlyExitModel.from_pretrained(backbone(tmp_path / "vit", "vit"), num_labels=3)
    before = copy.deepcopy(images.state_dict())
    standardize(images, {"pixel_values": torch.randn(4, 3, 8, 8)})
    assert all(torch.equal(tensor, before[name]) for name, tensor in images.state_dict().items())


def trained(model, folder, **settings):
    rows = [
        dict(zip(inputs(16), row, strict=True), labels=i % 3)
        for i, row in enumerate(zip(*inputs(16).values(), strict=True))
    ]
    trainer = make_trainer(folder, model, train_dataset=rows, **{"learning_rate": 0.0, "max_steps": 2, **settings})
    trainer.train()
    return model


def test_the_trainer_does_it_once(tmp_path):
    """At rate 0 nothing else moves; a second training, which finds trained heads, must not scale them again."""
    folder = backbone(tmp_path / "bert", "bert")
    BertModel(tiny_stock_config(), add_pooling_layer=False).save_pretrained(folder)
    made = AutoEarlyExitModel.from_pretrained(folder, num_labels=3)
    left = trained(copy.deepcopy(made), tmp_path, standardize_heads=False)
    assert all(torch.equal(tensor, made.state_dict()[name]) for name, tensor in left.state_dict().items())
    once = trained(copy.deepcopy(made), tmp_path)
    assert all(once.get_submodule(name).bias.any() for name in ("exit_heads.1.dense", "bert.pooler.dense"))
    twice = trained(copy.deepcopy(once), tmp_path, seed=1)
    assert all(torch.equal(tensor, once.state_dict()[name]) for name, tensor in twice.state_dict().items())
    scratch = MODEL_CLASSES["bert"](made.config)
    assert not trained(scratch, tmp_path).exit_heads["1"].dense.bias.any()


def test_the_examples_are_read_for_new_heads_only(tmp_path):
    """What breaks: a pass of the model before a training that has no new head."""
    torch.manual_seed(0)
    model = AutoEarlyExitModel.from_pretrained(backbone(tmp_path / "bert", "bert"), num_labels=3)
    model.save_pretrained(tmp_path / "exits")
    for folder, passes in (("bert", 3), ("exits", 2)):
        model = AutoEarlyExitModel.from_pretrained(tmp_path / folder, num_labels=3)
        counted = []
        model.bert.embeddings.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        trained(model, tmp_path)
        assert len(counted) == passes


def test_heads_without_a_linear_layer_are_left(tmp_path, monkeypatch):
    """What breaks: a head of one's own that multiplies by itself ends the training at its first step."""
    torch.manual_seed(0)

    class Products(ExitHead):
        def __init__(self, config):
            super().__init__(config)
            self.weight = nn.Parameter(torch.randn(self.width, config.num_labels))

        def classify(self, pooled):
            return pooled @ self.weight

    monkeypatch.setitem(EXIT_HEADS, "products", None)
    register_exit_head("products")(Products)
    model = AutoEarlyExitModel.from_pretrained(backbone(tmp_path / "bert", "bert"), num_labels=3, exit_head="products")
    for head in model.exit_heads.values():  # transformers leaves parameters that no module of torch holds as they come
        nn.init.normal_(head.weight)
    before = copy.deepcopy(model.state_dict())
    standardize(model, inputs())
    assert all(torch.equal(model.exit_heads[k].weight, before[f"exit_heads.{k}.weight"]) for k in "12")


def test_a_stream_without_rows_ends_the_training(tmp_path):
    class Nothing(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    model = AutoEarlyExitModel.from_pretrained(backbone(tmp_path / "bert", "bert"), num_labels=3)
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no", "max_steps": 2}
    quiet["accelerator_config"] = {"dispatch_batches": False}
    args = EarlyExitTrainingArguments(str(tmp_path), **quiet)
    trainer = JointExitTrainer(model=model, args=args, train_dataset=Nothing())
    trainer.train()
    assert trainer.state.global_step == 0
