"""Checks of a trainer's arguments before any work."""

import math
import os
import re

from accelerate.utils import DistributedType
from torch import nn
from transformers.utils import strtobool

from ..models import ExitConfigurationError
from .adapters import without_adapter
from .arguments import EarlyExitTrainingArguments


# Arguments of transformers that cannot be combined with the evaluation of every exit or with the precision of trained
# weights: the only possible value, and the reason.
_ONLY = {
    "batch_eval_metrics": (False, "metrics need all rows of an exit"),
    "eval_do_concat_batches": (True, "metrics need all rows of an exit"),
    "prediction_loss_only": (False, "exits are evaluated by their logits"),
    "bf16_full_eval": (False, "it leaves the trained weights in half precision; --bf16 evaluates in it too"),
    "fp16_full_eval": (False, "it leaves the trained weights in half precision; --fp16 evaluates in it too"),
    "use_liger_kernel": (False, "it has no kernels for early-exit models"),
}


def check_supported(args: EarlyExitTrainingArguments, optimizer, scheduler) -> None:
    """Raise an error for arguments of `Trainer` that would have no effect, or a wrong one."""
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


def check_sharding(args: EarlyExitTrainingArguments, model: nn.Module, scheme: str, trains_shards: bool) -> None:
    """Refuse parameters that are divided among processes where the scheme, or the machine, does not allow it.

    Args:
        args: of the training.
        model: that is trained; it may be divided already.
        scheme: its name.
        trains_shards: whether the scheme can.
    """
    fsdp, deepspeed = (strtobool(os.environ.get(f"ACCELERATE_USE_{name}", "0")) for name in ("FSDP", "DEEPSPEED"))
    fsdp = fsdp or bool(args.fsdp)
    divided = any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
    if not trains_shards and (divided or fsdp or deepspeed or args.deepspeed):
        raise ExitConfigurationError(
            f"--method {scheme} works on whole parameters and cannot train sharded ones: leave out --fsdp, "
            "--deepspeed and tensor parallelism, or use --method joint or boosted."
        )
    if not fsdp:
        return
    if without_adapter(model) is not model:
        raise ExitConfigurationError(
            "--fsdp cannot evaluate the exits inside a PEFT model, whose shards are those of the whole: leave it out."
        )
    kind = args.distributed_state and args.distributed_state.distributed_type
    if kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ExitConfigurationError(
            "--fsdp has no effect here: accelerate shards parameters on several accelerators, in processes that "
            "`accelerate launch` or torchrun has started; on the CPU it would train with DDP, and say nothing. Leave "
            "it out."
        )
    given = args.fsdp_plugin_args or {}  # else `accelerate launch` has given them, by its names and defaults
    version = given.get("fsdp_version") or os.environ.get("FSDP_VERSION", "1")
    if int(version) != 2:
        raise ExitConfigurationError(f"--fsdp_config names version {version}: exits are trained under FSDP2 only.")
    saved = given.get("state_dict_type") or os.environ.get("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    if saved != "FULL_STATE_DICT":
        raise ExitConfigurationError(
            f"--fsdp_config names state_dict_type {saved}, under which no model is saved: use FULL_STATE_DICT."
        )


def check_loss_function(args: EarlyExitTrainingArguments, scheme: str, weighs_examples: bool) -> None:
    """Raise an error for settings that have no effect with `compute_loss_func`, which returns one number per exit.

    Args:
        args: arguments of the training.
        scheme: name of the scheme.
        weighs_examples: whether the scheme has weights for the losses of single examples.
    """
    if weighs_examples:
        raise ExitConfigurationError(
            f"compute_loss_func returns one loss per exit, but --method {scheme} needs the loss of each example: use "
            "--method joint, or leave it out (--class_weights sets weights of classes in every scheme)."
        )
    for name in ("label_smoothing_factor", "class_weights"):
        if getattr(args, name):
            raise ExitConfigurationError(f"--{name} has no effect on compute_loss_func: give one of them.")


def check_best_metric(name: str | None, splits, num_exits: int, compute_metrics) -> None:
    """Raise an error for a `--metric_for_best_model` that no evaluation will return.

    Args:
        name: name of the metric.
        splits: names of the evaluation splits, if there are several.
        num_exits: number of exits.
        compute_metrics: the trainer's argument; if it was made by `make_compute_metrics`, its metrics are known.
    """
    if name is None:
        return
    metric = name.removeprefix("eval_")
    for split in splits:
        metric = metric.removeprefix(f"{split}_")
    of_exit = re.fullmatch(r"exit(\d+)_(.+)", metric)
    metric = of_exit[2] if of_exit else metric
    if of_exit and not 1 <= int(of_exit[1]) <= num_exits:
        raise ExitConfigurationError(f"--metric_for_best_model {name}: the model has exits 1 to {num_exits}.")
    if compute_metrics is None and metric != "loss":
        raise ExitConfigurationError(
            f"--metric_for_best_model {name} needs compute_metrics: without it evaluation gives eval_loss and "
            f"eval_exit1_loss to eval_exit{num_exits}_loss."
        )
    known = getattr(compute_metrics, "metric_names", None)
    if known is not None and metric not in ("loss", *known):
        names = ", ".join(f"{kind}_{name}" for kind in ("eval", f"eval_exit1 to {num_exits}") for name in known)
        raise ExitConfigurationError(f"--metric_for_best_model {name} is not one of: eval_loss, {names}.")


def check_warm_start(args: EarlyExitTrainingArguments, rows) -> None:
    """Raise an error for a warm start after which there is no step for the early exits.

    Args:
        args: arguments of the training.
        rows: the training rows; `None`: no training.
    """
    epochs = args.num_train_epochs
    if args.max_steps > 0:
        epochs = 1.0  # for a stream
        if hasattr(rows, "__len__"):
            batches = len(rows) / (args.train_batch_size * args.world_size)
            batches = math.floor(batches) if args.dataloader_drop_last else math.ceil(batches)
            epochs = args.max_steps / max(1, math.ceil(batches / args.gradient_accumulation_steps))
    if rows is not None and args.warm_start_epochs and args.warm_start_epochs >= epochs:
        raise ExitConfigurationError(
            f"--warm_start_epochs {args.warm_start_epochs:g} leaves no step for the early exits: this run trains "
            f"{epochs:.3g} epochs; give less."
        )
