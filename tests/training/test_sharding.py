"""Parameters sharded by FSDP2: joint and boosted train as in one process, and what cannot be sharded is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from factory import QUIET, make_trainer, tiny_model, tiny_rows

from een_hf import AutoEarlyExitModel, ExitConfigurationError
from een_hf.training import EarlyExitTrainingArguments, JointExitTrainer, get_scheme
from een_hf.training.checks import check_sharding


WORKER = Path(__file__).with_name("sharding_worker.py")
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders of the run in one process, and of that in two with shards."""
    folder = tmp_path_factory.mktemp("sharding")
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"}
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        (folder / name).mkdir()
        command = [sys.executable, *launcher, str(WORKER), str(folder / name)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder / "one", folder / "two"


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["joint", "boosted"])
def test_shards_on_two_processes_equal_one_process(scheme, runs):
    """What breaks: heads that are standardized on whole parameters lose it, or exits are read from half of a layer."""
    one, two = runs
    wanted = torch.load(one / f"{scheme}-0.pt")
    assert not any(wanted["sharded"].values())
    for process in range(2):
        found = torch.load(two / f"{scheme}-{process}.pt")
        assert all(found["sharded"].values())
        for name in ("exit_logits", "answers", "resumed"):
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-4)
        torch.testing.assert_close(found["resumed"], found["exit_logits"], rtol=0, atol=1e-6)
        assert found["thresholds"] == pytest.approx(wanted["thresholds"], abs=1e-4)
        assert found["fractions"] == wanted["fractions"] and max(found["fractions"]) < 1
    plain, sharded = (AutoEarlyExitModel.from_pretrained(folder / scheme) for folder in runs)
    assert type(sharded) is type(plain) and sharded.newly_initialized == frozenset()
    assert sharded.config.to_dict() == plain.config.to_dict() | {"exit_policy": sharded.config.exit_policy}
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(sharded.state_dict()[name], value, rtol=0, atol=1e-4, msg=name)
    assert {path.name for path in (one / scheme).glob("*.py")} == {path.name for path in (two / scheme).glob("*.py")}


FSDP = {"fsdp": True, "fsdp_config": {"version": 2}}


@pytest.mark.parametrize("scheme", ["joint", "boosted"])
def test_shards_that_there_would_not_be_are_refused(scheme, tmp_path):
    """What breaks: on the CPU accelerate trains with DDP in their place, and says nothing."""
    with pytest.raises(
        ExitConfigurationError, match="--fsdp has no effect here: .* on the CPU it would train with DDP"
    ):
        make_trainer(tmp_path, scheme=scheme, **FSDP)


def test_shards_of_accelerate_launch_are_refused_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ExitConfigurationError, match="--fsdp has no effect here"):
        make_trainer(tmp_path)


@pytest.mark.parametrize("scheme", ["l2w", "two_stage"])
@pytest.mark.parametrize("launched", [False, True])
def test_schemes_of_whole_parameters_refuse_shards(launched, scheme, tmp_path, monkeypatch):
    if launched:
        monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ExitConfigurationError, match=f"--method {scheme} works on whole parameters"):
        make_trainer(tmp_path, scheme=scheme, **({} if launched else FSDP))


@pytest.mark.parametrize(
    ("settings", "environment", "message"),
    [
        # Its wrapper hides the model, and parameters are flattened: heads could not be told from the backbone.
        ({"version": 1}, {}, "version 1: exits are trained under FSDP2 only"),
        ({"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}, {}, "no model is saved: use FULL_STATE_DICT"),
        (None, {}, "version 1"),
        (None, {"FSDP_VERSION": "2"}, "SHARDED_STATE_DICT, under which no model is saved"),
    ],
)
def test_settings_of_shards_that_do_not_work(settings, environment, message, tmp_path, monkeypatch):
    """On several accelerators, given by flags, or by `accelerate launch` as variables of the environment."""
    flags = {} if settings is None else {"fsdp": True, "fsdp_config": settings}
    args = EarlyExitTrainingArguments(str(tmp_path), **QUIET, **flags)
    for name, value in {**environment, **({"ACCELERATE_USE_FSDP": "true"} if settings is None else {})}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(args.distributed_state, "distributed_type", DistributedType.MULTI_GPU)
    with pytest.raises(ExitConfigurationError, match=message):
        JointExitTrainer(model=tiny_model(), args=args, train_dataset=tiny_rows())


@pytest.mark.parametrize("scheme", ["l2w", "two_stage"])
def test_schemes_of_whole_parameters_refuse_deepspeed(scheme, tmp_path, monkeypatch):
    """It is not installed here: the arguments are made before `accelerate launch` would name it."""
    args = EarlyExitTrainingArguments(str(tmp_path), **QUIET)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ExitConfigurationError, match=f"--method {scheme} .* leave out --fsdp, --deepspeed"):
        check_sharding(args, tiny_model(), scheme, trains_shards=get_scheme(scheme).trains_shards)
    check_sharding(args, tiny_model(), "joint", trains_shards=JointExitTrainer.trains_shards)
