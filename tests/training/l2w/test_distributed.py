"""Meta-weighted training in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = Path(__file__).with_name("distributed_worker.py")


@pytest.mark.parametrize("method", ["directional", pytest.param("exact", marks=pytest.mark.slow)])
def test_two_processes_keep_one_weight_network(method, tmp_path):
    """What breaks: W drifts apart, its gradients are summed or come from one process, shards are trained on."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ":".join(sys.path)}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launcher, str(WORKER), method, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("passed") == 2
