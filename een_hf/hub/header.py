"""Whether a file is the card of a run."""

import os

import yaml
from huggingface_hub import ModelCard


CARD_NAME = "README.md"
TAG = "early-exit"


def is_run_card(path: str | os.PathLike) -> bool:
    """Whether a file was written by `write_model_card`.

    Args:
        path: the file.

    Returns:
        `False` also if it does not exist.
    """
    try:
        return os.path.isfile(path) and TAG in (ModelCard.load(path).data.tags or ())
    except (OSError, TypeError, ValueError, yaml.YAMLError):  # not the header of a card
        return False
