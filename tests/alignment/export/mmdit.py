"""SD3's MMDiT as sd-scripts names it, and what a LoRA of those names adds to diffusers' transformer."""

import torch
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from torch import Tensor


def linears(depth: int, dual: tuple[int, ...] = ()) -> dict[str, tuple[float, float]]:
    """Linear layers of the MMDiT, with their outputs and inputs in units of its width.

    As in sd-scripts at 48d368f, library/sd3_models.py: ``MMDiT``, ``MMDiTBlock``, ``SingleDiTBlock``,
    ``AttentionLinears``, ``MLP``, ``UnPatch``, ``Embedder`` and ``TimestepEmbedding``. The last context block is
    ``pre_only``; blocks in ``dual`` have a second attention of the image's tokens.
    """
    found: dict[str, tuple[float, float]] = {
        "t_embedder.mlp.0": (1, 0),  # 0: a width of its own
        "t_embedder.mlp.2": (1, 1),
        "y_embedder.mlp.0": (1, 0),
        "y_embedder.mlp.2": (1, 1),
        "context_embedder": (1, 0),
        "final_layer.adaLN_modulation.1": (2, 1),
        "final_layer.linear": (0, 1),
    }
    for number in range(depth):
        for side in ("x_block", "context_block"):
            pre_only = side == "context_block" and number == depth - 1
            second = side == "x_block" and number in dual
            block = {"attn.qkv": (3, 1), "adaLN_modulation.1": (9 if second else 2 if pre_only else 6, 1)}
            block |= {} if pre_only else {"attn.proj": (1, 1), "mlp.fc1": (4, 1), "mlp.fc2": (1, 4)}
            block |= {"attn2.qkv": (3, 1), "attn2.proj": (1, 1)} if second else {}
            found |= {f"joint_blocks.{number}.{side}.{name}": size for name, size in block.items()}
    return found


def updates_of_sd3(transformer: torch.nn.Module, file: dict[str, Tensor]) -> dict[str, Tensor]:
    """What kohya's file adds to each parameter of diffusers' SD3 transformer: alpha / rank · up · down.

    Layers are found by the MMDiT's names, as sd-scripts and ComfyUI find them; every key must be used. Diffusers' own
    reader of single-file checkpoints puts the sums where they belong.
    """
    config, file = transformer.config, dict(file)
    width = config.num_attention_heads * config.attention_head_dim
    own = {
        "t_embedder.mlp.0": (width, 256),
        "y_embedder.mlp.0": (width, config.pooled_projection_dim),
        "context_embedder": (config.caption_projection_dim, config.joint_attention_dim),
        "final_layer.linear": (config.patch_size**2 * config.out_channels, width),
    }
    sizes = {
        n: own.get(n, (o * width, i * width))
        for n, (o, i) in linears(config.num_layers, config.dual_attention_layers).items()
    }
    state = {f"{name}.weight": torch.zeros(*size) for name, size in sizes.items()}
    state["x_embedder.proj.weight"] = torch.zeros(width, config.in_channels, config.patch_size, config.patch_size)
    for name, weight in state.items():
        key = f"lora_unet_{name.removesuffix('.weight').replace('.', '_')}"
        if f"{key}.alpha" in file:
            down, up = file.pop(f"{key}.lora_down.weight"), file.pop(f"{key}.lora_up.weight")
            scale = file.pop(f"{key}.alpha") / len(down)
            state[name] = scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    assert not file
    state |= {f"{name.removesuffix('weight')}bias": torch.zeros(len(weight)) for name, weight in state.items()}
    state["pos_embed"] = transformer.pos_embed.pos_embed * 0
    norms = {name: weight * 0 for name, weight in transformer.named_parameters() if ".norm_" in name}
    return norms | convert_sd3_transformer_checkpoint_to_diffusers(state)
