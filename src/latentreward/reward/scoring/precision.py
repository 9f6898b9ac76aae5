"""Backbones whose matrix products are computed in bfloat16, as scores need them: all else stays float32."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
EXACT = re.compile(
    r"(^|\.)(time_\w+|[tp]_embedder|add_embedding|\w+_modulation(_\w+)?|(img|txt)_mod|norm(\d|_out)?(_context)?"
    r"|distilled_guidance_layer|pos_embed|(all_)?x_embedder|patch_embedding|img_in|context_embedder|cap_embedder"
    r"|text_embedder|text_proj|txt_in|caption_projection|projector|t_embedding|adaln_proj|input_proj|llm_cond_proj"
    r")(\.|$)"
)
"""Names of layers that stay float32: those of time embedding and modulation, which are cheap (one vector per image) and
affect all tokens, and a transformer's patch and text embeddings."""
ATTENTION = re.compile(r"(?<!\.block\.attn1)\.(to_[qkv]|to_qkv_mlp_proj|add_[qkv]_proj)(\.|$)")
"""Names of query, key and value layers; on an accelerator their outputs stay bfloat16, which fused attention takes.

HiDream's attention gives queries and keys the type of the residual stream, so its values must have it too.
"""
ATTENTION_NORM = re.compile(r"\.norm_(added_)?[qk]$")  # names of the norms of queries and keys


def product_weights(network: nn.Module) -> set[int]:
    """Return the ids of the tensors that :func:`halve_products` converts to bfloat16."""
    return {
        id(tensor)
        for name, module in network.named_modules()
        if is_halved(name, module)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if tensor.is_floating_point()
    }


def is_halved(name: str, module: nn.Module) -> bool:
    """Tell whether :func:`halve_products` converts a layer to bfloat16."""
    return isinstance(module, PRODUCTS) and not EXACT.search(name)


def halve_products(network: nn.Module) -> None:
    """Convert the linear and convolution layers of ``network`` to bfloat16 and all else to float32, in place.

    Hooks cast the input of each converted layer to bfloat16 and its output to float32. Layers with names in
    :data:`EXACT` stay float32. Attention is computed in float32 on a CPU, and in bfloat16 on an accelerator.
    """
    halved = product_weights(network)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.bfloat16 if id(tensor) in halved else torch.float32)
    for name, module in network.named_modules():
        if is_halved(name, module):
            module.register_forward_pre_hook(partial(_cast_input, torch.bfloat16))
            elsewhere = None if ATTENTION.search(name) else torch.float32
            module.register_forward_hook(partial(_cast_output, torch.float32, elsewhere))
        elif isinstance(module, PRODUCTS):
            module.register_forward_pre_hook(partial(_cast_input, torch.float32))
        elif ATTENTION_NORM.search(name):
            module.register_forward_hook(partial(_cast_output, None, torch.bfloat16))


def _cast_input(dtype: torch.dtype, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].to(dtype), *inputs[1:]


def _cast_output(
    on_cpu: torch.dtype | None, elsewhere: torch.dtype | None, module: nn.Module, inputs: Any, output: Tensor
) -> Tensor:
    """Cast the output of a layer to the dtype for its device; None leaves it as it is."""
    dtype = on_cpu if output.device.type == "cpu" else elsewhere
    return output if dtype is None else output.to(dtype)
