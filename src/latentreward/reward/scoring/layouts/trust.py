"""Rule on which classes the files of a reward model may name.

Registered classes always load: backbones of :func:`~latentreward.core.registry.backbone_names`, heads that
``latentreward.reward`` exports, and families of ``latentreward.diffusion.families``. Any other class, and any
``${...}`` that OmegaConf would resolve on this machine, raises InputError before anything is imported, unless the user
trusts the model. A trusted class is imported from an installed package or the current folder, but never from the
model's own folder or the hub's cache.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from inspect import isabstract
from pathlib import Path
from types import ModuleType
from typing import Any

from latentreward.core.errors import InputError, did_you_mean
from latentreward.core.public_names import import_all, public_names
from latentreward.core.registry import backbone_names
from latentreward.core.settings.rewriting import show_secrets
from latentreward.diffusion import is_foreign
from latentreward.reward.heads.base import RewardHead

REMEDY = (
    "if you trust its author, give --trust_remote_code=true (in a YAML trust_remote_code: true beside its path, "
    "in Python trust_remote_code=True)"
)
MASK = "$\0{"  # replacement of ``${``, the start of an OmegaConf interpolation, in settings that must not be resolved


def registered_heads() -> dict[str, type[RewardHead]]:
    """Return the head classes that ``latentreward.reward`` exports, by name."""
    import_all(".reward.heads.")
    named = {name: getattr(sys.modules.get(module), name, None) for name, module in public_names().items()}
    heads = {name: kind for name, kind in named.items() if isinstance(kind, type) and issubclass(kind, RewardHead)}
    return {name: kind for name, kind in heads.items() if not isabstract(kind)}


def known_names(kind: str) -> Mapping[str, Any]:
    """Return the registered names of backbones or heads, as the keys of a mapping."""
    return backbone_names() if kind == "backbone" else registered_heads()


def registered_name(kind: str, class_path: str) -> str:
    """Return the registered name for an import path of a registered class; any other path is returned unchanged."""
    known = known_names(kind)
    package, _, last = class_path.rpartition(".")
    if package.startswith("latentreward.") and last in known:  # also by a path of an earlier version
        return last
    return {path: name for name, path in known.items() if isinstance(path, str)}.get(class_path, class_path)


def check_class(kind: str, name: str, trusted: bool) -> None:
    """Raise InputError if a class is neither registered nor, with ``trusted``, an import path; nothing is imported."""
    known = known_names(kind)
    if name in known:
        return
    if "." not in name:
        raise InputError(f"{kind}: unknown class {name!r}{did_you_mean(name, known)}")
    if not trusted:
        raise InputError(f"{kind}: class {name!r} is not registered and would be imported; {REMEDY}")


def check_family(settings: Mapping[str, Any], trusted: bool) -> None:
    """Raise InputError if settings name a family outside this package without ``trusted``; nothing is imported."""
    family = settings.get("family")
    if not isinstance(family, str | None):
        raise InputError(f"backbone: family={family!r:.80} is no import path; get the model again")
    if not trusted and is_foreign(family):
        raise InputError(f"backbone: family {family!r} is not of this package and would be imported; {REMEDY}")


def masked(settings: Any) -> Any:
    """Return a copy of settings in which OmegaConf finds no interpolation: each ``${`` is replaced by :data:`MASK`.

    Resolvers could read environment variables of this machine, and nested references could grow exponentially.
    """
    if isinstance(settings, Mapping):
        return {name: masked(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [masked(value) for value in settings]
    return settings.replace("${", MASK) if isinstance(settings, str) else settings


def check_masked(settings: Any) -> None:
    """Raise InputError if settings contain an interpolation that :func:`masked` replaced."""
    if isinstance(settings, Mapping | list):
        for value in settings.values() if isinstance(settings, Mapping) else settings:
            check_masked(value)
    elif isinstance(settings, str) and MASK in settings:
        shown = show_secrets(settings.replace(MASK, "${"))
        raise InputError(f"{shown!r} would be resolved on this machine; {REMEDY}")


class FolderGuard:
    """Import hook that raises InputError for modules in the given folders and leaves all others to Python's finders."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = [folder.resolve() for folder in folders]

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Raise InputError if the module ``name`` would be imported from one of the folders."""
        spec = PathFinder.find_spec(name, path, target)
        folders = () if spec is None else spec.submodule_search_locations or ()
        files = [spec and spec.origin, *(f"{folder}/*" for folder in folders)]
        for place in (Path(file).parent.resolve() for file in files if file):  # resolve: the hub's cache holds links
            if any(place.is_relative_to(folder) for folder in self.folders):
                raise InputError(f"module {name!r} lies in {place}, beside a model that came from others; install it")


@contextmanager
def guarded_imports(folder: Path | None = None) -> Iterator[None]:
    """Raise InputError for imports from ``folder`` or the hub's cache inside the block, wherever ``sys.path`` leads."""
    from huggingface_hub import constants

    guard = FolderGuard([Path(constants.HF_HUB_CACHE), *([] if folder is None else [folder])])
    sys.meta_path.insert(0, guard)
    try:
        yield
    finally:
        sys.meta_path.remove(guard)
