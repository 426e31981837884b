"""Loading of the fine-tuned model with exits, which are not trained yet."""

import copy
import os

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.label_values import SINGLE_LABEL
from ..data.samples import model_source
from ..errors import loading
from ..models import EarlyExitMixin, ExitConfigurationError
from ..models.auto import model_class_of
from ..models.checkpoint_loading import checkpoint_config
from ..models.exit_config import is_classifier


def name_of(model: PreTrainedModel) -> str:
    """The name or folder that a loaded model came from; its class if it has none.

    Raises:
        ExitConfigurationError: something else than a model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise ExitConfigurationError(
            f"MODEL is a {type(model).__name__}: give a folder, a Hub name, or a loaded model of transformers."
        )
    return model.config.name_or_path or type(model).__name__


def load_model(
    given: str | os.PathLike | PreTrainedModel,
    *,
    text: bool,
    exit_layers: list[int] | None = None,
    exit_pooling: str | None = None,
    exit_head: str | None = None,
) -> EarlyExitMixin:
    """Load a fine-tuned classifier as an early-exit model.

    Args:
        given: folder, Hub name, or a loaded model, whose weights are copied.
        text: whether the rows are texts; else they are images.
        exit_layers: 1-based; default: every layer.
        exit_pooling: pooling of the exits; default: that of the kind of data.
        exit_head: head of the exits; default: the architecture's.

    Returns:
        the model in eval mode, without a policy, on the GPU if there is one.

    Raises:
        ExitConfigurationError: a model that does not exist or cannot be retrofitted.
    """
    if isinstance(given, PreTrainedModel):
        name, source, settings = name_of(given), None, _copy_of(given)
        found = settings["config"].to_dict()
    else:
        name, source, settings = os.fspath(given), model_source(os.fspath(given)), {}
        with loading(f"MODEL {name}"):
            found = checkpoint_config(source, {})
    model_class = model_class_of(found, f"MODEL {name}")
    if not is_classifier(found.get("architectures"), model_class.__name__):
        raise ExitConfigurationError(
            f"MODEL {name} has no classifier of sequences or images: its `architectures` in config.json are "
            f"{found.get('architectures')}. Give a fine-tuned one."
        )
    if (model_class.main_input_name == "input_ids") != text:
        flag, kind = ("--train_dir", "images") if text else ("--train_file", "text")
        raise ExitConfigurationError(f"MODEL {name} reads {kind}: give {flag}.")
    pooling = exit_pooling or model_class.config_class.default_exit_pooling
    fields = {"exit_layers": exit_layers, "exit_pooling": pooling, "exit_head": exit_head, "exit_policy": None}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers would report that the heads of the exits are missing
    try:
        with loading(f"MODEL {name}"):
            model = model_class.from_pretrained(source, **settings, **fields).eval()
    finally:
        logging.set_verbosity(verbosity)
    model.config.name_or_path = name
    _check_model(name, model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _copy_of(model: PreTrainedModel) -> dict:
    """The arguments by which `from_pretrained` copies a loaded model."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return {
        "config": config,
        "state_dict": {name: tensor.detach().clone() for name, tensor in model.state_dict().items()},
        "attn_implementation": config._attn_implementation,
        "dtype": model.dtype,
    }


def _check_model(name: str, model: EarlyExitMixin) -> None:
    config = model.config
    if model.is_new_head(model.num_exits - 1):
        raise ExitConfigurationError(
            f"MODEL {name} has no classifier of sequences or images: parameters of its last head are missing. "
            "Give a fine-tuned one."
        )
    if missing := model.missing_weights():
        raise ExitConfigurationError(
            f"MODEL {name} lacks weights, for example {missing[0]}: its answers would be random."
        )
    if config.num_labels < 2 or config.problem_type not in (None, SINGLE_LABEL):
        raise ExitConfigurationError(
            f"MODEL {name} is for {config.problem_type or 'regression'}; a retrofit needs {SINGLE_LABEL}, because it "
            "counts equal answers."
        )
    if config.exit_aggregation == "boosted":
        raise ExitConfigurationError(f"MODEL {name} is boosted: its exits cannot be trained one by one.")
    if model.num_exits == 1:
        raise ExitConfigurationError("--exit_layers names only the last layer: name earlier ones.")
