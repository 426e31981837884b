"""Tiny random models of every architecture, made once per session, and a reference that shares no code with een_hf."""

import copy
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from een_hf.models import (
    EarlyExitBertConfig,
    EarlyExitBertForSequenceClassification,
    EarlyExitViTConfig,
    EarlyExitViTForImageClassification,
)


NUM_LAYERS, NUM_LABELS, HIDDEN = 4, 3, 32
SHAPE = {"hidden_size": HIDDEN, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
# Longest row full, one row of a single token, two equal lengths: the corners of padding.
LENGTHS = (12, 5, 9, 1, 12, 7)


@dataclass(frozen=True)
class Architecture:
    """One architecture: its stock classes, its early-exit classes and how to feed it."""

    name: str
    stock_config: object
    stock_class: type
    backbone_class: type
    config_class: type
    model_class: type
    auto_class: type
    poolings: tuple[str, ...]
    paddings: tuple[str, ...]

    def backbone(self, model):
        return getattr(model, self.name)

    def layers(self, model):
        return self.backbone(model).encoder.layer if self.name == "bert" else self.backbone(model).layers

    def inputs(self, batch_size=6, padding="none", lengths=None, seed=0):
        """Random inputs: text of these `lengths`, padded `right`, `left` or not at all (`none`), or images."""
        generator = torch.Generator().manual_seed(seed)
        if self.name == "vit":
            return {"pixel_values": torch.randn(batch_size, 3, 16, 16, generator=generator) * 3}
        lengths = lengths or [LENGTHS[row % len(LENGTHS)] for row in range(batch_size)]
        width = max(LENGTHS)
        inputs = {
            "input_ids": torch.randint(1, 99, (len(lengths), width), generator=generator),
            "token_type_ids": torch.randint(0, 2, (len(lengths), width), generator=generator),
        }
        if padding != "none":
            mask = torch.zeros(len(lengths), width, dtype=torch.int64)
            for row, length in enumerate(lengths):
                mask[row, slice(0, length) if padding == "right" else slice(width - length, width)] = 1
            inputs["attention_mask"] = mask
        return inputs

    def head_by_hand(self, model, layer, pooled):
        """The stock head (layer None) or the exit head after `layer`, as formulas on its weights."""
        state = {name: tensor.to(pooled.dtype) for name, tensor in model.state_dict().items()}
        exit_prefix = f"exit_heads.{layer}."
        if self.name == "bert":
            dense = "bert.pooler.dense" if layer is None else exit_prefix + "dense"
            features = torch.tanh(pooled @ state[dense + ".weight"].T + state[dense + ".bias"])
        else:
            norm = "vit.layernorm" if layer is None else exit_prefix + "layernorm"
            centered = pooled - pooled.mean(-1, keepdim=True)
            deviation = (centered.square().mean(-1, keepdim=True) + model.config.layer_norm_eps).sqrt()
            features = centered / deviation * state[norm + ".weight"] + state[norm + ".bias"]
        classifier = "classifier" if layer is None else exit_prefix + "classifier"
        return features @ state[classifier + ".weight"].T + state[classifier + ".bias"]

    def exit_logits_by_hand(self, model, stock_model, inputs, aggregate=True):
        """(batch, num_exits, num_labels) in float64 from the stock model's hidden states, rows pooled one by one."""
        config = model.config
        with torch.no_grad():
            hidden_states = stock_model(**inputs, output_hidden_states=True).hidden_states
        mask = inputs.get("attention_mask")
        exits = []
        for layer in config.exit_layers:
            last = layer == config.exit_layers[-1]
            rows = []
            for row, hidden in enumerate(hidden_states[layer].double()):
                tokens = [token for position, token in enumerate(hidden) if mask is None or mask[row, position]]
                if self.name == "vit":
                    tokens = tokens[1:]  # patches
                poolings = {"cls": hidden[0], "mean": sum(tokens) / len(tokens)}
                poolings["cls_mean"] = torch.cat([poolings["cls"], poolings["mean"]])
                rows.append(poolings[config.last_exit_pooling if last else config.exit_pooling])
            exits.append(self.head_by_hand(model, None if last else layer, torch.stack(rows)))
            if aggregate and config.exit_aggregation == "boosted" and len(exits) > 1:
                exits[-1] = exits[-1] + config.boost_temperature * exits[-2]
        return torch.stack(exits, 1)


def _architectures():
    bert = BertConfig(**SHAPE, vocab_size=99, max_position_embeddings=40, num_labels=NUM_LABELS)
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}  # BERT's default, too
    vit = ViTConfig(**SHAPE, **dropout, image_size=16, patch_size=4, num_labels=NUM_LABELS)
    return {
        "bert": Architecture(
            "bert",
            bert,
            BertForSequenceClassification,
            BertModel,
            EarlyExitBertConfig,
            EarlyExitBertForSequenceClassification,
            AutoModelForSequenceClassification,
            ("cls", "cls_mean", "mean"),
            ("right", "left", "none"),
        ),
        "vit": Architecture(
            "vit",
            vit,
            ViTForImageClassification,
            ViTModel,
            EarlyExitViTConfig,
            EarlyExitViTForImageClassification,
            AutoModelForImageClassification,
            ("cls", "mean", "cls_mean"),
            ("none",),
        ),
    }


