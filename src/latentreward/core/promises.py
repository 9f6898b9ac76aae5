"""What the methods of a part must return: stated at its base class, compared in the first call of a user's class."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import wraps
from inspect import isfunction, signature
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from latentreward.core.errors import InputError, lacks
from latentreward.core.registry import of_this_package

Method = TypeVar("Method", bound=Callable[..., Any])
Check = Callable[..., str | None]
"""Function of a result, part and arguments of the method. Returns what is wrong, "GOT; it must be WANTED", or None."""
Kind = Literal["numbers", "floats", "indices", "bool"]
KINDS = {
    "numbers": "finite numbers",
    "floats": "floating-point numbers",
    "indices": "whole numbers (int64)",
    "bool": "bool",
}
KEPT = "_promises_kept"  # Attribute of a part with the methods that were compared, and whether a graph was built


class Part(ABC):  # noqa: B024 - derived classes have the methods
    """Base of the classes from which users derive their own, and which YAML files name.

    A base class marks its methods by :func:`returns`. What such a method of a user's class returns is compared in its
    first call with a graph and in its first one without. Classes of this package run as they are, compared by
    :mod:`latentreward.testing`.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if of_this_package(cls.__module__):
            return
        for base in cls.__mro__:
            for name, promised in [*vars(base).items()]:
                method = getattr(cls, name, None)
                missing = getattr(method, "__isabstractmethod__", False)
                if hasattr(promised, "promise") and isfunction(method) and not (missing or hasattr(method, "compares")):
                    setattr(cls, name, compared(method, name, *promised.promise))

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Create the part; raise InputError if methods of its base class are missing."""
        if cls.__abstractmethods__:
            raise InputError(lacks(cls))
        part: Self = super().__new__(cls)
        return part


def returns(check: Check, each: bool = False) -> Callable[[Method], Method]:
    """Mark a method of a base class with what it, and methods that override it, must return; results stay as they are.

    Args:
        check: Compares a result.
        each: Whether the results of all calls are compared: those on the CPU, and of rules that a rollout calls once.
    """

    def mark(method: Method) -> Method:
        method.promise = check, each  # type: ignore[attr-defined]
        return method

    return mark


def compared(method: Method, name: str, check: Check, each: bool) -> Method:
    """Return a method whose result is compared by ``check``; see :func:`returns`. ``name`` is that in the class."""
    bind = signature(method).bind

    @wraps(method)
    def comparing(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        kept, call = vars(self).setdefault(KEPT, set()), (name, torch.is_grad_enabled())  # a validation comes first
        # Results of super().method() are not compared: they are not the part's.
        if getattr(type(self), name) is comparing and (each or call not in kept):
            given = bind(self, *args, **kwargs)  # in the order of the parameters, not of the call
            keep_promise(self, name, check, result, *given.args, *given.kwargs.values())
            kept.add(call)
        return result

    comparing.promise, comparing.compares = (check, each), True  # type: ignore[attr-defined]
    return comparing  # type: ignore[return-value]


def keep_promise(part: Any, method: str, check: Check, result: Any, *given: Any) -> None:
    """Raise InputError if ``check`` tells what is wrong with the result of a part's method."""
    if problem := check(result, *given):
        place = place_of(getattr(type(part), method))
        raise InputError(f"{type(part).__name__}.{method} returned {problem}{place}")


@contextmanager
def unchanged(name: str, *given: Any) -> Iterator[None]:
    """Raise InputError if the block changes a tensor of ``given`` in place; ``name`` is the part's in the message.

    The tensors' version counters tell it, for which nothing waits. Records of tensors are looked into.
    """
    found = [one for value in given for one in (vars(value).values() if is_dataclass(value) else (value,))]
    versions = [(one, one._version) for one in found if isinstance(one, Tensor) and not one.is_inference()]
    yield
    for one, version in versions:
        if one._version != version:
            problem = f"{name} changes a tensor {tuple(one.shape)} that it is given, which is used again"
            raise InputError(f"{problem}; let it change a copy, such as x.clone(), and no x.mul_(), x += or x[...] =")


