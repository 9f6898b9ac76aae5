"""Export of a trained adapter as a LoRA for ``load_lora_weights`` of diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentreward.backbones.tuning import LoRA
from latentreward.checkpoints.shards import require_finite, whole_tensor
from latentreward.families import Family
from latentreward.policies import POLICY, Policy
from latentreward.policies.checkpoint import ADAPTER, SavedAdapter
from latentreward.storage.durable import replacing

FILE = "pytorch_lora_weights.safetensors"
"""File name that diffusers looks for in a folder."""


@dataclass(frozen=True)
class TrainedLoRA:
    """The weights of a trained adapter without its network, not sharded, on the CPU.

    Attributes:
        weights: Tensors by the names ``LAYER.lora_A.weight`` and ``LAYER.lora_B.weight``, with LAYER the name of the
            layer in the network.
        settings: Rank, alpha, dropout and target modules of the adapter.
        family: Family of the network.

    Raises:
        InputError: If a weight is not finite.
    """

    weights: dict[str, Tensor]
    settings: LoRA
    family: Family

    def __post_init__(self) -> None:
        require_finite(self.weights, "the adapter")

    @classmethod
    def of_policy(cls, policy: Policy, dtype: torch.dtype = torch.float32) -> TrainedLoRA:
        """Copy the adapter of ``policy``; if weights are sharded, all ranks must call this method."""
        weights = {
            network_name(name): whole_tensor(weight).to(dtype)
            for name, weight in policy.named_parameters()
            if ADAPTER in name
        }
        config = policy.network.peft_config[POLICY]
        settings = LoRA(config.r, config.lora_alpha, config.lora_dropout, sorted(config.target_modules))
        return cls(weights, settings, policy.family)

    @classmethod
    def of_checkpoint(cls, saved: SavedAdapter, dtype: torch.dtype = torch.float32) -> TrainedLoRA:
        """Take the adapter of a checkpoint; only configs of the base pipeline are read."""
        weights = {network_name(name): weight.to(dtype) for name, weight in saved.weights.items()}
        return cls(weights, saved.source.lora, saved.source.resolve_family())

    def write_diffusers(self, folder: Path) -> Path:
        """Write :data:`FILE` into ``folder`` atomically, and return its path.

        The metadata hold rank and alpha, since diffusers otherwise assumes alpha = rank. Only a few of peft's settings
        are written, so that other versions of peft can read the file.
        """
        from diffusers import loaders  # importing the pipeline classes takes seconds and prints warnings

        used = self.settings
        targets = self.family.lora_targets if used.target_modules is None else used.target_modules
        metadata: dict[str, Any] = {"r": used.rank, "lora_alpha": used.alpha, "lora_dropout": used.dropout}
        metadata |= {"target_modules": list(targets), "rank_pattern": {}, "alpha_pattern": {}}
        layers = {
            f"{self.family.part}_lora_layers": self.weights,
            f"{self.family.part}_lora_adapter_metadata": metadata,
        }
        with replacing(folder / FILE) as partial:
            getattr(loaders, self.family.lora_loader).save_lora_weights(
                partial.parent, weight_name=partial.name, **layers
            )
        return folder / FILE


def network_name(name: str) -> str:
    """Convert a parameter's name in a :class:`Policy` to its name in a LoRA file, without prefix and adapter name."""
    return name.removeprefix("network.").replace(ADAPTER, ".")
