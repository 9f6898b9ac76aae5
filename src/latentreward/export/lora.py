"""A trained adapter as a LoRA that ``load_lora_weights`` of diffusers takes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentreward.backbones.tuning import LoRA
from latentreward.checkpoints.shards import require_finite, whole_tensor
from latentreward.policies import POLICY, DiTPolicy, Policy
from latentreward.policies.checkpoint import ADAPTER, SavedAdapter
from latentreward.storage.durable import replacing

FILE = "pytorch_lora_weights.safetensors"
"""Name that diffusers looks for in a folder."""
SD3 = "SD3LoraLoaderMixin"


@dataclass(frozen=True)
class TrainedLoRA:
    """An adapter apart from its network, whole and on the CPU.

    Attributes:
        weights: ``LAYER.lora_A.weight`` and ``LAYER.lora_B.weight``, by the network's own names.
        settings: Its rank and alpha.
        loader: Name of the part of such a network's pipeline class that saves and loads LoRAs.
    """

    weights: dict[str, Tensor]
    settings: LoRA
    loader: str

    def __post_init__(self) -> None:
        require_finite(self.weights, "the adapter")

    @classmethod
    def of_policy(cls, policy: Policy, dtype: torch.dtype = torch.float32) -> TrainedLoRA:
        """The adapter of ``policy`` as it is now; a collective call where weights are sharded."""
        weights = {
            network_name(name): whole_tensor(weight).to(dtype)
            for name, weight in policy.named_parameters()
            if ADAPTER in name
        }
        config = policy.network.peft_config[POLICY]
        settings = LoRA(config.r, config.lora_alpha, config.lora_dropout, sorted(config.target_modules))
        if isinstance(policy, DiTPolicy):
            return cls(weights, settings, SD3)
        return cls(weights, settings, unet_loader(policy.network.config.addition_embed_type))

    @classmethod
    def of_checkpoint(cls, saved: SavedAdapter, dtype: torch.dtype = torch.float32) -> TrainedLoRA:
        """The adapter of a checkpoint; of its base only configs are read."""
        weights = {network_name(name): weight.to(dtype) for name, weight in saved.weights.items()}
        base = saved.source.pipeline()
        if not base.has("unet"):
            return cls(weights, saved.source.lora, SD3)
        return cls(weights, saved.source.lora, unet_loader(base.config("unet").get("addition_embed_type")))

    @property
    def part(self) -> str:
        """What the pipeline calls the network."""
        return "transformer" if self.loader == SD3 else "unet"

    def write_diffusers(self, folder: Path) -> Path:
        """Write :data:`FILE` into ``folder``; it stands there whole or not at all.

        The metadata name rank and alpha, without which diffusers takes alpha = rank; of peft's settings only few, so
        that other versions of peft read them.
        """
        from diffusers import loaders  # not the pipeline, whose import takes seconds and prints remarks

        used = self.settings
        metadata: dict[str, Any] = {"r": used.rank, "lora_alpha": used.alpha, "lora_dropout": used.dropout}
        metadata |= {"target_modules": list(used.target_modules), "rank_pattern": {}, "alpha_pattern": {}}
        layers = {f"{self.part}_lora_layers": self.weights, f"{self.part}_lora_adapter_metadata": metadata}
        with replacing(folder / FILE) as partial:
            getattr(loaders, self.loader).save_lora_weights(partial.parent, weight_name=partial.name, **layers)
        return folder / FILE


def network_name(name: str) -> str:
    """A weight's name without the policy around the network, and without the adapter's name."""
    return name.removeprefix("network.").replace(ADAPTER, ".")


def unet_loader(addition_embed_type: str | None) -> str:
    """See :attr:`TrainedLoRA.loader`, for a U-Net, by an entry of its config."""
    return f"StableDiffusion{'XL' if addition_embed_type == 'text_time' else ''}LoraLoaderMixin"
