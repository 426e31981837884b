"""The forward pass in stages: every exit on every example, or each example up to its own exit."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.utils import ModelOutput, logging

from .exit_losses import infer_problem_type, loss_matrix, reduce_losses
from .exits import add_boosted, scale_gradient
from .policies import ExitPolicy
from .registries import ExitConfigurationError
from .stacked_heads import StackedHeads, add_boosted_stack, can_stack
from .stages import Examples


logger = logging.get_logger(__name__)


@dataclass
class EarlyExitClassifierOutput(ModelOutput):
    """The output of an early-exit classifier.

    Args:
        loss: scalar, if labels were given. Anytime: the joint loss, the sum over exits of the mean over examples.
            Dynamic: the mean over examples, each at its own exit.
        logits: (batch, num_labels), of the last exit (anytime) or of each example's own exit (dynamic).
        exit_logits: (batch, num_exits, num_labels), anytime only.
        exit_index: (batch,), int64, the 0-based exit of each example, dynamic only.
        hidden_states: one more than there are layers, each (batch, length, hidden_size), if requested.
        attentions: one per layer, each (batch, heads, length, length), if requested.
    """

    loss: torch.FloatTensor | None = None
    logits: torch.FloatTensor | None = None
    exit_logits: torch.FloatTensor | None = None
    exit_index: torch.LongTensor | None = None
    hidden_states: tuple[torch.FloatTensor, ...] | None = None
    attentions: tuple[torch.FloatTensor, ...] | None = None


class StagedForwardMixin:
    """The part of `EarlyExitMixin` that runs the layers and the exits: training, anytime and dynamic inference."""

    # Whether heads of one class and shape are evaluated together, if all exits are evaluated; None: in training on
    # accelerators.
    stack_heads: bool | None = None
    # Whether a text that is padded on the left has the same answer in a longer batch.
    answers_left_padding = True

    @property
    def reads_first_token(self) -> bool:
        """Whether an exit reads the hidden state of the first token, which may be padding."""
        poolings = self.config.last_exit_pooling, self.config.exit_pooling
        return any("cls" in pooling for pooling in poolings[: self.num_exits])

    def run_stage(
        self,
        exit_index: int,
        examples: Examples,
        context: Any,
        previous_logits: torch.Tensor | None = None,
        after: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the layers up to an exit, and this exit.

        A pure function of tensors, whose shapes do not depend on their values.

        Args:
            exit_index: 0-based.
            examples: the examples as they are after exit `after`, or after `embed`.
            context: what `make_context` returned for them.
            previous_logits: (batch, num_labels), the prediction of the exit before; `None` at the first exit. Only
                boosted exits read it.
            after: the 0-based exit to start after; `None`: the exit before this one; -1: before the first layer.
            **kwargs: passed to every layer.

        Returns:
            the hidden states for the next stage (batch, length, hidden_size), and logits (batch, num_labels).
        """
        config = self.config
        after = exit_index - 1 if after is None else after
        hidden = self.run_layers(after, exit_index, examples.hidden, context, **kwargs)
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

    def run_layers(self, after: int, exit_index: int, hidden: torch.Tensor, context: Any, **kwargs) -> torch.Tensor:
        """Run the layers after one exit, up to another.

        Args:
            after: the 0-based exit to start after; -1: before the first layer.
            exit_index: the 0-based exit to end at, which is not evaluated.
            hidden: hidden states (batch, length, hidden_size) after exit `after`.
            context: what `make_context` returned.
            **kwargs: passed to every layer.

        Returns:
            the hidden states that the exit reads, of the same shape.
        """
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
            examples: what `embed` returned.
            labels: as `loss_matrix` takes them; `None`: no loss.
            early_exit: `True`: in eval mode examples exit by the model's policy, if it has one. `False`: every exit is
                evaluated. A policy, or its dict: for this call it replaces the model's own, in training mode too.
            **kwargs: passed to every layer.

        Returns:
            the output, dynamic if a policy is used, else anytime.

        Raises:
            ExitConfigurationError: a batch without examples, a policy that does not fit the number of exits or the
                problem, or an attention mask that is not 2-D although examples can exit or an exit reads the mean of
                the tokens.
        """
        config = self.config
        policy = self._policy_of_call(early_exit)
        recording = policy is not None and [
            f"output_{name}"
            for name in ("hidden_states", "attentions")
            if kwargs.get(f"output_{name}", getattr(config, f"output_{name}"))
        ]
        if recording:
            logger.warning_once(f"{' and '.join(recording)} needs every layer: early exit saves no compute.")
        dynamic = policy is not None and not recording
        self.check_mask(examples.attention_mask, dynamic, examples.hidden.shape[:2])
        if not torch.compiler.is_compiling():
            self.check_count(len(examples))
            examples = examples.unpadded()
        exit_index = None
        if dynamic:
            logits, exit_index = self.run_dynamic(examples, policy, **kwargs)
        else:
            every = self.run_all(examples, **kwargs)
            exit_logits, logits = torch.stack(every, 1), every[-1]
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

    def _policy_of_call(self, early_exit: bool | ExitPolicy | dict) -> ExitPolicy | None:
        if isinstance(early_exit, dict) or hasattr(early_exit, "to_dict"):
            return self.checked_policy(early_exit)
        if not isinstance(early_exit, bool | None):
            raise ExitConfigurationError(
                f"early_exit is True, False, or for this call an ExitPolicy or its dict, not {early_exit!r}."
            )
        return self.get_exit_policy() if early_exit and not self.training else None

    @staticmethod
    def check_count(count: int) -> None:
        """Check that there are examples: the layers of transformers cannot run without.

        Args:
            count: number of examples of a batch.

        Raises:
            ExitConfigurationError: there are none.
        """
        if count == 0:
            raise ExitConfigurationError("The batch has no examples: give at least one.")

    def check_mask(
        self, attention_mask: torch.Tensor | None, dynamic: bool, shape: tuple[int, ...] | None = None
    ) -> None:
        """Check that the exits can read a mask.

        Args:
            attention_mask: as the caller gave it.
            dynamic: whether examples can exit.
            shape: (batch, length) of the hidden states; `None`: not known.

        Raises:
            ExitConfigurationError: the mask is not 2-D although examples can exit or an exit reads the mean of the
                tokens, or its shape is not `shape`.
        """
        if attention_mask is None:
            return
        if attention_mask.dim() == 2:
            if shape is not None and not torch.compiler.is_compiling() and attention_mask.shape != shape:
                raise ExitConfigurationError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}, but the inputs have {tuple(shape)}: the "
                    "mask must have one value for each token."
                )
            return
        poolings = {self.config.last_exit_pooling, self.config.exit_pooling if self.num_exits > 1 else "cls"}
        if dynamic or poolings != {"cls"}:
            raise ExitConfigurationError(
                f"attention_mask is {attention_mask.dim()}-D; it must be 2-D, (batch, length), if examples exit "
                "early or exits read the mean of the tokens. Masks of other shapes need early_exit=False and "
                "exit_pooling='cls'."
            )

    def check_padding(self, attention_mask: torch.Tensor | None, shape: tuple[int, ...]) -> None:
        """Check the mask of texts that may run in other batches: `check_mask`, and no padding on the left that counts.

        Args:
            attention_mask: as the caller gave it; `None`: no padding.
            shape: (batch, length) of the texts.

        Raises:
            ExitConfigurationError: the mask is not 2-D, its shape is not `shape`, or a text begins with padding,
                although the model's answers depend on the amount of such padding.
        """
        self.check_mask(attention_mask, True, shape)
        if attention_mask is None or self.answers_left_padding or bool((attention_mask[:, 0] != 0).all()):
            return
        raise ExitConfigurationError(
            "A text is padded on the left, but an exit of this network reads the first position, so that the answer "
            "would depend on the length of the batch: pad on the right (tokenizer.padding_side)."
        )

    def run_all(self, examples: Examples, **kwargs) -> list[torch.Tensor]:
        """Evaluate every exit on every example.

        Args:
            examples: what `embed` returned.
            **kwargs: passed to every layer.

        Returns:
            one tensor of logits (batch, num_labels) per exit.
        """
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
        """As `run_all`, by the same formulas, with the heads of all early exits evaluated together."""
        config, context, last = self.config, self.make_context(examples), self.num_exits - 1
        hidden, mask, stack = examples.hidden, examples.attention_mask, StackedHeads(heads)
        rescale = self.training and config.gradient_rescale
        for index in range(last):
            hidden = self.run_layers(index - 1, index, hidden, context, **kwargs)
            # `run_stage` multiplies the gradient by 1 / (behind + 1), and that of the next layers by `behind`, too.
            share = 1 / (last - index + 1)
            hidden = stack.read(hidden, mask, *((share, 1 - share) if rescale else ()))
        hidden = self.run_layers(last - 1, last, hidden, context, **kwargs)
        early, logits = stack.classify(), self.last_head(hidden, mask)
        if config.exit_aggregation == "boosted":
            early = add_boosted_stack(early, config.boost_temperature)
            logits = add_boosted(logits, early[-1], config.boost_temperature)
        return [*early, logits]

    def run_dynamic(self, examples: Examples, policy: ExitPolicy, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Run each example up to its own exit.

        Each exit writes the answers of all examples that have reached it, and later exits overwrite them. For each
        decision one small tensor is read from the device, and nothing is copied if no example exits.

        Args:
            examples: what `embed` returned.
            policy: the exit policy.
            **kwargs: passed to every layer.

        Returns:
            each example's logits at its own exit (batch, num_labels), and this exit (batch,), int64, 0-based.
        """
        context, answers, exit_index, after = self.make_context(examples), None, None, -1
        evaluated, boosted = self.evaluated_exits(policy), self.config.exit_aggregation == "boosted"
        for index in evaluated:
            hidden, logits = self.run_stage(index, examples, context, examples.logits, after, **kwargs)
            examples = replace(examples, hidden=hidden, logits=logits if boosted else None)
            if exit_index is None:
                answers, answered_at = logits, index
            else:
                answers.index_copy_(0, examples.ids, logits)
                exit_index.index_fill_(0, examples.ids, index)
            if index == evaluated[-1]:
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
                # Later answers are written into a copy, since the tensor that the head returned must not change.
                answers, exit_index = answers.clone(), torch.full_like(exits, index, dtype=torch.int64)
            examples, context = continuing, self.make_context(continuing)
        if exit_index is None:
            exit_index = torch.full(answers.shape[:1], answered_at, dtype=torch.int64, device=answers.device)
        return answers, exit_index
