"""Configuration of early-exit models: the exit fields, once, and one config class per architecture."""

import dataclasses
import os
from dataclasses import dataclass

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    BeitConfig,
    BertConfig,
    CamembertConfig,
    DebertaConfig,
    DebertaV2Config,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    PreTrainedConfig,
    RobertaConfig,
    ViTConfig,
    XLMRobertaConfig,
)

from .exits import EXIT_HEADS, POOLINGS
from .registries import CONFIG_HOOKS, ExitConfigurationError


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

    # Of an architecture, not of a model; properties where a field of the stock config decides
    default_exit_pooling = "mean"
    stock_pooling = "cls"  # what the stock head reads
    last_exit_poolings = ("cls", "mean")  # what it could read
    num_prefix_tokens = 0  # tokens before the patches of an image
    stock_architecture = None  # the stock class, where its `model_type` has several

    # A policy decides at run time which exit answers, so these are no predictions of their own.
    keys_to_ignore_at_inference = ["exit_logits", "exit_index", "hidden_states", "attentions"]

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
        self._call_hooks()

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._call_hooks()  # a pickled config, alone or of a model, can come into a process that made none

    def _call_hooks(self) -> None:
        for hook in CONFIG_HOOKS:
            hook(type(self))

    @property
    def exit_dropout(self) -> float:
        """Dropout of the exits' heads: that of the stock head, else of the layers."""
        names = ("classifier_dropout", "seq_classif_dropout", "cls_dropout", "hidden_dropout_prob")
        return next((rate for name in names if (rate := getattr(self, name, None)) is not None), 0.0)

    @property
    def max_input_length(self) -> int | None:
        """The most tokens that a text may have, special ones included; `None`: the positions set no limit."""
        return getattr(self, "max_position_embeddings", None)

    def input_limit(self, max_length: int | None) -> int | None:
        """The most tokens to keep of a text: no more than `max_length`, nor than the model takes; `None`: all."""
        return min(filter(None, (max_length, self.max_input_length)), default=None)

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
        names = cls.field_names()
        overrides = {names[name]: kwargs.pop(name) for name in list(kwargs) if name in names}
        if config_dict.get("model_type") == cls.model_type:
            config_dict = {"exit_pooling": "cls", **config_dict}  # the only one there was, before it was always saved
        num_layers = overrides.pop(names.get("num_hidden_layers"), None)
        if num_layers is not None:
            config_dict = cls.cut_to_layers(config_dict, num_layers)
        try:
            return super().from_dict({**config_dict, **overrides}, **kwargs)
        except ExitConfigurationError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
            raise ExitConfigurationError(f"The config cannot be read: {' '.join(str(error).split())[:300]}") from error

    @classmethod
    def cut_to_layers(cls, config_dict: dict, num_layers: int) -> dict:
        """The fields of a config as those of its first layers; what follows from their number is left out."""
        named_stages = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
        cut = {name: value for name, value in config_dict.items() if name not in named_stages}
        if cut.get("layer_types"):
            cut["layer_types"] = cut["layer_types"][:num_layers]
        return {**cut, cls.field_names()["num_hidden_layers"]: num_layers}

    @classmethod
    def field_names(cls) -> dict[str, str]:
        """What may be given to the construction, and the field that it sets: another where a name stands for it."""
        fields = {field.name: field.name for field in dataclasses.fields(cls) if field.name != "dtype"}
        return {**fields, **cls.attribute_map}

    def to_diff_dict(self) -> dict:
        """As in `PreTrainedConfig`; the pooling is always written, so that another default changes no saved model."""
        return {**super().to_diff_dict(), "exit_pooling": self.exit_pooling}

    def default_last_exit_pooling(self, stock_head: bool) -> str:
        """What the last exit reads, with a fine-tuned stock head or with a new one."""
        readable = self.exit_pooling in self.last_exit_poolings
        return self.exit_pooling if readable and not stock_head else self.stock_pooling


@strict
class EarlyExitBertConfig(EarlyExitConfigMixin, BertConfig):
    """`BertConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_bert"
    stock_model_type = "bert"


class _PositionsAfterPadding:
    """Positions are counted from the one after the padding token's."""

    @property
    def max_input_length(self) -> int:
        return self.max_position_embeddings - self.pad_token_id - 1


@strict
class EarlyExitRobertaConfig(_PositionsAfterPadding, EarlyExitConfigMixin, RobertaConfig):
    """`RobertaConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_roberta"
    stock_model_type = "roberta"


@strict
class EarlyExitXLMRobertaConfig(_PositionsAfterPadding, EarlyExitConfigMixin, XLMRobertaConfig):
    """`XLMRobertaConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_xlm-roberta"
    stock_model_type = "xlm-roberta"


@strict
class EarlyExitCamembertConfig(_PositionsAfterPadding, EarlyExitConfigMixin, CamembertConfig):
    """`CamembertConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_camembert"
    stock_model_type = "camembert"


