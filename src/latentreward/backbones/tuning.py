"""Which weights of a backbone train: all, none, or low-rank adapters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from latentreward.errors import InputError

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Attention projections of diffusers' networks."""
PEFT_SETTINGS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
    "use_rslora", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "bias",
)  # fmt: skip
"""Settings of PEFT's LoRA that are read: none of them imports, downloads or computes anything."""


@dataclass
class LoRA:
    """Low-rank adapters (arXiv:2106.09685) by peft.

    Attributes:
        rank: Inner width r.
        alpha: Scale; the update is alpha / rank · B A x.
        dropout: Dropout before A.
        target_modules: Name endings of the layers that get adapters; the default is every attention projection.
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    target_modules: Sequence[str] = ATTENTION


Tuning = Literal["full", "lora", "frozen"]
StorageDtype = Literal["float32", "bfloat16"]


def tune(network: nn.Module, tuning: Tuning, lora: LoRA, unread: Sequence[str] = ()) -> None:
    """Set which weights of ``network`` train.

    Args:
        network: diffusers network, already cut to the blocks that are read.
        tuning: ``full``, ``lora`` (adapters train, the rest is frozen) or ``frozen``.
        lora: Adapter settings, used with ``lora``.
        unread: Names of modules whose output nobody reads: they never train, and get no adapter.

    Raises:
        InputError: If no layer matches ``lora.target_modules``.
    """
    network.requires_grad_(tuning == "full")
    if tuning == "full":
        for name in unread:
            network.get_submodule(name).requires_grad_(False)
    elif tuning == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        endings = tuple(lora.target_modules)
        targets = [
            name
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear)
            and any(name == ending or name.endswith(f".{ending}") for ending in endings)
            and not any(name == skipped or name.startswith(f"{skipped}.") for skipped in unread)
        ]
        if not targets:
            raise InputError(f"lora.target_modules={list(endings)} matches no linear layer of the network")
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            init_lora_weights="gaussian",
        )
        inject_adapter_in_model(config, network)


def store_frozen(module: nn.Module, dtype: StorageDtype) -> None:
    """Keep frozen weights in ``dtype``; what trains stays float32.

    With pure bfloat16 parameters and a learning rate of 5e-5, weights above 0.016 never move.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else getattr(torch, dtype))
