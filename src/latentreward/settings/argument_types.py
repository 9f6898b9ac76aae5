"""Check of a call's arguments against the annotations, for settings that come from another's file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from latentreward.errors import InputError

SHOWN = 80
"""Number of characters of a wrong value that a message repeats."""


def check_types(target: Callable[..., Any], settings: Mapping[str, Any]) -> None:
    """Check that settings have the types that the parameters of ``target`` are annotated with.

    Numbers, texts, literals and lists of these are checked; other types, and names without a parameter, are not. A
    whole number is accepted as a float, a list as a tuple. JSON has NaN and infinity, which no parameter accepts.

    Raises:
        InputError: If a value has another type; names the first one.
    """
    parameters = signature(target, eval_str=True).parameters
    for name, value in settings.items():
        if name in parameters and not fits(value, parameters[name].annotation):
            shown = repr(value) if len(repr(value)) <= SHOWN else f"{repr(value)[:SHOWN]}…"
            raise InputError(f"{name} is {shown}, not {described(parameters[name].annotation)}")


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value has the annotated type ``kind``; a type that is not known here fits any value."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin in (Sequence, list, tuple):
        return isinstance(value, list | tuple) and items_fit(value, origin, arguments)
    if kind in (int, float):
        return (type(value) is int or type(value) is kind) and abs(value) < math.inf
    return isinstance(value, kind) if kind in (bool, str, NoneType) else True


def items_fit(values: Sequence[Any], origin: Any, arguments: tuple[Any, ...]) -> bool:
    """Tell whether the items of a list have the types of an annotation such as ``tuple[int, int]`` or ``list[str]``."""
    fixed = origin is tuple and Ellipsis not in arguments
    kinds = arguments if fixed else arguments[:1] * len(values)
    return len(kinds) == len(values) and all(map(fits, values, kinds))


def described(kind: Any) -> str:
    """Name an annotated type in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(map(described, arguments))
    if origin is Literal:
        return " or ".join(map(str, arguments))
    if origin in (Sequence, list, tuple):
        return "a list"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}.get(
        kind, str(kind)
    )
