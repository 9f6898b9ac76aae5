"""Which classes the files of a reward model may name: one rule for every place that loads one.

Registered classes (backbones of :func:`~latentreward.backbones.backbone_names`, heads that ``latentreward.heads``
exports) always load. Any other class, and any text that OmegaConf would resolve on this machine, is refused before
anything is imported, unless the user trusts the model; a class is then imported from what is installed or lies in the
current folder, but never from a published folder or the hub's cache.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import PathFinder
from inspect import isabstract
from pathlib import Path
from types import ModuleType
from typing import Any

import latentreward.heads
from latentreward.backbones import backbone_names
from latentreward.errors import InputError, did_you_mean
from latentreward.heads import RewardHead
from latentreward.settings.rewriting import show_secrets

REMEDY = (
    "if you trust its author, give --trust_remote_code=true (in a YAML trust_remote_code: true beside its path, "
    "in Python trust_remote_code=True)"
)
REEXPORTED = re.compile(r"latentreward\.(?:heads|backbones)\.(?:\w+\.)?(\w+)")
MASK = "$\0{"
"""What stands for the start of an interpolation that is not to be resolved."""


def registered_heads() -> dict[str, type[RewardHead]]:
    """Heads that ``latentreward.heads`` exports, by name."""
    exported = {name: getattr(latentreward.heads, name) for name in latentreward.heads.__all__}
    return {name: kind for name, kind in exported.items() if issubclass(kind, RewardHead) and not isabstract(kind)}


def known_names(kind: str) -> Mapping[str, Any]:
    """Registered names of a ``backbone`` or ``head``."""
    return backbone_names() if kind == "backbone" else registered_heads()


def registered_name(kind: str, class_path: str) -> str:
    """The registered name behind any of a class's paths; other paths stay as they are."""
    known = known_names(kind)
    ours = REEXPORTED.fullmatch(class_path)
    if ours and ours[1] in known:
        return ours[1]
    return {path: name for name, path in known.items() if isinstance(path, str)}.get(class_path, class_path)


def check_class(kind: str, name: str, trusted: bool) -> None:
    """Compare the class of a ``backbone`` or ``head`` with the registered ones; nothing is imported.

    Raises:
        InputError: If it is not registered and ``trusted`` is false, or is no class path.
    """
    known = known_names(kind)
    if name in known:
        return
    if "." not in name:
        raise InputError(f"{kind}: unknown class {name!r}{did_you_mean(name, known)}")
    if not trusted:
        raise InputError(f"{kind}: class {name!r} is not registered and would be imported; {REMEDY}")


def masked(settings: Any) -> Any:
    """Settings in which no text is an interpolation: resolvers read this machine, references can double without end."""
    if isinstance(settings, Mapping):
        return {name: masked(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [masked(value) for value in settings]
    return settings.replace("${", MASK) if isinstance(settings, str) else settings


def check_masked(settings: Any) -> None:
    """Raise InputError if settings hold what :func:`masked` has left unresolved."""
    if isinstance(settings, Mapping | list):
        for value in settings.values() if isinstance(settings, Mapping) else settings:
            check_masked(value)
    elif isinstance(settings, str) and MASK in settings:
        shown = show_secrets(settings.replace(MASK, "${"))
        raise InputError(f"{shown!r} would be resolved on this machine; {REMEDY}")


class FolderGuard:
    """A finder of modules that refuses those of some folders and leaves the rest to Python's own finders."""

    def __init__(self, folders: Iterable[Path]) -> None:
        self.folders = [folder.resolve() for folder in folders]

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        """Raise InputError if ``name`` would come from one of the folders."""
        spec = PathFinder.find_spec(name, path, target)
        files = (
            [] if spec is None else [spec.origin, *(f"{place}/*" for place in spec.submodule_search_locations or ())]
        )
        for place in (Path(file).parent.resolve() for file in files if file):  # files of the hub's cache are links
            if any(place.is_relative_to(folder) for folder in self.folders):
                raise InputError(f"module {name!r} lies in {place}, beside a model that came from others; install it")


@contextmanager
def guarded_imports(folder: Path | None = None) -> Iterator[None]:
    """Refuse imports from ``folder`` and from the hub's cache, wherever ``sys.path`` leads."""
    from huggingface_hub import constants

    guard = FolderGuard([Path(constants.HF_HUB_CACHE), *([] if folder is None else [folder])])
    sys.meta_path.insert(0, guard)
    try:
        yield
    finally:
        sys.meta_path.remove(guard)
