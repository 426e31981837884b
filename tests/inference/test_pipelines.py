"""Pipelines, transformers' own and the early-exit ones, against a plain loop over single inputs."""

import base64
import logging
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from factory import LABELS, TOKENS, tiny_model, tiny_processor
from PIL import Image
from transformers import pipeline

from een_hf import ExitConfigurationError
from een_hf.evaluation import relative_costs, stock_model, text_functions


SHAPE = {"num_hidden_layers": 4, "exit_layers": [1, 3, 4], "initializer_range": 0.5}
TEXTS = ["a b c d e f g h i j", "c", "d e f", "j j j a", "b a", "i h g f e", "a", "c d c d c d c"]
IMAGES = [Image.fromarray(np.random.default_rng(n).integers(0, 256, (8, 8, 3), dtype=np.uint8)) for n in range(8)]


def with_policy(model, batches):
    """Thresholds between the scores of these rows, so that each exit takes some."""
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(**batch, early_exit=False).exit_logits for batch in batches])
    scores = logits.softmax(-1).amax(-1)
    first = scores[:, 0].sort(descending=True).values
    staying = scores[scores[:, 0] < first[2:4].mean(), 1].sort(descending=True).values
    thresholds = [float(first[2:4].mean()), float(staying[1:3].mean()), 0.0]
    model.set_exit_policy({"criterion": "confidence", "thresholds": thresholds})
    return model


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """(folder, model, single inputs as the model takes them)"""
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = tiny_processor("bert")
    batches = [tokenizer(text, return_tensors="pt") for text in TEXTS]
    model = tiny_model("bert", vocab_size=len(TOKENS), max_position_embeddings=32, **LABELS, **SHAPE)
    with_policy(model, batches)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, batches


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    processor = tiny_processor("vit")
    batches = [processor(image, return_tensors="pt") for image in IMAGES]
    model = with_policy(tiny_model("vit", **SHAPE), batches)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, batches


CASES = [("text", "bert", TEXTS), ("image", "vit", IMAGES)]


