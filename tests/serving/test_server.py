"""The server, a real one on a loopback port, against the pipelines and the clients that people have."""

import asyncio
import base64
import copy
import io
import json
import logging
import random
import socket
import threading
import time

import httpx
import pytest
import torch
from huggingface_hub import InferenceClient
from transformers import pipeline

from een_hf.serving import AsyncExitEngine, EngineObserver, PrometheusObserver, ServerLimits, create_app

from .conftest import random_texts, running


def engine_of(served, **settings):
    settings = {"observer": PrometheusObserver(), **settings}
    return AsyncExitEngine(served.model, served.processor, **settings)


@pytest.fixture(scope="module")
def text_server(bert):
    with running(engine_of(bert), name="tiny", limits=ServerLimits(max_body_bytes=4000, max_inputs=8)) as address:
        yield address


@pytest.fixture(scope="module")
def image_server(vit):
    with running(engine_of(vit)) as address:
        yield address


def png(image):
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def close_to(found, wanted):
    def ordered(rows):
        return [sorted(row, key=lambda label: label["label"]) for row in rows]

    assert ordered(found) == [[_approx(label) for label in row] for row in ordered(wanted)]


def _approx(label):
    return {key: pytest.approx(value, abs=1e-5) if isinstance(value, float) else value for key, value in label.items()}


def test_texts_are_answered_as_by_the_pipeline(bert, text_server):
    """What breaks: another order of labels, scores of another temperature, the cost of another length."""
    classify = pipeline("early-exit-text-classification", model=bert.model, tokenizer=bert.processor, device="cpu")
    texts = random_texts(8, longest=20, seed=5)
    body = {"inputs": texts, "parameters": {"exits": True}}
    answer = httpx.post(f"{text_server}/predict", json=body)
    assert answer.status_code == 200
    close_to(answer.json(), classify(texts, top_k=None))
    scores = [[label["score"] for label in row] for row in answer.json()]
    assert scores == [sorted(row, reverse=True) for row in scores]
    # One text, a pair in both forms, a choice of labels, raw scores, no early exit.
    one = httpx.post(f"{text_server}/predict", json={"inputs": texts[0]}).json()
    close_to(one, [[{key: label[key] for key in ("label", "score")} for label in answer.json()[0]]])
    pair = {"text": "a b", "text_pair": "c"}
    for inputs in ([["a b", "c"]], pair, [pair]):
        body = {"inputs": inputs, "parameters": {"top_k": 2, "exits": True}}
        close_to(httpx.post(f"{text_server}/predict", json=body).json(), [classify(pair, top_k=2)])
    body = {"inputs": [texts[0]], "raw_scores": True, "parameters": {"policy": "full", "exits": True}}
    found = httpx.post(f"{text_server}/predict", json=body).json()
    bert.model.config.exit_policy, policy = None, bert.model.config.exit_policy
    try:
        wanted = classify([texts[0]], top_k=None, function_to_apply="none")
    finally:
        bert.model.config.exit_policy = policy
    costs = {"exit_layer": 4, "cost_saved": pytest.approx(0.0, abs=0.3)}  # heads that nobody reads are not evaluated
    for label in wanted[0]:
        label.update(costs)
    close_to(found, wanted)


def test_another_policy_for_one_request(bert, text_server):
    never = {"criterion": "confidence", "thresholds": [-1e30, 0, 0]}
    body = {"inputs": random_texts(4), "parameters": {"exits": True, "policy": never}}
    rows = httpx.post(f"{text_server}/predict", json=body).json()
    assert {label["exit_layer"] for row in rows for label in row} == {1}
    asked = [{**never, "temperatures": [temperature, 1, 1]} for temperature in (1, 4)]
    answers = [
        httpx.post(
            f"{text_server}/predict", json={"inputs": "a b", "raw_scores": raw, "parameters": {"policy": policy}}
        )
        for raw in (True, False)
        for policy in asked
    ]
    raw, same, plain, flat = (answer.json() for answer in answers)
    assert raw == same and flat[0][0]["score"] < plain[0][0]["score"]  # temperatures are for probabilities


