"""The registry of schemes."""

from ..models.registries import Registry
from .trainer import EarlyExitTrainer


_SCHEMES: dict[str, type[EarlyExitTrainer]] = Registry("--method")


def register_scheme(*names: str):
    """Class decorator that registers a trainer as a scheme.

    Args:
        *names: the names for `--method`; the first is the scheme's own name, the others are aliases.

    Returns:
        the decorator, for a subclass of `EarlyExitTrainer`.

    Raises:
        ExitConfigurationError: what is decorated is no subclass of `EarlyExitTrainer`.

    Example:
        >>> @een_hf.register_scheme("most_confident")
        ... class MostConfidentExitTrainer(een_hf.EarlyExitTrainer):
        ...     def sample_weights(self, losses, exit_logits):
        ...         confidence = exit_logits.softmax(-1).amax(-1)
        ...         return confidence.size(1) * confidence / confidence.sum(1, keepdim=True)
    """

    def register(trainer_class: type[EarlyExitTrainer]) -> type[EarlyExitTrainer]:
        _SCHEMES.check_class(trainer_class, EarlyExitTrainer)
        trainer_class.scheme = names[0]
        _SCHEMES.update(dict.fromkeys(names, trainer_class))
        return trainer_class

    return register


def scheme_names() -> list[str]:
    """The registered schemes.

    Returns:
        their own names, without aliases, sorted.
    """
    return sorted({trainer_class.scheme for trainer_class in _SCHEMES.values()})


def registered_scheme(name: str) -> type[EarlyExitTrainer] | None:
    """The trainer class of a registered scheme, or `None`. For names in files: nothing is imported for them."""
    return _SCHEMES.get(name)


def get_scheme(name: str) -> type[EarlyExitTrainer]:
    """The trainer class of a scheme.

    Args:
        name: a registered name, or `package.module:Class`, which is imported.

    Returns:
        the class.

    Raises:
        ExitConfigurationError: an unknown name, a module or class that does not exist, or no `EarlyExitTrainer`.
    """
    return _SCHEMES[_SCHEMES.find(name, register_scheme)]


def scheme_arguments() -> list[type]:
    """The arguments dataclasses of all registered schemes, for the parser."""
    classes = dict.fromkeys(trainer_class.arguments_class for trainer_class in _SCHEMES.values())
    return [arguments_class for arguments_class in classes if arguments_class is not None]
