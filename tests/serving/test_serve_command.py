"""`een-hf serve` as a process of its own."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
import torch
from factory import tiny_model

from een_hf.commands import main, serve
from een_hf.serving import PrometheusObserver, ServerLimits

from .conftest import random_texts


@pytest.mark.parametrize(
    "flags,said",
    [
        (["--timeout", "0"], "--timeout must be above 0"),
        (["--max_rows", "0"], "max_rows must be at least 1"),
        (["--max_wait_ms", "nan"], "--max_wait_ms must be a number"),
        (["--port", "99999"], "--host 127.0.0.1 --port 99999: cannot listen there"),
        (["--device", "nonsense"], "on device nonsense cannot be loaded"),
    ],
)
def test_bad_flags_are_refused_in_one_line(bert, flags, said):
    with pytest.raises(SystemExit, match=f"error: .*{said}"):
        main(["serve", str(bert.folder), "--port", "0", *flags])


def test_flags_reach_the_engine(bert, monkeypatch):
    """What breaks: a limit that was given does not hold, or an audit promises another confidence."""
    made = []
    monkeypatch.setattr(serve, "create_app", lambda engine, **settings: made.append((engine, settings)))
    monkeypatch.setattr(serve, "serve", lambda app, listening, timeout: (listening.close(), made.append(timeout)))
    flags = "--max_rows 3 --max_wait_ms 7 --max_waiting 11 --max_length 9 --max_inputs 5 --max_body_bytes 999"
    flags += " --timeout 13 --audit_rate 0.25 --audit_limit 0.1 --audit_confidence 0.8 --on_alarm full --port 0"
    main(["serve", str(bert.folder), *flags.split()])
    (engine, settings), timeout = made
    assert settings == {"name": str(bert.folder), "limits": ServerLimits(999, 5, 13.0)} and timeout == 13
    worker, auditor, monitor = engine.worker, engine.auditor, engine.auditor.monitor
    assert (worker.max_rows, worker.max_wait, engine.max_waiting, engine.reader.max_length) == (3, 0.007, 11, 9)
    assert (auditor.rate, auditor.on_alarm, monitor.limit, monitor.confidence) == (0.25, "full", 0.1, 0.8)
    assert worker.auditor is auditor and isinstance(engine.observer, PrometheusObserver)


def test_what_cannot_be_served(tmp_path):
    """What breaks: a port that is taken shows after the model was loaded; an untrained classifier answers users."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(SystemExit, match="cannot listen there"):
            main(["serve", "no-such-model", "--port", str(taken.getsockname()[1])])
    with pytest.raises(SystemExit, match="error: .*no-such-model"):
        main(["serve", str(tmp_path / "no-such-model"), "--port", "0"])
    tiny_model().bert.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="error: MODEL .* lacks weights, for example classifier.bias"):
        main(["serve", str(tmp_path), "--port", "0"])


def start(bert, *flags):
    command = [sys.executable, "-m", "een_hf", "serve", str(bert.folder), "--threads", "1", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    found = re.search(r"http://127.0.0.1:(\d+)", line)
    assert found, line + process.stderr.read()
    return process, int(found[1])


async def post(port, text):
    """Status and body of one request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"inputs": text, "raw_scores": True}).encode()
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    writer.write(head + body)
    answer = await reader.read()
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_stopped_answers_what_it_has_accepted(stop, bert):
    """What breaks: a deployment that replaces a server loses requests, or Ctrl-C ends in a traceback."""
    texts = random_texts(200, seed=7)
    process, port = start(bert, "--port", "0")

    async def ask():
        tasks = [asyncio.create_task(post(port, text)) for text in texts]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        process.send_signal(stop)
        return await asyncio.gather(*tasks, return_exceptions=True)

    answers = asyncio.run(ask())
    out, err = process.communicate(timeout=60)
    assert process.returncode in (0, -stop), err
    assert "Traceback" not in err
    answered = 0
    for text, answer in zip(texts, answers, strict=True):
        if isinstance(answer, (ConnectionError, IndexError)):
            continue  # the connection came too late to be accepted
        status, body = answer
        assert status == 200, body
        with torch.no_grad():
            logits = bert.model(**bert.processor(text, return_tensors="pt")).logits[0]
        for label in body[0]:
            assert label["score"] == pytest.approx(float(logits[bert.model.config.label2id[label["label"]]]), abs=1e-5)
        answered += 1
    assert answered > 0


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT") or os.name == "nt", reason="needs SO_REUSEPORT")
def test_two_servers_share_a_port(bert):
    first, port = start(bert, "--port", "0", "--reuse_port")
    second, same = start(bert, "--port", str(port), "--reuse_port")
    assert same == port

    async def ask(count):
        return await asyncio.gather(*[post(port, "a b") for _ in range(count)])

    assert {status for status, _ in asyncio.run(ask(40))} == {200}
    first.terminate()
    first.communicate(timeout=60)
    assert {status for status, _ in asyncio.run(ask(10))} == {200}
    second.terminate()
    second.communicate(timeout=60)
