"""The mixin that gives a stock encoder its exits, and the one staged loop that trains and runs them."""

import copy
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import ModelOutput, logging

from .configuration_een import ExitConfigurationError, is_classifier
from .exit_losses import infer_problem_type, loss_matrix, reduce_losses
from .exits import add_boosted, pool_hidden_states, scale_gradient
from .policies import ExitPolicy


logger = logging.get_logger(__name__)


@dataclass
class EarlyExitClassifierOutput(ModelOutput):
    """What an early-exit classifier returns.

    Args:
        loss: scalar, where labels were given. Anytime: the joint loss, the sum over exits of the mean over rows.
            Dynamic: the mean over rows, each at its own exit.
        logits: (batch, num_labels), the last exit's (anytime) or each row's own exit's (dynamic).
        exit_logits: (batch, num_exits, num_labels), anytime only.
        exit_index: (batch,), int64, 0-based exit that each row took, dynamic only.
        hidden_states: one more than layers, each (batch, length, hidden_size), where asked for.
        attentions: one per layer, each (batch, heads, length, length), where asked for.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    exit_logits: torch.FloatTensor | None = None
    exit_index: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class EarlyExitMixin:
    """Exits for a stock encoder; comes before its `PreTrainedModel` in the bases.

    An adapter builds the stock modules under their stock names plus `self.exit_heads` (`build_exit_heads`), and
    supplies `head_class`, `embed`, `backbone_layers`, `last_head_modules`, `last_head`, `layer_mask` where its layers
    read a mask, and a `forward` that names its inputs.
    """

    # The loss is a mean per batch: the Trainer must divide by the accumulation steps itself.
    accepts_loss_kwargs = False
    head_class: type[torch.nn.Module]

    backbone_frozen = False
    _policy: tuple = (None, None)  # what the config said, and the policy made of it
    # Names of the parameters that the loaded checkpoint did not bring, the last head's too where the checkpoint was
    # fine-tuned for something else; None: no checkpoint was loaded.
    newly_initialized: frozenset[str] | None = None

    # What an adapter supplies

    def embed(self, **inputs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states (batch, length, hidden_size) before layer 1, and the (batch, length) attention mask."""
        raise NotImplementedError

    @property
    def backbone_layers(self) -> torch.nn.ModuleList:
        """The layers of the stock encoder, in order."""
        raise NotImplementedError

    @property
    def last_head_modules(self) -> list[torch.nn.Module]:
        """The stock modules that make up the head of the last exit."""
        raise NotImplementedError

    def last_head(self, pooled: torch.Tensor) -> torch.Tensor:
        """The stock head of the last exit: (batch, hidden_size) to (batch, num_labels)."""
        raise NotImplementedError

    def layer_mask(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """The mask that the layers read, made from the 2-D attention mask."""
        return None

    # Construction and loading

    def build_exit_heads(self) -> torch.nn.ModuleDict:
        """The heads of exits 1..K-1, each under the number of its layer, so that a changed list keeps the others'."""
        self.config.last_exit_pooling = self.config.last_exit_pooling or self.config.exit_pooling
        return torch.nn.ModuleDict(
            {str(layer): self.head_class(self.config) for layer in self.config.exit_layers[:-1]}
        )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, config=None, output_loading_info=False, **kwargs
    ):
        """As `PreTrainedModel.from_pretrained`, from an early-exit or a stock checkpoint, with or without a head.

        Config fields may be given as keywords (`exit_layers=[3, 6, 9]`). A stock checkpoint that brings its own
        classifier gives the same logits at the last exit as before, whatever `exit_pooling` the other exits use.

        Raises:
            ExitConfigurationError: a checkpoint of another architecture, or an exit field that does not fit.
        """
        if not isinstance(config, cls.config_class):
            config = cls._exit_config(config or pretrained_model_name_or_path, kwargs)
        pooling_known = config.last_exit_pooling is not None
        architectures = config.architectures
        if architectures is None:  # the config was given, and made by hand
            architectures = cls._checkpoint_config(pretrained_model_name_or_path, kwargs).get("architectures")
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
        )
        missing = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
        if not is_classifier(architectures, cls.__name__):
            classifier = {id(parameter) for parameter in model.last_head_modules[-1].parameters()}
            missing |= {name for name, parameter in model.named_parameters() if id(parameter) in classifier}
        model.newly_initialized = frozenset(missing)
        stock_head = not model.is_new_head(model.num_exits - 1) and all(
            model.is_new_head(exit_index) for exit_index in range(model.num_exits - 1)
        )
        if not pooling_known and stock_head:
            model.config.last_exit_pooling = "cls"
            if model.config.exit_aggregation == "boosted":
                logger.warning(
                    "The checkpoint brings a fine-tuned head, but with exit_aggregation='boosted' the last exit "
                    "predicts the sum of all exits: its predictions change until the model is trained."
                )
        return (model, info) if output_loading_info else model

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As in torch, and also under the names that `save_pretrained` writes (for ViT those of older releases).

        `Trainer` loads checkpoints by this method and not by `from_pretrained`, which knows both.
        """
        own = self.state_dict()
        names = {id(tensor): name for name, tensor in own.items()}
        written = {name: names.get(id(tensor), name) for name, tensor in revert_weight_conversion(self, own).items()}
        renamed = {written.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(renamed, strict, assign)

    @classmethod
    def _checkpoint_config(cls, source: str, kwargs: dict) -> dict:
        """`config.json` of a folder or a Hub name."""
        hub_names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
        hub_kwargs = {name: kwargs[name] for name in hub_names if name in kwargs}
        return cls.config_class.get_config_dict(source, **hub_kwargs)[0]

    @classmethod
    def _exit_config(cls, source, kwargs: dict) -> PreTrainedConfig:
        """The early-exit config for `source` (a config, a folder or a Hub name); takes its fields out of `kwargs`."""
        if isinstance(source, PreTrainedConfig):
            config_dict = source.to_dict()
        else:
            config_dict = cls._checkpoint_config(source, kwargs)
        found = config_dict.pop("model_type", None)
        if found not in (cls.config_class.model_type, cls.config_class.stock_model_type):
            raise ExitConfigurationError(
                f"{cls.__name__} takes checkpoints of type {cls.config_class.stock_model_type!r} or "
                f"{cls.config_class.model_type!r}, not {found!r}."
            )
        names = cls.config_class.__dataclass_fields__.keys() - {"dtype"} | {"num_labels"}
        return cls.config_class.from_dict(config_dict, **{name: kwargs.pop(name) for name in names & kwargs.keys()})

    # Exits and their heads

    @property
    def num_exits(self) -> int:
        return len(self.config.exit_layers)

    def exit_head_modules(self, exit_index: int) -> list[torch.nn.Module]:
        """The modules that make up the head of the 0-based exit."""
        if exit_index == self.num_exits - 1:
            return self.last_head_modules
        return [self.exit_heads[str(self.config.exit_layers[exit_index])]]

    def is_new_head(self, exit_index: int) -> bool:
        """Whether a parameter of this exit's (0-based) head did not come from the checkpoint.

        The last head is new, too, where the checkpoint's `architectures` name no sequence or image classification.
        """
        if self.newly_initialized is None:
            return True
        weights = {id(part) for module in self.exit_head_modules(exit_index) for part in module.parameters()}
        return any(id(p) in weights and name in self.newly_initialized for name, p in self.named_parameters())

    def compute_exit(self, exit_index: int, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The logits (batch, num_labels) of one exit's own head; a boosted sum is not included."""
        if exit_index == self.num_exits - 1:
            return self.last_head(pool_hidden_states(hidden, attention_mask, self.config.last_exit_pooling))
        head = self.exit_heads[str(self.config.exit_layers[exit_index])]
        return head(pool_hidden_states(hidden, attention_mask, self.config.exit_pooling))

    def freeze_backbone(self) -> None:
        """Train heads 1..K-1 only: the backbone and the last head stay to the bit, and in eval mode.

        Raises:
            ExitConfigurationError: the last head is not fine-tuned, there is no other exit, or the exits are boosted.
        """
        if self.config.exit_aggregation == "boosted":
            raise ExitConfigurationError(
                "--freeze_backbone keeps the last head's predictions, which boosting changes: use --method joint."
            )
        if self.is_new_head(self.num_exits - 1):
            raise ExitConfigurationError(
                "--freeze_backbone needs a fine-tuned classifier, but the last head did not come from the checkpoint: "
                "give a fine-tuned one as --model_name_or_path, or leave --freeze_backbone out."
            )
        if self.num_exits == 1:
            raise ExitConfigurationError(
                "--freeze_backbone leaves nothing to train: --exit_layers names only the last."
            )
        self.requires_grad_(False)
        self.exit_heads.requires_grad_(True)
        self.backbone_frozen = True
        self.train(self.training)

    def train(self, mode: bool = True):
        super().train(mode)
        if self.backbone_frozen:
            for child in self.children():
                child.train(mode and child is self.exit_heads)
        return self

    def set_exit_policy(self, policy: "ExitPolicy | dict | None") -> None:
        """Set the policy that eval mode leaves by, after checking that it fits; `None` means no early exit.

        Raises:
            ExitConfigurationError: the policy does not fit the number of exits or the problem.
        """
        if policy is not None:
            # A model of custom code and the package have an ExitPolicy each: what both know is its dict.
            values = policy.to_dict() if hasattr(policy, "to_dict") else policy
            if not isinstance(values, dict):
                raise ExitConfigurationError(
                    f"set_exit_policy takes an ExitPolicy, its dict, or None for no early exit, not {policy!r}. The "
                    "policy of a budget: ExitPolicy.from_results(path, target_cost=0.5)."
                )
            policy = ExitPolicy.from_dict(values)
            policy.validate(self.num_exits, self.config.problem_type, self.config.num_labels)
            policy = policy.to_dict()
        self.config.exit_policy = policy

    def get_exit_policy(self) -> ExitPolicy | None:
        """The policy in the config, checked; made anew only after the config has changed.

        Raises:
            ExitConfigurationError: the policy does not fit the number of exits or the problem.
        """
        config = self.config
        if config.exit_policy is None:
            return None
        said = (config.exit_policy, config.problem_type, config.num_labels, self.num_exits)
        if said != self._policy[0]:
            policy = ExitPolicy.from_dict(config.exit_policy)
            policy.validate(self.num_exits, config.problem_type, config.num_labels)
            self._policy = copy.deepcopy(said), policy
        return self._policy[1]

    # The loop

    def run_stage(
        self,
        exit_index: int,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        mask: torch.Tensor | None,
        previous: torch.Tensor | None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layers between the exit before and this one (0-based), and what this exit predicts.

        Args:
            hidden: (batch, length, hidden_size), after the exit before, or the embeddings.
            attention_mask: (batch, length) or `None`.
            mask: what `layer_mask` made of it.
            previous: (batch, num_labels), what the exit before predicts; `None` at the first.

        Returns:
            the hidden states for the next stage, and logits (batch, num_labels).
        """
        config = self.config
        first = config.exit_layers[exit_index - 1] if exit_index else 0
        layers = self.backbone_layers
        for depth in range(first, config.exit_layers[exit_index]):
            hidden = layers[depth](hidden, mask, **kwargs)
        behind = self.num_exits - exit_index - 1
        rescale = self.training and config.gradient_rescale
        if rescale:
            hidden = scale_gradient(hidden, 1 / (behind + 1))
        logits = self.compute_exit(exit_index, hidden, attention_mask)
        if config.exit_aggregation == "boosted":
            logits = add_boosted(logits, previous, config.boost_temperature)
        if rescale and behind:
            hidden = scale_gradient(hidden, behind)
        return hidden, logits

    def run_exits(
        self,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        early_exit: bool | ExitPolicy | dict = True,
        **kwargs,
    ) -> EarlyExitClassifierOutput:
        """Run the layers and exits on embedded inputs: training, anytime and dynamic inference.

        Args:
            hidden: (batch, length, hidden_size), the embeddings.
            attention_mask: (batch, length) or `None`.
            labels: as `loss_matrix` takes them.
            early_exit: `False` evaluates every exit even if a policy is set. A policy, or its dict, takes the place of
                the model's own for this call, in training too: rows that have left take no part in the layers behind.
            **kwargs: passed to every layer.

        Raises:
            ExitConfigurationError: a policy that does not fit the number of exits or the problem.
        """
        config = self.config
        policy = ExitPolicy.from_dict(early_exit) if isinstance(early_exit, dict) else early_exit
        if isinstance(policy, ExitPolicy):
            policy.validate(self.num_exits, config.problem_type, config.num_labels)
        elif not hasattr(policy, "decide"):
            if not isinstance(early_exit, bool | None):
                raise ExitConfigurationError(
                    f"early_exit is True, False, or for this call an ExitPolicy or its dict, not {early_exit!r}."
                )
            policy = self.get_exit_policy() if early_exit and not self.training else None
        recording = policy is not None and [
            f"output_{name}"
            for name in ("hidden_states", "attentions")
            if kwargs.get(f"output_{name}", getattr(config, f"output_{name}"))
        ]
        if recording:
            logger.warning_once(f"{' and '.join(recording)} needs every layer: no compute is saved by early exit.")
        mask = self.layer_mask(hidden, attention_mask)
        if mask is None:
            attention_mask = None  # the layers need none, so there is no padding
        leaving = None if policy is None or recording else _LeavingRows(policy, self.num_exits, attention_mask)
        logits, collected = None, []
        for index in range(self.num_exits):
            hidden, logits = self.run_stage(index, hidden, attention_mask, mask, logits, **kwargs)
            if leaving is None:
                collected.append(logits)
                continue
            keep = leaving.decide(index, logits)
            if keep is None:
                continue
            if keep.numel() == 0:
                break
            hidden = hidden[:, : leaving.width].index_select(0, keep)
            logits = logits.index_select(0, keep)
            attention_mask = leaving.attention_mask
            mask = self.layer_mask(hidden, attention_mask)

        if leaving is not None:
            logits, exit_index = leaving.answers()
            exit_logits = None
        else:
            exit_logits, exit_index = torch.stack(collected, 1), None
            if policy is not None:
                exit_index = policy.exits_of(exit_logits)
                logits = exit_logits[torch.arange(len(exit_index), device=exit_logits.device), exit_index]
        loss = None
        if labels is not None:
            config.problem_type = infer_problem_type(config.problem_type, config.num_labels, labels)
            answered = exit_logits if exit_index is None else logits.unsqueeze(1)
            loss = reduce_losses(loss_matrix(answered, labels.to(logits.device), config.problem_type))
        return EarlyExitClassifierOutput(
            loss=loss, logits=logits, exit_logits=exit_logits if exit_index is None else None, exit_index=exit_index
        )


class _LeavingRows:
    """Which rows are still in the batch, and what the others answered.

    Each exit writes the answers of the rows that are still there, and later exits overwrite them. `attention_mask` and
    `width` describe the survivors, trailing columns that none of them uses cut off. Per decision one small tensor is
    read from the device, and nothing is copied if nobody leaves.
    """

    def __init__(self, policy: ExitPolicy, num_exits: int, attention_mask: torch.Tensor | None):
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"Early exit needs a 2-D attention_mask, not {attention_mask.dim()}-D; pass early_exit=False."
            )
        self.policy, self.num_exits = policy, num_exits
        self.state = ()  # what the criterion remembers of the rows that are still there
        self.rows = None  # None: nobody has left, every row is still at its place
        self.logits = self.exit_index = None
        self.attention_mask, self.width, self.columns = attention_mask, None, None

    def decide(self, index: int, logits: torch.Tensor) -> torch.Tensor | None:
        """Take the answers (rows, num_labels) of exit `index`; return which rows stay, `None` meaning all of them."""
        if self.rows is None:
            self.logits, self.exit_index = logits, index
        else:
            self.logits.index_copy_(0, self.rows, logits)
            self.exit_index.index_fill_(0, self.rows, index)
        if index == self.num_exits - 1:
            return None
        leaves, self.state = self.policy.decide(index, logits, self.state)
        num_staying, width, full = self._measure(leaves)
        if num_staying == len(leaves):
            return None
        if num_staying == 0:
            return leaves[:0]
        keep = torch.argsort(leaves, stable=True)[:num_staying]
        self._compact(keep, width, full)
        return keep

    def _measure(self, leaves: torch.Tensor) -> tuple[int, int | None, bool]:
        """(rows that stay, columns that they use, whether they use all of these columns), in one read."""
        if self.attention_mask is None or len(leaves) == 1:
            return len(leaves) - int(leaves.sum()), None, True
        if self.columns is None:
            used = self.attention_mask != 0
            last = (used * torch.arange(1, used.shape[1] + 1, device=used.device)).amax(1)
            # A row of padding only attends to all of it.
            self.columns = torch.stack([last.masked_fill(last == 0, used.shape[1]), used.sum(1)])
        last, used = self.columns
        stay = ~leaves
        # Rows that leave must not make the survivors look longer or shorter than they are.
        shortest = used.masked_fill(~stay, self.attention_mask.shape[1]).amin()
        count, width, shortest = torch.stack([stay.sum(), (last * stay).amax(), shortest]).tolist()
        return count, width, shortest >= width

    def _compact(self, keep: torch.Tensor, width: int | None, full: bool) -> None:
        if self.rows is None:
            # Later answers are written into a copy: what the head returned must stay as it is.
            logits, self.exit_index = self.answers()
            self.logits = logits.clone()
        self.rows = keep if self.rows is None else self.rows[keep]
        self.state = tuple(tensor[keep] for tensor in self.state)
        self.width = width
        if self.attention_mask is not None:
            self.attention_mask = None if full else self.attention_mask[:, :width].index_select(0, keep)
            self.columns = self.columns[:, keep]

    def answers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's logits (batch, num_labels), and the exit that it took or is at (batch,)."""
        if self.rows is None:
            shape, device = self.logits.shape[:1], self.logits.device
            return self.logits, torch.full(shape, self.exit_index, dtype=torch.int64, device=device)
        return self.logits, self.exit_index
