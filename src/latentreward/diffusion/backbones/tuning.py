"""Choice of the weights of a backbone that train: all, none, or low-rank adapters."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import nn

from latentreward.core.errors import InputError
from latentreward.core.programs import of_this_package

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Name endings of the attention projections in diffusers' networks."""
PEFT_SETTINGS = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern",
    "use_rslora", "fan_in_fan_out", "layers_to_transform", "layers_pattern", "bias",
)  # fmt: skip
"""Entries of an ``adapter_config.json`` that are passed to PEFT: none of them imports or downloads anything."""


@dataclass
class LoRA:
    """Settings of low-rank adapters (arXiv:2106.09685), made by peft.

    Attributes:
        rank: Rank r of the matrices A and B.
        alpha: Scale; a layer's output gets alpha / rank · B A x added.
        dropout: Dropout probability of the input of A.
        target_modules: Name endings of the linear layers that get adapters; None takes the attention projections, or
            what the network's family names.
    """

    rank: int = 64
    alpha: float = 128.0
    dropout: float = 0.0
    target_modules: Sequence[str] | None = None


Tuning = Literal["full", "lora", "frozen"]
StorageDtype = Literal["float32", "bfloat16"]


def tune(network: nn.Module, tuning: Tuning, lora: LoRA, unread: Sequence[str] = ()) -> None:
    """Set which weights of ``network`` train, and add adapters with ``tuning="lora"``.

    Args:
        network: diffusers network, already without the blocks that no tap needs.
        tuning: ``full``, ``lora`` (only adapters train) or ``frozen``.
        lora: Adapter settings, used with ``lora``.
        unread: Names of modules and weights that no feature depends on; they are frozen and get no adapter.

    Raises:
        InputError: If no layer matches ``lora.target_modules``.
    """
    network.requires_grad_(tuning == "full")
    if tuning == "full":
        freeze(network, unread)
    elif tuning == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        endings = tuple(ATTENTION if lora.target_modules is None else lora.target_modules)
        targets = [
            name
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear)
            and any(name == ending or name.endswith(f".{ending}") for ending in endings)
            and not any(name == skipped or name.startswith(f"{skipped}.") for skipped in unread)
        ]
        if not targets:
            raise InputError(
                f"lora.target_modules={list(endings)} matches no linear layer; see the family's lora_targets"
            )
        config = LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            init_lora_weights="gaussian",
        )
        with shown_as_float32(network):
            inject_adapter_in_model(config, network)


def warn_of_layers(network: nn.Module, lora: LoRA, owner: Any) -> None:
    """Warn of names that no layer of a network has, and of linear layers beside those that get adapters.

    Names are those of the settings, or of the network's ``owner``: its family or backbone. A family of this package
    names layers of all its models, of which a network may lack some. Networks with fused projections, such as PRX's
    ``img_qkv_proj``, share a part of the default names.
    """
    given, kind = lora.target_modules, type(owner)
    endings = tuple(owner.lora_targets if given is None else given)
    layers = [name for name, _ in network.named_modules()]
    own = [name for name in endings if name not in ATTENTION and (given or not of_this_package(kind.__module__))]
    told = []
    if missing := [name for name in own if not any(f".{layer}".endswith(f".{name}") for layer in layers)]:
        field = "lora.target_modules" if given else f"family: {kind.__name__}.lora_targets"
        told.append(f"{field}: no layer of {type(network).__name__} is named {', '.join(missing)}")
    if endings == ATTENTION:
        linear = [name for name in layers if isinstance(network.get_submodule(name), nn.Linear)]
        found = {name: ending for ending in endings for name in linear if name.endswith(f".{ending}")}
        attentions = {name.removesuffix(ending) for name, ending in found.items()}
        names = {name.removeprefix(one) for one in attentions for name in linear if name.startswith(one)}
        if beside := sorted(names - {*endings}):
            told.append(
                f"lora: only {', '.join(sorted({*found.values()}))} get adapters, not {', '.join(beside)} of the same "
                "layers; name all in lora.target_modules or in the family's lora_targets"
            )
    if told:
        from lightning.pytorch.utilities import rank_zero_warn  # seconds of a command's start otherwise

        for line in told:
            rank_zero_warn(line)


def freeze(network: nn.Module, names: Iterable[str]) -> None:
    """Freeze the modules and weights of ``network`` that have these names."""
    for name in names:
        attrgetter(name)(network).requires_grad_(False)


@contextmanager
def shown_as_float32(network: nn.Module) -> Iterator[None]:
    """Let the weights of ``network`` look like float32 inside the block, without memory.

    peft gives a new adapter the type of the layer's weight. In a half-precision type its initial values would be
    rounded, and depend on the type of the pipeline's files.
    """
    narrow = {weight: weight.data for weight in network.parameters() if weight.dtype != torch.float32}
    for weight, data in narrow.items():
        weight.data = torch.zeros((), device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for weight, data in narrow.items():
            weight.data = data
