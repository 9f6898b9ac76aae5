"""Choice of the weights of a backbone that train: all, none, or low-rank adapters, and ranks of stored adapters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

import torch
from torch import nn

from latentreward.core.errors import InputError
from latentreward.core.registry import of_this_package
from latentreward.core.storage.json_files import checked

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
    """Set which weights of ``network`` train, and add adapters with ``lora``; what no feature depends on is frozen."""
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
    """Warn of names in the settings, or in a family or backbone of one's own, that no layer of the network has.

    A family of this package names layers of all its models, of which a network may lack some.
    """
    given, kind = lora.target_modules, type(owner)
    endings = tuple(owner.lora_targets if given is None else given)
    layers = [f".{name}" for name, _ in network.named_modules()]
    own = [name for name in endings if name not in ATTENTION and (given or not of_this_package(kind.__module__))]
    if missing := [name for name in own if not any(layer.endswith(f".{name}") for layer in layers)]:
        from lightning.pytorch.utilities import rank_zero_warn  # seconds of a command's start otherwise

        field = "lora.target_modules" if given else f"family: {kind.__name__}.lora_targets"
        rank_zero_warn(f"{field}: no layer of {type(network).__name__} is named {', '.join(missing)}")


def freeze(network: nn.Module, names: Iterable[str]) -> None:
    """Freeze the modules and weights of ``network`` that have these names."""
    for name in names:
        attrgetter(name)(network).requires_grad_(False)


@contextmanager
def shown_as_float32(network: nn.Module) -> Iterator[None]:
    """Let weights look like float32, without memory: peft rounds a new adapter to the type of the layer's weight."""
    narrow = {weight: weight.data for weight in network.parameters() if weight.dtype != torch.float32}
    for weight, data in narrow.items():
        weight.data = torch.zeros((), device=data.device).expand(data.shape)
    try:
        yield
    finally:
        for weight, data in narrow.items():
            weight.data = data


CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter in PEFT's format."""
PREFIX = "base_model.model."
"""Prefix that PEFT adds to the names of the network's tensors in its file."""
NAME_PATTERN = re.compile(r"\^?([\w.-]|\\[.dw-]){1,200}\$?")
"""Regular expressions that PEFT may match with names of layers: without repetition, which can take for ever."""
FEW = 100
"""Number of names in a setting, of which PEFT matches each with each layer, that is read of any adapter."""
PARTS = {"A.weight", "B.weight", "B.bias", "magnitude_vector.weight"}
"""Tensors of a layer's adapter by what follows ``LAYER.lora_`` in their names; the last one is DoRA's."""


def plain_name(name: str) -> str:
    """Return the name of an adapter's tensor without ``_orig_mod`` and ``default``, of torch.compile and peft."""
    name = re.sub(r"\b(lora_unet_)?_orig_mod[._]", r"\1", name)
    name = re.sub(r"\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+\.(weight|bias)$", r".\1.\2", name)
    return f"{name}.weight" if name.endswith(".lora_magnitude_vector") else name


def stored_ranks(network: nn.Module, shapes: Mapping[str, tuple[int, ...]], origin: str | None) -> dict[str, int]:
    """Return the rank of each layer of a stored adapter, whose tensors must all have a place in ``network``.

    ``shapes`` are those of the stored tensors by :func:`plain_name`. ``origin`` is their source, for messages; with
    None tensors without a place are left out.
    """
    sizes = {
        name.removesuffix(".base_layer"): (
            (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)
        )
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)
    }
    parts: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        layer, _, part = name.rpartition(".lora_")
        parts.setdefault(layer, {})[part] = shape
    ranks = {}
    for layer, found in parts.items():
        size, down, up = sizes.get(layer, ()), found.get("A.weight") or (0,), found.get("B.weight")
        if size and up and down[0] and down[1:] == size[1:] and up[:2] == (size[0], down[0]) and found.keys() <= PARTS:
            ranks[layer] = down[0]
    odd = [name for name in shapes if name.rpartition(".lora_")[0] not in ranks]
    if odd and origin:
        raise InputError(
            f"{origin} has {len(odd)} of {len(shapes)} tensors without a place in the network (no such layer, another "
            f"width, A or B alone, or no LoRA): {', '.join(odd)[:200]}; give an adapter of this network"
        )
    if not ranks and origin:
        raise InputError(f"{origin} holds no weight of an adapter; give one of this network")
    return ranks


def check_settings(settings: Mapping[str, Any], stored: Iterable[int], origin: str) -> None:
    """Check the settings of a stored adapter, whose patterns PEFT matches with the names of all layers."""
    stored = [*stored]
    for name, value in settings.items():
        if isinstance(value, list | Mapping) and len(value) > max(FEW, len(stored)):
            raise InputError(
                f"{origin}: {name} has {len(value)} entries for {len(stored)} stored layers; write one for a layer"
            )
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = settings.get(name, [])
        if value != "all-linear" and not isinstance(value, list):
            raise InputError(f"{origin}: {name} is {value!r:.200}; write a list of names of layers")
    for name in ("rank_pattern", "alpha_pattern"):
        if not isinstance(settings.get(name, {}), Mapping):
            raise InputError(f"{origin}: {name} is {settings[name]!r:.200}; write a mapping of names of layers")
    for name in ("rank_pattern", "alpha_pattern", "layers_pattern"):
        for pattern in settings.get(name, ()):
            if not isinstance(pattern, str) or not NAME_PATTERN.fullmatch(pattern):
                raise InputError(f"{origin}: {name} holds {pattern!r:.200}; write names of layers")
    for alpha in (settings.get("lora_alpha", 1), *settings.get("alpha_pattern", {}).values()):
        checked(float, alpha, f"{origin}: alpha", "write a finite number")
    known = {*stored}
    named = [settings["r"], *settings.get("rank_pattern", {}).values()] if "r" in settings else [*known]
    wrong = [rank for rank in named if type(rank) is not int or not 1 <= rank <= max(known, default=1)]
    if wrong or (wrong := [named[0] for rank in known if rank not in named]):
        raise InputError(f"{origin}: rank {wrong[0]!r:.200} does not fit the stored weights; get the files again")
