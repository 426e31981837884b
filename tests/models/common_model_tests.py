"""transformers' common model tests on our classes; `test_transformers_common.py` runs this file beside them."""

import unittest

import torch
from tests.test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor, random_attention_mask

from een_hf.models import (
    EarlyExitBertConfig,
    EarlyExitBertForSequenceClassification,
    EarlyExitViTConfig,
    EarlyExitViTForImageClassification,
)


SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37, "num_labels": 3}


class BertTester:
    batch_size, seq_length = 13, 7
    num_hidden_layers, hidden_size, num_attention_heads, is_training = 2, 32, 4, True
    text = True

    def get_config(self):
        return EarlyExitBertConfig(**SHAPE, vocab_size=99, max_position_embeddings=64)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.seq_length]
        inputs = {"input_ids": ids_tensor(shape, 99), "attention_mask": random_attention_mask(shape)}
        return self.get_config(), {**inputs, "token_type_ids": ids_tensor(shape, 2)}


class ViTTester:
    batch_size = 13
    num_hidden_layers, hidden_size, num_attention_heads, is_training = 2, 32, 4, True
    seq_length = (30 // 2) ** 2 + 1

    def get_config(self):
        return EarlyExitViTConfig(**SHAPE, image_size=30, patch_size=2)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": floats_tensor([self.batch_size, 3, 30, 30])}


class CommonTests(ModelTesterMixin):
    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        # The mixin gives labels to the stock classes by name.
        return {**inputs, "labels": torch.zeros(self.model_tester.batch_size).long()} if return_labels else inputs


class EarlyExitBertTest(CommonTests, unittest.TestCase):
    all_model_classes = (EarlyExitBertForSequenceClassification,)

    def setUp(self):
        self.model_tester = BertTester()


class EarlyExitViTTest(CommonTests, unittest.TestCase):
    all_model_classes = (EarlyExitViTForImageClassification,)
    test_resize_embeddings = False

    def setUp(self):
        self.model_tester = ViTTester()

    def test_model_get_set_embeddings(self):
        """As for the stock ViT: what comes first is patches, no table of words."""
        model = EarlyExitViTForImageClassification(self.model_tester.get_config())
        assert isinstance(model.get_input_embeddings(), torch.nn.Module)
        assert model.get_output_embeddings() is None or isinstance(model.get_output_embeddings(), torch.nn.Linear)
