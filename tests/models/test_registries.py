"""Poolings, heads, criteria and architectures: known by name, taken from elsewhere, never imported by a file."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from een_hf import AutoEarlyExitModel
from een_hf.commands.train import main
from een_hf.data.text import TEXT
from een_hf.models import ExitConfigurationError
from een_hf.models.criteria import CRITERIA, find_criterion, get_criterion
from een_hf.models.exits import EXIT_HEADS, POOLINGS, find_exit_head, find_pooling
from een_hf.models.policies import ExitPolicy


REGISTRIES = (POOLINGS, EXIT_HEADS, CRITERIA)


@pytest.fixture
def outside(monkeypatch):
    """Name of a module of parts that can be imported; the registries are afterwards as they were."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    before = [dict(registry) for registry in REGISTRIES]
    yield "outside_parts"
    for registry, content in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(content)
    sys.modules.pop("outside_parts", None)


@pytest.mark.parametrize("find", [find_pooling, find_exit_head, find_criterion])
def test_unknown_names_are_answered_with_the_known(find, outside):
    for name, words in (("meen", "must be one of: "), ("outside_parts:Nothing", "cannot be imported")):
        with pytest.raises(ExitConfigurationError, match=words) as raised:
            find(name)
        assert "--exit_" in str(raised.value) and name in str(raised.value)


def test_a_part_of_another_kind_is_refused(outside):
    for find in (find_exit_head, find_criterion):
        with pytest.raises(ExitConfigurationError, match="is not a subclass of Exit"):
            find(f"{outside}:max_cls")


def test_the_names_that_parts_give_themselves(outside):
    """A file that names `module:Class` of a part with a name of its own could not be read where it is registered."""
    assert find_criterion(f"{outside}:SquaredConfidence") == "squared"
    assert find_pooling(f"{outside}:max_cls") == find_pooling("max_cls") == "max_cls"
    assert find_exit_head(f"{outside}:PlainHead") == f"{outside}:PlainHead"
    scores = get_criterion("squared").step(torch.tensor([[0.0, 0.0], [50.0, 0.0]]), ())[0]
    assert scores.tolist() == pytest.approx([0.5, 1.0])


def test_a_file_imports_nothing(bert, outside):
    """A config or a policy that comes with a model would run its author's code."""
    for field in ("exit_pooling", "exit_head"):
        with pytest.raises(ExitConfigurationError, match="must be one of"):
            bert.config_class(**{field: f"{outside}:PlainHead"})
    with pytest.raises(ExitConfigurationError, match="must be one of"):
        ExitPolicy.from_dict({"criterion": f"{outside}:SquaredConfidence", "thresholds": [0.5]}).scorer  # noqa: B018
    assert outside not in sys.modules


def test_a_policy_names_a_criterion_that_is_known(bert, outside):
    """A policy is checked where it is written; a model's file may name what is registered after loading."""
    with pytest.raises(ExitConfigurationError, match="exit criterion.*'squared'; it must be one of"):
        ExitPolicy("squared", [0.5, 0.0])
    config = bert.config_class(num_hidden_layers=2, exit_policy={"criterion": "squared", "thresholds": [0.5, 0.0]})
    model = AutoEarlyExitModel.from_pretrained(None, config=config, state_dict={})
    find_criterion(f"{outside}:SquaredConfidence")
    assert model.get_exit_policy() == ExitPolicy("squared", [0.5, 0.0])


