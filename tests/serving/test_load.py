"""A server under thousands of requests: none lost, none swapped, clients that are killed, memory that stays flat."""

import asyncio
import json
import random
import subprocess
import sys
import time

import psutil
import pytest
import torch
from serving import Client

from een_hf.serving import AsyncExitEngine

from .conftest import random_texts, running
from .test_serve_command import start


TEXTS = random_texts(300, longest=30, seed=31)


@pytest.fixture(scope="module")
def wanted(bert):
    with torch.no_grad():
        return [bert.model(**bert.processor(text, return_tensors="pt")).logits[0] for text in TEXTS]


def is_answer(bert, logits, status, body):
    found = {label["label"]: label["score"] for label in json.loads(body)[0]}
    labels = bert.model.config.id2label
    return status == 200 and all(abs(found[labels[place]] - float(logits[place])) < 1e-5 for place in range(3))


async def ask_all(port, places, at_once=32):
    """(place, status, body) of each request, some at a time."""
    client, left, answers = Client(port), iter(places), []

    async def work():
        for place in left:
            answers.append((place, *await client.ask(TEXTS[place])))

    await asyncio.gather(*[work() for _ in range(at_once)])
    client.close()
    return answers


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_request_is_lost_or_gets_the_answer_of_another(bert, wanted, count):
    with running(AsyncExitEngine(bert.model, bert.processor)) as address:
        places = [random.Random(0).randrange(len(TEXTS)) for _ in range(count)]
        answers = asyncio.run(ask_all(int(address.rsplit(":", 1)[1]), places))
    assert len(answers) == count
    assert all(is_answer(bert, wanted[place], status, body) for place, status, body in answers)


# Sends requests without end, and reads nothing.
CLIENT = """
import socket, sys, time

body = b'{"inputs": "a b c d e f g h a b c d e f g h"}'
request = b"POST /predict HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(body) + body
connections = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(10)]
for connection in connections:
    connection.sendall(request)
print("ready", flush=True)
while True:
    time.sleep(0.05)
    for connection in connections:
        connection.sendall(request)
"""


@pytest.mark.slow
def test_twenty_clients_are_killed_and_the_others_are_answered(bert, wanted):
    """What breaks: a client that dies takes the batch, a slot of the queue, or the server with it."""
    engine, rng = AsyncExitEngine(bert.model, bert.processor, max_waiting=100_000), random.Random(1)
    with running(engine) as address:
        port = int(address.rsplit(":", 1)[1])

        def kill_twenty():
            command = [sys.executable, "-c", CLIENT, str(port)]
            clients = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(20)]
            for client in clients:
                assert client.stdout.readline().strip() == b"ready"
                time.sleep(rng.random() / 5)
                client.kill()
                client.wait()

        async def both():
            killing = asyncio.create_task(asyncio.to_thread(kill_twenty))
            answers = []
            while not killing.done():
                places = [rng.randrange(len(TEXTS)) for _ in range(100)]
                answers += await ask_all(port, places, at_once=8)
            await killing
            return answers

        answers = asyncio.run(both())
        for _ in range(1000):
            if not engine.num_waiting:
                break
            time.sleep(0.05)
        assert engine.num_waiting == 0
    assert len(answers) >= 100
    assert all(is_answer(bert, wanted[place], status, body) for place, status, body in answers)


@pytest.mark.slow
def test_memory_stays_flat(bert):
    """What breaks: a little of each request is kept, and a server that runs for weeks is ended by the system."""
    process, port = start(bert, "--port", "0", "--audit_rate", "0.1", "--audit_limit", "0.9")
    try:
        used, rng = [], random.Random(2)
        for _ in range(5):
            places = [rng.randrange(len(TEXTS)) for _ in range(10_000)]
            answers = asyncio.run(ask_all(port, places))
            assert all(status == 200 for _, status, _ in answers)
            used.append(psutil.Process(process.pid).memory_info().rss / 2**20)
        assert used[-1] - used[1] < 10, used
    finally:
        process.terminate()
        process.communicate(timeout=60)
