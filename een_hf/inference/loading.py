"""Loading a trained early-exit model and its processor from a folder or from the Hub."""

from typing import Any

import torch
from transformers import AutoImageProcessor, AutoTokenizer

from ..errors import loading
from ..extras import named_extras
from ..models import MODEL_CLASSES, EarlyExitMixin, ExitConfigurationError
from ..models.checkpoint_loading import checkpoint_config


DTYPES = ("float32", "bfloat16", "float16")  # of weights


def load_early_exit_model(
    name: str, *, device: str | None = None, dtype: str | None = None, what: str = "MODEL"
) -> EarlyExitMixin:
    """Load an early-exit model whose exits are trained.

    Args:
        name: folder or Hub name.
        device: for example `cuda:1`; default: the GPU if there is one.
        dtype: for example `bfloat16`; default: the checkpoint's.
        what: the argument by which the user gave `name`, for messages.

    Returns:
        the model in eval mode.

    Raises:
        ExitConfigurationError: no such model, one without exits, weights that are missing, a policy that does not fit,
            or no such device.
    """
    what = f"{what} {name}"
    with loading(what):
        config = checkpoint_config(name, {})
    if not config:
        raise ExitConfigurationError(f"{what} cannot be loaded: it holds no config.json.")
    found = config.get("model_type")
    model_class = next((kind for kind in MODEL_CLASSES.values() if kind.config_class.model_type == found), None)
    if model_class is None:
        raise ExitConfigurationError(
            f"{what} is of type {found!r} and has no exits: train them, or add them by `een-hf retrofit`."
        )
    with loading(what):
        model = model_class.from_pretrained(name, dtype=getattr(torch, dtype) if dtype else "auto").eval()
        model.get_exit_policy()
    if model.newly_initialized:
        raise ExitConfigurationError(f"{what} lacks weights, for example {min(model.newly_initialized)}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with loading(f"{what} on device {device}"):
        return model.to(device)


def load_processor(name: str, model: EarlyExitMixin, *, what: str = "MODEL") -> Any:
    """Load the tokenizer or image processor that is saved with a model.

    Args:
        name: folder or Hub name.
        model: the model.
        what: the argument by which the user gave `name`, for messages.

    Returns:
        the tokenizer or image processor.

    Raises:
        ExitConfigurationError: there is none, or it does not work.
    """
    if model.main_input_name != "input_ids":
        with loading(f"The image processor of {what} {name}"):
            processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
            _check_image_processor(processor, model)
        return processor
    with loading(f"The tokenizer of {what} {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        tokenizer("a")  # some damage shows only in use
        if not has_vocabulary(tokenizer):
            raise ExitConfigurationError("it has no vocabulary.")
    return tokenizer


def _check_image_processor(processor: Any, model: EarlyExitMixin) -> None:
    """Raise an error if the model cannot embed what the processor makes of an image."""
    with named_extras():
        from PIL import Image

        from ..data.transforms import EvaluationTransform

    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    image = Image.new("RGB", (width, height), "gray")
    pixels = EvaluationTransform(processor, model.config.num_channels)(image)
    if not pixels.isfinite().all():
        raise ExitConfigurationError("it gives pixels that are not finite.")
    with torch.inference_mode():
        model.embed(pixel_values=pixels[None].to(model.device, model.dtype))


def has_vocabulary(tokenizer: Any) -> bool:
    """Whether a tokenizer has more than special tokens: transformers makes one from nothing, which reads no text."""
    return len(tokenizer) > len(tokenizer.all_special_ids)
