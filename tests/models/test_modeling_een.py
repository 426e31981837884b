"""Early-exit models against the stock models they are made of: logits, hidden states, gradients, files."""

import copy
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from factory import tiny_model
from transformers import BertConfig, BertForMultipleChoice, BertForTokenClassification

from een_hf.models import EarlyExitBertForSequenceClassification, ExitConfigurationError


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def assert_equal(actual, expected):
    """Equal to the last bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def assert_close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def each_input(architecture):
    """The inputs of every kind of padding that the architecture knows."""
    return [(padding, architecture.inputs(padding=padding)) for padding in architecture.paddings]


# The last exit is the stock model


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_last_exit_gives_the_stock_logits(architecture, load_stock, load_exits, attention):
    """A fine-tuned checkpoint would change its predictions by getting exits."""
    stock = load_stock(architecture, attn_implementation=attention)
    for pooling in architecture.poolings:
        model = load_exits(architecture, exit_layers=[1, 3], exit_pooling=pooling, attn_implementation=attention)
        assert model.config._attn_implementation == attention
        assert model.config.last_exit_pooling == "cls"
        for _, inputs in each_input(architecture):
            with torch.no_grad():
                output, expected = model(**inputs), stock(**inputs).logits
            assert_close(output.logits, expected)
            assert_equal(output.exit_logits[:, -1], output.logits)
            assert output.exit_logits.shape == (6, 3, 3)
            assert output.exit_index is None
            assert output.loss is None


def test_attention_mask_none_is_a_mask_of_ones(bert, load_exits):
    """Streams without padding pass no mask; mean pooling and attention must not need one."""
    model = load_exits(bert, exit_pooling="mean")
    inputs = bert.inputs()
    with torch.no_grad():
        without = model(**inputs, attention_mask=None).exit_logits
        ones = model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"])).exit_logits
    assert_close(without, ones)


@pytest.mark.parametrize("aggregation", ["none", "boosted"])
@pytest.mark.parametrize("exit_layers", [None, [2], [1, 3]])
def test_every_exit_equals_its_formula(architecture, load_stock, load_exits, exit_layers, aggregation):
    """An exit on the wrong layer, with the wrong pooling or without its norm still trains, only worse."""
    stock = load_stock(architecture)
    for pooling in architecture.poolings:
        model = load_exits(
            architecture,
            exit_layers=exit_layers,
            exit_pooling=pooling,
            exit_aggregation=aggregation,
            boost_temperature=0.7,
        )
        for _, inputs in each_input(architecture):
            with torch.no_grad():
                exit_logits = model(**inputs).exit_logits
            assert_close(exit_logits, architecture.exit_logits_by_hand(model, stock, inputs), 1e-5)


def test_padding_contents_do_not_matter(bert, load_exits):
    """Tokens under the padding would leak into the mean or into the attention of an exit."""
    model = load_exits(bert, exit_pooling="mean")
    inputs = bert.inputs(padding="right")
    other = dict(inputs, input_ids=torch.where(inputs["attention_mask"] == 0, 7, inputs["input_ids"]))
    with torch.no_grad():
        assert_close(model(**inputs).exit_logits, model(**other).exit_logits)


def test_hidden_states_and_attentions_are_stocks(architecture, load_stock, load_exits):
    """Tools that read hidden states or attentions would see other numbers than before, or none."""
    stock = load_stock(architecture, attn_implementation="eager")
    model = load_exits(architecture, exit_layers=[2], attn_implementation="eager")
    for _, inputs in each_input(architecture):
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True, output_attentions=True)
            expected = stock(**inputs, output_hidden_states=True, output_attentions=True)
            plain = model(**inputs)
        assert len(output.hidden_states) == len(expected.hidden_states) == 5
        assert len(output.attentions) == len(expected.attentions) == 4
        for actual, wanted in zip(
            output.hidden_states + output.attentions, expected.hidden_states + expected.attentions, strict=True
        ):
            assert_close(actual, wanted)
        assert plain.hidden_states is None
        assert plain.attentions is None


def test_hidden_states_by_config(architecture, load_exits):
    """The config's own switches would be overridden by a keyword's default."""
    model = load_exits(architecture, attn_implementation="eager")
    model.config.output_hidden_states = model.config.output_attentions = True
    with torch.no_grad():
        output = model(**architecture.inputs())
    assert (len(output.hidden_states), len(output.attentions)) == (5, 4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_gradients_of_the_last_exit_are_stocks(architecture, load_stock, load_exits, attention):
    """Fine-tuning through the last exit would be another training than the stock model's."""
    stock = load_stock(architecture, attn_implementation=attention)
    model = load_exits(architecture, exit_layers=[1, 3], attn_implementation=attention)
    inputs = architecture.inputs(padding=architecture.paddings[0])
    F.cross_entropy(model(**inputs).logits, LABELS).backward()
    F.cross_entropy(stock(**inputs).logits, LABELS).backward()
    expected, actual = gradients(stock), gradients(model)
    assert set(expected) == {name for name, _ in stock.named_parameters()}
    assert set(actual) == set(expected)
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


