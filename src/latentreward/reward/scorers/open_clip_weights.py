"""Conversion of OpenCLIP weights to a ``CLIPModel`` of transformers, which has other names and separate q, k and v."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from latentreward.core.errors import InputError, one_line

# Names are OpenCLIP's → transformers': beginnings within a block, whole names, and whole names of transposed matrices.
BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
}
TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
IN_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


def clip_model(tensors: Mapping[str, Tensor], origin: str, heads: int, dtype: torch.dtype) -> Any:
    """Build a ``CLIPModel`` from OpenCLIP weights, in evaluation mode and without gradients.

    All sizes but the number of heads, equal in both towers, are read from the weights. The conversion is exact for
    OpenCLIP models with GELU (not QuickGELU), a class token, and text pooled at the end token, such as ViT-H-14 of
    LAION-2B and HPSv2. Error messages name ``origin``, the source of the weights.

    Raises:
        InputError: If a tensor is missing, unknown or of another shape.
    """
    from transformers import CLIPModel

    try:
        converted = _renamed(tensors)
        with torch.device("meta"):
            model = CLIPModel(_config(tensors, heads))
        model.load_state_dict({name: value.to(dtype) for name, value in converted.items()}, assign=True)
    except (KeyError, ValueError, RuntimeError) as error:
        reason = one_line(error)[:200]
        raise InputError(f"weights: {origin} are not those of an OpenCLIP model with a ViT ({reason})") from error
    for tower in (model.text_model, model.vision_model):  # buffers that no state dict holds and that are still meta
        positions = tower.embeddings.position_embedding.weight
        tower.embeddings.position_ids = torch.arange(len(positions), device=positions.device).expand(1, -1)
    return model.eval().requires_grad_(False)


def _config(tensors: Mapping[str, Tensor], heads: int) -> Any:
    from transformers import CLIPConfig

    numbers: dict[str, set[str]] = {"": set(), "visual.": set()}
    for match in filter(None, map(IN_BLOCK.fullmatch, tensors)):
        numbers[match[1] or ""].add(match[2])
    embedding, patches = tensors["token_embedding.weight"], tensors["visual.conv1.weight"]
    width = tensors["visual.proj"].shape[1]
    tower = {"num_attention_heads": heads, "hidden_act": "gelu", "projection_dim": width}
    text = {
        "vocab_size": len(embedding),
        "hidden_size": embedding.shape[1],
        "intermediate_size": len(tensors["transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": len(numbers[""]),
        "max_position_embeddings": len(tensors["positional_embedding"]),
        "bos_token_id": len(embedding) - 2,
        "eos_token_id": len(embedding) - 1,  # OpenCLIP pools at the largest id
    }
    grid = round((len(tensors["visual.positional_embedding"]) - 1) ** 0.5)
    vision = {
        "hidden_size": len(patches),
        "intermediate_size": len(tensors["visual.transformer.resblocks.0.mlp.c_fc.bias"]),
        "num_hidden_layers": len(numbers["visual."]),
        "patch_size": patches.shape[-1],
        "image_size": grid * patches.shape[-1],
    }
    return CLIPConfig(text_config=text | tower, vision_config=vision | tower, projection_dim=width)


def _renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    converted: dict[str, Tensor] = {}
    for name, value in tensors.items():
        match = IN_BLOCK.fullmatch(name)
        tower, block, inner = match.groups("") if match else ("", "", "")
        layer = f"{'vision' if tower else 'text'}_model.encoder.layers.{block}."
        start = next((start for start in BLOCK if inner.startswith(start)), None)
        if name in WHOLE:
            converted[WHOLE[name]] = value
        elif name in TRANSPOSED:
            converted[TRANSPOSED[name]] = value.T.contiguous()
        elif start is not None:
            converted[layer + BLOCK[start] + inner.removeprefix(start)] = value
        elif packed := re.fullmatch(r"attn\.in_proj_(weight|bias)", inner):
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                converted[f"{layer}self_attn.{part}_proj.{packed[1]}"] = tensor.clone()
        elif name not in ("attn_mask", "logit_bias"):  # a buffer in old files, and a parameter that only SigLIP uses
            raise KeyError(f"{name} is unknown")
    return converted
