"""What all schemes share: the registry, the loss over exits, metrics of every exit, the heads' learning rate."""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler
from accelerate.utils import broadcast_object_list, gather_object
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from torch import nn
from torch.utils.data import RandomSampler
from transformers import EvalPrediction, Trainer
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler, nested_numpify
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, PredictionOutput

from ..errors import is_full_disk, refused
from ..hub import CARD_NAME, is_run_card
from ..inference import ExitPredictions, predict
from ..models import EarlyExitClassifierOutput, EarlyExitMixin, ExitConfigurationError
from ..models.exit_losses import infer_problem_type, loss_matrix, reduce_losses
from ..models.registries import Registry
from .arguments import CostUnit, EarlyExitTrainingArguments, publishing
from .callbacks import samplers_of, use_early_exit_callbacks
from .checkpoints import (
    PublicTrainerState,
    checkpoint_fault,
    is_whole_checkpoint,
    last_whole_checkpoint,
    reading_checkpoint,
    write_checksums,
)
from .head_init import standardize_heads
from .losses import LABEL_COLUMNS, class_weights, exit_loss_weights


logger = logging.getLogger(__name__)


SCHEME_FILE = "scheme.json"
_SCHEMES: dict[str, type["EarlyExitTrainer"]] = Registry("--method")


def register_scheme(*names: str):
    """Class decorator: make a trainer known to `--method` under `names`; the first is its proper name."""

    def register(trainer_class: type["EarlyExitTrainer"]) -> type["EarlyExitTrainer"]:
        _SCHEMES.check_class(trainer_class, EarlyExitTrainer)
        trainer_class.method = names[0]
        _SCHEMES.update(dict.fromkeys(names, trainer_class))
        return trainer_class

    return register


def scheme_names() -> list[str]:
    """The proper names of all registered schemes, sorted."""
    return sorted({trainer_class.method for trainer_class in _SCHEMES.values()})


def registered_scheme(name: str) -> type["EarlyExitTrainer"] | None:
    """The trainer class of a registered scheme, or `None`: what a file names is looked up and never imported."""
    return _SCHEMES.get(name)


def get_scheme(name: str) -> type["EarlyExitTrainer"]:
    """The trainer class of a registered scheme, or of `package.module:Class`, which is imported: for what users type.

    Raises:
        ExitConfigurationError: an unknown name, a module or class that is not there, or no `EarlyExitTrainer`.
    """
    return _SCHEMES[_SCHEMES.find(name, register_scheme)]


