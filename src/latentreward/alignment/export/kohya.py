"""Export of a trained adapter in the format of kohya's scripts, which ComfyUI and most other programs read.

The key of a weight is ``lora_unet_`` and the layer's name with ``_`` for ``.``. ``lora_down`` is A, ``lora_up`` is B.
Each layer has a scalar ``alpha``; programs that load the file scale B A by alpha / (rows of A).

Names of layers are those of the policy's family. Where the programs have one layer for several of diffusers', the
adapters become one, with stacked A and block-diagonal B. The joined A has more rows, so alpha is multiplied by the
number of parts here. Sd-scripts does not multiply alpha; its loader and ComfyUI then apply a part of the update.
"""

# Not diffusers' own ``convert_state_dict_to_kohya``: it has no names for SD3 and Wan.
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from latentreward.alignment.export.lora import TrainedLoRA, sort_metadata
from latentreward.core.storage.durable import replacing
from latentreward.diffusion.families.base import Pair

FILE = "kohya_lora.safetensors"  # name of the exported file
PREFIX = "lora_unet_"  # beginning of every key in the exported file


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
    weights: dict[str, Tensor] = {}
    for name, parts in lora.family.kohya_layers(lora.pairs).items():  # before the folder is made: it may have no names
        key, (down, up) = PREFIX + name.replace(".", "_"), join(parts)
        alpha = float(lora.settings.alpha) * sum(part is not None for part in parts)
        weights |= {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}
        weights[f"{key}.alpha"] = torch.tensor(alpha, dtype=down.dtype)
    metadata = {
        "format": "pt",
        "ss_network_module": lora.family.kohya_module,
        "ss_network_dim": str(lora.settings.rank),
        "ss_network_alpha": str(lora.settings.alpha),
    }
    with replacing(folder / FILE) as partial:
        save_file(weights, partial, metadata)
        sort_metadata(partial)
    return folder / FILE
