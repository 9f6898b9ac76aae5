"""Registry of backbone factories by short name, the calls that built them, and imports of classes by path.

A factory is a function that returns a backbone and is annotated with its return type, so that YAML can name the
function in ``class_path``. A registered factory may be named without its import path. This module imports neither torch
nor diffusers, because the command line imports it at every start.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from inspect import Parameter, isabstract, signature
from pathlib import Path
from typing import Any, Self, TypeVar, cast

from latentreward.core.errors import SEARCHED, InputError, did_you_mean, first_line, lacks, where

Kind = TypeVar("Kind")

MODULE_FOLDERS: list[str] = []
"""The folder of the call and those of its ``--config`` files, in which modules that settings name are searched."""


@cache
def of_this_package(path: str | None) -> bool:
    """Tell whether an import path, such as ``latentreward.reward.DRMHead``, or a module's name is of this package."""
    return within(path, ["latentreward"])


def of_framework(path: str | None) -> bool:
    """Tell whether an import path is of this package or of Lightning, and so none of the user's own code."""
    return within(path, ["latentreward", "lightning"])


def within(path: str | None, modules: Iterable[str]) -> bool:
    """Tell whether an import path is that of one of the modules, or of something inside one."""
    return f"{path}.".startswith(tuple(f"{module}." for module in modules))


def find_modules_here(settings: Iterable[Any]) -> None:
    """Append the current folder, or that of a ``--config`` file, to ``sys.path`` if a class path names a module in it.

    Otherwise ``sys.path`` stays unchanged. Libraries try to import optional packages, and would otherwise import a
    file of that name that somebody put beside a downloaded model or data set.
    """
    for package, _, rest in {value.partition(".") for value in settings if isinstance(value, str) and len(value) < 999}:
        if rest and package.isidentifier() and package not in sys.modules and find_spec(package) is None:
            folders = (folder for folder in (*MODULE_FOLDERS, str(Path.cwd())) if folder not in sys.path)
            sys.path += [folder for folder in folders if PathFinder.find_spec(package, [folder])][:1]


def import_class(setting: str, path: str, base: type[Kind]) -> type[Kind]:
    """Import a class by the path that a setting gives, such as ``my_module.MyClass``.

    The module may lie in the current folder or beside a ``--config`` file. Only a path that the user gave may be
    passed: importing runs the module.
    """
    if "." in path and not of_this_package(path):
        find_modules_here([path])
    module, _, name = path.rpartition(".")
    if module.startswith("."):
        raise InputError(f"{setting}={path!r} is relative; give the whole path of a class")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise InputError(
            f"{setting}={path!r} cannot be imported ({first_line(error)}){where(error)}; give the path of a class "
            f"{SEARCHED}"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, base)):
        wanted = f"{base.__module__}.{base.__name__}"
        raise InputError(f"{setting}={path!r} is not a subclass of {wanted}; give the path of a class derived from it")
    if isabstract(kind):
        raise InputError(f"{setting}={path!r}: {lacks(kind)}")
    return kind


@dataclass(frozen=True)
class Construction:
    """A call of a class or function, recorded as values that JSON can hold."""

    class_path: str
    init_args: dict[str, Any]  # in JSON types: tuples became lists, dataclasses became mappings

    @classmethod
    def of(
        cls, target: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], skip: int = 0
    ) -> Self | None:
        """Record the call ``target(*args, **kwargs)``; return None if an argument cannot be written as JSON.

        The first ``skip`` parameters are no settings, such as a head's first, the feature spec.
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
    if name not in _PATHS:
        raise InputError(f"unknown backbone {name!r}{did_you_mean(name, _PATHS)}")
    module, function = _PATHS[name].rsplit(".", 1)
    return getattr(import_module(module), function)


def create_backbone(name: str, /, **options: Any) -> Any:
    """Build a backbone with the factory registered as ``name``; raise InputError if there is none."""
    return factory_of(name)(**options)
