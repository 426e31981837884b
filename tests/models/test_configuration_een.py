"""The exit fields of a config: what is filled in, what is refused, and that overrides and JSON keep them."""

import json

import pytest
from transformers.utils import logging

from een_hf.models import EarlyExitBertConfig, EarlyExitViTConfig, ExitConfigurationError


pytestmark = pytest.mark.parametrize("config_class", [EarlyExitBertConfig, EarlyExitViTConfig])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [1, 2, 3, 4, 5, 6]),
        ([2, 4], [2, 4, 6]),
        ([2, 6], [2, 6]),
        ([6], [6]),
        ([], [6]),
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
    ],
)
def test_exit_layers_are_completed(config_class, given, expected):
    """Without this, exit K would not be the network's own head, and a saved list would be ambiguous."""
    config = config_class(num_hidden_layers=6, exit_layers=given)
    assert config.exit_layers == expected
    assert json.loads(config.to_json_string())["exit_layers"] == expected


def test_given_list_is_left_alone(config_class):
    """A caller that reuses its list for a second network would pass on the first one's last layer."""
    layers = [2, 4]
    config_class(num_hidden_layers=6, exit_layers=layers)
    assert layers == [2, 4]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"exit_layers": [2, 7]}, ["--exit_layers", "layer 7", "1 to 6"]),
        ({"exit_layers": [0, 3]}, ["--exit_layers", "layer 0", "1 to 6"]),
        ({"exit_layers": [-1]}, ["--exit_layers", "layer -1", "1 to 6"]),
        ({"exit_layers": [2, 4, 2]}, ["--exit_layers", "layer 2", "twice"]),
        ({"exit_layers": [4, 2]}, ["--exit_layers", "[2, 4]", "[4, 2]"]),
        ({"exit_pooling": "max"}, ["--exit_pooling", "'max'", "cls"]),
        ({"last_exit_pooling": "max"}, ["last_exit_pooling", "'max'", "cls"]),
        ({"exit_aggregation": "sum"}, ["exit_aggregation", "'sum'", "none", "boosted"]),
    ],
)
def test_bad_field_is_named_with_what_would_be_right(config_class, fields, words):
    """A setting that does not fit would surface later as an index error, or be ignored without a word."""
    with pytest.raises(ExitConfigurationError) as raised:
        config_class(num_hidden_layers=6, **fields)
    assert isinstance(raised.value, ValueError)
    for word in words:
        assert word in str(raised.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"exit_layers": "2,4"},
        {"exit_layers": [2.5]},
        {"exit_pooling": 1},
        {"boost_temperature": "half"},
        {"gradient_rescale": "no"},
        {"exit_policy": "confidence"},
    ],
)
def test_wrong_type_is_named(config_class, fields):
    """The string "no" would be true, and a string of layers would be taken letter by letter."""
    with pytest.raises(Exception, match=next(iter(fields))):
        config_class(num_hidden_layers=6, **fields)