def test_a_run_with_outside_parts(outside, stock_folders, minilm_path, tmp_path):
    """The whole way: flags, training, calibration, files, and the folder again."""
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["text", "label"], *([f"the film is {word}", word] for word in ["good", "bad"] * 16)]
        )
    shape = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32,vocab_size=30522"
    flags = ["--model_type=bert", f"--config_overrides={shape}", f"--tokenizer_name={minilm_path}"]
    flags += [f"--{split}_file={tmp_path / 'rows.csv'}" for split in ("train", "validation")]
    flags += ["--do_train", "--do_eval", "--max_steps=2", "--target_cost=0.9", "--use_cpu", "--max_seq_length=16"]
    flags += [f"--exit_head={outside}:PlainHead", f"--exit_pooling={outside}:max_cls"]
    main(TEXT, [*flags, f"--exit_criterion={outside}:SquaredConfidence", f"--output_dir={tmp_path / 'run'}"])
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["exit_head"], config["exit_pooling"]) == (f"{outside}:PlainHead", "max_cls")
    assert config["exit_policy"]["criterion"] == "squared"
    model = AutoEarlyExitModel.from_pretrained(tmp_path / "run")
    assert model.exit_heads["1"].classifier.weight.shape == (2, 32)
    assert model.get_exit_policy().criterion == "squared"


def test_auto_model(any_architecture, stock_folders):
    """One way in for all: by the type of the checkpoint."""
    model = AutoEarlyExitModel.from_pretrained(stock_folders[any_architecture.name, "head"], exit_layers=[2])
    assert type(model) is any_architecture.model_class and model.config.exit_layers == [2, 4]
    with pytest.raises(OSError, match="from_pretrained"):
        AutoEarlyExitModel()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gpt2"}, "'gpt2'; supported types: bert, .*vit.*'Add an architecture' in README"),
        ({"model_type": "swin", "depths": [2, 2], "embed_dim": 96}, "'swin', whose hidden states have another width"),
        ({}, "of type None"),
    ],
)
def test_architectures_without_exits(config, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExitConfigurationError, match=words):
        AutoEarlyExitModel.from_pretrained(tmp_path)


def test_adapters_are_imported_when_they_are_asked_for(tmp_path):
    """What breaks: who uses one architecture waits for the modules of fifteen, or the Auto classes do not find one.

    Nor is anything loaded that only training and evaluation need.
    """
    program = """
import json
import sys
from transformers import BertModel, PreTrainedModel, ViTModel
before = set(sys.modules)
import een_hf.models
heavy = {"sklearn", "matplotlib", "datasets", "timm", "pandas"}
assert not heavy & {name.split(".")[0] for name in set(sys.modules) - before}
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
from een_hf.models import MODEL_CLASSES, AutoEarlyExitModel

def imported():
    return {name.rpartition("modeling_")[2] for name in sys.modules if name.startswith("transformers.models.")}

assert not imported() & {"mpnet", "beit", "roberta", "modernbert", "deberta"}
tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
text = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("een_mpnet", **tiny, vocab_size=9))
image = AutoModelForImageClassification.from_config(AutoConfig.for_model("een_beit", **tiny, image_size=16))
assert [type(text).__name__, type(image).__name__] == [
    "EarlyExitMPNetForSequenceClassification", "EarlyExitBeitForImageClassification"
]
assert een_hf.models.EarlyExitMPNetForSequenceClassification is type(text) is MODEL_CLASSES["mpnet"]
assert {"mpnet", "beit"} <= imported() and not imported() & {"roberta", "modernbert", "deberta"}
stock = AutoConfig.for_model("modernbert", **tiny, vocab_size=9, pad_token_id=0)
stock.save_pretrained(sys.argv[1])
text.save_pretrained(sys.argv[1] + "/exits")
with open(sys.argv[1] + "/exits/config.json") as file:
    assert "AutoModelForSequenceClassification" in json.load(file)["auto_map"]
assert type(AutoEarlyExitModel.from_pretrained(sys.argv[1] + "/exits")) is type(text)
assert een_hf.models.auto.model_class_of(stock.to_dict(), "x").__name__.startswith("EarlyExitModernBert")
assert "roberta" not in imported() and len(MODEL_CLASSES.values()) >= 15 and "roberta" in imported()
assert all(hasattr(een_hf.models, name) for name in een_hf.models.__all__)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
