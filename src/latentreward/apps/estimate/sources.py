"""Finder of the models' configs for an estimate: local folder, local hub cache, or configs that ship here."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from omegaconf import OmegaConf
from omegaconf.resolvers import oc

from latentreward.apps.estimate.pipelines import CLIP_MODELS, HUB_IDS, PIPELINES, write_pipelines
from latentreward.core.errors import InputError
from latentreward.core.storage.hub import cached_files, is_hub_id
from latentreward.diffusion.backbones import loading
from latentreward.reward.scorers import clip

SOURCES = ("source", "processor", "text_projection_source", "base")
"""Names of settings whose value is a model: a folder or a hub id."""


class ConfigSources:
    """Finder that replaces the models named in settings by local folders with their configs; downloads nothing.

    Configs that ship with the package are written into ``folder``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used = dict[str, str]()  # model as named in the settings → origin of its configs, in words
        self._found = set[str]()  # folders that replaced models

    def replace(self, settings: Any) -> None:
        """Replace every model in nested settings, in place."""
        items = vars(settings) if isinstance(settings, Namespace) else settings
        for name, value in list(items.items()):
            if name in SOURCES and isinstance(value, str):
                if unset := re.match(r"<(\w+)>", value):  # as value_or_name writes it
                    raise InputError(
                        f"{name}: the environment variable {unset[1]} is not set, and an estimate reads the configs of "
                        "this model; export it, or give a folder or OWNER/NAME"
                    )
                items[name] = self.find(value, items.get("revision"))
            elif isinstance(value, Namespace | dict):
                self.replace(value)
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, Namespace | dict):
                        self.replace(item)

    def find(self, source: str, revision: str | None = None) -> str:
        """Return the folder with the configs of ``source``; a name that is not a hub id is returned unchanged."""
        if source in self._found:
            return source
        if Path(source).exists() or not is_hub_id(source):
            if Path(source).exists():
                self.used[source] = "its folder"
            elif "/" not in source and source not in (*loading.SHIPPED, *clip.SHIPPED):  # an old hub id, such as gpt2
                raise InputError(f"source={source!r} is not a folder; give a folder with its configs, or OWNER/NAME")
            return source
        if (cached := cached_files(source, revision)) is not None:
            self.used[source] = "the local cache of the hub"
            self._found.add(str(cached))
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
        self._found.add(str(self.folder / kept))
        return str(self.folder / kept)


def value_or_name(name: str, *default: Any) -> Any:
    """Return an environment variable as ``oc.env`` does, or ``<NAME>`` if it is not set and has no default."""
    if default or name in os.environ:
        return oc.env(name, *default)
    return f"<{name}>"  # not $NAME, which is expanded in paths


@contextmanager
def unset_variables() -> Iterator[None]:
    """Allow ``${oc.env:NAME}`` of unset environment variables in settings: an estimate does not read these paths."""
    replace = partial(OmegaConf.register_resolver, "oc.env", replace=True)
    replace(value_or_name)
    try:
        yield
    finally:
        replace(oc.env)