@strict
class EarlyExitDistilBertConfig(EarlyExitConfigMixin, DistilBertConfig):
    """`DistilBertConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_distilbert"
    stock_model_type = "distilbert"


@strict
class EarlyExitElectraConfig(EarlyExitConfigMixin, ElectraConfig):
    """`ElectraConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_electra"
    stock_model_type = "electra"


@strict
class EarlyExitMPNetConfig(EarlyExitConfigMixin, MPNetConfig):
    """`MPNetConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_mpnet"
    stock_model_type = "mpnet"

    @property
    def max_input_length(self) -> int:
        return self.max_position_embeddings - 2  # whatever the padding token: counted from 2


@strict
class EarlyExitModernBertConfig(EarlyExitConfigMixin, ModernBertConfig):
    """`ModernBertConfig` with the fields of `EarlyExitConfigMixin`; the stock head reads `classifier_pooling`."""

    model_type = "een_modernbert"
    stock_model_type = "modernbert"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        for rope in self.rope_parameters.values():
            if rope["rope_type"] in ("dynamic", "longrope"):
                raise ExitConfigurationError(
                    f"rope_parameters have rope_type {rope['rope_type']!r}, by which what a text gives depends on the "
                    "longest text beside it, and so on which have exited: exits need another, such as 'yarn'."
                )

    @property
    def stock_pooling(self) -> str:
        return self.classifier_pooling


class _RelativePositions:
    @property
    def max_input_length(self) -> int | None:
        return self.max_position_embeddings if self.position_biased_input else None


@strict
class EarlyExitDebertaConfig(_RelativePositions, EarlyExitConfigMixin, DebertaConfig):
    """`DebertaConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_deberta"
    stock_model_type = "deberta"


@strict
class EarlyExitDebertaV2Config(_RelativePositions, EarlyExitConfigMixin, DebertaV2Config):
    """`DebertaV2Config` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_deberta-v2"
    stock_model_type = "deberta-v2"


class EarlyExitImageConfigMixin(EarlyExitConfigMixin):
    """`EarlyExitConfigMixin` for images: one class token stands before the patches."""

    default_exit_pooling = "cls_mean"
    num_prefix_tokens = 1


@strict
class EarlyExitViTConfig(EarlyExitImageConfigMixin, ViTConfig):
    """`ViTConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_vit"
    stock_model_type = "vit"


@strict
class EarlyExitDeiTConfig(EarlyExitImageConfigMixin, DeiTConfig):
    """`DeiTConfig` with the fields of `EarlyExitConfigMixin`.

    Args:
        distillation_head: the last exit answers by the mean of two classifiers, one on the class token and one on the
            distillation token. Default: as the checkpoint does.
    """

    model_type = "een_deit"
    stock_model_type = "deit"
    num_prefix_tokens = 2

    distillation_head: bool = False

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        if "DeiTForImageClassificationWithTeacher" in (config_dict.get("architectures") or []):
            config_dict = {"distillation_head": True, **config_dict}
        return super().from_dict(config_dict, **kwargs)

    @property
    def last_exit_poolings(self) -> tuple[str, ...]:
        return ("cls",) if self.distillation_head else ("cls", "mean")

    @property
    def stock_architecture(self) -> str:
        return f"DeiTForImageClassification{'WithTeacher' * self.distillation_head}"


@strict
class EarlyExitDinov2Config(EarlyExitImageConfigMixin, Dinov2Config):
    """`Dinov2Config` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_dinov2"
    stock_model_type = "dinov2"
    stock_pooling = "cls_mean"
    last_exit_poolings = ("cls_mean",)


@strict
class EarlyExitDinov2WithRegistersConfig(EarlyExitImageConfigMixin, Dinov2WithRegistersConfig):
    """`Dinov2WithRegistersConfig` with the fields of `EarlyExitConfigMixin`."""

    model_type = "een_dinov2_with_registers"
    stock_model_type = "dinov2_with_registers"
    stock_pooling = "cls_mean"
    last_exit_poolings = ("cls_mean",)

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.num_register_tokens


@strict
class EarlyExitBeitConfig(EarlyExitImageConfigMixin, BeitConfig):
    """`BeitConfig` with the fields of `EarlyExitConfigMixin`; the stock head reads as `use_mean_pooling` says."""

    model_type = "een_beit"
    stock_model_type = "beit"

    @property
    def stock_pooling(self) -> str:
        return "mean" if self.use_mean_pooling else "cls"

    @property
    def last_exit_poolings(self) -> tuple[str, ...]:
        return (self.stock_pooling,)


def is_classifier(architectures: list[str] | None, *names: str) -> bool:
    """Whether a checkpoint's `architectures` name a classifier of sequences or images, or one of `names`."""
    endings = ("ForSequenceClassification", "ForImageClassification", "ForImageClassificationWithTeacher")
    return any(str(name).endswith(endings) or name in names for name in architectures or ())


def is_early_exit_config(config: PreTrainedConfig) -> bool:
    """Whether `config` describes an early-exit model."""
    return isinstance(config, EarlyExitConfigMixin)
