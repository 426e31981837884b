"""`EarlyExitTrainer`, the base class of all schemes: the loss over exits, the training step and its log."""

import logging
import math
from collections.abc import Callable

import torch
from torch import nn
from transformers import Trainer

from .._deprecated import moved_names, renamed_attribute
from ..errors import NonFiniteLossError
from ..models import EarlyExitClassifierOutput, EarlyExitMixin, ExitConfigurationError
from ..models.exit_losses import infer_problem_type, loss_matrix, reduce_losses
from .adapters import check_adapter, without_adapter
from .arguments import EarlyExitTrainingArguments
from .callbacks import use_early_exit_callbacks
from .checks import check_best_metric, check_loss_function, check_sharding, check_supported, check_warm_start
from .evaluation import EvaluationMixin
from .losses import class_weights, exit_loss_weights
from .optimization import OptimizationMixin
from .publishing import PublishingMixin
from .resuming import ResumingMixin
from .sampling import SamplingMixin


logger = logging.getLogger(__name__)

__getattr__ = moved_names(__name__)


def _read_later(number: torch.Tensor) -> Callable[[], float]:
    """Start to copy a number to the host; the returned function waits for the copy, but not for later work."""
    on_host = number.detach().to("cpu", non_blocking=True)
    if number.device.type == "cpu":
        return on_host.item
    copied = torch.Event(number.device)
    copied.record()

    def read() -> float:
        copied.synchronize()
        return on_host.item()

    return read


