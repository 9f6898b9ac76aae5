"""Export of a trained adapter in the format of kohya's scripts, which ComfyUI and most other programs read.

The key of a weight is ``lora_unet_`` and the layer's name with ``_`` for ``.``. ``lora_down`` is A, ``lora_up`` is B.
Each layer has a scalar ``alpha``; programs that load the file scale B A by alpha / (rows of A).

Sources: U-Nets as in diffusers' ``convert_state_dict_to_kohya`` and ComfyUI's ``model_lora_keys_unet``. SD3 as in
sd-scripts (Apache-2.0, commit 48d368f): ``networks/lora_sd3.py`` puts the prefix before the layer names of the MMDiT in
``library/sd3_models.py``; ComfyUI reads these names too. This MMDiT has one layer for queries, keys and values, where
diffusers has three. The three adapters become one, with stacked A and block-diagonal B, as in sd-scripts'
``LoRANetwork.state_dict`` under ``split_qkv``. The joined A has three times the rows, so alpha is multiplied by three
here. Sd-scripts does not multiply alpha; its loader and ComfyUI then apply a third of the trained update.
"""

# Not diffusers' own ``convert_state_dict_to_kohya``: it has no names for SD3.
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentreward.export.lora import SD3, TrainedLoRA
from latentreward.storage.durable import replacing

FILE = "kohya_lora.safetensors"
"""Name of the exported file."""
PREFIX = "lora_unet_"
"""Beginning of every key in the exported file."""
DOWN, UP = ".lora_A.weight", ".lora_B.weight"
"""Endings of the names of A and B in peft."""
SD3_LAYERS = {
    "pos_embed.proj": "x_embedder.proj",
    "context_embedder": "context_embedder",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}
"""Name of a layer in diffusers' SD3 transformer → its name in sd-scripts' MMDiT; within a block, without the block."""
SD3_JOINED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
}
"""Name of an MMDiT layer → the layers of diffusers' SD3 transformer whose outputs, concatenated, are its output."""
SCALE_FIRST = ("norm_out.linear", "norm1_context.linear")
"""Layers that, if they output scale and shift only, output scale first in diffusers and shift first in the MMDiT."""

Pair = tuple[Tensor, Tensor]
"""A ``(rank, in)`` and B ``(out, rank)`` of a layer."""


def kohya_weights(lora: TrainedLoRA) -> dict[str, Tensor]:
    """Return the weights of ``lora`` under kohya's names, and an alpha for each layer."""
    layers = [name.removesuffix(DOWN) for name in lora.weights if name.endswith(DOWN)]
    pairs = {layer: (lora.weights[layer + DOWN], lora.weights[layer + UP]) for layer in layers}
    named = mmdit_parts(pairs) if lora.loader == SD3 else {layer: [pair] for layer, pair in pairs.items()}
    renamed: dict[str, Tensor] = {}
    for name, parts in named.items():
        key, (down, up) = PREFIX + name.replace(".", "_"), join(parts)
        alpha = float(lora.settings.alpha) * sum(part is not None for part in parts)
        renamed |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        renamed[f"{key}.alpha"] = torch.tensor(alpha, dtype=down.dtype)
    return renamed


def mmdit_parts(pairs: Mapping[str, Pair]) -> dict[str, list[Pair | None]]:
    """Group the adapters of diffusers' SD3 transformer by the layers of sd-scripts' MMDiT.

    Args:
        pairs: A and B by the layers' names in diffusers' SD3 transformer.

    Returns:
        For each MMDiT layer the A and B of its parts, in order: three parts (query, key, value) for a joined layer,
        else one. A part without a trained adapter is None.
    """
    found: dict[str, list[Pair | None]] = {}
    for layer, (down, up) in pairs.items():
        block, rest = "", layer
        if layer.startswith("transformer_blocks."):
            _, number, rest = layer.split(".", 2)
            block = f"joint_blocks.{number}."
        swapped = rest in SCALE_FIRST and len(up) == 2 * down.shape[1]
        pair = down, torch.cat(up.chunk(2)[::-1]) if swapped else up
        joined = next((name for name, layers in SD3_JOINED.items() if rest in layers), None)
        if joined is None:
            found[block + SD3_LAYERS[rest]] = [pair]
        else:
            layers = SD3_JOINED[joined]
            found.setdefault(block + joined, [None] * len(layers))[layers.index(rest)] = pair
    return found


def join(parts: Sequence[Pair | None]) -> Pair:
    """Join the adapters of a layer's parts, whose outputs are concatenated, to one A and one B."""
    given = [part for part in parts if part is not None]
    if len(parts) == 1:
        return given[0]
    untrained = given[0][1].new_zeros(len(given[0][1]), 0)
    ups = [untrained if part is None else part[1] for part in parts]
    return torch.cat([down for down, _ in given]), torch.block_diag(*ups)


def write_kohya(lora: TrainedLoRA, folder: Path) -> Path:
    """Write :data:`FILE` into ``folder`` atomically, and return its path."""
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora_sd3" if lora.loader == SD3 else "networks.lora",
        "ss_network_dim": str(lora.settings.rank),
        "ss_network_alpha": str(lora.settings.alpha),
    }
    with replacing(folder / FILE) as partial:
        save_file(kohya_weights(lora), partial, metadata)
    return folder / FILE