# Loading and saving


def test_backbone_only_checkpoint(architecture, load_exits, load_stock, stock_folders):
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


def test_newly_initialized(architecture, load_exits, tmp_path):
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
    config = BertConfig(**{**bert.stock_config.to_dict(), "num_labels": 1 if "Choice" in stock_class.__name__ else 3})
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
    """Once written, the last exit's pooling is part of the model: a second load must not choose it anew."""
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


def test_fewer_layers(architecture, load_exits, load_stock):
    """A cut network keeps the head: exit K is then the stock head on the shallower network."""
    stock = load_stock(architecture, num_hidden_layers=2)
    model = load_exits(architecture, num_hidden_layers=2, exit_layers=[1])
    assert model.config.exit_layers == [1, 2]
    assert len(architecture.layers(model)) == 2
    inputs = architecture.inputs()
    with torch.no_grad():
        assert_close(model(**inputs).logits, stock(**inputs).logits)


def test_only_the_last_exit(architecture, load_exits, load_stock):
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


def test_loading_info(architecture, stock_folders):
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


# Inputs and options of forward


def test_inputs_embeds(bert, load_exits):
    """Prompts and attributions feed embeddings instead of ids."""
    model, inputs = load_exits(bert), bert.inputs(padding="right")
    input_ids = inputs.pop("input_ids")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(input_ids)
        assert_equal(
            model(inputs_embeds=embeds, **inputs).exit_logits, model(input_ids=input_ids, **inputs).exit_logits
        )
        for wrong in ({}, {"input_ids": input_ids, "inputs_embeds": embeds}):
            with pytest.raises(ValueError, match="input_ids.*inputs_embeds"):
                model(**wrong, **inputs)


def test_position_ids_and_token_types(bert, load_exits, load_stock):
    """An input that is accepted and ignored is a wrong answer without an error."""
    model, stock, inputs = load_exits(bert), load_stock(bert), bert.inputs(padding="right")
    inputs["position_ids"] = torch.arange(12).flip(0).unsqueeze(0)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert_close(logits, stock(**inputs).logits)
        for name in ("position_ids", "token_type_ids"):
            changed = {key: value for key, value in inputs.items() if key != name}
            assert not torch.allclose(model(**changed).logits, logits, atol=1e-3)


def test_interpolated_positions(vit, load_exits, load_stock):
    """A ViT at another image size reads resized position embeddings."""
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = load_exits(vit)(pixel_values=pixels, interpolate_pos_encoding=True).logits
        assert_close(logits, load_stock(vit)(pixel_values=pixels, interpolate_pos_encoding=True).logits)
        with pytest.raises(ValueError, match="pixel_values"):
            load_exits(vit)()


