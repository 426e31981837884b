"""The config fields that every early-exit model has."""

import dataclasses
import os
from dataclasses import dataclass

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from .exits import EXIT_HEADS, POOLINGS
from .registries import CONFIG_HOOKS, ExitConfigurationError


def resolve_exit_layers(exit_layers: list[int] | None, num_hidden_layers: int) -> list[int]:
    """Complete and check a list of exit layers.

    Args:
        exit_layers: 1-based layers; `None`: every layer.
        num_hidden_layers: number of layers of the network.

    Returns:
        the layers with exits; the last layer always has one and is appended if missing.

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
            f"exit_layers (--exit_layers) must be in increasing order: {sorted(layers)}, not {layers}."
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
        exit_layers: 1-based layers that have an exit, in increasing order; `None`: every layer. The last layer is
            appended if missing, so that after construction the list is always complete.
        exit_pooling: pooling of the exits before the last: `cls`, the first token; `mean`, the mean over the unmasked
            tokens, or over the patches of an image; `cls_mean`, both; or a registered one. Default: `mean` for texts,
            `cls_mean` for images. A config that was saved without the field means `cls`.
        exit_head: a registered head for these exits; `None`: the default head of the architecture.
        last_exit_pooling: pooling of the last exit. Set when a checkpoint is loaded: the stock head's own for a
            fine-tuned one, else `exit_pooling` if the head can read it.
        exit_aggregation: `none`: every exit predicts by itself; `boosted`: exit k predicts the running sum F_k.
        boost_temperature: t in F_k = f_k + t * stop_gradient(F_{k-1}).
        gradient_rescale: whether the gradients of hidden states are scaled as in the boosted scheme.
        exit_policy: criterion and thresholds as a plain dict (`ExitPolicy.to_dict`); `None`: no early exit.
        training_scheme: the scheme that trained the exits (`--method`, or `retrofit`), set when training begins;
            `None`: they are not trained.

    Raises:
        ExitConfigurationError: a field outside its choices, or exit layers that do not fit the network.

    References:
        Boosted Dynamic Neural Networks (Yu et al., AAAI 2023) for `exit_aggregation`, `boost_temperature` and
        `gradient_rescale`.
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

    # Properties of the architecture; some configs compute them from other fields.
    default_exit_pooling = "mean"
    stock_pooling = "cls"  # pooling of the stock head
    last_exit_poolings = ("cls", "mean")  # poolings that the stock head can read
    num_prefix_tokens = 0  # tokens before the patches of an image
    stock_architecture = None  # name of the stock class, if its `model_type` has several

    # Fields of the output that `Trainer` must not collect as predictions.
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
        self._call_hooks()  # a config that was pickled may be loaded in a process that has created none

    def _call_hooks(self) -> None:
        for hook in CONFIG_HOOKS:
            hook(type(self))

    @property
    def exit_dropout(self) -> float:
        """Dropout rate of the exits' heads: that of the stock head; if it has none, that of the layers."""
        names = ("classifier_dropout", "seq_classif_dropout", "cls_dropout", "hidden_dropout_prob")
        return next((rate for name in names if (rate := getattr(self, name, None)) is not None), 0.0)

    @property
    def max_input_length(self) -> int | None:
        """The largest number of tokens of a text, including special tokens; `None`: no limit."""
        return getattr(self, "max_position_embeddings", None)

    def input_limit(self, max_length: int | None) -> int | None:
        """The number of tokens to which texts are truncated.

        Args:
            max_length: the limit that the user gives; `None`: none.

        Returns:
            the smaller of `max_length` and the model's own limit; `None`: no limit.
        """
        return min(filter(None, (max_length, self.max_input_length)), default=None)

    def check_input_length(self, num_tokens: int, what: str) -> None:
        """Check that a text is not too long for the model.

        Args:
            num_tokens: its number of tokens.
            what: the name of the text in the message.

        Raises:
            ExitConfigurationError: the text has more tokens than the model takes.
        """
        longest = self.max_input_length
        if longest is not None and num_tokens > longest:
            raise ExitConfigurationError(
                f"{what} has {num_tokens} tokens, the model takes at most {longest}: tokenize with truncation=True, "
                f"max_length={longest}."
            )

    def check_tokens(self, inputs: dict, what: str) -> None:
        """Check that the embeddings have every token: one that they lack ends the whole process on CUDA.

        Args:
            inputs: model inputs, of which `input_ids`, `token_type_ids` and a mask (..., length) are read.
            what: the name of the text in the message.

        Raises:
            ExitConfigurationError: a token or token type that the model does not have, or a text whose tokens are all
                masked: its answer could depend on the padding.
        """
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() <= 2 and not mask.any(-1).all():
            raise ExitConfigurationError(f"{what} has a text without tokens: its attention_mask is 0 everywhere.")
        for name, size in (("input_ids", "vocab_size"), ("token_type_ids", "type_vocab_size")):
            count, values = getattr(self, size, None), inputs.get(name)
            if count and values is not None and not (0 <= int(values.min()) and int(values.max()) < count):
                raise ExitConfigurationError(
                    f"{what} has {name} that the model does not have: it has 0 to {count - 1}."
                )

    def to_dict(self) -> dict:
        """As in `PreTrainedConfig`; of a local folder only the last part is kept, since trackers upload the dict."""
        values = super().to_dict()
        name = values.get("_name_or_path")
        return {**values, "_name_or_path": os.path.basename(name)} if name and os.path.isdir(name) else values

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in `PreTrainedConfig`; a stock config has no type here, since it is expected and no reason to warn."""
        config_dict, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == cls.stock_model_type:
            del config_dict["model_type"]
        return config_dict, unused

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """As in `PreTrainedConfig`, but overrides are passed to the constructor, so that they are checked too.

        Args:
            config_dict: content of a `config.json`.
            **kwargs: fields that override it, and keywords of `PreTrainedConfig.from_dict`.

        Returns:
            the config.

        Raises:
            ExitConfigurationError: a value of another kind, or an attention kernel of the Hub, which is code: it may
                be requested when the model is loaded, but not by the config file.
        """
        for name in ("attn_implementation", "_attn_implementation"):
            if "/" in str(config_dict.get(name)):
                raise ExitConfigurationError(
                    f"The config names code of the Hub ({name}: {config_dict[name]!r}). Remove this entry, and give "
                    "attn_implementation when you load the model."
                )
        names = cls.field_names()
        overrides = {names[name]: kwargs.pop(name) for name in list(kwargs) if name in names}
        if config_dict.get("model_type") == cls.model_type:
            config_dict = {"exit_pooling": "cls", **config_dict}  # the only pooling when the field was not saved yet
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
        """The config of a network's first layers.

        Args:
            config_dict: fields of the config of the whole network.
            num_layers: number of layers to keep.

        Returns:
            the fields, without those that follow from the number of layers.
        """
        named_stages = ("stage_names", "out_features", "out_indices", "_out_features", "_out_indices")
        cut = {name: value for name, value in config_dict.items() if name not in named_stages}
        if cut.get("layer_types"):
            cut["layer_types"] = cut["layer_types"][:num_layers]
        return {**cut, cls.field_names()["num_hidden_layers"]: num_layers}

    @classmethod
    def field_names(cls) -> dict[str, str]:
        """The keywords of the constructor.

        Returns:
            for each the field that it sets, which has another name if the keyword is an alias (`attribute_map`).
        """
        fields = {field.name: field.name for field in dataclasses.fields(cls) if field.name != "dtype"}
        return {**fields, **cls.attribute_map}

    def to_diff_dict(self) -> dict:
        """As in `PreTrainedConfig`; `exit_pooling` is always saved, so that a new default changes no saved model."""
        return {**super().to_diff_dict(), "exit_pooling": self.exit_pooling}

    def default_last_exit_pooling(self, stock_head: bool) -> str:
        """The default of `last_exit_pooling`.

        Args:
            stock_head: whether the checkpoint has a fine-tuned head.

        Returns:
            name of a pooling.
        """
        readable = self.exit_pooling in self.last_exit_poolings
        return self.exit_pooling if readable and not stock_head else self.stock_pooling


class EarlyExitImageConfigMixin(EarlyExitConfigMixin):
    """`EarlyExitConfigMixin` for images, with one class token before the patches."""

    default_exit_pooling = "cls_mean"
    num_prefix_tokens = 1


def is_classifier(architectures: list[str] | None, *names: str) -> bool:
    """Whether a checkpoint is a classifier.

    Args:
        architectures: `architectures` of its config.
        *names: names of further classes that are classifiers.

    Returns:
        whether they name a classifier of sequences or images, or one of `names`.
    """
    endings = ("ForSequenceClassification", "ForImageClassification", "ForImageClassificationWithTeacher")
    given = architectures if isinstance(architectures, list) else ()  # what a config.json holds there is not checked
    return any(str(name).endswith(endings) or name in names for name in given)


def is_early_exit_config(config: PreTrainedConfig) -> bool:
    """Whether `config` describes an early-exit model."""
    return isinstance(config, EarlyExitConfigMixin)
