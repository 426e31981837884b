"""Old names: what was moved or renamed still works, with a DeprecationWarning that names the new place or name."""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping
from functools import wraps


def moved_module(old: str, new: str) -> None:
    """Called by a module that moved: replaces it by the module at the new path, so that both are one object.

    Args:
        old: full path of the calling module.
        new: full path of the module that has its content now.
    """
    warnings.warn(f"{old} is deprecated: import {new} instead.", DeprecationWarning, stacklevel=3)
    sys.modules[old] = importlib.import_module(new)


def moved_names(module: str, places: Mapping[str, str]) -> Callable[..., object]:
    """The `__getattr__` of a module from which names moved.

    Args:
        module: full path of the module.
        places: by name, the full path of the module that has it now.

    Returns:
        the function.
    """

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