def test_tuple_output(architecture, load_exits):
    """`return_dict=False` is how tracing and old scripts read the outputs: order and numbers."""
    model, inputs = load_exits(architecture), architecture.inputs()
    with torch.no_grad():
        named = model(**inputs, labels=LABELS)
        plain = model(**inputs, labels=LABELS, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 3
    for actual, expected in zip(plain, (named.loss, named.logits, named.exit_logits), strict=True):
        assert_equal(actual, expected)


def test_bfloat16(architecture, load_exits, stock_folders):
    """Half precision is how large encoders are served: every part must follow the model's dtype."""
    model, inputs = load_exits(architecture), architecture.inputs(padding=architecture.paddings[0])
    with torch.no_grad():
        expected = model(**inputs).exit_logits
        half = model.to(torch.bfloat16)(**inputs, labels=LABELS)
    assert half.exit_logits.dtype == torch.bfloat16
    assert half.loss.dtype == torch.float32
    error = (half.exit_logits.float() - expected).abs().max() / expected.abs().max()
    assert error < 0.05
    loaded = architecture.model_class.from_pretrained(stock_folders[architecture.name, "head"], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


def test_autocast(architecture, load_exits):
    """Mixed precision runs layers in bf16 and norms in float32: boosted sums must take both."""
    model = load_exits(architecture, exit_aggregation="boosted")
    inputs = architecture.inputs(padding=architecture.paddings[0])
    with torch.no_grad():
        expected = model(**inputs).exit_logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = model(**inputs, labels=LABELS)
    assert actual.loss.dtype == torch.float32
    assert (actual.exit_logits.float() - expected).abs().max() / expected.abs().max() < 0.05


# The new name of these calls is younger than the oldest transformers that is supported.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing(architecture, load_exits, frozen):
    """Checkpointing saves memory only; other gradients mean another training."""
    reference = load_exits(architecture, exit_layers=[1, 3], **NO_DROPOUT).train()
    inputs = architecture.inputs(padding=architecture.paddings[0])
    checkpointed = copy.deepcopy(reference)
    checkpointed.gradient_checkpointing_enable()
    for model in (reference, checkpointed):
        if frozen:
            model.freeze_backbone()
        model(**inputs, labels=LABELS).loss.backward()
    assert checkpointed.is_gradient_checkpointing
    expected, actual = gradients(reference), gradients(checkpointed)
    assert set(actual) == set(expected)
    assert all(name.startswith("exit_heads.") for name in actual) == frozen
    for name, gradient in expected.items():
        assert_close(actual[name], gradient)


# Loss


def _softmax_loss(logits, target):
    total = sum(math.exp(value) for value in logits)
    return -sum(share * math.log(math.exp(value) / total) for share, value in zip(target, logits, strict=True))


def _squared_loss(logits, target):
    return sum((value - wanted) ** 2 for value, wanted in zip(logits, target, strict=True)) / len(logits)


def _binary_loss(logits, target):
    chances = [1 / (1 + math.exp(-value)) for value in logits]
    parts = [math.log(c) if wanted else math.log(1 - c) for c, wanted in zip(chances, target, strict=True)]
    return -sum(parts) / len(parts)


def _soft_labels():
    shares = torch.rand(6, 3, generator=torch.Generator().manual_seed(3))
    return shares / shares.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("problem", "num_labels", "problem_type", "labels", "formula"),
    [
        ("single_label_classification", 3, None, LABELS, _softmax_loss),
        ("single_label_classification", 3, "single_label_classification", _soft_labels(), _softmax_loss),
        ("regression", 1, None, torch.linspace(0, 5, 6), _squared_loss),
        ("regression", 3, "regression", torch.randn(6, 3), _squared_loss),
        ("multi_label_classification", 3, None, torch.eye(3).repeat(2, 1), _binary_loss),
    ],
    ids=["classes", "soft_labels", "regression", "regression_3", "multi_label"],
)
def test_loss_is_the_joint_loss(architecture, stock_folders, problem, num_labels, problem_type, labels, formula):
    """A plain Trainer trains by `loss`: the mean over rows, summed over exits, of the problem's own loss."""
    model = architecture.model_class.from_pretrained(
        stock_folders[architecture.name, "head"],
        num_labels=num_labels,
        problem_type=problem_type,
        ignore_mismatched_sizes=True,
    ).eval()
    with torch.no_grad():
        output = model(**architecture.inputs(), labels=labels)
    assert model.config.problem_type == problem
    if problem == "single_label_classification" and not labels.is_floating_point():
        targets = [[float(label == index) for index in range(3)] for label in labels.tolist()]
    else:
        targets = labels.view(6, -1).tolist()
    total = 0.0
    for row, target in zip(output.exit_logits.double().tolist(), targets, strict=True):
        total += sum(formula(logits, target) for logits in row) / 6
    assert output.loss.item() == pytest.approx(total, abs=1e-5)


def test_last_exits_loss_is_stocks(architecture, load_stock, load_exits):
    """With one exit, fine-tuning here must be fine-tuning there."""
    model, stock, inputs = load_exits(architecture, exit_layers=[4]), load_stock(architecture), architecture.inputs()
    with torch.no_grad():
        assert_close(model(**inputs, labels=LABELS).loss, stock(**inputs, labels=LABELS).loss)


def test_trainer_scales_the_loss(architecture):
    """A forward with keywords makes the Trainer believe otherwise: gradients 4 x too large at 4 accumulation steps."""
    assert architecture.model_class.accepts_loss_kwargs is False


# Boosting


def test_boosted_stop_gradient_is_exact(architecture, load_exits):
    """A gradient through F_{k-1} would train early exits for the errors of late ones."""
    for exit_index in range(3):
        model = load_exits(architecture, exit_layers=[1, 3], exit_aggregation="boosted")
        model(**architecture.inputs()).exit_logits[:, exit_index].square().sum().backward()
        for other in range(3):
            for module in model.exit_head_modules(other):
                for parameter in module.parameters():
                    if other == exit_index:
                        assert parameter.grad.abs().sum() > 0
                    else:
                        assert parameter.grad is None or not parameter.grad.any()


def _block_gradients(architecture, model, inputs, labels, rescale):
    """Gradients of the joint boosted loss, block by block: g_k = (g_head + (K-k) g_next) / (K-k+1), or their sum."""
    config, layers = model.config, architecture.layers(model)
    kwargs = {key: value for key, value in inputs.items() if key != "attention_mask"}
    embeddings = architecture.backbone(model).embeddings
    context = model.make_context(model.embed(**inputs))
    starts = [0, *config.exit_layers[:-1]]

    def run(block, hidden):
        for layer in layers[starts[block] : config.exit_layers[block]]:
            hidden = layer(hidden, context)
        return hidden

    count = len(config.exit_layers)
    block_inputs, head_gradients, result, previous = [], [], {}, 0.0
    hidden = embeddings(**kwargs).detach()
    for block in range(count):
        block_inputs.append(hidden)
        hidden = run(block, hidden).detach().requires_grad_()
        modules = model.exit_head_modules(block)
        last = block == count - 1
        parameters = [
            (n, p) for n, p in model.named_parameters() if any(p is q for m in modules for q in m.parameters())
        ]
        own = model.last_head(hidden, None) if last else model.exit_heads[str(config.exit_layers[block])](hidden)
        boosted = own + config.boost_temperature * previous
        previous = boosted.detach()
        loss = F.cross_entropy(boosted, labels)
        values = torch.autograd.grad(loss, [hidden, *(p for _, p in parameters)])
        head_gradients.append(values[0])
        result.update(zip([n for n, _ in parameters], values[1:], strict=True))
        hidden = hidden.detach()
    arriving = torch.zeros_like(head_gradients[-1])
    for block in reversed(range(count)):
        left = count - 1 - block
        if rescale:
            received = (head_gradients[block] + left * arriving) / (left + 1)
        else:
            received = head_gradients[block] + arriving
        start = block_inputs[block].clone().requires_grad_()
        prefixes = [f"{layer}." for layer in range(starts[block], config.exit_layers[block])]
        where = "bert.encoder.layer." if architecture.name == "bert" else "vit.layers."
        parameters = [
            (n, p) for n, p in model.named_parameters() if any(n.startswith(where + prefix) for prefix in prefixes)
        ]
        values = torch.autograd.grad(run(block, start), [start, *(p for _, p in parameters)], received)
        arriving = values[0]
        result.update(zip([n for n, _ in parameters], values[1:], strict=True))
    names = [(n, p) for n, p in model.named_parameters() if n.startswith(f"{architecture.name}.embeddings")]
    values = torch.autograd.grad(embeddings(**kwargs), [p for _, p in names], arriving)
    result.update(zip([n for n, _ in names], values, strict=True))
    return result


@pytest.mark.parametrize("rescale", [True, False])
def test_gradient_rescaling_follows_its_recursion(architecture, load_exits, rescale):
    """Scaled at the wrong place, early blocks drown in the gradients of K exits or starve."""
    model = load_exits(
        architecture,
        exit_layers=[1, 3],
        exit_pooling="cls",
        exit_aggregation="boosted",
        gradient_rescale=rescale,
        **NO_DROPOUT,
    )
    model = model.double().train()
    inputs = architecture.inputs(padding=architecture.paddings[0])
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    expected = _block_gradients(architecture, model, inputs, LABELS, rescale)
    model(**inputs, labels=LABELS).loss.backward()
    actual = gradients(model)
    assert set(actual) == set(expected) == {name for name, _ in model.named_parameters()}
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, 1e-10)