def test_saved_without_a_pooling_means_the_class_token(config_class, tmp_path):
    """Models saved before the field was always written read the class token: another default changes their answers."""
    fresh = config_class(num_hidden_layers=6)
    assert fresh.exit_pooling == {"een_bert": "mean", "een_vit": "cls_mean"}[config_class.model_type]
    fresh.save_pretrained(tmp_path)
    assert config_class.from_pretrained(tmp_path).exit_pooling == fresh.exit_pooling
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["exit_pooling"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert config_class.from_pretrained(tmp_path).exit_pooling == "cls"
    assert config_class.from_pretrained(tmp_path, exit_pooling="mean").exit_pooling == "mean"


def test_defaults_change_nothing(config_class):
    """Defaults that boost, rescale gradients or exit early would change people's models unasked."""
    config = config_class()
    assert (config.exit_aggregation, config.boost_temperature) == ("none", 0.5)
    assert config.gradient_rescale is False
    assert config.exit_policy is None
    assert config.last_exit_pooling is None
    assert config.keys_to_ignore_at_inference == ["exit_logits", "exit_index", "hidden_states", "attentions"]


def test_model_type_differs_from_stock(config_class):
    """With the stock model_type, saved models would load as stock models and lose their exits."""
    assert config_class.model_type == "een_" + config_class.stock_model_type


FIELDS = {
    "num_hidden_layers": 6,
    "exit_layers": [2, 4, 6],
    "last_exit_pooling": "cls",
    "exit_aggregation": "boosted",
    "boost_temperature": 0.25,
    "gradient_rescale": True,
    "exit_policy": {"criterion": "confidence", "thresholds": [0.9, 0.8, 0.0], "temperatures": [1.5, 1.0, 2]},
}


def test_json_round_trip(config_class, tmp_path):
    """A field lost on the way to disk changes what a reloaded model predicts."""
    config = config_class(**FIELDS, num_labels=5, problem_type="single_label_classification")
    config.save_pretrained(tmp_path)
    on_disk = json.loads((tmp_path / "config.json").read_text())
    reloaded = config_class.from_pretrained(tmp_path)
    for name, value in FIELDS.items():
        assert on_disk[name] == value
        assert getattr(reloaded, name) == value
    assert reloaded.num_labels == 5
    assert reloaded.problem_type == "single_label_classification"
    assert reloaded.to_dict() == config.to_dict()


def test_overrides_take_part_in_construction(config_class, tmp_path):
    """Overrides set after construction would skip the checks and leave the last layer out."""
    config_class(**FIELDS).save_pretrained(tmp_path)
    assert config_class.from_pretrained(tmp_path, exit_layers=[1, 5]).exit_layers == [1, 5, 6]
    assert config_class.from_pretrained(tmp_path, exit_layers=None).exit_layers == [1, 2, 3, 4, 5, 6]
    shorter = config_class.from_pretrained(tmp_path, exit_layers=[1], num_hidden_layers=3)
    assert (shorter.exit_layers, shorter.num_hidden_layers) == ([1, 3], 3)
    with pytest.raises(ExitConfigurationError, match="--exit_layers.*layer 5.*1 to 3"):
        config_class.from_pretrained(tmp_path, exit_layers=[5], num_hidden_layers=3)
    with pytest.raises(ExitConfigurationError, match="exit_aggregation"):
        config_class.from_pretrained(tmp_path, exit_aggregation="sum")
    # The saved exits do not fit the shorter network: silently dropping some would move the last exit.
    with pytest.raises(ExitConfigurationError, match="--exit_layers"):
        config_class.from_pretrained(tmp_path, num_hidden_layers=3)


def test_unused_keywords_come_back(config_class, tmp_path):
    """Auto classes pass on what the config did not take; swallowed here, `dtype` and the like would be ignored."""
    config_class(**FIELDS).save_pretrained(tmp_path)
    config, unused = config_class.from_pretrained(
        tmp_path, exit_layers=[3], num_labels=7, unheard_of=1, return_unused_kwargs=True
    )
    assert (config.exit_layers, config.num_labels) == ([3, 6], 7)
    assert unused == {"unheard_of": 1}


def test_stock_config_file_becomes_exits(config_class, tmp_path, caplog):
    """A stock config on disk becomes a full early-exit config by itself, without a warning: peft reads it so."""
    stock_class = next(base for base in config_class.__mro__ if base.__module__.startswith("transformers.models"))
    stock_class(num_hidden_layers=3, hidden_size=24, num_attention_heads=2, num_labels=4).save_pretrained(tmp_path)
    logging.enable_propagation()
    try:
        config = config_class.from_pretrained(tmp_path, exit_layers=[1])
    finally:
        logging.disable_propagation()
    assert (config.exit_layers, config.hidden_size, config.num_labels) == ([1, 3], 24, 4)
    assert config.model_type == config_class.model_type
    assert not caplog.text
