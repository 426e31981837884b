"""A resumed run equals the uninterrupted one to the bit, whatever the order of its rows and wherever it was saved."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training.resume_worker import differences


WORKER = Path(__file__).with_name("resume_worker.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


SOME = pytest.param(["group_by_length", "random"], [6, 8], id="some")
ALL = ["group_by_length", "random", "sequential", "batch_rebalance"]
ALL = pytest.param(ALL, [2, 6, 8, 12, 16], id="all", marks=pytest.mark.slow)


def check(found: dict, strategies: list[str], steps: list[int]) -> None:
    for strategy in strategies:
        repeated = 2 if strategy == "sequential" else 0
        assert found[strategy] == {0: repeated, **dict.fromkeys(steps, 0.0)}, strategy


@pytest.mark.parametrize(("strategies", "steps"), [SOME, ALL])
def test_one_process(strategies, steps, tmp_path):
    """Six steps an epoch. What breaks: the rest of a resumed epoch takes another order, and rows repeat."""
    check(differences(tmp_path, strategies, steps), strategies, steps)


@pytest.mark.parametrize(("strategies", "steps"), [ALL])
def test_two_processes(strategies, steps, tmp_path):
    """What breaks: the epoch's number does not reach the sampler below accelerate's two wrappers."""
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [*TORCHRUN, str(WORKER), str(tmp_path), ",".join(strategies), ",".join(map(str, steps))]
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for process in range(2):
        found = json.loads((tmp_path / f"found-{process}.json").read_text())
        assert found["world_size"] == 2
        differing = {name: {int(k): v for k, v in each.items()} for name, each in found["differences"].items()}
        check(differing, strategies, steps)