def _scramble(model, seed=0, scale=0.15):
    """Random numbers in every parameter, norms and biases too, so that no part can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def _center(architecture, model):
    """Shift the biases of the exit heads so that rows differ in what they predict, and exits with them."""
    with torch.no_grad():
        means = model(**architecture.inputs(64, seed=11)).exit_logits.mean(0)
        for layer, mean in zip(model.config.exit_layers[:-1], means, strict=False):
            model.exit_heads[str(layer)].classifier.bias -= mean
    return model


@pytest.fixture(scope="session", params=["bert", "vit"])
def architecture(request) -> Architecture:
    return _architectures()[request.param]


@pytest.fixture(scope="session")
def bert() -> Architecture:
    return _architectures()["bert"]


@pytest.fixture(scope="session")
def vit() -> Architecture:
    return _architectures()["vit"]


@pytest.fixture(scope="session")
def stock_folders(tmp_path_factory):
    """(architecture name, what) to a folder: `head`, a fine-tuned stock classifier; `backbone`, without a head."""
    folders = {}
    torch.manual_seed(0)
    for name, architecture in _architectures().items():
        classifier = _scramble(architecture.stock_class(copy.deepcopy(architecture.stock_config)))
        backbone = _scramble(architecture.backbone_class(copy.deepcopy(architecture.stock_config)))
        for what, model in (("head", classifier), ("backbone", backbone)):
            folders[name, what] = str(tmp_path_factory.mktemp(f"stock_{name}_{what}"))
            model.save_pretrained(folders[name, what])
    return folders


@pytest.fixture
def load_stock(stock_folders):
    """A fresh stock classifier: `load_stock(architecture, **kwargs)`."""

    def load(architecture, **kwargs):
        return architecture.stock_class.from_pretrained(stock_folders[architecture.name, "head"], **kwargs).eval()

    return load


@pytest.fixture(scope="session")
def _loaded(stock_folders):
    cache = {}

    def load(architecture, what, **kwargs):
        key = (architecture.name, what, repr(sorted(kwargs.items(), key=lambda item: item[0])))
        if key not in cache:
            torch.manual_seed(0)
            model = architecture.model_class.from_pretrained(stock_folders[architecture.name, what], **kwargs)
            _scramble(model.exit_heads, seed=1, scale=0.3)
            cache[key] = _center(architecture, model.eval())
        return cache[key]

    return load


@pytest.fixture
def load_exits(_loaded):
    """A copy of an early-exit model on a stock checkpoint, random heads: `load_exits(architecture, **kwargs)`."""

    def load(architecture, what="head", **kwargs):
        return copy.deepcopy(_loaded(architecture, what, **kwargs))

    return load
