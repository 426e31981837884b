"""Optimizer and schedule, with another learning rate for new heads."""

import torch
from torch import nn
from transformers import Trainer

from ..errors import refused
from ..models import ExitConfigurationError
from ..sharding import reshard
from .head_init import standardize_heads


class OptimizationMixin:
    """The part of `EarlyExitTrainer` that creates optimizer and scheduler."""

    def new_heads(self) -> list[int]:
        """The 0-based exits whose heads were new when training began, also if it was interrupted since."""
        if self._new_heads is None:
            network = self.network
            self._new_heads = [k for k in range(network.num_exits) if network.is_new_head(k)]
        return self._new_heads

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`; before the first step new heads are fitted to its examples (`--standardize_heads`)."""
        batches, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        network = self.network
        pretrained = network.newly_initialized is not None
        if self.args.standardize_heads and not self.state.global_step and pretrained and self.new_heads():

            def run():
                training = network.training
                network.eval()
                for batch in map(self._prepare_inputs, batches):
                    network(**{**batch, "labels": None, "early_exit": False})
                network.train(training)
                reshard(network)  # or what is written to whole parameters is lost

            heads = [network.exit_head_modules(k) for k in self.new_heads()]
            standardize_heads(heads, run, lambda sums: self.accelerator.reduce(sums, "sum"))
        return batches, num_items_in_batch

    def head_learning_rate(self, optimizer: torch.optim.Optimizer, rate: float) -> float:
        """Learning rate of new heads: `--head_learning_rate`, or its default, which depends on the others' `rate`."""
        if self.args.head_learning_rate is not None:
            return self.args.head_learning_rate
        pretrained = self.network.newly_initialized is not None
        return rate * (20 if pretrained and "adam" in type(optimizer).__name__.lower() else 1)

    @staticmethod
    def get_optimizer_cls_and_kwargs(args, model=None):
        """As in `Trainer`, where most optimizers take some of `--optim_args` and leave the others unread.

        Raises:
            ExitConfigurationError: names one that is left.
        """
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        taken = {*settings, *(name for group in settings.get("params", ()) for name in group)}
        for pair in filter(None, (args.optim_args or "").replace(" ", "").split(",")):
            name = pair.split("=")[0]
            if not {name, f"{name.rstrip('0123456789')}s"} & taken:  # `betas` holds what is given as beta1, beta2
                raise ExitConfigurationError(
                    f"--optim_args {args.optim_args}: --optim {args.optim.value} has no use for {name!r} there."
                )
        return optimizer_class, settings

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """As in `Trainer`, with newly made heads in parameter groups of their own."""
        if self.optimizer is not None:
            return self.optimizer
        with refused(f"--optim {self.args.optim.value}, --optim_args {self.args.optim_args}"):
            optimizer = super().create_optimizer(model)
        heads = nn.ModuleList([part for k in self.new_heads() for part in self.network.exit_head_modules(k)])
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
