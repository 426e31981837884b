"""A run that is stopped in whatever way goes on from its last whole checkpoint."""

import json
import resource
import shutil

import pytest
import torch
from transformers import TrainerCallback

from een_hf.models import EarlyExitBertConfig, EarlyExitBertForSequenceClassification, ExitConfigurationError
from een_hf.training import EarlyExitTrainingArguments, JointExitTrainer
from een_hf.training.trainer import is_whole_checkpoint, last_whole_checkpoint


def make_trainer(folder, **settings):
    torch.manual_seed(0)
    config = EarlyExitBertConfig(
        vocab_size=500,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
    )
    ids = torch.randint(1, 500, (32, 8), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": int(row[0]) % 2} for row in ids]
    settings = {"save_steps": 2, "max_steps": 6, "per_device_train_batch_size": 8, **settings}
    common = {"save_strategy": "steps", "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    args = EarlyExitTrainingArguments(str(folder), **common, **settings)
    return JointExitTrainer(model=EarlyExitBertForSequenceClassification(config), args=args, train_dataset=rows)


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
    for name, wanted in finished.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], wanted), name
    assert is_whole_checkpoint(newest)


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
        with pytest.raises(ExitConfigurationError, match="--output_dir.*goes on from .*checkpoint-2"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = make_trainer(tmp_path / "run", save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    for name, wanted in finished.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], wanted), name


def test_a_repeated_step_leaves_nothing_of_the_old_checkpoint(finished, tmp_path):
    """What breaks: going on from step 2 and killed while saving step 4 again, the run mixes files of both."""
    folder = shutil.copytree(finished.args.output_dir, tmp_path / "run")
    (folder / "checkpoint-4" / "leftover").write_text("of the run before")
    make_trainer(folder).train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert not (folder / "checkpoint-4" / "leftover").exists()
    assert json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
