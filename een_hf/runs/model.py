"""The model of a run: from a checkpoint or from scratch, with the labels of the data."""

from dataclasses import dataclass
from typing import Any

import torch
import yaml
from transformers import PreTrainedConfig

from ..data.label_ids import model_label_ids
from ..data.label_values import REGRESSION
from ..data.samples import model_source
from ..data.task import Modality, TaskData
from ..errors import in_one_line, loading
from ..models import EarlyExitMixin, ExitConfigurationError
from ..models.auto import model_class_of
from ..models.checkpoint_loading import checkpoint_config
from ..models.criteria import resolve_problem_type
from ..models.exit_config import is_classifier
from ..training.arguments import ModelArguments
from ..training.history import history_of
from .arguments import RunArguments


@dataclass
class LoadedModel:
    """The model that a run starts from.

    Args:
        model: the model with its exits.
        processor: tokenizer or image processor.
        history: flags of the runs that trained it (`history_of`).
        new_head: whether its last head is new, so that it is trained in this run.
    """

    model: EarlyExitMixin
    processor: Any
    history: list[dict | None]
    new_head: bool


def load_for_run(modality: Modality, args: RunArguments, data: TaskData) -> LoadedModel:
    """The model, fitted to the data flags, with its tokenizer or image processor.

    Raises:
        ExitConfigurationError: as `load_model` does, or a processor that is missing or does not fit.
    """
    name = args.model.model_name_or_path
    model = load_model(modality, args.model, data, trains=args.training.do_train)
    if not args.training.do_train and (missing := model.missing_weights()):
        raise ExitConfigurationError(
            f"--model_name_or_path {name} lacks weights, for example {missing[0]}: its answers would be random. Give "
            "a complete checkpoint, or train it first (--do_train)."
        )
    new_head = model.is_new_head(model.num_exits - 1)
    history = history_of(name, has_head=not new_head)
    modality.fit_model(model, args.data)
    processor = modality.load_processor(name and model_source(name), args.data, model.config, **_hub(args.model))
    return LoadedModel(model, processor, history, new_head)


def load_model(modality: Modality, args: ModelArguments, data: TaskData, trains: bool = True) -> EarlyExitMixin:
    """The early-exit model for `data`, from a checkpoint or from scratch.

    Its weights are in `--dtype`; by default in float32 if the run trains, else as stored.

    Raises:
        ExitConfigurationError: an architecture that this script does not train, a config field that does not exist, or
            a fine-tuned head with other labels than the data.
    """
    given = {name: getattr(args, name) for name in ("exit_layers", "exit_pooling", "exit_head")}
    given = {name: value for name, value in given.items() if value is not None}
    given["problem_type"] = data.problem_type
    dtype = args.dtype or ("float32" if trains or args.model_type else "auto")
    if args.model_type is not None:
        return _new_model(modality, args, data, dtype, given)
    model_class, config, fine_tuned = _read_config(modality, args, **given)
    _take_labels(config, args, data, fine_tuned)
    with loading(f"--model_name_or_path {args.model_name_or_path}"):
        return model_class.from_pretrained(
            model_source(args.model_name_or_path),
            config=config,
            ignore_mismatched_sizes=args.ignore_mismatched_sizes or not fine_tuned,
            attn_implementation=args.attn_implementation,
            dtype=dtype,
            **_hub(args),
        )


def labels_of_checkpoint(modality: Modality, args: ModelArguments) -> TaskData | None:
    """The problem and the labels of a fine-tuned checkpoint, which data must fit; `None` if the head is new."""
    if args.model_type is not None or args.ignore_mismatched_sizes:
        return None
    _, config, fine_tuned = _read_config(modality, args)
    if not fine_tuned:
        return None
    problem_type = resolve_problem_type(config.problem_type, config.num_labels)
    names = [config.id2label[index] for index in range(config.num_labels)]
    return TaskData({}, problem_type, None if problem_type == REGRESSION else names, [], "", "", None, [])


