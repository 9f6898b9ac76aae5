"""A trained adapter under the names of kohya's scripts, which ComfyUI and most other programs read.

A key is a prefix and the layer's diffusers name with ``_`` for ``.``; ``lora_down`` is A, ``lora_up`` is B, and a
scalar ``alpha`` for each layer scales them by alpha / rank.

Sources: U-Nets as in diffusers' ``convert_state_dict_to_kohya`` and ComfyUI's ``model_lora_keys_unet``
(``lora_unet_``); SD3 under the prefix that ComfyUI's ``comfy/lora.py`` takes from OneTrainer (``lora_transformer_``).
"""

# Why our own conversion: diffusers' ``convert_state_dict_to_kohya`` has no names for SD3.
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentreward.export.lora import TrainedLoRA
from latentreward.storage.durable import replacing

FILE = "kohya_lora.safetensors"
SIDES = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}


def kohya_weights(lora: TrainedLoRA) -> dict[str, Tensor]:
    """Its weights under kohya's names, with their alphas."""
    renamed = {}
    for name, weight in lora.weights.items():
        layer, side = next((name.removesuffix(end), new) for end, new in SIDES.items() if name.endswith(end))
        key = f"lora_{lora.part}_{layer.replace('.', '_')}"
        renamed[key + side] = weight
        renamed[f"{key}.alpha"] = torch.tensor(float(lora.settings.alpha), dtype=weight.dtype)
    return renamed


def write_kohya(lora: TrainedLoRA, folder: Path) -> Path:
    """Write :data:`FILE` into ``folder``; it stands there whole or not at all."""
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(lora.settings.rank),
        "ss_network_alpha": str(lora.settings.alpha),
    }
    with replacing(folder / FILE) as partial:
        save_file(kohya_weights(lora), partial, metadata)
    return folder / FILE
