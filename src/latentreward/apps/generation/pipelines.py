"""Wrapping of a loaded diffusers pipeline as a policy, so that rewards can score its sampling states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from latentreward.errors import InputError
from latentreward.families import find_family
from latentreward.policies import AdapterSwitch, Policy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class LoadedPipeline:
    """Configs of a diffusers pipeline in memory, as a :class:`~latentreward.families.PipelineConfigs`.

    Args:
        pipeline: The pipeline.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self._pipeline = pipeline
        self.source = self.named = type(pipeline).__name__
        self.index: dict[str, Any] = {"_class_name": self.source, **pipeline.config}

    def has(self, part: str) -> bool:
        """See :meth:`PipelineConfigs.has`."""
        return getattr(self._pipeline, part, None) is not None

    def config(self, part: str) -> dict[str, Any]:
        """See :meth:`PipelineConfigs.config`."""
        if not self.has(part):
            raise InputError(f"this {self.source} has no {part}; give a whole text-to-image pipeline")
        loaded = getattr(self._pipeline, part)
        return {"_class_name": type(loaded).__name__, **loaded.config}

    def tensors(self, part: str, names: Sequence[str]) -> list[Tensor]:
        """See :meth:`PipelineConfigs.tensors`."""
        state = getattr(self._pipeline, part).state_dict()
        return [state[name].detach().cpu() for name in names]


def policy_of(pipeline: DiffusionPipeline, family: str | None = None) -> Policy:
    """Wrap a pipeline as a policy.

    Network and VAE are shared with the pipeline, and the pipeline's active LoRAs stay active. The policy has no text
    encoder: the pipeline encodes the prompts.

    Args:
        pipeline: The pipeline.
        family: Import path of a family of one's own; None finds the family among those of this package.

    Raises:
        InputError: If the pipeline is of no known family, or ``family`` cannot be imported.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = find_family(LoadedPipeline(pipeline), family)
    network = getattr(pipeline, found.part)
    layers = [module for module in network.modules() if isinstance(module, BaseTunerLayer)]
    active = list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))
    policy = Policy(network, found, vae=found.wrap_vae(pipeline.vae))
    if active:
        policy.adapters = AdapterSwitch(network, active)
    policy.source = type(pipeline).__name__
    return policy
