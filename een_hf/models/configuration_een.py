"""Configuration of early-exit models: the exit fields, once, and one config class per architecture."""

import dataclasses
import os
from dataclasses import dataclass

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import BertConfig, PreTrainedConfig, ViTConfig

from .exits import EXIT_HEADS, POOLINGS
from .registries import ExitConfigurationError


def resolve_exit_layers(exit_layers: list[int] | None, num_hidden_layers: int) -> list[int]:
    """Return the full, checked list of 1-based exit layers; `None` means every layer.

    The last layer always carries an exit and is appended where it is missing.

    Raises:
        ExitConfigurationError: a layer outside 1..`num_hidden_layers`, a layer given twice, or layers out of order.
    """
    if exit_layers is None:
        return list(range(1, num_hidden_layers + 1))
    layers = list(exit_layers)
    outside = [layer for layer in layers if not 1 <= layer <= num_hidden_layers]
    if outside:
        raise ExitConfigurationError(
            f"exit_layers (--exit_layers) names layer {outside[0]}, but this network has layers "
            f"1 to {num_hidden_layers}."
        )
    if len(set(layers)) != len(layers):
        twice = next(layer for layer in layers if layers.count(layer) > 1)
        raise ExitConfigurationError(f"exit_layers (--exit_layers) names layer {twice} twice; give each layer once.")
    if layers != sorted(layers):
        raise ExitConfigurationError(
            f"exit_layers (--exit_layers) must rise from shallow to deep, for example {sorted(layers)}, not {layers}."
        )
    return layers if layers and layers[-1] == num_hidden_layers else [*layers, num_hidden_layers]


def _one_of(name: str, value: str | None, choices: tuple) -> None:
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices)
        raise ExitConfigurationError(f"{name} is {value!r}; it must be one of: {known}.")


