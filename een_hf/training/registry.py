"""Schemes by name."""

from ..models.registries import Registry
from .trainer import EarlyExitTrainer


_SCHEMES: dict[str, type[EarlyExitTrainer]] = Registry("--method")


def register_scheme(*names: str):
    """Class decorator: make a trainer known to `--method` under `names`; the first is its proper name."""

    def register(trainer_class: type[EarlyExitTrainer]) -> type[EarlyExitTrainer]:
        _SCHEMES.check_class(trainer_class, EarlyExitTrainer)
        trainer_class.scheme = names[0]
        _SCHEMES.update(dict.fromkeys(names, trainer_class))
        return trainer_class

    return register


def scheme_names() -> list[str]:
    """The proper names of all registered schemes, sorted."""
    return sorted({trainer_class.scheme for trainer_class in _SCHEMES.values()})


def registered_scheme(name: str) -> type[EarlyExitTrainer] | None:
    """The trainer class of a registered scheme, or `None`: what a file names is looked up and never imported."""
    return _SCHEMES.get(name)


def get_scheme(name: str) -> type[EarlyExitTrainer]:
    """The trainer class of a registered scheme, or of `package.module:Class`, which is imported: for what users type.

    Raises:
        ExitConfigurationError: an unknown name, a module or class that is not there, or no `EarlyExitTrainer`.
    """
    return _SCHEMES[_SCHEMES.find(name, register_scheme)]


def scheme_arguments() -> list[type]:
    """The arguments dataclasses of all registered schemes, for the parser."""
    classes = dict.fromkeys(trainer_class.arguments_class for trainer_class in _SCHEMES.values())
    return [arguments_class for arguments_class in classes if arguments_class is not None]
