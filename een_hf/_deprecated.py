"""Old names: what was moved or renamed still works, with a DeprecationWarning that names the new place or name."""

import importlib
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec


# Modules that moved, and where their content is now.
_MODULES = {
    "een_hf.callbacks": "een_hf.training.callbacks",
    "een_hf.evaluation.calibration": "een_hf.calibration",
    "een_hf.onnx": "een_hf.inference.onnx",
    "een_hf.pipelines": "een_hf.inference.pipelines",
    "een_hf.training.forward_mode": "een_hf.training.l2w.forward_mode",
}
# Names that moved, by the module that had them: for each new module its names. The first two modules no longer exist.
_NAMES = {
    "een_hf.data.cifar": {
        "een_hf.data.image_arguments": ("ImageDataArguments",),
        "een_hf.data.images": ("IMAGES", "load_image_data"),
        "een_hf.data.sources": ("HUB_NAMES",),
    },
    "een_hf.training.experiment": {
        "een_hf.commands.train": ("main",),
        "een_hf.runs.arguments": ("RunArguments", "parse_arguments"),
        "een_hf.runs.costs": ("fitting_criterion",),
        "een_hf.runs.model": ("labels_of_checkpoint", "load_model"),
        "een_hf.runs.results": ("split_for_calibration",),
    },
    "een_hf.data.glue": {
        "een_hf.data.text": ("TEXT", "encode_text_data", "load_text_data"),
        "een_hf.data.text_arguments": ("TextDataArguments",),
        "een_hf.data.text_rows": ("prepare_rows", "text_columns"),
    },
    "een_hf.data.images": {
        "een_hf.data.decoding": ("color_mode", "decode_image", "standard_image", "warn_of_skipped"),
        "een_hf.data.transforms": ("seeded", "timm_transform"),
    },
    "een_hf.data.labels": {
        "een_hf.data.label_ids": ("model_label_ids",),
        "een_hf.data.label_streams": ("SHUFFLE_BUFFER",),
        "een_hf.data.label_values": ("PROBLEM_TYPES",),
    },
    "een_hf.data.streaming": {"een_hf.data.image_rows": ("ImageStream",)},
    "een_hf.data.task": {
        "een_hf.data.sources": ("check_splits",),
        "een_hf.data.splits": ("cut_validation_split",),
    },
    "een_hf.evaluation": {
        "een_hf.calibration": (
            "CalibrationReport",
            "budgeted_curve",
            "calibrate",
            "check_risk",
            "check_target_cost",
            "policy_row",
        ),
    },
    "een_hf.evaluation.results": {
        "een_hf.evaluation.curves": ("curve_area", "metric_at_cost"),
        "een_hf.evaluation.saved_logits": ("LOGITS_NAME", "load_exit_logits", "save_exit_logits"),
    },
    "een_hf.training.arguments": {"een_hf.training.publishing": ("publishing",)},
    "een_hf.training.trainer": {
        "een_hf.training.registry": (
            "get_scheme",
            "register_scheme",
            "registered_scheme",
            "scheme_arguments",
            "scheme_names",
        ),
        "een_hf.training.resuming": ("SCHEME_FILE",),
        "een_hf.training.sampling": ("EpochLengthGroupedSampler",),
    },
}


class _OldModules(MetaPathFinder, Loader):
    """Finds modules that no longer exist. One that moved is replaced by that at the new path: both are one object."""

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in _MODULES or fullname in _NAMES else None

    def exec_module(self, module) -> None:
        name = module.__name__
        if name in _NAMES:
            module.__getattr__ = moved_names(name)
            return
        warnings.warn(f"{name} is deprecated: import {_MODULES[name]} instead.", DeprecationWarning, stacklevel=2)
        sys.modules[name] = importlib.import_module(_MODULES[name])


def find_old_modules() -> None:
    """Let imports find the modules that moved, where nothing else finds them."""
    if not any(isinstance(finder, _OldModules) for finder in sys.meta_path):
        sys.meta_path.append(_OldModules())


def moved_names(module: str) -> Callable[..., object]:
    """The `__getattr__` of a module from which names moved.

    Args:
        module: full path of the module.

    Returns:
        the function.
    """
    places = {name: place for place, names in _NAMES[module].items() for name in names}

    def find(name: str, stacklevel: int = 2) -> object:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} is deprecated: import it from {places[name]}."
        warnings.warn(message, DeprecationWarning, stacklevel)
        return getattr(importlib.import_module(places[name]), name)

    return find


def renamed_argument(old: str, new: str) -> Callable[[Callable], Callable]:
    """Decorator of a function whose keyword argument was renamed.

    Args:
        old: its name before.
        new: its name now.

    Returns:
        the decorator.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def call(*args, **kwargs):
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"{function.__name__}() takes {new}, of which {old} is the old name: give one.")
                message = f"{function.__name__}({old}=) is deprecated: give {new}."
                warnings.warn(message, DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


class renamed_attribute:
    """The old name of a class attribute: reads the new one."""

    def __init__(self, new: str):
        self.new = new

    def __set_name__(self, owner, name: str):
        self.old = name

    def __get__(self, instance, owner):
        message = f"{owner.__name__}.{self.old} is deprecated: read {self.new}."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(owner if instance is None else instance, self.new)
