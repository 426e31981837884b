"""The callable of Ray Data and Spark, against the pipelines' answers row by row."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from factory import LABELS, TOKENS, tiny_model, tiny_processor
from PIL import Image

from een_hf import ExitConfigurationError, ExitPolicy
from een_hf.inference import ExitBatchPredictor


SETTINGS = {"num_hidden_layers": 4, "exit_layers": [1, 3, 4], "initializer_range": 0.5, **LABELS}
POLICY = {"criterion": "confidence", "thresholds": [0.6, 0.7, 0.0], "temperatures": [1.5, 1.2, 1.1]}
TEXTS = [" ".join(np.random.default_rng(seed).choice(list("abcdefghij"), 1 + seed % 30)) for seed in range(40)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    model = tiny_model("bert", seed=6, vocab_size=len(TOKENS), max_position_embeddings=24, **SETTINGS).eval()
    model.set_exit_policy(POLICY)
    model.save_pretrained(folder)
    tokenizer = tiny_processor()
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


@torch.no_grad()
def assert_right(found, model, inputs, policy=POLICY):
    for number, one in enumerate(inputs):
        outputs = model(**one, early_exit=policy)
        exit_index = 2 if outputs.exit_index is None else int(outputs.exit_index)
        logits = outputs.logits[0] / (policy["temperatures"][exit_index] if policy else 1)
        assert found["label"][number] == model.config.id2label[int(logits.argmax())]
        assert found["score"][number] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-5)
        assert found["exit_layer"][number] == [1, 3, 4][exit_index]


def test_columns_of_texts(bert):
    folder, model, tokenizer = bert
    inputs = [tokenizer(text, return_tensors="pt", truncation=True, max_length=24) for text in TEXTS]
    predictor = pickle.loads(pickle.dumps(ExitBatchPredictor(str(folder), "body", batch_size=7)))
    found = predictor({"id": np.arange(40), "body": np.array(TEXTS)})
    assert list(found) == ["id", "body", "label", "score", "exit_layer"] and found["id"].tolist() == list(range(40))
    assert_right(found, model, inputs)
    assert len(set(found["exit_layer"])) == 3
    assert len(pickle.dumps(predictor)) < 2000  # the model stays behind
    alone = predictor(np.array(TEXTS, dtype=object))
    assert list(alone) == ["label", "score", "exit_layer"] and alone["label"].tolist() == found["label"].tolist()
    empty = predictor({"id": np.array([], int), "body": np.array([], str)})
    assert {name: len(values) for name, values in empty.items()} == dict.fromkeys(found, 0)
    assert empty["label"].dtype.kind == "U" and empty["exit_layer"].dtype == found["exit_layer"].dtype
    with pytest.raises(ExitConfigurationError, match="no column 'body'; it has: text"):
        predictor({"text": TEXTS})
    for missing in (None, float("nan"), b"text"):
        with pytest.raises(ExitConfigurationError, match="Row 1 .* of column 'body' is no text but"):
            predictor({"body": np.array(["a", missing], dtype=object)})
    with pytest.raises(ExitConfigurationError, match="a column 'label', where the answers go"):
        predictor({"body": TEXTS, "label": [0] * 40})  # the truth would be lost


def test_pairs_and_other_policies(bert):
    folder, model, tokenizer = bert
    inputs = [tokenizer(text, "a b", return_tensors="pt", truncation=True, max_length=16) for text in TEXTS]
    for policy, wanted in ((False, False), (ExitPolicy.from_dict(POLICY), POLICY)):
        predictor = ExitBatchPredictor(str(folder), pair_column="other", policy=policy, max_length=16)
        assert_right(predictor({"text": TEXTS, "other": ["a b"] * 40}), model, inputs, wanted)


def test_images(tmp_path):
    model = tiny_model("vit", **SETTINGS).eval()
    model.set_exit_policy(POLICY)
    model.save_pretrained(tmp_path)
    processor = tiny_processor("vit")
    processor.save_pretrained(tmp_path)
    arrays = np.random.default_rng(0).integers(0, 256, (12, 9, 7, 3), dtype=np.uint8)
    inputs = [processor(Image.fromarray(array), return_tensors="pt") for array in arrays]
    assert_right(ExitBatchPredictor(str(tmp_path), "image")({"image": arrays}), model, inputs)


@pytest.mark.slow
def test_two_processes(bert):
    """What breaks: a worker needs more than the path, or processes that were forked share a lock of torch."""
    folder, model, tokenizer = bert
    inputs = [tokenizer(text, return_tensors="pt", truncation=True, max_length=24) for text in TEXTS]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        batches = pool.map(ExitBatchPredictor(str(folder)), [{"text": TEXTS[n : n + 10]} for n in range(0, 40, 10)])
    assert_right({name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}, model, inputs)
