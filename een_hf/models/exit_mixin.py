"""`EarlyExitMixin`: gives a stock encoder its exits."""

import copy
from typing import Any

import torch

from .checkpoint_loading import CheckpointLoadingMixin
from .exits import EXIT_HEADS, pool_hidden_states
from .policies import ExitPolicy
from .registries import ExitConfigurationError
from .staged_forward import StagedForwardMixin
from .stages import Examples, bidirectional_mask


class EarlyExitMixin(CheckpointLoadingMixin, StagedForwardMixin):
    """Exits for a stock encoder; comes before its `PreTrainedModel` in the bases.

    An adapter builds the stock modules under their stock names, and `self.exit_heads` with `build_exit_heads`. It
    defines where the layers are (`backbone_layers`) and what the stock head is (`last_head`, `last_head_modules`).
    `EarlyExitTextMixin` and `EarlyExitImageMixin` define the rest as most encoders need it: how inputs become hidden
    states (`embed`), the class of the other heads (`head_class`), and a `forward` that names the inputs. If layers are
    not called as `layer(hidden, mask)`, the adapter overrides `make_context` and `run_layer`.
    """

    # The loss is a mean per batch: the Trainer must divide by the accumulation steps itself.
    accepts_loss_kwargs = False
    head_class: type[torch.nn.Module]

    backbone_frozen = False
    cuda_graphs = True  # whether `predict` and the pipelines run captured programs on CUDA
    _policy: tuple = (None, None)  # the fields of the config that a policy was read from, and this policy

    # What an adapter supplies

    def embed(self, **inputs) -> Examples:
        """Convert model inputs to examples.

        Args:
            **inputs: as `forward` takes them, each (batch, ...).

        Returns:
            the hidden states before layer 1, the mask, and other tensors of the examples that layers or heads need.

        Raises:
            ExitConfigurationError: an input is missing.
        """
        raise NotImplementedError

    def make_context(self, examples: Examples) -> Any:
        """Compute what layers read in addition to the hidden states, by default the mask.

        Called again whenever examples or columns have been removed. It may depend only on shapes and tensors of
        `examples`, and reads nothing from the device if their padding is known.

        Args:
            examples: the examples before a layer.

        Returns:
            whatever `run_layer` takes; by default the mask of the attention implementation, or `None`.
        """
        return bidirectional_mask(self.config, examples)

    def run_layer(self, depth: int, hidden: torch.Tensor, context: Any, **kwargs) -> torch.Tensor:
        """Run one layer.

        Args:
            depth: 0-based.
            hidden: (batch, length, hidden_size).
            context: what `make_context` returned.
            **kwargs: keywords of `forward` that are no inputs, for example `output_attentions`.

        Returns:
            the hidden states after the layer, (batch, length, hidden_size).
        """
        return self.backbone_layers[depth](hidden, context, **kwargs)

    @property
    def backbone_layers(self) -> torch.nn.ModuleList:
        """The layers of the stock encoder, in order."""
        raise NotImplementedError

    @property
    def last_head_modules(self) -> list[torch.nn.Module]:
        """The stock modules that make up the head of the last exit; its classifier comes last."""
        raise NotImplementedError

    def last_head(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The stock head of the last exit, with its norm and its pooling (`config.last_exit_pooling`).

        Args:
            hidden: (batch, length, hidden_size), after the last layer.
            attention_mask: (batch, length), or `None`: no padding.

        Returns:
            logits (batch, num_labels).
        """
        raise NotImplementedError

    # Exits and their heads

    def build_exit_heads(self) -> torch.nn.ModuleDict:
        """Build the heads of exits 1..K-1.

        Returns:
            each head under the number of its layer, so that another list of layers still finds its heads in a
            checkpoint.
        """
        config = self.config
        if config.last_exit_pooling is None:
            config.last_exit_pooling = config.default_last_exit_pooling(stock_head=False)
        head_class = EXIT_HEADS[config.exit_head] if config.exit_head else self.head_class
        return torch.nn.ModuleDict({str(layer): head_class(config) for layer in config.exit_layers[:-1]})

    @property
    def num_exits(self) -> int:
        """The number of exits, K."""
        return len(self.config.exit_layers)

    def exit_head_modules(self, exit_index: int) -> list[torch.nn.Module]:
        """The modules of an exit's head.

        Args:
            exit_index: 0-based.

        Returns:
            the head of an early exit; of the last exit the stock modules.
        """
        if exit_index == self.num_exits - 1:
            return self.last_head_modules
        return [self.exit_heads[str(self.config.exit_layers[exit_index])]]

    def head_module_names(self) -> list[str]:
        """The modules with the parameters of all heads: `modules_to_save` of a PEFT configuration.

        Returns:
            their names.
        """
        parts = {id(part) for part in self.exit_heads.modules() if part._parameters}
        # Whole modules of the last head: PEFT adds `classifier` itself if it knows the task, but no module inside it.
        parts |= {id(module) for module in self.last_head_modules if any(True for _ in module.parameters())}
        return [name for name, module in self.named_modules() if id(module) in parts]

    def compute_exit(self, exit_index: int, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Evaluate the head of one exit, without the sum of boosted exits.

        Args:
            exit_index: 0-based.
            hidden: (batch, length, hidden_size), after the exit's layer.
            attention_mask: (batch, length), or `None`: no padding.

        Returns:
            logits (batch, num_labels).
        """
        if exit_index == self.num_exits - 1:
            return self.last_head(hidden, attention_mask)
        return self.exit_heads[str(self.config.exit_layers[exit_index])](hidden, attention_mask)

    def pool_last(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """Pool hidden states for the stock head of the last exit (`config.last_exit_pooling`).

        Args:
            hidden: (batch, length, hidden_size).
            attention_mask: (batch, length), or `None`: no padding.

        Returns:
            (batch, hidden_size), for `cls_mean` (batch, 2 * hidden_size).
        """
        config = self.config
        return pool_hidden_states(hidden, attention_mask, config.last_exit_pooling, config.num_prefix_tokens)

    def evaluated_exits(self, policy: ExitPolicy | None) -> list[int]:
        """The exits that must be evaluated under a policy: its `evaluated_early_exits`, and the last.

        All are evaluated if exits are boosted.

        Args:
            policy: an exit policy; `None`: no early exit.

        Returns:
            0-based exits, in order.
        """
        if self.config.exit_aggregation == "boosted":
            return list(range(self.num_exits))
        return [*([] if policy is None else policy.evaluated_early_exits()), self.num_exits - 1]

    def freeze_backbone(self) -> None:
        """Train only heads 1..K-1; the backbone and the last head do not change, not by a bit, and stay in eval mode.

        Raises:
            ExitConfigurationError: the last head is not fine-tuned, there is no other exit, or exits are boosted.
        """
        if self.config.exit_aggregation == "boosted":
            raise ExitConfigurationError(
                "--freeze_backbone keeps the predictions of the last head, but the boosted scheme changes them: use "
                "--method joint."
            )
        if self.is_new_head(self.num_exits - 1):
            raise ExitConfigurationError(
                "--freeze_backbone needs a fine-tuned classifier, but the last head is not from the checkpoint: give "
                "a fine-tuned model as --model_name_or_path, or leave --freeze_backbone out."
            )
        if self.num_exits == 1:
            raise ExitConfigurationError(
                "--freeze_backbone leaves nothing to train, since --exit_layers names only the last layer."
            )
        self.requires_grad_(False)
        self.exit_heads.requires_grad_(True)
        self.backbone_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True):
        """As in torch; a frozen backbone stays in eval mode."""
        super().train(mode)
        if self.backbone_frozen:
            for child in self.children():
                child.train(mode and child is self.exit_heads)
        return self

    def set_exit_policy(self, policy: "ExitPolicy | dict | None") -> None:
        """Set the policy by which examples exit in eval mode, after checking that it fits.

        Args:
            policy: an exit policy or its dict; `None`: no early exit.

        Raises:
            ExitConfigurationError: the policy does not fit the number of exits or the problem.
        """
        if policy is not None:
            values = policy.to_dict() if hasattr(policy, "to_dict") else policy
            if not isinstance(values, dict):
                raise ExitConfigurationError(
                    f"set_exit_policy takes an ExitPolicy, its dict, or None for no early exit, not {policy!r}. "
                    "ExitPolicy.from_results(path, target_cost=0.5) reads the policy of a budget."
                )
            policy = self.checked_policy(values).to_dict()
        self.config.exit_policy = policy

    def checked_policy(self, policy: "ExitPolicy | dict | None") -> ExitPolicy | None:
        """Check that a policy fits the model, whose own is not changed.

        Args:
            policy: an exit policy or its dict; `None`: none.

        Returns:
            the policy, or `None`.

        Raises:
            ExitConfigurationError: it is no policy, or does not fit the number of exits or the problem.
        """
        if policy is not None and not isinstance(policy, ExitPolicy):
            # A model loaded with trust_remote_code has its own class ExitPolicy: both classes know the dict.
            policy = ExitPolicy.from_dict(policy.to_dict() if hasattr(policy, "to_dict") else policy)
        if policy is not None:
            policy.validate(self.num_exits, self.config.problem_type, self.config.num_labels)
        return policy

    def get_exit_policy(self) -> ExitPolicy | None:
        """The policy of the config, after checking that it fits.

        Returns:
            the policy; `None`: no early exit.

        Raises:
            ExitConfigurationError: the policy does not fit the number of exits or the problem.
        """
        config = self.config
        if config.exit_policy is None:
            return None
        said = (config.exit_policy, config.problem_type, config.num_labels, self.num_exits)
        if said != self._policy[0]:
            policy = ExitPolicy.from_dict(config.exit_policy)  # refuses what is no dict
            self._policy = copy.deepcopy(said), self.checked_policy(policy)
        return self._policy[1]
