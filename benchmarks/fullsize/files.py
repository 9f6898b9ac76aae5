"""Files that the jobs of ``make fullsize`` read: pipelines with random weights, and pairs of the tiny world.

Usage: ``python files.py GROUP FOLDER [--tiny]``
"""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from random_pipelines import write_weights

from latentreward.apps.estimate.pipelines import CLIP_MODELS, PIPELINES, write_pipelines
from latentreward.tinyworld.writers import write_hpdv3, write_pickapic

Parts = Mapping[str, Mapping[str, Any]]
FEW_T5 = {"text_encoder_3": {"num_layers": 1}}
FULL: dict[str, tuple[str, Parts]] = {
    "sd15": ("sd15", {}),
    "sdxl": ("sdxl", {}),
    "sdxl_cut": (
        "sdxl",
        {
            "unet": {"transformer_layers_per_block": (1, 1, 1)},
            "text_encoder": {"num_hidden_layers": 2},
            "text_encoder_2": {"num_hidden_layers": 2},
        },
    ),
    "sd35_t5": ("sd35", {}),
    "sd35": ("sd35", FEW_T5),
    "z_image": ("z-image", {"transformer": {"n_layers": 15}, "text_encoder": {"num_hidden_layers": 2}}),
}
"""Group → published pipeline, and the entries of its parts' configs that are cut."""
_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
_VAE = {"block_out_channels": (32,) * 4}
TINY: dict[str, Parts] = {
    "sd15": {
        "unet": {"block_out_channels": (32,) * 4, "cross_attention_dim": 32, "sample_size": 8},
        "vae": _VAE,
        "text_encoder": _CLIP,
    },
    "sdxl": {
        "unet": {
            "block_out_channels": (32,) * 3,
            "cross_attention_dim": 64,
            "sample_size": 8,
            "attention_head_dim": (2, 2, 2),
            "transformer_layers_per_block": (1, 1, 1),
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 32 + 6 * 8,
        },
        "vae": _VAE,
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
    },
    "sd35": {
        "transformer": {
            "sample_size": 16,
            "num_layers": 13,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 64,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 16,
        },
        "vae": _VAE,
        "text_encoder": _CLIP,
        "text_encoder_2": _CLIP,
        "text_encoder_3": {"d_model": 64, "d_kv": 8, "d_ff": 128, "num_layers": 1, "num_heads": 2},
    },
    "z-image": {
        "transformer": {
            "dim": 32,
            "n_heads": 2,
            "n_kv_heads": 2,
            "n_refiner_layers": 1,
            "cap_feat_dim": 32,
            "axes_dims": (4, 6, 6),
        },
        "vae": _VAE,
        "text_encoder": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
        },
    },
}
"""Published pipeline → entries of its parts' configs that make it tiny."""
PAIRS = {"train": 24, "test": 4}


def write_group(group: str, folder: Path, tiny: bool) -> None:
    """Write the pipeline ``group``, and for SD1.5 the text projection of CLIP-L, into ``folder``."""
    base, cut = FULL[group]
    changes = [cut, TINY[base] if tiny else {}]
    parts = {
        part: {**config, **{name: value for change in changes for name, value in change.get(part, {}).items()}}
        for part, config in PIPELINES[base].items()
    }
    width = parts["text_encoder"]["hidden_size"]
    clip = [] if base != "sd15" else ["clip_l"]
    write_pipelines(folder, {group: parts}, clip)
    write_weights(folder / group, torch.float32 if base == "sd15" else torch.bfloat16)
    if clip:
        config = {**CLIP_MODELS["clip_l"], "text_config": parts["text_encoder"], "projection_dim": width}
        (folder / "clip_l" / "config.json").write_text(json.dumps(config))
        matrix = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) / width**0.5
        save_file({"text_projection.weight": matrix}, folder / "clip_l" / "model.safetensors")


def write_data(folder: Path) -> None:
    """Write pairs of pictures in the layouts of Pick-a-Pic and HPDv3, a list of pictures, and prompts."""
    splits = {"train": PAIRS["train"], "validation_unique": PAIRS["test"], "test_unique": PAIRS["test"]}
    write_pickapic(folder / "pickapic", splits)
    write_hpdv3(folder / "hpdv3", PAIRS)
    gaps = "1,1,1\n" * PAIRS["train"]
    (folder / "gaps.csv").write_text(f"aesthetic_gap,clipscore_gap,vqascore_gap\n{gaps}")
    rows = json.loads((folder / "hpdv3" / "test.json").read_text())
    pictures = "".join(f'{row["path1"]},"{row["prompt"]}"\n' for row in rows)
    (folder / "hpdv3" / "images.csv").write_text(f"image,prompt\n{pictures}")
    (folder / "prompts.txt").write_text("".join(f"{row['prompt']}\n" for row in rows))


def main() -> None:
    """Write a group's files; one that was left unfinished is written anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=FULL)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if not (data := options.folder / "data").is_dir():
        shutil.rmtree(partial := options.folder / "data.partial", ignore_errors=True)
        write_data(partial)
        partial.rename(data)
    shutil.rmtree(partial := options.folder / f"{options.group}.partial", ignore_errors=True)
    write_group(options.group, partial, options.tiny)
    partial.rename(options.folder / options.group)


if __name__ == "__main__":
    main()
