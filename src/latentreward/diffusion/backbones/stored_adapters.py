"""Checks of a stored adapter before its layers are made: a file must neither hang a command nor fill memory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from latentreward.core.errors import InputError
from latentreward.core.storage.json_files import checked

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
    """Return the name of an adapter's tensor without what torch.compile and peft add to it in memory.

    ``_orig_mod.to_q.lora_A.default.weight`` becomes ``to_q.lora_A.weight``.
    """
    name = re.sub(r"\b(lora_unet_)?_orig_mod[._]", r"\1", name)
    name = re.sub(r"\.(lora_A|lora_B|lora_magnitude_vector)\.[^.]+\.(weight|bias)$", r".\1.\2", name)
    return f"{name}.weight" if name.endswith(".lora_magnitude_vector") else name


def stored_ranks(network: nn.Module, shapes: Mapping[str, tuple[int, ...]], origin: str | None) -> dict[str, int]:
    """Return the rank of each layer of a stored adapter, whose tensors must all have a place in ``network``.

    Args:
        network: Network that the adapter is for; adapters that it already has do not matter.
        shapes: Shape of each stored tensor by its :func:`plain_name`, ``LAYER.lora_A.weight`` or such.
        origin: Source of the tensors, for messages; None leaves tensors without a place out.

    Raises:
        InputError: If a tensor is of no linear layer or convolution of ``network``, is of a kind other than
            :data:`PARTS`, has another width than its layer, or A is there without B.
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
    """Check the settings of a stored adapter, whose patterns PEFT matches with the names of all layers.

    Raises:
        InputError: If an expression is not a name with dots and escapes, a setting has another type, alpha is not
            finite, the ranks are not those of the stored tensors, or a setting has more names than there are layers.
    """
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
