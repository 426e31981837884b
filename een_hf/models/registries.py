"""Names for the parts that a model is put together from; outside classes join them by the same functions."""

import importlib
from collections.abc import Callable


# Called with the class of every early-exit config that is made.
CONFIG_HOOKS: list[Callable[[type], object]] = []


class ExitError(Exception):
    """The base of all errors that this library raises on purpose; the message is meant for its user."""


class ExitConfigurationError(ExitError, ValueError):
    """An exit setting that does not fit the network, the problem or the data."""


class Registry(dict):
    """Parts by name; an unknown name is answered with the known.

    Args:
        setting: where a user names one, for messages: `exit_pooling (--exit_pooling)`.
    """

    def __init__(self, setting: str):
        super().__init__()
        self.setting = setting

    def __getitem__(self, name: str):
        """
        Raises:
            ExitConfigurationError: an unknown name; the known ones are listed.
        """
        if not isinstance(name, str) or name not in self:
            known = ", ".join(sorted(map(str, self)))
            raise ExitConfigurationError(
                f"{self.setting} is {name!r}; it must be one of: {known}; from elsewhere: package.module:Name."
            )
        return super().__getitem__(name)

    def find(self, name: str, register: Callable[[str], Callable]) -> str:
        """The name of a part as a user gives it: a registered name, or `package.module:Name`, which is imported.

        For what is typed only: what a file names is looked up and never imported.

        Args:
            name: as given.
            register: called with a name, returns the decorator that registers a part which its module leaves out.

        Raises:
            ExitConfigurationError: an unknown name, a module or part that is not there, or a part of another kind.
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
        """Raise ExitConfigurationError where a part is not a subclass of `base`."""
        if not (isinstance(part, type) and issubclass(part, base)):
            raise ExitConfigurationError(f"{self.setting}: {part!r} is not a subclass of {base.__name__}.")
