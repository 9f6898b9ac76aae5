"""Reading of JSON files that were written elsewhere, with one-line errors."""

import json
from pathlib import Path
from typing import Any

from latentreward.errors import InputError, first_line


def read_config(path: Path, name: str | None = None, remedy: str = "download it again") -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Args:
        path: File.
        name: Name of the file in messages; None takes its path.
        remedy: What to do about a damaged file, for messages.

    Raises:
        InputError: If the file is not valid JSON, or does not hold an object.
    """
    name = name or str(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is damaged ({first_line(error)}); {remedy}") from error
    if not isinstance(config, dict):
        raise InputError(f"{name} is damaged (it holds a {type(config).__name__}); {remedy}")
    return config