def test_gradient_rescaling_leaves_outputs_and_eval_alone(architecture, load_exits):
    """A scale of gradients that changes a forward pass, or the gradients of an attribution in eval mode."""
    inputs = architecture.inputs()
    models = [load_exits(architecture, gradient_rescale=rescale) for rescale in (False, True)]
    outputs = [model(**inputs, labels=LABELS) for model in models]
    assert_equal(outputs[1].exit_logits, outputs[0].exit_logits)
    for output in outputs:
        output.loss.backward()
    for name, gradient in gradients(models[0]).items():
        assert_equal(gradients(models[1])[name], gradient)


# Freezing


def test_frozen_backbone_stays_to_the_bit(architecture, load_exits):
    """The promise of --freeze_backbone: the fine-tuned model inside answers as before, whatever the exits learn."""
    model, inputs = load_exits(architecture, exit_layers=[1, 3]), architecture.inputs()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        logits = model(**inputs).logits
    model.freeze_backbone()
    model.train()
    assert model.training
    backbone = architecture.backbone(model)
    assert not any(module.training for module in backbone.modules())
    assert not any(module.training for head in model.last_head_modules for module in head.modules())
    assert all(module.training for module in model.exit_heads.modules())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(**inputs, labels=LABELS)
        # Dropout in the backbone or the last head would show here.
        assert_equal(output.logits, logits)
        output.loss.backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        if name.startswith("exit_heads."):
            assert not torch.equal(tensor, before[name])
        else:
            assert_equal(tensor, before[name])
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    assert not any(module.training for module in backbone.modules())


