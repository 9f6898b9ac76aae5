"""Rewards of an alignment run whose settings are read, and whose weights are not."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from latentreward.backbones.sd_unet import unet_family
from latentreward.contracts import FeatureSpec
from latentreward.errors import InputError
from latentreward.estimate.sources import ConfigSources
from latentreward.heads import RewardHead
from latentreward.policies import PolicySource
from latentreward.rewards import LatentReward
from latentreward.scoring.layouts.base import SharingReward
from latentreward.scoring.layouts.find import checkpoint_of
from latentreward.scoring.layouts.model_folder import PretrainedReward, is_model_folder
from latentreward.scoring.layouts.recipe import ModelPart, build_head
from latentreward.scoring.layouts.run import TrainedReward, settings_beside
from latentreward.scoring.network import RewardNetwork
from latentreward.storage.hub import cached_files

USUAL = {
    "sd_tiny": "lrm_tiny",
    "sd35_tiny": "dina_lrm_tiny",
    "SD1.5": "lrm_sd15",
    "SD2.1": "lrm_sd15",
    "SDXL": "lrm_sdxl",
    "SD3": "lrm_sd3",
    "SD3.5": "dina_lrm_sd35",
}
"""Family of a policy → the shipped settings of the reward that is trained for it: configs/model/NAME.yaml."""


class Unread(SharingReward):
    """A stored reward on the meta device, of which no weight is read."""

    def _part(self) -> ModelPart:
        """Class and settings of the head."""
        raise NotImplementedError

    def _new_head(self, spec: FeatureSpec) -> RewardHead:
        with torch.device("meta"):
            return build_head(self._part(), spec).requires_grad_(False).eval()

    def load(self) -> RewardNetwork:
        """See :meth:`StoredReward.load`."""
        with torch.device("meta"):
            backbone = self._backbone()
        return RewardNetwork(backbone, self._new_head(backbone.feature_spec)).requires_grad_(False).eval()

    def head(self) -> RewardHead:
        """See :meth:`StoredReward.head`."""
        return self._new_head(self.on_meta_device.feature_spec)

    def adapter(self) -> dict[str, Tensor]:
        """See :meth:`StoredReward.adapter`."""
        network = self.on_meta_device.get_submodule(self.on_meta_device.network_name)
        return {name: weight for name, weight in network.named_parameters() if ".lora_" in name}

    def same_base(self, part: str, weights: Any, source: str) -> bool:
        """Whether both name the same base: what its weights would tell is not read."""
        return source == self.on_meta_device.source


class UnreadRun(Unread, TrainedReward):
    """A run's settings, or those of a shipped model file."""

    def _part(self) -> ModelPart:
        return self._parts["head"]


class UnreadFolder(Unread, PretrainedReward):
    """A model folder's settings."""

    def _part(self) -> ModelPart:
        return self.config.recipe.head


class UnreadReward(LatentReward):
    """A :class:`LatentReward` from settings alone.

    Args:
        stored: Its settings.
        settings: Arguments of the :class:`LatentReward`.
    """

    def __init__(self, stored: Unread, settings: Namespace) -> None:
        super().__init__(settings.path, share=settings.share, batch_size=settings.batch_size)
        self._stored = stored


def replace_rewards(settings: Any, policy: PolicySource, sources: ConfigSources) -> None:
    """Put an :class:`UnreadReward` in the place of each :class:`LatentReward` that settings name.

    Args:
        settings: Of a module; changed in place.
        policy: The module's policy.
        sources: Finds configs, and notes what it found.
    """
    for name, value in vars(settings).items():
        for index, item in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(item, Namespace):
                continue
            kind = str(item.get("class_path")).rpartition(".")[2]
            if kind == "StepAwareScorer":
                item.init_args.weights = None
            if kind != "LatentReward":
                replace_rewards(item, policy, sources)
            elif isinstance(value, list):
                value[index] = UnreadReward(find_settings(item.init_args, policy, sources), item.init_args)
            else:
                settings[name] = UnreadReward(find_settings(item.init_args, policy, sources), item.init_args)


def find_settings(reward: Namespace, policy: PolicySource, sources: ConfigSources) -> Unread:
    """Settings of a reward from its folder, else the shipped ones of the reward that is usual for the policy."""
    place = Path(reward.path) if Path(reward.path).exists() else cached_files(reward.path, reward.revision)
    found: UnreadRun | UnreadFolder | None = None
    options = {"base": reward.base, "trusted": reward.trust_remote_code}
    if place is not None and is_model_folder(place):
        found = UnreadFolder(place, **options)
        sources.replace(found.config.recipe.backbone.init_args)
    elif place is not None:
        try:
            checkpoint = checkpoint_of(place)
            found = UnreadRun(checkpoint, Path(reward.config or settings_beside(checkpoint)), **options)
        except InputError:  # one of the papers' layouts
            found = None
    if found is None:
        name = f"configs/model/{USUAL[family_of(policy)]}.yaml"
        shipped = Path(import_module("latentreward.configs").__path__[0]) / name.removeprefix("configs/")
        found = UnreadRun(Path(), shipped, base=reward.base, trusted=True)
        sources.used[reward.path] = name
    else:
        sources.used[reward.path] = "its own settings"
    if isinstance(found, UnreadRun):
        for part in found._parts.values():
            sources.replace(part.init_args)
    return found


def family_of(policy: PolicySource) -> str:
    """Key of :data:`USUAL`."""
    pipeline = policy.pipeline()
    if policy.source in USUAL:
        return policy.source
    if pipeline.has("unet"):
        return unet_family(pipeline.config("unet"))
    return "SD3.5" if pipeline.config("transformer").get("qk_norm") else "SD3"