def place_of(function: Any) -> str:
    """Return file and line of a function that is not this package's, in brackets; empty for others."""
    code = getattr(getattr(function, "__wrapped__", function), "__code__", None)
    if code is None or of_this_package(getattr(function, "__module__", None)):
        return ""
    return f" ({Path(code.co_filename).name}:{code.co_firstlineno})"


def tensor(
    shape: Callable[..., Sequence[int]], kind: Kind = "numbers", low: float = -math.inf, high: float = math.inf
) -> Check:
    """Return the check of a tensor; see :func:`wrong_tensor`. ``shape`` is a function of part and arguments."""
    return lambda found, *given: wrong_tensor(found, shape(*given), kind, low, high)


def wrong_tensor(
    found: Any, shape: Sequence[int], kind: Kind = "numbers", low: float = -math.inf, high: float = math.inf
) -> str | None:
    """Return what is wrong with what should be a tensor of a ``shape``, see :data:`Check`; −1 is a side of any length.

    Numbers are of a floating type, finite and from ``low`` to ``high``; ``floats`` may be infinite or NaN.
    """
    sides = tuple(shape)
    same = isinstance(found, Tensor) and found.ndim == len(sides)
    if not same or any(side not in (-1, length) for side, length in zip(sides, found.shape, strict=True)):
        wanted = f"a tensor {sides}".replace("-1", "any") if sides else "a scalar tensor"
        return f"{shown(found)}; it must be {wanted}"
    right = {"indices": found.dtype == torch.int64, "bool": found.dtype == torch.bool}
    if not right.get(kind, found.is_floating_point()):
        wanted = KINDS["floats" if kind == "numbers" else kind]
        return f"a tensor of {str(found.dtype).removeprefix('torch.')}; it must be {wanted}"
    values = found.detach().flatten()
    if kind in ("bool", "floats") or values.is_meta or not len(values):
        return None
    sound = values.isfinite()
    if (low, high) != (-math.inf, math.inf):
        sound &= (values >= low) & (values <= high)
    if sound.all():  # also of an estimate's stand-ins, which have no values and whose booleans are true
        return None
    bad = values[~sound]
    if (low, high) == (-math.inf, math.inf):
        return f"{bad[0].item()}; it must be {KINDS[kind]}"
    return f"{bad[0].item():g}; it must be numbers from {low:g} to {high:g}"


def has_values(tensor: Tensor) -> bool:
    """Tell whether a tensor has values: it is neither on the meta device nor an estimate's stand-in."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


def finite(*given: Tensor) -> bool:
    """Tell whether numbers are finite, so that results must be, too."""
    # Without detach a check within a checkpointed block would save tensors, which its recomputation does not.
    return all(values.is_meta or bool(values.detach().isfinite().all()) for values in given)


def detached(found: Tensor, given: Tensor) -> str | None:
    """Return what is wrong with a result without a gradient to what it is computed from, see :data:`Check`."""
    if found.requires_grad or not (given.requires_grad and torch.is_grad_enabled()):
        return None
    return "a tensor without a gradient; it must be computed by torch operations, without detach, item or no_grad"


def shown(found: Any) -> str:
    """Describe a result in a message: shape of a tensor, else type or a short value."""
    if isinstance(found, Tensor):
        return str(tuple(found.shape))
    return repr(found) if isinstance(found, int | float | bool | None) else type(found).__name__


def number(kind: Any, wanted: str, high: float = math.inf) -> Check:
    """Return the check of a number of a type from 0 to ``high``, which messages call ``wanted``."""

    def check(found: Any, *given: Any) -> str | None:
        return None if isinstance(found, kind) and 0 <= found <= high else f"{shown(found)}; it must be {wanted}"

    return check


def of_class(kind: type, also_none: bool = False) -> Check:
    """Return the check of an object of a class, or None under ``also_none``."""

    def check(found: Any, *given: Any) -> str | None:
        right = isinstance(found, kind) or (also_none and found is None)
        return None if right else f"{shown(found)}; it must be a {kind.__name__}{' or None' * also_none}"

    return check
