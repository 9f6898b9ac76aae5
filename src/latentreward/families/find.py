"""Recognition of the family of a pipeline from its configs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import Any

from latentreward.errors import InputError, first_line
from latentreward.families.base import Family, PipelineConfigs
from latentreward.programs import check_import, find_modules_here

_SANA = "no family here has its VAE (AutoencoderDC) and prompts; give a class of your own as family (docs/families.md)"
UNSUPPORTED: Mapping[str, str] = dict.fromkeys(("SanaPipeline", "SanaSprintPipeline", "SanaTransformer2DModel"), _SANA)
"""Class of a pipeline or network in diffusers that belongs to no family → why it is refused."""


@cache
def families() -> dict[str, type[Family]]:
    """Return the families of this package by name, found by their files."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        module = import_module(f"{__package__}.{file.stem}") if not file.stem.startswith("_") else None
        for kind in vars(module).values() if module else ():
            if isinstance(kind, type) and issubclass(kind, Family) and kind.name and kind.__module__ == module.__name__:
                found[kind.name] = kind
    return found


def find_family(pipeline: PipelineConfigs, own: str | None = None) -> Family:
    """Return the family of a pipeline, checked; no weight is loaded.

    Args:
        pipeline: Configs of the pipeline.
        own: Import path of a family to use without asking those of this package.

    Raises:
        InputError: If no family knows the pipeline, its family refuses the variant, or ``own`` cannot be imported.
    """
    if own is not None:
        family = import_family(own)(pipeline)
        family.check_names()
        family.check()
        return family
    names = [str(pipeline.index.get("_class_name"))]
    for part in ("transformer", "unet"):
        names += [str(pipeline.config(part).get("_class_name"))] if pipeline.has(part) else []
    refused = dict(UNSUPPORTED)
    for kind in families().values():
        refused |= kind.refused
    for name in names:
        if reason := refused.get(name):
            raise InputError(f"source={pipeline.source!r} is a {name}: {reason}")
    found = [kind for kind in families().values() if kind.recognises(pipeline)]
    if len(found) != 1:
        known = ", ".join(sorted(kind.title for kind in families().values()))
        raise InputError(
            f"source={pipeline.source!r} is of no known family (it holds a {names[-1]}); known are {known}; give a "
            "class of your own as family"
        )
    family = found[0](pipeline)
    family.check()
    return family


def is_foreign(path: Any) -> bool:
    """Tell whether a setting ``family`` names a class outside this package, whose module would be imported."""
    return isinstance(path, str) and "." in path and not path.startswith(f"{__package__}.")


def import_family(path: str) -> type[Family]:
    """Import a family by the import path of its class, such as ``my_module.MyFamily``.

    The module may lie in the current folder. Whoever reads ``path`` from a file of others must ask :func:`is_foreign`
    first.

    Raises:
        InputError: If there is no such class, it is no family or abstract, or ``--restrict-imports`` does not allow it.
    """
    if is_foreign(path):
        check_import("family", path)
        find_modules_here([path])
    module, _, name = path.rpartition(".")
    if module.startswith("."):
        raise InputError(f"family={path!r} is relative; give the whole path of a class")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, ValueError, AttributeError) as error:
        raise InputError(
            f"family={path!r} cannot be imported ({first_line(error)}); give the path of a class"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Family)):
        raise InputError(f"family={path!r} is not a subclass of latentreward.families.Family")
    if isabstract(kind):
        raise InputError(f"family={path!r} is abstract; give a class that implements all of a family")
    return kind
