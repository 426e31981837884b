"""Early-exit models against the stock models they are made of: logits, hidden states, gradients."""

import copy

import pytest
import torch
import torch.nn.functional as F
from factory import NO_DROPOUT, tiny_model
from models.comparing import LABELS, assert_close, assert_equal, each_input, gradients


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


def test_the_config_may_ask_for_hidden_states(architecture, load_exits):
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


def test_embeddings_are_answered_as_their_tokens(bert, load_exits):
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


def test_position_ids_and_token_types_are_read(bert, load_exits, load_stock):
    """An input that is accepted and ignored is a wrong answer without an error."""
    model, stock, inputs = load_exits(bert), load_stock(bert), bert.inputs(padding="right")
    inputs["position_ids"] = torch.arange(12).flip(0).unsqueeze(0)
    with torch.no_grad():
        logits = model(**inputs).logits
        assert_close(logits, stock(**inputs).logits)
        for name in ("position_ids", "token_type_ids"):
            changed = {key: value for key, value in inputs.items() if key != name}
            assert not torch.allclose(model(**changed).logits, logits, atol=1e-3)


def test_images_of_another_size_read_interpolated_positions(vit, load_exits, load_stock):
    """A ViT at another image size reads resized position embeddings."""
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = load_exits(vit)(pixel_values=pixels, interpolate_pos_encoding=True).logits
        assert_close(logits, load_stock(vit)(pixel_values=pixels, interpolate_pos_encoding=True).logits)
        with pytest.raises(ValueError, match="pixel_values"):
            load_exits(vit)()


def test_a_tuple_holds_the_same_in_order(architecture, load_exits):
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
def test_gradient_checkpointing_changes_no_gradient(architecture, load_exits, frozen):
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
    model = tiny_model(classifier_dropout=0.4)
    assert (model.dropout.p, model.exit_heads["1"].dropout.p) == (0.4, 0.4)