def test_the_hubs_own_client_understands_the_answers(bert, vit, text_server, image_server, monkeypatch):
    """What breaks: InferenceClient, which people have in their programs, cannot talk to the server."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    found = InferenceClient(model=text_server).text_classification("a b c")
    classify = pipeline("early-exit-text-classification", model=bert.model, tokenizer=bert.processor, device="cpu")
    for label, wanted in zip(found, classify("a b c", top_k=None), strict=True):
        assert label.label == wanted["label"] and label.score == pytest.approx(wanted["score"], abs=1e-5)
    classify = pipeline(
        "early-exit-image-classification", model=vit.model, image_processor=vit.processor, device="cpu"
    )
    for options in ({}, {"top_k": 2}):  # a file; base64 and parameters
        found = InferenceClient(model=image_server).image_classification(png(vit.images[0]), **options)
        for label, wanted in zip(found, classify(vit.images[0], **options), strict=False):
            assert label.label == wanted["label"] and label.score == pytest.approx(wanted["score"], abs=1e-5)


def test_images_as_files_and_in_base64(vit, image_server):
    classify = pipeline(
        "early-exit-image-classification", model=vit.model, image_processor=vit.processor, device="cpu"
    )
    wanted = classify(vit.images[:4], top_k=3)
    files = [png(image) for image in vit.images[:4]]
    encoded = [base64.b64encode(file).decode() for file in files]
    encoded[1] = f"data:image/png;base64,{encoded[1]}"
    body = {"inputs": encoded, "parameters": {"exits": True}}
    close_to(httpx.post(f"{image_server}/predict", json=body).json(), wanted)
    for file, row in zip(files, wanted, strict=True):
        answer = httpx.post(f"{image_server}/predict", content=file, headers={"Content-Type": "image/png"})
        close_to([answer.json()], [[{key: label[key] for key in ("label", "score")} for label in row]])
    for content, status in ((b"no image", 422), (files[0][:40], 422), (b"", 422)):
        answer = httpx.post(f"{image_server}/predict", content=content, headers={"Content-Type": "image/png"})
        assert answer.status_code == status, content
    for inputs in ("/etc/passwd", "http://127.0.0.1/a.png", ["a", "b"], {"text": "a", "text_pair": "b"}):
        assert httpx.post(f"{image_server}/predict", json={"inputs": inputs}).status_code == 422, inputs


BAD = [
    (b"", 400),
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b"[" * 3000, 400),
    (b'{"inputs": "\\ud800"}', 400),
    (b"[]", 422),
    (b"{}", 422),
    (b'{"inputs": 3}', 422),
    (b'{"inputs": null}', 422),
    (b'{"inputs": []}', 422),
    (b'{"inputs": [[]]}', 422),
    (b'{"inputs": [["a", "b", "c"]]}', 422),
    (b'{"inputs": "a", "unknown": 1}', 422),
    (b'{"inputs": "a", "truncate": false}', 422),
    (b'{"inputs": "a", "parameters": {"top_k": 0}}', 422),
    (b'{"inputs": "a", "parameters": {"timeout": -1}}', 422),
    (b'{"inputs": "a", "parameters": {"policy": "half"}}', 422),
    (b'{"inputs": "a", "parameters": {"policy": {"criterion": "os:system", "thresholds": [0, 0, 0]}}}', 422),
    (b'{"inputs": "a", "parameters": {"policy": {"criterion": "confidence", "thresholds": [0]}}}', 422),
    (b'{"inputs": "a", "parameters": {"policy": {"criterion": "confidence", "thresholds": [NaN, 0, 0]}}}', 422),
    (json.dumps({"inputs": ["a"] * 9}).encode(), 413),
    (json.dumps({"inputs": "a" * 4000}).encode(), 413),
]


@pytest.mark.parametrize("body,status", BAD)
def test_bad_requests_are_answered_by_what_is_wrong(text_server, body, status):
    answer = httpx.post(f"{text_server}/predict", content=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "error_type"} and len(answer.text) < 1000
    assert httpx.get(f"{text_server}/health").status_code == 200


def test_a_thousand_damaged_bodies(text_server):
    """What breaks: a body that nobody thought of ends in a 500, or in a server that is gone."""
    rng = random.Random(0)
    whole = json.dumps(
        {
            "inputs": ["a b", ["c", "d"]],
            "parameters": {"top_k": 1, "exits": True, "policy": "full"},
            "raw_scores": True,
        }
    ).encode()
    statuses = set()
    with httpx.Client(base_url=text_server) as client:
        for _ in range(1000):
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                place = rng.randrange(len(damaged))
                action = rng.randrange(3)
                if action == 0:
                    damaged[place] = rng.randrange(256)
                elif action == 1:
                    del damaged[place : place + rng.randint(1, 9)]
                else:
                    damaged[place:place] = rng.choice([b"[", b"}", b"null", b'"', b"1e999", b"\\u0000", b"-"])
                if not damaged:
                    damaged = bytearray(b" ")
            answer = client.post("/predict", content=bytes(damaged))
            statuses.add(answer.status_code)
            assert answer.status_code in (200, 400, 422), (bytes(damaged), answer.text)
        assert statuses >= {400, 422}
        assert client.post("/predict", json={"inputs": "a"}).status_code == 200


def test_an_image_for_a_model_of_texts(text_server):
    answer = httpx.post(f"{text_server}/predict", content=b"x", headers={"Content-Type": "image/png"})
    assert answer.status_code == 415


def test_a_body_of_unknown_size_ends_at_the_limit(text_server):
    for sizes, status in (([1000] * 100, 413), ([1000, 3001], 413), ([1000, 3000], 400)):  # the last is no JSON
        answer = httpx.post(f"{text_server}/predict", content=(b"x" * size for size in sizes))
        assert answer.status_code == status, sizes


class Gate(EngineObserver):
    """Stops the worker after a stage until it is opened."""

    def __init__(self):
        self.opened, self.num_dropped = threading.Event(), 0

    def stage_ran(self, *_):
        assert self.opened.wait(30)

    def dropped(self, num_rows):
        self.num_dropped += num_rows


def test_a_busy_server_says_when_to_come_back_and_ends_what_takes_too_long(bert):
    gate = Gate()
    with running(engine_of(bert, observer=gate, max_waiting=2), limits=ServerLimits(timeout=0.3)) as address:
        late = httpx.post(f"{address}/predict", json={"inputs": ["a", "b"]}, timeout=30)
        assert late.status_code == 504 and late.json()["error_type"] == "timeout"
        # The rows of that request are still with the worker, which is stopped.
        busy = httpx.post(f"{address}/predict", json={"inputs": "a"}, timeout=30)
        assert busy.status_code == 503 and int(busy.headers["Retry-After"]) >= 1
        gate.opened.set()
        for _ in range(100):
            answer = httpx.post(f"{address}/predict", json={"inputs": "a"}, timeout=30)
            if answer.status_code != 503:
                break
            time.sleep(0.02)
        assert answer.status_code == 200
        with socket.create_connection(address.removeprefix("http://").split(":")) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            slow.settimeout(30)
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")


def test_the_time_of_the_body_counts(bert):
    """What breaks: a slow body and a slow answer together take twice what a request may take."""
    engine, given = engine_of(bert), []
    answer = engine.predict
    engine.predict = lambda examples, policy, timeout: (given.append(timeout), answer(examples, policy, timeout))[1]

    async def body():
        yield b'{"inputs": '
        await asyncio.sleep(0.3)
        yield b'"a"}'

    async def main():
        app = httpx.ASGITransport(create_app(engine, limits=ServerLimits(timeout=20)))
        async with engine, httpx.AsyncClient(transport=app, base_url="http://a") as client:
            asked = (b'{"inputs": "a", "parameters": {"timeout": %d}}' % seconds for seconds in (5, 60))
            for content in (body(), *asked):
                assert (await client.post("/predict", content=content)).status_code == 200

    asyncio.run(main())
    assert given[0] < 19.8 and given[1] == 5 and given[2] <= 20  # a client cannot take longer than the server allows


def test_answers_that_are_not_finite_end_in_an_error(bert):
    """What breaks: JSON has no NaN, and a request that is answered by none is not counted."""
    model = copy.deepcopy(bert.model)
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    engine = AsyncExitEngine(model, bert.processor, observer=PrometheusObserver())
    with running(engine) as address:
        answer = httpx.post(f"{address}/predict", json={"inputs": "a", "parameters": {"policy": "full"}})
        assert answer.status_code == 500 and "NaN" in answer.json()["error"]
        assert 'een_requests_total{status="500"} 1.0' in httpx.get(f"{address}/metrics").text


def test_rows_of_a_client_that_is_gone_are_removed(bert):
    gate, gone = Gate(), threading.Event()

    class Engine(AsyncExitEngine):
        async def predict(self, *args, **kwargs):
            try:
                return await super().predict(*args, **kwargs)
            except asyncio.CancelledError:
                gone.set()
                raise

    engine = Engine(bert.model, bert.processor, observer=gate)
    with running(engine) as address:
        waiting = threading.Thread(target=httpx.post, args=(f"{address}/predict",), kwargs={"json": {"inputs": "a"}})
        waiting.start()  # occupies the worker
        while not engine.num_waiting:
            time.sleep(0.005)
        body = json.dumps({"inputs": ["b", "c"]}).encode()
        with socket.create_connection(address.removeprefix("http://").split(":")) as going:
            head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            going.sendall(head + body)
            while engine.num_waiting < 3:
                time.sleep(0.005)
        assert gone.wait(30)
        gate.opened.set()
        waiting.join()
        while engine.num_waiting:
            time.sleep(0.005)
    assert gate.num_dropped == 2


def test_what_is_described_and_measured(bert, text_server):
    assert httpx.post(f"{text_server}/predict", json={"inputs": ["a b", "c"]}).status_code == 200
    info = httpx.get(f"{text_server}/info").json()
    assert info["model_id"] == "tiny" and info["labels"] == ["no", "yes", "perhaps"]
    assert info["policy"]["thresholds"] == bert.model.config.exit_policy["thresholds"]
    assert info["limits"]["max_inputs"] == 8
    metrics = httpx.get(f"{text_server}/metrics").text
    values = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if not line.startswith("#"))
    exited = sum(float(value) for name, value in values.items() if name.startswith("een_rows_exited_total"))
    assert exited == float(values["een_row_seconds_count"]) >= 2
    assert float(values['een_requests_total{status="200"}']) >= 1 and float(values["een_rows_waiting"]) == 0
    stages = {name for name in values if name.startswith("een_stage_rows_count")}
    assert 'een_stage_rows_count{exit="1"}' in stages <= {f'een_stage_rows_count{{exit="{k}"}}' for k in (1, 2, 3)}
    schema = httpx.get(f"{text_server}/openapi.json").json()
    text = json.dumps(schema)
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert {"PredictRequest", "Parameters", "Prediction"} <= names <= set(schema["components"]["schemas"])
    assert httpx.get(text_server, follow_redirects=True).url.path == "/docs"  # what a browser shows
    assert set(schema["paths"]) == {"/predict", "/health", "/info", "/metrics"}


def test_nothing_of_a_request_is_logged(bert, caplog, capfd):
    """What breaks: texts of users, or what a model failed on, stand in a log."""
    secret = "j j secret"
    with caplog.at_level(logging.DEBUG), running(engine_of(bert)) as address:
        assert httpx.post(f"{address}/predict", json={"inputs": secret}).status_code == 200
        assert httpx.post(f"{address}/predict", json={"inputs": [[secret] * 3]}).status_code == 422
        forward = bert.model.embed
        bert.model.embed = lambda **inputs: (_ for _ in ()).throw(RuntimeError(secret))
        try:
            failed = httpx.post(f"{address}/predict", json={"inputs": secret})
        finally:
            bert.model.embed = forward
            del bert.model.embed
        assert failed.status_code == 500 and failed.json()["error_type"] == "backend"
    out = capfd.readouterr()
    for text in (caplog.text, out.out, out.err, failed.text):
        assert "secret" not in text
    assert "RuntimeError" in caplog.text