def answers_of(model, batches):
    """(best label, its probability, exit) of each input, one at a time."""
    with torch.no_grad():
        outputs = [model(**batch) for batch in batches]
    odds = [output.logits[0].double().softmax(-1) for output in outputs]
    return [
        (model.config.id2label[int(p.argmax())], float(p.max()), int(output.exit_index))
        for p, output in zip(odds, outputs, strict=True)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("kind, name, inputs", CASES)
def test_stock_pipelines_run_the_models(kind, name, inputs, batch_size, request):
    """Padding, or answers put back to the wrong rows after some left, would change labels and scores."""
    folder, model, batches = request.getfixturevalue(name)
    found = pipeline(f"{kind}-classification", model=str(folder), device="cpu")(inputs, batch_size=batch_size, top_k=1)
    for (answer,), (label, score, _) in zip(found, answers_of(model, batches), strict=True):
        assert (answer["label"], answer["score"]) == (label, pytest.approx(score, abs=1e-5))


@pytest.mark.parametrize("cuda_graphs", [None, True])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("kind, name, inputs", CASES)
def test_early_exit_pipelines_say_where_each_input_exited(kind, name, inputs, batch_size, cuda_graphs, request):
    folder, model, batches = request.getfixturevalue(name)
    expected = answers_of(model, batches)
    assert len({exit_index for *_, exit_index in expected}) == 3
    own = pipeline(f"early-exit-{kind}-classification", model=str(folder), device="cpu")
    own.cuda_graphs = cuda_graphs  # by the runner's programs, as on CUDA
    found = own(inputs, batch_size=batch_size, top_k=1)
    for (answer,), (label, score, exit_index), batch in zip(found, expected, batches, strict=True):
        length = batch["input_ids"].shape[1] if kind == "text" else None
        saved = 1 - relative_costs(model, sequence_length=length)[exit_index]
        assert answer == {
            "label": label,
            "score": pytest.approx(score, abs=1e-5),
            "exit_layer": [1, 3, 4][exit_index],
            "cost_saved": pytest.approx(saved),
        }


@pytest.mark.parametrize("cuda_graphs", [None, True])
@pytest.mark.parametrize("kind, name, inputs", CASES)
def test_a_model_in_training_mode_answers_without_dropout(kind, name, inputs, cuda_graphs, request):
    """A model is in training mode after `Trainer.train`: its policy would be ignored, and each answer be random."""
    folder, model, batches = request.getfixturevalue(name)
    own = pipeline(f"early-exit-{kind}-classification", model=str(folder), device="cpu")
    own.cuda_graphs, own.model = cuda_graphs, own.model.train()
    layers = model.config.exit_layers
    expected = [(label, pytest.approx(score, abs=1e-5), layers[k]) for label, score, k in answers_of(model, batches)]
    found = [own(given, top_k=1) for given in inputs]
    assert [(each["label"], each["score"], each["exit_layer"]) for (each,) in found] == expected
    assert all(module.training for module in own.model.modules())


@pytest.mark.parametrize("name", ["temperatures", "confidence_temperatures"])
@pytest.mark.parametrize("kind, model_name, inputs", CASES)
def test_scores_are_the_probabilities_at_the_temperature_of_the_exit(kind, model_name, inputs, name, request):
    """Raw probabilities of early exits are too low: the easiest inputs would look the least certain."""
    folder, model, batches = request.getfixturevalue(model_name)
    policy = {**model.config.exit_policy, name: [1.1, 0.6, 0.7]}
    ours = pipeline(f"early-exit-{kind}-classification", model=str(folder), device="cpu")
    stock = pipeline(f"{kind}-classification", model=str(folder), device="cpu")
    for each in (ours, stock):
        each.model.set_exit_policy(policy)
    taken = set()
    for batch, given in zip(batches, inputs, strict=True):
        with torch.no_grad():
            output = ours.model(**batch)
        raw, index = output.logits[0].double(), int(output.exit_index)
        taken.add(index)
        tempered = (raw / policy[name][index]).softmax(-1).sort(descending=True).values
        scores = [one["score"] for one in ours(given, top_k=3)]
        assert scores == pytest.approx(tempered.tolist(), abs=1e-5)
        plain = raw.softmax(-1).sort(descending=True).values
        assert [one["score"] for one in stock(given, top_k=3)] == pytest.approx(plain.tolist(), abs=1e-5)
        logits = [one["score"] for one in ours(given, top_k=3, function_to_apply="none")]
        assert logits == pytest.approx(raw.sort(descending=True).values.tolist(), abs=1e-4)
    assert len(taken) > 1


def test_scores_of_several_labels_are_tempered_too(bert):
    own = pipeline("early-exit-text-classification", model=str(bert[0]), device="cpu")
    own.model.config.problem_type = "multi_label_classification"
    policy = {"criterion": "label_confidence", "thresholds": [0.0, 0.0, 0.0], "temperatures": [3.0, 1.0, 1.0]}
    own.model.set_exit_policy(policy)
    with torch.no_grad():
        logits = own.model(**bert[2][0]).logits[0]
    found = {one["label"]: one["score"] for one in own(TEXTS[0], top_k=None)}
    for index, label in own.model.config.id2label.items():
        assert found[label] == pytest.approx(float((logits[index] / 3).sigmoid()), abs=1e-5)


def test_texts_are_cut_at_the_models_length(bert):
    """The tokenizer knows of no limit: position 33 of 32 ends in a traceback."""
    own = pipeline("early-exit-text-classification", model=str(bert[0]), device="cpu")
    assert own.tokenizer.model_max_length > 10**6
    text = " ".join("abcdefghij" * 4)
    with pytest.raises(ExitConfigurationError, match="42 tokens, the model takes at most 32.*truncation=True"):
        own(text)
    cut = own(" ".join(text.split()[:30]))
    assert own(text, truncation=True) == own(text, truncation=True, max_length=99) == cut
    assert own(text, truncation=True, max_length=8) == own(" ".join(text.split()[:6]))


def test_timed_texts_are_cut_at_the_models_length(bert):
    """A run with a larger --max_seq_length trains and evaluates, and would end in a traceback when it is timed."""
    tokenizer = tiny_processor("bert")
    texts = [" ".join("abcdefghij" * 4), "a"]
    functions = text_functions(bert[1], tokenizer, [texts], max_length=99, batch_size=2)
    assert [len(function()) for name, function in functions.items() if name.startswith("stock")] == [2]
    assert [len(functions[name]().logits) for name in ("exits off", "exits on")] == [2, 2]


def test_answers_have_the_shape_of_the_stock_pipelines(bert):
    """One text, all labels, pairs: code written for the stock pipeline goes on working."""
    folder = str(bert[0])
    ours = pipeline("early-exit-text-classification", model=folder, device="cpu")
    stock = pipeline("text-classification", model=folder, device="cpu")
    for inputs, settings in (("a b", {}), (["a b", "c"], {}), (["a b"], {"top_k": None}), ({"text": "a"}, {})):
        mine, theirs = ours(inputs, **settings), stock(inputs, **settings)
        flat = [mine, theirs]
        while isinstance(flat[1], list):
            assert len(flat[0]) == len(flat[1])
            flat = [flat[0][0], flat[1][0]]
        assert {name: flat[0][name] for name in flat[1]} == flat[1]


@pytest.mark.parametrize("cuda_graphs", [None, True])
def test_without_a_policy_every_input_pays_for_all(bert, cuda_graphs):
    """Exits that are off save nothing, and the earlier heads cost a little."""
    folder, model, batches = bert
    own = pipeline("early-exit-text-classification", model=str(folder), device="cpu")
    own.cuda_graphs = cuda_graphs
    own.model.set_exit_policy(None)
    (answer,) = own(["a b c"])
    assert answer["exit_layer"] == 4
    assert answer["cost_saved"] == pytest.approx(1 - relative_costs(model, sequence_length=5)[-1])
    assert -0.2 < answer["cost_saved"] < 0


def test_a_model_without_exits_is_refused(bert):
    folder, model, _ = bert
    tokenizer = tiny_processor("bert")
    with pytest.raises(ExitConfigurationError, match="early-exit-text-classification.*BertForSequenceClassification"):
        pipeline("early-exit-text-classification", model=stock_model(model), tokenizer=tokenizer, device="cpu")


def test_a_saved_pipeline_loads_again(bert, tmp_path):
    """Saving must not take along files that only run inside the package."""
    first = pipeline("early-exit-text-classification", model=str(bert[0]), device="cpu")
    first.save_pretrained(tmp_path)
    assert not (tmp_path / "pipelines.py").exists()
    again = pipeline("early-exit-text-classification", model=str(tmp_path), device="cpu")
    assert again(TEXTS, batch_size=4) == first(TEXTS, batch_size=4)


def test_early_exit_pipelines_log_no_unsupported_model(bert, caplog):
    logging.getLogger("transformers").propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            pipeline("early-exit-text-classification", model=str(bert[0]), device="cpu")
    finally:
        logging.getLogger("transformers").propagate = False
    assert "not supported" not in caplog.text


def test_an_image_is_answered_alike_wherever_it_is(vit, tmp_path):
    """What breaks: an address or an encoded image is read otherwise than the file, or needs a package of its own."""
    folder, *_ = vit
    path = tmp_path / "image.png"
    IMAGES[0].save(path)
    classify = pipeline("early-exit-image-classification", model=str(folder))
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        encoded = base64.b64encode(path.read_bytes()).decode()
        forms = [IMAGES[0], str(path), f"{address}/image.png", encoded, f"data:image/png;base64,{encoded}"]
        wanted, *found = [classify(form) for form in forms]
        assert found == [wanted] * 4
        with pytest.raises(OSError, match="404"):
            classify(f"{address}/none.png")
        server.shutdown()
