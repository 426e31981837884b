"""Loading of trained models: what is missing or damaged is said in one line that names the model."""

import json

import numpy as np
import pytest
from damage import wrong_json
from factory import tiny_model, tiny_processor
from transformers import ViTImageProcessor

from een_hf import AutoEarlyExitModel
from een_hf.inference.loading import load_early_exit_model, load_processor
from een_hf.models import ExitConfigurationError


@pytest.fixture
def folder(tmp_path):
    model = tiny_model(exit_layers=[1])
    model.set_exit_policy({"criterion": "confidence", "thresholds": [0.5, 0.0]})
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    return tmp_path


def change(path, **fields):
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    "content", ["null", "3", "[]", '["model_type"]', '"x"', "[" * 100_000, '{"model_type": []}', ""]
)
def test_a_config_that_is_none_is_refused(folder, content):
    """What breaks: whatever transformers makes of it ends in an AttributeError or a RecursionError."""
    (folder / "config.json").write_text(content)
    with pytest.raises(ExitConfigurationError) as refused:
        load_early_exit_model(str(folder))
    assert str(folder) in str(refused.value) and "\n" not in str(refused.value)


def test_any_wrong_config_is_named(folder):
    path = folder / "config.json"
    for text in wrong_json(json.loads(path.read_text()), np.random.default_rng(15), 15):
        path.write_text(text)
        try:
            load_early_exit_model(str(folder))
        except ExitConfigurationError as refused:
            assert str(folder) in str(refused) and "\n" not in str(refused), text


def test_a_policy_that_does_not_fit_is_found_when_the_model_is_loaded(folder):
    """What breaks: a server starts, says that it is well, and refuses every request."""
    change(folder / "config.json", exit_policy={"criterion": "confidence", "thresholds": [0.5]})
    with pytest.raises(ExitConfigurationError, match=f"{folder} cannot be loaded: .*1 thresholds.*2 exits"):
        load_early_exit_model(str(folder))


def test_damaged_weights_are_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ExitConfigurationError, match=f"The weights of {folder}.*cannot be read"):
        AutoEarlyExitModel.from_pretrained(folder)


def test_a_tokenizer_made_from_nothing_is_refused(folder):
    """What breaks: without its vocabulary the tokenizer loads, and every text gets the same answer."""
    model = load_early_exit_model(str(folder))
    assert load_processor(str(folder), model)("a").input_ids
    change(folder / "tokenizer_config.json", model_max_length=[])
    with pytest.raises(ExitConfigurationError, match=f"The tokenizer of MODEL {folder} cannot be loaded"):
        load_processor(str(folder), model)
    change(folder / "tokenizer_config.json", model_max_length=16)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ExitConfigurationError, match="has no vocabulary"):
        load_processor(str(folder), model)


def test_an_image_processor_that_changes_no_size_is_taken(tmp_path):
    """What breaks: a server refuses a model whose images have its size already."""
    model = tiny_model("vit").eval()
    ViTImageProcessor(do_resize=False).save_pretrained(tmp_path)
    assert load_processor(str(tmp_path), model)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"size": {"height": 16, "width": 16}}, "16"),
        ({"image_std": [0.0, 0.0, 0.0]}, "not finite"),
        ({"image_mean": [0.5, 0.5]}, "size of tensor"),
        ({"size": {"width": 8}}, "size"),
    ],
)
def test_an_image_processor_that_does_not_work_is_refused(fields, named, tmp_path):
    """What breaks: a server starts, and every request for an image fails."""
    model = tiny_model("vit").eval()
    tiny_processor("vit").save_pretrained(tmp_path)
    assert load_processor(str(tmp_path), model)
    change(tmp_path / "preprocessor_config.json", **fields)
    with pytest.raises(ExitConfigurationError, match=f"The image processor of MODEL {tmp_path} cannot.*{named}"):
        load_processor(str(tmp_path), model)
