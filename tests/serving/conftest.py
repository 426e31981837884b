"""Tiny random models with their processors, whose policies let examples exit everywhere."""

import contextlib
import socket
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from factory import LABELS, TOKENS, tiny_model, tiny_processor
from PIL import Image


SHAPE = {"num_hidden_layers": 4, "exit_layers": [1, 3, 4], "initializer_range": 0.5}


def random_texts(count, longest=24, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(list("abcdefghij"), rng.integers(1, longest))) for _ in range(count)]


def policy_of_thirds(model, inputs):
    """A third of the examples exits at each, by thresholds midway between two scores: rounding decides nothing."""
    with torch.no_grad():
        scores = torch.cat([model(**one, early_exit=False).exit_logits for one in inputs]).softmax(-1).amax(-1)
    left, thresholds = torch.ones(len(scores), dtype=torch.bool), []
    for column in scores.T[:-1]:
        ordered = column[left].sort(descending=True).values
        count = len(ordered) // (model.num_exits - len(thresholds))
        thresholds.append(float(ordered[count - 1 : count + 1].mean()))
        left &= column < thresholds[-1]
    return {"criterion": "confidence", "thresholds": [*thresholds, 0.0]}


def make_bert(folder, **settings):
    tokenizer = tiny_processor("bert")
    settings = {**SHAPE, **LABELS, "exit_pooling": "mean", **settings}
    model = tiny_model("bert", vocab_size=len(TOKENS), max_position_embeddings=40, **settings).eval()
    model.set_exit_policy(policy_of_thirds(model, [tokenizer(text, return_tensors="pt") for text in random_texts(60)]))
    return SimpleNamespace(folder=folder, model=model, processor=tokenizer)


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    made = make_bert(tmp_path_factory.mktemp("bert"))
    made.model.save_pretrained(made.folder)
    made.processor.save_pretrained(made.folder)
    return made


@pytest.fixture(scope="session")
def vit(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("vit"), np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(30)]
    processor, model = tiny_processor("vit"), tiny_model("vit", **SHAPE, **LABELS).eval()
    model.set_exit_policy(policy_of_thirds(model, [processor(image, return_tensors="pt") for image in images]))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return SimpleNamespace(folder=folder, model=model, processor=processor, images=images)


@contextlib.contextmanager
def running(engine, **settings):
    """The address of a real server of an engine on a loopback port."""
    import uvicorn

    from een_hf.serving import create_app

    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(engine, **settings), access_log=False, log_level="warning", lifespan="on")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
