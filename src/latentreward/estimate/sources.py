"""Where the configs of an estimate come from: what is at hand, else what the package keeps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from omegaconf import OmegaConf
from omegaconf.resolvers import oc

from latentreward.errors import InputError
from latentreward.estimate.pipelines import CLIP_MODELS, HUB_IDS, PIPELINES, write_pipelines
from latentreward.storage.hub import cached_files

SOURCES = ("source", "processor", "text_projection_source", "base")
"""Settings that name a model."""


class ConfigSources:
    """Replaces the models that settings name by folders with their configs; nothing is downloaded.

    Args:
        folder: Where configs that the package keeps are written.

    Attributes:
        used: Model as the settings name it → where its configs came from.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.used = folder, dict[str, str]()

    def replace(self, settings: Any) -> None:
        """Replace every model in settings, in place."""
        items = vars(settings) if isinstance(settings, Namespace) else settings
        for name, value in list(items.items()):
            if name in SOURCES and isinstance(value, str):
                items[name] = self.find(value, items.get("revision"))
            elif isinstance(value, Namespace | dict):
                self.replace(value)
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, Namespace | dict):
                        self.replace(item)

    def find(self, source: str, revision: str | None = None) -> str:
        """Folder with the configs of ``source``; names that are no hub ids stay.

        Raises:
            InputError: If it is a hub id that is neither cached here nor kept in the package.
        """
        if Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/", "~")):
            if Path(source).exists():
                self.used[source] = "its folder"
            return source
        if (cached := cached_files(source, revision)) is not None:
            self.used[source] = "the local cache of the hub"
            return str(cached)
        if (kept := HUB_IDS.get(source)) is None:
            raise InputError(
                f"source={source!r} is not in the local cache of the hub, and the package keeps no configs of it; give "
                f"a folder with its configs, or one of {', '.join(HUB_IDS)}"
            )
        self.used[source] = "configs kept in the package"
        if not (self.folder / kept).is_dir():
            write_pipelines(
                self.folder,
                {kept: PIPELINES[kept]} if kept in PIPELINES else {},
                [kept] if kept in CLIP_MODELS else [],
            )
        return str(self.folder / kept)


def value_or_name(name: str, *default: Any) -> Any:
    """OmegaConf resolver ``oc.env`` that gives a variable's name where it is not set and has no default."""
    return oc.env(name, *default) if default or name in os.environ else f"${name}"


@contextmanager
def unset_variables() -> Iterator[None]:
    """Let settings name variables of the environment that are not set: paths of data that nobody reads."""
    replace = partial(OmegaConf.register_resolver, "oc.env", replace=True)
    replace(value_or_name)
    try:
        yield
    finally:
        replace(oc.env)
