"""What an estimate builds without reading weights: the configs of the models in settings, and their rewards."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from omegaconf import OmegaConf
from omegaconf.resolvers import oc
from torch import Tensor

from latentreward.alignment import LatentReward, PolicySource
from latentreward.apps.estimate.pipelines import CLIP_MODELS, HUB_IDS, PIPELINES, write_pipelines
from latentreward.core.errors import InputError
from latentreward.core.settings.rewriting import shipped_configs
from latentreward.core.storage.hub import cached_files, is_hub_id
from latentreward.diffusion import DiffusionBackbone, Family
from latentreward.diffusion.backbones import loading
from latentreward.diffusion.families.instruct_pix2pix import InstructPix2Pix
from latentreward.diffusion.families.sd import StableDiffusion
from latentreward.diffusion.families.sd3 import StableDiffusion3
from latentreward.reward import RewardHead
from latentreward.reward.scorers import clip
from latentreward.reward.scoring.find import checkpoint_of
from latentreward.reward.scoring.importers import TrainedReward
from latentreward.reward.scoring.recipe import ModelRecipe, build_head
from latentreward.reward.scoring.stored import Model, PretrainedReward, StoredReward, is_model_folder

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
            for inner in value if isinstance(value, list) else [value]:
                if isinstance(inner, Namespace | dict):
                    self.replace(inner)

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
            parts = {kept: PIPELINES[kept]} if kept in PIPELINES else {}
            write_pipelines(self.folder, parts, [kept] if kept in CLIP_MODELS else [])
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


class Unread(StoredReward):
    """Stored reward that is built on the meta device from another's settings; its weights are never read."""

    recipe: ModelRecipe

    def __init__(self, stored: PretrainedReward | TrainedReward) -> None:
        self.stored, self.recipe = stored, stored.recipe

    def backbone(self) -> DiffusionBackbone:
        return self.stored.backbone()

    def head(self, backbone: DiffusionBackbone) -> RewardHead:
        with torch.device("meta"):
            return build_head(self.recipe.head, backbone.feature_spec)

    def load(self, kind: type[Model]) -> Model:
        with torch.device("meta"):
            backbone = self.backbone()
        return kind(backbone, self.head(backbone)).requires_grad_(False).eval()

    def adapter(self, backbone: DiffusionBackbone) -> dict[str, Tensor]:
        network = backbone.get_submodule(backbone.network_name)
        return {name: weight for name, weight in network.named_parameters() if ".lora_" in name}

    def same_base(self, part: str, weights: Any, source: str) -> bool:
        """Tell whether the reward's settings name ``source`` as their base; values of weights are not compared."""
        return source == self.on_meta_device.source


class UnreadReward(LatentReward):
    """Replacement for :class:`LatentReward`, whose arguments are those of :func:`find_settings` too.

    ``kept`` is the folder of :class:`ConfigSources`.
    """

    def __init__(self, path: str, usual: str, usual_base: str | None, kept: str, **options: Any) -> None:
        super().__init__(path, **options)
        sources = ConfigSources(Path(kept))
        settings = Namespace(path=path, usual=usual, usual_base=usual_base, **options)
        self.__dict__["stored"] = find_settings(settings, sources)


def replace_rewards(settings: Namespace, policy: PolicySource, sources: ConfigSources) -> None:
    """Replace rewards in a module's settings, in place, by those that read no weights."""
    kind = str(settings.get("class_path")).rpartition(".")[2]
    if kind == "StepAwareScorer":
        settings.init_args.weights = None
    if kind == "LatentReward":
        family = policy.resolve_family()
        settings.init_args.usual = usual_reward(family)
        # LPO steers SD2.1 with the reward of SD1.5, which has the same VAE.
        settings.init_args.usual_base = policy.source if getattr(family, "model", "") != "SD2.1" else None
        find_settings(settings.init_args, sources)
        settings.init_args.kept = str(sources.folder)
        settings.class_path = f"{UnreadReward.__module__}.{UnreadReward.__qualname__}"
        return
    for value in vars(settings).values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Namespace):
                replace_rewards(item, policy, sources)


def usual_reward(family: Family) -> str:
    """Return NAME of ``configs/model/NAME.yaml``, the reward that is usually trained for a model."""
    tiny = family.pipeline.named in loading.SHIPPED
    if isinstance(family, InstructPix2Pix):
        return f"lrm_ip2p_{'sdxl' if family.is_xl else 'sd15'}"
    if isinstance(family, StableDiffusion):
        return "lrm_tiny" if tiny else "lrm_sdxl" if family.is_xl else "lrm_sd15"
    if not isinstance(family, StableDiffusion3):
        return f"dina_lrm_{family.name}"
    if tiny:
        return "dina_lrm_tiny"
    if family.is_large:
        return "dina_lrm_sd35_large"
    return "dina_lrm_sd35" if family.config.get("qk_norm") else "lrm_sd3"


def find_settings(reward: Namespace, sources: ConfigSources) -> Unread:
    """Build a reward from the settings at its ``path``, else from the shipped file ``usual`` on ``usual_base``."""
    path, base = reward.path, reward.get("base")
    place = Path(path) if Path(path).exists() else cached_files(path, reward.get("revision"))
    trusted = bool(reward.get("trust_remote_code"))
    sources.used[path] = "its own settings"
    stored: PretrainedReward | TrainedReward | None = None
    if place is not None and is_model_folder(place):
        stored = PretrainedReward(place, base, trusted)
        stored.check_base_is_here()
    elif place is not None:
        with suppress(InputError):  # raised for the layouts of the papers' released files
            config = reward.get("config")
            stored = TrainedReward(checkpoint_of(place), config and Path(config), True, base, trusted)
    if stored is None and reward.get("config"):  # the reward is not trained yet: as its settings say
        stored = TrainedReward(Path(), Path(reward.config), base=base, trusted=True)
        sources.used[path] = f"{reward.config}, since no reward lies there"
    if stored is None:
        name = f"model/{reward.usual}.yaml"
        shipped = shipped_configs()  # not find_config, which prefers a file of the current folder
        if name not in shipped:
            raise InputError(
                f"path={path!r}: no reward lies there, and the package has no configs/{name} to count in its place; "
                "train the reward, or give the path of another"
            )
        stored = TrainedReward(Path(), shipped[name], base=base or reward.usual_base, trusted=True)
        head = stored.recipe.head.init_args  # of the text projection only the shape counts, which is the same without
        head |= dict.fromkeys({"text_projection_source"} & head.keys())
        sources.used[path] = f"configs/{name}"
    for part in (stored.recipe.backbone, stored.recipe.head):
        sources.replace(part.init_args)
    return Unread(stored)
