"""The mixin that gives a stock encoder its exits, and the one staged loop that trains and runs them."""

import copy
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import ModelOutput, logging
from transformers.utils.output_capturing import capture_outputs

from .configuration_een import ExitConfigurationError, is_classifier
from .exit_losses import infer_problem_type, loss_matrix, reduce_losses
from .exits import (
    EXIT_HEADS,
    BertExitHead,
    StackedHeads,
    ViTExitHead,
    add_boosted,
    add_boosted_stack,
    can_stack,
    pool_hidden_states,
    scale_gradient,
)
from .policies import ExitPolicy
from .stages import Examples, bidirectional_mask


logger = logging.get_logger(__name__)

# What a PEFT model puts into the name of a parameter: the copy that is trained, or the layer that is adapted.
_ADAPTER_PARTS = re.compile(r"\.(?:original_module|base_layer|modules_to_save\.[^.]+)(?=\.)")


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

    An adapter builds the stock modules under their stock names plus `self.exit_heads` (`build_exit_heads`). It says
    where the layers are (`backbone_layers`) and what the stock head is (`last_head`, `last_head_modules`).
    `EarlyExitTextMixin` and `EarlyExitImageMixin` supply the rest, as most encoders have it: how inputs become hidden
    states (`embed`), what the heads of the other exits are (`head_class`), and a `forward` that names the inputs.
    Where layers are not called as `layer(hidden, mask)`, the adapter says how: `make_context`, `run_layer`.
    """

    # The loss is a mean per batch: the Trainer must divide by the accumulation steps itself.
    accepts_loss_kwargs = False
    head_class: type[torch.nn.Module]

    backbone_frozen = False
    cuda_graphs = True  # whether what answers whole data sets and pipelines on CUDA runs captured programs
    # Whether heads of one class and shape are evaluated together where all exits are; None: in training, on
    # accelerators.
    stack_heads: bool | None = None
    _policy: tuple = (None, None)  # what the config said, and the policy made of it
    # Whether a text that is padded on the left has the same answer in a longer batch.
    answers_left_padding = True
    # Names of the parameters that the loaded checkpoint did not bring, the last head's too where the checkpoint was
    # fine-tuned for something else; None: no checkpoint was loaded.
    newly_initialized: frozenset[str] | None = None

    # What an adapter supplies

    def embed(self, **inputs) -> Examples:
        """The examples before layer 1: hidden states, mask, and whatever else layers or heads need of each example."""
        raise NotImplementedError

    def make_context(self, examples: Examples) -> Any:
        """What every layer reads beside the hidden states; made again whenever examples or columns have been removed.

        It depends on the shapes and tensors of `examples` only, and reads nothing from the device where their padding
        is known. Default: the mask of the attention implementation.
        """
        return bidirectional_mask(self.config, examples)

    def run_layer(self, depth: int, hidden: torch.Tensor, context: Any, **kwargs) -> torch.Tensor:
        """The hidden states (batch, length, hidden_size) after the layer at this 0-based depth."""
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
            (batch, num_labels)
        """
        raise NotImplementedError

    # Construction and loading

    def build_exit_heads(self) -> torch.nn.ModuleDict:
        """The heads of exits 1..K-1, each under the number of its layer, so that a changed list keeps the others'."""
        config = self.config
        if config.last_exit_pooling is None:
            config.last_exit_pooling = config.default_last_exit_pooling(stock_head=False)
        head_class = EXIT_HEADS[config.exit_head] if config.exit_head else self.head_class
        return torch.nn.ModuleDict({str(layer): head_class(config) for layer in config.exit_layers[:-1]})

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
        if architectures is None and pretrained_model_name_or_path is not None:  # the config was made by hand
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
            model.config.last_exit_pooling = model.config.default_last_exit_pooling(stock_head=True)
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
        return PreTrainedConfig.get_config_dict(source, **hub_kwargs)[0]

    @classmethod
    def _exit_config(cls, source, kwargs: dict) -> PreTrainedConfig:
        """The early-exit config for `source` (a config, a folder or a Hub name); takes its fields out of `kwargs`."""
        if isinstance(source, PreTrainedConfig):
            config_dict = source.to_dict()
        else:
            config_dict = cls._checkpoint_config(source, kwargs)
        found = config_dict.get("model_type")
        if found == cls.config_class.stock_model_type:
            del config_dict["model_type"]
        elif found != cls.config_class.model_type:
            raise ExitConfigurationError(
                f"{cls.__name__} takes checkpoints of type {cls.config_class.stock_model_type!r} or "
                f"{cls.config_class.model_type!r}, not {found!r}."
            )
        names = cls.config_class.field_names().keys() | {"num_labels"}
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

    def head_module_names(self) -> list[str]:
        """Names of the modules that hold the parameters of all heads: `modules_to_save` of a PEFT configuration."""
        parts = {id(part) for part in self.exit_heads.modules() if part._parameters}
        # Of the last head the modules as wholes: PEFT adds `classifier` where it knows the task, and none inside it.
        parts |= {id(module) for module in self.last_head_modules if any(True for _ in module.parameters())}
        return [name for name, module in self.named_modules() if id(module) in parts]

    def is_new_head(self, exit_index: int) -> bool:
        """Whether a parameter of this exit's (0-based) head did not come from the checkpoint.

        The last head is new, too, where the checkpoint's `architectures` name no sequence or image classification.
        """
        if self.newly_initialized is None:
            return True
        weights = {id(part) for module in self.exit_head_modules(exit_index) for part in module.parameters()}
        named = ((_ADAPTER_PARTS.sub("", name), parameter) for name, parameter in self.named_parameters())
        return any(id(parameter) in weights and name in self.newly_initialized for name, parameter in named)

    def missing_weights(self) -> list[str]:
        """Names of the parameters outside the heads that did not come from the checkpoint, and are random."""
        missing, heads = self.newly_initialized or (), range(self.num_exits)
        known = {id(part) for k in heads for head in self.exit_head_modules(k) for part in head.parameters()}
        return [name for name, part in self.named_parameters() if name in missing and id(part) not in known]

    def compute_exit(self, exit_index: int, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """The logits (batch, num_labels) of one exit's own head; a boosted sum is not included."""
        if exit_index == self.num_exits - 1:
            return self.last_head(hidden, attention_mask)
        return self.exit_heads[str(self.config.exit_layers[exit_index])](hidden, attention_mask)

    def pool_last(self, hidden: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """What the stock head of the last exit reads: (batch, length, hidden_size) to (batch, hidden_size)."""
        config = self.config
        return pool_hidden_states(hidden, attention_mask, config.last_exit_pooling, config.num_prefix_tokens)

    def evaluated_exits(self, policy: ExitPolicy | None) -> list[int]:
        """The 0-based exits that must be evaluated under a policy: where examples can exit, and the last.

        A criterion that remembers earlier exits reads all of them, and so does a boosted sum.
        """
        last = self.num_exits - 1
        if self.config.exit_aggregation == "boosted" or (policy is not None and policy.remembers):
            return list(range(self.num_exits))
        return [index for index in range(last) if policy is not None and policy.lets_exit(index)] + [last]

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
        """Set the policy by which examples exit in eval mode, after checking that it fits; `None` means no early exit.

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
        """The policy in the config, checked; read again only after the config has changed.

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
        examples: Examples,
        context: Any,
        previous_logits: torch.Tensor | None = None,
        after: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The layers up to an exit (0-based), and what this exit predicts.

        A pure function of tensors, whose shapes do not depend on their values.

        Args:
            exit_index: 0-based.
            examples: as they are after exit `after`, or after `embed`.
            context: what `make_context` made of them.
            previous_logits: (batch, num_labels), what the exit before predicts; `None` at the first. Read by boosted
                exits only.
            after: 0-based; default the exit before this one. -1 is before the first layer.
            **kwargs: passed to every layer.

        Returns:
            the hidden states for the next stage (batch, length, hidden_size), and logits (batch, num_labels).
        """
        config = self.config
        after = exit_index - 1 if after is None else after
        hidden = self._run_layers(after, exit_index, examples.hidden, context, **kwargs)
        behind = self.num_exits - exit_index - 1
        rescale = self.training and config.gradient_rescale
        if rescale:
            hidden = scale_gradient(hidden, 1 / (behind + 1))
        logits = self.compute_exit(exit_index, hidden, examples.attention_mask)
        if config.exit_aggregation == "boosted":
            logits = add_boosted(logits, previous_logits, config.boost_temperature)
        if rescale and behind:
            hidden = scale_gradient(hidden, behind)
        return hidden, logits

    def _run_layers(self, after: int, exit_index: int, hidden: torch.Tensor, context: Any, **kwargs) -> torch.Tensor:
        """The layers after one exit, up to another (0-based; -1 is before the first layer)."""
        layers = self.config.exit_layers
        for depth in range(layers[after] if after >= 0 else 0, layers[exit_index]):
            hidden = self.run_layer(depth, hidden, context, **kwargs)
        return hidden

    def run_exits(
        self,
        examples: Examples,
        labels: torch.Tensor | None = None,
        early_exit: bool | ExitPolicy | dict = True,
        **kwargs,
    ) -> EarlyExitClassifierOutput:
        """Run the layers and exits on embedded inputs: training, anytime and dynamic inference.

        Args:
            examples: what `embed` made of the inputs.
            labels: as `loss_matrix` takes them.
            early_exit: `False` evaluates every exit even if a policy is set. A policy, or its dict, takes the place of
                the model's own for this call, in training too: examples that have exited take no part in the layers
                behind.
            **kwargs: passed to every layer.

        Raises:
            ExitConfigurationError: a policy that does not fit the number of exits or the problem, or an attention mask
                that is not 2-D where examples can exit or an exit reads the mean of the tokens.
        """
        config = self.config
        policy = self._policy_of_call(early_exit)
        recording = policy is not None and [
            f"output_{name}"
            for name in ("hidden_states", "attentions")
            if kwargs.get(f"output_{name}", getattr(config, f"output_{name}"))
        ]
        if recording:
            logger.warning_once(f"{' and '.join(recording)} needs every layer: no compute is saved by early exit.")
        dynamic = policy is not None and not recording
        self.check_mask(examples.attention_mask, dynamic, examples.hidden.shape[:2])
        if not torch.compiler.is_compiling():
            examples = examples.unpadded()
        exit_index = None
        if policy is None or recording:
            every = self.run_all(examples, **kwargs)
            exit_logits, logits = torch.stack(every, 1), every[-1]
            if policy is not None:
                exit_index = policy.exits_of(exit_logits)
                logits = exit_logits[torch.arange(len(exit_index), device=exit_logits.device), exit_index]
        else:
            logits, exit_index = self.run_dynamic(examples, policy, **kwargs)
        loss = None
        if labels is not None:
            config.problem_type = infer_problem_type(config.problem_type, config.num_labels, labels)
            answered = exit_logits if exit_index is None else logits.unsqueeze(1)
            loss = reduce_losses(loss_matrix(answered, labels.to(logits.device), config.problem_type))
        return EarlyExitClassifierOutput(
            loss=loss, logits=logits, exit_logits=exit_logits if exit_index is None else None, exit_index=exit_index
        )

    def _policy_of_call(self, early_exit: bool | ExitPolicy | dict) -> ExitPolicy | None:
        policy = ExitPolicy.from_dict(early_exit) if isinstance(early_exit, dict) else early_exit
        if isinstance(policy, ExitPolicy):
            policy.validate(self.num_exits, self.config.problem_type, self.config.num_labels)
        elif not hasattr(policy, "decide"):
            if not isinstance(early_exit, bool | None):
                raise ExitConfigurationError(
                    f"early_exit is True, False, or for this call an ExitPolicy or its dict, not {early_exit!r}."
                )
            policy = self.get_exit_policy() if early_exit and not self.training else None
        return policy

    def check_mask(
        self, attention_mask: torch.Tensor | None, dynamic: bool, shape: tuple[int, ...] | None = None
    ) -> None:
        """Refuse a mask that the exits cannot read.

        Args:
            attention_mask: as it was given.
            dynamic: whether examples can exit.
            shape: (batch, length) of what is masked, where it is known.

        Raises:
            ExitConfigurationError: it is not 2-D where examples can exit or an exit reads the mean of the tokens, or
                it is the mask of another batch.
        """
        if attention_mask is None:
            return
        if attention_mask.dim() == 2:
            if shape is not None and not torch.compiler.is_compiling() and attention_mask.shape != shape:
                raise ExitConfigurationError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, the inputs {tuple(shape)}: give each "
                    "token of the batch its place in the mask."
                )
            return
        poolings = {self.config.last_exit_pooling, self.config.exit_pooling if self.num_exits > 1 else "cls"}
        if dynamic or poolings != {"cls"}:
            raise ExitConfigurationError(
                f"attention_mask is {attention_mask.dim()}-D; it must be 2-D, (batch, length), where examples exit "
                "early and where exits read the mean of the tokens. Others run with early_exit=False and "
                "exit_pooling='cls' only."
            )

    def check_padding(self, attention_mask: torch.Tensor | None) -> None:
        """Refuse padding on the left where the answer to a text depends on how much of it there is.

        Args:
            attention_mask: (batch, length); `None` means no padding.

        Raises:
            ExitConfigurationError: a text begins with padding that an exit reads.
        """
        if attention_mask is None or self.answers_left_padding or bool((attention_mask[:, 0] != 0).all()):
            return
        raise ExitConfigurationError(
            "A text is padded on the left, where the head of this network reads the first position, whose answer then "
            "depends on the length of the batch: pad on the right (tokenizer.padding_side)."
        )

    def run_all(self, examples: Examples, **kwargs) -> list[torch.Tensor]:
        """The logits (batch, num_labels) of every exit."""
        stack = self.stack_heads
        if stack is None:
            stack = self.training and examples.hidden.device.type not in ("cpu", "meta")
        if stack:
            heads = [self.exit_head_modules(index)[0] for index in range(self.num_exits - 1)]
            if can_stack(heads):
                return self._run_all_stacked(heads, examples, **kwargs)
        context, logits, collected = self.make_context(examples), None, []
        for index in range(self.num_exits):
            hidden, logits = self.run_stage(index, examples, context, logits, **kwargs)
            examples = replace(examples, hidden=hidden)
            collected.append(logits)
        return collected

    def _run_all_stacked(self, heads: list[torch.nn.Module], examples: Examples, **kwargs) -> list[torch.Tensor]:
        """As `run_all`, by the same formulas; heads, sums and gradient scales of all exits are a few operations."""
        config, context, last = self.config, self.make_context(examples), self.num_exits - 1
        hidden, mask, stack = examples.hidden, examples.attention_mask, StackedHeads(heads)
        rescale = self.training and config.gradient_rescale
        for index in range(last):
            hidden = self._run_layers(index - 1, index, hidden, context, **kwargs)
            # `run_stage` multiplies by 1 / (behind + 1), and for the layers behind by (behind) on top.
            share = 1 / (last - index + 1)
            hidden = stack.read(hidden, mask, *((share, 1 - share) if rescale else ()))
        hidden = self._run_layers(last - 1, last, hidden, context, **kwargs)
        early, logits = stack.classify(), self.last_head(hidden, mask)
        if config.exit_aggregation == "boosted":
            early = add_boosted_stack(early, config.boost_temperature)
            logits = add_boosted(logits, early[-1], config.boost_temperature)
        return [*early, logits]

    def run_dynamic(self, examples: Examples, policy: ExitPolicy, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Each example's logits at its own exit (batch, num_labels), and that exit (batch,).

        Each exit writes the answers of the examples that are still there, and later exits overwrite them. Per decision
        one small tensor is read from the device, and nothing is copied if nobody exits.
        """
        context, answers, exit_index, after = self.make_context(examples), None, None, -1
        *early, last = self.evaluated_exits(policy)
        boosted = self.config.exit_aggregation == "boosted"
        for index in (*early, last):
            hidden, logits = self.run_stage(index, examples, context, examples.logits, after, **kwargs)
            examples = replace(examples, hidden=hidden, logits=logits if boosted else None)
            if exit_index is None:
                answers, answered_at = logits, index
            else:
                answers.index_copy_(0, examples.ids, logits)
                exit_index.index_fill_(0, examples.ids, index)
            if index == last:
                break
            exits, examples.state = policy.decide(index, logits, examples.state)
            after = index
            if not policy.lets_exit(index):
                continue
            if examples.ids is None and len(examples) > 1:
                examples.ids = torch.arange(len(examples), device=logits.device)
            continuing = examples.continuing(exits)
            if continuing is None:
                break
            if continuing is examples:
                continue
            if exit_index is None:
                # Later answers are written into a copy: what the head returned must stay as it is.
                answers, exit_index = answers.clone(), torch.full_like(exits, index, dtype=torch.int64)
            examples, context = continuing, self.make_context(continuing)
        if exit_index is None:
            exit_index = torch.full(answers.shape[:1], answered_at, dtype=torch.int64, device=answers.device)
        return answers, exit_index


class LayerOutput(torch.nn.Module):
    """What `run_layer` passes its results through where the stock layers do not show them to the recording hooks.

    The adapter says so: `_can_record_outputs = {"hidden_states": LayerOutput, "attentions": LayerOutput}`.
    """

    def forward(self, before: torch.Tensor, after: torch.Tensor, attention: torch.Tensor | None = None) -> tuple:
        return after, attention


class EarlyExitTextMixin(EarlyExitMixin):
    """`EarlyExitMixin` for an encoder of text whose `base_model.embeddings` takes what `forward` names."""

    head_class = BertExitHead

    def embed(
        self, input_ids=None, attention_mask=None, token_type_ids=None, position_ids=None, inputs_embeds=None
    ) -> Examples:
        self.check_one_input(input_ids, inputs_embeds)
        hidden = self.base_model.embeddings(
            input_ids=input_ids, token_type_ids=token_type_ids, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        return Examples(hidden, attention_mask)

    @staticmethod
    def check_one_input(input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> None:
        """Raise ValueError unless there are tokens or their embeddings, and not both."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Give exactly one of input_ids and inputs_embeds.")

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        early_exit: bool | ExitPolicy | dict = True,
        **kwargs,
    ) -> EarlyExitClassifierOutput:
        """Classify; inputs as in the stock class, `early_exit` as in `EarlyExitMixin.run_exits`."""
        examples = self.embed(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return self.run_exits(examples, labels, early_exit, **kwargs)


class EarlyExitUntypedTextMixin(EarlyExitTextMixin):
    """`EarlyExitTextMixin` for an encoder without token types."""

    def embed(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None) -> Examples:
        self.check_one_input(input_ids, inputs_embeds)
        hidden = self.base_model.embeddings(
            input_ids=input_ids, position_ids=position_ids, inputs_embeds=inputs_embeds
        )
        return Examples(hidden, attention_mask)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        early_exit: bool | ExitPolicy | dict = True,
        **kwargs,
    ) -> EarlyExitClassifierOutput:
        """Classify; inputs as in the stock class, `early_exit` as in `EarlyExitMixin.run_exits`."""
        examples = self.embed(input_ids, attention_mask, position_ids, inputs_embeds)
        return self.run_exits(examples, labels, early_exit, **kwargs)


class EarlyExitImageMixin(EarlyExitMixin):
    """`EarlyExitMixin` for a vision transformer: class token, patches, and learned positions under the stock names."""

    head_class = ViTExitHead

    def embed(self, pixel_values=None, interpolate_pos_encoding=None) -> Examples:
        return Examples(
            self.base_model.embeddings(
                self.check_images(pixel_values), interpolate_pos_encoding=interpolate_pos_encoding
            )
        )

    def check_images(self, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """The images, in the precision of the patches' projection."""
        if pixel_values is None:
            raise ValueError("Give pixel_values.")
        return pixel_values.to(self.base_model.embeddings.patch_embeddings.projection.weight.dtype)

    @torch.no_grad()
    def set_image_size(self, image_size: int) -> None:
        """Take images of another height and width, a multiple of the patch size: position embeddings are resized."""
        embeddings = self.base_model.embeddings
        patches, table = embeddings.patch_embeddings, embeddings.position_embeddings
        count = (image_size // patches.patch_size[0]) * (image_size // patches.patch_size[1])
        if table is not None:
            shaped = table.new_empty(1, table.shape[1] - patches.num_patches + count, table.shape[2])
            resized = embeddings.interpolate_pos_encoding(shaped, image_size, image_size)
            embeddings.position_embeddings = torch.nn.Parameter(resized.clone())
        embeddings.image_size = patches.image_size = (image_size, image_size)
        patches.num_patches = count
        self.config.image_size = image_size

    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        early_exit: bool | ExitPolicy | dict = True,
        **kwargs,
    ) -> EarlyExitClassifierOutput:
        """Classify; inputs as in the stock class, `early_exit` as in `EarlyExitMixin.run_exits`."""
        return self.run_exits(self.embed(pixel_values, interpolate_pos_encoding), labels, early_exit, **kwargs)
