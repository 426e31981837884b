"""Registries of the parts of a model, by name; classes of other packages are registered by the same functions."""

import importlib
from collections.abc import Callable


# Called with the class of every early-exit config that is created.
CONFIG_HOOKS: list[Callable[[type], object]] = []


class ExitError(Exception):
    """The base class of all errors of this library; their messages are written for users."""


class ExitConfigurationError(ExitError, ValueError):
    """A setting or input that does not fit the network, the problem or the data."""


class Registry(dict):
    """Parts by name.

    Args:
        setting: the setting by which users choose a part, for messages: `exit_pooling (--exit_pooling)`.
    """

    def __init__(self, setting: str):
        super().__init__()
        self.setting = setting

    def __getitem__(self, name: str):
        """The part of this name.

        Raises:
            ExitConfigurationError: an unknown name; the message lists the known names.
        """
        if not isinstance(name, str) or name not in self:
            known = ", ".join(sorted(map(str, self)))
            raise ExitConfigurationError(
                f"{self.setting} is {name!r}; it must be one of: {known}; or your own, as package.module:Name."
            )
        return super().__getitem__(name)

    def find(self, name: str, register: Callable[[str], Callable]) -> str:
        """The name of a part as users type it: a registered name, or `package.module:Name`, which is imported.

        Only for names that users type: names in files are looked up, and nothing is imported for them.

        Args:
            name: as given.
            register: called with a name, returns the decorator that registers a part. Used if the module of the part
                does not register it.

        Returns:
            the name under which the part is registered.

        Raises:
            ExitConfigurationError: an unknown name, a module or part that does not exist, or a part of another kind.
        """
        if name in self or ":" not in name:
            self[name]
            return name
        module_name, part_name = name.split(":", 1)
        try:
            part = getattr(importlib.import_module(module_name), part_name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ExitConfigurationError(f"{self.setting} is {name!r}, which cannot be imported: {error}.") from error
        if part not in self.values():
            register(name)(part)
        return next(known for known, registered in self.items() if registered is part)

    def check_class(self, part, base: type) -> None:
        """Raise ExitConfigurationError if a part is not a subclass of `base`."""
        if not (isinstance(part, type) and issubclass(part, base)):
            raise ExitConfigurationError(f"{self.setting}: {part!r} is not a subclass of {base.__name__}.")
