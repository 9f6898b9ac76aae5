"""Registry of backbone factories by short name.

A factory is a function that returns a backbone and is annotated with its return type, so that YAML can name the
function in ``class_path``. A registered factory may be named without its import path. This module imports neither torch
nor diffusers, because the command line imports it at every start.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from latentreward.core.errors import InputError, did_you_mean


@dataclass(frozen=True)
class Construction:
    """A call of a class or function, recorded as values that JSON can hold.

    Attributes:
        class_path: Import path of the class or function that was called.
        init_args: Arguments by name, in JSON types: tuples became lists, dataclasses became mappings.
    """

    class_path: str
    init_args: dict[str, Any]

    @classmethod
    def of(
        cls, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], skip: int = 0
    ) -> Self | None:
        """Record the call ``target(*args, **kwargs)``; return None if an argument cannot be written as JSON.

        Args:
            target: Class or function.
            args: Positional arguments.
            kwargs: Named arguments.
            skip: Number of leading parameters to leave out because they are not settings, e.g. 1 for a head, whose
                first parameter is the feature spec.
        """
        function, first = (target.__init__, (None,)) if isinstance(target, type) else (target, ())  # type: ignore[misc]
        taken = signature(function)
        try:
            given = dict(taken.bind(*first, *args, **kwargs).arguments)
        except TypeError:
            return None  # the arguments do not fit the signature; the call itself raises the error
        for name in [*taken.parameters][: len(first) + skip]:
            given.pop(name, None)
        for parameter in taken.parameters.values():
            if parameter.kind is Parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        try:
            plain = json.loads(json.dumps(given, default=dataclasses.asdict))
        except (TypeError, ValueError, RecursionError):
            return None
        return cls(f"{target.__module__}.{target.__qualname__}", plain)


Factory = TypeVar("Factory", bound=Callable[..., Any])


# Found in the files of the families, which are not imported: that takes seconds.
_PATHS = {
    name: f"latentreward.diffusion.families.{file.stem}.{name}"
    for file in sorted((Path(__file__).parents[1] / "diffusion" / "families").glob("*.py"))
    for name in re.findall(r"^@register_backbone\ndef (\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE)
}


def register_backbone(factory: Factory) -> Factory:
    """Register a factory function under its own name; a decorator.

    The returned function also records its call in the backbone's ``built_by``. A reward that was built in Python can be
    saved only with that record.

    Raises:
        InputError: If another function is registered under the name.
    """
    name, path = factory.__name__, f"{factory.__module__}.{factory.__qualname__}"
    if _PATHS.setdefault(name, path) != path:
        raise InputError(f"backbone name {name!r} is taken by {_PATHS[name]}; rename {path}")

    @wraps(factory)
    def noted(*args: Any, **kwargs: Any) -> Any:
        backbone = factory(*args, **kwargs)
        if hasattr(backbone, "built_by"):
            backbone.built_by = Construction.of(factory, args, kwargs)
        return backbone

    return cast(Factory, noted)


def backbone_names() -> dict[str, str]:
    """Return the import path of every registered factory by short name."""
    return dict(_PATHS)


def factory_of(name: str) -> Any:
    """Import and return the factory registered as ``name``; raise InputError if there is none."""
    from importlib import import_module

    if name not in _PATHS:
        raise InputError(f"unknown backbone {name!r}{did_you_mean(name, _PATHS)}")
    module, function = _PATHS[name].rsplit(".", 1)
    return getattr(import_module(module), function)


def create_backbone(name: str, /, **options: Any) -> Any:
    """Build a backbone with the factory registered as ``name``; raise InputError if there is none."""
    return factory_of(name)(**options)
