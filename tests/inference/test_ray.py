"""The recipe of Ray Data on a real Ray of three CPUs, against the model's answers row by row."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas
import psutil
import pytest
import torch
from factory import LABELS, TOKENS, tiny_model, tiny_processor


pytestmark = pytest.mark.slow
pytest.importorskip("ray", reason="needs the extra ray")
WORKER, NUM_ROWS = Path(__file__).with_name("ray_worker.py"), 400


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Texts, the model's answers, the folder of Ray's answers, and the folder that Ray itself wrote to."""
    folder, temporary = tmp_path_factory.mktemp("ray"), tmp_path_factory.mktemp("r")  # sockets need a short path
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(TOKENS[5:], 1 + row % 9)) for row in range(NUM_ROWS)]
    model, tokenizer = tiny_model(noise=0.3, **LABELS).eval(), tiny_processor()
    with torch.no_grad():
        scores = model(**tokenizer(texts, padding=True, return_tensors="pt")).exit_logits.softmax(-1).amax(-1)
    thresholds = scores.quantile(0.6, dim=0, interpolation="midpoint").tolist()
    model.set_exit_policy({"criterion": "confidence", "thresholds": thresholds})
    with torch.no_grad():
        answers = [model(**tokenizer(text, return_tensors="pt")) for text in texts]
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    rows = pandas.DataFrame({"id": range(NUM_ROWS), "text": texts})
    for name in ("csv", "parquet"):
        (folder / name).mkdir()
        for start in range(0, NUM_ROWS, 100):
            path, part = folder / name / f"{start}.{name}", rows[start : start + 100]
            part.to_csv(path, index=False) if name == "csv" else part.to_parquet(path)
    # Ray reports its use to its makers unless it is told not to.
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(WORKER), str(folder), str(temporary)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return texts, answers, folder, temporary


@pytest.mark.parametrize("name", ["plain", "killed"])
def test_every_row_comes_back_once_with_the_answer_of_the_model(name, run):
    """What breaks: rows of the actor that died are lost or come twice, or an actor answers with another's model."""
    texts, answers, folder, _ = run
    found = pandas.read_parquet(folder / name).sort_values("id")
    assert found["id"].tolist() == list(range(NUM_ROWS)) and found["text"].tolist() == texts
    assert found["label"].tolist() == [LABELS["id2label"][int(answer.logits.argmax())] for answer in answers]
    assert found["exit_layer"].tolist() == [int(answer.exit_index) + 1 for answer in answers]
    assert set(found["exit_layer"]) == {1, 2, 3}
    scores = [float(answer.logits.softmax(-1).max()) for answer in answers]
    np.testing.assert_allclose(found["score"], scores, rtol=0, atol=1e-5)


def test_an_actor_was_killed_and_others_answered(run):
    folder = run[2]
    assert len({*pandas.read_parquet(folder / "killed")["pid"]} - {int((folder / "marker").read_text())}) >= 2


def test_nothing_of_ray_stays(run):
    """What breaks: a run that has ended leaves processes behind that hold memory and ports."""
    temporary = str(run[3])
    until = time.monotonic() + 60
    while remaining := [p for p in psutil.process_iter(["cmdline"]) if temporary in " ".join(p.info["cmdline"] or [])]:
        assert time.monotonic() < until, remaining
        time.sleep(0.5)
