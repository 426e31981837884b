"""The model first, its early exits afterwards."""

from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate.utils import broadcast
from torch.utils.data import Subset

from ..models import ExitConfigurationError
from .frozen_heads import read_features, train_heads
from .registry import register_scheme
from .trainer import EarlyExitTrainer


@dataclass
class TwoStageArguments:
    """Settings of `--method two_stage`."""

    second_stage_epochs: int = field(
        default=20, metadata={"help": "two_stage: passes of the early exits over what they read of the training rows."}
    )
    second_stage_learning_rate: float = field(
        default=1e-3, metadata={"help": "two_stage: of the early exits, at the start; AdamW, cosine to zero."}
    )
    second_stage_batch_size: int = field(default=32, metadata={"help": "two_stage: rows per step of the early exits."})
    second_stage_samples: int = field(
        default=50_000,
        metadata={
            "help": "two_stage: most training rows, drawn at random, that the early exits learn from; each takes "
            "4 * (exits - 1) * hidden size bytes of memory."
        },
    )

    def __post_init__(self):
        for name in ("second_stage_epochs", "second_stage_batch_size", "second_stage_samples"):
            if getattr(self, name) < 1:
                raise ExitConfigurationError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 < self.second_stage_learning_rate < float("inf"):
            raise ExitConfigurationError(
                f"--second_stage_learning_rate must be positive, not {self.second_stage_learning_rate}."
            )


@register_scheme("two_stage")
class TwoStageExitTrainer(EarlyExitTrainer):
    """The model and its last exit are trained as without early exits; then the early exits learn what it answers.

    The first stage is plain fine-tuning, and so is what the last exit answers. After its last step, the best
    checkpoint loaded where that is asked for, the model reads training rows once more, in eval mode. The exits before
    the last learn its probabilities from what they read there, all else being frozen: a few seconds of training for
    each thousand rows. Until then their metrics mean nothing, and a checkpoint holds them untrained; resuming from the
    last one trains them again, to the same result.

    `--exit_loss_weights` has no effect, label smoothing and class weights act in the first stage.

    References:
        DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference (Xin et al., ACL 2020), section 3.1, trains in
        these two stages. There exits learn the labels; here they learn the last exit's probabilities.
    """

    arguments_class = TwoStageArguments
    paper = "DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference (ACL 2020)"
    citation = "https://arxiv.org/abs/2004.12993"

    def _accept(self, model, args, train_dataset) -> None:
        super()._accept(model, args, train_dataset)
        if model.backbone_frozen:
            raise ExitConfigurationError(
                "--method two_stage trains the model before its early exits, and --freeze_backbone keeps it: use "
                "--method joint."
            )
        if args.warm_start_epochs:
            raise ExitConfigurationError(
                "--method two_stage trains the last exit alone: leave out --warm_start_epochs."
            )
        if args.fsdp or args.deepspeed:
            raise ExitConfigurationError(
                "--method two_stage reads whole parameters between its stages: leave out --fsdp and --deepspeed."
            )
        if train_dataset is not None and not hasattr(train_dataset, "__len__"):
            raise ExitConfigurationError(
                "--method two_stage reads training rows a second time, which a stream does not give: use --method "
                "joint, or leave out --streaming."
            )

    def in_warm_start(self) -> bool:
        """The last exit alone is trained, in all of the first stage."""
        return True

    def train(self, *args, **kwargs):
        """As in `Trainer`, both stages."""
        outcome = super().train(*args, **kwargs)
        self.train_early_exits()
        return outcome

    def train_early_exits(self) -> None:
        """The second stage, on the model as it is now."""
        settings, model = self.scheme_args, self.network
        features, answers = self._read_training_rows(model)
        loss = train_heads(
            model,
            features,
            answers,
            num_train_epochs=settings.second_stage_epochs,
            train_batch_size=settings.second_stage_batch_size,
            head_learning_rate=settings.second_stage_learning_rate,
            seed=self.args.seed,
            disable_tqdm=self.args.disable_tqdm or not self.accelerator.is_local_main_process,
        )
        for parameter in model.exit_heads.parameters():  # devices of the same kind need not round alike
            parameter.data.copy_(broadcast(parameter.data))
        self.log({"second_stage_loss": loss})

    def _read_training_rows(self, model) -> tuple[np.ndarray, np.ndarray]:
        """Features and the last exit's logits of training rows, in their order, those of all processes."""
        rows, most = self.train_dataset, self.scheme_args.second_stage_samples
        if len(rows) > most:
            generator = np.random.default_rng(self.args.seed)
            chosen = np.sort(generator.choice(len(rows), most, replace=False)).tolist()
            rows = rows.select(chosen) if hasattr(rows, "select") else Subset(rows, chosen)
        features, answers = [], []
        model.eval()
        for batch in self.get_eval_dataloader(rows):
            inputs = {name: value for name, value in self._prepare_inputs(batch).items() if name != "labels"}
            with self.accelerator.autocast():
                found = read_features(model, inputs)
            for values, part in zip((features, answers), self.accelerator.gather_for_metrics(found), strict=True):
                values.append(part.cpu())
        return torch.cat(features).numpy(), torch.cat(answers).numpy()
