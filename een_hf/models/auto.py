"""Which class a checkpoint gets: the registry of architectures, and one way in for all of them."""

import importlib

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from .modeling_een import EarlyExitMixin
from .registries import CONFIG_HOOKS, ExitConfigurationError, Registry


class _Architectures(Registry):
    """Early-exit classes; one that stands as `(module, name)` is imported when it is asked for."""

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


# By the type of the stock model, which flags, results and cards go by.
MODEL_CLASSES: dict[str, type[EarlyExitMixin]] = _Architectures("model_type (--model_type)")
# The Auto classes of transformers find a model by its config: whoever has one has the model's class registered.
CONFIG_HOOKS.append(lambda config_class: MODEL_CLASSES.get(config_class.stock_model_type))


def register_adapter(config_class: type[PreTrainedConfig], module: str, task: str) -> tuple[str, str]:
    """Make an architecture of this package known, its model not yet imported; returns the class's name and module."""
    name = config_class.__name__.removesuffix("Config") + f"For{task}"
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    MODEL_CLASSES[config_class.stock_model_type] = module, name
    return name, module


def register_architecture(model_class: type[EarlyExitMixin]) -> type[EarlyExitMixin]:
    """Class decorator: make an early-exit class known to the scripts, the commands and transformers' Auto classes."""
    MODEL_CLASSES.check_class(model_class, EarlyExitMixin)
    config_class = model_class.config_class
    images = model_class.main_input_name == "pixel_values"
    auto_class = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    MODEL_CLASSES[config_class.stock_model_type] = model_class
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    auto_class.register(config_class, model_class, exist_ok=True)
    # What is saved takes the files of this folder along, and so runs where een_hf is not installed.
    config_class.register_for_auto_class()
    model_class.register_for_auto_class(auto_class)
    return model_class


def find_architecture(name: str) -> str:
    """The stock type of an architecture, registered or `package.module:Class`, which is imported: for users' flags."""
    return MODEL_CLASSES.find(name, lambda _: register_architecture)


def model_class_of(config_dict: dict, what: str, main_input_name: str | None = None) -> type[EarlyExitMixin]:
    """The early-exit class for a stock or early-exit checkpoint.

    Args:
        config_dict: its `config.json`.
        what: what to call the checkpoint in messages: `--model_name_or_path my-model`.
        main_input_name: `input_ids` or `pixel_values`, where only models of text or of images will do.

    Raises:
        ExitConfigurationError: no class for its type; those that there are, and how to add one.
    """
    found = config_dict.get("model_type")
    stock = getattr(CONFIG_MAPPING[found], "stock_model_type", found) if found in CONFIG_MAPPING else found
    model_class = MODEL_CLASSES.get(stock)
    if model_class is not None and main_input_name in (None, model_class.main_input_name):
        return model_class
    fitting = [name for name, kind in MODEL_CLASSES.items() if main_input_name in (None, kind.main_input_name)]
    if model_class is not None:
        raise ExitConfigurationError(
            f"{what} is of type {found!r} and reads {model_class.main_input_name}; {main_input_name} are read by: "
            f"{', '.join(fitting)}."
        )
    if any(isinstance(config_dict.get(name), list) for name in ("depths", "hidden_sizes", "embed_dims")):
        raise ExitConfigurationError(
            f"{what} is of type {found!r}, whose width changes from one stage of layers to the next: exits need "
            f"hidden states of one width in all layers. They exist for: {', '.join(fitting)}."
        )
    raise ExitConfigurationError(
        f"{what} is of type {found!r}; exits exist for: {', '.join(fitting)}. Another architecture is one adapter "
        "file: see 'Add an architecture' in README.md."
    )


class AutoEarlyExitModel:
    """Picks the early-exit class by the type of a checkpoint, of text or of images."""

    def __init__(self):
        raise OSError("AutoEarlyExitModel makes models by AutoEarlyExitModel.from_pretrained(name_or_folder).")

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path, **kwargs) -> EarlyExitMixin:
        """The early-exit model of a stock or early-exit checkpoint, with or without a fine-tuned head.

        Args:
            pretrained_model_name_or_path: Hub name or folder.
            **kwargs: as `EarlyExitMixin.from_pretrained` takes them: `exit_layers=[3, 6, 9]` and the like.

        Raises:
            ExitConfigurationError: an architecture that has no exits, or an exit field that does not fit.

        Example:
            >>> model = AutoEarlyExitModel.from_pretrained("my-finetuned-model", exit_layers=[3, 6, 9])
        """
        config = kwargs.get("config")
        if isinstance(config, PreTrainedConfig):
            config_dict = config.to_dict()
        else:
            config_dict = EarlyExitMixin._checkpoint_config(config or pretrained_model_name_or_path, kwargs)
        model_class = model_class_of(config_dict, str(pretrained_model_name_or_path))
        return model_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