@dataclass(kw_only=True, repr=False)
class EarlyExitConfigMixin:
    """The exit fields that every early-exit config has.

    Args:
        exit_layers: 1-based layers that carry an exit, rising; `None` means every layer, and the last layer is
            appended where it is missing, so that after construction the list is always complete.
        exit_pooling: what the exits before the last read: `cls`, the first token; `mean`, the mean over the unmasked
            tokens, or over the patches of an image; `cls_mean`, both; or a registered one. Default: `mean` for text,
            `cls_mean` for images. A config that was saved without the field means `cls`.
        exit_head: a registered head for these exits; `None`: that of the architecture.
        last_exit_pooling: what the last exit reads. Written when a checkpoint is loaded: the stock head's own for a
            fine-tuned one, else as `exit_pooling` where that head can read it.
        exit_aggregation: `none`, every exit predicts by itself, or `boosted`, exit k predicts the running sum F_k
            (Boosted Dynamic Neural Networks, AAAI 2023).
        boost_temperature: t in F_k = f_k + t * stop_gradient(F_{k-1}).
        gradient_rescale: scale hidden states in the backward pass as the boosted scheme does.
        exit_policy: criterion and thresholds as a plain dict (`ExitPolicy.to_dict`), or `None`: no early exit.
        training_scheme: what trained the exits (`--method`, or `retrofit`), written when training begins; `None`:
            nothing did.

    Raises:
        ExitConfigurationError: a field outside its choices, or exit layers that do not fit the network.
    """

    exit_layers: list[int] | None = None
    exit_pooling: str | None = None
    exit_head: str | None = None
    last_exit_pooling: str | None = None
    exit_aggregation: str = "none"
    boost_temperature: float | int = 0.5
    gradient_rescale: bool = False
    exit_policy: dict | None = None
    training_scheme: str | None = None

    # Of an architecture, not of a model
    default_exit_pooling = "mean"
    stock_pooling = "cls"  # what the stock head reads
    last_exit_poolings = ("cls", "mean")  # what it could read
    num_prefix_tokens = 0  # tokens before the patches of an image

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if not 0 <= self.boost_temperature < 1e30:
            raise ExitConfigurationError(
                f"boost_temperature (--boost_temperature) must be a number from 0, not {self.boost_temperature}."
            )
        self.exit_layers = resolve_exit_layers(self.exit_layers, self.num_hidden_layers)
        if self.exit_pooling is None:
            self.exit_pooling = self.default_exit_pooling
        POOLINGS[self.exit_pooling]
        if self.exit_head is not None:
            EXIT_HEADS[self.exit_head]
        _one_of("last_exit_pooling", self.last_exit_pooling, (None, *self.last_exit_poolings))
        _one_of("exit_aggregation", self.exit_aggregation, ("none", "boosted"))

    @property
    def max_input_length(self) -> int | None:
        """The most tokens that a text may have, special ones included; `None`: the positions set no limit."""
        return getattr(self, "max_position_embeddings", None)

    def check_input_length(self, num_tokens: int, what: str) -> None:
        """Raise ExitConfigurationError where texts, called `what`, have more tokens than the positions reach."""
        longest = self.max_input_length
        if longest is not None and num_tokens > longest:
            raise ExitConfigurationError(
                f"{what} has {num_tokens} tokens, the model takes at most {longest}: tokenize with truncation=True, "
                f"max_length={longest}."
            )

    def to_dict(self) -> dict:
        """As in `PreTrainedConfig`; trackers record it, so that a local folder is named by its last part."""
        values = super().to_dict()
        name = values.get("_name_or_path")
        return {**values, "_name_or_path": os.path.basename(name)} if name and os.path.isdir(name) else values

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in `PreTrainedConfig`, but overrides take part in the construction, and so in its checks.

        Raises:
            ExitConfigurationError: a value of another kind, or an attention kernel of the Hub, which is code: whoever
                loads the model may ask for one, its file may not.
        """
        for name in ("attn_implementation", "_attn_implementation"):
            if "/" in str(config_dict.get(name)):
                raise ExitConfigurationError(
                    f"The config names code of the Hub ({name}: {config_dict[name]!r}). Remove that line, and give "
                    "attn_implementation when the model is loaded."
                )
        fields = {field.name for field in dataclasses.fields(cls)} - {"dtype"}
        overrides = {name: kwargs.pop(name) for name in list(kwargs) if name in fields}
        if config_dict.get("model_type") == cls.model_type:
            config_dict = {"exit_pooling": "cls", **config_dict}  # the only one there was, before it was always saved
        try:
            return super().from_dict({**config_dict, **overrides}, **kwargs)
        except StrictDataclassError as error:
            raise ExitConfigurationError(f"The config cannot be read: {' '.join(str(error).split())[:300]}") from error

    def to_diff_dict(self) -> dict:
        """As in `PreTrainedConfig`; the pooling is always written, so that another default changes no saved model."""
        return {**super().to_diff_dict(), "exit_pooling": self.exit_pooling}

    def default_last_exit_pooling(self, stock_head: bool) -> str:
        """What the last exit reads, with a fine-tuned stock head or with a new one."""
        readable = self.exit_pooling in self.last_exit_poolings
        return self.exit_pooling if readable and not stock_head else self.stock_pooling


# A policy decides at run time which exit answers, so these are no predictions of their own.
_KEYS_TO_IGNORE = ["exit_logits", "exit_index", "hidden_states", "attentions"]


@strict
class EarlyExitBertConfig(EarlyExitConfigMixin, BertConfig):
    """`BertConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_bert"
    stock_model_type = "bert"
    keys_to_ignore_at_inference = _KEYS_TO_IGNORE


@strict
class EarlyExitViTConfig(EarlyExitConfigMixin, ViTConfig):
    """`ViTConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_vit"
    stock_model_type = "vit"
    default_exit_pooling = "cls_mean"
    num_prefix_tokens = 1
    keys_to_ignore_at_inference = _KEYS_TO_IGNORE


def is_classifier(architectures: list[str] | None, *names: str) -> bool:
    """Whether a checkpoint's `architectures` name a classifier of sequences or images, or one of `names`."""
    endings = ("ForSequenceClassification", "ForImageClassification")
    return any(str(name).endswith(endings) or name in names for name in architectures or ())


def is_early_exit_config(config: PreTrainedConfig) -> bool:
    """Whether `config` describes an early-exit model."""
    return isinstance(config, EarlyExitConfigMixin)
