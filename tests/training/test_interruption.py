"""A run that is stopped in whatever way goes on from its last whole checkpoint."""

import json
import resource
import shutil

import factory
import numpy as np
import pytest
import torch
from damage import damaged, wrong_json
from factory import assert_same_weights, tiny_model, tiny_rows
from transformers import TrainerCallback

from een_hf.errors import DiskFullError
from een_hf.models import ExitConfigurationError
from een_hf.training.checkpoints import checkpoint_fault, is_whole_checkpoint, last_whole_checkpoint


def make_trainer(folder, scheme="joint", **settings):
    rows = tiny_rows(count=32, learnable=True)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, **settings}
    model = tiny_model(vocab_size=500)  # whose weights do not fit into `FullDisk`
    return factory.make_trainer(folder, model, scheme, train_dataset=rows, eval_dataset=rows, **settings)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run's folder with the checkpoints of steps 2, 4 and 6."""
    trainer = make_trainer(tmp_path_factory.mktemp("run"))
    trainer.train()
    return trainer


@pytest.mark.parametrize("damage", ["no state", "torn state", "only weights"])
def test_a_half_written_checkpoint_is_passed_over(damage, finished, tmp_path):
    """What breaks: a kill while step 6 is saved makes the run start from rubbish, or not at all."""
    folder = shutil.copytree(finished.args.output_dir, tmp_path / "run")
    newest = folder / "checkpoint-6"
    state = newest / "trainer_state.json"
    if damage == "torn state":
        state.write_text(state.read_text()[:100])
    else:
        state.unlink()
    if damage == "only weights":
        for file in newest.iterdir():
            if file.name != "model.safetensors":
                file.unlink()
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-4")
    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, finished.model)
    assert is_whole_checkpoint(newest)


@pytest.fixture(scope="module")
def finished_l2w(tmp_path_factory):
    """A run's folder with checkpoints of steps 1 and 2, the weight network among them."""
    trainer = make_trainer(tmp_path_factory.mktemp("l2w"), "l2w", save_steps=1, max_steps=2)
    trainer.train()
    return trainer.args.output_dir


PARTS = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "weight_network.pt", "model.safetensors", "scheme.json"]


@pytest.mark.parametrize("part", [*PARTS, "trainer_state.json", "checksums.json"])
def test_a_checkpoint_with_a_broken_part_is_passed_over(part, finished_l2w, tmp_path, caplog):
    """What breaks: one torn file of the newest checkpoint ends every resume in a traceback."""
    folder = shutil.copytree(finished_l2w, tmp_path / "run")
    file = folder / "checkpoint-2" / part
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert last_whole_checkpoint(folder) == str(folder / "checkpoint-1")
    assert f"{folder / 'checkpoint-2'} is skipped: {part} is" in caplog.text.replace("cannot be", "is")
    message = f"--resume_from_checkpoint .*checkpoint-2 .*not complete.*{part}"
    with pytest.raises(ExitConfigurationError, match=message):
        make_trainer(folder, "l2w").train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_a_run_goes_on_from_the_checkpoint_before_a_broken_one(finished, tmp_path):
    folder = shutil.copytree(finished.args.output_dir, tmp_path / "run")
    file = folder / "checkpoint-6" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    resumed = make_trainer(folder)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, finished.model)
    assert is_whole_checkpoint(folder / "checkpoint-6")


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_any_damage_is_noticed(finished_l2w, tmp_path, count):
    folder = shutil.copytree(finished_l2w, tmp_path / "run") / "checkpoint-2"
    rng, files = np.random.default_rng(count), sorted(folder.iterdir())
    for number in range(count):
        file = files[number % len(files)]
        whole = file.read_bytes()
        (broken,) = damaged(whole, rng, 1)
        file.write_bytes(broken)
        try:
            assert broken == whole or file.name == "trainer_state.json" or checkpoint_fault(folder), file
        finally:
            file.write_bytes(whole)
        assert checkpoint_fault(folder) is None


