"""Loading and saving: which heads are new, what is kept to the bit, what comes along."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from factory import tiny_model, tiny_stock_model
from models.comparing import assert_close, assert_equal, each_input
from transformers import BertForMultipleChoice, BertForTokenClassification

from een_hf.models import AutoEarlyExitModel, EarlyExitBertForSequenceClassification, ExitConfigurationError, ExitHead
from een_hf.models.exits import EXIT_HEADS


def test_a_checkpoint_without_a_head_makes_every_head_new(architecture, load_exits, load_stock, stock_folders):
    """Without a fine-tuned head nothing ties the last exit to `cls`, and reports must say that the head is new."""
    backbone = architecture.backbone_class.from_pretrained(stock_folders[architecture.name, "backbone"]).eval()
    for pooling in architecture.poolings:
        model = load_exits(architecture, what="backbone", exit_pooling=pooling)
        assert model.config.last_exit_pooling == (pooling if pooling != "cls_mean" else "cls")
        assert {"classifier.weight", "classifier.bias"} <= model.newly_initialized
        assert all(model.is_new_head(index) for index in range(4))
        assert not any(name.startswith(architecture.name) for name in model.newly_initialized)
        for _, inputs in each_input(architecture):
            with torch.no_grad():
                hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
                expected = backbone(**inputs, output_hidden_states=True).hidden_states[-1]
            assert_close(hidden, expected)
            # The stock classifier serves as a carrier of the same backbone for the formulas.
            stock = load_stock(architecture)
            architecture.backbone(stock).load_state_dict(architecture.backbone(model).state_dict())
            with torch.no_grad():
                assert_close(model(**inputs).exit_logits, architecture.exit_logits_by_hand(model, stock, inputs), 1e-5)


def test_what_is_newly_initialized_is_listed(architecture, load_exits, tmp_path):
    """The head learning rate and freezing go by what is new: a wrong list trains the wrong heads."""
    model = load_exits(architecture, exit_layers=[1, 3])
    heads = {name for name, _ in model.named_parameters() if name.startswith("exit_heads.")}
    assert len(heads) == 8
    assert model.newly_initialized == heads
    assert [model.is_new_head(index) for index in range(3)] == [True, True, False]
    model.save_pretrained(tmp_path)
    reloaded = architecture.model_class.from_pretrained(tmp_path)
    assert reloaded.newly_initialized == frozenset()
    assert not any(reloaded.is_new_head(index) for index in range(3))
    scratch = architecture.model_class(copy.deepcopy(model.config))
    assert scratch.newly_initialized is None
    assert all(scratch.is_new_head(index) for index in range(3))


def test_other_number_of_labels_makes_every_head_new(architecture, stock_folders):
    """A classifier of another size is thrown away: the last exit must not count as fine-tuned."""
    model = architecture.model_class.from_pretrained(
        stock_folders[architecture.name, "head"],
        exit_layers=[2],
        exit_pooling=architecture.poolings[-1],
        num_labels=7,
        ignore_mismatched_sizes=True,
    ).eval()
    assert [model.is_new_head(index) for index in range(2)] == [True, True]
    assert model.config.last_exit_pooling == ("cls" if architecture.name == "vit" else architecture.poolings[-1])
    with torch.no_grad():
        assert model(**architecture.inputs()).exit_logits.shape == (6, 2, 7)


@pytest.mark.parametrize("stock_class", [BertForTokenClassification, BertForMultipleChoice])
def test_a_head_for_something_else_is_a_new_head(bert, stock_class, tmp_path):
    """Its last linear layer has the right name, but its pooler is random, or it scores something else than classes."""
    config = copy.deepcopy(bert.stock_config)
    config.num_labels = 1 if "Choice" in stock_class.__name__ else 3
    stock_class(config).save_pretrained(tmp_path)
    model = bert.model_class.from_pretrained(tmp_path, exit_layers=[2], exit_pooling="mean")
    assert model.is_new_head(1)
    assert model.config.last_exit_pooling == "mean"
    with pytest.raises(ExitConfigurationError, match="--freeze_backbone needs a fine-tuned classifier"):
        model.freeze_backbone()


def test_every_parameter_of_the_last_head_must_come_from_the_checkpoint(bert, load_stock, tmp_path):
    stock = load_stock(bert)
    state = {name: tensor for name, tensor in stock.state_dict().items() if name != "bert.pooler.dense.bias"}
    stock.save_pretrained(tmp_path, state_dict=state)
    model = bert.model_class.from_pretrained(tmp_path, exit_layers=[2])
    assert model.newly_initialized >= {"bert.pooler.dense.bias"}
    assert model.is_new_head(1)


def test_saved_model_is_the_same_to_the_bit(architecture, load_exits, tmp_path):
    """A saved and published model would predict something else than the one that was measured."""
    model = load_exits(
        architecture,
        exit_layers=[1, 3],
        exit_pooling=architecture.poolings[-1],
        exit_aggregation="boosted",
        boost_temperature=0.3,
    )
    model.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    assert on_disk["exit_layers"] == [1, 3, 4]
    assert on_disk["last_exit_pooling"] == "cls"
    assert on_disk["model_type"] == "een_" + architecture.name
    for loader in (architecture.model_class, architecture.auto_class):
        reloaded = loader.from_pretrained(tmp_path)
        assert type(reloaded) is architecture.model_class
        for name, tensor in model.state_dict().items():
            assert_equal(reloaded.state_dict()[name], tensor)
        assert set(reloaded.state_dict()) == set(model.state_dict())
        for _, inputs in each_input(architecture):
            with torch.no_grad():
                assert_equal(reloaded(**inputs).exit_logits, model(**inputs).exit_logits)


def test_last_pooling_survives_reloading(bert, load_exits, tmp_path):
    """Once written, the last exit's pooling is part of the model: a second load must not choose it again."""
    for what, expected in (("head", "cls"), ("backbone", "mean")):
        load_exits(bert, what=what, exit_layers=[1, 3], exit_pooling="mean").save_pretrained(tmp_path / what)
        again = bert.model_class.from_pretrained(tmp_path / what)
        assert (again.config.exit_pooling, again.config.last_exit_pooling) == ("mean", expected)
        # With other exits only, the checkpoint looks like a stock one: the last head alone is not new.
        for pooling in ("cls", "mean"):
            again = bert.model_class.from_pretrained(tmp_path / what, exit_layers=[2], exit_pooling=pooling)
            assert (again.config.exit_pooling, again.config.last_exit_pooling) == (pooling, expected)


