"""Tiny random models, rows and trainers; a test that depends on a size or a setting names it itself."""

import inspect
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertTokenizer,
    Trainer,
    ViTImageProcessor,
)

from een_hf.models import MODEL_CLASSES
from een_hf.training import EarlyExitTrainingArguments, get_scheme


NUM_LABELS = 3
SHAPE = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 60, "max_position_embeddings": 16}
IMAGE = {"image_size": 8, "patch_size": 4}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
LABELS = {"id2label": {0: "no", 1: "yes", 2: "perhaps"}, "label2id": {"no": 0, "yes": 1, "perhaps": 2}}
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]
# `exit_results.json` of a run with two exits.
RESULTS = {
    "method": "joint",
    "model_type": "bert",
    "dataset": "words",
    "task_name": None,
    "metric": "accuracy",
    "exit_layers": [1, 2],
    "num_eval_samples": 16,
    "num_calibration_samples": 8,
    "anytime": [
        {"exit": 1, "layer": 1, "relative_cost": 0.5, "loss": 0.7, "metrics": {"accuracy": 0.5}, "ece": 0.1},
        {"exit": 2, "layer": 2, "relative_cost": 1.0, "loss": 0.3, "metrics": {"accuracy": 0.9}, "ece": 0.2},
    ],
    "anytime_report": [],
    "budgeted": [
        {
            "target_cost": cost,
            "relative_cost": cost - 0.01,
            "metrics": {"accuracy": cost},
            "thresholds": [0.8, 0.0],
            "exit_fractions": [1 - cost, cost],
        }
        for cost in (0.6, 0.8)
    ],
    "policy": {
        "criterion": "confidence",
        "thresholds": [0.75, 0.0],
        "calibrated_for": {"target_cost": 0.7},
        "guarantee": None,
        "relative_cost": 0.68,
        "metrics": {"accuracy": 0.88},
        "exit_fractions": [0.6, 0.4],
    },
}


def reads_text(kind: str) -> bool:
    """Whether models of this stock type (`bert`, `vit`, ...) read tokens, not pixels."""
    return MODEL_CLASSES[kind].main_input_name == "input_ids"


def tiny_settings(kind: str = "bert", **changes) -> dict:
    """The fields of a tiny config, stock or with exits, of this type."""
    return {**SHAPE, **(TEXT if reads_text(kind) else IMAGE), "num_labels": NUM_LABELS, **changes}


def tiny_config(kind: str = "bert", **changes):
    """An early-exit config."""
    return MODEL_CLASSES[kind].config_class(**tiny_settings(kind, **changes))


def tiny_stock_config(kind: str = "bert", **changes):
    """The config of transformers itself."""
    return AutoConfig.for_model(kind, **tiny_settings(kind, **changes))


def tiny_model(kind: str = "bert", *, seed: int = 0, noise: float = 0.0, **changes):
    """An early-exit model; `noise` moves every parameter, so that examples differ in what exits predict of them."""
    torch.manual_seed(seed)
    return _moved(MODEL_CLASSES[kind](tiny_config(kind, **changes)), noise)


def tiny_stock_model(kind: str = "bert", *, seed: int = 0, noise: float = 0.0, **changes):
    """The classifier of transformers itself."""
    torch.manual_seed(seed)
    auto_class = AutoModelForSequenceClassification if reads_text(kind) else AutoModelForImageClassification
    return _moved(auto_class.from_config(tiny_stock_config(kind, **changes)), noise)


def _moved(model, noise: float):
    if noise:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn(parameter.shape))
    return model


def tiny_processor(kind: str = "bert", tokens=TOKENS, size: int = IMAGE["image_size"]):
    """A tokenizer of these tokens, or a processor of square images."""
    if reads_text(kind):
        return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})
    return ViTImageProcessor(size={"height": size, "width": size})


def download(hub: Path, name: str, revision: str, *parts) -> None:
    """Save models or processors as the cache of the Hub `hub` holds a revision of the repository `someone/name`."""
    repository, commit = hub / f"models--someone--{name}", revision.encode().hex().zfill(40)
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    for part in parts:
        part.save_pretrained(repository / "snapshots" / commit)


def tiny_rows(kind: str = "bert", count: int = 24, *, length: int = 8, seed: int = 1, learnable: bool = False) -> list:
    """Rows of random tokens or pixels with random classes; `learnable`: whether the first token is odd."""
    generator = torch.Generator().manual_seed(seed)
    if reads_text(kind):
        name, values = "input_ids", torch.randint(1, TEXT["vocab_size"], (count, length), generator=generator)
    else:
        name, values = "pixel_values", torch.randn(count, 3, 8, 8, generator=generator)
    labels = values[:, 0] % 2 if learnable else torch.randint(0, NUM_LABELS, (count,), generator=generator)
    return [{name: value, "labels": label} for value, label in zip(values, labels, strict=True)]


def make_trainer(folder, model=None, scheme="joint", **settings):
    """A quiet trainer on the CPU that saves nothing, on `tiny_rows` in training and evaluation.

    Args:
        folder: its output.
        model: default `tiny_model()`, unless there is a `model_init`.
        scheme: name or class.
        **settings: what the constructor of `Trainer` names goes there, `scheme_args` too; the others are flags.
    """
    if model is None and "model_init" not in settings:
        model = tiny_model()
    names = {*inspect.signature(Trainer.__init__).parameters, "scheme_args"}
    own = {name: settings.pop(name) for name in names & settings.keys()}
    if "train_dataset" not in own:
        rows = tiny_rows("vit" if getattr(model, "main_input_name", None) == "pixel_values" else "bert")
        own = {"train_dataset": rows, "eval_dataset": rows, **own}
    scheme = get_scheme(scheme) if isinstance(scheme, str) else scheme
    return scheme(model=model, args=EarlyExitTrainingArguments(str(folder), **{**QUIET, **settings}), **own)


def assert_same_weights(one, other) -> None:
    """Two models of the same architecture are equal to the bit."""
    for name, wanted in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], wanted), name
