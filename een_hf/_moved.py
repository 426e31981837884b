"""Old import paths: what moved is found where it was, with a DeprecationWarning that names the new place."""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping


def moved_module(old: str, new: str) -> None:
    """Called by a module that moved: puts the one at the new path in its place, so that both are one object.

    Args:
        old: full path of the calling module.
        new: full path of the module to which its content went.
    """
    warnings.warn(f"{old} is deprecated: import {new} instead.", DeprecationWarning, stacklevel=3)
    sys.modules[old] = importlib.import_module(new)


def moved_names(module: str, places: Mapping[str, str]) -> Callable[..., object]:
    """The `__getattr__` of a module from which names moved.

    Args:
        module: full path of the module.
        places: by name, the full path of the module that holds it now.
    """

    def find(name: str, stacklevel: int = 2) -> object:
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        message = f"{module}.{name} is deprecated: import it from {places[name]}."
        warnings.warn(message, DeprecationWarning, stacklevel)
        return getattr(importlib.import_module(places[name]), name)

    return find


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
