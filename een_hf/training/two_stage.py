"""The scheme `two_stage`: the model is trained first, and its early exits afterwards."""

from dataclasses import dataclass, field

import numpy as np
import torch
from accelerate.utils import broadcast
from torch.utils.data import Subset

from ..models import ExitConfigurationError
from ..models.exit_losses import infer_problem_type
from .frozen_heads import new_features, read_features, train_heads
from .registry import register_scheme
from .trainer import EarlyExitTrainer


_REMEDY = "give a smaller --second_stage_samples or --second_stage_views, or another --exit_head"


class _SomeRows(Subset):
    """A part of a data set that augments its rows by epoch."""

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


@dataclass
class TwoStageArguments:
    """Settings of `--method two_stage`."""

    joint_first_stage: bool = field(
        default=False, metadata={"help": "Train all exits in the first stage, as --method joint, not only the last."}
    )
    second_stage_epochs: int = field(
        default=20, metadata={"help": "Epochs of the early exits over the stored inputs of their heads."}
    )
    second_stage_learning_rate: float = field(
        default=1e-3, metadata={"help": "Learning rate of the early exits (AdamW, cosine to zero)."}
    )
    second_stage_batch_size: int = field(default=32, metadata={"help": "Rows per step of the early exits."})
    second_stage_samples: int = field(
        default=50_000,
        metadata={
            "help": "Largest number of training rows, drawn at random, for the early exits; each needs 4 bytes of "
            "memory, in every process, for every number that a head reads."
        },
    )
    second_stage_views: int = field(
        default=1,
        metadata={
            "help": "How often the training images are read for the early exits, each time augmented differently."
        },
    )

    def __post_init__(self):
        for name in ("second_stage_epochs", "second_stage_batch_size", "second_stage_samples", "second_stage_views"):
            if getattr(self, name) < 1:
                raise ExitConfigurationError(f"--{name} must be at least 1, not {getattr(self, name)}.")
        if not 0 < self.second_stage_learning_rate < float("inf"):
            raise ExitConfigurationError(
                f"--second_stage_learning_rate must be positive, not {self.second_stage_learning_rate}."
            )


@register_scheme("two_stage")
class TwoStageExitTrainer(EarlyExitTrainer):
    """The model is trained as without early exits; then the early exits learn to predict what the last exit predicts.

    The first stage is plain fine-tuning, and the last exit's predictions are those of plain fine-tuning. After its
    last step (with the best checkpoint loaded, if requested) the model runs once more on the training rows, in eval
    mode. The exits before the last learn the last exit's probabilities from their hidden states, while all other
    weights are frozen: a few seconds of training for each thousand rows. Until then their metrics have no meaning, and
    checkpoints contain them untrained; resuming from the last checkpoint trains them again, to the same result.

    With `--joint_first_stage` the first stage is that of `--method joint`, warm start included: the layers learn to
    serve early exits too, metrics and checkpoints before the second stage are those of joint training, and so are the
    last exit's predictions. Otherwise `--exit_loss_weights` has no effect. Label smoothing and class weights are used
    in the first stage.

    References:
        DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference (Xin et al., ACL 2020), section 3.1, trains in
        these two stages. There exits learn the labels; here they learn the last exit's probabilities.
    """

    arguments_class = TwoStageArguments
    trains_shards = False
    paper = "DeeBERT: Dynamic Early Exiting for Accelerating BERT Inference (ACL 2020)"
    citation = "https://arxiv.org/abs/2004.12993"

    def _accept(self, model, args, train_dataset) -> None:
        super()._accept(model, args, train_dataset)
        if model.backbone_frozen:
            raise ExitConfigurationError(
                "--method two_stage trains the model before its early exits, but --freeze_backbone keeps it: use "
                "--method joint."
            )
        if model.num_exits == 1:
            raise ExitConfigurationError(
                "--method two_stage trains early exits, and the model has its last exit only: give --exit_layers."
            )
        if args.warm_start_epochs and not self.scheme_args.joint_first_stage:
            raise ExitConfigurationError(
                "--method two_stage trains the last exit alone: leave out --warm_start_epochs, or give "
                "--joint_first_stage."
            )
        if train_dataset is not None and not hasattr(train_dataset, "__len__"):
            raise ExitConfigurationError(
                "--method two_stage reads training rows a second time, which a stream does not allow: use --method "
                "joint, or leave out --streaming."
            )
        views = self.scheme_args.second_stage_views
        if views > 1 and train_dataset is not None and not hasattr(train_dataset, "set_epoch"):
            raise ExitConfigurationError(
                f"--second_stage_views {views} reads augmented images again, but these rows are the same each time: "
                "leave it out."
            )

    def in_warm_start(self) -> bool:
        """As in `EarlyExitTrainer`: in all of the first stage, unless `--joint_first_stage` is given."""
        return not self.scheme_args.joint_first_stage or super().in_warm_start()

    def train(self, *args, **kwargs):
        """As in `Trainer`; trains both stages."""
        self._check_memory()
        outcome = super().train(*args, **kwargs)
        self.train_early_exits()
        return outcome

    def train_early_exits(self) -> None:
        """Train the second stage, on the model as it is now."""
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

    def _check_memory(self) -> None:
        """Raise an error, before the first stage, if memory is too small for the inputs of the heads."""
        with torch.random.fork_rng(devices=[]):
            [batch] = self.get_test_dataloader(Subset(self.train_dataset, [0]))
        inputs = {name: value for name, value in self._prepare_inputs(batch).items() if name != "labels"}
        read, _ = read_features(self.network.eval(), inputs)
        new_features((self._num_views(), *read.shape[1:]), "float32", _REMEDY)

    def _num_views(self) -> int:
        settings = self.scheme_args
        return min(len(self.train_dataset), settings.second_stage_samples) * settings.second_stage_views

    def _read_training_rows(self, model) -> tuple[np.ndarray, np.ndarray]:
        """Features and the last exit's logits of training rows, in their order, view after view, of all processes."""
        rows, settings = self.train_dataset, self.scheme_args
        if len(rows) > settings.second_stage_samples:
            generator = np.random.default_rng(self.args.seed)
            chosen = np.sort(generator.choice(len(rows), settings.second_stage_samples, replace=False)).tolist()
            rows = rows.select(chosen) if hasattr(rows, "select") else _SomeRows(rows, chosen)
        found, start = None, 0
        model.eval()
        # Not as evaluation rows: Trainer keeps their data loader where its workers persist.
        loader = self.get_test_dataloader(rows)
        for _ in range(settings.second_stage_views):
            for batch in loader:  # accelerate counts the passes, and sets the epoch of the rows
                inputs = {**self._prepare_inputs(batch)}
                labels = inputs.pop("labels")
                # Not known yet where a run is resumed after its last step.
                model.config.problem_type = infer_problem_type(
                    model.config.problem_type, model.config.num_labels, labels
                )
                with self.accelerator.autocast():
                    read = self.accelerator.gather_for_metrics(read_features(model, inputs))
                if found is None:
                    found = [new_features((self._num_views(), *part.shape[1:]), "float32", _REMEDY) for part in read]
                for values, part in zip(found, read, strict=True):
                    values[start : start + len(part)] = part.cpu()
                start += len(read[0])
        return tuple(found)
