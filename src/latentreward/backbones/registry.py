"""Short names of ready-made backbones.

A backbone is made by a factory function, annotated with its return type, so that YAML can name it by class path. Names
registered here work without the path. This module imports neither torch nor diffusers: the command line reads it.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from latentreward.construction import Construction
from latentreward.errors import InputError, did_you_mean

Factory = TypeVar("Factory", bound=Callable[..., Any])

_PATHS: dict[str, str] = {
    name: f"latentreward.backbones.{module}.{name}"
    for module, names in (
        ("sd_unet", ("sd15", "sd21", "sdxl", "sd_tiny")),
        ("sd3_dit", ("sd3_medium", "sd35_medium", "sd35_tiny")),
    )
    for name in names
}


def register_backbone(factory: Factory) -> Factory:
    """Make a factory function known by its own name; use as a decorator in a plug-in.

    The backbone notes how it was made, so that a reward put together in Python can be saved.

    Raises:
        InputError: If the name is taken by another function.
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
    """Short name → import path of every known backbone."""
    return dict(_PATHS)


def create_backbone(name: str, /, **options: Any) -> Any:
    """Call the factory registered as ``name``.

    Raises:
        InputError: If no factory has that name.
    """
    from importlib import import_module

    if name not in _PATHS:
        raise InputError(f"unknown backbone {name!r}{did_you_mean(name, _PATHS)}")
    module, function = _PATHS[name].rsplit(".", 1)
    return getattr(import_module(module), function)(**options)
