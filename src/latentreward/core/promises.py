"""What the methods of a part must return: stated at its base class, compared wherever a derived class is called."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import is_dataclass
from functools import cache, wraps
from inspect import BoundArguments, Parameter, getattr_static, isfunction, signature
from pathlib import Path
from traceback import walk_tb
from typing import Any, ClassVar, Literal, Self, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from latentreward.core.errors import InputError, lacks, where
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
COUNT = "must be a whole number of at least 1"
KEPT = "_promises_kept"
"""Attribute of a part with the names of the methods that were compared."""
VALUES: ContextVar[bool] = ContextVar("VALUES", default=True)
"""Whether checks look at values, for which they wait for an accelerator; else at shapes and types alone."""


class Part(ABC):  # noqa: B024 - derived classes have the methods
    """Base of the classes from which users derive their own, and which YAML files name.

    A base class marks its methods by :func:`returns`. What such a method of a user's class returns is compared: in its
    first call whole, later by shape and type alone, which never waits for an accelerator. Classes of this package run
    as they are; its tests compare them.

    Attributes:
        needs: Names of attributes that a derived class must set.
        counts: Names of attributes that are a whole number of at least 1, or None.
    """

    needs: ClassVar[Sequence[str]] = ()
    counts: ClassVar[Sequence[str]] = ()

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        promises = [
            (name, *method.promise)
            for base in cls.__mro__
            for name, method in vars(base).items()
            if isfunction(method) and hasattr(method, "promise")
        ]
        if of_this_package(cls.__module__):
            return
        for name, *promise in promises:
            method = getattr(cls, name)
            missing = getattr(method, "__isabstractmethod__", False)
            if isfunction(method) and not missing and not hasattr(method, "compares"):
                setattr(cls, name, compared(method, name, *promise))

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Create the part; raise InputError if methods of its base class are missing or take other arguments."""
        if cls.__abstractmethods__:
            raise InputError(lacks(cls))
        check_methods(cls)
        part: Self = super().__new__(cls)
        return part


def returns(check: Check, each: bool = False, keeps: bool = False) -> Callable[[Method], Method]:
    """Mark a method of a base class with what it, and methods that override it, must return; results stay as they are.

    Results of ``super().method()`` are not compared: they are not the part's.

    Args:
        check: Compares a result.
        each: Whether values of each call are compared; for results on the CPU, and for rules that are called once in a
            rollout.
        keeps: Whether what the method is given is used after it, and must stay as it is; see :func:`unchanged`.
    """

    def mark(method: Method) -> Method:
        method.promise = check, each, keeps  # type: ignore[attr-defined]
        return method

    return mark


