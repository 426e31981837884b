"""The extras of een_hf: errors for missing packages name the extra that installs them."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from .errors import chain_of
from .models import ExitConfigurationError


_PACKAGES = {
    "train": ("accelerate", "datasets", "evaluate", "matplotlib", "psutil", "pyarrow", "scipy", "sklearn"),
    "vision": ("PIL", "timm", "torchvision"),
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "peft": ("peft",),
    "demo-app": ("gradio",),
    "export": ("onnx", "onnx_ir", "onnxruntime", "onnxscript"),
}
_EXTRA_OF = {package: extra for extra, packages in _PACKAGES.items() for package in packages}


class MissingPackageError(ExitConfigurationError, ImportError):
    """A package of an extra of een_hf is not installed."""


@contextmanager
def named_extras() -> Iterator[None]:
    """For imports inside the block: an error for a missing package names the extra that installs it.

    Raises:
        MissingPackageError: a package of an extra is not installed. Other errors pass.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = next((name for name in map(_package_of, chain_of(error)) if name in _EXTRA_OF), None)
        if package is None:
            raise
        raise MissingPackageError(
            f'This needs the package {package}, which is not installed: pip install "een_hf[{_EXTRA_OF[package]}]".'
        ) from error


def imported_on_use(package: str, names: Mapping[str, Sequence[str]]) -> Callable[[str], object]:
    """The `__getattr__` of a package whose modules are imported on first use.

    Args:
        package: full path of the package.
        names: for each module of the package, the names that it has.

    Returns:
        the function; its errors for missing packages name the extra.
    """
    module_of = {name: module for module, held in names.items() for name in held}

    def find(name: str) -> object:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        with named_extras():
            return getattr(importlib.import_module(f".{module_of[name]}", package), name)

    return find


def _package_of(error: BaseException) -> str:
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    return (name or "").partition(".")[0]