def test_auto_class_takes_overrides(architecture, load_exits, tmp_path):
    """Overrides through the Auto classes would be dropped or kept unchecked."""
    load_exits(architecture, exit_layers=[1, 3]).save_pretrained(tmp_path)
    model = architecture.auto_class.from_pretrained(tmp_path, exit_layers=[3])
    assert model.config.exit_layers == [3, 4]
    with pytest.raises(ExitConfigurationError, match="--exit_layers"):
        architecture.auto_class.from_pretrained(tmp_path, exit_layers=[9])


def test_exit_heads_are_kept_when_exit_layers_change(architecture, load_exits, tmp_path):
    """Numbered by position, the head of layer 3 would be loaded behind layer 2."""
    model = load_exits(architecture, exit_layers=[1, 3])
    model.save_pretrained(tmp_path)
    changed = architecture.model_class.from_pretrained(tmp_path, exit_layers=[2, 3])
    assert [changed.is_new_head(index) for index in range(3)] == [True, False, False]
    inputs = architecture.inputs()
    with torch.no_grad():
        before, after = model(**inputs).exit_logits, changed(**inputs).exit_logits
    assert_equal(after[:, 1:], before[:, 1:])
    assert torch.isfinite(after).all()


def test_fewer_layers_keep_the_last_head(architecture, load_exits, load_stock):
    """A cut network keeps the head: exit K is then the stock head on the shallower network."""
    stock = load_stock(architecture, num_hidden_layers=2)
    model = load_exits(architecture, num_hidden_layers=2, exit_layers=[1])
    assert model.config.exit_layers == [1, 2]
    assert len(architecture.layers(model)) == 2
    inputs = architecture.inputs()
    with torch.no_grad():
        assert_close(model(**inputs).logits, stock(**inputs).logits)


def test_the_last_exit_alone_is_the_plain_model(architecture, load_exits, load_stock):
    """One exit is the plain model: comparisons need it to work."""
    model, inputs = load_exits(architecture, exit_layers=[4]), architecture.inputs()
    with torch.no_grad():
        output, stock = model(**inputs), load_stock(architecture)(**inputs)
    assert output.exit_logits.shape == (6, 1, 3)
    assert_close(output.logits, stock.logits)


