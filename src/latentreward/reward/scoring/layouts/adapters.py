"""Reading and writing of LoRA adapters in PEFT's format: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentreward.core.errors import InputError, one_line
from latentreward.core.storage.json_files import read_config
from latentreward.core.storage.safetensors_header import read_header
from latentreward.diffusion.backbones.stored_adapters import CONFIG, PREFIX, WEIGHTS, check_settings, stored_ranks
from latentreward.diffusion.backbones.tuning import PEFT_SETTINGS
from latentreward.reward.scoring.files import compare_tensors, existing_folder, read_safetensors

ADAPTER = "default"  # name of the adapter in the network's LoRA layers


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """Return the layers of ``network`` that have the adapter :data:`ADAPTER`, by name."""
    from peft.tuners.lora import LoraLayer

    modules = network.named_modules()
    return {name: one for name, one in modules if isinstance(one, LoraLayer) and ADAPTER in one.lora_A}


def names_in_file(network: nn.Module) -> dict[str, str]:
    """Return, for every tensor of the adapter, its name in PEFT's file → its name in ``network``."""
    names = (name for name, _ in network.named_parameters() if ".lora_" in name and f".{ADAPTER}." in name)
    return {PREFIX + name.replace(f".{ADAPTER}.", "."): name for name in names}


def write_adapter(network: nn.Module, folder: Path, base: str) -> None:
    """Write the adapter of ``network`` in the format that PEFT's ``from_pretrained`` reads."""
    folder.mkdir(parents=True)
    own = {name: network.get_parameter(full) for name, full in names_in_file(network).items()}
    state = {name: weight.detach().cpu().contiguous() for name, weight in own.items()}
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(adapter_settings(network, base), indent=2) + "\n")


def adapter_settings(network: nn.Module, base: str) -> dict[str, Any]:
    """Return the contents of ``adapter_config.json`` for the adapter of ``network``, derived from its LoRA layers.

    Only few entries are written, so that any version of PEFT reads the file.
    """
    layers = lora_layers(network)
    ranks = {name: layer.r[ADAPTER] for name, layer in layers.items()}
    alphas = {name: layer.lora_alpha[ADAPTER] for name, layer in layers.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    first = next(iter(layers.values()))
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": getattr(first.lora_dropout[ADAPTER], "p", 0.0),
        "r": rank,
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != alpha},
        "target_modules": list(layers),
        "use_rslora": bool(first.use_rslora.get(ADAPTER, False)),
    }


def inject_adapter(network: nn.Module, folder: Path) -> None:
    """Add the LoRA layers that the config in ``folder`` describes to ``network``, in float32 with initial values.

    The new tensors are trainable; all other parameters of the network are frozen.

    Raises:
        InputError: If a file is missing or damaged, or the config does not fit the network.
    """
    from peft import LoraConfig, inject_adapter_in_model

    path = existing_folder(folder, CONFIG, WEIGHTS) / CONFIG
    settings = read_config(path)
    known = {name: settings[name] for name in PEFT_SETTINGS if settings.get(name) is not None}
    try:
        header = read_header(folder / WEIGHTS)[0].items()
        shapes = {name.removeprefix(PREFIX): entry.shape for name, entry in header}
    except (ValueError, RecursionError) as error:
        raise InputError(f"cannot load {folder / WEIGHTS}: {error}; download it again") from error
    ranks = stored_ranks(network, shapes, None)  # read_lora names those that do not fit
    check_settings(known, ranks.values(), f"cannot load {path}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(LoraConfig(**known), network, ADAPTER)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, re.error) as error:
        raise InputError(f"cannot load {path}: {one_line(error)}; is this the adapter of that network?") from error
    for name in names_in_file(network).values():
        weight = network.get_parameter(name)
        weight.data = weight.data.float()


def read_lora(folder: Path, network: nn.Module) -> dict[str, Tensor]:
    """Read the tensors of the adapter in ``folder``, by their names in ``network``.

    Raises:
        InputError: If the file is missing or damaged, or a tensor is missing, unexpected or has the wrong shape.
    """
    path = existing_folder(folder, WEIGHTS) / WEIGHTS
    state = {name.removeprefix(PREFIX): tensor for name, tensor in read_safetensors(path).items()}
    own = {name.removeprefix(PREFIX): full for name, full in names_in_file(network).items()}
    compare_tensors({name: network.get_parameter(full) for name, full in own.items()}, state, path)
    return {own[name]: tensor for name, tensor in state.items()}


def fill_adapter(network: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy the tensors of an adapter, by their names in ``network``, into its LoRA layers."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            network.get_parameter(name).copy_(tensor)
