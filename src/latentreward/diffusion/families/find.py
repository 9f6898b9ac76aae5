"""Recognition of the family of a pipeline from its configs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from latentreward.core.errors import InputError
from latentreward.core.programs import import_class, of_this_package
from latentreward.core.registry import backbone_names
from latentreward.diffusion.families.base import Family, PipelineConfigs

_SANA = "no family here has its VAE (AutoencoderDC) and prompts; give a class of your own as family (docs/families.md)"
UNSUPPORTED: Mapping[str, str] = dict.fromkeys(("SanaPipeline", "SanaSprintPipeline", "SanaTransformer2DModel"), _SANA)
"""Class of a pipeline or network in diffusers that belongs to no family → why it is refused."""


@cache
def families(*mentioning: str) -> dict[str, type[Family]]:
    """Return the families of this package by name, of all files or of those that hold one of the given words."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("[!_]*.py")):
        if mentioning and not any(word in file.read_text(encoding="utf-8") for word in mentioning):
            continue  # each import costs time
        module = import_module(f"{__package__}.{file.stem}")
        for kind in vars(module).values():
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
        theirs = next(base for base in type(family).__mro__ if "name" in vars(base))
        taken = backbone_names() | {name: kind.__module__ for name, kind in families().items()}
        if not of_this_package(theirs.__module__) and of_this_package(taken.get(family.name)):
            raise InputError(f"family: {theirs.__name__}.name is {family.name!r}, a name of this package; give another")
        family.check()
        return family
    configs = [pipeline.index, *(pipeline.config(part) for part in ("transformer", "unet") if pipeline.has(part))]
    names = [str(config.get("_class_name")) for config in configs]
    refused, known = dict(UNSUPPORTED), families(*names)  # a family's file names its classes
    for kind in known.values():
        refused |= kind.refused
    for name in names:
        if reason := refused.get(name):
            raise InputError(f"source={pipeline.source!r} is a {name}: {reason}")
    found = [kind for kind in known.values() if kind.recognises(pipeline)]
    found = found or [kind for kind in families().values() if kind.recognises(pipeline)]
    if len(found) != 1:
        titles = ", ".join(sorted(kind.title for kind in families().values()))
        raise InputError(
            f"source={pipeline.source!r} is of no known family (it holds a {names[-1]}); known are {titles}; give a "
            "class of your own as family"
        )
    family = found[0](pipeline)
    family.check()
    return family


def is_foreign(path: Any) -> bool:
    """Tell whether a setting ``family`` names a class outside this package, whose module would be imported."""
    return isinstance(path, str) and "." in path and not of_this_package(path)


def import_family(path: str) -> type[Family]:
    """Import a family by the import path of its class; see :func:`~latentreward.core.programs.import_class`.

    Whoever reads ``path`` from a file of others must ask :func:`is_foreign` first.
    """
    if "." not in path:
        raise InputError(
            f"family={path!r} cannot be imported: it is no path of a class, such as my_file.MyFamily; for a family of "
            "this package leave family out, which is found from the pipeline's configs"
        )
    return import_class("family", path, Family)
