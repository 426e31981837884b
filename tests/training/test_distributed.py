"""Two processes train, evaluate and predict as one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


WORKER = Path(__file__).with_name("distributed_worker.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
# `--cpu --num_processes 2` would silently run one process.
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--mixed_precision", "no"]
ACCELERATE += ["--num_machines", "1", "--dynamo_backend", "no", "--main_process_port", "0"]


def run_worker(folder, launcher=()):
    folder.mkdir()
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(folder)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return run_worker(tmp_path_factory.mktemp("one") / "run")


@pytest.mark.parametrize(
    "launcher", [TORCHRUN, pytest.param(ACCELERATE, marks=pytest.mark.slow)], ids=["torchrun", "accelerate"]
)
def test_two_processes_equal_one(launcher, one_process, tmp_path):
    """What breaks: gradients summed instead of averaged, rows out of order, duplicates of the last batch kept."""
    two = run_worker(tmp_path / "run", launcher)
    for scheme in ("joint", "boosted", "two_stage"):
        alone = torch.load(one_process / f"{scheme}-0.pt", weights_only=False)
        assert alone["world_size"] == 1
        for process in range(2):
            found = torch.load(two / f"{scheme}-{process}.pt", weights_only=False)
            assert found["world_size"] == 2
            for name, wanted in alone["parameters"].items():
                torch.testing.assert_close(found["parameters"][name], wanted, rtol=0, atol=1e-5, msg=name)
            for name in ("exit_logits", "answers", "streamed"):
                torch.testing.assert_close(found[name], alone[name], rtol=0, atol=1e-5)
                assert torch.equal(found[name].argmax(-1), alone[name].argmax(-1))
            assert torch.equal(found["exit_labels"], alone["exit_labels"])
            assert torch.equal(found["streamed_labels"], alone["exit_labels"])
            assert found["evaluated"] == alone["evaluated"]
            assert found["answer_metrics"] == alone["answer_metrics"]
            assert max(found["answer_metrics"]["test_exit_fractions"]) < 1, "all rows exit at one exit"
            assert found["thresholds"] == pytest.approx(alone["thresholds"], abs=1e-5)
