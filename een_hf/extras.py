"""Which extra of een_hf brings a package that is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

from .models import ExitConfigurationError


_PACKAGES = {
    "train": ("accelerate", "datasets", "evaluate", "matplotlib", "pyarrow", "scipy", "sklearn"),
    "vision": ("PIL", "timm", "torchvision"),
    "export": ("onnx", "onnx_ir", "onnxruntime", "onnxscript"),
}
_EXTRA_OF = {package: extra for extra, packages in _PACKAGES.items() for package in packages}


class MissingPackageError(ExitConfigurationError, ImportError):
    """A package that an extra of een_hf brings is not installed."""


@contextmanager
def named_extras() -> Iterator[None]:
    """Around imports: one that fails for want of a package names the extra that brings it.

    Raises:
        MissingPackageError: a package of an extra is not installed. Other errors pass.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA_OF:
            raise
        raise MissingPackageError(
            f'This needs the package {package}, which is not installed: pip install "een_hf[{_EXTRA_OF[package]}]".'
        ) from error
