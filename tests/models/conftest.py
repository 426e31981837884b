"""Tiny random models of every architecture, made once per session, and a reference that shares no code with een_hf."""

import copy
import importlib
import inspect
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    DeiTForImageClassificationWithTeacher,
)

from een_hf.models import MODEL_CLASSES


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

    @property
    def text(self):
        return self.model_class.main_input_name == "input_ids"

    def backbone(self, model):
        return model.base_model

    def layers(self, model):
        return self.backbone(model).encoder.layer if self.name == "bert" else self.backbone(model).layers

    def inputs(self, batch_size=6, padding="none", lengths=None, seed=0):
        """Random inputs: text of these `lengths`, padded `right`, `left` or not at all (`none`), or images."""
        generator = torch.Generator().manual_seed(seed)
        if not self.text:
            return {"pixel_values": torch.randn(batch_size, 3, 16, 16, generator=generator) * 3}
        lengths = lengths or [LENGTHS[row % len(LENGTHS)] for row in range(batch_size)]
        width = max(LENGTHS)
        inputs = {"input_ids": torch.randint(1, 99, (len(lengths), width), generator=generator)}
        if "token_type_ids" in inspect.signature(self.stock_class.forward).parameters:
            types = max(1, self.stock_config.type_vocab_size)
            inputs["token_type_ids"] = torch.randint(0, types, (len(lengths), width), generator=generator)
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


TEXT = {**SHAPE, "vocab_size": 99, "max_position_embeddings": 40}
# Dropout as BERT has it.
IMAGE = {**SHAPE, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "image_size": 16, "patch_size": 4}
RELATIVE = {**TEXT, "relative_attention": True, "pos_att_type": "c2p|p2c", "position_biased_input": False}
# The stock type of each, and a tiny config; where a type has several forms of layers or heads, each of them.
STOCK = {
    "bert": ("bert", TEXT),
    "vit": ("vit", IMAGE),
    "roberta": ("roberta", TEXT),
    "xlm-roberta": ("xlm-roberta", TEXT),
    "camembert": ("camembert", TEXT),
    "distilbert": (
        "distilbert",
        {"dim": HIDDEN, "n_layers": NUM_LAYERS, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99},
    ),
    "electra": ("electra", {**TEXT, "embedding_size": 24}),
    "mpnet": ("mpnet", TEXT),
    # From outside the package; with trigrams a token reads its neighbour, be it padding.
    "mobilebert": (
        "mobilebert",
        {
            **TEXT,
            "embedding_size": 16,
            "intra_bottleneck_size": 16,
            "num_feedforward_networks": 2,
            "trigram_input": False,
        },
    ),
    "modernbert": ("modernbert", {**TEXT, "local_attention": 4, "pad_token_id": 0, "classifier_pooling": "mean"}),
    "modernbert_cls": ("modernbert", {**TEXT, "local_attention": 4, "pad_token_id": 0}),
    "deberta": ("deberta", {**RELATIVE, "type_vocab_size": 2}),
    "deberta-v3": (
        "deberta-v2",
        {**RELATIVE, "position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
    "deberta-v2": ("deberta-v2", {**RELATIVE, "position_buckets": 8, "conv_kernel_size": 3, "type_vocab_size": 2}),
    "deberta-v2_absolute": ("deberta-v2", TEXT),
    "deit": ("deit", IMAGE),
    "deit_teacher": ("deit", IMAGE),
    "dinov2": ("dinov2", {**IMAGE, "mlp_ratio": 2}),
    "dinov2_with_registers": ("dinov2_with_registers", {**IMAGE, "mlp_ratio": 2}),
    "beit": ("beit", {**IMAGE, "use_relative_position_bias": True}),
    "beit_shared": (
        "beit",
        {
            **IMAGE,
            "use_shared_relative_position_bias": True,
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": False,
        },
    ),
}


def _architecture(name):
    model_type, settings = STOCK[name]
    if model_type == "mobilebert":
        importlib.import_module("mobilebert_adapter")
    config = AutoConfig.for_model(model_type, **settings, num_labels=NUM_LABELS)
    model_class = MODEL_CLASSES[model_type]
    text = model_class.main_input_name == "input_ids"
    auto_class = AutoModelForSequenceClassification if text else AutoModelForImageClassification
    classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if text else MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
    stock_class = classes[type(config)]
    if isinstance(stock_class, tuple):
        stock_class = stock_class[0]
    return Architecture(
        name,
        config,
        DeiTForImageClassificationWithTeacher if name == "deit_teacher" else stock_class,
        MODEL_MAPPING[type(config)],
        model_class.config_class,
        model_class,
        auto_class,
        ("cls", "cls_mean", "mean") if text else ("cls", "mean", "cls_mean"),
        ("right", "left", "none") if text else ("none",),
    )


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
    return _architecture(request.param)


# Networks that another in the list nearly is.
TWINS = ("xlm-roberta", "camembert", "modernbert_cls", "deberta-v2_absolute", "dinov2", "beit_shared")


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=pytest.mark.slow if name in TWINS else ()) for name in STOCK],
)
def any_architecture(request) -> Architecture:
    return _architecture(request.param)


@pytest.fixture(scope="session")
def bert() -> Architecture:
    return _architecture("bert")


@pytest.fixture(scope="session")
def vit() -> Architecture:
    return _architecture("vit")


class _StockFolders(dict):
    """(architecture name, what) to a folder: `head`, a fine-tuned stock classifier; `backbone`, without a head."""

    def __init__(self, make_folder):
        super().__init__()
        self.make_folder = make_folder

    def __missing__(self, key):
        name, what = key
        architecture = _architecture(name)
        torch.manual_seed(0)
        kind = architecture.stock_class if what == "head" else architecture.backbone_class
        self[key] = str(self.make_folder(f"stock_{name}_{what}"))
        _scramble(kind(copy.deepcopy(architecture.stock_config))).save_pretrained(self[key])
        return self[key]


@pytest.fixture(scope="session")
def stock_folders(tmp_path_factory):
    return _StockFolders(tmp_path_factory.mktemp)


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
