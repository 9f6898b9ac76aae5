"""LoRA adapters in PEFT's own files: ``adapter_config.json`` and ``adapter_model.safetensors``."""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from latentreward.backbones.tuning import PEFT_SETTINGS
from latentreward.errors import InputError
from latentreward.scoring.files import compare_tensors, existing_folder, read_config, read_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the network's own names."""
ADAPTER = "default"


def lora_layers(network: nn.Module) -> dict[str, Any]:
    """Layers of ``network`` that have the adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A
    }


def names_in_file(network: nn.Module) -> dict[str, str]:
    """Name in the file → name in the network, of every tensor of the adapter."""
    names = (name for name, _ in network.named_parameters() if ".lora_" in name and f".{ADAPTER}." in name)
    return {PREFIX + name.replace(f".{ADAPTER}.", "."): name for name in names}


def write_adapter(network: nn.Module, folder: Path, base: str) -> None:
    """Write the adapter of ``network`` into ``folder``, which is made; PEFT's ``from_pretrained`` reads it.

    Args:
        network: Has an adapter.
        folder: Where the two files go.
        base: Name of the base model, for readers.
    """
    folder.mkdir(parents=True)
    state = {
        name: network.get_parameter(own).detach().cpu().contiguous() for name, own in names_in_file(network).items()
    }
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(adapter_settings(network, base), indent=2) + "\n")


def adapter_settings(network: nn.Module, base: str) -> dict[str, Any]:
    """PEFT's settings of the adapter of ``network``, as its layers have them; few, so that any version reads them."""
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
    """Give ``network`` the adapter that the config in ``folder`` describes, not yet filled, in float32.

    Its tensors train; the rest of the network does not.

    Raises:
        InputError: If a file is missing or damaged, or no layer of the network fits.
    """
    from peft import LoraConfig, inject_adapter_in_model

    path = existing_folder(folder, CONFIG, WEIGHTS) / CONFIG
    settings = read_config(path)
    known = {name: settings[name] for name in PEFT_SETTINGS if settings.get(name) is not None}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            inject_adapter_in_model(LoraConfig(**known), network, ADAPTER)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError, re.error) as error:
        text = " ".join(str(error).split())
        raise InputError(f"cannot load {path}: {text}; is this the adapter of that network?") from error
    for name in names_in_file(network).values():
        weight = network.get_parameter(name)
        weight.data = weight.data.float()


def read_lora(folder: Path, network: nn.Module) -> dict[str, Tensor]:
    """Tensors of the adapter in ``folder``, by their names in ``network``, which has it.

    Raises:
        InputError: If the file is missing or damaged, or a tensor is missing, left over or of another shape.
    """
    path = existing_folder(folder, WEIGHTS) / WEIGHTS
    state = {name.removeprefix(PREFIX): tensor for name, tensor in read_safetensors(path).items()}
    own = {name.removeprefix(PREFIX): full for name, full in names_in_file(network).items()}
    compare_tensors({name: network.get_parameter(full) for name, full in own.items()}, state, path)
    return {own[name]: tensor for name, tensor in state.items()}


def fill_adapter(folder: Path, network: nn.Module) -> None:
    """Load the adapter in ``folder`` into ``network``, which has it; see :func:`read_lora`."""
    with torch.no_grad():
        for name, tensor in read_lora(folder, network).items():
            network.get_parameter(name).copy_(tensor)