@pytest.mark.parametrize("count", [1, pytest.param(8, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", [*PARTS, "trainer_state.json"])
def test_damage_without_checksums_ends_in_one_line(part, finished_l2w, tmp_path, count):
    """A checkpoint by an earlier version has none: what a library makes of its damage must not be a traceback."""
    folder = shutil.copytree(finished_l2w, tmp_path / "run") / "checkpoint-1"
    (folder / "checksums.json").unlink()
    file = folder / part
    whole, rng, refused = file.read_bytes(), np.random.default_rng(count), 0
    files = [whole[: int(rng.integers(len(whole)))] for _ in range(count)]
    if part.endswith(".json"):
        files += [text.encode() for text in wrong_json(json.loads(whole), rng, count)]
    else:
        values = (None, {"state": 1, "param_groups": [3]}, {"python": 1, "network": {"x": 2}}, 3, [], {}, "x")
        for value in values[:count]:
            torch.save(value, file)
            files.append(file.read_bytes())
    for broken in files:
        file.write_bytes(broken)
        trainer = make_trainer(tmp_path / "out", "l2w", save_strategy="no", max_steps=2)
        try:
            trainer.train(resume_from_checkpoint=str(folder))
        except ExitConfigurationError as error:
            assert "\n" not in str(error) and "checkpoint-1" in str(error)
            refused += 1
    assert refused >= count


@pytest.mark.parametrize("part", ["optimizer.pt", "scheduler.pt", "weight_network.pt"])
def test_a_part_that_is_missing_without_checksums_is_named(part, finished_l2w, tmp_path):
    """What breaks: a run resumes with a new optimizer or schedule, and says nothing of it."""
    folder = shutil.copytree(finished_l2w, tmp_path / "run") / "checkpoint-1"
    (folder / "checksums.json").unlink()
    (folder / part).unlink()
    with pytest.raises(ExitConfigurationError, match=f"checkpoint-1 .*{part}"):
        make_trainer(tmp_path / "out", "l2w", save_strategy="no", max_steps=2).train(str(folder))


def test_the_curves_of_a_resumed_run_are_those_of_one_in_one_go(tmp_path):
    """The last checkpoint lies between two logs: losses of the steps before it belong into the next log's mean."""
    settings = {"logging_steps": 3, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    make_trainer(tmp_path / "whole", **settings).train()
    folder = shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "training_curves.json").unlink()
    make_trainer(folder, **settings).train(resume_from_checkpoint=True)
    found, wanted = (
        json.loads((tmp_path / name / "training_curves.json").read_text()) for name in ("resumed", "whole")
    )
    assert found == wanted and wanted["train_loss"]["step"] == [3, 6]


def test_the_best_checkpoint_is_found_again(tmp_path):
    """The state that is saved names no path, so that a run that was moved keeps its best checkpoint, too."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}  # the first is the best
    make_trainer(tmp_path / "planted" / "run", **settings, learning_rate=1e-3).train()
    for path in (tmp_path / "planted").rglob("trainer_state.json"):
        assert "planted" not in path.read_text()
    moved = shutil.move(tmp_path / "planted" / "run", tmp_path / "moved")
    shutil.rmtree(moved / "checkpoint-6")
    trainer = make_trainer(moved, **settings, learning_rate=1e-3)
    trainer.train(resume_from_checkpoint=True)
    best = trainer.state.best_global_step
    assert trainer.state.best_model_checkpoint == str(moved / f"checkpoint-{best}") and best < 6


def test_naming_a_half_written_checkpoint_is_an_error(finished, tmp_path):
    folder = shutil.copytree(finished.args.output_dir, tmp_path / "run")
    (folder / "checkpoint-6" / "trainer_state.json").unlink()
    with pytest.raises(ExitConfigurationError, match="--resume_from_checkpoint .*checkpoint-6"):
        make_trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-6"))
    with pytest.raises(ExitConfigurationError, match="--resume_from_checkpoint"):
        make_trainer(tmp_path / "empty").train(resume_from_checkpoint=True)


class FullDisk(TrainerCallback):
    """From a step on, files cannot grow beyond 40 kB: the weights fit no more."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_says_so_and_keeps_the_last_checkpoint(finished, tmp_path):
    """What breaks: the old checkpoint goes before the new one is written, or the new one stays as a torn file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = make_trainer(tmp_path / "run", save_total_limit=1)
    trainer.add_callback(FullDisk())
    try:
        with pytest.raises(DiskFullError, match="--output_dir.*continues from .*checkpoint-2"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = make_trainer(tmp_path / "run", save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert_same_weights(resumed.model, finished.model)


def test_a_repeated_step_leaves_nothing_of_the_old_checkpoint(finished, tmp_path):
    """What breaks: going on from step 2 and killed while saving step 4 again, the run mixes files of both."""
    folder = shutil.copytree(finished.args.output_dir, tmp_path / "run")
    (folder / "checkpoint-4" / "leftover").write_text("of the run before")
    make_trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert not (folder / "checkpoint-4" / "leftover").exists()
    assert json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4


def test_weights_alone_are_nothing_to_go_on_from(tmp_path):
    """What breaks: the run goes on with a new optimizer, and without a word."""
    make_trainer(tmp_path, save_only_model=True).train()
    with pytest.raises(ExitConfigurationError, match="checkpoint-6 holds no optimizer.*--model_name_or_path"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)
