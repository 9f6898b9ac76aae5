"""Reading of JSON files that were written elsewhere, with one-line errors."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from latentreward.errors import InputError, first_line

KINDS = {bool: "true or false", int: "a whole number from 1 on", float: "a finite number"}
"""Type of an entry that :func:`entry` returns → its description in messages."""

Kind = TypeVar("Kind", bool, int, float)


def read_config(path: Path, name: str | None = None, remedy: str = "download it again") -> dict[str, Any]:
    """Read a JSON file that holds an object.

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


def entry(config: Mapping[str, Any], field: str, kind: type[Kind], name: str, default: Kind | None = None) -> Kind:
    """Return an entry of a config that was written elsewhere.

    Args:
        config: Config of a part of a pipeline.
        field: Name of the entry.
        kind: ``bool``, ``int`` for sizes, which are at least 1, or ``float`` for other numbers.
        name: Name of the config in messages, such as ``source='...': vae``.
        default: Value of an entry that is missing or null; None if it must be there.

    Raises:
        InputError: If the entry is missing or not of this kind.
    """
    value = config.get(field)
    if value is None:
        value = default
    if value is None:
        raise InputError(f"{name} lacks {field}, which must be {KINDS[kind]}; get the pipeline as published")
    fits = type(value) is kind or (kind is float and type(value) is int)
    if not fits or (kind is int and value < 1) or not abs(value) <= sys.float_info.max:
        raise InputError(
            f"{name} has {field}={value!r:.80}, which must be {KINDS[kind]}; get the pipeline as published"
        )
    return value  # type: ignore[no-any-return]


def entries(
    config: Mapping[str, Any], field: str, kind: type[Kind], name: str, default: Sequence[Kind] = ()
) -> tuple[Kind, ...]:
    """Return the values of an entry that is a list; for the arguments and errors see :func:`entry`."""
    found = config.get(field)
    values = default if found is None else found
    if not isinstance(values, list | tuple) or not values:
        shown = f"lacks {field}" if found is None else f"has {field}={found!r:.80}"
        raise InputError(
            f"{name} {shown}, which must be a list, each value {KINDS[kind]}; get the pipeline as published"
        )
    return tuple(entry({field: value}, field, kind, name) for value in values)
