"""Loading an early-exit model from an early-exit or a stock checkpoint, and which weights the checkpoint had."""

from __future__ import annotations

import re

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, initialization
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

from .exit_config import is_classifier
from .exits import ExitHead
from .registries import ExitConfigurationError


logger = logging.get_logger(__name__)

# What PEFT adds to the name of a parameter that is trained as a copy, or whose layer is adapted.
_ADAPTER_PARTS = re.compile(r"\.(?:original_module|base_layer|modules_to_save\.[^.]+)(?=\.)")


def checkpoint_config(source: str, kwargs: dict) -> dict:
    """Read `config.json` of a checkpoint.

    Args:
        source: folder or Hub name.
        kwargs: keywords of `from_pretrained`, of which those of the Hub (`revision`, `token`, ...) are used.

    Returns:
        its content; empty if there is no such file.

    Raises:
        ExitConfigurationError: the file holds something else than fields.
        OSError: from transformers, for a file that is no JSON, or a model that does not exist.
    """
    hub_names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    hub_kwargs = {name: kwargs[name] for name in hub_names if name in kwargs}
    try:
        found = PreTrainedConfig.get_config_dict(source, **hub_kwargs)[0]
    except (RecursionError, TypeError):  # lists in lists in lists; a number, or null
        found = None
    if not isinstance(found, dict):
        raise ExitConfigurationError(f"The config.json of {source} holds no fields.")
    return found


