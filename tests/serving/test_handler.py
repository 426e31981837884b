"""The handler of Inference Endpoints, loaded from its file as they do, against the pipelines."""

import base64
import copy
import importlib.util
import io

import pytest
from transformers import pipeline

from een_hf.hub import write_handler

from .conftest import random_texts


def load_handler(folder):
    spec = importlib.util.spec_from_file_location("handler", write_handler(folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndpointHandler(str(folder))


def assert_same(found, wanted):
    for row, other in zip(found, wanted, strict=True):
        for label, same in zip(row, other, strict=True):
            assert label["score"] == pytest.approx(same.pop("score"), abs=1e-5)
            del label["score"], same["cost_saved"]
            assert label == same


def test_texts(bert):
    handler, texts = load_handler(bert.folder), random_texts(8, seed=21)
    classify = pipeline("early-exit-text-classification", model=bert.model, tokenizer=bert.processor, device="cpu")
    parameters = {"exits": True, "top_k": 2}
    assert_same(handler({"inputs": texts, "parameters": parameters}), classify(texts, top_k=2))
    assert_same(handler({"inputs": texts[0], "parameters": parameters}), [classify(texts[0], top_k=2)])
    labels = handler({"inputs": "a " * 100})[0]  # more than the model takes
    assert len(labels) == 3 and set(labels[0]) == {"label", "score"}


def test_scores_are_of_tempered_logits(bert, tmp_path):
    """What breaks: what people read as confidence is not the probability that the policy decided by."""
    model = copy.deepcopy(bert.model)
    model.set_exit_policy({**bert.model.config.exit_policy, "temperatures": [3.0, 0.5, 2.0]})
    for part in (model, bert.processor):
        part.save_pretrained(tmp_path)
    classify = pipeline("early-exit-text-classification", model=model, tokenizer=bert.processor, device="cpu")
    found = load_handler(tmp_path)({"inputs": ["a b c", "d"], "parameters": {"exits": True}})
    assert_same(found, classify(["a b c", "d"], top_k=None))


def test_images(vit):
    handler = load_handler(vit.folder)
    classify = pipeline(
        "early-exit-image-classification", model=vit.model, image_processor=vit.processor, device="cpu"
    )
    file = io.BytesIO()
    vit.images[0].save(file, "png")
    given = [vit.images[0], file.getvalue(), base64.b64encode(file.getvalue()).decode()]
    parameters = {"exits": True, "top_k": 3}
    assert_same(handler({"inputs": given, "parameters": parameters}), classify([vit.images[0]] * 3, top_k=3))
    assert_same([handler({"inputs": given[1], "parameters": parameters})], [classify(vit.images[0], top_k=3)])
