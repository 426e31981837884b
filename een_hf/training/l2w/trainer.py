"""The scheme `l2w`: a small network learns how much each sample counts at each exit.

Symbols: l[i,k] is the loss of sample i at exit k and w[i,k] its weight; K the number of exits; theta the parameters
of the network, W the weight prediction network; g the clipped gradient of the weighted loss, and P how far the
optimizer's step moves theta per unit of g.
"""

import math
import os
from contextlib import nullcontext

import torch
from transformers import get_scheduler

from ...errors import CheckpointError
from ...models import ExitConfigurationError
from ..checkpoints import reading_checkpoint
from ..registry import register_scheme
from ..trainer import EarlyExitTrainer
from .arguments import MetaWeightedArguments
from .look_ahead import DIFFERENTIABLE, LookAhead, halve
from .meta_batches import check_meta_batch_size, meta_batches
from .network import WeightPredictionNetwork
from .report import WeightRecord
from .scopes import random_fork, restored
from .token_table import used_tokens


STATE_FILE = "weight_network.pt"
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")


@register_scheme("l2w")
class MetaWeightedExitTrainer(EarlyExitTrainer):
    """A weight network W learns, by looking one step ahead, the weight of each sample at each exit.

    The network trains on sum_k mean_i w[i,k] l[i,k], with w = W(l) taken as a constant. Every `meta_interval`
    optimizer steps W is trained first. By default, as in the paper, the step's first micro-batch is divided into
    halves a and b. W is updated for (train a, meta b), then for (train b, meta a), both at the same theta:

        theta'(w) = the optimizer's step on a = theta - P g(w) + terms without w
        L_meta    = sum_k mean of l[j,k](theta') over the samples j of b charged at exit k (`charged_shares`)
        W         = Adam's step on dL_meta/dW

    No graph of second order is needed: dL_meta/dw[i,k] = -(1/n) <grad l[i,k](theta), u>, with u = c P grad
    L_meta(theta') and c the clipping constant. `--meta_gradient forward`, the default on accelerators, computes this
    by forward-mode differentiation along u, in one forward pass, with autocast where the training has it; it never
    waits for the device. `directional`, the default on the CPU, takes central differences along u, in full float32
    also under mixed precision; `exact` is the double backward, in float32 too. All use the dropout masks of the train
    part's first pass. Parameters, buffers and random states are restored to the last bit. A batch of one sample has no
    halves, and W is not updated. Logged weights are those of the main process' samples.

    A half of one process' micro-batch has 16 samples at a batch size of 32; in the paper's CIFAR runs it has 512. Of
    so few samples a deep exit is charged with one or none, and the meta gradient is noisier. With `--meta_batch_size`
    N, a is the whole micro-batch, b has N training rows in an order of their own, and a look-ahead updates W once.
    The order depends on the seed and the number of the look-ahead. In each pass over the rows all processes together
    use each row at most once; those left over at its end are not used.

    Args:
        model: as in `EarlyExitTrainer`.
        args: as in `EarlyExitTrainer`.
        **kwargs: as in `EarlyExitTrainer`.

    Raises:
        ExitConfigurationError: a problem, optimizer or attention kernel that the look-ahead does not support, or
            training rows from which no meta batch of `meta_batch_size` can be drawn.

    Differences from the paper's code:
        - With `--meta_batch_size` the meta part is not a half of the batch. Without it, both look-aheads start at the
          same theta, and then one step takes the whole batch; there, each half has its own step, and the second
          look-ahead starts after the first step.
        - The look-ahead is the real optimizer's step, clipped and per parameter group, for SGD and AdamW, made linear
          in g: c and the g^2 of AdamW count as constants. There it is SGD's only, and nothing is clipped.
        - A sample of the meta part is removed from the batch at the exit where it is charged, which saves the deeper
          layers: but for the draws of dropout, loss and gradient are those of all samples at all exits.
        - A directional derivative takes the place of the double backward (`exact` keeps it).
        - `--exit_loss_weights` multiplies w in the look-ahead too; soft labels and label smoothing are respected.
          Mixup and CutMix mix row i with row n - 1 - i: the halves of such a batch show the same images.
        - W's generator and the order of equally confident samples are fixed: runs repeat and resume to the bit.

    References:
        Han, Pu, Lai, Wang, Song, Cao, Huang, Deng, Huang: Learning to Weight Samples for Dynamic Early-exiting
        Networks (ECCV 2022).
    """

    arguments_class = MetaWeightedArguments
    trains_shards = False
    paper = "Learning to Weight Samples for Dynamic Early-exiting Networks (ECCV 2022)"
    citation = "https://arxiv.org/abs/2209.08310"

    def __init__(self, model=None, args=None, **kwargs):
        super().__init__(model=model, args=args, **kwargs)
        self._check_settings(own_optimizer=kwargs.get("optimizer_cls_and_kwargs") is not None)
        self._make_weight_network()

    def _make_weight_network(self) -> None:
        self.meta_generator = torch.Generator().manual_seed(self.args.seed)
        self.weight_network = WeightPredictionNetwork(self.network.num_exits, self.scheme_args, self.meta_generator)
        self.weight_network.to(self.args.device)
        self.meta_optimizer = torch.optim.Adam(
            self.weight_network.parameters(),
            lr=self.scheme_args.meta_learning_rate,
            weight_decay=self.scheme_args.meta_weight_decay,
        )
        self.meta_scheduler = None
        self._looked_ahead_at = self._meta_batches = None
        self.look_ahead, self.weight_record = LookAhead(self), WeightRecord()

    def _hp_search_setup(self, trial):
        super()._hp_search_setup(trial)
        if self.model_init is not None:  # for another model
            self._make_weight_network()

    # What cannot be trained

    def check_model(self, model) -> None:
        _check_problem(model.config.problem_type, model.config.num_labels)
        dtypes = {str(parameter.dtype) for parameter in model.parameters() if parameter.requires_grad}
        if not dtypes <= {"torch.float32", "torch.float64"}:
            raise ExitConfigurationError(
                f"--method l2w needs parameters in float32, not {', '.join(sorted(dtypes))}: load the checkpoint with "
                "dtype=torch.float32, and give --bf16 for speed."
            )
        super().check_model(model)

    def _check_settings(self, own_optimizer: bool) -> None:
        check_meta_batch_size(self)
        if self.optimizer is not None:
            _check_optimizer(self.optimizer)
        elif not own_optimizer and self.args.optim not in _OPTIMIZERS:
            raise ExitConfigurationError(_unknown_optimizer(self.args.optim.value))
        # Older versions of transformers know one of the two names only.
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if (getattr(self.args, name, None) or {}).get("use_reentrant"):
                raise ExitConfigurationError(
                    "--method l2w takes gradients that re-entrant checkpointing does not give: leave use_reentrant "
                    f"out of --{name}."
                )
        kernel = self.network.config._attn_implementation
        if "flash" in str(kernel):
            raise ExitConfigurationError(
                f"--method l2w needs float32 or derivatives that {kernel} does not have: use --attn_implementation "
                "sdpa."
            )
        method = self.scheme_args.meta_gradient
        if method in ("exact", "forward") and kernel not in DIFFERENTIABLE:
            raise ExitConfigurationError(
                f"--meta_gradient {method} needs derivatives that {kernel} does not have: use --attn_implementation "
                "eager or sdpa."
            )
        if method == "exact":
            # The newer name first: the older one warns.
            if getattr(self.args, "activation_checkpointing", None) or self.args.gradient_checkpointing:
                raise ExitConfigurationError(
                    "--meta_gradient exact does not work with --gradient_checkpointing: use `auto`."
                )

    def losses_of(self, exit_logits, labels):
        losses = super().losses_of(exit_logits, labels)
        _check_problem(self.network.config.problem_type, self.network.config.num_labels)
        return losses

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        _check_optimizer(optimizer)
        return optimizer

    # The weighted step

    def sample_weights(self, losses, exit_logits):
        with torch.no_grad():
            weights = self.weight_network(losses, exit_logits)
        self.weight_record.add(weights, losses)
        return weights

    def training_step(self, model, inputs, num_items_in_batch=None):
        step = self.state.global_step
        if step != self._looked_ahead_at:
            self._looked_ahead_at = step
            # Without labels the weighted step says what is missing.
            if step % self.scheme_args.meta_interval == 0 and inputs.get("labels") is not None:
                model.train()
                if self.in_warm_start():
                    self.meta_optimizer.zero_grad()
                    self.meta_optimizer.step()  # without a gradient: only the schedule advances
                    self.meta_scheduler.step()
                else:
                    self.meta_step(self._prepare_inputs(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    # Learning W

    def meta_step(self, inputs: dict) -> None:
        """Update W on both orders of the halves of a micro-batch, or on the whole of it and a drawn meta batch.

        Args:
            inputs: model inputs and labels, each (batch, ...).
        """
        parts, device = self._parts(inputs), self.args.device
        whole = self.look_ahead.programs is not None  # graphs read tensors that stay where they are
        tokens = nullcontext() if whole else used_tokens(parts[0], self.network, self.optimizer)
        self.look_ahead.share_offset = torch.rand((), generator=self.meta_generator, dtype=torch.float64).item()
        with random_fork(device), restored(list(self.network.buffers())), tokens:
            for train, meta in parts:
                self.meta_optimizer.zero_grad()
                if len(train["labels"]) and len(meta["labels"]):
                    weights, gradient, meta_loss = self.meta_gradient(train, meta)
                    weights.backward(gradient)
                    self.weight_record.add_meta_loss(meta_loss)
                if self._average_over_processes():
                    self.meta_optimizer.step()
        self.meta_scheduler.step()

    def _parts(self, inputs: dict) -> list[tuple[dict, dict]]:
        """Train and meta part of each update of W: both orders of the halves, or the batch and a meta batch."""
        if self.scheme_args.meta_batch_size is None:
            halves = halve(inputs)
            return [halves, halves[::-1]]
        with random_fork(self.args.device):  # a data loader draws a seed
            if self._meta_batches is None:
                self._meta_batches = meta_batches(self, self.meta_scheduler.last_epoch)
            return [(inputs, self._prepare_inputs(next(self._meta_batches)))]

    def meta_gradient(self, train: dict, meta: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Look one step ahead on the train part, and evaluate this step on the meta part (`LookAhead.gradient`).

        Args:
            train: model inputs and labels of the train part.
            meta: model inputs and labels of the meta part.

        Returns:
            w (samples, num_exits), the gradient of the meta loss with respect to w, and the meta loss.
        """
        return self.look_ahead.gradient(train, meta)

    def _average_over_processes(self) -> bool:
        """Average W's gradient over the processes that have one; `False` if none has."""
        parameters = list(self.weight_network.parameters())
        ready = parameters[0].grad is not None
        if self.accelerator.num_processes == 1:
            return ready
        parts = [(p.grad if ready else torch.zeros_like(p)).flatten() for p in parameters]
        total = self.accelerator.reduce(torch.cat([*parts, parts[0].new_tensor([float(ready)])]), "sum")
        for parameter, part in zip(parameters, total[:-1].split([p.numel() for p in parameters]), strict=True):
            parameter.grad = (part / total[-1]).view_as(parameter)
        return ready or total[-1].item() > 0

    # Schedule and checkpoints

    def create_scheduler(self, num_training_steps, optimizer=None):
        num_updates = math.ceil(num_training_steps / self.scheme_args.meta_interval)
        schedule = self.scheme_args.meta_lr_scheduler_type
        self.meta_scheduler = get_scheduler(schedule, self.meta_optimizer, 0, num_updates)
        self._looked_ahead_at = self._meta_batches = None
        return super().create_scheduler(num_training_steps, optimizer)

    def _meta_parts(self) -> dict:
        return {"network": self.weight_network, "optimizer": self.meta_optimizer, "scheduler": self.meta_scheduler}

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            state = {name: part.state_dict() for name, part in self._meta_parts().items()}
            torch.save({**state, "generator": self.meta_generator.get_state()}, os.path.join(output_dir, STATE_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = os.path.join(checkpoint, STATE_FILE)
        if not os.path.exists(path):
            raise CheckpointError(
                f"--resume_from_checkpoint {checkpoint} has no {STATE_FILE}, the weight network of --method l2w: "
                f"start again from its weights with --model_name_or_path {checkpoint}."
            )
        with reading_checkpoint(checkpoint):
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, part in self._meta_parts().items():
                part.load_state_dict(state[name])
            self.meta_generator.set_state(state["generator"])

    # What W has learned

    def log(self, logs, start_time=None):
        """As in `Trainer`, and statistics of the weights since the last log."""
        if "loss" in logs:
            logs = {**logs, **self.weight_record.logs()}
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As in `Trainer`; writes a heat map of weight against loss to the output folder."""
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self._meta_batches = None  # ends the workers of its data loader
        if self.is_world_process_zero():
            self.weight_record.write(self.args.output_dir)
        return output


def _check_problem(problem_type: str | None, num_labels: int) -> None:
    if problem_type not in (None, "single_label_classification") or num_labels == 1:
        raise ExitConfigurationError(
            f"--method l2w is for single-label classification, not {problem_type or 'regression'}: use --method joint "
            "or boosted. If the labels are soft, set problem_type='single_label_classification' in the config."
        )


def _check_optimizer(optimizer) -> None:
    optimizer = getattr(optimizer, "optimizer", optimizer)
    switches = [name for name in ("amsgrad", "maximize") if any(group.get(name) for group in optimizer.param_groups)]
    if switches or type(optimizer) not in (torch.optim.AdamW, torch.optim.SGD):
        raise ExitConfigurationError(_unknown_optimizer(" with ".join([type(optimizer).__name__, *switches])))


def _unknown_optimizer(found: str) -> str:
    return f"--method l2w looks ahead by AdamW's or SGD's step: --optim must be {', '.join(_OPTIMIZERS)}, not {found}."
