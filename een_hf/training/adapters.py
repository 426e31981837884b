"""PEFT models around early-exit models."""

import json
import os
from pathlib import Path

from torch import nn
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME

from ..hub.header import CARD_NAME
from ..hub.settings import last_part
from ..models import EarlyExitMixin, ExitConfigurationError


CONFIG_FOLDER = "base_config"


def without_adapter(model: nn.Module) -> nn.Module:
    """The model inside a PEFT model; any other model unchanged."""
    if isinstance(model, EarlyExitMixin) or not hasattr(model, "peft_config"):
        return model
    # Models of mixed adapters have no `get_base_model`.
    return model.get_base_model() if hasattr(model, "get_base_model") else model.base_model.model


def check_adapter(model: nn.Module, network: EarlyExitMixin, *, freezes_backbone: bool, trains: bool) -> None:
    """Check that a PEFT model has its adapter at all exits, and that no exit would stay random.

    Args:
        model: the PEFT model.
        network: the early-exit model inside.
        freezes_backbone: `--freeze_backbone`.
        trains: whether there are training rows.

    Raises:
        ExitConfigurationError: the message says what to change in the PEFT configuration.
    """
    for settings in model.peft_config.values():
        if settings.is_prompt_learning:
            raise ExitConfigurationError(
                f"{settings.peft_type.value} puts tokens before the input, which early exit would ignore in "
                "inference: use an adapter inside the layers, such as LoRA."
            )
    if freezes_backbone:
        raise ExitConfigurationError("--freeze_backbone keeps the backbone, which a PEFT model adapts: leave it out.")
    if not trains:
        return
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ExitConfigurationError("The PEFT model has nothing to train: load it with is_trainable=True.")
    for k in range(network.num_exits):
        if not network.is_new_head(k):
            continue
        own = {id(parameter) for head in network.exit_head_modules(k) for parameter in head.parameters()}
        for name, parameter in network.named_parameters():
            replaced = ".original_module." in name  # by the copy that is trained
            if id(parameter) in own and not replaced and not parameter.requires_grad:
                raise ExitConfigurationError(
                    f"Exit {k + 1} is new, but the PEFT model does not train its {name}, which would stay random: "
                    "give the PEFT configuration modules_to_save=model.head_module_names()."
                )


def save_base_config(network: EarlyExitMixin, folder: str | os.PathLike) -> None:
    """Save the config of the early-exit model, with its exits and policy, in a folder below that of its adapter.

    It has a separate folder, since transformers takes a folder with `config.json` for a complete model.
    """
    own = Path(folder, CONFIG_FOLDER)
    own.mkdir(exist_ok=True)
    network.config.to_json_file(own / CONFIG_NAME)


def hide_base_path(model: nn.Module, folder: str | os.PathLike) -> None:
    """In PEFT's files for a push, replace the path of a base model in a local folder by the last part of the path."""
    for name, settings in model.peft_config.items():
        path = settings.base_model_name_or_path
        for file in (Path(folder, "" if name == "default" else name, ADAPTER_CONFIG_NAME), Path(folder, CARD_NAME)):
            if path and file.is_file():
                text = file.read_text(encoding="utf-8")
                text = text.replace(json.dumps(path)[1:-1], last_part(path)).replace(path, last_part(path))
                file.write_text(text, encoding="utf-8")
