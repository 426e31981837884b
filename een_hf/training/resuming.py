"""Writing of complete checkpoints, and resuming from them."""

import json
import os
import shutil
from dataclasses import asdict

import torch
from safetensors import SafetensorError
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import CheckpointError, DiskFullError, is_full_disk
from .checkpoints import (
    PublicTrainerState,
    checkpoint_fault,
    is_whole_checkpoint,
    last_whole_checkpoint,
    reading_checkpoint,
    write_checksums,
)


SCHEME_FILE = "scheme.json"


class ResumingMixin:
    """The part of `EarlyExitTrainer` that writes checkpoints and resumes from them."""

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As in `Trainer`; `True` resumes from the last complete checkpoint.

        Raises:
            CheckpointError: the checkpoint to resume from is missing or incomplete, or was written by another scheme.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = last_whole_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise CheckpointError(
                    f"--resume_from_checkpoint: {self.args.output_dir} has no complete checkpoint to resume from."
                )
        elif checkpoint and (fault := checkpoint_fault(checkpoint)):
            raise CheckpointError(
                f"--resume_from_checkpoint {checkpoint} does not exist or is not complete ({fault}): leave the flag "
                "out to resume from the last complete checkpoint."
            )
        self._resumed_from = checkpoint
        self._forget_steps()
        if checkpoint:
            self._read_scheme(checkpoint)
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _read_scheme(self, checkpoint: str) -> None:
        """Check that a checkpoint is of this scheme, and read which heads are new."""
        path = os.path.join(checkpoint, SCHEME_FILE)
        if not os.path.exists(path):
            if not os.path.exists(os.path.join(checkpoint, OPTIMIZER_NAME)):
                raise CheckpointError(
                    f"--resume_from_checkpoint {checkpoint} holds no optimizer (--save_only_model), so that no run "
                    f"can resume from it: start from its weights, --model_name_or_path {checkpoint}, in another "
                    "--output_dir."
                )
            return
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled  # their states are in files of other names
        for name in () if sharded else (OPTIMIZER_NAME, SCHEDULER_NAME):
            if not os.path.exists(os.path.join(checkpoint, name)):  # Trainer would begin with a new one
                raise CheckpointError(
                    f"--resume_from_checkpoint {checkpoint} has no {name}: it is not complete, or was written under "
                    "FSDP or DeepSpeed, which must resume it. Give another checkpoint, or start again from its "
                    "weights with --model_name_or_path."
                )
        with reading_checkpoint(checkpoint), open(path) as file:
            written = json.load(file)
            found, self._new_heads = written["method"], written.get("new_heads")
            if not isinstance(found, str) or not all(type(k) is int for k in self._new_heads or ()):
                raise ValueError(f"{SCHEME_FILE} names no scheme")
            if (unlogged := written.get("unlogged_losses")) is not None:
                sums, self._num_summed = unlogged
                self._summed_losses = torch.tensor(sums, dtype=torch.float32, device=self.args.device)
                num_exits = self.network.num_exits
                if self._summed_losses.shape != (num_exits,) or type(self._num_summed) is not int:
                    raise ValueError(f"{SCHEME_FILE} holds no loss for each of {num_exits} exits")
        if found != self.scheme:
            raise CheckpointError(
                f"--resume_from_checkpoint {checkpoint} was trained with --method {found}, not {self.scheme}: "
                f"resume with --method {found}, or start again from its weights, --model_name_or_path {checkpoint}."
            )

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with reading_checkpoint(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_callback_state(self):
        folder, step = self._resumed_from, self.state.best_global_step
        with reading_checkpoint(folder):
            super()._load_callback_state()
        if step is not None and self.state.best_model_checkpoint is None:
            best = os.path.join(os.path.dirname(os.path.normpath(folder)), f"{PREFIX_CHECKPOINT_DIR}-{step}")
            self.state.best_model_checkpoint = best if os.path.isdir(best) else None

    def _load_optimizer_and_scheduler(self, checkpoint):
        with reading_checkpoint(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_scaler(self, checkpoint):
        with reading_checkpoint(checkpoint):
            super()._load_scaler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with reading_checkpoint(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save_checkpoint(self, model, trial):
        self.state.__class__ = PublicTrainerState
        folder = os.path.join(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save and os.path.isdir(folder):
            shutil.rmtree(folder)  # left by an interrupted run, or by one that is repeated: never mix the two
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if is_whole_checkpoint(folder):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            if not is_full_disk(error):
                raise
            last = last_whole_checkpoint(self._get_output_dir(trial))
            raise DiskFullError(
                f"{folder} could not be written ({error}): free space on the disk of --output_dir, then repeat the "
                f"command. It continues from {last or 'the start'}."
            ) from error

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # The checksums are written next, by one process: all other processes must have written their files.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_checksums(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            settings = asdict(self.scheme_args) if self.scheme_args else {}
            settings |= {"method": self.scheme, "new_heads": self.new_heads()}
            if self._num_summed:
                settings["unlogged_losses"] = [self._summed_losses.tolist(), self._num_summed]
            with open(os.path.join(output_dir, SCHEME_FILE), "w") as file:
                json.dump(settings, file, indent=2)