class EarlyExitTrainer(ResumingMixin, EvaluationMixin, SamplingMixin, OptimizationMixin, PublishingMixin, Trainer):
    """A `Trainer` for early-exit models, and the base class of schemes (`register_scheme`).

    The loss is `(w * l).mean(0).sum()`, with l[i,k] the loss of sample i at exit k; `--exit_loss_weights` multiplies w
    in every scheme. A scheme overrides `sample_weights` (w[i,k]), `check_model` (which models it can train, and the
    settings that it writes into the config), or any method of `Trainer`.

    Args:
        model: an early-exit model, or a PEFT model around one.
        args: `EarlyExitTrainingArguments`.
        scheme_args: the scheme's own dataclass (`arguments_class`); `None`: its defaults.
        train_dataset: as in `Trainer`.
        eval_dataset: as in `Trainer`.
        model_init: as in `Trainer`: creates the model of each training, for `hyperparameter_search`.
        compute_loss_func: as in `Trainer`, but called once for every exit, with an output that has that exit's
            `logits`.
        compute_metrics: as in `Trainer`, but called once for every exit, with its logits (num_samples, num_labels),
            and with the inputs and the losses of that exit if `--include_for_metrics` requests them.
        optimizers: as in `Trainer`.
        preprocess_logits_for_metrics: as in `Trainer`, but called once for every exit, with its logits and the labels.
        **kwargs: the other arguments of `Trainer`.

    Raises:
        ExitConfigurationError: a model without exits, or settings that do not fit it.
    """

    scheme: str  # its name
    arguments_class: type | None = None
    paper: str = ""  # title, for the model card
    citation: str = ""  # link
    trains_shards: bool = True  # whether parameters may be divided among processes
    method = renamed_attribute("scheme")

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if not hasattr(cls, "scheme"):  # a scheme that is used without being registered
            cls.scheme = f"{cls.__module__}:{cls.__qualname__}"

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
                f"{type(self).__name__} needs EarlyExitTrainingArguments, which extend TrainingArguments, not "
                f"{type(args).__name__}."
            )
        check_supported(args, *optimizers)
        if compute_loss_func is not None:
            weighs_examples = type(self).sample_weights is not EarlyExitTrainer.sample_weights
            check_loss_function(args, self.scheme, weighs_examples)
        args.method = self.scheme
        args.dataloader_pin_memory &= torch.accelerator.is_available()
        args.logging_nan_inf_filter = False  # a loss that is not finite stops the run instead
        self.scheme_args = scheme_args or (self.arguments_class and self.arguments_class())
        self.task_metrics, self.logits_for_metrics = compute_metrics, preprocess_logits_for_metrics
        # As in `Trainer`: the user's function itself divides by the examples of all micro-batches.
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
        check_warm_start(args, train_dataset)
        if type(self).evaluate is EarlyExitTrainer.evaluate:
            splits = self.eval_dataset if isinstance(self.eval_dataset, dict) else ()
            check_best_metric(args.metric_for_best_model, splits, self.network.num_exits, compute_metrics)
        use_early_exit_callbacks(self)

    def _accept(self, model: nn.Module, args: EarlyExitTrainingArguments, train_dataset) -> None:
        """Check that a model can be trained with these arguments, prepare it, and reset the state of an earlier model.

        Raises:
            ExitConfigurationError: a model without exits, or arguments that do not fit it.
        """
        given, model = model, without_adapter(model)
        if not isinstance(model, EarlyExitMixin):
            raise ExitConfigurationError(
                f"{type(self).__name__} needs an early-exit model, not {type(model).__name__}: load the checkpoint "
                "with EarlyExitBertForSequenceClassification or EarlyExitViTForImageClassification."
            )
        check_sharding(args, given, self.scheme, self.trains_shards)
        if given is not model:
            check_adapter(given, model, freezes_backbone=args.freeze_backbone, trains=train_dataset is not None)
        model.cuda_graphs = not args.no_cuda_graphs
        weights = exit_loss_weights(args.exit_loss_weights, model.num_exits)
        self.exit_loss_weights, self._weighs_exits = weights.to(args.device), bool((weights != 1).any())
        self.class_weights = None
        if args.class_weights is not None and train_dataset is not None:
            self.class_weights = class_weights(args.class_weights, model.config.num_labels, train_dataset)
            self.class_weights = self.class_weights.to(args.device)
        if args.freeze_backbone:
            model.freeze_backbone()  # first, since it refuses boosted models, and `check_model` may reset boosting
        self.check_model(model)
        half = {p.dtype for p in model.parameters() if p.requires_grad} & {torch.float16, torch.bfloat16}
        if half and train_dataset is not None:
            logger.warning(
                "The weights are trained in %s, in which small steps are lost: load the model with "
                "dtype=torch.float32, and give --bf16 for speed.",
                " and ".join(sorted(map(str, half))),
            )
        self._new_heads: list[int] | None = None
        self._forget_steps()
        self._operations_of_a_number: int | None = None  # forward and backward, for each number of the input
        self._unchecked = None, float  # losses of this micro-batch, and a function that reads their sum

    @property
    def network(self) -> EarlyExitMixin:
        """The early-exit model, without the wrappers of PEFT, several processes or compilation."""
        # `unwrap_model` would look through all modules of a model that is not wrapped.
        model = self.model
        return model if isinstance(model, EarlyExitMixin) else without_adapter(self.accelerator.unwrap_model(model))

    @property
    def has_adapter(self) -> bool:
        """Whether a PEFT model is trained, of which only the adapter is saved."""
        return not isinstance(self.model, EarlyExitMixin) and hasattr(self.model, "peft_config")

    def _forget_steps(self) -> None:
        """Reset the counters of an earlier training."""
        self._summed_losses, self._num_summed = 0.0, 0  # of each exit, since the last log
        self._place = (0, -1)  # global step, and micro-batch within it

    def _hp_search_setup(self, trial):
        super()._hp_search_setup(trial)
        if self.model_init is not None:  # another model, and perhaps other arguments
            self.args.check()
            self._accept(self.model, self.args, self.train_dataset)
            check_warm_start(self.args, self.train_dataset)
        self.network.config.training_scheme = self.scheme

    # What a scheme may change

    def check_model(self, model: EarlyExitMixin) -> None:
        """Check that the scheme can train a model, and write the scheme's settings into `model.config`.

        By default every exit predicts by itself.

        Args:
            model: an early-exit model.

        Raises:
            ExitConfigurationError: the scheme cannot train it.
        """
        if model.config.exit_aggregation != "none" or model.config.gradient_rescale:
            logger.warning(
                "--method %s does not boost: exit_aggregation and gradient_rescale of the checkpoint are reset.",
                self.scheme,
            )
        model.config.exit_aggregation = "none"
        model.config.gradient_rescale = False

    def sample_weights(self, losses: torch.Tensor, exit_logits: torch.Tensor) -> torch.Tensor | None:
        """The weights w of the losses; by default all 1.

        Args:
            losses: l, (batch, num_exits), without gradient.
            exit_logits: (batch, num_exits, num_labels), without gradient.

        Returns:
            w, (batch, num_exits); `None`: all 1.
        """
        return None

    # Loss

    def losses_of(self, exit_logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The losses l; in training with `--class_weights`.

        Args:
            exit_logits: (batch, num_exits, num_labels).
            labels: as `loss_matrix` takes them.

        Returns:
            l, (batch, num_exits).

        Raises:
            ExitConfigurationError: label smoothing or class weights for a problem without classes.
        """
        args, model = self.args, self.network
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
        """l from `losses_of`; or the result of `compute_loss_func` for each exit, repeated for all examples."""
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
        """As in `Trainer`: the weighted sum over exits of the mean over examples.

        `compute_loss_func`, if given, is called for each exit, with an output whose `logits` are that exit's. As in
        `Trainer`, it divides by `num_items_in_batch` itself.

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
            if self.in_warm_start():
                means[:-1] = math.nan  # not logged
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
        """As in `Trainer`; the loss is checked while the backward pass runs, so that the device does not wait.

        Raises:
            NonFiniteLossError: the loss is not finite.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        (losses, read), self._unchecked = self._unchecked, (None, float)
        if not math.isfinite(read()):
            self._stop_at(losses)
        return loss

    def floating_point_ops(self, inputs):
        """As in `Trainer`, but without counting the parameters again at every step."""
        main_input = inputs.get(self.network.main_input_name)
        if main_input is None or not main_input.numel():
            return super().floating_point_ops(inputs)
        if self._operations_of_a_number is None:
            self._operations_of_a_number = super().floating_point_ops(inputs) // main_input.numel()
        return self._operations_of_a_number * main_input.numel()

    def _stop_at(self, losses: torch.Tensor) -> None:
        """Stop the run because of a loss that is not finite, and name the examples that cause it."""
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
        raise NonFiniteLossError(f"The loss of training step {step} is not finite for {cause}.")

    def in_warm_start(self) -> bool:
        """Whether only the last exit is trained at this step, as in the first `--warm_start_epochs`.

        Returns:
            `True` during the warm start.
        """
        return (self.state.epoch or 0.0) < self.args.warm_start_epochs

    def log(self, logs, start_time=None):
        """As in `Trainer`, and the loss of each exit that is trained (mean over the batches of this process)."""
        if "loss" in logs and self._num_summed:
            means = (self._summed_losses / self._num_summed).tolist()
            self._summed_losses, self._num_summed = 0.0, 0
            trained = {f"exit{k}_loss": mean for k, mean in enumerate(means, 1) if not math.isnan(mean)}
            logs = {**logs, **trained}
        super().log(logs, start_time)

    def report_results(self, results: dict) -> None:
        """Send the final results to the trackers.

        Args:
            results: exits, budgets and policy, as in exit_results.json.
        """
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_exit_results"):
                callback.on_exit_results(self.args, self.state, self.control, results=results, model=self.model)
