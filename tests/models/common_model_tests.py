"""transformers' common model and config tests on our classes; `test_transformers_common.py` runs this beside them."""

import inspect
import unittest

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask

from een_hf.models import MODEL_CLASSES


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
# What an architecture needs beside or instead of that, to be small.
OWN = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37},
    "electra": {**SHAPE, "embedding_size": 24},
    "modernbert": {**SHAPE, "local_attention": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "deberta": {**SHAPE, "relative_attention": True, "pos_att_type": "c2p|p2c", "position_biased_input": False},
    "deberta-v2": {**SHAPE, "relative_attention": True, "pos_att_type": "c2p|p2c", "position_buckets": 8},
    "dinov2": {**SHAPE, "mlp_ratio": 2},
    "dinov2_with_registers": {**SHAPE, "mlp_ratio": 2, "num_register_tokens": 4},
}


class Tester:
    """What `ModelTesterMixin` asks of the model tester of a stock architecture."""

    batch_size, vocab_size, image_size, patch_size = 13, 99, 16, 4
    num_hidden_layers, hidden_size, num_attention_heads, is_training = 2, 32, 4, True

    def __init__(self, model_class):
        self.model_class, self.config_class = model_class, model_class.config_class
        self.text = model_class.main_input_name == "input_ids"
        patches = (self.image_size // self.patch_size) ** 2
        self.seq_length = 7 if self.text else patches + self.get_config().num_prefix_tokens

    def get_config(self):
        own = OWN.get(self.config_class.stock_model_type, SHAPE)
        if not self.text:
            return self.config_class(**own, num_labels=3, image_size=self.image_size, patch_size=self.patch_size)
        return self.config_class(**own, num_labels=3, vocab_size=self.vocab_size, max_position_embeddings=64)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        if not self.text:
            return config, {"pixel_values": floats_tensor([self.batch_size, 3, self.image_size, self.image_size])}
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, self.vocab_size), "attention_mask": random_attention_mask(shape)}
        if "token_type_ids" in inspect.signature(self.model_class.forward).parameters:
            inputs["token_type_ids"] = ids_tensor(shape, max(1, config.type_vocab_size))
        return config, inputs


class CommonTests(ModelTesterMixin):
    def setUp(self):
        (model_class,) = self.all_model_classes
        self.model_tester = Tester(model_class)
        settings = self.model_tester.get_config().to_dict()
        names = ("hidden_size", "num_hidden_layers", "num_attention_heads")
        common = {name: settings[name] for name in names if name in settings}
        self.config_tester = ConfigTester(
            self, config_class=model_class.config_class, has_text_modality=self.model_tester.text, **common
        )

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        # The mixin gives labels to the stock classes by name.
        return {**inputs, "labels": torch.zeros(self.model_tester.batch_size).long()} if return_labels else inputs

    def test_config(self):
        self.config_tester.run_common_tests()


class ImageTests(CommonTests):
    test_resize_embeddings = False

    def test_model_get_set_embeddings(self):
        """As for the stock classes of images: what comes first is patches, no table of words."""
        model = self.all_model_classes[0](self.model_tester.get_config())
        assert isinstance(model.get_input_embeddings(), torch.nn.Module)
        assert model.get_output_embeddings() is None or isinstance(model.get_output_embeddings(), torch.nn.Linear)


# Switches of the mixin. The embedding of masked patches, which pretraining alone reads, gets no gradient.
SWITCHES = {name: {"test_all_params_have_gradient": False} for name in ("dinov2", "dinov2_with_registers")}


def _tests_of(model_class):
    base = CommonTests if model_class.main_input_name == "input_ids" else ImageTests
    switches = SWITCHES.get(model_class.config_class.stock_model_type, {})
    body = {"all_model_classes": (model_class,), "__module__": __name__, **switches}
    return type(f"{model_class.__name__}Test", (base, unittest.TestCase), body)


# RoBERTa's own network under other names, left out for time.
TWINS = {"xlm-roberta", "camembert"}
for _name in MODEL_CLASSES:
    if _name not in TWINS:
        _tests = _tests_of(MODEL_CLASSES[_name])
        globals()[_tests.__name__] = _tests
del _tests  # pytest would collect it twice
