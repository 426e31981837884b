"""The settings of a run that may be published: no tokens, and of local paths only the last part."""

import os
import re
from typing import Any


_TOKEN = re.compile(r"(.*_)?token")


def hub_name(name: str | None, installed: tuple[str, ...] = ()) -> str | None:
    """Check that a name is a name on the Hub.

    Args:
        name: a name or path; `None`: none.
        installed: names of installed samples.

    Returns:
        `name`; `None` if it is an existing path, an installed sample, or no valid name.
    """
    if name is None or name in installed or os.path.exists(name):
        return None
    return name if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) else None


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Remove from settings what must not be pushed or logged: tokens, and all but the last part of local paths.

    Args:
        settings: values by name, which may be lists and dicts; names that end in `_dir` or `_file` are paths.

    Returns:
        the settings, for example for a model card.
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
    """The last part of a local path; anything else unchanged."""
    return name if hub_name(name) else os.path.basename(os.path.normpath(name)) or name
