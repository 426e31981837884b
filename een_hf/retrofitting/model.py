"""The fine-tuned model, with exits that are not trained yet."""

import torch
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..data.label_values import SINGLE_LABEL
from ..data.samples import model_source
from ..errors import loading
from ..models import EarlyExitMixin, ExitConfigurationError
from ..models.auto import model_class_of
from ..models.exit_config import is_classifier


def load_model(
    name: str,
    *,
    text: bool,
    exit_layers: list[int] | None = None,
    exit_pooling: str | None = None,
    exit_head: str | None = None,
) -> EarlyExitMixin:
    """The early-exit model on the fine-tuned one, in eval mode, without a policy, on the GPU where there is one.

    Args:
        name: folder or Hub name.
        text: whether the rows are text; else they are images.
        exit_layers: 1-based; by default every layer.
        exit_pooling: what an exit reads; by default that of the kind of data.
        exit_head: by default the architecture's.

    Raises:
        ExitConfigurationError: a model that does not exist or cannot be retrofitted.
    """
    with loading(f"MODEL {name}"):
        found, _ = PreTrainedConfig.get_config_dict(model_source(name))
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
    logging.set_verbosity_error()  # that the exits' heads are missing is as it should be
    try:
        with loading(f"MODEL {name}"):
            model = model_class.from_pretrained(model_source(name), **fields).eval()
    finally:
        logging.set_verbosity(verbosity)
    _check_model(name, model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _check_model(name: str, model: EarlyExitMixin) -> None:
    config = model.config
    if model.is_new_head(model.num_exits - 1):
        raise ExitConfigurationError(
            f"MODEL {name} has no classifier of sequences or images: parameters of its last head are missing. "
            "Give a fine-tuned one."
        )
    if missing := model.missing_weights():
        raise ExitConfigurationError(
            f"MODEL {name} lacks weights, for example {missing[0]}: what it answers would be random."
        )
    if config.num_labels < 2 or config.problem_type not in (None, SINGLE_LABEL):
        raise ExitConfigurationError(
            f"MODEL {name} is for {config.problem_type or 'regression'}; answers that agree are counted for "
            f"{SINGLE_LABEL}."
        )
    if config.exit_aggregation == "boosted":
        raise ExitConfigurationError(f"MODEL {name} is boosted: its exits cannot be trained one by one.")
    if model.num_exits == 1:
        raise ExitConfigurationError("--exit_layers names only the last layer: name earlier ones.")
