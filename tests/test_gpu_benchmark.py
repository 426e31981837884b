"""benchmarks/gpu.py on small shapes, where its judgements can be compared with plain counts."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gpu
import numpy as np
import pytest
import torch
from common import exit_in_shares

from een_hf import ExitPolicy


ARGS = argparse.Namespace(device="cpu", small=True, length=16)


@pytest.fixture
def minilm():
    return gpu.make_network(ARGS, "minilm", 2, "float32")


def test_inputs_exit_in_the_shares_asked_for(minilm):
    """Fails if a benchmark that says "half of the layers" runs more or fewer."""
    inputs = gpu.random_inputs(ARGS, minilm, 40)
    shares = gpu.half_cost_shares(minilm)
    assert sum(shares) == pytest.approx(1) and np.dot(shares, minilm.config.exit_layers) == pytest.approx(3)
    seen = exit_in_shares(minilm, inputs, shares)
    taken = minilm(**inputs).exit_index
    np.testing.assert_allclose(taken.bincount(minlength=3) / 40, shares, atol=1 / 40)
    depth = [2 * int(index) + 2 for index in taken]
    assert seen.tolist() == [sum(layer < d for d in depth) / 40 for layer in range(6)]


def test_equal_scores_exit_together_or_not_at_all(minilm):
    """Fails if ties, as all scores of patience at exit 1, make every example exit at once."""
    inputs = gpu.random_inputs(ARGS, minilm, 16)
    exit_in_shares(minilm, inputs, [0.5, 0.25, 0.25], "patience")
    assert (minilm(**inputs).exit_index > 0).all()


@pytest.mark.parametrize(
    ("fault", "right"),
    [("none", True), ("near the threshold", True), ("exit", False), ("logits", False), ("nan", False)],
)
def test_a_wrong_answer_is_called_wrong(fault, right):
    """Fails if the check passes whatever the runner answers, or calls rounding at a threshold an error."""
    exit_logits = torch.randn(50, 3, 4, generator=torch.Generator().manual_seed(0)) * 3
    scores = exit_logits.softmax(-1).amax(-1)
    policy = ExitPolicy("confidence", scores.median(0).values.add(1e-4).tolist())
    taken = policy.exits_of(exit_logits)
    if fault == "near the threshold":
        row = int((scores[:, 0] - policy.thresholds[0]).abs().argmin())
        taken[row] = 0
    elif fault == "exit":
        taken[int(scores[:, 0].argmin())] = 0
    logits = exit_logits[torch.arange(50), taken].clone()
    if fault in ("logits", "nan"):
        logits[7, 2] += float("nan") if fault == "nan" else 1.0
    found = gpu.compare(SimpleNamespace(logits=logits, exit_index=taken), exit_logits, policy)
    assert found["at another exit"] == int(fault in ("near the threshold", "exit"))
    assert gpu.verdict([found], "float32")["ok"] is right


@pytest.mark.parametrize("index", range(3))
def test_the_chain_of_exits_is_timed_only_if_it_answers_right(minilm, index):
    """Fails if a chain that skips the wrong layers stands in the table."""
    args, inputs = argparse.Namespace(device="cpu", dtype="float32"), gpu.random_inputs(ARGS, minilm, 1)
    thresholds = [2.0] * 3
    thresholds[index] = -1.0
    policy, functions = ExitPolicy("confidence", thresholds), {}
    with torch.inference_mode():
        assert gpu.add_chain(args, minilm, policy, inputs, index, functions) == "right"
        logits, taken = functions["one graph"]()
        assert int(taken) == index
        torch.testing.assert_close(logits, minilm(**inputs, early_exit=False).exit_logits[:, index])
        functions = {}
        assert "instead of" in gpu.add_chain(args, minilm, policy, inputs, (index + 1) % 3, functions)
        args.device = "cuda"  # which is not here
        assert "not available" in gpu.add_chain(args, minilm, policy, inputs, index, functions) and not functions


def test_what_fails_is_a_row_and_takes_no_other_along(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "STARTED", gpu.time.perf_counter())
    part = gpu.Part("batches", argparse.Namespace(limit=60, results=tmp_path))

    def broken(args, model):
        raise RuntimeError("no such kernel")

    part.measure(broken, model="minilm")
    part.measure(lambda args, model: [{"batch_size": 8}], model="vit-small")
    part.args.limit = 0
    part.measure(broken, model="bert-base")
    part.write()
    rows = json.loads((tmp_path / "gpu_batches.json").read_text())["rows"]
    assert rows[0] == {"model": "minilm", "failed": "RuntimeError: no such kernel"}
    assert rows[1] == {"model": "vit-small", "batch_size": 8} and "skipped" in rows[2]
    assert [line[1] for line in gpu.table(tmp_path, ["batches", "texts"], judged=True)] == [
        "failed",
        "skipped",
        "failed",
    ]


def test_targets_are_judged(tmp_path):
    """Fails if a miss is called met, or a base model is judged by the target of a small one."""
    row = {"step": 3, "batch_size": 128, "runner / eager": 0.66, "runner / graph": 0.72}
    row |= {"dynamic / eager": 2.0, "dynamic / graph": 4.0}
    rows = [{"model": model, **row} for model in ("vit-small", "vit-base")]
    (tmp_path / "gpu_batches.json").write_text(json.dumps({"rows": rows}))
    verdicts = [line[3] for line in gpu.table(tmp_path, ["batches"], judged=True)]
    assert verdicts == ["<= 0.65 missed", "<= 0.75 met", "<= 0.65 missed", "<= 0.70 missed"]
    assert {line[3] for line in gpu.table(tmp_path, ["batches"], judged=False)} == {""}


@pytest.mark.slow
def test_the_whole_script_without_a_gpu(tmp_path):
    script = Path(gpu.__file__)
    words = ["--small", "--models", "minilm", "--results", str(tmp_path)]
    done = subprocess.run([sys.executable, str(script), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.stem for path in tmp_path.iterdir()) == [
        "gpu_batches",
        "gpu_correctness",
        "gpu_serving",
        "gpu_single",
        "gpu_texts",
    ]
    single = json.loads((tmp_path / "gpu_single.json").read_text())["rows"]
    assert {row["conditional nodes"] for row in single} == {"right"}
    checks = json.loads((tmp_path / "gpu_correctness.json").read_text())["rows"]
    assert {row["criterion"] for row in checks} == set(gpu.CRITERIA) and all(row["ok"] for row in checks)
    assert {"predict", "engine", "server"} < {row["what"] for row in checks}