def _own_tensors(head: ExitHead) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a head that are in no module of torch."""
    own = {}
    for prefix, module in head.named_modules():
        if not type(module).__module__.startswith("torch."):
            own |= dict(module.named_parameters(prefix, recurse=False))
            own |= dict(module.named_buffers(prefix, recurse=False))
    return own


class CheckpointLoadingMixin:
    """The part of `EarlyExitMixin` that loads checkpoints."""

    # Names of the parameters that the loaded checkpoint did not contain, including those of the last head if it was
    # not fine-tuned for classification; None: no checkpoint was loaded.
    newly_initialized: frozenset[str] | None = None

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, config=None, output_loading_info=False, **kwargs
    ):
        """As `PreTrainedModel.from_pretrained`, from an early-exit or a stock checkpoint, with or without a head.

        If a stock checkpoint has a fine-tuned classifier, the last exit gives the same logits as before, whatever
        `exit_pooling` the other exits use.

        Args:
            pretrained_model_name_or_path: Hub name or folder.
            *model_args: as in `PreTrainedModel.from_pretrained`.
            config: a stock or early-exit config, or the name or folder of one; `None`: the checkpoint's.
            output_loading_info: whether to return the loading info of transformers, too.
            **kwargs: as in `PreTrainedModel.from_pretrained`, and fields of the config, such as
                `exit_layers=[3, 6, 9]`.

        Returns:
            the model in eval mode, or model and loading info.

        Raises:
            ExitConfigurationError: a checkpoint of another architecture, an exit field that does not fit, or damaged
                weights.
        """
        if not isinstance(config, cls.config_class) or cls._config_fields() & kwargs.keys():
            config = cls._exit_config(config or pretrained_model_name_or_path, kwargs)
        pooling_known = config.last_exit_pooling is not None
        architectures = config.architectures
        if architectures is None and pretrained_model_name_or_path is not None:  # the user has built the config
            architectures = checkpoint_config(pretrained_model_name_or_path, kwargs).get("architectures")
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *model_args, config=config, output_loading_info=True, **kwargs
            )
        except SafetensorError as error:
            raise ExitConfigurationError(
                f"The weights of {pretrained_model_name_or_path} (safetensors) cannot be read: {error}"
            ) from error
        missing = set(info["missing_keys"]) | {key for key, *_ in info["mismatched_keys"]}
        if not is_classifier(architectures, cls.__name__):
            classifier = {id(parameter) for parameter in model.last_head_modules[-1].parameters()}
            missing |= {name for name, parameter in model.named_parameters() if id(parameter) in classifier}
        model.newly_initialized = frozenset(missing)
        if not pooling_known:
            model._keep_stock_head()
        return (model, info) if output_loading_info else model

    def _init_weights(self, module):
        """As in transformers, and own parameters and buffers of heads, as their constructors set them.

        Checkpoints are loaded into a model without storage: what its constructors set is lost.
        """
        super()._init_weights(module)
        if isinstance(module, ExitHead) and (own := _own_tensors(module)):
            for name, value in _own_tensors(type(module)(self.config)).items():
                initialization.copy_(own[name], value)

    def _keep_stock_head(self) -> None:
        """Let the last exit pool as the stock head does, if the checkpoint has this head and no other."""
        *early, last = (self.is_new_head(exit_index) for exit_index in range(self.num_exits))
        if last or not all(early):
            return
        self.config.last_exit_pooling = self.config.default_last_exit_pooling(stock_head=True)
        if self.config.exit_aggregation == "boosted":
            logger.warning(
                "The checkpoint has a fine-tuned head, but with exit_aggregation='boosted' the last exit predicts the "
                "sum of all exits: its predictions change until the model is trained."
            )

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As in torch, and also under the names that `save_pretrained` writes (for ViT those of older releases).

        `Trainer` loads checkpoints by this method, not by `from_pretrained`, which knows both.
        """
        own = self.state_dict()
        names = {id(tensor): name for name, tensor in own.items()}
        written = {name: names.get(id(tensor), name) for name, tensor in revert_weight_conversion(self, own).items()}
        renamed = {written.get(name, name): tensor for name, tensor in state_dict.items()}
        return super().load_state_dict(renamed, strict, assign)

    @classmethod
    def _exit_config(cls, source, kwargs: dict) -> PreTrainedConfig:
        """The early-exit config for `source` (a config, a folder or a Hub name); takes its fields out of `kwargs`."""
        if isinstance(source, PreTrainedConfig):
            config_dict = source.to_dict()
        else:
            config_dict = checkpoint_config(source, kwargs)
        found = config_dict.get("model_type")
        if found == cls.config_class.stock_model_type:
            del config_dict["model_type"]
        elif found != cls.config_class.model_type:
            raise ExitConfigurationError(
                f"{cls.__name__} takes checkpoints of type {cls.config_class.stock_model_type!r} or "
                f"{cls.config_class.model_type!r}, not {found!r}."
            )
        fields = {name: kwargs.pop(name) for name in cls._config_fields() & kwargs.keys()}
        return cls.config_class.from_dict(config_dict, **fields)

    @classmethod
    def _config_fields(cls) -> set[str]:
        """The fields of the config that are keywords of `from_pretrained`."""
        return cls.config_class.field_names().keys() | {"num_labels"}

    def is_new_head(self, exit_index: int) -> bool:
        """Whether a parameter of an exit's head was not in the checkpoint.

        The last head also counts as new if the checkpoint's `architectures` name no sequence or image classification.

        Args:
            exit_index: 0-based.

        Returns:
            `True` also if no checkpoint was loaded.
        """
        if self.newly_initialized is None:
            return True
        weights = {id(part) for module in self.exit_head_modules(exit_index) for part in module.parameters()}
        named = ((_ADAPTER_PARTS.sub("", name), parameter) for name, parameter in self.named_parameters())
        return any(id(parameter) in weights and name in self.newly_initialized for name, parameter in named)

    def missing_weights(self) -> list[str]:
        """The parameters outside the heads that were not in the checkpoint, and are random.

        Returns:
            their names.
        """
        missing, heads = self.newly_initialized or (), range(self.num_exits)
        known = {id(part) for k in heads for head in self.exit_head_modules(k) for part in head.parameters()}
        return [name for name, part in self.named_parameters() if name in missing and id(part) not in known]