def compared(method: Method, name: str, check: Check, each: bool, keeps: bool) -> Method:
    """Return a method whose result is compared by ``check``; see :func:`returns`. ``name`` is that in the class."""
    bind = signature(method).bind

    def problem_of(result: Any, given: BoundArguments) -> str | None:  # in the order of the parameters, not of the call
        return check(result, *given.args, *given.kwargs.values())

    @wraps(method)
    def comparing(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            with unchanged(f"{type(self).__name__}.{name}", *((*args, *kwargs.values()) if keeps else ())):
                result = method(self, *args, **kwargs)
        except AttributeError as error:
            if "before Module.__init__() call" not in str(error):
                raise
            *_, (caller, line), _ = walk_tb(error.__traceback__)  # the last one is torch's
            place = f"{Path(caller.f_code.co_filename).name}:{line}"
            raise InputError(
                f"{type(self).__name__}.{name}: {error}; call super().__init__() first ({place})"
            ) from error
        except IndexError as error:  # for a row past the end, by which an iteration ends, or for one before it
            index = args[0] if name == "__getitem__" and args and isinstance(args[0], SupportsIndex) else -1
            if not 0 <= index < (length := len(self)):
                raise
            place = f"{type(self).__name__}.__getitem__({index}), although __len__ returned {length}"
            raise InputError(f"{place}: {error}{where(error)}") from error
        if getattr(type(self), name) is comparing:
            keep_promise(self, name, lambda: problem_of(result, bind(self, *args, **kwargs)), each)
        return result

    comparing.promise, comparing.compares = (check, each, keeps), True  # type: ignore[attr-defined]
    return comparing  # type: ignore[return-value]


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


def keep_promise(part: Any, method: str, problem: Callable[[], str | None], each: bool = False) -> None:
    """Raise InputError if ``problem()`` tells one of what a part's method returned; see :func:`returns`."""
    kept = vars(part).setdefault(KEPT, set())
    first = each or method not in kept
    check_needs(part)
    token = VALUES.set(first)
    try:
        found = problem()
    finally:
        VALUES.reset(token)
    if found:
        raise InputError(f"{type(part).__name__}.{method} returned {found}{place_of(getattr(type(part), method))}")
    kept.add(method)


@cache
def check_methods(cls: type[Part]) -> None:
    """Raise InputError for a user's method that does not take the arguments of the method that it overrides."""
    for base in cls.__mro__:
        for name, wanted in vars(base).items() if of_this_package(base.__module__) else ():
            method = getattr_static(cls, name)
            named = not name.startswith("_") or name in ("__call__", "__getitem__")
            if named and isfunction(wanted) and isfunction(method) and not of_this_package(method.__module__):
                check_takes(f"{cls.__name__}.{name}", method, wanted)


def check_takes(
    name: str, function: Callable[..., Any], wanted: Callable[..., Any], with_defaults: bool = True
) -> None:
    """Raise InputError if a user's function, ``name`` in messages, does not take the arguments of ``wanted``.

    ``with_defaults`` says whether it must take arguments that have a default in ``wanted``, too.
    """
    try:
        taken, needed = signature(function), signature(wanted).parameters
    except ValueError:  # of functions in C
        return
    kinds = {name: one.kind for name, one in needed.items() if with_defaults or one.default is Parameter.empty}
    by_place = [name for name, kind in kinds.items() if kind is Parameter.POSITIONAL_OR_KEYWORD]
    by_name = {name: None for name, kind in kinds.items() if kind is Parameter.KEYWORD_ONLY}
    try:
        if Parameter.VAR_POSITIONAL not in kinds.values():
            taken.bind(*by_place, **by_name)
    except TypeError as error:
        names = [", ".join(parameters) for parameters in (taken.parameters, needed)]
        raise InputError(f"{name}({names[0]}) must take ({names[1]}){place_of(function)}") from error


def check_needs(part: Part) -> None:
    """Raise InputError if an attribute that the part :attr:`~Part.needs` is missing, or one of its counts is none."""
    if isinstance(part, nn.Module) and "_modules" not in vars(part):
        place = place_of(type(part).__init__)
        raise InputError(f"{type(part).__name__} is not initialised; call super().__init__() in its __init__{place}")
    for name in part.needs:
        if not hasattr(part, name):
            base = next(base.__name__ for base in type(part).__mro__ if "needs" in vars(base))
            raise InputError(
                f"{type(part).__name__} lacks {name}, an attribute of {base}; set it, or call super().__init__()"
            )
    for name in [name for name in part.counts if not is_count(getattr(part, name))]:
        raise InputError(f"{type(part).__name__}.{name} is {getattr(part, name)!r:.200}, which {COUNT}, or None")


def is_count(value: Any) -> bool:
    """Tell whether a value is a whole number of at least 1, or None."""
    return value is None or (type(value) is int and value >= 1)


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
    if kind in ("bool", "floats") or values.is_meta or not len(values) or not VALUES.get():
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
    """Tell whether numbers are finite, so that results must be, too; true where checks do not look at values."""
    # Without detach a check within a checkpointed block would save tensors, which its recomputation does not.
    return not VALUES.get() or all(values.is_meta or bool(values.detach().isfinite().all()) for values in given)


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
        if right and isinstance(found, Part):
            check_needs(found)
        return None if right else f"{shown(found)}; it must be a {kind.__name__}{' or None' * also_none}"

    return check
