"""What of a run's settings may be shown: no tokens, and local paths by their last part only."""

import os
import re
from typing import Any


_TOKEN = re.compile(r"(.*_)?token")


def hub_name(name: str | None, installed: tuple[str, ...] = ()) -> str | None:
    """`name` if it can only be a name on the Hub: no folder, and none of the `installed` samples."""
    if name is None or name in installed or os.path.exists(name):
        return None
    return name if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) else None


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they may be pushed or logged: without tokens, and with the last part of local paths only.

    Args:
        settings: values by name, lists and dicts of them included; what ends in `_dir` or `_file` is a path.
    """
    return {
        name: None if _TOKEN.fullmatch(str(name)) else public_value(value, str(name).endswith(("_dir", "_file")))
        for name, value in settings.items()
    }


def public_value(value: Any, is_path: bool = False) -> Any:
    if isinstance(value, dict):
        return public_settings(value)
    if type(value) in (list, tuple):
        return type(value)(public_value(item, is_path) for item in value)
    if not isinstance(value, str) or not {"/", os.sep} & {*value}:
        return value
    return os.path.basename(os.path.normpath(value)) if is_path else last_part(value)


def last_part(name: str) -> str:
    """A local path by its last part; anything else as it is."""
    return name if hub_name(name) else os.path.basename(os.path.normpath(name)) or name
