"""Names of the tensors in single-file checkpoints of Stable Diffusion 1.5.

They are those of the CompVis code, as listed in ``scripts/convert_diffusers_to_original_stable_diffusion.py`` of
diffusers.
"""

import re
from pathlib import Path

from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def replaced(name: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        name = name.replace(f".{new}.", f".{old}.")
    return name


def unet_name(name: str, layers: int) -> str:
    outside = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
    outside |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
    start, _, last = name.rpartition(".")
    if start in outside:
        return f"{outside[start]}.{last}"
    if found := re.match(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", name):
        place = 1 if found[1] == "attentions" else 2 * int(found[2])
        return replaced(f"middle_block.{place}.{found[3]}", RESNET if found[1] == "resnets" else {})
    half, level, kind, layer, rest = re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name).groups()
    down = half == "down"
    first = int(level) * (layers + 1) + down
    if kind == "downsamplers":
        return f"input_blocks.{first + layers}.0.{rest.replace('conv', 'op')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{{sampler}}.{rest}"
    block = f"{'input' if down else 'output'}_blocks.{first + int(layer)}.{int(kind == 'attentions')}.{rest}"
    return replaced(block, RESNET if kind == "resnets" else {})


def unet_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    state = unet.state_dict()
    found = {}
    for name, tensor in state.items():
        attended = f"{name.partition('.upsamplers')[0]}.attentions.0.norm.weight" in state
        found[unet_name(name, unet.config.layers_per_block).format(sampler=1 + attended)] = tensor
    return found


def vae_tensors(vae: AutoencoderKL) -> dict[str, Tensor]:
    levels, found = len(vae.config.block_out_channels), {}
    for name, tensor in vae.state_dict().items():
        old = replaced(name, {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut"})
        old = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", old)
        old = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", old)
        old = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", old)
        old = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", old)
        old = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", old)
        if "mid_block.attentions.0" in old:
            old = replaced(old.replace("mid_block.attentions.0", "mid.attn_1"), ATTENTION)
        matrix = "mid.attn_1" in old and tensor.ndim == 2  # a convolution there
        found[old] = tensor[..., None, None] if matrix else tensor
    return found


def write_sd15(path: Path, unet: UNet2DConditionModel, vae: AutoencoderKL, text: CLIPTextModel) -> None:
    """Write a checkpoint of SD1.5 as the CompVis code names it, with what such files hold beside the weights."""
    prefix = "cond_stage_model.transformer.text_model."
    words = {prefix + name.removeprefix("text_model."): tensor for name, tensor in text.state_dict().items()}
    every = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_tensors(unet).items()}
    every |= {f"first_stage_model.{name}": tensor for name, tensor in vae_tensors(vae).items()} | words
    every["betas"] = every["model.diffusion_model.out.2.bias"].clone()
    save_file({name: tensor.contiguous() for name, tensor in every.items()}, path)
