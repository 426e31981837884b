"""A third architecture from outside the package, as README says: one adapter, and all the rest knows it."""

import csv
import json

import numpy as np
import pytest
import torch
from huggingface_hub.dataclasses import strict
from transformers import (
    AutoModelForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    RobertaPreTrainedModel,
)
from transformers.models.roberta.modeling_roberta import RobertaClassificationHead
from transformers.utils.output_capturing import capture_outputs

from een_hf.data.glue import TEXT
from een_hf.models import MODEL_CLASSES, EarlyExitMixin, register_architecture
from een_hf.models.configuration_een import EarlyExitConfigMixin
from een_hf.models.exits import BertExitHead
from een_hf.models.stages import Examples
from een_hf.training.experiment import main


@strict
class EarlyExitRobertaConfig(EarlyExitConfigMixin, RobertaConfig):
    model_type = "een_roberta"
    stock_model_type = "roberta"


class EarlyExitRobertaForSequenceClassification(EarlyExitMixin, RobertaPreTrainedModel):
    config_class = EarlyExitRobertaConfig
    head_class = BertExitHead

    def __init__(self, config):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.roberta = RobertaModel(config, add_pooling_layer=False)
        self.classifier = RobertaClassificationHead(config)
        self.exit_heads = self.build_exit_heads()
        self.post_init()

    @property
    def backbone_layers(self):
        return self.roberta.encoder.layer

    @property
    def last_head_modules(self):
        return [self.classifier]

    def last_head(self, hidden, attention_mask):
        return self.classifier(self.pool_last(hidden, attention_mask).unsqueeze(1))

    def embed(self, input_ids, attention_mask=None):
        return Examples(self.roberta.embeddings(input_ids), attention_mask)

    @capture_outputs
    def forward(self, input_ids=None, attention_mask=None, labels=None, early_exit=True, **kwargs):
        return self.run_exits(self.embed(input_ids, attention_mask), labels, early_exit, **kwargs)


@pytest.fixture
def registered():
    yield register_architecture(EarlyExitRobertaForSequenceClassification)
    del MODEL_CLASSES["roberta"]


@pytest.fixture
def stock(tmp_path, minilm_path):
    """A stock classifier with MiniLM's words, its folder, and inputs of mixed length."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(
        **shape, vocab_size=30522, max_position_embeddings=40, pad_token_id=0, initializer_range=0.3
    )
    model = RobertaForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "stock")
    ids = torch.randint(5, 900, (8, 12))
    mask = (torch.arange(12) < torch.tensor([12, 3, 7, 1, 12, 9, 5, 2])[:, None]).long()
    return tmp_path / "stock", model, {"input_ids": ids * mask, "attention_mask": mask}


def test_the_mixin_does_the_rest(registered, stock):
    """What breaks: the loop, loading or compaction lean on something that only BERT or ViT has."""
    folder, plain, inputs = stock
    model = registered.from_pretrained(folder, exit_pooling="mean").eval()
    with torch.no_grad():
        wanted, every = plain(**inputs).logits, model(**inputs).exit_logits
        assert (every[:, -1] - wanted).abs().max() <= 1e-6
        sure = every.softmax(-1).amax(-1)
        thresholds = [float(sure[:, k].median()) for k in range(2)] + [0.0]
        model.set_exit_policy({"criterion": "confidence", "thresholds": thresholds})
        output = model(**inputs)
    exits = [next(k for k in range(3) if k == 2 or row[k] >= thresholds[k]) for row in sure.tolist()]
    assert output.exit_index.tolist() == exits and len(set(exits)) > 1
    assert (output.logits - every[range(8), exits]).abs().max() <= 1e-5


@pytest.mark.parametrize("method", ["joint", "boosted", "l2w"])
def test_the_scripts_train_it(registered, stock, minilm_path, tmp_path, method):
    """The whole run, and its folder through AutoModel; three places to be edited would be three to be forgotten."""
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        words = np.random.default_rng(0).choice(["good", "bad"], 64)
        csv.writer(file).writerows([["text", "label"], *([f"the film is {word}", word] for word in words)])
    flags = [f"--model_name_or_path={stock[0]}", f"--tokenizer_name={minilm_path}", f"--method={method}"]
    flags += [f"--{split}_file={tmp_path / 'rows.csv'}" for split in ("train", "validation")]
    flags += ["--do_train", "--do_eval", "--max_steps=60", "--learning_rate=3e-3", "--target_cost=0.8", "--use_cpu"]
    main(TEXT, [*flags, "--max_seq_length=16", "--ignore_mismatched_sizes", f"--output_dir={tmp_path / 'run'}"])
    results = json.loads((tmp_path / "run" / "exit_results.json").read_text())
    assert results["model_type"] == "roberta" and results["anytime"][-1]["metrics"]["accuracy"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert type(model) is registered and model.config.exit_policy is not None