def test_freezing_is_refused_where_it_means_nothing(architecture, load_exits):
    """Freezing a random last head, or one that boosting changes, would break the promise; one exit trains nothing."""
    for model, words in (
        (load_exits(architecture, what="backbone"), "fine-tuned"),
        (architecture.model_class(copy.deepcopy(load_exits(architecture).config)), "fine-tuned"),
        (load_exits(architecture, exit_aggregation="boosted"), "--method"),
        (load_exits(architecture, exit_layers=[4]), "--exit_layers"),
    ):
        with pytest.raises(ExitConfigurationError, match="--freeze_backbone") as raised:
            model.freeze_backbone()
        assert words in str(raised.value)
        # A refused call must not have frozen half of the model.
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_models_without_a_checkpoint(architecture):
    """Training from scratch starts from a config: every weight must be initialised."""
    torch.manual_seed(0)
    config = architecture.config_class(**{**architecture.stock_config.to_dict(), "model_type": None}, exit_layers=[2])
    model = architecture.model_class(config).eval()
    assert model.config.last_exit_pooling == ("mean" if architecture.name == "bert" else "cls")
    with torch.no_grad():
        exit_logits = model(**architecture.inputs()).exit_logits
    assert exit_logits.shape == (6, 2, 3)
    assert torch.isfinite(exit_logits).all()
    deviation = model.exit_heads["2"].classifier.weight.std().item()
    assert deviation == pytest.approx(config.initializer_range, rel=0.3)
    assert not model.exit_heads["2"].classifier.bias.any()


def test_classifier_dropout_reaches_every_head():
    """`classifier_dropout` of a checkpoint would act on its own head only."""
    config = BertConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
        classifier_dropout=0.4,
    )  # fmt: skip
    model = EarlyExitBertForSequenceClassification(
        EarlyExitBertForSequenceClassification.config_class.from_dict({**config.to_dict(), "model_type": None})
    )
    assert (model.dropout.p, model.exit_heads["1"].dropout.p) == (0.4, 0.4)


def test_a_model_that_another_process_pickled_is_saved_with_its_code(tmp_path):
    """What breaks: a queue worker's `save_pretrained` leaves a folder that loads only where een_hf is installed."""
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(tiny_model()))
    code = "import pickle, sys; pickle.load(open(f'{sys.argv[1]}/model.pkl', 'rb')).save_pretrained(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=Path(__file__).parents[2])
    assert "auto_map" in json.loads((tmp_path / "config.json").read_text())
    assert (tmp_path / "modeling_een_bert.py").is_file()
