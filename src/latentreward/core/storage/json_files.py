"""Reading of JSON and other plain values that were written elsewhere, with one-line errors."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from inspect import signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ConfigDict, Field, FiniteFloat, PositiveInt, PydanticUserError, TypeAdapter, ValidationError

from latentreward.core.errors import InputError, did_you_mean, first_line, printable

Kind = TypeVar("Kind", bool, int, float)
Content = TypeVar("Content")
STRICT = ConfigDict(allow_inf_nan=False, extra="forbid")
"""Value of ``__pydantic_config__`` of a dataclass that :func:`checked` builds: finite numbers, no unknown names."""
ENTRIES: dict[type, Any] = {bool: bool, int: PositiveInt, float: FiniteFloat}
"""Type of an entry that :func:`entry` returns → what it accepts: sizes are at least 1."""
UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
"""Pydantic's errors about a name that a record does not have."""
SHOWN = 100  # number of characters of a value from elsewhere that a message repeats
MISSING = ("missing", "missing_argument")  # pydantic's errors about a name that a record lacks
PLAIN = (bool, int, float, str, NoneType)


def parse(text: bytes | str) -> Any:
    """Parse JSON; InputError, a ValueError too, if an object has a key twice, of which the last would win."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise InputError(f"key {shown(Counter(key for key, _ in pairs).most_common(1)[0][0])!r} is given twice")
    return found


def read_config(path: Path, name: str | None = None, remedy: str = "download it again") -> dict[str, Any]:
    """Read a JSON file that holds an object; raises InputError if it is damaged."""
    name = name or str(path)
    try:
        config = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{name} is damaged ({first_line(error)}); {remedy}") from error
    if not isinstance(config, dict):
        raise InputError(f"{name} is damaged (it holds a {type(config).__name__}); {remedy}")
    return config


def checked(kind: type[Content] | Any, value: Any, place: str = "", remedy: str = "") -> Any:
    """Check a plain value, as JSON and YAML hold it, against a type, and return it as that type.

    Types are checked strictly: a text is no number and a truth value none; numbers are finite. A whole number is also a
    float, a list also a tuple, and a mapping also a dataclass.

    Args:
        kind: Any type that pydantic knows.
        value: The value.
        place: Name of the value in messages; it may end in a colon and a blank, after which the faulty part is named.
        remedy: End of the message.

    Raises:
        InputError: If the value has another type; names the first fault, an unknown name before others.
    """
    try:
        return adapter(kind).validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        first = next((one for one in faults if one["type"] in UNKNOWN), faults[0])
        *parents, last = first["loc"] or ("",)
        inside = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        fault = f"{first['msg'].removeprefix('Value error, ')}, not {shown(repr(first['input']))}"
        if first["type"] in UNKNOWN:
            known = {one["loc"][-1] for one in faults if one["type"] in MISSING and [*one["loc"][:-1]] == parents}
            known |= {one.name for one in fields(kind)} if is_dataclass(kind) and not parents else set()
            fault = f"no setting has this name{did_you_mean(str(last), map(str, known))}"
        elif first["type"] in MISSING:
            fault = f"it is missing in {shown(first['input'])}"
        fault = fault.replace("Input should", "it must")
        inside = inside.removeprefix(".") if place[-1:] in ("", " ") else inside
        at = f"{place}{inside}".removesuffix(": ")
        raise InputError(f"{at}: {fault}{remedy and '; '}{remedy}") from error
    except (TypeError, ValueError, RecursionError) as error:  # it has other keys than texts, or is inside itself
        raise InputError(f"{place}: it is no plain value ({first_line(error)}){remedy and '; '}{remedy}") from error


def shown(value: Any) -> str:
    """Show the beginning of a value from elsewhere, in one printable line."""
    text = printable(" ".join(str(value).split()))
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


@cache
def adapter(kind: Any) -> TypeAdapter[Any]:
    """Return pydantic's check of a type, which refuses NaN and infinity; a record has a configuration of its own."""
    try:
        return TypeAdapter(kind, config=STRICT)
    except PydanticUserError:
        return TypeAdapter(kind)


def check_arguments(target: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Raise InputError for settings from JSON of other types than the parameters of ``target`` are annotated with.

    Numbers, texts, literals and lists of these are checked; other types, and names without a parameter, are not.
    """
    parameters = signature(target, eval_str=True).parameters
    for name, value in settings.items():
        if name in parameters and is_plain(parameters[name].annotation):
            checked(parameters[name].annotation, value, name)


def is_plain(kind: Any) -> bool:
    """Tell whether an annotation names only types of JSON: numbers, texts, null, literals, and lists of these."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType, Sequence, list, tuple):
        return all(one is Ellipsis or is_plain(one) for one in arguments)
    return kind in PLAIN or origin is Literal or (origin is Annotated and is_plain(arguments[0]))


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
    value = default if config.get(field) is None else config[field]
    if value is None:
        raise InputError(f"{name} lacks {field}; get the pipeline as published")
    found: Kind = checked(ENTRIES.get(kind, kind), value, f"{name}: {field}", "get the pipeline as published")
    return found


def entries(
    config: Mapping[str, Any], field: str, kind: type[Kind], name: str, default: Sequence[Kind] = ()
) -> tuple[Kind, ...]:
    """Return the values of an entry that is a list; for the arguments and errors see :func:`entry`."""
    several: Any = Annotated[tuple[ENTRIES[kind], ...], Field(min_length=1)]  # type: ignore[valid-type]
    return entry(config, field, several, name, default or None)  # type: ignore[type-var, arg-type]
