"""An architecture from outside the package, as README says: one adapter, and all the rest knows it.

That the mixin does the rest is in `test_architectures.py`, whose list it is on.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, MobileBertConfig, MobileBertForSequenceClassification

from een_hf.commands.train import main
from een_hf.data.text import TEXT
from een_hf.training import ModelArguments


@pytest.fixture
def stock(tmp_path):
    """Folder of a stock classifier with MiniLM's vocabulary."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = MobileBertConfig(
        **shape,
        embedding_size=16,
        use_bottleneck=False,
        vocab_size=30522,
        normalization_type="layer_norm",
        initializer_range=0.3,
    )
    MobileBertForSequenceClassification(config).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


@pytest.mark.parametrize(
    "method", ["joint", *(pytest.param(name, marks=pytest.mark.slow) for name in ("boosted", "l2w"))]
)
def test_the_scripts_train_it(stock, minilm_path, tmp_path, method):
    """The whole run, and its folder through AutoModel; three places to be edited would be three to be forgotten."""
    from mobilebert_adapter import EarlyExitMobileBertForSequenceClassification

    with (tmp_path / "rows.csv").open("w", newline="") as file:
        words = np.random.default_rng(0).choice(["good", "bad"], 64)
        csv.writer(file).writerows([["text", "label"], *([f"the film is {word}", word] for word in words)])
    flags = [f"--model_name_or_path={stock}", f"--tokenizer_name={minilm_path}", f"--method={method}"]
    flags += [f"--{split}_file={tmp_path / 'rows.csv'}" for split in ("train", "validation")]
    flags += ["--do_train", "--do_eval", "--max_steps=60", "--learning_rate=3e-3", "--target_cost=0.8", "--use_cpu"]
    main(TEXT, [*flags, "--max_seq_length=16", "--ignore_mismatched_sizes", f"--output_dir={tmp_path / 'run'}"])
    results = json.loads((tmp_path / "run" / "exit_results.json").read_text())
    assert results["model_type"] == "mobilebert" and results["anytime"][-1]["metrics"]["accuracy"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert type(model) is EarlyExitMobileBertForSequenceClassification and model.config.exit_policy is not None


def test_a_class_is_named_on_the_command_line():
    """From scratch, `--model_type module:Class` imports the adapter; a run would else need code of its own."""
    name = "mobilebert_adapter:EarlyExitMobileBertForSequenceClassification"
    assert ModelArguments(model_type=name).model_type == "mobilebert"


def test_readme_shows_the_adapter():
    """A reader would copy what no test runs."""
    root = Path(__file__).parents[2]
    code = (root / "tests" / "mobilebert_adapter.py").read_text().split('"""', 2)[2].strip()
    assert code in (root / "README.md").read_text()
    assert len(code.splitlines()) < 60