def _new_model(modality: Modality, args: ModelArguments, data: TaskData, dtype: str, given: dict) -> EarlyExitMixin:
    """A model from scratch (`--model_type`)."""
    if args.model_type not in modality.model_classes:
        raise ExitConfigurationError(
            f"--model_type {args.model_type} does not fit this script, which trains "
            f"{', '.join(modality.model_classes)}."
        )
    model_class = modality.model_classes[args.model_type]
    names = model_class.config_class.field_names()
    overrides = dict(pair.split("=") for pair in (args.config_overrides or "").split(",") if pair)
    unknown = sorted(overrides.keys() - names.keys())
    if unknown:
        raise ExitConfigurationError(
            f"--config_overrides names {unknown[0]!r}, which {model_class.config_class.__name__} lacks."
        )
    try:
        overrides = {names[name]: yaml.safe_load(value) for name, value in overrides.items()}
    except yaml.YAMLError as error:
        raise ExitConfigurationError(
            f"--config_overrides {args.config_overrides} cannot be read: {in_one_line(error)}"
        ) from error
    try:
        config = model_class.config_class(**overrides, **given)
        _set_labels(config, _label_names(data))
        return model_class(config).to(getattr(torch, dtype))
    except ExitConfigurationError:
        raise
    except Exception as error:  # numbers that do not fit together raise errors of many kinds
        raise ExitConfigurationError(
            f"--config_overrides {args.config_overrides} does not define a valid {model_class.__name__}: "
            f"{in_one_line(error)}"
        ) from error


def _take_labels(config: PreTrainedConfig, args: ModelArguments, data: TaskData, fine_tuned: bool) -> None:
    """Set the label names of the data in the config, unless the head is fine-tuned and has its own names."""
    if not fine_tuned or args.ignore_mismatched_sizes:
        _set_labels(config, _label_names(data))
    elif data.num_labels > config.num_labels or data.label_names is None and config.num_labels > 1:
        raise ExitConfigurationError(
            f"--model_name_or_path {args.model_name_or_path} has a head for {config.num_labels} labels, the data have "
            f"{data.num_labels}: give --ignore_mismatched_sizes to start with a new head, or another checkpoint."
        )
    elif data.num_labels == config.num_labels and data.label_names and _unnamed(config):
        ids = model_label_ids(data, config.label2id)
        _set_labels(config, dict(sorted(zip(ids, data.label_names, strict=True))))


def _read_config(modality: Modality, args: ModelArguments, **given) -> tuple[type, PreTrainedConfig, bool]:
    """The class for a checkpoint, its config with what is `given`, and whether it is a fine-tuned classifier."""
    name = args.model_name_or_path
    with loading(f"--model_name_or_path {name}"):
        found = checkpoint_config(model_source(name), _hub(args))
    model_class = model_class_of(found, f"--model_name_or_path {name}", modality.main_input_name)
    config_class = model_class.config_class
    if found.get("model_type") != config_class.model_type:  # a stock checkpoint, for which the defaults hold
        found = {name: value for name, value in found.items() if name != "model_type"}
    with loading(f"--model_name_or_path {name}"):
        config_class.from_dict(found)  # what is wrong in the file, before what does not fit in the flags
    config = config_class.from_dict(found, **given)
    return model_class, config, is_classifier(found.get("architectures"), model_class.__name__)


def _hub(args: ModelArguments) -> dict[str, Any]:
    return {"cache_dir": args.cache_dir, "revision": args.model_revision, "token": args.token}


def _unnamed(config: PreTrainedConfig) -> bool:
    return set(config.label2id) == {f"LABEL_{index}" for index in range(config.num_labels)}


def _label_names(data: TaskData) -> dict[int, str]:
    return dict(enumerate(data.label_names or [f"LABEL_{i}" for i in range(data.num_labels)]))


def _set_labels(config: PreTrainedConfig, names: dict[int, str]) -> None:
    config.id2label, config.label2id = names, {name: index for index, name in names.items()}