def test_a_given_config_is_used_and_left_alone(architecture, stock_folders, load_stock):
    """A caller's config would be changed behind its back, or its exits ignored."""
    config = architecture.config_class(
        **{**architecture.stock_config.to_dict(), "model_type": None}, exit_layers=[1, 2]
    )
    before = copy.deepcopy(config.to_dict())
    model = architecture.model_class.from_pretrained(stock_folders[architecture.name, "head"], config=config).eval()
    assert model.config.exit_layers == [1, 2, 4]
    assert [model.is_new_head(index) for index in range(3)] == [True, True, False]
    other = architecture.model_class.from_pretrained(
        stock_folders[architecture.name, "head"], config=config, exit_layers=[3]
    )
    assert other.config.exit_layers == [3, 4]
    assert config.to_dict() == before
    stock_config = load_stock(architecture).config
    by_stock = architecture.model_class.from_pretrained(
        stock_folders[architecture.name, "head"], config=stock_config, exit_layers=[1, 2]
    ).eval()
    assert by_stock.config.exit_layers == [1, 2, 4]
    assert by_stock.config.num_labels == 3
    inputs = architecture.inputs()
    with torch.no_grad():
        expected = load_stock(architecture)(**inputs).logits
        assert_close(model(**inputs).logits, expected)
        assert_close(by_stock(**inputs).logits, expected)


def test_label_names_come_along(architecture, load_stock, tmp_path):
    """A pipeline would answer LABEL_0 where the stock model answered a name."""
    stock = load_stock(architecture)
    stock.config.id2label = {0: "no", 1: "maybe", 2: "yes"}
    stock.config.label2id = {"no": 0, "maybe": 1, "yes": 2}
    stock.save_pretrained(tmp_path)
    model = architecture.model_class.from_pretrained(tmp_path)
    assert model.config.id2label == {0: "no", 1: "maybe", 2: "yes"}
    assert model.config.label2id == {"no": 0, "maybe": 1, "yes": 2}


def test_another_architecture_is_refused(architecture, stock_folders):
    """Loading a ViT as a BERT would warn about every weight and give a random model."""
    other = "vit" if architecture.name == "bert" else "bert"
    with pytest.raises(ExitConfigurationError, match=f"'{architecture.name}'.*not '{other}'"):
        architecture.model_class.from_pretrained(stock_folders[other, "head"])


def test_loading_info_is_the_pair_that_callers_expect(architecture, stock_folders):
    """The pair that callers of output_loading_info expect."""
    model, info = architecture.model_class.from_pretrained(
        stock_folders[architecture.name, "head"], output_loading_info=True
    )
    assert set(info["missing_keys"]) == model.newly_initialized
    assert not info["unexpected_keys"]


def test_boosting_a_fine_tuned_head_warns(architecture, stock_folders, caplog):
    """With F_K the loaded head no longer gives its own predictions: nobody may learn that from bad numbers."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            architecture.model_class.from_pretrained(
                stock_folders[architecture.name, "head"], exit_aggregation="boosted"
            )
        assert "boosted" in caplog.text
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            architecture.model_class.from_pretrained(
                stock_folders[architecture.name, "backbone"], exit_aggregation="boosted"
            )
        assert "boosted" not in caplog.text
    finally:
        transformers_logging.disable_propagation()


def test_a_model_that_another_process_pickled_is_saved_with_its_code(tmp_path):
    """What breaks: a queue worker's `save_pretrained` leaves a folder that loads only where een_hf is installed."""
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(tiny_model()))
    code = "import pickle, sys; pickle.load(open(f'{sys.argv[1]}/model.pkl', 'rb')).save_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    assert "auto_map" in json.loads((tmp_path / "config.json").read_text())
    assert (tmp_path / "modeling_een_bert.py").is_file()


class _ScaledHead(ExitHead):
    """A linear layer, whose logits are multiplied by numbers that are in no module of torch."""

    def __init__(self, config):
        super().__init__(config)
        self.classifier = torch.nn.Linear(self.width, config.num_labels)
        self.scale = torch.nn.Parameter(torch.full((config.num_labels,), 3.0))
        self.register_buffer("shift", torch.arange(config.num_labels, dtype=torch.float32))

    def classify(self, pooled):
        return self.scale * self.classifier(pooled) + self.shift


def test_a_heads_own_parameters_are_those_of_its_constructor(tmp_path, monkeypatch):
    """What breaks: in a checkpoint that lacks a head, its bare parameters are memory that nobody wrote."""
    monkeypatch.setitem(EXIT_HEADS, "scaled", _ScaledHead)
    tiny_stock_model().save_pretrained(tmp_path / "stock")
    model = EarlyExitBertForSequenceClassification.from_pretrained(tmp_path / "stock", exit_head="scaled")
    for head in model.exit_heads.values():
        assert head.scale.tolist() == [3.0] * model.num_labels and head.shift.tolist() == [0.0, 1.0, 2.0]
        head.scale.data.fill_(7.0)
        head.shift.fill_(-1.0)
    model.save_pretrained(tmp_path / "exits")
    for head in AutoEarlyExitModel.from_pretrained(tmp_path / "exits").exit_heads.values():
        assert head.scale.unique().tolist() == [7.0] and head.shift.unique().tolist() == [-1.0]