def scheme_arguments() -> list[type]:
    """The arguments dataclasses of all registered schemes, for the parser."""
    classes = dict.fromkeys(trainer_class.arguments_class for trainer_class in _SCHEMES.values())
    return [arguments_class for arguments_class in classes if arguments_class is not None]


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """transformers' sampler; its draws depend on seed and epoch alone, so that a resumed run sees the same batches."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


# Arguments of transformers that evaluating every exit, or keeping the trained weights, does not allow: the one value
# that is taken, and why.
_ONLY = {
    "batch_eval_metrics": (False, "metrics need all rows of an exit"),
    "eval_do_concat_batches": (True, "metrics need all rows of an exit"),
    "prediction_loss_only": (False, "exits are evaluated by their logits"),
    "bf16_full_eval": (False, "it leaves the trained weights in half precision; --bf16 evaluates in it too"),
    "fp16_full_eval": (False, "it leaves the trained weights in half precision; --fp16 evaluates in it too"),
    "use_liger_kernel": (False, "it has no kernels for early-exit models"),
}


def _check_supported(args: EarlyExitTrainingArguments, optimizer, scheduler) -> None:
    """Refuse, by name, arguments of `Trainer` that would have no effect, or a wrong one."""
    for name, (taken, reason) in _ONLY.items():
        if getattr(args, name, taken) != taken:
            raise ExitConfigurationError(f"--{name} must be {taken}: {reason}.")
    unknown = sorted({*args.include_for_metrics} - {"inputs", "loss"})
    if unknown:
        raise ExitConfigurationError(f"--include_for_metrics takes `inputs` and `loss`, not {unknown[0]!r}.")
    if args.label_names not in (None, ["labels"]):
        raise ExitConfigurationError(f"--label_names {args.label_names}: rename that column to `labels`.")
    if optimizer is not None and args.head_learning_rate is not None:
        raise ExitConfigurationError("--head_learning_rate has no effect on an optimizer of your own: leave it out.")
    if scheduler is not None and args.lr_milestones is not None:
        raise ExitConfigurationError("--lr_milestones have no effect on a scheduler of your own: leave them out.")


def _pad(values: list) -> np.ndarray:
    """Stack arrays of several lengths, the shorter filled up with -100, as `Trainer` does."""
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(value) for value in values], True, -100).numpy()


def _read_later(number: torch.Tensor) -> Callable[[], float]:
    """Start to copy a number to the host; what is returned waits for it, but not for work that came after."""
    on_host = number.detach().to("cpu", non_blocking=True)
    if number.device.type == "cpu":
        return on_host.item
    copied = torch.Event(number.device)
    copied.record()

    def read() -> float:
        copied.synchronize()
        return on_host.item()

    return read


class EarlyExitTrainer(Trainer):
    """A `Trainer` for early-exit models; a scheme subclasses it under `@register_scheme("name")`.

    A scheme changes what it needs: `check_model` (what it can train, settings it writes into the config),
    `sample_weights` (w[i,k]), or the Trainer's own hooks. The loss is `(w * l).mean(0).sum()` with l[i,k] the loss of
    sample i at exit k, and `--exit_loss_weights` multiplies w in every scheme.

    Args:
        model: an early-exit model.
        args: `EarlyExitTrainingArguments`.
        scheme_args: the scheme's own dataclass (`arguments_class`), its defaults where left out.
        compute_metrics: as in `Trainer`: called with (num_samples, num_labels) logits, once for every exit, with the
            inputs and the losses of that exit where `--include_for_metrics` asks for them.
        preprocess_logits_for_metrics: as in `Trainer`: called with such logits and the labels, once for every exit.
        compute_loss_func: as in `Trainer`: called once for every exit, with an output that has that exit's `logits`.
        model_init: as in `Trainer`: makes the model of each training, for `hyperparameter_search`.
        **kwargs: as in `Trainer`, whose other arguments are listed there.

    Raises:
        ExitConfigurationError: a model without exits, or settings that do not fit it.
    """

    method: str
    arguments_class: type | None = None
    citation: str = ""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "method"):  # a scheme that is used without being registered
            cls.method = f"{cls.__module__}:{cls.__qualname__}"

    def __init__(
        self,
        model=None,
        args=None,
        *,
        scheme_args=None,
        train_dataset=None,
        eval_dataset=None,
        model_init=None,
        compute_loss_func=None,
        compute_metrics=None,
        optimizers=(None, None),
        preprocess_logits_for_metrics=None,
        **kwargs,
    ):
        args = args or EarlyExitTrainingArguments()
        if not isinstance(args, EarlyExitTrainingArguments):
            raise ExitConfigurationError(
                f"{type(self).__name__} needs EarlyExitTrainingArguments, which take all that TrainingArguments take, "
                f"not {type(args).__name__}."
            )
        _check_supported(args, *optimizers)
        if compute_loss_func is not None:
            self._check_loss_function(args)
        args.method = self.method
        args.dataloader_pin_memory &= torch.accelerator.is_available()
        args.logging_nan_inf_filter = False  # a loss that is not finite stops the run instead
        self.scheme_args = scheme_args or (self.arguments_class and self.arguments_class())
        self.task_metrics, self.logits_for_metrics = compute_metrics, preprocess_logits_for_metrics
        # As in `Trainer`: a function of the user's divides by the examples of all micro-batches itself.
        self.loss_is_scaled_for_ga = compute_loss_func is not None
        if model is not None or model_init is None:
            self._accept(model, args, train_dataset)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            model_init=model_init,
            compute_loss_func=compute_loss_func,
            compute_metrics=self._metrics_of_exits,
            optimizers=optimizers,
            **kwargs,
        )
        if model is None:
            self._accept(self.model, args, train_dataset)
        self._check_warm_start()
        self._check_best_metric()
        use_early_exit_callbacks(self)

    def _accept(self, model: EarlyExitMixin, args: EarlyExitTrainingArguments, train_dataset) -> None:
        """Check that a model can be trained as the arguments say, prepare it, and forget what belongs to another.

        Raises:
            ExitConfigurationError: a model without exits, or arguments that do not fit it.
        """
        if not isinstance(model, EarlyExitMixin):
            raise ExitConfigurationError(
                f"{type(self).__name__} needs an early-exit model, not {type(model).__name__}: load the checkpoint "
                "with EarlyExitBertForSequenceClassification or EarlyExitViTForImageClassification."
            )
        model.cuda_graphs = not args.no_cuda_graphs
        weights = exit_loss_weights(args.exit_loss_weights, model.num_exits)
        self.exit_loss_weights, self._weighs_exits = weights.to(args.device), bool((weights != 1).any())
        self.class_weights = None
        if args.class_weights is not None and train_dataset is not None:
            self.class_weights = class_weights(args.class_weights, model.config.num_labels, train_dataset)
            self.class_weights = self.class_weights.to(args.device)
        if args.freeze_backbone:
            model.freeze_backbone()  # first: it refuses a boosted model, which a scheme may make a plain one
        self.check_model(model)
        half = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.float16, torch.bfloat16}
        if half and train_dataset is not None:
            logger.warning(
                "The weights are trained in %s, in which small steps are lost: load the model with "
                "dtype=torch.float32, and give --bf16 for speed.",
                " and ".join(sorted(map(str, half))),
            )
        self._new_heads: list[int] | None = None
        self._summed_losses, self._num_summed = 0.0, 0  # of each exit, since the last log
        self._place = (0, -1)  # global step, and micro-batch within it
        self._operations_of_a_number: int | None = None  # that the model takes in, forward and backward
        self._unchecked = None, float  # losses of the present micro-batch, and what reads the number made of them

    def _hp_search_setup(self, trial):
        super()._hp_search_setup(trial)
        if self.model_init is not None:  # another model, and perhaps other arguments
            self.args.check()
            self._accept(self.model, self.args, self.train_dataset)
            self._check_warm_start()
        self.accelerator.unwrap_model(self.model).config.training_scheme = self.method

    def _check_loss_function(self, args: EarlyExitTrainingArguments) -> None:
        """Refuse what a loss of the user's own, one number per exit, leaves without effect."""
        if type(self).sample_weights is not EarlyExitTrainer.sample_weights:
            raise ExitConfigurationError(
                f"compute_loss_func gives one loss per exit, but --method {self.method} weighs the loss of each "
                "example: use --method joint, or leave it out (--class_weights weighs classes in every scheme)."
            )
        for name in ("label_smoothing_factor", "class_weights"):
            if getattr(args, name):
                raise ExitConfigurationError(f"--{name} has no effect on compute_loss_func: give one of them.")

    def _check_best_metric(self) -> None:
        """Refuse a `--metric_for_best_model` that no evaluation will give."""
        name = self.args.metric_for_best_model
        if name is None or type(self).evaluate is not EarlyExitTrainer.evaluate:
            return
        metric = name.removeprefix("eval_")
        for split in self.eval_dataset if isinstance(self.eval_dataset, dict) else ():
            metric = metric.removeprefix(f"{split}_")
        of_exit = re.fullmatch(r"exit(\d+)_(.+)", metric)
        num_exits = self.accelerator.unwrap_model(self.model).num_exits
        if of_exit and not 1 <= int(of_exit[1]) <= num_exits:
            raise ExitConfigurationError(f"--metric_for_best_model {name}: the model has exits 1 to {num_exits}.")
        if self.task_metrics is None and (of_exit[2] if of_exit else metric) != "loss":
            raise ExitConfigurationError(
                f"--metric_for_best_model {name} needs compute_metrics: without it evaluation gives eval_loss and "
                f"eval_exit1_loss to eval_exit{num_exits}_loss."
            )
        known = getattr(self.task_metrics, "metric_names", None)
        if known is not None and (of_exit[2] if of_exit else metric) not in ("loss", *known):
            names = ", ".join(f"{kind}_{name}" for kind in ("eval", f"eval_exit1 to {num_exits}") for name in known)
            raise ExitConfigurationError(f"--metric_for_best_model {name} is not one of: eval_loss, {names}.")

    # What a scheme may change

    def check_model(self, model: EarlyExitMixin) -> None:
        """Refuse what the scheme cannot train, and write its settings into `model.config`.

        Unless a scheme says otherwise, every exit predicts by itself.
        """
        if model.config.exit_aggregation != "none" or model.config.gradient_rescale:
            logger.warning(
                "--method %s resets exit_aggregation and gradient_rescale of the checkpoint: no boosting.", self.method
            )
        model.config.exit_aggregation = "none"
        model.config.gradient_rescale = False

    def sample_weights(self, losses: torch.Tensor, exit_logits: torch.Tensor) -> torch.Tensor | None:
        """w, (batch, num_exits), for these losses (batch, num_exits) and logits; `None` weighs all by 1."""
        return None

    def _check_warm_start(self) -> None:
        """Refuse a warm start that leaves the early exits no step."""
        args, rows = self.args, self.train_dataset
        epochs = args.num_train_epochs
        if args.max_steps > 0:
            epochs = 1.0  # of a stream
            if hasattr(rows, "__len__"):
                batches = len(rows) / (args.train_batch_size * args.world_size)
                batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
                epochs = args.max_steps / max(1, math.ceil(batches / args.gradient_accumulation_steps))
        if rows is not None and args.warm_start_epochs and args.warm_start_epochs >= epochs:
            raise ExitConfigurationError(
                f"--warm_start_epochs {args.warm_start_epochs:g} leaves the early exits no step: this run trains "
                f"{epochs:.3g} epochs; give less."
            )

    # Loss

    def losses_of(self, exit_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """l, (batch, num_exits), from logits (batch, num_exits, num_labels); in training under `--class_weights`.

        Raises:
            ExitConfigurationError: label smoothing or class weights where there are no classes.
        """
        # To unwrap a model that is not wrapped looks through all of its modules.
        model = self.model if isinstance(self.model, EarlyExitMixin) else self.accelerator.unwrap_model(self.model)
        args = self.args
        config, weights = model.config, self.class_weights if model.training else None
        config.problem_type = infer_problem_type(config.problem_type, config.num_labels, labels)
        if config.problem_type != "single_label_classification":
            for name in ("label_smoothing_factor", "class_weights"):
                if getattr(args, name):
                    raise ExitConfigurationError(
                        f"--{name} is for single-label classification, not {config.problem_type}: leave it out."
                    )
        return loss_matrix(exit_logits, labels, config.problem_type, args.label_smoothing_factor, weights)

    def _all_losses(self, exit_logits: torch.Tensor, labels: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """l as `losses_of` gives it, or the number that `compute_loss_func` gives of each exit, for all examples."""
        if self.compute_loss_func is None:
            return self.losses_of(exit_logits, labels)
        outputs = [EarlyExitClassifierOutput(logits=logits) for logits in exit_logits.unbind(1)]
        losses = [self.compute_loss_func(output, labels, num_items_in_batch=num_items_in_batch) for output in outputs]
        losses = torch.stack(losses)
        if losses.dim() != 1:
            raise ExitConfigurationError(
                f"compute_loss_func must give one number per call, not a tensor of shape {tuple(losses.shape[1:])}."
            )
        return losses.expand(len(labels), -1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The weighted sum over exits of the mean over examples.

        `compute_loss_func`, where given, is called for each exit, with an output whose `logits` are that exit's, and
        like `Trainer`'s it divides by `num_items_in_batch` itself.

        Raises:
            ExitConfigurationError: a batch without labels.
        """
        if inputs.get("labels") is None:
            raise ExitConfigurationError(f"A training batch needs `labels`; this one has: {', '.join(inputs)}.")
        features = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**{**features, "early_exit": False})
        losses = self._all_losses(outputs.exit_logits, inputs["labels"], num_items_in_batch)
        weights, num_micro_batches = self.exit_loss_weights.to(losses) if self._weighs_exits else None, 1
        if self.compute_loss_func is not None and num_items_in_batch is not None:
            num_micro_batches = getattr(self, "current_gradient_accumulation_steps", 1)  # of which this is a part
            if self.args.average_tokens_across_devices:
                losses = losses * self.accelerator.num_processes  # the gradient will be their mean
        if model.training:
            means = losses.detach().mean(0)
            means = means if num_micro_batches == 1 else means * num_micro_batches
            self._summed_losses = self._summed_losses + means
            self._num_summed += 1
        if model.training and self.in_warm_start():
            weights = self.exit_loss_weights.to(losses)
            weights = torch.cat([weights[:-1] * 0, weights[-1:]])  # all exits stay in the graph, as DDP needs
        elif model.training:
            sample_weights = self.sample_weights(losses.detach(), outputs.exit_logits.detach())
            if sample_weights is not None:
                weights = sample_weights if weights is None else weights * sample_weights
        loss = reduce_losses(losses, weights)
        if model.training:
            step, number = self._place
            self._place = self.state.global_step, number + 1 if step == self.state.global_step else 0
            self._unchecked = losses.detach(), _read_later(loss)
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As in `Trainer`; the loss is looked at when the backward pass is under way, so that no device waits for it.

        Raises:
            ExitConfigurationError: it is not finite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        (losses, read), self._unchecked = self._unchecked, (None, float)
        if not math.isfinite(read()):
            self._stop_at(losses)
        return loss

    def floating_point_ops(self, inputs):
        """As in `Trainer`, which counts the parameters at every step."""
        main_input = inputs.get(getattr(self.model, "main_input_name", None))
        if main_input is None or not main_input.numel():
            return super().floating_point_ops(inputs)
        if self._operations_of_a_number is None:
            self._operations_of_a_number = super().floating_point_ops(inputs) // main_input.numel()
        return self._operations_of_a_number * main_input.numel()

    def _stop_at(self, losses: torch.Tensor) -> None:
        """Stop the run before a loss that is not finite spoils the weights; name the examples that it comes from."""
        places = (~losses.isfinite().all(1)).nonzero().squeeze(1).tolist()
        if len(places) in (0, len(losses)):
            cause = "all examples of a batch: training has diverged, lower --learning_rate"
        else:
            rows = self._rows_of_batch()
            where = "the batch" if rows is None else "the training data"
            named = ", ".join(str(place if rows is None else rows[place]) for place in places)
            cause = f"rows {named} (counted from 0) of {where}: look for NaN or infinity in their inputs and labels, "
            cause += "or lower --learning_rate"
        step = self.state.global_step + 1
        raise ExitConfigurationError(f"The loss of training step {step} is not finite for {cause}.")

    def _rows_of_batch(self) -> list[int] | None:
        """The row of each example of the present micro-batch; `None` for a stream, or an order that was not seeded."""
        loader = self.callback_handler.train_dataloader
        if loader is None or not hasattr(self.train_dataset, "__len__"):
            return None
        samplers = list(samplers_of(loader))
        if isinstance(samplers[-1], RandomSampler) and not isinstance(samplers[-1], SeedableRandomSampler):
            return None
        number = round(self.state.epoch % 1 * len(loader)) + self._place[1]
        return next(islice(samplers[0], number, None), None)

    def in_warm_start(self) -> bool:
        """Whether the last exit alone is trained, for the first `--warm_start_epochs`."""
        return (self.state.epoch or 0.0) < self.args.warm_start_epochs

    def log(self, logs, start_time=None):
        """As in `Trainer`; beside the training loss stands each exit's own, the mean over this process' batches."""
        if "loss" in logs and self._num_summed:
            means = (self._summed_losses / self._num_summed).tolist()
            self._summed_losses, self._num_summed = 0.0, 0
            logs = {**logs, **{f"exit{k}_loss": mean for k, mean in enumerate(means, 1)}}
        super().log(logs, start_time)

    def report_results(self, results: dict) -> None:
        """Show trackers the final table of exits, budgets and policy, as in exit_results.json."""
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_exit_results"):
                callback.on_exit_results(self.args, self.state, self.control, results=results, model=self.model)

    # Evaluation

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As in `Trainer`; the predictions are the logits of all exits, (batch, num_exits, num_labels)."""
        inputs = {**inputs, "early_exit": False}
        only_exit_logits = ["logits", "exit_index", "hidden_states", "attentions"]
        return super().prediction_step(model, inputs, prediction_loss_only, [*only_exit_logits, *(ignore_keys or [])])

    def predict_exits(self, dataset, metric_key_prefix: str = "test") -> PredictionOutput:
        """Evaluate every exit on every row: predictions (num_rows, num_exits, num_labels), labels, metrics."""
        return super().predict(dataset, metric_key_prefix=metric_key_prefix)

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Answer as the model will: with its exit policy where it has one, else from the last exit.

        The rows run through `een_hf.inference.predict`, spread over the processes; each is read once.

        Args:
            test_dataset: a map-style data set, or a stream.
            ignore_keys: without effect, as nothing but logits is predicted.
            metric_key_prefix: of the names of the metrics.

        Returns:
            predictions (num_rows, num_labels); labels, where the rows have them; metrics, with `exit_fractions` where
            the model has an exit policy.
        """
        answers, kept = self._answer_rows(test_dataset)
        logits, labels, metrics = answers.logits.numpy(), None, {}
        label_column = next((name for name in LABEL_COLUMNS if kept and name in kept[0]), None)
        if label_column is not None:
            labels = np.array([np.asarray(row[label_column]) for row in kept])
            if self.task_metrics is not None:
                targets, wanted, losses, inputs = torch.from_numpy(labels), self.args.include_for_metrics, None, None
                if "loss" in wanted:
                    losses = self._all_losses(answers.logits.unsqueeze(1), targets, (targets != -100).sum()).squeeze(1)
                if "inputs" in wanted:
                    inputs = _pad([row[self.model.main_input_name] for row in kept])
                metrics = self._metrics_of(answers.logits, targets, losses, inputs)
        config = self.accelerator.unwrap_model(self.model).config
        if config.exit_policy is not None:
            counts = np.bincount(answers.exit_index, minlength=len(config.exit_layers))
            metrics = {**metrics, "exit_fractions": (counts / max(len(logits), 1)).tolist()}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(predictions=logits, label_ids=labels, metrics=metrics)

    def predict_dynamic(self, dataset) -> ExitPredictions:
        """Each row's answer and exit by `een_hf.inference.predict`, spread over the processes, in input order.

        Under the precision of the evaluation (`--bf16`, `--fp16`), as the thresholds were calibrated.
        """
        return self._answer_rows(dataset)[0]

    def _answer_rows(self, dataset) -> tuple[ExitPredictions, list[dict]]:
        """Answers of all rows in input order, and of each row the columns that metrics read."""
        if hasattr(dataset, "set_format"):  # a datasets.Dataset
            dataset = self._remove_unused_columns(dataset, "test")
        accelerator = self.accelerator
        first, step = accelerator.process_index, accelerator.num_processes
        sized = hasattr(dataset, "__len__")
        ids = range(first, len(dataset), step) if sized else None
        rows = ((row, dataset[row]) for row in ids) if sized else islice(enumerate(dataset), first, None, step)
        names = [*LABEL_COLUMNS, *([self.model.main_input_name] if "inputs" in self.args.include_for_metrics else [])]
        kept = []

        def own_rows():
            for index, row in rows:
                kept.append((index, {name: row[name] for name in names if name in row}))
                yield row

        with accelerator.autocast():
            own = predict(
                accelerator.unwrap_model(self.model).to(self.args.device),
                own_rows(),
                self.args.per_device_eval_batch_size,
                collator=self._get_collator_with_removed_columns(self.data_collator, "test"),
                window=max(len(ids), 1) if sized else None,
                progress=not self.args.disable_tqdm and accelerator.is_main_process,
                total=len(ids) if sized else None,
            )
        kept, *answers = zip(*gather_object([(kept, *vars(own).values())]), strict=True)
        kept = [pair for part in kept for pair in part]
        order = torch.tensor([index for index, _ in kept], dtype=torch.int64).argsort()
        answers = (None if parts[0] is None else torch.cat(parts)[order] for parts in answers)
        return ExitPredictions(*answers), [kept[place][1] for place in order.tolist()]

    def calibrate(self, calibration_data, cost: str = "operations", latency_batch_size: int = 1, **settings):
        """Choose an exit policy on rows that nothing else has chosen; it is returned, not set.

        Args:
            calibration_data: rows as `evaluate` takes them.
            cost: `operations`, or `latency`, measured on the model's device.
            latency_batch_size: examples that run together where latency is measured.
            **settings: of `een_hf.calibrate`, for example `target_cost=0.5`, or `max_risk=0.02,
                risk="consistency"`.

        Returns:
            a `CalibrationReport`; set its policy with `model.set_exit_policy(report.policy)`.
        """
        from ..calibration import calibrate
        from ..evaluation import cost_inputs, relative_costs, relative_latencies

        unit, size = CostUnit(cost), cost_inputs(calibration_data)
        prediction = self.predict_exits(calibration_data, "calibration")
        network = self.accelerator.unwrap_model(self.model)
        settings.setdefault("problem_type", network.config.problem_type or "single_label_classification")
        if unit == CostUnit.OPERATIONS:
            costs = relative_costs(network, **size)
        else:
            decides = {name: settings[name] for name in ("criterion", "params") if name in settings}
            with self.accelerator.autocast():
                measured = [relative_latencies(network, batch_size=latency_batch_size, **decides, **size)]
            costs, _ = broadcast_object_list(measured)[0]  # all processes choose the same policy
        return calibrate(prediction.predictions, prediction.label_ids, costs, **settings)

    def _metrics_of_exits(self, prediction: EvalPrediction) -> dict[str, float]:
        """`exit{k}_loss` and `exit{k}_<metric>` for every exit, `<metric>` for the last."""
        exit_logits, labels = torch.as_tensor(prediction.predictions), torch.as_tensor(prediction.label_ids)
        with torch.no_grad():
            losses = self._all_losses(exit_logits, labels, num_items_in_batch=(labels != -100).sum())
        metrics, last = {}, {}
        for index, own in enumerate(losses.unbind(1)):
            metrics[f"exit{index + 1}_loss"] = own.mean().item()
            if self.task_metrics is not None:
                last = self._metrics_of(exit_logits[:, index], labels, own, prediction.inputs)
                metrics.update({f"exit{index + 1}_{name}": value for name, value in last.items()})
        return {**metrics, **last}

    def _metrics_of(
        self, logits: torch.Tensor, labels: torch.Tensor, losses: torch.Tensor, inputs
    ) -> dict[str, float]:
        """What `compute_metrics` says of one exit's logits, (num_rows, num_labels), given what it asked for."""
        if self.logits_for_metrics is not None:
            logits = self.logits_for_metrics(logits, labels)
        given = {"inputs": inputs} if "inputs" in self.args.include_for_metrics else {}
        if "loss" in self.args.include_for_metrics:
            given["losses"] = losses.numpy()
        return self.task_metrics(EvalPrediction(nested_numpify(logits), labels.numpy(), **given))

    # Batches

    def _get_train_sampler(self, train_dataset=None):
        """As in `Trainer`; `group_by_length` batches hold the same rows for any number of processes.

        Raises:
            ExitConfigurationError: rows are to be ordered by their lengths, which only reading them all would give.
        """
        rows, strategy = self.train_dataset, self.args.train_sampling_strategy
        if strategy not in ("group_by_length", "batch_rebalance") or not hasattr(rows, "__len__"):
            return super()._get_train_sampler(train_dataset)
        columns = getattr(rows, "column_names", None)
        if columns is None and isinstance(rows, (list, tuple)) and rows:
            columns = rows[0]
        known = [name for name in (self.args.length_column_name, "input_ids") if name in (columns or ())]
        if not known:
            raise ExitConfigurationError(
                f"--train_sampling_strategy {strategy} needs the length of each row before training: a column "
                f"`input_ids` or `{self.args.length_column_name}` (--length_column_name) of a datasets.Dataset, or a "
                "list. Other rows are not read for it: use `random`."
            )
        if strategy == "batch_rebalance":
            return super()._get_train_sampler(train_dataset)
        values = rows[known[0]] if hasattr(rows, "column_names") else [row[known[0]] for row in rows]
        lengths = list(values) if known[0] == self.args.length_column_name else [len(tokens) for tokens in values]
        step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochLengthGroupedSampler(step, lengths, seed)

    def _get_dataloader(self, *args, is_training=False, **kwargs):
        """As in `Trainer`, but `--dataloader_drop_last` is for training: evaluation reads every row."""
        wanted = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = wanted and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = wanted

    def _get_eval_sampler(self, eval_dataset):
        """Rows in their order: predictions are matched with them by position."""
        ordered = self.args.world_size <= 1 and hasattr(eval_dataset, "__len__")
        return torch.utils.data.SequentialSampler(eval_dataset) if ordered else None

    # Optimizer

    def new_heads(self) -> list[int]:
        """The 0-based exits whose heads were newly made when training began, be it before an interruption."""
        if self._new_heads is None:
            network = self.accelerator.unwrap_model(self.model)
            self._new_heads = [k for k in range(network.num_exits) if network.is_new_head(k)]
        return self._new_heads

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`; before the first step new heads are fitted to its examples (`--standardize_heads`)."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        network = self.accelerator.unwrap_model(self.model)
        if self.args.standardize_heads and not self.state.global_step and network.newly_initialized is not None:

            def run():
                training = network.training
                network.eval()
                for batch in map(self._prepare_inputs, batches):
                    network(**{**batch, "labels": None, "early_exit": False})
                network.train(training)

            heads = [network.exit_head_modules(k) for k in self.new_heads()]
            standardize_heads(heads, run, lambda sums: self.accelerator.reduce(sums, "sum"))
        return batches, num_items_in_batch

    def head_learning_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> float:
        """Learning rate of newly made heads: `--head_learning_rate`, or its default where the others have `rate`."""
        if self.args.head_learning_rate is not None:
            return self.args.head_learning_rate
        pretrained = self.accelerator.unwrap_model(self.model).newly_initialized is not None
        return rate * (20 if pretrained and "adam" in type(optimizer).__name__.lower() else 1)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As in `Trainer`, with newly made heads in parameter groups of their own."""
        if self.optimizer is not None:
            return self.optimizer
        with refused(f"--optim {self.args.optim.value}, --optim_args {self.args.optim_args}"):
            optimizer = super().create_optimizer(model)
        network = self.accelerator.unwrap_model(self.model if model is None else model)
        heads = nn.ModuleList([part for k in self.new_heads() for part in network.exit_head_modules(k)])
        new = {id(parameter) for parameter in heads.parameters()}
        groups = []
        for group in optimizer.param_groups:
            for is_new, rate in ((False, group["lr"]), (True, self.head_learning_rate(optimizer, group["lr"]))):
                params = [parameter for parameter in group["params"] if (id(parameter) in new) == is_new]
                if params:
                    groups.append({**group, "params": params, "lr": rate})
        optimizer.param_groups = groups
        return optimizer

    def create_scheduler(self, num_training_steps, optimizer=None):
        """As in `Trainer`, or a drop to a tenth at each of `--lr_milestones`."""
        if self.lr_scheduler is None and self.args.lr_milestones:
            drops = [round(share * num_training_steps) for share in self.args.lr_milestones]
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda step: 0.1 ** sum(step >= drop for drop in drops)
            )
            self._created_lr_scheduler = True
        kind, settings = self.args.lr_scheduler_type, self.args.lr_scheduler_kwargs
        with refused(f"--lr_scheduler_type {kind.value}, --lr_scheduler_kwargs {settings}"):
            return super().create_scheduler(num_training_steps, optimizer)

    # Checkpoints

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As in `Trainer`; `True` resumes from the last whole checkpoint.

        Raises:
            ExitConfigurationError: the checkpoint to resume from is half-written, or belongs to another scheme.
        """
        checkpoint = resume_from_checkpoint
        if checkpoint is True:
            checkpoint = last_whole_checkpoint(self.args.output_dir)
            if checkpoint is None:
                raise ExitConfigurationError(f"--resume_from_checkpoint: no whole one in {self.args.output_dir}.")
        elif checkpoint and (fault := checkpoint_fault(checkpoint)):
            raise ExitConfigurationError(
                f"--resume_from_checkpoint {checkpoint} is not there or not whole ({fault}): leave the flag out to go "
                "on from the last whole one."
            )
        self._resumed_from = checkpoint
        if checkpoint:
            self._read_scheme(checkpoint)
        return super().train(resume_from_checkpoint=checkpoint, **kwargs)

    def _read_scheme(self, checkpoint: str) -> None:
        """Refuse a checkpoint of another scheme; go on with its division into new and old heads."""
        path = os.path.join(checkpoint, SCHEME_FILE)
        if not os.path.exists(path):
            if not os.path.exists(os.path.join(checkpoint, OPTIMIZER_NAME)):
                raise ExitConfigurationError(
                    f"--resume_from_checkpoint {checkpoint} holds no optimizer (--save_only_model), so that no run "
                    f"can go on from it: start from its weights, --model_name_or_path {checkpoint}, in another "
                    "--output_dir."
                )
            return
        with reading_checkpoint(checkpoint), open(path) as file:
            written = json.load(file)
            found, self._new_heads = written["method"], written.get("new_heads")
            if not isinstance(found, str) or not all(type(k) is int for k in self._new_heads or ()):
                raise ValueError(f"{SCHEME_FILE} names no scheme")
            sums, self._num_summed = written.get("unlogged_losses") or (0.0, 0)
            self._summed_losses = torch.tensor(sums, device=self.args.device)
        if found != self.method:
            raise ExitConfigurationError(
                f"--resume_from_checkpoint {checkpoint} was trained with --method {found}, not {self.method}: go on "
                f"with --method {found}, or start anew from its weights with --model_name_or_path {checkpoint}."
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
            shutil.rmtree(folder)  # of an interrupted run, or one that is being repeated: never mix the two
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
            raise ExitConfigurationError(
                f"{folder} could not be written ({error}): make room below --output_dir, then give the same command "
                f"again. It goes on from {last or 'the start'}."
            ) from error

    def _save_rng_state(self, output_dir):
        super()._save_rng_state(output_dir)
        # What makes a checkpoint whole is written next, by one process: all the others must be through.
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_checksums(output_dir)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            settings = asdict(self.scheme_args) if self.scheme_args else {}
            settings |= {"method": self.method, "new_heads": self.new_heads()}
            if self._num_summed:
                settings["unlogged_losses"] = [self._summed_losses.tolist(), self._num_summed]
            with open(os.path.join(output_dir, SCHEME_FILE), "w") as file:
                json.dump(settings, file, indent=2)

    # Hub

    def create_model_card(self, language=None, license=None, tags=None, **kwargs) -> None:
        """As in `Trainer`, but the card of an evaluated run stays, with these fields added to its header."""
        path = os.path.join(self.args.output_dir, CARD_NAME)
        if not is_run_card(path):
            super().create_model_card(language=language, license=license, tags=tags, **kwargs)
        elif self.is_world_process_zero():
            card = ModelCard.load(path)
            for name, value in (("language", language), ("license", license)):
                if value is not None:
                    card.data[name] = value
            tags = [tags] if isinstance(tags, str) else tags or []
            card.data.tags = list(dict.fromkeys([*card.data.tags, *tags]))
            card.save(path)

    def _save(self, output_dir=None, state_dict=None):
        with publishing():
            super()._save(output_dir, state_dict)

    def _push_from_checkpoint(self, checkpoint_folder):
        # Trainer takes config and weights out of the checkpoint; the config names these files.
        if self.is_world_process_zero():
            custom_object_save(self.accelerator.unwrap_model(self.model), self.args.output_dir)
        with publishing():
            super()._push_from_checkpoint(checkpoint_folder)
