"""The registry of architectures, and `AutoEarlyExitModel`, which picks the class of a checkpoint."""

import importlib

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from .checkpoint_loading import checkpoint_config
from .exit_mixin import EarlyExitMixin
from .registries import CONFIG_HOOKS, ExitConfigurationError, Registry


class _Architectures(Registry):
    """Early-exit classes; those registered as `(module, name)` are imported on first use."""

    def __getitem__(self, name: str) -> type[EarlyExitMixin]:
        found = super().__getitem__(name)
        if not isinstance(found, tuple):
            return found
        module, class_name = found
        return register_architecture(getattr(importlib.import_module(module), class_name))

    def get(self, name, default=None):
        return self[name] if name in self else default

    def values(self) -> list[type[EarlyExitMixin]]:
        return [self[name] for name in self]

    def items(self) -> list[tuple[str, type[EarlyExitMixin]]]:
        return [(name, self[name]) for name in self]


# By the type of the stock model, which flags, results and model cards use too.
MODEL_CLASSES: dict[str, type[EarlyExitMixin]] = _Architectures("model_type (--model_type)")
# The Auto classes of transformers find a model class by its config: creating a config registers the model class.
CONFIG_HOOKS.append(lambda config_class: MODEL_CLASSES.get(config_class.stock_model_type))


def register_adapter(config_class: type[PreTrainedConfig], module: str, task: str) -> tuple[str, str]:
    """Register an architecture of this package without importing its model; returns the class's name and module."""
    name = config_class.__name__.removesuffix("Config") + f"For{task}"
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    MODEL_CLASSES[config_class.stock_model_type] = module, name
    return name, module


def register_architecture(model_class: type[EarlyExitMixin]) -> type[EarlyExitMixin]:
    """Class decorator that registers an early-exit class with the commands and with transformers' Auto classes.

    Args:
        model_class: a subclass of `EarlyExitMixin`, with its `config_class`.

    Returns:
        the class.

    Raises:
        ExitConfigurationError: it is no subclass of `EarlyExitMixin`.

    Example:
        >>> @een_hf.register_architecture
        ... class MyBert(een_hf.EarlyExitBertForSequenceClassification):
        ...     pass
    """
    MODEL_CLASSES.check_class(model_class, EarlyExitMixin)
    config_class = model_class.config_class
    images = model_class.main_input_name == "pixel_values"
    auto_class = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    MODEL_CLASSES[config_class.stock_model_type] = model_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    auto_class.register(config_class, model_class, exist_ok=True)
    # `save_pretrained` then copies the files of this folder, so that the model runs where een_hf is not installed.
    config_class.register_for_auto_class()
    model_class.register_for_auto_class(auto_class)
    return model_class


def find_architecture(name: str) -> str:
    """The stock type of an architecture as users type it: registered, or `package.module:Class`, which is imported."""
    return MODEL_CLASSES.find(name, lambda _: register_architecture)


def model_class_of(config_dict: dict, what: str, main_input_name: str | None = None) -> type[EarlyExitMixin]:
    """The early-exit class for a stock or early-exit checkpoint.

    Args:
        config_dict: its `config.json`.
        what: the name of the checkpoint in messages, for example `--model_name_or_path my-model`.
        main_input_name: `input_ids` or `pixel_values`, if the model must be one of texts or of images; `None`: any.

    Returns:
        the class.

    Raises:
        ExitConfigurationError: no class is registered for its type; the message lists the types, and how to add one.
    """
    found = config_dict.get("model_type")
    found = found if isinstance(found, str) else None
    stock = getattr(CONFIG_MAPPING[found], "stock_model_type", found) if found in CONFIG_MAPPING else found
    model_class = MODEL_CLASSES.get(stock)
    if model_class is not None and main_input_name in (None, model_class.main_input_name):
        return model_class
    fitting = [name for name, kind in MODEL_CLASSES.items() if main_input_name in (None, kind.main_input_name)]
    if model_class is not None:
        raise ExitConfigurationError(
            f"{what} is of type {found!r} and reads {model_class.main_input_name}; the types that read "
            f"{main_input_name} are: {', '.join(fitting)}."
        )
    if any(isinstance(config_dict.get(name), list) for name in ("depths", "hidden_sizes", "embed_dims")):
        raise ExitConfigurationError(
            f"{what} is of type {found!r}, whose hidden states have another width in each stage of layers, but exits "
            f"need the same width in all layers. Supported types: {', '.join(fitting)}."
        )
    raise ExitConfigurationError(
        f"{what} is of type {found!r}; supported types: {', '.join(fitting)}. To support another architecture, write "
        "an adapter of one file: see 'Add an architecture' in README.md."
    )


class AutoEarlyExitModel:
    """Loads a checkpoint into the early-exit class of its type, for texts or for images.

    Example:
        >>> model = een_hf.AutoEarlyExitModel.from_pretrained("my-finetuned-bert", exit_layers=[1, 2])
        >>> model.config.exit_layers  # the last layer always has an exit
        [1, 2, 3]
    """

    def __init__(self):
        raise OSError("AutoEarlyExitModel makes models by AutoEarlyExitModel.from_pretrained(name_or_folder).")

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path, **kwargs) -> EarlyExitMixin:
        """The early-exit model of a stock or early-exit checkpoint, with or without a fine-tuned head.

        Args:
            pretrained_model_name_or_path: Hub name or folder.
            **kwargs: as in `EarlyExitMixin.from_pretrained`, for example `exit_layers=[3, 6, 9]`.

        Returns:
            the model in eval mode.

        Raises:
            ExitConfigurationError: an architecture that is not supported, or an exit field that does not fit.
        """
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig):
            config_dict = config.to_dict()
        else:
            config_dict = checkpoint_config(config or pretrained_model_name_or_path, kwargs)
        model_class = model_class_of(config_dict, str(pretrained_model_name_or_path))
        return model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
